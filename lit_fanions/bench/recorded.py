"""Rank k on matrices of real runs: warm starts from step to step, against Newton-Schulz.

The matrices are the momenta in Lightning checkpoints of consecutive steps of Fanion.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_fanions import lmo
from lit_fanions._messages import one_line
from lit_fanions.bench import polar, race, report
from lit_fanions.lmo import Triplets
from lit_fanions.optim.matrices import to_matrices

SOLVERS: tuple[lmo.Solver, ...] = ("subspace", "auto")
_SHAPES = 4


def momenta(files: Sequence[Path]) -> dict[str, list[Tensor]]:
    """Return the momentum of every matrix at every step, from Lightning checkpoints of Fanion.

    Args:
        files: Checkpoints of one run; they are put in the order of their steps.

    Returns:
        Matrices (rows, cols) in the order of the steps, by the parameter's name and, where a
        parameter is several matrices, their place in it.

    Raises:
        Refused: If a file is no such checkpoint, or they are of different models.
    """
    steps: dict[int, dict[str, Tensor]] = {}
    for file in files:
        checkpoint = _read(file)
        found = dict(_momenta(checkpoint))
        if not found:
            raise report.Refused(f"{file} has no momentum of matrices that Fanion steps")
        steps[checkpoint.get("global_step", len(steps))] = found
    first, *others = (steps[step] for step in sorted(steps))
    shapes = {name: m.shape for name, m in first.items()}
    if any({name: m.shape for name, m in each.items()} != shapes for each in others):
        raise report.Refused("the checkpoints are of different models")
    if not others:
        raise report.Refused("recorded momentum needs the checkpoints of at least two steps")
    return {name: [m, *(each[name] for each in others)] for name, m in first.items()}


def choose(momenta: Mapping[str, list[Tensor]], least: int) -> dict[str, list[Tensor]]:
    """Return one of the matrices of each of the largest shapes.

    Args:
        momenta: As from ``momenta``.
        least: Smallest number of rows and of columns.

    Raises:
        Refused: If there is none.
    """
    names: dict[tuple[int, ...], list[str]] = {}
    for name, sequence in momenta.items():
        if min(sequence[0].shape) >= least:
            names.setdefault(tuple(sequence[0].shape), []).append(name)
    if not names:
        raise report.Refused(f"the checkpoints have no matrix of at least {least}x{least}")
    largest = sorted(names, key=math.prod, reverse=True)[:_SHAPES]
    # Of those of one shape the middle one: a network's first and last layers are special.
    chosen = [names[shape][len(names[shape]) // 2] for shape in largest]
    return {name: momenta[name] for name in chosen}


def race_all(
    sequences: Mapping[str, Sequence[Tensor]], ranks: Sequence[int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Race through the steps of every matrix but the first, which only warms the starts.

    Args:
        sequences: Matrices step by step, by name.
        ranks: Numbers of triplets.
        options: Those of ``race.add_arguments``.

    Returns:
        For every matrix and competitor the seconds a step and the quality at each.
    """
    return [
        entry
        for name, sequence in sequences.items()
        for entry in _race(name, [m.float().to(options.device) for m in sequence], ranks, options)
    ]


def table(entries: Sequence[Mapping[str, Any]]) -> report.Table:
    """Return the outcome of ``race_all`` as a table."""
    return report.Table(
        f"recorded momentum, {entries[0]['steps']} steps from warm starts; "
        "quality: <M, D> over the Ky Fan k norm, or the nuclear one",
        ["matrix", "shape", "direction", "ms", "x Newton-Schulz", "mean quality", "least"],
        [
            [
                entry["matrix"],
                polar.shape_text(entry["shape"]),
                entry["direction"],
                1e3 * entry["median_seconds"],
                entry["ratio_to_newton_schulz"],
                sum(entry["quality"]) / len(entry["quality"]),
                min(entry["quality"]),
            ]
            for entry in entries
        ],
    )


