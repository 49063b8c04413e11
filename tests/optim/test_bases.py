"""The bases from which rank-k solvers start."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lit_fanions import Fanion, lmo
from lit_fanions.optim.checkpoints import first_state
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("algorithm", ["fanion", "dion"])
def test_a_growing_rank_keeps_the_basis_and_adds_columns(algorithm, dtype, monkeypatch):
    drawn = []
    start = lmo.block_power.start_block
    monkeypatch.setattr(
        lmo.block_power, "start_block",
        lambda shape, k, **options: drawn.append(k) or start(shape, k, **options),
    )  # fmt: skip
    grad = with_spectrum(torch.logspace(0, -2, 48), 60, 48).to(dtype)
    p = nn.Parameter(torch.zeros(60, 48, dtype=dtype))
    options = {"lr": 1.0, "scale": "none", "nesterov": False, "momentum": 0.0}
    optimizer = Fanion(
        [p], algorithm=algorithm, rank=4, solver="subspace", error_feedback=False, **options
    )
    for _ in range(4):
        update(optimizer, p, grad)
    for rank in (5, 8, 9):
        optimizer.param_groups[0]["rank"] = rank
        d = update(optimizer, p, grad)
        assert (d * grad).sum().abs() / torch.linalg.svdvals(grad)[:rank].sum() > 0.97
    assert drawn == [1, 3, 1]


def test_the_added_columns_are_the_leading_vectors_outside_the_basis():
    m = with_spectrum(torch.tensor([3.0, 2.5, 2.0, *[0.1] * 27]), 40, 30).float()[None]
    _, _, vh = torch.linalg.svd(m)
    basis = vh[:, [0, 2]].mT
    wide = lmo.widened(m, basis, 3, torch.Generator().manual_seed(0))
    assert torch.equal(wide[..., :2], basis)
    torch.testing.assert_close((wide[..., 2] * vh[:, 1]).sum().abs(), torch.tensor(1.0))


@pytest.mark.parametrize("m", [0.0, torch.nan], ids=str)
def test_columns_are_added_to_a_basis_of_matrices_that_tell_nothing(m):
    matrices, generator = torch.full((2, 12, 9), m), torch.Generator().manual_seed(0)
    basis = lmo.start_block((2, 12, 9), 3, device=matrices.device, oversampling=0)
    for columns in (4, 7, 9):
        basis = lmo.widened(matrices, basis, columns, generator.manual_seed(0))
        eye = torch.eye(columns).expand(2, -1, -1)
        torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize("entries", [None, 0], ids=["stack", "slices"])
@pytest.mark.parametrize("adapt", ["none", "rows"])
@pytest.mark.parametrize("algorithm", ["fanion", "dion"])
def test_splits_may_change_in_the_middle(algorithm, adapt, entries):
    p = parameter(60, 40)
    options = {} if entries is None else {"stack_entries": entries}
    optimizer = Fanion([p], algorithm=algorithm, rank=3, adapt=adapt, lr=0.1, **options)
    for splits in (None, 2, [20, 40], {"count": 4, "dim": 1}, 3, None):
        optimizer.param_groups[0]["splits"] = splits
        for seed in range(2):
            update(optimizer, p, gaussian64(60, 40, seed=seed))
        assert p.isfinite().all()
        fresh = Fanion([q := parameter(60, 40)], algorithm=algorithm, rank=3, adapt=adapt, lr=0.1)
        fresh.param_groups[0]["splits"] = splits
        update(fresh, q, gaussian64(60, 40))
        shapes = [
            {k: x.shape for k, x in o.state[x].items()} for o, x in ((optimizer, p), (fresh, q))
        ]
        assert shapes[0] == shapes[1]


def momentum_free(p: nn.Parameter) -> Fanion:
    return Fanion([p], algorithm="neon", momentum=0.0, lr=0.1, seed=1)


def take_some_zero_steps(p: Tensor, optimizer: Fanion, seeds: range) -> None:
    """Step with gradients of which those of seeds 0, 2 and 3 are zero."""
    for seed in seeds:
        p.grad = gaussian64(80, 64, seed=seed) * (seed not in (0, 2, 3))
        optimizer.step()


@pytest.mark.parametrize("saved_after", [1, 3, 4, 5])
@pytest.mark.parametrize("how", ["load", "deepcopy"])
def test_a_zero_gradient_before_the_save_does_not_turn_the_basis_again(how, saved_after):
    p = parameter64(80, 64)
    optimizer = momentum_free(p)
    take_some_zero_steps(p, optimizer, range(saved_after))
    if how == "load":
        q = nn.Parameter(p.detach().clone())
        other = momentum_free(q)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        q, other = copy.deepcopy((p, optimizer))
    take_some_zero_steps(p, optimizer, range(saved_after, 7))
    take_some_zero_steps(q, other, range(saved_after, 7))
    assert torch.equal(p, q)
    assert_same_state(optimizer, other)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_checkpoint_without_the_flag_is_warm_if_it_has_a_momentum(steps):
    p = parameter64(80, 64)
    optimizer = Fanion([p], algorithm="neon")
    take_some_zero_steps(p, optimizer, range(steps))
    saved = optimizer.state_dict()
    del saved["state"][0]["warm"]
    q = nn.Parameter(p.detach().clone())
    other = Fanion([q], algorithm="neon")
    other.load_state_dict(saved)
    take_some_zero_steps(p, optimizer, range(steps, 5))
    take_some_zero_steps(q, other, range(steps, 5))
    assert torch.equal(p, q)
    assert_same_state(optimizer, other)


def test_the_flag_of_a_warm_basis_stays_on_the_cpu():
    p = nn.Parameter(torch.empty(6, 5, device="meta"))
    optimizer = Fanion([p], algorithm="neon")
    p.grad = torch.empty_like(p)
    state = first_state(p, optimizer.param_groups[0], torch.Generator())
    assert state["warm"].device.type == "cpu" and bool(state["warm"])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
    assert optimizer.state[p]["warm"].device.type == "cpu"
    assert optimizer.state[p]["basis0"].device.type == "meta"


def test_a_rank_lowered_from_full_needs_no_look_at_the_momentum():
    p = parameter64(80, 64)
    optimizer = Fanion([p], algorithm="muon")
    take_some_zero_steps(p, optimizer, range(2))
    assert "warm" not in optimizer.state[p]
    optimizer.param_groups[0]["rank"] = 3
    take_some_zero_steps(p, optimizer, range(2, 3))
    assert bool(optimizer.state[p]["warm"])
