"""Rank k: our solvers against SciPy's ARPACK, torch's randomised SVDs and the full SVD.

Every solver gets the cheapest of its settings that reaches the same error of the rank-k direction,
|U_k V_k^T - exact|_F / sqrt(k), on --seeds seeds; these settings then race on the same. Cases:

  gaussian   a square Gaussian matrix, Table 2 of the paper
  power_law  3072x768 of singular values i^-0.7, from cold starts
  momentum   matrices that an optimizer had at consecutive steps, from warm starts, against
             Newton-Schulz; read from Lightning checkpoints

  python -m experiments.bench topk --checkpoints logs/*/checkpoints/*.ckpt --json topk.json

The whole takes tens of minutes on a few CPU cores; choose by --cases, --k and --size.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.bench import gpu_peers, polar, race, recorded
from lit_fanions import lmo
from lit_fanions.cli import console
from lit_fanions.lmo import Triplets

CASES = ("gaussian", "power_law", "momentum")
ARPACK, FULL, LOW_RANK, PCA = "SciPy ARPACK", "torch svd", "torch svd_lowrank", "torch pca_lowrank"
OURS = "ours: "
AUTO, CUPY, LANCZOS = f"{OURS}auto", f"{OURS}cupy", f"{OURS}lanczos"
RANDOMIZED, POWER = f"{OURS}randomized", f"{OURS}power"
# Table 2 of the paper, 5000x5000, rtol .01: seconds by k. What raced there against the others was
# CuPy's thick-restart Lanczos; here it is that on a GPU and ARPACK on a CPU.
PAPER_SVDS = {1: 0.18, 10: 0.47, 100: 1.96}
PAPER = {POWER: {1: 7.7}, PCA: {1: 1.15, 10: 19.4, 100: 170.0}}
# Settings from the cheapest up.
_ARPACK_TOLERANCES = (
    *(0.8, 0.5, 0.3, 0.2, 0.15, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02, 0.015, 0.01),
    *(7e-3, 5e-3, 3e-3, 2e-3, 1e-3),
)
_TOLERANCES = (
    *(0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.015, 0.01, 7e-3, 5e-3, 3e-3, 2e-3, 1.5e-3),
    *(1e-3, 7e-4, 5e-4, 3e-4, 2e-4, 1.5e-4, 1e-4),
)
_POWER_STEPS = (4, 16, 64, 256, 1024, 4096)
# With the first of these tolerances iterations may be made in bfloat16, with the second not.
_PRECISIONS = (1e-2, 1e-3)
_SEEDS = 5
# The exact solver is no match for the others above this, and would only take time.
_EXACT_SIZE = 1024
# Recorded matrices are at least this large.
_LEAST, _QUICK_LEAST = 128, 8
_ERROR_NOTE = "error: |U V^T - exact|_F / sqrt(k), the worst of all runs"
_PAPER_NOTE = (
    "paper: 5000x5000, rtol .01, on a GPU; its SVDS is CuPy's thick-restart Lanczos, whose time "
    "stands beside what the others are compared with here"
)
_NO_CHECKPOINTS = (
    "recorded momentum: left out. Record some consecutive steps with ModelCheckpoint"
    "(every_n_train_steps=1, save_top_k=-1) and name the files with --checkpoints"
)
_NO_CUPY = 'CuPy: left out; install it by pip install "lit-fanions[cuda12]" (or cuda13)'


@dataclasses.dataclass(frozen=True)
class Case:
    """A matrix of which the leading triplets are wanted.

    Args:
        name: Its name in CASES.
        title: In words.
        matrix: The matrix, float32.
        ranks: Numbers of triplets.
        widths: From k, the widths of the blocks that randomised solvers try.
        iterations: Their numbers of iterations.
        with_pca: Whether torch.pca_lowrank competes.
        references: Solvers of which the fastest is what the others are compared with.
    """

    name: str
    title: str
    matrix: Tensor
    ranks: Sequence[int]
    widths: Callable[[int], Sequence[int]]
    iterations: Sequence[int]
    with_pca: bool
    references: Sequence[str]


class Solver(NamedTuple):
    """A competitor.

    Attributes:
        levels: Its settings, from the cheapest up.
        ordered: Whether the error falls from each to the next.
        random: Whether seeds matter.
    """

    levels: Sequence[race.Level]
    ordered: bool = False
    random: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, metavar="CASE", help="some of the cases only"
    )
    add_search(parser)
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="Lightning checkpoints of consecutive steps, for recorded momentum",
    )
    race.add_arguments(parser)


def add_search(parser: argparse.ArgumentParser, budget: float = 60.0, seeds: int = _SEEDS) -> None:
    """Add the options of the search for settings.

    Args:
        parser: Of the command.
        budget: Seconds by default.
        seeds: Their default number.
    """
    parser.add_argument(
        "--k", nargs="+", type=race.whole, metavar="K", help="ranks, instead of each case's own"
    )
    parser.add_argument(
        "--size",
        type=race.whole,
        metavar="N",
        help="rows and columns of the Gaussian matrix (default: 5000, with --quick 96)",
    )
    parser.add_argument(
        "--error",
        type=race.positive,
        default=0.01,
        metavar="E",
        help="error to reach (default: 0.01)",
    )
    parser.add_argument(
        "--budget",
        type=race.positive,
        default=budget,
        metavar="SECONDS",
        help="to look for the setting of each solver and k, and again to race it "
        f"(default: {budget:g})",
    )
    parser.add_argument(
        "--seeds",
        type=race.whole,
        default=seeds,
        metavar="N",
        help=f"on which a setting has to reach it (default: {seeds})",
    )


def run(options: argparse.Namespace) -> console.Report:
    """Race the solvers.

    Args:
        options: Those of ``add_arguments``.

    Raises:
        Refused: If a package is missing, or k or a checkpoint is not possible.
    """
    chosen = options.cases or CASES[: 3 if options.checkpoints else 2]
    matrices = cases(options, chosen)
    on_gpu = options.device.type == "cuda"
    compares_cupy = on_gpu and gpu_peers.available()
    packages: tuple[str, ...] = ()
    if matrices and (compares_cupy or not on_gpu):
        packages = ("cupy",) if on_gpu else ("scipy", "numpy")
    products = _products(options.device, chosen)
    facts = race.conditions(options, products, *packages)
    notes = race.notes(options, products, *packages)
    sequences = _sequences(options) if "momentum" in chosen else {}

    tables, panels, results, peers = [], [], [], []
    for case in matrices:
        results += (entries := race_case(case, exact(case.matrix, max(case.ranks)), options))
        tables.append(table(case, entries, options.error))
        panels += [_panel(case, k, entries) for k in case.ranks]
        if case.name == "gaussian" and compares_cupy:
            peers = gpu_peers.compare(case.matrix, case.ranks, options.repeats)
            tables.append(gpu_peers.table(peers))
    momentum = recorded.race_all(sequences, _recorded_ranks(options), options)
    if momentum:
        tables.append(recorded.table(momentum))
        panels += recorded.panels(momentum)

    first, *more = tables
    rules = lmo.rules()
    return console.Report(
        title=first.title,
        columns=first.columns,
        rows=first.rows,
        notes=[
            *([_ERROR_NOTE] if matrices else []),
            *([_PAPER_NOTE] if "gaussian" in chosen else []),
            *([] if options.checkpoints else [_NO_CHECKPOINTS]),
            *([_NO_CUPY] if on_gpu and not compares_cupy else []),
            *notes,
            "",
            'what "auto" chooses:',
            console.table(["condition", "choice"], rules),
        ],
        data={
            **facts,
            "goal": options.error,
            "budget": options.budget,
            "results": results,
            "momentum": momentum,
            "cupy": peers,
            "rules": rules,
        },
        more=more,
        panels=panels,
    )


def cases(options: argparse.Namespace, chosen: Sequence[str]) -> list[Case]:
    """Return the cases of these names that are matrices made here.

    Args:
        options: Those of ``add_arguments``.
        chosen: The names.

    Raises:
        Refused: If a rank is too large.
    """
    made = [make(options) for name, make in _MAKE.items() if name in chosen]
    for case in made:
        limit = min(case.matrix.shape)
        if max(case.ranks) >= limit:
            raise console.Refused(
                f"k = {max(case.ranks)} is too large for {case.title}: give --k below {limit}"
            )
    return made


def rank_k_error(found: Triplets, exact: Triplets, k: int) -> float:
    """Return |U V^T - U* V*^T|_F / sqrt(k) of the k leading triplets, from products of k columns.

    Args:
        found: k triplets; their vectors need not be orthonormal.
        exact: At least k triplets in float64.
        k: How many.
    """
    u, vh = found.U.double(), found.Vh.double()
    own = ((u.mT @ u) * (vh @ vh.mT)).sum()
    common = ((exact.U[:, :k].mT @ u) * (exact.Vh[:k] @ vh.mT)).sum()
    square = float(own - 2 * common) / k + 1
    return math.inf if math.isnan(square) else math.sqrt(max(0.0, square))


def sigma_error(found: Triplets, exact: Triplets, k: int) -> float:
    """Return the largest relative error of the k leading singular values.

    Args:
        found: k triplets.
        exact: At least k triplets in float64.
        k: How many.
    """
    s = exact.S[:k]
    own = found.S.double().sort(descending=True).values
    return float(((own - s).abs() / s).max().nan_to_num(math.inf))


def solvers(case: Case, k: int) -> dict[str, Solver]:
    """Return the competitors for k triplets of a case by name."""
    m = case.matrix
    limit = min(m.shape)
    blocks = sorted(
        {(min(q, limit), n) for q in case.widths(k) for n in case.iterations if q >= k},
        key=lambda block: _flops(m, *block),
    )
    on_gpu = m.device.type == "cuda"
    competitors: dict[str, Solver] = {}
    if not on_gpu:
        competitors[ARPACK] = Solver([_arpack(m, k, tol) for tol in _ARPACK_TOLERANCES], True)
    competitors[FULL] = Solver([race.Level("", lambda seed: _svd(m, k))], random=False)
    competitors[LOW_RANK] = Solver([_low_rank(torch.svd_lowrank, m, k, *b) for b in blocks])
    if case.with_pca:
        competitors[PCA] = Solver([_low_rank(_pca_lowrank, m, k, *b) for b in blocks])
    competitors[AUTO] = Solver([_ours(m, k, "auto", tol=tol) for tol in _TOLERANCES], True)
    competitors[LANCZOS] = Solver([_ours(m, k, "lanczos", tol=tol) for tol in _TOLERANCES], True)
    competitors[RANDOMIZED] = Solver(
        [
            _ours(m, k, "randomized", _flops(m, q, n), oversampling=q - k, solver_steps=n, tol=tol)
            for q, n in blocks
            for tol in _PRECISIONS
        ]
    )
    competitors[POWER] = Solver(
        [
            _ours(m, k, "power", steps, solver_steps=steps, tol=_PRECISIONS[-1])
            for steps in _POWER_STEPS
        ],
        ordered=True,
    )
    if limit <= _EXACT_SIZE:
        competitors[f"{OURS}exact"] = Solver([_ours(m, k, "exact")], random=False)
    if on_gpu and gpu_peers.available():
        competitors[CUPY] = Solver([_ours(m, k, "cupy", tol=tol) for tol in _TOLERANCES], True)
    return competitors


def _gaussian(options: argparse.Namespace) -> Case:
    size = options.size or (96 if options.quick else 5000)
    return Case(
        name="gaussian",
        title=f"Gaussian {size}x{size}, as in Table 2 of the paper",
        matrix=polar.gaussian((size, size)).to(options.device),
        ranks=options.k or ((1, 4) if options.quick else (1, 10, 100)),
        widths=lambda k: (k + 8, 2 * k + 8, 4 * k + 32),
        iterations=(8, 16, 32, 64, 128, 256),
        with_pca=True,
        references=(ARPACK if options.device.type == "cpu" else CUPY,),
    )


def _power_law(options: argparse.Namespace) -> Case:
    shape = (96, 64) if options.quick else (3072, 768)
    return Case(
        name="power_law",
        title=f"{polar.shape_text(shape)} of singular values i^-0.7",
        matrix=polar.power_law(shape).to(options.device),
        ranks=options.k or ((1, 4) if options.quick else (1, 8, 32, 128)),
        widths=lambda k: (k + 2, k + 8, 2 * k, 2 * k + 8),
        iterations=(1, 2, 3, 4, 6, 8, 12),
        with_pca=False,
        references=(ARPACK, LOW_RANK, FULL),
    )


_MAKE = {"gaussian": _gaussian, "power_law": _power_law}


def _products(device: torch.device, chosen: Sequence[str]) -> dict[str, str]:
    coarse = {"the search of our lanczos on large ones": "bfloat16"}
    return {
        "the solvers of rank k": "float32",
        **(coarse if polar.multiplies_bf16(device) else {}),
        **({polar.TORCH: "bfloat16"} if "momentum" in chosen else {}),
    }


def _recorded_ranks(options: argparse.Namespace) -> Sequence[int]:
    return options.k or ((2, 4) if options.quick else (8, 32))


def _sequences(options: argparse.Namespace) -> dict[str, list[Tensor]]:
    if not options.checkpoints:
        raise console.Refused("--cases momentum needs --checkpoints")
    least = max(_QUICK_LEAST if options.quick else _LEAST, max(_recorded_ranks(options)) + 1)
    momenta = recorded.momenta(options.checkpoints)
    return recorded.choose(momenta, least)


def exact(m: Tensor, k: int) -> Triplets:
    """Return the k leading triplets in float64.

    Of a large matrix they come from its Gram matrix, in a tenth of the time of the SVD. That
    squares the condition number, but the leading singular values of the large cases are all of the
    size of the first: the vectors are right to about 1e-11.

    Args:
        m: A matrix.
        k: How many.
    """
    m = m.double()
    if min(m.shape) <= _EXACT_SIZE:
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        return Triplets(u[:, :k], s[:k], vh[:k])
    print(f"float64 reference of {polar.shape_text(m.shape)}: some seconds", file=sys.stderr)
    rows, cols = m.shape
    if rows < cols:
        u, s, vh = exact(m.mT, k)
        return Triplets(vh.mT, s, u.mT)
    gram = m.mT @ m
    if m.device.type == "cpu":  # where torch cannot leave the others out
        last = (cols - k, cols - 1)
        _, found = console.require("scipy.linalg", "this race").eigh(
            gram.numpy(), subset_by_index=last
        )
        v = torch.from_numpy(found).flip(-1)
    else:
        v = torch.linalg.eigh(gram).eigenvectors[:, -k:].flip(-1)
    u = m @ v
    s = torch.linalg.vector_norm(u, dim=0)
    return Triplets(u / s, s, v.mT)


def _arpack(m: Tensor, k: int, tol: float) -> race.Level:
    linalg, numpy = (
        console.require(name, "this race") for name in ("scipy.sparse.linalg", "numpy")
    )
    matrix = m.numpy()

    def solve(seed: int) -> Triplets:
        start = numpy.random.default_rng(seed).standard_normal(min(m.shape))
        found = linalg.svds(matrix, k, tol=tol, v0=start.astype(matrix.dtype), solver="arpack")
        return Triplets(*(torch.from_numpy(part.copy()) for part in found))

    return race.Level(f"tol {tol:g}", solve)


def _svd(m: Tensor, k: int) -> Triplets:
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return Triplets(u[:, :k], s[:k], vh[:k])


def _low_rank(
    function: Callable[..., tuple[Tensor, Tensor, Tensor]], m: Tensor, k: int, q: int, niter: int
) -> race.Level:
    def solve(seed: int) -> Triplets:
        torch.manual_seed(seed)
        u, s, v = function(m, q=q, niter=niter)
        return Triplets(u[:, :k], s[:k], v.mT[:k])

    return race.Level(f"q {q}, niter {niter}", solve, _flops(m, q, niter))


def _pca_lowrank(m: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.pca_lowrank(m, q=q, center=False, niter=niter)


def _flops(m: Tensor, q: int, iterations: int) -> int:
    """Of a randomised SVD, but for a factor: products with m, and factorisations of blocks."""
    rows, cols = m.shape
    return (iterations + 1) * (2 * rows * cols * q + (rows + cols) * q * q)


def _ours(m: Tensor, k: int, solver: lmo.Solver, cost: float = 1.0, **options: Any) -> race.Level:
    def solve(seed: int) -> Triplets:
        generator = torch.Generator().manual_seed(seed)
        return lmo.top_singular(m, k, solver=solver, generator=generator, **options)

    words = {"tol": "tol", "solver_steps": "steps", "oversampling": "oversampling"}
    setting = ", ".join(f"{words[name]} {value:g}" for name, value in options.items())
    return race.Level(setting, solve, cost)


def race_case(
    case: Case,
    reference: Triplets,
    options: argparse.Namespace,
    only: Container[str] | None = None,
) -> list[dict[str, Any]]:
    """Choose everybody's setting for every rank, then let those that reach the error race.

    Args:
        case: The matrix.
        reference: What is compared with, see ``exact``: as many triplets as the largest rank.
        options: Those of ``add_search`` and ``race.add_turns``.
        only: The names of the competitors; None for all.

    Returns:
        For every rank and competitor its setting, errors and seconds, and those of all the
        settings that were tried.
    """
    return [entry for k in case.ranks for entry in _race(case, reference, k, options, only)]


def _race(
    case: Case,
    truth: Triplets,
    k: int,
    options: argparse.Namespace,
    only: Container[str] | None,
) -> list[dict[str, Any]]:
    print(f"{case.title}, k = {k}: choosing settings, then racing", file=sys.stderr)

    def error(found: Triplets) -> float:
        return rank_k_error(found, truth, k)

    competitors = {
        name: solver for name, solver in solvers(case, k).items() if only is None or name in only
    }
    trials: dict[str, race.Trial] = {}
    tried: dict[str, list[dict[str, Any]]] = {name: [] for name in competitors}
    for name, solver in competitors.items():

        def note(level: race.Level, seed: int, seconds: float, found: Triplets) -> None:
            attempt = {"setting": level.setting, "seed": seed, "seconds": seconds}
            errors = {"error": error(found), "sigma_error": sigma_error(found, truth, k)}
            tried[name].append({**attempt, **errors})  # noqa: B023

        trials[name] = race.cheapest(
            solver.levels,
            error,
            goal=options.error,
            seeds=options.seeds if solver.random else 1,
            budget=options.budget,
            device=options.device,
            ordered=solver.ordered,
            watch=note,
        )
    errors = {name: [trial.error] for name, trial in trials.items()}
    seconds = race.take_turns(
        {
            name: trial.turn
            for name, trial in trials.items()
            # What takes the whole budget is not run again: its trial says enough.
            if trial.reached and trial.seconds * (options.repeats + 1) <= options.budget
        },
        repeats=options.repeats,
        device=options.device,
        watch=lambda name, found: errors[name].append(error(found)),
    )
    medians = {name: trial.seconds for name, trial in trials.items() if trial.reached}
    medians |= race.medians(seconds)
    reference = _least(medians, case.references)
    best = _least(medians, [name for name in medians if name.startswith(OURS) and name != AUTO])
    return [
        {
            "case": case.name,
            "k": k,
            "solver": name,
            "setting": trial.level.setting,
            "reached": trial.reached,
            "seeds": trial.seeds,
            "seeds_wanted": options.seeds if competitors[name].random else 1,
            "error": max(errors[name]),
            "seconds": seconds.get(name, [trial.seconds]),
            "median_seconds": medians.get(name, trial.seconds),
            "ratio_to_reference": _ratio(medians.get(name), reference),
            "ratio_to_best_of_ours": (
                _ratio(medians.get(name), best) if name.startswith(OURS) else None
            ),
            "tried": tried[name],
        }
        for name, trial in trials.items()
    ]


def _least(medians: Mapping[str, float], names: Sequence[str]) -> float | None:
    return min((medians[name] for name in names if name in medians), default=None)


def _ratio(seconds: float | None, reference: float | None) -> float | None:
    return None if seconds is None or reference is None else seconds / reference


def table(case: Case, entries: Sequence[Mapping[str, Any]], goal: float) -> console.Table:
    """Return the entries of ``race_case`` as a table, the paper's seconds beside the Gaussian's."""
    with_paper = case.name == "gaussian"
    reference = case.references[0] if len(case.references) == 1 else "best of theirs"
    columns = ["k", "solver", "setting", "ms", "error", f"x {reference}"]
    return console.Table(
        f"{case.title}: error at most {goal:g}",
        [*columns, "x best of ours", *(["paper s", "x its SVDS"] if with_paper else [])],
        [_row(case, entry) + (_paper(case, entry) if with_paper else []) for entry in entries],
    )


def _row(case: Case, entry: Mapping[str, Any]) -> list[object]:
    # The budget may end before all seeds are tried; what fails is not tried on more.
    fewer = entry["reached"] and entry["seeds"] < entry["seeds_wanted"]
    tried = f"(seeds tried: {entry['seeds']} of {entry['seeds_wanted']})"
    return [
        entry["k"],
        entry["solver"],
        f"{entry['setting']} {tried}".strip() if fewer else entry["setting"],
        1e3 * entry["median_seconds"],
        entry["error"],
        _shown(entry["ratio_to_reference"]) if entry["reached"] else "not reached",
        _shown(entry["ratio_to_best_of_ours"]),
    ]


def _paper(case: Case, entry: Mapping[str, Any]) -> list[object]:
    """The paper's seconds of this solver, and their ratio to those of its SVDS."""
    solver, k = entry["solver"], entry["k"]
    seconds = (PAPER_SVDS if solver in case.references else PAPER.get(solver, {})).get(k)
    return [_shown(seconds), _shown(_ratio(seconds, PAPER_SVDS.get(k)))]


def _shown(value: float | None) -> object:
    return "" if value is None else value


def _panel(case: Case, k: int, entries: Sequence[Mapping[str, Any]]) -> console.Panel:
    bars = {}
    for entry in entries:
        if entry["k"] == k:
            label = entry["solver"] + ("" if entry["reached"] else " (not reached)")
            bars[label] = 1e3 * entry["median_seconds"]
    return console.Panel(f"{case.name}, k = {k}", "ms", bars)
