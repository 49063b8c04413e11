"""`python -m lit_fanions`: the door of the command line; see `lit_fanions.cli.app`."""

import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence


def start(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status, see ``lit_fanions.cli.app.main``.

    Lightning is loaded only for the commands that need it.
    """
    given = list(sys.argv[1:] if args is None else args)
    return exit_status(lambda: _run(given[0] if given else "", given))


def exit_status(run: Callable[[], int]) -> int:
    """Return the exit status of a command; Ctrl-C and a file that fails end it with one line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # σ in a table must not end a command in Latin-1
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run()
    except KeyboardInterrupt:  # while Lightning is imported
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as by `| head`; Python would complain again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # such as a full disk, or a file in the place of a folder
        from lit_fanions.cli import failures

        return failures.print_failure(failures.describe(error))


def _run(command: str, given: list[str]) -> int:
    from lit_fanions.checks import did_you_mean
    from lit_fanions.cli.errors import config_files
    from lit_fanions.cli.messages import OTHER_COMMANDS, SUBCOMMANDS, format_help, format_versions

    if command in ("", "--version", "--help", "-h"):
        print(format_versions() if command == "--version" else format_help())
        return 0 if command else 2
    if command in OTHER_COMMANDS:
        module, _ = OTHER_COMMANDS[command]
        return importlib.import_module(f"lit_fanions.{module}").main(given[1:])
    commands = [*SUBCOMMANDS, *OTHER_COMMANDS]
    if command and not command.startswith("-") and command not in commands:
        hint = did_you_mean(command, commands)
        print(f"error: {command!r} is none of {', '.join(commands)}{hint}", file=sys.stderr)
        return 2
    # The import of Lightning takes seconds; child processes of a strategy would repeat the line.
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_first and (files := config_files(given)) and "--help" not in given:
        print(f"{command}: reading {', '.join(files)}", file=sys.stderr, flush=True)
    from lit_fanions.cli.app import main

    return main(given)


if __name__ == "__main__":
    raise SystemExit(start())
