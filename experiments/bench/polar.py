"""Full rank: every polar factor of ours against torch's Newton-Schulz iteration and the SVD.

Times are those of a Gaussian matrix, alone and in a batch of four. The quality of the direction D
of a matrix M is the smallest <M, D> / |M|_* over a Gaussian matrix, one with the singular values
i^-0.7 and one of condition number 1e3 (geometric). "largest s" is D's largest singular value.

  python -m experiments.bench polar --plot polar.png
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.bench import race, report
from lit_fanions import lmo
from lit_fanions.cli import console

SHAPES = ((768, 768), (768, 3072), (256, 2304), (3072, 768))
QUICK_SHAPES = ((32, 32), (16, 96), (96, 32))
BATCHES = (1, 4)
METHODS: tuple[tuple[lmo.PolarMethod, int | None], ...] = (
    ("jordan", 5),
    ("quintic", None),
    ("polar_express", 6),
    ("cans", 5),
    ("fast", None),
    ("convergent", None),
    ("exact", None),
    ("auto", None),
)
TORCH = "torch's Newton-Schulz 5"
_DECAY = -0.7
_CONDITION = 1e3
# Keller Jordan's coefficients, the defaults of torch.optim.Muon.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)

Polar = Callable[[Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    race.add_arguments(parser)


def run(options: argparse.Namespace) -> report.Report:
    """Time and judge every method.

    Args:
        options: Options of ``race.add_arguments``.
    """
    entries, panels = [], []
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        qualities = dict(_qualities(shape, options.device))
        for batch in BATCHES:
            entries += (found := _race(shape, batch, qualities, options))
            bars = {entry["method"]: 1e3 * entry["median_seconds"] for entry in found}
            panels.append(report.Panel(f"{batch} of {shape_text(shape)}", "ms", bars))
    return report.Report(
        title="polar factors: time, and quality of the direction",
        columns=["shape", "batch", "method", "ms", "x torch", "quality", "largest s"],
        rows=[
            [
                shape_text(entry["shape"]),
                entry["batch"],
                entry["method"],
                1e3 * entry["median_seconds"],
                entry["ratio_to_torch"],
                min(entry["quality"].values()),
                entry["largest_singular_value"],
            ]
            for entry in entries
        ],
        notes=[
            f"quality: smallest <M, D> / |M|_* over {', '.join(spectra((2, 2)))}",
            *race.notes(options, products(options.device)),
        ],
        data={**race.conditions(options, products(options.device)), "results": entries},
        panels=panels,
    )


def products(device: torch.device) -> dict[str, str]:
    """Return the dtypes in which float32 matrices are multiplied, for ``race.conditions``."""
    ours = "bfloat16 (small ones and by cans: float32)" if multiplies_bf16(device) else "float32"
    return {TORCH: "bfloat16", "our Newton-Schulz": ours}


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether our solvers multiply large float32 matrices in bfloat16 on a device."""
    return lmo.polar_dtype(torch.empty(1024, 1024, device=device), "auto") == torch.bfloat16


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as text, such as 768x3072."""
    return "x".join(map(str, shape))


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return standard normal float32 matrices on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(shape: tuple[int, int], s: Tensor, seed: int = 0) -> Tensor:
    """Return a float32 matrix on the CPU with these singular values and random singular vectors."""
    rows, cols = shape
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(s), generator=generator, dtype=torch.float64)).Q
        for n in (rows, cols)
    )
    return (u * s @ v.mT).float()


def power_law(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Return a matrix with the singular values i^-0.7."""
    i = torch.arange(1, min(shape) + 1, dtype=torch.float64)
    return with_spectrum(shape, i**_DECAY, seed)


def spectra(shape: tuple[int, int]) -> dict[str, Tensor]:
    """Return a matrix of each kind on which the quality of directions is measured, by name."""
    exponents = torch.linspace(0, -1, min(shape), dtype=torch.float64)
    return {
        "Gaussian": gaussian(shape),
        "power law": power_law(shape),
        f"condition {_CONDITION:g}": with_spectrum(shape, _CONDITION**exponents),
    }


