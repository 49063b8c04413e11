"""Quantities against their definitions by a float64 SVD, and the stated errors of the estimates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_fanions import norms
from lit_fanions.callbacks import quantities
from lit_fanions.lmo import spectrum as spectra
from lit_fanions.lmo.spectrum import QUANTILES
from lit_fanions.optim.algorithms import oracle
from lit_fanions.optim.options import default_options

SHAPES = [(140, 300), (512, 160), (200, 200), (512, 512)]
SMALL_SHAPES = [(1, 7), (5, 1), (12, 30), (128, 40), (3, 9, 6)]


def with_values(shape: tuple[int, ...], values: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = min(shape)
    u, v = (
        torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64)).Q
        for size in shape
    )
    return ((u * values) @ v.mT).float()


def powers(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "i^-.5": lambda n: powers(n) ** -0.5,
    "i^-1": lambda n: powers(n) ** -1,
    "i^-2": lambda n: powers(n) ** -2,
    "condition 1e4": lambda n: 10 ** (-4 * (powers(n) - 1) / (n - 1)),
    "rank 1": lambda n: (powers(n) <= 1).double(),
    "rank 5": lambda n: (powers(n) <= 5) / powers(n),
    "spike": lambda n: 1 + 30 * (powers(n) <= 1),
}


def matrices(shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    if kind == "gaussian":
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return with_values(shape, SPECTRA[kind](min(shape)), seed)


def svd(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x.double())


def definitions(x: Tensor, k: int) -> dict[str, Tensor]:
    s = svd(x)
    square = s.square().sum(-1)
    return {
        "spectral": s[..., 0],
        "nuclear": s.sum(-1),
        "frobenius": square.sqrt(),
        "ky_fan": s[..., :k].sum(-1),
        "nuclear_rank": s.sum(-1).square() / square,
        "stable_rank": square / s[..., 0].square(),
        "energy": s[..., :k].square().sum(-1) / square,
        "quantiles": (s / s[..., :1]).quantile(
            torch.tensor(QUANTILES, dtype=torch.float64), -1
        ).movedim(0, -1),
    }  # fmt: skip


def measured(x: Tensor, k: int, **options: bool) -> dict[str, Tensor]:
    s = spectra.measure(x, **options)
    return {
        "spectral": spectra.spectral(s),
        "nuclear": spectra.nuclear(s),
        "frobenius": s.frobenius,
        "ky_fan": spectra.ky_fan(s, k),
        "nuclear_rank": spectra.nuclear_rank(s),
        "stable_rank": spectra.stable_rank(s),
        "energy": spectra.energy(s, k),
        "quantiles": spectra.quantiles(s),
    }


@pytest.mark.parametrize("shape", [*SMALL_SHAPES, *SHAPES])
def test_exact_values_match_the_svd(shape):
    x = matrices(shape, "gaussian", 0)
    want = definitions(x, 3)
    for name, value in measured(x, 3, exact=True).items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_small_matrices_match_the_svd(shape):
    x = matrices(shape, "gaussian", 0)
    want = definitions(x, 3)
    for options in ({}, {"leading": True}):
        for name, value in measured(x, 3, **options).items():
            torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-5, msg=name)


STATED = {
    "spectral": 0.01,
    "nuclear": 0.04,
    "nuclear_rank": 0.08,
    "ky_fan": 0.1,
    "frobenius": 1e-5,
}


@pytest.mark.parametrize("kind", ["gaussian", *SPECTRA])
@pytest.mark.parametrize("shape", SHAPES)
def test_estimates_are_within_the_stated_errors(shape, kind):
    for seed in range(2):
        x = matrices(shape, kind, seed)
        for k in (1, 8, 40, min(shape) // 2, min(shape) - 1):
            want, got = definitions(x, k), measured(x, k)
            for name, error in STATED.items():
                assert abs(got[name] / want[name] - 1) <= error, (name, k)
            assert got["spectral"] <= want["spectral"] * (1 + 1e-5)
            assert abs(got["energy"] - want["energy"]) <= 0.05
            assert (got["quantiles"] - want["quantiles"]).abs().max() <= 0.1
        leading = spectra.spectral(spectra.measure(x, leading=True))
        assert 0.95 <= leading / want["spectral"] <= 1 + 1e-5


def test_ky_fan_norms_do_not_exceed_the_nuclear_norm():
    for seed in range(3):
        s = spectra.measure(with_values((300, 300), torch.exp(-powers(300) / 20), seed))
        assert spectra.ky_fan(s, 299) <= spectra.ky_fan(s, 300) <= spectra.nuclear(s)


def test_nuclear_norms_of_many_equal_values_are_within_the_stated_error():
    for shape in SHAPES:
        x = with_values(shape, (powers(min(shape)) <= 40).double(), 0)
        assert abs(spectra.nuclear(spectra.measure(x)) / 40 - 1) < 1 / 3


def test_batched_and_single_matrices_agree():
    x = torch.stack([matrices((150, 200), kind, 1) for kind in ("gaussian", "i^-1", "rank 5")])
    together = measured(x, 8)
    for i, one in enumerate(x):
        for name, value in measured(one, 8).items():
            torch.testing.assert_close(together[name][i], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20])
@pytest.mark.parametrize("shape", [(20, 30), (150, 140)])
def test_quantities_scale_with_the_matrix(shape, scale):
    x = matrices(shape, "i^-1", 0)
    want, got = measured(x, 4), measured((x.double() * scale).float(), 4)
    for name in want:
        unit = scale if name in ("spectral", "nuclear", "frobenius", "ky_fan") else 1
        torch.testing.assert_close(got[name].double() / unit, want[name].double(),
                                   rtol=1e-3, atol=1e-3, msg=name)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"exact": True}], ids=str)
@pytest.mark.parametrize("shape", [(20, 30), (150, 140)])
def test_non_finite_and_zero_matrices_have_nan_and_zero_values(shape, options):
    x = torch.stack([matrices(shape, "gaussian", i) for i in range(3)])
    x[1, 0, 0], x[2] = torch.nan, 0
    s = spectra.measure(x, **options)
    assert s.values[0].isfinite().all()
    assert s.values[1].isnan().all()
    assert (s.values[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_measured(dtype):
    x = matrices((140, 150), "gaussian", 0).to(dtype)
    assert spectra.spectral(spectra.measure(x)) == pytest.approx(float(svd(x)[0]), rel=0.01)


def test_the_global_generator_is_not_used():
    x = matrices((200, 200), "gaussian", 0)
    state = torch.get_rng_state()
    spectra.measure(x)
    assert torch.equal(state, torch.get_rng_state())


GROUPS: list[tuple[dict[str, Any], Callable[[], norms.Norm]]] = [
    ({"algorithm": "muon"}, norms.Spectral),
    ({"algorithm": "neon"}, norms.Nuclear),
    ({"algorithm": "fanion", "rank": 3}, lambda: norms.KyFanDual(3)),
    ({"algorithm": "dion", "rank": 3}, lambda: norms.KyFanDual(3)),
    ({"algorithm": "kyfan", "rank": 3}, lambda: norms.KyFan(3)),
    ({"algorithm": "nsgd"}, norms.Frobenius),
    ({"algorithm": "signum"}, norms.MaxEntry),
    ({"algorithm": "coordinate"}, norms.SumEntry),
    ({"algorithm": "f_muon", "alpha": 0.3}, lambda: norms.Blend(norms.Spectral(), 0.3)),
    (
        {"algorithm": "s_fanion", "rank": 2, "sign_scale": 0.2},
        lambda: norms.Blend(norms.KyFanDual(2), 0.5, "sign", 0.2),
    ),
]


@pytest.mark.parametrize(("options", "norm"), GROUPS)
def test_own_dual_is_the_dual_of_the_groups_ball(options, norm):
    group = {**default_options(options["algorithm"]), **options}
    for shape in [(9, 14), (3, 12, 8)]:
        x = matrices(shape, "gaussian", 0)
        got = oracle(group, *shape[-2:]).dual(spectra.measure(x, exact=True), x)
        torch.testing.assert_close(got.double(), norm().dual(x), rtol=1e-6, atol=0)


def test_every_quantity_is_explained():
    text = (Path(__file__).parents[2] / "docs/quantities.md").read_text()
    assert [name for name in quantities.QUANTITIES if f"`{name}`" not in text] == []
