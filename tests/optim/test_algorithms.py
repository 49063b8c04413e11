"""What the names of algorithms stand for."""

import math

import pytest
import torch
from torch import Tensor, nn

from lit_fanions import Fanion
from lit_fanions.optim.algorithms import ALGORITHMS, oracle, resolve_rank
from lit_fanions.optim.options import default_options
from tests.matrices import gaussian64, parameter64
from tests.optim.reference import EXACT, NAMES, SHAPES
from tests.optim.steps import EVERY, MATRIX, first_update, update


def test_names_stand_for_the_options_of_the_paper():
    assert {*NAMES, "schatten", "dion", "cosmos"} == {*MATRIX}
    for name, options in NAMES.items():
        entry = ALGORITHMS[name].options
        if ALGORITHMS[name].ball in ("fanion", "kyfan"):
            assert (entry["rank"], entry["alpha"], entry["blend"]) == options


SAME = [
    ({"algorithm": "f_muon", "alpha": 1.0}, {"algorithm": "muon"}),
    ({"algorithm": "s_muon", "alpha": 1.0}, {"algorithm": "muon"}),
    ({"algorithm": "f_muon", "alpha": 0.0}, {"algorithm": "nsgd"}),
    ({"algorithm": "f_neon", "alpha": 0.0}, {"algorithm": "nsgd"}),
    ({"algorithm": "f_fanion", "alpha": 0.0}, {"algorithm": "nsgd"}),
    ({"algorithm": "s_muon", "alpha": 0.0}, {"algorithm": "signum", "sign_scale": 60**-0.5}),
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
    ({"algorithm": "nsgd", "alpha": 0.0}, {"algorithm": "nsgd"}),
    ({"algorithm": "kyfan", "rank": 1}, {"algorithm": "muon"}),
    ({"algorithm": "kyfan", "rank": "full"}, {"algorithm": "neon"}),
]


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("left", "right"), SAME)
def test_names_at_their_endpoints_equal_other_names(left, right, scale):
    a, b = parameter64(10, 6), parameter64(10, 6)
    # The norms of approximate directions differ a little from what Muon's factor assumes.
    solvers = EXACT if scale == "match_rms_adamw" else {}
    first, second = (
        Fanion([p], **options, **solvers, scale=scale, weight_decay=0.1)
        for p, options in ((a, left), (b, right))
    )
    for i in range(4):
        grad = gaussian64(10, 6, seed=i)
        update(first, a, grad)
        update(second, b, grad)
    torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-6)


def test_kyfan_is_muon_over_k_where_nothing_dominates_and_neon_where_something_does():
    even = torch.eye(6).double() + 0.1 * gaussian64(6, 6)
    got = first_update((6, 6), even, algorithm="kyfan", rank=2, **EXACT)
    torch.testing.assert_close(got @ got.T, torch.eye(6).double() / 4, rtol=0, atol=1e-9)
    peaked = even + 100 * torch.outer(gaussian64(6), gaussian64(6, seed=1))
    got = first_update((6, 6), peaked, algorithm="kyfan", rank=2, **EXACT)
    want = first_update((6, 6), peaked, algorithm="neon", **EXACT)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


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
    p = parameter64(*shape)
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
        grad = gaussian64(*shape, seed=i)
        update(optimizer, p, grad)
        literal.step(grad)
        # The basis is kept in float32.
        torch.testing.assert_close(p.detach(), literal.w, rtol=0, atol=1e-5)
        torch.testing.assert_close(optimizer.state[p]["momentum"], literal.m, rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", EVERY)
def test_every_algorithm_minimises(algorithm):
    target = gaussian64(8, 6)
    p = nn.Parameter(torch.zeros_like(target))
    lr = {"signum": 0.05, "sgd": 0.3, "coordinate": 0.5}.get(algorithm, 0.3)
    optimizer = Fanion([p], algorithm=algorithm, lr=lr, momentum=0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 120)
    for _ in range(120):
        p.grad = p.detach() - target
        optimizer.step()
        schedule.step()
    assert (p.detach() - target).norm() < 0.4 * target.norm()


@pytest.mark.parametrize("algorithm", ["nsgd", "signum", "coordinate", "adamw", "sgd"])
def test_algorithms_of_any_shape_step_scalars_and_vectors(algorithm):
    ps = [parameter64(*shape) for shape in [(), (5,), (3, 4), (2, 3, 4), (2, 2, 2, 2)]]
    optimizer = Fanion(ps, algorithm=algorithm, lr=0.1)
    before = [p.detach().clone() for p in ps]
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < old).any() for p, old in zip(ps, before, strict=True))


@pytest.mark.parametrize(
    ("rank", "want"),
    [("full", 6), (1, 1), (5, 5), (6, 6), (99, 6), (1.0, 6), (0.5, 3), (0.01, 1), (0.9, 5)],
)
def test_ranks_resolve_to_whole_numbers(rank, want):
    assert resolve_rank(rank, 6, 40) == resolve_rank(rank, 40, 6) == want


def test_the_length_of_a_direction_is_known_where_it_does_not_depend_on_the_momentum():
    def length(algorithm: str, **options: object) -> float | None:
        group = {**default_options(algorithm), "algorithm": algorithm, **options}
        return oracle(group, 8, 6).length

    assert length("fanion", rank=3) == pytest.approx(math.sqrt(3))
    assert length("fanion", alpha=0.0) == length("nsgd") == 1
    assert length("signum", sign_scale=0.5) == pytest.approx(0.5 * math.sqrt(48))
    assert length("fanion", alpha=0.0, blend="sign") == pytest.approx(length("nsgd"))
    assert length("signum") == pytest.approx(math.sqrt(48))
    assert length("coordinate") == 1
    assert length("row") == pytest.approx(math.sqrt(8))
    assert length("column") == pytest.approx(math.sqrt(6))
    for unknown in ({"alpha": 0.3}, {"algorithm": "kyfan"}, {"algorithm": "dion"}):
        assert length(**{"algorithm": "fanion", **unknown}) is None
