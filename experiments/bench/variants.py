"""Variants of the Newton-Schulz iteration that are no presets: the quality of their directions.

AOL is the preconditioning of Turbo-Muon (arXiv 2512.04632): rows of the matrix are divided by the
roots of the absolute row sums of its Gram matrix before the first step. The Gram form iterates on
the Gram matrix and is recomputed from the matrix every few steps. Rounding to float16 or bfloat16
happens after every product, as on a GPU; nothing is timed.

  python -m experiments.bench variants
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from experiments.bench import polar, report
from lit_fanions.lmo.presets import coefficients, polynomials

SHAPES = ((256, 256), (256, 1024))
QUICK_SHAPES = ((32, 64),)
AOL_STEPS = (
    ("jordan", 4),
    ("jordan", 5),
    ("polar_express", 4),
    ("polar_express", 5),
    ("polar_express", 6),
)
RESTARTS = (2, 3, 6)
_ROUNDED = (torch.float16, torch.bfloat16)

Round = Callable[[Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--quick", action="store_true", help="small matrices")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="device")


def run(options: argparse.Namespace) -> report.Report:
    """Judge every variant on every spectrum.

    Args:
        options: ``quick`` and ``device``.
    """
    entries: list[dict[str, Any]] = []
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        for name, m in polar.spectra(shape).items():
            m = m.to(options.device)
            norm = polar.nuclear_norm(m)
            for variant, d in _directions(m):
                finite = d.nan_to_num(0.0)
                entries.append(
                    {
                        "shape": shape,
                        "spectrum": name,
                        "variant": variant,
                        "quality": polar.quality(m, d, norm),
                        "largest_singular_value": float(torch.linalg.matrix_norm(finite, 2)),
                    }
                )
    heads = ("spectrum", "variant", "quality", "largest_singular_value")
    return report.Report(
        title="variants of the Newton-Schulz iteration: quality of the direction",
        columns=["shape", "spectrum", "variant", "quality", "largest s"],
        rows=[[polar.shape_text(e["shape"]), *(e[head] for head in heads)] for e in entries],
        notes=["quality: <M, D> / |M|_*; above 1 where singular values of D exceed 1"],
        data={"results": entries},
    )


def _directions(m: Tensor) -> Iterator[tuple[str, Tensor]]:
    x = m / torch.linalg.matrix_norm(m)
    for method, steps in AOL_STEPS:
        yield f"{method} {steps}", direct(x, polynomials(method, steps), lambda t: t)
        scaled = precondition(x)
        yield f"{method} {steps}, AOL", direct(scaled, coefficients(method, steps), lambda t: t)
    rows = polynomials("polar_express")
    for dtype in _ROUNDED:
        name = str(dtype).removeprefix("torch.")

        def rounded(t: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return t.to(dtype).float()

        yield f"polar_express 6, {name}", direct(x, rows, rounded)
        for restart in RESTARTS:
            yield f"the same, Gram form of {restart} steps", gram_form(x, rows, rounded, restart)


def precondition(x: Tensor) -> Tensor:
    """Return the rows over the roots of the absolute row sums of x x^T: all s <= 1."""
    return x * (x @ x.mT).abs().sum(-1, keepdim=True).rsqrt()


def direct(x: Tensor, rows: Any, rounded: Round) -> Tensor:
    """Return x after the steps, each on the matrix itself."""
    x = rounded(x)
    for a, b, c in rows:
        gram = rounded(x @ x.mT)
        x = rounded(rounded(b * gram + c * (gram @ gram) + a * _eye(gram)) @ x)
    return x


def gram_form(x: Tensor, rows: Any, rounded: Round, restart: int) -> Tensor:
    """Return x after the steps, the Gram matrix recomputed from x every ``restart`` steps."""
    x = rounded(x)
    for first in range(0, len(rows), restart):
        gram = rounded(x @ x.mT)
        product = _eye(gram)
        for a, b, c in rows[first : first + restart]:
            factor = rounded(b * gram + c * (gram @ gram) + a * _eye(gram))
            product = rounded(factor @ product)
            gram = rounded(rounded(factor @ gram) @ factor)
        x = rounded(product @ x)
    return x


def _eye(gram: Tensor) -> Tensor:
    return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
