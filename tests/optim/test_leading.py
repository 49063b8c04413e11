"""COSMOS: Adam in the leading subspace of the gradients, the ball in the rest."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_fanions import Fanion, norms
from lit_fanions.lmo import newton_schulz
from lit_fanions.optim.algorithms import oracle
from tests.lmo.conftest import DeviceBranches
from tests.lmo.matrices import gaussian
from tests.matrices import gaussian64
from tests.optim.test_launches import CountOperations

LR, BETA1, BETA2, GAMMA, R, EPS = 0.1, 0.9, 0.8, 0.3, 2, 1e-8
REST = {
    "cosmos": ({}, norms.Spectral()),
    "neon": ({"rank": 1}, norms.Nuclear()),
    "nsgd": ({"alpha": 0.0}, norms.Frobenius()),
    "f_muon": ({"alpha": 0.5}, norms.Blend(norms.Spectral(), 0.5)),
}
SHAPES = [(9, 5), (5, 9), (6, 6)]


def reference(w: Tensor, gradients: list[Tensor], ball: norms.Norm) -> Tensor:
    """Run the algorithm of arXiv 2502.17410, as in the authors' code, with an RMS of .2 lr."""
    if w.shape[0] < w.shape[1]:
        return reference(w.mT, [g.mT for g in gradients], ball).mT
    (rows, cols), m, v = w.shape, torch.zeros_like(w), torch.zeros(w.shape[0], R).double()
    for t, g in enumerate(gradients, 1):
        m = BETA1 * m + (1 - BETA1) * g
        gram = g.mT @ g
        if t == 1:
            u = torch.linalg.eigh(gram)[1].flip(-1)[:, :R]
            s = (1 - BETA2) * u.mT @ gram @ u
        else:
            old = u
            u = torch.linalg.qr(BETA2 * old @ s + (1 - BETA2) * gram @ old)[0]
            s = u.mT @ (BETA2 * old @ s @ old.mT + (1 - BETA2) * gram) @ u
        v = BETA2 * v + (1 - BETA2) * (g @ u) ** 2
        a = (m @ u / (1 - BETA1**t)) / ((v / (1 - BETA2**t)).sqrt() + EPS) @ u.mT
        b = ball.lmo(m - m @ u @ u.mT)
        d = a + GAMMA * math.sqrt(rows * cols) * b / b.norm()
        w = w - LR * 0.2 * math.sqrt(rows * cols) * d / d.norm()
    return w


def cosmos(parameters: list[nn.Parameter], **options: object) -> Fanion:
    given = {"momentum": BETA1, "beta2": BETA2, "adapt_rank": R, "rest_weight": GAMMA, "eps": EPS}
    exact = {"polar": "exact", "solver": "exact"}
    return Fanion(parameters, algorithm="cosmos", **{"lr": LR, **given, **exact, **options})


def train(optimizer: Fanion, seeds: range, bad: float = 0.0) -> None:
    (group,) = optimizer.param_groups
    for seed in seeds:
        for i, p in enumerate(group["params"]):
            p.grad = gaussian(*p.shape, seed=10 * seed + i).to(p) + bad
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_the_papers_algorithm(shape, rest, dtype):
    options, ball = REST[rest]
    p = nn.Parameter(gaussian64(*shape).to(dtype))
    start = p.detach().double().clone()
    optimizer = cosmos([p], **options)
    gradients = [gaussian64(*shape, seed=i + 1) for i in range(3)]
    for gradient in gradients:
        p.grad = gradient.to(dtype)
        optimizer.step()
    expected = reference(start, gradients, ball)
    torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=2e-5)


def test_rounding_in_the_subspace_is_not_enlarged():
    """A polar factor in bfloat16 gives what is left of the subspace singular values near 1."""
    p = nn.Parameter(torch.zeros(160, 96))
    optimizer = cosmos([p], adapt_rank=8, polar="auto", rest_weight=10.0)
    for seed in range(3):
        before = p.detach().clone()
        p.grad = gaussian(160, 96, seed=seed)
        optimizer.step()
    u = optimizer.state[p]["second0"][0, :96]
    inside = (before - p.detach()) @ u
    expected = optimizer.state[p]["momentum"] @ u
    angle = (inside * expected).sum() / (inside.norm() * expected.norm())
    assert angle > 0.9  # of Adam's step: that of noise in all directions would be near 0


def test_convolutions_fused_weights_and_stacks_are_stepped_matrix_by_matrix():
    whole = [gaussian64(6, 2, 2, 2), gaussian64(12, 5), gaussian64(3, 7, 5)]
    forms = [{}, {"splits": 3}, {"layout": "batch"}]
    for x, options in zip(whole, forms, strict=True):
        p = nn.Parameter(x.clone())
        parts = [x.flatten(1)] if x.ndim == 4 else x.chunk(3) if x.ndim == 2 else x.unbind()
        alone = [nn.Parameter(part.clone()) for part in parts]
        optimizer, others = cosmos([p], **options), [cosmos([part]) for part in alone]
        for seed in range(3):
            p.grad = gaussian64(*x.shape, seed=seed + 1)
            grads = p.grad.flatten(1) if x.ndim == 4 else p.grad
            pieces = [grads] if x.ndim == 4 else grads.chunk(3) if x.ndim == 2 else grads.unbind()
            for part, own, other in zip(alone, pieces, others, strict=True):
                part.grad = own.clone()
                other.step()
            optimizer.step()
        joined = torch.cat([part.detach().reshape(-1) for part in alone])
        torch.testing.assert_close(p.detach().reshape(-1), joined, rtol=0, atol=1e-9)


