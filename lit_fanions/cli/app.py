"""The command line: `python -m lit_fanions {fit,validate,test,predict,params} --config FILE`.

It is Lightning's own command line with other messages (``parser``, ``errors``, ``failures``), stops
between two steps (``_stopping``), whole and checked checkpoints (``_checkpoint_io``), callbacks of
every run (``_hooks``), and `params`, which shows which parameter is trained by which algorithm, and
why. docs/errors.md and docs/reliability.md say what a user can rely on.

Models and data come from `class_path`, never from here: this package installs without the zoo.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_fanions import callbacks
from lit_fanions.cli import _hooks, failures, messages
from lit_fanions.cli import parser as parsing
from lit_fanions.cli._checkpoint_io import CheckpointFiles, check_argument, replacing
from lit_fanions.cli._stopping import Interrupted, StopBetweenSteps
from lit_fanions.cli.errors import config_files, one_line
from lit_fanions.cli.messages import SUBCOMMANDS
from lit_fanions.memory import reuse_freed_memory

NOISE = (
    "Tip: For seamless cloud",
    "TPU available",
    "Loading `train_dataloader` to estimate number of stepping batches",
    "`weights_only` was not set",
)

EVALUATIONS = ("validate", "test", "predict")
KEYWORDS = ("best", "last", "hpc")  # checkpoints that Lightning looks up


class Trainer(pl.Trainer):
    """Lightning's Trainer with the method behind the subcommand `params`."""

    def params(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        devices: int = 1,
    ) -> None:
        """Show which algorithm trains which parameter, and why; trains nothing.

        Args:
            model: The model whose parameters are shown.
            datamodule: Not used: a recipe of fit is accepted as it is.
            devices: Show also which of so many devices under DDP solves which matrices.
        """
        from lit_fanions import Fanion, split_parameters
        from lit_fanions.optim.factory import parameter_groups
        from lit_fanions.optim.sharing import format_owners

        model.configure_model()
        own = self.callbacks  # type: ignore[attr-defined]
        dropped_in = [c.config for c in own if isinstance(c, callbacks.FanionOptimizer)]
        config = dropped_in[-1] if dropped_in else getattr(model, "fanion_config", None)
        split = split_parameters(model, config)
        print(split)
        if devices > 1:
            print(format_owners(Fanion(parameter_groups(split)).param_groups, devices))
        frozen = {n: p.numel() for n, p in model.named_parameters() if not p.requires_grad}
        if frozen:
            names = f"{next(iter(frozen))}, ..." if len(frozen) > 1 else next(iter(frozen))
            print(f"Frozen, in no group: {sum(frozen.values()):,} ({names})")
        print(f"Total parameters: {sum(p.numel() for p in model.parameters()):,}")


