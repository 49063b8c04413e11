"""What torch asks of every optimizer of its test database, asked of every algorithm.

The database (``torch.testing._internal.common_optimizers``) gives the configurations of AdamW, SGD
and Muon and the inputs that every optimizer refuses. The properties are those that torch checks of
each of its optimizers. ``NOT_SUPPORTED`` says what of the database does not apply, and why.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lit_fanions import Fanion
from lit_fanions.optim.algorithms import ANY_SHAPE
from tests.optim.stepping import every_algorithm, normal, parameters, run

pytest.importorskip("expecttest")  # torch's test helpers need it
from torch.testing._internal import common_optimizers

# Their import forbids setting torch.backends' flags, which Lightning's Trainer does.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

DATABASE = {info.optim_cls.__name__: info for info in common_optimizers.optim_db}
# Torch's optimizer -> the algorithm that is it, and torch's names of options.
SAME = {"AdamW": "adamw", "SGD": "sgd", "Muon": "muon"}
RENAMED = {"ns_steps": "polar_steps", "adjust_lr_fn": "scale"}
DEFAULT_LR = {"AdamW": 1e-3, "SGD": 1e-3, "Muon": 1e-3}

# Options and inputs of the database that do not apply, and why.
NOT_SUPPORTED = {
    "maximize": "the loss can be negated",
    "amsgrad": "no ball has a second moment; torch's AdamW is there for it",
    "differentiable": "steps change parameters in place",
    "foreach": "parameters are stepped together where that is faster, as without the option",
    "fused": "adamw and sgd are always fused",
    "dampening": "the momentum of sgd is torch's default",
    "ns_coefficients": "tables of coefficients have names (polar)",
    "complex parameters": "directions are defined for real matrices",
    "sparse gradients": "momenta are dense",
}


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
        close = (0.4 if "ns_steps" in options else 0.05) if name == "Muon" else 1e-5
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


SWITCHES = [*list(NOT_SUPPORTED)[:6]]


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

    first = closure().item()
    for _ in range(40):
        loss = optimizer.step(closure)
        if schedule == "plateau":
            scheduler.step(loss.item())
        elif scheduler:
            scheduler.step()
    assert closure().item() < first
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
