"""Time that the host takes to ask an accelerator for a step, against optimizers of torch.

No accelerator is needed: a process imports the package with its branches for accelerators and steps
tiny tensors of a CPU, whose kernels take little beside the host's work. ``python
tests/optim/test_host_time.py`` prints the ratios. Load of other processes moves them by a third,
so that the test has wider bounds than the goals, which are 1 and 1.5.
"""

import importlib
import importlib.machinery
import json
import re
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import subprocess_environment

SIDE = 4
MATRICES = [*[(SIDE, SIDE)] * 4, (SIDE, 4 * SIDE), (4 * SIDE, SIDE)] * 12
VECTORS = [(8,)] * 99
STEPS = 100


class BranchesForAccelerators(importlib.machinery.SourceFileLoader):
    """Load a module that takes the CPU for a CUDA device."""

    def get_code(self, fullname):
        source = self.get_data(self.path).decode()
        for kind, own in (("cpu", ""), ("cuda", "cpu")):
            compared = rf'device\.type (==|!=|in|not in) (\(?)"{kind}"'
            source = re.sub(compared, rf'device.type \1 \2"{own}"', source)
        return compile(source, self.path, "exec", dont_inherit=True)


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if not name.startswith("lit_fanions."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = BranchesForAccelerators(spec.loader.name, spec.loader.path)
        return spec


def parameters(shapes):
    tensors = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in tensors:
        p.grad = torch.randn_like(p)
    return tensors


def ratio(mine, others):
    """Return the ratio of the least times of the thread in steps that take turns."""
    times = ([], [])
    for _ in range(STEPS):
        for own, optimizer in zip(times, (mine, others), strict=True):
            start = time.thread_time()
            optimizer.step()
            own.append(time.thread_time() - start)
    return min(times[0]) / min(times[1])


def measure():
    sys.meta_path.insert(0, Finder)
    torch.set_num_threads(1)
    fanion = importlib.import_module("lit_fanions").Fanion
    muon = {"lr": 0.01, "weight_decay": 0.1}
    return {
        "muon, 72 matrices": ratio(
            fanion(parameters(MATRICES), algorithm="muon", **muon),
            torch.optim.Muon(parameters(MATRICES), **muon),
        ),
        "adamw, 99 vectors": ratio(
            fanion(parameters(VECTORS), algorithm="adamw", lr=0.01),
            torch.optim.AdamW(parameters(VECTORS), lr=0.01, fused=True),
        ),
    }


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_the_host_takes_no_longer_than_for_optimizers_of_torch():
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, env=subprocess_environment(), capture_output=True, text=True, check=True
    )
    ratios = json.loads(done.stdout)
    assert ratios["muon, 72 matrices"] <= 1.5
    assert ratios["adamw, 99 vectors"] <= 2.0


if __name__ == "__main__":
    print(json.dumps(measure()))
