"""The factorisations of a few rows that the rank-k solvers are made of, for CPUs and GPUs."""

import pytest
import torch

from lit_fanions.lmo.block_power import dion, subspace
from lit_fanions.lmo.factorisations import (
    by_sweeps,
    cholesky_rows,
    completed,
    gram_schmidt,
    noise,
    orthonormal_rows,
    orthonormal_shards,
    principal,
    principal_rows,
    rows_outside,
    scattered_rows,
    wide,
)
from tests.lmo.conftest import DeviceBranches
from tests.matrices import gaussian, orthonormal, power_law, with_spectrum

DTYPES = [torch.float32, torch.float64]
ROWS = pytest.mark.parametrize("method", [orthonormal_rows, gram_schmidt, cholesky_rows])


def assert_orthonormal(rows: torch.Tensor) -> None:
    eye = torch.eye(rows.shape[-2], dtype=torch.float64).expand(*rows.shape[:-1], rows.shape[-2])
    gram = rows.double() @ rows.double().mT
    torch.testing.assert_close(gram, eye, rtol=0, atol=30 * torch.finfo(rows.dtype).eps)


@ROWS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 40), (3, 5, 40), (2, 3, 5, 40), (1, 7), (9, 9), (64, 300)])
def test_orthonormal_rows_have_the_span_of_the_rows(shape, dtype, method):
    x = gaussian(*shape).to(dtype)
    q = method(x)
    assert (q.shape, q.dtype) == (x.shape, dtype)
    assert_orthonormal(q)
    torch.testing.assert_close(x @ q.mT @ q, x, rtol=0, atol=1e-5)


@ROWS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("name", ["equal", "combination", "zero", "all zero", "nearly equal"])
def test_orthonormal_rows_replace_what_is_dependent(name, length, dtype, method):
    x = gaussian(2, 5, length)
    if name == "equal":
        x[1, 3] = x[1, 0]
    elif name == "combination":
        x[1, 4] = x[1, 0] - 2 * x[1, 2]
    elif name == "zero":
        x[1, 2] = 0
    elif name == "all zero":
        x[1] = 0
    else:
        x[1, 3] = x[1, 0] * (1 + 1e-6 * gaussian(length, seed=1))
    q = method(x.to(dtype))
    assert_orthonormal(q)
    torch.testing.assert_close(x @ q.float().mT @ q.float(), x, rtol=0, atol=1e-5)


@ROWS
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
@pytest.mark.parametrize("which", [slice(None), slice(3)], ids=["all", "some"])
def test_rows_of_any_length_become_orthonormal(scale, which, method):
    x = gaussian(2, 5, 40)
    scaled = x.clone()
    scaled[1, which] *= scale
    q = method(scaled)
    assert_orthonormal(q)
    # Numbers as small as 1e-42 have two digits left.
    torch.testing.assert_close(x @ q.mT @ q, x, rtol=0, atol=0.02 if scale == 1e-42 else 1e-5)


