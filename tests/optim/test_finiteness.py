"""Gradients with NaN or infinity: skipped, refused, or let through."""

import math

import pytest
import torch

from lit_fanions import Fanion
from tests.matrices import gaussian, gaussian64, parameter, parameter64
from tests.optim.steps import EVERY, copy_of_state, update


# That no state of any algorithm changes: test_contract.py.
@pytest.mark.parametrize(
    ("algorithm", "bad"),
    [
        *((name, bad) for name in ("muon", "adamw") for bad in (math.nan, math.inf, -math.inf)),
        *((name, math.nan) for name in ("neon", "kyfan", "signum", "s_fanion", "dion", "sgd")),
    ],
)
def test_a_nonfinite_gradient_skips_its_parameter_alone(algorithm, bad):
    a, b = parameter(8, 6, dtype=torch.float32), parameter(8, 6, seed=1, dtype=torch.float32)
    lonely = parameter(8, 6, seed=1, dtype=torch.float32)
    options = {"algorithm": algorithm, "lr": 0.01, "weight_decay": 0.1}
    if algorithm not in ("adamw", "sgd"):
        options["stack_entries"] = 0  # a product of two matrices at once may round otherwise
    optimizer, other = Fanion([a, b], **options), Fanion([lonely], **options)
    for i in range(5):
        grads = [gaussian(8, 6, seed=10 * i + j) for j in range(2)]
        if i in (2, 3):
            grads[0][1, 1] = bad
            before = copy_of_state(optimizer, a)
        a.grad, b.grad, lonely.grad = grads[0], grads[1], grads[1].clone()
        optimizer.step()
        other.step()
        if i in (2, 3):
            after = copy_of_state(optimizer, a)
            assert after.pop("skipped") == before.pop("skipped") + 1 == i - 1
            assert all(torch.equal(before[key], after[key]) for key in before), "changed"
    assert optimizer.state[b]["skipped"] == 0
    if "basis0" not in optimizer.state[b]:  # there the random starts differ
        assert torch.equal(b, lonely)
    assert a.isfinite().all() and b.isfinite().all()


@pytest.mark.parametrize("algorithm", ["muon", "neon", "dion", "f_fanion", "adamw", "sgd"])
def test_training_goes_on_as_if_a_skipped_step_had_not_happened(algorithm):
    a, b = parameter64(8, 6), parameter64(8, 6)
    options = {"algorithm": algorithm, "lr": 0.01, "renormalize": True}
    if algorithm in ("adamw", "sgd"):
        options.pop("renormalize")
    first, second = Fanion([a], **options), Fanion([b], **options)
    for i in range(4):
        grad = gaussian64(8, 6, seed=i)
        update(first, a, grad)
        if i != 2:
            update(first, a, torch.full_like(grad, math.nan))
        update(second, b, grad)
    assert torch.equal(a, b)


@pytest.mark.parametrize("algorithm", ["muon", "dion", "adamw"])
def test_nonfinite_error_names_the_parameters_and_changes_nothing(algorithm):
    named = [
        ("fine", parameter64(6, 4)),
        ("broken", parameter64(6, 4)),
        ("worse", parameter64(6, 4)),
    ]
    optimizer = Fanion(named, algorithm=algorithm, nonfinite="error", lr=0.02)
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [copy_of_state(optimizer, p) for _, p in named]
    named[1][1].grad[0, 0] = math.nan
    named[2][1].grad[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="broken, worse") as error:
        optimizer.step()
    assert "fine" not in str(error.value)
    for (_, p), old in zip(named, before, strict=True):
        new = copy_of_state(optimizer, p)
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_nonfinite_error_names_unnamed_parameters_by_group_and_position():
    p, q = parameter64(6, 4), parameter64(6, 4)
    optimizer = Fanion([{"params": [p, q], "name": "body"}], nonfinite="error")
    p.grad, q.grad = torch.ones_like(p), torch.full_like(q, math.nan)
    with pytest.raises(FloatingPointError, match=r"body\[1\]"):
        optimizer.step()


