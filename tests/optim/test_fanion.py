"""Fanion against three tiers of truth: a float64 reference by SVD, torch's optimizers, itself."""

import copy
import io
import math
import pickle
import platform
import subprocess
import sys
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_fanions import Fanion

# The names, written down a second time: rank, alpha, blend.
NAMES: dict[str, tuple[int | float | str, float, str]] = {
    "muon": ("full", 1.0, "frobenius"),
    "neon": (1, 1.0, "frobenius"),
    "fanion": (0.25, 1.0, "frobenius"),
    "kyfan": (0.25, 1.0, "frobenius"),
    "nsgd": ("full", 0.0, "frobenius"),
    "signum": ("full", 0.0, "sign"),
    "coordinate": ("full", 1.0, "frobenius"),
    "f_muon": ("full", 0.5, "frobenius"),
    "f_neon": (1, 0.5, "frobenius"),
    "f_fanion": (0.25, 0.5, "frobenius"),
    "s_muon": ("full", 0.5, "sign"),
    "s_neon": (1, 0.5, "sign"),
    "s_fanion": (0.25, 0.5, "sign"),
}
MATRIX = [*NAMES, "dion"]
EVERY = [*MATRIX, "adamw", "sgd"]
LOW_RANK = ["neon", "fanion", "f_neon", "f_fanion", "s_neon", "s_fanion"]
SCALES = ["none", "original", "match_rms_adamw", "spectral_unclamped"]
SHAPES = [(8, 4), (4, 8), (5, 5)]
EXACT = {"polar": "exact", "solver": "exact"}


class Case(NamedTuple):
    """What the reference knows of an optimizer."""

    algorithm: str = "muon"
    rank: int | float | str | None = None
    alpha: float | None = None
    blend: str | None = None
    sign_scale: float = 1.0
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0
    scale: str = "original"
    renormalize: bool = False
    error_feedback: bool = False

    def options(self) -> dict[str, Any]:
        return {key: value for key, value in self._asdict().items() if value is not None}


def reference_direction(m: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """D(M) by SVD, and the part of M that it captures."""
    rank, alpha, blend = (
        own if own is not None else named
        for own, named in zip(case[1:4], NAMES[case.algorithm], strict=True)
    )
    limit = min(m.shape)
    k = limit if rank == "full" else round(rank * limit) if isinstance(rank, float) else rank
    k = min(max(1, k), limit)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    d = u[:, :k] @ vh[:k]
    if case.algorithm == "coordinate":
        d = m.sign() * (m.abs() == m.abs().max())
    if case.algorithm == "kyfan":
        d = u[:, :1] @ vh[:1] if s[0] >= s.sum() / k else u @ vh / k
    other = m.sign() * case.sign_scale if blend == "sign" else m / m.norm()
    return alpha * d + (1 - alpha) * other, (u[:, :k] * s[:k]) @ vh[:k]


def reference_step(w: Tensor, m: Tensor, g: Tensor, case: Case) -> None:
    """One step of one matrix, in place: the paper's algorithm, literally."""
    rows, cols = w.shape
    mu, lr = case.momentum, case.lr
    m.copy_(m + g if case.error_feedback else mu * m + (1 - mu) * g)
    n = (1 - mu) * g + mu * m if case.nesterov and not case.error_feedback else m
    d, captured = reference_direction(n, case)
    factor = {
        "none": 1.0,
        "original": max(1.0, rows / cols) ** 0.5,
        "spectral_unclamped": (rows / cols) ** 0.5,
        "match_rms_adamw": 0.2 / d.square().mean().sqrt(),
    }[case.scale]
    if case.renormalize:
        w.mul_(rows**0.5 / w.norm())
    w.copy_((1 - lr * case.weight_decay) * w - lr * factor * d)
    if case.error_feedback:
        m.sub_((1 - mu) * captured)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(normal(*shape, seed=seed, dtype=dtype))


def decaying(rows: int, cols: int, seed: int = 0, condition: float = 1e3) -> Tensor:
    """A matrix whose singular values fall from 1 to 1 / condition, as a momentum's do."""
    k = min(rows, cols)
    u = torch.linalg.qr(normal(rows, k, seed=seed)).Q
    v = torch.linalg.qr(normal(cols, k, seed=seed + 1)).Q
    return (u * torch.logspace(0, -math.log10(condition), k, dtype=torch.float64)) @ v.T


def update(optimizer: Fanion, p: Tensor, grad: Tensor | None) -> Tensor:
    """Steps and returns what was taken from a parameter."""
    before = p.detach().clone()
    p.grad = None if grad is None else grad.to(p.dtype)
    optimizer.step()
    return before - p.detach()


def first_update(shape: tuple[int, ...], grad: Tensor, **options: Any) -> Tensor:
    """What one step from zero with lr 1 takes."""
    p = nn.Parameter(torch.zeros(shape, dtype=options.pop("dtype", grad.dtype)))
    return update(Fanion([p], **{"lr": 1.0, **options}), p, grad)


def assert_follows_reference(
    case: Case, shape: tuple[int, int], steps: int = 4, atol: float = 2e-6
) -> None:
    p = parameter(*shape, seed=1)
    w, m = p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    optimizer = Fanion([p], **case.options(), **EXACT)
    for i in range(steps):
        grad = normal(*shape, seed=10 + i)
        update(optimizer, p, grad)
        reference_step(w, m, grad, case)
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=atol, msg=f"step {i}, {shape}")
        torch.testing.assert_close(optimizer.state[p]["momentum"], m, rtol=0, atol=1e-9)


# Tier 1: exact solvers are the reference.


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("algorithm", NAMES)
def test_every_algorithm_equals_the_reference(algorithm, scale, nesterov):
    for shape in SHAPES:
        assert_follows_reference(Case(algorithm, scale=scale, nesterov=nesterov), shape)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        algorithm=st.sampled_from(["muon", "fanion", "f_muon", "s_fanion"]),
        rank=st.sampled_from([1, 2, 3, 0.3, 0.8, 1.0, "full"]),
        alpha=st.sampled_from([None, 0.0, 0.2, 0.7, 1.0]),
        blend=st.sampled_from([None, "frobenius", "sign"]),
        sign_scale=st.sampled_from([1.0, 0.03]),
        lr=st.floats(0.01, 0.5),
        momentum=st.sampled_from([0.0, 0.5, 0.95]),
        nesterov=st.booleans(),
        weight_decay=st.sampled_from([0.0, 0.3]),
        scale=st.sampled_from(SCALES),
        renormalize=st.booleans(),
        error_feedback=st.just(False),
    ),
    shape=st.sampled_from(SHAPES),
)
def test_every_mixture_of_options_equals_the_reference(case, shape):
    assert_follows_reference(case, shape)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("rank", [1, 2, 0.5])
@pytest.mark.parametrize("algorithm", ["neon", "fanion", "f_neon", "s_fanion"])
def test_error_feedback_equals_the_reference(algorithm, rank, weight_decay):
    case = Case(algorithm, rank=rank, error_feedback=True, weight_decay=weight_decay)
    for shape in SHAPES:
        assert_follows_reference(case, shape)


