"""Every option of a parameter group, declared once: name, type, default, check and help.

``GroupOptions`` is the declaration. The checks of ``Fanion``, the signature and docstring of its
constructor, the YAML options with their help and the reference page all follow from its fields. A
new option is a field here and its use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lit_fanions.checks import check_choice, check_flag, exponent, real_number, whole_number
from lit_fanions.lmo import BALLS, OVERSAMPLING
from lit_fanions.lmo.presets import METHODS
from lit_fanions.lmo.singular_triplets import SOLVER_NAMES
from lit_fanions.optim.adapting import NAMES as ADAPTS
from lit_fanions.optim.algorithms import ALGORITHMS, find_algorithm
from lit_fanions.optim.fused import KERNELS, check_kernels
from lit_fanions.optim.matrices import LAYOUTS, check_heads, check_splits
from lit_fanions.optim.step_sizes import SCALES

_Check = Callable[[str, Any], Any]
_T = TypeVar("_T")
_DTYPES = ("float16", "bfloat16", "float32", "float64")
# More steps of a solver than these change no direction, and a misplaced number hangs the run.
_MOST_POLAR_STEPS = 100
_MOST_SOLVER_STEPS = 10_000
# Options that say how a step is computed, and not which step: the same for groups of every kind.
RUNTIME_OPTIONS = ("nonfinite", "capturable", "share_work")
# Learning rate of adamw and sgd where the library chooses them.
ENTRYWISE_LR = 1e-3


def _lr(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return real_number(name, value, 0.0)
    if value.numel() != 1:
        raise ValueError(f"{name}: a tensor lr must have one element, got {tuple(value.shape)}")
    real_number(name, value.item(), 0.0)
    # torch's schedulers change such an lr in place: each group gets a copy of its own.
    return value.detach().clone().reshape(())


def _rank(name: str, value: Any) -> Any:
    whole = hasattr(value, "__index__")
    if value == "full":
        return value
    with contextlib.suppress(ValueError):
        number = whole_number(name, value) if whole else real_number(name, value, above=0.0)
        if whole or number <= 1:
            return number
    raise ValueError(
        f'{name} must be a whole number of at least 1, a fraction in (0, 1] or "full", '
        f"got {value!r}"
    )


def _dtype(name: str, value: Any) -> str:
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    check_choice(name, value, _DTYPES)
    return str(value)


def _option(
    help: str, check: _Check | None = None, choices: Iterable[str] = (), **defaults: Any
) -> Any:
    """Declare an option.

    ``check`` maps its name and a value that is not None to the value as it is stored, or raises;
    by default the value must be one of the choices. ``defaults`` go by the kind of algorithm
    (matrix, adamw, sgd), where the algorithm says nothing else. Groups of a kind that is missing do
    not have the option.
    """

    def is_choice(name: str, value: Any) -> Any:
        check_choice(name, value, choices)  # a table may have got rows since
        return value

    metadata = {"help": help, "check": check or is_choice, "choices": tuple(choices)}
    return field(default=None, metadata={**metadata, "defaults": defaults})


def _choices_as_types(cls: type[_T]) -> type[_T]:
    """Give options that are names the type that parsers and help pages show."""
    for name, declared in vars(cls).items():
        if isinstance(declared, dataclasses.Field) and declared.metadata["choices"]:
            cls.__annotations__[name] = Literal[declared.metadata["choices"]] | None
    return cls


@dataclass(frozen=True)
@_choices_as_types
class GroupOptions:
    """Options of a parameter group. None: what the algorithm says."""

    algorithm: str | None = _option(
        f"The norm ball, by name ({', '.join(ALGORITHMS)}), or torch's adamw and sgd. Default: "
        "muon for matrices, adamw for others.",
        choices=ALGORITHMS,
    )
    lr: float | None = _option(
        "Learning rate, the radius of the ball. Default: .02 for matrices; adamw and sgd need one "
        "(1e-3 in the factory).",
        _lr,
        matrix=0.02,
        adamw=None,
        sgd=None,
    )
    momentum: float | None = _option(
        "Weight of the old momentum in the new, in [0, 1); beta1 of adamw. Default: .95, and .9 "
        "for adamw and sgd.",
        partial(real_number, least=0.0, below=1.0),
        matrix=0.95,
        adamw=0.9,
        sgd=0.9,
    )
    nesterov: bool | None = _option(
        "Nesterov momentum. Error feedback has its own momentum and turns it off. Default: on, "
        "off for cosmos and sgd.",
        check_flag, matrix=True, sgd=False,
    )  # fmt: skip
    weight_decay: float | None = _option(
        "Decoupled weight decay, W <- (1 - lr * weight_decay) W; coupled for sgd, as in torch. "
        "Decay and step of float16 and bfloat16 weights are rounded together: entries stay where "
        "their sum is below half the spacing of the weight's numbers. That of the constructor is "
        "for groups of any algorithm. Default: 0.",
        partial(real_number, least=0.0), matrix=0.0, adamw=0.0, sgd=0.0,
    )  # fmt: skip
    cautious_decay: bool | None = _option(
        "Decay only entries that the step moves towards 0 or not at all (cautious weight decay, "
        "arXiv 2510.12402). Default: off.",
        check_flag,
        matrix=False,
    )
    beta2: float | None = _option(
        "Decay of the second moment of adamw (default: .999) and of adapt (.95), in [0, 1).",
        partial(real_number, least=0.0, below=1.0),
        matrix=0.95,
        adamw=0.999,
    )
    eps: float | None = _option(
        "Added to the denominator of adamw and of adapt. Default: 1e-8.",
        partial(real_number, least=0.0),
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
        real_number,
        matrix=1.0,
    )
    blend: str | None = _option(
        "Ball of the partner in a blend: frobenius (normalised SGD), sign, or any other of the "
        "table of balls. Default: frobenius, sign for s_.",
        choices=BALLS,
        matrix="frobenius",
    )
    sign_scale: float | None = _option(
        "Size of the entries of the sign direction. Default: 1 for signum, 1 / sqrt(rows * cols) "
        "for a partner, which is then as long as that of nsgd.",
        partial(real_number, above=0.0), matrix=None,
    )  # fmt: skip
    p: float | None = _option(
        "Exponent of the Schatten ball: 1 neon, 2 nsgd, .inf muon. Default 3.", exponent, matrix=3.0
    )
    polar: str | None = _option(
        "Solver for full rank (lmo.polar). Default: auto.", choices=METHODS, matrix="auto"
    )
    polar_steps: int | None = _option(
        "Steps of the solver for full rank. Default: the method's own number.",
        partial(whole_number, least=1, most=_MOST_POLAR_STEPS),
        matrix=None,
    )
    solver: str | None = _option(
        "Solver for rank k (lmo.top_singular), warm-started from the previous step. Default: auto.",
        choices=SOLVER_NAMES,
        matrix="auto",
    )
    solver_steps: int | None = _option(
        "Steps of the solver for rank k. Default: the solver's own number, one for subspace.",
        partial(whole_number, least=1, most=_MOST_SOLVER_STEPS),
        matrix=None,
    )
    oversampling: int | None = _option(
        "Columns of the basis of the rank-k solver beyond the rank. The basis, (in, columns) for "
        f"each matrix, is part of the state. Default: {OVERSAMPLING}.",
        partial(whole_number, least=0),
        matrix=OVERSAMPLING,
    )
    stack_entries: int | None = _option(
        "Entries of the matrices of one shape that are solved together, in one batch, which bounds "
        "the memory of a step: up to three times theirs in float32, four for blends, kyfan and "
        "large ranks, five for dion, ten for polar=exact. A larger matrix is solved alone. "
        "Default: 2**26, and 5 * 2**20 on CPUs.",
        partial(whole_number, least=0, most=2**63 - 1),
        matrix=None,
    )
    scale: str | None = _option(
        "Step-size rule for a matrix of out x in, by torch's names: none (1), original "
        "(sqrt(max(1, out / in))), spectral_unclamped (sqrt(out / in)), match_rms_adamw (an RMS of "
        ".2 lr for every update). Default: original, the last for cosmos, the one before for dion.",
        choices=SCALES,
        matrix="original",
    )
    adapt: str | None = _option(
        "Divide the direction by the root of its second moment, for each row (rows, as NorMuon) or "
        "entry (entries, as AdaMuon), or join it, taken outside a leading subspace of gradients, "
        "with Adam's step inside (leading, as COSMOS); the length stays. Default: none.",
        choices=ADAPTS, matrix="none",
    )  # fmt: skip
    adapt_rank: int | None = _option(
        "Dimension of the subspace of adapt leading, clamped to the matrix. Default: 64.",
        whole_number,
        matrix=64,
    )
    rest_weight: float | None = _option(
        "RMS of the ball's direction outside the subspace of adapt leading, over that of Adam's "
        "step inside (gamma). Default: .1.",
        partial(real_number, least=0.0), matrix=0.1,
    )  # fmt: skip
    renormalize: bool | None = _option(
        "Scale the weight to Frobenius norm sqrt(out) before each step. Default: off.",
        check_flag, matrix=False,
    )  # fmt: skip
    error_feedback: bool | None = _option(
        "Keep what a step of low rank leaves behind: M <- M + G, and only the captured part "
        "decays, M <- M - (1 - momentum) U_k S_k V_k^T. Default: off, on for dion.",
        check_flag, matrix=False,
    )  # fmt: skip
    heads: int | dict[str, int] | Literal["auto"] | None = _option(
        "Heads of attention as matrices of their own: their number, for rows, or {count, dim} with "
        "dim 0 for rows and 1 for columns (output projections); with splits, in each part. auto, "
        "in the factory: as the attention module says. Stored as splits. The outputs of columns "
        "are added: scale and renormalize take them for the whole matrix. Default: whole.",
        check_heads,
        matrix=None,
    )
    splits: int | list[int] | dict[str, int] | None = _option(
        "A fused parameter as several matrices: into how many equal parts, or into which sizes, "
        "its rows are cut (3 for QKV). Default: what the module's class says.",
        check_splits,
        matrix=None,
    )
    layout: str | None = _option(
        "How a parameter is a matrix: flatten (out x the rest, as linear layers and convolutions), "
        "transposed (dimensions 0 and 1 swapped, as transposed convolutions and weights stored in "
        "x out), batch (leading dimensions are separate matrices, as stacks of experts), "
        "batch_transposed (the same, each stored in x out). Default: what the module's class says.",
        choices=LAYOUTS,
        matrix="flatten",
    )
    nonfinite: str | None = _option(
        "What a NaN or an infinity in a gradient does: skip that parameter's step on the device "
        "and count it in its state; error, FloatingPointError before anything has changed (waits "
        "for the device); or propagate. Default: skip.",
        choices=("skip", "error", "propagate"), matrix="skip", adamw="skip", sgd="skip",
    )  # fmt: skip
    momentum_dtype: str | None = _option(
        "Dtype of the momentum. Default: the parameter's, float32 for float16.",
        _dtype,
        _DTYPES,
        matrix=None,
    )
    kernels: str | None = _option(
        "plain (PyTorch's), or triton: fewer launches and bytes for contiguous, unsharded "
        "parameters on a GPU, never measured there; all others take plain ones (docs/gpu). "
        "Default: plain.",
        check_kernels, KERNELS, matrix="plain",
    )  # fmt: skip
    capturable: bool | None = _option(
        "Let a CUDA graph capture the step: lr, momentum and weight decay (of adamw and sgd lr "
        "alone) become tensors on the device. ``copy_options_to_device`` before a replay brings "
        "new values; all other options stay as captured. Default: off.",
        check_flag, matrix=False, adamw=False, sgd=False,
    )  # fmt: skip
    share_work: bool | None = _option(
        "Let one rank solve each matrix that ranks replicate or have shards of. Default: on.",
        check_flag, matrix=True,
    )  # fmt: skip
    seed: int | None = _option(
        "Seed of the random starts of rank-k solvers, which become part of the state. Default: "
        "that of seed_everything, 0 without one.",
        partial(whole_number, least=0, most=2**63 - 1),
        matrix=None,
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check every option that is given, and store it as its check returns it."""
        for name, check in CHECKS.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check(name, value))

    def given(self) -> dict[str, Any]:
        """Return the options that are not None."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}


FIELDS = dataclasses.fields(GroupOptions)
NAMES = tuple(f.name for f in FIELDS)
CHECKS: dict[str, _Check] = {f.name: f.metadata["check"] for f in FIELDS}


def argument_docs(names: Iterable[str] | None = None) -> str:
    """Return options, by default all, as entries of the Args section of a class's docstring."""
    helps = {f.name: f.metadata["help"] for f in FIELDS}
    wrapper = textwrap.TextWrapper(100, initial_indent=" " * 8, subsequent_indent=" " * 12)
    texts = (f"{name}: {helps[name]}" for name in (helps if names is None else names))
    return "\n".join(wrapper.fill(text) for text in texts)


GroupOptions.__doc__ = f"{GroupOptions.__doc__}\n\n    Args:\n{argument_docs()}\n    "


def takes_options(init: Callable[..., None]) -> Callable[..., None]:
    """Show the options as arguments of a constructor with ``**options``.

    ``help``, editors and jsonargparse read the signature.
    """
    types = typing.get_type_hints(GroupOptions)
    own = {
        name: parameter
        for name, parameter in inspect.signature(init).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    more = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=types[name]
        )
        for name in NAMES
        if name not in own
    ]
    init.__signature__ = inspect.Signature([*own.values(), *more])  # type: ignore[attr-defined]
    return init


def default_options(algorithm: str) -> dict[str, Any]:
    """Return every option that groups of an algorithm have, with its default."""
    entry = find_algorithm(algorithm)
    defaults = {f.name: f.metadata["defaults"] for f in FIELDS}
    own = {name: kinds[entry.kind] for name, kinds in defaults.items() if entry.kind in kinds}
    return {**own, **entry.options}
