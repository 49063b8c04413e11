r"""The balls of Muon, F-Muon and F-Neon, and of the Ky Fan 2-norm and its dual (Figures 3 to 5).

The axes are singular values, unsorted and with signs: a point is a diagonal matrix. The curves are
drawn by evaluating norms of such matrices, the polyhedra from the vertices and faces that the
oracles of a norm and of its dual return. For alpha outside [0, 1] there is no ball, and the steps
are drawn instead.

  python -m experiments.paper balls
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from experiments.paper.balls import claims, figure, geometry
from experiments.paper.balls.geometry import Outlines, Polyhedron, polyhedron
from experiments.paper.outcome import Claim, Outcome
from lit_fanions import norms
from lit_fanions.cli.console import Table

TIME = "ten seconds; quick: a few seconds"
DIRECTIONS, QUICK_DIRECTIONS = 720, 48  # in a plane; multiples of 8
SAMPLES, QUICK_SAMPLES = 4000, 400  # random directions and points in space


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the points that claims are tried on (default: 0)",
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
    circle = geometry.circle_of_directions(count)
    planes, steps = geometry.ball_outlines(circle), geometry.steps_outside(circle)
    solids = {
        "Ky Fan 2": polyhedron(norms.KyFan(2), norms.KyFanDual(2), points),
        "dual of Ky Fan 2": polyhedron(norms.KyFanDual(2), norms.KyFan(2), points),
    }
    judged: list[Claim] = []
    if not options.quick:
        judged = [
            claims.judge_blend_balls(planes, circle),
            claims.judge_ky_fan_balls(points),
            claims.judge_outside(circle),
        ]
    outcome = Outcome(
        tables=[_planes_table(planes), _solids_table(solids)],
        columns=["figure", "ball", "alpha", "x", "y", "z"],
        rows=_rows(planes, steps, solids),
        settings={
            "alphas": geometry.ALPHAS,
            "outside": geometry.OUTSIDE,
            "directions": count,
            "samples": samples,
            "seed": options.seed,
        },
        draw=lambda canvas: figure.draw(canvas, planes, steps, solids),
        size=(15, 10.5),
        claims=judged,
        arguments=options.arguments,
    )
    print(outcome)
    outcome.save(options.out, "balls")
    return 0


def _rows(
    planes: Outlines, steps: dict[float, Tensor], solids: dict[str, Polyhedron]
) -> list[list[object]]:
    """Return all points that are drawn as rows of the CSV."""
    return [
        *(
            ["4", f"dual of {dual}", alpha, *point, 0.0]
            for (dual, alpha), curve in planes.items()
            for point in curve.tolist()
        ),
        *(["3", "steps", alpha, *p, 0.0] for alpha, curve in steps.items() for p in curve.tolist()),
        *(["5", name, None, *p] for name, ball in solids.items() for p in ball.vertices.tolist()),
    ]


def _area(curve: Tensor) -> float:
    """Return the area inside a closed curve, (count, 2)."""
    x, y = curve.unbind(-1)
    return 0.5 * float((x * y.roll(-1) - y * x.roll(-1)).sum().abs())


def _planes_table(planes: Outlines) -> Table:
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
    """Return how many faces have how many sides, in words."""
    counts = [len(face) for face in solid.faces]
    return ", ".join(f"{counts.count(sides)} of {sides}" for sides in sorted(set(counts)))
