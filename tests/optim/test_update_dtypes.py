"""Steps of every dtype, of zero gradients and of tiny and huge ones."""

import pytest
import torch

from lit_fanions import Fanion
from tests.matrices import decaying, gaussian64, parameter, parameter64
from tests.optim.steps import EVERY, MATRIX, first_update, update

KINDS = ["muon", "neon", "dion", "adamw", "sgd"]


@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [
        *((name, torch.float32) for name in EVERY),
        *((name, dtype) for name in KINDS for dtype in (torch.bfloat16, torch.float64)),
    ],
)
def test_a_zero_gradient_moves_nothing(algorithm, dtype):
    p = parameter(8, 6, dtype=dtype)
    before = p.detach().clone()
    options = {"scale": "match_rms_adamw"} if algorithm in MATRIX else {}
    optimizer = Fanion([p], algorithm=algorithm, **options, lr=0.02)
    for _ in range(2):
        update(optimizer, p, torch.zeros(8, 6))
    assert torch.equal(p, before)


# The oracles themselves: test_contract.py.
@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("algorithm", ["muon", "fanion", "kyfan", "nsgd", "s_neon", "row", "dion"])
def test_directions_do_not_depend_on_the_size_of_gradients(algorithm, size):
    grad = decaying(24, 40, condition=10).float()
    want = first_update((24, 40), grad, algorithm=algorithm)
    got = first_update((24, 40), grad * size, algorithm=algorithm)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-2 * want.abs().max().item())


@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [
        *((name, torch.bfloat16) for name in EVERY),
        *((name, dtype) for name in KINDS for dtype in (torch.float16, torch.float64)),
    ],
)
def test_every_dtype_steps_like_float32(algorithm, dtype):
    a, b = parameter(8, 6, dtype=torch.float32), parameter(8, 6, dtype=dtype)
    options = {"algorithm": algorithm, "lr": 0.05, "weight_decay": 0.1}
    first, second = Fanion([a], **options), Fanion([b], **options)
    for i in range(3):
        grad = gaussian64(8, 6, seed=i).to(dtype)
        update(first, a, grad.float())
        update(second, b, grad)
    assert b.dtype == dtype
    state = second.state[b]
    # float16 has too little range for sums of gradients; fused kernels want the parameter's dtype.
    wide = dtype == torch.float16 and algorithm not in ("adamw", "sgd")
    own = state.get("momentum", state.get("exp_avg")).dtype
    assert own == (torch.float32 if wide else dtype)
    torch.testing.assert_close(b.detach().float(), a.detach(), rtol=0.02, atol=0.03)


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        *(("muon", name) for name in ("float16", "bfloat16", "float32", "float64")),
        *((name, "float32") for name in ("neon", "f_muon", "s_fanion", "dion", "kyfan")),
    ],
)
def test_momentum_has_the_dtype_of_its_option(algorithm, name):
    p = parameter(8, 6, dtype=torch.bfloat16)
    optimizer = Fanion([p], algorithm=algorithm, momentum_dtype=name, lr=0.02)
    for i in range(2):
        update(optimizer, p, gaussian64(8, 6, seed=i))
    assert optimizer.state[p]["momentum"].dtype == getattr(torch, name)
    assert p.dtype == torch.bfloat16 and p.isfinite().all()


def test_momentum_dtype_may_be_a_torch_dtype_and_is_kept_by_name():
    optimizer = Fanion([parameter64(3, 3)], momentum_dtype=torch.float32)
    assert optimizer.param_groups[0]["momentum_dtype"] == "float32"


def test_float32_momentum_of_a_bf16_parameter_is_the_exact_average():
    p = parameter(8, 6, dtype=torch.bfloat16)
    optimizer = Fanion([p], momentum_dtype="float32", momentum=0.9)
    want = torch.zeros(8, 6)
    for i in range(5):
        grad = gaussian64(8, 6, seed=i).bfloat16()
        update(optimizer, p, grad)
        want.lerp_(grad.float(), 1 - 0.9)
    torch.testing.assert_close(optimizer.state[p]["momentum"], want, rtol=0, atol=0)
