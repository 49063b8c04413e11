"""Transforms by second moments against the pseudo-code of their papers, in float64."""

import pytest
import torch
from torch import nn

from lit_fanions import Fanion, norms
from tests.lmo.matrices import gaussian

LR, MU, BETA2, EPS = 0.1, 0.9, 0.8, 1e-8


def reference(weight: torch.Tensor, gradients: list[torch.Tensor], by_rows: bool) -> torch.Tensor:
    """NorMuon (arXiv 2510.05491) or AdaMuon (2507.11005, without the sign), at the length of D."""
    w = weight.double()
    momentum = torch.zeros_like(w)
    second = torch.zeros(w.shape[0], 1).double() if by_rows else torch.zeros_like(w)
    for gradient in gradients:
        momentum = MU * momentum + (1 - MU) * gradient.double()
        d = norms.Spectral().lmo((1 - MU) * gradient.double() + MU * momentum)
        squares = d.square().mean(1, keepdim=True) if by_rows else d.square()
        second = BETA2 * second + (1 - BETA2) * squares
        adapted = d / (second.sqrt() + EPS)
        w = w - LR * adapted * d.norm() / adapted.norm()
    return w


@pytest.mark.parametrize("adapt", ["rows", "entries"])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (2, 6, 4)])
def test_steps_equal_the_papers_pseudo_code(shape, adapt):
    p = nn.Parameter(gaussian(*shape))
    start = p.detach().clone()
    gradients = [gaussian(*shape, seed=i + 1) for i in range(3)]
    optimizer = Fanion(
        [p], lr=LR, momentum=MU, adapt=adapt, beta2=BETA2, eps=EPS, polar="exact", scale="none",
        layout="batch",
    )  # fmt: skip
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    matrices = zip(start.view(-1, *shape[-2:]), p.detach().view(-1, *shape[-2:]), strict=True)
    for i, (before, after) in enumerate(matrices):
        own = [gradient.view(-1, *shape[-2:])[i] for gradient in gradients]
        expected = reference(before, own, adapt == "rows")
        torch.testing.assert_close(after.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapt", ["rows", "entries"])
def test_slices_of_a_stack_adapt_as_the_whole(adapt):
    def train(entries: int | None) -> torch.Tensor:
        p = nn.Parameter(gaussian(6, 8, 5))
        optimizer = Fanion([p], lr=LR, adapt=adapt, layout="batch", stack_entries=entries)
        for i in range(3):
            p.grad = gaussian(6, 8, 5, seed=i)
            optimizer.step()
        return p.detach()

    torch.testing.assert_close(train(80), train(None), rtol=0, atol=1e-6)


def test_a_transform_may_be_switched_on_and_off():
    p = nn.Parameter(gaussian(8, 5))
    optimizer = Fanion([p], lr=LR)
    for adapt in ("none", "rows", "entries", "none"):
        optimizer.param_groups[0]["adapt"] = adapt
        p.grad = gaussian(8, 5)
        optimizer.step()
        assert ("second0" in optimizer.state[p]) == (adapt != "none")
