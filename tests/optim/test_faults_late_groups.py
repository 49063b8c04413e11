"""Groups that are added during training with nothing but parameters and an lr."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from lit_fanions import Fanion, configure_optimizers
from lit_fanions.optim.algorithms import ALGORITHMS


class Backbone(nn.Module):
    """A frozen embedding, two layers and a norm, under a head that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 5, bias=False))
        self.attention = nn.MultiheadAttention(5, 1)
        self.head = nn.Linear(5, 3)
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def unfrozen(self) -> list[nn.Parameter]:
        parts = (self.embed, self.body, self.attention)
        return [p for part in parts for p in part.requires_grad_(True).parameters()]


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape or (4, 3)))


def run(optimizer: Fanion, steps: int = 2) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        optimizer.step()


def groups_by_name(optimizer: Fanion) -> dict[str, dict]:
    return {group["name"]: group for group in optimizer.param_groups}


def test_factory_splits_a_late_group_by_what_its_parameters_are():
    module = Backbone()
    optimizer = configure_optimizers(module, total_steps=4)["optimizer"]
    optimizer.add_param_group({"params": module.unfrozen(), "lr": 1e-4})
    groups = groups_by_name(optimizer)
    assert groups["embedding.late"]["param_names"] == ["embed.weight"]
    assert groups["matrix.late"]["param_names"][:2] == ["body.0.weight", "body.2.weight"]
    assert groups["matrix.late.splits3"]["splits"] == 3
    assert groups["matrix.late"]["config_group"] == "matrix"
    assert all(p.ndim < 2 for p in groups["vector.late"]["params"])
    algorithms = {name: group["algorithm"] for name, group in groups.items() if "late" in name}
    assert algorithms == {
        "embedding.late": "adamw", "matrix.late": "muon", "matrix.late.splits3": "muon",
        "vector.late": "adamw",
    }  # fmt: skip
    run(optimizer)


def test_parts_of_another_kind_are_slowed_down_as_the_first_group_is():
    module = Backbone()
    made = configure_optimizers(module, total_steps=10, schedule={"shape": "linear"})
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for _ in range(5):
        optimizer.step()
        schedule.step()
    first = optimizer.param_groups[0]
    assert first["lr"] == pytest.approx(0.5e-3)
    optimizer.add_param_group({"params": module.unfrozen(), "lr": first["lr"] / 10})
    groups = groups_by_name(optimizer)
    assert groups["matrix.late"]["lr"] == pytest.approx(0.02 / 20)
    # The callback that has added the group changes the lr of the last one, which it knows.
    assert optimizer.param_groups[-1]["algorithm"] == "adamw"
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.5e-4)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert groups["matrix.late"]["lr"] == pytest.approx(0.002 / 10)
    assert groups["vector.late"]["lr"] == pytest.approx(1e-4 / 10)


def test_vectors_leave_a_late_group_of_matrices_for_the_options_of_the_vectors_there_are():
    first, vectors = matrix(), matrix(3)
    optimizer = Fanion(
        [
            {"params": [first], "name": "weights"},
            {"params": [vectors], "name": "biases", "algorithm": "sgd", "lr": 0.3, "momentum": 0.5},
        ],
        lr=0.1,
    )
    late = [matrix(), matrix(4), matrix(())]
    optimizer.add_param_group({"params": late, "lr": 0.05})
    groups = groups_by_name(optimizer)
    assert groups["biases.late"]["params"] == late[1:]
    assert groups["biases.late"]["algorithm"] == "sgd"
    assert groups["biases.late"]["momentum"] == 0.5
    assert groups["biases.late"]["lr"] == pytest.approx(0.3 / 2)
    assert optimizer.param_groups[-1]["params"] == late[:1]
    assert optimizer.param_groups[-1]["lr"] == 0.05
    run(optimizer)


@pytest.mark.parametrize("is_named", [True, False])
def test_vectors_get_adamw_with_a_warning_where_there_are_none(is_named):
    first = matrix()
    optimizer = Fanion([("w", first)] if is_named else [first], lr=0.1)
    with pytest.warns(UserWarning, match='"algorithm": "adamw"'):
        optimizer.add_param_group({"params": [matrix(), matrix(4)], "lr": 0.01})
    vectors, matrices = optimizer.param_groups[1:]
    assert (vectors["algorithm"], vectors["lr"]) == ("adamw", pytest.approx(1e-4))
    assert (matrices["algorithm"], matrices["lr"]) == ("muon", 0.01)
    assert ("param_names" in vectors) == is_named
    run(optimizer)


