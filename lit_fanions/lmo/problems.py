"""What oracles and solvers are asked, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lit_fanions.lmo.scaling import unit_frobenius

# Columns of a block iteration beyond k: the k-th singular value is then better separated from those
# outside the block, and converges faster.
OVERSAMPLING = 8


@dataclass(frozen=True)
class Settings:
    """Options of the solvers and of balls.

    Attributes:
        polar: Full-rank method, see ``newton_schulz.polar``.
        polar_steps: Steps of the full-rank method; None is the method's own number.
        solver: Rank-k solver, see ``singular_triplets.top_singular``.
        solver_steps: Steps of the rank-k solver; None is the solver's own number.
        oversampling: Columns beyond k of a block that starts cold.
        tol: Error of U_k V_k^T at which solvers with a tolerance stop, or None.
        residual_tol: Residual at which they stop if ``tol`` is None: enough for an accurate
            ``<m, D>``, which is what the optimizer needs.
        sign_scale: Radius of the sign ball, the size of the entries of its direction.
        p: Exponent of the Schatten ball, from 1 to infinity.
        kernels: plain, or triton for the symmetric products of ``polar`` on a GPU.
    """

    polar: str = "auto"
    polar_steps: int | None = None
    solver: str = "auto"
    solver_steps: int | None = None
    oversampling: int = OVERSAMPLING
    tol: float | None = None
    residual_tol: float = 1e-2
    sign_scale: float = 1.0
    p: float = 3.0
    kernels: str = "plain"


class Triplets(NamedTuple):
    """Singular triplets of a batch of matrices, in descending order.

    Attributes:
        U: (..., rows, k).
        S: (..., k).
        Vh: (..., k, cols).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


@dataclass(frozen=True)
class Case:
    """What a ball is asked about: matrices of one shape, a rank and the options of solvers.

    Attributes:
        k: Rank, from 1 to min(rows, cols), for the balls that have one.
        rows: Rows of each matrix.
        cols: Columns of each matrix.
        settings: Solvers and their options.
    """

    k: int
    rows: int
    cols: int
    settings: Settings = field(default_factory=Settings)

    @property
    def limit(self) -> int:
        """The smaller side of the matrices."""
        return min(self.rows, self.cols)


@dataclass
class Problem:
    """Matrices whose directions are wanted.

    Attributes:
        m: Matrices, (..., rows, cols), of any float dtype.
        case: Their shape, the rank and the options of solvers.
        warm_start: Right singular vectors for the rank-k solvers, (..., cols, width).
        generator: CPU generator of their random starts.
        unit: Whether the matrices have Frobenius norm 1 and ``polar_dtype`` already.
        overwrite: Whether the memory of m may be used by the last oracle that reads it.
    """

    m: Tensor
    case: Case
    warm_start: Tensor | None = None
    generator: torch.Generator | None = None
    unit: bool = False
    overwrite: bool = False

    def normalised(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the matrices over their Frobenius norms, and the norms.

        Matrices that came normalised keep their dtype, and None stands for their norms. For others
        a dtype of None is float32, or float64 for float64.
        """
        if self.unit:
            return self.m if self.overwrite else self.m.clone(), None
        return unit_frobenius(self.m, dtype=dtype, overwrite=self.overwrite)


class Answer(NamedTuple):
    """What an oracle returns.

    Attributes:
        direction: (..., rows, cols), in the dtype it was computed in.
        triplets: The triplets that a rank-k solver found, k or more; None without a solver. Their
            Vh.mT is the next warm start, and U_k S_k Vh_k is what error feedback subtracts.
    """

    direction: Tensor
    triplets: Triplets | None = None
