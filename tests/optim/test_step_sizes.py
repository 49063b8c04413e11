"""The factor of a step that its shape decides."""

import itertools
import math

import pytest
import torch
from torch import nn

from lit_fanions import configure_optimizers, split_parameters
from lit_fanions.optim.step_sizes import step_size_factor
from tests.matrices import gaussian, gaussian64
from tests.optim.reference import EXACT
from tests.optim.steps import MATRIX, first_update, take_steps

# With alpha 0 only the partner counts, with alpha 1 only the algorithm's own ball.
BLENDED = [
    *((name, *blended) for name in MATRIX for blended in ((None, None), (0.3, "sign"))),
    *((name, 0.3, "frobenius") for name in ("muon", "neon", "kyfan", "dion")),
    *((name, 0.0, blend) for name in ("muon", "neon") for blend in ("frobenius", "sign")),
    *((name, 1.0, "sign") for name in ("f_muon", "s_neon")),
]


@pytest.mark.parametrize(("algorithm", "alpha", "blend"), BLENDED)
def test_match_rms_adamw_gives_every_update_the_same_rms(algorithm, alpha, blend):
    for shape in [(12, 20), (20, 12), (2, 8, 12)]:
        layout = "flatten" if len(shape) == 2 else "batch"
        options = {"algorithm": algorithm, "alpha": alpha, "blend": blend, "layout": layout}
        got = first_update(
            shape, gaussian64(*shape), scale="match_rms_adamw", lr=0.5, sign_scale=0.2, **EXACT,
            **options,
        )  # fmt: skip
        rms = got.square().mean((-2, -1)).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, 0.1), rtol=1e-5, atol=0)


def test_match_rms_adamw_is_torchs_factor_for_muon():
    got = first_update((12, 20), gaussian64(12, 20), scale="match_rms_adamw", **EXACT)
    u, _, vh = torch.linalg.svd(gaussian64(12, 20), full_matrices=False)
    torch.testing.assert_close(got, 0.2 * math.sqrt(20) * u @ vh, rtol=0, atol=1e-9)


def torch_knows(scale):
    try:
        torch.optim.Muon([nn.Parameter(torch.ones(1, 1))], adjust_lr_fn=scale)
    except ValueError:  # torch 2.11, spectral_unclamped
        return False
    return True


@pytest.mark.parametrize(("rows", "cols"), [(8, 2), (2, 8), (5, 5)])
def test_factors_equal_those_of_torch(rows, cols):
    adjust = torch.optim._muon._adjust_lr
    norm = math.sqrt(min(rows, cols))
    for scale in filter(torch_knows, ("original", "match_rms_adamw", "spectral_unclamped")):
        want = adjust(1.0, scale, torch.Size((rows, cols)))
        assert step_size_factor(scale, rows, cols, norm) == pytest.approx(want)
    assert step_size_factor("none", rows, cols, norm) == 1


@pytest.mark.parametrize(
    ("module", "rows", "cols"),
    [
        (nn.Conv2d(3, 64, 3), 64, 27),
        (nn.Conv2d(64, 8, 3), 8, 576),
        (nn.Conv2d(64, 8, (1, 7)), 8, 448),
        (nn.Conv1d(4, 32, 5), 32, 20),
        (nn.Conv3d(2, 64, 2), 64, 16),
        (nn.ConvTranspose2d(3, 64, 2), 64, 12),
        (nn.ConvTranspose1d(64, 3, 2), 3, 128),
        (nn.Conv2d(8, 64, 3, groups=2), 32, 36),
    ],
)
@pytest.mark.parametrize("scale", ["original", "spectral_unclamped", "match_rms_adamw"])
def test_convolutions_step_as_flattened_matrices(module, rows, cols, scale):
    want = {
        "original": math.sqrt(max(1.0, rows / cols)) * math.sqrt(min(rows, cols)),
        "spectral_unclamped": math.sqrt(rows / cols) * math.sqrt(min(rows, cols)),
        "match_rms_adamw": 0.2 * math.sqrt(rows * cols),
    }[scale]
    optimizer = configure_optimizers(module, scale=scale, polar="exact", lr=1.0)["optimizer"]
    before = module.weight.detach().clone()
    module.weight.grad = gaussian(*before.shape)
    optimizer.step()
    count = before.numel() / (rows * cols)
    norm = (before - module.weight.detach()).norm().item() / math.sqrt(count)
    assert norm == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("scale", ["none", "original", "spectral_unclamped", "match_rms_adamw"])
@pytest.mark.parametrize("rank", ["full", 2])
def test_the_table_shows_the_radius_that_the_step_uses(scale, rank):
    module = nn.Sequential(nn.Linear(6, 24, bias=False), nn.Linear(24, 8), nn.Linear(8, 3))
    options = {"scale": scale, "lr": 0.5, "rank": rank, "polar": "exact", "solver": "exact"}
    split = split_parameters(module, {"matrix": options})
    optimizer = configure_optimizers(module, {"matrix": options})["optimizer"]
    before = [p.detach().clone() for p in module.parameters()]
    take_steps(optimizer, 1)
    header, *rows = str(split).splitlines()
    columns = ["parameter", "shape", "group", "algorithm", "ball", "lr", "radius", "size", "reason"]
    assert header.split() == columns
    starts = [header.index(name) for name in columns]
    for assignment, row, old in zip(split, rows, before, strict=True):
        if assignment.group != "matrix":
            continue
        cells = [row[a:b].strip() for a, b in itertools.pairwise([*starts, len(row)])]
        shape, radius = cells[1], cells[6]
        assert shape == "x".join(map(str, assignment.parameter.shape))
        norm = (old - assignment.parameter.detach()).norm().item()
        k = min(old.shape) if rank == "full" else rank
        assert float(radius) * math.sqrt(k) == pytest.approx(norm, rel=1e-3)
