"""The trust-region theory: constants against brute force, plans against what they promise."""

import math

import pytest
import torch

from lit_fanions import Fanion, bounds, norms
from tests.matrices import gaussian64
from tests.test_norms import inner

SPECTRAL = [
    norms.Frobenius(),
    norms.Spectral(),
    norms.Nuclear(),
    norms.KyFan(2),
    norms.KyFan(4),
    norms.KyFanDual(3),
    norms.KyFanDual(9),
]
F_BLENDS = [norms.Blend(norm, (0.3, 0.9)[i % 2]) for i, norm in enumerate(SPECTRAL)]
EXACT = [*SPECTRAL, *F_BLENDS, norms.Schatten(1.5), norms.Schatten(3), norms.SumEntry()]
BOUNDED = [
    norms.MaxEntry(),
    norms.MaxRow(),
    norms.MaxColumn(),
    norms.Blend(norms.Spectral(), 0.4, norms.MaxRow()),
    norms.Blend(norms.Schatten(3), 0.4),
    norms.Blend(norms.SumEntry(), 0.4),
    norms.Blend(norms.MaxEntry(), 0.4),
    norms.Blend(norms.Spectral(), 0.4, "sign", 0.3),
    norms.Blend(norms.Nuclear(), 0.4, "sign"),
    norms.Blend(norms.SumEntry(), 0.4, "sign", 2.0),
]
SHAPES = [(5, 5), (4, 7), (7, 3), (1, 5), (5, 1)]


