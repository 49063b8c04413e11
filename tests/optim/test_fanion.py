"""Fanion as a torch optimizer: closures, schedulers, scalers, hooks."""

import math

import pytest
import torch
from torch import Tensor

from lit_fanions import Fanion
from tests.matrices import gaussian, gaussian64, parameter, parameter64
from tests.optim.steps import SAVED, build, one_matrix, take_steps, through_a_file, update


@pytest.mark.parametrize("algorithm", ["muon", "dion", "adamw"])
def test_a_closure_is_called_once_with_gradients_on(algorithm):
    p = parameter(6, 4)
    optimizer = Fanion([p], algorithm=algorithm, lr=0.02)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    want = before.square().sum()
    with torch.no_grad():
        assert torch.equal(optimizer.step(closure), want)
    want = p.detach().square().sum()
    assert torch.equal(optimizer.step(closure=closure), want)
    assert calls == [True, True]
    assert not torch.equal(p, before)
    assert optimizer.step() is None


def test_schedulers_of_torch_drive_every_group():
    optimizer = build(SAVED)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda i: 0.5**i, lambda i: 1.0])
    take_steps(optimizer, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4, eta_min=0.01)
    for i in range(4):
        take_steps(optimizer, 1, start=i)
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.01])


def test_lambda_lr_has_a_factor_for_each_group():
    optimizer = build(SAVED)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda i: 0.5**i, lambda i: 1 + i])
    take_steps(optimizer, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.2])


def test_one_cycle_cycles_the_momentum_of_every_group():
    optimizer = build(SAVED)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[0.2, 0.01], total_steps=10, cycle_momentum=True,
        base_momentum=0.8, max_momentum=0.95,
    )  # fmt: skip
    seen = []
    for i in range(9):
        seen.append([group["momentum"] for group in optimizer.param_groups])
        take_steps(optimizer, 1, start=i)
        schedule.step()
    assert min(m for m, _ in seen) == pytest.approx(0.8)
    assert seen[0] == pytest.approx([0.95, 0.95]) and all(a == b for a, b in seen)
    other = build(SAVED)
    other.load_state_dict(through_a_file(optimizer.state_dict()))  # its keys stand in the groups
    assert other.param_groups[0]["max_lr"] == 0.2


def test_a_grad_scaler_skips_infinite_steps_and_unscales_others():
    a, b = parameter(6, 4, dtype=torch.float32), parameter(6, 4, dtype=torch.float32)
    scaled, plain = Fanion([a], algorithm="nsgd"), Fanion([b], algorithm="nsgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(4):
        grad = gaussian(6, 4, seed=i)
        broken = i == 1
        b.grad, a.grad = grad.clone(), grad * scaler.get_scale()
        if broken:
            a.grad[0, 0] = math.inf
        else:
            plain.step()
        before = a.detach().clone()
        scaler.scale(torch.zeros((), requires_grad=True))
        scaler.step(scaled)
        scaler.update()
        assert torch.equal(a, before) == broken
    torch.testing.assert_close(a.detach(), b.detach())
    assert scaler.get_scale() == 512
    assert scaled.state[a]["skipped"] == 0  # the scaler has seen it first


def test_clipping_sees_the_same_parameters():
    p = parameter64(6, 4)
    optimizer = Fanion([p], algorithm="sgd", lr=1.0, momentum=0.0, nesterov=False)
    p.grad = 100 * gaussian64(6, 4)
    before = p.detach().clone()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    assert (before - p.detach()).norm().item() == pytest.approx(1.0, rel=1e-4)


def test_zero_grad_and_hooks():
    optimizer = one_matrix()
    (p,) = optimizer.param_groups[0]["params"]
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    update(optimizer, p, gaussian64(6, 4))
    assert calls == ["before", "after"]
    optimizer.zero_grad()
    assert p.grad is None
    update(optimizer, p, gaussian64(6, 4))
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(p.grad, torch.zeros(6, 4))
