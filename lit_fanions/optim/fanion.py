"""Fanion: one optimizer for every parameter of a network, one norm ball per parameter group."""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_fanions import lmo
from lit_fanions.optim.functional import (
    Observer,
    Rank,
    Scale,
    is_finite,
    start_bases,
    step_entrywise,
    step_matrices,
)
from lit_fanions.optim.matrices import Layout, Splits, local_grad, matrix_shapes

Algorithm = Literal[
    "muon", "neon", "fanion", "kyfan", "nsgd", "signum", "coordinate",
    "f_muon", "f_neon", "f_fanion", "s_muon", "s_neon", "s_fanion", "dion", "adamw", "sgd",
]  # fmt: skip
Nonfinite = Literal["skip", "error", "propagate"]
MomentumDtype = Literal["float16", "bfloat16", "float32", "float64"]

# What each name means. Explicit options win.
_LOW_RANK = 0.25
_SPHERE: dict[str, Any] = {"rank": "full", "alpha": 1.0, "blend": "frobenius"}
_NAMED: dict[str, dict[str, Any]] = {
    "muon": _SPHERE,
    "neon": {**_SPHERE, "rank": 1},
    "fanion": {**_SPHERE, "rank": _LOW_RANK},
    "kyfan": {**_SPHERE, "rank": _LOW_RANK},
    "nsgd": {**_SPHERE, "alpha": 0.0},
    "signum": {**_SPHERE, "alpha": 0.0, "blend": "sign"},
    "coordinate": _SPHERE,
    "dion": {
        **_SPHERE,
        "rank": _LOW_RANK,
        "error_feedback": True,
        "scale": "spectral_unclamped",
    },
}
_NAMED |= {
    f"{prefix}_{name}": {**_NAMED[name], "alpha": 0.5, "blend": blend}
    for prefix, blend in (("f", "frobenius"), ("s", "sign"))
    for name in ("muon", "neon", "fanion")
}
_MATRIX_DEFAULTS: dict[str, Any] = {
    "momentum": 0.95,
    "weight_decay": 0.0,
    "nesterov": True,
    "sign_scale": 1.0,
    "polar": "auto",
    "polar_steps": None,
    "solver": "auto",
    "solver_steps": None,
    "oversampling": lmo.OVERSAMPLING,
    "stack_entries": None,
    "scale": "original",
    "renormalize": False,
    "error_feedback": False,
    "splits": None,
    "layout": "flatten",
    "nonfinite": "skip",
    "momentum_dtype": None,
    "seed": 0,
}
_ENTRYWISE_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {
        "momentum": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "nonfinite": "skip",
    },
    "sgd": {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "nonfinite": "skip"},
}
# These see a tensor as a bag of numbers, so they take any shape.
_ANY_SHAPE = ("nsgd", "signum", "coordinate", *_ENTRYWISE_DEFAULTS)
# What torch and its schedulers keep in a group beside the options.
_KEPT = ("params", "param_names", "name", "algorithm", "initial_lr", "initial_momentum")


def algorithm_options(algorithm: str) -> dict[str, Any]:
    """Every option that groups of an algorithm have beside lr, with its default.

    Raises:
        ValueError: If there is no such algorithm.
    """
    _check_choice("algorithm", algorithm, Algorithm)
    if is_entrywise(algorithm):
        return {**_ENTRYWISE_DEFAULTS[algorithm]}
    return {**_MATRIX_DEFAULTS, **_NAMED[algorithm]}


def named_options(algorithm: str) -> set[str]:
    """The options that an algorithm's name stands for."""
    return set(_NAMED.get(algorithm, ()))


def is_entrywise(algorithm: str) -> bool:
    """Whether torch's own AdamW or SGD steps this group."""
    return algorithm in _ENTRYWISE_DEFAULTS


