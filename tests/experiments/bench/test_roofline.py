"""Counted operations and bytes, and the time that they take at measured rates."""

import pytest
import torch

from experiments.bench import roofline
from lit_fanions import Fanion


def test_products_and_other_traffic_are_counted():
    a, b, out = torch.ones(4, 8), torch.ones(8, 5), torch.ones(4, 5)

    def call():
        torch.mm(a, b, out=out)
        torch.addmm(out.bfloat16(), a.bfloat16(), b.bfloat16())
        out.add_(1)

    work = roofline.count(call)
    assert work.flops == {torch.float32: 320, torch.bfloat16: 320}
    casts = 6 * (out.numel() + a.numel() + b.numel())
    assert work.traffic == casts + 4 * 2 * out.numel()


def test_time_is_the_sum_of_products_and_traffic():
    rates = roofline.Rates({torch.float32: 100.0, torch.bfloat16: 400.0}, 10.0)
    work = roofline.Work({torch.float32: 200.0, torch.bfloat16: 400.0}, 5.0)
    assert rates.seconds(work) == pytest.approx(2 + 1 + 0.5)


def test_steps_of_every_solver_have_a_rate(monkeypatch):
    monkeypatch.setattr(roofline, "_SIDE", {"cpu": 8})
    monkeypatch.setattr(roofline, "_COPIED", 8)
    rates = roofline.measure_rates(torch.device("cpu"))
    for options in ({"algorithm": "muon"}, {"algorithm": "fanion", "rank": 4}):
        p = torch.nn.Parameter(torch.ones(96, 80))
        optimizer = Fanion([p], **options)
        p.grad = torch.randn(96, 80)
        optimizer.step()
        work = roofline.count(optimizer.step)
        assert sum(work.flops.values()) > 0
        assert work.flops.keys() <= rates.products.keys()
        assert rates.seconds(work) > work.traffic / rates.memory > 0
