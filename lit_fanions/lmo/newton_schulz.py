"""Full rank: the orthogonal polar factor U V^T, the oracle of the spectral ball (Muon).

Newton-Schulz iterations are matrix products alone, x <- a x + b (x x^T) x + c (x x^T)^2 x, which
drive every singular value to about 1. A preset is a table of (a, b, c), a row a step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from lit_fanions import norms
from lit_fanions.checks import check_choice, whole_number
from lit_fanions.lmo.scaling import unit_frobenius

_Row = tuple[float, float, float]
# Write x x^T, and a polynomial of a Gram matrix.
_Products = tuple[Callable[[Tensor, Tensor], object], Callable[[Tensor, _Row, Tensor], object]]


class _Preset(NamedTuple):
    summary: str
    rows: tuple[_Row, ...]
    steps: int
    repeats: bool  # whether its last row may be repeated past the end of the table
    margin: float = 1.0  # the input is divided by this as well, against rounding


def _safe(rows: tuple[_Row, ...], margin: float) -> tuple[_Row, ...]:
    # These polynomials are optimal on an interval and diverge outside, where rounding may lead.
    return tuple((a / margin, b / margin**3, c / margin**5) for a, b, c in rows)


_PRESETS: dict[str, _Preset] = {
    "jordan": _Preset(
        "K. Jordan et al., Muon (2024): fast at first, never settles at 1",
        ((3.4445, -4.7750, 2.0315),),
        5,
        True,
    ),
    # A sixth step would start far from where the fifth row is good.
    "quintic": _Preset(
        "fitted for exactly five steps",
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        5,
        False,
    ),
    # The published seventh row is that of the limit but for rounding.
    "polar_express": _Preset(
        "arXiv 2505.16932: minimax optimal for singular values from 1e-3 to 1",
        (
            *_safe(
                (
                    (8.28721201814563, -23.595886519098837, 17.300387312530933),
                    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                ),
                1.01,
            ),
            (1.875, -1.25, 0.375),
        ),
        6,
        True,
        1.01,
    ),
    # Steep at the ends of its intervals, so in bfloat16 it needs the safety margin even more.
    "cans": _Preset(
        "arXiv 2506.10935: equioscillates up to the very ends of its intervals",
        (
            *_safe(
                (
                    (8.4703, -25.1081, 18.6293),
                    (4.1828, -3.1087, 0.5806),
                    (3.9619, -2.9541, 0.5630),
                    (3.2866, -2.4647, 0.5074),
                ),
                1.02,
            ),
            (2.2737, -1.6447, 0.4162),
        ),
        5,
        True,
        1.02,
    ),
    "convergent": _Preset(
        "converges from everywhere in (0, 1], slowly", ((2.0, -1.5, 0.5),), 12, True
    ),
}
# The preset of "auto": the fewest products that keep <m, d> at .97 of the nuclear norm for
# condition numbers up to 1e3.
AUTO = "polar_express"
SUMMARIES = {
    **{name: f"{own.summary} ({own.steps} steps)" for name, own in _PRESETS.items()},
    "exact": "the singular value decomposition",
    "auto": f"the same as {AUTO}",
}
METHODS = tuple(SUMMARIES)
if TYPE_CHECKING:
    PolarMethod = str
else:
    PolarMethod = Literal[METHODS]

# Matrices up to this size gain nothing from bfloat16 and are the most sensitive to its rounding.
_BF16_SIZE = 64

# Ratio of the longer to the shorter side from which the Gram form takes less time, and the number
# of steps that one Gram matrix is used for.
GRAM_ASPECT = 2.5
_GRAM_STEPS = 3


def _representable(rows: tuple[_Row, ...]) -> tuple[_Row, ...]:
    """Rescale the polynomials so that every a is exact in bfloat16.

    Rounding a to bfloat16 would shift the whole diagonal by up to .4 % at every step. The input is
    scaled down by a factor of at most 2 in exchange, which every preset allows.
    """
    found: list[_Row] = []
    unit = 1.0  # of the step's output
    for a, b, c in reversed(rows):
        mantissa, exponent = math.frexp(a / unit)
        new_a = math.ldexp(math.floor(mantissa * 2**8), exponent - 8)
        ratio = new_a * unit / a
        found.append((new_a, b * ratio**3 / unit, c * ratio**5 / unit))
        unit = ratio
    return tuple(reversed(found))


def coefficients(method: str, steps: int | None = None) -> tuple[_Row, ...]:
    """Return the (a, b, c) of each step of a Newton-Schulz preset; None: its own number of steps.

    Past the end of its table a preset repeats the last row; one that cannot is refused there.
    """
    check_polar(method, steps)
    preset = _PRESETS[AUTO if method == "auto" else method]
    steps = preset.steps if steps is None else steps
    return (preset.rows + preset.rows[-1:] * steps)[:steps]


def polynomials(method: str, steps: int | None = None) -> tuple[_Row, ...]:
    """Return ``coefficients`` for matrices of Frobenius norm 1, with the preset's margin."""
    rows = coefficients(method, steps)
    margin = _PRESETS[AUTO if method == "auto" else method].margin
    return (*_safe(rows[:1], margin), *rows[1:])


