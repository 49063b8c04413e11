"""Block power iteration, cold and warm, and the step of Dion."""

from contextlib import nullcontext

import pytest
import torch

from lit_fanions import Fanion, lmo, norms
from lit_fanions.lmo.block_power import dion, subspace
from lit_fanions.lmo.factorisations import noise
from tests.lmo.matrices import (
    MATRICES,
    attained,
    broken,
    distances,
    orthonormal_vectors,
    quality,
)
from tests.matrices import gaussian, orthonormal, power_law, with_spectrum

CPU = torch.device("cpu")


def rank_k(u: torch.Tensor, vh: torch.Tensor, k: int) -> torch.Tensor:
    return u[..., :k] @ vh[..., :k, :]


def start(m: torch.Tensor, width: int) -> torch.Tensor:
    return lmo.start_block(m.shape, width, device=CPU, oversampling=0).to(m.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 80, 60), (3, 80, 60), (1, 60, 80), (2, 60, 80), (1, 8, 60)])
def test_many_iterations_find_the_svd(shape, dtype):
    m = torch.stack(
        [with_spectrum(power_law(8, 1.0), *shape[1:], seed) for seed in range(shape[0])]
    )
    m = (m + 0.01 * gaussian(*shape) / 60).to(dtype)
    u, s, vh = subspace(m, start(m, 8), iterations=60)
    assert (u.shape, s.shape, vh.shape) == (
        (shape[0], shape[1], 8),
        (shape[0], 8),
        (shape[0], 8, shape[2]),
    )
    assert {u.dtype, s.dtype, vh.dtype} == {dtype}
    torch.testing.assert_close(s, torch.linalg.svdvals(m)[:, :8], rtol=1e-3, atol=0)
    assert distances(m, u, s, vh)[:, :6].max() < 1e-2
    assert orthonormal_vectors(u, vh)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_warm_start_makes_one_iteration_better_than_four(power):
    m = torch.stack([with_spectrum(power_law(60, power), 80, 60, seed) for seed in (0, 2)]).float()
    dual = norms.KyFan(6).value(m)
    after = []
    basis = start(m, 10)
    for _ in range(4):
        u, _, vh = subspace(m, basis, iterations=1)
        after.append(attained(m, rank_k(u, vh, 6), dual))
        basis = vh.mT
    cold_u, _, cold_vh = subspace(m, start(m, 10), iterations=4)
    assert after == sorted(after)
    assert after[-1] >= attained(m, rank_k(cold_u, cold_vh, 6), dual) - 1e-3
    assert after[0] < 0.95 < 0.97 < after[-1]


@pytest.mark.parametrize("k", [1, 8])
def test_one_iteration_follows_a_slowly_turning_matrix(k, device):
    # Like a momentum of which a twentieth is new at each step.
    m = gaussian(100, 80)
    for step in range(20):
        m = 0.95 * m + 0.05 * gaussian(100, 80, seed=step + 1)
    with device:
        basis = lmo.warmed(m, lmo.start_block(m.shape, k, device=CPU))[None]
    found = []
    for step in range(20, 60):
        m = 0.95 * m + 0.05 * gaussian(100, 80, seed=step + 1)
        with device:
            u, _, vh = subspace(m[None], basis, iterations=1)
        basis = vh.mT
        found.append(quality(m, rank_k(u, vh, k)[0], norms.KyFanDual(k)))
    # The sweeps that replace an eigendecomposition on a GPU turn the vectors a little less far.
    assert min(found) >= (0.98 if isinstance(device, nullcontext) else 0.97)


def test_warmed_turns_towards_the_leading_vectors_and_keeps_the_rest():
    m = with_spectrum(power_law(40, 0.7), 60, 40).float()
    block = lmo.start_block((3, 60, 40), 4, device=CPU)
    warm = lmo.warmed(torch.stack([m, m * 0, m * torch.nan]), block)
    assert warm.shape == block.shape
    leading = torch.linalg.svd(m).Vh[:4]
    assert torch.linalg.svdvals(leading @ block[0]).min() < 0.7
    assert torch.linalg.svdvals(leading @ warm[0]).min() > 0.99
    assert torch.equal(warm[1:], block[1:])
    small, large = (lmo.warmed(m * scale, block[0])[:, :4] for scale in (1e-20, 1e20))
    torch.testing.assert_close(torch.linalg.svdvals(small.mT @ large), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["equal", "zero", "all zero", "of the kernel"])
