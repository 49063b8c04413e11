"""CuPy's svds as a solver, with a stand-in of NumPy; test_cuda.py has the real one."""

import contextlib
import sys
import types

import numpy as np
import pytest
import torch

from lit_fanions import lmo, norms
from lit_fanions.lmo.convergence import Goal
from lit_fanions.lmo.cupy_svds import svds
from tests.lmo.conftest import DeviceBranches
from tests.lmo.matrices import distances, orthonormal_vectors, quality
from tests.matrices import gaussian, power_law, with_spectrum

STREAM = 77


def leading_eigenpairs(product, start: np.ndarray, k: int, tol: float):
    """Return the k largest eigenvalues and eigenvectors, by thick-restart Lanczos as CuPy's.

    What matters here is when it stops: when the norm of all k residuals is at most tol, whatever
    the scale of the matrix.
    """
    size = min(max(2 * k, k + 32), len(start) - 1)
    basis, images = start[None] / np.linalg.norm(start), np.zeros((0, len(start)), start.dtype)
    for _ in range(10 * len(start)):
        images = np.vstack([images, product(basis[-1])])
        outside = images[-1]
        for _ in range(2):
            outside = outside - basis.T @ (basis @ outside)
        beta = np.linalg.norm(outside)
        if len(basis) == size:
            w, q = np.linalg.eigh(basis @ images.T)
            w, q = w[-k:], q[:, -k:]
            if np.linalg.norm(beta * q[-1]) <= tol:
                break
            basis, images = q.T @ basis, q.T @ images
        outside = outside / max(beta, np.finfo(start.dtype).tiny)
        outside = outside - basis.T @ (basis @ outside)
        basis = np.vstack([basis, outside / np.linalg.norm(outside)])
    return w, (q.T @ basis).T


class StandIn:
    """What CuPy's svds was called with, and what it took."""

    def __init__(self) -> None:
        self.log: list[dict] = []
        self.starts: list[np.ndarray] = []
        self.state = ["the user's"]
        self.active: list[tuple] = []
        self.products = 0

    @contextlib.contextmanager
    def entered(self, name, value):
        self.active.append((name, value))
        yield
        self.active.remove((name, value))

    def svds(self, a, k=6, *, tol=0):
        rows, cols = a.shape
        limit = min(rows, cols)
        active = list(self.active)
        self.log.append({"shape": a.shape, "dtype": a.dtype, "k": k, "tol": tol, "active": active})
        self.starts.append(self.state[0].random(limit))
        if k >= limit:
            raise ValueError(f"k must be smaller than min(m, n) (actual: {k})")
        if k + 2 >= limit:  # its basis has a vector less than there are dimensions
            raise IndexError("Index out of bounds")
        if not a.any() or not np.isfinite(a).all():  # Lanczos divides by the length of a product
            raise np.linalg.LinAlgError("Eigenvalues did not converge")
        tall = a if rows >= cols else a.T

        def product(x):
            self.products += 1
            return tall.T @ (tall @ x)

        w, x = leading_eigenpairs(product, self.starts[-1].astype(a.dtype), k, tol)
        large = w > w.max() * np.finfo(a.dtype).eps * (1e3 if a.dtype == np.float32 else 1e6)
        s = np.sqrt(w[large])
        # Values in ascending order, but for those that are cut off, whose vectors are arbitrary.
        short = np.linalg.qr(np.hstack([x[:, large], self.starts[-1][:, None] * x[:, ~large]]))[0]
        short[:, : len(s)] = x[:, large]
        long = np.linalg.qr(np.hstack([tall @ x[:, large] / s, tall[:, : k - len(s)] ** 2 + 1]))[0]
        long[:, : len(s)] = tall @ x[:, large] / s
        s = np.concatenate([s, np.zeros(k - len(s))]).astype(a.dtype)
        u, v = (long, short) if rows >= cols else (short, long)
        return u.astype(a.dtype), s, np.ascontiguousarray(v.T.astype(a.dtype))


