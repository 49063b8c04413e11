"""What every algorithm of the table keeps, whoever added it.

Runs over ``ALGORITHMS`` itself, so a new row is tested as soon as it is there.
"""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

from lit_fanions import Fanion, lmo, norms
from lit_fanions.lmo import spectrum as spectra
from lit_fanions.optim.algorithms import ALGORITHMS, oracle
from lit_fanions.optim.options import NAMES, default_options
from tests.lmo.matrices import gaussian

EVERY = list(ALGORITHMS)
BALLS = [name for name, entry in ALGORITHMS.items() if entry.kind == "matrix"]
SHAPES = [(12, 7), (7, 12), (9, 9)]
# Dion's oracle is one power iteration, and Newton-Schulz leaves singular values near 1.
EXACT = {"polar": "exact", "solver": "exact"}


def group_of(algorithm: str, **options: object) -> dict:
    return {**default_options(algorithm), "algorithm": algorithm, **options}


def solved(algorithm: str, m: torch.Tensor, **options: object) -> tuple[lmo.Oracle, torch.Tensor]:
    solver = oracle(group_of(algorithm, **options), *m.shape[-2:])
    start = None
    if columns := solver.basis_columns:
        block = lmo.start_block(m.shape, columns, device=m.device, oversampling=0)
        start = lmo.warmed(m, block)
    return solver, solver.solve(m, warm_start=start).direction


def trained(algorithm: str, steps: int = 3) -> tuple[list[nn.Parameter], Fanion]:
    parameters = [nn.Parameter(gaussian(8, 6)), nn.Parameter(gaussian(5, 9))]
    optimizer = Fanion(parameters, lr=0.05, algorithm=algorithm)
    step(parameters, optimizer, range(steps))
    return parameters, optimizer


def step(parameters: list[nn.Parameter], optimizer: Fanion, seeds: range, bad: float = 0) -> None:
    for seed in seeds:
        for i, p in enumerate(parameters):
            p.grad = gaussian(*p.shape, seed=10 * seed + i) + bad
        optimizer.step()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("algorithm", BALLS)
