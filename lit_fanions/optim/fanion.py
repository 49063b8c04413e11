"""Fanion: one optimizer for every parameter of a network, one norm ball per parameter group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_fanions.checks import check_choice
from lit_fanions.optim.algorithms import DEFAULT_ALGORITHM, algorithm_docs, is_entrywise, is_foreign
from lit_fanions.optim.bases import default_seed, warm_up
from lit_fanions.optim.buckets import Partition, current_partition, with_buckets
from lit_fanions.optim.capturing import DeviceNumbers, check_capture, is_capturing
from lit_fanions.optim.checkpoints import first_state, fit_state, restore_dtypes
from lit_fanions.optim.conversion import OnMismatch, prepare
from lit_fanions.optim.effects import check_effects, given_options
from lit_fanions.optim.entrywise import step_entrywise
from lit_fanions.optim.finiteness import finite_flags
from lit_fanions.optim.groups import (
    are_parameters,
    as_list,
    carry_over,
    check_combination,
    check_gradients,
    check_group,
    check_keys,
    check_names,
    check_parameters,
    check_torch_options,
    free_name,
    keys_of_others,
    refuse_argument,
    resolve_heads,
)
from lit_fanions.optim.late_groups import Planner, is_bare, split_bare_group
from lit_fanions.optim.matrix_step import step_matrices, without_autocast
from lit_fanions.optim.observing import Observer
from lit_fanions.optim.options import GroupOptions, argument_docs, default_options, takes_options
from lit_fanions.optim.saved_states import check_form
from lit_fanions.optim.shared_step import step_shared
from lit_fanions.optim.sharing import Share, check_agreement, plan_shares, team_of_group
from lit_fanions.optim.together import own_state


class Fanion(torch.optim.Optimizer):
    """Steps each matrix along the steepest direction of a chosen norm ball.

    A step with the gradient G, the momentum M and the weight W::

        M <- momentum * M + (1 - momentum) * G
        W <- (1 - lr * weight_decay) * W - lr * scale * D(N)

    with D(N) the maximiser of ``<N, D>`` over the ball, and N = M or its Nesterov form
    (1 - momentum) * G + momentum * M. The family has three numbers: the ``rank`` of the direction,
    its weight ``alpha``, and the ``blend`` that has 1 - alpha. A name sets them (algorithm, unit
    ball, direction of M = U S V^T)::

    {table}

    Groups carry every option, so that each group can have its own. Options that are impossible or
    look like a misspelt one are refused, here and in ``add_param_group`` alike.

    Args:
        params: Parameters, (name, parameter) pairs, or group dicts, as for any torch optimizer.
        process_group: Ranks that replicate the parameters and have the same gradients, which then
            share the work: each solves a part of the matrices and gets the other directions from
            its owners. For plain loops (``torch.distributed.group.WORLD``); under Lightning's DDP
            the factory sets it. DTensors need none.
        on_mismatch: What ``load_state_dict`` does with a state of another configuration: refuse
            other groups and algorithms, and take other options from it (error); or keep each
            parameter's momentum, found by name, and all options as they are here (keep_momentum).
    {arguments}

    Attributes:
        process_group: As given; no part of copies and pickles, which share nothing.
        on_mismatch: As given.
        keeps_options: Whether the state loaded last has left all options as they were.
        observers: Called in each step with an ``Observation`` of the matrices of each parameter;
            not for groups of adamw and sgd. A step with observers needs memory for a few more
            copies of one parameter. Observers are no part of copies, pickles and checkpoints.

    Raises:
        TypeError: If a group or a parameter is of a wrong type, or an argument is unknown.
        ValueError: If an option is impossible, or a parameter has no matrix form.
    """

    observers: tuple[Observer, ...] = ()
    process_group: dist.ProcessGroup | None = None
    on_mismatch: OnMismatch = "error"
    planner: Planner | None = None  # set by the factory; no part of copies, pickles and checkpoints
    _restored: Mapping[str, Any] | None = None  # the dict that load_state_dict is loading
    _is_built = False  # whether the constructor has added its groups
    # The constructor's groups so far, with the options given for them.
    _unchecked: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = ()
    _given: Mapping[str, Any] = {}  # options of the constructor
    _numbers: DeviceNumbers  # those of capturable groups
    _partitions: dict[str, Partition]  # buckets of entrywise groups by the groups' names
    _stepped: set[Tensor]  # parameters stepped as part of a capturable group

    @takes_options
    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        momentum: float | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        on_mismatch: OnMismatch = "error",
        **options: Any,
    ) -> None:
        kind = dist.ProcessGroup if dist.is_available() else ()
        if not (process_group is None or isinstance(process_group, kind)):
            raise TypeError(
                f"process_group must be a torch.distributed.ProcessGroup, got {process_group!r}"
            )
        self.process_group = process_group
        check_choice("on_mismatch", on_mismatch, get_args(OnMismatch))
        self.on_mismatch = on_mismatch
        self.keeps_options = on_mismatch == "keep_momentum"
        algorithm = options.pop("algorithm", None)
        algorithm = DEFAULT_ALGORITHM if algorithm is None else algorithm
        unknown = set(options) - set(GroupOptions.__dataclass_fields__)
        if unknown:
            refuse_argument(min(unknown), algorithm)
        options |= {"lr": lr, "momentum": momentum}
        given = {name: value for name, value in options.items() if value is not None}
        check_names(given, algorithm, f"Fanion ({algorithm})", ())
        self._given = given
        # Only what every group has: schedulers and monitors of other projects look in here for
        # "betas" or "momentum", and then expect it in all groups.
        defaults = {**default_options(algorithm), **given}
        shared = ("lr", "momentum", "weight_decay")
        super().__init__(
            params, {**{name: defaults[name] for name in shared}, "algorithm": algorithm}
        )
        check_effects(self._unchecked, self.param_groups)
        del self._unchecked
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: torch's part and the options for later groups."""
        kept = super().__getstate__()
        state = defaultdict(dict, {p: own_state(state) for p, state in self.state.items()})
        return {**kept, "state": state, "_given": self._given, "on_mismatch": self.on_mismatch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled state; options younger than it get their algorithm's defaults."""
        super().__setstate__(state)
        self.__dict__.setdefault("process_group", None)
        self.__dict__.setdefault("keeps_options", self.on_mismatch == "keep_momentum")
        self._prepare()
        for group in self.param_groups:
            for name, value in default_options(group["algorithm"]).items():
                group.setdefault(name, value)
            if group.get("seed", 0) is None:
                group["seed"] = default_seed()
        if self._restored is not None:
            restore_dtypes(self, self._restored)

    def _prepare(self) -> None:
        """Get ready for steps from a state, by what is no part of copies and checkpoints."""
        self._is_built = True
        self._partitions, self._stepped = {}, set()
        self.__dict__.setdefault("_numbers", DeviceNumbers())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, completed by what its algorithm says and checked.

        A group that is added during training with nothing but parameters and lr, as callbacks of
        fine-tuning do, becomes several where its parameters are stepped by different algorithms
        (``late_groups.split_bare_group``).

        Args:
            param_group: ``params`` and any options. Missing options are the constructor's where
                the group's algorithm steps by the same kind of rule as the constructor's (adamw
                does not take lr and momentum of muon, but weight decay), else the algorithm's.
                ``name`` must be unique; without a name the group gets that of its algorithm. Keys
                that are no options stay: wrappers and schedulers have such keys.

        Raises:
            TypeError: If the group or a parameter is of a wrong type.
            ValueError: If an option is impossible, or a parameter has no matrix form.
        """
        check_keys(param_group)
        given = {key: value for key, value in param_group.items() if value is not None}
        parts = [given]
        if self._is_built and self.param_groups and is_bare(given):
            given["params"] = as_list(given["params"])
            if are_parameters(given["params"]):
                others, defaults = self.param_groups, self.defaults
                parts = split_bare_group(given, others, defaults, self.planner)
        before, added = len(self.param_groups), []
        try:
            for part in parts:
                if part is not given and "name" in part:
                    taken = [group["name"] for group in self.param_groups]
                    part["name"] = free_name(part["name"], taken)
                added.append(self._add_group(part))
            if self._is_built:
                check_effects(added, self.param_groups)
            else:  # later groups may have use for options of the constructor
                self._unchecked = (*self._unchecked, *added)
        except (TypeError, ValueError):
            del self.param_groups[before:]
            raise

    def _add_group(self, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Add a group and return it, with the options that were given for it."""
        taken = [group["name"] for group in self.param_groups]
        algorithm = given.setdefault("algorithm", self.defaults["algorithm"])
        own = default_options(algorithm)
        name = given.setdefault("name", free_name(algorithm, taken))
        if not isinstance(name, str) or name in taken:
            raise ValueError(f"group name {name!r} must be a string that no other group has")
        where = f"group {name!r} ({algorithm})"
        check_torch_options(given, where)
        check_names(given, algorithm, where, keys_of_others(given))
        default = self.defaults["algorithm"]
        carried = carry_over(self._given, default, algorithm)
        group = {**own, **carried, **given}
        if group["lr"] is None or ("lr" not in given and is_foreign(default, algorithm)):
            reason = f"the default {self.defaults['lr']} is meant for {default}"
            reason = f"{algorithm} has no default" if default == algorithm else reason
            raise ValueError(f"{where}: set lr; {reason}")
        group = check_group(group, where)
        named = given_options(group, carried, given)
        if group.get("error_feedback"):
            group["nesterov"] = False
        if "seed" in own and group["seed"] is None:
            group["seed"] = default_seed()
        group = resolve_heads(group, where)
        check_combination(group, where)
        super().add_param_group(self._with_names(group))
        check_parameters(self.param_groups[-1])
        return self.param_groups[-1], named

    def _with_names(self, group: dict[str, Any]) -> dict[str, Any]:
        """Name the parameters of a later group where all others have names, as torch asks for.

        Callbacks that unfreeze layers add parameters without names.
        """
        named = bool(self.param_groups) and "param_names" in self.param_groups[0]
        params = as_list(group["params"])
        if named and are_parameters(params) and all(isinstance(p, Tensor) for p in params):
            params = [(f"{group['name']}.{i}", p) for i, p in enumerate(params)]
        return {**group, "params": params}

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the groups, as of any torch optimizer.

        Momenta that accelerators keep in one tensor for all parameters of a shape are copied out
        of it, so that each is saved with its own size.
        """
        state_dict = super().state_dict()
        states = {index: own_state(state) for index, state in state_dict["state"].items()}
        return {**state_dict, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state_dict of an optimizer with the same groups.

        Options that may change between runs (lr, alpha, ...) are taken from the checkpoint, as in
        torch. Momenta keep the dtype they were saved in. Parameters' names are compared where both
        sides have some. Hooks run first: what they leave is checked and loaded.

        With ``on_mismatch="keep_momentum"``, a state_dict of other groups, algorithms or options,
        or of torch's AdamW, Adam, SGD or Muon, is converted (``conversion.keep_momentum``).

        Args:
            state_dict: A result of ``state_dict()``.

        Raises:
            ValueError: If groups, their algorithms, their parameters' names or shapes differ.
        """

        def check(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            loadable, self.keeps_options = prepare(self.param_groups, given, self.on_mismatch)
            self._restored = loadable
            return loadable

        if not isinstance(state_dict, dict):
            check_form(state_dict)  # hooks and torch copy it before the check
        handle = self.register_load_state_dict_pre_hook(check)  # the last of them
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._restored = None

    # torch.compile(optimizer.step) does not trace it: a trace of every parameter's state would cost
    # more than it gains. The functions of ``update`` on a stack can be compiled.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every group.

        Gradients are left as they are. Nothing waits for the device but the first step of rank-k
        groups, ``nonfinite="error"``, ``polar="exact"``, the solvers exact, lanczos and cupy, and
        the Schatten ball (eigendecompositions) unless p is 1, 2, infinity or 1 + 2^n.

        Args:
            closure: Recomputes the loss and the gradients.

        Returns:
            The closure's result.

        Raises:
            FloatingPointError: In a group of ``nonfinite="error"``, with the parameters' names.
            RuntimeError: If a gradient is sparse, or missing on some ranks that share the work, or
                these have different seeds for random starts.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups)
        if is_capturing():
            check_capture(self.param_groups, self._stepped)
        else:
            self.copy_options_to_device()
        with without_autocast(self.param_groups):
            shares = self._agreed_shares()
            self._initialise_state()
            flags = finite_flags(self.param_groups, self.state, self._partitions)
            for group in map(self._numbers.replace, self.param_groups):
                if is_entrywise(group["algorithm"]):
                    step_entrywise(group, self.state, flags, self._partitions[group["name"]])
                else:
                    step_matrices(group, self.state, flags.finite, self.observers, shares)
                    step_shared(group, self.state, flags.finite, self.observers, shares)
        return loss

    def _agreed_shares(self) -> dict[Tensor, Share]:
        """Return who solves what, once all ranks have the same gradients and seeds."""
        if not (dist.is_available() and dist.is_initialized()):
            return {}
        replicas = None if self.process_group is None else team_of_group(self.process_group)
        check_agreement(self.param_groups, replicas)
        return plan_shares(self.param_groups, replicas, bool(self.observers))

    def copy_options_to_device(self) -> None:
        """Copy lr, momentum and weight decay of capturable groups to the device, without a wait.

        A step does so itself unless a CUDA graph captures it: call this before each replay.
        """
        self._numbers.upload(self.param_groups)

    def _initialise_state(self) -> None:
        # For parameters without a gradient too: a distributed checkpoint needs the same state on
        # every rank.
        for group in self.param_groups:
            generator = torch.Generator().manual_seed(group.get("seed", 0))
            entrywise = is_entrywise(group["algorithm"])
            before = self._partitions.get(group["name"])
            partition = current_partition(group, self.state, before)
            for p in partition.others:
                state = self.state[p]
                if not state:
                    self.state[p] = first_state(p, group, generator)
                elif p.grad is not None:
                    fit_state(p, state, group)
                    if not entrywise:
                        warm_up(p, state, group)
            if entrywise:
                self._partitions[group["name"]] = with_buckets(group, self.state, partition)
            if group["capturable"]:
                self._stepped.update(p for p in group["params"] if p.grad is not None)


_DOC = (Fanion.__doc__ or "").replace("    {table}", algorithm_docs())
Fanion.__doc__ = _DOC.replace("    {arguments}", argument_docs())
