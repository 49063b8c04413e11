"""Who raised an error while a recipe was built or run: its values, or the user's own code.

Only values that this package, its zoo or Lightning refuse are mistakes in the configuration. Any
other error shows file, line and exception, as it would without a command line around it.
"""

import contextlib
import errno
import os
import pickle
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import lit_fanions
from lit_fanions.cli.errors import one_line
from lit_fanions.cli.messages import print_error, relative_path

TRACEBACK = "LIT_FANIONS_TRACEBACK"

_PACKAGE = Path(lit_fanions.__file__).parent
_ZOO = (_PACKAGE.parent / "models", _PACKAGE.parent / "datamodules")
_INSTALLED = tuple(
    Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")
_WORKER_FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)')  # Python's own format

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRONG_PATH = (
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
    errno.ENAMETOOLONG,
)

Place = tuple[str, int, str]  # file, line, function


def unwrap(error: BaseException) -> BaseException:
    """Return the exception that jsonargparse has wrapped in others of its own."""
    while error.__cause__ is not None and _raising_package(error) == "jsonargparse":
        error = error.__cause__
    return error


def is_refusal(error: BaseException) -> bool:
    """Return True if a value of the configuration was refused before anything ran.

    Lightning's refusals count only if no user code called it: that call is the mistake then.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    error = unwrap(error)
    if isinstance(error, (FileNotFoundError, pickle.UnpicklingError)):  # data or a checkpoint
        return True
    if isinstance(error, OSError) and error.filename and error.errno in _WRONG_PATH:
        return user_place(error) is None
    if isinstance(error, TypeError):  # devices that an accelerator does not know
        return ".accelerators." in _raising_module(error) and user_place(error) is None
    if not isinstance(error, (ValueError, MisconfigurationException)):
        return False
    *_, (file, _, _) = [("", 0, ""), *_places(error)]
    if _is_below(file, _PACKAGE, *_ZOO):
        return True
    return _raising_package(error) in (*_LIGHTNING, "jsonargparse") and user_place(error) is None


def user_place(error: BaseException) -> Place | None:
    """Return the innermost place in the user's own code, or None if there is none."""
    worker = str(error).partition("Original Traceback")[2]  # of a process that loads data
    places = [(file, int(line), name) for file, line, name in _WORKER_FRAME.findall(worker)]
    for file, line, name in reversed([*_places(error), *places]):
        if Path(file).is_file() and not _is_below(file, _PACKAGE, *_INSTALLED):
            return file, line, name
    return None


def is_full_disk(error: BaseException) -> TypeGuard[OSError]:
    """Return True for a failed write of this program that names no file."""
    if not isinstance(error, OSError) or error.errno not in _DISK_FULL:
        return False
    return error.filename is None and user_place(error) is None


@contextlib.contextmanager
def full_disks_left_to_main_thread() -> Iterator[None]:
    """Print no traceback of a thread on a full disk: TensorBoard's hands its error on."""
    before = threading.excepthook

    def show(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or not is_full_disk(args.exc_value):
            before(args)

    threading.excepthook = show
    try:
        yield
    finally:
        threading.excepthook = before


def describe(error: BaseException) -> str:
    """Return an error in one line: place in the user's code, type and message."""
    error = unwrap(error)
    if isinstance(error, pickle.UnpicklingError):
        return "the file given as --ckpt_path is no checkpoint, or not one that is safe to load"
    last_line = str(error).rstrip().rpartition("\n")[2]
    text = last_line if "Original Traceback" in str(error) else one_line(error, limit=600)
    if not text.startswith(type(error).__name__):
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    if place := user_place(error):
        return f"{relative_path(place[0])}:{place[1]} in {place[2]}: {text}"
    return text


def describe_refusal(error: BaseException) -> str:
    """Return a refused value in one line, without the type of the exception."""
    error = unwrap(error)
    is_plain = str(error) and not isinstance(error, pickle.UnpicklingError)
    return one_line(error, limit=600) if is_plain else describe(error)


def print_failure(description: str) -> int:
    """Print one line about the current error, which ended a command; return the exit status 1."""
    hint = "" if print_traceback() else f" [{TRACEBACK}=1 shows the traceback]"
    print_error(f"error: {description}{hint}")
    return 1


def print_traceback() -> bool:
    """Print the traceback of the current error if the user asked for it; return that."""
    asked = os.environ.get(TRACEBACK, "0") not in ("", "0")
    if asked and sys.exc_info()[0]:
        traceback.print_exc()
    return asked


def _places(error: BaseException) -> Iterator[Place]:
    """Yield the places of a traceback, the innermost last."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        yield frame.f_code.co_filename, line, frame.f_code.co_name


def _raising_package(error: BaseException) -> str:
    return _raising_module(error).partition(".")[0]


def _raising_module(error: BaseException) -> str:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def _is_below(file: str, *folders: Path) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in folders)