@pytest.mark.parametrize("algorithm", ["muon", "f_muon", "kyfan", "s_fanion"])
@pytest.mark.parametrize(
    "options", [{}, {"renormalize": True}, {"scale": "match_rms_adamw"}], ids=str
)
def test_float64_parameters_are_stepped_in_float64(algorithm, options):
    assert_follows_reference(Case(algorithm, **options), (8, 4), atol=1e-12)


def index_matrices(shape: tuple[int, ...], layout: str, parts: int) -> list[Tensor]:
    """Which entries of a parameter make up each of its matrices, in torch's own layouts."""
    index = torch.arange(math.prod(shape)).reshape(shape)
    if layout == "batch":
        stacks = index.reshape(-1, *shape[-2:])
        return [part for matrix in stacks for part in matrix.chunk(parts)]
    chunks = index.chunk(parts)
    if layout == "transposed":  # torch keeps in x out / groups
        return [chunk.transpose(0, 1).flatten(1) for chunk in chunks]
    return [chunk.flatten(1) for chunk in chunks]


LAYOUTS = [
    ((6, 4), "flatten", 1),
    ((9, 4), "flatten", 3),
    ((4, 3, 3, 2), "flatten", 1),
    ((6, 2, 3), "flatten", 2),
    ((3, 5, 2, 2), "transposed", 1),
    ((6, 2, 3), "transposed", 3),
    ((3, 5, 4), "batch", 1),
    ((2, 3, 6, 4), "batch", 2),
]


@pytest.mark.parametrize("algorithm", ["muon", "f_fanion", "s_neon", "coordinate", "kyfan"])
@pytest.mark.parametrize(("shape", "layout", "parts"), LAYOUTS)
def test_layouts_and_splits_equal_the_reference(shape, layout, parts, algorithm):
    case = Case(algorithm, weight_decay=0.1, renormalize=True, scale="match_rms_adamw")
    p = parameter(*shape, seed=1)
    w, m = p.detach().flatten().clone(), torch.zeros(p.numel(), dtype=torch.float64)
    splits = None if parts == 1 else parts
    optimizer = Fanion([p], **case.options(), **EXACT, layout=layout, splits=splits)
    for i in range(3):
        grad = normal(*shape, seed=10 + i)
        update(optimizer, p, grad)
        for index in index_matrices(shape, layout, parts):
            one_w, one_m = w[index], m[index]
            reference_step(one_w, one_m, grad.flatten()[index], case)
            w[index], m[index] = one_w, one_m
        torch.testing.assert_close(p.detach().flatten(), w, rtol=0, atol=2e-6)


@pytest.mark.parametrize("algorithm", ["muon", "fanion", "s_neon"])
@pytest.mark.parametrize("sizes", [[2, 3, 4], [3, 3, 3], [8, 1]])
def test_parts_of_given_sizes_step_like_separate_parameters(sizes, algorithm):
    whole = parameter(9, 5)
    parts = [nn.Parameter(part.clone()) for part in whole.detach().split(sizes)]
    fused = Fanion([whole], algorithm=algorithm, splits=sizes, **EXACT, lr=0.02)
    apart = Fanion(parts, algorithm=algorithm, **EXACT, lr=0.02)
    for i in range(3):
        whole.grad = normal(9, 5, seed=i)
        for part, grad in zip(parts, whole.grad.split(sizes), strict=True):
            part.grad = grad.clone()
        fused.step()
        apart.step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]))


# Tier 2: the solvers that users get are close to the exact ones.


@pytest.mark.parametrize("algorithm", [*NAMES, "neon_cold"])
@pytest.mark.parametrize("shape", [(64, 48), (40, 96)])
def test_the_default_solvers_are_close_to_exact_ones(algorithm, shape):
    cold, algorithm = algorithm.endswith("_cold"), algorithm.removesuffix("_cold")
    case = Case(algorithm)
    p = parameter(*shape, dtype=torch.float32)
    w, m = p.detach().double(), torch.zeros(shape, dtype=torch.float64)
    optimizer = Fanion([p], **case.options(), **({"solver": "randomized"} if cold else {}))
    grad = decaying(*shape)
    for i in range(4):
        grad = grad + 0.02 * decaying(*shape, seed=20 + i)  # gradients change slowly
        before = w.clone()
        got = update(optimizer, p, grad).double()
        reference_step(w, m, grad, case)
        want = before - w
        assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.97
        assert 0.8 < got.norm() / want.norm() < 1.2


@pytest.mark.parametrize(
    "polar", ["jordan", "quintic", "polar_express", "cans", "convergent", "exact", "auto"]
)
def test_every_polar_method_steps_almost_along_the_polar_factor(polar):
    grad = decaying(48, 32).float()
    share = {"exact": 0.999, "jordan": 0.85}.get(polar, 0.97)  # jordan never settles at 1
    got = first_update((48, 32), grad, polar=polar, scale="none").double()
    u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
    assert (got * grad).sum() >= share * (u @ vh * grad).sum()


@pytest.mark.parametrize("solver", ["auto", "lanczos", "subspace", "randomized", "power", "exact"])
def test_every_solver_finds_the_leading_directions(solver):
    grad = decaying(64, 80).float()
    got = first_update((64, 80), grad, algorithm="fanion", rank=3, scale="none", solver=solver)
    s = torch.linalg.svdvals(grad.double())
    assert (got.double() * grad).sum() >= 0.99 * s[:3].sum()
    assert got.norm().item() == pytest.approx(3**0.5, rel=1e-3)


# torch's optimizers.


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("shape", [(16, 32), (48, 16), (24, 24)])
def test_muon_agrees_with_torch_step_by_step(shape, scale, nesterov):
    ours, theirs = (parameter(*shape, dtype=torch.float32) for _ in range(2))
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.2}
    fanion = Fanion([ours], polar="jordan", scale=scale, **options)
    muon = torch.optim.Muon([theirs], adjust_lr_fn=scale, **options)
    for i in range(6):
        before = theirs.detach().clone()
        theirs.grad = normal(*shape, seed=i, dtype=torch.float32)
        update(fanion, ours, theirs.grad)
        muon.step()
        moved = (theirs.detach() - before).norm()
        # torch orthogonalises in bfloat16: no two right answers are closer.
        assert (ours.detach() - theirs.detach()).norm() < 0.03 * (i + 1) * moved
    momentum = muon.state[theirs]["momentum_buffer"]
    torch.testing.assert_close(fanion.state[ours]["momentum"], momentum, rtol=0, atol=0)


