"""Products with matrices that lie on ranks in strips of rows or of columns.

A direction U_k V_k^T from a warm basis takes products with the matrix alone. Each rank multiplies
its strip, and sums of blocks of k columns and of k x k Gram matrices travel, never a matrix:
``shared_step`` has the step. Other matrices go to an owner (``sharing``).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_fanions.lmo.block_power import Products
from lit_fanions.lmo.factorisations import orthonormal_shards
from lit_fanions.optim.algorithms import Group, oracle
from lit_fanions.optim.exchange import AllGather, Field, Team, sum_over, team_of_group
from lit_fanions.optim.matrices import chunk_bounds, is_distributed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


# Operations of float32 products that take as long as receiving a byte: 4e13 a second against 4.5e11
# bytes a second. Predicted, not measured.
_WORTH_A_BYTE = 90


class Strips(NamedTuple):
    """How a matrix lies on ranks in strips."""

    team: Team  # the ranks that have one each
    dim: int  # 0 for strips of rows, 1 for strips of columns
    # First row or column of each rank's strip and the one after its last.
    bounds: tuple[tuple[int, int], ...]

    @property
    def own(self) -> slice:
        """The rows or columns of this rank."""
        return slice(*self.bounds[self.team.place])


def strips_to_multiply(p: Tensor, group: Group) -> Strips | None:
    """Return the strips of a parameter whose direction is found by products with them.

    None for parameters that go to an owner: all but DTensors of two dimensions that are sharded
    along one dimension of the mesh and replicated along the others; matrices that are cut or
    transposed; float64; directions that need whole matrices; and where products cost more.
    """
    if not is_distributed(p) or p.ndim != 2 or not p.numel() or p.dtype == torch.float64:
        return None
    is_cut = group["layout"] != "flatten" or group["splits"] is not None
    if is_cut or group["adapt"] != "none" or group["renormalize"] or not group["share_work"]:
        return None
    if oracle(group, *p.shape).products_solver(p.device) is None:
        return None
    strips = _strips(p.shape, p.device_mesh, tuple(p.placements))
    if strips is None:
        return None
    shards, ranks = strips.team.size, p.device_mesh.size()
    gains = gains_by_products(p.shape, group, strips.dim, shards, ranks, p.dtype.itemsize)
    return strips if gains else None


@functools.lru_cache(maxsize=1024)
def _strips(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Any, ...]) -> Strips | None:
    from torch.distributed.tensor import Replicate, Shard

    sharded = [i for i, placement in enumerate(placements) if type(placement) is not Replicate]
    if len(sharded) != 1 or type(placements[sharded[0]]) is not Shard:
        return None
    at, coordinate = sharded[0], mesh.get_coordinate()
    assert coordinate is not None
    line = mesh.mesh[tuple(slice(None) if i == at else c for i, c in enumerate(coordinate))]
    places = {rank: place for place, rank in enumerate(line.tolist())}
    team, dim = team_of_group(mesh.get_group(at)), placements[at].dim
    if team.size == 1:
        return None
    bounds = (chunk_bounds(shape[dim], team.size, places[rank]) for rank in team.ranks)
    return Strips(team, dim, tuple(bounds))


def gains_by_products(
    shape: torch.Size, group: Group, dim: int, shards: int, ranks: int, itemsize: int = 4
) -> bool:
    """Return whether products with strips of a matrix cost less than sending it to an owner.

    There are as many different strips as ``shards``, of rows (dim 0) or columns (1); as many ranks
    share the matrices; ``itemsize`` is the bytes of an entry of the weight and the momentum.
    """
    repeated = repeated_flops(shape, group, dim) / _WORTH_A_BYTE
    by_owners = received_by_owners(shape, group, shards, ranks, itemsize)
    return received_by_products(shape, group, dim) + repeated < by_owners


def repeated_flops(shape: torch.Size, group: Group, dim: int) -> float:
    """Return the operations on whole vectors that every rank repeats."""
    (rows, cols), solver = shape, oracle(group, *shape)
    width, passes = solver.basis_columns or 0, solver.case.settings.solver_steps or 1
    # Gram matrices of the right vectors, which block iterations turn as well; and of left ones.
    right = 4.0 if solver.warms_up else 2.0
    return width**2 * (right * cols + (4.0 * passes * rows if dim == 1 else 0.0))


def received_by_products(shape: torch.Size, group: Group, dim: int) -> float:
    """Return the bytes that a rank receives for the direction of a matrix in strips.

    The true number is (ranks - 1) / ranks of it, as for ``received_by_owners``. A sum takes a
    reduce-scatter and an all-gather.
    """
    rows, cols = shape
    solver = oracle(group, rows, cols)
    width, passes = solver.basis_columns or 0, solver.case.settings.solver_steps or 1
    if dim == 0:
        return passes * (2 * 4 * cols * width + 2 * 2 * 8 * width**2)
    return passes * (2 * 4 * rows * width + 4 * cols * width)


def received_by_owners(
    shape: torch.Size, group: Group, shards: int, ranks: int, itemsize: int = 4
) -> float:
    """Return the bytes that a rank receives on average for a matrix that an owner solves."""
    rows, cols = shape
    basis = 4 * cols * (oracle(group, rows, cols).basis_columns or 0)
    sent = 2 if group["error_feedback"] else 1  # the direction, and what feedback captures
    return rows * cols * itemsize * (1 / ranks + sent / shards) + basis


class StripProducts(Products):
    """Products with strips of matrices; what is summed or gathered is equal on all ranks.

    Attributes:
        m: This rank's strips over the Frobenius norms of the matrices, (count, rows, cols).
        length: These norms, (count, 1, 1), in float64.
        strips: How each of the matrices lies on the ranks.
    """

    def __init__(self, m: Tensor, strips: Strips) -> None:
        super().__init__(m)
        self.strips = strips
        self.length = self.norm(m)
        m.div_(torch.where(self.length == 0, 1.0, self.length))

    def norm(self, x: Tensor) -> Tensor:
        """Return the Frobenius norms of matrices in strips, (count, 1, 1), in float64."""
        own = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)
        return sum_over(self.strips.team, own.square_()).sqrt_()


class RowStrips(StripProducts):
    """Strips of rows: vectors with an entry for each row lie on the ranks as the rows do."""

    def right(self, u: Tensor) -> Tensor:
        """Return u m, summed over the ranks."""
        return sum_over(self.strips.team, super().right(u))

    def orthonormal(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's entries of orthonormal rows, from sums of Gram matrices."""
        total = self.strips.bounds[-1][1]
        add = functools.partial(sum_over, self.strips.team)
        return orthonormal_shards(w, self.strips.own, total, add)

    def strip(self, left: Tensor, right: Tensor) -> Tensor:
        """Return this rank's rows of left right, of its rows of left and the whole of right."""
        return left @ right


