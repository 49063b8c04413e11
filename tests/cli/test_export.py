"""An exported optimizer is one file, needs torch alone, and steps as Fanion does."""

import ast
import copy
import importlib.util
import subprocess
import sys

import pytest
import torch

from lit_fanions import Fanion
from lit_fanions.__main__ import start as main
from lit_fanions.cli.export import Bundle, exportable, single_file
from tests.conftest import subprocess_environment

SHAPES = [(24, 16), (24, 16), (16, 80), (8, 4, 3, 3), (1, 7), (96, 70)]


def load(path, text):
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # NamedTuple looks its module up
    spec.loader.exec_module(module)
    (cls,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    )
    return cls


def train(make, dtype=torch.float32, steps=6, size=1.0, late=()):
    """Return the weights after some steps, one of which has a NaN in one gradient.

    Args:
        make: Makes an optimizer.
        dtype: Of the weights.
        steps: Number of steps.
        size: Factor of the gradients.
        late: Numbers of the weights that have no gradient, or a zero, in the first steps.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]
    optimizer = make(weights)
    for step in range(steps):
        for w in weights:
            noise = torch.randn(w.shape, generator=generator)
            w.grad = ((w.detach() + noise) * size).to(dtype)
        for i in late:
            weights[i].grad = (None, torch.zeros_like(weights[i]), weights[i].grad)[min(step, 2)]
        if step == 3:
            weights[0].grad[0, 0] = torch.nan
        optimizer.step()
    return weights


@pytest.mark.parametrize("algorithm", exportable())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_steps_are_those_of_fanion(algorithm, dtype, weight_decay, tmp_path):
    cls = load(tmp_path / f"exported_{algorithm}.py", single_file(algorithm))
    options = {"weight_decay": weight_decay}
    # Averages of such gradients are zero in float16.
    case = {"dtype": dtype, "size": 1e-6 if dtype == torch.float16 else 1.0, "late": (1, 5)}
    expected = train(
        lambda p: Fanion(p, algorithm=algorithm, stack_entries=0, seed=0, **options), **case
    )
    for found, wanted in zip(train(lambda p: cls(p, **options), **case), expected, strict=True):
        assert torch.equal(found, wanted)


def test_gradients_that_would_overflow_the_momentum_are_skipped(tmp_path):
    cls = load(tmp_path / "exported_muon.py", single_file("muon"))
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = cls([weight])
    weight.grad = torch.full((4, 3), 3e38)
    optimizer.step()
    assert torch.equal(weight, torch.ones(4, 3))
    assert not optimizer.state[weight]["momentum"].any()


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("f_muon", {"alpha": 0.8, "nesterov": False, "weight_decay": 0.1, "lr": 0.3}),
        ("s_neon", {"sign_scale": 0.1, "rank": 3, "seed": 5, "oversampling": 2}),
        ("fanion", {"rank": "full", "scale": "spectral_unclamped"}),
        ("muon", {"scale": "match_rms_adamw", "momentum": 0.5}),
        ("f_fanion", {"scale": "match_rms_adamw"}),
    ],
)
def test_options_are_those_of_fanion(algorithm, options, tmp_path):
    cls = load(tmp_path / f"exported_{algorithm}.py", single_file(algorithm))
    expected = train(lambda p: Fanion(p, algorithm=algorithm, stack_entries=0, **options))
    for found, wanted in zip(train(lambda p: cls(p, **options)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("polar", "steps"), [("jordan", 3), ("fast", None)])
def test_newton_schulz_method_is_chosen_when_exporting(polar, steps, tmp_path):
    cls = load(tmp_path / f"exported_{polar}.py", single_file("muon", polar, steps))
    options = {"polar": polar, "polar_steps": steps, "stack_entries": 0}
    expected = train(lambda p: Fanion(p, **options))
    assert all(map(torch.equal, train(cls), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_is_saved_and_loaded(dtype, tmp_path):
    cls = load(tmp_path / "exported_f_neon.py", single_file("f_neon"))
    weight = torch.nn.Parameter(torch.randn(40, 40).to(dtype))
    first = cls([weight])
    weight.grad = torch.randn(40, 40).to(dtype)
    first.step()
    other = torch.nn.Parameter(weight.detach().clone())
    second = cls([other])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    weight.grad = other.grad = torch.randn(40, 40).to(dtype)
    first.step()
    second.step()
    assert torch.equal(weight, other)


@pytest.mark.parametrize("algorithm", exportable())
def test_file_imports_torch_and_the_standard_library_alone(algorithm):
    text = single_file(algorithm)
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert modules - {"torch"} <= {"__future__", "collections", "functools", "math", "typing"}
    assert "SPDX-License-Identifier: Apache-2.0" in text
    assert "rank_k" not in text and "Exported" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_command_writes_a_file_that_runs_alone(tmp_path, capfd):
    path = tmp_path / "f_muon.py"
    assert main(["export", "--algorithm", "f_muon", "--output", str(path)]) == 0
    assert capfd.readouterr().out.startswith(f"{path}: ")
    code = (
        "import sys, torch, f_muon\n"
        "w = torch.nn.Parameter(torch.ones(4, 3)); w.grad = torch.ones(4, 3)\n"
        "f_muon.FMuon([w]).step()\n"
        "assert w.std() < 1e-3 and w.mean() != 1\n"
        "assert 'lit_fanions' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True,
                   env={**subprocess_environment(), "PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert main(["export", "--algorithm", "f_muon"]) == 0
    assert capfd.readouterr().out == path.read_text()


def test_vectors_are_refused(tmp_path):
    cls = load(tmp_path / "exported_muon.py", single_file("muon"))
    with pytest.raises(ValueError, match=r"shape \(3,\) is no matrix: give vectors"):
        cls([torch.nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--algorithm", "f_moun"], "did you mean 'f_muon'?"),
        (["--algorithm", "adamw"], "algorithm 'adamw' is none of muon, "),
        (["--algorithm", "cosmos"], "algorithm 'cosmos' is none of muon, "),
        (["--algorithm", "muon", "--polar", "exact"], "polar method 'exact' is none of jordan, "),
        (["--algorithm", "muon", "--polar", "quintic", "--polar-steps", "3"], "exactly 5 steps"),
    ],
)
def test_mistakes_are_named(args, message, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["export", *args])
    assert stop.value.code == 2
    assert message in capfd.readouterr().err


def test_what_cannot_be_copied_is_refused():
    bundle = Bundle("", {}, {})
    bundle.add("lit_fanions.cli.catalogue", "_WIDTH")
    with pytest.raises(
        ValueError, match=r"_WIDTH is defined in lit_fanions\.optim\.split_table and"
    ):
        bundle.add("lit_fanions.optim.split_table", "_WIDTH")
    with pytest.raises(ValueError, match=r"lit_fanions\.norms is a module"):
        bundle.add("lit_fanions.lmo.newton_schulz", "_exact")
