"""Steps with the option ``kernels: triton``, by Triton's interpreter, against the plain ones."""

import importlib.util
import math
import subprocess
import sys

import pytest
import torch

from lit_fanions import Fanion
from lit_fanions.lmo import newton_schulz
from lit_fanions.optim import fused
from tests.conftest import subprocess_environment
from tests.lmo.conftest import DeviceBranches
from tests.matrices import parameter
from tests.optim.test_launches import assert_same, train
from tests.triton_interpreter import rounding_bfloat16  # isort: split

from lit_fanions.optim import triton_passes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = [(8, 12), (4, 3, 2, 2)]


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch):
    monkeypatch.setattr(newton_schulz, "_has_bf16", lambda device_type: device_type == "cuda")
    with rounding_bfloat16():
        yield


@pytest.fixture
def passes(monkeypatch):
    """Return the stacks that kernels have stepped, by their sizes."""
    stepped = []

    def note(pieces, group):
        stepped.append(len(pieces))
        return update(pieces, group)

    update = fused.update_by_kernels
    monkeypatch.setattr("lit_fanions.optim.matrix_step.update_by_kernels", note)
    return stepped


def assert_close(found, wanted, dtype, **options):
    """Assert that weights and momenta are equal but for a rounding of the weight's dtype."""
    # Bases may turn within their span.
    mine, others = (
        [{key: x for key, x in state.items() if "basis" not in key} for state in states]
        for states in (found, wanted)
    )
    once = max(torch.finfo(dtype).eps, 1e-6)
    assert_same(mine, others, **{"rtol": 2 * once, "atol": 2 * once, **options})


STEPS = {
    "nesterov": {"algorithm": "nsgd"},
    "plain momentum": {"algorithm": "nsgd", "nesterov": False},
    "short momentum": {"algorithm": "nsgd", "momentum": 0.3},
    "no weight decay": {"algorithm": "nsgd", "weight_decay": 0.0},
    "cautious decay": {"algorithm": "signum", "cautious_decay": True},
    "error feedback": {"algorithm": "dion", "rank": 2},
    "rank k": {"algorithm": "fanion", "rank": 2},
    "a factor of each matrix": {
        "algorithm": "kyfan", "rank": 2, "scale": "match_rms_adamw", "polar": "exact",
    },
    "a factor for all": {"algorithm": "nsgd", "scale": "match_rms_adamw"},
    "equal splits": {"algorithm": "nsgd", "splits": 2},
    "batch": {"algorithm": "nsgd", "layout": "batch"},
    "slices": {"algorithm": "nsgd", "layout": "batch", "stack_entries": 50},
    "propagate": {"algorithm": "nsgd", "nonfinite": "propagate"},
    "lr on the device": {"algorithm": "nsgd", "lr": torch.tensor(0.1)},
    "lr of zero": {"algorithm": "dion", "rank": 2, "lr": 0.0},
    "other momentum": {"algorithm": "nsgd", "momentum_dtype": "float32"},
}  # fmt: skip


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_step_as_the_plain_path_does(dtype, options, passes):
    broken = None if "nonfinite" in options else 1
    for shape in RAGGED:
        given = {"dtype": dtype, "broken": broken, **options}
        found = train([shape] * 3, kernels="triton", **given)
        assert passes
        assert_close(found, train([shape] * 3, **given), dtype)
        assert found[1]["skipped"] == (broken is not None)


@pytest.mark.parametrize("algorithm", ["muon", "f_muon", "s_muon"])
def test_full_rank_steps_agree_within_the_rounding_of_bfloat16(algorithm, passes):
    found, wanted = (
        train([(70, 101)] * 2, algorithm=algorithm, kernels=kernels)
        for kernels in ("triton", "plain")
    )
    assert passes == [2] * 3
    for mine, others in zip(found, wanted, strict=True):
        apart = (mine["weight"] - others["weight"]).norm() / others["weight"].norm()
        assert apart < 0.002


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [None, 2])
def test_renormalised_weights_are_rounded_once_less(splits, dtype):
    options = {"algorithm": "nsgd", "renormalize": True, "splits": splits, "dtype": dtype}
    found = train([(8, 12)] * 3, kernels="triton", **options)
    eps = max(2 * torch.finfo(dtype).eps, 1e-6)
    assert_close(found, train([(8, 12)] * 3, **options), dtype, rtol=eps, atol=2 * eps)


@pytest.mark.parametrize("options", [
    {"algorithm": "nsgd"}, {"algorithm": "nsgd", "renormalize": True},
    {"algorithm": "nsgd", "cautious_decay": True}, {"algorithm": "dion", "rank": 2},
])  # fmt: skip
def test_numbers_of_the_device_step_as_numbers_of_the_host(options, passes):
    found, wanted = (
        train([(8, 12)] * 3, kernels="triton", capturable=capturable, **options)
        for capturable in (True, False)
    )
    assert passes == [3] * 6
    assert_close(found, wanted, torch.float32)


def test_an_lr_of_zero_on_the_device_does_not_renormalise():
    options = {"algorithm": "nsgd", "renormalize": True, "capturable": True, "lr": 0.0}
    found, wanted = (
        train([(8, 12)] * 3, kernels=kernels, **options) for kernels in ("triton", "plain")
    )
    assert_same(found, wanted, rtol=0, atol=1e-6)