def test_rows_of_several_ranks_become_orthonormal_as_whole_ones():
    x = gaussian(6, 20, 60)
    x[1, 3] = x[1, 0]
    x[2, 4:15] = x[2, :4].sum(0)
    x[3] = 0
    x[4] *= 1e30
    x[5, 2, 3] = torch.inf
    q, broken = orthonormal_shards(x, slice(None), 60, lambda gram: gram)
    assert broken.isnan().flatten().tolist() == [False] * 5 + [True]
    assert_orthonormal(q)
    torch.testing.assert_close((x @ q.mT @ q)[:4], x[:4], rtol=0, atol=1e-5)
    wanted = gram_schmidt(x[0])
    torch.testing.assert_close((q[0] * wanted).sum(-1).abs(), torch.ones(20), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cholesky_rows_are_those_of_gram_and_schmidt(dtype):
    # Steep spectra turn rows of random vectors nearly parallel.
    x = gaussian(3, 12, 12).double() @ with_spectrum(torch.logspace(0, -3, 12), 12, 60)
    x[1, 4] *= 1e-20
    found, wanted = cholesky_rows(x.to(dtype)), gram_schmidt(x)
    signs = (found * wanted).sum(-1, keepdim=True).sign()
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close((signs * found).double(), wanted, rtol=0, atol=tolerance)
    assert ((found * x).sum(-1) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outside", [0, 1, 5])
def test_rows_outside_a_basis_span_the_rest_of_the_rows(outside, dtype, device):
    q = orthonormal(60, 45).mT.to(dtype)
    basis, rest = q[:40], q[40 : 40 + outside]
    inside = 1e3 * gaussian(5, 40).to(dtype) @ basis
    z = inside + gaussian(5, outside, seed=1).to(dtype) @ rest
    with device:
        found, r = rows_outside(z, basis)
    assert_orthonormal(torch.cat([basis, found]))
    part = z - inside
    rounding = 2e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(part @ found.mT @ found, part, rtol=0, atol=40 * rounding)
    bound = 64 * torch.finfo(dtype).eps * z.norm(dim=-1)
    assert ((r.mT @ found - part).norm(dim=-1) <= 2 * bound).all()
    if outside < 5:  # what was lost is not taken for nothing
        assert (r.norm(dim=-1)[outside:] >= bound[outside:]).all()


@pytest.mark.parametrize("index", [0, 1, 7, 4096])
def test_scattered_rows_are_like_random_ones(index):
    like = torch.zeros(1, dtype=torch.float64)
    x = scattered_rows(24, 500, like, index)
    assert torch.equal(x, scattered_rows(24, 500, like, index))
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(24).double(), rtol=0.1, atol=0)
    others = torch.cat([scattered_rows(24, 500, like, index + 1), orthonormal(500, 24).mT])
    s = torch.linalg.svdvals(torch.cat([x, others]))
    assert s.min() > 0.5  # those of 72 random rows are 1 - (72 / 500) ** 0.5 = .62


def graded(n: int, off_diagonal: float, seed: int = 0) -> torch.Tensor:
    """Return a nearly diagonal Gram matrix of descending order, as of a warm-started block."""
    x = torch.eye(n).double() + off_diagonal * gaussian(n, n, seed=seed).double()
    x = x * (2.0 * power_law(n, 1.0)).unsqueeze(-1)
    return x @ x.mT


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("off_diagonal", [0.0, 0.01, 0.05])
def test_sweeps_find_the_leading_eigenvectors_of_a_nearly_diagonal_matrix(off_diagonal, k, device):
    gram = torch.stack([graded(16, off_diagonal, seed) for seed in range(5)])
    squares, exact = torch.linalg.eigh(gram)
    with device:
        s, q = by_sweeps(gram)
    torch.testing.assert_close(
        q.mT @ q, torch.eye(16).double().expand(5, 16, 16), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(s[:, :k], squares.flip(-1)[:, :k].sqrt(), rtol=1e-2, atol=0)
    # The cosines of the angles between the two subspaces of the first k.
    cosines = torch.linalg.svdvals(q[..., :k].mT @ exact.flip(-1)[..., :k])
    assert cosines.min() > 0.97


def test_sweeps_leave_a_diagonal_matrix_as_it_is(device):
    s = power_law(7, 0.5)
    with device:
        found, q = by_sweeps(torch.diag(s**2))
    torch.testing.assert_close(found, s)
    torch.testing.assert_close(q.abs(), torch.eye(7).double())


def test_principal_is_an_eigendecomposition_in_descending_order():
    s = torch.stack([power_law(9, 1), torch.cat([power_law(4, 1), torch.zeros(5).double()])])
    q = torch.stack([orthonormal(9, 9, seed) for seed in (0, 1)])
    found, vectors = principal((q * s[:, None] ** 2) @ q.mT)
    torch.testing.assert_close(found, s, rtol=1e-7, atol=1e-7)
    back = (vectors * found[:, None] ** 2) @ vectors.mT
    torch.testing.assert_close(back, (q * s[:, None] ** 2) @ q.mT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_principal_rows_have_singular_values_as_accurate_as_the_rows(rank, dtype, device):
    wanted = torch.cat([0.3 ** torch.arange(rank).double(), torch.zeros(6 - rank).double()])
    basis = torch.eye(6).double()
    basis[:rank, :rank] = torch.linalg.qr(basis + 0.05 * gaussian(6, 6)).Q[:rank, :rank]
    basis = torch.linalg.qr(basis).Q
    x = (basis * wanted @ orthonormal(40, 6).mT)[None].to(dtype)
    with device:
        s, q = principal_rows(x)
    rounding = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(s[0], wanted, rtol=1e-3, atol=rounding)
    torch.testing.assert_close(q.mT @ q, torch.eye(6).double()[None], rtol=0, atol=1e-12)
    assert not (s[0, rank:] > noise(s, dtype)[0]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_completed_rows_are_orthonormal(rank, dtype, device):
    s = torch.cat([power_law(rank, 2), torch.zeros(6 - rank).double()]).expand(2, 6)
    unit = torch.stack([orthonormal(30, 6).mT, -orthonormal(30, 6, 1).mT])
    with device:
        rows = completed((s.unsqueeze(-1) * unit).to(dtype), s)
    assert rows.dtype == dtype
    assert_orthonormal(rows)
    torch.testing.assert_close(rows[:, :rank], unit[:, :rank].to(dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_completed_rows_of_rounding_are_orthonormal(dtype, device):
    # A matrix of rank 3 times a block of 6 vectors: three rows are rounding errors.
    m = with_spectrum(power_law(3, 1), 40, 30).to(dtype)
    block = orthonormal(30, 6).to(dtype)
    x = (m @ block).mT
    s, q = principal(wide(x @ x.mT))
    with device:
        rows = completed(q.mT.to(dtype) @ x, s)
    assert_orthonormal(rows)


def test_noise_is_relative_to_the_largest():
    s = torch.tensor([[3.0, 1e-7, 0.0], [3e20, 1e3, 1.0], [0.0, 0.0, 0.0]])
    assert (s > noise(s, torch.float32)).tolist() == [
        [True, False, False],
        [True, False, False],
        [False, False, False],
    ]
    assert (s > noise(s, torch.float64))[:2].tolist() == [[True, True, False], [True, False, False]]


def test_wide_is_float64():
    x = gaussian(3, 4)
    assert torch.equal(wide(x), x.double())


@pytest.mark.parametrize("k", [1, 8])
def test_gpus_get_no_factorisation_that_loops_over_a_batch(k, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("called on a GPU")

    m = gaussian(3, 60, 50)
    block = orthonormal(50, k + 8).float().expand(3, -1, -1)
    for name in ("qr", "eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    with DeviceBranches():
        subspace(m, block, iterations=1)
        dion(m, block)
    with pytest.raises(AssertionError, match="called on a GPU"):
        dion(m, block)
