"""The monitor's values against norms and ranks of a float64 SVD."""

import pytest
import torch

from lit_fanions import norms
from lit_fanions.callbacks import SpectralMonitor
from lit_fanions.callbacks.quantities import QUANTITIES
from lit_fanions.lmo.spectrum import QUANTILES
from tests.callbacks.nets import MATRICES, Net, fit
from tests.callbacks.recording import (
    LoggedValues,
    StepRecords,
    config,
    matrix,
    norms_and_ranks,
    svd,
)  # fmt: skip

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore:SpectralMonitor has no logger"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


SMOOTHNESS = {name for name in QUANTITIES if name.startswith("smoothness_")}  # of another monitor


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("algorithm", ["muon", "f_fanion", "kyfan"])
def test_values_match_a_float64_svd(tmp_path, algorithm, exact):
    values, records = LoggedValues(), StepRecords()
    options = config(algorithm, **({} if algorithm == "muon" else {"rank": 2}), scale="original")
    fit(tmp_path, Net(options), SpectralMonitor(1, exact=exact), values, records)
    norm = {
        "muon": norms.Spectral(),
        "f_fanion": norms.Blend(norms.KyFanDual(2), 0.5),
        "kyfan": norms.KyFan(2),
    }[algorithm]
    for step, got in enumerate(values.steps):
        for name in MATRICES:
            g = matrix(records.gradients[step], name)
            m = 0.05 * g + 0.95 * matrix(records.momenta[step], name)  # Nesterov
            before, after = matrix(records.before[step], name), matrix(records.after[step], name)
            rows, cols = before.shape
            k = 2 if algorithm != "muon" else min(rows, cols) // 4
            want = {
                "gradient_dual": norm.dual(g),
                "momentum_dual": norm.dual(m),
                **{f"gradient_{key}": value for key, value in norms_and_ranks(g, k).items()},
                **{f"momentum_{key}": value for key, value in norms_and_ranks(m, k).items()},
                "update_rms": (after - before).square().mean().sqrt(),
                "update_spectral": svd(after - before)[0],
                "update_relative": (after - before).norm() / before.norm(),
                "update_lr": torch.tensor(0.05 * max(1, rows / cols) ** 0.5),
                "update_skipped": torch.tensor(0.0),
                "weight_spectral": svd(before)[0],
                "weight_stable_rank": before.norm().square() / svd(before)[0].square(),
            }
            ratios = (svd(m) / svd(m)[0]).quantile(torch.tensor(QUANTILES, dtype=torch.float64))
            for q, ratio in zip(QUANTILES, ratios, strict=True):
                want[f"momentum_quantile{round(100 * q)}"] = ratio
            for key, value in want.items():
                assert got[f"{key}/{name}"] == pytest.approx(float(value), rel=1e-3, abs=1e-6), (
                    key, name, step,
                )  # fmt: skip
            assert 0.97 <= got[f"oracle_quality/{name}"] <= 1.01
            others = {"oracle_quality", "oracle_residual"} | SMOOTHNESS
            assert set(QUANTITIES) - set(want) == others


@pytest.mark.parametrize("exact_oracle", [True, False])
def test_oracle_quality_is_1_for_exact_directions_only(tmp_path, exact_oracle):
    values = LoggedValues()
    options = {"polar": "exact"} if exact_oracle else {"polar": "convergent", "polar_steps": 1}
    fit(tmp_path, Net(config(**options)), SpectralMonitor(1), values)
    qualities = [step[f"oracle_quality/{name}"] for step in values.steps for name in MATRICES]
    if exact_oracle:
        assert qualities == pytest.approx([1.0] * len(qualities), rel=1e-4)
    else:
        assert min(qualities) < 0.9


def test_oracle_residual_is_what_error_feedback_leaves(tmp_path):
    values, records = LoggedValues(), StepRecords()
    options = config("neon", error_feedback=True, solver="exact")
    fit(tmp_path, Net(options), SpectralMonitor(1, exact=True), values, records)
    for name in MATRICES:
        m = matrix(records.gradients[0], name)  # the first momentum
        s = svd(m)
        want = s[1:].norm() / s.norm()
        assert values.steps[0][f"oracle_residual/{name}"] == pytest.approx(float(want), rel=1e-3)


def test_group_values_are_means_over_its_matrices(tmp_path):
    run = fit(tmp_path, Net(config()), SpectralMonitor(1))
    # Groups of the configuration: the optimizer has three of this one, of different matrix forms.
    members = [run.callback_metrics[f"spectral/momentum_nuclear/{name}"] for name in MATRICES]
    mean = run.callback_metrics["spectral/momentum_nuclear/group/matrix"]
    assert mean == pytest.approx(float(sum(members)) / len(MATRICES), rel=1e-5)


@pytest.mark.parametrize("net", [Net(torch_optimizer=True), Net(config("adamw"))],
                         ids=["torch", "adamw"])  # fmt: skip
def test_other_optimizers_log_gradients_updates_and_weights(tmp_path, net):
    values, records = LoggedValues(), StepRecords()
    fit(tmp_path, net, SpectralMonitor(1, exact=True), values, records)
    assert not any(tag.startswith(("momentum", "oracle")) for tag in values.steps[0])
    for step, got in enumerate(values.steps):
        for name in MATRICES:
            g, w = (matrix(tensors[step], name) for tensors in (records.gradients, records.before))
            change = matrix(records.after[step], name) - w
            assert got[f"gradient_nuclear/{name}"] == pytest.approx(float(svd(g).sum()), rel=1e-3)
            assert got[f"weight_spectral/{name}"] == pytest.approx(float(svd(w)[0]), rel=1e-3)
            want = float(change.norm() / w.norm())
            assert got[f"update_relative/{name}"] == pytest.approx(want, rel=1e-3)
        assert "update_lr/group/matrix" in got
    logged = {tag.partition("/")[2] for tag in values.steps[0]} - {"group/matrix"}
    assert {name for name in logged if not name.startswith("group/")} == set(MATRICES)


def test_the_rank_argument_sets_k(tmp_path):
    metrics = fit(tmp_path, Net(config()), SpectralMonitor(1, rank=1)).callback_metrics
    for name in MATRICES:
        assert (
            metrics[f"spectral/gradient_kyfan/{name}"]
            == metrics[f"spectral/gradient_spectral/{name}"]
        )
