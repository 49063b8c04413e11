"""Which rank solves which matrix, and how matrices and directions travel between ranks.

Every parameter has an owner among the ranks that hold it: the rank that solves its matrices. Owners
are chosen by the operations that a direction takes, so that all ranks get about the same work, and
every rank computes the same owners. ``shared_step`` has the step.

Ranks that replicate a parameter (DDP) each know its momentum: the owner's direction goes to all of
them, by one all-gather for a stack of parameters. Shards of a DTensor go to the owner and come back
as shards of the direction, by one all-to-all each; no rank has more whole matrices than it solves.
Strips of matrices that are solved by products have no owner (``sharded_products``).
"""

from __future__ import annotations

import functools
import heapq
import itertools
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_fanions.lmo.costs import product_flops
from lit_fanions.optim.adapting import splits_momentum
from lit_fanions.optim.algorithms import Group, is_entrywise, oracle
from lit_fanions.optim.bases import keeps_bases
from lit_fanions.optim.exchange import Team, team_of_group
from lit_fanions.optim.groups import named_parameters
from lit_fanions.optim.matrices import chunk_bounds, is_distributed, matrix_shapes
from lit_fanions.optim.sharded_products import Strips, strips_to_multiply

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Operations for each entry from which solving a matrix takes longer than receiving its direction:
# what an accelerator multiplies (4e14 operations a second) while its links (4.5e11 bytes a second)
# bring two bytes, rounded down. Predicted, not measured.
_WORTH_SENDING = 1000


@functools.lru_cache(maxsize=256)
def assign_owners(
    shapes: tuple[torch.Size, ...], costs: tuple[float, ...], ranks: int
) -> list[int]:
    """Return the rank that each of some parameters is given to: the most expensive first.

    Those of one shape are given one after the other, so that all ranks have a part of a stack.
    """
    loads = [(0.0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], shapes[i])):
        load, rank = heapq.heappop(loads)
        owners[i] = rank
        heapq.heappush(loads, (load + costs[i], rank))
    return owners


def solve_flops(shape: torch.Size, group: Group) -> float:
    """Return the operations of the matrix products that solve the matrices of a parameter."""
    total = 0.0
    for count, rows, cols in matrix_shapes(shape, group["layout"], group["splits"]):
        solver = oracle(group, rows, cols)
        captured = product_flops(solver.case.k, solver.case) if group["error_feedback"] else 0.0
        total += count * (solver.flops + captured)
    return total


def format_owners(groups: Iterable[Group], ranks: int) -> str:
    """Return which of some ranks that replicate parameters solves which of them, a line each."""
    shared = {
        name: (p.shape, solve_flops(p.shape, group))
        for group in groups
        if _is_shared(group)
        for name, p in named_parameters(group)
        if is_worth_sending(p.shape, group)
    }
    shapes, costs = zip(*shared.values(), strict=True) if shared else ((), ())
    owners = dict(zip(shared, assign_owners(shapes, costs, ranks), strict=True))
    total = sum(costs)
    if not shared:
        return (
            f"Each of {ranks} ranks that replicate the parameters solves all matrices: sending "
            "directions would take longer, or share_work is off."
        )
    lines = [
        f"Solved by {ranks} ranks that replicate the parameters, {total:.3g} operations a step; "
        "each of them solves all other matrices:"
    ]
    for rank in range(ranks):
        own = [name for name, owner in owners.items() if owner == rank]
        part = sum(shared[name][1] for name in own) / total if total else 0.0
        line = f"  rank {rank}, {part:.1%}: {', '.join(own) or 'nothing'}"
        lines += textwrap.wrap(line, 120, subsequent_indent=" " * 4, break_long_words=False)
    return "\n".join(lines)


def _is_shared(group: Group) -> bool:
    """Return whether the matrices of a group may be solved by one rank each.

    Not where the owner would need the gradients beside the momenta.
    """
    return (
        not is_entrywise(group["algorithm"]) and group["share_work"] and not splits_momentum(group)
    )


def is_worth_sending(shape: torch.Size, group: Group) -> bool:
    """Return whether ranks that replicate a parameter gain by solving it once."""
    return solve_flops(shape, group) >= _WORTH_SENDING * shape.numel() > 0


def team_of_mesh(mesh: DeviceMesh) -> Team:
    """Return the ranks of a device mesh; the first call makes a group for one of two dimensions."""
    if mesh.ndim == 1:
        return team_of_group(mesh.get_group())
    assert dist.group.WORLD is not None
    return _team_of_ranks(dist.group.WORLD, tuple(mesh.mesh.flatten().tolist()))


