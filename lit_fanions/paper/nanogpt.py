r"""NanoGPT with each algorithm at its own best learning rate, on equal tokens (section 5.3).

Every recipe is trained at several learning rates of its matrices, multiples of the one that it
states, with one seed; while the best is the smallest or the largest one, the next beyond is tried
too. At the best, it is trained with more seeds. The outcome: final validation losses in a table and
as CSV, curves and the losses over the learning rates as a picture, everything as JSON.

  python -m lit_fanions.paper nanogpt --config configs/nanogpt/*_cpu.yaml --out results/nanogpt \\
      --data.data_dir data/fineweb_bytes

Other arguments are those of fit and hold for every run.
"""

import argparse
import csv
import json
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import yaml

from lit_fanions.bench.report import Refused, machine, table
from lit_fanions.paper.runs import Curve, Run, execute, finite, mean_curve, spread

TIME = "(an hour on 2 cores for seven algorithms)"
METRIC = "val/loss"
LR = "--model.init_args.optimizer.matrix.lr"
Key = tuple[str, float, int]  # recipe, lr, seed
Results = dict[Key, Curve]
EXTENSIONS = 3  # of the range of learning rates, each by one more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command; all others are those of fit."""
    parser.add_argument(
        "--config", type=Path, nargs="+", required=True, metavar="FILE", help="recipes to compare"
    )
    parser.add_argument(
        "--factors",
        type=float,
        nargs="+",
        default=[0.5, 1.0, 2.0],
        help="learning rates to try, as multiples of the recipe's; at least two",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs at the best learning rate")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to")


def run(options: argparse.Namespace, recipe: Sequence[str]) -> int:
    """Train, tabulate and plot.

    Args:
        options: See ``add_arguments``.
        recipe: Further arguments of fit.

    Returns:
        The exit status: 0, or 1 if a run failed.
    """
    if len(options.factors) < 2 or min(options.factors) <= 0:
        raise Refused("--factors: give two or more positive numbers")
    if options.seeds < 1 or options.jobs < 1:
        raise Refused("--seeds and --jobs must be at least 1")
    paths = {path.stem: path for path in options.config}
    if len(paths) < len(options.config):
        raise Refused("--config: two recipes have the same file name")
    grid = {
        name: sorted(_stated_lr(path) * factor for factor in options.factors)
        for name, path in paths.items()
    }
    done: Results = {}
    failed: list[str] = []

    def train(keys: Set[Key]) -> None:
        runs = {}
        for name, lr, seed in sorted(keys - done.keys()):
            args = (f"--config={paths[name]}", f"--seed_everything={seed}", f"{LR}={lr:g}")
            runs[name, lr, seed] = Run(f"{name}-lr{lr:g}-seed{seed}", (*args, *recipe))
        curves = execute(runs.values(), options.out / "runs", METRIC, options.jobs)
        done.update({key: curves[run.name] for key, run in runs.items() if run.name in curves})
        failed.extend(run.name for run in runs.values() if run.name not in curves)

    for _ in range(EXTENSIONS + 1):
        train({(name, lr, 0) for name, lrs in grid.items() for lr in lrs})
        for name, lrs in grid.items():
            chosen = _best_lr(name, done)
            if chosen == lrs[0]:
                lrs.insert(0, lrs[0] ** 2 / lrs[1])
            elif chosen == lrs[-1]:
                lrs.append(lrs[-1] ** 2 / lrs[-2])
    best = {name: lr for name in grid if (lr := _best_lr(name, done)) is not None}
    train({(name, lr, seed) for name, lr in best.items() for seed in range(options.seeds)})
    if not best:
        raise Refused("every run failed; their output is in output.txt of each")
    _report(options.out, done, best, list(recipe))
    if failed:
        print(f"{len(failed)} runs failed; their output is in {options.out}/runs/*/output.txt")
    return int(bool(failed))


def _stated_lr(path: Path) -> float:
    try:
        content = yaml.safe_load(path.read_text())
        return float(content["model"]["init_args"]["optimizer"]["matrix"]["lr"])
    except FileNotFoundError:
        raise Refused(f"--config: there is no file {path}") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise Refused(f"--config: {path} states no model.init_args.optimizer.matrix.lr") from None


def _best_lr(name: str, done: Results) -> float | None:
    losses = {lr: curve[-1][1] for (n, lr, seed), curve in done.items() if n == name and seed == 0}
    return min(losses, key=lambda lr: losses[lr]) if losses else None


def _report(folder: Path, done: Results, best: Mapping[str, float], recipe: list[str]) -> None:
    chosen = {
        name: [curve for (n, lr, _), curve in sorted(done.items()) if (n, lr) == (name, best[name])]
        for name in best
    }
    finals = {name: spread([curve[-1][1] for curve in curves]) for name, curves in chosen.items()}
    order = sorted(best, key=lambda name: finals[name])
    tried = {
        name: [
            (lr, c[-1][1]) for (n, lr, seed), c in sorted(done.items()) if n == name and not seed
        ]
        for name in order
    }
    rows = [
        [
            name,
            f"{best[name]:g}",
            "{:.4f} ± {:.4f}".format(*finals[name]),
            len(chosen[name]),
            "  ".join(f"{lr:g}: {loss:.4f}" for lr, loss in tried[name]),
        ]
        for name in order
    ]
    print(table(["recipe", "lr", METRIC, "seeds", "by lr, seed 0"], rows))
    with (folder / "nanogpt.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["recipe", "lr", "seed", "step", METRIC])
        for (name, lr, seed), curve in sorted(done.items()):
            writer.writerows([name, f"{lr:g}", seed, step, value] for step, value in curve)
    runs = [
        {"recipe": name, "lr": lr, "seed": seed, "curve": finite(curve)}
        for (name, lr, seed), curve in sorted(done.items())
    ]
    contents = {"machine": machine(), "arguments": recipe, "best_lr": dict(best), "runs": runs}
    (folder / "nanogpt.json").write_text(json.dumps(contents, indent=2) + "\n")
    _plot(folder / "nanogpt.png", {name: chosen[name] for name in order}, finals, tried)
    print(f"saved: {folder}/nanogpt.png, .csv, .json")


def _plot(
    path: Path,
    chosen: Mapping[str, Sequence[Curve]],
    finals: Mapping[str, tuple[float, float]],
    tried: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Curves at the best learning rates, and the last losses at all of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for name, curves in chosen.items():
        steps, means, deviations = mean_curve(curves)
        (line,) = left.plot(steps, means, label=f"{name} {finals[name][0]:.3f}")
        low = [m - d for m, d in zip(means, deviations, strict=True)]
        high = [m + d for m, d in zip(means, deviations, strict=True)]
        left.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        right.plot(*zip(*tried[name], strict=True), marker="o", color=line.get_color())
    seeds = max(map(len, chosen.values()))
    left.set(xlabel="optimizer step", ylabel=METRIC, title=f"at the best lr, {seeds} seeds")
    right.set(xlabel="lr of the matrices", title="after the last step, one seed", xscale="log")
    means = [mean for mean, _ in finals.values() if math.isfinite(mean)]
    if means:
        margin = 0.1 * (max(means) - min(means)) + 0.01
        left.set_ylim(min(means) - margin, max(means) + 4 * margin)
    left.legend()
    figure.savefig(path, dpi=150)
