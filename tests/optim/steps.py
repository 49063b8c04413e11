"""Optimizers of a few matrices, and the steps that tests take with them."""

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn

from lit_fanions import Fanion
from lit_fanions.optim.algorithms import ALGORITHMS
from tests.matrices import gaussian64, parameter, parameter64

EVERY = list(ALGORITHMS)
# They wait for a GPU; fake tensors let them pass.
FACTORISATIONS = {
    "_linalg_eigh", "_linalg_eigvals", "_linalg_svd", "linalg_eig", "linalg_lstsq", "linalg_qr",
}  # fmt: skip
MATRIX = [name for name, entry in ALGORITHMS.items() if entry.kind == "matrix"]


def take_steps(optimizer: Fanion, steps: int, start: int = 0) -> None:
    """Step on random gradients that depend on the number of the step alone."""
    for i in range(start, start + steps):
        for j, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = gaussian64(*p.shape, seed=1000 * i + j).to(p.dtype)
        optimizer.step()


def copy_of_state(optimizer: Fanion, p: Tensor) -> dict[str, Tensor]:
    """Return copies of a parameter and of its state."""
    state = {key: value.clone() for key, value in optimizer.state[p].items()}
    return {"weight": p.detach().clone(), **state}


def update(optimizer: Fanion, p: Tensor, grad: Tensor | None) -> Tensor:
    """Step, and return what was subtracted from a parameter."""
    before = p.detach().clone()
    p.grad = None if grad is None else grad.to(p.dtype)
    optimizer.step()
    return before - p.detach()


def first_update(shape: tuple[int, ...], grad: Tensor, **options: Any) -> Tensor:
    """Return what the first step with lr 1 subtracts from a parameter of zeros."""
    p = nn.Parameter(torch.zeros(shape, dtype=options.pop("dtype", grad.dtype)))
    return update(Fanion([p], **{"lr": 1.0, **options}), p, grad)


def one_matrix(**options: Any) -> Fanion:
    """Return an optimizer of one 6x4 matrix."""
    return Fanion([("w", parameter64(6, 4))], **options)


def snapshot(optimizer: Fanion) -> Any:
    """Return the groups, with parameters by id, and the size of the state."""
    groups = [{**group, "params": [*map(id, group["params"])]} for group in optimizer.param_groups]
    return copy.deepcopy(groups), len(optimizer.state)


def trained(algorithm: str, steps: int, dtype=torch.float32, **options: Any):
    """Return two parameters and their optimizer after some steps."""
    named = [("a", parameter(40, 48, dtype=dtype)), ("b", parameter(48, 40, seed=1, dtype=dtype))]
    optimizer = Fanion(named, algorithm=algorithm, lr=0.01, **options)
    take_steps(optimizer, steps)
    return [p for _, p in named], optimizer


def through_a_file(state: Any) -> Any:
    """Return what torch.load reads after torch.save."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_state(first: Fanion, second: Fanion) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert state.keys() == b["state"][index].keys()
        for key, value in state.items():
            assert value.dtype == b["state"][index][key].dtype, key
            assert torch.equal(value, b["state"][index][key]), key


def build(groups: list[tuple[str, str, list[tuple[str, tuple[int, ...]]]]]) -> Fanion:
    """Return an optimizer of groups: name, algorithm, and names and shapes of parameters."""
    return Fanion(
        [
            {"name": name, "algorithm": algorithm, "lr": 0.1,
             "params": [(leaf, parameter64(*shape)) for leaf, shape in leaves]}
            for name, algorithm, leaves in groups
        ]
    )  # fmt: skip


SAVED = [("matrix", "muon", [("w", (4, 3))]), ("other", "adamw", [("b", (4,))])]
