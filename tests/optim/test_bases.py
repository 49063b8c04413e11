"""The bases from which rank-k solvers start."""

import pytest
import torch
from torch import Tensor, nn

from lit_fanions import Fanion
from tests.matrices import decaying, gaussian64, parameter, parameter64, with_spectrum
from tests.optim.steps import assert_same_state, take_steps, through_a_file, trained, update


@pytest.mark.parametrize("algorithm", ["neon", "fanion", "f_neon", "kyfan", "dion"])
def test_bases_are_part_of_the_state_from_the_first_step(algorithm):
    (p, _), optimizer = trained(algorithm, 1, rank=2)
    basis = optimizer.state[p]["basis0"]
    assert basis.shape[:2] == (1, p.shape[1])
    assert basis.isfinite().all()


@pytest.mark.parametrize("algorithm", ["neon", "dion"])
def test_the_seed_decides_the_run(algorithm):
    def first_basis(seed: int) -> Tensor:
        (p, _), optimizer = trained(algorithm, 0, seed=seed)
        optimizer.step()
        return optimizer.state[p]["basis0"]

    assert torch.equal(first_basis(1), first_basis(1))
    assert not torch.equal(first_basis(1), first_basis(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_may_get_another_rank_in_the_middle(dtype):
    p = parameter(64, 64, dtype=dtype)
    optimizer = Fanion([p], algorithm="fanion", rank=4, scale="none", lr=1.0, nesterov=False)
    grad = decaying(64, 64)
    for rank in (4, 20, 2):
        optimizer.param_groups[0]["rank"] = rank
        got = update(optimizer, p, grad)
        # The rank of what was taken: U_k V_k^T has norm sqrt(k).
        assert got.float().norm().item() == pytest.approx(rank**0.5, rel=0.02)


@pytest.mark.parametrize("algorithm", ["muon", "fanion", "dion"])
def test_a_rank_lowered_from_full_is_warm_started(algorithm):
    p, grad = parameter(80, 64, dtype=torch.float32), decaying(80, 64)
    options = {"scale": "none", "lr": 1.0, "nesterov": False, "error_feedback": False}
    optimizer = Fanion([p], algorithm=algorithm, rank="full", **options)
    update(optimizer, p, grad)
    optimizer.param_groups[0]["rank"] = 4
    for _ in range(3):
        d = update(optimizer, p, grad)
    captured = (d * grad).sum().abs() / torch.linalg.svdvals(grad)[:4].sum()
    assert captured > 0.99
    width = 4 if algorithm == "dion" else 12
    assert optimizer.state[p]["basis0"].shape == (1, 64, width)


def test_a_group_may_get_another_oversampling_or_solver_in_the_middle():
    p, q = parameter64(40, 30), parameter64(40, 30, seed=1)
    optimizer = Fanion([p, q], algorithm="fanion", rank=3)
    (group,) = optimizer.param_groups
    for options, width in (
        ({"oversampling": 5}, 8),
        ({"oversampling": 0}, 3),
        ({"oversampling": 99}, 30),
        ({"oversampling": 2, "rank": 8}, 10),
        ({"solver": "exact"}, None),
        ({"solver": "subspace"}, 10),
        ({"rank": "full"}, None),
        ({"rank": 2}, 4),
    ):
        group.update(options)
        p.grad, q.grad = gaussian64(40, 30), gaussian64(40, 30, seed=1)
        optimizer.step()
        for x in (p, q):
            basis = optimizer.state[x].get("basis0")
            assert (None if basis is None else basis.shape[-1]) == width
            if basis is not None:
                eye = torch.eye(width, dtype=basis.dtype)
                torch.testing.assert_close(basis.mT @ basis, eye[None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [{"rank": 4}, {"rank": 20}, {"rank": 7, "oversampling": 12}])
@pytest.mark.parametrize("algorithm", ["muon", "fanion", "dion"])
def test_a_run_resumed_across_a_new_basis_is_bit_equal(algorithm, change):
    def changed(optimizer: Fanion) -> None:
        optimizer.param_groups[0].update(change)
        take_steps(optimizer, 3, start=3)

    straight, optimizer = trained(algorithm, 3)
    state = through_a_file(optimizer.state_dict())
    weights = [p.detach().clone() for p in straight]
    changed(optimizer)
    resumed, other = trained(algorithm, 0)
    with torch.no_grad():
        for p, weight in zip(resumed, weights, strict=True):
            p.copy_(weight)
    other.load_state_dict(state)
    changed(other)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert_same_state(optimizer, other)
    width = change["rank"] + (change.get("oversampling", 8) if algorithm != "dion" else 0)
    assert optimizer.state[straight[0]]["basis0"].shape[-1] == width


@pytest.mark.parametrize("first", ["nan", "zero", "none"])
@pytest.mark.parametrize("splits", [None, [4, 60]])
def test_a_basis_waits_for_a_usable_gradient(first, splits):
    gradient = with_spectrum(torch.logspace(0, -2, 64), 64, 64).float()

    def quality(late: bool) -> float:
        p = nn.Parameter(torch.zeros(64, 64))
        optimizer = Fanion(
            [p], algorithm="fanion", rank=4, lr=1.0, scale="none", momentum=0.0, nesterov=False,
            splits=splits, solver="subspace",
        )  # fmt: skip
        if late:
            broken = {"nan": torch.full_like(p, torch.nan), "zero": torch.zeros_like(p)}
            p.grad = broken.get(first)
            optimizer.step()
        before = p.detach().clone()
        p.grad = gradient.clone()
        optimizer.step()
        return float(((before - p.detach()) * gradient).sum())

    assert quality(late=True) == pytest.approx(quality(late=False), rel=1e-3)


def test_a_blend_of_dion_starts_as_dion():
    p, q = nn.Parameter(torch.zeros(12, 9)), nn.Parameter(torch.zeros(12, 9))
    pure = Fanion([p], algorithm="dion", rank=2, lr=1.0)
    blended = Fanion([q], algorithm="dion", rank=2, lr=1.0, alpha=0.5)
    p.grad = q.grad = parameter(12, 9).detach()
    for optimizer in (pure, blended):
        optimizer.step()
    assert torch.equal(pure.state[p]["basis0"], blended.state[q]["basis0"])
