"""The tolerance of top_singular is the error of U_k V_k^T."""

import pytest
import torch

from lit_fanions import lmo
from tests.lmo.conftest import DeviceBranches
from tests.matrices import gaussian, power_law, with_spectrum

CLUSTERS = torch.cat([torch.full((n,), s) for n, s in ((5, 1.0), (27, 0.6), (500, 0.2))])


def spectrum(name: str, n: int, seed: int) -> torch.Tensor:
    """Return n singular values, the largest first."""
    noise = 1 + 0.02 * gaussian(n, seed=seed).double()
    return (
        {
            "slow power law": lambda: power_law(n, 0.3),
            "power law": lambda: power_law(n, 0.7),
            "steep power law": lambda: power_law(n, 1.5),
            "exponential": lambda: torch.exp(-torch.arange(n) / (n / 8)),
            "flat": lambda: torch.linspace(1, 0.5, n),
            # Groups of nearly equal values, as the layers of a network begin.
            "clustered": lambda: torch.cat([CLUSTERS[:n], torch.full((n,), 0.2)])[:n] * noise,
            # As a momentum's: a few directions above a bulk.
            "recorded": lambda: power_law(n, 0.5) * noise.log().mul(8).exp() + 0.02,
        }[name]()
        .sort(descending=True)
        .values
    )


SPECTRA = ["slow power law", "power law", "steep power law", "exponential", "flat", "clustered"]
NAMES = ["gaussian", *SPECTRA, "recorded"]


def matrix(name: str, n: int, seed: int) -> torch.Tensor:
    rows, cols = (n, n * 4 // 5) if seed % 2 else (n * 3 // 4, n)
    if name == "gaussian":
        return gaussian(rows, cols, seed=seed)
    return with_spectrum(spectrum(name, min(rows, cols), seed), rows, cols, seed).float()


def errors(m: torch.Tensor, ranks: list[int], tol: float) -> list[float]:
    """Return true errors over the tolerance, where the answer calls the direction determined."""
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    found_errors = []
    for k in ranks:
        found = lmo.lanczos_search(m, k, tol=tol)
        d = found.triplets.U.double() @ found.triplets.Vh.double()
        error = torch.linalg.matrix_norm(d - u[:, :k] @ vh[:k]) / k**0.5
        ky_fan = s[:k].sum()
        assert (m.double() * d).sum() >= (1 - tol) * ky_fan
        if bool(found.determined):
            found_errors.append(float(error) / tol)
        else:
            assert s[k] >= (1 - 2e-4) * s[k - 1]
    return found_errors


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_within_the_tolerance(name):
    for tol in (1e-1, 1e-2, 1e-3):
        assert max(errors(matrix(name, 200, 1), [1, 4, 20, 64], tol)) <= 1


@pytest.mark.slow
def test_the_error_is_within_the_tolerance_for_many_matrices():
    found = []
    for n, seeds in ((200, 6), (500, 4), (1000, 2), (2000, 1)):
        for name in NAMES:
            for seed in range(seeds):
                found += errors(matrix(name, n, seed), [1, 4, 16, 50, 128], 1e-2)
    assert len(found) > 450
    assert sum(error <= 1 for error in found) >= 0.95 * len(found)
    assert max(found) <= 2


def test_copies_at_the_cut_leave_the_direction_open():
    m = with_spectrum(torch.tensor([1.0] * 10 + [0.5] * 200), 300, 250).float()
    inside, at_the_end = (lmo.lanczos_search(m, k, tol=1e-3) for k in (6, 10))
    assert not inside.determined and at_the_end.determined
    assert inside.error > 1 > at_the_end.error
    for k, found in ((6, inside), (10, at_the_end)):
        d = found.triplets.U @ found.triplets.Vh
        assert (m * d).sum() >= (1 - 1e-3) * k
        assert found.residuals.shape == (k,) and (found.residuals <= 1e-3).all()


def test_a_search_says_what_it_cost():
    m = gaussian(2, 3, 80, 60)
    loose, tight = (lmo.lanczos_search(m, 4, tol=tol) for tol in (1e-1, 1e-4))
    assert loose.products < tight.products
    assert loose.error.shape == loose.determined.shape == (2, 3)
    assert tight.error.max() <= 1e-4
    assert all(
        torch.equal(a, b)
        for a, b in zip(tight.triplets, lmo.top_singular(m, 4, tol=1e-4), strict=True)
    )


def test_the_rule_of_the_optimizer_has_a_name_of_its_own():
    m = matrix("flat", 300, 1)
    by_residual = lmo.top_singular(m, 4, residual_tol=1e-2)
    by_error = lmo.top_singular(m, 4, tol=1e-2)
    d = lmo.direction(m, rank=4, solver="lanczos")
    assert torch.equal(d, by_residual.U @ by_residual.Vh)
    assert not torch.equal(d, by_error.U @ by_error.Vh)
    assert torch.equal(
        lmo.direction(m, rank=4, solver="lanczos", tol=1e-2), by_error.U @ by_error.Vh
    )
    for wrong in (-1.0, float("nan")):
        for name in ("tol", "residual_tol"):
            with pytest.raises(ValueError, match=f"{name} must be"):
                lmo.top_singular(m, 4, **{name: wrong})


def test_a_zero_and_a_broken_matrix_have_no_error():
    m = gaussian(3, 80, 60)
    m[1], m[2, 0, 0] = 0, torch.nan
    found = lmo.lanczos_search(m, 4)
    assert found.determined.tolist() == [True, True, False]
    assert found.error[1] == 0 and found.error[2].isnan()


@pytest.mark.parametrize("products", [torch.float32], indirect=True, ids=str)
def test_on_the_branches_for_gpus_the_error_is_within_the_tolerance(products):
    for name in NAMES:
        with DeviceBranches():
            assert max(errors(matrix(name, 200, 1), [4, 20], 1e-2)) <= 1
