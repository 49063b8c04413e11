"""Scion (arXiv 2502.07529): every parameter in a ball of its own, without AdamW."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lit_fanions import Fanion, configure_optimizers, norms
from lit_fanions.optim.algorithms import is_entrywise
from tests.matrices import gaussian64
from tests.optim.networks import small_network

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = ["nanogpt/scion_cpu.yaml", "nanogpt/track3_scion.yaml", "airbench/scion.yaml"]
BALLS = {
    "muon": (norms.Spectral(), (8, 6)),
    "signum": (norms.MaxEntry(), (8, 6)),
    "row": (norms.MaxRow(), (8, 6)),
    "column": (norms.MaxColumn(), (8, 6)),
    "nsgd": (norms.Frobenius(), (8, 6)),
}


@pytest.mark.parametrize("algorithm", BALLS)
def test_weight_decay_of_one_over_the_radius_is_the_constrained_variant(algorithm):
    """W <- (1 - gamma) W + gamma rho lmo(-M), M <- momentum M + (1 - momentum) G."""
    norm, shape = BALLS[algorithm]
    gamma, radius, momentum = 0.1, 3.0, 0.9
    start = 2.5 * gaussian64(*shape) / norm.value(gaussian64(*shape))
    p, want, average = nn.Parameter(start.clone()), start, torch.zeros(shape).double()
    optimizer = Fanion(
        [p], algorithm=algorithm, lr=gamma * radius, weight_decay=1 / radius, momentum=momentum,
        nesterov=False, scale="none", polar="exact",
    )  # fmt: skip
    for seed in range(40):
        p.grad = gaussian64(*shape, seed=seed)
        average = momentum * average + (1 - momentum) * p.grad
        want = (1 - gamma) * want - gamma * radius * norm.lmo(average)
        optimizer.step()
        assert norm.value(p.detach()) <= radius * (1 + 1e-6)
    torch.testing.assert_close(p.detach(), want)


@pytest.mark.parametrize("algorithm", ["signum", "nsgd"])
def test_vectors_step_in_balls_of_any_shape(algorithm):
    p = nn.Parameter(gaussian64(1, 9)[0].clone())
    optimizer = Fanion([p], algorithm=algorithm, lr=0.1, nesterov=False, scale="none")
    before, p.grad = p.detach().clone(), gaussian64(1, 9, seed=1)[0]
    optimizer.step()
    direction = p.grad.sign() if algorithm == "signum" else p.grad / p.grad.norm()
    torch.testing.assert_close(p.detach(), before - 0.1 * direction)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_step_every_parameter_in_a_ball(recipe):
    config = yaml.safe_load((CONFIGS / recipe).read_text())["model"]["init_args"]["optimizer"]
    config["overrides"].pop("whitening_bias", None)  # of a layer that other networks lack
    network = small_network()
    made = configure_optimizers(network, config, total_steps=10)
    groups = made["optimizer"].param_groups
    assert not any(is_entrywise(group["algorithm"]) for group in groups)
    assert sum(len(group["params"]) for group in groups) == len([*network.parameters()])
    assert not any(group["nesterov"] for group in groups)
