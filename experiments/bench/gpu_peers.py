"""The same algorithms in torch and in CuPy, raced on one GPU.

Each algorithm is written once, with operations that both libraries have. For Lanczos, ours races
CuPy's own.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from experiments.bench import race
from lit_fanions import lmo
from lit_fanions.cli import console

_RANDOMIZED_STEPS = 4
_POWER_STEPS = 64
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def available() -> bool:
    """Return whether CuPy is installed."""
    return find_spec("cupy") is not None


def full_svd(xp: Any, m: Any, start: Any) -> Any:
    """Return all singular triplets."""
    return tuple(xp.linalg.svd(m, full_matrices=False))


def randomized_svd(xp: Any, m: Any, start: Any) -> Any:
    """Return the triplets that block power iterations from a start block find."""
    v = start
    for _ in range(_RANDOMIZED_STEPS):
        u = xp.linalg.qr(m @ v)[0]
        v = xp.linalg.qr(m.T @ u)[0]
    u, s, vh = xp.linalg.svd(m @ v, full_matrices=False)
    return u, s, vh @ v.T


def power_iteration(xp: Any, m: Any, start: Any) -> Any:
    """Return the leading triplet that power iterations find."""
    v = start[:, :1]
    for _ in range(_POWER_STEPS):
        u = m @ v
        v = m.T @ (u / xp.linalg.norm(u))
        s = xp.linalg.norm(v)
        v = v / s
    return u / xp.linalg.norm(u), s[None], v.T


def newton_schulz(xp: Any, m: Any, start: Any) -> Any:
    """Return an approximate polar factor, from five Newton-Schulz iterations."""
    a, b, c = _NEWTON_SCHULZ
    x = m / xp.linalg.norm(m)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


# Those whose time depends on k, and those whose time does not. CuPy and torch are called alike.
RANK_K: dict[str, Callable[[Any, Any, Any], Any]] = {"randomized SVD": randomized_svd}
ALGORITHMS = RANK_K | {
    "full SVD": full_svd,
    "power iteration": power_iteration,
    "Newton-Schulz": newton_schulz,
}
_SVD_SIZE = 2048  # the SVD of a larger matrix takes 10 s or more


def compare(
    m: Tensor, ranks: Sequence[int], *, repeats: int, longest: float
) -> list[dict[str, Any]]:
    """Race torch against CuPy.

    Args:
        m: A float32 matrix on a GPU; the full SVD is one of its leading block of at most 2048.
        ranks: Numbers of triplets for Lanczos and the randomised SVD.
        repeats: Number of turns of each.
        longest: Seconds after which a competitor is not run again (``race.take_turns``).

    Returns:
        For each algorithm and rank the seconds in both, and CuPy's median over torch's.
    """
    cupy = console.require("cupy", "this comparison")
    entries = []
    with (
        cupy.cuda.Device(m.device.index),
        cupy.cuda.ExternalStream(torch.cuda.current_stream(m.device).cuda_stream),
    ):
        for name, k, sides in _pairs(cupy, m, ranks):
            seconds = race.take_turns(sides, repeats=repeats, device=m.device, longest=longest)
            medians = race.medians(seconds)
            entries.append(
                {
                    "algorithm": name,
                    "k": k,
                    "seconds": seconds,
                    "median_seconds": medians,
                    "ratio": medians["cupy"] / medians["torch"],
                }
            )
    return entries


def table(entries: Sequence[dict[str, Any]]) -> console.Table:
    """Return the entries of ``compare`` as a table."""
    return console.Table(
        "the same algorithms in torch and in CuPy (Lanczos: ours and CuPy's)",
        ["algorithm", "k", "torch ms", "CuPy ms", "CuPy / torch"],
        [
            [
                entry["algorithm"],
                entry["k"] or "",
                1e3 * entry["median_seconds"]["torch"],
                1e3 * entry["median_seconds"]["cupy"],
                entry["ratio"],
            ]
            for entry in entries
        ],
    )


def _pairs(
    cupy: Any, m: Tensor, ranks: Sequence[int]
) -> Iterator[tuple[str, int | None, dict[str, race.Turn]]]:
    """Yield each algorithm's name, k if its time depends on k, and its two competitors."""

    def sides(algorithm: Callable[[Any, Any, Any], Any], m: Tensor, k: int) -> dict[str, race.Turn]:
        own = m, lmo.start_block(tuple(m.shape), k, device=m.device)
        shared = [cupy.from_dlpack(x) for x in own]
        return {
            "torch": lambda seed: algorithm(torch, *own),
            "cupy": lambda seed: algorithm(cupy, *shared),
        }

    for name, algorithm in ALGORITHMS.items():
        if name not in RANK_K:
            block = m[:_SVD_SIZE, :_SVD_SIZE].contiguous() if algorithm is full_svd else m
            yield name, None, sides(algorithm, block, 1)
    for k in ranks:
        for name, algorithm in RANK_K.items():
            yield name, k, sides(algorithm, m, k)
        lanczos: dict[str, race.Turn] = {
            "torch": lambda seed, k=k: lmo.top_singular(m, k, solver="lanczos"),  # type: ignore[misc]
            "cupy": lambda seed, k=k: lmo.top_singular(m, k, solver="cupy"),  # type: ignore[misc]
        }
        yield "Lanczos", k, lanczos
