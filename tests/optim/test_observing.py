"""What a step shows to its observers, and that looking changes nothing."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_fanions import Fanion, lmo
from lit_fanions.optim import matrix_step
from lit_fanions.optim.matrices import to_matrices
from lit_fanions.optim.observing import Observation
from tests.optim.steps import MATRIX

FORMS: list[dict[str, Any]] = [
    *({"algorithm": name} for name in MATRIX),
    {"algorithm": "muon", "nesterov": False, "weight_decay": 0.1},
    {"algorithm": "f_muon", "scale": "match_rms_adamw", "renormalize": True},
    {"algorithm": "muon", "splits": 2},
    {"algorithm": "f_neon", "splits": [2, 4]},
    {"algorithm": "fanion", "layout": "batch", "stack_entries": 20},
    {"algorithm": "muon", "layout": "transposed"},
    {"algorithm": "neon", "error_feedback": True},
    {"algorithm": "dion", "rank": "full", "scale": "match_rms_adamw"},
    {"algorithm": "muon", "momentum_dtype": "bfloat16"},
]
LR = 0.1


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(6, 4, 5)) for _ in range(2)] + [
        nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(8, 3, dtype=torch.bfloat16))
    ]  # fmt: skip


def make_optimizer(ps: list[nn.Parameter], options: dict[str, Any]) -> Fanion:
    return Fanion([p for p in ps if is_divisible(p, options)], lr=LR, **options)


def is_divisible(p: Tensor, options: dict[str, Any]) -> bool:
    return "splits" not in options or p.shape[0] == 6


def give_gradients(optimizer: Fanion, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape, generator=generator).to(p)
        if step == 1 and p.ndim == 2:
            p.grad[0, 0] = torch.nan


def run(options: dict[str, Any], observed: bool, steps: int = 3) -> tuple[Fanion, list[dict]]:
    optimizer, seen = make_optimizer(parameters(), options), []
    for step in range(steps):
        give_gradients(optimizer, step)
        optimizer.observers = (lambda o: seen.append(copied(o)),) if observed else ()
        optimizer.step()
    return optimizer, seen


def copied(seen: Observation) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, Tensor) and name != "parameter" else value
        for name, value in seen._asdict().items()
    }


@pytest.fixture(params=["as on a CPU", "stacked"])
def stacks(request, monkeypatch):
    """Run on stacks of one parameter, and of all parameters of a shape as on accelerators."""

    def by_shape(parameters: list[Tensor], group: object) -> list[list[Tensor]]:
        kinds = dict.fromkeys((p.shape, p.dtype) for p in parameters)
        return [[p for p in parameters if (p.shape, p.dtype) == kind] for kind in kinds]

    if request.param == "stacked":
        monkeypatch.setattr(matrix_step, "stacks", by_shape)


@pytest.mark.usefixtures("stacks")
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_observers_change_no_bit(options):
    plain, watched = run(options, False)[0], run(options, True)[0]
    for p, q in zip(plain.param_groups[0]["params"], watched.param_groups[0]["params"],
                    strict=True):  # fmt: skip
        assert torch.equal(p, q)
        assert plain.state[p].keys() == watched.state[q].keys()
        for key, value in plain.state[p].items():
            assert torch.equal(value, watched.state[q][key])


@pytest.mark.usefixtures("stacks")
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_observations_equal_the_step(options):
    optimizer = make_optimizer(parameters(), options)
    group = optimizer.param_groups[0]
    for step in range(3):
        give_gradients(optimizer, step)
        seen: list[dict] = []
        optimizer.observers = (lambda o, seen=seen: seen.append(copied(o)),)
        before = [p.detach().clone() for p in group["params"]]
        optimizer._initialise_state()
        momenta = [optimizer.state[p]["momentum"].clone() for p in group["params"]]
        optimizer.step()
        for p, old, momentum in zip(group["params"], before, momenta, strict=True):
            own = sorted((o for o in seen if o["parameter"] is p), key=lambda o: o["first"])

            def matrices(x: Tensor) -> list[Tensor]:
                parts = to_matrices(x.detach(), group["layout"], group["splits"])
                return [m for part in parts for m in part]

            shown = {
                name: [m for o in own for m in o[name]]
                for name in ("before", "after", "gradient", "momentum", "direction")
            }
            for i, o in enumerate(own):
                assert o["first"] == sum(len(other["before"]) for other in own[:i])
            assert len(shown["before"]) == len(matrices(p))
            for a, b in zip(shown["before"], matrices(old), strict=True):
                assert torch.equal(a, b)
            for a, b in zip(shown["after"], matrices(p), strict=True):
                assert torch.equal(a, b)
            finite = bool(p.grad.isfinite().all())
            assert all(bool(o["finite"]) == finite for o in own)
            if not finite:
                for a, b in zip(shown["momentum"], matrices(momentum), strict=True):
                    assert torch.equal(a, b)
                continue
            for a, b in zip(shown["gradient"], matrices(p.grad), strict=True):
                assert torch.equal(a, b)
            for a, b in zip(shown["momentum"], matrices(expected_momentum(p, momentum, group)),
                            strict=True):  # fmt: skip
                assert torch.equal(a, b)
            if p.dtype == torch.float32 and not group["renormalize"]:
                decayed = 1 - LR * group["weight_decay"]
                for a, b, d in zip(shown["before"], shown["after"], shown["direction"],
                                   strict=True):  # fmt: skip
                    torch.testing.assert_close(a * decayed - LR * d.float(), b)


def expected_momentum(p: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
    g, mu = p.grad.to(momentum.dtype), group["momentum"]
    if group["error_feedback"]:
        return momentum + g
    after = momentum.lerp(g, 1 - mu)
    return g.lerp(after, mu) if group["nesterov"] else after


@pytest.mark.usefixtures("stacks")
@pytest.mark.parametrize("scale", ["none", "original", "match_rms_adamw", "spectral_unclamped"])
def test_observed_direction_over_its_factor_is_the_oracle(scale):
    options = {"algorithm": "f_fanion", "rank": 2, "solver": "exact", "scale": scale}
    for o in run(options, True, steps=1)[1]:
        if o["before"].dtype == torch.float32:
            want = lmo.direction(o["momentum"], rank=2, alpha=0.5, solver="exact")
            torch.testing.assert_close(o["direction"] / o["factor"], want, rtol=1e-4, atol=1e-5)


def test_captured_is_what_error_feedback_takes():
    for o in run({"algorithm": "neon", "error_feedback": True, "solver": "exact"}, True, 1)[1]:
        u, s, vh = torch.linalg.svd(o["momentum"].double(), full_matrices=False)
        want = s[:, :1, None] * u[..., :1] @ vh[:, :1]
        torch.testing.assert_close(o["captured"].double(), want, rtol=2e-2, atol=2e-2)
    for o in run({"algorithm": "dion", "rank": "full"}, True, 1)[1]:
        torch.testing.assert_close(
            o["captured"].float(), o["momentum"].float(), rtol=2e-2, atol=2e-2
        )


def test_groups_of_adamw_and_sgd_are_not_observed():
    p = nn.Parameter(torch.randn(3, 4))
    optimizer = Fanion([p], algorithm="adamw", lr=1e-3)
    seen: list[Observation] = []
    optimizer.observers = (seen.append,)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert seen == []


def test_copies_have_no_observers():
    optimizer = make_optimizer(parameters(), {"algorithm": "muon"})
    optimizer.observers = (lambda o: None,)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.observers == ()
    assert "observers" not in str(optimizer.state_dict())