def panels(entries: Sequence[Mapping[str, Any]]) -> list[report.Panel]:
    """Return the outcome of ``race_all`` as charts, one a matrix."""
    return [
        report.Panel(
            name,
            "ms a step",
            {e["direction"]: 1e3 * e["median_seconds"] for e in entries if e["matrix"] == name},
        )
        for name in dict.fromkeys(entry["matrix"] for entry in entries)
    ]


def _read(file: Path) -> Mapping[str, Any]:
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["optimizer_states"][0]["param_groups"]
    except Exception as error:  # whatever a broken pickle may raise
        reason = one_line(f"{type(error).__name__}: {error}", 100)
        raise report.Refused(f"{file} is no readable Lightning checkpoint: {reason}") from error
    return checkpoint


def _momenta(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    optimizer = checkpoint["optimizer_states"][0]
    for group in optimizer["param_groups"]:
        if "layout" not in group:  # not a group of matrices
            continue
        unnamed = [f"{group['name']}[{i}]" for i in range(len(group["params"]))]
        names = group.get("param_names", unnamed)
        for name, index in zip(names, group["params"], strict=True):
            momentum = optimizer["state"].get(index, {}).get("momentum")
            if momentum is None or momentum.ndim < 2:
                continue
            parts = to_matrices(momentum, group["layout"], group["splits"])
            matrices = [m for part in parts for m in part]
            for i, m in enumerate(matrices):
                yield (name if len(matrices) == 1 else f"{name}[{i}]"), m


def _race(
    name: str, sequence: Sequence[Tensor], ranks: Sequence[int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    steps = sequence[1:]
    competitors: dict[str, race.Turn] = {polar.TORCH: lambda turn: _polar_factors(steps)}
    rank_of: dict[str, int] = {}
    for k in ranks:
        for solver in SOLVERS:
            label = f"{solver}, k = {k}"
            competitors[label], rank_of[label] = _warm(sequence, k, solver), k
    spectra = [torch.linalg.svdvals(m.double()) for m in steps]
    qualities: dict[str, list[float]] = {}

    def judge(label: str, directions: Sequence[Tensor]) -> None:
        qualities[label] = [
            polar.quality(m, d, s[: rank_of.get(label)].sum())
            for m, d, s in zip(steps, directions, spectra, strict=True)
        ]

    seconds = race.take_turns(
        competitors, repeats=options.repeats, device=options.device, watch=judge
    )
    medians = race.medians(seconds)
    return [
        {
            "matrix": name,
            "shape": list(sequence[0].shape),
            "steps": len(steps),
            "direction": label,
            "k": rank_of.get(label),
            "seconds": [each / len(steps) for each in taken],
            "median_seconds": medians[label] / len(steps),
            "ratio_to_newton_schulz": medians[label] / medians[polar.TORCH],
            "quality": qualities[label],
        }
        for label, taken in seconds.items()
    ]


def _polar_factors(sequence: Sequence[Tensor]) -> list[Tensor]:
    return [polar.torch_newton_schulz(m) for m in sequence]


def _warm(sequence: Sequence[Tensor], k: int, solver: lmo.Solver) -> race.Turn:
    """Directions of rank k step by step, each from the singular vectors of the step before."""

    def solve(m: Tensor, basis: Tensor) -> Triplets:
        # All columns of the basis, as the optimizer keeps them, not only k.
        return lmo.top_singular(m, basis.shape[-1], solver=solver, warm_start=basis)

    first = sequence[0]
    start = lmo.warmed(first, lmo.start_block(tuple(first.shape), k, device=first.device))
    start = solve(first, start).Vh.mT

    def turn(seed: int) -> list[Tensor]:
        basis, directions = start, []
        for m in sequence[1:]:
            u, _, vh = solve(m, basis)
            directions.append(u[:, :k] @ vh[:k])
            basis = vh.mT
        return directions

    return turn
