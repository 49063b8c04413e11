"""Norms of Gaussian matrices against the formulas of section 4."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from experiments.paper.bounds import asymptotics, smoothness
from experiments.paper.bounds.smoothness import format_spread
from lit_fanions import norms
from lit_fanions.cli.console import Table
from lit_fanions.cli.curves import spread

# Section 4, for matrices of m × n.
FORMULAS: dict[str, Callable[[int, int], float]] = {
    "nuclear": lambda m, n: n * math.sqrt(m),
    "Frobenius": lambda m, n: math.sqrt(m * n),
    "spectral": lambda m, n: math.sqrt(m) + math.sqrt(n),
}
NORMS: dict[str, norms.Norm] = {
    "nuclear": norms.Nuclear(),
    "Frobenius": norms.Frobenius(),
    "spectral": norms.Spectral(),
    "Ky Fan 5": norms.KyFan(5),
    "Ky Fan 20": norms.KyFan(20),
}
Shape = tuple[int, int]
Samples = dict[Shape, dict[str, list[float]]]  # shape -> norm -> one value per matrix
# An asymptotic is right if its error at the largest size is below this, and has not grown.
CLOSE = 0.03


def sample_norms(shapes: Sequence[Shape], samples: int, generator: torch.Generator) -> Samples:
    """Return the norms of Gaussian matrices.

    Args:
        shapes: Shapes of the matrices.
        samples: Number of matrices of each shape.
        generator: Source of randomness.
    """
    matrices = {shape: smoothness.standard_normal((samples, *shape), generator) for shape in shapes}
    return {
        shape: {name: norm.value(m).tolist() for name, norm in NORMS.items()}
        for shape, m in matrices.items()
    }


def rows(matrices: Samples) -> list[list[object]]:
    """Return all values as rows of the CSV."""
    return [
        ["Gaussian", f"{m} × {n}", f"{name} norm", i, value]
        for (m, n), found in matrices.items()
        for name, values in found.items()
        for i, value in enumerate(values)
    ]


def ratios_to_formula(matrices: Samples, shape: Shape, name: str) -> list[float]:
    """Return the measured norms over the article's formula."""
    return [value / FORMULAS[name](*shape) for value in matrices[shape][name]]


def ratios_of_norms(matrices: Samples, shape: Shape, top: str, bottom: str) -> list[float]:
    """Return one norm over another, for each matrix."""
    found = matrices[shape]
    return [a / b for a, b in zip(found[top], found[bottom], strict=True)]


def exact_asymptotic(shape: Shape, name: str) -> float:
    """Return the norm of large Gaussian matrices by the Marchenko-Pastur law."""
    return asymptotics.gaussian_norm(NORMS[name], *shape)


def square_shapes(matrices: Samples) -> list[Shape]:
    """Return the square shapes, the smallest first."""
    return sorted(shape for shape in matrices if shape[0] == shape[1])


def converges_to_one(first: Sequence[float], last: Sequence[float]) -> bool:
    """Return True if ratios go to 1 from the smallest size to the largest."""
    errors = [abs(spread(values)[0] - 1) for values in (first, last)]
    noise = 2 * math.hypot(*(spread(v)[1] / math.sqrt(len(v)) for v in (first, last)))
    return errors[1] <= CLOSE and errors[1] <= errors[0] + noise


def norms_table(matrices: Samples) -> Table:
    """Return the table of norms by shape, beside both asymptotics."""
    cells = []
    for shape, found in matrices.items():
        for name, values in found.items():
            law, known = exact_asymptotic(shape, name), name in FORMULAS
            ratios = ratios_to_formula(matrices, shape, name) if known else []
            cells.append(
                [
                    f"{shape[0]} × {shape[1]}",
                    name,
                    format_spread(values, 4),
                    f"{FORMULAS[name](*shape):.4g}" if known else "–",
                    format_spread(ratios) if known else "–",
                    f"{law:.4g}",
                    format_spread([value / law for value in values]),
                ]
            )
    return Table(
        "Norms of Gaussian m × n matrices: mean ± std over the samples",
        ["m × n", "norm", "measured", "article", "ratio", "Marchenko-Pastur", "ratio"],
        cells,
    )
