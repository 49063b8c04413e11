r"""The balls of Muon, F-Muon and F-Neon, and of the Ky Fan 2-norm and its dual (Figures 3 to 5).

The axes are singular values, unsorted and with signs: a point is a diagonal matrix, and the balls
are drawn by evaluating norms of such matrices, the polyhedra by the vertices and faces that the
oracles of a norm and of its dual answer with. Where alpha is outside [0, 1] there is no ball, and
what is drawn are the steps.

  python -m experiments.paper balls
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from experiments.paper import verdicts
from experiments.paper.outcome import Claim, Outcome
from lit_fanions import norms
from lit_fanions.cli.console import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TIME = "ten seconds; quick: a few seconds"
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
OUTSIDE = (-0.1, 1.1)  # that the article tries
DIRECTIONS, QUICK_DIRECTIONS = 720, 48  # of a plane, multiples of 8
SAMPLES, QUICK_SAMPLES = 4000, 400  # directions and points of space
EXACT = 1e-9
DUALS: dict[str, norms.Norm] = {"F*": norms.Spectral(), "F2": norms.Nuclear()}


class Polyhedron(NamedTuple):
    """A ball in space.

    Attributes:
        vertices: (count, 3).
        faces: The vertices of each, in order.
    """

    vertices: Tensor
    faces: list[Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--seed", type=int, default=0, help="of the points that claims are tried on (default: 0)"
    )


def run(options: argparse.Namespace) -> int:
    """Draw, measure and compare.

    Args:
        options: See ``add_arguments``.

    Returns:
        The exit status, 0.
    """
    count = QUICK_DIRECTIONS if options.quick else DIRECTIONS
    samples = QUICK_SAMPLES if options.quick else SAMPLES
    points = torch.randn(
        samples, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(options.seed)
    )
    circle = _circle(count)
    planes = {
        (dual, alpha): circle / value(norms.Blend(norm, alpha), circle).unsqueeze(-1)
        for dual, norm in DUALS.items()
        for alpha in ALPHAS
    }
    steps = {alpha: oracle(norms.Blend(norms.Spectral(), alpha), circle) for alpha in OUTSIDE}
    solids = {
        "Ky Fan 2": polyhedron(norms.KyFan(2), norms.KyFanDual(2), points),
        "dual of Ky Fan 2": polyhedron(norms.KyFanDual(2), norms.KyFan(2), points),
    }
    outcome = Outcome(
        tables=[_planes_table(planes), _solids_table(solids)],
        columns=["figure", "ball", "alpha", "x", "y", "z"],
        rows=[
            *(
                ["4", f"dual of {dual}", alpha, *point, 0.0]
                for (dual, alpha), curve in planes.items()
                for point in curve.tolist()
            ),
            *(
                ["3", "steps", alpha, *p, 0.0]
                for alpha, curve in steps.items()
                for p in curve.tolist()
            ),
            *(
                ["5", name, None, *p]
                for name, solid in solids.items()
                for p in solid.vertices.tolist()
            ),
        ],
        settings={
            "alphas": ALPHAS,
            "outside": OUTSIDE,
            "directions": count,
            "samples": samples,
            "seed": options.seed,
        },
        draw=lambda figure: _draw(figure, planes, steps, solids),
        size=(15, 10.5),
        claims=[] if options.quick else [_sums(planes, circle), _ky_fan(points), _outside(circle)],
    )
    print(outcome)
    outcome.save(options.out, "balls")
    return 0


# Norms of points, as norms of diagonal matrices.


def value(norm: norms.Norm, points: Tensor) -> Tensor:
    """The norm of diagonal matrices: (..., n) -> (...)."""
    return norm.value(torch.diag_embed(points))


def oracle(norm: norms.Norm, points: Tensor) -> Tensor:
    """The diagonal of the oracle's answer, which is diagonal too: (..., n) -> (..., n)."""
    return norm.lmo(torch.diag_embed(points)).diagonal(dim1=-2, dim2=-1)


