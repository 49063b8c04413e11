"""Full rank: the orthogonal polar factor U V^T, the oracle of the spectral ball (Muon).

Newton-Schulz iterations are matrix products alone, x <- a x + b (x x^T) x + c (x x^T)^2 x, which
drive every singular value to about 1. ``presets`` has the (a, b, c) of their steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lit_fanions import norms
from lit_fanions.lmo.presets import Row, check_polar, polynomials, rescales
from lit_fanions.lmo.scaling import unit_frobenius

# Write x x^T, and a polynomial of a Gram matrix.
_Products = tuple[Callable[[Tensor, Tensor], object], Callable[[Tensor, Row, Tensor], object]]


# Matrices up to this size gain nothing from bfloat16 and are the most sensitive to its rounding.
_BF16_SIZE = 64

# Ratio of the longer to the shorter side from which the Gram form takes less time, and the number
# of steps that one Gram matrix is used for.
GRAM_ASPECT = 2.5
_GRAM_STEPS = 3


def _representable(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rescale the polynomials so that every a is exact in bfloat16.

    Rounding a to bfloat16 would shift the whole diagonal by up to .4 % at every step. The input is
    scaled down by a factor of at most 2 in exchange, which every preset allows.
    """
    found: list[Row] = []
    unit = 1.0  # of the step's output
    for a, b, c in reversed(rows):
        mantissa, exponent = math.frexp(a / unit)
        new_a = math.ldexp(math.floor(mantissa * 2**8), exponent - 8)
        ratio = new_a * unit / a
        found.append((new_a, b * ratio**3 / unit, c * ratio**5 / unit))
        unit = ratio
    return tuple(reversed(found))


def polar(m: Tensor, *, method: str = "polar_express", steps: int | None = None) -> Tensor:
    """Return the orthogonal polar factor U V^T of m = U S V^T.

    Newton-Schulz presets compute in bfloat16 where the device multiplies it fast, in float32
    elsewhere, for cans and for small matrices, and in float64 for float64 input. ``exact`` is an
    SVD in float64.

    Args:
        m: Matrices, (..., rows, cols), of any float dtype and scale.
        method: jordan | quintic | polar_express | cans | fast | convergent | exact | auto.
        steps: Newton-Schulz steps; None is the preset's own number.

    Returns:
        The same shape and dtype. Zero for a zero matrix; NaN for one with a NaN or an infinity.

    Raises:
        ValueError: If m is no batch of float matrices, or the method does not exist or cannot take
            that many steps.
    """
    norms.check_matrices(m, "floating-point")
    check_polar(method, steps)
    x, _ = unit_frobenius(m.detach(), dtype=polar_dtype(m, method))
    return unit_polar(x, method, steps, overwrite=True).to(m.dtype)


def polar_dtype(m: Tensor, method: str) -> torch.dtype:
    """Return the dtype in which ``unit_polar`` takes the matrices m."""
    if method == "exact":
        return torch.promote_types(m.dtype, torch.float32)
    # The first polynomial of CANS nearly vanishes at .86, where rounding would decide the sign.
    if m.dtype != torch.float64 and (method == "cans" or min(m.shape[-2:]) <= _BF16_SIZE):
        return torch.float32
    return fast_dtype(m.device, m.dtype)


def unit_polar(
    x: Tensor,
    method: str,
    steps: int | None = None,
    *,
    alpha: float = 1.0,
    partner: Callable[[Tensor], Tensor] | None = None,
    overwrite: bool = False,
    kernels: str = "plain",
) -> Tensor:
    """Return ``polar`` of matrices of Frobenius norm 1, or its blend with another direction.

    The blend is fused into the last product, so that it costs no pass over the matrices.

    Args:
        x: Matrices, (..., rows, cols), in the dtype of ``polar_dtype``.
        method: Method of ``polar``.
        steps: Newton-Schulz steps.
        alpha: Weight of the polar factor; the partner has 1 - alpha.
        partner: Maps x to the direction to blend with; it may overwrite x. None: no blend.
        overwrite: Whether the memory of x may be used if there is no partner, which always may.
        kernels: plain, or triton for the symmetric products on a GPU.
    """
    if method != "exact":
        by_triton = kernels == "triton" and x.device.type == "cuda" and x.dtype.itemsize == 2
        return iterate(
            x,
            polynomials(method, steps),
            alpha=alpha,
            partner=partner,
            overwrite=overwrite,
            rescale=rescales(method),
            products=_triton_products() if by_triton else None,
        )
    d = _exact(x)
    return d if partner is None else partner(x).lerp_(d, alpha)


