"""The family of directions and its rank-k solvers, against the exact norms of lit_fanions.norms."""

import dataclasses
import re
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fanions import lmo, norms
from lit_fanions.lmo import singular_triplets
from lit_fanions.lmo.krylov import Lanczos
from tests.lmo.conftest import DeviceBranches
from tests.lmo.matrices import (
    MATRICES,
    attained,
    broken,
    gaussian,
    orthonormal,
    orthonormal_vectors,
    power_law,
    quality,
    with_spectrum,
)

CPU = torch.device("cpu")
# CuPy's is in test_cupy.py.
SOLVERS = [solver for solver in get_args(lmo.Solver) if solver != "cupy"]
ITERATIVE = [solver for solver in SOLVERS if solver not in ("exact", "auto")]


def floor(solver: str, *dtypes: torch.dtype) -> float:
    """The part of <m, oracle> that a solver must attain; power iteration has no oversampling."""
    least = {"exact": 1 - 1e-6, "power": 0.97}.get(solver, 0.99)
    return least - max(torch.finfo(dtype).eps for dtype in dtypes)


def radius(*dtypes: torch.dtype) -> float:
    """How far out of the ball rounding may lead."""
    return 1 + 1e-4 + 4 * max(torch.finfo(dtype).eps for dtype in (torch.float32, *dtypes))


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_rank_k_directions_are_oracles(name, solver):
    m = MATRICES[name]
    for k in (1, 5, 17):
        d = lmo.direction(m, rank=k, solver=solver, polar="exact")
        assert d.shape == m.shape
        assert d.dtype == m.dtype
        assert quality(m, d, norms.KyFanDual(k)) >= floor(solver, m.dtype)
        assert norms.KyFanDual(k).value(d).max() <= radius(m.dtype)
        if name.startswith("zero"):
            assert not d.any()


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_on_a_gpu_they_are_nearly_that(name, solver, products):
    # It has no eigendecomposition of the block that would not wait for the device.
    m = MATRICES[name]
    for k in (1, 5, 17):
        with DeviceBranches():
            d = lmo.direction(m, rank=k, solver=solver, polar="exact")
            u, s, vh = lmo.top_singular(m, k, solver=solver)
        assert orthonormal_vectors(u, vh)
        assert (s[:, 1:] <= s[:, :-1]).all()
        least = {"subspace": 0.96, "randomized": 0.96, "power": 0.9}.get(solver, 0.99)
        assert quality(m, d, norms.KyFanDual(k)) >= least - torch.finfo(m.dtype).eps
        assert norms.KyFanDual(k).value(d).max() <= radius(m.dtype)
        assert d.any() != name.startswith("zero")


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_kyfan_directions_are_oracles(name, solver, products):
    m = MATRICES[name]
    for k in (1, 3, 100):
        d = lmo.direction(m, ball="kyfan", rank=k, solver=solver)
        assert d.shape == m.shape
        assert d.dtype == m.dtype
        assert quality(m, d, norms.KyFan(k)) >= 0.97 - torch.finfo(m.dtype).eps
        assert norms.KyFan(k).value(d).max() <= 1.02


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_triplets_are_orthonormal_descending_and_near(name, solver):
    m = MATRICES[name]
    batch, rows, cols = m.shape
    wanted = torch.float64 if m.dtype == torch.float64 else torch.float32
    for k in (1, 5, 40):
        u, s, vh = lmo.top_singular(m, k, solver=solver)
        n = min(k, rows, cols)
        assert (u.shape, s.shape, vh.shape) == ((batch, rows, n), (batch, n), (batch, n, cols))
        assert {u.dtype, s.dtype, vh.dtype} == {wanted}
        assert orthonormal_vectors(u, vh)
        assert (s >= 0).all()
        largest = s[:, :1].clamp(min=torch.finfo(s.dtype).tiny)
        assert ((s[:, 1:] - s[:, :-1]) / largest <= 1e-6).all()
        exact = torch.linalg.svdvals(m.double())[:, :n]
        rounding = 1e-6 if solver == "exact" else 0.1 if k == 40 or solver == "power" else 0.03
        torch.testing.assert_close(s / largest, (exact / largest).to(s), rtol=0, atol=rounding)


