"""Sharpness-aware minimisation: a step uphill in a norm ball before the gradient of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_fanions.checks import check_flag, real_number
from lit_fanions.lmo import BALLS
from lit_fanions.optim.algorithms import Rank, find_algorithm, is_entrywise, oracle
from lit_fanions.optim.groups import check_group
from lit_fanions.optim.matrices import (
    from_matrices,
    gather,
    local,
    local_grad,
    placed_as,
    to_matrices,
)
from lit_fanions.optim.options import default_options
from lit_fanions.optim.parameters import assign

# A perturbation of a batch of matrices: all of it, or its left and right vectors.
_Perturbation = Tensor | tuple[Tensor, Tensor]
_Form = dict[str, Any]  # layout and splits of a parameter


class SharpnessAscent:
    """Context in which the matrices of a module are moved uphill, from W to W + rho * D(G).

    G is the gradient when the context is entered. Sharpness-aware minimisation (SAM, Foret et al.,
    arXiv 2010.01412) steps with the gradient that the same batch has there::

        ascent = SharpnessAscent(model, rho=0.05)
        for batch in loader:
            loss(batch).backward()
            with ascent:
                optimizer.zero_grad()
                loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    D is the oracle of any ball. ``neon``, the nuclear ball, is nu-SAM (Pethick et al., TMLR 2025):
    D is u_1 v_1^T of each matrix. ``nsgd`` is SAM with a radius for each matrix instead of one for
    all, ``signum`` its version in the largest entry.

    Only parameters that ``split_parameters`` calls matrices are moved, and of these the ones that
    have a gradient; a matrix whose gradient has a NaN or an infinity stays where it is. With
    DistributedDataParallel the first gradient is the mean over all ranks.

    Args:
        module: The module to be trained.
        rho: Radius of the step uphill, in the norm of the ball; at least 0.
        algorithm: Name of the ball, as for ``Fanion``; any but adamw, sgd and dion.
        rank: Rank of the algorithms that have one; None is the algorithm's own.
        exact: True keeps a copy of the matrices while the context is open and restores them to the
            bit. False keeps the perturbation and subtracts it, right up to rounding; for balls of
            low rank without a blend it is kept as vectors, rank * (rows + columns) numbers.

    Raises:
        ValueError: If an argument is not one of these.
    """

    def __init__(
        self,
        module: nn.Module,
        rho: float = 0.05,
        *,
        algorithm: str = "neon",
        rank: Rank | None = None,
        exact: bool = True,
    ) -> None:
        check_flag("exact", exact)
        if is_entrywise(algorithm) or not BALLS[find_algorithm(algorithm).ball].warms_up:
            raise ValueError(f"algorithm {algorithm!r} has no ball for a single step uphill")
        if rank is not None and "rank" not in BALLS[find_algorithm(algorithm).ball].reads:
            raise ValueError(f"algorithm {algorithm!r} has no rank, got {rank!r}: leave it out")
        options = {**default_options(algorithm), "algorithm": algorithm, "solver": "randomized"}
        if rank is not None:
            options["rank"] = rank
        self.rho, self.exact = real_number("rho", rho, 0.0), exact
        self._options = check_group(options, "the ascent")
        self._forms: dict[Tensor, _Form] = {
            a.parameter: {key: a.options[key] for key in ("layout", "splits") if key in a.options}
            for a in assign(module)
            if a.role == "matrix"
        }
        # Each moved parameter with a copy of it, or with its perturbations.
        self._moved: list[tuple[Tensor, Tensor | list[_Perturbation]]] = []

    @torch.no_grad()
    def __enter__(self) -> SharpnessAscent:
        if self._moved:
            raise RuntimeError("the ascent is already open")
        try:
            for p, form in self._forms.items():
                if p.grad is not None:
                    gradients = to_matrices(gather(local_grad(p), p), **form)
                    perturbations = [self._perturbation(g) for g in gradients]
                    step = self._step(p, perturbations)
                    self._moved.append((p, local(p).clone() if self.exact else perturbations))
                    local(p).add_(step, alpha=self.rho)
        except BaseException:
            self.__exit__()
            raise
        return self

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        while self._moved:
            p, before = self._moved.pop()
            if isinstance(before, Tensor):
                local(p).copy_(before)
            else:
                local(p).sub_(self._step(p, before), alpha=self.rho)

    def _perturbation(self, gradient: Tensor) -> _Perturbation:
        """Return D of a batch of matrices, 0 for those with a NaN or an infinity."""
        own = oracle(self._options, *gradient.shape[-2:])
        direction, triplets = own.solve(gradient)
        direction = torch.nan_to_num(direction, 0.0)
        is_low_rank = len(own.parts) == 1 and own.ball.feedback
        if self.exact or triplets is None or not is_low_rank:
            return direction
        right = torch.nan_to_num(triplets.Vh[..., : own.case.k, :], 0.0)
        return direction @ right.mT, right

    def _step(self, p: Tensor, perturbations: list[_Perturbation]) -> Tensor:
        """Return D of a parameter, this rank's shard of it."""
        whole = [d if isinstance(d, Tensor) else d[0] @ d[1] for d in perturbations]
        return local(placed_as(from_matrices(whole, p.shape, **self._forms[p]), p)).to(p.dtype)
