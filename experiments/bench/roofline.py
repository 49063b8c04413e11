"""The time that the products and the memory traffic of a call take at the rates of this machine.

Operations and bytes are counted in the call itself, rates are measured. No code can take less time
than its products do. The bytes are an upper limit: what is still in a cache is counted too. Kernels
of Triton count as memory traffic, their products do not.
"""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from experiments.bench import race
from experiments.bench.cost import PRODUCTS, CountBytes

# Side of the matrices whose product is timed: it takes long beside its launch.
_SIDE = {"cpu": 1024, "cuda": 8192}
_COPIED = 2**26  # entries of a copy: more than any cache holds
_REPEATS = 7
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Work(NamedTuple):
    """What a call does.

    Attributes:
        flops: Operations of matrix products by dtype.
        traffic: Bytes that all other operations read and write.
    """

    flops: dict[torch.dtype, float]
    traffic: float


class Rates(NamedTuple):
    """What a device does in a second.

    Attributes:
        products: Operations of matrix products by dtype.
        memory: Bytes read and written by a copy.
    """

    products: dict[torch.dtype, float]
    memory: float

    def seconds(self, work: Work) -> float:
        """Return the time of the work at these rates, one after the other, without caches."""
        products = sum(flops / self.products[dtype] for dtype, flops in work.flops.items())
        return products + work.traffic / self.memory


class _CountWork(CountBytes):
    """Count the operations of matrix products beside the bytes of all others."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            left, right = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.flops[left.dtype] += 2 * left.numel() * right.shape[-1]
        return super().__torch_dispatch__(func, types, args, kwargs)


def count(call: Callable[[], object]) -> Work:
    """Return the work of a call."""
    with _CountWork() as counted:
        call()
    return Work(dict(counted.flops), counted.total)


def measure_rates(device: torch.device) -> Rates:
    """Return the median rates of a device."""

    def median(call: Callable[[], object]) -> float:
        call()
        return statistics.median(race.timed(call, device)[0] for _ in range(_REPEATS))

    side, products = _SIDE[device.type], {}
    for dtype in _DTYPES:
        x = torch.randn(side, side, device=device).to(dtype)
        product = functools.partial(torch.mm, x, x, out=torch.empty_like(x))
        products[dtype] = 2 * side**3 / median(product)
    source = torch.zeros(_COPIED, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.itemsize
    return Rates(products, copied / median(lambda: target.copy_(source)))