def test_large_matrices_are_shared_by_several_programs(monkeypatch):
    monkeypatch.setattr(triton_passes, "_MOST_PROGRAMS", 3)
    options = {"algorithm": "nsgd", "broken": None, "steps": 2}
    found = train([(90, 211)] * 2, kernels="triton", **options)
    assert_close(found, train([(90, 211)] * 2, **options), torch.float32)


OUTSIDE = {
    "transposed": ({"layout": "transposed"}, [(8, 12)] * 2),
    "unequal splits": ({"splits": [6, 2]}, [(8, 12)] * 2),
    "columns": ({"splits": {"count": 2, "dim": 1}}, [(8, 12)] * 2),
    "float64 momentum": ({"momentum_dtype": "float64"}, [(8, 12)] * 2),
}


@pytest.mark.parametrize(("options", "shapes"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_kernels_do_not_take_is_stepped_by_plain(options, shapes, passes):
    found = train(shapes, kernels="triton", **options)
    assert not passes
    assert_same(found, train(shapes, **options))


def test_parameters_on_a_cpu_are_stepped_by_plain(passes):
    plain, kernels = parameter(8, 12), parameter(8, 12)
    for p, name in ((plain, "plain"), (kernels, "triton")):
        p.grad = torch.ones_like(p)
        Fanion([p], kernels=name).step()
    assert torch.equal(plain, kernels)
    assert not passes


@pytest.mark.parametrize("options", [{"algorithm": "nsgd"}, {"algorithm": "fanion", "rank": 2}])
def test_kernels_step_weights_in_channels_last_unless_they_have_bases(options, passes):
    options = {"dtype": torch.float32, "channels_last": True, **options}
    found = train([(4, 3, 2, 2)] * 3, kernels="triton", **options)
    assert bool(passes) == ("rank" not in options)
    assert_close(found, train([(4, 3, 2, 2)] * 3, **options), torch.float32)


def test_observers_see_scaled_directions_and_change_nothing():
    def stepped(observed):
        generator = torch.Generator().manual_seed(3)
        p, seen = parameter(40, 8), []
        optimizer = Fanion([p], algorithm="nsgd", kernels="triton", lr=0.5)
        optimizer.observers = (seen.append,) if observed else ()
        p.grad = torch.randn(40, 8, generator=generator)
        before = p.detach().clone()
        with DeviceBranches():
            optimizer.step()
        return p.detach(), before, seen

    (found, before, (shown,)), (wanted, *_) = stepped(True), stepped(False)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert shown.factor == math.sqrt(5)
    torch.testing.assert_close(before - 0.5 * shown.direction[0], found, rtol=0, atol=1e-6)


def test_matrices_of_any_scale_are_normalised():
    """Their squares leave the range of float32; a broken matrix becomes NaN, a zero one stays."""
    draws = torch.randn(5, 2, 5000)
    rows = draws * torch.tensor([1e-30, 1.0, 1e30, 0.0, 1.0]).view(-1, 1, 1)
    rows[4, 0, 7] = torch.inf
    gradients = list(rows.clone().unbind())
    n, partials = triton_passes.momentum_pass(
        [torch.zeros_like(x) for x in gradients], gradients, torch.ones(5, dtype=torch.bool),
        1.0, None, skip=True, feedback=False, nesterov=False, matrices=1, dtype=torch.float32,
    )  # fmt: skip
    triton_passes.divide_by_norms(n, partials)
    torch.testing.assert_close(n[:3].norm(dim=1), torch.ones(3))
    direction = draws[:3].flatten(1) / draws[:3].flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(n[:3], direction)
    assert (n[3] == 0).all()
    assert n[4].isnan().all()


def test_tables_of_addresses_are_uploaded_once_and_written_by_kernels_in_a_capture(monkeypatch):
    monkeypatch.setattr(triton_passes, "_tables", {})
    monkeypatch.setattr(triton_passes, "_captured", [])
    old, new = [torch.zeros(4), torch.zeros(4)], [torch.zeros(4)]
    table, aligned = triton_passes._addresses(old)
    assert table.tolist() == [x.data_ptr() for x in old]
    assert aligned
    assert triton_passes._addresses(old)[0] is table
    assert not triton_passes._addresses([old[0][1:]])[1]
    monkeypatch.setattr(triton_passes, "is_capturing", lambda: True)
    assert triton_passes._addresses(old)[0] is table
    assert triton_passes._captured == [table], "the graph reads it for as long as it lives"
    assert triton_passes._addresses(new)[0].tolist() == [new[0].data_ptr()]
    assert len(triton_passes._tables) == 2, "what a capture writes is no table before its replay"


def test_tables_of_addresses_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(triton_passes, "_tables", {})
    monkeypatch.setattr(triton_passes, "_MOST_TABLES", 3)
    tensors = [torch.zeros(2) for _ in range(5)]
    for x in tensors:
        triton_passes._addresses([x])
    assert len(triton_passes._tables) == 3


def test_triton_is_refused_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="kernels='triton' needs Triton: pip install triton"):
        Fanion([parameter(3, 3)], kernels="triton")


def test_a_checkpoint_leaves_the_kernels_to_the_machine(monkeypatch):
    saved, here = Fanion([parameter(3, 3)], kernels="triton"), Fanion([parameter(3, 3)])
    state = saved.state_dict()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    here.load_state_dict(state)
    assert here.param_groups[0]["kernels"] == "plain"


def test_all_kernels_compile_for_an_h100():
    """Loads and stores of passes are 16 bytes wide, and products are those of tensor cores."""
    command = [sys.executable, "-m", "tests.optim.triton_compile"]
    environment = {**subprocess_environment(), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 12
