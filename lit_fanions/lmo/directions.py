"""Directions of steepest descent: the oracle of a ball, blended with that of another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_fanions import norms
from lit_fanions.checks import check_choice, exponent, real_number, whole_number
from lit_fanions.lmo.balls import BALLS, Ball, polar_factor, polar_input
from lit_fanions.lmo.low_rank import ProductsSolver
from lit_fanions.lmo.presets import check_polar
from lit_fanions.lmo.problems import OVERSAMPLING, Answer, Case, Problem, Settings, Triplets
from lit_fanions.lmo.singular_triplets import check_solver
from lit_fanions.lmo.spectrum import Spectrum


@dataclass(frozen=True)
class Oracle:
    """The oracle of alpha * ball + (1 - alpha) * partner for matrices of one shape.

    Attributes:
        ball: The ball whose direction has the weight alpha.
        case: Shape of the matrices, rank of both directions, and options of the solvers.
        alpha: The weight, any finite number.
        partner: The ball whose direction has the weight 1 - alpha.
    """

    ball: Ball
    case: Case
    alpha: float = 1.0
    partner: Ball = BALLS["frobenius"]

    @property
    def parts(self) -> list[tuple[Ball, float]]:
        """The balls whose weights are not 0, with these weights."""
        weighted = [(self.ball, self.alpha), (self.partner, 1 - self.alpha)]
        return [(ball, weight) for ball, weight in weighted if weight]

    def solve(
        self,
        m: Tensor,
        *,
        warm_start: Tensor | None = None,
        generator: torch.Generator | None = None,
        unit: bool = False,
        overwrite: bool = False,
    ) -> Answer:
        """Return the directions of matrices, without checks and casts.

        Args:
            m: Matrices, (..., rows, cols).
            warm_start: Start block for the rank-k solvers, (..., cols, width).
            generator: CPU generator of their random starts.
            unit: Whether m has Frobenius norm 1 and the dtype of ``polar_dtype``; only where
                ``takes_unit``.
            overwrite: Whether the memory of m may be used.

        Returns:
            The directions, (..., rows, cols), in the dtype they were computed in, and the widest
            block of triplets that a rank-k solver found.
        """
        problem = Problem(m, self.case, warm_start, generator, unit, overwrite)
        if len(self.parts) == 1:
            return self.parts[0][0].oracle(problem)
        if self.ball.is_polar(self.case):
            return self._fused(problem)
        answer = self.ball.oracle(replace(problem, overwrite=False))
        rest = self._partner_answer(problem)
        blended = rest.direction.lerp_(answer.direction.to(rest.direction.dtype), self.alpha)
        found = [t for t in (answer.triplets, rest.triplets) if t is not None]
        # The widest block is the best start of the next step.
        return Answer(blended, max(found, key=lambda t: t.S.shape[-1], default=None))

    def _fused(self, problem: Problem) -> Answer:
        """Blend a polar factor with the partner in the last product."""
        found: list[Triplets | None] = []

        def rest(x: Tensor) -> Tensor:
            # The products may have dropped a batch dimension of one.
            m = x.view(problem.m.shape)
            answer = self._partner_answer(replace(problem, m=m, unit=True, overwrite=True))
            found.append(answer.triplets)
            return answer.direction.to(x.dtype).view(x.shape)

        x, _ = polar_input(problem)
        d = polar_factor(x, self.case.settings, alpha=self.alpha, partner=rest)
        return Answer(d, found[0])

    def _partner_answer(self, problem: Problem) -> Answer:
        """Return the partner's answer, which may lose NaN: the other direction has it."""
        if self.partner.in_place is None:
            return self.partner.oracle(problem)
        return Answer(self.partner.in_place(problem.normalised()[0], self.case.settings))

    def products_solver(self, device: torch.device) -> ProductsSolver | None:
        """Return the solver of matrices whose shards lie on several ranks.

        None unless the direction is U_k V_k^T from products with the matrices, alone or blended
        with an entrywise direction of the normalised matrices.
        """
        if not self.alpha or (self.alpha != 1 and self.partner.in_place is None):
            return None
        return self.ball.products_solver(self.case, device)

    @property
    def takes_unit(self) -> bool:
        """Whether matrices may come normalised in the dtype of ``polar_dtype``."""
        return bool(self.alpha) and self.ball.is_polar(self.case)

    @property
    def basis_columns(self) -> int | None:
        """Columns of the basis that the solvers start from; None without a solver."""
        columns = [ball.basis_columns(self.case) for ball, _ in self.parts]
        return max((n for n in columns if n is not None), default=None)

    @property
    def warms_up(self) -> bool:
        """Whether the basis of a first step is turned towards the gradient."""
        return any(ball.warms_up for ball, _ in self.parts if ball.solved_rank(self.case))

    @property
    def length(self) -> float | None:
        """Frobenius norm of the directions; None where it depends on the matrix."""
        if len(self.parts) > 1:
            return None
        ((ball, weight),) = self.parts
        unit = ball.length(self.case)
        return None if unit is None else weight * unit * ball.radius(self.case.settings)

    @property
    def flops(self) -> float:
        """Operations of the matrix products that solve one matrix."""
        return sum(ball.flops(self.case) for ball, _ in self.parts)

    def dual(self, spectrum: Spectrum, m: Tensor) -> Tensor:
        """Return the dual norm of matrices m with a spectrum, what ``<m, D>`` can reach: (...)."""
        total = torch.zeros_like(spectrum.frobenius)
        for ball, weight in self.parts:
            radius = ball.radius(self.case.settings)
            total = total + weight * radius * ball.dual(spectrum, m, self.case)
        return total

    def norm(self) -> norms.Norm:
        """Return the exact norm in whose unit ball the directions are."""
        exact, partner = (ball.norm(self.case) for ball in (self.ball, self.partner))
        radius, other = (ball.radius(self.case.settings) for ball in (self.ball, self.partner))
        if self.alpha == 1 and radius == 1:
            return exact
        if radius == 1:
            return norms.Blend(exact, self.alpha, partner, other)
        if self.alpha == 1 or other != 1:  # one ball, of another radius
            return norms.Blend(exact, 0.0, exact, radius)
        return norms.Blend(partner, 1 - self.alpha, exact, radius)


