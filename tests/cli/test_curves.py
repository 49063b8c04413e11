"""Curves are read from TensorBoard's logs and averaged over seeds."""

import math

import pytest
from torch.utils.tensorboard import SummaryWriter

from lit_fanions.cli.console import Refused
from lit_fanions.cli.curves import read_curves, spread

INF, NAN = math.inf, math.nan


def test_scalar_with_a_similar_name_is_suggested(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for tag in ("val/acc", "epoch", "spectral/momentum_nuclear/matrix"):
            writer.add_scalar(tag, 1.0, 0)
    with pytest.raises(Refused, match=r"has no val/accc; did you mean 'val/acc'\?$"):
        read_curves(tmp_path, ["val/accc"])
    with pytest.raises(Refused, match=r"has no x; logged are epoch, val/acc$"):
        read_curves(tmp_path, ["x"])


def test_non_finite_values_are_read_as_infinity(tmp_path):
    values = {0: 2.5, 3: NAN, 7: INF, 9: -INF, 12: 0.5}
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in values.items():
            writer.add_scalar("val/loss", value, step)
            writer.add_scalar("train/loss", -1.0, step)
    curves = read_curves(tmp_path, ["train/loss", "val/loss"])
    assert list(curves) == ["train/loss", "val/loss"]
    assert curves["val/loss"] == [(0, 2.5), (3, INF), (7, INF), (9, INF), (12, 0.5)]
    with pytest.raises(Refused, match=r"has no val/acc"):
        read_curves(tmp_path, ["val/loss", "val/acc"])


@pytest.mark.parametrize(
    ("values", "mean", "deviation"),
    [
        ([3.0], 3.0, 0.0),
        ([1.0, 3.0], 2.0, 2**0.5),
        ([1.0, 2.0, 3.0], 2.0, 1.0),
        ([1.0, INF], INF, 0.0),
        ([INF, INF], INF, 0.0),
        ([1.0, NAN], NAN, 0.0),
        ([INF, -INF], NAN, 0.0),
        ([1e200, 3e200], 2e200, 2**0.5 * 1e200),
    ],
)
def test_spread_is_mean_and_sample_deviation(values, mean, deviation):
    assert spread(values) == pytest.approx((mean, deviation), nan_ok=True)
