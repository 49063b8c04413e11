"""The command line: `python -m lit_fanions {fit,validate,test,predict,params} --config FILE`.

It is Lightning's own command line with these differences:

* a mistake in the configuration is told in at most three lines, with exit status 2;
* an error while running is one line, with exit status 1 (`LIT_FANIONS_TRACEBACK=1` shows it all);
* Ctrl-C during fit finishes the step, saves a checkpoint and says how to go on, status 130;
* a checkpoint restores a run but never overrides the configuration, and where the two differ,
  that is said;
* `params` shows which parameter is trained by which algorithm, and why;
* `report LOGDIR` draws what TensorBoard would show (`lit_fanions.report`).

Models and data come from `class_path`, never from here: this package installs without the zoo.
"""

import argparse
import logging
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_fanions.cli import errors

PROGRAM = "python -m lit_fanions"
TRACEBACK = "LIT_FANIONS_TRACEBACK"
USAGE_ERROR, RUN_ERROR, INTERRUPTED = 2, 1, 130

NOISE = (
    "Tip: For seamless cloud",
    "TPU available",
    "Loading `train_dataloader` to estimate number of stepping batches",
    "`weights_only` was not set",
)

REFUSALS = (ValueError, TypeError, MisconfigurationException)  # of values, by whoever gets them

_OVERRIDE = re.compile(r"^(?P<name>--[\w.]+\.overrides\.\w+)\.(?P<keys>[\w.]+)(?:=(?P<value>.+))?$")

EXAMPLES = f"""\
examples:
  {PROGRAM} fit --config configs/quickstart.yaml
  {PROGRAM} fit --config configs/airbench/muon.yaml --config configs/cpu.yaml
  {PROGRAM} fit --config RECIPE.yaml --model.optimizer.matrix.lr 0.03 --trainer.max_epochs 4
  {PROGRAM} fit --config RECIPE.yaml --ckpt_path LOGS/checkpoints/last.ckpt
  {PROGRAM} test --config RECIPE.yaml --ckpt_path LOGS/checkpoints/last.ckpt
  {PROGRAM} params --config RECIPE.yaml
  {PROGRAM} report LOGS
  {PROGRAM} fit --model.help models.Airbench

Later files and options win over earlier ones. `fit --print_config` shows the result."""

SUBCOMMANDS = {
    "fit": "Train.",
    "validate": "Evaluate a checkpoint on the validation set.",
    "test": "Evaluate a checkpoint on the test set.",
    "predict": "Save the predictions of a checkpoint.",
    "params": "Show which algorithm trains which parameter, and why.",
}

SECTIONS = {
    "trainer": "trainer: how to run, the options of Lightning's Trainer",
    "model": "model: what to train, any LightningModule",
    "data": "data: what to train on, any LightningDataModule",
}

SUBCOMMAND_USAGE = "%(prog)s --config FILE [--config FILE ...] [--OPTION VALUE ...]"


class Interrupted(Exception):
    """The user stopped the run; the message says what was kept and how to go on."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the line breaks of descriptions and examples kept."""


