"""`python -m experiments.paper COMMAND`: see `experiments.paper`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.paper import (
    airbench,
    balls,
    bounds,
    claims,
    least_squares,
    logistic_regression,
    nanogpt,
    nanogpt_alpha,
    norms,
    ranks,
    topk,
)
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
}
# These are also given the arguments that they do not know, which are those of fit.
WITH_RECIPE = (
    "least_squares",
    "logistic_regression",
    "airbench",
    "nanogpt",
    "nanogpt_alpha",
    "ranks",
)
TIME = "about five hours; quick: three minutes"  # as all times, on 2 cores with --jobs 2
RESULTS = Path("results")
QUICK = RESULTS / "quick"


def main(args: Sequence[str] | None = None) -> int:
    """Run one command, or all.

    Args:
        args: The arguments; by default those of the process.

    Returns:
        The exit status: 0, 1 if a run failed, 130 after Ctrl-C, 143 after SIGTERM. Bad input exits
        with status 2.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.paper", allow_abbrev=False)
    parser.add_argument("--list", action="store_true", help="name the commands and their time")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = console.add_command(commands, name, module)
        _add_common(command, name)
    console.add_command(commands, "claims", claims)
    everything = commands.add_parser("all", help="All of them, one after the other, then claims.")
    everything.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    _add_common(everything, "")
    options, recipe = parser.parse_known_args(args)
    if options.list:
        for name, module in COMMANDS.items():
            summary = (module.__doc__ or "").partition("\n")[0].rstrip(".")
            print(f"{name:20} {summary} ({module.TIME})")
        print(f"{'all':20} All of these, one after the other, then claims ({TIME})")
        print(f"{'claims':20} {(claims.__doc__ or '').partition(chr(10))[0].rstrip('.')}")
        return 0
    if options.command is None:
        parser.error(f"name a command: {', '.join([*COMMANDS, 'claims', 'all'])}")
    command = commands.choices[options.command]
    if "quick" in options and options.out is None:
        options.out = (QUICK if options.quick else RESULTS) / options.name
    given = [recipe] if options.command in WITH_RECIPE else []
    try:
        runner.refuse_mistyped(recipe, command)
        if recipe and not given:
            raise console.Refused(f"unrecognized arguments: {' '.join(recipe)}")
        if options.command == "all":
            return _all(options)
        if options.command == "claims":
            return claims.run(options)
        console.require("matplotlib", options.command)
        return COMMANDS[options.command].run(options, *given)
    except console.Refused as error:
        command.error(str(error))
    except (KeyboardInterrupt, runner.Stopped) as error:
        print("stopped; the same command goes on with the runs that are missing", file=sys.stderr)
        return error.status if isinstance(error, runner.Stopped) else 130


def _add_common(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--out",
        type=_folder,
        metavar="DIR",
        help=f"of the outcome (default: {RESULTS / name}, with --quick {QUICK / name})",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.set_defaults(name=name)


def _folder(text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be a folder: {error.strerror}") from None
    return path


def _all(options: argparse.Namespace) -> int:
    """Run every command with its defaults, also after one that failed; 1 if one did.

    What they say about the paper's claims is left in claims.md.
    """
    outcomes = []
    for name in COMMANDS:
        print(f"== {name}", flush=True)
        start, quick = time.monotonic(), ["--quick"] if options.quick else []
        given = sys.argv
        jobs = ["--jobs", str(options.jobs)] if name in WITH_RECIPE else []
        # The JSON names it.
        sys.argv = [given[0], name, "--out", str(options.out / name), *quick, *jobs]
        try:
            status = main()
        except SystemExit as stop:  # refused, and said so
            status = int(stop.code or 0)
        finally:
            sys.argv = given
        if status >= 128:  # stopped
            return status
        outcomes.append([name, "failed" if status else "done", time.monotonic() - start])
    print(console.table(["command", "outcome", "seconds"], outcomes))
    if options.quick:
        print("claims: left out, as --quick proves nothing")
    else:
        claims.write(claims.read(options.out), options.out)
    return int(any(outcome == "failed" for _, outcome, _ in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