def test_jordan_is_its_five_steps_in_float64():
    grad = normal(12, 7)
    x = grad.T / grad.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    got = first_update((12, 7), grad, polar="jordan", scale="none")
    torch.testing.assert_close(got, x.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_bit_equal_to_torch(weight_decay, dtype):
    ours = [parameter(5, 3, dtype=dtype), parameter(7, seed=1, dtype=dtype)]
    theirs = copy.deepcopy(ours)
    fanion = Fanion(
        [{"params": ours, "algorithm": "adamw", "lr": 0.01, "momentum": 0.8, "beta2": 0.95,
          "eps": 1e-6, "weight_decay": weight_decay}]
    )  # fmt: skip
    adamw = torch.optim.AdamW(
        theirs, 0.01, (0.8, 0.95), 1e-6, weight_decay=weight_decay, fused=True
    )
    assert_bit_equal_steps(fanion, ours, adamw, theirs)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_bit_equal_to_torch(momentum, nesterov, weight_decay):
    ours = [parameter(5, 3, dtype=torch.float32), parameter(7, dtype=torch.float32)]
    theirs = copy.deepcopy(ours)
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    fanion = Fanion([{"params": ours, "algorithm": "sgd", "lr": 0.1, **options}])
    sgd = torch.optim.SGD(theirs, 0.1, fused=True, **options)
    assert_bit_equal_steps(fanion, ours, sgd, theirs)


def assert_bit_equal_steps(fanion, ours, other, theirs, steps=5):
    for i in range(steps):
        for j, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = normal(*a.shape, seed=100 * i + j).to(a.dtype)
            b.grad = a.grad.clone()
        fanion.step()
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_groups_that_name_their_algorithm_get_torchs_defaults():
    a, b = parameter(3), parameter(3, seed=1)
    optimizer = Fanion(
        [{"params": [a], "algorithm": "adamw", "lr": 1e-3},
         {"params": [b], "algorithm": "sgd", "lr": 1e-3}]
    )  # fmt: skip
    adamw, sgd = optimizer.param_groups
    assert (adamw["momentum"], adamw["beta2"], adamw["eps"]) == (0.9, 0.999, 1e-8)
    assert not sgd["nesterov"]
    assert adamw["weight_decay"] == sgd["weight_decay"] == 0


# Endpoints: one family under many names.

SAME = [
    ({"algorithm": "f_muon", "alpha": 1.0}, {"algorithm": "muon"}),
    ({"algorithm": "s_muon", "alpha": 1.0}, {"algorithm": "muon"}),
    ({"algorithm": "f_muon", "alpha": 0.0}, {"algorithm": "nsgd"}),
    ({"algorithm": "f_neon", "alpha": 0.0}, {"algorithm": "nsgd"}),
    ({"algorithm": "f_fanion", "alpha": 0.0}, {"algorithm": "nsgd"}),
    ({"algorithm": "s_muon", "alpha": 0.0}, {"algorithm": "signum"}),
    ({"algorithm": "s_neon", "alpha": 0.0, "sign_scale": 1.0}, {"algorithm": "signum"}),
    ({"algorithm": "f_neon", "alpha": 1.0}, {"algorithm": "neon"}),
    ({"algorithm": "s_neon", "alpha": 1.0}, {"algorithm": "neon"}),
    ({"algorithm": "fanion", "rank": 1}, {"algorithm": "neon"}),
    ({"algorithm": "fanion", "rank": "full"}, {"algorithm": "muon"}),
    ({"algorithm": "fanion", "rank": 1.0}, {"algorithm": "muon"}),
    ({"algorithm": "fanion", "rank": 6}, {"algorithm": "muon"}),
    ({"algorithm": "muon", "rank": 2}, {"algorithm": "fanion", "rank": 2}),
    ({"algorithm": "neon", "rank": 2}, {"algorithm": "fanion", "rank": 2}),
    ({"algorithm": "f_fanion", "rank": 1}, {"algorithm": "f_neon"}),
    ({"algorithm": "f_fanion", "rank": "full"}, {"algorithm": "f_muon"}),
    ({"algorithm": "s_fanion", "rank": "full"}, {"algorithm": "s_muon"}),
    ({"algorithm": "muon", "alpha": 0.3}, {"algorithm": "f_muon", "alpha": 0.3}),
    ({"algorithm": "muon", "alpha": 0.3, "blend": "sign"}, {"algorithm": "s_muon", "alpha": 0.3}),
    ({"algorithm": "f_neon", "blend": "sign"}, {"algorithm": "s_neon"}),
    ({"algorithm": "s_muon", "alpha": 0.0}, {"algorithm": "signum"}),
    ({"algorithm": "nsgd", "alpha": 0.0}, {"algorithm": "nsgd"}),
    ({"algorithm": "kyfan", "rank": 1}, {"algorithm": "muon"}),
    ({"algorithm": "kyfan", "rank": "full"}, {"algorithm": "neon"}),
]


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("left", "right"), SAME)
def test_endpoints_coincide_with_the_named_algorithms(left, right, scale):
    a, b = parameter(10, 6), parameter(10, 6)
    # The norms of approximate directions differ a little from what Muon's factor assumes.
    solvers = EXACT if scale == "match_rms_adamw" else {}
    first, second = (
        Fanion([p], **options, **solvers, scale=scale, weight_decay=0.1)
        for p, options in ((a, left), (b, right))
    )
    for i in range(4):
        grad = normal(10, 6, seed=i)
        update(first, a, grad)
        update(second, b, grad)
    torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-6)


def test_kyfan_is_muon_over_k_where_nothing_dominates_and_neon_where_something_does():
    even = torch.eye(6).double() + 0.1 * normal(6, 6)
    got = first_update((6, 6), even, algorithm="kyfan", rank=2, **EXACT)
    torch.testing.assert_close(got @ got.T, torch.eye(6).double() / 4, rtol=0, atol=1e-9)
    peaked = even + 100 * torch.outer(normal(6), normal(6, seed=1))
    got = first_update((6, 6), peaked, algorithm="kyfan", rank=2, **EXACT)
    want = first_update((6, 6), peaked, algorithm="neon", **EXACT)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


# Dion, transcribed from arXiv 2504.05295 (centralised).


class LiteralDion:
    """M, Q and W of one matrix."""

    def __init__(self, w: Tensor, q: Tensor, lr: float, mu: float, weight_decay: float) -> None:
        self.w, self.q, self.m = w.clone(), q.clone(), torch.zeros_like(w)
        self.lr, self.mu, self.weight_decay = lr, mu, weight_decay

    def step(self, g: Tensor) -> None:
        rows, cols = g.shape
        self.m = self.m + g
        p, _ = torch.linalg.qr(self.m @ self.q)
        r = self.m.T @ p
        self.m = self.m - (1 - self.mu) * p @ r.T
        self.q = r / r.norm(dim=0)
        self.w = (1 - self.lr * self.weight_decay) * self.w
        self.w = self.w - self.lr * math.sqrt(rows / cols) * p @ self.q.T


