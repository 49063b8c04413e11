"""Errors of a run: where they are in the user's own code, and which are refused values."""

import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_fanions.cli import failures
from lit_fanions.cli.app import main
from tests.cli.recipes import FIT


@pytest.fixture
def fresh_mine(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A project whose module `mine` and what it imports are not those of another test."""
    for name in ("mine", "toy_zoo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("mine", "toy_zoo"):
        sys.modules.pop(name, None)


def test_run_time_error_is_one_line(project, capfd):
    assert main([*FIT, "--model", "toy_zoo.Failing"]) == 1
    lines = capfd.readouterr().err.splitlines()
    (line,) = [line for line in lines if "error" in line]
    assert line == lines[-1]
    assert "RuntimeError: the third step went wrong" in line
    assert "LIT_FANIONS_TRACEBACK=1" in line


def test_traceback_on_request(project, capfd, monkeypatch):
    monkeypatch.setenv("LIT_FANIONS_TRACEBACK", "1")
    assert main([*FIT, "--model", "toy_zoo.Failing"]) == 1
    printed = capfd.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert "toy_zoo.py" in printed
    assert "LIT_FANIONS_TRACEBACK" not in printed.splitlines()[-1]


def test_failed_run_keeps_its_log(project, capfd):
    main([*FIT, "--model", "toy_zoo.Failing"])
    (events,) = project.glob("lightning_logs/version_0/events.*")
    assert b"train/loss" in events.read_bytes()


def test_missing_data_is_a_usage_error(project, capfd):
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--data.data_dir", "nowhere"])
    assert stop.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "error: no folder nowhere: pass --data.data_dir"
    )


@pytest.mark.parametrize(
    ("option", "fragment"),
    [
        ("--trainer.devices=abc", "`devices` selected with `CPUAccelerator` should be an int > 0."),
        ("--trainer.default_root_dir=recipe.yaml", "Not a directory: 'recipe.yaml/"),
        ("--trainer.accumulate_grad_batches=0", "accumulate_grad_batches must be at least 1"),
        ("--trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch must be at least 1"),
        ("--trainer.val_check_interval=0", "val_check_interval must be above 0"),
        ("--seed_everything=-1", "seed_everything must be between 0 and 4294967295"),
    ],
)
def test_values_that_lightning_cannot_use_are_usage_errors(option, fragment, project, capfd):
    with pytest.raises(SystemExit) as stop:
        main([*FIT, option])
    assert stop.value.code == 2
    (line,) = [one for one in capfd.readouterr().err.splitlines() if one.startswith("error: ")]
    assert fragment in line


# A user's own module, in which one hook fails: HOOK and ERROR are filled in.

MINE = """\
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from toy_zoo import ToyData, ToyNet


class Failing:
    def HOOK(self, *args, **kwargs):
        ERROR


class Net(Failing, ToyNet):
    pass


class Watcher(Failing, Callback):
    pass


class Data(Failing, ToyData):
    pass


class Points:
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ERROR


class WorkerData(ToyData):
    def train_dataloader(self):
        return DataLoader(Points(), num_workers=1)
"""
ERROR_LINE = 1 + MINE.splitlines().index("        ERROR")

MODEL, DATA = ["--model", "mine.Net"], ["--data", "mine.Data"]
CALLBACK = ["--trainer.callbacks+", "mine.Watcher"]
OWN_CODE = {
    "model __init__": (MODEL, "__init__"),
    "model setup": (MODEL, "setup"),
    "configure_optimizers": (MODEL, "configure_optimizers"),
    "training_step": (MODEL, "training_step"),
    "validation_step": (MODEL, "validation_step"),
    "test_step": (MODEL, "test_step"),
    "callback __init__": (CALLBACK, "__init__"),
    "callback setup": (CALLBACK, "setup"),
    "callback": (CALLBACK, "on_train_batch_end"),
    "data __init__": (DATA, "__init__"),
    "prepare_data": (DATA, "prepare_data"),
    "data setup": (DATA, "setup"),
    "train_dataloader": (DATA, "train_dataloader"),
}
ERRORS = {
    "len(3)": "TypeError: object of type 'int' has no len()",
    "raise ValueError('too narrow')": "ValueError: too narrow",
    "{}['key']": "KeyError: 'key'",
    "self.nothing": "AttributeError: ",
}


def write_mine(hook: str, error: str) -> None:
    Path("mine.py").write_text(MINE.replace("HOOK", hook).replace("ERROR", error))


def last_error(capfd: pytest.CaptureFixture) -> str:
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: "), line
    return line.removeprefix("error: ")


@pytest.mark.parametrize("name", OWN_CODE)
def test_own_code_shows_file_line_and_exception(name, fresh_mine, capfd):
    (args, hook), error = OWN_CODE[name], "len(3)"
    write_mine(hook, error)
    assert main([*FIT, *args]) == 1
    line = last_error(capfd)
    assert line.startswith(f"mine.py:{ERROR_LINE} in {hook}: {ERRORS[error]}"), line
    assert "LIT_FANIONS_TRACEBACK=1" in line


@pytest.mark.parametrize("name", ["model __init__", "data setup", "callback setup"])
@pytest.mark.parametrize("error", list(ERRORS)[1:])
def test_every_type_of_error_in_own_code_has_status_1(name, error, fresh_mine, capfd):
    args, hook = OWN_CODE[name]
    write_mine(hook, error)
    assert main([*FIT, *args]) == 1
    assert last_error(capfd).startswith(f"mine.py:{ERROR_LINE} in {hook}: {ERRORS[error]}")


def test_error_while_importing_own_code_shows_where(fresh_mine, capfd):
    Path("mine.py").write_text("import toy_zoo\nlen(3)\n")
    assert main([*FIT, *MODEL]) == 1
    assert last_error(capfd).startswith("mine.py:2 in <module>: TypeError: ")


def test_own_import_of_a_missing_package_shows_where(fresh_mine, capfd):
    Path("mine.py").write_text("\nimport no_such_package\n")
    assert main([*FIT, *MODEL]) == 1
    assert last_error(capfd).startswith("mine.py:2 in <module>: ModuleNotFoundError: ")


def test_error_in_a_worker_of_the_loader_shows_where(fresh_mine, capfd):
    write_mine("no_hook", "len(3)")
    assert main([*FIT, "--data", "mine.WorkerData"]) == 1
    line = last_error(capfd)
    assert " in __getitem__: TypeError: object of type 'int' has no len()" in line
    assert line.startswith("mine.py:")


def test_wrong_call_of_lightning_shows_where(fresh_mine, capfd):
    write_mine("validation_step", "self.log('val/loss', 'much')")
    assert main([*FIT, *MODEL]) == 1
    assert last_error(capfd).startswith(f"mine.py:{ERROR_LINE} in validation_step: ")


def test_refused_option_in_own_configure_optimizers_is_a_mistake_in_the_configuration(
    fresh_mine, capfd
):
    refused = "from lit_fanions import configure_optimizers as c; return c(self, alpha='half')"
    write_mine("configure_optimizers", refused)
    with pytest.raises(SystemExit) as stop:
        main([*FIT, *MODEL])
    assert stop.value.code == 2
    assert "alpha" in last_error(capfd)


def test_file_that_is_missing_before_training_is_a_mistake_in_the_configuration(fresh_mine, capfd):
    write_mine("setup", "open('points.txt')")
    with pytest.raises(SystemExit) as stop:
        main([*FIT, *DATA])
    assert stop.value.code == 2
    assert "points.txt" in last_error(capfd)


def test_file_that_is_missing_while_training_is_an_error_of_the_run(fresh_mine, capfd):
    write_mine("on_train_batch_end", "open('points.txt')")
    assert main([*FIT, *CALLBACK]) == 1
    assert last_error(capfd).startswith(f"mine.py:{ERROR_LINE} in on_train_batch_end: File")


def test_file_that_is_no_checkpoint_is_a_mistake_in_the_configuration(project, capfd):
    Path("weights.ckpt").write_text("hello")
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--ckpt_path", "weights.ckpt"])
    assert stop.value.code == 2
    assert "--ckpt_path: weights.ckpt is no checkpoint" in capfd.readouterr().err


# Full disks: no file may grow beyond a limit, so that a write fails as on a full disk.


@pytest.fixture
def disk(project):
    """A function that limits the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_is_one_line_that_names_the_folder(disk, capfd):
    disk(1_000)  # too small for the saved recipe
    assert main(FIT) == 1
    line = last_error(capfd)
    assert "File too large" in line
    assert "lightning_logs/version_0" in line


def test_full_disk_in_own_code_shows_where(fresh_mine, capfd):
    write_mine("on_train_batch_end", "raise OSError(28, 'No space left on device')")
    assert main([*FIT, *CALLBACK]) == 1
    assert last_error(capfd).startswith(f"mine.py:{ERROR_LINE} in on_train_batch_end: OSError")


def test_full_disk_of_a_thread_is_left_to_the_main_thread(monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_type))
    with failures.full_disks_left_to_main_thread():
        for target, arguments in ((Path("/dev/full").write_text, ["x"]), (int, ["x"])):
            thread = threading.Thread(target=target, args=arguments)
            thread.start()
            thread.join()
    assert shown == [ValueError]
