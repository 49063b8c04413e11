"""How large a gradient is in each norm, and when: what the models of convex problems log."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_fanions import norms
from lit_fanions.callbacks import quantities
from lit_fanions.optim.functional import resolve_rank

NORMS = ("spectral", "frobenius", "nuclear", "dual")


def gradient_norms(gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The norms of ``NORMS``: the dual norms of neon, of nsgd, of muon, and of the group's own.

    Args:
        gradient: (..., rows, cols).
        group: Options of the parameter group of ``Fanion`` that steps along it.

    Returns:
        (4, ...), float64.
    """
    spectrum = quantities.spectrum(gradient, exact=True)
    found = (
        quantities.spectral(spectrum),
        spectrum.frobenius,
        quantities.nuclear(spectrum),
        quantities.own_dual(spectrum, gradient, group),
    )
    return torch.stack(found)


def is_logged(step: int, every: int, per_decade: int) -> bool:
    """Whether a step is one of those that a plot over a linear or a logarithmic axis needs.

    Args:
        step: Counted from 0, which is one.
        every: So are the multiples of this.
        per_decade: So are about so many from each power of ten to the next, evenly spread.
    """
    if step % every == 0 or step == 1:
        return True
    places = (math.floor(per_decade * math.log10(k)) for k in (step, step - 1))
    return next(places) > next(places)


def own_norm(group: Mapping[str, Any], rows: int, cols: int) -> norms.Norm:
    """The norm in whose ball a parameter group of ``Fanion`` steps.

    Args:
        group: Its options; not of dion, adamw and sgd.
        rows: Of the matrices.
        cols: Of the matrices.
    """
    rank = resolve_rank(group["rank"], rows, cols)
    balls = {"coordinate": norms.SumEntry(), "kyfan": norms.KyFan(rank)}
    ball = balls.get(group["algorithm"], norms.KyFanDual(rank))
    if group["alpha"] == 1:
        return ball
    return norms.Blend(ball, group["alpha"], group["blend"], group["sign_scale"])