@functools.lru_cache(maxsize=64)
def _team_of_ranks(world: dist.ProcessGroup, ranks: tuple[int, ...]) -> Team:
    """Return some ranks; the world is a key of the cache, as processes may make another one."""
    return team_of_group(world if len(ranks) == world.size() else _group_of(list(ranks)))


@functools.lru_cache(maxsize=64)
def _cpu_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a group of the same ranks that sends tensors in the memory of the hosts."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    return _group_of(dist.get_process_group_ranks(group), backend="gloo")


def _group_of(ranks: list[int], **options: Any) -> dist.ProcessGroup:
    group = dist.new_group(ranks, use_local_synchronization=True, **options)
    assert isinstance(group, dist.ProcessGroup)  # as this rank is one of them
    return group


class Region(NamedTuple):
    """The part of a tensor that a rank holds."""

    shape: torch.Size  # shape of the shard
    # Indices of the same entries in the whole tensor and in the shard.
    blocks: tuple[tuple[tuple[slice, ...], tuple[slice, ...]], ...]

    def cut(self, whole: Tensor, shard: Tensor) -> None:
        """Copy a shard from a whole tensor."""
        for there, here in self.blocks:
            shard[here].copy_(whole[there])

    def paste(self, shard: Tensor, whole: Tensor) -> None:
        """Copy a shard into a whole tensor."""
        for there, here in self.blocks:
            whole[there].copy_(shard[here])


class ShardMap(NamedTuple):
    """How a DTensor lies on its ranks."""

    regions: tuple[Region, ...]  # what each rank of the team holds
    # For each owner, the ranks whose shards make up the whole tensor. Of ranks that hold the same
    # shard it is the one that shares most coordinates of the mesh with the owner.
    sources: tuple[tuple[int, ...], ...]


def shard_map(p: Tensor) -> ShardMap | None:
    """Return how a DTensor lies on its ranks; None for a placement that is not known here."""
    assert is_distributed(p)
    return _shard_map(p.shape, p.device_mesh, tuple(p.placements))


@functools.lru_cache(maxsize=1024)
def _shard_map(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Any, ...]) -> ShardMap | None:
    factors = [_split_factor(placement) for placement in placements]
    if None in factors:
        return None
    sizes = tuple(mesh.mesh.shape)
    for placement, factor, parts in zip(placements, factors, sizes, strict=True):
        if factor and factor > 1 and shape[placement.dim] % (factor * parts):
            return None  # torch's versions differ in where the longer pieces lie
    coordinates = {int(mesh.mesh[place]): place for place in itertools.product(*map(range, sizes))}
    regions, places = [], [coordinates[rank] for rank in team_of_mesh(mesh).ranks]
    for place in places:
        runs = [[(0, size)] for size in shape]
        for at, parts, placement, factor in zip(place, sizes, placements, factors, strict=True):
            if factor:
                runs[placement.dim] = _chunk(runs[placement.dim], parts, at, factor)
        regions.append(_region(runs))
    copies = [i for i, factor in enumerate(factors) if factor == 0]
    sources = tuple(
        tuple(j for j, other in enumerate(places) if all(other[i] == place[i] for i in copies))
        for place in places
    )
    return ShardMap(tuple(regions), sources)


def _split_factor(placement: Any) -> int | None:
    """Return into how many pieces a dimension is cut before it is sharded.

    1 for Shard, more for the shards that FSDP2 makes of tensor-parallel ones, 0 for Replicate, None
    for other placements.
    """
    from torch.distributed.tensor import Replicate, Shard

    if type(placement) is Replicate:
        return 0
    if type(placement) is Shard:
        return 1
    return getattr(placement, "split_factor", None)


_Runs = list[tuple[int, int]]  # starts and ends of ranges of indices


def _chunk(runs: _Runs, parts: int, place: int, factor: int) -> _Runs:
    """Return a part of the indices: each of ``factor`` pieces is cut as torch.chunk cuts it."""
    total = sum(stop - start for start, stop in runs)
    found = []
    for piece in range(factor):
        first, last = chunk_bounds(total, factor, piece)
        start, stop = chunk_bounds(last - first, parts, place)
        found += _take(runs, first + start, first + stop)
    return found


def _take(runs: _Runs, first: int, last: int) -> _Runs:
    """Return the indices that stand at the places ``first`` to ``last`` - 1 of the ranges."""
    taken, passed = [], 0
    for start, stop in runs:
        low, high = max(first - passed, 0), min(last - passed, stop - start)
        if low < high:
            taken.append((start + low, start + high))
        passed += stop - start
    return taken