@pytest.mark.parametrize("rank", [1, 3, 0.5, "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dion_is_the_published_algorithm(shape, rank):
    if rank == "full":
        rank = 1.0  # all of the matrix, still by power iteration
    p = parameter(*shape)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    optimizer = Fanion([p], algorithm="dion", rank=rank, **options)
    p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()  # makes the state, and leaves everything as it is
    optimizer.param_groups[0]["lr"] = 0.1
    q = optimizer.state[p]["basis0"][0].double()
    assert q.shape[-1] == (rank if isinstance(rank, int) else round(rank * min(shape)))
    literal = LiteralDion(p.detach(), q, 0.1, 0.9, 0.2)
    for i in range(6):
        grad = normal(*shape, seed=i)
        update(optimizer, p, grad)
        literal.step(grad)
        # The basis is kept in float32.
        torch.testing.assert_close(p.detach(), literal.w, rtol=0, atol=1e-5)
        torch.testing.assert_close(optimizer.state[p]["momentum"], literal.m, rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["neon", "fanion", "dion"])
def test_error_feedback_decays_only_what_was_captured(algorithm):
    u, v = (torch.linalg.qr(normal(8, 8, seed=seed)).Q for seed in (1, 2))
    s = torch.tensor([9.0, 7, 3, 2, 1, 0.5, 0.2, 0.1], dtype=torch.float64)
    p = parameter(8, 8)
    rank = {"neon": 1}.get(algorithm, 2)
    optimizer = Fanion(
        [p], algorithm=algorithm, rank=rank, error_feedback=True, momentum=0.6, **EXACT, lr=0.02
    )
    update(optimizer, p, (u * s) @ v.T)
    momentum = optimizer.state[p]["momentum"]
    if algorithm == "dion":  # one power iteration: within its own P only
        basis = momentum.new_tensor(optimizer.state[p]["basis0"][0])
        assert momentum.norm() < ((u * s) @ v.T).norm() and basis.shape == (8, 2)
        return
    kept = (u.T @ momentum @ v).diagonal()
    want = torch.where(torch.arange(8) < rank, 0.6 * s, s)
    torch.testing.assert_close(kept, want, rtol=0, atol=1e-9)


def test_error_feedback_turns_nesterov_off_and_says_so_in_the_group():
    for options in ({"algorithm": "dion"}, {"algorithm": "neon", "error_feedback": True}):
        assert Fanion([parameter(4, 4)], nesterov=True, **options).param_groups[0]["nesterov"] is (
            False
        )


# match_rms_adamw: every update has an RMS of .2 lr.


@pytest.mark.parametrize("blend", ["frobenius", "sign"])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("algorithm", MATRIX)
def test_match_rms_adamw_gives_every_update_the_same_rms(algorithm, alpha, blend):
    if algorithm == "dion" and alpha == 0:
        pytest.skip("refused")
    for shape in [(12, 20), (20, 12), (2, 8, 12)]:
        layout = "flatten" if len(shape) == 2 else "batch"
        options = {"algorithm": algorithm, "alpha": alpha, "blend": blend, "layout": layout}
        got = first_update(
            shape, normal(*shape), scale="match_rms_adamw", lr=0.5, sign_scale=0.2, **EXACT,
            **options,
        )  # fmt: skip
        rms = got.square().mean((-2, -1)).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, 0.1), rtol=1e-5, atol=0)


def test_match_rms_adamw_is_torchs_factor_for_muon():
    got = first_update((12, 20), normal(12, 20), scale="match_rms_adamw", **EXACT)
    u, _, vh = torch.linalg.svd(normal(12, 20), full_matrices=False)
    torch.testing.assert_close(got, 0.2 * math.sqrt(20) * u @ vh, rtol=0, atol=1e-9)


# Non-finite gradients.


def bits(optimizer: Fanion, p: Tensor) -> dict[str, Tensor]:
    state = {key: value.clone() for key, value in optimizer.state[p].items()}
    return {"weight": p.detach().clone(), **state}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("algorithm", EVERY)
def test_a_nonfinite_gradient_skips_its_parameter_alone(algorithm, bad):
    a, b = parameter(8, 6, dtype=torch.float32), parameter(8, 6, seed=1, dtype=torch.float32)
    lonely = parameter(8, 6, seed=1, dtype=torch.float32)
    options = {"algorithm": algorithm, "lr": 0.01, "weight_decay": 0.1}
    if algorithm not in ("adamw", "sgd"):
        options["stack_entries"] = 0  # a product of two matrices at once may round otherwise
    optimizer, other = Fanion([a, b], **options), Fanion([lonely], **options)
    for i in range(5):
        grads = [normal(8, 6, seed=10 * i + j, dtype=torch.float32) for j in range(2)]
        if i in (2, 3):
            grads[0][1, 1] = bad
            before = bits(optimizer, a)
        a.grad, b.grad, lonely.grad = grads[0], grads[1], grads[1].clone()
        optimizer.step()
        other.step()
        if i in (2, 3):
            after = bits(optimizer, a)
            assert after.pop("skipped") == before.pop("skipped") + 1 == i - 1
            assert all(torch.equal(before[key], after[key]) for key in before), "changed"
    assert optimizer.state[b]["skipped"] == 0
    if algorithm not in (*LOW_RANK, "dion", "kyfan"):  # there the random starts differ
        assert torch.equal(b, lonely)
    assert a.isfinite().all() and b.isfinite().all()


@pytest.mark.parametrize("algorithm", ["muon", "neon", "dion", "f_fanion", "adamw", "sgd"])
def test_a_skipped_step_is_a_step_that_never_happened(algorithm):
    a, b = parameter(8, 6), parameter(8, 6)
    options = {"algorithm": algorithm, "lr": 0.01, "renormalize": True}
    if algorithm in ("adamw", "sgd"):
        options.pop("renormalize")
    first, second = Fanion([a], **options), Fanion([b], **options)
    for i in range(4):
        grad = normal(8, 6, seed=i)
        update(first, a, grad)
        if i != 2:
            update(first, a, torch.full_like(grad, math.nan))
        update(second, b, grad)
    assert torch.equal(a, b)


@pytest.mark.parametrize("algorithm", ["muon", "dion", "adamw"])
def test_nonfinite_error_names_the_parameters_and_changes_nothing(algorithm):
    named = [("fine", parameter(6, 4)), ("broken", parameter(6, 4)), ("worse", parameter(6, 4))]
    optimizer = Fanion(named, algorithm=algorithm, nonfinite="error", lr=0.02)
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [bits(optimizer, p) for _, p in named]
    named[1][1].grad[0, 0] = math.nan
    named[2][1].grad[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="broken, worse") as error:
        optimizer.step()
    assert "fine" not in str(error.value)
    for (_, p), old in zip(named, before, strict=True):
        new = bits(optimizer, p)
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_nonfinite_error_names_unnamed_parameters_by_group_and_position():
    p, q = parameter(6, 4), parameter(6, 4)
    optimizer = Fanion([{"params": [p, q], "name": "body"}], nonfinite="error")
    p.grad, q.grad = torch.ones_like(p), torch.full_like(q, math.nan)
    with pytest.raises(FloatingPointError, match=r"body\[1\]"):
        optimizer.step()


@pytest.mark.parametrize("algorithm", EVERY)
def test_propagate_looks_away(algorithm):
    p = parameter(8, 6, dtype=torch.float32)
    optimizer = Fanion([p], algorithm=algorithm, nonfinite="propagate", lr=0.02)
    update(optimizer, p, torch.full((8, 6), math.nan))
    assert p.isnan().any()
    assert optimizer.state[p]["skipped"] == 0


def test_a_finite_gradient_too_large_for_the_momentum_is_no_poison():
    p = parameter(6, 4, dtype=torch.float32)
    optimizer = Fanion([p], momentum_dtype="float16")
    update(optimizer, p, torch.full((6, 4), 1e6))
    update(optimizer, p, normal(6, 4))
    assert p.isfinite().all()
    assert optimizer.state[p]["momentum"].isfinite().all()


def test_grad_scaling_is_left_to_the_scaler():
    assert not hasattr(Fanion([parameter(3, 3)]), "_step_supports_amp_scaling")


