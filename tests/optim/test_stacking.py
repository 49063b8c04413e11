"""Matrices that are solved at once: which ones, and the memory that they need."""

import math
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.bench.step import peak_bytes
from lit_fanions import Fanion
from lit_fanions.optim import matrix_step
from tests.lmo.conftest import polar_module
from tests.matrices import gaussian, parameter
from tests.optim.steps import MATRIX, take_steps

STACKED = [
    *({"algorithm": name} for name in MATRIX),
    {"algorithm": "muon", "renormalize": True, "scale": "match_rms_adamw"},
    {"algorithm": "neon", "error_feedback": True},
    {"algorithm": "f_neon", "splits": 3, "scale": "match_rms_adamw"},
    {"algorithm": "s_muon", "splits": [4, 8]},
]


@pytest.mark.parametrize("options", STACKED, ids=str)
def test_parameters_of_one_shape_stay_separate_matrices(options, monkeypatch):
    def stacks(parameters: list[Tensor], group: object) -> list[list[Tensor]]:
        """How parameters are stacked on accelerators, and how they are not."""
        shapes = dict.fromkeys(p.shape for p in parameters)
        together = [[p for p in parameters if p.shape == shape] for shape in shapes]
        return together if stacked else [[p] for p in parameters]

    monkeypatch.setattr(matrix_step, "stacks", stacks)

    def train() -> list[Tensor]:
        ps = [parameter(12, 8, seed=i) for i in range(3)]
        ps.append(parameter(12, 4, 2, seed=3))
        optimizer = Fanion(ps, **options, lr=0.1)
        for i in range(4):
            for j, p in enumerate(ps):
                p.grad = gaussian(*p.shape, seed=10 * i + j)
            ps[1].grad[0] = math.nan if i == 2 else 0.0
            ps[2].grad = None if i == 1 else ps[2].grad
            optimizer.step()
        return [p.detach() for p in ps] + [optimizer.state[p]["momentum"] for p in ps]

    stacked = False
    separate = train()
    stacked = True
    for alone, together in zip(separate, train(), strict=True):
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


def peak(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> float:
    """Return the peak memory of a second step, in tensors of the parameter's shape."""
    p = parameter(*shape, dtype=dtype)
    optimizer = Fanion([p], **options)
    take_steps(optimizer, 1)
    return peak_bytes(optimizer.step, p.device) / (p.numel() * p.element_size())


@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize(
    ("options", "shape", "most"),
    [
        ({}, (256, 256), 3.1),
        ({}, (128, 512), 3.1),
        ({"nesterov": False}, (512, 128), 3.1),
        ({"algorithm": "f_muon"}, (256, 256), 4.1),
        ({"algorithm": "kyfan", "rank": 8}, (256, 256), 4.2),
        ({"algorithm": "fanion", "rank": 4}, (256, 256), 3.1),
        ({"algorithm": "nsgd"}, (256, 256), 2.1),
    ],
)
def test_memory_of_a_step_is_bounded(options, shape, most, has_bf16, monkeypatch):
    # This machine may have bfloat16 or not; with it products are smaller, but need workspaces.
    monkeypatch.setattr(polar_module, "_has_bf16", lambda device_type: has_bf16)
    assert peak(shape, **options) < most


@pytest.mark.parametrize("algorithm", ["muon", "neon", "kyfan", "nsgd"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [((32, 96, 96), {"layout": "batch"}), ((32 * 96, 96), {"splits": 32})],
)
def test_slices_of_a_stack_bound_the_memory_of_a_step(shape, options, algorithm):
    together = 2 * 96 * 96
    slices = peak(shape, algorithm=algorithm, stack_entries=together, **options)
    assert 16 * slices < 6  # of 16 slices; the parameter's own size would be 16


IN_SLICES = [
    ((6, 12, 10), {"layout": "batch"}),
    ((6, 12, 10), {"layout": "batch", "splits": [4, 8]}),
    ((3, 2, 12, 10), {"layout": "batch", "splits": 2}),
    ((36, 10), {"splits": 3}),
    ((36, 10), {"splits": [12, 24]}),
    ((36, 10, 3), {"layout": "transposed", "splits": 3}),
]
# Slicing does not depend on the kind of momentum, so each shape takes one of these four.
MOMENTA = [("float32", True), ("float16", False), ("float32", False), ("float16", True)]
SLICED = [
    # Every algorithm once; those that keep more than a momentum in every shape.
    *((name, *IN_SLICES[i % 6], *MOMENTA[i % 4]) for i, name in enumerate(MATRIX)),
    *(
        (name, *IN_SLICES[i], *MOMENTA[(i + j) % 4])
        for j, name in enumerate(["muon", "s_neon", "fanion_feedback", "dion"])
        for i in range(6)
    ),
]


@pytest.mark.parametrize(
    ("algorithm", "shape", "options", "momentum_dtype", "nesterov"), SLICED, ids=str
)
def test_slices_of_a_stack_step_as_the_whole(algorithm, shape, options, momentum_dtype, nesterov):
    if algorithm == "fanion_feedback":
        options, algorithm = {**options, "error_feedback": True}, "fanion"

    def train(entries: int) -> tuple[Tensor, Fanion]:
        p = parameter(*shape)
        optimizer = Fanion(
            [p], algorithm=algorithm, nesterov=nesterov, weight_decay=0.1, renormalize=True,
            momentum_dtype=momentum_dtype, stack_entries=entries, **options, lr=0.02)  # fmt: skip
        take_steps(optimizer, 2)
        p.grad.view(-1)[-1] = math.nan
        optimizer.step()
        take_steps(optimizer, 1, start=2)
        return p.detach(), optimizer

    (whole, one), (sliced, other) = train(10**6), train(1)
    tolerance = 1e-3 if momentum_dtype == "float32" else 2e-2
    torch.testing.assert_close(sliced, whole, rtol=0, atol=tolerance)
    a, b = (o.state[o.param_groups[0]["params"][0]] for o in (one, other))
    assert a.keys() == b.keys()
    assert a["skipped"] == b["skipped"] == 1
    assert {key: value.shape for key, value in a.items()} == {k: v.shape for k, v in b.items()}


MEMORY = """
import resource, torch
from lit_fanions import Fanion
from lit_fanions.memory import reuse_freed_memory
{}
weights = [torch.nn.Parameter(torch.randn(384, 768)) for _ in range(4)]
optimizer = Fanion([dict(params=weights, algorithm="f_muon", lr=0.1, polar_steps=1)])
faults = 0
for step in range(7):
    for w in weights:
        w.grad = torch.randn(384, 768)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    optimizer.step()
    faults += (step > 3) * (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators differ")
def test_steps_reuse_freed_memory():
    def faults(change=""):
        command = [sys.executable, "-c", MEMORY.format(change)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # A busy machine makes faults of its own.
    assert any(2 * faults("reuse_freed_memory()") < faults() for _ in range(3))
