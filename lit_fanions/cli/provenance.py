"""Tell how a result was made: the recipes that were read and the commit of this program."""

import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

FINISHED = "result.json"  # in the folder of a training that has succeeded


def recipe_digests(args: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each recipe that arguments of fit name."""
    values = (arg.partition("=")[2] if arg.startswith("--") else arg for arg in args)
    return {
        value: hashlib.sha256(Path(value).read_bytes()).hexdigest()
        for value in values
        if value.endswith((".yaml", ".yml", ".json")) and os.path.isfile(value)
    }


def commits(folder: Path) -> list[str]:
    """Return the commits that made the finished trainings of a folder, "" for outside of git."""
    saved = [json.loads(path.read_text()) for path in folder.glob(f"*/{FINISHED}")]
    return sorted({run.get("commit") or "" for run in saved})


@functools.cache
def commit() -> str | None:
    """Return this program's git commit, "-dirty" if files were changed; None outside of git."""
    git = functools.partial(subprocess.check_output, text=True, stderr=subprocess.DEVNULL)
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        # An installed package may lie in the folder of a repository that is not its own.
        git([*here, "ls-files", "--error-unmatch", Path(__file__).name])
        return git([*here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