def iterate(
    x: Tensor,
    rows: tuple[Row, ...],
    *,
    alpha: float = 1.0,
    partner: Callable[[Tensor], Tensor] | None = None,
    overwrite: bool = False,
    rescale: bool = False,
    products: _Products | None = None,
) -> Tensor:
    """Return the polar factor of matrices of Frobenius norm 1, or a blend, see ``unit_polar``.

    ``rows`` are the (a, b, c) of the Newton-Schulz steps, ``products`` functions in place of
    ``_gram`` and ``_polynomial``. With ``rescale`` the steps are those of x / |x x^T|_F^(1/2).
    """
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    x = x[0] if len(x) == 1 else x  # on CPUs two-dimensional products are faster
    if x.dtype == torch.bfloat16:
        rows = _representable(rows)
    short, long = sorted(shape[-2:])
    # Small products take an accelerator less time than their launches, of which there are more.
    gains = x.dtype != torch.bfloat16 and (x.device.type == "cpu" or short > _BF16_SIZE)
    if gains and long >= GRAM_ASPECT * short:
        d, factor = _gram_newton_schulz(x, rows, rescale)
        spare = x if overwrite and partner is None and d is not x else None
    else:
        used = products or (_gram, _polynomial)
        d, factor, spare = _newton_schulz(x, rows, overwrite and partner is None, rescale, used)
    product = (factor, d) if shape[-2] <= shape[-1] else (d, factor)
    if partner is None:
        return torch.matmul(*product, out=spare).reshape(shape)
    # The partner may overwrite x.
    left, right = (t.clone() if t is x else t for t in product)
    base = partner(x)
    add = base.addmm_ if base.ndim == 2 else base.baddbmm_
    return add(left, right, beta=1 - alpha, alpha=alpha).reshape(shape)


def _newton_schulz(
    x: Tensor,
    rows: tuple[Row, ...],
    overwrite: bool,
    rescale: bool,
    products: _Products,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the iterate before the last product, its factor on the short side, and free memory."""
    write_gram, write_polynomial = products
    # Products go into memory that is allocated once: for large matrices an allocation costs as much
    # as a product. The Gram matrix uses the memory of the next iterate, which is not needed yet.
    wide, small = x.shape[-2] <= x.shape[-1], (*x.shape[:-2], *[min(x.shape[-2:])] * 2)
    factor, spare = x.new_empty(small), x.new_empty(x.shape)
    for i, row in enumerate(rows):
        if i:
            used = x if i > 1 or (overwrite and x.is_contiguous()) else torch.empty_like(spare)
            x = torch.matmul(*((factor, x) if wide else (x, factor)), out=spare)
            spare = used
        gram = spare.view(-1)[: factor.numel()].view(small)
        write_gram(x if wide else x.mT, gram)
        unit = _divide_by_norm(gram) if rescale and not i else None
        write_polynomial(gram, row, factor)
        if unit is not None:
            factor.mul_(unit)
    return x, factor, spare


def _divide_by_norm(gram: Tensor) -> Tensor:
    """Divide x x^T by its Frobenius norm; return what divides x as much."""
    norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True)
    norm.clamp_(min=torch.finfo(norm.dtype).tiny)  # zero stays zero
    gram.div_(norm)
    return norm.rsqrt_()


def _gram(x: Tensor, out: Tensor) -> None:
    torch.matmul(x, x.mT, out=out)


def _polynomial(gram: Tensor, row: Row, out: Tensor) -> None:
    """Write a I + b gram + c gram^2."""
    a, b, c = row
    _multiply_add(b, gram, gram, gram, c, out=out)
    out.diagonal(dim1=-2, dim2=-1).add_(a)


def _triton_products() -> _Products:
    """Return ``_gram`` and ``_polynomial`` by kernels that compute one triangle."""
    from lit_fanions.lmo.triton_products import symmetric_product

    return (
        lambda x, out: symmetric_product(out, x, None, 0.0, 0.0, 1.0),
        lambda gram, row, out: symmetric_product(out, gram, gram, *row),
    )


def _gram_newton_schulz(x: Tensor, rows: tuple[Row, ...], rescale: bool) -> tuple[Tensor, Tensor]:
    """Run the same iteration on the small Gram matrix, multiplying x after a few steps.

    Rounding errors of the Gram matrix grow as the small singular values do, so the Gram matrix is
    recomputed from x every few steps. bfloat16 would need that at every step: already with two
    steps the iteration diverges on some small matrices.
    """
    wide = x.shape[-2] <= x.shape[-1]
    product: Tensor | None = None
    gram = x.new_empty(*x.shape[:-2], *[min(x.shape[-2:])] * 2)
    for i, (a, b, c) in enumerate(rows):
        if i % _GRAM_STEPS == 0:
            if product is not None:
                x = product @ x if wide else x @ product
            product = None
            _gram(x if wide else x.mT, gram)
            unit = _divide_by_norm(gram) if rescale and not i else None
        factor = _multiply_add(b, gram, gram, gram, c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if (i + 1) % _GRAM_STEPS and i + 1 < len(rows):
            torch.matmul(factor @ gram, factor, out=gram)
        if not i and unit is not None:
            product = product * unit
    assert product is not None
    return x, product


def _multiply_add(
    beta: float, c: Tensor, a: Tensor, b: Tensor, alpha: float, out: Tensor | None = None
) -> Tensor:
    """Return beta c + alpha a b for matrices or batches of them."""
    fused = torch.addmm if a.ndim == 2 else torch.baddbmm
    return fused(c, a, b, beta=beta, alpha=alpha, out=out)


def _exact(m: Tensor) -> Tensor:
    finite = m.isfinite().all(-1).all(-1)[..., None, None]
    d = norms.Spectral().lmo(torch.where(finite, m, 0.0)).to(m)
    return torch.where(finite, d, torch.nan)


def fast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of matrices are fast and accurate enough for a direction.

    float64 for float64; bfloat16 where the hardware multiplies it; else float32.
    """
    if dtype == torch.float64:
        return dtype
    return torch.bfloat16 if _has_bf16(device.type) else torch.float32


@functools.cache
def _has_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        # ROCm devices report their own architecture numbers, and all current ones have bf16.
        return torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)
    if device_type == "cpu":
        # Older releases of torch cannot tell; float32 is then the safe answer.
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return False
