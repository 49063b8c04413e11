r"""Beyond the paper: do the blends close the gap to Muon as the network grows, and with more steps?

NanoGPT in three sizes at equal steps, and in three sizes with as many tokens for each parameter.
Each recipe has its own best learning rate at each size, found as by `nanogpt`, and is compared with
Muon of the same size at equal seeds. A line through the gaps over the logarithm of the number of
parameters, one for each seed, says how the gap changes, and where the paper's size would be if the
line held so far.

  python -m experiments.paper sizes --jobs 2 --data.data_dir data/fineweb_bytes

--data.data_dir is a folder made by `python -m datamodules.fineweb tokenize` (see its --help). All
other options are passed to `fit` for every run.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.paper import tuning, verdicts
from experiments.paper.nanogpt import COMPARISON as NANOGPT
from experiments.paper.tuning import Finals, Variant
from lit_fanions.cli.console import Refused, Table
from lit_fanions.cli.results import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TIME = "about six hours; quick: half a minute"
REFERENCE, *RIVALS = "muon_cpu", "f_muon_cpu", "s_muon_cpu", "adamw_cpu"
QUICK = Path(NANOGPT.quick[0]).stem
_NETWORK = "--model.init_args.network"


@dataclass(frozen=True)
class _Size:
    """A NanoGPT and the length of its training.

    Attributes:
        layers: Number of blocks.
        width: Width of the residual stream; heads are 64 wide.
        steps: Number of optimizer steps.
    """

    layers: int
    width: int
    steps: int = 150

    @property
    def parameters(self) -> int:
        """The number of parameters in the matrices of the blocks, without the embeddings."""
        return 12 * self.layers * self.width**2

    @property
    def network(self) -> tuple[str, ...]:
        """The arguments of fit for the network."""
        sizes = {
            "layers": self.layers,
            "width": self.width,
            "heads": self.width // 64,
            "mlp_width": 4 * self.width,
        }
        return tuple(f"{_NETWORK}.{name}={value}" for name, value in sizes.items())

    @property
    def length(self) -> tuple[str, ...]:
        """The arguments of fit for the length of the training."""
        return f"--trainer.max_steps={self.steps}", f"--data.val_every_n_steps={self.steps}"


SIZES = {
    "2x64": _Size(2, 64),
    "4x128": _Size(4, 128),
    "6x192": _Size(6, 192),
    "2x64-75-steps": _Size(2, 64, 75),
    "2x128-300-steps": _Size(2, 128, 300),
    "4x128-600-steps": _Size(4, 128, 600),
}
SERIES = {
    "150 steps": ("2x64", "4x128", "6x192"),
    "equal tokens per parameter": ("2x64-75-steps", "2x128-300-steps", "4x128-600-steps"),
}
PAPER = _Size(12, 768).parameters  # of the 276 million of the paper's NanoGPT
BESIDE = {f"{rival}-{size}": f"{REFERENCE}-{size}" for size in SIZES for rival in RIVALS}


def make_variants(paths: Mapping[str, Path]) -> dict[str, Variant]:
    """Return every recipe in every size, to begin with the lr that it states.

    Args:
        paths: Recipes by name: some of those that are compared.

    Raises:
        Refused: If a recipe is not compared here.
    """
    known = (REFERENCE, *RIVALS, QUICK)
    if unknown := sorted(paths.keys() - set(known)):
        raise Refused(f"--config: {unknown[0]} is not compared; give some of {', '.join(known)}")
    return {
        f"{name}-{size}": Variant(
            path, tuning.stated_lr(path), own.network + own.length * (name != QUICK)
        )
        for size, own in SIZES.items()
        for name, path in paths.items()
    }


def gaps(finals: Finals, rival: str, sizes: Sequence[str]) -> dict[str, dict[int, float]]:
    """Return a recipe's loss minus Muon's, by size and seed; sizes without both are left out.

    Args:
        finals: Last losses by variant and seed.
        rival: Name of the recipe.
        sizes: Names of sizes.
    """
    pairs = {
        size: (finals.get(f"{rival}-{size}", {}), finals.get(f"{REFERENCE}-{size}", {}))
        for size in sizes
    }
    return {
        size: {seed: own[seed] - muon[seed] for seed in sorted(own.keys() & muon.keys())}
        for size, (own, muon) in pairs.items()
        if own.keys() & muon.keys()
    }


def tabulate_trends(finals: Finals) -> list[Table]:
    """Return the table of what ten times as many parameters change, or none without two sizes.

    Args:
        finals: Last losses by variant and seed.
    """
    trends = (_trend(finals, rival, series) for series in SERIES for rival in RIVALS)
    rows = [row for row in trends if row]
    title = (
        f"gap to {REFERENCE}: a line for each seed over log10 of the parameters in matrices; the "
        "intervals are those of the seeds and do not say whether the line holds"
    )
    columns = [
        *("recipe", "sizes", "ten times as many"),
        *(f"at {PAPER / 1e6:.0f} M", "means are off it by"),
    ]
    return [Table(title, columns, rows)] if rows else []


def _trend(finals: Finals, rival: str, series: str) -> list[str]:
    """Return a row of the table of trends, empty without two sizes or a seed that all have."""
    found = gaps(finals, rival, SERIES[series])
    seeds = sorted(set.intersection(*map(set, found.values()))) if len(found) > 1 else []
    if not seeds:
        return []
    lines = {
        seed: _fit_line({SIZES[size].parameters: own[seed] for size, own in found.items()})
        for seed in seeds
    }
    zero = dict.fromkeys(seeds, 0.0)
    slope = {seed: slope for seed, (slope, _) in lines.items()}
    there = {seed: level + slope * math.log10(PAPER) for seed, (slope, level) in lines.items()}
    off = max(
        abs(statistics.mean(own[seed] - _on_line(lines[seed], size) for seed in seeds))
        for size, own in found.items()
    )
    differences = (str(verdicts.mean_difference(x, zero)) for x in (slope, there))
    return [rival, series, *differences, f"{off:.4f}"]


def _fit_line(gaps: Mapping[int, float]) -> tuple[float, float]:
    """Return slope and level of the least-squares line of gaps over log10 of the parameters."""
    import numpy as np

    slope, level = np.polyfit(np.log10([*gaps]), [*gaps.values()], 1)
    return float(slope), float(level)


def _on_line(line: tuple[float, float], size: str) -> float:
    slope, level = line
    return level + slope * math.log10(SIZES[size].parameters)


def draw(figure: Figure, finals: Finals) -> None:
    """Draw the gaps over the number of parameters, with 95 % intervals.

    Args:
        figure: An empty figure.
        finals: Last losses by variant and seed.
    """
    series = [
        name for name, own in SERIES.items() if any(gaps(finals, rival, own) for rival in RIVALS)
    ]
    panels = figure.subplots(1, max(len(series), 1), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, series, strict=False):
        _draw_series(axes, finals, name)
    panels[0].set_ylabel(f"val/loss minus that of {REFERENCE}")


def _draw_series(axes: Axes, finals: Finals, series: str) -> None:
    for rival in RIVALS:
        means = {
            SIZES[size].parameters: verdicts.mean_difference(own, dict.fromkeys(own, 0.0))
            for size, own in gaps(finals, rival, SERIES[series]).items()
        }
        if means:
            axes.errorbar(
                [*means],
                drawable([gap.mean for gap in means.values()]),
                [gap.half_interval() for gap in means.values()],
                fmt="-o",
                color=f"C{RIVALS.index(rival)}",
                capsize=3,
                label=rival,
            )
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xscale("log")
    axes.set(xlabel="parameters in matrices", title=f"{series}, each at its own lr, 95 %")
    axes.legend()


COMPARISON = tuning.Comparison(
    name="sizes",
    metrics=NANOGPT.metrics,
    recipes=tuple(f"configs/nanogpt/{name}.yaml" for name in (REFERENCE, *RIVALS)),
    quick=NANOGPT.quick,
    seeds=5,
    data="web text, NanoGPT in several sizes",
    make_variants=make_variants,
    draw=draw,
    beside=BESIDE,
    tabulate=tabulate_trends,
)

add_arguments = functools.partial(tuning.add_arguments, comparison=COMPARISON)
run = functools.partial(tuning.run, comparison=COMPARISON)
