"""Rank k on matrices of real runs: warm starts from step to step, against Newton-Schulz.

The matrices are those whose directions Fanion computed: the momenta in Lightning checkpoints of
consecutive steps or, in groups with Nesterov momentum, their Nesterov form.
"""

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.bench import polar, race, report
from lit_fanions import lmo
from lit_fanions.cli import console
from lit_fanions.cli.errors import one_line
from lit_fanions.lmo import Triplets
from lit_fanions.optim.matrices import to_matrices

SOLVERS: tuple[lmo.Solver, ...] = ("subspace", "auto")
_SHAPES = 4


class _Recorded(NamedTuple):
    """The momentum of a matrix after a step, and options of its group.

    Attributes:
        momentum: Momentum, (rows, cols).
        mu: Momentum factor of the next step; schedules change it before a checkpoint is saved.
        nesterov: Whether directions are those of the Nesterov form.
    """

    momentum: Tensor
    mu: float
    nesterov: bool


def momenta(files: Sequence[Path]) -> dict[str, list[Tensor]]:
    """Return the matrices whose directions were computed at each step, up to a factor.

    Without Nesterov momentum that is the momentum M_t, else (1 - mu) G_t + mu M_t. The gradient's
    part is M_t - mu M_{t-1}, so the first checkpoint then only gives the M_{t-1} of the second.

    Args:
        files: Lightning checkpoints of one run of Fanion, in any order.

    Returns:
        Matrices (rows, cols) in the order of the steps, by the name of the parameter; a parameter
        of several matrices has an entry "name[i]" for each.

    Raises:
        Refused: If a file is no such checkpoint, if they are of different models or too few, or if
            a step that the Nesterov form needs is missing.
    """
    found: dict[int, dict[str, _Recorded]] = {}
    for file in files:
        checkpoint = _read(file)
        matrices = dict(_matrices(checkpoint))
        if not matrices:
            raise console.Refused(f"{file} has no momentum of matrices that Fanion steps")
        found[checkpoint.get("global_step", len(found))] = matrices
    steps = sorted(found)
    first, *others = (found[step] for step in steps)
    shapes = {name: each.momentum.shape for name, each in first.items()}
    if any({name: m.momentum.shape for name, m in other.items()} != shapes for other in others):
        raise console.Refused("the checkpoints are of different models")
    nesterov = any(each.nesterov for each in first.values())
    if len(steps) < 2 + nesterov:
        raise console.Refused(
            "recorded momentum needs the checkpoints of at least two steps, and with Nesterov "
            f"momentum of three, got {len(steps)}"
        )
    gap = next(((a, b) for a, b in itertools.pairwise(steps) if b != a + 1), None)
    if nesterov and gap:
        raise console.Refused(
            f"Nesterov momentum needs every step, and after {gap[0]} comes {gap[1]}: record with "
            "ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)"
        )
    sequences = {name: [found[step][name] for step in steps] for name in first}
    # The same steps for all matrices, because their results stand side by side.
    last = nesterov - len(steps)
    return {name: _direction_inputs(each)[last:] for name, each in sequences.items()}


def _direction_inputs(sequence: Sequence[_Recorded]) -> list[Tensor]:
    """Return the momenta or their Nesterov forms; the latter are one fewer."""
    if not sequence[0].nesterov:
        return [each.momentum for each in sequence]
    return [
        (1 + before.mu) * after.momentum.float() - before.mu * before.momentum.float()
        for before, after in itertools.pairwise(sequence)
    ]


def choose(momenta: Mapping[str, list[Tensor]], least: int) -> dict[str, list[Tensor]]:
    """Return one matrix of each of the four largest shapes.

    Args:
        momenta: Matrices by name, from ``momenta``.
        least: Smallest number of rows and columns.

    Raises:
        Refused: If all matrices are smaller.
    """
    names: dict[tuple[int, ...], list[str]] = {}
    for name, sequence in momenta.items():
        if min(sequence[0].shape) >= least:
            names.setdefault(tuple(sequence[0].shape), []).append(name)
    if not names:
        raise console.Refused(f"the checkpoints have no matrix of at least {least}x{least}")
    largest = sorted(names, key=math.prod, reverse=True)[:_SHAPES]
    # The middle one of each shape, because a network's first and last layers are special.
    chosen = [names[shape][len(names[shape]) // 2] for shape in largest]
    return {name: momenta[name] for name in chosen}


def race_all(
    sequences: Mapping[str, Sequence[Tensor]], ranks: Sequence[int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Race through the steps of every matrix; the first step only makes the warm start.

    Args:
        sequences: Matrices in the order of the steps, by name.
        ranks: Numbers of triplets.
        options: Options of ``race.add_turns``.

    Returns:
        For every matrix and competitor the seconds per step and the quality at each step.
    """
    return [
        entry
        for name, sequence in sequences.items()
        for entry in _race(name, [m.float().to(options.device) for m in sequence], ranks, options)
    ]


def table(entries: Sequence[Mapping[str, Any]]) -> console.Table:
    """Return the entries of ``race_all`` as a table."""
    return console.Table(
        "recorded momentum, in its Nesterov form if the run had Nesterov momentum, "
        f"{entries[0]['steps']} steps from warm starts; "
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
    """Return the entries of ``race_all`` as charts, one for each matrix."""
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
    except Exception as error:  # a broken file can raise almost anything
        reason = one_line(f"{type(error).__name__}: {error}", 100)
        raise console.Refused(f"{file} is no readable Lightning checkpoint: {reason}") from error
    return checkpoint


def _matrices(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, _Recorded]]:
    optimizer = checkpoint["optimizer_states"][0]
    for group in optimizer["param_groups"]:
        if "layout" not in group:  # an entrywise group
            continue
        unnamed = [f"{group['name']}[{i}]" for i in range(len(group["params"]))]
        names = group.get("param_names", unnamed)
        nesterov, mu = group.get("nesterov", False), group.get("momentum", 0.0)
        for name, index in zip(names, group["params"], strict=True):
            momentum = optimizer["state"].get(index, {}).get("momentum")
            if momentum is None or momentum.ndim < 2:
                continue
            parts = to_matrices(momentum, group["layout"], group["splits"])
            matrices = [m for part in parts for m in part]
            for i, m in enumerate(matrices):
                label = name if len(matrices) == 1 else f"{name}[{i}]"
                yield label, _Recorded(m, mu, nesterov)


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
    """Return a turn that computes rank-k directions, each warm-started from the step before."""

    def solve(m: Tensor, basis: Tensor) -> Triplets:
        # The optimizer also warm-starts from all columns of its basis, not only from k.
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
