"""Write docs/algorithms.md: the mathematics, with every ball, algorithm and option.

  python -m experiments.reference

Tables come from ``lmo.BALLS``, ``ALGORITHMS``, ``SCALES`` and ``GroupOptions``; the text between
them stands here. A test compares the page with what this command would write.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lit_fanions.lmo import BALLS, Case
from lit_fanions.lmo.presets import SUMMARIES
from lit_fanions.lmo.singular_triplets import SOLVER_NAMES
from lit_fanions.optim.adapting import NAMES as ADAPTS
from lit_fanions.optim.algorithms import ALGORITHMS, AlgorithmEntry, describe_step
from lit_fanions.optim.options import FIELDS, GroupOptions
from lit_fanions.optim.step_sizes import SCALES

PAGE = Path(__file__).parents[1] / "docs/algorithms.md"

# Explanations of names whose tables have no text; a name without one is listed all the same.
SCALE_TEXTS = {
    "none": ("1", "the step's spectral norm is lr for muon"),
    "original": ("√max(1, out / in)", "the rule of the first Muon; the default"),
    "match_rms_adamw": (
        ".2 √(out · in) / ‖D‖_F",
        "updates of RMS .2 lr for every ball, rank and alpha: an lr of AdamW fits",
    ),
    "spectral_unclamped": ("√(out / in)", "the RMS → RMS operator norm; dion's default"),
}
ADAPT_TEXTS = {
    "none": "the direction as it is; the default",
    "rows": "a second moment for each row, as NorMuon (arXiv 2510.05491)",
    "entries": "one for each entry, as AdaMuon (arXiv 2507.11005)",
    "leading": "that of Adam inside a leading subspace, as COSMOS (arXiv 2502.17410)",
}
SOLVER_TEXTS = {
    "auto": "subspace from a warm start, lanczos from a cold one, exact for small matrices on CPUs",
    "lanczos": "thick-restart block Lanczos, until the tolerance is met",
    "subspace": "block power iterations: 8 from a cold start, 1 from the previous step's basis",
    "randomized": "8 block power iterations, from a fresh random block at each step",
    "power": "64 power iterations, from a random block of k vectors without oversampling",
    "polar": "the polar factor of the matrix in a subspace of k columns, which starts from the "
    "previous step's: fewest operations, less accurate on flat spectra",
    "exact": "singular value decomposition in float64",
    "cupy": "CuPy's thick-restart Lanczos, on CUDA",
}

INTRODUCTION = """\
# Algorithms and options

Written by `python -m experiments.reference` from the tables of the code: edit those, or the text in
`experiments/reference.py`.

## The step

A matrix group steps each of its matrices W, with the gradient G:

1. momentum: M ← μ M + (1 − μ) G, and N = (1 − μ) G + μ M with Nesterov's form, else N = M;
2. direction: D(N) = argmax { ⟨N, D⟩ : ‖D‖ ≤ 1 }, the point of the unit ball that goes furthest
   along N (the linear minimisation oracle). ⟨N, D(N)⟩ is the dual norm of N;
3. adapt, if asked for: D is divided by the root of its second moment, or joined with Adam's step;
4. size: the factor s of the rule `scale` for the shape of the matrix;
5. apply: W ← (1 − lr · weight_decay) W − lr · s · D(N).

D(0) = 0, and D does not depend on the size of N: only lr and the schedule set the length of a step.
In the tables M stands for the matrix whose direction is taken. M = U Σ Vᵀ is its singular value
decomposition, σ₁ ≥ σ₂ ≥ … its singular values, and k the rank.

## Balls

A ball is a norm that steps are bounded in. `Fanion` takes the names of the next section; `blend`
takes the names of this one. The exact norms, with value, dual and oracle in float64, are in
`lit_fanions.norms`; fast oracles for batches are behind `lit_fanions.lmo.direction`.
"""

BLENDS = """\
## Blends

With `alpha` below 1 the step is a mixture, α · D + (1 − α) · D′, where D′ is the direction of the
ball `blend`. It is the oracle of the Minkowski sum of the two balls, each scaled by its weight: the
dual norm is α ‖·‖† + (1 − α) ‖·‖′† (Lemma 9 of the article). Any ball of the table can be the
partner. `sign_scale` is s, the size of the entries of the sign direction: by default 1 for `signum`
and 1 / √(rows · cols) for a partner, which is then as long as that of `nsgd`. Outside [0, 1] the
mixture is allowed, with a warning, and is the oracle of no norm.

The authors' own code calls the weight of the *partner* `sgd_coeff` = 1 − α.

## Algorithms

A name only sets options; options given explicitly win. `algorithm: muon` with `alpha: 0.5` is
`f_muon`. A rank is a whole number, a fraction of min(rows, cols), or `full`.
"""

ERROR_FEEDBACK = """\
`error_feedback` keeps what a step of low rank leaves behind: M ← M + G, and only the captured part
decays, M ← M − (1 − μ) U_k Σ_k V_kᵀ. It needs a rank below full, and is on for dion.

## Adapting

`adapt` divides the direction by the root of a running second moment of it (`beta2`, `eps`) and
scales it to its former length, so that the step-size rules mean the same.