def test_dependent_start_columns_are_replaced(name, dtype):
    m = with_spectrum(power_law(30, 0.5), 50, 40).to(dtype)
    basis = start(m[None], 6)
    if name == "equal":
        basis[..., 1:] = basis[..., :1]
    elif name == "zero":
        basis[..., 2] = 0
    elif name == "all zero":
        basis[:] = 0
    else:
        basis[:] = torch.linalg.svd(m).Vh[30:36].mT  # the matrix has rank 30
    u, s, vh = subspace(m[None], basis, iterations=1)
    assert orthonormal_vectors(u, vh)
    for _ in range(20):
        u, s, vh = subspace(m[None], vh.mT, iterations=2)
    assert quality(m, rank_k(u, vh, 3)[0], norms.KyFanDual(3)) > 0.99
    assert s.isfinite().all()


@pytest.mark.parametrize("length", [1e-30, 1e30])
def test_the_length_of_start_columns_does_not_matter(length):
    m = gaussian(1, 50, 40)
    found = [subspace(m, start(m, 6) * x, iterations=2) for x in (1, length)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_scale_goes_to_the_singular_values_alone(scale):
    m = gaussian(2, 50, 40)
    u, s, vh = subspace(m, start(m, 6), iterations=3)
    scaled_u, scaled_s, scaled_vh = subspace(m * scale, start(m, 6), iterations=3)
    rounding = 1e-3
    torch.testing.assert_close(scaled_s / scale, s, rtol=rounding, atol=0)
    torch.testing.assert_close(scaled_u @ scaled_vh, u @ vh, rtol=0, atol=rounding)


def test_zero_and_broken_matrices():
    m = torch.cat([broken(gaussian(30, 40)), torch.zeros(1, 30, 40)])
    u, s, vh = subspace(m, start(m[0], 5).expand(5, -1, -1), iterations=4)
    for part in (u, s, vh):
        assert part[[0, 3, 4]].isfinite().all()
        assert part[1:3].isnan().all()
    torch.testing.assert_close(2 * s[0], s[3])
    assert not s[4].any()
    assert orthonormal_vectors(u[4], vh[4])


def test_a_batch_is_a_loop():
    m = with_spectrum(torch.logspace(0, -1, 30), 30, 40).float()
    m = torch.stack([m, 3 * m.flip(0), m.flip(1)])
    batched = subspace(m, start(m, 5), iterations=3)
    looped = [subspace(x, start(m, 5)[i, None], iterations=3) for i, x in enumerate(m.split(1))]
    rounding = 1e-4
    u, s, vh = (torch.cat(parts) for parts in zip(*looped, strict=True))
    torch.testing.assert_close(batched[1], s, rtol=rounding, atol=0)
    torch.testing.assert_close(batched[0] @ batched[2], u @ vh, rtol=0, atol=rounding)


@pytest.mark.parametrize("iterations", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(80, 70), (70, 400)])
@pytest.mark.parametrize("width", [8, 16])
def test_singular_values_beyond_the_rank_are_noise(width, shape, dtype, iterations, device):
    m = gaussian(2, shape[0], 3).double() @ gaussian(2, 3, shape[1], seed=1).double()
    m = m.to(dtype)
    basis = start(m, width)
    with device:
        for _ in range(3):
            _, s, vh = subspace(m, basis, iterations=iterations)
            basis = vh.mT
    least = noise(s, dtype)
    assert ((s > least).sum(-1) == 3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_does_not_matter(dtype, device):
    m = torch.stack([gaussian(30, 20), gaussian(30, 20) * torch.nan])
    basis = orthonormal(20, 4).float().expand(2, -1, -1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            found = [*subspace(m, basis, iterations=2), *dion(m[:1], basis[:1])]
    finally:
        torch.set_default_dtype(before)
    assert {x.dtype for x in found} == {torch.float32}
    assert all(x[0].isfinite().all() for x in found)


def test_dion_takes_one_power_iteration(device):
    m = with_spectrum(power_law(30, 1.0), 40, 30)[None]
    exact = torch.linalg.svd(m)
    basis = orthonormal(30, 4)[None]
    for _ in range(50):
        with device:
            p, r, basis = dion(m, basis)
    torch.testing.assert_close(p.mT @ p, torch.eye(4).double()[None], rtol=0, atol=1e-12)
    torch.testing.assert_close(r, m.mT @ p)
    torch.testing.assert_close(r.norm(dim=1), exact.S[:, :4], rtol=1e-3, atol=0)
    torch.testing.assert_close(basis.norm(dim=1), torch.ones(1, 4).double())
    assert quality(m, p @ basis.mT, norms.KyFanDual(4)) > 0.999


def test_dion_of_a_zero_matrix_is_zero(device):
    with device:
        p, r, q = dion(torch.zeros(1, 40, 30), orthonormal(30, 4)[None].float())
    assert not r.any()
    assert not p.any()
    assert torch.equal(q, orthonormal(30, 4)[None].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (6, 200)])
def test_dion_has_no_columns_of_rounding_errors(shape, dtype, device):
    m = with_spectrum(torch.tensor([1.0, 0.3]), *shape)[None].to(dtype)
    basis = orthonormal(shape[1], 5)[None].to(dtype)
    close = m + torch.finfo(dtype).eps / 4 * gaussian(1, *shape).to(dtype)
    directions = []
    for x in (m, close):
        with device:
            p, r, q = dion(x, basis)
        assert (p.norm(dim=1) == 0).sum() == (r.norm(dim=1) == 0).sum() == 3
        directions.append(p @ q.mT)
    torch.testing.assert_close(*directions, rtol=0, atol=1e5 * torch.finfo(dtype).eps)
    # A gradient that brings the rank back is followed again.
    with device:
        p, _, _ = dion(gaussian(1, *shape).to(dtype), q)
    torch.testing.assert_close(p.norm(dim=1), torch.ones(1, 5).to(dtype))


@pytest.mark.parametrize("name", MATRICES)
def test_polar_directions_are_near_oracles(name, device):
    m = MATRICES[name]
    for k in (1, 5, 17):
        with device:
            d = lmo.direction(m, rank=k, solver="polar", solver_steps=20, polar="exact")
        assert d.shape == m.shape and d.dtype == m.dtype
        assert quality(m, d, norms.KyFanDual(k)) >= 0.95 - torch.finfo(m.dtype).eps
        assert norms.KyFanDual(k).value(d).max() <= 1.005 + 4 * torch.finfo(m.dtype).eps
        assert d.any() != name.startswith("zero")
    spoilt = broken(gaussian(70, 90))
    with device:
        d = lmo.direction(spoilt, rank=5, solver="polar")
    assert d[1:3].isnan().all()
    assert d[0].isfinite().all() and d[3].isfinite().all()


@pytest.mark.parametrize("k", [1, 8, 32])
@pytest.mark.parametrize(("power", "least"), [(0.0, 0.96), (0.3, 0.98), (0.7, 0.985)])
def test_polar_directions_follow_a_changing_matrix(power, least, k):
    m = gaussian(96, 80) if power == 0 else with_spectrum(power_law(80, power), 96, 80).float()
    oracle = lmo.Oracle(lmo.BALLS["fanion"], lmo.Case(k, 96, 80, lmo.Settings(solver="polar")))
    assert oracle.basis_columns == k
    block = lmo.start_block(m.shape, k, device=m.device, oversampling=0)
    basis = lmo.warmed(m, block)
    noise = m.norm() / (96 * 80) ** 0.5
    for step in range(20):
        m = 0.95 * m + 0.05 * noise * gaussian(96, 80, seed=step)
        answer = oracle.solve(m, warm_start=basis)
        basis = answer.triplets.Vh.mT
        assert quality(m, answer.direction, norms.KyFanDual(k)) > least


def test_polar_directions_are_no_triplets():
    m = gaussian(30, 20)
    with pytest.raises(ValueError, match="finds directions, no triplets"):
        lmo.top_singular(m, 3, solver="polar")
    with pytest.raises(ValueError, match="error feedback needs singular triplets"):
        Fanion([torch.nn.Parameter(m)], algorithm="neon", solver="polar", error_feedback=True)
