"""Thick-restart block Lanczos: triplets, and the residuals that it reports."""

import pytest
import torch

from lit_fanions.lmo import krylov
from lit_fanions.lmo.convergence import Goal
from lit_fanions.lmo.factorisations import noise
from lit_fanions.lmo.krylov import Lanczos, block_width, lanczos
from tests.lmo.conftest import DeviceBranches
from tests.lmo.matrices import CLUSTER, broken, distances, orthonormal_vectors
from tests.matrices import gaussian, power_law, with_spectrum

DTYPES = [torch.float32, torch.float64]
TALL_AND_WIDE = [(120, 90), (90, 120)]
# A wide matrix is searched as its transpose, so that each dtype needs only one of the two.
TALL_OR_WIDE = [((120, 90), torch.float32), ((90, 120), torch.float64)]


def find(m: torch.Tensor, k: int, width: int | None = None, **options) -> Lanczos:
    """Return ``lanczos`` from a random start, by default as wide as a cold start."""
    width = block_width(k, min(m.shape[-2:])) if width is None else width
    start = gaussian(m.shape[-1], width, seed=99).to(m.dtype).expand(len(m), -1, -1)
    options = {"tol": 1e-2, "cycles": 100, "random_start": True, **options}
    goal = Goal(options.pop("tol"), options.pop("error", None))
    return lanczos(m, k, start, goal=goal, **options)


def assert_right(m: torch.Tensor, k: int, found: Lanczos, tol: float) -> None:
    """Assert that the first k triplets are the leading ones and all vectors orthonormal."""
    assert found.U.shape[-1] == found.S.shape[-1] == found.Vh.shape[-2] >= k
    exact = torch.linalg.svdvals(m.double())[..., :k]
    torch.testing.assert_close(found.S[..., :k].double(), exact, rtol=tol, atol=0)
    rounding = 200 * torch.finfo(m.dtype).eps * exact[..., :1] / exact
    assert (distances(m, *found[:3])[..., :k] <= tol + rounding).all()
    assert (found.residuals <= tol + rounding).all()
    assert orthonormal_vectors(found.U, found.Vh)


@pytest.mark.parametrize("tol", [1e-2, 1e-5])
@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("spectrum", ["gaussian", "power law", "condition 1e3", "clustered"])
@pytest.mark.parametrize(("shape", "dtype"), TALL_OR_WIDE)
def test_the_tolerance_is_met(spectrum, shape, k, dtype, tol):
    if spectrum == "gaussian":
        m = gaussian(2, *shape)
    else:
        s = {
            "power law": power_law(90, 0.7),
            "condition 1e3": torch.logspace(0, -3, 90),
            "clustered": torch.tensor([1.0] * 7 + [0.5] * 83),
        }[spectrum]
        m = torch.stack([with_spectrum(s, *shape, seed) for seed in (0, 2)])
    m = m.to(dtype)
    assert_right(m, k, find(m, k, tol=tol), tol)


@pytest.mark.parametrize("k", [1, 8])
def test_a_few_of_many_copies_of_a_singular_value_are_found(k):
    m = with_spectrum(torch.tensor([1.0] * 30 + [0.5] * 60), 120, 90)[None]
    assert_right(m, k, find(m, k), 1e-2)


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
@pytest.mark.parametrize(
    "copies, before, k", [(17, 0, 17), (24, 0, 24), (32, 0, 32), (20, 4, 30), (45, 0, 48)]
)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((220, 210), torch.float32), ((150, 600), torch.float64)]
)
def test_more_copies_of_a_singular_value_than_a_block_has_columns_are_found(
    copies, before, k, shape, tol, dtype
):
    s = torch.tensor([2.0] * before + [1.0] * copies + [0.3] * 60)
    m = with_spectrum(s, *shape)[None].to(dtype)
    found = find(m, k, tol=tol)
    torch.testing.assert_close(found.S[0, :k].double(), s[:k].double(), rtol=1e-3, atol=0)
    assert_right(m, k, found, tol)


@pytest.mark.parametrize("spread", [1e-6, 1e-3, 0.05])
def test_nearly_equal_singular_values_beyond_a_block_are_found(spread):
    s = torch.cat([torch.linspace(1, 1 - spread, 20), torch.full((60,), 0.5)])
    m = with_spectrum(s, 220, 210)[None].float()
    found = find(m, 20)
    torch.testing.assert_close(found.S[0, :20], s[:20], rtol=1e-3, atol=0)