@pytest.mark.parametrize("k", [1, 4, 40])
def test_triplets_are_those_of_the_svd(k):
    m = with_spectrum(power_law(40, 1.0), 50, 40)
    s = torch.linalg.svdvals(m)[:k]
    for solver in ("lanczos", "exact", "auto"):
        u, found, vh = lmo.top_singular(m, k, solver=solver, tol=1e-8)
        torch.testing.assert_close(found, s, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(u.mT @ m @ vh.mT, torch.diag(s), rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("solver", SOLVERS)
def test_singular_values_have_the_scale_of_the_matrix(scale, solver):
    m = gaussian(60, 70) * scale
    tol = 1e-3  # too small for bfloat16
    found = lmo.top_singular(m, 3, solver=solver, tol=tol)
    reference = lmo.top_singular(m.double(), 3, solver=solver, tol=tol).S.float()
    torch.testing.assert_close(found.S / scale, reference / scale, rtol=5e-3, atol=0)
    d = lmo.direction(m, rank=3, solver=solver)
    assert quality(m, d, norms.KyFanDual(3)) >= floor(solver, torch.float32)


@pytest.mark.parametrize("solver", ["lanczos", "subspace", "auto"])
@pytest.mark.parametrize("k", [1, 8])
def test_a_warm_start_is_used(k, solver):
    m = gaussian(100, 80)
    exact = lmo.top_singular(m, k + 8, solver="exact")
    close = torch.linalg.qr(exact.Vh.mT + 0.02 * gaussian(80, k + 8, seed=1)).Q
    for basis in (close, close.to(torch.bfloat16), lmo.top_singular(m, k + 8).Vh.mT):
        warm = lmo.direction(m, rank=k, solver=solver, warm_start=basis)
        assert quality(m, warm, norms.KyFanDual(k)) > 0.99
    cold = lmo.direction(m, rank=k, solver="subspace", solver_steps=1)
    assert quality(m, cold, norms.KyFanDual(k)) < 0.9


@pytest.mark.parametrize("solver", ["randomized", "power"])
def test_the_cold_solvers_take_no_warm_start(solver):
    m = gaussian(100, 80)
    basis = lmo.top_singular(m, 8, solver="exact").Vh.mT
    warm = lmo.direction(m, rank=2, solver=solver, warm_start=basis)
    assert torch.equal(warm, lmo.direction(m, rank=2, solver=solver))


@pytest.mark.parametrize("solver", ["subspace", "randomized", "power"])
def test_more_steps_come_closer(solver):
    m = gaussian(100, 80)
    found = [
        quality(m, lmo.direction(m, rank=3, solver=solver, solver_steps=n), norms.KyFanDual(3))
        for n in (1, 4, 16, 64)
    ]
    assert found == sorted(found)
    assert found[0] < 0.9 < 0.999 < found[-1]
    own = {"subspace": 8, "randomized": 8, "power": 64}[solver]
    assert torch.equal(
        lmo.direction(m, rank=3, solver=solver, solver_steps=own),
        lmo.direction(m, rank=3, solver=solver),
    )


def test_a_broken_matrix_spoils_no_other():
    m = broken(gaussian(60, 70))
    for solver in SOLVERS:
        for warm_start in (None, lmo.start_block(m.shape, 3, device=CPU)):
            options = {"solver": solver, "warm_start": warm_start}
            for part in lmo.top_singular(m, 3, **options):
                assert part[1:3].isnan().all()
                assert part[[0, 3]].isfinite().all()
            d = lmo.direction(m, rank=3, **options)
            assert d[1:3].isnan().all()
            if warm_start is None:
                least = floor(solver, torch.float32)
                assert quality(m[[0, 3]], d[[0, 3]], norms.KyFanDual(3)) >= least


OPTIONS = [
    {},
    {"polar": "exact"},
    {"polar": "quintic", "alpha": 0.7},
    {"rank": 1},
    *[{"rank": 5, "solver": solver} for solver in SOLVERS],
    {"rank": 5, "solver": "lanczos", "tol": 1e-3, "alpha": 0.5, "blend": "sign"},
    {"rank": 5, "solver": "subspace", "alpha": 0.5},
    {"ball": "kyfan", "rank": 3},
    {"ball": "kyfan", "rank": 3, "solver": "lanczos", "alpha": 0.5},
    {"ball": "coordinate"},
    {"ball": "coordinate", "alpha": 0.5},
    {"alpha": 0.0},
    {"alpha": 0.0, "blend": "sign"},
    {"alpha": 0.5, "blend": "sign", "sign_scale": 0.1},
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))
)
class TestDirection:
    def test_batched_is_looped(self, options, products):
        s = power_law(70, 0.7)
        m = torch.stack([with_spectrum(s, 70, 80, seed).float() for seed in range(6)])
        m = m.unflatten(0, (2, 3))
        d = lmo.direction(m, **options)
        for one, alone in zip(d.flatten(0, 1), m.flatten(0, 1), strict=True):
            looped = lmo.direction(alone, **options)
            # Random starts are drawn for the batch as a whole.
            assert (one - looped).norm() <= 0.15 * looped.norm()
            inner = ((x * alone).sum().item() for x in (one, looped))
            assert next(inner) == pytest.approx(next(inner), rel=0.02)

    def test_leaves_its_input_alone(self, options, products):
        for m in (
            gaussian(3, 70, 80),
            gaussian(70, 80),
            gaussian(80, 70).mT,
            gaussian(70, 80).to(products),
        ):
            before = m.clone()
            lmo.direction(m, **options).zero_()
            assert torch.equal(m, before)

    def test_same_call_same_answer_whatever_the_global_seed(self, options, products):
        m = gaussian(70, 80)
        torch.manual_seed(1)
        first = lmo.direction(m, **options)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert torch.equal(lmo.direction(m, **options), first)
        assert torch.equal(torch.get_rng_state(), state)

    def test_zero_and_broken_matrices(self, options, products):
        m = torch.cat([broken(gaussian(70, 80)), torch.zeros(1, 70, 80)])
        d = lmo.direction(m, **options)
        assert d[[0, 3]].isfinite().all()
        assert d[0].any()
        assert d[1:3].isnan().all()
        assert not d[4].any()

    def test_is_scale_invariant(self, options, products):
        m = with_spectrum(power_law(70, 0.7), 70, 80).float()
        d = lmo.direction(m, **options)
        for scale in (1e-20, 0.3, 1e20):
            scaled = lmo.direction(m * scale, **options)
            torch.testing.assert_close(scaled, d, rtol=0, atol=2e-2)

    def test_oracle_may_use_the_memory_of_the_matrices(self, options, products):
        m = gaussian(3, 70, 80)
        known = {f.name for f in dataclasses.fields(lmo.Settings)}
        settings = lmo.Settings(**{k: v for k, v in options.items() if k in known})
        oracle = lmo.Oracle(
            lmo.BALLS[options.get("ball", "fanion")],
            options.get("rank") or 70,
            options.get("alpha", 1.0),
            lmo.BALLS[options.get("blend", "frobenius")],
            settings,
        )
        wanted = lmo.direction(m, **options)
        for overwrite in (False, True):
            d = oracle.solve(m.clone(), overwrite=overwrite).direction
            torch.testing.assert_close(d.to(m.dtype), wanted, rtol=0, atol=1e-6)
            if not oracle.takes_unit(70):
                continue
            x, _ = lmo.unit_frobenius(m, dtype=lmo.polar_dtype(m, settings.polar))
            before = x.clone()
            d = oracle.solve(x, unit=True, overwrite=overwrite).direction
            torch.testing.assert_close(d.to(m.dtype), wanted, rtol=0, atol=1e-6)
            assert overwrite or oracle.alpha != 1 or torch.equal(x, before)


