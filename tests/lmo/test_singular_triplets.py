"""The rank-k solvers: their triplets, their starts, and which one auto takes."""

import re

import pytest
import torch

from lit_fanions import lmo, norms
from lit_fanions.lmo import singular_triplets
from lit_fanions.lmo.krylov import Lanczos
from tests.lmo.matrices import (
    MATRICES,
    SOLVERS,
    broken,
    least_quality,
    orthonormal_vectors,
    quality,
)
from tests.matrices import gaussian, power_law, with_spectrum

CPU = torch.device("cpu")
ITERATIVE = [solver for solver in SOLVERS if solver not in ("exact", "auto")]


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


@pytest.mark.parametrize("scale", [1e-40, 1e37])
@pytest.mark.parametrize("solver", ["exact", "lanczos", "randomized"])
def test_cold_searches_take_numbers_at_the_ends_of_the_range(scale, solver):
    m = gaussian(60, 70)
    found = lmo.top_singular((m.double() * scale).float(), 3, solver=solver)
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    difference = found.U @ found.Vh - (u[:, :3] @ vh[:3]).float()
    assert difference.norm() <= 0.02 * 3**0.5
    largest = torch.finfo(torch.float32).max  # where the Frobenius norm is larger
    expected = s[:3] * scale if scale < 1 else torch.full((3,), largest, dtype=torch.float64)
    torch.testing.assert_close(found.S.double() / scale, expected / scale, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("solver", SOLVERS)
def test_singular_values_have_the_scale_of_the_matrix(scale, solver):
    m = gaussian(60, 70) * scale
    tol = 1e-3  # too small for bfloat16
    found = lmo.top_singular(m, 3, solver=solver, tol=tol)
    reference = lmo.top_singular(m.double(), 3, solver=solver, tol=tol).S.float()
    torch.testing.assert_close(found.S / scale, reference / scale, rtol=5e-3, atol=0)
    d = lmo.direction(m, rank=3, solver=solver)
    assert quality(m, d, norms.KyFanDual(3)) >= least_quality(solver, torch.float32)


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
                least = least_quality(solver, torch.float32)
                assert quality(m[[0, 3]], d[[0, 3]], norms.KyFanDual(3)) >= least


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
        return [
            [float(x) for x in re.findall(pattern, condition)]
            for condition, _ in singular_triplets.rules()
        ]

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

        def lanczos(m, k, start, *, cycles, goal, coarse=None, **rest):
            calls.append(("lanczos", cycles, coarse))
            return Lanczos(*some(m, k), m.new_zeros(len(m), k), m.new_zeros(len(m)), 0)

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
        assert [choice for _, choice in singular_triplets.rules()] == [
            "solver exact",
            "solver exact",
            "solver subspace, 1 iteration",
            "solver lanczos",
            "searched in bfloat16, improved in float32",
            "polar polar_express, 6 steps",  # test_newton_schulz.py
            "its Gram form",  # test_newton_schulz.py
        ]

    def test_auto_takes_the_solver_of_the_rules(self, numbers, chosen):
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

    def test_auto_equals_the_solver_that_it_names(self, numbers):
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


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_impossible_numbers_of_triplets_are_refused(k):
    with pytest.raises(ValueError, match=f"at least 1, got {k}"):
        lmo.top_singular(gaussian(4, 5), k)