# Zero, tiny and huge gradients; dtypes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("algorithm", EVERY)
def test_a_zero_gradient_moves_nothing(algorithm, dtype):
    p = parameter(8, 6, dtype=dtype)
    before = p.detach().clone()
    options = {"scale": "match_rms_adamw"} if algorithm in MATRIX else {}
    optimizer = Fanion([p], algorithm=algorithm, **options, lr=0.02)
    for _ in range(2):
        update(optimizer, p, torch.zeros(8, 6))
    assert torch.equal(p, before)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("algorithm", MATRIX)
def test_directions_do_not_depend_on_the_size_of_gradients(algorithm, size):
    grad = decaying(24, 40, condition=10).float()
    want = first_update((24, 40), grad, algorithm=algorithm)
    got = first_update((24, 40), grad * size, algorithm=algorithm)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-2 * want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("algorithm", EVERY)
def test_every_dtype_steps_like_float32(algorithm, dtype):
    a, b = parameter(8, 6, dtype=torch.float32), parameter(8, 6, dtype=dtype)
    options = {"algorithm": algorithm, "lr": 0.05, "weight_decay": 0.1}
    first, second = Fanion([a], **options), Fanion([b], **options)
    for i in range(3):
        grad = normal(8, 6, seed=i).to(dtype)
        update(first, a, grad.float())
        update(second, b, grad)
    assert b.dtype == dtype
    state = second.state[b]
    assert state.get("momentum", state.get("exp_avg")).dtype == dtype
    torch.testing.assert_close(b.detach().float(), a.detach(), rtol=0.02, atol=0.03)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("algorithm", ["muon", "neon", "f_muon", "s_fanion", "dion", "kyfan"])
def test_momentum_dtype(algorithm, name):
    p = parameter(8, 6, dtype=torch.bfloat16)
    optimizer = Fanion([p], algorithm=algorithm, momentum_dtype=name, lr=0.02)
    for i in range(2):
        update(optimizer, p, normal(8, 6, seed=i))
    assert optimizer.state[p]["momentum"].dtype == getattr(torch, name)
    assert p.dtype == torch.bfloat16 and p.isfinite().all()


def test_momentum_dtype_may_be_a_torch_dtype_and_is_kept_by_name():
    optimizer = Fanion([parameter(3, 3)], momentum_dtype=torch.float32)
    assert optimizer.param_groups[0]["momentum_dtype"] == "float32"


def test_float32_momentum_of_a_bf16_parameter_is_the_exact_average():
    p = parameter(8, 6, dtype=torch.bfloat16)
    optimizer = Fanion([p], momentum_dtype="float32", momentum=0.9)
    want = torch.zeros(8, 6)
    for i in range(5):
        grad = normal(8, 6, seed=i).bfloat16()
        update(optimizer, p, grad)
        want.lerp_(grad.float(), 1 - 0.9)
    torch.testing.assert_close(optimizer.state[p]["momentum"], want, rtol=0, atol=0)


# Options are refused by name.


def two(**options: Any) -> Fanion:
    return Fanion([("w", parameter(6, 4))], **options)


REFUSED = [
    ({"lr": -1.0}, "lr must be a number of at least 0"),
    ({"lr": math.nan}, "lr"),
    ({"lr": math.inf}, "lr"),
    ({"lr": "0.1"}, "lr"),
    ({"lr": True}, "lr"),
    ({"momentum": 1.0}, "momentum must be"),
    ({"momentum": -0.1}, "momentum"),
    ({"weight_decay": -1e-9}, "weight_decay"),
    ({"nesterov": 1}, "nesterov must be true or false"),
    ({"renormalize": "yes"}, "renormalize"),
    ({"error_feedback": 1}, "error_feedback"),
    ({"algorithm": "mion"}, "did you mean 'muon'"),
    ({"algorithm": "adam"}, "did you mean 'adamw'"),
    ({"rank": 0}, "rank must be a whole number"),
    ({"rank": -1}, "rank"),
    ({"rank": 1.5}, "rank"),
    ({"rank": 0.0}, "rank"),
    ({"rank": True}, "rank"),
    ({"rank": "half"}, "rank"),
    ({"alpha": math.nan}, "alpha"),
    ({"alpha": math.inf}, "alpha"),
    ({"alpha": "1"}, "alpha"),
    ({"blend": "frobenious"}, "did you mean 'frobenius'"),
    ({"sign_scale": -1.0}, "sign_scale"),
    ({"polar": "jrdan"}, "jordan"),
    ({"polar": "quintic", "polar_steps": 6}, "exactly 5 steps"),
    ({"polar": "exact", "polar_steps": 3}, "exact"),
    ({"polar_steps": 0}, "steps"),
    ({"solver": "lancos"}, "did you mean 'lanczos'"),
    ({"scale": "orignal"}, "did you mean 'original'"),
    ({"splits": 0}, "splits"),
    ({"splits": []}, "splits"),
    ({"splits": 1.5}, "splits"),
    ({"splits": [2, -2]}, "splits"),
    ({"splits": 4}, "splits 4 does not divide the 6 rows"),
    ({"splits": [2, 2]}, "do not add up to the 6 rows"),
    ({"layout": "flat"}, "did you mean 'flatten'"),
    ({"nonfinite": "skipp"}, "did you mean 'skip'"),
    ({"momentum_dtype": "float23"}, "did you mean 'float32'"),
    ({"momentum_dtype": torch.int32}, "momentum_dtype"),
    ({"seed": 0.5}, "seed"),
    ({"algorithm": "muon", "error_feedback": True}, "error feedback"),
    ({"algorithm": "nsgd", "error_feedback": True, "rank": 2}, "error feedback"),
    ({"algorithm": "dion", "alpha": 0.0}, "alpha"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message) as error:
        two(**options)
    assert "\n" not in str(error.value)


GROUP_REFUSED = [
    *REFUSED,
    ({"nesterv": True}, "did you mean 'nesterov'"),
    ({"betas": (0.9, 0.99)}, "betas"),
    ({"beta2": 0.9}, "beta2"),
    ({"name": "matrix"}, "name"),
    ({"name": 3}, "name"),
    ({"algorithm": "adamw"}, "set lr"),
    ({"algorithm": "adamw", "lr": 0.1, "rank": 2}, "rank"),
    ({"algorithm": "adamw", "lr": 0.1, "beta2": 1.0}, "beta2"),
    ({"algorithm": "adamw", "lr": 0.1, "eps": -1.0}, "eps"),
    ({"algorithm": "sgd", "lr": 0.1, "beta2": 0.9}, "beta2"),
]


def snapshot(optimizer: Fanion) -> Any:
    groups = [{**group, "params": [*map(id, group["params"])]} for group in optimizer.param_groups]
    return copy.deepcopy(groups), len(optimizer.state)


@pytest.mark.parametrize(("options", "message"), GROUP_REFUSED)
def test_add_param_group_refuses_what_the_constructor_refuses(options, message):
    optimizer = Fanion([{"params": [("a", parameter(6, 4))], "name": "matrix"}])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("w", parameter(6, 4))], **options})
    assert snapshot(optimizer) == before
    group = {"params": [("w", parameter(6, 4))], **options}
    with pytest.raises(ValueError, match=message):
        Fanion([{"params": [("a", parameter(6, 4))], "name": "matrix"}, group])


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        (lambda p: [nn.Parameter(torch.ones(4))], ValueError, r"\(4,\), which is no matrix"),
        (lambda p: [nn.Parameter(torch.ones(()))], ValueError, "no matrix"),
        (lambda p: [nn.Parameter(torch.ones(2, 2, dtype=torch.cfloat))], TypeError, "complex"),
        (lambda p: [torch.ones(3, 3, dtype=torch.int)], TypeError, "int32"),
        (lambda p: [p], ValueError, "more than one"),
        (lambda p: {p}, TypeError, "set"),
        (lambda p: ["w"], TypeError, "str"),
    ],
)
def test_impossible_parameters_are_refused_and_leave_no_trace(params, kind, message):
    p = parameter(6, 4)
    optimizer = Fanion([p])
    before = snapshot(optimizer)
    with pytest.raises(kind, match=message):
        optimizer.add_param_group({"params": params(p), "name": "new"})
    assert snapshot(optimizer) == before
    optimizer.add_param_group({"params": [parameter(6, 4)], "name": "new"})  # the name is free


