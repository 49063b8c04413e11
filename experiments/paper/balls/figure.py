"""The picture of balls: Figures 3 to 5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.paper.balls.geometry import ALPHAS, Outlines, Polyhedron

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(
    figure: Figure,
    planes: Outlines,
    steps: dict[float, Tensor],
    solids: dict[str, Polyhedron],
) -> None:
    """Draw the balls of the plane above, those of space below.

    Args:
        figure: An empty figure.
        planes: Outlines of balls by dual norm and alpha.
        steps: Steps with alpha outside [0, 1], by alpha.
        solids: The two balls in space by name.
    """
    halves: Any = figure.subfigures(2, 1)
    top, bottom = halves
    muon, *blends = top.subplots(1, 3)
    for alpha, label in ((1.0, "Muon"), (0.5, "F-Muon, α = 0.5"), (0.0, "NSGD")):
        _draw_curve(muon, planes["F*", alpha], label=label, alpha=0.12)
    for (alpha, curve), style in zip(steps.items(), ("--", ":"), strict=True):
        # The parts do not meet at the axes, because they are no outline of a set: leave gaps.
        jumps = (curve - curve.roll(1, 0)).norm(dim=-1) > 0.1
        gaps = torch.where(jumps.unsqueeze(-1), math.nan, curve)
        muon.plot(*gaps.mT, style, color="black", linewidth=1, label=f"steps, α = {alpha:g}")
    _finish_plane(muon, "Figure 3: balls of Muon and F-Muon")
    for axes, panel, (dual, algorithm) in zip(
        blends, "ab", (("F*", "F-Muon"), ("F2", "F-Neon")), strict=True
    ):
        for i, alpha in enumerate(ALPHAS):
            color = _viridis(i, len(ALPHAS))
            _draw_curve(axes, planes[dual, alpha], label=f"α = {alpha:g}", color=color)
        _finish_plane(axes, f"Figure 4{panel}: balls of the dual of {dual} ({algorithm})")
    titles = ("Figure 5a: ball of the Ky Fan 2-norm", "Figure 5b: ball of its dual")
    solid_axes = bottom.subplots(1, 2, subplot_kw={"projection": "3d"})
    for axes, title, solid in zip(solid_axes, titles, solids.values(), strict=True):
        _draw_solid(axes, solid)
        axes.set_title(title)


def _viridis(i: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](i / count)


def _draw_curve(
    axes: Axes, curve: Tensor, label: str, color: Any = None, alpha: float = 0.0
) -> None:
    closed = torch.cat([curve, curve[:1]])
    (line,) = axes.plot(*closed.mT, color=color, label=label)
    if alpha:
        axes.fill(*closed.mT, color=line.get_color(), alpha=alpha, linewidth=0)


def _finish_plane(axes: Axes, title: str) -> None:
    axes.set(xlabel="σ₁", ylabel="σ₂", title=title, xlim=(-1.35, 1.35), ylim=(-1.35, 1.35))
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="center", fontsize=9)


def _draw_solid(axes: Any, solid: Polyhedron) -> None:
    from matplotlib.colors import LightSource
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    faces: Sequence[Any] = [face.numpy() for face in solid.faces]
    axes.add_collection3d(
        Poly3DCollection(
            faces,
            facecolors="tab:blue",
            edgecolors="black",
            linewidths=0.8,
            alpha=0.75,
            shade=True,
            lightsource=LightSource(azdeg=225, altdeg=35),
        )
    )
    ends, ticks = (-1, 1), (-1, -0.5, 0, 0.5, 1)
    axes.set(xlim=ends, ylim=ends, zlim=ends, xticks=ticks, yticks=ticks, zticks=ticks)
    axes.set(xlabel="σ₁", ylabel="σ₂", zlabel="σ₃")
    axes.set_box_aspect((1, 1, 1), zoom=0.9)
    axes.view_init(elev=22, azim=-58)