def test_matrices_get_the_constructors_lr_where_there_are_none():
    vectors = {"params": [matrix(3)], "algorithm": "adamw", "lr": 1e-3}
    optimizer = Fanion([vectors], lr=0.5)
    optimizer.add_param_group({"params": [matrix(), matrix(4)], "lr": 1e-4})
    lrs = {group["algorithm"]: group["lr"] for group in optimizer.param_groups[1:]}
    assert lrs == {"muon": pytest.approx(0.05), "adamw": 1e-4}


def test_group_that_names_its_algorithm_is_not_split():
    optimizer = Fanion([matrix()])
    with pytest.raises(ValueError, match="no matrix for muon; give it to a group of"):
        optimizer.add_param_group({"params": [matrix(), matrix(4)], "algorithm": "muon"})
    assert len(optimizer.param_groups) == 1


def test_late_group_that_is_refused_leaves_no_part_behind():
    module = Backbone()
    optimizer = configure_optimizers(module, total_steps=4)["optimizer"]
    before = len(optimizer.param_groups)
    for wrong in ([*module.unfrozen(), module.head.weight], [module.head.weight]):
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": wrong, "lr": 1e-4})
        assert len(optimizer.param_groups) == before


def test_parameters_that_the_factorys_module_does_not_have_are_split_by_shape():
    optimizer = configure_optimizers(Backbone(), total_steps=4)["optimizer"]
    optimizer.add_param_group({"params": (p for p in [matrix(), matrix(4)]), "lr": 1e-4})
    late = optimizer.param_groups[2:]
    assert [group["algorithm"] for group in late] == ["muon", "adamw"]
    assert late[1]["name"] == "vector.late" and late[1]["config_group"] == "vector"


@pytest.mark.parametrize("is_copied", [False, True])
def test_state_of_split_groups_is_loaded(is_copied):
    def build() -> Fanion:
        torch.manual_seed(0)
        module = Backbone()
        optimizer = configure_optimizers(module, total_steps=4)["optimizer"]
        optimizer.add_param_group({"params": module.unfrozen(), "lr": 1e-4})
        return optimizer

    saving = build()
    run(saving)
    loading = copy.deepcopy(saving) if is_copied else build()
    loading.load_state_dict(copy.deepcopy(saving.state_dict()))
    names = [group["name"] for group in saving.param_groups]
    assert [group["name"] for group in loading.param_groups] == names
    run(loading)


OTHERS = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "averaging": lambda o: SWALR(o, 0.01),
}


@pytest.mark.parametrize("scheduler", OTHERS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_groups_are_taken_over_with_the_keys_of_schedulers(algorithm, scheduler):
    optimizer = Fanion([matrix()], algorithm=algorithm, lr=0.1)
    OTHERS[scheduler](optimizer)
    groups = [{**group, "rho": 0.05} for group in optimizer.param_groups]
    taken = Fanion(groups, algorithm=algorithm, lr=0.1)
    assert taken.param_groups == groups


@pytest.mark.parametrize(
    ("key", "option"),
    [("lr_mult", "lr"), ("lr_scale", "lr"), ("lr_factor", "lr"), ("wd_mult", "weight_decay")],
)
def test_factors_that_would_be_ignored_are_refused(key, option):
    message = f"has no option '{key}': multiply {option} yourself"
    with pytest.raises(ValueError, match=message):
        Fanion([{"params": [matrix()], key: 0.1}])
    optimizer = Fanion([matrix()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [matrix()], "algorithm": "sgd", "lr": 1.0, key: 0.1})


@pytest.mark.parametrize("key", ["momentums", "max_momentm", "lr_", "momentum_dtyp", "polar_step"])
def test_misspelt_option_is_still_refused(key):
    with pytest.raises(ValueError, match="did you mean"):
        Fanion([{"params": [matrix()], key: 1}])
