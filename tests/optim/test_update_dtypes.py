"""Steps of every dtype, of zero gradients and of tiny and huge ones."""

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize("options", [{}, {"cautious_decay": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize(("algorithm", "lr"), [("muon", 0.02), ("nsgd", 0.2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_decay_as_float32_weights(dtype, algorithm, lr, options):
    def shrinkage(dtype: torch.dtype) -> float:
        start = 0.1 * torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
        norms = []
        for own in ({}, {"weight_decay": 1e-3 / lr, **options}):
            p = nn.Parameter(start.to(dtype, copy=True))
            optimizer = Fanion([p], algorithm=algorithm, lr=lr, **own)
            generator = torch.Generator().manual_seed(1)
            for _ in range(100):
                p.grad = torch.randn(64, 48, generator=generator).to(dtype)
                optimizer.step()
            norms.append(p.detach().double().norm().item())
        return 1 - norms[1] / norms[0]

    assert shrinkage(dtype) == pytest.approx(shrinkage(torch.float32), rel=0.1)


def test_decay_and_step_of_a_16_bit_weight_are_rounded_once():
    # The spacing of bfloat16 above 1 is 1/128: decay and step, 1/320 each, are lost alone.
    for parameters in (1, 2):
        ps = [nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(parameters)]
        optimizer = Fanion(
            ps, algorithm="signum", lr=1 / 320, weight_decay=1.0, scale="none", momentum=0.0
        )
        for p in ps:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert all((p == 1 - 1 / 128).all() for p in ps)
