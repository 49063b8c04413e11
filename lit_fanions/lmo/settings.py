"""How oracles are computed: the options that travel together from a caller to the solvers.

A room of its own, below balls and solvers, because both read it.
"""

from __future__ import annotations

from dataclasses import dataclass

# Columns beyond k in a block iteration: the cut at k then lies inside the block, where the
# singular values are better separated from those outside.
OVERSAMPLING = 8


@dataclass(frozen=True)
class Settings:
    """Solvers of an oracle, and the radius of the sign ball.

    Attributes:
        polar: Full-rank method, see ``newton_schulz.polar``.
        polar_steps: Its steps; None is the method's own number.
        solver: Rank-k solver, see ``singular_triplets.top_singular``.
        solver_steps: Its steps; None is the solver's own number.
        oversampling: Columns beyond k of a block that starts cold.
        tol: Residual at which solvers with a tolerance stop.
        sign_scale: Radius of the sign ball, the size of the entries of its direction.
    """

    polar: str = "auto"
    polar_steps: int | None = None
    solver: str = "auto"
    solver_steps: int | None = None
    oversampling: int = OVERSAMPLING
    tol: float = 1e-2
    sign_scale: float = 1.0