def test_a_group_must_be_a_dict():
    with pytest.raises(TypeError, match="dict"):
        Fanion([parameter(3, 3)]).add_param_group([parameter(3, 3)])


@pytest.mark.parametrize("algorithm", ["nsgd", "signum", "coordinate", "adamw", "sgd"])
def test_entrywise_algorithms_take_any_shape(algorithm):
    ps = [parameter(*shape) for shape in [(), (5,), (3, 4), (2, 3, 4), (2, 2, 2, 2)]]
    optimizer = Fanion(ps, algorithm=algorithm, lr=0.1)
    before = [p.detach().clone() for p in ps]
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < old).any() for p, old in zip(ps, before, strict=True))


@pytest.mark.parametrize("options", [{"rank": 2}, {"polar": "jordan"}, {"alpha": 0.3}])
def test_options_that_the_constructors_algorithm_lacks_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Fanion([parameter(4, 4)], algorithm="adamw", lr=1e-3, **options)


def test_every_group_has_a_unique_name_of_its_own():
    groups = [{"params": [parameter(4, 4)]} for _ in range(3)]
    groups.append({"params": [parameter(4, 4)], "algorithm": "neon"})
    optimizer = Fanion(groups)
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["muon", "muon_1", "muon_2", "neon"]


@pytest.mark.parametrize("algorithm", EVERY)
def test_every_option_stands_in_the_group(algorithm):
    group = Fanion([("w", parameter(8, 6))], algorithm=algorithm, lr=0.1).param_groups[0]
    want = {"lr", "momentum", "weight_decay", "nonfinite", "name", "param_names"}
    if algorithm in MATRIX:
        want |= {
            "nesterov", "rank", "alpha", "blend", "sign_scale", "polar", "polar_steps", "solver",
            "scale", "renormalize", "error_feedback", "splits", "momentum_dtype",
        }  # fmt: skip
    assert want <= group.keys()
    assert group["param_names"] == ["w"]


def test_explicit_options_win_over_the_name_but_not_over_another_groups_name():
    first, second, third = Fanion(
        [
            {"params": [parameter(8, 8)]},
            {"params": [parameter(8, 8)], "algorithm": "neon"},
            {"params": [parameter(8, 8)], "algorithm": "f_muon", "alpha": 0.9},
        ],
        algorithm="fanion",
        rank=3,
        weight_decay=0.1,
    ).param_groups
    assert (first["rank"], second["rank"], third["rank"]) == (3, 1, "full")
    assert third["alpha"] == 0.9
    assert first["weight_decay"] == second["weight_decay"] == 0.1


def test_defaults_hold_only_what_every_group_has():
    optimizer = Fanion([parameter(3, 3)])
    assert set(optimizer.defaults) == {"lr", "momentum", "weight_decay", "algorithm"}