@pytest.fixture
def cupy(monkeypatch):
    """Put a CuPy of NumPy in place of the real one, with tensors that say they are on a GPU."""
    stand_in = StandIn()
    state = stand_in.state
    random = types.SimpleNamespace(
        RandomState=np.random.RandomState,
        get_random_state=lambda: state[0],
        set_random_state=lambda new: state.__setitem__(0, new),
    )
    cuda = types.SimpleNamespace(
        Device=lambda index: stand_in.entered("device", index),
        ExternalStream=lambda stream: stand_in.entered("stream", stream),
    )
    names = ["cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.sparse", "cupyx.scipy.sparse.linalg"]
    modules = {name: types.ModuleType(name) for name in names}
    modules["cupy"].cuda = cuda
    modules["cupy"].random = random
    modules["cupy"].from_dlpack = lambda x: x.numpy()
    modules["cupyx.scipy.sparse"].linalg = modules["cupyx.scipy.sparse.linalg"]
    modules["cupyx.scipy.sparse.linalg"].svds = stand_in.svds
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    stream = types.SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    with DeviceBranches():
        yield stand_in


SPECTRA = {
    "gaussian": None,
    "power law": power_law(120, 0.5),
    "steep": torch.logspace(0, -3, 120),
    "one large": torch.cat([torch.tensor([30.0]), torch.linspace(1.5, 0.5, 119)]),
}


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize(
    ("shape", "scale"), [((300, 120), 1), ((120, 300), 1e-10), ((300, 120), 1e10)]
)
@pytest.mark.parametrize("name", SPECTRA)
def test_the_tolerance_is_that_of_the_residuals(name, shape, k, tol, scale, cupy):
    s = SPECTRA[name]
    m = (gaussian(*shape) if s is None else with_spectrum(s, *shape))[None].float() * scale
    found = lmo.top_singular(m, k, solver="cupy", residual_tol=tol)
    exact = torch.linalg.svdvals(m.double())[:, :k]
    rounding = 50 * torch.finfo(m.dtype).eps * (exact[:, :1] / exact) ** 2
    assert (distances(m, *found) <= tol + rounding).all()
    torch.testing.assert_close(found.S.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_error_is_that_of_the_direction(name, k, cupy):
    s = SPECTRA[name]
    m = (gaussian(300, 120) if s is None else with_spectrum(s, 300, 120)).float()
    u, _, vh = lmo.top_singular(m, k, solver="cupy", tol=1e-2)
    error = torch.linalg.matrix_norm(u.double() @ vh.double() - norms.KyFanDual(k).lmo(m))
    assert error <= 1e-2 * k**0.5
    assert u.shape == (300, k) and vh.shape == (k, 120)
    assert cupy.products < 1000


def test_a_loose_tolerance_takes_fewer_products(cupy):
    m, products = gaussian(1, 400, 300), []
    for tol in (1e-1, 1e-5):
        before = cupy.products
        lmo.top_singular(m, 10, solver="cupy", residual_tol=tol)
        products.append(cupy.products - before)
    assert products[0] < products[1]


@pytest.mark.parametrize("name", SPECTRA)
def test_a_tolerance_below_rounding_ends(name, cupy):
    s = SPECTRA[name]
    m = gaussian(300, 120) if s is None else with_spectrum(s, 300, 120).float()
    lmo.top_singular(m, 10, solver="cupy", residual_tol=0.0)
    assert cupy.products < 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 30, 20), (3, 20, 30)])
def test_triplets_come_in_descending_order(shape, dtype, cupy):
    m = torch.stack([with_spectrum(power_law(20, 0.5), *shape[1:], i) for i in range(shape[0])])
    m = m.to(dtype)
    u, s, vh = svds(m, 4, goal=Goal(1e-3))
    assert (u.shape, s.shape, vh.shape) == (
        (shape[0], shape[1], 4),
        (shape[0], 4),
        (shape[0], 4, shape[2]),
    )
    assert {u.dtype, s.dtype, vh.dtype} == {dtype}
    torch.testing.assert_close(s, torch.linalg.svdvals(m)[:, :4])
    assert distances(m, u, s, vh).max() < 1e-5


def test_each_matrix_is_solved_on_its_device_and_stream(cupy):
    svds(gaussian(2, 30, 20), 4, goal=Goal(1e-3))
    for call in cupy.log:
        assert call.pop("tol") > 0
    call = {
        "shape": (30, 20),
        "dtype": np.float32,
        "k": 4,
        "active": [("device", 1), ("stream", STREAM)],
    }
    assert cupy.log == [call, call]