def torch_muon() -> Any:
    """Return torch's Muon module.

    Raises:
        Refused: If this torch has no Muon.
    """
    try:
        from torch.optim import _muon
    except ImportError as error:
        raise console.Refused(
            f"this race needs torch.optim.Muon of torch 2.9 or later, not {torch.__version__}"
        ) from error
    return _muon


def torch_newton_schulz(m: Tensor) -> Tensor:
    """Return torch.optim.Muon's direction of each matrix, one after the other.

    Raises:
        Refused: If torch has no Muon.
    """
    return _newton_schulz(torch_muon()._zeropower_via_newtonschulz, m)


def quality(m: Tensor, d: Tensor, norm: Tensor) -> float:
    """Return <m, d> / norm, where norm is the dual norm of m: 1 for an exact direction."""
    return float((m.double() * d.double()).sum() / norm)


def nuclear_norm(m: Tensor) -> Tensor:
    """Return the sum of the singular values, in float64."""
    return torch.linalg.svdvals(m.double()).sum()


def _methods(device: torch.device) -> dict[str, Polar]:
    """Return the competitors by name, torch's first."""
    methods: dict[str, Polar] = {TORCH: torch_newton_schulz}
    if device.type == "cuda":
        compiled = torch.compile(torch_muon()._zeropower_via_newtonschulz, dynamic=False)
        methods[f"{TORCH}, compiled"] = lambda m: _newton_schulz(compiled, m)
    methods["SVD in float64"] = _svd
    return methods | {
        name if steps is None else f"{name} {steps}": _ours(name, steps) for name, steps in METHODS
    }


def _newton_schulz(function: Callable[..., Tensor], m: Tensor) -> Tensor:
    """Apply torch's iteration, which takes one matrix, to a matrix or to each of a batch."""
    if m.ndim == 2:
        return function(m, _COEFFICIENTS, 5, 1e-7)
    return torch.stack([function(each, _COEFFICIENTS, 5, 1e-7) for each in m])


def _ours(method: str, steps: int | None) -> Polar:
    return lambda m: lmo.polar(m, method=method, steps=steps)


def _svd(m: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(m.double(), full_matrices=False)
    return (u @ vh).to(m)


def _qualities(
    shape: tuple[int, int], device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each method's name and the quality of its directions."""
    matrices = {name: m.to(device) for name, m in spectra(shape).items()}
    norms = {name: nuclear_norm(m) for name, m in matrices.items()}
    for method, polar in _methods(device).items():
        directions = {name: polar(m) for name, m in matrices.items()}
        yield (
            method,
            {
                "quality": {
                    name: quality(m, directions[name], norms[name]) for name, m in matrices.items()
                },
                "largest_singular_value": max(map(_spectral_norm, directions.values())),
            },
        )


def _spectral_norm(d: Tensor) -> float:
    d = d.double() if d.shape[0] <= d.shape[1] else d.double().mT
    return float(torch.linalg.eigvalsh(d @ d.mT)[-1].sqrt())


def _race(
    shape: tuple[int, int],
    batch: int,
    qualities: Mapping[str, Mapping[str, Any]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time the methods on a batch of Gaussian matrices."""
    m = gaussian(shape if batch == 1 else (batch, *shape)).to(options.device)
    turns = {name: _turn(polar, m) for name, polar in _methods(options.device).items()}
    seconds = race.take_turns(
        turns, repeats=options.repeats, device=options.device, longest=options.longest
    )
    medians = race.medians(seconds)
    return [
        {
            "shape": shape,
            "batch": batch,
            "method": name,
            "seconds": taken,
            "median_seconds": medians[name],
            "ratio_to_torch": medians[name] / medians[TORCH],
            **qualities[name],
        }
        for name, taken in seconds.items()
    ]


def _turn(polar: Polar, m: Tensor) -> race.Turn:
    return lambda turn: polar(m)
