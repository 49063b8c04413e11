"""Symmetric products by Triton's interpreter against PyTorch's."""

import pytest
import torch

from lit_fanions.lmo.newton_schulz import unit_polar
from tests.lmo.conftest import DeviceBranches
from tests.triton_interpreter import rounding_bfloat16  # isort: split

from lit_fanions.lmo.triton_products import symmetric_product


@pytest.fixture(autouse=True)
def _bfloat16():
    with rounding_bfloat16():
        yield


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 70, 101), (2, 130, 40), (128, 64), (1, 1, 5)])
def test_symmetric_products_are_those_of_float64(shape, transposed, dtype):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    x = x.mT if transposed else x
    square = (*x.shape[:-1], x.shape[-2])
    gram, polynomial = (torch.full(square, torch.nan, dtype=dtype) for _ in range(2))
    symmetric_product(gram, x, None, 0.0, 0.0, 1.0)
    symmetric_product(polynomial, gram, gram, 1.5, -2.0, 0.5)
    products = [x.double() @ x.double().mT]
    g, identity = gram.double(), torch.eye(square[-1])
    products.append(1.5 * identity - 2 * g + 0.5 * g @ g)
    for found, wanted in zip((gram, polynomial), products, strict=True):
        close = torch.finfo(dtype).eps * wanted.abs().max()
        assert (found.double() - wanted).abs().max() <= close


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 70, 101), (101, 70)])
def test_polar_factors_are_as_accurate_with_triton(shape, dtype):
    m = torch.randn(shape, dtype=torch.float64)
    m /= torch.linalg.matrix_norm(m, keepdim=True)
    nuclear = torch.linalg.svdvals(m).sum(-1)
    qualities = []
    for kernels in ("plain", "triton"):
        with DeviceBranches():
            d = unit_polar(m.to(dtype), "polar_express", kernels=kernels)
        qualities.append((m * d.double()).sum((-2, -1)) / nuclear)
    plain, triton = qualities
    assert (triton > plain - 0.005).all()


def test_products_of_float32_stay_plain(monkeypatch):
    """Triton would round float32 to TF32."""
    monkeypatch.delattr("lit_fanions.lmo.triton_products.symmetric_product")
    x = torch.randn(70, 101) / 84
    with DeviceBranches():
        found, wanted = (unit_polar(x, "cans", kernels=kernels) for kernels in ("triton", "plain"))
    assert torch.equal(found, wanted)
