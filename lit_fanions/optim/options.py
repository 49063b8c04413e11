"""Every option of a parameter group, declared once: name, type, default, check and help.

``GroupOptions`` is the declaration. The checks of ``Fanion``, the signature and docstring of its
constructor, the YAML options with their help and the reference page all follow from its fields. A
new option is a field here and its use.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lit_fanions.checks import (
    check_choice,
    check_flag,
    did_you_mean,
    exponent,
    real_number,
    whole_number,
)  # fmt: skip
from lit_fanions.lmo import BALLS, OVERSAMPLING, PolarMethod, Solver
from lit_fanions.lmo.newton_schulz import METHODS
from lit_fanions.lmo.singular_triplets import SOLVER_NAMES
from lit_fanions.optim.adapting import NAMES as ADAPTS
from lit_fanions.optim.adapting import Adapt
from lit_fanions.optim.algorithms import ALGORITHMS, Algorithm, BlendName, find_algorithm
from lit_fanions.optim.matrices import LAYOUTS, Layout
from lit_fanions.optim.step_sizes import SCALES, Scale

Nonfinite = Literal["skip", "error", "propagate"]
MomentumDtype = Literal["float16", "bfloat16", "float32", "float64"]
_Check = Callable[[str, Any], Any]

# Names that other optimizers use for an option.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "betas": "momentum (beta1) and beta2",
    "beta1": "momentum",
    "wd": "weight_decay",
    "ns_steps": "polar_steps",
    "backend_steps": "polar_steps",
    "ns_coefficients": "polar",
    "adjust_lr_fn": "scale",
    "k": "rank",
}


def _choice(allowed: Iterable[str]) -> _Check:
    def check(name: str, value: Any) -> Any:
        check_choice(name, value, allowed)
        return value

    return check


def _number(
    least: float = -float("inf"), below: float = float("inf"), above: float = -float("inf")
) -> _Check:
    return lambda name, value: real_number(name, value, least, below, above=above)


def _whole(least: int) -> _Check:
    return lambda name, value: whole_number(name, value, least)


def _rank(name: str, value: Any) -> Any:
    if value == "full":
        return value
    try:
        return whole_number(name, value)
    except ValueError:
        fraction = hasattr(value, "__float__") and not isinstance(value, (bool, str))
        if fraction and 0 < float(value) <= 1 and not hasattr(value, "__index__"):
            return float(value)
        raise ValueError(
            f'{name} must be a whole number of at least 1, a fraction in (0, 1] or "full", '
            f"got {value!r}"
        ) from None


def _splits(name: str, value: Any) -> Any:
    try:
        if isinstance(value, (list, tuple)) and value:
            return [whole_number(name, size) for size in value]
        return whole_number(name, value)
    except ValueError:
        raise ValueError(
            f"{name} must be a number of equal parts or a list of sizes, got {value!r}"
        ) from None


def _dtype(name: str, value: Any) -> str:
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    check_choice(name, value, MomentumDtype.__args__)  # type: ignore[attr-defined]
    return str(value)


_ABSENT = object()


def _option(
    help: str,
    check: _Check,
    *,
    matrix: Any = _ABSENT,
    adamw: Any = _ABSENT,
    sgd: Any = _ABSENT,
) -> Any:
    """Declare an option.

    Args:
        help: Its text in help and reference.
        check: Maps its name and a value that is not None to the value as it is stored, or raises.
        matrix: Default in groups of balls, where the algorithm says nothing else.
        adamw: Default in groups of adamw.
        sgd: Default in groups of sgd.
    """
    defaults = {"matrix": matrix, "adamw": adamw, "sgd": sgd}
    given = {kind: value for kind, value in defaults.items() if value is not _ABSENT}
    return field(default=None, metadata={"help": help, "check": check, "defaults": given})


@dataclass(frozen=True)
class GroupOptions:
    """Options of a parameter group. None: what the algorithm says."""

    algorithm: Algorithm | None = _option(
        f"The norm ball, by name ({', '.join(ALGORITHMS)}), or torch's adamw and sgd. Default: "
        "muon for matrices, adamw for others.",
        _choice(ALGORITHMS),
    )
    lr: float | None = _option(
        "Learning rate, the radius of the ball. Default: .02 for matrices; adamw and sgd need one "
        "(1e-3 in the factory).",
        _number(0.0),
        matrix=0.02,
        adamw=None,
        sgd=None,
    )
    momentum: float | None = _option(
        "Weight of the old momentum in the new, in [0, 1); beta1 of adamw. Default: .95, and .9 "
        "for adamw and sgd.",
        _number(0.0, 1.0),
        matrix=0.95,
        adamw=0.9,
        sgd=0.9,
    )
    nesterov: bool | None = _option(
        "Nesterov momentum. Error feedback has its own momentum and turns it off. Default: on, "
        "off for sgd.",
        check_flag,
        matrix=True,
        sgd=False,
    )
    weight_decay: float | None = _option(
        "Decoupled weight decay, W <- (1 - lr * weight_decay) W; coupled for sgd, as in torch. "
        "Default: 0.",
        _number(0.0),
        matrix=0.0,
        adamw=0.0,
        sgd=0.0,
    )
    beta2: float | None = _option(
        "Decay of the second moment of adamw (default: .999) and of adapt (.95), in [0, 1).",
        _number(0.0, 1.0),
        matrix=0.95,
        adamw=0.999,
    )
    eps: float | None = _option(
        "Added to the denominator of adamw and of adapt. Default: 1e-8.",
        _number(0.0),
        matrix=1e-8,
        adamw=1e-8,
    )
    rank: int | float | Literal["full"] | None = _option(
        "Rank of the direction: a whole number, a fraction of min(rows, cols), or full; clamped "
        "to the matrix with one warning. Default: full, 1 for neon, a quarter for fanion, kyfan "
        "and dion.",
        _rank,
        matrix="full",
    )
    alpha: float | None = _option(
        "Weight of the direction in a blend, 1 - alpha for the partner. Outside [0, 1] there is no "
        "norm ball: allowed, with one warning. Default: 1, .5 for f_ and s_.",
        _number(),
        matrix=1.0,
    )
    blend: BlendName | None = _option(
        "Ball of the partner in a blend: frobenius (normalised SGD), sign, or any other of the "
        "table of balls. Default: frobenius, sign for s_.",
        _choice(BALLS),
        matrix="frobenius",
    )
    sign_scale: float | None = _option(
        "Size of the entries of the sign direction. Default: 1.", _number(above=0.0), matrix=1.0
    )
    p: float | None = _option(
        "Exponent of the Schatten ball: 1 neon, 2 nsgd, .inf muon. Default 3.", exponent, matrix=3.0
    )
    polar: PolarMethod | None = _option(
        "Solver for full rank (lmo.polar). Default: auto.", _choice(METHODS), matrix="auto"
    )
    polar_steps: int | None = _option(
        "Steps of the solver for full rank. Default: the method's own number.",
        _whole(1),
        matrix=None,
    )
    solver: Solver | None = _option(
        "Solver for rank k (lmo.top_singular), warm-started from the previous step. Default: auto.",
        _choice(SOLVER_NAMES),
        matrix="auto",
    )
    solver_steps: int | None = _option(
        "Steps of the solver for rank k. Default: the solver's own number, one for subspace.",
        _whole(1),
        matrix=None,
    )
    oversampling: int | None = _option(
        "Columns of that solver's basis beyond the rank. The basis, (in, columns) for each matrix, "
        f"is part of the state. Default: {OVERSAMPLING}.",
        _whole(0),
        matrix=OVERSAMPLING,
    )
    stack_entries: int | None = _option(
        "Entries of the matrices of one shape that are solved together, in one batch, which bounds "
        "the memory of a step: up to three times theirs in float32, four for blends, kyfan and "
        "large ranks, five for dion, ten for polar=exact. A larger matrix is solved alone. "
        "Default: 2**26, and 5 * 2**20 on CPUs.",
        _whole(0),
        matrix=None,
    )
    scale: Scale | None = _option(
        "Step-size rule for a matrix of out x in, by torch's names: none (1), original "
        "(sqrt(max(1, out / in))), spectral_unclamped (sqrt(out / in)), match_rms_adamw (an RMS of "
        ".2 lr for every update). Default: original, spectral_unclamped for dion.",
        _choice(SCALES),
        matrix="original",
    )
    adapt: Adapt | None = _option(
        "Divide the direction by the root of its second moment, for each row (rows, as NorMuon) or "
        "entry (entries, as AdaMuon), and scale it to its former length. Default: none.",
        _choice(ADAPTS),
        matrix="none",
    )
    renormalize: bool | None = _option(
        "Scale the weight to Frobenius norm sqrt(out) before each step. Default: off.",
        check_flag,
        matrix=False,
    )
    error_feedback: bool | None = _option(
        "Keep what a step of low rank leaves behind: M <- M + G, and only the captured part "
        "decays, M <- M - (1 - momentum) U_k S_k V_k^T. Default: off, on for dion.",
        check_flag,
        matrix=False,
    )
    splits: int | list[int] | None = _option(
        "A fused parameter as several matrices: into how many equal parts, or into which sizes, "
        "its rows are cut (3 for QKV). Default: what the module's class says.",
        _splits,
        matrix=None,
    )
    layout: Layout | None = _option(
        "How a parameter is a matrix: flatten (out x the rest, as linear layers and convolutions), "
        "transposed (dimensions 0 and 1 swapped, as transposed convolutions and weights stored in "
        "x out), batch (leading dimensions are separate matrices, as stacks of experts), "
        "batch_transposed (the same, each stored in x out). Default: what the module's class says.",
        _choice(LAYOUTS),
        matrix="flatten",
    )
    nonfinite: Nonfinite | None = _option(
        "What a NaN or an infinity in a gradient does: skip that parameter's step on the device "
        "and count it in its state; error, FloatingPointError before anything has changed (waits "
        "for the device); or propagate. Default: skip.",
        _choice(Nonfinite.__args__),  # type: ignore[attr-defined]
        matrix="skip",
        adamw="skip",
        sgd="skip",
    )
    momentum_dtype: MomentumDtype | None = _option(
        "Dtype of the momentum. Default: the parameter's, float32 for float16.", _dtype, matrix=None
    )
    share_work: bool | None = _option(
        "Let one rank solve each matrix that ranks replicate or have shards of. Default: on.",
        check_flag,
        matrix=True,
    )
    seed: int | None = _option(
        "Seed of the random starts of rank-k solvers, which become part of the state. Default: "
        "that of seed_everything, 0 without one.", _whole(0), matrix=None,
    )  # fmt: skip

    def given(self) -> dict[str, Any]:
        """Return the options that are not None."""
        return {f.name: getattr(self, f.name) for f in FIELDS if getattr(self, f.name) is not None}


FIELDS = dataclasses.fields(GroupOptions)
NAMES = tuple(f.name for f in FIELDS)


def default_options(algorithm: str) -> dict[str, Any]:
    """Return every option that groups of an algorithm have, with its default.

    Raises:
        ValueError: If there is no such algorithm.
    """
    entry = find_algorithm(algorithm)
    defaults = {
        f.name: f.metadata["defaults"][entry.kind]
        for f in FIELDS
        if entry.kind in f.metadata["defaults"]
    }
    return {**defaults, **entry.options}


def carry_over(given: Mapping[str, Any], source: str, target: str) -> dict[str, Any]:
    """Return the options given with one algorithm that hold for a group of another.

    Options that the target's name fixes (rank, alpha, blend, ...) are not carried over. Between
    adamw and sgd lr is not; between balls and those two only ``nonfinite`` is.

    Args:
        given: Options given with the source.
        source: Name of an algorithm.
        target: Name of the group's algorithm.
    """
    if source == target:
        return dict(given)
    kinds = {find_algorithm(source).kind, find_algorithm(target).kind}
    allowed = default_options(target).keys() - find_algorithm(target).options.keys()
    if len(kinds) > 1:
        allowed = allowed - {"lr"} if "matrix" not in kinds else {"nonfinite"}
    return {name: value for name, value in given.items() if name in allowed}


def is_foreign(source: str, target: str) -> bool:
    """Return whether two algorithms are of different kinds (balls, adamw, sgd), with lr apart."""
    return find_algorithm(source).kind != find_algorithm(target).kind


def default_seed() -> int:
    """Return the seed of Lightning's seed_everything, 0 without one.

    Not torch's own seed: where ranks seed torch differently, their bases would differ too.
    """
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return int(seed) if seed.isdigit() else 0


def check_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the options of a group and return them as they are stored.

    Args:
        group: Options of a group, all of its algorithm's and maybe keys of others.
        where: What to call the group in messages.

    Raises:
        ValueError: If an option is impossible.
    """
    options = default_options(group["algorithm"])
    checks = {f.name: f.metadata["check"] for f in FIELDS}
    return {
        name: checks[name](f"{where}: {name}", value)
        if name in checks and (value is not None or (name in options and options[name] is not None))
        else value
        for name, value in group.items()
    }


def check_names(given: Iterable[str], algorithm: str, where: str, others: Iterable[str]) -> None:
    """Refuse options that the algorithm does not have, and keys that look like a typo of one.

    Other keys are left alone: wrappers and schedulers keep their own in parameter groups.

    Args:
        given: The keys given.
        algorithm: Name of the group's algorithm.
        where: What to call the group in messages.
        others: Keys that are no options but known.

    Raises:
        ValueError: With the closest option's name and a list of all.
    """
    options = ["algorithm", "name", *default_options(algorithm)]
    known = {*options, *others}
    for key in given:
        if key in known:
            continue
        hint = did_you_mean(key, options)
        if key in _OTHER_NAMES:
            hint = f"; did you mean {_OTHER_NAMES[key]}?"
        if hint or key in NAMES:
            listed = ", ".join(sorted(options))
            raise ValueError(f"{where} has no option {key!r}{hint} (options: {listed})")
