"""Norms that neither under- nor overflow, and the parts that directions are blended with."""

import pytest
import torch

from lit_fanions import lmo
from tests.lmo.matrices import broken
from tests.matrices import gaussian

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_entry(dtype):
    m = torch.tensor([[[1.0, -3.0]], [[2.0, 0.5]], [[0.0, 0.0]], [[-1.0, -2.0]]]).to(dtype)
    largest = lmo.largest_entry(m)
    assert largest.dtype == dtype
    assert largest.tolist() == [[[3]], [[2]], [[0]], [[2]]]
    nan, inf = lmo.largest_entry(broken(m[0])[1:3])
    assert nan.isnan()
    assert inf.isinf()


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-20, 1e-3, 1, 1e3, 1e20, 1e35])
def test_unit_frobenius_at_any_scale(scale):
    m = gaussian(3, 20, 30) * scale
    x, norm = lmo.unit_frobenius(m)
    assert norm.shape == (3, 1, 1)
    assert x.dtype == norm.dtype == torch.float32
    exact = torch.linalg.vector_norm(m.double(), dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(norm.double() / scale, exact / scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(x.double(), m.double() / exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_unit_frobenius_of_float64(scale):
    m = gaussian(20, 30).double() * scale
    x, norm = lmo.unit_frobenius(m)
    assert x.dtype == norm.dtype == torch.float64
    torch.testing.assert_close(torch.linalg.vector_norm(x), torch.ones(()).double())
    torch.testing.assert_close(x * norm, m, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-20, 1])  # with a look at the largest entries, and without
def test_zero_stays_zero_and_only_broken_matrices_become_nan(scale):
    m = torch.cat([broken(gaussian(20, 30) * scale), torch.zeros(1, 20, 30)])
    x, norm = lmo.unit_frobenius(m)
    assert norm[1:3].isnan().all()
    assert x[1:3].isnan().all()
    assert not norm[4]
    assert not x[4].any()
    torch.testing.assert_close(x[0], x[3])
    torch.testing.assert_close(2 * norm[0], norm[3])


@pytest.mark.parametrize("scale", [1e-20, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_frobenius_uses_memory_only_when_it_may(dtype, scale):
    if dtype == torch.float16:
        scale = max(scale, 1e-3)
    m = (gaussian(2, 20, 30) * scale).to(dtype)
    before = m.clone()
    x, norm = lmo.unit_frobenius(m)
    assert torch.equal(m, before)
    again, same = lmo.unit_frobenius(m, overwrite=True)
    assert torch.equal(again, x)
    assert torch.equal(same, norm)
    low, _ = lmo.unit_frobenius(before, dtype=torch.bfloat16)
    assert torch.equal(low, x.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_frobenius_norm(dtype):
    m = gaussian(2, 20, 30).to(dtype)
    norm = lmo.frobenius_norm(m)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = torch.linalg.vector_norm(m.double(), dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


def test_parts_of_blends_use_the_memory_of_the_matrices():
    x, _ = lmo.unit_frobenius(gaussian(20, 30))
    x[0, 0] = 0
    assert lmo.BALLS["frobenius"].in_place(x, lmo.Settings(sign_scale=0.3)) is x
    for scale in (1.0, 0.3):
        part = x.clone()
        assert lmo.BALLS["sign"].in_place(part, lmo.Settings(sign_scale=scale)) is part
        assert torch.equal(part, scale * x.sign())
