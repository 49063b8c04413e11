"""The ascent of SAM against its formula, and weights that are restored to the bit."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lit_fanions import SharpnessAscent, norms
from lit_fanions.optim.algorithms import ALGORITHMS, oracle
from lit_fanions.optim.options import default_options

RHO = 0.3
ASCENTS = [name for name, entry in ALGORITHMS.items() if entry.kind == "matrix" and name != "dion"]
BALLS = {
    "neon": norms.Nuclear(),
    "nsgd": norms.Frobenius(),
    "signum": norms.MaxEntry(),
    "fanion": norms.KyFanDual(2),
    "f_neon": norms.Blend(norms.Nuclear(), 0.5),
    "row": norms.MaxRow(),
}


class Net(nn.Module):
    """A convolution, a fused weight of three matrices, a transposed layer and a head."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(4, 6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(6, 5, 2)
        self.head = nn.Linear(5, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.up(x.mT).mT.tanh().mean(1))


def loss_of(net: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype
    x = torch.randn(7, 4, 8, generator=generator).to(dtype)
    return nn.functional.cross_entropy(net(x), torch.arange(7) % 3)


MATRICES = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "up.weight"]


def matrices(name: str, x: Tensor) -> Tensor:
    """Return the matrices, out x in, of a weight of ``Net``."""
    if name == "attention.in_proj_weight":
        return x.unflatten(0, (3, -1))
    return (x.transpose(0, 1) if name == "up.weight" else x).flatten(1).unsqueeze(0)


def weight(name: str, m: Tensor, shape: torch.Size) -> Tensor:
    """Invert ``matrices``."""
    if name == "up.weight":
        return m[0].view(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    return m.reshape(shape)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("algorithm", BALLS)
def test_three_steps_are_those_of_the_formula(algorithm):
    """W <- W - lr * grad(W + rho * D(grad(W))), the method of nu-SAM with a plain SGD step."""
    net, reference, lr = Net(), Net(), 0.5
    rank = 2 if algorithm == "fanion" else None
    ascent = SharpnessAscent(net, RHO, algorithm=algorithm, rank=rank)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for step in range(3):
        loss_of(net, step).backward()
        with ascent:
            optimizer.zero_grad()
            loss_of(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()

        named = dict(reference.named_parameters())
        first = torch.autograd.grad(loss_of(reference, step), [*named.values()])
        before = weights(reference)
        with torch.no_grad():
            for (name, p), g in zip(named.items(), first, strict=True):
                if name in MATRICES:
                    d = BALLS[algorithm].lmo(matrices(name, g))
                    p.add_(weight(name, d, p.shape), alpha=RHO)
        second = torch.autograd.grad(loss_of(reference, step), [*named.values()])
        with torch.no_grad():
            for (name, p), g in zip(named.items(), second, strict=True):
                p.copy_(before[name] - lr * g)
        for name, p in net.named_parameters():
            torch.testing.assert_close(p, named[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ["neon", "muon", "kyfan"])
def test_weights_are_restored_to_the_bit(algorithm, dtype):
    net = Net(dtype)
    before = weights(net)
    loss_of(net, 0).backward()
    ascent = SharpnessAscent(net, RHO, algorithm=algorithm)
    with pytest.raises(KeyError), ascent:
        moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
        raise KeyError
    assert moved == set(MATRICES)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_inexact_ascents_keep_vectors_and_restore_up_to_rounding():
    exact, inexact = (Net(torch.float32) for _ in range(2))
    before, inside = weights(exact), []
    for net, how in ((exact, True), (inexact, False)):
        loss_of(net, 0).backward()
        ascent = SharpnessAscent(net, RHO, exact=how)
        with ascent:
            inside.append(weights(net))
            vectors = [pair for _, pairs in ascent._moved for pair in pairs]
    numbers = sum(x.numel() for pair in vectors for x in pair)
    shapes = [m.shape for name in MATRICES for m in matrices(name, before[name])]
    assert numbers == sum(map(sum, shapes))
    for name, p in inexact.named_parameters():
        torch.testing.assert_close(inside[0][name], inside[1][name], rtol=0, atol=1e-6)
        torch.testing.assert_close(p, before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_matrix_with_a_broken_gradient_stays_where_it_is(value, exact):
    net = Net(torch.float32)
    loss_of(net, 0).backward()
    net.conv.weight.grad[0, 0, 0] = value
    before = weights(net)
    with SharpnessAscent(net, RHO, exact=exact):
        assert torch.equal(net.conv.weight, before["conv.weight"])
        assert not torch.equal(net.up.weight, before["up.weight"])
    assert torch.equal(net.conv.weight, before["conv.weight"])


@pytest.mark.parametrize("algorithm", ASCENTS)
def test_every_ball_gives_its_steepest_ascent(algorithm):
    """<G, W' - W> is rho times the dual norm of G, the most that the ball allows."""
    net = Net()
    loss_of(net, 0).backward()
    before, named = weights(net), dict(net.named_parameters())
    group = {**default_options(algorithm), "algorithm": algorithm}
    with SharpnessAscent(net, RHO, algorithm=algorithm):
        for name in MATRICES:
            g, moved = (matrices(name, x) for x in (named[name].grad, named[name] - before[name]))
            dual = oracle(group, *g.shape[-2:]).norm().dual(g)
            part = (g * moved).sum((-2, -1)) / (RHO * dual)
            assert (part > 0.9).all() and (part < 1.1).all(), name


def test_an_error_on_the_way_up_restores_what_has_been_moved(monkeypatch):
    net = Net(torch.float32)
    loss_of(net, 0).backward()
    before, ascent = weights(net), SharpnessAscent(net, RHO)
    perturbation, calls = ascent._perturbation, []

    def interrupted(gradient: Tensor) -> Tensor:
        calls.append(gradient)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return perturbation(gradient)

    monkeypatch.setattr(ascent, "_perturbation", interrupted)
    with pytest.raises(KeyboardInterrupt), ascent:
        pass
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_frozen_and_unused_parameters_are_left_alone():
    net = Net()
    net.up.weight.requires_grad_(False)
    before = copy.deepcopy(net.up.weight)
    with SharpnessAscent(net, RHO):  # no gradient at all
        assert torch.equal(net.up.weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": -1.0}, "rho must be a number of at least 0"),
        ({"rho": torch.nan}, "rho must be"),
        ({"algorithm": "adamw"}, "no ball"),
        ({"algorithm": "dion"}, "no ball"),
        ({"algorithm": "nuclear"}, "algorithm 'nuclear' is none of"),
        ({"rank": 0}, "rank"),
        ({"algorithm": "nsgd", "rank": 2}, "algorithm 'nsgd' has no rank, got 2: leave it out"),
        ({"exact": "no"}, "exact must be true or false"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SharpnessAscent(Net(), **arguments)