def count_warnings(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("alpha", [-0.5, 1.5])
def test_alpha_outside_the_unit_interval_warns_once_and_works(alpha):
    p = parameter(6, 4)

    def train() -> None:
        optimizer = Fanion([p], algorithm="f_muon", alpha=alpha)
        for i in range(3):
            update(optimizer, p, normal(6, 4, seed=i))

    (message,) = count_warnings(train)
    assert str(alpha) in message and "[0, 1]" in message
    assert_follows_reference(Case("f_muon", alpha=alpha), (6, 4))


@pytest.mark.parametrize("algorithm", ["fanion", "f_fanion", "dion"])
def test_a_rank_beyond_the_matrix_is_clamped_with_one_warning(algorithm):
    ps = [parameter(8, 6), parameter(12, 3), parameter(2, 9)]

    def train() -> None:
        optimizer = Fanion(ps, algorithm=algorithm, rank=4, lr=0.02)
        for _ in range(2):
            for p in ps:
                p.grad = normal(*p.shape)
            optimizer.step()

    (message,) = count_warnings(train)
    assert "rank 4" in message and "clamped" in message


def test_fractions_never_warn_and_round_to_at_least_one():
    assert not count_warnings(lambda: Fanion([parameter(3, 90)], algorithm="fanion", rank=0.01))
    case = Case("fanion", rank=0.01)
    assert_follows_reference(case, (3, 5))


# state_dict and load_state_dict.


def trained(algorithm: str, steps: int, dtype=torch.float32, **options: Any):
    """A parameter, its optimizer after some steps, and nothing random but the seeds."""
    named = [("a", parameter(40, 48, dtype=dtype)), ("b", parameter(48, 40, seed=1, dtype=dtype))]
    optimizer = Fanion(named, algorithm=algorithm, lr=0.01, **options)
    run(optimizer, 0, steps)
    return [p for _, p in named], optimizer


def run(optimizer: Fanion, start: int, steps: int) -> None:
    for i in range(start, start + steps):
        for j, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = normal(*p.shape, seed=1000 * i + j).to(p.dtype)
        optimizer.step()


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_state(first: Fanion, second: Fanion) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert state.keys() == b["state"][index].keys()
        for key, value in state.items():
            assert value.dtype == b["state"][index][key].dtype, key
            assert torch.equal(value, b["state"][index][key]), key


@pytest.mark.parametrize("algorithm", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bit_equal_to_the_uninterrupted_one(algorithm, dtype):
    straight, optimizer = trained(algorithm, 3, dtype)
    state = through_a_file(optimizer.state_dict())
    weights = [p.detach().clone() for p in straight]
    run(optimizer, 3, 3)

    resumed, other = trained(algorithm, 0, dtype)
    with torch.no_grad():
        for p, weight in zip(resumed, weights, strict=True):
            p.copy_(weight)
    other.load_state_dict(state)
    run(other, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert_same_state(optimizer, other)


@pytest.mark.parametrize("algorithm", ["neon", "fanion", "f_neon", "kyfan", "dion"])
def test_bases_are_part_of_the_state_from_the_first_step(algorithm):
    (p, _), optimizer = trained(algorithm, 1, rank=2)
    basis = optimizer.state[p]["basis0"]
    assert basis.shape[:2] == (1, p.shape[1])
    assert basis.isfinite().all()


def test_the_state_is_complete_after_one_step_without_some_gradients():
    named = [("a", parameter(8, 6)), ("b", parameter(8, 6)), ("c", parameter(4))]
    optimizer = Fanion(
        [{"params": named[:2], "algorithm": "neon"},
         {"params": named[2:], "algorithm": "adamw", "lr": 0.1}]
    )  # fmt: skip
    named[0][1].grad = normal(8, 6)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert state[0].keys() == state[1].keys() == {"momentum", "basis0", "skipped"}
    assert state[2].keys() == {"step", "exp_avg", "exp_avg_sq", "skipped"}
    assert torch.equal(named[1][1], normal(8, 6))


@pytest.mark.parametrize("algorithm", ["neon", "dion"])
def test_the_seed_decides_the_run(algorithm):
    def first_basis(seed: int) -> Tensor:
        (p, _), optimizer = trained(algorithm, 0, seed=seed)
        optimizer.step()
        return optimizer.state[p]["basis0"]

    assert torch.equal(first_basis(1), first_basis(1))
    assert not torch.equal(first_basis(1), first_basis(2))


def test_loading_keeps_the_momentum_dtype():
    (p, _), optimizer = trained("fanion", 3, torch.bfloat16, momentum_dtype="float32")
    (q, _), other = trained("fanion", 0, torch.bfloat16, momentum_dtype="float32")
    other.load_state_dict(optimizer.state_dict())
    for key, dtype in (("momentum", torch.float32), ("skipped", torch.int64)):
        assert other.state[q][key].dtype == dtype
        assert torch.equal(other.state[q][key], optimizer.state[p][key])


def test_adamw_of_bf16_parameters_keeps_its_step_count_exact():
    p, q = (parameter(4, 4, dtype=torch.bfloat16) for _ in range(2))
    optimizer, other = (Fanion([x], algorithm="adamw", lr=1e-3) for x in (p, q))
    run(optimizer, 0, 2)
    optimizer.state[p]["step"].fill_(1001.0)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.state[q]["step"].item() == 1001 and other.state[q]["step"].dtype == torch.float32


def build(groups: list[tuple[str, str, list[tuple[str, tuple[int, ...]]]]]) -> Fanion:
    return Fanion(
        [
            {"name": name, "algorithm": algorithm, "lr": 0.1,
             "params": [(leaf, parameter(*shape)) for leaf, shape in leaves]}
            for name, algorithm, leaves in groups
        ]
    )  # fmt: skip


SAVED = [("matrix", "muon", [("w", (4, 3))]), ("other", "adamw", [("b", (4,))])]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([("matrices", "muon", SAVED[0][2]), SAVED[1]], "'matrix' there, 'matrices' here"),
        ([("matrix", "neon", SAVED[0][2]), SAVED[1]], "'muon' there, 'neon' here"),
        ([("matrix", "muon", [("v", (4, 3))]), SAVED[1]], "'w' there, 'v' here"),
        ([("matrix", "muon", [("w", (3, 4))]), SAVED[1]], r"\(4, 3\).*\(3, 4\)"),
        ([SAVED[0], ("other", "adamw", [("b", (5,))])], r"\(4,\).*\(5,\)"),
        ([SAVED[0]], "groups"),
        ([*SAVED, ("more", "sgd", [("c", (2,))])], "groups"),
        ([SAVED[0], ("other", "adamw", [("b", (4,)), ("c", (4,))])], "'c' here"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(groups, message):
    saved, optimizer = build(SAVED), build(groups)
    run(saved, 0, 1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved.state_dict())
    assert snapshot(optimizer) == before


def test_a_checkpoint_with_another_number_of_unnamed_parameters_is_refused_in_words():
    saved = Fanion([parameter(4, 3), parameter(4, 3)])
    with pytest.raises(ValueError, match=r"param|group") as error:
        Fanion([parameter(4, 3)]).load_state_dict(saved.state_dict())
    assert "zip()" not in str(error.value)


def test_a_checkpoint_of_another_optimizer_is_refused():
    p = parameter(4, 3)
    with pytest.raises(ValueError, match="checkpoint"):
        Fanion([p]).load_state_dict(torch.optim.AdamW([p]).state_dict())


def test_loading_takes_the_options_that_may_change():
    saved = two(lr=0.3, algorithm="f_muon", alpha=0.7)
    run(saved, 0, 1)
    optimizer = two(lr=0.1, algorithm="f_muon")
    optimizer.load_state_dict(saved.state_dict())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["alpha"]) == (0.3, 0.7)


def test_loading_leaves_the_given_dict_alone():
    saved = two()
    run(saved, 0, 1)
    state = copy.deepcopy(saved.state_dict())
    optimizer = two()
    optimizer.load_state_dict(state_dict=state)
    assert str(state) == str(saved.state_dict())


@pytest.mark.parametrize("algorithm", ["neon", "dion", "f_muon", "adamw"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(algorithm, how):
    _, optimizer = trained(algorithm, 2)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert twin.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    run(optimizer, 2, 2)
    run(twin, 2, 2)
    for p, q in zip(*(o.param_groups[0]["params"] for o in (optimizer, twin)), strict=True):
        assert torch.equal(p, q)
    assert_same_state(optimizer, twin)


@pytest.mark.parametrize("how", ["load", "pickle", "deepcopy"])
def test_groups_added_later_get_the_constructors_options(how):
    _, optimizer = trained("fanion", 2, rank=3, weight_decay=0.1)
    if how == "load":
        _, other = trained("fanion", 0, rank=3, weight_decay=0.1)
        other.load_state_dict(optimizer.state_dict())
        optimizer = other
    else:
        optimizer = copy.deepcopy(optimizer) if how == "deepcopy" else (
            pickle.loads(pickle.dumps(optimizer))
        )  # fmt: skip
    optimizer.add_param_group({"params": [("c", parameter(9, 7, dtype=torch.float32))]})
    group = optimizer.param_groups[1]
    assert (group["rank"], group["weight_decay"], group["name"]) == (3, 0.1, "fanion_1")
    run(optimizer, 2, 2)
    with pytest.raises(ValueError, match="did you mean"):
        optimizer.add_param_group({"params": [("d", parameter(9, 7))], "algoritm": "muon"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_may_get_another_rank_in_the_middle(dtype):
    p = parameter(64, 64, dtype=dtype)
    optimizer = Fanion([p], algorithm="fanion", rank=4, scale="none", lr=1.0, nesterov=False)
    grad = decaying(64, 64)
    for rank in (4, 20, 2):
        optimizer.param_groups[0]["rank"] = rank
        got = update(optimizer, p, grad)
        # The rank of what was taken: U_k V_k^T has norm sqrt(k).
        assert got.float().norm().item() == pytest.approx(rank**0.5, rel=0.02)


@pytest.mark.parametrize("algorithm", ["muon", "fanion", "dion"])
def test_a_rank_lowered_from_full_is_warm_started(algorithm):
    p, grad = parameter(80, 64, dtype=torch.float32), decaying(80, 64)
    options = {"scale": "none", "lr": 1.0, "nesterov": False, "error_feedback": False}
    optimizer = Fanion([p], algorithm=algorithm, rank="full", **options, lr=0.02)
    update(optimizer, p, grad)
    optimizer.param_groups[0]["rank"] = 4
    for _ in range(3):
        d = update(optimizer, p, grad)
    captured = (d * grad).sum().abs() / torch.linalg.svdvals(grad)[:4].sum()
    assert captured > 0.99
    width = 4 if algorithm == "dion" else 12
    assert optimizer.state[p]["basis0"].shape == (1, 64, width)


def test_a_group_may_get_another_oversampling_or_solver_in_the_middle():
    p, q = parameter(40, 30), parameter(40, 30, seed=1)
    optimizer = Fanion([p, q], algorithm="fanion", rank=3)
    (group,) = optimizer.param_groups
    for options, width in (
        ({"oversampling": 5}, 8),
        ({"oversampling": 0}, 3),
        ({"oversampling": 99}, 30),
        ({"oversampling": 2, "rank": 8}, 10),
        ({"solver": "exact"}, None),
        ({"solver": "subspace"}, 10),
        ({"rank": "full"}, None),
        ({"rank": 2}, 4),
    ):
        group.update(options)
        p.grad, q.grad = normal(40, 30), normal(40, 30, seed=1)
        optimizer.step()
        for x in (p, q):
            basis = optimizer.state[x].get("basis0")
            assert (None if basis is None else basis.shape[-1]) == width
            if basis is not None:
                eye = torch.eye(width, dtype=basis.dtype)
                torch.testing.assert_close(basis.mT @ basis, eye[None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [{"rank": 4}, {"rank": 20}, {"rank": 7, "oversampling": 12}])
@pytest.mark.parametrize("algorithm", ["muon", "fanion", "dion"])
def test_a_run_resumed_across_a_new_basis_is_bit_equal(algorithm, change):
    def changed(optimizer: Fanion) -> None:
        optimizer.param_groups[0].update(change)
        run(optimizer, 3, 3)

    straight, optimizer = trained(algorithm, 3)
    state = through_a_file(optimizer.state_dict())
    weights = [p.detach().clone() for p in straight]
    changed(optimizer)
    resumed, other = trained(algorithm, 0)
    with torch.no_grad():
        for p, weight in zip(resumed, weights, strict=True):
            p.copy_(weight)
    other.load_state_dict(state)
    changed(other)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert_same_state(optimizer, other)
    width = change["rank"] + (change.get("oversampling", 8) if algorithm != "dion" else 0)
    assert optimizer.state[straight[0]]["basis0"].shape[-1] == width


@pytest.mark.parametrize(
    ("start", "later"), [("error", "skip"), ("propagate", "skip"), ("skip", "error")]
)
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_group_may_get_another_policy_in_the_middle(algorithm, start, later):
    p = parameter(6, 4)
    optimizer = Fanion([p], algorithm=algorithm, nonfinite=start, lr=0.02)
    update(optimizer, p, normal(6, 4))
    optimizer.param_groups[0]["nonfinite"] = later
    assert update(optimizer, p, normal(6, 4)).abs().sum() > 0


# With the rest of torch.


def test_schedulers_of_torch_drive_every_group():
    optimizer = build(SAVED)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda i: 0.5**i, lambda i: 1.0])
    run(optimizer, 0, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4, eta_min=0.01)
    for i in range(4):
        run(optimizer, i, 1)
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.01])


def test_lambda_lr_has_a_factor_for_each_group():
    optimizer = build(SAVED)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda i: 0.5**i, lambda i: 1 + i])
    run(optimizer, 0, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.2])


def test_one_cycle_cycles_the_momentum_of_every_group():
    optimizer = build(SAVED)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[0.2, 0.01], total_steps=10, cycle_momentum=True,
        base_momentum=0.8, max_momentum=0.95,
    )  # fmt: skip
    seen = []
    for i in range(9):
        seen.append([group["momentum"] for group in optimizer.param_groups])
        run(optimizer, i, 1)
        schedule.step()
    assert min(m for m, _ in seen) == pytest.approx(0.8)
    assert seen[0] == pytest.approx([0.95, 0.95]) and all(a == b for a, b in seen)
    other = build(SAVED)
    other.load_state_dict(through_a_file(optimizer.state_dict()))  # its keys stand in the groups
    assert other.param_groups[0]["max_lr"] == 0.2


