"""What is compared, and the results by learning rate and seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from experiments.paper.outcome import Claim
from lit_fanions.cli.console import Refused, Table
from lit_fanions.cli.curves import Curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LR = "--model.init_args.optimizer.matrix.lr"
NO_BEST = "A training failed, or a better lr may lie beyond the last one tried."
Key = tuple[str, float, int]  # variant, lr, seed
Results = dict[Key, Curves]
Finals = Mapping[str, Mapping[int, float]]  # variant -> seed -> last value of the first metric


@dataclass(frozen=True)
class Variant:
    """One of the trainings that are compared.

    Args:
        path: Its recipe.
        lr: Learning rate of its matrices to begin with.
        args: Further arguments of fit.
    """

    path: Path
    lr: float
    args: tuple[str, ...] = ()


def variants_as_stated(paths: Mapping[str, Path]) -> dict[str, Variant]:
    """Return the recipes as they are, to begin with the lr that they state."""
    return {name: Variant(path, stated_lr(path)) for name, path in paths.items()}


def stated_lr(path: Path) -> float:
    """Return the lr of the matrices that a recipe states.

    Raises:
        Refused: If it states none, or one that is not positive.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        lr = float(content["model"]["init_args"]["optimizer"]["matrix"]["lr"])
    except OSError as error:
        raise Refused(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise Refused(f"--config: {path} states no model.init_args.optimizer.matrix.lr") from None
    if not (math.isfinite(lr) and lr > 0):
        raise Refused(f"--config: {path} states the lr {lr:g}: it must be positive")
    return lr


@dataclass(frozen=True)
class Comparison:
    """What a command compares and concludes.

    Args:
        name: Name of the command.
        metrics: Scalars in the logs; the last value of the first is to be small.
        recipes: Patterns of the recipes that are trained by default.
        quick: What --quick trains, see ``repetitions.plan``.
        seeds: Number of seeds by default.
        data: The data of the recipes, in words.
        logarithmic: Whether metrics are shown on logarithmic axes.
        make_variants: Returns what is trained, given the recipes.
        judge: Returns verdicts on the paper's claims, given last values and the data in words. It
            gets only those variants whose best lr is certain, not those with a best at the edge.
        draw: Draws the last values of the variants whose best lr is certain; by default curves and
            learning rates are drawn.
        beside: Variants, and the variant that each is compared with at equal seeds.
        tabulate: Returns further tables of last values of the variants whose best lr is certain.
    """

    name: str
    metrics: Sequence[str]
    recipes: Sequence[str]
    quick: Sequence[str]
    seeds: int
    data: str = ""
    logarithmic: bool = False
    make_variants: Callable[[Mapping[str, Path]], dict[str, Variant]] = variants_as_stated
    judge: Callable[[Finals, str], Sequence[Claim]] = lambda finals, data: ()
    draw: Callable[[Figure, Finals], None] | None = None
    beside: Mapping[str, str] = field(default_factory=dict)
    tabulate: Callable[[Finals], Sequence[Table]] = lambda finals: ()


def losses_by_lr(name: str, results: Results, metric: str) -> dict[float, float]:
    """Return the last values of seed 0 by lr, ascending."""
    losses = {
        lr: curves[metric][-1][1]
        for (other, lr, seed), curves in results.items()
        if (other, seed) == (name, 0)
    }
    return dict(sorted(losses.items()))


def best_lr(name: str, results: Results, metric: str) -> float | None:
    """Return the lr of the lowest loss, the smallest of equal ones; None if no run succeeded."""
    losses = losses_by_lr(name, results, metric)
    return min(losses, key=lambda lr: (math.isnan(losses[lr]), losses[lr])) if losses else None