class Parser(LightningArgumentParser):
    """Reports a mistake in at most three lines and accepts no abbreviations."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def option_names(self) -> list[str]:
        """Return the dotted names of all options, those of subcommands included."""
        subcommands = getattr(self._subcommands_action, "choices", None) or {}
        nested = [name for parser in subcommands.values() for name in parser.option_names()]
        return [action.dest for action in self._actions if action.option_strings] + nested

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Check the values; the complaint about an unknown key names the likely one."""
        try:
            super().validate(*args, **kwargs)
        except KeyError as error:
            message = errors.add_hint(str(error), self.option_names())
            raise type(error)(message) from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the mistake and exit with status 2; nested parsers pass it on."""
        message = errors.add_hint(message, self.option_names())
        if not self.exit_on_error:
            super().error(message, ex)
        _print_traceback()
        self.fail(*errors.explain(message, getattr(self, "args", None) or []))

    def fail(self, *lines: str) -> NoReturn:
        """Print `lines` as an error and exit with status 2."""
        help_line = f"all options: {PROGRAM} {getattr(self, 'subcommand', '')} --help"
        lines = lines if len(lines) > 1 else (*lines, " ".join(help_line.split()))
        print("error: " + "\n  ".join(lines[:3]), file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


class Trainer(pl.Trainer):
    """Lightning's Trainer with the method behind the subcommand `params`."""

    def params(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
    ) -> None:
        """Show which algorithm trains which parameter, and why; trains nothing.

        Args:
            model: The model whose parameters are shown.
            datamodule: Not used: a recipe of fit is accepted as it is.
        """
        from lit_fanions import split_parameters
        from lit_fanions.callbacks import FanionOptimizer

        model.configure_model()
        callbacks = self.callbacks  # type: ignore[attr-defined]
        dropped_in = [own.config for own in callbacks if isinstance(own, FanionOptimizer)]
        config = dropped_in[-1] if dropped_in else getattr(model, "fanion_config", None)
        print(split_parameters(model, config))
        print(f"Total parameters: {sum(p.numel() for p in model.parameters()):,}")