SMALL_BESIDE_THE_LARGEST = {
    "spike of 1e3": torch.cat([torch.tensor([1e3]), torch.linspace(1.5, 0.5, 89)]),
    "spike of 1e4": torch.cat([torch.tensor([1e4]), torch.linspace(1.5, 0.5, 89)]),
    "two spikes": torch.cat([torch.tensor([1e3, 8e2]), torch.linspace(1.5, 0.5, 88)]),
    "halved": 2.0 ** -torch.arange(90).double(),
    "a tenth": 10.0 ** -torch.arange(10).double(),
    "rank 3 and little else": torch.cat([torch.ones(3), torch.linspace(1.5e-4, 5e-5, 87)]),
}


@pytest.mark.parametrize("k, tol", [(4, 1e-2), (8, 1e-2), (4, 1e-6)])
@pytest.mark.parametrize("name", SMALL_BESIDE_THE_LARGEST)
@pytest.mark.parametrize(
    ("shape", "dtype", "scale"),
    [(*TALL_OR_WIDE[0], 1), (*TALL_OR_WIDE[1], 1), ((90, 120), torch.float32, 1e-30)],
)
def test_singular_values_far_below_the_largest_are_found(name, shape, k, tol, dtype, scale):
    m = with_spectrum(SMALL_BESIDE_THE_LARGEST[name], *shape)[None].to(dtype)
    found = find(m * scale, k, tol=tol)
    exact = torch.linalg.svdvals(m.double())[:, :k]
    defined = exact > 100 * torch.finfo(dtype).eps * exact[:, :1]
    found = found._replace(S=found.S / scale)
    true = distances(m, *found[:3])[:, :k]
    rounding = 20 * torch.finfo(dtype).eps * exact[:, :1] / exact
    assert (true <= tol + rounding)[defined].all()
    assert (true <= 1.01 * found.residuals + rounding)[defined].all()
    error = (found.S[:, :k].double() - exact).abs() / exact
    assert (error <= tol**2 + tol / 10 + rounding)[defined].all()


@pytest.mark.parametrize("name", ["gaussian", "spike of 1e4", "a tenth"])
@pytest.mark.parametrize("tol", [1e-6, 1e-9, 0.0])
def test_a_tolerance_below_rounding_ends_with_the_residuals_that_were_reached(tol, name):
    m = gaussian(90, 80) if name == "gaussian" else None
    m = with_spectrum(SMALL_BESIDE_THE_LARGEST[name], 120, 90).float() if m is None else m
    found = find(m[None], 4, tol=tol)
    assert found.products < 4000
    true = distances(m[None], *found[:3])[:, :4]
    rounding = 20 * torch.finfo(m.dtype).eps * found.S[:, :1] / found.S[:, :4]
    assert (found.residuals >= 0.5 * true).all()
    assert (found.residuals <= tol + rounding).all()


