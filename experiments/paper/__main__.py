"""`python -m experiments.paper COMMAND`: see `experiments.paper`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.bench import report
from experiments.paper import (
    airbench,
    balls,
    bounds,
    claims,
    family,
    least_squares,
    logistic_regression,
    nanogpt,
    nanogpt_alpha,
    norms,
    outcome,
    pairs,
    ranks,
    sizes,
    topk,
)
from lit_fanions.__main__ import exit_status
from lit_fanions.cli import console, runner

COMMANDS = {
    "norms": norms,
    "balls": balls,
    "bounds": bounds,
    "topk": topk,
    "least_squares": least_squares,
    "logistic_regression": logistic_regression,
    "airbench": airbench,
    "nanogpt": nanogpt,
    "nanogpt_alpha": nanogpt_alpha,
    "ranks": ranks,
    "family": family,
    "pairs": pairs,
    "sizes": sizes,
}
# Commands that train recipes; arguments that they do not know are passed to fit.
TRAINING = (
    "least_squares",
    "logistic_regression",
    "airbench",
    "nanogpt",
    "nanogpt_alpha",
    "ranks",
    "family",
    "pairs",
    "sizes",
)
TIME = "more than a day; quick: three minutes"  # as all times, on 2 cores with --jobs 2
RESULTS = Path("results")
QUICK = RESULTS / "quick"
# Folders that the recipes need.
CHECKOUT = ("configs", "models", "datamodules")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command, or all.

    Args:
        args: The command line; by default that of the process.

    Returns:
        The exit status: 0, 1 if a run failed, 130 after Ctrl-C, 143 after SIGTERM. Bad input exits
        with status 2.
    """
    args = sys.argv[1:] if args is None else list(args)
    parser, subparsers = _parsers()
    options, recipe = parser.parse_known_args(args)
    if options.list:
        _print_list()
        return 0
    if options.command is None:
        parser.error(f"name a command: {', '.join([*COMMANDS, 'claims', 'all'])}")
    options.arguments = args
    if "quick" in options and options.out is None:
        options.out = (QUICK if options.quick else RESULTS) / options.name
    subparser = subparsers.choices[options.command]
    try:
        console.refuse_mistyped(recipe, subparser)
        if recipe and options.command not in TRAINING:
            raise console.Refused(f"unrecognized arguments: {' '.join(recipe)}")
        return _run(options, recipe)
    except console.Refused as error:
        subparser.error(str(error))  # exits
        raise
    except (KeyboardInterrupt, runner.Stopped) as error:
        print("stopped; the same command continues with the missing runs", file=sys.stderr)
        return error.status if isinstance(error, runner.Stopped) else 130


def _parsers() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    """Return the parser of the command line, and its subparsers."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {outcome.PROGRAM}",
        description="Regenerate the tables and figures of the paper, one command each.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--list", action="store_true", help="list the commands with the time they take"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        _add_common(report.add_command(subparsers, name, module), name)
    report.add_command(subparsers, "claims", claims)
    text = "Run all commands, one after the other, then claims."
    everything = subparsers.add_parser("all", help=text, description=text, allow_abbrev=False)
    everything.add_argument(
        "--jobs", type=int, default=1, help="number of trainings at a time (default: 1)"
    )
    _add_common(everything, "")
    return parser, subparsers


def _add_common(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--out",
        type=_folder,
        metavar="DIR",
        help=f"folder for the outcome (default: {RESULTS / name}, with --quick {QUICK / name})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to check that the command works"
    )
    parser.set_defaults(name=name)


def _folder(text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be a folder: {error.strerror}") from None
    return path


def _print_list() -> None:
    """Print the commands, what they regenerate and how long they take."""
    for name, module in COMMANDS.items():
        print(f"{name:20} {_summary(module.__doc__)} ({module.TIME})")
    print(f"{'all':20} All of these, one after the other, then claims ({TIME})")
    print(f"{'claims':20} {_summary(claims.__doc__)}")


def _summary(docstring: str | None) -> str:
    return (docstring or "").partition("\n")[0].rstrip(".")


def _run(options: argparse.Namespace, recipe: Sequence[str]) -> int:
    """Run the command that the options name and return its exit status."""
    if options.command == "all":
        return _run_all(options)
    if options.command == "claims":
        return claims.run(options)
    for package in ("matplotlib", "scipy"):
        console.require(package, options.command)
    module = COMMANDS[options.command]
    if options.command not in TRAINING:
        return module.run(options)
    if options.config is None:  # recipes of the user's own may need nothing of the checkout
        _require_checkout(options.command)
    return module.run(options, recipe)


def _require_checkout(command: str) -> None:
    """Refuse to train the recipes of the checkout from another folder.

    Raises:
        Refused: If the current folder lacks what the recipes need.
    """
    missing = [f"{folder}/" for folder in CHECKOUT if not Path(folder).is_dir()]
    if missing:
        root = Path(__file__).resolve().parents[2]
        raise console.Refused(
            f"{command} trains the recipes of a checkout of lit_fanions, and {Path().resolve()} "
            f"has no {', '.join(missing)}: start it in the root of a checkout (cd {root})"
        )


def _run_all(options: argparse.Namespace) -> int:
    """Run every command with its defaults, also after one that failed, then write claims.md.

    Returns:
        The exit status: 0, 1 if a command failed, or that of a command that was stopped.
    """
    outcomes = []
    for name in COMMANDS:
        print(f"== {name}", flush=True)
        start = time.monotonic()
        args = [name, "--out", str(options.out / name)]
        args += ["--quick"] if options.quick else []
        args += ["--jobs", str(options.jobs)] if name in TRAINING else []
        try:
            status = main(args)
        except SystemExit as stop:  # the command was refused and has printed why
            status = int(stop.code or 0)
        if status >= 128:  # stopped by a signal
            return status
        outcomes.append([name, "failed" if status else "done", time.monotonic() - start])
    print(console.table(["command", "outcome", "seconds"], outcomes))
    if options.quick:
        print("claims: not written, because --quick proves nothing")
    else:
        claims.write_page(claims.read_results(options.out), options.out)
    return int(any(outcome == "failed" for _, outcome, _ in outcomes))


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
