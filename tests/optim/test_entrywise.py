"""AdamW and SGD, which torch steps."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lit_fanions import Fanion
from tests.matrices import gaussian, gaussian64, parameter, parameter64
from tests.optim.steps import take_steps, through_a_file


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
            a.grad = gaussian64(*a.shape, seed=100 * i + j).to(a.dtype)
            b.grad = a.grad.clone()
        fanion.step()
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_groups_that_name_their_algorithm_get_torchs_defaults():
    a, b = parameter64(3), parameter64(3, seed=1)
    optimizer = Fanion(
        [{"params": [a], "algorithm": "adamw", "lr": 1e-3},
         {"params": [b], "algorithm": "sgd", "lr": 1e-3}]
    )  # fmt: skip
    adamw, sgd = optimizer.param_groups
    assert (adamw["momentum"], adamw["beta2"], adamw["eps"]) == (0.9, 0.999, 1e-8)
    assert not sgd["nesterov"]
    assert adamw["weight_decay"] == sgd["weight_decay"] == 0


def test_adamw_of_bf16_parameters_keeps_its_step_count_exact():
    p, q = (parameter(4, 4, dtype=torch.bfloat16) for _ in range(2))
    optimizer, other = (Fanion([x], algorithm="adamw", lr=1e-3) for x in (p, q))
    take_steps(optimizer, 2)
    optimizer.state[p]["step"].fill_(1001.0)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.state[q]["step"].item() == 1001 and other.state[q]["step"].dtype == torch.float32


def strided(shape: tuple[int, int]) -> Tensor:
    return torch.empty(shape[::-1]).t()


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
@pytest.mark.parametrize("odd", ["gradient", "state", "parameter"])
def test_entrywise_steps_do_not_depend_on_memory_layouts(algorithm, odd):
    def train(relayout: bool) -> Tensor:
        base = gaussian(6, 9)
        p = nn.Parameter(base[:, :4] if relayout and odd == "parameter" else base[:, :4].clone())
        optimizer = Fanion([p], algorithm=algorithm, lr=0.1)
        for i in range(4):
            p.grad = gaussian(6, 4, seed=i)
            if relayout and odd == "gradient":
                p.grad = strided((6, 4)).copy_(p.grad)
            if relayout and odd == "state" and i == 2:
                for key in ("momentum", "exp_avg", "exp_avg_sq"):
                    if key in optimizer.state[p]:
                        moved = strided((6, 4)).copy_(optimizer.state[p][key])
                        optimizer.state[p][key] = moved
            optimizer.step()
        assert torch.equal(base[:, 4:], gaussian(6, 9)[:, 4:])  # not this parameter's
        return p.detach().clone()

    torch.testing.assert_close(train(True), train(False), rtol=0, atol=1e-7)
