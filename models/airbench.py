"""The airbench convolutional networks for CIFAR-10.

After Keller Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (arXiv:2404.00498), and its
successors with Muon; https://github.com/KellerJordan/cifar10-airbench.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lit_fanions import FanionConfig, configure_optimizers
from lit_fanions.checks import check_flag, real_number, whole_number
from models.data import HasTrainingImages, attached_data
from models.modules import attached_trainer, save_plain_hyperparameters

Level = Literal[0, 1, 2]
SIZE = 32  # height and width of the images in pixels
PATCH = 2  # height and width of the whitening filters in pixels
WHITENING_EPS = 5e-4


def whitening_filters(images: Tensor, patch: int = PATCH, eps: float = WHITENING_EPS) -> Tensor:
    """Return filters whose responses to patches of the images are uncorrelated, of unit variance.

    They are the eigenvectors of the patches' second moments (not centred), each divided by
    sqrt(eigenvalue + eps), and their negatives, so that a rectifier loses neither half: float32
    (2 * channels * patch**2, channels, patch, patch), for normalised images.
    """
    channels = images.shape[1]
    patches = images.float().unfold(2, patch, 1).unfold(3, patch, 1)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels * patch**2)
    moments = (patches.mT @ patches).cpu().double() / len(patches)
    values, vectors = torch.linalg.eigh(moments)
    filters = (vectors / (values + eps).sqrt()).mT.flip(0)  # largest eigenvalue first
    return torch.cat([filters, -filters]).float().view(-1, channels, patch, patch)


def augmented_logits(
    network: Callable[[Tensor], Tensor], images: Tensor, level: Level
) -> tuple[Tensor, Tensor]:
    """Return logits of images, without and with test-time augmentation.

    Level 0 takes the image alone, level 1 averages it with its mirror image. Level 2 averages
    level 1 of the image with level 1 of two shifted views: by one pixel down and right, and by one
    pixel up and left, over a reflected border.
    """

    def with_mirror(view: Tensor, logits: Tensor) -> Tensor:
        return (logits + network(view.flip(-1))) / 2

    plain = network(images)
    if level == 0:
        return plain, plain
    centred = with_mirror(images, plain)
    if level == 1:
        return plain, centred
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    views = padded[..., :-2, :-2], padded[..., 2:, 2:]
    shifted = sum(with_mirror(view, network(view)) for view in views) / 2
    return plain, (centred + shifted) / 2


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with a trained bias and no trained scale.

    The scale is a buffer of ones instead of a parameter, because the fused kernels need one.
    """

    def __init__(self, channels: int, momentum: float) -> None:
        super().__init__(channels, eps=1e-12, momentum=momentum)
        del self.weight
        self.register_buffer("weight", torch.ones(channels), persistent=False)


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """Return a convolution that at first copies its input into its first output channels."""
    conv = nn.Conv2d(channels_in, channels_out, 3, padding="same", bias=False)
    nn.init.dirac_(conv.weight.data[:channels_in])
    return conv