def problem(rows, cols, seed=0):
    """A and B of equation 19: random bases, spectra uniform in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in (rows, cols):
        basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        spectrum = torch.rand(size, dtype=torch.float64, generator=generator)
        made.append((basis.Q * spectrum) @ basis.Q.mT)
    return made


def climb(norm, a, b, steps=30):
    """The largest dual norm of A X B found on the ball, by alternating with the oracle.

    From random matrices, and from some that share the bases of A and B, which arrive sooner.
    """
    shape = (20, a.shape[-1], b.shape[-1])
    starts = gaussian64(*shape)
    bases = [torch.linalg.eigh(matrix).eigenvectors.flip(-1) for matrix in (a, b)]
    aligned = bases[0] @ (starts.abs() * torch.eye(*shape[1:])) @ bases[1].mT
    aligned[0] = torch.outer(bases[0][:, 0], bases[1][:, 0])
    x = norm.lmo(torch.cat([starts, aligned]))
    for _ in range(steps):
        x = norm.lmo(a @ x @ b)
    return norm.dual(a @ x @ b).max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", EXACT, ids=repr)
def test_smoothness_is_attained_and_never_exceeded(norm, shape):
    a, b = problem(*shape)
    found = climb(norm, a, b)
    torch.testing.assert_close(bounds.smoothness(norm, a, b), found, rtol=1e-6, atol=0)
    assert found <= bounds.smoothness(norm, a, b) * (1 + 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", BOUNDED, ids=repr)
def test_bounded_smoothness_is_never_exceeded(norm, shape):
    a, b = problem(*shape)
    ratio = climb(norm, a, b) / bounds.smoothness(norm, a, b)
    assert 0.3 < ratio <= 1 + 1e-12


# Lemmas 7 and 8.


@pytest.mark.parametrize("norm", [*SPECTRAL, F_BLENDS[1], *BOUNDED[:2], BOUNDED[3]], ids=repr)
def test_plan_without_noise_reaches_the_precision(norm):
    a, b = problem(5, 4)
    minimum, x = gaussian64(5, 4), torch.zeros(5, 4, dtype=torch.float64)
    gap = 0.5 * inner(minimum, a @ minimum @ b).item()
    precision = 0.3 * norm.dual(a @ minimum @ b).item()
    plan = bounds.plan(bounds.smoothness(norm, a, b).item(), gap, precision)
    assert plan.momentum == 0
    reached = []
    for _ in range(plan.steps):
        gradient = a @ (x - minimum) @ b
        reached.append(norm.dual(gradient).item())
        x -= plan.lr * norm.lmo(gradient)
    assert min(reached) <= precision


def test_plan_is_that_of_the_descent_inequality():
    smoothness, gap, precision = 3.0, 50.0, 0.2
    plan = bounds.plan(smoothness, gap, precision)
    assert plan == (pytest.approx(precision / smoothness), 7500, 0.0)
    for lr in (0.9 * plan.lr, 1.1 * plan.lr):  # no other lr gets the bound down in as many steps
        assert gap / (lr * plan.steps) + smoothness * lr / 2 > precision


@pytest.mark.parametrize("sigma", [1e-9, 0.1, 0.6, 3.0, 50.0])
def test_plan_with_noise_fulfils_the_inequality(sigma):
    smoothness, gap, precision, rho = 2.0, 7.0, 0.5, 1.5
    lr, steps, momentum = bounds.plan(smoothness, gap, precision, rho=rho, sigma=sigma)
    a, noise = 1 - momentum, rho * sigma
    error = noise / (a * steps) + noise * math.sqrt(a / (2 - a)) + smoothness * lr * (1 - a) / a
    bound = gap / (lr * steps) + smoothness * lr / 2 + 2 * error
    assert bound <= precision * (1 + 1e-9)
    # What the orders of Lemma 8 say, with the constants of ours.
    assert a == pytest.approx(min(1, precision**2 / (16 * noise**2)), rel=1e-6)
    order = min(precision / smoothness, precision**3 / (noise**2 * smoothness))
    assert order / 160 <= lr <= order
    order = max(
        noise / precision,
        (noise / precision) ** 3,
        smoothness * gap / precision**2,
        smoothness * gap * noise**2 / precision**4,
    )
    assert order <= steps <= 1100 * order
    assert steps >= bounds.plan(smoothness, gap, precision).steps


def test_error_of_a_momentum_from_zero_is_within_the_bound():
    # After the scale is taken out: weights a (1 - a)^(k - i) / (1 - (1 - a)^(k + 1)), summed.
    for a in (1.0, 0.7, 0.3, 0.05, 0.004):
        k = torch.arange(round(20 / a), dtype=torch.float64)
        q = (1 - a) ** (k + 1)
        noise = (a / (2 - a) * (1 + q) / (1 - q)).sqrt()
        assert (noise.cumsum(0) <= 1 / a + (k + 1) * math.sqrt(a / (2 - a)) + 1e-9).all()
        drift = (1 - a) / a - (k + 1) * q / (1 - q)  # steps behind, in the mean
        assert (drift <= (1 - a) / a + 1e-12).all()


def test_plan_with_noise_reaches_the_precision():
    norm, sigma = norms.Spectral(), 0.2
    a, b = problem(3, 3)
    minimum = gaussian64(3, 3)
    gap = 0.5 * inner(minimum, a @ minimum @ b).item()
    precision = 0.5 * norm.dual(a @ minimum @ b).item()
    lipschitz, rho = bounds.smoothness(norm, a, b).item(), bounds.rho(norm, 3, 3)
    plan = bounds.plan(lipschitz, gap, precision, rho=rho, sigma=sigma)
    assert 0.5 < plan.momentum < 1
    x = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    optimizer = Fanion(
        [x], lr=plan.lr, momentum=plan.momentum, nesterov=False, scale="none", polar="exact"
    )
    generator, reached = torch.Generator().manual_seed(1), []
    for _ in range(plan.steps):
        gradient = a @ (x.detach() - minimum) @ b
        reached.append(norm.dual(gradient).item())
        noise = torch.randn(3, 3, dtype=torch.float64, generator=generator)
        x.grad = gradient + sigma / 3 * noise
        optimizer.step()
    assert sum(reached) / len(reached) <= precision


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1.0, 1.0), "smoothness must be positive"),
        ((1.0, -1.0, 1.0), "gap must be 0 or more"),
        ((1.0, 1.0, math.nan), "precision must be positive"),
        ((math.inf, 1.0, 1.0), "finite"),
    ],
)
def test_impossible_plans(arguments, message):
    with pytest.raises(ValueError, match=message):
        bounds.plan(*arguments)


# (A3).


@pytest.mark.parametrize("shape", [*SHAPES, (4, 4), (4, 2)])
@pytest.mark.parametrize("norm", [*EXACT, *BOUNDED], ids=repr)
def test_rho_is_attained_and_never_exceeded(norm, shape):
    # Convex maximisation over the Frobenius ball, again by alternating: x is the direction of the
    # answer to x. From random matrices and from plain ones, among them a Hadamard matrix.
    rows, cols = shape
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    hadamard = torch.kron(torch.kron(hadamard, hadamard), hadamard)[:rows, :cols]
    plain = torch.stack([hadamard, torch.ones(shape), torch.eye(*shape)]).double()
    x = torch.cat([gaussian64(20, *shape), plain])
    for _ in range(30):
        x = norm.lmo(x)
    found = torch.linalg.matrix_norm(norm.lmo(x)).max().item()
    expected = bounds.rho(norm, *shape)
    assert found <= expected * (1 + 1e-9)
    exact = norm in EXACT or shape == (4, 4) or 1 in shape
    assert found >= expected * (1 - 1e-6 if exact else 0.9)
    random = gaussian64(20, *shape)
    assert (norm.dual(random) <= expected * torch.linalg.matrix_norm(random) * (1 + 1e-9)).all()


# Input.


def test_smoothness_of_a_batch_is_that_of_its_problems():
    pairs = [problem(4, 6, seed) for seed in range(3)]
    a, b = (torch.stack(matrices) for matrices in zip(*pairs, strict=True))
    for norm in [*EXACT, *BOUNDED]:
        assert not bounds.smoothness(norm, torch.zeros(2, 4, 4), b[0]).any()
        single = torch.stack([bounds.smoothness(norm, *pair) for pair in pairs])
        torch.testing.assert_close(bounds.smoothness(norm, a, b), single)


@pytest.mark.parametrize("norm", [*SPECTRAL, norms.SumEntry(), norms.MaxEntry()], ids=repr)
def test_limits_of_alpha(norm):
    a, b = problem(4, 5)
    frobenius = norms.Frobenius()
    for compute in (lambda n: bounds.smoothness(n, a, b), lambda n: bounds.rho(n, 4, 5)):
        for blend, limit in ((1.0, norm), (0.0, frobenius)):
            blended = torch.as_tensor(compute(norms.Blend(norm, blend)))
            torch.testing.assert_close(blended, torch.as_tensor(compute(limit)))
            near = torch.as_tensor(compute(norms.Blend(norm, abs(blend - 1e-9))))
            torch.testing.assert_close(near, blended, rtol=1e-6, atol=0)


def test_impossible_input_is_refused():
    good, norm = torch.eye(3), norms.Spectral()
    for bad, message in (
        (torch.ones(3, 2), "A must be a square matrix"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "A must be symmetric"),
        (-torch.eye(2), "positive semi-definite"),
    ):
        with pytest.raises(ValueError, match=message):
            bounds.smoothness(norm, bad, good)
    outside = norms.Blend(norm, 1.5)
    for compute in (
        lambda: bounds.smoothness(outside, good, good),
        lambda: bounds.rho(outside, 3, 3),
    ):
        with pytest.raises(ValueError, match="this blend is no norm"):
            compute()
    with pytest.raises(ValueError, match="norm must be one of"):
        bounds.rho(object(), 3, 3)
    with pytest.raises(ValueError, match="at least 1"):
        bounds.rho(norm, 0, 3)


# Generalised smoothness.


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)], (3.0, 2.0)),
        ([(1.0, 5.0)], (5.0, 0.0)),
        ([(2.0, 5.0), (2.0, 7.0)], (6.0, 0.0)),
        ([(1.0, 6.0), (2.0, 3.0)], (4.5, 0.0)),  # a negative slope
        ([(1.0, 1.0), (2.0, 4.0)], (0.0, 1.8)),  # a negative constant
        ([(0.0, 0.0)], (0.0, 0.0)),
    ],
)
def test_fit_of_smoothness_is_the_best_without_negative_numbers(points, expected):
    assert bounds.fit_smoothness(points) == pytest.approx(expected)


@pytest.mark.parametrize("norm", [norms.Spectral(), norms.Nuclear(), norms.KyFan(2)], ids=str)
def test_smoothness_is_computed_where_the_matrices_are(norm):
    # On a device without values as on a GPU: no tensor of another device takes part.
    spectrum = torch.empty(3, dtype=torch.float64, device="meta")
    matrix = spectrum.diag_embed()
    assert bounds._smoothness(norm, matrix, matrix, spectrum).device == spectrum.device
    with torch.device("meta"):
        value = bounds.smoothness(norm, *[torch.eye(3, device="cpu")] * 2)
    assert value == bounds.smoothness(norm, torch.eye(3), torch.eye(3))
