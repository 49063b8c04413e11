"""NanoGPT: the networks of ``models.gpt`` as a LightningModule for streams of tokens."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torchmetrics import SumMetric

from lit_fanions import FanionConfig, configure_optimizers
from models.gpt import GPT, IGNORED, GPTConfig

Batch = tuple[Tensor, Tensor]


def _sum() -> SumMetric:
    return SumMetric(nan_strategy="disable")  # a look at the values would make the host wait


def sequences(batch: Batch | Tensor) -> int:
    """Number of sequences in a batch: batch_size_fn of Lightning's ThroughputMonitor."""
    return len(batch if isinstance(batch, Tensor) else batch[0])


def tokens(batch: Batch | Tensor) -> int:
    """Number of tokens in a batch: length_fn of Lightning's ThroughputMonitor."""
    return (batch if isinstance(batch, Tensor) else batch[0]).numel()


class NanoGPT(LightningModule):
    """A GPT that predicts the next token of sequences (inputs, targets) from a DataModule.

    The loss that is differentiated is summed over the tokens of the step (over all ranks, and over
    accumulated batches), as in modded-nanogpt; a threshold for gradient clipping would have to
    reckon with that. Logged are train/loss, the mean of a step, and {val,test}/loss in nats per
    token, with {val,test}/bits_per_byte where the DataModule has a tokenizer.

    Args:
        optimizer: Algorithms, step sizes and schedules per group of parameters.
        network: The network; {} is modded-nanogpt's track 3, in float32.
        activation_checkpointing: Keep the blocks' inputs only and compute the rest again in the
            backward pass: less memory, a third more work.
        logits_chunk: Compute the losses of so many tokens at a time, and their logits again in the
            backward pass: less memory. None: of all at once.
        compile: Compile the network with torch.compile.
        init_from: A checkpoint of this module whose weights a fit starts from.
        sample_tokens: Continue ``sample_prompt`` by so many tokens after each validation, for
            TensorBoard's text tab, and print it when the fit ends; 0: don't.
        sample_prompt: What is continued.
        predict_tokens: Tokens that predict continues each prompt of the DataModule by.
        temperature: Of the samples; 0: always the likeliest token.
        top_k: Draw from the so many likeliest tokens; None: from all.
    """

    def __init__(
        self,
        optimizer: FanionConfig = FanionConfig(),
        network: GPTConfig = GPTConfig(),
        activation_checkpointing: bool = False,
        logits_chunk: int | None = None,
        compile: bool = False,
        init_from: str | None = None,
        sample_tokens: int = 0,
        sample_prompt: str = "The",
        predict_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = 50,
    ) -> None:
        super().__init__()
        for name, value in (
            ("sample_tokens", sample_tokens),
            ("predict_tokens", predict_tokens),
            ("temperature", temperature),
        ):
            if value < 0:
                raise ValueError(f"{name}={value}: it must not be negative")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}: give a number of tokens, or null for all")
        self.fanion_config = FanionConfig.from_dict(optimizer)
        config = network if isinstance(network, GPTConfig) else GPTConfig(**network)
        # Checkpoints must hold plain data: a dataclass would not load with weights_only.
        self.save_hyperparameters(ignore=["optimizer", "network", "init_from"])
        self.save_hyperparameters(
            {"optimizer": self.fanion_config.to_dict(), "network": vars(config).copy()}
        )
        self.network = GPT(config, activation_checkpointing, logits_chunk)
        self.compiled, self.init_from = compile, init_from
        self.sample_tokens, self.sample_prompt = sample_tokens, sample_prompt
        self.predict_tokens = predict_tokens
        self.temperature, self.top_k = temperature, top_k
        self._configured = False
        self._batch_shape = 0, 0
        self._step_losses: list[tuple[Tensor, Tensor]] = []  # sum and count of each forward pass
        self._total_steps = 0
        self._sample = 0, ""  # step, text
        self._vocabulary: int | None = None  # tokens that the data has, of which samples are drawn
        self._tokenizer: Any = None
        self.nats, self.tokens, self.bytes = _sum(), _sum(), _sum()
        self.token_bytes: Tensor | None
        self.register_buffer("token_bytes", None, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the token after each: int64 (batch, length) -> logits (batch, length, vocab)."""
        return self.network(tokens)

    def generate(self, prompt: Tensor, count: int, seed: int = 0) -> Tensor:
        """Continue texts: int64 (batch, length) -> (batch, length + count).

        Raises:
            ValueError: If the prompt is empty or the text would exceed the context.
        """
        was_training = self.training
        self.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
                return self.network.generate(
                    prompt,
                    count,
                    temperature=self.temperature,
                    top_k=self.top_k,
                    vocab_size=self._vocabulary,
                    generator=torch.Generator().manual_seed(seed),
                )
        finally:
            self.train(was_training)

    @property
    def flops_per_batch(self) -> int:
        """Floating-point operations of the last batch, for Lightning's ThroughputMonitor."""
        count, length = self._batch_shape
        passes = 3 if self.trainer.training else 1  # the backward pass is two
        return passes * count * length * self.network.flops_per_token(length)

    # -- Lightning's hooks --

    def configure_model(self) -> None:
        """Shard the layers for FSDP2 and compile."""
        if self._configured:
            return
        self._configured = True
        if self.device_mesh is not None:
            if self.device_mesh["tensor_parallel"].size() > 1:
                raise ValueError(
                    "NanoGPT's layers are not split by tensor parallelism: use "
                    "ModelParallelStrategy(data_parallel_size=NUMBER_OF_PROCESSES, "
                    "tensor_parallel_size=1)"
                )
            mesh = self.device_mesh["data_parallel"]
            network = self.network
            # Embeddings apart from the rest, as they may have another dtype.
            for layer in (*network.blocks, network.embedding, *network.value_embeddings):
                fully_shard(layer, mesh=mesh)
            fully_shard(network, mesh=mesh)
        if self.compiled:
            self.network.compile()

    def setup(self, stage: str) -> None:
        """Check that data and network fit together, and load the weights to start from.

        Raises:
            ValueError: If the vocabulary is too small, documents start with another token, or the
                checkpoint is of another network.
            FileNotFoundError: If the checkpoint does not exist.
        """
        datamodule, config = getattr(self._trainer, "datamodule", None), self.network.config
        self._vocabulary = getattr(datamodule, "vocab_size", self._vocabulary)
        if (self._vocabulary or 0) > config.vocab_size:
            raise ValueError(
                f"the data has {self._vocabulary} different tokens and the network "
                f"vocab_size={config.vocab_size}: set it to at least {self._vocabulary}"
            )
        bos = getattr(datamodule, "bos", config.bos)
        if config.document_mask and bos != config.bos:
            raise ValueError(
                f"documents start with token {bos} in the data and with bos={config.bos} in the "
                f"network: set bos to {bos}"
            )
        length = getattr(datamodule, "sequence_length", 0)
        if stage == "fit" and length > config.context_length:
            raise ValueError(
                f"sequence_length={length} of the data exceeds context_length="
                f"{config.context_length} of the network: shorten the one or lengthen the other"
            )
        self._set_up_text(getattr(datamodule, "tokenizer", None))
        if stage == "fit" and self.init_from is not None and self.trainer.ckpt_path is None:
            self._load_weights(Path(self.init_from))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how many tokens the data has."""
        checkpoint["vocabulary"] = self._vocabulary

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Draw samples from the tokens that the data had."""
        self._vocabulary = checkpoint.get("vocabulary")

    def on_train_start(self) -> None:
        """Start anew, and ask how many steps the windows have to grow.

        Raises:
            ValueError: If the trainer cannot tell.
        """
        self._step_losses.clear()  # of a step that an error ended
        if self.network.config.window is None:
            return
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ValueError("the window grows over the run, whose end is open: set max_steps")
        self._total_steps = int(steps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss whose gradient, as the trainer reduces it, is that of the sum."""
        inputs, targets = batch
        self._batch_shape = inputs.shape[0], inputs.shape[1]
        loss = self.network(inputs, targets, self._windows()).sum()
        self._step_losses.append((loss.detach(), (targets != IGNORED).sum().type_as(loss)))
        # The trainer averages over ranks and over accumulated batches.
        return loss * (self.trainer.world_size * self.trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the mean loss of the step's tokens."""
        total = torch.stack([torch.stack(pair) for pair in self._step_losses]).sum(0)
        self._step_losses.clear()
        total = self.trainer.strategy.reduce(total, reduce_op="sum")
        self.log("train/loss", total[0] / total[1], prog_bar=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the losses."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the losses."""
        self._evaluate(batch)

    def predict_step(self, batch: Tensor, batch_idx: int) -> str | Tensor:
        """Continue a prompt, int64 (1, length): its text, or token ids without a tokenizer."""
        tokens = self.generate(batch, self.predict_tokens, seed=batch_idx)
        if self._tokenizer is None:
            return tokens
        text = self._tokenizer.decode(tokens[0, 1:].tolist())  # the first one starts the document
        self.print(text + "\n")
        return text

    def on_validation_epoch_start(self) -> None:
        """Start anew: trainer.validate leaves inference tensors, which fit refuses."""
        for metric in (self.nats, self.tokens, self.bytes):
            metric.reset()

    def on_test_epoch_start(self) -> None:
        """As in validation."""
        self.on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        """Log the losses and a sample."""
        self._log_losses("val")
        if self.sample_tokens and self._tokenizer and not self.trainer.sanity_checking:
            self._show_sample()

    def on_test_epoch_end(self) -> None:
        """Log the losses."""
        self._log_losses("test")

    def on_train_end(self) -> None:
        """Draw a sample of the trained weights, unless a validation just did."""
        step = self.trainer.global_step
        if self.sample_tokens and self._tokenizer and self._sample[0] != step:
            self._show_sample()

    def on_fit_end(self) -> None:
        """Print the last sample."""
        if self._sample[1] and self.trainer.is_global_zero:
            print(f"sample: {self._sample[1]}")  # not self.print: the progress bar is gone

    def configure_optimizers(self) -> Any:
        """One optimizer for all parameters, with the schedules of their groups."""
        return configure_optimizers(self, self.fanion_config)

    # -- private --

    def _windows(self) -> Tensor | None:
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        done = self.trainer.global_step / max(1, self._total_steps)
        return self.network.windows(min(1.0, done) if fitting else 1.0)

    def _evaluate(self, batch: Batch) -> None:
        inputs, targets = batch
        self._batch_shape = inputs.shape[0], inputs.shape[1]
        self.nats.update(self.network(inputs, targets, self._windows()).sum())
        counted = targets != IGNORED
        self.tokens.update(counted.sum())
        if self.token_bytes is not None:
            self.bytes.update((self.token_bytes[targets.clamp(min=0)] * counted).sum())

    def _log_losses(self, stage: str) -> None:
        nats = self.nats.compute()
        losses = {f"{stage}/loss": nats / self.tokens.compute()}
        if self.token_bytes is not None:
            losses[f"{stage}/bits_per_byte"] = nats / self.bytes.compute() / math.log(2)
        self.log_dict(losses, prog_bar=True, sync_dist=True)  # the same on all ranks already

    def _set_up_text(self, tokenizer: Any) -> None:
        """Prepare what takes the tokenizer, whose vocabulary may be out of reach."""
        if tokenizer is None:
            return
        try:
            self.token_bytes = tokenizer.token_bytes().to(self.device)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            rank_zero_warn(f"no bits per byte and no samples of text: {error}")
            return
        self._tokenizer = tokenizer
        prompt = 1 + len(tokenizer.encode(self.sample_prompt))
        if self.sample_tokens and prompt + self.sample_tokens > self.network.config.context_length:
            raise ValueError(
                f"sample_tokens={self.sample_tokens} after a prompt of {prompt} tokens exceed the "
                f"context of {self.network.config.context_length}: choose fewer"
            )

    def _show_sample(self) -> None:
        prompt = [self._tokenizer.bos, *self._tokenizer.encode(self.sample_prompt).tolist()]
        # On all ranks, as sharded layers take all of them.
        tokens = self.generate(torch.tensor([prompt], device=self.device), self.sample_tokens)
        self._sample = self.trainer.global_step, self._tokenizer.decode(tokens[0, 1:].tolist())
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    step, text = self._sample
                    text = text.replace("\n", "  \n")  # Markdown keeps these line ends
                    logger.experiment.add_text("val/sample", text, step)

    def _load_weights(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"init_from: there is no file {path}: give the checkpoint to start from by "
                "--model.init_from"
            )
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        except Exception as error:  # torch.load fails in a dozen ways on a damaged file
            reason = type(error).__name__
            raise ValueError(
                f"init_from: {path} is damaged or no Lightning checkpoint ({reason})"
            ) from None
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            first = (str(error).splitlines()[1:2] or [str(error)])[0].strip()
            if len(first) > 200:  # the names of all its parameters
                first = f"{first[:200]} ..."
            raise ValueError(f"init_from: {path} is of another network: {first}") from None
