"""Step-size rules: the factor that multiplies lr for a matrix of out x in.

The names and formulas are torch.optim.Muon's, generalised to every ball by the length of its
directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

# RMS of an update of AdamW, which match_rms_adamw aims at (arXiv 2502.16982).
MATCHED_RMS = 0.2


def _match_rms_adamw(rows: int, cols: int, length: float | None) -> float | None:
    return None if length is None else MATCHED_RMS * math.sqrt(rows * cols) / length


SCALES: dict[str, Callable[[int, int, float | None], float | None]] = {
    "none": lambda rows, cols, length: 1.0,
    "original": lambda rows, cols, length: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": _match_rms_adamw,
    "spectral_unclamped": lambda rows, cols, length: math.sqrt(rows / cols),
}


def step_size_factor(
    scale: str, rows: int, cols: int, length: float | None, blocks: int = 1
) -> float | None:
    """Return the factor of a step-size rule of ``SCALES`` for a matrix of rows x cols (out x in).

    ``match_rms_adamw`` gives the step an RMS of .2 lr whatever the direction's length, and is
    torch's .2 sqrt(max(rows, cols)) for Muon: None where ``length``, the Frobenius norm of the
    directions, is None, as it depends on the matrix. With as many ``blocks`` of such matrices side
    by side, whose outputs are added, such as the heads of an output projection, the factor is the
    one of the whole, out x (blocks * in).
    """
    whole_length = None if length is None else length * math.sqrt(blocks)
    return SCALES[scale](rows, cols * blocks, whole_length)
