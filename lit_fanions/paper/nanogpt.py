"""NanoGPT with each algorithm at its own best learning rate, on equal tokens (section 5.3).

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
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from lit_fanions.bench.report import Refused, machine, table
from lit_fanions.paper.runs import Curve, Run, execute, mean_curve, spread

TIME = "(an hour on 2 cores for seven algorithms)"
METRIC = "val/loss"
LR = "--model.init_args.optimizer.matrix.lr"
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
    stated = {_name(path): _stated_lr(path) for path in options.config}
    paths = {_name(path): path for path in options.config}
    if len(stated) < len(options.config):
        raise Refused("--config: two recipes have the same file name")

    def planned(name: str, lr: float, seed: int) -> Run:
        settings = (f"--config={paths[name]}", f"--seed_everything={seed}", f"{LR}={lr:g}")
        return Run(f"{name}-lr{lr:g}-seed{seed}", (*settings, *recipe))

    def train(runs: Mapping[tuple[str, float, int], Run]) -> None:
        curves = execute(runs.values(), options.out / "runs", METRIC, options.jobs)
        done.update({key: curves[run.name] for key, run in runs.items() if run.name in curves})
        failed.extend(run.name for run in runs.values() if run.name not in curves)

    done: dict[tuple[str, float, int], Curve] = {}
    failed: list[str] = []
    wanted = {name: sorted(lr * f for f in options.factors) for name, lr in stated.items()}
    for _ in range(EXTENSIONS + 1):
        grid = {(name, lr, 0) for name, lrs in wanted.items() for lr in lrs}
        train({key: planned(*key) for key in sorted(grid - done.keys())})
        for name, lrs in wanted.items():
            best = _best_lr(name, done)
            if best == lrs[0]:
                lrs.insert(0, lrs[0] ** 2 / lrs[1])
            elif best == lrs[-1]:
                lrs.append(lrs[-1] ** 2 / lrs[-2])
    best = {name: lr for name in wanted if (lr := _best_lr(name, done)) is not None}
    more = {(name, lr, seed) for name, lr in best.items() for seed in range(options.seeds)}
    train({key: planned(*key) for key in sorted(more - done.keys())})
    if not best:
        raise Refused("every run failed; their output is in output.txt of each")

    chosen = {
        name: [done[name, lr, s] for s in range(options.seeds) if (name, lr, s) in done]
        for name, lr in best.items()
    }
    finals = {name: spread([c[-1][1] for c in curves]) for name, curves in chosen.items()}
    order = sorted(chosen, key=lambda name: finals[name])
    tried = {name: sorted({lr for n, lr, _ in done if n == name}) for name in order}
    rows = [
        [
            name,
            f"{best[name]:g}",
            f"{finals[name][0]:.4f} ± {finals[name][1]:.4f}",
            len(chosen[name]),
            " ".join(f"{lr:g}: {done[name, lr, 0][-1][1]:.4f}" for lr in tried[name]),
        ]
        for name in order
    ]
    print(table(["recipe", "lr", METRIC, "seeds", "by lr, seed 0"], rows))
    _save(options.out, done, best, [*recipe])
    _plot(options.out / "nanogpt.png", order, chosen, finals, tried, done)
    print(f"saved: {options.out}/nanogpt.png, .csv, .json")
    if failed:
        print(f"{len(failed)} runs failed; their output is in {options.out}/runs/*/output.txt")
    return int(bool(failed))


def _name(path: Path) -> str:
    return path.stem


def _stated_lr(path: Path) -> float:
    try:
        content = yaml.safe_load(path.read_text())
        return float(content["model"]["init_args"]["optimizer"]["matrix"]["lr"])
    except FileNotFoundError:
        raise Refused(f"--config: there is no file {path}") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise Refused(f"--config: {path} states no model.init_args.optimizer.matrix.lr") from None


def _best_lr(name: str, done: Mapping[tuple[str, float, int], Curve]) -> float | None:
    losses = {lr: curve[-1][1] for (n, lr, seed), curve in done.items() if n == name and seed == 0}
    return min(losses, key=lambda lr: losses[lr]) if losses else None


def _save(
    folder: Path,
    done: Mapping[tuple[str, float, int], Curve],
    best: Mapping[str, float],
    recipe: list[str],
) -> None:
    with (folder / "nanogpt.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["recipe", "lr", "seed", "step", METRIC])
        for (name, lr, seed), curve in sorted(done.items()):
            writer.writerows([name, f"{lr:g}", seed, step, value] for step, value in curve)
    runs = [
        {
            "recipe": name,
            "lr": lr,
            "seed": seed,
            "curve": [(s, v if math.isfinite(v) else None) for s, v in curve],
        }
        for (name, lr, seed), curve in sorted(done.items())
    ]
    contents = {"machine": machine(), "arguments": recipe, "best_lr": best, "runs": runs}
    (folder / "nanogpt.json").write_text(json.dumps(contents, indent=2) + "\n")


def _plot(
    path: Path,
    order: Sequence[str],
    chosen: Mapping[str, Sequence[Curve]],
    finals: Mapping[str, tuple[float, float]],
    tried: Mapping[str, Sequence[float]],
    done: Mapping[tuple[str, float, int], Curve],
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name in order:
        steps, means, deviations = mean_curve(chosen[name])
        label = f"{name.removesuffix('_cpu')} {finals[name][0]:.3f}"
        (line,) = left.plot(steps, means, label=label)
        low = [m - d for m, d in zip(means, deviations, strict=True)]
        high = [m + d for m, d in zip(means, deviations, strict=True)]
        left.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        last = [done[name, lr, 0][-1][1] for lr in tried[name]]
        right.plot(tried[name], last, marker="o", color=line.get_color())
    seeds = max(map(len, chosen.values()))
    left.set(xlabel="optimizer step", ylabel=METRIC, title=f"at the best lr, {seeds} seeds")
    right.set(xlabel="lr of the matrices", title="after the last step, one seed", xscale="log")
    worst = max(mean for mean, _ in finals.values() if math.isfinite(mean))
    best = min(mean for mean, _ in finals.values())
    margin = 0.1 * (worst - best) + 0.01
    left.set_ylim(best - margin, worst + 4 * margin)
    right.set_ylim(best - margin, worst + 4 * margin)
    left.legend()
    figure.savefig(path, dpi=150)
