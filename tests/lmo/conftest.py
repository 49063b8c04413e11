"""Stand-ins for hardware that the machine of the tests may lack."""

import importlib
from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode

polar_module = importlib.import_module("lit_fanions.lmo.newton_schulz")

GPU = torch.device("cuda", 1)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def products(request, monkeypatch) -> torch.dtype:
    """Set the dtype of fast products, whatever the machine."""
    has_bf16 = request.param == torch.bfloat16
    monkeypatch.setattr(polar_module, "_has_bf16", lambda device_type: has_bf16)
    return request.param


class DeviceBranches(TorchFunctionMode):
    """In this context tensors of the CPU say that they are on a GPU.

    The code then takes the branches that it has for GPUs; the kernels stay those of the CPU.
    """

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
    """Return a context in which the code takes its branches for a CPU, or those for a GPU."""
    monkeypatch.setattr(polar_module, "_has_bf16", lambda device_type: device_type == "cuda")
    return nullcontext() if request.param == "cpu" else DeviceBranches()
