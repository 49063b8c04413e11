"""Parameters and steps for what every algorithm is asked."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_fanions import Fanion
from lit_fanions.optim.algorithms import ALGORITHMS, ANY_SHAPE

every_algorithm = pytest.mark.parametrize("algorithm", list(ALGORITHMS))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(algorithm: str, count: int = 2) -> list[nn.Parameter]:
    shapes = [(6, 4), (3, 5), (5,)] if algorithm in ANY_SHAPE else [(6, 4), (3, 5), (4, 2)]
    return [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes[:count])]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=100 * seed + i).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, seeds: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in seeds:
        set_gradients(params, seed)
        optimizer.step()


def trained(algorithm: str, **options: Any) -> tuple[list[nn.Parameter], Fanion]:
    params = parameters(algorithm)
    optimizer = Fanion(params, algorithm=algorithm, **{"lr": 0.05, **options})
    run(optimizer, range(3))
    return params, optimizer


def assert_equal_after(first: Fanion, second: Fanion, steps: range = range(3, 6)) -> None:
    """Step both with the same gradients and compare parameters and state."""
    for optimizer in (first, second):
        run(optimizer, steps)
    a, b = ([p for g in o.param_groups for p in g["params"]] for o in (first, second))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert_equal_state(first.state_dict(), second.state_dict())


def assert_equal_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for index, state in first["state"].items():
        assert state.keys() == second["state"][index].keys()
        assert all(torch.equal(state[key], second["state"][index][key]) for key in state)