def test_slices_of_a_stack_step_as_the_whole():
    weights = [nn.Parameter(gaussian(6, 8, 5)) for _ in range(2)]
    for p, entries in zip(weights, (80, None), strict=True):
        train(cosmos([p], layout="batch", stack_entries=entries), range(3))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_equal_and_a_skipped_step_leaves_no_trace(dtype):
    parameters = [nn.Parameter(gaussian(*shape).to(dtype)) for shape in SHAPES]
    optimizer = cosmos(parameters)
    train(optimizer, range(2))
    train(optimizer, range(2, 3), bad=math.nan)
    copies = copy.deepcopy(parameters)
    resumed = cosmos(copies, lr=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, range(3, 5))
    train(resumed, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(parameters, copies, strict=True))
    assert all(optimizer.state[p]["skipped"] == 1 for p in parameters)
    unskipped = [nn.Parameter(gaussian(*shape).to(dtype)) for shape in SHAPES]
    train(other := cosmos(unskipped), range(2))
    train(other, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(parameters, unskipped, strict=True))


def test_a_gradient_that_is_not_finite_or_missing_at_first_does_no_harm():
    broken, late = (nn.Parameter(gaussian(8, 6)) for _ in range(2))
    optimizer = cosmos([broken, late])
    broken.grad = torch.full((8, 6), math.nan)
    optimizer.step()
    assert torch.equal(broken.detach(), gaussian(8, 6))
    train(optimizer, range(4))
    for p in (broken, late):
        basis = optimizer.state[p]["second0"][0, :6]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(R), rtol=0, atol=1e-5)
        assert p.isfinite().all() and not torch.equal(p.detach(), gaussian(8, 6))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_gradients_of_any_size_leave_everything_finite(scale):
    p = nn.Parameter(gaussian(8, 6))
    optimizer = cosmos([p])
    for seed in range(3):
        p.grad = scale * gaussian(8, 6, seed=seed)
        optimizer.step()
    assert p.isfinite().all()
    assert all(x.isfinite().all() for x in optimizer.state[p].values())
    assert torch.equal(p.detach(), gaussian(8, 6)) == (scale == 0)


def test_a_subspace_of_all_columns_leaves_adam_alone():
    p = nn.Parameter(gaussian64(8, 3))
    optimizer = cosmos([p], adapt_rank=64, rest_weight=5.0)
    assert not oracle(optimizer.param_groups[0], 8, 3).basis_columns
    before, g = p.detach().clone(), gaussian64(8, 3, seed=1)
    p.grad = g.clone()
    optimizer.step()
    u = torch.linalg.svd(g, full_matrices=False).Vh.mT
    adam = (g @ u).sign() @ u.mT  # after one step M / sqrt(V) is a sign
    moved = before - p.detach()
    torch.testing.assert_close(moved / moved.norm(), adam / adam.norm(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_branches_for_accelerators_step_the_same(shape):
    weights = [[nn.Parameter(gaussian(*shape)) for _ in range(2)] for _ in range(2)]
    optimizers = [cosmos(own) for own in weights]
    for optimizer in optimizers:  # the first U is an approximation there
        train(optimizer, range(1))
    train(optimizers[0], range(1, 3))
    with DeviceBranches():
        train(optimizers[1], range(1, 3))
    for p, q in zip(*weights, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"rank": 1}])
def test_steps_do_not_wait_for_the_device(options, monkeypatch):
    """Fake tensors have no memory: reading a number would raise, as do factorisations that wait."""
    monkeypatch.setattr(newton_schulz, "_has_bf16", lambda device_type: device_type == "cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        p = nn.Parameter(torch.empty(300, 240, device="cuda"))
        optimizer = Fanion([p], algorithm="cosmos", adapt_rank=4, **options)
        p.grad = torch.empty_like(p)
        for _ in range(2):
            with CountOperations() as count:
                optimizer.step()
    assert optimizer.state[p]["second0"].shape == (1, 300 + 240 + 4 + 2, 4)
    assert count.counts.total() > 0


def test_every_update_has_the_length_of_the_scale_rule():
    for options in ({}, {"rank": 1}, {"alpha": 0.5}, {"polar": "jordan"}):
        parameters = [nn.Parameter(gaussian(*shape)) for shape in SHAPES]
        optimizer = cosmos(parameters, **options)
        for seed in range(3):
            before = [p.detach().clone() for p in parameters]
            train(optimizer, range(seed, seed + 1))
            for p, old in zip(parameters, before, strict=True):
                rms = (p.detach() - old).square().mean().sqrt()
                assert float(rms) == pytest.approx(0.2 * LR, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "muon", "adapt_rank": 8}, "adapt_rank belongs to adapt: set it to leading"),
        ({"algorithm": "muon", "adapt": "rows", "rest_weight": 1.0}, "rest_weight belongs to"),
        ({"algorithm": "cosmos", "adapt_rank": 0}, "adapt_rank"),
        ({"algorithm": "cosmos", "rest_weight": -1.0}, "rest_weight"),
        ({"algorithm": "neon", "adapt": "leading", "error_feedback": True}, "choose one of them"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Fanion([nn.Parameter(gaussian(4, 3))], **options)