class ConvGroup(nn.Module):
    """Convolutions of one width; the first is followed by a pooling that halves height and width.

    With ``residual``, the first one's activation is added before the last one's.
    """

    def __init__(
        self, channels_in: int, channels_out: int, depth: int, residual: bool, bn_momentum: float
    ) -> None:
        super().__init__()
        self.residual = residual
        inputs = [channels_in] + [channels_out] * (depth - 1)
        self.convs = nn.ModuleList(conv3x3(channels, channels_out) for channels in inputs)
        self.norms = nn.ModuleList(BatchNorm(channels_out, bn_momentum) for _ in inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels_in, h, w) to (n, channels_out, h // 2, w // 2)."""
        first = x = F.gelu(self.norms[0](F.max_pool2d(self.convs[0](x), 2)))
        last = len(self.convs) - 1
        for i in range(1, last + 1):
            x = self.norms[i](self.convs[i](x))
            x = F.gelu(x + first if self.residual and i == last else x)
        return x

    def flops_per_image(self, size: int) -> int:
        """Return the floating-point operations for an input of size x size pixels."""
        first, *others = (weight.numel() for weight in self.convs.parameters())
        return 2 * (first * size**2 + sum(others) * (size // 2) ** 2)


class Airbench(LightningModule):
    """The airbench CNN for 32 x 32 images: whitening, three groups of convolutions, a linear head.

    The defaults are the variant that is trained with Muon: 94 % on CIFAR-10 after 8 epochs, with
    1,971,640 parameters. The variants that the original trains with SGD are

    - airbench93: widths 64 128 128, bn_momentum 0.4, logit_scale 1/9, unit_head false
    - airbench94: widths 64 256 256, otherwise as airbench93
    - airbench95: widths 128 384 384, otherwise as airbench93
    - airbench96: widths 128 384 512, depth 3, residual true, bn_momentum 0.1, otherwise as
      airbench93

    When a fit starts, the first layer's filters are computed from the DataModule's
    ``training_images(n)`` and frozen; a checkpoint holds its own filters. The training loss is
    summed over the batch (over all ranks and accumulated micro-batches), as the published learning
    rates expect; the logged loss is the mean. Logs train/loss_step, and once per epoch
    {train,val,test}/{loss,acc} and test/acc_no_tta.

    Args:
        optimizer: Algorithms, step sizes and schedules per group of parameters.
        widths: Channels of the three groups.
        depth: Convolutions per group.
        residual: Add a group's first activation before its last one.
        bn_momentum: Weight of the new batch in batch norm's running statistics, as in torch.
        logit_scale: Factor on the logits; None: 1 / the last width.
        unit_head: Divide the head's initial weight by its own standard deviation.
        num_classes: Number of classes.
        label_smoothing: Label smoothing of the loss, in training and in evaluation.
        whiten: Number of training images that the whitening filters are computed from; 0: train
            the first layer instead, which grey images need.
        val_tta: Test-time augmentation in validation; 0: none, 1: mirror, 2: mirror and shift.
        test_tta: Test-time augmentation in test and predict, numbered as val_tta.
        compile: Compile the network with torch.compile, which takes longer than a run of 8 epochs.
    """

    def __init__(
        self,
        optimizer: FanionConfig = FanionConfig(),
        widths: tuple[int, int, int] = (64, 256, 256),
        depth: int = 2,
        residual: bool = False,
        bn_momentum: float = 0.4,
        logit_scale: float | None = None,
        unit_head: bool = True,
        num_classes: int = 10,
        label_smoothing: float = 0.2,
        whiten: int = 5000,
        val_tta: Level = 0,
        test_tta: Level = 2,
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_architecture(widths, depth, residual, num_classes, whiten)
        _check_numbers(bn_momentum, logit_scale, label_smoothing)
        check_flag("unit_head", unit_head)
        check_flag("compile", compile)
        for name, level in (("val_tta", val_tta), ("test_tta", test_tta)):
            if level not in (0, 1, 2):
                raise ValueError(
                    f"{name}={level}: choose 0 (none), 1 (mirror) or 2 (mirror and shift)"
                )
        self.fanion_config = FanionConfig.from_dict(optimizer)
        save_plain_hyperparameters(self, {"optimizer": self.fanion_config.to_dict()})
        self.label_smoothing = label_smoothing
        self.whiten_images = whiten
        self.val_tta: Level = val_tta
        self.test_tta: Level = test_tta
        self.logit_scale = 1 / widths[-1] if logit_scale is None else logit_scale

        channels = 2 * 3 * PATCH**2
        self.whiten = nn.Conv2d(3, channels, PATCH)
        self.whiten.weight.requires_grad = not whiten
        self.groups = nn.ModuleList()
        for width in widths:
            self.groups.append(ConvGroup(channels, width, depth, residual, bn_momentum))
            channels = width
        self.head = nn.Linear(channels, num_classes, bias=False)
        if unit_head:
            self.head.weight.data /= self.head.weight.data.std()
        self.to(memory_format=torch.channels_last)

        self._has_filters = not whiten
        self._to_compile = compile
        # Checking values and labels would copy them to the host, which makes a GPU wait.
        losses = (MeanMetric(nan_strategy="disable") for _ in range(3))
        self.train_loss, self.val_loss, self.test_loss = losses
        top1 = partial(MulticlassAccuracy, num_classes, average="micro", validate_args=False)
        self.train_acc, self.val_acc = top1(), top1()
        self.test_acc, self.test_acc_no_tta = top1(), top1()

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images.

        Args:
            images: float (n, 3, 32, 32).

        Returns:
            Logits, (n, num_classes).
        """
        x = F.gelu(self.whiten(images))
        for group in self.groups:
            x = group(x)
        return self.head(F.max_pool2d(x, 3).flatten(1)).float() * self.logit_scale

    def count_work(self, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Return what a training batch adds up to, for ``StepMonitor``."""
        count = len(batch[0])
        # A backward pass costs two forward passes.
        return {"images": count, "flops": 3 * count * self.flops_per_image()}

    def flops_per_image(self) -> int:
        """Return the floating-point operations of one image's forward pass: two per product."""
        size = SIZE - PATCH + 1
        flops = 2 * (self.whiten.weight.numel() * size**2 + self.head.weight.numel())
        for group in self.groups:
            assert isinstance(group, ConvGroup)
            flops += group.flops_per_image(size)
            size //= 2
        return flops

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the label-smoothed cross entropy per example: (n, classes), (n,) -> (n,)."""
        return F.cross_entropy(
            logits, labels, label_smoothing=self.label_smoothing, reduction="none"
        )

    # -- Lightning's hooks --

    def configure_model(self) -> None:
        """Compile the network, once; names of parameters stay."""
        if self._to_compile:
            self._to_compile = False
            self.compile(dynamic=False)

    def setup(self, stage: str) -> None:
        """Compute the whitening filters when a fit starts, unless the model has them already.

        Raises:
            RuntimeError: If the trainer's DataModule cannot provide training images.
            ValueError: If the trainer wants to synchronise batch norm.
        """
        strategy = getattr(attached_trainer(self), "strategy", None)
        # Private, because nothing public tells what sync_batchnorm or a plugin was given.
        if getattr(strategy, "_layer_sync", None) is not None:
            raise ValueError(
                "sync_batchnorm cannot convert Airbench's batch norm, whose scale is no parameter: "
                "leave it out; each rank then normalises with its own batch"
            )
        if stage != "fit" or self._has_filters:
            return
        data = attached_data(self)
        if not isinstance(data, HasTrainingImages):
            given = "no DataModule" if data is None else type(data).__name__
            raise RuntimeError(
                "Airbench computes its whitening filters from a DataModule's training_images(n), "
                f"and was given {given}: fit with datamodule=CIFAR10DataModule() or another that "
                "has the method, or set whiten=0"
            )
        filters = whitening_filters(data.training_images(self.whiten_images))
        if filters.flatten(1).norm(dim=1).max() > 0.999 * WHITENING_EPS**-0.5:
            # Batch norm would amplify such channels' rounding errors and their biases' gradients.
            rank_zero_warn(
                "Whitening: some combinations of neighbouring pixels and colours never vary in the "
                "training images (are they grey?), which makes training unstable. Set whiten=0 to "
                "train the first layer instead."
            )
        with torch.no_grad():
            self.whiten.weight.copy_(filters)
        self._has_filters = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Use the checkpoint's filters instead of computing new ones."""
        self._has_filters = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return a loss whose gradient, once the trainer has averaged it, is that of the sum."""
        images, labels = batch
        logits = self(images)
        losses = self.losses(logits, labels)
        self.train_loss.update(losses.detach())
        self.train_acc.update(logits.detach(), labels)
        self.log("train/loss_step", losses.detach().mean(), batch_size=len(labels))
        # The trainer averages over ranks and over accumulated micro-batches.
        return losses.sum() * (self.trainer.world_size * self.trainer.accumulate_grad_batches)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count correct answers."""
        images, labels = batch
        _, logits = augmented_logits(self, images, self.val_tta)
        self.val_loss.update(self.losses(logits, labels))
        self.val_acc.update(logits, labels)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count correct answers with and without augmentation."""
        images, labels = batch
        plain, logits = augmented_logits(self, images, self.test_tta)
        self.test_loss.update(self.losses(logits, labels))
        self.test_acc.update(logits, labels)
        self.test_acc_no_tta.update(plain, labels)

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> Tensor:
        """Return class probabilities, float32 (n, num_classes), of images with or without labels.

        ``predict`` saves a list of these to predictions.pt, one entry per batch and in the order
        of the data: ``torch.cat(torch.load("predictions.pt"))`` has a row for each image.
        """
        images = batch if isinstance(batch, Tensor) else batch[0]
        return augmented_logits(self, images, self.test_tta)[1].float().softmax(-1)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics: trainer.validate leaves inference tensors, which fit refuses."""
        self.val_loss.reset()
        self.val_acc.reset()

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training metrics."""
        self._log_metrics("train", "loss", "acc")

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val", "loss", "acc")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_metrics("test", "loss", "acc", "acc_no_tta")

    def configure_optimizers(self) -> Any:
        """Return one optimizer for all parameters, with the schedules of their groups."""
        return configure_optimizers(self, self.fanion_config)

    def _log_metrics(self, stage: str, *names: str) -> None:
        for name in names:
            metric = getattr(self, f"{stage}_{name}")
            self.log(f"{stage}/{name}", metric, prog_bar=stage == "val" and name == "acc")


def _check_architecture(
    widths: tuple[int, int, int], depth: int, residual: bool, num_classes: int, whiten: int
) -> None:
    if len(widths) != 3:
        raise ValueError(f"widths={widths}: give three numbers of channels")
    for width in widths:
        whole_number("widths", width)
    check_flag("residual", residual)
    if whole_number("depth", depth) < 1 + residual:
        raise ValueError(f"depth={depth}: a residual group takes at least 2 convolutions")
    whole_number("num_classes", num_classes)
    whole_number("whiten", whiten, 0)


def _check_numbers(bn_momentum: float, logit_scale: float | None, label_smoothing: float) -> None:
    if real_number("bn_momentum", bn_momentum, 0) > 1:
        raise ValueError(f"bn_momentum={bn_momentum}: it is a weight and must be at most 1")
    if logit_scale is not None:
        real_number("logit_scale", logit_scale, above=0)
    real_number("label_smoothing", label_smoothing, 0, 1)
