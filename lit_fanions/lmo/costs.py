"""Floating-point operations of the solvers, by which ranks share matrices and costs are predicted.

Products of matrices alone are counted, as ``torch.utils.flop_counter`` counts them, 2 a b c for
(a, b) @ (b, c). Passes over a matrix are bound by memory and cost little beside products.
"""

from __future__ import annotations

from lit_fanions.lmo.presets import coefficients
from lit_fanions.lmo.problems import Case
from lit_fanions.lmo.singular_triplets import SOLVERS

# Cost of an SVD in products (short, long) @ (long, short): an estimate, as torch counts none.
_SVD = 10
# Block products of a Lanczos search to a tolerance: an estimate, as they depend on the matrix.
_SEARCH = 8


def polar_flops(case: Case) -> float:
    """Return the operations of a polar factor by Newton-Schulz; its Gram form takes fewer."""
    settings, short, long = case.settings, *sorted((case.rows, case.cols))
    if settings.polar == "exact":
        return 2.0 * _SVD * short**2 * long
    steps = len(coefficients(settings.polar, settings.polar_steps))
    return steps * (4.0 * short**2 * long + 2.0 * short**3)


def triplets_flops(k: int, case: Case) -> float:
    """Return the operations of the k leading triplets, by block iterations from a warm start."""
    rows, cols, settings = case.rows, case.cols, case.settings
    name = "subspace" if settings.solver == "auto" else settings.solver
    entry = SOLVERS[name]
    if entry.steps is None or entry.width is None:
        return 2.0 * _SVD * case.limit**2 * max(rows, cols)
    width = entry.width(k, case.limit, settings.oversampling)
    steps = settings.solver_steps or entry.steps[entry.warm]
    if name == "lanczos":
        return 4.0 * rows * cols * width * _SEARCH
    # An iteration multiplies by the matrix and its transpose and makes rows orthonormal, which
    # takes two products; the end rotates both sides by the eigenvectors of a Gram matrix.
    iteration = 4.0 * rows * cols * width + 4.0 * width**2 * rows
    return steps * iteration + 2.0 * width**2 * (rows + 2 * cols)


def product_flops(k: int, case: Case) -> float:
    """Return the operations of a product (rows, k) @ (k, cols)."""
    return 2.0 * case.rows * k * case.cols
