"""The quantities that the monitors log: names, titles, meanings; docs/quantities.md has more."""

from __future__ import annotations

import re
from typing import NamedTuple

from lit_fanions.lmo.spectrum import QUANTILES

# Everything that SpectralMonitor logs has a tag that starts with this, so that loggers keep it
# apart from losses and metrics.
PREFIX = "spectral/"
_GROUP = "group/"


class Quantity(NamedTuple):
    """Title and definition of a quantity, for plots and for the report.

    In definitions G is the gradient, M the momentum as the direction sees it, D the direction, W
    the weight, n the smaller side of the matrix.
    """

    title: str
    meaning: str


class Tag(NamedTuple):
    """A tag of a logger, taken apart."""

    quantity: str  # a key of `QUANTITIES`
    matrix: str  # name of the matrix, or of the group
    is_group: bool = False  # the mean over a parameter group

    def __str__(self) -> str:
        """Return the tag as it is logged."""
        return f"{PREFIX}{self.quantity}/{_GROUP if self.is_group else ''}{self.matrix}"


def parse_tag(tag: str) -> Tag | None:
    """Return the parts of a tag of SpectralMonitor, or None for any other tag.

    Logs of version 0.1, whose tags have no prefix, are understood too.
    """
    quantity, _, matrix = tag.removeprefix(PREFIX).partition("/")
    if quantity not in QUANTITIES or not matrix:
        return None
    return Tag(quantity, matrix.removeprefix(_GROUP), matrix.startswith(_GROUP))


# Gradient and momentum have these in common; x stands for G or M.
_NORMS = {
    "dual": (
        "dual norm of the group's ball",
        "max ⟨x, D⟩ over the ball in which the group steps: the decrease of the loss, to first "
        "order, that a step of unit lr promises.",
    ),
    "nuclear": ("nuclear norm", "‖x‖_*, the sum of all singular values; muon's dual norm."),
    "kyfan": ("Ky Fan k norm", "Sum of the k largest singular values of x."),
    "frobenius": ("Frobenius norm", "‖x‖_F, the length of x as a vector."),
    "spectral": ("spectral norm", "The largest singular value of x."),
    "nuclear_rank": (
        "nuclear rank",
        "‖x‖_*² / ‖x‖_F², from 1 (rank one) to n (all singular values equal).",
    ),
    "energy": (
        "energy in rank k",
        "Part of ‖x‖_F² that the best approximation of rank k keeps, from 0 to 1.",
    ),
}
_QUANTITIES = {
    **{
        f"{family}_{name}": (f"{family.capitalize()}: {title}", re.sub(r"\bx\b", x, meaning))
        for family, x in (("gradient", "G"), ("momentum", "M"))
        for name, (title, meaning) in _NORMS.items()
    },
    **{
        f"momentum_quantile{round(100 * q)}": (
            f"Momentum: {round(100 * q)} % quantile of σ / σ₁",
            f"{round(100 * q)} % of M's singular values, relative to the largest, lie below it.",
        )
        for q in QUANTILES
    },
    "oracle_quality": (
        "Oracle: ⟨M, D⟩ / dual norm of M",
        "1 for an exact direction; below .97 the solver needs more steps.",
    ),
    "oracle_residual": (
        "Oracle: part of the momentum left to error feedback",
        "‖M - M_k‖_F / ‖M‖_F with M_k the part that the step has used.",
    ),
    "update_rms": ("Update: root mean square", "‖ΔW‖_F / √(rows · cols), weight decay included."),
    "update_spectral": ("Update: spectral norm", "The largest singular value of the change ΔW."),
    "update_relative": ("Update: ‖ΔW‖ / ‖W‖", "Length of the change over that of W."),
    "update_lr": (
        "Update: lr after the shape rule",
        "lr times the step-size factor of the matrix's shape.",
    ),
    "update_skipped": (
        "Update: skipped steps so far",
        "Steps left out because a gradient was not finite.",
    ),
    "weight_spectral": (
        "Weight: spectral norm",
        "The largest singular value of W before the step.",
    ),
    "weight_stable_rank": ("Weight: stable rank", "‖W‖_F² / σ₁², from 1 (rank one) to n."),
    "smoothness_estimate": (
        "Smoothness: L of the last step, in the ball's norm",
        "Dual norm of the change of a fixed batch's gradient over the norm of the change of W.",
    ),
    "smoothness_constant": ("Smoothness: L₀", "L ≈ L₀ + L₁ ‖G‖† over the looks so far, L₀ ≥ 0."),
    "smoothness_slope": ("Smoothness: L₁", "L ≈ L₀ + L₁ ‖G‖† over the looks so far, L₁ ≥ 0."),
    "smoothness_gluon_lr": ("Smoothness: step of Gluon", "‖G‖† / (L₀ + L₁ ‖G‖†)."),
    "smoothness_descent_lr": (
        "Smoothness: step of Lemma 7",
        "‖G‖† over the largest L so far, the step with the best guaranteed decrease.",
    ),
    "smoothness_lr": ("Smoothness: step in use", "lr times the step-size factor."),
}
# The part of a name before the first underscore is its family.
QUANTITIES = {name: Quantity(*text) for name, text in _QUANTITIES.items()}