def test_a_search_that_ends_too_early_says_so():
    m = gaussian(1, 300, 260)
    found = find(m, 10, tol=1e-5, cycles=1, basis=50)
    true = distances(m, *found[:3])[:, :10].float()
    assert true.max() > 1e-2
    torch.testing.assert_close(found.residuals, true, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("width", [1, 8, 20])
@pytest.mark.parametrize(("shape", "dtype"), TALL_OR_WIDE)
def test_a_warm_start_without_the_leading_vector_finds_it(shape, width, dtype):
    m = torch.stack(
        [with_spectrum(s, *shape) for s in (power_law(90, 0.5), power_law(30, 1), torch.ones(90))]
    ).to(dtype)
    start = torch.linalg.svd(m, full_matrices=False).Vh[:, 1 : width + 1].mT
    found = lanczos(m, 1, start)
    torch.testing.assert_close(found.S[:, 0].double(), torch.ones(3).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_duplicate_and_zero_rows_and_columns(dtype):
    m = gaussian(1, 90, 80).to(dtype)
    m[:, 20:60] = m[:, :1]
    m[:, :, 50:] = 0
    m[:, 60:70] = 0
    for k in (1, 10, 30, 80):
        found = find(m, k)
        wanted = torch.linalg.svdvals(m)[:, :k]
        torch.testing.assert_close(found.S[:, :k], wanted, rtol=1e-3, atol=1e-4)
        assert (found.residuals <= 1e-2).all()
        assert orthonormal_vectors(found.U, found.Vh)


@pytest.mark.parametrize("k", [8, 12])
def test_in_float64_singular_values_beyond_the_rank_are_noise(k):
    s = find(with_spectrum(power_law(3, 1), 80, 70)[None], k).S[0]
    assert (s[3:k] <= noise(s, torch.float64)).all()


@pytest.mark.parametrize("shape", TALL_AND_WIDE)
@pytest.mark.parametrize("basis", [32, 60, None])
@pytest.mark.parametrize("tol", [0.1, 1e-3, 1e-6])
def test_the_residuals_are_those_of_the_triplets(tol, basis, shape):
    m = gaussian(2, *shape).double()
    found = find(m, 4, tol=tol, basis=basis)
    torch.testing.assert_close(
        found.residuals, distances(m, *found[:3])[:, :4], rtol=1e-3, atol=1e-12
    )


def test_in_float64_the_residuals_of_small_singular_values_count_too():
    m = with_spectrum(torch.logspace(0, -12, 60), 80, 70)[None]
    found = find(m, 32, tol=1e-2)  # of which the last is 5e-7
    assert (distances(m, *found[:3])[:, :32] <= 1e-2).all()


def test_the_products_are_those_with_m_and_its_transpose():
    m = gaussian(1, 200, 150)
    found = find(m, 3)
    # 8 columns at a time, once by m and once by m^T; each of the 150 is multiplied at most once.
    # In the end the three triplets are multiplied to compute their residuals.
    assert (found.products - 2 * 3) % 16 == 0
    assert 3 * 16 <= found.products < 2 * 150
    assert find(m, 3, tol=1e-5).products > found.products
    assert find(m.expand(3, -1, -1), 3).products == 3 * found.products


@pytest.mark.parametrize("k, basis", [(3, 32), (3, 40), (10, 60)])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((300, 260), torch.float32), ((260, 300), torch.float64)]
)
def test_restarts_go_on_from_where_the_search_was(k, basis, shape, dtype):
    m = gaussian(1, *shape).to(dtype)
    once = find(m, k, tol=1e-5, basis=basis, cycles=1)
    assert once.residuals.max() > 1e-2
    restarted = find(m, k, tol=1e-5, basis=basis)
    assert_right(m, k, restarted, 1e-5)
    # At least three restarts, each of which multiplies the new vectors of its basis.
    assert restarted.products > 2 * (basis + 3 * (basis - k - 2 * block_width(k, 260)))
    # A cycle that started from scratch would be as inaccurate as the first.
    errors = [find(m, k, tol=0, basis=basis, cycles=n).residuals.max().item() for n in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize("cols", [*range(33, 41), 45])
@pytest.mark.parametrize("cycles", [2, 3, 5])
def test_a_block_may_be_wider_than_what_is_left(cols, cycles):
    # A basis of 32 vectors leaves less than one block of 8, and no residual is below a tol of 0.
    m = gaussian(1, 70, cols).double()
    found = find(m, 3, tol=0, basis=32, cycles=cycles)
    assert orthonormal_vectors(found.U, found.Vh)
    torch.testing.assert_close(found.S[0, 0], torch.linalg.svdvals(m)[0, 0], rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 33), (33, 40), (20, 20), (1, 9), (9, 1), (1, 1), (2, 2)])
def test_all_triplets_are_found(shape, dtype):
    m = gaussian(2, *shape).to(dtype)
    k = min(shape)
    found = find(m, k)
    assert found.U.shape == (2, shape[0], k)
    assert found.Vh.shape == (2, k, shape[1])
    assert_right(m, k, found, 1e-5)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 30])
@pytest.mark.parametrize("shape", TALL_AND_WIDE)
def test_the_start_may_have_any_width(shape, width):
    m = gaussian(2, *shape)
    assert_right(m, 3, find(m, 3, width=width, tol=1e-4), 1e-4)


