"""Steps with the solvers that users get, against exact directions and torch's Muon."""

import pytest
import torch
from torch import Tensor, nn

from lit_fanions import Fanion
from tests.matrices import decaying, gaussian, gaussian64, parameter
from tests.optim.reference import NAMES, Case, reference_step
from tests.optim.steps import first_update, update


def polar(m: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(m.double(), full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("algorithm", [*NAMES, "neon_cold"])
@pytest.mark.parametrize("shape", [(64, 48), (40, 96)])
def test_the_default_solvers_are_close_to_exact_ones(algorithm, shape):
    cold, algorithm = algorithm.endswith("_cold"), algorithm.removesuffix("_cold")
    case = Case(algorithm)
    p = parameter(*shape, dtype=torch.float32)
    w, m = p.detach().double(), torch.zeros(shape, dtype=torch.float64)
    optimizer = Fanion([p], **case.options(), **({"solver": "randomized"} if cold else {}))
    grad = decaying(*shape)
    for i in range(4):
        grad = grad + 0.02 * decaying(*shape, seed=20 + i)  # gradients change slowly
        before = w.clone()
        got = update(optimizer, p, grad).double()
        reference_step(w, m, grad, case)
        want = before - w
        assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.97
        assert 0.8 < got.norm() / want.norm() < 1.2


@pytest.mark.parametrize(
    "polar", ["jordan", "quintic", "polar_express", "cans", "fast", "convergent", "exact", "auto"]
)
def test_every_polar_method_steps_almost_along_the_polar_factor(polar):
    grad = decaying(48, 32).float()
    # jordan never settles at 1, fast has not come so far.
    share = {"exact": 0.999, "jordan": 0.85, "fast": 0.7}.get(polar, 0.97)
    got = first_update((48, 32), grad, polar=polar, scale="none").double()
    u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
    assert (got * grad).sum() >= share * (u @ vh * grad).sum()


@pytest.mark.parametrize("solver", ["auto", "lanczos", "subspace", "randomized", "power", "exact"])
def test_every_solver_finds_the_leading_directions(solver):
    grad = decaying(64, 80).float()
    got = first_update((64, 80), grad, algorithm="fanion", rank=3, scale="none", solver=solver)
    s = torch.linalg.svdvals(grad.double())
    assert (got.double() * grad).sum() >= 0.99 * s[:3].sum()
    assert got.norm().item() == pytest.approx(3**0.5, rel=1e-3)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("shape", [(16, 32), (48, 16), (24, 24)])
def test_muon_agrees_with_torch_step_by_step(shape, scale, nesterov):
    ours, theirs = (parameter(*shape, dtype=torch.float32) for _ in range(2))
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.2}
    fanion = Fanion([ours], polar="jordan", scale=scale, **options)
    try:
        muon = torch.optim.Muon([theirs], adjust_lr_fn=scale, **options)
    except ValueError:
        pytest.skip(f"torch {torch.__version__} does not know {scale}")
    for i in range(6):
        before = theirs.detach().clone()
        theirs.grad = gaussian(*shape, seed=i)
        update(fanion, ours, theirs.grad)
        muon.step()
        moved = (theirs.detach() - before).norm()
        # torch orthogonalises in bfloat16: no two right answers are closer.
        assert (ours.detach() - theirs.detach()).norm() < 0.03 * (i + 1) * moved
    momentum = muon.state[theirs]["momentum_buffer"]
    torch.testing.assert_close(fanion.state[ours]["momentum"], momentum, rtol=0, atol=0)


def test_jordan_is_its_five_steps_in_float64():
    grad = gaussian64(12, 7)
    x = grad.T / grad.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    got = first_update((12, 7), grad, polar="jordan", scale="none")
    torch.testing.assert_close(got, x.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("polar_method", ["jordan", "polar_express", "cans", "convergent"])
def test_more_steps_than_a_preset_has_rows_are_still_descent(polar_method):
    grad = gaussian(24, 16) @ torch.diag(torch.logspace(0, -2, 16))
    for steps in range(5, 13):
        p = nn.Parameter(torch.zeros(24, 16))
        p.grad = grad.clone()
        Fanion([p], lr=1.0, polar=polar_method, polar_steps=steps).step()
        assert (
            nn.functional.cosine_similarity(
                -p.detach().flatten().double(), polar(grad).flatten(), dim=0
            )
            > 0.8
        ), steps


@pytest.mark.parametrize("steps", [4, 6])
def test_a_preset_that_must_not_be_continued_refuses_other_counts(steps):
    with pytest.raises(ValueError, match="exactly 5 steps"):
        Fanion([parameter(4, 4)], polar="quintic", polar_steps=steps)


def test_the_first_rank_k_step_is_as_good_as_the_next():
    p = parameter(256, 128)
    optimizer = Fanion([p], algorithm="fanion", rank=8, scale="none", nesterov=False, lr=1.0)
    grad, before = gaussian(256, 128, seed=1), p.detach().clone()
    p.grad = grad.clone()
    optimizer.step()
    captured = ((before - p.detach()) * grad).sum() / torch.linalg.svdvals(grad)[:8].sum()
    assert captured > 0.97