def test_values_that_are_cut_off_stay_with_their_vectors(cupy):
    m = with_spectrum(power_law(3, 1.0), 30, 20).float()[None]
    u, s, vh = svds(m, 5, goal=Goal(1e-4))
    torch.testing.assert_close(s[0, :3], power_law(3, 1.0).float())
    assert not s[0, 3:].any()
    torch.testing.assert_close((u * s[:, None]) @ vh, m, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, scale",
    [(torch.float16, 1), (torch.bfloat16, 1e20), (torch.float32, 1e-20), (torch.float64, 1e-20)],
)
def test_directions_keep_dtype_and_scale(dtype, scale, cupy):
    m = (gaussian(2, 3, 30, 40) * scale).to(dtype)
    d = lmo.direction(m, rank=3, solver="cupy", tol=1e-4)
    assert (d.shape, d.dtype) == (m.shape, m.dtype)
    assert quality(m, d, norms.KyFanDual(3)) > 0.99
    assert {call["dtype"] for call in cupy.log} <= {np.dtype("float32"), np.dtype("float64")}
    _, s, _ = lmo.top_singular(m, 3, solver="cupy")
    torch.testing.assert_close(
        s.double(), torch.linalg.svdvals(m.double())[..., :3], rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("shape", [(30, 20), (1, 20), (20, 1), (6, 6)])
def test_all_triplets_are_more_than_cupy_gives(shape, cupy):
    m = gaussian(2, *shape)
    u, s, vh = lmo.top_singular(m, 50, solver="cupy")
    torch.testing.assert_close(s, torch.linalg.svdvals(m), rtol=1e-4, atol=0)
    assert orthonormal_vectors(u, vh)
    torch.testing.assert_close((u * s[:, None]) @ vh, m, rtol=0, atol=1e-4)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_almost_all_triplets_are_more_than_cupy_gives(k, cupy):
    m = gaussian(1, 6, 9)
    u, s, vh = lmo.top_singular(m, k, solver="cupy")
    assert bool(cupy.log) == (k == 2)
    torch.testing.assert_close(s, torch.linalg.svdvals(m)[:, :k], rtol=1e-4, atol=0)
    assert orthonormal_vectors(u, vh)


def test_zero_and_broken_matrices_do_not_reach_cupy(cupy):
    m = gaussian(5, 30, 20)
    m[1] = 0
    m[2, 3, 4] = torch.nan
    m[3, 4, 5] = torch.inf
    for found in (
        svds(m, 4, goal=Goal(1e-4)),
        lmo.top_singular(m, 4, solver="cupy", residual_tol=1e-4),
    ):
        u, s, vh = found
        assert not s[1].any() and orthonormal_vectors(u[:2], vh[:2])
        assert all(x[2:4].isnan().all() for x in (u, s, vh))
        torch.testing.assert_close(s[::4], torch.linalg.svdvals(m[::4])[:, :4], rtol=1e-4, atol=0)
    assert len(cupy.log) == 4
    d = lmo.direction(m, rank=4, solver="cupy")
    assert not d[1].any()
    assert d[2:4].isnan().all()


def test_starts_come_from_the_generator(cupy):
    m = gaussian(1, 30, 20)

    def start(seed: int | None) -> np.ndarray:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        lmo.top_singular(m, 4, solver="cupy", generator=generator)
        return cupy.starts[-1]

    assert np.array_equal(start(1), start(1))
    assert np.array_equal(start(None), start(None))
    assert not np.array_equal(start(1), start(2))
    assert cupy.state == ["the user's"]


@pytest.mark.parametrize(
    "version, extra", [("12.8", "cuda12"), ("13.0", "cuda13"), (None, "cuda13")]
)
def test_without_cupy_the_message_says_how_to_get_it(version, extra, cupy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(RuntimeError, match=rf'pip install "lit-fanions\[{extra}\]"') as raised:
        lmo.direction(gaussian(20, 30), rank=2, solver="cupy")
    assert isinstance(raised.value.__cause__, ImportError)


@pytest.mark.parametrize("rank", [1, 2])
def test_without_cuda_the_message_says_what_to_choose(rank):
    with pytest.raises(RuntimeError, match='needs a CUDA tensor, got one on cpu; choose "lanczos"'):
        lmo.direction(gaussian(20, 30), rank=rank, solver="cupy")


def test_solver_steps_are_refused(cupy):
    with pytest.raises(ValueError, match="takes no solver_steps, got 3"):
        lmo.direction(gaussian(20, 30), rank=2, solver="cupy", solver_steps=3)
    assert not cupy.log