def check_polar(method: str, steps: int | None) -> None:
    """Refuse a method that does not exist and a number of steps that it cannot take."""
    check_choice("polar method", method, METHODS)
    if steps is None:
        return
    if method == "exact":
        raise ValueError(f"the exact polar factor takes no steps, got {steps}: leave them out")
    whole_number("steps", steps)
    preset = _PRESETS[AUTO if method == "auto" else method]
    if not preset.repeats and steps != preset.steps:
        raise ValueError(
            f"polar method {method!r} is fitted for exactly {preset.steps} steps, got {steps}; "
            'choose "polar_express" for another number'
        )


def polar(m: Tensor, *, method: str = "polar_express", steps: int | None = None) -> Tensor:
    """Return the orthogonal polar factor U V^T of m = U S V^T.

    Newton-Schulz presets compute in bfloat16 where the device multiplies it fast, in float32
    elsewhere, for cans and for small matrices, and in float64 for float64 input. ``exact`` is an
    SVD in float64.

    Args:
        m: Matrices, (..., rows, cols), of any float dtype and scale.
        method: jordan | quintic | polar_express | cans | convergent | exact | auto.
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
            products=_triton_products() if by_triton else None,
        )
    d = _exact(x)
    return d if partner is None else partner(x).lerp_(d, alpha)


def iterate(
    x: Tensor,
    rows: tuple[_Row, ...],
    *,
    alpha: float = 1.0,
    partner: Callable[[Tensor], Tensor] | None = None,
    overwrite: bool = False,
    products: _Products | None = None,
) -> Tensor:
    """Return the polar factor of matrices of Frobenius norm 1, or a blend, see ``unit_polar``.

    ``rows`` are the (a, b, c) of the Newton-Schulz steps, ``products`` functions in place of
    ``_gram`` and ``_polynomial``.
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
        d, factor = _gram_newton_schulz(x, rows)
        spare = x if overwrite and partner is None and d is not x else None
    else:
        used = products or (_gram, _polynomial)
        d, factor, spare = _newton_schulz(x, rows, overwrite and partner is None, used)
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
    rows: tuple[_Row, ...],
    overwrite: bool,
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
        write_polynomial(gram, row, factor)
    return x, factor, spare


def _gram(x: Tensor, out: Tensor) -> None:
    torch.matmul(x, x.mT, out=out)


def _polynomial(gram: Tensor, row: _Row, out: Tensor) -> None:
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


def _gram_newton_schulz(x: Tensor, rows: tuple[_Row, ...]) -> tuple[Tensor, Tensor]:
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
        factor = _multiply_add(b, gram, gram, gram, c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if (i + 1) % _GRAM_STEPS and i + 1 < len(rows):
            torch.matmul(factor @ gram, factor, out=gram)
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
