"""`python -m experiments.bench COMMAND`: see `experiments.bench`."""

import argparse
from collections.abc import Sequence

from experiments.bench import cost, monitor, overhead, polar, report, step, topk, variants
from lit_fanions.__main__ import exit_status
from lit_fanions.cli import console
from lit_fanions.memory import reuse_freed_memory

COMMANDS = {
    "cost": cost,
    "monitor": monitor,
    "overhead": overhead,
    "polar": polar,
    "step": step,
    "topk": topk,
    "variants": variants,
}
# Commands that pass arguments they do not know on to fit.
WITH_RECIPE = ("monitor", "overhead")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command, print its report and save it if asked to.

    Args:
        args: Arguments; None: those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = report.add_command(commands, name, module)
        command.add_argument(
            "--json", type=report.output_file, metavar="FILE", help="save the numbers as JSON"
        )
    options, recipe = parser.parse_known_args(args)
    reuse_freed_memory()  # as the command line does in trainings
    command, plot = commands.choices[options.command], vars(options).get("plot")
    given = [recipe] if options.command in WITH_RECIPE else []
    if recipe and not given:
        command.error(f"unrecognized arguments: {' '.join(recipe)}")
    try:
        if plot:
            console.require("matplotlib", "--plot")
        outcome = COMMANDS[options.command].run(options, *given)
    except console.Refused as error:
        command.error(str(error))
    print(outcome)
    if options.json:
        outcome.save(options.json)
    if plot:
        outcome.plot(plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
