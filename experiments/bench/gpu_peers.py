"""What CuPy costs: the same algorithms in torch and in CuPy, side by side on one GPU.

Each is written once, for both, in the operations that they share; Lanczos is ours and CuPy's.
"""

from collections.abc import Callable, Sequence
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
    """Return the triplets in the span of a block after some iterations."""
    v = start
    for _ in range(_RANDOMIZED_STEPS):
        u = xp.linalg.qr(m @ v)[0]
        v = xp.linalg.qr(m.T @ u)[0]
    u, s, vh = xp.linalg.svd(m @ v, full_matrices=False)
    return u, s, vh @ v.T


def power_iteration(xp: Any, m: Any, start: Any) -> Any:
    """Return the leading triplet after some products."""
    v = start[:, :1]
    for _ in range(_POWER_STEPS):
        u = m @ v
        v = m.T @ (u / xp.linalg.norm(u))
        s = xp.linalg.norm(v)
        v = v / s
    return u / xp.linalg.norm(u), s[None], v.T


def newton_schulz(xp: Any, m: Any, start: Any) -> Any:
    """Return the polar factor's approximation after five iterations."""
    a, b, c = _NEWTON_SCHULZ
    x = m / xp.linalg.norm(m)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


ALGORITHMS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "full SVD": full_svd,
    "randomized SVD": randomized_svd,
    "power iteration": power_iteration,
    "Newton-Schulz": newton_schulz,
}


def compare(m: Tensor, ranks: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Race torch against CuPy.

    Args:
        m: A float32 matrix on a GPU.
        ranks: Numbers of triplets of Lanczos and of the randomised SVD.
        repeats: Turns of each.

    Returns:
        For each algorithm and rank the seconds in both, and CuPy's median over torch's.
    """
    cupy = console.require("cupy", "this comparison")
    entries = []
    with (
        cupy.cuda.Device(m.device.index),
        cupy.cuda.ExternalStream(torch.cuda.current_stream(m.device).cuda_stream),
    ):
        for k in ranks:
            for name, sides in _pairs(cupy, m, k).items():
                seconds = race.take_turns(sides, repeats=repeats, device=m.device)
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
    """Return the outcome of ``compare`` as a table."""
    return console.Table(
        "what CuPy costs: the same in torch and in CuPy (Lanczos: ours and CuPy's)",
        ["algorithm", "k", "torch ms", "CuPy ms", "CuPy / torch"],
        [
            [
                entry["algorithm"],
                entry["k"],
                1e3 * entry["median_seconds"]["torch"],
                1e3 * entry["median_seconds"]["cupy"],
                entry["ratio"],
            ]
            for entry in entries
        ],
    )


def _pairs(cupy: Any, m: Tensor, k: int) -> dict[str, dict[str, race.Turn]]:
    """The two sides of each algorithm by its name."""
    start = lmo.start_block(tuple(m.shape), k, device=m.device)
    there = [cupy.from_dlpack(x) for x in (m, start)]

    def sides(algorithm: Callable[[Any, Any, Any], Any]) -> dict[str, race.Turn]:
        return {
            "torch": lambda seed: algorithm(torch, m, start),
            "cupy": lambda seed: algorithm(cupy, *there),
        }

    lanczos: dict[str, race.Turn] = {
        "torch": lambda seed: lmo.top_singular(m, k, solver="lanczos"),
        "cupy": lambda seed: lmo.top_singular(m, k, solver="cupy"),
    }
    return {name: sides(algorithm) for name, algorithm in ALGORITHMS.items()} | {"Lanczos": lanczos}