def test_oracle_attains_its_dual_norm(algorithm, shape):
    m = gaussian(3, *shape).double()
    solver, d = solved(algorithm, m, **EXACT)
    reached = (m * d).sum((-2, -1))
    dual = solver.dual(spectra.measure(m, exact=True), m)
    least = 0.9 if algorithm == "dion" else 1 - 1e-6
    assert (reached >= least * dual).all()
    assert (reached <= dual * (1 + 1e-6)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("algorithm", BALLS)
def test_direction_lies_in_the_ball_of_the_exact_norm(algorithm, shape):
    m = gaussian(*shape).double()
    solver, d = solved(algorithm, m, **EXACT)
    norm = solver.norm()
    with contextlib.suppress(ValueError):  # of blends with a norm that has no coordinates
        assert norm.value(d) <= 1 + (0.5 if algorithm == "dion" else 1e-5)
    if algorithm != "dion":
        torch.testing.assert_close(d, norm.lmo(m), rtol=0, atol=1e-6)
    dual = solver.dual(spectra.measure(m, exact=True), m)
    torch.testing.assert_close(dual, norm.dual(m), rtol=1e-9, atol=0)


@pytest.mark.parametrize("algorithm", BALLS)
def test_direction_has_the_length_that_the_table_says(algorithm):
    for shape in SHAPES:
        m = gaussian(*shape).double()
        solver, d = solved(algorithm, m, **EXACT)
        length = solver.length
        if length is not None:
            assert float(d.norm()) == pytest.approx(length, rel=1e-6)
        alone = lmo.BALLS[ALGORITHMS[algorithm].ball].length(solver.case)
        assert (length is None) == (solver.alpha not in (0, 1) or alone is None)


@pytest.mark.parametrize("algorithm", BALLS)
def test_zero_matrices_have_no_direction_and_broken_ones_nan(algorithm):
    m = torch.stack([torch.zeros(6, 5), gaussian(6, 5), gaussian(6, 5)])
    m[2, 1, 1] = math.inf
    _, d = solved(algorithm, m)
    assert not d[0].any()
    assert d[1].isfinite().all() and d[1].any()
    assert d[2].isnan().all()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("algorithm", BALLS)
def test_direction_does_not_depend_on_the_scale(algorithm, scale):
    m = gaussian(8, 6)
    torch.testing.assert_close(
        solved(algorithm, m * scale)[1], solved(algorithm, m)[1], rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("algorithm", EVERY)
def test_resume_is_bit_equal(algorithm):
    parameters, optimizer = trained(algorithm)
    resumed = copy.deepcopy(parameters)
    loaded = Fanion(resumed, lr=0.9, algorithm=algorithm)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(parameters, optimizer, range(3, 6))
    step(resumed, loaded, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(parameters, resumed, strict=True))


@pytest.mark.parametrize("algorithm", EVERY)
def test_a_skipped_step_leaves_no_trace(algorithm):
    parameters, optimizer = trained(algorithm)
    weights = copy.deepcopy(parameters)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    step(parameters, optimizer, range(3, 5), bad=math.nan)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(p, q) for p, q in zip(parameters, weights, strict=True))
    for index, state in before.items():
        assert after[index].pop("skipped") == state.pop("skipped") + 2
        assert all(torch.equal(after[index][key], state[key]) for key in state)


@pytest.mark.parametrize("algorithm", BALLS)
def test_observed_direction_is_measured_with_its_own_dual(algorithm):
    seen: list = []
    parameters, optimizer = trained(algorithm)
    optimizer.observers = (seen.append,)
    step(parameters, optimizer, range(3, 4))
    assert len(seen) == len(parameters)
    for one in seen:
        moved = float(one.group["lr"]) * one.direction
        torch.testing.assert_close(one.before - one.after, moved, rtol=0, atol=1e-6)
        if one.group["adapt"] != "none":  # the direction has left the ball
            continue
        m = one.momentum
        dual = oracle(one.group, *m.shape[-2:]).dual(spectra.measure(m, exact=True), m)
        quality = (m * one.direction / one.factor).sum((-2, -1)) / dual
        least = 0.5 if algorithm == "dion" else 0.95
        assert (quality > least).all() and (quality < 1.02).all()


@pytest.mark.parametrize("algorithm", EVERY)
def test_every_option_of_a_group_is_declared(algorithm):
    _, optimizer = trained(algorithm, 1)
    (group,) = optimizer.param_groups
    own = {"params", "name", "algorithm"}
    assert set(group) - own == set(default_options(algorithm))
    assert set(group) - own <= set(NAMES)


@pytest.mark.parametrize("shape", [(24, 40), (1, 9), (9, 9)])
@pytest.mark.parametrize("partner", lmo.BALLS)
@pytest.mark.parametrize("algorithm", ["muon", "fanion", "row", "dion"])
def test_every_ball_is_a_partner(algorithm, partner, shape):
    p = nn.Parameter(gaussian(*shape))
    options = {"rank": 2} if algorithm in ("fanion", "dion") else {}
    optimizer = Fanion(
        [p], lr=0.1, algorithm=algorithm, alpha=0.6, blend=partner, momentum=0.0, nesterov=False,
        error_feedback=False, scale="none", **EXACT, **options,
    )  # fmt: skip
    for i in range(3):
        before = p.detach().clone()
        p.grad = gaussian(*shape, seed=i)
        optimizer.step()
    if {"dion", "spectral_unit"} & {algorithm, partner}:  # which are the oracles of no norm
        assert p.isfinite().all()
        return
    (group,) = optimizer.param_groups
    wanted = 0.1 * oracle(group, *shape).norm().lmo(p.grad)
    torch.testing.assert_close((before - p.detach()).double(), wanted, rtol=0, atol=1e-5)


def test_kyfan_takes_the_leading_pair_where_it_dominates():
    u, v = gaussian(8, 1), gaussian(1, 6)
    m = u @ v + 1e-3 * gaussian(8, 6)
    _, d = solved("kyfan", m, rank=3, **EXACT)
    assert torch.linalg.matrix_rank(d, rtol=1e-3) == 1
    torch.testing.assert_close(d.double(), norms.KyFan(3).lmo(m), rtol=0, atol=1e-5)
    flat = gaussian(8, 6)
    _, d = solved("kyfan", flat, rank=3, **EXACT)
    torch.testing.assert_close(d.double(), norms.KyFan(3).lmo(flat), rtol=0, atol=1e-5)


def test_a_scaled_sign_ball_has_the_norm_of_its_radius():
    m = gaussian(5, 4).double()
    for algorithm, options in (
        ("signum", {}),
        ("s_muon", {}),
        ("signum", {"alpha": 0.3, "blend": "row"}),
    ):
        solver, d = solved(algorithm, m, sign_scale=3.0, **options, **EXACT)
        torch.testing.assert_close(d, solver.norm().lmo(m), rtol=0, atol=1e-6)
        dual = solver.dual(spectra.measure(m, exact=True), m)
        torch.testing.assert_close(dual, solver.norm().dual(m))


def test_captured_is_all_of_the_momentum_where_the_rank_is_clamped():
    p = nn.Parameter(gaussian(12, 9))
    with pytest.warns(UserWarning, match="clamped"):
        optimizer = Fanion(
            [p], lr=0.1, algorithm="fanion", rank=64, error_feedback=True, alpha=0.5,
            blend="nuclear", momentum=0.9,
        )  # fmt: skip
    p.grad = gaussian(12, 9)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum"], 0.9 * p.grad)


@pytest.mark.parametrize("solver", ["randomized", "power"])
def test_solvers_that_start_cold_follow_the_seed(solver):
    def run(seed: int) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(80, 60))
        optimizer = Fanion([p], algorithm="neon", solver=solver, solver_steps=1, seed=seed)
        p.grad = gaussian(80, 60)
        optimizer.step()
        return p.detach()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("adapt", ["rows", "entries"])