@pytest.mark.parametrize("rank", [0, 1, 2, 7])
@pytest.mark.parametrize("k", [1, 5, 30])
@pytest.mark.parametrize(("shape", "dtype"), TALL_OR_WIDE)
def test_vectors_of_rank_deficient_matrices_are_orthonormal(k, rank, shape, dtype):
    m = (with_spectrum(power_law(7, 1)[:rank], *shape) if rank else torch.zeros(shape))[None]
    m = m.to(dtype)
    found = find(m, k)
    wanted = torch.linalg.svdvals(m.double())
    torch.testing.assert_close(
        found.S[:, :k].double(), wanted[:, :k], rtol=1e-3, atol=float(1e-5 * wanted[0, 0])
    )
    assert (found.residuals <= 1e-2).all()
    assert orthonormal_vectors(found.U, found.Vh)
    back = (found.U * found.S[:, None]) @ found.Vh
    if k >= rank:
        torch.testing.assert_close(back, m, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [2, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "s", [torch.tensor([1.0] * 6 + [0.5] * 244), torch.ones(250), power_law(35, 0.5)],
    ids=["two values", "one value", "rank 35"],
)  # fmt: skip
def test_an_exhausted_krylov_space_is_extended(s, dtype, width):
    # It has as many dimensions as there are different singular values, times the width.
    m = with_spectrum(s, 260, 250)[None].to(dtype)
    found = find(m, 200, width=width)
    wanted = torch.linalg.svdvals(m.double())[:, :200]
    torch.testing.assert_close(found.S[:, :200].double(), wanted, rtol=1e-3, atol=1e-5)
    assert orthonormal_vectors(found.U, found.Vh)


@pytest.mark.parametrize("tol", [2e-2, 4e-3, 1e-3, 1e-5])
@pytest.mark.parametrize("basis", [40, None])
@pytest.mark.parametrize(("shape", "dtype"), TALL_OR_WIDE)
def test_a_coarse_search_does_not_change_the_accuracy(basis, tol, shape, dtype):
    m = with_spectrum(power_law(90, 0.5), *shape)[None].to(dtype)
    found = find(m, 4, tol=tol, coarse=torch.bfloat16, basis=basis)
    assert_right(m, 4, found, tol)
    true = distances(m, *found[:3])[:, :4].to(dtype)
    torch.testing.assert_close(found.residuals, true, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4, 1e-5])
def test_a_coarse_search_costs_no_more_than_it_saves(tol):
    m = gaussian(1, 300, 260)
    alone = find(m, 4, tol=tol)
    both = find(m, 4, tol=tol, coarse=torch.bfloat16)
    # Products in bfloat16 are several times faster, but never reach residuals this small.
    assert alone.products < both.products < 2 * alone.products


@pytest.mark.parametrize("error", [1e-2, None])
@pytest.mark.parametrize("k", [1, 10])
def test_a_coarse_search_leaves_little_to_the_one_that_decides(k, error, monkeypatch):
    products, search = [], krylov._krylov

    def spy(m, *args, **options):
        found = search(m, *args, **options)
        products.append((m.dtype, found.products))
        return found

    monkeypatch.setattr(krylov, "_krylov", spy)
    m = gaussian(1, 1200, 1100)
    found = find(m, k, error=error, coarse=torch.bfloat16)
    (coarse, many), (fine, few) = products
    assert (coarse, fine) == (torch.bfloat16, torch.float32)
    assert few < 0.3 * many
    if error is None:
        assert_right(m, k, found, 1e-2)
        return
    u, _, vh = torch.linalg.svd(m.double())
    off = (found.U[..., :k] @ found.Vh[..., :k, :]).double() - u[..., :k] @ vh[..., :k, :]
    assert off.norm() < error * k**0.5


@pytest.mark.parametrize("coarse", [None, torch.bfloat16])
@pytest.mark.parametrize("shape", TALL_AND_WIDE)
def test_a_batch_equals_a_loop_over_its_matrices(shape, coarse):
    parts = [
        gaussian(*shape),
        torch.zeros(shape),  # stops at once
        with_spectrum(power_law(1, 1), *shape).float(),
        with_spectrum(torch.tensor([1.0] * 9), *shape).float(),
        with_spectrum(power_law(90, 2), *shape).float(),
        with_spectrum(power_law(90, 0.01), *shape).float(),  # takes longest
    ]
    m = torch.stack(parts)
    batched = find(m, 12, tol=1e-3, coarse=coarse)
    looped = [find(x, 12, tol=1e-3, coarse=coarse) for x in m.split(1)]
    assert batched.products == sum(found.products for found in looped)
    for field in ("S", "residuals"):
        together = torch.cat([getattr(found, field)[:, :12] for found in looped])
        assert torch.equal(getattr(batched, field)[:, :12], together)
    together = torch.cat([found.U[..., :12] @ found.Vh[:, :12] for found in looped])
    assert torch.equal(batched.U[..., :12] @ batched.Vh[:, :12], together)


