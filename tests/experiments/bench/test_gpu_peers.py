"""The algorithms that race torch against CuPy are right in any array library."""

import pytest
import torch

from experiments.bench import gpu_peers, polar
from lit_fanions import lmo


def test_only_algorithms_that_depend_on_k_race_for_every_k(monkeypatch):
    numpy = pytest.importorskip("numpy")  # shares memory with torch as CuPy does
    monkeypatch.setattr(gpu_peers, "_SVD_SIZE", 20)
    pairs = list(gpu_peers._pairs(numpy, polar.gaussian((40, 30)), [2, 3]))
    assert [(name, k) for name, k, _ in pairs] == [
        *((name, None) for name in ("full SVD", "power iteration", "Newton-Schulz")),
        *((name, k) for k in (2, 3) for name in ("randomized SVD", "Lanczos")),
    ]
    for name, k, sides in pairs:
        assert list(sides) == ["torch", "cupy"]
        if name != "Lanczos":  # CuPy's own needs a GPU
            ours, theirs = (torch.as_tensor(sides[side](0)[1]) for side in sides)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        if name == "full SVD":
            assert len(ours) == 20
        if k:
            assert len(sides["torch"](0)[1]) >= k


@pytest.mark.parametrize("xp", [torch, pytest.param(None, id="numpy")])
def test_algorithms_shared_with_cupy(xp):
    # NumPy stands in for CuPy, which has the same functions.
    m, start = polar.power_law((40, 30)), lmo.start_block((40, 30), 4, device=torch.device("cpu"))
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    if xp is None:
        xp = pytest.importorskip("numpy")
        args = xp, m.numpy(), start.numpy()
    else:
        args = xp, m, start
    results = {
        name: [torch.as_tensor(part) for part in algorithm(*args)]
        for name, algorithm in gpu_peers.ALGORITHMS.items()
    }
    for name, k in (("full SVD", 30), ("randomized SVD", 4), ("power iteration", 1)):
        found = lmo.Triplets(*results[name])
        torch.testing.assert_close(found.S[:k], s[:k], rtol=1e-3, atol=1e-4)
        d = found.U[:, :k] @ found.Vh[:k]
        torch.testing.assert_close(d, u[:, :k] @ vh[:k], rtol=0, atol=0.02)
    d = torch.stack(results["Newton-Schulz"])
    assert polar.quality(m, d, s.sum()) == pytest.approx(1, abs=0.25)
