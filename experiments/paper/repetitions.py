"""Options of commands that train recipes with several seeds, and the trainings themselves."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.paper import execution
from lit_fanions.cli import runner
from lit_fanions.cli.console import Refused, check_counts, refuse_reserved
from lit_fanions.cli.curves import Curve


def add_arguments(
    parser: argparse.ArgumentParser,
    recipes: Sequence[str],
    seeds: int,
    full: Sequence[str] = (),
) -> None:
    """Add the options of commands that train.

    Args:
        parser: Parser of the command.
        recipes: Patterns of the files that are trained by default.
        seeds: Default number of seeds.
        full: Patterns of the files that are trained with --full; without any, there is no --full.
    """
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help=f"recipes to train (default: {' '.join(recipes)})",
    )
    parser.add_argument(
        "--seeds", type=int, help=f"number of repetitions (default: {seeds}, with --quick 1)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    if full:
        parser.add_argument(
            "--full", action="store_true", help=f"for GPUs: {' '.join(full)}, unchanged"
        )
    parser.set_defaults(recipes=(recipes, full), default_seeds=seeds)


def plan(
    options: argparse.Namespace,
    recipe: Sequence[str],
    reserved: Mapping[str, str],
    quick: Sequence[str],
) -> tuple[dict[str, Path], list[str]]:
    """Fill in the defaults of ``add_arguments``, and check what was given.

    Args:
        options: Options of the command; ``seeds`` is set here.
        recipe: Arguments of fit.
        reserved: Options of fit that the command sets itself, see ``refuse_reserved``.
        quick: The recipe that --quick trains by default, then arguments of fit that leave a few
            steps of it.

    Returns:
        Recipes by name, and all arguments of fit.

    Raises:
        Refused: If an option is not possible.
    """
    refuse_reserved(recipe, reserved)
    if options.seeds is None:
        options.seeds = 1 if options.quick else options.default_seeds
    check_counts(options, "seeds", "jobs")
    patterns: Sequence[str] = options.recipes["full" in options and options.full]
    few_steps: Sequence[str] = ()
    if options.quick:
        patterns, few_steps = quick[:1], quick[1:]
    paths = options.config or [p for each in patterns for p in sorted(Path().glob(each))]
    if not paths:
        raise Refused(f"no {patterns[0]} here: start the command in a checkout of lit_fanions")
    for path in paths if options.config or recipe else ():
        check([f"--config={path}", *few_steps, *recipe])
    named = {path.stem: path for path in paths}
    if len(named) < len(paths):
        files = ", ".join(map(str, paths))
        raise Refused(f"--config: {files} have a file name in common: rename one, or leave it out")
    return named, [*few_steps, *recipe]


def check(args: Sequence[str]) -> None:
    """Refuse arguments that fit would refuse.

    Raises:
        SystemExit: With fit's own message.
    """
    from lit_fanions.cli.app import Reader

    Reader(["fit", *args])


def has_claims(options: argparse.Namespace, some: bool = False) -> bool:
    """Return True if the numbers can test the paper: default recipes that were not shortened.

    Args:
        options: Options of the command.
        some: Whether some of these recipes test some of the claims.
    """
    known = [path for each in options.recipes[0] for path in Path().glob(each)] if some else []
    whole = options.config is None or (some and set(options.config) <= set(known))
    return whole and not options.quick


def describe_data(data: str, *extra: Sequence[str]) -> str:
    """Return the data set and the extra arguments of fit in one line."""
    return ", ".join([data, *(" ".join(part) for part in extra if part)])


def train_with_seeds(
    variants: Mapping[str, Sequence[str]], options: argparse.Namespace, metric: str
) -> dict[str, dict[int, Curve]]:
    """Train each variant with seeds 0, 1, ...

    Args:
        variants: Arguments of fit by the variant's name.
        options: Options of the command, completed by ``plan``.
        metric: Name of the scalar that is read.

    Returns:
        The curves of the trainings that succeeded, by variant and seed.

    Raises:
        Refused: If none succeeded.
    """
    runs = {
        # All variants with one seed, then with the next: an interrupted command has tried all.
        (name, seed): runner.Run(f"{name}-seed{seed}", (*args, f"--seed_everything={seed}"))
        for seed in range(options.seeds)
        for name, args in variants.items()
    }
    curves = execution.execute(runs.values(), options.out / "runs", [metric], options.jobs)
    if not curves:
        raise Refused(f"every run failed: see {options.out}/runs/*/output.txt")
    if len(curves) < len(runs):
        print(f"failed runs: {len(runs) - len(curves)}; see {options.out}/runs/*/output.txt")
    found: dict[str, dict[int, Curve]] = {name: {} for name in variants}
    for (name, seed), run in runs.items():
        if run.name in curves:
            found[name][seed] = curves[run.name][metric]
    return found
