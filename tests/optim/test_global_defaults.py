"""Steps and checkpoints are the same whatever torch's default dtype and default device are."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lit_fanions import Fanion
from lit_fanions.lmo import direction, top_singular
from tests.optim.stepping import assert_equal_state, normal

# A device on which a tensor has no values stands for any other device than the parameters'.
DEFAULTS = {"float64": torch.float64, "bfloat16": torch.bfloat16, "meta": torch.device("meta")}
every_default = pytest.mark.parametrize("default", list(DEFAULTS))


@contextmanager
def default_of_torch(name: str) -> Iterator[None]:
    value, before = DEFAULTS[name], torch.get_default_dtype()
    if isinstance(value, torch.device):
        with value:
            yield
        return
    torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def steps(parameters: list[nn.Parameter], gradients: list[torch.Tensor], **options: object) -> dict:
    optimizer = Fanion(parameters, lr=0.1, weight_decay=0.1, **options)
    for gradient in gradients:
        for p in parameters:
            p.grad = gradient.clone()
        optimizer.step()
    return optimizer.state_dict()


def assert_same_steps(default: str, **options: object) -> None:
    own, other = ([nn.Parameter(normal(40, 34)), nn.Parameter(normal(40, 34))] for _ in range(2))
    # Of rank 2: bases are filled up with random columns.
    gradients = [normal(40, 2, seed=i) @ normal(2, 34, seed=9 + i) for i in range(2)]
    state = steps(own, gradients, **options)
    with default_of_torch(default):
        again = steps(other, gradients, **options)
    assert all(torch.equal(p, q) for p, q in zip(own, other, strict=True))
    assert_equal_state(state, again)


@every_default
@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "dion"},
        {"algorithm": "neon", "solver": "lanczos"},
        {"algorithm": "muon", "adapt": "leading"},
        {"algorithm": "muon", "renormalize": True},
        {"algorithm": "neon", "capturable": True},
        {"algorithm": "adamw", "capturable": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_steps_do_not_depend_on_defaults_of_torch(options, default):
    assert_same_steps(default, **options)


@every_default
@pytest.mark.parametrize("solver", ["lanczos", "subspace", "exact"])
def test_singular_triplets_have_the_dtype_of_computation_whatever_the_default(solver, default):
    m = normal(30, 20)
    expected = top_singular(m, 3, solver=solver)
    with default_of_torch(default):
        found = top_singular(m, 3, solver=solver)
        direction(m, rank=3, solver=solver)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)


@every_default
def test_checkpoints_are_loaded_alike_whatever_the_default(default):
    p = nn.Parameter(normal(3, 4))
    saved = steps([p], [normal(3, 4)], algorithm="adamw")
    # Numbers in place of tensors, as other packages save them.
    saved["state"][0] |= {key: saved["state"][0][key].item() for key in ("step", "skipped")}
    with default_of_torch(default):
        loaded = Fanion([nn.Parameter(p.detach())], algorithm="adamw", lr=0.1)
        loaded.load_state_dict(copy.deepcopy(saved))
    state = loaded.state_dict()["state"][0]
    assert state["step"].dtype == torch.float32 and state["step"].item() == 1


@every_default
def test_count_of_steps_is_kept_whatever_the_default(default):
    p = nn.Parameter(normal(3, 4))
    theirs = torch.optim.AdamW([("weight", p)], lr=0.1)
    p.grad = normal(3, 4)
    theirs.step()
    saved = theirs.state_dict()
    saved["state"][0]["step"] += 1000  # bfloat16 has no number 1001
    with default_of_torch(default):
        loaded = Fanion(
            [("weight", nn.Parameter(p.detach()))], algorithm="adamw", lr=0.1,
            on_mismatch="keep_momentum",
        )  # fmt: skip
        with pytest.warns(UserWarning, match="keep their momentum"):
            loaded.load_state_dict(saved)
    step = loaded.state_dict()["state"][0]["step"]
    assert step.dtype == torch.float32 and step.item() == 1001
