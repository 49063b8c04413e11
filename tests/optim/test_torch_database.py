"""What torch asks of every optimizer of its test database, asked of every algorithm.

The database (``torch.testing._internal.common_optimizers``) gives the configurations of AdamW, SGD
and Muon and the inputs that every optimizer refuses. The properties are those that torch checks of
each of its optimizers. ``NOT_SUPPORTED`` says what of the database does not apply, and why.
"""

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lit_fanions import Fanion
from lit_fanions.optim.algorithms import ALGORITHMS, ANY_SHAPE

pytest.importorskip("expecttest")  # torch's test helpers need it
from torch.testing._internal import common_optimizers

# Their import forbids setting torch.backends' flags, which Lightning's Trainer does.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

EVERY = list(ALGORITHMS)
every_algorithm = pytest.mark.parametrize("algorithm", EVERY)
DATABASE = {info.optim_cls.__name__: info for info in common_optimizers.optim_db}
# Torch's optimizer -> the algorithm that is it, and torch's names of options.
SAME = {"AdamW": "adamw", "SGD": "sgd", "Muon": "muon"}
RENAMED = {"ns_steps": "polar_steps", "adjust_lr_fn": "scale"}
DEFAULT_LR = {"AdamW": 1e-3, "SGD": 1e-3, "Muon": 1e-3}

# Options and inputs of the database that do not apply, and why.
NOT_SUPPORTED = {
    "maximize": "the loss can be negated",
    "amsgrad": "no ball has a second moment; torch's AdamW is there for it",
    "capturable": "steps do not wait for the device where that can be avoided",
    "differentiable": "steps change parameters in place",
    "foreach": "parameters are stepped together where that is faster, as without the option",
    "fused": "adamw and sgd are always fused",
    "dampening": "the momentum of sgd is torch's default",
    "ns_coefficients": "tables of coefficients have names (polar)",
    "complex parameters": "directions are defined for real matrices",
    "sparse gradients": "momenta are dense",
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(algorithm: str, count: int = 2) -> list[nn.Parameter]:
    shapes = [(6, 4), (3, 5), (5,)] if algorithm in ANY_SHAPE else [(6, 4), (3, 5), (4, 2)]
    return [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes[:count])]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=100 * seed + i).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, seeds: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in seeds:
        set_gradients(params, seed)
        optimizer.step()


def trained(algorithm: str, **options: Any) -> tuple[list[nn.Parameter], Fanion]:
    params = parameters(algorithm)
    optimizer = Fanion(params, algorithm=algorithm, **{"lr": 0.05, **options})
    run(optimizer, range(3))
    return params, optimizer


def assert_equal_after(first: Fanion, second: Fanion, steps: range = range(3, 6)) -> None:
    """Step both with the same gradients and compare parameters and state."""
    for optimizer in (first, second):
        run(optimizer, steps)
    a, b = ([p for g in o.param_groups for p in g["params"]] for o in (first, second))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert_equal_state(first.state_dict(), second.state_dict())


def assert_equal_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for index, state in first["state"].items():
        assert state.keys() == second["state"][index].keys()
        assert all(torch.equal(state[key], second["state"][index][key]) for key in state)


# Configurations of the database.


def translated(options: dict[str, Any]) -> dict[str, Any]:
    own = {RENAMED.get(name, name): value for name, value in options.items()}
    if "betas" in own:
        own["momentum"], own["beta2"] = (float(beta) for beta in own.pop("betas"))
    return own


def configurations() -> list[Any]:
    found = []
    for name in SAME:
        for given in DATABASE[name].optim_inputs_func("cpu"):
            if not NOT_SUPPORTED.keys() & given.kwargs.keys():
                found.append(pytest.param(name, given.kwargs, id=f"{name}-{given.desc}"))
    return found


