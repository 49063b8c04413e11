"""`python -m lit_fanions`: the command line of `lit_fanions.cli`."""

import sys


def start() -> int:
    """Run the command line; Lightning is imported only for the commands that need it."""
    try:
        from lit_fanions.cli.light import run_light_command

        status = run_light_command(sys.argv[1:])
        if status is None:
            from lit_fanions.cli.app import main

            status = main()
        return status
    except KeyboardInterrupt:  # while it is imported
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(start())
