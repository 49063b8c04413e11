"""What torch asks of state dicts, copies and hooks of every optimizer, asked of every algorithm."""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lit_fanions import Fanion
from tests.optim.stepping import (
    assert_equal_after,
    assert_equal_state,
    every_algorithm,
    parameters,
    run,
    trained,
)


@pytest.mark.parametrize("names", [(False, False), (True, True), (True, False), (False, True)])
@every_algorithm
def test_state_dict_is_loaded_by_named_and_unnamed_optimizers(algorithm, names):
    def build(is_named: bool) -> Fanion:
        params = parameters(algorithm)
        pairs = [(f"layer{i}", p) for i, p in enumerate(params)]
        return Fanion(pairs if is_named else params, algorithm=algorithm, lr=0.05)

    saving, loading = (build(is_named) for is_named in names)
    run(saving, range(3))
    saved = saving.state_dict()
    before = copy.deepcopy(saved)
    with torch.no_grad():
        for p, q in zip(*(o.param_groups[0]["params"] for o in (saving, loading)), strict=True):
            q.copy_(p)
    loading.load_state_dict(saved)
    assert_equal_state(saved, before)
    assert ("param_names" in loading.param_groups[0]) == names[1]
    for optimizer in (saving, loading):
        run(optimizer, range(3, 5))
        optimizer.param_groups[0].pop("param_names", None)
    assert_equal_state(saving.state_dict(), loading.state_dict())


@every_algorithm
def test_counts_may_be_saved_as_numbers(algorithm):
    params, optimizer = trained(algorithm)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for key in {"step", "skipped"} & state.keys():
            state[key] = state[key].item()
    other = Fanion(copy.deepcopy(params), algorithm=algorithm, lr=0.05)
    other.load_state_dict(saved)
    assert_equal_after(optimizer, other)
    other.param_groups[0]["params"][0].grad.fill_(math.nan)
    other.step()
    (count,) = {int(s["skipped"]) for s in other.state.values() if s["skipped"]}
    assert count == 1


@every_algorithm
def test_state_is_saved_and_loaded_with_weights_only(algorithm):
    params, optimizer = trained(algorithm)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = Fanion(copy.deepcopy(params), algorithm=algorithm, lr=0.9)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_equal_after(optimizer, other)


@every_algorithm
def test_deepcopy_has_every_public_attribute_and_can_be_printed(algorithm):
    _, optimizer = trained(algorithm)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    copied = copy.deepcopy(optimizer)
    assert {name for name in vars(copied) if not name.startswith("_")} == public
    assert repr(copied) == repr(optimizer)
    assert_equal_after(optimizer, copied)


@every_algorithm
def test_state_of_a_group_added_later_is_loaded(algorithm):
    def build() -> Fanion:
        first, second, late = parameters(algorithm, 3)
        optimizer = Fanion([first, second], algorithm=algorithm, lr=0.05)
        run(optimizer, range(2))
        optimizer.add_param_group({"params": [late], "lr": 0.1})
        return optimizer

    saving, loading = build(), build()
    run(saving, range(2, 4))
    loading.load_state_dict(copy.deepcopy(saving.state_dict()))
    assert_equal_state(saving.state_dict(), loading.state_dict())
    smaller = Fanion(parameters(algorithm), algorithm=algorithm, lr=0.05)
    with pytest.raises(ValueError, match="saved with other groups"):
        smaller.load_state_dict(saving.state_dict())
    with pytest.raises(ValueError, match="saved with other groups"):
        loading.load_state_dict(smaller.state_dict())


@every_algorithm
def test_hooks_run_in_torchs_order(algorithm):
    _, optimizer = trained(algorithm)
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *args: calls.append(name)

    everywhere = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_state_dict_pre_hook(note("save pre")),
        optimizer.register_state_dict_post_hook(note("save post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre 2")),
        optimizer.register_load_state_dict_pre_hook(note("load pre 1"), prepend=True),
        optimizer.register_load_state_dict_post_hook(note("load post 2")),
        optimizer.register_load_state_dict_post_hook(note("load post 1"), prepend=True),
    ]
    run(optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    expected = [
        "global pre", "pre", "post", "global post", "save pre", "save post",
        "load pre 1", "load pre 2", "load post 1", "load post 2",
    ]  # fmt: skip
    assert calls == expected
    for handle in (*everywhere, *handles):
        handle.remove()
    run(optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == expected