@pytest.mark.parametrize(("name", "options"), configurations())
def test_configuration_of_the_database_steps_like_torch(name, options):
    options = {"lr": DEFAULT_LR[name], **options}
    defaults = {"SGD": {"momentum": 0.0}, "AdamW": {"weight_decay": 0.01}, "Muon": {}}[name]
    ours = translated({**defaults, **options})
    if name == "Muon":
        # Torch iterates in bfloat16 with its own table, and its default weight decay is .1.
        ours = {"weight_decay": 0.1, "polar": "jordan", **ours}
    if ours.get("polar_steps", 5) != 5:
        ours["polar"] = "convergent"  # a table of five steps is not continued as torch does
    mine, theirs = parameters(SAME[name]), parameters(SAME[name])
    fanion = Fanion(mine, algorithm=SAME[name], **copy.deepcopy(ours))
    reference = DATABASE[name].optim_cls(theirs, **copy.deepcopy(options))
    before = [p.detach().clone() for p in mine]
    run(fanion, range(4))
    run(reference, range(4))
    for p, q, start in zip(mine, theirs, before, strict=True):
        close = 0.35 if name == "Muon" else 1e-5
        assert (p - q).norm() <= close * (q - start).norm()


def test_every_option_left_out_of_the_database_is_refused():
    named = set()
    for name, algorithm in SAME.items():
        for given in DATABASE[name].optim_inputs_func("cpu"):
            for option in NOT_SUPPORTED.keys() & given.kwargs.keys():
                named.add(option)
                with pytest.raises((TypeError, ValueError), match=option):
                    Fanion(parameters(algorithm), algorithm=algorithm, lr=0.1, **{option: True})
    assert named == {"maximize", "amsgrad", "dampening", "ns_coefficients"}


SWITCHES = [*list(NOT_SUPPORTED)[:7]]


@pytest.mark.parametrize("option", SWITCHES)
@every_algorithm
def test_option_of_torch_in_a_group_is_refused_with_what_to_do(algorithm, option):
    group = {"params": parameters(algorithm), option: True}
    with pytest.raises(ValueError, match=rf"no option '{option}'"):
        Fanion([group], algorithm=algorithm, lr=0.1)
    with pytest.raises(TypeError, match=f"no argument '{option}': "):
        Fanion(parameters(algorithm), algorithm=algorithm, lr=0.1, **{option: True})


def test_group_of_a_torch_optimizer_with_its_switches_off_is_taken_over():
    theirs = torch.optim.SGD(parameters("sgd"), lr=0.1, momentum=0.9)
    (group,) = Fanion([{**g} for g in theirs.param_groups], algorithm="sgd", lr=0.1).param_groups
    assert group["lr"] == 0.1 and group["maximize"] is False


REFUSED_ALIKE = common_optimizers.get_error_inputs_for_all_optims("cpu", torch.float32)
OWN_WORDS = {"Tensor lr must be 1-element": "a tensor lr must have one element"}


@pytest.mark.parametrize("case", REFUSED_ALIKE, ids=lambda case: case.optimizer_error_input.desc)
@every_algorithm
def test_input_that_every_optimizer_refuses_is_refused_alike(algorithm, case):
    given = case.optimizer_error_input
    params = parameters(algorithm) if given.params is None else given.params
    message = OWN_WORDS.get(case.error_regex, case.error_regex)
    with warnings.catch_warnings(), pytest.raises(case.error_type, match=message):
        warnings.simplefilter("error")
        Fanion(params, algorithm=algorithm, **{"lr": 0.1, **given.kwargs})


@every_algorithm
def test_complex_and_sparse_input_is_refused(algorithm):
    with pytest.raises(TypeError, match="complex64"):
        Fanion([nn.Parameter(torch.ones(3, 3) * 1j)], algorithm=algorithm, lr=0.1)
    with pytest.raises(TypeError, match="sparse"):
        Fanion([nn.Parameter(torch.eye(3).to_sparse())], algorithm=algorithm, lr=0.1)
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Fanion(embedding.parameters(), algorithm=algorithm, lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


# Directions, learning rates and schedules.


SCHEDULES: dict[str, Callable[[Any], Any] | None] = {
    "constant": None,
    "step": lambda o: lr_scheduler.StepLR(o, 10, 0.9),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=60),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.95)], [3]
    ),
}


