"""Distributed checkpoints: torch takes a dummy step with zero gradients and lr 0."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from tests.optim.ranks import (
    STEPS,
    Net,
    assert_close,
    full_copy,
    make_optimizer,
    on_ranks,
    shard,
    states,
    train,
    weights,
)

pytestmark = pytest.mark.timeout(90)


CHECKPOINTED = [
    {"algorithm": "muon", "renormalize": True},
    {"algorithm": "f_fanion", "rank": 2},
    {"algorithm": "kyfan"},
    {"algorithm": "neon", "error_feedback": True, "renormalize": True},
    {"algorithm": "dion"},
    {"algorithm": "adamw"},
    {"algorithm": "signum"},
]


FORMS = [{}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}]


def resumed(net: nn.Module, make: Callable[[], nn.Module], options: dict[str, Any],
            form: dict[str, bool], rank: int | None = None) -> dict[str, Any]:  # fmt: skip
    """Train, save, restore into a fresh model and train on, beside the uninterrupted run."""
    how = dcp.StateDictOptions(**form)
    optimizer = make_optimizer(net, **options)
    fresh = weights(net)
    empty = dcp.get_optimizer_state_dict(net, optimizer, options=how)
    unchanged = all(torch.equal(fresh[name], value) for name, value in weights(net).items())
    optimizer.zero_grad()
    train(net, optimizer, rank=rank)
    saved = copy.deepcopy(dcp.get_state_dict(net, optimizer, options=how))
    train(net, optimizer, start=STEPS, rank=rank)

    other = make()
    other_optimizer = make_optimizer(other, **options)
    dcp.set_state_dict(
        other, other_optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=how
    )
    loaded = weights(other)
    same = all(torch.equal(full_copy(saved[0][name]), value) for name, value in loaded.items())
    train(other, other_optimizer, start=STEPS, rank=rank)
    return {
        "straight": {**weights(net), **states(net, optimizer)},
        "resumed": {**weights(other), **states(other, other_optimizer)},
        "unchanged": unchanged, "same": same, "empty": bool(empty),
    }  # fmt: skip


def assert_resumed(result: dict[str, Any]) -> None:
    assert result["unchanged"], "the dummy step has moved the weights"
    assert result["same"], "loading has moved the weights"
    assert_close(result["resumed"], result["straight"], atol=0)
    assert all(value.isfinite().all() for value in result["resumed"].values())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("options", CHECKPOINTED, ids=str)
def test_a_distributed_checkpoint_of_one_process(options, form):
    assert_resumed(resumed(Net(), Net, options, form))


def _checkpoint(rank: int, options: dict[str, Any], form: dict[str, bool]) -> dict[str, Any]:
    def make() -> nn.Module:
        return shard(Net())

    return resumed(make(), make, options, form, rank)


@pytest.mark.parametrize("options", CHECKPOINTED, ids=str)
def test_a_distributed_checkpoint_of_fsdp2(tmp_path, options):
    for result in on_ranks(tmp_path, _checkpoint, options, {}):
        assert_resumed(result)
