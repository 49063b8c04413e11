"""`python -m lit_fanions.paper COMMAND`: see `lit_fanions.paper`."""

import argparse
import sys
from collections.abc import Sequence

from lit_fanions.bench import report
from lit_fanions.paper import nanogpt
from lit_fanions.paper.runs import Stopped

COMMANDS = {"nanogpt": nanogpt}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: The arguments; by default those of the process.

    Returns:
        The exit status: 0, 1 if a run failed, 130 after Ctrl-C, 143 after SIGTERM. Bad input exits
        with status 2.
    """
    parser = argparse.ArgumentParser(prog="python -m lit_fanions.paper", allow_abbrev=False)
    parser.add_argument("--list", action="store_true", help="name the commands and their time")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        report.add_command(commands, name, module)
    options, recipe = parser.parse_known_args(args)
    if options.list:
        for name, module in COMMANDS.items():
            summary = (module.__doc__ or "").partition("\n")[0].rstrip(".")
            print(f"{name:10} {summary} {module.TIME}")
        return 0
    if options.command is None:
        parser.error(f"name a command: {', '.join(COMMANDS)}")
    try:
        report.require("matplotlib", options.command)
        return COMMANDS[options.command].run(options, recipe)
    except report.Refused as error:
        commands.choices[options.command].error(str(error))
    except (KeyboardInterrupt, Stopped) as error:
        print("stopped; the same command goes on with the runs that are missing", file=sys.stderr)
        return error.status if isinstance(error, Stopped) else 130


if __name__ == "__main__":
    raise SystemExit(main())