@pytest.mark.parametrize("has_tensor_lr", [False, True])
@pytest.mark.parametrize("is_contiguous", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("algorithm", ["muon", "fanion", "dion", "s_muon", "adamw", "sgd"])
def test_loss_falls_under_every_schedule(algorithm, schedule, is_contiguous, has_tensor_lr):
    weight = nn.Parameter(normal(10, 5, 2)[..., 0] if not is_contiguous else normal(10, 5))
    inputs, target = normal(5, 8, seed=1), normal(10, 8, seed=2)
    lr = 0.01
    optimizer = Fanion([weight], algorithm=algorithm, lr=torch.tensor(lr) if has_tensor_lr else lr)
    make = SCHEDULES[schedule]
    scheduler = make(optimizer) if make else None

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight @ inputs - target).square().mean()
        loss.backward()
        return loss

    first = float(closure())
    for _ in range(40):
        loss = optimizer.step(closure)
        if schedule == "plateau":
            scheduler.step(float(loss))
        elif scheduler:
            scheduler.step()
    assert float(closure()) < first
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == has_tensor_lr


@every_algorithm
def test_tensor_lr_steps_like_a_number(algorithm):
    mine, theirs = parameters(algorithm), parameters(algorithm)
    shared = torch.tensor([0.05])
    number = Fanion(mine, algorithm=algorithm, lr=0.05)
    tensor = Fanion(theirs, algorithm=algorithm, lr=shared)
    tensor.add_param_group({"params": parameters(algorithm, 1), "lr": shared})
    shared.fill_(100.0)  # the groups have copies
    run(number, range(3))
    run(tensor, range(3))
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    lrs = [group["lr"] for group in tensor.param_groups]
    assert lrs[0] is not lrs[1] and lrs[0].shape == ()


@every_algorithm
def test_each_group_has_its_own_lr_and_weight_decay(algorithm):
    moving, still, decayed = parameters(algorithm, 3)
    groups = [
        {"params": [moving]},
        {"params": [still], "lr": 0.0, "weight_decay": 0.5},
        {"params": [decayed], "weight_decay": 0.5},
    ]
    optimizer = Fanion(groups, algorithm=algorithm, lr=0.1)
    before = [p.detach().clone() for p in (moving, still, decayed)]
    for p in (moving, still, decayed):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(moving, before[0]) and torch.equal(still, before[1])
    torch.testing.assert_close(decayed, before[2] * (1 - 0.1 * 0.5))


@every_algorithm
def test_step_without_gradients_changes_nothing(algorithm):
    params = parameters(algorithm)
    before = copy.deepcopy(params)
    optimizer = Fanion(params, algorithm=algorithm, lr=0.1, weight_decay=0.5)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.step(lambda: None) is None
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@every_algorithm
def test_parameters_without_entries_are_stepped(algorithm, recwarn):
    shapes = [(0, 4), (4, 0), (0, 0), *([(0,)] if algorithm in ANY_SHAPE else [])]
    empty = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    full = parameters(algorithm)
    optimizer = Fanion([*empty[:2], *full, *empty[2:]], algorithm=algorithm, lr=0.05)
    run(optimizer, range(2))
    alone = Fanion(parameters(algorithm), algorithm=algorithm, lr=0.05)
    for seed in range(2):
        for i, p in enumerate(alone.param_groups[0]["params"]):
            p.grad = normal(*p.shape, seed=100 * seed + i + 2)
        alone.step()
    assert not recwarn.list
    for p, q in zip(full, alone.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)


@every_algorithm
def test_group_of_several_dtypes_is_stepped(algorithm):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    params = [nn.Parameter(normal(6, 4).to(dtype)) for dtype in dtypes]
    optimizer = Fanion(params, algorithm=algorithm, lr=0.01)
    for seed in range(3):
        for p in params:
            p.grad = normal(6, 4, seed=seed).to(p.dtype)
        optimizer.step()
    for p in params[1:]:
        torch.testing.assert_close(p.float(), params[0], rtol=0, atol=0.05)


# State dicts, copies and hooks.


