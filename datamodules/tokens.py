"""The LightningDataModule of token shards, which FineWeb and the embedded text share."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import loader, windows
from datamodules.loader import EpochLoader, fit_progress, rank_and_world, resolve_seed
from datamodules.shards import Shards, Split
from datamodules.tokenizers import Tokenizer
from datamodules.whole_steps import WholeSteps
from datamodules.windows import Batch, Pieces, Share, Starts
from lit_fanions.checks import check_flag, whole_number


class TokenDataModule(LightningDataModule):
    """Sequences of token shards; subclasses say which shards.

    Batches are inputs and targets, int64 (sequences, sequence_length), the targets one token ahead.
    Targets of -100 have no loss. All batches of a fit have the same shape.

    Window i of the training data is the tokens i·T to i·T + T of all shards together, with T the
    sequence_length. Any number of processes trains on the same windows in the same optimizer step:
    the data module sets the trainer's accumulate_grad_batches accordingly, and fills up with
    sequences without targets. If the loss is summed over targets and multiplied by the world size
    and the accumulated batches, by which a Trainer divides, its gradient is that of the whole step.

    A checkpoint may be resumed in the middle of an epoch, also with another number of processes
    and another micro_batch_size; if it was saved within an optimizer step, that step is repeated.

    With the trainer's overfit_batches, every epoch has the batches of the first one.

    Args:
        tokenizer: Tokenizer that the shards were made with.
        batch_tokens: Tokens of one optimizer step, over all processes and accumulated forward
            passes; a multiple of sequence_length.
        sequence_length: Tokens of a sequence.
        micro_batch_size: Largest number of sequences per forward pass and process.
        shuffle: Permute the windows of all shards together, differently in each epoch; otherwise
            they come in order.
        seed: Seed of the permutation; None: that of seed_everything, 0 without one.
        align_documents: Let each training sequence start with a document: the first one that
            starts after the sequence before. Reads all shards once when a fit is set up, about
            1 GB a second.
        val_tokens: Number of targets to evaluate on, the first of the validation shards, each
            exactly once over all processes; None: all. Never shuffled or aligned.
        val_sequence_length: Tokens of a sequence in evaluation; None: sequence_length.
        val_batch_size: Largest number of sequences per forward pass and process in evaluation;
            None: micro_batch_size.
        val_every_n_steps: Optimizer steps between validations; None: the trainer's interval.
        num_workers: Processes that read ahead; 0: none, which is fast enough for most.
        prompts: Texts that predict continues, one per batch; divided among the processes.

    Attributes:
        tokenizer: Tokenizer that the shards were made with.
        vocab_size: Number of different tokens.
        bos: The token that every document, and every prompt, starts with.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        batch_tokens: int = 524288,
        sequence_length: int = 1024,
        micro_batch_size: int = 64,
        shuffle: bool = False,
        seed: int | None = None,
        align_documents: bool = False,
        val_tokens: int | None = None,
        val_sequence_length: int | None = None,
        val_batch_size: int | None = None,
        val_every_n_steps: int | None = None,
        num_workers: int = 0,
        prompts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        whole_number("batch_tokens", batch_tokens)
        whole_number("sequence_length", sequence_length)
        whole_number("micro_batch_size", micro_batch_size)
        optional = {
            "val_tokens": val_tokens,
            "val_sequence_length": val_sequence_length,
            "val_batch_size": val_batch_size,
            "val_every_n_steps": val_every_n_steps,
        }
        for name, number in optional.items():
            if number is not None:
                whole_number(name, number)
        sequences = round(batch_tokens / sequence_length)
        if batch_tokens % sequence_length:
            raise ValueError(
                f"batch_tokens={batch_tokens} must be a multiple of sequence_length="
                f"{sequence_length}: choose {max(sequences, 1) * sequence_length}"
            )
        check_flag("shuffle", shuffle)
        check_flag("align_documents", align_documents)
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r}: give a list of texts")
        self.tokenizer = tokenizer
        self.vocab_size, self.bos = tokenizer.vocab_size, tokenizer.bos
        self.batch_tokens, self.sequence_length = batch_tokens, sequence_length
        self.micro_batch_size = micro_batch_size
        self.shuffle, self.align_documents = shuffle, align_documents
        self.seed = loader.checked_seed(seed)
        self.val_tokens = val_tokens
        self.val_sequence_length = val_sequence_length or sequence_length
        self.val_batch_size = val_batch_size or micro_batch_size
        self.val_every_n_steps = val_every_n_steps
        self.num_workers = whole_number("num_workers", num_workers, 0)
        self.prompts = list(prompts)
        self._shards: dict[Split, Shards] = {}
        self._starts: Starts = np.empty(0, np.int64)
        self._saved_recipe: dict[str, Any] | None = None

    def shard_paths(self, split: Split) -> list[Path]:
        """Return the files of one split, in order."""
        raise NotImplementedError(f"{type(self).__name__} must implement shard_paths(split)")

    # -- Lightning's hooks --

    def setup(self, stage: str | None = None) -> None:
        """Open the shards that the stage needs; before a fit, set what the trainer counts in."""
        if stage == "predict":
            return
        self._shards["val"] = self._open("val")
        if stage not in ("fit", None):
            return
        train = self._shards["train"] = self._open("train")
        length = self.sequence_length
        if self.align_documents:
            self._starts = windows.aligned_windows(train.find(self.bos), len(train), length)
        else:
            self._starts = windows.consecutive_windows(len(train), length)
        if len(self._starts) < self._sequences:
            aligned = " that start with a document" if self.align_documents else ""
            raise ValueError(
                f"batch_tokens={self.batch_tokens} are {self._sequences} sequences of "
                f"{self.sequence_length}, and the {len(train)} training tokens have only "
                f"{len(self._starts)}{aligned}: choose fewer or provide more"
            )
        if self.trainer is not None:
            self._set_up_trainer(self.trainer)

    def train_dataloader(self) -> EpochLoader[Batch]:
        """Return this process' part of the training batches."""
        shards, recipe = self._split("train"), self._recipe()
        loader.warn_if_changed(self._saved_recipe, recipe)

        def pieces(epoch: int) -> Pieces:
            starts = self._starts
            if self.shuffle:
                starts = windows.shuffled(starts, recipe["seed"], epoch)
            share = self._share(self._sequences, self.micro_batch_size)
            return Pieces(shards, starts, self.sequence_length, len(shards) - 1, share, self.bos)

        return EpochLoader(
            lambda epoch, first: self._read(pieces(epoch), first),
            len(pieces(0)),
            lambda: fit_progress(self.trainer),
        )

    def val_dataloader(self) -> EpochLoader[Batch]:
        """Return this process' part of the first ``val_tokens`` validation targets."""
        shards = self._split("val")
        targets = len(shards) - 1
        if self.val_tokens is not None and self.val_tokens > targets:
            rank_zero_warn(
                f"val_tokens={self.val_tokens}, and the validation shards have only {targets} "
                "targets: evaluating on those"
            )
        targets = min(self.val_tokens or targets, targets)
        starts = np.arange(0, targets, self.val_sequence_length)
        share = self._share(len(starts), self.val_batch_size)
        pieces = Pieces(shards, starts, self.val_sequence_length, targets, share, self.bos)
        return EpochLoader(lambda epoch, first: self._read(pieces, first), len(pieces))

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> EpochLoader[Tensor]:
        """Return this process' prompts: each int64 (1, tokens), ``bos`` first.

        With a ModelParallelStrategy, each process gets all prompts.
        """
        if not self.prompts:
            raise ValueError("there is nothing to continue: set prompts, such as ['Once upon']")
        rank, world_size = rank_and_world(self.trainer)
        if self.trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            rank, world_size = 0, 1  # all processes take part in each forward pass
        encoded = self.encoded_prompts()[rank::world_size]
        prompts = [torch.tensor([ids]) for _, ids in encoded]
        return EpochLoader(lambda epoch, first: iter(prompts[first:]), len(prompts))

    def state_dict(self) -> dict[str, Any]:
        """Return what the training batches depend on, and the number of batches per step."""
        if "train" not in self._shards:
            return {}
        return {**self._recipe(), "accumulate_grad_batches": self._accumulation()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what the checkpoint's batches depended on; train_dataloader warns if it differs."""
        self._saved_recipe = {
            name: value for name, value in state_dict.items() if name != "accumulate_grad_batches"
        }

    # -- for models --

    def encoded_prompts(self) -> list[tuple[str, list[int]]]:
        """Return each prompt with its tokens, ``bos`` first."""
        encode = self.tokenizer.encode
        return [(prompt, [self.bos, *encode(prompt).tolist()]) for prompt in self.prompts]

    # -- private --

    @property
    def _sequences(self) -> int:
        return self.batch_tokens // self.sequence_length

    def _share(self, sequences: int, micro_batch_size: int) -> Share:
        return Share(sequences, micro_batch_size, *rank_and_world(self.trainer))

    def _accumulation(self) -> int:
        return self._share(self._sequences, self.micro_batch_size).passes

    def _recipe(self) -> dict[str, Any]:
        return {
            "seed": resolve_seed(self.seed),
            "shuffle": self.shuffle,
            "batch_tokens": self.batch_tokens,
            "sequence_length": self.sequence_length,
            "align_documents": self.align_documents,
            "shards": [[s.path.name, len(s)] for s in self._split("train").shards],
        }

    def _open(self, split: Split) -> Shards:
        shards = Shards(self.shard_paths(split), self.vocab_size)
        if len(shards) < 2:
            raise ValueError(
                f"{shards.shards[0].path} holds one token: a sequence and its target take two"
            )
        return shards

    def _split(self, split: Split) -> Shards:
        if split not in self._shards:
            stage = "fit" if split == "train" else "test"
            raise RuntimeError(f"the {split} shards are not open: call setup({stage!r}) first")
        return self._shards[split]

    def _set_up_trainer(self, trainer: pl.Trainer) -> None:
        """Set what Lightning counts in batches, before its loops read it."""
        steps = WholeSteps.attached_to(trainer)
        user, passes = steps.user_settings(trainer), self._accumulation()
        given = user["accumulate_grad_batches"]
        if given not in (1, passes):
            raise ValueError(
                f"accumulate_grad_batches={given}: leave it out, batch_tokens={self.batch_tokens} "
                f"and micro_batch_size={self.micro_batch_size} on {trainer.world_size} processes "
                f"make it {passes}"
            )
        if self.val_every_n_steps is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            steps.apply(trainer, accumulate_grad_batches=passes)
            return
        interval = self.val_every_n_steps * passes
        if user["val_check_interval"] not in (1.0, interval) or (
            user["check_val_every_n_epoch"] not in (1, None)
        ):
            raise ValueError(
                f"val_every_n_steps={self.val_every_n_steps} and the trainer's val_check_interval "
                "or check_val_every_n_epoch both say when to validate: leave one of them out"
            )
        steps.apply(
            trainer,
            accumulate_grad_batches=passes,
            val_check_interval=interval,
            check_val_every_n_epoch=None,  # count steps across epochs
        )

    def _read(self, pieces: Pieces, first: int) -> Iterator[Batch]:
        trainer = self.trainer
        on_cuda = trainer is not None and trainer.strategy.root_device.type == "cuda"
        pieces_in_order = DataLoader(
            pieces,
            batch_size=None,  # a piece is a batch already
            sampler=range(first, len(pieces)),
            num_workers=self.num_workers,
            pin_memory=on_cuda,
            generator=torch.Generator(),  # without it, torch's global generator would be drawn from
        )
        # The loader makes a list of each pair.
        yield from ((inputs, targets) for inputs, targets in pieces_in_order)
