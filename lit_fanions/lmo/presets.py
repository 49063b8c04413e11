"""Presets of Newton-Schulz iterations: the polynomials of their steps.

A preset is a table of (a, b, c), a row a step: x <- a x + b (x x^T) x + c (x x^T)^2 x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from lit_fanions.checks import check_choice, whole_number

Row = tuple[float, float, float]


class _Preset(NamedTuple):
    summary: str
    rows: tuple[Row, ...]
    steps: int
    repeats: bool  # whether its last row may be repeated past the end of the table
    margin: float = 1.0  # the input is divided by this as well, against rounding
    rescales: bool = False  # whether x is divided by |x x^T|_F^(1/2) too (arXiv 2506.10935)


def _safe(rows: tuple[Row, ...], margin: float) -> tuple[Row, ...]:
    # These polynomials are optimal on an interval and diverge outside, where rounding may lead.
    return tuple((a / margin, b / margin**3, c / margin**5) for a, b, c in rows)


# The published seventh row is that of the limit but for rounding.
_POLAR_EXPRESS = (
    *_safe(
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        ),
        1.01,
    ),
    (1.875, -1.25, 0.375),
)
_PRESETS: dict[str, _Preset] = {
    "jordan": _Preset(
        "K. Jordan et al., Muon (2024): fast at first, singular values end between .7 and 1.2",
        ((3.4445, -4.7750, 2.0315),),
        5,
        True,
    ),
    # A sixth step would start far from where the fifth row is good.
    "quintic": _Preset(
        "fitted for exactly five steps",
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        5,
        False,
    ),
    "polar_express": _Preset(
        "arXiv 2505.16932: minimax optimal for singular values from 1e-3 to 1",
        _POLAR_EXPRESS,
        6,
        True,
        1.01,
    ),
    # Steep at the ends of its intervals, so in bfloat16 it needs the safety margin even more.
    "cans": _Preset(
        "arXiv 2506.10935: equioscillates up to the very ends of its intervals",
        (
            *_safe(
                (
                    (8.4703, -25.1081, 18.6293),
                    (4.1828, -3.1087, 0.5806),
                    (3.9619, -2.9541, 0.5630),
                    (3.2866, -2.4647, 0.5074),
                ),
                1.02,
            ),
            (2.2737, -1.6447, 0.4162),
        ),
        5,
        True,
        1.02,
    ),
    "fast": _Preset(
        "steps of polar_express from ‖M Mᵀ‖_F^½, a closer bound than ‖M‖_F: singular values end "
        "between .44 and 1.56",
        _POLAR_EXPRESS,
        4,
        True,
        1.01,
        rescales=True,
    ),
    "convergent": _Preset(
        "converges from everywhere in (0, 1], slowly", ((2.0, -1.5, 0.5),), 12, True
    ),
}
# The preset of "auto": the fewest products that keep <m, d> at .97 of the nuclear norm for
# condition numbers up to 1e3.
AUTO = "polar_express"
SUMMARIES = {
    **{name: f"{own.summary} ({own.steps} steps)" for name, own in _PRESETS.items()},
    "exact": "the singular value decomposition",
    "auto": f"the same as {AUTO}",
}
METHODS = tuple(SUMMARIES)
if TYPE_CHECKING:
    PolarMethod = str
else:
    PolarMethod = Literal[METHODS]


def coefficients(method: str, steps: int | None = None) -> tuple[Row, ...]:
    """Return the (a, b, c) of each step of a Newton-Schulz preset; None: its own number of steps.

    Past the end of its table a preset repeats the last row; one that cannot is refused there.
    """
    check_polar(method, steps)
    preset = _preset(method)
    steps = preset.steps if steps is None else steps
    return (preset.rows + preset.rows[-1:] * steps)[:steps]


def polynomials(method: str, steps: int | None = None) -> tuple[Row, ...]:
    """Return ``coefficients`` for matrices of spectral norm 1 or less, with the preset's margin."""
    rows = coefficients(method, steps)
    return (*_safe(rows[:1], _preset(method).margin), *rows[1:])


def rescales(method: str) -> bool:
    """Return whether a preset divides x by |x x^T|_F^(1/2) in its first step, see ``iterate``."""
    return _preset(method).rescales


def _preset(method: str) -> _Preset:
    return _PRESETS[AUTO if method == "auto" else method]


def check_polar(method: str, steps: int | None) -> None:
    """Refuse a method that does not exist and a number of steps that it cannot take."""
    check_choice("polar method", method, METHODS)
    if steps is None:
        return
    if method == "exact":
        raise ValueError(f"the exact polar factor takes no steps, got {steps}: leave them out")
    whole_number("steps", steps)
    preset = _preset(method)
    if not preset.repeats and steps != preset.steps:
        raise ValueError(
            f"polar method {method!r} is fitted for exactly {preset.steps} steps, got {steps}; "
            'choose "polar_express" for another number'
        )