def polyhedron(norm: norms.Norm, dual: norms.Norm, directions: Tensor) -> Polyhedron:
    """The ball of a norm in three singular values, from what oracles answer to some directions.

    Args:
        norm: Its oracle answers with vertices of the ball.
        dual: The dual norm, whose oracle answers with the normals of the ball's faces.
        directions: (count, 3), enough to meet every vertex.
    """
    vertices = _distinct(oracle(norm, directions))
    faces = []
    for normal in _distinct(oracle(dual, directions)):
        face = vertices[vertices @ normal > 1 - EXACT]
        across = face[0] - face.mean(0)
        turned = torch.linalg.cross(normal / normal.norm(), across)
        around = face - face.mean(0)
        faces.append(face[torch.atan2(around @ turned, around @ across).argsort()])
    return Polyhedron(vertices, faces)


def _distinct(points: Tensor) -> Tensor:
    return torch.unique((points / EXACT).round(), dim=0) * EXACT


def _circle(count: int) -> Tensor:
    angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return torch.stack([angles.cos(), angles.sin()], -1)


# Tables.


def _area(curve: Tensor) -> float:
    x, y = curve.unbind(-1)
    return 0.5 * float((x * y.roll(-1) - y * x.roll(-1)).sum().abs())


def _planes_table(planes: dict[tuple[str, float], Tensor]) -> Table:
    cells = []
    for (dual, alpha), curve in planes.items():
        on_axis, on_diagonal = curve[0].norm().item(), curve[len(curve) // 8].norm().item()
        cells.append([f"dual of {dual}", f"{alpha:g}", on_axis, on_diagonal, _area(curve)])
    columns = ["ball", "alpha", "reach along an axis", "along the diagonal", "area"]
    return Table("In the plane of two singular values", columns, cells)


def _solids_table(solids: dict[str, Polyhedron]) -> Table:
    cells = [
        [name, len(solid.vertices), len(solid.faces), _sides(solid)]
        for name, solid in solids.items()
    ]
    return Table(
        "In the space of three singular values", ["ball", "vertices", "faces", "sides"], cells
    )


def _sides(solid: Polyhedron) -> str:
    counts = [len(face) for face in solid.faces]
    return ", ".join(f"{counts.count(sides)} of {sides}" for sides in sorted(set(counts)))


# Claims.


def _sums(planes: dict[tuple[str, float], Tensor], circle: Tensor) -> Claim:
    # How far a ball reaches in a direction adds up in a Minkowski sum.
    def error(swapped: bool) -> float:
        worst = 0.0
        for (dual, alpha), curve in planes.items():
            reach = (circle @ curve.mT).amax(-1)
            spectral = (dual == "F*") != swapped  # the ball that has the weight alpha
            norm = norms.Spectral() if spectral else norms.Nuclear()
            of_parts = torch.diag_embed(circle)
            expected = alpha * norm.dual(of_parts) + (1 - alpha)
            worst = max(worst, (reach - expected).abs().max().item())
        return worst

    # A polygon of that many directions misses as much of a round ball.
    fine = 2 * math.pi / len(circle)
    printed, lemma = error(swapped=True), error(swapped=False)
    return Claim(
        "blend-balls",
        verdicts.of(printed <= fine),
        f"the drawn balls reach as far as such a sum within {printed:.2g}; as the sum with the "
        f"spectral ball for F* and the nuclear ball for F2 within {lemma:.2g}",
        f"two singular values, {len(circle)} directions, alpha = "
        f"{', '.join(f'{alpha:g}' for alpha in ALPHAS)}",
        len(circle),
        f"Confirmed if they reach equally far within {fine:.2g}, the distance of the directions. "
        "Lemma 9 has the balls of the dual norms: spectral for F* (F-Muon), nuclear for F2 "
        "(F-Neon).",
    )


def _ky_fan(points: Tensor) -> Claim:
    # Some of the points lie inside, some outside of each ball.
    x = points.abs()
    pairs = torch.stack([x[:, :2].sum(-1), x[:, 1:].sum(-1), x[:, ::2].sum(-1)], -1)
    first = _agreement(value(norms.KyFan(2), points) <= 1, (pairs <= 1).all(-1))
    inside, cube = value(norms.KyFanDual(2), points) <= 1, x.amax(-1) <= 1
    printed, right = (_agreement(inside, cube & (x.sum(-1) <= radius)) for radius in (0.5, 2.0))
    return Claim(
        "ky-fan-balls",
        verdicts.of(first == printed == 1),
        f"of random points the three l1-balls (of two coordinates each) have {first:.1%} on the "
        f"right side; l_inf and l1 of radius 1/2 {printed:.1%}, of radius 2 {right:.1%}",
        "three singular values, normally distributed points",
        len(points),
        "Confirmed if all points are. The text's formula, max(|x|, |y|, |z|, (|x| + |y| + |z|) / "
        "2), has the l1-ball of radius 2.",
    )


def _agreement(a: Tensor, b: Tensor) -> float:
    return (a == b).double().mean().item()


def _outside(circle: Tensor) -> Claim:
    def surpassed(alpha: float) -> float:
        """In how many directions another step goes further than the direction's own."""
        steps = oracle(norms.Blend(norms.Spectral(), alpha), circle)
        reach = circle @ steps.mT
        return (reach.amax(-1) > reach.diagonal() + EXACT).double().mean().item()

    inside = max(surpassed(alpha) for alpha in ALPHAS)
    outside = {alpha: surpassed(alpha) for alpha in OUTSIDE}
    return Claim(
        "outside-ball",
        verdicts.of(inside == 0 and min(outside.values()) > 0),
        "directions in which another of the steps goes further than the direction's own: "
        + ", ".join(f"alpha = {alpha:g}: {share:.0%}" for alpha, share in outside.items())
        + f"; alpha in [0, 1]: {inside:.0%}",
        "two singular values",
        len(circle),
        "Confirmed if there are some for every alpha outside, and none for those in [0, 1].",
    )


# The picture.


def _draw(
    figure: Figure,
    planes: dict[tuple[str, float], Tensor],
    steps: dict[float, Tensor],
    solids: dict[str, Polyhedron],
) -> None:
    halves: Any = figure.subfigures(2, 1)
    top, bottom = halves
    muon, *blends = top.subplots(1, 3)
    for alpha, label in ((1.0, "Muon"), (0.5, "F-Muon, α = 0.5"), (0.0, "NSGD")):
        _curve(muon, planes["F*", alpha], label=label, alpha=0.12)
    for (alpha, curve), style in zip(steps.items(), ("--", ":"), strict=True):
        # Its parts do not meet at the axes: they are no outline of a set.
        jumps = (curve - curve.roll(1, 0)).norm(dim=-1) > 0.1
        gaps = torch.where(jumps.unsqueeze(-1), math.nan, curve)
        muon.plot(*gaps.mT, style, color="black", linewidth=1, label=f"steps, α = {alpha:g}")
    _plane(muon, "Figure 3: balls of Muon and F-Muon")
    for axes, panel, (dual, algorithm) in zip(
        blends, "ab", (("F*", "F-Muon"), ("F2", "F-Neon")), strict=True
    ):
        for i, alpha in enumerate(ALPHAS):
            color = _color(i, len(ALPHAS))
            _curve(axes, planes[dual, alpha], label=f"α = {alpha:g}", color=color)
        _plane(axes, f"Figure 4{panel}: balls of the dual of {dual} ({algorithm})")
    titles = ("Figure 5a: ball of the Ky Fan 2-norm", "Figure 5b: ball of its dual")
    solid_axes = bottom.subplots(1, 2, subplot_kw={"projection": "3d"})
    for axes, title, solid in zip(solid_axes, titles, solids.values(), strict=True):
        _solid(axes, solid)
        axes.set_title(title)


def _color(i: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](i / count)


def _curve(axes: Axes, curve: Tensor, label: str, color: Any = None, alpha: float = 0.0) -> None:
    closed = torch.cat([curve, curve[:1]])
    (line,) = axes.plot(*closed.mT, color=color, label=label)
    if alpha:
        axes.fill(*closed.mT, color=line.get_color(), alpha=alpha, linewidth=0)


def _plane(axes: Axes, title: str) -> None:
    axes.set(xlabel="σ₁", ylabel="σ₂", title=title, xlim=(-1.35, 1.35), ylim=(-1.35, 1.35))
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="center", fontsize=9)


def _solid(axes: Any, solid: Polyhedron) -> None:
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