@pytest.mark.parametrize("shape", TALL_AND_WIDE)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_scale_goes_to_the_singular_values_alone(scale, shape):
    m = gaussian(2, *shape)
    found, scaled = find(m, 3), find(m * scale, 3)
    torch.testing.assert_close(scaled.S[:, :3] / scale, found.S[:, :3], rtol=1e-4, atol=0)
    for field in ("residuals", "U", "Vh"):
        torch.testing.assert_close(
            getattr(scaled, field).abs(), getattr(found, field).abs(), rtol=0, atol=1e-3
        )
    assert scaled.products == found.products


@pytest.mark.parametrize("shape", TALL_AND_WIDE)
def test_a_broken_matrix_spoils_no_other(shape):
    m = broken(gaussian(*shape))
    found = find(m, 3)
    for field in found[:5]:
        assert field[1:3].isnan().all()
    assert_right(m[[0, 3]], 3, Lanczos(*(field[[0, 3]] for field in found[:5]), 0), 1e-2)


@pytest.mark.parametrize(
    ("shape", "k", "basis"),
    [((120, 90), 4, None), ((90, 120), 3, 32), ((120, 90), 30, None), ((90, 120), 90, None)],
)
def test_on_the_branches_for_gpus_a_batch_is_searched_together(k, basis, shape):
    m = torch.stack(
        [
            gaussian(*shape),
            torch.zeros(shape),
            gaussian(*shape) * torch.inf,
            with_spectrum(power_law(90, 0.01), *shape).float(),
            with_spectrum(CLUSTER, *shape).float(),
        ]
    )
    with DeviceBranches():
        found = find(m, k, tol=1e-3, basis=basis)
        alone = [find(x, k, tol=1e-3, basis=basis).products for x in m.split(1)]
    good = [0, 1, 3, 4]
    found_good = Lanczos(*(field[good] for field in found[:5]), found.products)
    exact = torch.linalg.svdvals(m[good])[:, :k]
    torch.testing.assert_close(found_good.S[:, :k], exact, rtol=1e-3, atol=1e-5)
    assert orthonormal_vectors(found_good.U, found_good.Vh)
    assert (found_good.residuals <= 1e-3).all()
    # Rounding decides at which look the slowest of them ends.
    assert found.products <= 1.3 * max(alone)
    for field in found[:5]:
        assert field[2].isnan().all()


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
@pytest.mark.parametrize("k", [1, 8, 40])
@pytest.mark.parametrize("power", [0.0, 0.3, 0.7])
def test_on_the_branches_for_gpus_a_search_ends_two_blocks_later_at_most(power, k, tol):
    m = gaussian(300, 260) if power == 0 else with_spectrum(power_law(260, power), 300, 260)
    m = m[None].float()
    on_cpu = find(m, k, tol=tol)
    with DeviceBranches():
        found = find(m, k, tol=tol)
    assert found.products <= on_cpu.products + 2 * 2 * block_width(k, 260)
    assert (found.residuals <= tol).all()


def test_a_broken_matrix_ends_the_search_at_once():
    m = gaussian(1, 120, 90)
    m[0, 3, 4] = torch.inf
    assert find(m, 4).products < find(gaussian(1, 120, 90), 4).products


def test_a_good_start_saves_products():
    m = gaussian(1, 300, 260)
    cold = find(m, 6, tol=1e-3)
    warm = lanczos(
        m + 0.01 * gaussian(1, 300, 260, seed=1), 6, cold.Vh.mT, goal=Goal(1e-3), cycles=50
    )
    assert warm.products < cold.products
    assert_right(m + 0.01 * gaussian(1, 300, 260, seed=1), 6, warm, 1e-3)


def test_the_start_is_not_changed():
    m, start = gaussian(2, 50, 40), gaussian(2, 40, 8)
    before = m.clone(), start.clone()
    lanczos(m, 3, start, goal=Goal(1e-3), cycles=9)
    assert torch.equal(m, before[0])
    assert torch.equal(start, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_does_not_matter(dtype, device):
    m = torch.stack([gaussian(60, 50), gaussian(60, 50) * torch.nan])
    with device:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            found = lanczos(m, 3, gaussian(2, 50, 8).to(m), goal=Goal(1e-3))
        finally:
            torch.set_default_dtype(before)
    assert [x.dtype for x in found[:5]] == [torch.float32] * 5
    assert_right(m[:1], 3, Lanczos(*(x[:1] for x in found[:5]), 0), 1e-3)
    assert found.S[1].isnan().all()
