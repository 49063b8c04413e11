"""The factorisations of a few rows that the rank-k solvers are made of."""

import pytest
import torch

from lit_fanions.lmo.factorisations import (
    by_sweeps,
    completed,
    noise,
    orthonormal_rows,
    principal,
    wide,
)
from tests.lmo.matrices import gaussian, orthonormal, power_law, with_spectrum

DTYPES = [torch.float32, torch.float64]


def assert_orthonormal(rows: torch.Tensor) -> None:
    eye = torch.eye(rows.shape[-2], dtype=torch.float64).expand(*rows.shape[:-1], rows.shape[-2])
    gram = rows.double() @ rows.double().mT
    torch.testing.assert_close(gram, eye, rtol=0, atol=30 * torch.finfo(rows.dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 40), (3, 5, 40), (2, 3, 5, 40), (1, 7), (9, 9)])
def test_orthonormal_rows_have_the_span_of_the_rows(shape, dtype):
    x = gaussian(*shape).to(dtype)
    q = orthonormal_rows(x)
    assert (q.shape, q.dtype) == (x.shape, dtype)
    assert_orthonormal(q)
    torch.testing.assert_close(x @ q.mT @ q, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["equal", "combination", "zero", "all zero", "nearly equal"])
def test_orthonormal_rows_replace_what_is_dependent(name, dtype):
    x = gaussian(2, 5, 40)
    if name == "equal":
        x[1, 3] = x[1, 0]
    elif name == "combination":
        x[1, 4] = x[1, 0] - 2 * x[1, 2]
    elif name == "zero":
        x[1, 2] = 0
    elif name == "all zero":
        x[1] = 0
    else:
        x[1, 3] = x[1, 0] * (1 + 1e-6 * gaussian(40, seed=1))
    q = orthonormal_rows(x.to(dtype))
    assert_orthonormal(q)
    torch.testing.assert_close(x @ q.float().mT @ q.float(), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
@pytest.mark.parametrize("which", [slice(None), slice(3)], ids=["all", "some"])
def test_orthonormal_rows_of_any_length(scale, which):
    x = gaussian(2, 5, 40)
    scaled = x.clone()
    scaled[1, which] *= scale
    q = orthonormal_rows(scaled)
    assert_orthonormal(q)
    # Of numbers as small as 1e-42 two digits are left.
    torch.testing.assert_close(x @ q.mT @ q, x, rtol=0, atol=0.02 if scale == 1e-42 else 1e-5)


def graded(n: int, off_diagonal: float, seed: int = 0) -> torch.Tensor:
    """The Gram matrix of a block that a warm start has made nearly diagonal and descending."""
    x = torch.eye(n).double() + off_diagonal * gaussian(n, n, seed=seed).double()
    x = x * (2.0 * power_law(n, 1.0)).unsqueeze(-1)
    return x @ x.mT


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("off_diagonal", [0.0, 0.01, 0.05])
def test_sweeps_find_the_leading_eigenvectors_of_a_nearly_diagonal_matrix(off_diagonal, k):
    gram = torch.stack([graded(16, off_diagonal, seed) for seed in range(5)])
    squares, exact = torch.linalg.eigh(gram)
    s, q = by_sweeps(gram)
    torch.testing.assert_close(
        q.mT @ q, torch.eye(16).double().expand(5, 16, 16), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(s[:, :k], squares.flip(-1)[:, :k].sqrt(), rtol=1e-2, atol=0)
    # The cosines of the angles between the two subspaces of the first k.
    cosines = torch.linalg.svdvals(q[..., :k].mT @ exact.flip(-1)[..., :k])
    assert cosines.min() > 0.97


def test_sweeps_leave_a_diagonal_matrix_as_it_is():
    s = power_law(7, 0.5)
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
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_completed_rows_are_orthonormal(rank, dtype):
    s = torch.cat([power_law(rank, 2), torch.zeros(6 - rank).double()]).expand(2, 6)
    unit = torch.stack([orthonormal(30, 6).mT, -orthonormal(30, 6, 1).mT])
    rows = completed((s.unsqueeze(-1) * unit).to(dtype), s)
    assert rows.dtype == dtype
    assert_orthonormal(rows)
    torch.testing.assert_close(rows[:, :rank], unit[:, :rank].to(dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_completed_rows_of_rounding_are_orthonormal(dtype):
    # What is left of a matrix of rank 3 in a block of 6: three rows of nothing but rounding.
    m = with_spectrum(power_law(3, 1), 40, 30).to(dtype)
    block = orthonormal(30, 6).to(dtype)
    x = (m @ block).mT
    s, q = principal(wide(x @ x.mT))
    assert_orthonormal(completed(q.mT.to(dtype) @ x, s))


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