@pytest.mark.parametrize("algorithm", EVERY)
def test_propagate_lets_nan_into_the_weights(algorithm):
    p = parameter(8, 6, dtype=torch.float32)
    optimizer = Fanion([p], algorithm=algorithm, nonfinite="propagate", lr=0.02)
    update(optimizer, p, torch.full((8, 6), math.nan))
    assert p.isnan().any()
    assert optimizer.state[p]["skipped"] == 0


def test_training_survives_a_gradient_too_large_for_the_momentum_dtype():
    p = parameter(6, 4, dtype=torch.float32)
    optimizer = Fanion([p], momentum_dtype="float16")
    update(optimizer, p, torch.full((6, 4), 1e6))
    update(optimizer, p, gaussian64(6, 4))
    assert p.isfinite().all()
    assert optimizer.state[p]["momentum"].isfinite().all()


def test_grad_scaling_is_left_to_the_scaler():
    assert not hasattr(Fanion([parameter64(3, 3)]), "_step_supports_amp_scaling")


@pytest.mark.parametrize(
    ("start", "later"), [("error", "skip"), ("propagate", "skip"), ("skip", "error")]
)
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_group_may_get_another_policy_in_the_middle(algorithm, start, later):
    p = parameter64(6, 4)
    optimizer = Fanion([p], algorithm=algorithm, nonfinite=start, lr=0.02)
    update(optimizer, p, gaussian64(6, 4))
    optimizer.param_groups[0]["nonfinite"] = later
    assert update(optimizer, p, gaussian64(6, 4)).abs().sum() > 0


# Finite gradients that would overflow the state.

HUGE = [(torch.float32, 1e30), (torch.float32, 1e37), (torch.float16, 6e4)]


@pytest.mark.parametrize(("dtype", "huge"), HUGE, ids=str)
@pytest.mark.parametrize("algorithm", EVERY)
def test_training_goes_on_after_huge_gradients(algorithm, dtype, huge):
    p = parameter(40, 30, dtype=dtype)
    optimizer = Fanion([p], algorithm=algorithm, lr=0.01, momentum=0.5)
    grad = gaussian(40, 30).to(dtype)
    for i in range(30):
        update(optimizer, p, grad.sign() * huge * (-1 if i % 3 else 1))
    state = {key: x for key, x in optimizer.state[p].items() if x.is_floating_point()}
    assert all(x.isfinite().all() for x in state.values())
    for _ in range(150):  # old gradients leave the momentum
        update(optimizer, p, grad)
    assert p.isfinite().all()
    with torch.no_grad():
        p.zero_()  # sgd has moved it by 1e28
    assert (update(optimizer, p, grad) != 0).any()


@pytest.mark.parametrize(
    ("algorithm", "dtype", "largest"),
    [
        ("adamw", torch.float32, 1.8e19),
        ("adamw", torch.float16, 250.0),
        ("sgd", torch.float32, 3.3e37),
        ("sgd", torch.float16, 6400.0),
        ("dion", torch.float32, 3.4e36),
        ("muon", torch.float32, 1.7e38),
    ],
)
def test_gradients_up_to_the_range_of_the_state_are_stepped(algorithm, dtype, largest):
    p = parameter(6, 4, dtype=dtype)
    optimizer = Fanion([p], algorithm=algorithm, lr=0.01)
    update(optimizer, p, torch.full((6, 4), largest))
    assert optimizer.state[p]["skipped"] == 0
    for sign in (1, -1):
        update(
            optimizer,
            p,
            torch.full(
                (6, 4), sign * min(1.2 * largest, 6.5e4 if dtype == torch.float16 else 3e38)
            ),
        )
    assert optimizer.state[p]["skipped"] == 2
    assert all(x.isfinite().all() for x in optimizer.state[p].values())


def test_gradient_too_large_for_the_state_is_named_by_nonfinite_error():
    p = parameter(6, 4, dtype=torch.float32)
    optimizer = Fanion([("w", p)], algorithm="adamw", lr=0.01, nonfinite="error")
    with pytest.raises(FloatingPointError, match="gradient of w"):
        update(optimizer, p, torch.full((6, 4), 1e30))
