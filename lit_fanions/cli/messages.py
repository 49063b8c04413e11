"""What the command line prints beside errors: results, logs, and commands to go on with."""

import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only

from lit_fanions import callbacks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

PROGRAM = "python -m lit_fanions"
SUBCOMMANDS = {
    "fit": "Train.",
    "validate": "Evaluate a checkpoint on the validation set.",
    "test": "Evaluate a checkpoint on the test set.",
    "predict": "Save the predictions of a checkpoint.",
    "params": "Show which algorithm trains which parameter, and why.",
}
# Commands that need no Lightning: the modules whose `main` takes their arguments, and what they do.
OTHER_COMMANDS = {
    "list": ("cli.catalogue", "Print models, data, recipes, algorithms and callbacks."),
    "report": ("cli.report", "Write what TensorBoard would show as one HTML page."),
    "compare": ("cli.compare", "Find the first step and tensor in which two trainings differ."),
    "export": ("cli.export", "Write an optimizer as one file that needs torch alone."),
    "sweep": ("sweep.__main__", "Train a grid of settings, or search them."),
}
DESCRIPTION = "Train networks in the norm of your choice."
EXAMPLES = f"""\
examples:
  {PROGRAM} fit --config configs/quickstart.yaml
  {PROGRAM} fit --config configs/airbench/muon.yaml --config configs/cpu.yaml
  {PROGRAM} fit --config RECIPE.yaml --model.optimizer.matrix.lr 0.03 --trainer.max_epochs 4
  {PROGRAM} fit --config RECIPE.yaml --trainer.callbacks.SpectralMonitor.every_n_steps 10
  {PROGRAM} fit --config RECIPE.yaml --ckpt_path LOGS/checkpoints/last.ckpt
  {PROGRAM} test --config RECIPE.yaml --ckpt_path LOGS/checkpoints/last.ckpt
  {PROGRAM} params --config RECIPE.yaml
  {PROGRAM} list
  {PROGRAM} report LOGS
  {PROGRAM} compare LOGS OTHER_LOGS
  {PROGRAM} fit --model.help models.Airbench

callbacks of this package (--trainer.callbacks+ CLASS, --help: fit --trainer.callbacks.help CLASS):
  {", ".join(f"lit_fanions.callbacks.{name}" for name in callbacks.__all__)}

Later files and options win over earlier ones. `fit --print_config` shows the result."""


def format_help() -> str:
    """Return the help of the program; that of a subcommand is its parser's."""
    others = {name: text for name, (_, text) in OTHER_COMMANDS.items()}
    commands = "\n".join(f"  {k:10}{v}" for k, v in {**SUBCOMMANDS, **others}.items())
    usage = f"usage: {PROGRAM} COMMAND [--OPTION VALUE ...]\n       {PROGRAM} COMMAND --help"
    return f"{usage}\n\n{DESCRIPTION}\n\ncommands:\n{commands}\n\n{EXAMPLES}"


def format_versions() -> str:
    """Return the versions that a bug report needs."""
    versions = []
    for label, name in {"": "lit-fanions", "lightning ": "lightning", "torch ": "torch"}.items():
        try:
            versions.append(f"{label}{metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{label}(not installed)")
    return ", ".join([*versions, f"python {platform.python_version()}"])


def print_error(line: str) -> None:
    """Print a line on stderr, below a progress bar that may stand in the last one."""
    print(f"\n{line}" if sys.stderr.isatty() else line, file=sys.stderr)


@rank_zero_only
def print_warning(line: str) -> None:
    """Print a warning on stderr, below a progress bar that may stand in the last line."""
    print(f"\nwarning: {line}", file=sys.stderr)


def relative_path(path: str | Path) -> str:
    """Return a path relative to the working directory if it lies below it."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def format_test_results(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for every test metric; accuracies as percentages and first."""
    for name, value in sorted(metrics.items(), key=lambda item: "/acc" not in item[0]):
        stage, _, metric = name.partition("/")
        if stage == "test" and metric:
            number = float(value)
            head, _, detail = metric.partition("_")
            words = {"acc": "accuracy"}.get(head, head) + (f" ({detail})" if detail else "")
            is_share = head in ("acc", "accuracy")
            shown = f"{100 * number:.2f} %" if is_share else f"{number:.4g}"
            yield f"test {words.replace('_', ' ')}: {shown}"


def describe_logs(trainer: "Trainer") -> Iterator[str]:
    """Yield where the logs are, and the command that opens them."""
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None) or logger.save_dir
        if not folder:
            continue
        yield f"logs: {relative_path(folder)}"
        if any(cls.__name__ == "TensorBoardLogger" for cls in type(logger).__mro__):
            folder = shlex.quote(relative_path(folder))
            yield f"open them with: {_tensorboard_command()} --logdir {folder}"


def program_command() -> str:
    """Return the command that starts this program again, wherever its Python is."""
    return _find_command("python", Path(sys.executable)) + " -m lit_fanions"


def _tensorboard_command() -> str:
    """Return the command that starts the TensorBoard of this environment."""
    beside = Path(sys.executable).with_name("tensorboard")
    if beside.exists():
        return _find_command("tensorboard", beside)
    return f"{shlex.quote(sys.executable)} -m tensorboard.main"


def _find_command(name: str, file: Path) -> str:
    """Return a name if the shell finds this file under it, else the file's path."""
    on_path = shutil.which(name)
    is_found = on_path is not None and Path(on_path).absolute() == file.absolute()
    return name if is_found else shlex.quote(relative_path(file))
