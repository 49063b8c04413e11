"""The race of rank-k solvers: matrices, competitors, their errors, and who reaches one how fast."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.bench import gpu_peers, polar, race
from lit_fanions import lmo
from lit_fanions.cli import console
from lit_fanions.lmo import Triplets

ARPACK, FULL, LOW_RANK, PCA = "SciPy ARPACK", "torch svd", "torch svd_lowrank", "torch pca_lowrank"
OURS = "ours: "
AUTO, CUPY, LANCZOS = f"{OURS}auto", f"{OURS}cupy", f"{OURS}lanczos"
RANDOMIZED, POWER, EXACT = f"{OURS}randomized", f"{OURS}power", f"{OURS}exact"

# Settings of each solver, from the cheapest up.
_ARPACK_TOLERANCES = (
    *(0.8, 0.5, 0.3, 0.2, 0.15, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02, 0.015, 0.01),
    *(7e-3, 5e-3, 3e-3, 2e-3, 1e-3),
)
# The tolerance is the error wanted; smaller ones are for matrices on which it was not met.
_TOLERANCES = (1e-2, 3e-3, 1e-3)
_POWER_STEPS = (4, 16, 64, 256, 1024, 4096)
# A solver may iterate in bfloat16 at the first of these tolerances, and not at the second.
_PRECISIONS = (1e-2, 1e-3)
# Larger matrices would only make the exact solver, which cannot win there, take minutes.
_EXACT_SIZE = 1024
# On a GPU the full SVD of a larger matrix takes 10 s or more, a thousand times the others' time.
_GPU_SVD_SIZE = 2048


@dataclasses.dataclass(frozen=True)
class Case:
    """A matrix whose leading singular triplets are wanted.

    Args:
        name: Name on the command line.
        title: Description in the tables.
        matrix: The matrix, float32.
        ranks: Numbers of triplets.
        widths: Block widths that randomised solvers try, as a function of k.
        iterations: Numbers of iterations that they try.
        with_pca: Whether torch.pca_lowrank competes.
        references: Solvers whose fastest one the others are compared with.
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
        levels: Settings, from the cheapest up.
        ordered: Whether the error falls from each level to the next.
        random: Whether results depend on the seed.
    """

    levels: Sequence[race.Level]
    ordered: bool = False
    random: bool = True


def gaussian(size: int, ranks: Sequence[int], device: torch.device) -> Case:
    """Return the case of Table 2 of the paper, a square Gaussian matrix.

    Args:
        size: Number of rows and columns.
        ranks: Numbers of triplets.
        device: Device of the matrix.
    """
    return Case(
        name="gaussian",
        title=f"Gaussian {size}x{size}, as in Table 2 of the paper",
        matrix=polar.gaussian((size, size)).to(device),
        ranks=ranks,
        widths=lambda k: (k + 8, 2 * k + 8, 4 * k + 32),
        iterations=(8, 16, 32, 64, 128, 256),
        with_pca=True,
        references=(ARPACK if device.type == "cpu" else CUPY,),
    )


def power_law(shape: tuple[int, int], ranks: Sequence[int], device: torch.device) -> Case:
    """Return the case of a matrix with the singular values i^-0.7.

    Args:
        shape: Numbers of rows and columns.
        ranks: Numbers of triplets.
        device: Device of the matrix.
    """
    return Case(
        name="power_law",
        title=f"{polar.shape_text(shape)} of singular values i^-0.7",
        matrix=polar.power_law(shape).to(device),
        ranks=ranks,
        widths=lambda k: (k + 2, k + 8, 2 * k, 2 * k + 8),
        iterations=(1, 2, 3, 4, 6, 8, 12),
        with_pca=False,
        references=(ARPACK, LOW_RANK, FULL),
    )


def solvers(case: Case, k: int) -> dict[str, Solver]:
    """Return the competitors for k triplets of a case, by name."""
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
    if not on_gpu or limit <= _GPU_SVD_SIZE:
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
        competitors[EXACT] = Solver([_ours(m, k, "exact")], random=False)
    if on_gpu and gpu_peers.available():
        competitors[CUPY] = Solver([_ours(m, k, "cupy", tol=tol) for tol in _TOLERANCES], True)
    return competitors


def exact(m: Tensor, k: int) -> Triplets:
    """Return the k leading triplets in float64.

    Those of a large matrix come from its Gram matrix, in a tenth of the time of the SVD. That
    squares the condition number, but the leading singular values of the large cases are all of the
    size of the first, so the vectors are right to about 1e-11.

    Args:
        m: A matrix, (rows, cols).
        k: Number of triplets.
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
    if m.device.type == "cpu":  # torch always computes all eigenvectors, SciPy only the k wanted
        eigh = console.require("scipy.linalg", "this race").eigh
        _, vectors = eigh(gram.numpy(), subset_by_index=(cols - k, cols - 1))
        v = torch.from_numpy(vectors).flip(-1)
    else:
        v = torch.linalg.eigh(gram).eigenvectors[:, -k:].flip(-1)
    u = m @ v
    s = torch.linalg.vector_norm(u, dim=0)
    return Triplets(u / s, s, v.mT)


def rank_k_error(found: Triplets, exact: Triplets, k: int) -> float:
    """Return |U V^T - U* V*^T|_F / sqrt(k) of the k leading triplets, from products of k columns.

    Args:
        found: k triplets; their vectors need not be orthonormal.
        exact: At least k triplets in float64.
        k: Number of triplets.
    """
    u, vh = found.U.double(), found.Vh.double()
    own = ((u.mT @ u) * (vh @ vh.mT)).sum()
    common = ((exact.U[:, :k].mT @ u) * (exact.Vh[:k] @ vh.mT)).sum()
    square = float(own - 2 * common) / k + 1
    return math.inf if math.isnan(square) else math.sqrt(max(0.0, square))


