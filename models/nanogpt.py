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
from lit_fanions.checks import check_flag, real_number, whole_number
from models.data import (
    HasDocuments,
    HasPrompts,
    HasSequences,
    HasTokenizer,
    HasVocabulary,
    Tokenizer,
    attached_data,
)
from models.gpt import GPT, IGNORED, GPTConfig
from models.modules import save_plain_hyperparameters
from models.width_transfer import transfer_learning_rates

Batch = tuple[Tensor, Tensor]


class NanoGPT(LightningModule):
    """A GPT that predicts the next token of sequences (inputs, targets) from a DataModule.

    The training loss is summed over the tokens of the step (over all ranks and accumulated
    micro-batches), as in modded-nanogpt: choose a threshold for gradient clipping accordingly.
    Logs train/loss, the mean over a step, and {val,test}/loss in nats per token; if the DataModule
    has a tokenizer, also {val,test}/bits_per_byte.

    Args:
        optimizer: Algorithms, step sizes and schedules per group of parameters.
        network: The network; {} is modded-nanogpt's track 3, in float32.
        activation_checkpointing: Keep the blocks' inputs only and recompute the rest in the
            backward pass: less memory, a third more work.
        logits_chunk: Number of tokens whose losses are computed at a time, with the logits
            recomputed in the backward pass: less memory. None: all at once.
        compile: Compile the network with torch.compile.
        base_width: Width of the network that the learning rates were tuned for; they are
            transferred to this one's (``models.width_transfer``). None: take them as given.
        init_from: Checkpoint of this module whose weights a fit starts from.
        sample_tokens: Number of tokens to continue ``sample_prompt`` by after each validation, for
            TensorBoard's text tab; the last sample is printed when the fit ends. 0: no samples.
        sample_prompt: Text that the samples continue.
        predict_tokens: Number of tokens that predict continues each prompt of the DataModule by.
        temperature: Divisor of the logits in sampling; 0: always take the likeliest token.
        top_k: Number of likeliest tokens to sample from; None: all.
    """

    def __init__(
        self,
        optimizer: FanionConfig = FanionConfig(),
        network: GPTConfig = GPTConfig(),
        activation_checkpointing: bool = False,
        logits_chunk: int | None = None,
        compile: bool = False,
        base_width: int | None = None,
        init_from: str | None = None,
        sample_tokens: int = 0,
        sample_prompt: str = "The",
        predict_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = 50,
    ) -> None:
        super().__init__()
        self.fanion_config = FanionConfig.from_dict(optimizer)
        config = network if isinstance(network, GPTConfig) else GPTConfig(**network)
        save_plain_hyperparameters(
            self,
            {"optimizer": self.fanion_config.to_dict(), "network": vars(config).copy()},
            ignore=["init_from"],
        )
        self.network = GPT(config, activation_checkpointing, logits_chunk)
        if base_width is not None:  # after the hyperparameters were saved as given
            self.fanion_config = transfer_learning_rates(
                self.fanion_config, base_width, config.width
            )
        check_flag("compile", compile)
        check_flag("activation_checkpointing", activation_checkpointing)
        self.compiled, self.init_from = compile, init_from
        self.sample_tokens = whole_number("sample_tokens", sample_tokens, 0)
        self.sample_prompt = sample_prompt
        self.predict_tokens = whole_number("predict_tokens", predict_tokens, 0)
        self.temperature = real_number("temperature", temperature, 0)
        self.top_k = None if top_k is None else whole_number("top_k", top_k)
        self._configured = False
        self._step_losses: list[tuple[Tensor, Tensor]] = []  # sum and count of each forward pass
        self._total_steps = 0
        self._sample = 0, ""  # step, text
        self._vocabulary: int | None = None  # the data's; only its tokens are sampled
        self._tokenizer: Tokenizer | None = None
        # Checking for NaN would copy every value to the host, which makes a GPU wait.
        self.nats, self.tokens, self.bytes = (SumMetric(nan_strategy="disable") for _ in range(3))
        self.token_bytes: Tensor | None
        self.register_buffer("token_bytes", None, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of each next token: int64 (batch, length) -> (batch, length, vocab)."""
        return self.network(tokens)

    def generate(self, prompt: Tensor, count: int, seed: int = 0) -> Tensor:
        """Continue texts: int64 (batch, length) -> (batch, length + count).

        Raises:
            ValueError: If the prompt is empty or the text would exceed the context.
        """
        was_training = self.training
        self.eval()
        try:
            # Compiled, the network would be compiled again for every length.
            with torch.compiler.set_stance("force_eager"):
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

    def count_work(self, batch: Batch) -> dict[str, float]:
        """Return what a training batch adds up to, for ``StepMonitor``."""
        count, length = batch[0].shape
        # A backward pass costs two forward passes.
        flops = 3 * count * length * self.network.flops_per_token(length)
        return {"tokens": count * length, "flops": flops}

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
            # Embeddings in units of their own, because their dtype may differ from the rest's.
            for layer in (*network.blocks, network.embedding, *network.value_embeddings):
                fully_shard(layer, mesh=mesh)
            fully_shard(network, mesh=mesh)
        if self.compiled:
            # Static shapes: FlexAttention is slow with symbolic ones, and a fit has two shapes.
            self.network.compile(dynamic=False)

    def setup(self, stage: str) -> None:
        """Check that data and network fit together, and load the weights to start from.

        Raises:
            ValueError: If the network's vocabulary or context is too small for the data, documents
                start with another token, or the checkpoint is of another network.
            FileNotFoundError: If the checkpoint does not exist.
        """
        data = attached_data(self)
        self._check_data(data, stage)
        if isinstance(data, HasTokenizer):
            self._set_up_text(data.tokenizer)
        if stage == "fit" and self.init_from is not None and self.trainer.ckpt_path is None:
            self._load_weights(Path(self.init_from))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the vocabulary size of the data, so that samples need no data."""
        checkpoint["vocabulary"] = self._vocabulary

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the vocabulary size of the data."""
        self._vocabulary = checkpoint.get("vocabulary")

    def on_train_start(self) -> None:
        """Ask the trainer over how many steps the windows grow.

        Raises:
            ValueError: If the windows grow and the number of steps is unknown.
        """
        self._step_losses.clear()  # an error may have ended an earlier fit within a step
        if self.network.config.window is None:
            return
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ValueError("the window grows over the run, which has no end: set max_steps")
        self._total_steps = int(steps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return a loss whose gradient, once the trainer has averaged it, is that of the sum."""
        inputs, targets = batch
        loss = self.network(inputs, targets, self._windows()).sum()
        self._step_losses.append((loss.detach(), (targets != IGNORED).sum().type_as(loss)))
        # The trainer averages over ranks and over accumulated micro-batches.
        return loss * (self.trainer.world_size * self.trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the mean loss of the step's tokens."""
        total = torch.stack([torch.stack(pair) for pair in self._step_losses]).sum(0)
        self._step_losses.clear()
        total = self.trainer.strategy.reduce(total, reduce_op="sum")
        # In the progress bar, it would make the host wait for the device after every batch.
        self.log("train/loss", total[0] / total[1])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the losses."""
        inputs, targets = batch
        self.nats.update(self.network(inputs, targets, self._windows()).sum())
        counted = targets != IGNORED
        self.tokens.update(counted.sum())
        if self.token_bytes is not None:
            self.bytes.update((self.token_bytes[targets.clamp(min=0)] * counted).sum())

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> str | Tensor:
        """Continue a prompt, int64 (1, length).

        ``predict`` saves a list of the results to predictions.pt, one entry per prompt.

        Returns:
            The prompt and its continuation as text; without a tokenizer, their tokens, int64
            (1, length + predict_tokens).
        """
        tokens = self.generate(batch, self.predict_tokens, seed=batch_idx)
        if self._tokenizer is None:
            return tokens
        text = self._tokenizer.decode(tokens[0, 1:].tolist())  # without the leading bos
        self.print(text + "\n")
        return text

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics: trainer.validate leaves inference tensors, which fit refuses."""
        for metric in (self.nats, self.tokens, self.bytes):
            metric.reset()

    on_test_epoch_start = on_validation_epoch_start  # they share the metrics

    def on_validation_epoch_end(self) -> None:
        """Log the losses and a sample."""
        self._log_losses("val")
        if self.sample_tokens and self._tokenizer and not self.trainer.sanity_checking:
            self._show_sample(self._tokenizer)

    def on_test_epoch_end(self) -> None:
        """Log the losses."""
        self._log_losses("test")

    def on_train_end(self) -> None:
        """Sample from the trained weights, unless a validation did so after the last step."""
        step = self.trainer.global_step
        if self.sample_tokens and self._tokenizer and self._sample[0] != step:
            self._show_sample(self._tokenizer)

    def on_fit_end(self) -> None:
        """Print the last sample."""
        if self._sample[1] and self.trainer.is_global_zero:
            print(f"sample: {self._sample[1]}")  # self.print needs the progress bar, closed by now

    def configure_optimizers(self) -> Any:
        """Return one optimizer for all parameters, with the schedules of their groups."""
        return configure_optimizers(self, self.fanion_config)

    # -- private --

    def _check_data(self, data: Any, stage: str) -> None:
        config = self.network.config
        limit = config.context_length
        if isinstance(data, HasVocabulary):
            self._vocabulary = data.vocab_size
        if (self._vocabulary or 0) > config.vocab_size:
            raise ValueError(
                f"the data has {self._vocabulary} different tokens and the network "
                f"vocab_size={config.vocab_size}: set it to at least {self._vocabulary}"
            )
        if config.document_mask and isinstance(data, HasDocuments) and data.bos != config.bos:
            raise ValueError(
                f"documents start with token {data.bos} in the data and with "
                f"bos={config.bos} in the network: set bos to {data.bos}"
            )
        if stage == "fit" and isinstance(data, HasSequences) and data.sequence_length > limit:
            raise ValueError(
                f"sequence_length={data.sequence_length} of the data exceeds context_length="
                f"{limit} of the network: shorten the one or lengthen the other"
            )
        # All prompts on every process: one that stops alone would leave the others waiting.
        has_prompts = stage == "predict" and isinstance(data, HasPrompts)
        for prompt, ids in data.encoded_prompts() if has_prompts else ():
            if len(ids) >= limit:
                raise ValueError(
                    f"the prompt {prompt[:20]!r}… has {len(ids)} tokens, and the model's context "
                    f"is {limit}: shorten it"
                )

    def _windows(self) -> Tensor | None:
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        progress = self.trainer.global_step / max(1, self._total_steps)
        return self.network.windows(min(1.0, progress) if fitting else 1.0)

    def _log_losses(self, stage: str) -> None:
        nats = self.nats.compute()
        losses = {f"{stage}/loss": nats / self.tokens.compute()}
        if self.token_bytes is not None:
            losses[f"{stage}/bits_per_byte"] = nats / self.bytes.compute() / math.log(2)
        # The same on all ranks; Lightning warns without sync_dist.
        self.log_dict(losses, prog_bar=True, sync_dist=True)

    def _set_up_text(self, tokenizer: Tokenizer) -> None:
        """Prepare bits per byte and samples, unless the tokenizer's vocabulary is missing."""
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

    def _show_sample(self, tokenizer: Tokenizer) -> None:
        prompt = [tokenizer.bos, *tokenizer.encode(self.sample_prompt).tolist()]
        # On all ranks, because sharded layers need every rank in a forward pass.
        tokens = self.generate(torch.tensor([prompt], device=self.device), self.sample_tokens)
        self._sample = self.trainer.global_step, tokenizer.decode(tokens[0, 1:].tolist())
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
            if len(first) > 200:  # it may list the names of all parameters
                first = f"{first[:200]} ..."
            raise ValueError(f"init_from: {path} is of another network: {first}") from None
