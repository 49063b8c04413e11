"""Kernels of Triton on the CPU, by its interpreter, with a bfloat16 that is one.

The interpreter stores bfloat16 as integers, cuts digits off where GPUs round, and multiplies the
integers in products.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("set TRITON_INTERPRET=1 to interpret kernels", allow_module_level=True)

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _to_float(x: TensorHandle) -> np.ndarray:
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data.astype(np.float32)


def _cast(self: InterpreterBuilder, x: TensorHandle, target: tl.dtype) -> TensorHandle:
    kinds = x.dtype.scalar, target.scalar
    if kinds == (tl.bfloat16, tl.float32):
        return TensorHandle(_to_float(x), tl.float32)
    if kinds == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.array(x.data)).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
    return _original_cast(self, x, target)


_original_cast = InterpreterBuilder.cast_impl


def _dot(
    self: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    total: TensorHandle,
    *options: object,
) -> TensorHandle:
    return TensorHandle(np.matmul(_to_float(a), _to_float(b)) + total.data, total.dtype.scalar)


@contextmanager
def rounding_bfloat16() -> Iterator[None]:
    """Round to bfloat16 and multiply it as GPUs do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", _cast)
        patch.setattr(InterpreterBuilder, "create_dot", _dot)
        yield
