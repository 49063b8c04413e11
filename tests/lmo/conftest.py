"""What the tests of the oracles share: hardware that this machine need not have."""

import importlib
from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode

# The package's attribute of that name is the function.
polar_module = importlib.import_module("lit_fanions.lmo.newton_schulz")

GPU = torch.device("cuda")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def products(request, monkeypatch) -> torch.dtype:
    """The dtype of fast products, whatever this machine's is."""
    has_bf16 = request.param == torch.bfloat16
    monkeypatch.setattr(polar_module, "_has_bf16", lambda device_type: has_bf16)
    return request.param


class PretendGPU(TorchFunctionMode):
    """In this context tensors of the CPU say that they are on a GPU, and new ones stay there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return GPU
        args = tuple(x for x in args if not isinstance(x, torch.device) or x != GPU)
        kwargs = {name: x for name, x in (kwargs or {}).items() if name != "device" or x != GPU}
        if func is torch.Tensor.to and len(args) == 1 and not kwargs:
            return args[0]
        return func(*args, **kwargs)


@pytest.fixture(params=["cpu", "gpu"])
def device(request, monkeypatch):
    """A context in which tensors are on a CPU, or are taken to be on a GPU."""
    monkeypatch.setattr(polar_module, "_has_bf16", lambda device_type: device_type == "cuda")
    return nullcontext() if request.param == "cpu" else PretendGPU()
