"""One look of SpectralMonitor: few launches and one copy on an accelerator, the same values."""

import collections

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lit_fanions.callbacks import measuring
from lit_fanions.callbacks.measuring import Look
from lit_fanions.callbacks.watching import MatrixStep
from lit_fanions.lmo import spectrum as spectra
from lit_fanions.optim.algorithms import ALGORITHMS, oracle
from lit_fanions.optim.observing import Observation
from lit_fanions.optim.options import default_options
from tests.optim.test_launches import CountOperations

BALLS = [name for name, entry in ALGORITHMS.items() if entry.kind == "matrix"]


class CountCopies(TorchDispatchMode):
    """Count copies of tensors from one device to another, by their direction."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_to_copy", "copy_"):
            source = args[-1] if func.overloadpacket.__name__ == "copy_" else args[0]
            if source.device != out.device:
                self.counts[source.device.type, out.device.type] += 1
        return out


@pytest.fixture
def cuda():
    """Fake CUDA tensors: an operation that waits for a number on the device raises."""
    spectra._start_blocks.cache_clear()
    with FakeTensorMode():
        yield "cuda"
    spectra._start_blocks.cache_clear()


def a_step(name: str, shape: tuple[int, ...], device: str, algorithm: str = "muon") -> MatrixStep:
    generator = None if device == "cuda" else torch.Generator().manual_seed(len(name))
    g, m, d, before = (torch.randn(1, *shape, device=device, generator=generator) for _ in range(4))
    group = {**default_options(algorithm), "algorithm": algorithm, "lr": 0.1}
    flag = torch.ones((), device=device)
    after = before - 0.1 * d
    observation = Observation(
        before, group, 0, g, m, d, 1.0, None, before, after, flag.bool(), flag * 0
    )
    return MatrixStep([name], "matrix", name, 0.1, g, before, after, observation)


def test_a_look_makes_one_copy_and_few_launches(cuda):
    copied, launches = [], []
    for count in (1, 9):
        look, steps = Look(), [a_step(str(i), (200, 300), cuda) for i in range(count)]
        with CountOperations() as operations, CountCopies() as copies:
            for step in steps:
                look.add(step)
            assert len(list(look.results())) == count
        copied.append(dict(copies.counts))
        launches.append(operations.counts.total())
    # The first look copies its start blocks to the device, where they stay.
    assert copied == [{("cuda", "cpu"): 1, ("cpu", "cuda"): 14}, {("cuda", "cpu"): 1}]
    assert launches[0] <= 820
    assert launches[1] - launches[0] <= 8 * 35  # the products are made for all together


def test_the_batch_and_the_copy_leave_every_value_as_it_is(monkeypatch):
    steps = [a_step(f"{i}", shape, "cpu") for i in range(3) for shape in ((150, 140), (20, 7))]

    def values() -> list[dict]:
        look = Look()
        for step in sorted(steps, key=lambda step: step.before.shape):
            look.add(step)
        return [found.values for found in look.results()]

    together = values()
    monkeypatch.setattr(measuring, "_MOST_ENTRIES", 0)
    for one, other in zip(together, values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", BALLS)
def test_dual_norms_are_those_of_the_groups_oracle(algorithm):
    step = a_step("w", (6, 9), "cpu", algorithm)
    look = Look(exact=True)
    look.add(step)
    (found,) = look.results()
    m = step.observation.momentum
    want = oracle(step.observation.group, 6, 9).dual(spectra.measure(m, exact=True), m)
    torch.testing.assert_close(found.values["momentum_dual"], want.double())


@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e20, 3e38])
@pytest.mark.parametrize("algorithm", ["f_muon", "s_fanion", "row"])
def test_values_follow_the_scale_of_the_matrices(algorithm, size):
    step = a_step("w", (6, 9), "cpu", algorithm)
    unit = step.gradient / step.gradient.abs().max()
    found = {}
    for scale in (1.0, size):
        x = unit * scale
        observation = step.observation._replace(gradient=x, momentum=x)
        look = Look()
        look.add(step._replace(gradient=x, observation=observation))
        (measured,) = look.results()
        found[scale] = measured.values
    homogeneous = ("nuclear", "kyfan", "frobenius", "spectral", "dual")
    for name, value in found[1.0].items():
        of_x = name.startswith(("gradient", "momentum"))
        factor = size if of_x and name.partition("_")[2] in homogeneous else 1.0
        torch.testing.assert_close(found[size][name], value * factor, rtol=1e-3, atol=0)