def _region(runs: Sequence[_Runs]) -> Region:
    shape = torch.Size(sum(stop - start for start, stop in own) for own in runs)
    pairs = []
    for own in runs:
        ends = itertools.accumulate((stop - start for start, stop in own), initial=0)
        pairs.append([
            (slice(start, stop), slice(at, at + stop - start))
            for (start, stop), at in zip(own, ends, strict=False)
        ])  # fmt: skip
    # A tensor without dimensions has one block, at the index ().
    blocks = (tuple(zip(*block, strict=True)) or ((), ()) for block in itertools.product(*pairs))
    return Region(shape, tuple((there, here) for there, here in blocks))


class Share(NamedTuple):
    """Who solves a parameter."""

    team: Team  # the ranks that hold it
    owner: int  # place in the team of the rank that solves it
    # How a DTensor lies on the ranks; None for a parameter that all of them have whole.
    shards: ShardMap | None
    # The strips of a matrix that is solved by products with them, unless its state needs an owner;
    # None where an owner solves it.
    strips: Strips | None = None


def plan_shares(
    groups: Iterable[Group], replicas: Team | None, observed: bool = False
) -> dict[Tensor, Share]:
    """Return who solves each parameter that is not solved by every rank.

    A DTensor is left out where its placement is not known, where ``renormalize`` needs its whole
    weight, and in steps whose observers are shown whole matrices. A replicated parameter is left
    out where sending its direction would take longer than solving it. ``replicas`` are the ranks
    that replicate the parameters; None: only DTensors are shared.
    """
    found: dict[tuple[Team, bool], list[tuple[Tensor, float, ShardMap | None, Strips | None]]] = {}
    for group in groups:
        if not _is_shared(group):
            continue
        work: dict[torch.Size, float] = {}
        for p in group["params"]:
            shards, team = None, replicas
            if is_distributed(p):
                shards = None if observed or group["renormalize"] else shard_map(p)
                team = None if shards is None else team_of_mesh(p.device_mesh)
            if team is None or team.size == 1 or p.grad is None or not p.numel():
                continue
            if p.shape not in work:
                work[p.shape] = max(solve_flops(p.shape, group), float(p.numel()))
            if shards is not None or work[p.shape] >= _WORTH_SENDING * p.numel():
                strips = None if shards is None else strips_to_multiply(p, group)
                # Strips apart, so that parameters with an owner are shared out evenly.
                alike = found.setdefault((team, strips is None), [])
                alike.append((p, work[p.shape], shards, strips))
    shares = {}
    for (team, _), members in found.items():
        parameters, costs, *_ = zip(*members, strict=True)
        owners = assign_owners(tuple(p.shape for p in parameters), costs, team.size)
        for (p, _, shards, strips), owner in zip(members, owners, strict=True):
            shares[p] = Share(team, owner, shards, strips)
    return shares


def check_agreement(groups: Iterable[Group], replicas: Team | None) -> None:
    """Raise on all ranks where they differ in which gradients there are, or in a seed.

    A rank without a gradient would leave the others waiting in a collective. Bases drawn with
    different seeds give ranks that hold the same parameter different directions. Flags and seeds
    travel between the hosts, so that no device is waited for. ``replicas`` are the ranks that
    replicate the parameters; None: they share DTensors alone.
    """
    parties: dict[Team, list[tuple[str, Tensor, Group]]] = {}
    for group in groups:
        sharing = replicas if group.get("share_work") else None
        for name, p in named_parameters(group):
            team = team_of_mesh(p.device_mesh) if is_distributed(p) else sharing
            if team is not None and team.size > 1:
                parties.setdefault(team, []).append((name, p, group))
    for team, members in parties.items():
        given = torch.tensor([p.grad is not None for _, p, _ in members], device="cpu").long()
        seeds = torch.tensor([group.get("seed", 0) for *_, group in members], device="cpu")
        most = torch.stack([given, 1 - given, seeds, -seeds])
        dist.all_reduce(most, dist.ReduceOp.MAX, group=_cpu_group(team.group))
        some, some_without, highest, lowest = most.tolist()
        both = zip(members, some, some_without, strict=True)
        if odd := [name for (name, *_), given, missing in both if given and missing]:
            raise RuntimeError(
                f"{', '.join(odd)}: a gradient on some of the {team.size} ranks, none on others; "
                "nothing was stepped. Give every rank the same gradients: their sum over the "
                "ranks, with zeros where a rank has none"
            )
        for (name, p, group), high, low in zip(members, highest, lowest, strict=True):
            if high != -low and keeps_bases(p, group):
                raise RuntimeError(
                    f"{name}: the {team.size} ranks have different seeds, from {-low} to {high}, "
                    f"for the random starts of group {group['name']!r}, and their weights would "
                    "drift apart; nothing was stepped. Give every rank the same seed "
                    "(Fanion(..., seed=0), or matrix.seed of a config); seed_everything may "
                    "differ then"
                )