class CLI(LightningCLI):
    """Lightning's command line for recipes that name their model and data by class path."""

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        # Class paths may name modules of the working directory, as with `python -m`.
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        _quiet_lightning()
        self._stop = StopBetweenSteps()
        self._progress = _hooks.WatchProgress()
        self._skips = _hooks.WatchSkippedSteps()
        super().__init__(
            save_config_callback=_hooks.SaveRecipe,
            save_config_kwargs={"overwrite": True},
            trainer_class=Trainer,
            trainer_defaults={
                "callbacks": [
                    *(self._stop, self._progress, self._skips, _hooks.ReportRestoredOptions()),
                    *(_hooks.ResumeExactly(), _hooks.SaveLastStep()),
                ]
            },
            parser_kwargs=parsing.parser_options(),
            parser_class=parsing.Parser,
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
        parser.add_argument(
            "--nonfinite_patience",
            type=PositiveInt | None,
            default=None,
            help="Steps in a row without a finite gradient of some parameter that end fit; null: "
            "only warn.",
        )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Add the options of single subcommands."""
        added = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in EVALUATIONS:
            added.add_argument(
                "--allow_untrained",
                action="store_true",
                help="Run without --ckpt_path, on the weights that the model starts with.",
            )
        return added

    def setup_parser(self, *args: Any) -> None:
        """Replace Lightning's descriptions of the subcommands by short ones."""
        super().setup_parser(*args)
        for action in getattr(self.parser._subcommands_action, "_choices_actions", ()):
            action.help = SUBCOMMANDS[action.dest]

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give the sections of the help titles that say what they are."""
        super().add_core_arguments_to_parser(parser)
        for key, title in parsing.SECTIONS.items():
            (parser.groups or {})[key].title = title

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`, with the options of callbacks by name and of overrides."""
        given = list(sys.argv[1:] if args is None else args)
        for own in (parser, *getattr(self, "_subcommand_parsers", {}).values()):
            own.command_line = given
        assert isinstance(parser, parsing.Parser)
        if odd := [text for text in given if "\0" in text]:
            parser.fail(f"{odd[0]!r} holds a NUL character, which no option takes")
        parsing.check_texts(parser, config_files(given))
        nested = parsing.nest_overrides(given)
        self.config = parser.parse_args(parsing.list_callback_options(parser, nested))
        if subcommand := self.config.get("subcommand"):
            own = self._subcommand_parsers[subcommand]
            parsing.check_numbers(own, self.config[subcommand])  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        """Refuse a checkpoint that cannot be loaded, and evaluations without any.

        Lightning would also override the configuration from the checkpoint here.
        """
        subcommand = self.config.get("subcommand")
        if not subcommand:
            return
        config = self.config[subcommand]
        path = config.get("ckpt_path")
        fail = self._subcommand_parsers[subcommand].fail  # type: ignore[attr-defined]
        if subcommand in EVALUATIONS and not path and not config.allow_untrained:
            fail(
                f"{subcommand} without --ckpt_path would run on untrained weights; give "
                "--ckpt_path FILE, or --allow_untrained"
            )
        if path in KEYWORDS and subcommand != "fit":
            fail(f"--ckpt_path {path} works only with fit; pass the file")
        if "weights_only" in config and config.weights_only is None:
            config.weights_only = True  # Lightning would run the code in one from a URL
        if path and path not in KEYWORDS and not path.startswith("registry"):
            try:
                check_argument(path, config.get("weights_only") is not False)
            except (ValueError, OSError) as error:
                fail(f"--ckpt_path: {one_line(error, limit=600)}")
        self._progress.checkpoint = path

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; a refused value is a mistake in the configuration."""
        try:
            super().instantiate_classes()
        except Exception as error:
            self._refuse_or_raise(error)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer; `params` needs none of its devices and loggers, and one callback."""
        if self.subcommand == "params":
            given = self._get(self.config_init, "trainer")["callbacks"] or []
            given = given if isinstance(given, list) else [given]
            return Trainer(
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                callbacks=[own for own in given if isinstance(own, callbacks.FanionOptimizer)],
            )
        self._skips.patience = self._get(self.config, "nonfinite_patience")
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        if not sys.stdout.isatty():
            trainer.callbacks = _hooks.without_bars(trainer.callbacks)  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            _hooks.reserve_version(logger, self._progress.folders)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; a stop by a signal becomes `Interrupted`, whoever raises it."""
        try:
            with self._stop.listen(), failures.full_disks_left_to_main_thread():
                super()._run_subcommand(subcommand)
        except (Interrupted, KeyboardInterrupt, SystemExit, Exception) as error:
            self._stop.end_other_ranks(self.trainer)
            if (number := self._stop.stopped_by(error, self.trainer)) is not None:
                raise self._stop.interruption(self.trainer, number) from error
            if failures.is_full_disk(error):
                folder = self.trainer.log_dir or self.trainer.default_root_dir
                raise OSError(
                    error.errno, f"{error.strerror} in the run's folder", folder
                ) from error
            if not isinstance(error, Exception) or self._progress.has_begun:
                raise
            self._refuse_or_raise(error)

    def _refuse_or_raise(self, error: Exception) -> NoReturn:
        """Exit with status 2 if the configuration is to blame for `error`; raise it otherwise."""
        if not failures.is_refusal(error):
            raise error
        failures.print_traceback()
        messages.print_error(f"error: {failures.describe_refusal(error)}")
        raise SystemExit(parsing.USAGE_ERROR) from error

    def after_fit(self) -> None:
        """Test the trained weights if the recipe says so, and print where the logs are."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        lines: list[str] = []
        if self._get(self.config, "test_after_fit"):
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            lines += messages.format_test_results(self.trainer.callback_metrics)
        lines += messages.describe_logs(self.trainer)
        if lines and self.trainer.is_global_zero:
            print(*lines, sep="\n")

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
        with replacing(path) as file:
            torch.save(predictions, file)
        print(f"predictions: {messages.relative_path(path)}")
        print(
            f"format: torch.load gives a list of {len(predictions)} batches, each what "
            f"{type(model).__name__}.predict_step returned"
        )


class Reader(CLI):
    """Reads the arguments of a run as the run would, and goes no further.

    A mistake ends the process with the lines and the status that the run would end with.
    """

    def read(self, args: Sequence[str]) -> Namespace:
        """Return the configuration of other arguments, those of the subcommand included."""
        self.parse_arguments(self.parser, args)
        self._parse_ckpt_path()
        return self.config

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return its exit status.

    The status is 0, 1 if a training failed, 130 after Ctrl-C and 143 after SIGTERM. Mistakes in the
    command line or the configuration exit with status 2.
    """
    given = list(sys.argv[1:] if args is None else args)
    reuse_freed_memory()
    try:
        CLI(given)
    except Interrupted as stop:
        rank_zero_only(messages.print_error)(stop.last_line(given))
        return 128 + stop.number  # as shells count
    except KeyboardInterrupt:
        messages.print_error("interrupted")
        return 130
    except Exception as error:
        return failures.print_failure(failures.describe(error))
    return 0


def _quiet_lightning() -> None:
    """Silence advertising, and remarks from inside Lightning that no user can act on."""
    for handler in logging.getLogger("lightning.pytorch").handlers:
        if _is_news not in handler.filters:
            handler.addFilter(_is_news)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message="The dirpath has changed")


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in str(record.msg) for text in NOISE)