@pytest.mark.parametrize("alpha", [-0.1, 0.0, 0.3, 1.0, 1.1])
@pytest.mark.parametrize("rank", [1, 4, None])
@pytest.mark.parametrize("blend", ("frobenius", "sign", "row", "nuclear"))
def test_blends_are_the_weighted_sums_of_the_oracles(alpha, rank, blend):
    m = gaussian(2, 40, 50)
    inside = norms.Spectral() if rank is None else norms.KyFanDual(rank)
    d = lmo.direction(
        m, rank=rank, alpha=alpha, blend=blend, sign_scale=0.3, polar="exact", solver="exact"
    )
    partner = {"row": norms.MaxRow(), "nuclear": norms.Nuclear()}.get(blend, blend)
    scale = 0.3 if blend == "sign" else 1.0
    exact = norms.Blend(inside, alpha, partner, sign_scale=scale).lmo(m)
    torch.testing.assert_close(d.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("blend", ("frobenius", "sign", "row", "nuclear"))
@pytest.mark.parametrize(
    "ball, rank, norm",
    [
        ("kyfan", 3, norms.KyFan(3)),
        ("kyfan", None, norms.Nuclear()),
        ("coordinate", None, norms.SumEntry()),
        ("row", None, norms.MaxRow()),
        ("column", None, norms.MaxColumn()),
    ],
)
def test_other_balls_blend_too(ball, rank, norm, blend, alpha):
    m = gaussian(2, 40, 50)
    options = {"polar": "exact", "solver": "exact"}
    d = lmo.direction(m, ball=ball, rank=rank, alpha=alpha, blend=blend, **options)
    partner = {"row": norms.MaxRow(), "nuclear": norms.Nuclear()}.get(blend, blend)
    exact = norms.Blend(norm, alpha, partner).lmo(m)
    torch.testing.assert_close(d.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_kyfan_takes_the_longer_of_its_two_vertices(k):
    concentrated = with_spectrum(torch.tensor([10.0] + [0.1] * 19), 20, 30).float()
    spread = with_spectrum(torch.linspace(1, 0.9, 20), 20, 30).float()
    for m in (concentrated, spread):
        d = lmo.direction(m, ball="kyfan", rank=k)
        torch.testing.assert_close(d.double(), norms.KyFan(k).lmo(m), rtol=0, atol=4e-2)
        rank = torch.linalg.matrix_rank(d, atol=0.05)
        assert rank == (1 if m is concentrated and k > 1 else 20)


@pytest.mark.parametrize("name", MATRICES)
def test_the_coordinate_direction_is_the_sign_of_the_largest_entry(name):
    m = MATRICES[name]
    d = lmo.direction(m, ball="coordinate")
    assert d.dtype == m.dtype
    assert quality(m, d, norms.SumEntry()) == pytest.approx(1)
    assert (norms.SumEntry().value(d) == (m.amax((-2, -1)) != 0).double()).all()


# Exact methods turn with their input, the iterative ones have their own bases.
@pytest.mark.parametrize(
    "options",
    [{"rank": 1}, {"rank": 4}, {}, {"ball": "kyfan", "rank": 3}, {"rank": 4, "alpha": 0.5}],
    ids=str,
)
@settings(max_examples=10, deadline=None)
@given(st.integers(5, 30), st.integers(5, 30), st.integers(0, 2**31))
def test_exact_directions_turn_with_their_input(options, rows, cols, seed):
    m = with_spectrum(power_law(min(rows, cols), 0.7), rows, cols)
    q, r = orthonormal(rows, rows, seed), orthonormal(cols, cols, seed + 1)
    options = {"polar": "exact", "solver": "exact", **options}
    turned = lmo.direction(q @ m @ r, **options)
    torch.testing.assert_close(turned, q @ lmo.direction(m, **options) @ r, rtol=0, atol=1e-9)


@st.composite
def problems(draw) -> tuple[torch.Tensor, int]:
    """Matrices of any shape, rank, scale and dtype, of a condition number up to 1e3; and a k."""
    rows, cols = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    rank, power = draw(st.integers(1, min(rows, cols))), draw(st.floats(0, 3))
    m = with_spectrum(torch.logspace(0, -power, rank), rows, cols, draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    scale = draw(st.integers(-25, 25)) if dtype != torch.float16 else draw(st.integers(-1, 3))
    return (m * 10.0**scale).to(dtype), draw(st.integers(1, 62))


anything = settings(max_examples=100, deadline=None)


@anything
@given(problems(), st.sampled_from(SOLVERS))
def test_any_matrix_gets_an_oracle(problem, solver):
    m, k = problem
    d = lmo.direction(m, rank=k, solver=solver, polar="exact")
    assert (d.shape, d.dtype) == (m.shape, m.dtype)
    assert quality(m, d, norms.KyFanDual(k)) >= 0.97 - torch.finfo(m.dtype).eps
    assert norms.KyFanDual(k).value(d) <= radius(m.dtype)
    assert not lmo.direction(m * 0, rank=k, solver=solver).any()


@anything
@given(problems(), st.sampled_from(SOLVERS), st.integers(-25, 25))
def test_scale_changes_no_direction(problem, solver, exponent):
    m, k = problem
    m = m.float() / m.float().abs().max()
    options = {"rank": k, "solver": solver, "polar": "exact"}
    d, scaled = lmo.direction(m, **options), lmo.direction(m * 2.0**exponent, **options)
    dual = norms.KyFan(k).value(m)
    assert attained(m, scaled, dual) == pytest.approx(attained(m, d, dual), abs=0.02)
    assert norms.KyFanDual(k).value(scaled) <= radius()


@anything
@given(problems(), st.integers(1, 62), st.sampled_from(["lanczos", "subspace"]))
def test_a_batch_attains_what_a_loop_does(problem, k, solver):
    m, _ = problem
    m = m.float() / m.float().abs().max()
    batch = torch.stack([m, m.flip(0), m * 0, 1e10 * m])
    d = lmo.direction(batch, rank=k, solver=solver)
    dual = norms.KyFanDual(k).dual(batch)
    looped = torch.stack([lmo.direction(x, rank=k, solver=solver) for x in batch])
    assert attained(batch, d, dual) == pytest.approx(attained(batch, looped, dual), abs=0.02)


class TestRandomStarts:
    @pytest.mark.parametrize("solver", ITERATIVE)
    def test_the_same_seed_gives_the_same_bits(self, solver):
        m = gaussian(2, 60, 70)

        def triplets(seed):
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            state = torch.get_rng_state()
            found = lmo.top_singular(m, 3, solver=solver, solver_steps=1, generator=generator)
            assert torch.equal(torch.get_rng_state(), state)
            return torch.cat([part.flatten() for part in found])

        assert torch.equal(triplets(5), triplets(5))
        assert torch.equal(triplets(None), triplets(0))
        if solver != "lanczos":  # a cycle of which finds everything here
            assert not torch.equal(triplets(5), triplets(6))

    def test_a_start_is_orthonormal_and_drawn_on_the_cpu(self):
        for shape, k, oversampling, width in (
            ((60, 70), 3, 8, 11),
            ((2, 3, 60, 70), 3, 0, 3),
            ((5, 70), 3, 8, 5),
            ((70, 5), 3, 8, 5),
        ):
            block = lmo.start_block(shape, k, device=CPU, oversampling=oversampling)
            assert block.shape == (*shape[:-2], shape[-1], width)
            assert block.dtype == torch.float32
            eye = torch.eye(width).expand(*shape[:-2], width, width)
            torch.testing.assert_close(block.mT @ block, eye, rtol=0, atol=1e-5)
        generator = torch.Generator().manual_seed(3)
        first, second = (lmo.start_block((9, 9), 2, device=CPU, generator=generator) for _ in "ab")
        assert not torch.equal(first, second)


class TestRules:
    """What "auto" does is what ``rules`` says, number by number."""

    @pytest.fixture
    def numbers(self) -> list[list[float]]:
        """The numbers of each rule's condition, in order."""
        pattern = r"\d+(?:\.\d+)?(?:e-?\d+)?"
        return [[float(x) for x in re.findall(pattern, condition)] for condition, _ in lmo.rules()]

    @pytest.fixture
    def chosen(self, monkeypatch):
        """Which solver takes the triplets of a matrix of that shape, and its arguments."""
        calls: list[tuple] = []

        def some(m, k):
            u, s, vh = (
                m.new_zeros(*m.shape[:-1], k),
                m.new_zeros(len(m), k),
                m.new_zeros(len(m), k, m.shape[-1]),
            )
            return u, s, vh

        def lanczos(m, k, start, *, cycles, tol, coarse=None, **rest):
            calls.append(("lanczos", cycles, coarse))
            return Lanczos(*some(m, k), m.new_zeros(len(m), k), 0)

        def subspace(m, basis, *, iterations):
            calls.append(("subspace", iterations))
            return some(m, basis.shape[-1])

        monkeypatch.setattr(singular_triplets, "lanczos", lanczos)
        monkeypatch.setattr(singular_triplets, "subspace", subspace)

        def choice(shape, k=1, *, warm=False, dtype=torch.float32, device="cpu", **options):
            m = torch.zeros(shape, dtype=dtype, device=device)
            if warm:
                options["warm_start"] = torch.zeros(shape[-1], min(k, *shape), device=device)
            calls.clear()
            lmo.top_singular(m, k, **{"solver": "auto", **options})
            return calls[0] if calls else ("exact",)

        return choice

    def test_choices(self):
        assert [choice for _, choice in lmo.rules()] == [
            "solver exact",
            "solver exact",
            "solver subspace, 1 iteration",
            "solver lanczos",
            "searched in bfloat16, improved in float32",
            "polar polar_express, 6 steps",  # test_polar.py
            "its Gram form",  # test_polar.py
        ]

    def test_solvers(self, numbers, chosen):
        (warm_size,), (cold_size, part) = ([int(x) for x in rule] for rule in numbers[:2])
        for shape in (lambda n: (n, 2 * n), lambda n: (2 * n, n)):
            assert chosen(shape(warm_size), warm=True) == ("exact",)
            assert chosen(shape(warm_size + 1), warm=True) == ("subspace", 1)
            assert chosen(shape(max(warm_size, cold_size))) == ("exact",)
            assert chosen(shape(max(warm_size, cold_size) + 1))[0] == "lanczos"
            k = max(warm_size, cold_size)
            assert chosen(shape(part * k), k)[0] == "lanczos"
            assert chosen(shape(part * k - 1), k) == ("exact",)
            assert chosen(shape(part * k - 1), k, warm=True) == ("subspace", 1)

    def test_solvers_of_other_devices(self, chosen):
        assert chosen((4, 5), device="meta")[0] == "lanczos"
        assert chosen((4, 5), device="meta", warm=True) == ("subspace", 1)

    def test_the_choice_is_what_it_is_called(self, numbers):
        size = int(numbers[1][0])
        for rows, solver in ((size + 1, "lanczos"), (size, "exact")):
            m, k = gaussian(rows, size + 60), 2
            auto = lmo.top_singular(m, k, solver="auto")
            for found, named in zip(auto, lmo.top_singular(m, k, solver=solver), strict=True):
                assert torch.equal(found, named)

    def test_searches_in_bfloat16(self, numbers, chosen, products):
        size = int(numbers[4][0])
        fast = torch.bfloat16 if products == torch.bfloat16 else None
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for solver in ("auto", "lanczos"):
                options = {"solver": solver, "dtype": dtype}
                assert chosen((size, size), **options)[2] == fast
                assert chosen((size - 1, size), **options)[2] is None
        assert chosen((size, size), dtype=torch.float64)[2] is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "at least 1, got 0"),
        ({"rank": 2.5}, "at least 1, got 2.5"),
        ({"rank": True}, "at least 1, got True"),
        ({"blend": "box"}, "frobenius, spectral"),
        ({"ball": "box"}, "frobenius, spectral"),
        ({"polar": "newton"}, "jordan"),
        ({"polar": "quintic", "polar_steps": 6}, "exactly 5"),
        ({"polar": "exact", "polar_steps": 6}, "takes no steps"),
        ({"polar_steps": 0}, "at least 1"),
        ({"rank": 1, "solver": "arpack"}, "none of auto, lanczos"),
        ({"rank": 1, "solver": "subspace", "solver_steps": 0}, "at least 1, got 0"),
        ({"rank": 1, "solver": "subspace", "solver_steps": 2.0}, "at least 1, got 2.0"),
        ({"rank": 1, "solver": "exact", "solver_steps": 2}, "takes no solver_steps, got 2"),
        ({"rank": 1, "solver": "auto", "solver_steps": 2}, "takes no solver_steps, got 2"),
        ({"rank": 1, "oversampling": -1}, "at least 0, got -1"),
        ({"rank": 1, "oversampling": 1.5}, "at least 0, got 1.5"),
    ],
    ids=str,
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        lmo.direction(gaussian(4, 5), **options)


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_impossible_numbers_of_triplets(k):
    with pytest.raises(ValueError, match=f"at least 1, got {k}"):
        lmo.top_singular(gaussian(4, 5), k)


@pytest.mark.parametrize(
    "m", [torch.ones(3), torch.ones(3, 3, dtype=torch.int64)], ids=["1d", "int"]
)
def test_what_is_no_matrix(m):
    with pytest.raises(ValueError, match=re.escape(f"got {m.dtype} {tuple(m.shape)}")):
        lmo.direction(m)


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))
)
@pytest.mark.parametrize("shape", [(0, 6, 7), (2, 0, 6, 7)])
def test_an_empty_batch_has_an_empty_answer(shape, options):
    assert lmo.direction(torch.zeros(shape), **options).shape == shape