class Fanion(torch.optim.Optimizer):
    r"""Steps each matrix along the steepest direction of a chosen norm ball.

    .. math::
        M \leftarrow \mu M + (1 - \mu) G, \quad
        W \leftarrow (1 - \eta \lambda) W - \eta \, s \, D(N)

    with D(N) the maximiser of <N, D> over the ball, N = M or its Nesterov form
    (1 - mu) G + mu M, and s the step-size rule ``scale``. The family has three numbers: the
    ``rank`` of the direction, the weight ``alpha`` of it, and the ``blend`` that has the rest.
    A name sets them:

    ============ ========================= ================================================
    algorithm    unit ball                 direction of M = U S V^T
    ============ ========================= ================================================
    muon         spectral                  U V^T
    neon         nuclear                   u_1 v_1^T
    fanion       dual of Ky Fan k          U_k V_k^T
    kyfan        Ky Fan k                  u_1 v_1^T if s_1 >= \|M\|_* / k, else U V^T / k
    nsgd         Frobenius                 M / \|M\|_F
    signum       largest entry             sign(M)
    coordinate   sum of entries            sign of the largest entry, 0 elsewhere
    f_muon, ...  blend with Frobenius      alpha D + (1 - alpha) M / \|M\|_F
    s_muon, ...  blend with sign           alpha D + (1 - alpha) sign_scale sign(M)
    dion         (arXiv 2504.05295)        one power iteration, error feedback
    adamw, sgd                             torch's own, entrywise
    ============ ========================= ================================================

    Groups carry every option, so that each group can have its own; unknown or impossible ones are
    refused by name, here and in ``add_param_group`` alike.

    Args:
        params: Parameters, (name, parameter) pairs, or group dicts, as for any torch optimizer.
        lr: Learning rate, the radius of the ball.
        momentum: mu above; beta_1 for adamw.
        nesterov: Nesterov momentum. Error feedback has its own momentum and turns it off.
        weight_decay: Decoupled, W <- (1 - lr * weight_decay) W; coupled for sgd, as in torch.
        algorithm: A name of the table.
        rank: A whole number, a fraction of min(rows, cols), or "full"; clamped to the matrix with
            one warning. None: what the algorithm says (a quarter for fanion, kyfan and dion).
        alpha: Weight of the direction in a blend. None: what the algorithm says (1, and .5 for f_
            and s_). Outside [0, 1] there is no norm ball: allowed, with one warning.
        blend: frobenius | sign, what has the weight 1 - alpha. None: what the algorithm says.
        sign_scale: Size of the entries of the sign part.
        polar: Solver for full rank: jordan | quintic | polar_express | cans | convergent | exact
            | auto (``lmo.polar``).
        polar_steps: Its steps; None: the method's own number.
        solver: Solver for rank k: auto | lanczos | subspace | randomized | power | exact | cupy
            (``lmo.top_singular``), warm-started from the previous step.
        solver_steps: Its steps; None: the solver's own number, a single one for subspace.
        oversampling: Columns of the solver's basis beyond the rank. The basis, (in, columns) for
            each matrix, is part of the state.
        scale: Step-size rule for a matrix of out x in: "none"; "original", sqrt(max(1, out / in));
            "spectral_unclamped", sqrt(out / in); "match_rms_adamw", which gives every update an
            RMS of .2 lr: .2 sqrt(max(out, in)) for muon. None: original, and spectral_unclamped
            for dion.
        renormalize: Before each step, scale the weight to Frobenius norm sqrt(out).
        error_feedback: Keep what a rank-k step leaves behind: M <- M + G, then only the captured
            part decays, M <- M - (1 - mu) U_k S_k V_k^T. None: what the algorithm says.
        splits: A fused parameter as several matrices: into how many equal parts, or into which
            sizes, its rows are cut (QKV: 3).
        layout: How a parameter of other than two dimensions is a matrix: "flatten", out x (the
            rest), as convolutions are; "transposed", dimensions 0 and 1 swapped first, as
            transposed convolutions need; "batch", leading dimensions are separate matrices, as in
            stacks of experts.
        nonfinite: For a gradient with a NaN or an infinity: "skip" that parameter's step, on the
            device, and count it in its state "skipped"; "error", FloatingPointError before
            anything has changed (synchronises); "propagate", look away.
        momentum_dtype: Of the momentum; None: the parameter's.
        stack_entries: How many entries matrices of one shape may have in all to be solved
            together, in one batch, which bounds the memory of a step: up to three times theirs
            in float32, four for blends, kyfan and large ranks, five for dion, and ten for
            polar="exact", whose SVD is in float64. bfloat16 parameters need as many bytes as
            float32 ones. A larger matrix is solved alone, a distributed parameter is gathered
            as a whole. None: 2**26, and 5 * 2**20 on CPUs.
        seed: Of the random starts of rank-k solvers, which become part of the state.

    Attributes:
        observers: Are called in each step with what it does to the matrices of each parameter
            (``functional.Observation``); not for groups of adamw and sgd. Such a step needs memory
            for a few copies of one parameter more. They are no part of copies, pickles and
            checkpoints.

    Raises:
        TypeError: If a group or a parameter is of a wrong type.
        ValueError: If an option is unknown or impossible, or a parameter has no matrix form.
    """

    observers: tuple[Observer, ...] = ()

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        algorithm: Algorithm = "muon",
        rank: Rank | None = None,
        alpha: float | None = None,
        blend: lmo.BlendName | None = None,
        sign_scale: float = 1.0,
        polar: lmo.PolarMethod = "auto",
        polar_steps: int | None = None,
        solver: lmo.Solver = "auto",
        solver_steps: int | None = None,
        oversampling: int = lmo.OVERSAMPLING,
        scale: Scale | None = None,
        renormalize: bool = False,
        error_feedback: bool | None = None,
        splits: Splits = None,
        layout: Layout = "flatten",
        nonfinite: Nonfinite = "skip",
        momentum_dtype: MomentumDtype | torch.dtype | None = None,
        stack_entries: int | None = None,
        seed: int = 0,
    ) -> None:
        self._options = {
            "nesterov": nesterov,
            "rank": rank,
            "alpha": alpha,
            "blend": blend,
            "sign_scale": sign_scale,
            "polar": polar,
            "polar_steps": polar_steps,
            "solver": solver,
            "solver_steps": solver_steps,
            "oversampling": oversampling,
            "scale": scale,
            "renormalize": renormalize,
            "error_feedback": error_feedback,
            "splits": splits,
            "layout": layout,
            "nonfinite": nonfinite,
            "momentum_dtype": momentum_dtype,
            "stack_entries": stack_entries,
            "seed": seed,
        }
        # Only what every group has: schedulers and monitors of other projects look in here for
        # "betas" or "momentum", and then expect it in all groups.
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "algorithm": algorithm,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: torch's part and the defaults of later groups."""
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes that back; options younger than a pickle get their algorithm's defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in algorithm_options(group["algorithm"]).items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, completed by what its algorithm says and checked.

        Args:
            param_group: ``params`` and any options. What is missing is the constructor's where
                the group's algorithm steps by the same kind of rule (lr of muon is no lr of
                adamw), then the algorithm's. ``name`` must be unique; without one the algorithm's
                is taken.

        Raises:
            TypeError: If the group or a parameter is of a wrong type.
            ValueError: If an option is unknown or impossible, or a parameter has no matrix form.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group must be a dict, got {type(param_group).__name__}")
        given = {key: value for key, value in param_group.items() if value is not None}
        taken = [group["name"] for group in self.param_groups]
        algorithm = given.setdefault("algorithm", self.defaults["algorithm"])
        name = given.setdefault("name", _free_name(algorithm, taken))
        if not isinstance(name, str) or name in taken:
            raise ValueError(f"group name {name!r} must be a string that no other group has")
        options = self._inherited(algorithm)
        _check_keys(given, (*_KEPT, "lr", *options), f"group {name!r} ({algorithm})")
        group = {**options, **given}
        if "lr" not in group:
            raise ValueError(
                f"group {name!r} ({algorithm}) needs its own lr: that of "
                f"{self.defaults['algorithm']}, {self.defaults['lr']}, means something else there"
            )
        if group.get("error_feedback"):
            group["nesterov"] = False
        if isinstance(group.get("momentum_dtype"), torch.dtype):
            group["momentum_dtype"] = str(group["momentum_dtype"]).removeprefix("torch.")
        _check_options(group)
        super().add_param_group(group)
        try:
            _check_parameters(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _inherited(self, algorithm: str) -> dict[str, Any]:
        """What a group starts from: its algorithm's options, then the constructor's."""
        own, default = algorithm_options(algorithm), self.defaults["algorithm"]
        if algorithm == default and is_entrywise(algorithm):
            chosen = {
                key: value
                for key, value in self._options.items()
                if value is not None and value != _MATRIX_DEFAULTS.get(key)
            }
            _check_keys(chosen, (*_KEPT, "lr", *own), algorithm)
        if algorithm != default and (is_entrywise(algorithm) or is_entrywise(default)):
            return {**own, "nonfinite": self._options["nonfinite"]}
        # An explicit option wins over the name it was given with, not over another group's name.
        fixed = () if algorithm == default else _NAMED[algorithm]
        given = {
            key: value
            for key, value in {**self.defaults, **self._options}.items()
            if value is not None and key in ("lr", *own) and key not in fixed
        }
        return {**own, **given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state_dict of an optimizer with the same groups.

        Options that may change between runs (lr, alpha, ...) are taken from the checkpoint, as in
        torch. Momenta keep the dtype they were saved in.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            ValueError: If groups, their algorithms, their parameters' names or shapes differ.
        """
        _check_same_groups(self.param_groups, state_dict["param_groups"])
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for (name, p), index in zip(_named(group), saved_group["params"], strict=True):
                _check_same_shape(name, p, state_dict["state"].get(index, {}))
        groups = zip(self.param_groups, state_dict["param_groups"], strict=True)
        # Options younger than the checkpoint stay as they are.
        completed = [{**own, **saved} for own, saved in groups]
        super().load_state_dict({**state_dict, "param_groups": completed})
        # torch casts the state to the parameter's dtype, which would round the fp32 momentum of a
        # bf16 parameter, and leaves counters where they were saved. The entrywise kernels want
        # just that dtype, and everything on one device.
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            entrywise = is_entrywise(group["algorithm"])
            for p, index in zip(group["params"], saved_group["params"], strict=True):
                for key, saved in state_dict["state"].get(index, {}).items():
                    cast = entrywise and saved.is_floating_point()
                    value = self.state[p][key] if cast else saved
                    self.state[p][key] = value.to(p.device, copy=not cast)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group.

        Gradients are left as they are. Nothing waits for the device but the first step of rank-k
        groups, ``nonfinite="error"``, ``polar="exact"`` and the solvers exact, lanczos and cupy.

        Args:
            closure: Recomputes the loss and the gradients.

        Returns:
            What the closure returned.

        Raises:
            FloatingPointError: In a group of ``nonfinite="error"``, with the parameters' names.
            RuntimeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        self._initialise_state()
        self._raise_nonfinite()
        for group in self.param_groups:
            if is_entrywise(group["algorithm"]):
                step_entrywise(group, self.state)
            else:
                step_matrices(group, self.state, self.observers)
        return loss

    def _initialise_state(self) -> None:
        # For parameters without a gradient too: a distributed checkpoint needs the same state on
        # every rank.
        for group in self.param_groups:
            generator = torch.Generator().manual_seed(group.get("seed", 0))
            for p in group["params"]:
                if self.state[p]:
                    continue
                if group["algorithm"] == "adamw":
                    state = {
                        "step": torch.zeros((), dtype=torch.float32, device=p.device),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
                else:
                    dtype = group.get("momentum_dtype")
                    state = {"momentum": torch.zeros_like(p, dtype=dtype and getattr(torch, dtype))}
                    if not is_entrywise(group["algorithm"]):
                        state |= start_bases(p, group, generator)
                state["skipped"] = torch.zeros((), dtype=torch.int64, device=p.device)
                self.state[p] = state

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            for name, p in _named(group):
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(
                        f"the gradient of {name} is sparse; Fanion takes dense ones: make the "
                        "embedding with sparse=False"
                    )

    def _raise_nonfinite(self) -> None:
        watched = [
            (name, is_finite(local_grad(p), p))
            for group in self.param_groups
            if group["nonfinite"] == "error"
            for name, p in _named(group)
            if p.grad is not None
        ]
        if watched and not torch.stack([finite for _, finite in watched]).all():
            names = ", ".join(name for name, finite in watched if not finite)
            raise FloatingPointError(
                f"non-finite gradient of {names}; nothing was stepped. Lower lr, clip gradients, "
                'or leave such steps out with nonfinite="skip"'
            )


def _named(group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    unnamed = [f"{group['name']}[{i}]" for i in range(len(group["params"]))]
    yield from zip(group.get("param_names", unnamed), group["params"], strict=True)


def _free_name(algorithm: str, taken: list[str]) -> str:
    names = [algorithm, *(f"{algorithm}_{i}" for i in range(1, len(taken) + 1))]
    return next(name for name in names if name not in taken)


# Checks: every group passes these, from the constructor and from add_param_group alike.

_CHOICES: dict[str, Any] = {
    "algorithm": Algorithm,
    "blend": lmo.BlendName,
    "polar": lmo.PolarMethod,
    "solver": lmo.Solver,
    "scale": Scale,
    "layout": Layout,
    "nonfinite": Nonfinite,
}
_TINY = sys.float_info.min

# From the first number on and below the second.
_RANGES: dict[str, tuple[float, float]] = {
    "lr": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
    "momentum": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "eps": (0.0, math.inf),
    "alpha": (-sys.float_info.max, math.inf),
    "sign_scale": (_TINY, math.inf),
}


def _check_choice(option: str, value: Any, choices: Any) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(
            f"{option} {value!r} is none of {', '.join(allowed)}{_did_you_mean(value, allowed)}"
        )


def _did_you_mean(value: Any, allowed: Any) -> str:
    close = difflib.get_close_matches(str(value), list(allowed), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_keys(given: dict[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in allowed:
            options = sorted({"algorithm", *allowed} - {*_KEPT} | {"algorithm", "name"})
            raise ValueError(
                f"{where} has no option {key!r}{_did_you_mean(key, options)} "
                f"(options: {', '.join(options)})"
            )


def _check_options(group: dict[str, Any]) -> None:
    where = f"group {group['name']!r}: "
    for option, choices in _CHOICES.items():
        if option in group:
            _check_choice(where + option, group[option], choices)
    for option, (low, high) in _RANGES.items():
        if option not in group:
            continue
        value = group[option]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value < high:
            bounds = {
                (0.0, 1.0): "in [0, 1)",
                (0.0, math.inf): "of at least 0",
                (_TINY, math.inf): "above 0",
            }.get((low, high), "that is finite")
            raise ValueError(f"{where}{option} must be a number {bounds}, got {value!r}")
    for option in ("nesterov", "renormalize", "error_feedback"):
        if option in group and not isinstance(group[option], bool):
            raise ValueError(f"{where}{option} must be true or false, got {group[option]!r}")
    if is_entrywise(group["algorithm"]):
        return
    if group["momentum_dtype"] not in (None, *get_args(MomentumDtype)):
        _check_choice(where + "momentum_dtype", group["momentum_dtype"], MomentumDtype)
    if not isinstance(group["seed"], int) or isinstance(group["seed"], bool):
        raise ValueError(f"{where}seed must be a whole number, got {group['seed']!r}")
    _check_rank(group["rank"], where)
    lmo.check_polar(group["polar"], group["polar_steps"])
    lmo.check_solver(group["solver"], group["solver_steps"], group["oversampling"])
    _check_stack(group["stack_entries"], where)
    _check_splits(group["splits"], where)
    full = group["rank"] == "full" or (isinstance(group["rank"], float) and group["rank"] == 1)
    if group["error_feedback"] and (
        group["alpha"] == 0
        or group["algorithm"] in ("coordinate", "kyfan")
        or (full and group["algorithm"] != "dion")
    ):
        raise ValueError(
            f"{where}error feedback keeps what a step of low rank leaves behind, which "
            f"{group['algorithm']} of rank {group['rank']!r} and alpha {group['alpha']} does not "
            "have: choose fanion, neon or dion with a rank below full and alpha above 0"
        )
    if not 0 <= group["alpha"] <= 1:
        warnings.warn(
            f"{where}alpha = {group['alpha']} is outside [0, 1]: the step is the oracle of no norm",
            stacklevel=4,
        )


def _check_rank(rank: Any, where: str) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not (rank == "full" or whole or (isinstance(rank, float) and 0 < rank <= 1)):
        raise ValueError(
            f'{where}rank must be a whole number of at least 1, a fraction in (0, 1] or "full", '
            f"got {rank!r}"
        )


def _check_stack(entries: Any, where: str) -> None:
    if entries is not None and (
        not isinstance(entries, int) or isinstance(entries, bool) or entries < 0
    ):
        raise ValueError(
            f"{where}stack_entries must be a whole number of at least 0 or None, got {entries!r}"
        )


def _check_splits(splits: Any, where: str) -> None:
    sizes = splits if isinstance(splits, (list, tuple)) else [splits]
    if splits is not None and not (
        sizes and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
    ):
        raise ValueError(
            f"{where}splits must be a number of equal parts or a list of sizes, got {splits!r}"
        )


def _check_parameters(group: dict[str, Any]) -> None:
    clamped = False
    for name, p in _named(group):
        if not p.is_floating_point():
            raise TypeError(f"{name} is {p.dtype}; Fanion steps real floating-point parameters")
        if is_entrywise(group["algorithm"]):
            continue
        if p.ndim < 2 and group["algorithm"] not in _ANY_SHAPE:
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}, which is no matrix for {group['algorithm']}; "
                f"give it to a group of {', '.join(_ANY_SHAPE)}"
            )
        if group["layout"] == "batch" and p.ndim < 2:
            raise ValueError(f"{name} has shape {tuple(p.shape)}, which is no batch of matrices")
        for _, rows, cols in matrix_shapes(p.shape, group["layout"], group["splits"]):
            clamped |= isinstance(group["rank"], int) and group["rank"] > min(rows, cols)
    if clamped:
        warnings.warn(
            f"group {group['name']!r}: rank {group['rank']} is more than some of its matrices have "
            "and is clamped to their smaller dimension",
            stacklevel=4,
        )


def _check_same_groups(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    for what, read in (
        ("groups", lambda groups: [g.get("name") for g in groups]),
        ("algorithms", lambda groups: [g.get("algorithm") for g in groups]),
        ("parameters", lambda groups: [n for g in groups for n in g.get("param_names", [])]),
        ("numbers of parameters", lambda groups: [len(g["params"]) for g in groups]),
    ):
        ours, theirs = read(own), read(saved)
        if ours != theirs:
            odd = next(pair for pair in zip_longest(ours, theirs) if pair[0] != pair[1])
            raise ValueError(
                f"the checkpoint was saved with other {what}: {odd[1]!r} there, {odd[0]!r} here; "
                "load it into an optimizer with the same configuration and model"
            )


def _check_same_shape(name: str, p: Tensor, state: dict[str, Any]) -> None:
    for key in ("momentum", "exp_avg"):
        if key in state and state[key].shape != p.shape:
            raise ValueError(
                f"the checkpoint's {key} of {name} has shape {tuple(state[key].shape)}, the "
                f"parameter {tuple(p.shape)}: it is another model's"
            )
