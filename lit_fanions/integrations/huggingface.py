"""Fanion in the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lit_fanions.optim.config import FanionConfig
from lit_fanions.optim.factory import configure_optimizers
from lit_fanions.optim.fanion import Fanion
from lit_fanions.optim.schedules import ScheduleConfig


def optimizer_factory() -> Callable[..., Fanion]:
    """Return the function that makes the optimizer of a model.

    transformers' Trainer takes it as an optimizer factory, with the options of the configuration::

        Trainer(model, args, optimizer_cls_and_kwargs=(optimizer_factory, {"algorithm": "muon"}))

    The Trainer's own schedule multiplies the lr of every group. Its ``learning_rate``,
    ``weight_decay`` and ``adam_*`` arguments do not reach the optimizer: give lr and weight_decay
    with the options, and those of AdamW's parameters in ``other``.
    """
    return make_optimizer


def make_optimizer(
    model: nn.Module, config: FanionConfig | Mapping[str, Any] | None = None, **overrides: Any
) -> Fanion:
    """Return the optimizer of a model, without a schedule.

    Args:
        model: The model.
        config: The configuration; None for the defaults.
        **overrides: As those of ``lit_fanions.configure_optimizers``.

    Raises:
        ValueError: If the configuration has a schedule: the Trainer has one of its own.
    """
    config = FanionConfig.from_dict(config).updated(overrides)
    own = [override.schedule for override in config.overrides.values()]
    if config.schedule != ScheduleConfig() or any(own):
        raise ValueError(
            "schedule: transformers' Trainer has its own: set lr_scheduler_type and warmup_ratio "
            "in TrainingArguments"
        )
    optimizer = configure_optimizers(model, config)["optimizer"]
    assert isinstance(optimizer, Fanion)
    return optimizer
