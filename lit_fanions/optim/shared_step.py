"""The step of parameters whose matrices are shared out to ranks: each solves what it owns.

The formula is that of ``update`` and the solving that of ``matrix_step``. Matrices in strips are
solved by products with the strips, and have no owner. A stack of all other of parameters of
one shape takes three stages: momenta are updated and shards of them sent to the owners; owners
solve and send directions; all apply them. The directions of a stack travel while the next one is
solved, so that a rank which owns nothing in one stack works on the next.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from lit_fanions.lmo import polar_dtype
from lit_fanions.lmo.singular_triplets import rescaled
from lit_fanions.optim.adapting import is_moment, moment_key, moment_shape
from lit_fanions.optim.algorithms import oracle
from lit_fanions.optim.bases import State, basis_key, is_basis, next_basis
from lit_fanions.optim.exchange import AllGather, AllToAll, Field
from lit_fanions.optim.matrices import from_matrices, matrix_shapes, to_matrices
from lit_fanions.optim.matrix_step import share_of_stack, solve_parts, stack_matrices, store_stepped
from lit_fanions.optim.observing import Observer, observe_step
from lit_fanions.optim.sharded_products import Strips, products_with
from lit_fanions.optim.sharing import Region, Share
from lit_fanions.optim.stacking import in_batches, stack_entries, stacks, takes_unit
from lit_fanions.optim.update import (
    Group,
    Piece,
    Solved,
    apply,
    size_factor,
    static_factor,
    update_momentum,
)

# Tensors of an answer that have the parameter's shape: a rank gets its own shard of these.
_SHARDED = ("step", "captured")
_Answer = Mapping[str, Any]
_BASIS = basis_key(0)


def step_shared(
    group: Group,
    states: Mapping[Tensor, State],
    finite: Mapping[Tensor, Tensor],
    observers: Sequence[Observer],
    shares: Mapping[Tensor, Share],
) -> None:
    """Step the parameters of a group of matrices that ranks share; see ``step_matrices``.

    ``shares`` says who solves the parameters of all groups. Only replicated parameters are shown
    to observers.
    """
    shared = {p: shares[p] for p in group["params"] if p in shares}
    shared |= {
        p: share._replace(strips=None)
        for p, share in shared.items()
        if share.strips and not _has_products_state(p, states[p], group)
    }
    jobs = []
    for stack in _stacks(shared, states, group):
        pieces = [Piece.whole(p, states[p], finite[p]) for p in stack]
        if strips := shared[stack[0]].strips:
            _step_strips(pieces, strips, group)
        else:
            jobs.append(_Job(pieces, [shared[p] for p in stack], group, observers))
    for i in range(len(jobs) + 2):
        for stage, job in ((_Job.begin, i), (_Job.solve, i - 1), (_Job.finish, i - 2)):
            if 0 <= job < len(jobs):
                stage(jobs[job])


def _stacks(
    shares: Mapping[Tensor, Share], states: Mapping[Tensor, State], group: Group
) -> list[list[Tensor]]:
    """Return parameters of one shape, dtypes, device and placement, a few for each rank."""

    def key(p: Tensor) -> tuple[object, ...]:
        team, _, shards, strips = shares[p]
        dtypes = p.dtype, states[p]["momentum"].dtype
        return p.shape, *dtypes, p.device, team, id(shards), strips

    def fits(p: Tensor, count: int) -> bool:
        team, _, shards, strips = shares[p]
        if strips:
            return count * p.numel() <= stack_entries(group, p.device) * strips.team.size
        # A rank gets the directions of all replicated parameters. Of shards it has its part alone,
        # but twice: the shards of one stack arrive while those of another leave.
        limit = stack_entries(group, p.device) * (1 if shards is None else team.size / 2)
        return count <= team.size or count * p.numel() <= limit

    return in_batches(shares, key, fits)


def _has_products_state(p: Tensor, state: State, group: Group) -> bool:
    """Return whether the state has what a step by products needs.

    After options have changed its basis may be missing or too narrow: an owner then makes one.
    """
    basis, columns = state.get(_BASIS), oracle(group, *p.shape).basis_columns
    if basis is None or columns is None or state["momentum"].dtype == torch.float64:
        return False
    return basis.shape[:-1] == (1, p.shape[-1]) and basis.shape[-1] >= columns


def _step_strips(pieces: Sequence[Piece], strips: Strips, group: Group) -> None:
    """Step pieces whose directions are found by products with their strips.

    Each rank forms its strip of the direction U_k V_k^T, so that no rank ever has a whole matrix.
    Bases are whole and equal on all ranks, as with any other placement.
    """
    solver = oracle(group, *pieces[0].parameter.shape)
    m = pieces[0].weight.new_empty(len(pieces), *pieces[0].weight.shape, dtype=torch.float32)
    for own, piece in zip(m, pieces, strict=True):
        own.copy_(update_momentum(piece, group))
        piece.state.pop(moment_key(0), None)  # would be stale where options have changed
    products = products_with(m, strips)
    basis = torch.cat([piece.state[_BASIS][..., : solver.basis_columns] for piece in pieces])
    solve = solver.products_solver(basis.device)
    assert solve is not None
    triplets = solve(products, basis.float())
    triplets = triplets._replace(S=rescaled(triplets.S, products.length))
    k = solver.ball.solved_rank(solver.case)
    u, vh = triplets.U[..., :k], triplets.Vh[..., :k, :]
    d = products.strip(u, vh)
    if len(solver.parts) > 1:
        assert solver.partner.in_place is not None
        d = solver.partner.in_place(products.m, solver.case.settings).lerp_(d, solver.alpha)
    factor = size_factor(d, solver, group, products.norm)
    d = d if isinstance(factor, float) and factor == 1 else d.mul_(factor)
    captured: Sequence[Tensor | None] = [None] * len(pieces)
    if group["error_feedback"]:
        captured = products.strip(u * triplets.S[..., None, :k], vh).unbind()
    store_stepped(pieces, _BASIS, basis, next_basis(triplets, basis))
    for piece, step, own_part in zip(pieces, d.unbind(), captured, strict=True):
        apply(piece, step, own_part, group)


class _Job:
    """The step of a stack of shared pieces."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        shares: Sequence[Share],
        group: Group,
        observers: Sequence[Observer],
    ) -> None:
        self.pieces, self.group, self.observers = pieces, group, observers
        self.team, self.shards = shares[0].team, shares[0].shards
        self.fields = [_answer_fields(piece, group) for piece in pieces]
        # Places of the pieces that each rank owns.
        self.owned: list[list[int]] = [[] for _ in self.team.ranks]
        for i, share in enumerate(shares):
            self.owned[share.owner].append(i)
        self.mine = self.owned[self.team.place]
        self.like = pieces[0].momentum

    def begin(self) -> None:
        """Update the momenta, and send shards of N to the owners."""
        if self.shards is None:
            without = {**self.group, "nesterov": False}  # N is needed by the owner alone
            ns = [
                update_momentum(piece, self.group if i in self.mine else without)
                for i, piece in enumerate(self.pieces)
            ]
            self.wholes = {i: ns[i] for i in self.mine}
            return
        place, (regions, sources) = self.team.place, self.shards
        shards = [Field(region.shape, self.like.dtype) for region in regions]
        self.to_owners = AllToAll(
            self.team,
            [[shards[place]] * len(xs) * (place in sources[o]) for o, xs in enumerate(self.owned)],
            [[shard] * len(self.mine) * (j in sources[place]) for j, shard in enumerate(shards)],
            self.like.device,
        )
        for owned, views in zip(self.owned, self.to_owners.outgoing, strict=True):
            ns = [update_momentum(self.pieces[i], self.group) for i in owned]
            for view, n in zip(views, ns, strict=False):  # no views where others send the same
                view.copy_(n)
        self.to_owners.post()

    def solve(self) -> None:
        """Solve the matrices that this rank owns, and send their directions."""
        wholes = self.wholes if self.shards is None else self._assembled()
        answers: dict[int, _Answer] = {}
        places = {self.pieces[i].parameter: i for i in self.mine}
        for stack in stacks(list(places), self.group):
            own = [places[p] for p in stack]
            answers.update(self._answers(own, [wholes.pop(i) for i in own]))
        if self.shards is None:
            messages = [self._message(ps, None) for ps in self.owned]
            self.to_all: AllGather | AllToAll = AllGather(self.team, messages, self.like.device)
            self._fill(self.to_all.outgoing[0], answers, None)
        else:
            regions = self.shards.regions
            self.to_all = AllToAll(
                self.team,
                [self._message(self.mine, region) for region in regions],
                [self._message(ps, regions[self.team.place]) for ps in self.owned],
                self.like.device,
            )
            for region, views in zip(regions, self.to_all.outgoing, strict=True):
                self._fill(views, answers, region)
        self.to_all.post()

    def finish(self) -> None:
        """Apply the directions, and store what the solvers leave."""
        self.to_all.wait()
        answers = {}
        for owned, views in zip(self.owned, self.to_all.incoming, strict=True):
            received = iter(views)
            for i in owned:
                answers[i] = {key: next(received) for key in self.fields[i]}
        for i, piece in enumerate(self.pieces):
            self._apply(piece, answers[i])
        del self.to_all

    def _assembled(self) -> dict[int, Tensor]:
        """Return the whole N of the parameters that this rank owns, from the shards received."""
        assert self.shards is not None
        self.to_owners.wait()
        wholes = {i: self.like.new_empty(self.pieces[i].parameter.shape) for i in self.mine}
        for region, views in zip(self.shards.regions, self.to_owners.incoming, strict=True):
            for view, whole in zip(views, wholes.values(), strict=False):
                region.paste(view, whole)
        del self.to_owners
        return wholes

    def _answers(self, own: Sequence[int], ns: list[Tensor]) -> dict[int, _Answer]:
        """Solve pieces of one shape; return the whole tensors that their ``fields`` name."""
        group, pieces = self.group, [self.pieces[i] for i in own]
        batches = stack_matrices(ns, len(own), group)
        ns.clear()
        solved = solve_parts(pieces, batches, group)
        answers: dict[int, _Answer] = {}
        for place, (i, piece) in enumerate(zip(own, pieces, strict=True)):
            parts = [share_of_stack(answer, place, len(own)) for answer in solved]
            tensors: dict[str, list[Tensor]] = {"step": [x.direction for x in parts]}
            if group["error_feedback"]:
                tensors["captured"] = [x.captured for x in parts if x.captured is not None]
            shape = piece.parameter.shape
            answers[i] = {
                **piece.state,
                **{f"factor{part}": x.factor for part, x in enumerate(parts)},
                **{
                    key: from_matrices(xs, shape, group["layout"], group["splits"])
                    for key, xs in tensors.items()
                },
            }
        return answers

    def _message(self, owned: Sequence[int], region: Region | None) -> list[Field]:
        """Return what the owner of pieces sends to a rank that holds a region of them."""
        return [
            field._replace(shape=region.shape) if region and key in _SHARDED else field
            for i in owned
            for key, field in self.fields[i].items()
        ]

    def _fill(
        self, views: Sequence[Tensor], answers: Mapping[int, _Answer], region: Region | None
    ) -> None:
        free = iter(views)
        for i in self.mine:
            for key in self.fields[i]:
                if region and key in _SHARDED:
                    region.cut(answers[i][key], next(free))
                else:
                    next(free).copy_(answers[i][key])

    def _apply(self, piece: Piece, answer: _Answer) -> None:
        """Apply what a piece's owner has sent."""
        group, step, captured = self.group, answer["step"], answer.get("captured")
        _store(piece.state, {key: x for key, x in answer.items() if _is_stored(key)})
        if self.shards is not None:
            apply(piece, step, captured, group)
            return
        layout, splits = group["layout"], group["splits"]
        directions = to_matrices(step, layout, splits)
        captures = () if captured is None else to_matrices(captured, layout, splits)
        solvers = [oracle(group, *d.shape[-2:]) for d in directions]
        solved = [
            Solved(d, answer.get(f"factor{part}", static_factor(solvers[part], group)), c)
            for part, (d, c) in enumerate(zip_longest(directions, captures))
        ]
        observe_step(piece, solved, group, self.observers)