`adapt: leading` is COSMOS (arXiv 2502.17410). One power iteration a step follows an orthonormal
basis U of the `adapt_rank` leading eigenvectors of the gradients' second moment, on the smaller
side of the matrix. Inside its span the step is Adam's, as in SOAP: A = M U / (√V + eps) Uᵀ, with V
the running mean of (G U)². Outside it is the ball's: B = D(M − M U Uᵀ). The sum A + `rest_weight` ·
√(out · in) · B / ‖B‖_F gets the length of the ball's directions. The ball is that of the algorithm:
`cosmos` has Muon's, as published; with `rank: 1` Neon's; `nsgd` with `adapt: leading` has NSGD's.
With the scale of `cosmos` the entries of an update have an RMS of .2 lr; in the authors' code it is
lr_ratio · lr. The state is about adapt_rank · (in + out) numbers in float32, the products take some
16 · adapt_rank · in · out operations a step (5 % of Newton–Schulz's for 768×3072), and the first
step decomposes every gradient. Each process solves every matrix, of gathered shards.
`error_feedback` is refused.
"""

SIZES = """\
## Step-size rules

`scale` multiplies lr for a matrix of out × in. The names are those of `torch.optim.Muon`.
"""

SOLVERS = """\
## Solvers

`polar` chooses how U Vᵀ is computed for full rank, `polar_steps` the number of its steps. `jordan`
and `polar_express` differ in quality: see [results](results.md#the-matrix-side).

`schatten` takes an eigendecomposition of the Gram matrix. On a GPU, where that waits for the
device, p = 1 + 2ⁿ (3, 5, 9, 17, …) takes matrix products alone; p = 1, 2 and ∞ are the balls
`nuclear`, `frobenius` and `spectral`. `capturable` refuses every other p. `polar: exact` decomposes
the matrix itself.
"""

RANK_K = """\
`solver` chooses how the k leading singular triplets are found. The basis of one step starts the
next, and is part of the state and of checkpoints.
"""

OPTIONS = """\
## Options of a group

Every parameter group has its own, by the same names in `Fanion`, in `param_groups` and in YAML. A
misspelt option is refused, with the likely name. Groups: *matrix* are those of a ball, *adamw* and
*sgd* those of torch's own steps. Shapes and overrides are explained in
[configuration](configuration.md).
"""


def render() -> str:
    """Return the page.

    Raises:
        ValueError: If a ball or an option has no text.
    """
    balls = [
        (
            f"`{name}`",
            _text(name, ball.summary),
            _text(name, ball.direction),
            str(ball.norm(Case(4, 8, 8))),
        )
        for name, ball in BALLS.items()
    ]
    scales = [
        (f"`{name}`", *(_text(name, text) for text in SCALE_TEXTS.get(name, ("",))))
        for name in SCALES
    ]
    adapting = [(f"`{name}`", _text(name, ADAPT_TEXTS.get(name, ""))) for name in ADAPTS]
    polar = [(f"`{name}`", summary) for name, summary in SUMMARIES.items()]
    solvers = [(f"`{name}`", _text(name, SOLVER_TEXTS.get(name, ""))) for name in SOLVER_NAMES]
    parts = [
        INTRODUCTION,
        _table(("ball", "norm", "D(M)", "exact (k = 4)"), balls),
        BLENDS,
        _table(
            ("`algorithm`", "ball", "D(M)", "it sets"),
            [(f"`{name}`", *describe(name, entry)) for name, entry in ALGORITHMS.items()],
        ),
        ERROR_FEEDBACK,
        _table(("`adapt`", "second moment"), adapting),
        SIZES,
        _table(("`scale`", "factor", "what for"), scales),
        SOLVERS,
        _table(("`polar`", "method"), polar),
        RANK_K,
        _table(("`solver`", "method"), solvers),
        OPTIONS,
        _table(("option", "groups", "values", "what it does"), list(_options())),
    ]
    return "\n".join(parts)


def main() -> int:
    """Write the page."""
    PAGE.write_text(render())
    print(PAGE)
    return 0


def describe(name: str, entry: AlgorithmEntry) -> tuple[str, str, str]:
    """Return ball, direction and options of an algorithm as text."""
    plain = {"rank": "full", "alpha": 1.0, "blend": "frobenius"}
    options = {key: value for key, value in entry.options.items() if plain.get(key) != value}
    shown = ", ".join(f"{key} {_value(value)}" for key, value in options.items())
    return *describe_step({"algorithm": name, **entry.options}), shown


def _options() -> Iterable[tuple[str, ...]]:
    """Yield a row for each option."""
    hints = typing.get_type_hints(GroupOptions)
    for option in FIELDS:
        kinds = ", ".join(option.metadata["defaults"]) or "all"
        help_text = _text(option.name, option.metadata["help"])
        # The names of algorithms and balls stand in tables of their own above.
        own_table = {"algorithm": "a name from above", "blend": "a ball"}
        values = own_table.get(option.name) or _type_text(hints[option.name])
        yield f"`{option.name}`", kinds, values, help_text.replace("|", "\\|")


def _type_text(hint: Any) -> str:
    """Return a type as the values that a user writes."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [one for one in typing.get_args(hint) if one is not type(None)]
        return ", ".join(map(_type_text, members))
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "list of int"
    return str(hint.__name__)


def _value(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"{value}"


def _text(name: str, text: str) -> str:
    if not text:
        raise ValueError(f"{name!r} has no text for the reference page")
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