@pytest.mark.parametrize("names", [(False, False), (True, True), (True, False), (False, True)])
@every_algorithm
def test_state_dict_is_loaded_by_named_and_unnamed_optimizers(algorithm, names):
    def build(is_named: bool) -> Fanion:
        params = parameters(algorithm)
        pairs = [(f"layer{i}", p) for i, p in enumerate(params)]
        return Fanion(pairs if is_named else params, algorithm=algorithm, lr=0.05)

    saving, loading = (build(is_named) for is_named in names)
    run(saving, range(3))
    saved = saving.state_dict()
    before = copy.deepcopy(saved)
    with torch.no_grad():
        for p, q in zip(*(o.param_groups[0]["params"] for o in (saving, loading)), strict=True):
            q.copy_(p)
    loading.load_state_dict(saved)
    assert_equal_state(saved, before)
    assert ("param_names" in loading.param_groups[0]) == names[1]
    for optimizer in (saving, loading):
        run(optimizer, range(3, 5))
        optimizer.param_groups[0].pop("param_names", None)
    assert_equal_state(saving.state_dict(), loading.state_dict())


@every_algorithm
def test_counts_may_be_saved_as_numbers(algorithm):
    params, optimizer = trained(algorithm)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for key in {"step", "skipped"} & state.keys():
            state[key] = state[key].item()
    other = Fanion(copy.deepcopy(params), algorithm=algorithm, lr=0.05)
    other.load_state_dict(saved)
    assert_equal_after(optimizer, other)
    other.param_groups[0]["params"][0].grad.fill_(math.nan)
    other.step()
    (count,) = {int(s["skipped"]) for s in other.state.values() if s["skipped"]}
    assert count == 1


@every_algorithm
def test_state_is_saved_and_loaded_with_weights_only(algorithm):
    params, optimizer = trained(algorithm)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = Fanion(copy.deepcopy(params), algorithm=algorithm, lr=0.9)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_equal_after(optimizer, other)


@every_algorithm
def test_deepcopy_has_every_public_attribute_and_can_be_printed(algorithm):
    _, optimizer = trained(algorithm)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    copied = copy.deepcopy(optimizer)
    assert {name for name in vars(copied) if not name.startswith("_")} == public
    assert repr(copied) == repr(optimizer)
    assert_equal_after(optimizer, copied)


@every_algorithm
def test_state_of_a_group_added_later_is_loaded(algorithm):
    def build() -> Fanion:
        first, second, late = parameters(algorithm, 3)
        optimizer = Fanion([first, second], algorithm=algorithm, lr=0.05)
        run(optimizer, range(2))
        optimizer.add_param_group({"params": [late], "lr": 0.1})
        return optimizer

    saving, loading = build(), build()
    run(saving, range(2, 4))
    loading.load_state_dict(copy.deepcopy(saving.state_dict()))
    assert_equal_state(saving.state_dict(), loading.state_dict())
    smaller = Fanion(parameters(algorithm), algorithm=algorithm, lr=0.05)
    with pytest.raises(ValueError, match="saved with other groups"):
        smaller.load_state_dict(saving.state_dict())
    with pytest.raises(ValueError, match="saved with other groups"):
        loading.load_state_dict(smaller.state_dict())


@every_algorithm
def test_hooks_run_in_torchs_order(algorithm):
    _, optimizer = trained(algorithm)
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *args: calls.append(name)

    everywhere = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_state_dict_pre_hook(note("save pre")),
        optimizer.register_state_dict_post_hook(note("save post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre 2")),
        optimizer.register_load_state_dict_pre_hook(note("load pre 1"), prepend=True),
        optimizer.register_load_state_dict_post_hook(note("load post 2")),
        optimizer.register_load_state_dict_post_hook(note("load post 1"), prepend=True),
    ]
    run(optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    expected = [
        "global pre", "pre", "post", "global post", "save pre", "save post",
        "load pre 1", "load pre 2", "load post 1", "load post 2",
    ]  # fmt: skip
    assert calls == expected
    for handle in (*everywhere, *handles):
        handle.remove()
    run(optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == expected
