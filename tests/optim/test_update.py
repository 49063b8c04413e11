"""Steps against the paper's algorithm in float64, with exact singular vectors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_fanions import Fanion
from tests.matrices import gaussian, gaussian64, parameter, parameter64
from tests.optim.reference import (
    EXACT,
    NAMES,
    SCALES,
    SHAPES,
    Case,
    assert_follows_reference,
    index_matrices,
    reference_step,
)
from tests.optim.steps import EVERY, MATRIX, one_matrix, take_steps, update


# Nesterov's momentum and the scale act before and after the direction: no need for all pairs.
@pytest.mark.parametrize(
    ("scale", "nesterov"), zip(SCALES, [True, False, True, False], strict=True)
)
@pytest.mark.parametrize("algorithm", NAMES)
def test_every_algorithm_equals_the_reference(algorithm, scale, nesterov):
    for shape in SHAPES:
        assert_follows_reference(Case(algorithm, scale=scale, nesterov=nesterov), shape)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        algorithm=st.sampled_from(["muon", "fanion", "f_muon", "s_fanion"]),
        rank=st.sampled_from([1, 2, 3, 0.3, 0.8, 1.0, "full"]),
        alpha=st.sampled_from([None, 0.0, 0.2, 0.7, 1.0]),
        blend=st.sampled_from([None, "frobenius", "sign"]),
        sign_scale=st.sampled_from([1.0, 0.03]),
        lr=st.floats(0.01, 0.5),
        momentum=st.sampled_from([0.0, 0.5, 0.95]),
        nesterov=st.booleans(),
        weight_decay=st.sampled_from([0.0, 0.3]),
        scale=st.sampled_from(SCALES),
        renormalize=st.booleans(),
        error_feedback=st.just(False),
    ),
    shape=st.sampled_from(SHAPES),
)
def test_every_mixture_of_options_equals_the_reference(case, shape):
    if case.alpha is None:  # a blend alone may have no effect, which is refused
        case = case._replace(blend=None)
    assert_follows_reference(case, shape)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("rank", [1, 2, 0.5])
@pytest.mark.parametrize("algorithm", ["neon", "fanion", "f_neon", "s_fanion"])
def test_error_feedback_equals_the_reference(algorithm, rank, weight_decay):
    case = Case(algorithm, rank=rank, error_feedback=True, weight_decay=weight_decay)
    for shape in SHAPES:
        assert_follows_reference(case, shape)


@pytest.mark.parametrize("algorithm", ["muon", "f_muon", "kyfan", "s_fanion"])
@pytest.mark.parametrize(
    "options", [{}, {"renormalize": True}, {"scale": "match_rms_adamw"}], ids=str
)
def test_float64_parameters_are_stepped_in_float64(algorithm, options):
    assert_follows_reference(Case(algorithm, **options), (8, 4), atol=1e-12)


LAYOUTS = [
    ((6, 4), "flatten", 1),
    ((9, 4), "flatten", 3),
    ((4, 3, 3, 2), "flatten", 1),
    ((6, 2, 3), "flatten", 2),
    ((3, 5, 2, 2), "transposed", 1),
    ((6, 2, 3), "transposed", 3),
    ((3, 5, 4), "batch", 1),
    ((2, 3, 6, 4), "batch", 2),
]


@pytest.mark.parametrize("algorithm", ["muon", "f_fanion", "s_neon", "coordinate", "kyfan"])
@pytest.mark.parametrize(("shape", "layout", "parts"), LAYOUTS)
def test_layouts_and_splits_equal_the_reference(shape, layout, parts, algorithm):
    case = Case(algorithm, weight_decay=0.1, renormalize=True, scale="match_rms_adamw")
    p = parameter64(*shape, seed=1)
    w, m = p.detach().flatten().clone(), torch.zeros(p.numel(), dtype=torch.float64)
    splits = None if parts == 1 else parts
    optimizer = Fanion([p], **case.options(), **EXACT, layout=layout, splits=splits)
    for i in range(3):
        grad = gaussian64(*shape, seed=10 + i)
        update(optimizer, p, grad)
        for index in index_matrices(shape, layout, parts):
            one_w, one_m = w[index], m[index]
            reference_step(one_w, one_m, grad.flatten()[index], case)
            w[index], m[index] = one_w, one_m
        torch.testing.assert_close(p.detach().flatten(), w, rtol=0, atol=2e-6)


@pytest.mark.parametrize("algorithm", ["muon", "fanion", "s_neon"])
@pytest.mark.parametrize("sizes", [[2, 3, 4], [3, 3, 3], [8, 1]])
def test_parts_of_given_sizes_step_like_separate_parameters(sizes, algorithm):
    whole = parameter64(9, 5)
    parts = [nn.Parameter(part.clone()) for part in whole.detach().split(sizes)]
    fused = Fanion([whole], algorithm=algorithm, splits=sizes, **EXACT, lr=0.02)
    apart = Fanion(parts, algorithm=algorithm, **EXACT, lr=0.02)
    for i in range(3):
        whole.grad = gaussian64(9, 5, seed=i)
        for part, grad in zip(parts, whole.grad.split(sizes), strict=True):
            part.grad = grad.clone()
        fused.step()
        apart.step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]))


@pytest.mark.parametrize("sizes", [[1, 3], [3, 1], [1, 1, 2]])
def test_parts_of_transposed_convolutions_are_renormalised_like_separate_parameters(sizes):
    # Parts of one row are views of the weight, larger ones are copies.
    options = {"layout": "transposed", "renormalize": True, **EXACT, "lr": 0.02}
    whole, grad = parameter64(4, 5, 2, 2), gaussian64(4, 5, 2, 2, seed=1)
    parts = [nn.Parameter(part.clone()) for part in whole.detach().split(sizes)]
    update(Fanion([whole], splits=sizes, **options), whole, grad)
    apart = Fanion(parts, **options)
    for part, own in zip(parts, grad.split(sizes), strict=True):
        part.grad = own.clone()
    apart.step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]))


@pytest.mark.parametrize("stack_entries", [None, 0])
def test_clamped_error_feedback_of_transposed_matrices_is_that_of_the_matrices(stack_entries):
    options = {"algorithm": "fanion", "rank": 9, "error_feedback": True, "polar": "exact"}
    options |= {"lr": 0.02, "scale": "none", "stack_entries": stack_entries}
    first, second = parameter64(2, 5, 4), parameter64(2, 5, 4)
    second.data = second.data.mT.contiguous()
    for p, layout in ((first, "batch_transposed"), (second, "batch")):
        with pytest.warns(UserWarning, match="clamped"):
            optimizer = Fanion([p], layout=layout, **options)
        for i in range(2):
            grad = gaussian64(2, 5, 4, seed=i)
            update(optimizer, p, grad if p is first else grad.mT.contiguous())
    torch.testing.assert_close(first.detach(), second.detach().mT)


@pytest.mark.parametrize("algorithm", ["neon", "fanion", "dion"])
def test_error_feedback_decays_only_what_was_captured(algorithm):
    u, v = (torch.linalg.qr(gaussian64(8, 8, seed=seed)).Q for seed in (1, 2))
    s = torch.tensor([9.0, 7, 3, 2, 1, 0.5, 0.2, 0.1], dtype=torch.float64)
    p = parameter64(8, 8)
    rank = {"neon": 1}.get(algorithm, 2)
    optimizer = Fanion(
        [p], algorithm=algorithm, rank=rank, error_feedback=True, momentum=0.6, **EXACT, lr=0.02
    )
    update(optimizer, p, (u * s) @ v.T)
    momentum = optimizer.state[p]["momentum"]
    if algorithm == "dion":  # one power iteration: within its own P only
        basis = momentum.new_tensor(optimizer.state[p]["basis0"][0])
        assert momentum.norm() < ((u * s) @ v.T).norm() and basis.shape == (8, 2)
        return
    kept = (u.T @ momentum @ v).diagonal()
    want = torch.where(torch.arange(8) < rank, 0.6 * s, s)
    torch.testing.assert_close(kept, want, rtol=0, atol=1e-9)


def test_lr_zero_freezes_the_weights_but_not_the_momentum():
    optimizer = one_matrix(lr=0.0, weight_decay=0.1, renormalize=True)
    (p,) = optimizer.param_groups[0]["params"]
    before = p.detach().clone()
    update(optimizer, p, gaussian64(6, 4, seed=3))
    assert torch.equal(p, before)
    assert optimizer.state[p]["momentum"].norm() > 0


# Without Nesterov's momentum the oracle gets the momentum itself, which it must not overwrite.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("algorithm", "nesterov"),
    [*((name, False) for name in MATRIX if name != "dion"), ("muon", True), ("f_neon", True)],
)
def test_the_momentum_is_the_average_of_the_gradients_and_nothing_else(algorithm, nesterov, dtype):
    p = parameter(10, 6, dtype=dtype)
    optimizer = Fanion([p], algorithm=algorithm, nesterov=nesterov, momentum=0.9, lr=0.02)
    want = torch.zeros(10, 6, dtype=dtype)
    for i in range(4):
        p.grad = gaussian(10, 6, seed=i).to(dtype)
        optimizer.step()
        want.lerp_(p.grad, 1 - 0.9)
        assert torch.equal(optimizer.state[p]["momentum"], want)


@pytest.mark.parametrize("algorithm", EVERY)
def test_the_first_step_starts_from_the_weights_it_was_given(algorithm):
    p = parameter(6, 4)
    before = p.detach().clone()
    optimizer = Fanion([p], algorithm=algorithm, lr=1e-6)
    assert torch.equal(p, before)
    take_steps(optimizer, 1)
    assert not torch.equal(p, before)
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "nonfinite"), [({}, "propagate"), ({"nesterov": False}, "skip")], ids=str
)
@pytest.mark.parametrize("algorithm", EVERY)
def test_steps_leave_gradients_unchanged(algorithm, options, nonfinite):
    if algorithm == "adamw":
        options = {}
    p, bad = parameter(6, 4), parameter(6, 4)
    optimizer = Fanion([p, bad], algorithm=algorithm, nonfinite=nonfinite, **options, lr=0.02)
    p.grad, bad.grad = gaussian(6, 4), torch.full((6, 4), math.nan)
    grad, before = p.grad, p.grad.clone()
    optimizer.step()
    optimizer.step()
    assert p.grad is grad and torch.equal(grad, before)
    assert bad.grad.isnan().all()


def test_renormalize_reaches_the_norm_in_bf16():
    p = parameter(64, 32, dtype=torch.bfloat16)
    optimizer = Fanion([p], renormalize=True, lr=1e-8)
    for i in range(5):
        p.grad = gaussian(64, 32, seed=i).bfloat16()
        optimizer.step()
    assert p.detach().float().norm().item() == pytest.approx(8.0, rel=1e-3)


@pytest.mark.parametrize("stack_entries", [None, 0])
@pytest.mark.parametrize("algorithm", ["muon", "s_neon", "dion"])
def test_cautious_decay_spares_entries_that_the_step_moves_away_from_zero(algorithm, stack_entries):
    """W <- W - lr (u + weight_decay 1[u W >= 0] W), arXiv 2510.12402."""
    options = {"algorithm": algorithm, "lr": 0.1, "stack_entries": stack_entries}
    plain, cautious = parameter64(2, 6, 4), parameter64(2, 6, 4)
    steps = [
        Fanion([plain], layout="batch", **options),
        Fanion([cautious], layout="batch", weight_decay=0.5, cautious_decay=True, **options),
    ]
    start = plain.detach().clone()
    start[0, 0] = 0.0
    for p, optimizer in zip((plain, cautious), steps, strict=True):
        with torch.no_grad():
            p.copy_(start)
        p.grad = gaussian64(2, 6, 4, seed=1)
        optimizer.step()
    step = start - plain.detach()
    want = start - step - 0.1 * 0.5 * torch.where(step * start >= 0, start, 0.0)
    torch.testing.assert_close(cautious.detach(), want)
    assert not torch.equal(want, start - step - 0.1 * 0.5 * start)
