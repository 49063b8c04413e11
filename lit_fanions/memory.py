"""Memory of CPU trainings: let freed blocks be used again, a process-wide setting of the allocator.

A room of its own, for the command line and for loops that want it: an optimizer step has no
business with the settings of a process.
"""

from __future__ import annotations

import functools

import torch

# The largest block, in bytes, by which glibc's threshold grows.
_LARGEST = 31 * 2**20


@functools.cache
def reuse_freed_memory() -> None:
    """Make glibc keep freed blocks of up to 32 MiB, so that a step reuses those of the last one.

    By default glibc returns large blocks to the system at once, and page faults of fresh ones cost
    a CPU step 5 to 30 %. glibc raises its threshold when a block above it is freed, which this does
    once; the block is never touched and takes no memory. The environment variable
    ``MALLOC_MMAP_THRESHOLD_=33554432`` has the same effect. Other allocators are left as they are.
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")
