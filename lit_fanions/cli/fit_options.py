"""Check options that a command passes on to fit, before it trains anything."""

import argparse
from collections.abc import Iterable, Mapping, Sequence

from lit_fanions.checks import did_you_mean
from lit_fanions.cli.console import Refused

# Options of fit without a dot: they are never taken for mistyped options of another command.
FIT_OPTIONS = {
    *("--config", "--print_config", "--seed_everything", "--trainer", "--model", "--data"),
    *("--test_after_fit", "--ckpt_path", "--weights_only"),
}


def check(args: Sequence[str]) -> None:
    """Refuse arguments that fit would refuse.

    Raises:
        SystemExit: With fit's own message.
    """
    from lit_fanions.cli.app import Reader

    Reader(["fit", *args])


def refuse(args: Iterable[str], reserved: Mapping[str, str]) -> None:
    """Refuse options of fit that a command sets itself.

    Args:
        args: Arguments that the user gave.
        reserved: Advice by option. Options below a reserved one are reserved too, with or without
            `init_args` in their name.

    Raises:
        Refused: At the first reserved option.
    """
    for arg in args:
        given = arg.partition("=")[0].removesuffix("+")
        plain = given.replace(".init_args", "")
        for option, advice in reserved.items():
            if plain == option or plain.startswith(f"{option}."):
                raise Refused(f"{given} cannot be used here: {advice}")


def refuse_mistyped(args: Iterable[str], parser: argparse.ArgumentParser) -> None:
    """Refuse mistyped options of a command, which fit could not explain.

    Args:
        args: Arguments that the command's parser left over.
        parser: Parser of the command.

    Raises:
        Refused: At the first that resembles an option of the command.
    """
    own = [option for action in parser._actions for option in action.option_strings]
    for arg in args:
        given = arg.partition("=")[0]
        known = not given.startswith("--") or "." in given or given in FIT_OPTIONS
        if not known and (hint := did_you_mean(given, own)):
            raise Refused(f"unknown option {given}{hint}")
