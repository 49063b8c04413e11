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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.bench import gpu_peers, polar, race, recorded, report
from experiments.bench.rank_k import (
    ARPACK,
    CUPY,
    LANCZOS,
    PCA,
    POWER,
    RANDOMIZED,
    Case,
    Solver,
    exact,
    gaussian,
    power_law,
    race_case,
    rank_k_error,
    sigma_error,
    solvers,
)
from lit_fanions.cli import console
from lit_fanions.lmo import singular_triplets

__all__ = [
    "ARPACK",
    "CUPY",
    "LANCZOS",
    "PCA",
    "POWER",
    "RANDOMIZED",
    "Case",
    "Solver",
    "add_arguments",
    "add_search",
    "cases",
    "exact",
    "race_case",
    "rank_k_error",
    "run",
    "sigma_error",
    "solvers",
    "table",
]

CASES = ("gaussian", "power_law", "momentum")
# Seconds by k in Table 2 of the paper: 5000x5000, rtol .01. Its fastest solver was CuPy's
# thick-restart Lanczos, which is the reference here on a GPU; on a CPU it is ARPACK.
PAPER_SVDS = {1: 0.18, 10: 0.47, 100: 1.96}
PAPER = {POWER: {1: 7.7}, PCA: {1: 1.15, 10: 19.4, 100: 170.0}}
_SEEDS = 5
# Smallest number of rows and columns of a recorded matrix.
_LEAST, _QUICK_LEAST = 128, 8
_ERROR_NOTE = "error: |U V^T - exact|_F / sqrt(k), the worst of all runs"
_PAPER_NOTE = (
    "paper: 5000x5000, rtol .01, on a GPU; its SVDS is CuPy's thick-restart Lanczos, shown beside "
    "the solver that the others are compared with here"
)
_NO_CHECKPOINTS = (
    "recorded momentum: left out. Record some consecutive steps with ModelCheckpoint"
    "(every_n_train_steps=1, save_top_k=-1) and name the files with --checkpoints"
)
_NO_CUPY = 'CuPy: left out; install it by pip install "lit-fanions[cuda12]" (or cuda13)'


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
        parser: Parser of the command.
        budget: Default of --budget, in seconds.
        seeds: Default of --seeds.
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
        help="time to search the setting of each solver and k, and the same again to race it "
        f"(default: {budget:g})",
    )
    parser.add_argument(
        "--seeds",
        type=race.whole,
        default=seeds,
        metavar="N",
        help=f"seeds on which a setting has to reach the error (default: {seeds})",
    )


def run(options: argparse.Namespace) -> report.Report:
    """Race the solvers.

    Args:
        options: Options of ``add_arguments``.

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
    # Before the race, which takes long: these refuse what is missing.
    facts = race.conditions(options, products, *packages)
    sequences = _sequences(options) if "momentum" in chosen else {}

    tables, panels, results, peers = [], [], [], []
    for case in matrices:
        results += (entries := race_case(case, exact(case.matrix, max(case.ranks)), options))
        tables.append(table(case, entries, options.error))
        panels += [_panel(case, k, entries) for k in case.ranks]
        if case.name == "gaussian" and compares_cupy:
            peers = gpu_peers.compare(
                case.matrix, case.ranks, repeats=options.repeats, longest=options.longest
            )
            tables.append(gpu_peers.table(peers))
    momentum = recorded.race_all(sequences, _recorded_ranks(options), options)
    if momentum:
        tables.append(recorded.table(momentum))
        panels += recorded.panels(momentum)

    first, *more = tables
    rules = singular_triplets.rules()
    notes = [
        *([_ERROR_NOTE] if matrices else []),
        *([_PAPER_NOTE] if "gaussian" in chosen else []),
        *([] if options.checkpoints else [_NO_CHECKPOINTS]),
        *([_NO_CUPY] if on_gpu and not compares_cupy else []),
        *race.notes(options, products, *packages),
        *("", 'what "auto" chooses:', console.table(["condition", "choice"], rules)),
    ]
    found = {"results": results, "momentum": momentum, "cupy": peers, "rules": rules}
    return report.Report(
        title=first.title,
        columns=first.columns,
        rows=first.rows,
        notes=notes,
        data={**facts, "goal": options.error, "budget": options.budget, **found},
        more=more,
        panels=panels,
    )


def cases(options: argparse.Namespace, chosen: Sequence[str]) -> list[Case]:
    """Return the chosen cases whose matrices are made here, not recorded.

    Args:
        options: Options of ``add_arguments``.
        chosen: Names of cases.

    Raises:
        Refused: If a rank is too large.
    """
    made = []
    if "gaussian" in chosen:
        size = options.size or (96 if options.quick else 5000)
        ranks = options.k or ((1, 4) if options.quick else (1, 10, 100))
        made.append(gaussian(size, ranks, options.device))
    if "power_law" in chosen:
        shape = (96, 64) if options.quick else (3072, 768)
        ranks = options.k or ((1, 4) if options.quick else (1, 8, 32, 128))
        made.append(power_law(shape, ranks, options.device))
    for case in made:
        limit = min(case.matrix.shape)
        if max(case.ranks) >= limit:
            raise console.Refused(
                f"k = {max(case.ranks)} is too large for {case.title}: give --k below {limit}"
            )
    return made


def table(case: Case, entries: Sequence[Mapping[str, Any]], goal: float) -> console.Table:
    """Return the entries of ``race_case`` as a table; the Gaussian's has the paper's seconds.

    Args:
        case: The case.
        entries: Entries of ``race_case``.
        goal: The error that was to be reached.
    """
    with_paper = case.name == "gaussian"
    reference = case.references[0] if len(case.references) == 1 else "best of theirs"
    columns = ["k", "solver", "setting", "ms", "error", f"x {reference}"]
    return console.Table(
        f"{case.title}: error at most {goal:g}",
        [*columns, "x best of ours", *(["paper s", "x its SVDS"] if with_paper else [])],
        [_row(entry) + (_paper_cells(case, entry) if with_paper else []) for entry in entries],
    )


def _row(entry: Mapping[str, Any]) -> list[object]:
    setting = entry["setting"]
    # The budget may end before all seeds are tried; a setting that fails is not tried on more.
    if entry["reached"] and entry["seeds"] < entry["seeds_wanted"]:
        setting = f"{setting} (seeds tried: {entry['seeds']} of {entry['seeds_wanted']})".strip()
    return [
        entry["k"],
        entry["solver"],
        setting,
        1e3 * entry["median_seconds"],
        entry["error"],
        _cell(entry["ratio_to_reference"]) if entry["reached"] else "not reached",
        _cell(entry["ratio_to_best_of_ours"]),
    ]


def _paper_cells(case: Case, entry: Mapping[str, Any]) -> list[object]:
    """Return the paper's seconds of this solver, and their ratio to those of its SVDS."""
    solver, k = entry["solver"], entry["k"]
    seconds = (PAPER_SVDS if solver in case.references else PAPER.get(solver, {})).get(k)
    ratio = seconds / PAPER_SVDS[k] if seconds is not None and k in PAPER_SVDS else None
    return [_cell(seconds), _cell(ratio)]


def _cell(value: float | None) -> object:
    return "" if value is None else value


def _panel(case: Case, k: int, entries: Sequence[Mapping[str, Any]]) -> report.Panel:
    bars = {}
    for entry in entries:
        if entry["k"] == k:
            label = entry["solver"] + ("" if entry["reached"] else " (not reached)")
            bars[label] = 1e3 * entry["median_seconds"]
    return report.Panel(f"{case.name}, k = {k}", "ms", bars)


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