def direction(
    m: Tensor,
    *,
    rank: int | None = None,
    alpha: float = 1.0,
    blend: str = "frobenius",
    sign_scale: float = 1.0,
    p: float = 3.0,
    ball: str = "fanion",
    polar: str = "auto",
    polar_steps: int | None = None,
    solver: str = "auto",
    solver_steps: int | None = None,
    oversampling: int = OVERSAMPLING,
    tol: float | None = None,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the direction of steepest descent D(m) = ``argmax {<m, d> : |d| <= 1}``.

    ``rank=None`` is Muon, ``rank=1`` Neon, ``rank=k`` a k-Fanion; ``alpha < 1`` blends it with
    normalised SGD (F-), sign descent (S-) or another ball of the table; with ``alpha=0`` the
    partner alone remains.

    Args:
        m: Matrices, (..., rows, cols), of any float dtype. Rank-k solvers that start warm or run
            on a GPU need entries from 1e-30 to 1e30.
        rank: Rank k of the direction; None, or at least min(rows, cols), is full.
        alpha: Weight of the direction. Any finite number.
        blend: Ball that has the weight 1 - alpha: frobenius (m / |m|_F), sign (sign_scale *
            sign(m)) or any other of ``balls.BALLS``.
        sign_scale: Size of the entries of the sign direction.
        p: Exponent of the Schatten ball, from 1 to infinity.
        ball: A ball of ``balls.BALLS``; fanion has the rank k, kyfan is the Ky Fan ball of k.
        polar: Full-rank method, see ``polar``.
        polar_steps: Steps of the full-rank method; None is the method's own number.
        solver: Rank-k solver, see ``top_singular``.
        solver_steps: Steps of the rank-k solver; None is the solver's own number.
        oversampling: Columns of a cold start block beyond k.
        tol: Tolerance of the rank-k solver; None is the optimizer's, a residual_tol of .01.
        warm_start: Start block of the rank-k solver, (..., cols, width); dion needs one.
        generator: CPU generator of random start blocks.

    Returns:
        The same shape and dtype as m. Zero for a zero matrix; NaN for one with a NaN or an
        infinity.

    Raises:
        ValueError: If an option is not possible.
    """
    norms.check_matrices(m, "floating-point")
    if "dion" in (ball, blend) and warm_start is None:
        raise ValueError("dion iterates on a basis: give warm_start, (..., cols, rank)")
    check_choice("ball", ball, BALLS)
    check_choice("blend", blend, BALLS)
    solvers = polar, polar_steps, solver, solver_steps, oversampling, tol
    case = _checked_case(m, rank, Settings(*solvers, sign_scale=sign_scale, p=p))
    oracle = Oracle(BALLS[ball], case, real_number("alpha", alpha), BALLS[blend])
    answer = oracle.solve(m.detach(), warm_start=warm_start, generator=generator)
    return answer.direction.to(m.dtype)


def _checked_case(m: Tensor, rank: int | None, settings: Settings) -> Case:
    check_polar(settings.polar, settings.polar_steps)
    check_solver(settings.solver, settings.solver_steps, settings.oversampling)
    if settings.tol is not None:
        real_number("tol", settings.tol, 0.0)
    real_number("sign_scale", settings.sign_scale, above=0.0)
    exponent("p", settings.p)
    rows, cols = m.shape[-2:]
    k = min(rows, cols) if rank is None else min(whole_number("rank", rank), rows, cols)
    return Case(k, rows, cols, settings)
