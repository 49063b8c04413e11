"""torch.compile of a step, and of the functions that it runs on a stack of matrices."""

import pytest
import torch
from torch import Tensor, nn

from lit_fanions import Fanion
from lit_fanions.optim.options import default_options
from lit_fanions.optim.update import (
    Batch,
    Group,
    Piece,
    apply,
    find_oracle,
    normalised,
    solve,
    update_momentum,
)
from tests.matrices import gaussian

OPTIONS = [
    {"algorithm": "muon"},
    {"algorithm": "nsgd", "nesterov": False, "weight_decay": 0.1, "scale": "match_rms_adamw"},
    {"algorithm": "f_muon", "polar": "jordan", "polar_steps": 2, "nonfinite": "propagate"},
]


def momentum(piece: Piece, group: Group) -> Tensor:
    return update_momentum(piece, group)


def direction(n: Tensor, group: Group) -> Tensor:
    oracle, unit = find_oracle(n, group)
    batch = Batch(normalised(n, group) if unit else n, oracle, unit, overwrite=True)
    return solve(batch, None, None, group).direction


def move(piece: Piece, step: Tensor, group: Group) -> None:
    apply(piece, step, None, group)


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="torch 2.11 does not trace the table of balls"
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_functions_of_a_stack_compile_as_one_graph(options, tensors):
    # Tensors of no device take the branches that do not look at numbers.
    def empty(*shape: int, **kinds) -> Tensor:
        return torch.empty(shape, device="meta", **kinds)

    torch._dynamo.reset()
    group = {**default_options(options["algorithm"]), **options, "lr": 0.1}
    if tensors:
        group |= {name: empty(dtype=torch.float64) for name in ("lr", "momentum")}
    stack = empty(3, 80, 72)
    piece = Piece(stack, stack, empty(3, 80, 72), empty(3, 80, 72),
                  empty(3, 1, 1, dtype=torch.bool), {})  # fmt: skip
    settings = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
    n = torch.compile(momentum, **settings)(piece, group)
    d = torch.compile(direction, **settings)(n, group)
    torch.compile(move, **settings)(piece, d, group)
    assert n.shape == d.shape == stack.shape


@pytest.mark.parametrize("algorithm", ["muon", "f_fanion", "adamw"])
def test_a_compiled_step_is_the_plain_one_and_has_no_graph(algorithm):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    p, q = nn.Parameter(gaussian(6, 4)), nn.Parameter(gaussian(6, 4))
    optimizer, other = (Fanion([x], algorithm=algorithm, lr=0.05) for x in (p, q))
    compiled = torch.compile(optimizer.step, backend=backend)
    for seed in range(3):
        p.grad, q.grad = gaussian(6, 4, seed=seed), gaussian(6, 4, seed=seed)
        compiled()
        other.step()
    assert torch.equal(p, q)
    assert not graphs
