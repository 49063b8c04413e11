"""Least squares: loss and gradient, exact steps of each problem, logged values."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from datamodules import LeastSquaresDataModule
from datamodules.least_squares import Problems, random_problems
from lit_fanions import bounds, norms
from lit_fanions.cli.curves import read_curves
from models import LeastSquares

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

SIZE = {"problems": 3, "rows": 6, "cols": 4}
PLAIN = {
    "momentum": 0.0,
    "nesterov": False,
    "polar": "exact",
    "solver": "exact",
    "scale": "none",
    "lr": 0.05,
}
BALLS = {
    "nsgd": norms.Frobenius(),
    "muon": norms.Spectral(),
    "neon": norms.Nuclear(),
    "f_muon": norms.Blend(norms.Spectral(), 0.5),
    "f_neon": norms.Blend(norms.Nuclear(), 0.5),
    "s_muon": norms.Blend(norms.Spectral(), 0.5, "sign"),
    "s_neon": norms.Blend(norms.Nuclear(), 0.5, "sign"),
}


def model(algorithm: str = "muon", **options) -> LeastSquares:
    size = {"sign_scale": 1.0} if algorithm.startswith("s_") else {}
    matrix = {**PLAIN, **size, "algorithm": algorithm}
    return LeastSquares({"matrix": matrix}, **{**SIZE, **options})


def trainer(steps: int, folder: Path | None = None, **options) -> Trainer:
    logger = False if folder is None else TensorBoardLogger(folder, name="", version="")
    settings = {
        "max_steps": steps,
        "max_epochs": -1,
        "accelerator": "cpu",
        "precision": "64-true",
        "logger": logger,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 5,
    }
    return Trainer(**{**settings, **options})


def data(**options) -> LeastSquaresDataModule:
    return LeastSquaresDataModule(**{**SIZE, "steps_per_epoch": 8, **options})


def descended(norm: norms.Norm, steps: int) -> torch.Tensor:
    """Run the paper's iteration (7) on each problem: (steps + 1, problems, rows, cols)."""
    problems = random_problems(*SIZE.values())
    paths = []
    for m, n, s in zip(*problems, strict=True):
        x = torch.zeros_like(s)
        path = [x]
        for _ in range(steps):
            x = x - 0.05 * norm.lmo(m @ (x - s) @ n)
            path.append(x)
        paths.append(torch.stack(path))
    return torch.stack(paths, 1)


def value_and_gradient(x: torch.Tensor, problems: Problems) -> tuple[torch.Tensor, torch.Tensor]:
    """Return F and its gradient (equations 19 and 20) at x, (..., rows, cols)."""
    difference = x - problems.target
    gradient = problems.left @ difference @ problems.right
    return torch.einsum("...ij,...ij->...", difference, gradient) / 2, gradient


def test_loss_and_gradient_equal_the_formulas():
    problems, module = random_problems(*SIZE.values()), model()
    with torch.no_grad():
        module.weight.normal_()
    losses, gradient = value_and_gradient(module.weight.detach(), problems)
    found = module.losses(problems)
    torch.testing.assert_close(found, losses)
    torch.testing.assert_close(*torch.autograd.grad(found.sum(), module.weight), gradient)
    with torch.no_grad():
        module.weight.copy_(problems.target)
    assert (module.losses(problems) == 0).all()


@pytest.mark.parametrize("algorithm", BALLS)
def test_steps_equal_the_papers_iteration_of_each_problem(algorithm):
    module = model(algorithm)
    trainer(20).fit(module, data())
    torch.testing.assert_close(module.weight.detach(), descended(BALLS[algorithm], 20)[-1])


def test_single_problem_steps_as_a_matrix():
    module = model("neon", problems=1)
    trainer(20).fit(module, data(problems=1))
    torch.testing.assert_close(module.weight.detach(), descended(BALLS["neon"], 20)[-1, 0])


@pytest.mark.parametrize("algorithm", ["f_muon", "s_neon"])
def test_logged_values_equal_exact_norms(algorithm, tmp_path):
    trainer(130, tmp_path).fit(model(algorithm, points_per_decade=2), data())
    problems = random_problems(*SIZE.values())
    losses, gradients = value_and_gradient(descended(BALLS[algorithm], 130), problems)
    exact = {
        "spectral": norms.Spectral().value(gradients),
        "frobenius": norms.Frobenius().value(gradients),
        "nuclear": norms.Nuclear().value(gradients),
        "dual": BALLS[algorithm].dual(gradients),
    }
    expected = {"train/loss": losses.mean(1), "problem2/loss": losses[:, 2]}
    for name, values in exact.items():
        best = values.cummin(0).values
        expected |= {f"gradient/{name}": values.mean(1), f"best/{name}": best.mean(1)}
        expected |= {f"problem1/{name}": values[:, 1], f"problem1/best_{name}": best[:, 1]}
    curves = read_curves(tmp_path, [*expected, *(f"problem{i}/smoothness" for i in range(3))])
    for name, values in expected.items():
        steps = [step for step, _ in curves[name]]
        assert {0, 1, 32, 100, 130, *range(0, 130, 5)} <= {*steps}
        found = torch.tensor([value for _, value in curves[name]], dtype=torch.float64)
        torch.testing.assert_close(found, values[steps], rtol=1e-5, atol=1e-8)
    smoothness = bounds.smoothness(BALLS[algorithm], problems.left, problems.right)
    for i in range(3):
        assert curves[f"problem{i}/smoothness"] == [(0, pytest.approx(smoothness[i].item()))]


class Saving(Callback):
    """Saves a checkpoint after the 11th step."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 11:
            trainer.save_checkpoint("middle.ckpt")


def test_resume_is_bit_equal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, resumed = model("f_neon"), model("f_neon")
    trainer(20, callbacks=[Saving()]).fit(whole, data())
    trainer(20).fit(resumed, data(), ckpt_path="middle.ckpt")
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.best, resumed.best)
    assert whole.best.isfinite().all()


def test_second_fit_resets_the_smallest_norms():
    module = model()
    trainer(3).fit(module, data())
    first = module.best.clone()
    with torch.no_grad():
        module.weight.add_(10.0)
    trainer(1).fit(module, data())
    assert (module.best > first).all()


def test_precision_is_double_with_any_trainer_precision():
    module = model("muon")
    trainer(5, precision="32-true").fit(module, data())
    torch.testing.assert_close(module.weight.detach(), descended(BALLS["muon"], 5)[-1])


def test_sizes_that_differ_from_the_data_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 6, 4\) and the model \(3, 6, 5\): give both"):
        trainer(1).fit(model(cols=5), data())
    with pytest.raises(ValueError, match="rows must be a whole number of at least 1, got 0"):
        LeastSquares(rows=0)
    assert math.isinf(LeastSquares().best.min())
