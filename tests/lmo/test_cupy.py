"""Everything around the call of CuPy's svds, with a CuPy made of NumPy (test_cuda.py: the real)."""

import contextlib
import sys
import types

import numpy as np
import pytest
import torch

from lit_fanions import lmo, norms
from lit_fanions.lmo.cupy_svds import cupy_svds
from tests.lmo.matrices import (
    distances,
    gaussian,
    orthonormal_vectors,
    power_law,
    quality,
    with_spectrum,
)

STREAM = 77


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda", 1)


def on_gpu(m: torch.Tensor) -> torch.Tensor:
    return m.as_subclass(OnGPU)


def plain(tensors) -> list[torch.Tensor]:
    return [x.as_subclass(torch.Tensor) for x in tensors]


@pytest.fixture
def cupy(monkeypatch):
    """A CuPy that answers as the real one does; its ``log`` has what it was called with."""
    log, active = [], []
    state = ["the user's"]

    @contextlib.contextmanager
    def entered(name, value):
        active.append((name, value))
        yield
        active.remove((name, value))

    def svds(a, k=6, *, tol=0):
        rows, cols = a.shape
        log.append({"shape": a.shape, "dtype": a.dtype, "k": k, "tol": tol, "active": list(active)})
        starts.append(state[0].random(min(rows, cols)))
        if k >= min(rows, cols):
            raise ValueError(f"k must be smaller than min(m, n) (actual: {k})")
        if k + 2 >= min(rows, cols):  # its basis has a vector less than there are dimensions
            raise IndexError("Index out of bounds")
        if not a.any() or not np.isfinite(a).all():  # Lanczos divides by the length of a product
            raise np.linalg.LinAlgError("Eigenvalues did not converge")
        # Values in ascending order, but for those that are cut off.
        u, s, vh = np.linalg.svd(a, full_matrices=False)
        u, s, vh = u[:, :k], s[:k], vh[:k]
        large = s**2 > s[0] ** 2 * np.finfo(a.dtype).eps * (1e3 if a.dtype == np.float32 else 1e6)
        order = [*np.flatnonzero(large)[::-1], *np.flatnonzero(~large)]
        return u[:, order], np.where(large, s, 0)[order], vh[order]

    starts = []
    random = types.SimpleNamespace(
        RandomState=np.random.RandomState,
        get_random_state=lambda: state[0],
        set_random_state=lambda new: state.__setitem__(0, new),
    )
    cuda = types.SimpleNamespace(
        Device=lambda index: entered("device", index),
        ExternalStream=lambda stream: entered("stream", stream),
    )
    names = ["cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.sparse", "cupyx.scipy.sparse.linalg"]
    modules = {name: types.ModuleType(name) for name in names}
    modules["cupy"].cuda = cuda
    modules["cupy"].random = random
    modules["cupy"].from_dlpack = lambda x: x.as_subclass(torch.Tensor).numpy()
    modules["cupyx.scipy.sparse.linalg"].svds = svds
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    stream = types.SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return types.SimpleNamespace(log=log, starts=starts, state=state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 30, 20), (3, 20, 30)])
def test_triplets_come_in_descending_order(shape, dtype, cupy):
    m = torch.stack([with_spectrum(power_law(20, 0.5), *shape[1:], i) for i in range(shape[0])])
    m = m.to(dtype)
    u, s, vh = plain(cupy_svds(on_gpu(m), 4, tol=1e-3))
    assert (u.shape, s.shape, vh.shape) == (
        (shape[0], shape[1], 4),
        (shape[0], 4),
        (shape[0], 4, shape[2]),
    )
    assert {u.dtype, s.dtype, vh.dtype} == {dtype}
    torch.testing.assert_close(s, torch.linalg.svdvals(m)[:, :4])
    assert distances(m, u, s, vh).max() < 1e-5


def test_each_matrix_is_solved_on_its_device_and_stream(cupy):
    cupy_svds(on_gpu(gaussian(2, 30, 20)), 4, tol=1e-3)
    call = {
        "shape": (30, 20),
        "dtype": np.float32,
        "k": 4,
        "tol": 1e-3,
        "active": [("device", 1), ("stream", STREAM)],
    }
    assert cupy.log == [call, call]


