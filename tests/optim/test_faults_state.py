"""State, parameters and surroundings that change between steps."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from lit_fanions import Fanion
from lit_fanions.optim.algorithms import ALGORITHMS

every_algorithm = pytest.mark.parametrize("algorithm", list(ALGORITHMS))


def trained(algorithm: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, Fanion]:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 4, dtype=dtype))
    optimizer = Fanion([p], algorithm=algorithm, lr=0.05)
    step(p, optimizer, 1)
    return p, optimizer


def step(p: nn.Parameter, optimizer: Fanion, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


@every_algorithm
def test_parameter_of_another_shape_than_its_state_is_refused(algorithm):
    # torch's fused kernels would write beyond the memory of the state.
    p, optimizer = trained(algorithm)
    p.grad = None
    p.data = torch.randn(60, 40)
    with pytest.raises(RuntimeError, match=r"has shape \(60, 40\), but its \w+ \(6, 4\)"):
        step(p, optimizer, 2)
    optimizer.state.clear()
    step(p, optimizer, 2)


@every_algorithm
def test_parameter_cast_to_another_dtype_is_stepped(algorithm):
    p, optimizer = trained(algorithm)
    same, reference = trained(algorithm)
    p.grad = None
    p.data = p.data.double()
    step(p, optimizer, 2)
    step(same, reference, 2)
    torch.testing.assert_close(p.float(), same, rtol=0, atol=2e-3)


@every_algorithm
def test_state_without_a_count_of_skipped_steps_is_stepped(algorithm):
    p, optimizer = trained(algorithm)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["skipped"]
    optimizer.load_state_dict(saved)
    p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    assert optimizer.state[p]["skipped"] == 1


@every_algorithm
def test_incomplete_checkpoints_are_refused_in_words(algorithm):
    _, optimizer = trained(algorithm)
    saved = copy.deepcopy(optimizer.state_dict())
    key = "exp_avg_sq" if algorithm == "adamw" else "momentum"
    del saved["state"][0][key]
    with pytest.raises(ValueError, match=rf"state of {algorithm}\[0\] .* has no '{key}'"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="'state' is missing"):
        optimizer.load_state_dict({"param_groups": []})


@every_algorithm
def test_step_under_autocast_is_that_without(algorithm):
    p, optimizer = trained(algorithm)
    q, reference = trained(algorithm)
    with torch.autocast("cpu", torch.bfloat16):
        step(p, optimizer, 2)
    step(q, reference, 2)
    assert torch.equal(p, q)


def test_closure_keeps_its_autocast():
    p, optimizer = trained("muon")
    dtypes = []

    def closure() -> Tensor:
        loss = p @ p.T
        dtypes.append(loss.dtype)
        loss.sum().backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
    assert dtypes == [torch.bfloat16]


class Tagged(Tensor):
    """A subclass that does nothing."""


@every_algorithm
def test_subclasses_of_tensor_step_like_tensors(algorithm):
    p, optimizer = trained(algorithm)
    torch.manual_seed(0)
    q = nn.Parameter(torch.randn(6, 4).as_subclass(Tagged))
    reference = Fanion([q], algorithm=algorithm, lr=0.05)
    for seed in (1, 2):
        step(q, reference, seed)
    step(p, optimizer, 2)
    assert torch.equal(p.detach(), q.detach().as_subclass(Tensor))


@every_algorithm
def test_gradients_made_under_inference_mode_or_with_a_graph_are_stepped(algorithm):
    p, optimizer = trained(algorithm)
    with torch.inference_mode():
        gradient = torch.randn(6, 4)
    p.grad = gradient
    optimizer.step()
    p.grad = None
    p.pow(3).sum().backward(create_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    p.grad = None  # breaks the cycle with the graph
    assert not any(value.requires_grad for value in optimizer.state[p].values())


@every_algorithm
def test_first_step_leaves_the_global_random_state_alone(algorithm):
    before = torch.random.get_rng_state()
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = Fanion([p], algorithm=algorithm, lr=0.05)
    p.grad = torch.eye(6, 4)
    optimizer.step()
    assert torch.equal(torch.random.get_rng_state(), before)


@every_algorithm
def test_steps_inside_backward_are_those_after_it(algorithm):
    p, optimizer = trained(algorithm)
    q, reference = trained(algorithm)
    p.grad = q.grad = None

    def step_at_once(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    hook = p.register_post_accumulate_grad_hook(step_at_once)
    p.square().sum().backward()
    hook.remove()
    q.square().sum().backward()
    reference.step()
    assert torch.equal(p, q) and p.grad is None
