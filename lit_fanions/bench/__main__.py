"""`python -m lit_fanions.bench COMMAND`: see `lit_fanions.bench`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lit_fanions.bench import overhead

COMMANDS = {
    "overhead": overhead,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command, print its report and save it if asked to.

    Args:
        args: The arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m lit_fanions.bench", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="save the numbers as JSON")
    options, recipe = parser.parse_known_args(args)
    report = COMMANDS[options.command].run(options, recipe)
    print(report)
    if options.json:
        report.save(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