class ColumnStrips(StripProducts):
    """Strips of columns: all vectors are whole on every rank."""

    def left(self, v: Tensor) -> Tensor:
        """Return v m^T, summed over the ranks."""
        return sum_over(self.strips.team, super().left(v[..., self.strips.own]))

    def right(self, u: Tensor) -> Tensor:
        """Return u m, with the columns of all ranks."""
        own, bounds = super().right(u), self.strips.bounds
        fields = [
            [Field(torch.Size((*own.shape[:-1], stop - start)), own.dtype)]
            for start, stop in bounds
        ]
        gather = AllGather(self.strips.team, fields, own.device)
        gather.outgoing[0][0].copy_(own)
        gather.post()
        gather.wait()
        whole = own.new_empty(*own.shape[:-1], max(stop for _, stop in bounds))
        for (start, stop), (part,) in zip(bounds, gather.incoming, strict=True):
            whole[..., start:stop] = part
        return whole

    def strip(self, left: Tensor, right: Tensor) -> Tensor:
        """Return this rank's columns of left right, which are whole."""
        return left @ right[..., self.strips.own]


def products_with(m: Tensor, strips: Strips) -> RowStrips | ColumnStrips:
    """Return products with matrices of which this rank has the float32 strips m.

    The memory of m, (count, rows, cols), is overwritten.
    """
    return RowStrips(m, strips) if strips.dim == 0 else ColumnStrips(m, strips)