def sigma_error(found: Triplets, exact: Triplets, k: int) -> float:
    """Return the largest relative error of the k leading singular values.

    Args:
        found: k triplets, in any order.
        exact: At least k triplets in float64.
        k: Number of triplets.
    """
    s = exact.S[:k]
    own = found.S.double().sort(descending=True).values
    return float(((own - s).abs() / s).max().nan_to_num(math.inf))


def race_case(
    case: Case,
    reference: Triplets,
    options: argparse.Namespace,
    only: Container[str] | None = None,
) -> list[dict[str, Any]]:
    """Choose every solver's setting for every rank, then race those that reach the error.

    Args:
        case: The case.
        reference: Exact triplets (``exact``), as many as the largest rank.
        options: Options of ``topk.add_search`` and ``race.add_turns``.
        only: Names of the competitors; None: all.

    Returns:
        For every rank and competitor its setting, errors and seconds, and those of all settings
        that were tried.
    """
    return [entry for k in case.ranks for entry in _race(case, reference, k, options, only)]


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
    """Return the work of a randomised SVD, up to a constant factor."""
    rows, cols = m.shape
    return (iterations + 1) * (2 * rows * cols * q + (rows + cols) * q * q)


def _ours(m: Tensor, k: int, solver: lmo.Solver, cost: float = 1.0, **options: Any) -> race.Level:
    def solve(seed: int) -> Triplets:
        generator = torch.Generator().manual_seed(seed)
        return lmo.top_singular(m, k, solver=solver, generator=generator, **options)

    words = {"tol": "tol", "solver_steps": "steps", "oversampling": "oversampling"}
    setting = ", ".join(f"{words[name]} {value:g}" for name, value in options.items())
    return race.Level(setting, solve, cost)


def _race(
    case: Case,
    truth: Triplets,
    k: int,
    options: argparse.Namespace,
    only: Container[str] | None,
) -> list[dict[str, Any]]:
    """Run ``race_case`` for one rank."""
    print(f"{case.title}, k = {k}: choosing settings, then racing", file=sys.stderr)
    entries: dict[str, dict[str, Any]] = {}
    trials: dict[str, race.Trial] = {}
    for name, solver in solvers(case, k).items():
        if only is not None and name not in only:
            continue
        wanted = options.seeds if solver.random else 1
        tried: list[dict[str, Any]] = []

        def note(level: race.Level, seed: int, seconds: float, found: Triplets) -> None:
            attempt = {"setting": level.setting, "seed": seed, "seconds": seconds}
            errors = {"error": rank_k_error(found, truth, k)}
            errors["sigma_error"] = sigma_error(found, truth, k)
            tried.append({**attempt, **errors})  # noqa: B023

        trial = trials[name] = race.cheapest(
            solver.levels,
            lambda found: rank_k_error(found, truth, k),
            goal=options.error,
            seeds=wanted,
            budget=options.budget,
            device=options.device,
            ordered=solver.ordered,
            watch=note,
        )
        entries[name] = {
            "case": case.name,
            "k": k,
            "solver": name,
            "setting": trial.level.setting,
            "reached": trial.reached,
            "seeds": trial.seeds,
            "seeds_wanted": wanted,
            "error": trial.error,
            "seconds": [trial.seconds],
            "median_seconds": trial.seconds,
            "tried": tried,
        }
    _race_settings(entries, trials, truth, options)
    _add_ratios(entries, case.references)
    return list(entries.values())


def _race_settings(
    entries: Mapping[str, dict[str, Any]],
    trials: Mapping[str, race.Trial],
    truth: Triplets,
    options: argparse.Namespace,
) -> None:
    """Race the settings that reach the error, and put errors and seconds into the entries."""

    def note(name: str, found: Triplets) -> None:
        entry = entries[name]
        entry["error"] = max(entry["error"], rank_k_error(found, truth, entry["k"]))

    seconds = race.take_turns(
        {
            name: trial.turn
            for name, trial in trials.items()
            # A solver that would need more than the budget keeps the seconds of its trial.
            if trial.reached and trial.seconds * (options.repeats + 1) <= options.budget
        },
        repeats=options.repeats,
        device=options.device,
        watch=note,
    )
    medians = race.medians(seconds)
    for name, taken in seconds.items():
        entries[name] |= {"seconds": taken, "median_seconds": medians[name]}


def _add_ratios(entries: Mapping[str, dict[str, Any]], references: Sequence[str]) -> None:
    """Compare the entries that reach the error with the references and with the best of ours."""
    medians = {name: e["median_seconds"] for name, e in entries.items() if e["reached"]}
    reference = _least(medians, references)
    best = _least(medians, [name for name in medians if name.startswith(OURS) and name != AUTO])
    for name, entry in entries.items():
        own = medians.get(name)
        entry["ratio_to_reference"] = _ratio(own, reference)
        entry["ratio_to_best_of_ours"] = _ratio(own, best) if name.startswith(OURS) else None


def _least(medians: Mapping[str, float], names: Sequence[str]) -> float | None:
    return min((medians[name] for name in names if name in medians), default=None)


def _ratio(seconds: float | None, reference: float | None) -> float | None:
    return None if seconds is None or reference is None else seconds / reference
