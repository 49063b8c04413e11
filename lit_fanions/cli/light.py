"""The commands that need no Lightning: `--version`, `list` and `report`."""

import platform
from collections.abc import Sequence
from importlib import metadata


def run_light_command(args: Sequence[str]) -> int | None:
    """Run a command that trains nothing.

    Args:
        args: The command line.

    Returns:
        The exit status, or None if Lightning has to run the command.
    """
    if args[:1] == ["--version"]:
        print(format_versions())
        return 0
    if args[:1] == ["list"]:
        from lit_fanions.cli import catalogue

        return catalogue.main(args[1:])
    if args[:1] == ["report"]:
        from lit_fanions.cli import report

        return report.main(list(args[1:]), "python -m lit_fanions report")
    return None


def format_versions() -> str:
    """Return the versions that a bug report needs."""
    packages = {"": "lit-fanions", "lightning ": "lightning", "torch ": "torch"}
    versions = [f"{label}{_version(name)}" for label, name in packages.items()]
    return ", ".join([*versions, f"python {platform.python_version()}"])


def _version(name: str) -> str:
    """Return the version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"
