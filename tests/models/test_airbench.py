"""The airbench network: its parts against slow references, its options."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from models import Airbench
from models.airbench import BatchNorm, augmented_logits
from tests.models.airbench_runs import images, small

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


VARIANTS: dict[str, dict[str, Any]] = {
    "94 muon": {},
    "93": {"widths": (64, 128, 128), "logit_scale": 1 / 9, "unit_head": False},
    "94": {"logit_scale": 1 / 9, "unit_head": False},
    "95": {"widths": (128, 384, 384), "logit_scale": 1 / 9, "unit_head": False},
    "96": {
        "widths": (128, 384, 512),
        "depth": 3,
        "residual": True,
        "bn_momentum": 0.1,
        "logit_scale": 1 / 9,
        "unit_head": False,
    },
}


@pytest.mark.parametrize(
    ("variant", "total"),
    [
        ("94 muon", 1_971_640),
        ("93", 569_016),
        ("94", 1_971_640),
        ("95", 4_604_728),
        ("96", 9_915_704),
    ],
)
def test_variants_have_the_published_number_of_parameters(variant: str, total: int) -> None:
    model = Airbench(**VARIANTS[variant])
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == total
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == total - 288
    assert not parameters["whiten.weight"].requires_grad


def test_muon_variant_has_the_published_matrices() -> None:
    filters = [conv.weight for group in Airbench().groups for conv in group.convs]
    assert [(w.shape[0], w[0].numel()) for w in filters] == [
        (64, 216), (64, 576), (256, 576), (256, 2304), (256, 2304), (256, 2304)
    ]  # fmt: skip
    assert sum(w.numel() for w in filters) == 1_967_616


def test_batch_norm_scales_are_ones_and_no_parameters() -> None:
    model = small()
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert len(norms) == 6
    for norm in norms:
        assert [name for name, _ in norm.named_parameters()] == ["bias"]
        assert torch.equal(norm.weight, torch.ones_like(norm.bias))
        assert (norm.eps, norm.momentum) == (1e-12, 0.4)


def reference(model: Airbench, x: Tensor) -> Tensor:
    """Compute the network in evaluation mode from plain operations."""

    def norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
        x = (x - layer.running_mean[:, None, None]) / layer.running_var[:, None, None].sqrt()
        return x + layer.bias[:, None, None]

    sizes = [x.shape[-1]]
    x = F.gelu(F.conv2d(x, model.whiten.weight, model.whiten.bias))
    sizes.append(x.shape[-1])
    for group in model.groups:
        x = F.max_pool2d(F.conv2d(x, group.convs[0].weight, padding=1), 2)
        x = first = F.gelu(norm(group.norms[0], x))
        x = norm(group.norms[1], F.conv2d(x, group.convs[1].weight, padding=1))
        if len(group.convs) == 3:
            x = norm(group.norms[2], F.conv2d(F.gelu(x), group.convs[2].weight, padding=1))
        if group.residual:
            x = x + first
        x = F.gelu(x)
        sizes.append(x.shape[-1])
    assert sizes == [32, 31, 15, 7, 3]
    x = x.amax((2, 3))
    return x @ model.head.weight.T * model.logit_scale


@pytest.mark.parametrize("variant", ["94 muon", "96"])
def test_forward_equals_the_reference(variant: str) -> None:
    torch.manual_seed(0)
    model = Airbench(**{**VARIANTS[variant], "widths": (8, 12, 16)}).double()
    x = images(8).double()
    model.train()
    for _ in range(3):
        model(x)  # gives the batch norms statistics
    for module in model.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.bias)
    model.eval()
    torch.testing.assert_close(model(x).double(), reference(model, x), atol=1e-6, rtol=1e-5)


def test_logit_scale_defaults_to_one_over_the_width() -> None:
    assert Airbench().logit_scale == 1 / 256
    assert Airbench(logit_scale=1 / 9).logit_scale == 1 / 9


def test_convolutions_start_by_copying_their_input() -> None:
    for group in Airbench().groups:
        for conv in group.convs:
            copied = conv.weight[: conv.in_channels]
            expected = torch.zeros_like(copied)
            expected[range(len(copied)), range(len(copied)), 1, 1] = 1
            assert torch.equal(copied, expected)
            rest = conv.weight[conv.in_channels :]
            bound = (conv.in_channels * 9) ** -0.5  # torch's default
            assert rest.numel() == 0 or 0.5 * bound < rest.std() < bound


def test_head_starts_with_unit_deviation_by_default() -> None:
    assert Airbench().head.bias is None
    assert Airbench().head.weight.std().item() == pytest.approx(1)
    assert Airbench(unit_head=False).head.weight.std().item() == pytest.approx(
        1 / 16 / 3**0.5, rel=0.1
    )


def test_bn_momentum_weights_the_new_batch() -> None:
    norm = small(bn_momentum=0.25).groups[0].norms[0]
    norm(torch.full((2, 8, 3, 3), 8.0))
    torch.testing.assert_close(norm.running_mean, torch.full((8,), 2.0))


def test_batch_norm_stays_float32_under_autocast() -> None:
    model = small()
    x = images(16)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.float32
    for norm in (m for m in model.modules() if isinstance(m, BatchNorm)):
        state = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        assert {t.dtype for t in state} == {torch.float32}
    torch.testing.assert_close(low, model(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (64, 256)}, "widths=(64, 256): give three"),
        ({"widths": (64, 0, 256)}, "widths must be a whole number of at least 1, got 0"),
        ({"depth": 0}, "depth must be a whole number of at least 1, got 0"),
        ({"depth": 1, "residual": True}, "depth=1: a residual group"),
        ({"whiten": -1}, "whiten must be a whole number of at least 0, got -1"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        ({"bn_momentum": 1.5}, "bn_momentum=1.5: "),
        ({"bn_momentum": math.nan}, "bn_momentum must be a number of at least 0, got nan"),
        ({"logit_scale": 0.0}, "logit_scale must be a number above 0, got 0.0"),
        ({"logit_scale": math.inf}, "logit_scale must be a number above 0, got inf"),
        ({"label_smoothing": 1.0}, "label_smoothing must be a number in [0, 1), got 1.0"),
        ({"label_smoothing": -1.0}, "label_smoothing must be a number in [0, 1), got -1.0"),
        ({"label_smoothing": math.nan}, "label_smoothing must be a number in [0, 1), got nan"),
        ({"compile": "yes"}, "compile must be true or false, got 'yes'"),
        ({"unit_head": 1}, "unit_head must be true or false, got 1"),
        ({"val_tta": 3}, "val_tta=3: choose 0"),
        ({"test_tta": -1}, "test_tta=-1: choose 0"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Airbench(**options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_that_torch_counts(variant: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, one = Airbench(**VARIANTS[variant]).eval(), torch.empty(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(one)
    assert model.flops_per_image() == counter.get_total_flops()


@pytest.mark.parametrize("sync", [False, True])
def test_synchronised_batch_norm_is_refused(sync: bool) -> None:
    model = small(whiten=0)
    options = {"strategy": "ddp", "devices": 1, "logger": False}
    model.trainer = Trainer(accelerator="cpu", sync_batchnorm=sync, **options)
    if not sync:
        model.setup("fit")
        return
    with pytest.raises(ValueError, match="sync_batchnorm cannot convert Airbench's batch norm"):
        model.setup("fit")


def test_work_of_a_training_batch_is_counted() -> None:
    model = small()
    batch = images(4), torch.arange(4)
    assert model.count_work(batch) == {"images": 4, "flops": 3 * 4 * model.flops_per_image()}


def test_network_is_one_graph_for_the_compiler() -> None:
    model = small(compile=True)
    names = [name for name, _ in model.named_parameters()]
    model.configure_model()
    assert model._compiled_call_impl is not None
    assert [name for name, _ in model.named_parameters()] == names
    graphs = CompileCounter()
    compiled = torch.compile(model.forward, backend=graphs, fullgraph=True, dynamic=False)
    x = images(4)
    torch.testing.assert_close(compiled(x), model.forward(x))
    compiled(x.flip(-1))
    assert graphs.frame_count == 1


def shifted(x: Tensor, rows: int, columns: int) -> Tensor:
    """Return a view: pixel (i, j) is pixel (i + rows, j + columns), reflected at the border."""

    def reflect(position: int) -> int:
        return -position if position < 0 else 62 - position if position > 31 else position

    view = torch.empty_like(x)
    for i in range(32):
        for j in range(32):
            view[..., i, j] = x[..., reflect(i + rows), reflect(j + columns)]
    return view


def test_augmented_logits_equal_the_slow_reference() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 5, stride=3), nn.GELU(), nn.Flatten())
    x = images(3)
    with torch.no_grad():

        def both(view: Tensor) -> Tensor:
            return torch.stack([network(view), network(view.flip(3))]).mean(0)

        corners = torch.stack([both(shifted(x, -1, -1)), both(shifted(x, 1, 1))]).mean(0)
        expected = {0: network(x), 1: both(x), 2: 0.5 * both(x) + 0.5 * corners}
        for level, logits in expected.items():
            plain, augmented = augmented_logits(network, x, level)
            torch.testing.assert_close(plain, network(x))
            torch.testing.assert_close(augmented, logits)