def test_lr_zero_freezes_the_weights_but_not_the_momentum():
    optimizer = two(lr=0.0, weight_decay=0.1, renormalize=True)
    (p,) = optimizer.param_groups[0]["params"]
    before = p.detach().clone()
    update(optimizer, p, normal(6, 4, seed=3))
    assert torch.equal(p, before)
    assert optimizer.state[p]["momentum"].norm() > 0


def test_a_grad_scaler_skips_infinite_steps_and_unscales_others():
    a, b = parameter(6, 4, dtype=torch.float32), parameter(6, 4, dtype=torch.float32)
    scaled, plain = Fanion([a], algorithm="nsgd"), Fanion([b], algorithm="nsgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(4):
        grad = normal(6, 4, seed=i, dtype=torch.float32)
        broken = i == 1
        b.grad, a.grad = grad.clone(), grad * scaler.get_scale()
        if broken:
            a.grad[0, 0] = math.inf
        else:
            plain.step()
        before = a.detach().clone()
        scaler.scale(torch.zeros((), requires_grad=True))
        scaler.step(scaled)
        scaler.update()
        assert torch.equal(a, before) == broken
    torch.testing.assert_close(a.detach(), b.detach())
    assert scaler.get_scale() == 512
    assert scaled.state[a]["skipped"] == 0  # the scaler has seen it first


def test_clipping_sees_the_same_parameters():
    p = parameter(6, 4)
    optimizer = Fanion([p], algorithm="sgd", lr=1.0, momentum=0.0, nesterov=False)
    p.grad = 100 * normal(6, 4)
    before = p.detach().clone()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    assert (before - p.detach()).norm().item() == pytest.approx(1.0, rel=1e-4)


def test_zero_grad_and_hooks():
    optimizer = two()
    (p,) = optimizer.param_groups[0]["params"]
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    update(optimizer, p, normal(6, 4))
    assert calls == ["before", "after"]
    optimizer.zero_grad()
    assert p.grad is None
    update(optimizer, p, normal(6, 4))
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(p.grad, torch.zeros(6, 4))


@pytest.mark.parametrize("algorithm", EVERY)
def test_every_algorithm_minimises(algorithm):
    target = normal(8, 6)
    p = nn.Parameter(torch.zeros_like(target))
    lr = {"signum": 0.05, "sgd": 0.3, "coordinate": 0.5}.get(algorithm, 0.3)
    optimizer = Fanion([p], algorithm=algorithm, lr=lr, momentum=0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 120)
    for _ in range(120):
        p.grad = p.detach() - target
        optimizer.step()
        schedule.step()
    assert (p.detach() - target).norm() < 0.4 * target.norm()


MEMORY = """
import resource, torch
from lit_fanions import Fanion
from lit_fanions.memory import reuse_freed_memory
{}
weights = [torch.nn.Parameter(torch.randn(768, 1536)) for _ in range(8)]
optimizer = Fanion([dict(params=weights, algorithm="f_muon", lr=0.1, polar_steps=1)])
faults = 0
for step in range(10):
    for w in weights:
        w.grad = torch.randn(768, 1536)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    optimizer.step()
    faults += (step > 3) * (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators differ")
def test_steps_use_the_same_memory_again():
    def faults(change=""):
        command = [sys.executable, "-c", MEMORY.format(change)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert 4 * faults("reuse_freed_memory()") < faults()