class StopBetweenSteps(Callback):
    """Lets Ctrl-C end a fit after the step in progress, with a checkpoint of that moment.

    Stopping inside a step could save half-updated weights. A second Ctrl-C stops at once. With
    several processes Lightning's own handling stays, as they would stop at different steps.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: Any = None

    def _request(self, signum: int, frame: Any) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        _tell("finishing this step; press Ctrl-C again to stop at once")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over Ctrl-C."""
        main_thread = threading.current_thread() is threading.main_thread()
        if trainer.world_size == 1 and main_thread:
            self._previous = signal.signal(signal.SIGINT, self._request)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Save and stops if Ctrl-C was pressed during the step."""
        if self._requested:
            raise Interrupted(_save_interrupted(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give Ctrl-C back."""
        self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give Ctrl-C back."""
        self._release()

    def _release(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


class ReportRestoredOptions(Callback):
    """Warns where a resumed optimizer runs with other options than the configured ones.

    A checkpoint restores the options of every parameter group with its state.
    """

    def __init__(self) -> None:
        self._configured: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the configured options: nothing is restored yet."""
        self._configured = _group_options(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare them with what the run goes on with."""
        if trainer.ckpt_path:
            for line in _differences(self._configured, _group_options(trainer)):
                _warn(line)


class SaveLastStep(Callback):
    """Lets last.ckpt hold the end of a fit that ends between two saves."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it again, for every ModelCheckpoint with save_last."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last is True:
                saved = getattr(callback, "_last_global_step_saved", trainer.global_step)
                if callback.last_model_path and saved != trainer.global_step:
                    trainer.save_checkpoint(
                        callback.last_model_path, weights_only=callback.save_weights_only
                    )


class SaveRecipe(SaveConfigCallback):
    """Saves the configuration without the arguments of one call, such as the checkpoint.

    What lies beside the logs is then a recipe that every subcommand accepts.
    """

    def __init__(self, parser: Any, config: Namespace, *args: Any, **kwargs: Any) -> None:
        recipe = config.clone()
        for name in ("config", "ckpt_path", "weights_only", "verbose", "return_predictions"):
            recipe.pop(name, None)
        super().__init__(parser, recipe, *args, **kwargs)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save it, unless there is no logger: that would put it into the working directory."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """Lightning's command line for recipes that name their model and data by class path."""

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        super().__init__(
            save_config_callback=SaveRecipe,
            save_config_kwargs={"overwrite": True},
            trainer_class=Trainer,
            trainer_defaults={
                "callbacks": [StopBetweenSteps(), ReportRestoredOptions(), SaveLastStep()]
            },
            parser_kwargs={
                "prog": PROGRAM,
                "description": "Train networks in the norm of your choice. Beside the subcommands "
                "below there is `report LOGDIR`, which draws what TensorBoard would show.",
                "epilog": EXAMPLES,
                "version": _versions(),
                "formatter_class": HelpFormatter,
                **{
                    name: {"description": text, "usage": SUBCOMMAND_USAGE, "epilog": EXAMPLES}
                    for name, text in SUBCOMMANDS.items()
                },
            },
            parser_class=Parser,
            args=None if args is None else list(args),
            run=run,
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Add `params` to Lightning's subcommands."""
        return {**LightningCLI.subcommands(), "params": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what recipes say beside trainer, model and data."""
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="Whether fit ends with a test of the trained weights.",
        )

    def setup_parser(self, *args: Any) -> None:
        """Replace Lightning's descriptions of the subcommands by short ones."""
        super().setup_parser(*args)
        for action in getattr(self.parser._subcommands_action, "_choices_actions", ()):
            action.help = SUBCOMMANDS[action.dest]

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give the sections of the help titles that say what they are."""
        super().add_core_arguments_to_parser(parser)
        for key, title in SECTIONS.items():
            (parser.groups or {})[key].title = title

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args` without Lightning's warning that the process has arguments too."""
        self.config = parser.parse_args(None if args is None else _nest_overrides(args))

    def _parse_ckpt_path(self) -> None:
        """Refuse a checkpoint that does not exist.

        Lightning would also override the configuration from the checkpoint here.
        """
        subcommand = self.config.get("subcommand")
        path = subcommand and self.config[subcommand].get("ckpt_path")
        parser = subcommand and self._subcommand_parsers[subcommand]
        if path in ("last", "hpc") and subcommand != "fit":
            assert isinstance(parser, Parser)
            parser.fail(
                f"--ckpt_path {path} finds nothing in a run of its own: give the checkpoint's path"
            )
        if path and not _is_checkpoint(path):
            message = f"Parser key \"ckpt_path\": File does not exist: '{Path(path).absolute()}'"
            parser.error(message)

    def before_instantiate_classes(self) -> None:
        """Warn if weights that nothing has trained are about to be evaluated."""
        evaluates = self.subcommand in ("validate", "test", "predict")
        if evaluates and not self._get(self.config, "ckpt_path"):
            _warn(f"{self.subcommand} without --ckpt_path runs on freshly initialised weights")

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; a refused value is a mistake in the configuration."""
        try:
            super().instantiate_classes()
        except (KeyError, *REFUSALS) as error:
            self._refuse(error)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer; `params` needs none of its devices and loggers, and one callback."""
        if self.subcommand == "params":
            from lit_fanions.callbacks import FanionOptimizer

            given = self._get(self.config_init, "trainer")["callbacks"] or []
            callbacks = given if isinstance(given, list) else [given]
            return Trainer(
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                callbacks=[own for own in callbacks if isinstance(own, FanionOptimizer)],
            )
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; Lightning's exit after Ctrl-C becomes `Interrupted`.

        A value that is refused while a fit is set up, such as an option of the optimizer, is a
        mistake in the configuration too.
        """
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as exit_:
            if not self.trainer.interrupted:
                raise
            raise Interrupted(_last_checkpoint(self.trainer)) from exit_
        except REFUSALS as error:
            batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
            if subcommand != "fit" or batches > 0:
                raise
            self._refuse(error)

    def _refuse(self, error: Exception) -> NoReturn:
        """Exit with status 2 because of what the configuration says."""
        _print_traceback()
        _tell(f"error: {_describe(error)}")
        raise SystemExit(USAGE_ERROR) from error

    def after_fit(self) -> None:
        """Test the trained weights if the recipe says so, and tell where the logs are."""
        if _is_trial(self.trainer):
            return
        if self._get(self.config, "test_after_fit"):
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            _print_all(_test_results(self.trainer.callback_metrics))
        _print_all(_log_lines(self.trainer))

    def predict(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        **kwargs: Any,
    ) -> None:
        """Predict and save the predictions, one entry per batch, beside the logs."""
        predictions = self.trainer.predict(model, datamodule=datamodule, **kwargs)
        folder = self.trainer.log_dir
        if predictions is None or folder is None:
            return
        ranks = self.trainer.world_size
        suffix = f"_rank{self.trainer.global_rank}" if ranks > 1 else ""
        path = Path(folder, f"predictions{suffix}.pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(predictions, path)
        print(f"predictions: {_relative(path)}")


class Reader(CLI):
    """Reads the arguments of a run as the run would, and goes no further.

    A mistake ends the process with the lines and the status that the run would end with.
    """

    def __init__(self, args: Sequence[str]) -> None:
        _find_modules_in_working_directory()
        _quiet_lightning()
        super().__init__(args)

    def read(self, args: Sequence[str]) -> Namespace:
        """Return the configuration of other arguments, those of the subcommand included."""
        self.parse_arguments(self.parser, args)
        self._parse_ckpt_path()
        return self.config

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        """Nothing is built."""

    def instantiate_classes(self) -> None:
        """Nothing is built."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: The arguments; by default those of the process.

    Returns:
        The exit status: 0, 1 for an error while running, 130 after Ctrl-C. A mistake in the
        configuration exits with status 2.
    """
    given = list(sys.argv[1:] if args is None else args)
    _find_modules_in_working_directory()
    _quiet_lightning()
    if given[:1] == ["report"]:  # it needs no model, which Lightning's subcommands do
        from lit_fanions.cli import report

        return report.main(given[1:], f"{PROGRAM} report")
    try:
        CLI(given)
    except (Interrupted, KeyboardInterrupt) as stop:
        _tell(_interrupted_line(str(stop), given))
        return INTERRUPTED
    except FileNotFoundError as error:
        _print_traceback()
        _tell(f"error: {_describe(error)}")
        return USAGE_ERROR
    except Exception as error:
        shown = _print_traceback()
        hint = "" if shown else f" [{TRACEBACK}=1 shows the traceback]"
        _tell(f"error: {_describe(error)}{hint}")
        return RUN_ERROR
    return 0


def _nest_overrides(args: Sequence[str]) -> list[str]:
    """Rewrite `--A.overrides.NAME.KEY VALUE` as `--A.overrides.NAME {KEY: VALUE}`.

    jsonargparse reaches into a mapping no deeper than to its values.
    """
    nested, remaining = [], iter(args)
    for arg in remaining:
        match = _OVERRIDE.match(arg)
        value = match and (match["value"] or next(remaining, None))
        if match is None or value is None:
            nested.append(arg)
            continue
        for key in reversed(match["keys"].split(".")):
            value = f"{{{key}: {value}}}"
        nested += [match["name"], value]
    return nested


def _find_modules_in_working_directory() -> None:
    """Let class paths name modules of the working directory, as `python -m` does."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())


def _quiet_lightning() -> None:
    """Silence advertising, and remarks from inside Lightning that no user can act on."""
    for handler in logging.getLogger("lightning.pytorch").handlers:
        if _is_news not in handler.filters:
            handler.addFilter(_is_news)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message="The dirpath has changed")


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in str(record.msg) for text in NOISE)


def _versions() -> str:
    """Return the versions that a bug report needs."""
    try:
        own = metadata.version("lit-fanions")
    except metadata.PackageNotFoundError:
        own = "(not installed)"
    return (
        f"{own}, lightning {pl.__version__}, torch {torch.__version__}, "
        f"python {platform.python_version()}"
    )


def _describe(error: BaseException) -> str:
    """Return an error in one line, with its type where the text alone says little."""
    if isinstance(error, pickle.UnpicklingError):
        return "the file given as --ckpt_path is no checkpoint, or not one that is safe to load"
    text = errors.one_line(error, limit=600)
    plain = isinstance(error, (ValueError, FileNotFoundError, MisconfigurationException))
    return text if plain and text else f"{type(error).__name__}: {text}"


def _print_traceback() -> bool:
    """Print the traceback of the current error if the user asked for it."""
    asked = os.environ.get(TRACEBACK, "0") not in ("", "0")
    if asked and sys.exc_info()[0]:
        traceback.print_exc()
    return asked


def _tell(line: str) -> None:
    """Print a line on stderr, below a progress bar that may stand in the last one."""
    print(f"\n{line}" if sys.stderr.isatty() else line, file=sys.stderr)


@rank_zero_only
def _warn(line: str) -> None:
    print(f"\nwarning: {line}", file=sys.stderr)  # a progress bar may stand in the last line


@rank_zero_only
def _print_all(lines: Iterator[str]) -> None:
    for line in lines:
        print(line)


def _is_trial(trainer: pl.Trainer) -> bool:
    """Tell whether the run only tries the code, and is to leave nothing behind."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _relative(path: str | Path) -> str:
    """Return a path as seen from the working directory, if it lies below it."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _is_checkpoint(path: str) -> bool:
    """Tell whether Lightning can look up `path`: a file, a folder, a keyword or a remote."""
    keyword = path in ("best", "last", "hpc") or path.startswith("registry")
    return keyword or "://" in path or Path(path).exists()


def _save_interrupted(trainer: pl.Trainer) -> str:
    """Save the state between two steps and returns the path."""
    callback = trainer.checkpoint_callback
    folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
    folder = folder or Path(trainer.log_dir or trainer.default_root_dir, "checkpoints")
    path = Path(folder, "interrupted.ckpt")
    if not _is_trial(trainer):
        trainer.save_checkpoint(path)
    return str(path)


def _last_checkpoint(trainer: pl.Trainer) -> str:
    """Return the path of the last checkpoint that a stopped fit left behind, or ''."""
    callback = trainer.checkpoint_callback
    if trainer.state.fn != TrainerFn.FITTING or not isinstance(callback, ModelCheckpoint):
        return ""
    return callback.last_model_path or callback.best_model_path


def _interrupted_line(checkpoint: str, args: Sequence[str]) -> str:
    """Say what is left of a stopped run and how to go on with it."""
    if not checkpoint or not Path(checkpoint).exists():
        return "interrupted; no checkpoint was saved"
    command = [*_without_option(args, "--ckpt_path"), "--ckpt_path", _relative(checkpoint)]
    return f"interrupted; resume with: {_program()} {shlex.join(command)}"


def _without_option(args: Sequence[str], option: str) -> list[str]:
    """Return `args` without `option VALUE` and `option=VALUE`."""
    kept = [a for a in args if not a.startswith(f"{option}=")]
    while option in kept:
        at = kept.index(option)
        del kept[at : at + 2]
    return kept


def _group_options(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the options of every parameter group, before any schedule."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [
        {
            name: group.get(f"initial_{name}", value)
            for name, value in group.items()
            if name not in ("params", "param_names") and not name.startswith("initial_")
        }
        for group in groups
    ]


def _differences(
    configured: Sequence[Mapping[str, Any]], restored: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield a line for every option that a checkpoint sets to another value."""
    for index, (ours, theirs) in enumerate(zip(configured, restored, strict=False)):
        for name in ours:
            if name in theirs and ours[name] != theirs[name]:
                yield (
                    f"group {ours.get('name', index)}: {name} {theirs[name]} from the checkpoint "
                    f"is used, not the configured {ours[name]}"
                )


def _test_results(metrics: Mapping[str, Any]) -> Iterator[str]:
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


def _log_lines(trainer: pl.Trainer) -> Iterator[str]:
    """Yield where the logs are, and the command that opens them."""
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None) or logger.save_dir
        if not folder:
            continue
        yield f"logs: {_relative(folder)}"
        if isinstance(logger, TensorBoardLogger):
            yield f"open them with: {_tensorboard()} --logdir {shlex.quote(_relative(folder))}"


def _program() -> str:
    """Return the command that starts this program again, wherever its Python is."""
    on_path = shutil.which("python")
    if on_path and Path(on_path).absolute() == Path(sys.executable).absolute():
        return PROGRAM
    return f"{shlex.quote(_relative(sys.executable))} -m lit_fanions"


def _tensorboard() -> str:
    """Return the command that starts the TensorBoard of this environment."""
    beside = Path(sys.executable).with_name("tensorboard")
    on_path = shutil.which("tensorboard")
    if on_path and Path(on_path).absolute() == beside:
        return "tensorboard"
    if beside.exists():
        return shlex.quote(_relative(beside))
    return f"{shlex.quote(sys.executable)} -m tensorboard.main"