def _is_stored(key: str) -> bool:
    return is_basis(key) or is_moment(key)


def _store(state: State, received: Mapping[str, Tensor]) -> None:
    """Store bases and moments, in place where they fit; drop those that solvers no longer keep."""
    for key in [key for key in state if _is_stored(key) and key not in received]:
        del state[key]
    for key, x in received.items():
        if key in state and state[key].shape == x.shape:
            state[key].copy_(x)
        else:
            state[key] = x.clone()  # the memory of the message must be freed


def _answer_fields(piece: Piece, group: Group) -> dict[str, Field]:
    """Return what the owner of a piece sends, for a rank that needs the whole direction.

    The step has the narrower of the weight's dtype and the solver's, so that sending it rounds
    nothing that applying it would not. Bases and moments keep their keys in the state.
    """
    p, fields, dtypes = piece.parameter, {}, []
    for part, shape in enumerate(matrix_shapes(p.shape, group["layout"], group["splits"])):
        count, rows, cols = shape
        solver = oracle(group, rows, cols)
        example = piece.momentum.new_empty(()).expand(rows, cols)
        dtypes.append(
            polar_dtype(example, group["polar"])
            if takes_unit(solver, group)
            else piece.weight.dtype
        )
        if static_factor(solver, group) is None:
            fields[f"factor{part}"] = Field(torch.Size((count, 1, 1)), torch.float32)
        columns = solver.basis_columns
        if columns is not None:
            stored = piece.state.get(basis_key(part))
            dtype = torch.float32 if stored is None else stored.dtype
            fields[basis_key(part)] = Field(torch.Size((count, cols, columns)), dtype)
        if group["adapt"] != "none":
            fields[moment_key(part)] = Field(moment_shape(shape, group), torch.float32)
    widest = functools.reduce(torch.promote_types, dtypes)
    step = min(widest, piece.weight.dtype, key=lambda dtype: dtype.itemsize)
    first = {"step": Field(p.shape, step)}
    if group["error_feedback"]:
        first["captured"] = Field(p.shape, piece.momentum.dtype)
    return {**first, **fields}