def test_values_that_are_cut_off_stay_with_their_vectors(cupy):
    m = with_spectrum(power_law(3, 1.0), 30, 20).float()[None]
    u, s, vh = plain(cupy_svds(on_gpu(m), 5, tol=1e-3))
    torch.testing.assert_close(s[0, :3], power_law(3, 1.0).float())
    assert not s[0, 3:].any()
    torch.testing.assert_close((u * s[:, None]) @ vh, m, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, scale",
    [(torch.float16, 1), (torch.bfloat16, 1e20), (torch.float32, 1e-20), (torch.float64, 1e-20)],
)
def test_directions(dtype, scale, cupy):
    m = (gaussian(2, 3, 30, 40) * scale).to(dtype)
    (d,) = plain([lmo.direction(on_gpu(m), rank=3, solver="cupy", tol=1e-4)])
    assert (d.shape, d.dtype) == (m.shape, m.dtype)
    assert quality(m, d, norms.KyFanDual(3)) > 0.99
    assert {call["tol"] for call in cupy.log} == {1e-4}
    assert {call["dtype"] for call in cupy.log} <= {np.dtype("float32"), np.dtype("float64")}
    _, s, _ = plain(lmo.top_singular(on_gpu(m), 3, solver="cupy"))
    torch.testing.assert_close(
        s.double(), torch.linalg.svdvals(m.double())[..., :3], rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("shape", [(30, 20), (1, 20), (20, 1), (6, 6)])
def test_all_triplets_are_more_than_cupy_gives(shape, cupy):
    m = gaussian(2, *shape)
    u, s, vh = plain(lmo.top_singular(on_gpu(m), 50, solver="cupy"))
    torch.testing.assert_close(s, torch.linalg.svdvals(m), rtol=1e-4, atol=0)
    assert orthonormal_vectors(u, vh)
    torch.testing.assert_close((u * s[:, None]) @ vh, m, rtol=0, atol=1e-4)


@pytest.mark.parametrize("k", [3, 4, 5])
def test_almost_all_triplets_are_more_than_cupy_gives(k, cupy):
    m = gaussian(1, 6, 9)
    u, s, vh = plain(lmo.top_singular(on_gpu(m), k, solver="cupy"))
    assert len(cupy.log) == (k == 3)
    torch.testing.assert_close(s, torch.linalg.svdvals(m)[:, :k], rtol=1e-4, atol=0)
    assert orthonormal_vectors(u, vh)


def test_zero_and_broken_matrices_do_not_reach_cupy(cupy):
    m = gaussian(5, 30, 20)
    m[1] = 0
    m[2, 3, 4] = torch.nan
    m[3, 4, 5] = torch.inf
    for found in (
        cupy_svds(on_gpu(m), 4, tol=1e-4),
        lmo.top_singular(on_gpu(m), 4, solver="cupy", tol=1e-4),
    ):
        u, s, vh = plain(found)
        assert not s[1].any() and orthonormal_vectors(u[:2], vh[:2])
        assert all(x[2:4].isnan().all() for x in (u, s, vh))
        torch.testing.assert_close(s[::4], torch.linalg.svdvals(m[::4])[:, :4], rtol=1e-4, atol=0)
    assert len(cupy.log) == 4
    (d,) = plain([lmo.direction(on_gpu(m), rank=4, solver="cupy")])
    assert not d[1].any()
    assert d[2:4].isnan().all()


def test_starts_come_from_the_generator(cupy):
    m = on_gpu(gaussian(1, 30, 20))

    def start(seed: int | None) -> np.ndarray:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        lmo.top_singular(m, 4, solver="cupy", generator=generator)
        return cupy.starts[-1]

    assert np.array_equal(start(1), start(1))
    assert np.array_equal(start(None), start(None))
    assert not np.array_equal(start(1), start(2))
    assert cupy.state == ["the user's"]


def test_without_cupy_the_message_says_how_to_get_it(cupy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    with pytest.raises(RuntimeError, match=r'pip install "lit-fanions\[cuda12\]"') as raised:
        lmo.direction(on_gpu(gaussian(20, 30)), rank=2, solver="cupy")
    assert isinstance(raised.value.__cause__, ImportError)


@pytest.mark.parametrize("rank", [1, 2])
def test_without_cuda_the_message_says_what_to_choose(rank):
    with pytest.raises(RuntimeError, match='needs a CUDA tensor, got one on cpu; choose "lanczos"'):
        lmo.direction(gaussian(20, 30), rank=rank, solver="cupy")


def test_its_steps_are_its_own(cupy):
    with pytest.raises(ValueError, match="takes no steps, got 3"):
        lmo.direction(on_gpu(gaussian(20, 30)), rank=2, solver="cupy", solver_steps=3)
    assert not cupy.log
