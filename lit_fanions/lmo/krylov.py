"""Rank k to a tolerance: thick-restart block Lanczos, every step a product with m and with m^T.

The method of the paper's section 3 (Wu & Simon, SIAM J. Matrix Anal. Appl. 22, 2000), on m^T m
without forming it. Vectors come in blocks, because a product with eight vectors reads the matrix as
often as a product with one. Only the right vectors are orthonormalised, since the left vectors
follow from them.

The recurrence tells when the triplets may be accurate enough, but squares hide what is small beside
the largest singular value. So the residuals of the triplets themselves decide: where they are too
large, the search goes on from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_fanions.lmo.convergence import Check, Goal, Projection, direction_error
from lit_fanions.lmo.factorisations import (
    completed,
    gram_schmidt,
    noise,
    rows_outside,
    scattered_rows,
)
from lit_fanions.lmo.scaling import largest_entry

# Blocks of a cycle, before a restart keeps the best of their vectors.
_BLOCKS = 24
# Checking convergence costs an eigendecomposition: check after the basis has grown by this factor.
_LOOK_AGAIN = 1.25
# Residual at which a search in coarse products stops: rounding lets few become smaller.
_COARSE_TOLERANCE = 5e-4
# Vectors beside the k that start the second search, and what their number is a multiple of, because
# processors multiply such blocks faster.
_SPARE, _TILE = 2, 8
# Random columns beside a start that may lack a leading singular vector, and the blocks after which
# such a vector stands out.
_FRESH = 4
_MATURE = 3


class Lanczos(NamedTuple):
    """What ``lanczos`` found."""

    U: Tensor  # (batch, rows, width), width >= k where the matrix has as many
    S: Tensor  # (batch, width), descending
    Vh: Tensor  # (batch, width, cols)
    # The larger of |m^T u - s v| and |m v - s u| over s, (batch, k), computed from the triplets.
    # Above the tolerance where the search ended without reaching it.
    residuals: Tensor
    error: Tensor  # estimate of |U_k V_k^T - exact| / sqrt(k), (batch,), see ``direction_error``
    products: int  # columns multiplied by m or by m^T; counted once for matrices solved together


def block_width(k: int, limit: int) -> int:
    """Return the number of columns of a cold start for k triplets.

    A wider block uses the memory's bandwidth better and converges later. A block finds as many
    copies of a repeated singular value as it has columns; where more are wanted, ``lanczos`` adds
    random columns.
    """
    width = 8 if k <= 4 else 16 if k <= 48 else 32
    return min(width, limit)


def lanczos(
    m: Tensor,
    k: int,
    start: Tensor,
    *,
    goal: Goal = Goal(1e-2),  # noqa: B008
    cycles: int = 50,
    basis: int | None = None,
    coarse: torch.dtype | None = None,
    random_start: bool = False,
) -> Lanczos:
    """Return the k leading singular triplets, found by thick-restart block Lanczos.

    On a CPU every matrix stops when its own residuals are small enough. Elsewhere all stop
    together, and the host solves the projected problem while the device multiplies the next block.

    In float32 residuals below some 1e-6 s_1 / s_k are out of reach. The search then stops at what
    rounding allows, and the residuals in the answer say how much that is.

    Args:
        m: Matrices, (batch, rows, cols), float32 or float64, of entries from 1e-30 to 1e30.
        k: At most min(rows, cols).
        start: Start vectors, (batch, cols, width), of full rank; the blocks get their width.
        goal: When to stop.
        cycles: Largest number of restarts, the start included.
        basis: Number of vectors that are collected before a restart keeps k and a block of the
            best, at least k and three blocks. None: 24 blocks.
        coarse: A dtype of faster products: a first search is made in it, and its outcome is the
            start of one in the dtype of m, which alone decides when to stop.
        random_start: Whether the start vectors are random. Others may be orthogonal to a leading
            singular vector: a few random vectors are added to them, and the search does not end
            before three blocks. It may still miss a vector whose singular value is larger than
            the next by a few per cent only.

    Returns:
        See ``Lanczos``. NaN for a matrix with a NaN or an infinity.
    """
    limits = _Limits(k, goal, cycles, basis, coarse)
    fresh = 0 if random_start else _FRESH
    if m.shape[-1] > m.shape[-2]:  # the vectors to orthonormalise shall be short
        turned = _search_each(m.mT, (m @ start).mT, limits, fresh)
        return turned._replace(U=turned.Vh.mT, Vh=turned.U.mT)
    return _search_each(m, start.mT, limits, fresh)


class _Limits(NamedTuple):
    """What ends a search: see the arguments of ``lanczos``."""

    k: int
    goal: Goal
    cycles: int
    basis: int | None
    coarse: torch.dtype | None


def _search_each(m: Tensor, start: Tensor, limits: _Limits, fresh: int) -> Lanczos:
    """Run ``lanczos`` on a batch, on a CPU matrix by matrix; start vectors are rows."""
    if m.device.type != "cpu" or not len(m):
        return _search(m, start, limits, fresh)
    found = [_search(x, block, limits, fresh) for x, block in zip(m, start, strict=True)]
    width = min(len(x.S) for x in found)  # each stopped when it had enough
    parts = [(x.U[:, :width], x.S[:width], x.Vh[:width], x.residuals, x.error) for x in found]
    u, s, vh, residuals, error = map(torch.stack, zip(*parts, strict=True))
    return Lanczos(u, s, vh, residuals, error, sum(x.products for x in found))


def _search(m: Tensor, start: Tensor, limits: _Limits, fresh: int) -> Lanczos:
    if limits.coarse is None:
        return _krylov(m, start, limits, fresh)
    residual = max(limits.goal.residual, _COARSE_TOLERANCE)
    rough = limits._replace(goal=Goal(residual, limits.goal.error), cycles=2)
    found = _krylov(m.to(limits.coarse), start, rough, fresh)
    rows = -(-(limits.k + _SPARE) // _TILE) * _TILE
    better = _krylov(m, found.Vh[..., :rows, :], limits, 0, blocks=1)
    return better._replace(products=found.products + better.products)


def _krylov(
    m: Tensor, start: Tensor, limits: _Limits, fresh: int, blocks: int = _MATURE
) -> Lanczos:
    """Search until the goal or a limit is reached, from start rows and ``fresh`` random rows.

    The answer has the dtype of the start; that of m may be coarser. ``blocks``: number of blocks
    after which the search looks for the first time.
    """
    k, on_cpu = limits.k, m.device.type == "cpu"
    basis = _BLOCKS * block_width(k, m.shape[-1]) if limits.basis is None else limits.basis
    space = _Space(m, start, fresh, k, basis)
    check = Check(limits.goal, copies=space.width, age=0 if fresh else _MATURE)
    rough = m.dtype != start.dtype  # what coarse products find is the start of another search
    cycle, look = 1, float(max(k + 1, blocks * space.width))
    while True:
        space.multiply()
        check.age += 1
        complete, over = space.ready == space.done, space.done >= space.size
        if not (complete or over or space.done >= look):
            continue
        look = _LOOK_AGAIN * space.done
        projection = space.project()
        if not on_cpu and space.ready < space.size:
            space.multiply()  # the device does this while the host goes on
            check.age += 1
        s, q = projection.ritz()
        around, spread = projection.around_cut(s), projection.spread()
        last = complete or (over and cycle == limits.cycles)
        promising = check.passes(projection.estimates(s, q), around, spread)
        following: Tensor | None = None
        if last or (promising and (rough or check.age >= _MATURE)):
            found, outside = space.triplets(s, q, around, spread)
            if last or rough:
                return found
            if not check.passes(found.residuals.to(s.device), around, spread):
                if check.stalls(found.residuals):
                    return found
                following = outside
            elif check.may_lack_copies(s[..., :k]):
                following = space.random_rows()
                check.copies, check.age = check.copies + space.width, 0
            else:
                return found
        if over:
            space.restart(s, q)
            cycle, look = cycle + 1, float(space.done)
        if following is not None:
            space.follow(following)
            look = float(space.ready)


class _Space:
    """An orthonormal basis v (as rows) that grows by blocks, and what is known of m on it.

    Rows before ``done`` are multiplied; rows from ``done`` to ``ready`` are the next block.
    """

    def __init__(self, m: Tensor, start: Tensor, fresh: int, k: int, basis: int) -> None:
        cols = m.shape[-1]
        width = min(start.shape[-2], cols)
        fresh = min(fresh, cols - width)
        batch, self.dtype = m.shape[:-2], start.dtype
        self.m, self.k, self.width = m, k, width + fresh
        self.size = min(max(basis, k + 3 * self.width), cols)
        # Squares of the singular values would lose half of float32's digits.
        self.exact = torch.float32 if m.device.type == "mps" else torch.float64
        length = self.size + self.width
        self.v = start.new_empty(*batch, length + self.width, cols)
        self.w = start.new_empty(*batch, length, m.shape[-2], dtype=self.exact)  # v m^T
        self.gram = self.w.new_zeros(*batch, length, length)  # w w^T
        self.v[..., :width, :] = gram_schmidt(start[..., :width, :])
        if fresh:
            rows = scattered_rows(fresh, cols, start, index=1).expand(*batch, -1, -1)
            self.v[..., width : width + fresh, :], _ = rows_outside(rows, self.v[..., :width, :])
        self.done, self.ready, self.products = 0, self.width, 0

    def multiply(self) -> None:
        """Multiply the next block by m and by m^T; what is outside the basis follows it."""
        block, new = slice(self.done, self.ready), self.ready - self.done
        left = self._left(self.v[..., block, :])
        if not self.products:
            # From the block, because the largest entry of the matrix would take a copy of it.
            peak = largest_entry(left)
            self.broken = ~peak.isfinite()
            self.scale = torch.where(self.broken | (peak == 0), 1, 1 / peak)
        left = torch.where(self.broken, 0, left * self.scale)
        self.w[..., block, :] = left
        coupled = self.w[..., block, :] @ self.w[..., : self.ready, :].mT
        self.gram[..., block, : self.ready] = coupled
        self.gram[..., : self.ready, block] = coupled.mT
        z = (left.to(self.m.dtype) @ self.m).to(self.dtype) * self.scale
        z = torch.where(self.broken, 0, z)
        fresh, self._coupling = rows_outside(z, self.v[..., : self.ready, :])
        self.products += 2 * new
        self.done = self.ready
        self._append(fresh)

    def _left(self, rows: Tensor) -> Tensor:
        """Return rows m^T; in this order the product is half as long on a CPU as in the other."""
        return (self.m @ rows.to(self.m.dtype).mT).mT.to(self.dtype)

    def _append(self, block: Tensor) -> None:
        self.ready = min(self.done + block.shape[-2], self.v.shape[-1])
        self.v[..., self.done : self.ready, :] = block[..., : self.ready - self.done, :]

    def project(self) -> Projection:
        """Return what a check needs; on an accelerator copies to the host are only started."""
        gram = self.gram[..., : self.done, : self.done]
        w, complete = self.w[..., : self.done, :], self.ready == self.done
        (gram, coupling), ready = _to_host(gram, self._coupling)
        return Projection(self.k, gram, coupling, w, complete, ready)

    def triplets(
        self, s: Tensor, q: Tensor, around: Tensor, spread: Tensor
    ) -> tuple[Lanczos, Tensor]:
        """Return the triplets with their residuals, and m^T u - s v of the k of them as rows.

        ``s`` and the left singular vectors ``q`` belong to the first n vectors of the basis;
        ``around`` has the first k + 1 singular values; ``spread``: see ``direction_error``.
        """
        k, n = self.k, q.shape[-2]
        best = q[..., : min(k + self.width, n)].mT.to(self.w)
        s = s[..., : best.shape[-2]].to(self.w)
        least = noise(s, self.dtype).to(self.dtype)
        u = completed((best @ self.w[..., :n, :]).to(self.dtype), s)
        vh = best.to(self.dtype) @ self.v[..., :n, :]
        s = s.to(self.dtype)
        lengths = s[..., :k, None]
        right = (u[..., :k, :].to(self.m.dtype) @ self.m).to(self.dtype) * self.scale
        left = self._left(vh[..., :k, :]) * self.scale
        right = torch.where(self.broken, 0, right - lengths * vh[..., :k, :])
        left = torch.where(self.broken, 0, left - lengths * u[..., :k, :])
        norms = [torch.linalg.vector_norm(x, dim=-1) for x in (left, right)]
        outside = torch.maximum(*norms)
        # A zero singular value has no defined vectors: its residual counts as 0 if what m makes of
        # the vectors is as small as what counts as zero.
        zero = torch.where(outside > least, outside / least, 0.0)
        residuals = torch.where(s[..., :k] > least, outside / s[..., :k], zero)
        self.products += 2 * k
        nan = torch.where(self.broken, torch.nan, 0.0).to(self.dtype)
        s = s / self.scale[..., 0] + nan[..., 0]
        error = direction_error(residuals.to(around), around, spread).to(nan) + nan[..., 0, 0]
        parts = (u.mT + nan, s, vh + nan, residuals + nan[..., 0], error)
        return Lanczos(*parts, self.products), right

    def restart(self, s: Tensor, q: Tensor) -> None:
        """Keep k and a block of the best vectors, and the next block."""
        kept = min(self.k + self.width, self.done)
        s, q = s.to(self.w), q.to(self.w)
        following = self.v[..., self.done : self.ready, :].clone()
        self.v[..., :kept, :] = q[..., :kept].mT.to(self.dtype) @ self.v[..., : self.done, :]
        self.w[..., :kept, :] = q[..., :kept].mT @ self.w[..., : self.done, :]
        self.gram.zero_().diagonal(dim1=-2, dim2=-1)[..., :kept] = s[..., :kept] ** 2
        self.done = kept
        self._append(following)

    def follow(self, rows: Tensor) -> None:
        """Replace the next block by the span of given rows outside the basis, the longest first."""
        longest = torch.linalg.vector_norm(rows, dim=-1).topk(min(self.width, rows.shape[-2]))
        rows = rows.gather(
            -2, longest.indices.unsqueeze(-1).expand(*longest.indices.shape, rows.shape[-1])
        )
        block, _ = rows_outside(rows, self.v[..., : self.done, :])
        self._append(block)

    def random_rows(self) -> Tensor:
        """Return a block of random rows, others after each product."""
        rows = scattered_rows(self.width, self.v.shape[-1], self.v, index=self.products)
        return rows.expand(*self.m.shape[:-2], -1, -1)


def _to_host(*tensors: Tensor) -> tuple[list[Tensor], Callable[[], None]]:
    """Return copies on the CPU, and a function that waits until they are complete."""
    if not tensors[0].is_cuda:
        return [x.cpu() for x in tensors], lambda: None
    copies = [torch.empty_like(x, device="cpu", pin_memory=True) for x in tensors]
    for copy, x in zip(copies, tensors, strict=True):
        copy.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copies, event.synchronize
