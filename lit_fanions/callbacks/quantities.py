"""The quantities that the monitors log: names, titles, meanings; docs/quantities.md has more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lit_fanions.lmo.spectrum import QUANTILES, Spectrum
from lit_fanions.optim.algorithms import oracle

# Everything that SpectralMonitor logs has a tag that starts with this, so that loggers keep it
# apart from losses and metrics.
PREFIX = "spectral/"
_GROUP = "group/"


class Quantity(NamedTuple):
    """What is known of a quantity beside its name.

    Attributes:
        title: Heading of its plots.
        meaning: Its definition, in one sentence. G is the gradient, M the momentum as the
            direction sees it, D the direction, W the weight, n the smaller side of the matrix.
    """

    title: str
    meaning: str


class Tag(NamedTuple):
    """A tag of a logger, taken apart.

    Attributes:
        quantity: A key of ``QUANTITIES``.
        matrix: Name of the matrix, or of the group.
        is_group: True for the mean over a parameter group.
    """

    quantity: str
    matrix: str
    is_group: bool = False

    def __str__(self) -> str:
        """Return the tag as it is logged."""
        return f"{PREFIX}{self.quantity}/{_GROUP if self.is_group else ''}{self.matrix}"


def parse_tag(tag: str) -> Tag | None:
    """Return the parts of a tag of SpectralMonitor, or None for any other tag.

    Args:
        tag: The tag. Logs of version 0.1, whose tags have no prefix, are understood too.
    """
    quantity, _, matrix = tag.removeprefix(PREFIX).partition("/")
    if quantity not in QUANTITIES or not matrix:
        return None
    return Tag(quantity, matrix.removeprefix(_GROUP), matrix.startswith(_GROUP))


def _norms(what: str, x: str) -> dict[str, Quantity]:
    """Return the quantities that gradient and momentum have in common."""
    name = what.lower()
    return {
        f"{name}_dual": Quantity(
            f"{what}: dual norm of the group's ball",
            f"max ⟨{x}, D⟩ over the ball in which the group steps: the decrease of the loss, to "
            "first order, that a step of unit lr promises.",
        ),
        f"{name}_nuclear": Quantity(
            f"{what}: nuclear norm", f"‖{x}‖_*, the sum of all singular values; muon's dual norm."
        ),
        f"{name}_kyfan": Quantity(
            f"{what}: Ky Fan k norm", f"Sum of the k largest singular values of {x}."
        ),
        f"{name}_frobenius": Quantity(
            f"{what}: Frobenius norm", f"‖{x}‖_F, the length of {x} as a vector."
        ),
        f"{name}_spectral": Quantity(
            f"{what}: spectral norm", f"The largest singular value of {x}."
        ),
        f"{name}_nuclear_rank": Quantity(
            f"{what}: nuclear rank",
            f"‖{x}‖_*² / ‖{x}‖_F², from 1 (rank one) to n (all singular values equal).",
        ),
        f"{name}_energy": Quantity(
            f"{what}: energy in rank k",
            f"Part of ‖{x}‖_F² that the best approximation of rank k keeps, from 0 to 1.",
        ),
    }


# The part of a name before the first underscore is its family.
QUANTITIES = {
    **_norms("Gradient", "G"),
    **_norms("Momentum", "M"),
    **{
        f"momentum_quantile{round(100 * q)}": Quantity(
            f"Momentum: {round(100 * q)} % quantile of σ / σ₁",
            f"{round(100 * q)} % of M's singular values, relative to the largest, lie below it.",
        )
        for q in QUANTILES
    },
    "oracle_quality": Quantity(
        "Oracle: ⟨M, D⟩ / dual norm of M",
        "1 for an exact direction; below .97 the solver needs more steps.",
    ),
    "oracle_residual": Quantity(
        "Oracle: part of the momentum left to error feedback",
        "‖M - M_k‖_F / ‖M‖_F with M_k the part that the step has used.",
    ),
    "update_rms": Quantity(
        "Update: root mean square", "‖ΔW‖_F / √(rows · cols), weight decay included."
    ),
    "update_spectral": Quantity(
        "Update: spectral norm", "The largest singular value of the change ΔW."
    ),
    "update_relative": Quantity("Update: ‖ΔW‖ / ‖W‖", "Length of the change over that of W."),
    "update_lr": Quantity(
        "Update: lr after the shape rule", "lr times the step-size factor of the matrix's shape."
    ),
    "update_skipped": Quantity(
        "Update: skipped steps so far", "Steps left out because a gradient was not finite."
    ),
    "weight_spectral": Quantity(
        "Weight: spectral norm", "The largest singular value of W before the step."
    ),
    "weight_stable_rank": Quantity("Weight: stable rank", "‖W‖_F² / σ₁², from 1 (rank one) to n."),
}


def own_dual(s: Spectrum, x: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return the dual of the norm in whose ball a group steps: what its oracle can reach, (...).

    Args:
        s: Spectrum of the matrices.
        x: The matrices, (..., rows, cols).
        group: Options of one of ``Fanion``'s matrix groups.
    """
    return oracle(group, *x.shape[-2:]).dual(s, x)
