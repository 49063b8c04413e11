"""Language-model batches out of token shards, the same ones on any number of processes.

Below: pure functions that say which windows of the token sequence an optimizer step sees, and which
piece of them a process reads in a forward pass; then the reader of those pieces; then the
LightningDataModule that FineWeb and the embedded text share.

The batch of an optimizer step is a set of windows that depends on the recipe alone. It is cut into
as many pieces as there are forward passes on all processes together, of equal shape: where windows
are missing, sequences fill up that have no targets. So sums over a step are exact for any number of
processes, and a run may go on with another number of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.loader import EpochLoader, fit_progress, rank_and_world, resolve_seed
from datamodules.shards import Shards
from datamodules.tokenizers import Tokenizer

Batch = tuple[Tensor, Tensor]
Starts = NDArray[np.int64]
Split = Literal["train", "val"]

IGNORED = -100  # the target that torch's cross entropy leaves out


# --- which windows: pure functions ---


def consecutive_windows(tokens: int, length: int) -> Starts:
    """Where windows of ``length`` tokens and one more, the last target, start.

    Args:
        tokens: Number of tokens there are.
        length: Tokens of a window's input.

    Returns:
        0, length, 2 length, …, int64 (max(tokens - 1, 0) // length,).
    """
    return np.arange(max(tokens - 1, 0) // length, dtype=np.int64) * length


def aligned_windows(documents: Starts, tokens: int, length: int) -> Starts:
    """Where windows start that all start with a document.

    Greedy: the next window starts with the first document that starts at or after the end of the
    one before, as in modded-nanogpt's loader.

    Args:
        documents: Where documents start, ascending, int64 (n,).
        tokens: Number of tokens there are.
        length: Tokens of a window's input; it has one more, the last target.

    Returns:
        A part of ``documents``.
    """
    following = np.searchsorted(documents, documents + length).tolist()
    chosen, document = [], 0
    while document < len(following):
        chosen.append(document)
        document = following[document]
    starts = documents[chosen]
    return starts[starts + length < tokens]


def shuffled(starts: Starts, seed: int, epoch: int) -> Starts:
    """Permute windows as a function of the arguments alone; ``epoch`` counts from 0."""
    return np.random.default_rng((seed, 1 + epoch)).permutation(starts)


def accumulation(sequences: int, micro_batch_size: int, world_size: int) -> int:
    """Forward passes per process that a batch of that many sequences takes."""
    return math.ceil(sequences / (micro_batch_size * world_size))


def piece(sequences: int, pieces: int, index: int) -> tuple[int, int]:
    """First and last + 1 of the sequences that belong to a piece.

    The rule of tensor_split: the first ``sequences % pieces`` pieces have one more than the rest.
    """
    size, longer = divmod(sequences, pieces)
    first = index * size + min(index, longer)
    return first, first + size + (index < longer)


# --- reading them ---


@dataclass(frozen=True)
class Pieces(Dataset[Batch]):
    """What one process reads: piece after piece of batch after batch.

    Attributes:
        shards: The tokens.
        starts: Of the windows in the order of the batches; an incomplete last batch is dropped.
        length: Tokens of a sequence.
        targets: Number of targets there are: those of the tokens 0 … targets - 1. Others, as those
            of a last window that reaches beyond, are ignored and their inputs not read.
        sequences: Windows of a batch.
        passes: Pieces of a batch that each process reads.
        rank: Which process.
        world_size: Number of processes.
        fill: The token that stands where nothing was read.
    """

    shards: Shards
    starts: Starts
    length: int
    targets: int
    sequences: int
    passes: int
    rank: int
    world_size: int
    fill: int

    def __len__(self) -> int:
        return len(self.starts) // self.sequences * self.passes

    def __getitem__(self, index: int) -> Batch:
        """Read inputs and targets, int64 (sequences of the longest piece, length)."""
        batch, turn = divmod(index, self.passes)
        pieces = self.passes * self.world_size
        # In each turn the processes' pieces are neighbours.
        first, last = piece(self.sequences, pieces, turn * self.world_size + self.rank)
        shape = math.ceil(self.sequences / pieces), self.length
        inputs = np.full(shape, self.fill, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        offset = batch * self.sequences
        for row, start in enumerate(self.starts[offset + first : offset + last].tolist()):
            known = min(self.length, self.targets - start)
            tokens = self.shards.read(start, known + 1)
            inputs[row, :known] = tokens[:-1]
            targets[row, :known] = tokens[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)


# --- resume ---


def at_whole_step(progress: dict[str, Any], old: int, new: int) -> tuple[dict[str, Any], bool]:
    """Rewrite how far a fit got, so that it goes on with a whole optimizer step.

    Args:
        progress: State of Lightning's count of batches: ready, started, processed and completed,
            in "current" (the epoch) and "total"; and "is_last_batch".
        old: Batches per step when it was saved.
        new: Batches per step from now on.

    Returns:
        The count in new batches, those of a step that was not finished taken back, and whether
        something was taken back.
    """
    epoch, total = progress["current"], progress["total"]
    between_batches = all(
        count["ready"] == count["started"] == count["processed"] for count in (epoch, total)
    )
    # The last batch of an epoch always ends a step, also where limit_train_batches cuts it short.
    whole = between_batches and (epoch["processed"] % old == 0 or progress["is_last_batch"])
    if whole and old == new:
        return progress, False
    earlier = total["processed"] - epoch["processed"]
    if old != new:
        earlier = earlier // old * new
    reached = epoch["processed"] // old * new
    # Saved at the end of a batch, which Lightning counts as completed only after that. What was
    # not finished becomes what would have been saved at the end of the last whole step.
    pending = total["processed"] - total["completed"] if whole else 1

    def count(batches: int) -> dict[str, int]:
        done = dict.fromkeys(("ready", "started", "processed"), batches)
        return {**done, "completed": batches - pending}

    counts = {"current": count(reached), "total": count(earlier + reached)}
    return {**counts, "is_last_batch": whole and progress["is_last_batch"]}, not whole


class _WholeSteps(Callback):
    """Keeps a trainer's counts of batches in whole optimizer steps, from fit to fit.

    It stays with the trainer and remembers what that was told, which is not what the user said; and
    it translates the progress in a checkpoint before Lightning's loops read it.
    """

    SETTINGS = ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch")

    def __init__(self) -> None:
        self._said: dict[str, Any] = {}
        self._told: dict[str, Any] = {}

    def said(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The settings as the user made them; None for one that is not there."""
        # val_check_interval is not there if it is a time.
        now = {name: getattr(trainer, name, None) for name in self.SETTINGS}
        return {
            name: self._said[name] if self._told and value == self._told[name] else value
            for name, value in now.items()
        }

    def tell(self, trainer: pl.Trainer, **settings: Any) -> None:
        """Make these settings for the next fit, and the others what the user made them."""
        self._said = self.said(trainer)
        before, self._told = self._told, {**self._said, **settings}
        for name, value in self._told.items():
            if getattr(trainer, name, None) != value:
                setattr(trainer, name, value)
        old, new = (told.get("accumulate_grad_batches") for told in (before, self._told))
        if old not in (None, new):  # what earlier fits counted goes on
            total = trainer.fit_loop.epoch_loop.batch_progress.total
            total.load_state_dict(
                {name: count // old * new for name, count in total.state_dict().items()}
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        saved = checkpoint.get(type(data).__qualname__, {}).get("accumulate_grad_batches")
        if saved is None or not isinstance(data, TokenDataModule) or not trainer.training:
            return
        loop = checkpoint["loops"]["fit_loop"]
        progress, taken_back = at_whole_step(
            loop["epoch_loop.batch_progress"], saved, trainer.accumulate_grad_batches
        )
        loop["epoch_loop.batch_progress"] = progress
        # Lightning counts a step that it finds saved at its end once more for the loggers.
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= taken_back


# --- the DataModule ---


class TokenDataModule(LightningDataModule):
    """Sequences out of token shards; subclasses say which shards.

    Batches are inputs and targets, int64 (sequences, sequence_length), the targets one token ahead.
    Targets of -100 are to be ignored. All batches of a fit have the same shape.

    A window i of the training data is the tokens i·T to i·T + T of all shards together, with T the
    sequence_length. Any number of processes sees the same windows in the same optimizer step: the
    trainer's accumulate_grad_batches is set to what that takes, and missing sequences are filled up
    by ignored ones. The gradient of a loss that is summed over targets, times world size and
    accumulated batches, which a Trainer divides by, is that of the whole step.

    A checkpoint may be resumed in the middle of an epoch, also with other numbers of processes and
    another micro_batch_size; if it was saved in the middle of an optimizer step, with that step.

    Args:
        tokenizer: What the shards were made with.
        batch_tokens: Tokens of one optimizer step, over all processes and accumulated forward
            passes; a multiple of sequence_length.
        sequence_length: Tokens of a sequence.
        micro_batch_size: At most that many sequences per forward pass and process.
        shuffle: Permute the windows of all shards together, differently in each epoch; otherwise
            they come in order.
        seed: Of the permutation; None: that of seed_everything, 0 without one.
        align_documents: Let each training sequence start with a document: the next one starts with
            the first document after the end of the one before. Reads all shards once when a fit is
            set up, about 1 GB a second.
        val_tokens: Evaluate on the targets in the first val_tokens + 1 tokens of the validation
            shards, each exactly once over all processes; None: on all. Never shuffled or aligned.
        val_sequence_length: Tokens of a sequence in evaluation; None: sequence_length.
        val_batch_size: At most that many of them per forward pass and process; None:
            micro_batch_size.
        val_every_n_steps: Optimizer steps between validations; None: what the trainer says.
        num_workers: Processes that read ahead; 0: none, which is fast enough for most.
        prompts: What predict continues, one at a time; shared out to the processes.

    Attributes:
        tokenizer: What the shards were made with.
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
        numbers = {
            "batch_tokens": batch_tokens,
            "sequence_length": sequence_length,
            "micro_batch_size": micro_batch_size,
            "val_tokens": val_tokens,
            "val_sequence_length": val_sequence_length,
            "val_batch_size": val_batch_size,
            "val_every_n_steps": val_every_n_steps,
        }
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}: it must be at least 1")
        if batch_tokens % sequence_length:
            raise ValueError(
                f"batch_tokens={batch_tokens} must be a multiple of sequence_length="
                f"{sequence_length}: choose {_nearest_multiple(batch_tokens, sequence_length)}"
            )
        if seed is not None and seed < 0:
            raise ValueError(f"seed={seed}: it must not be negative")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: it must not be negative")
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r}: give a list of texts")
        self.tokenizer = tokenizer
        self.vocab_size, self.bos = tokenizer.vocab_size, tokenizer.bos
        self.batch_tokens, self.sequence_length = batch_tokens, sequence_length
        self.micro_batch_size = micro_batch_size
        self.shuffle, self.seed, self.align_documents = shuffle, seed, align_documents
        self.val_tokens = val_tokens
        self.val_sequence_length = val_sequence_length or sequence_length
        self.val_batch_size = val_batch_size or micro_batch_size
        self.val_every_n_steps = val_every_n_steps
        self.num_workers = num_workers
        self.prompts = list(prompts)
        self._shards: dict[Split, Shards] = {}
        self._starts: Starts = np.empty(0, np.int64)
        self._saved_recipe: dict[str, Any] | None = None

    def shard_paths(self, split: Split) -> list[Path]:
        """The files of one split, in order."""
        raise NotImplementedError(f"{type(self).__name__} must implement shard_paths(split)")

    # -- Lightning's hooks --

    def setup(self, stage: str | None = None) -> None:
        """Open the shards that the stage needs; before a fit, tell the trainer how to step.

        Raises:
            ValueError: If there are too few tokens, or the trainer was told otherwise.
        """
        if stage == "predict":
            return
        self._shards["val"] = self._open("val")
        if stage not in ("fit", None):
            return
        train = self._shards["train"] = self._open("train")
        if self.align_documents:
            self._starts = aligned_windows(train.find(self.bos), len(train), self.sequence_length)
        else:
            self._starts = consecutive_windows(len(train), self.sequence_length)
        if len(self._starts) < self._sequences:
            aligned = " that start with a document" if self.align_documents else ""
            raise ValueError(
                f"batch_tokens={self.batch_tokens} are {self._sequences} sequences of "
                f"{self.sequence_length}, and the {len(train)} training tokens have only "
                f"{len(self._starts)}{aligned}: choose fewer or provide more"
            )
        if self.trainer is not None:
            self._tell(self.trainer)

    def train_dataloader(self) -> EpochLoader[Batch]:
        """This process' part of the training batches."""
        shards, recipe = self._split("train"), self._recipe()
        if self._saved_recipe not in (None, recipe):
            rank_zero_warn(
                f"Resuming with {recipe}, while the checkpoint was made with "
                f"{self._saved_recipe}: the batches differ from the uninterrupted run's."
            )

        def pieces(epoch: int) -> Pieces:
            starts = self._starts
            if self.shuffle:
                starts = shuffled(starts, recipe["seed"], epoch)
            return self._pieces(
                shards, starts, self.sequence_length, len(shards) - 1, self._sequences,
                self.micro_batch_size,
            )  # fmt: skip

        return EpochLoader(
            lambda epoch, first: self._read(pieces(epoch), first),
            len(pieces(0)),
            lambda: fit_progress(self.trainer),
        )

    def val_dataloader(self) -> EpochLoader[Batch]:
        """This process' part of the first ``val_tokens`` targets of the validation shards."""
        shards = self._split("val")
        targets = len(shards) - 1
        if self.val_tokens is not None and self.val_tokens > targets:
            rank_zero_warn(
                f"val_tokens={self.val_tokens}, and the validation shards have only {targets} "
                "targets: evaluating on those"
            )
        targets = min(self.val_tokens or targets, targets)
        starts = np.arange(0, targets, self.val_sequence_length)
        pieces = self._pieces(
            shards, starts, self.val_sequence_length, targets, len(starts), self.val_batch_size
        )
        return EpochLoader(lambda epoch, first: self._read(pieces, first), len(pieces))

    def test_dataloader(self) -> EpochLoader[Batch]:
        """The same as ``val_dataloader``."""
        return self.val_dataloader()

    def predict_dataloader(self) -> EpochLoader[Tensor]:
        """This process' prompts: each int64 (1, tokens), ``bos`` first.

        With a ModelParallelStrategy these are all prompts, on each process.

        Raises:
            ValueError: If there are none, or one that fills the model's context.
        """
        if not self.prompts:
            raise ValueError("there is nothing to continue: set prompts, such as ['Once upon']")
        encoded = [[self.bos, *self.tokenizer.encode(prompt).tolist()] for prompt in self.prompts]
        most = _context_length(self.trainer)
        for prompt, ids in zip(self.prompts, encoded, strict=True):
            if most is not None and len(ids) >= most:
                raise ValueError(
                    f"the prompt {prompt[:20]!r}… has {len(ids)} tokens, and the model's context "
                    f"is {most}: shorten it"
                )
        rank, world_size = rank_and_world(self.trainer)
        if self.trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            rank, world_size = 0, 1  # all processes take part in each forward pass
        prompts = [torch.tensor([ids]) for ids in encoded[rank::world_size]]
        return EpochLoader(lambda epoch, first: iter(prompts[first:]), len(prompts))

    def state_dict(self) -> dict[str, Any]:
        """What the training batches depend on, and how many a step took; nothing before a fit."""
        if "train" not in self._shards:
            return {}
        return {**self._recipe(), "accumulate_grad_batches": self._accumulation()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what the checkpoint was trained with, for the comparison."""
        self._saved_recipe = {
            name: value for name, value in state_dict.items() if name != "accumulate_grad_batches"
        }

    # -- private --

    @property
    def _sequences(self) -> int:
        return self.batch_tokens // self.sequence_length

    def _accumulation(self) -> int:
        _, world_size = rank_and_world(self.trainer)
        return accumulation(self._sequences, self.micro_batch_size, world_size)

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

    def _tell(self, trainer: pl.Trainer) -> None:
        """Set what Lightning counts in batches, before its loops look at it."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        steps = next((c for c in callbacks if isinstance(c, _WholeSteps)), None)
        if steps is None:
            callbacks.append(steps := _WholeSteps())
        said, passes = steps.said(trainer), self._accumulation()
        given = said["accumulate_grad_batches"]
        if given not in (1, passes):
            raise ValueError(
                f"accumulate_grad_batches={given}: leave it out, batch_tokens={self.batch_tokens} "
                f"and micro_batch_size={self.micro_batch_size} on {trainer.world_size} processes "
                f"make it {passes}"
            )
        if self.val_every_n_steps is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            steps.tell(trainer, accumulate_grad_batches=passes)
            return
        interval = self.val_every_n_steps * passes
        if said["val_check_interval"] not in (1.0, interval) or (
            said["check_val_every_n_epoch"] not in (1, None)
        ):
            raise ValueError(
                f"val_every_n_steps={self.val_every_n_steps} and the trainer's val_check_interval "
                "or check_val_every_n_epoch both say when to validate: leave one of them out"
            )
        steps.tell(
            trainer,
            accumulate_grad_batches=passes,
            val_check_interval=interval,
            check_val_every_n_epoch=None,  # count on from epoch to epoch
        )

    def _pieces(
        self, shards: Shards, starts: Starts, length: int, targets: int, sequences: int, micro: int
    ) -> Pieces:
        rank, world_size = rank_and_world(self.trainer)
        passes = accumulation(sequences, micro, world_size)
        return Pieces(
            shards, starts, length, targets, sequences, passes, rank, world_size, self.bos
        )

    def _read(self, pieces: Pieces, first: int) -> Iterator[Batch]:
        trainer = self.trainer
        on_cuda = trainer is not None and trainer.strategy.root_device.type == "cuda"
        loader = DataLoader(
            pieces,
            batch_size=None,  # a piece is a batch already
            sampler=range(first, len(pieces)),
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=on_cuda,
            generator=torch.Generator(),  # leaves torch's global one alone
        )
        yield from ((inputs, targets) for inputs, targets in loader)  # pinned, they are a list


def _as_it_is(batch: Any) -> Any:
    return batch


def _context_length(trainer: pl.Trainer | None) -> int | None:
    """Most tokens that the trainer's model can take in; None if it does not tell."""
    network = getattr(getattr(trainer, "lightning_module", None), "network", None)
    return getattr(getattr(network, "config", None), "context_length", None)


def _nearest_multiple(number: int, factor: int) -> int:
    return max(round(number / factor), 1) * factor