def test_adapted_steps_without_eps_stay_finite(adapt):
    p = nn.Parameter(torch.zeros(4, 3))
    optimizer = Fanion([p], algorithm="coordinate", adapt=adapt, eps=0.0)
    p.grad = torch.tensor([[0.0, 0.0, 0.0], [1, 2, 3], [0, 0, 1], [0, 0, 0]])
    optimizer.step()
    assert p.isfinite().all() and p.any()


@pytest.mark.parametrize("adapt", ["rows", "entries"])
@pytest.mark.parametrize("algorithm", [name for name in BALLS if name != "cosmos"])
def test_adapted_steps_keep_their_length_and_resume(algorithm, adapt):
    lengths: list[float] = []
    parameters = [nn.Parameter(gaussian(8, 6)), nn.Parameter(gaussian(5, 9))]
    optimizer = Fanion(parameters, lr=0.05, algorithm=algorithm, adapt=adapt)
    plain = Fanion(copy.deepcopy(parameters), lr=0.05, algorithm=algorithm)
    step(parameters, optimizer, range(2))
    step(plain.param_groups[0]["params"], plain, range(2))
    for each in (optimizer, plain):
        each.observers = (lambda seen: lengths.append(float(seen.direction.norm())),)
    weights = copy.deepcopy(parameters)
    resumed = Fanion(weights, lr=0.9, algorithm=algorithm, adapt=adapt)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(parameters, optimizer, range(2, 3))
    step(plain.param_groups[0]["params"], plain, range(2, 3))
    step(weights, resumed, range(2, 3))
    assert lengths[:2] == pytest.approx(lengths[2:], rel=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(parameters, weights, strict=True))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    step(parameters, optimizer, range(3, 4), bad=math.nan)
    after = optimizer.state_dict()["state"]
    keys = [key for key in before[0] if key.startswith("second")]
    assert keys and all(torch.equal(after[i][key], before[i][key]) for i in before for key in keys)
