"""NormAdvisor: what it measures, and that its fragment is a configuration."""

from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from lit_fanions import FanionConfig, configure_optimizers, lmo, split_parameters
from lit_fanions.callbacks import NormAdvisor
from lit_fanions.callbacks.activations import patches
from lit_fanions.callbacks.advisor import Evidence, advise, smallest_rank, sufficient_polar
from lit_fanions.lmo.spectrum import Spectrum, measure
from lit_fanions.optim.groups import configured_group
from tests.callbacks.nets import MATRICES, Net, assert_bit_equal, everything, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]


def with_values(values: Tensor, rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    u, v = (
        torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64)).Q
        for size in (rows, n)
    )
    return ((u * values) @ v.mT).float()


@pytest.mark.parametrize("algorithm", ["muon", "dion"])
def test_training_is_bit_equal_and_a_configuration_is_printed(tmp_path, capsys, algorithm):
    config = {"matrix": {"algorithm": algorithm, "lr": 0.05}}
    plain = everything(fit(tmp_path, Net(config)))
    capsys.readouterr()
    advisor = NormAdvisor(2)
    run = fit(tmp_path, Net(config), advisor)
    assert_bit_equal(everything(run), plain)
    assert run.optimizers[0].observers == ()
    assert not any(m._forward_pre_hooks for m in run.lightning_module.modules())

    printed = capsys.readouterr().out
    assert all(name in printed for name in MATRICES)
    assert "heuristic" in printed
    start = printed.index("# A heuristic")
    pasted = FanionConfig.from_dict(yaml.safe_load(printed[start:]))
    assert pasted.matrix.alpha is not None
    assert configure_optimizers(Net(), pasted)["optimizer"].param_groups
    assert FanionConfig.from_dict(yaml.safe_load(advisor.fragment)) == pasted


class OneLayer(Net):
    """A linear layer whose inputs, and whose gradients' factors, are known."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.embed = self.conv = self.attention = self.head = None
        self.experts = None
        self.down = nn.Linear(10, 12, bias=False)
        self.inputs: list[Tensor] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        x = torch.randn(32, 10, generator=torch.Generator().manual_seed(index))
        self.inputs.append(x)
        return self.down(x).square().mean()


def test_ranks_match_gradients_and_activations(tmp_path):
    net, advisor = OneLayer({"overrides": {"head": {"algorithm": "muon", "lr": 0.1}}}), None
    advisor = NormAdvisor(1)
    fit(tmp_path, net, advisor)
    found = advisor.evidence["down.weight"]
    assert found.group == "head"
    assert len(found.nuclear_rank) == len(found.stable_rank) == len(net.inputs)
    assert len(found.agreement) == len(net.inputs) - 1
    for x, value in zip(net.inputs, found.stable_rank, strict=True):
        s = torch.linalg.svdvals(x.double())
        assert value == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-3)
    assert all(1 <= value <= 10 for value in found.nuclear_rank)
    assert all(0 <= value <= 1 + 1e-5 for value in found.agreement)
    section = yaml.safe_load(advisor.fragment)["overrides"]["head"]
    assert section["algorithm"] in ("f_muon", "f_fanion")


def test_activations_of_convolutions_and_attention_are_measured(tmp_path):
    advisor = NormAdvisor(3)
    fit(tmp_path, Net(), advisor)
    for name, found in advisor.evidence.items():
        # In steps 0 and 3, and compared with 1 and 4.
        assert len(found.nuclear_rank) == 2
        assert len(found.agreement) == 2
        known = not name.startswith(("experts", "attention.out_proj"))
        assert len(found.stable_rank) == (2 if known else 0), name
    names = [name for name, _ in Net().named_parameters()]
    assert set(advisor.evidence) == set(MATRICES)
    assert [*advisor.evidence] == sorted(
        MATRICES, key=lambda name: (names.index(name.partition("[")[0]), name)
    )


@pytest.mark.parametrize(
    "options",
    [{"stride": 2, "dilation": 2}, {"padding": 1, "stride": 2}, {"padding": "same"},
     {"padding": "same", "dilation": 3}, {"padding": "valid"}],
    ids=str,
)  # fmt: skip
def test_patches_times_the_flattened_weight_are_the_convolution(options):
    x = torch.randn(4, 2, 7, 6)
    for conv, inputs in (
        (nn.Conv2d(2, 5, (3, 2), bias=False, **options), x),
        (nn.Conv1d(2, 5, 3, bias=False, **options), x[..., 0]),
        (nn.Conv2d(2, 5, (3, 2), bias=False, **options), x[0]),
    ):
        got = patches(conv, inputs) @ conv.weight.flatten(1).mT
        want = conv(inputs)
        want = (want if want.ndim == inputs.ndim == conv.weight.ndim else want[None]).flatten(2)
        torch.testing.assert_close(got, want.mT.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_smallest_rank_reaches_the_part():
    s = torch.tensor([3.0, 2.0, 1.0, 0.1], dtype=torch.float64)
    one = measure(with_values(s, 7))
    for power in (1, 2):
        parts = (s**power).cumsum(0) / (s**power).sum()
        for part in (0.1, 0.5, 0.9, 0.95, 0.9999, 1.0):
            want = int((parts < part - 1e-7).sum()) + 1
            assert smallest_rank(one, part, power=power) == want
    large = with_values(torch.arange(1, 201, dtype=torch.float64) ** -1.0, 300)
    exact = smallest_rank(measure(large, exact=True), 0.9, power=2)
    assert abs(smallest_rank(measure(large), 0.9, power=2) - exact) <= 1


@pytest.mark.parametrize("condition", [3, 30, 300])
def test_the_suggested_polar_method_suffices(condition):
    values = torch.logspace(0, -torch.tensor(float(condition)).log10(), 48, dtype=torch.float64)
    m = with_values(values, 60)
    method, steps = sufficient_polar(measure(m))
    d = lmo.polar(m.double(), method=method, steps=steps)
    assert float((m * d).sum()) / float(values.sum()) >= 0.98 - 2e-3
    assert torch.linalg.svdvals(d).quantile(0.1) >= 0.5 - 1e-2


def test_smaller_values_need_more_steps():
    steps = [
        sufficient_polar(measure(with_values(torch.logspace(0, -power, 48).double(), 60)))[1]
        for power in (0.2, 2, 3.5)
    ]
    assert steps[0] < steps[1] < steps[2]


def test_no_polar_method_suffices_for_tiny_singular_values():
    m = with_values(torch.tensor([1.0] + [1e-9] * 9, dtype=torch.float64), 20)
    assert sufficient_polar(measure(m)) is None


def evidence(nuclear: float, stable: float | None, ranks: tuple[int, int], **more: Any) -> Evidence:
    return Evidence(
        group=more.pop("group", "matrix"), limit=100, nuclear_rank=[nuclear],
        stable_rank=[] if stable is None else [stable], energy_rank=[ranks[0]],
        norm_rank=[ranks[1]], agreement=more.pop("agreement", [0.95]), low=[0.1],
        polar=[("polar_express", 5)], **more,
    )  # fmt: skip


def test_advice_follows_ratios_ranks_and_agreement():
    spectral = advise({"a": evidence(40, 10, (5, 60)), "b": evidence(30, 10, (5, 60))})
    assert spectral == {
        "matrix": {"algorithm": "f_muon", "rank": "full", "alpha": 0.8, "polar": "polar_express",
                   "polar_steps": 5}
    }  # fmt: skip
    low = advise({"a": evidence(2, 10, (7, 80), agreement=[0.3]), "b": evidence(2, None, (1, 9))})
    assert low["matrix"] == {
        "algorithm": "f_fanion", "rank": 8, "alpha": 0.15, "solver": "subspace",
        "solver_steps": 2,
    }  # fmt: skip
    unknown = advise({"a": evidence(2, None, (80, 90), group="head")})
    assert unknown["overrides"]["head"]["alpha"] == 0.5
    for config in (spectral, low, unknown):
        assert FanionConfig.from_dict(config)


OWN = {
    "matrix": {"algorithm": "fanion", "rank": 2, "error_feedback": True},
    "overrides": {"qkv": {"parameters": ["attention.in_proj_weight"], "splits": 3},
                  "router": {"parameters": ["down.weight"], "algorithm": "adamw", "lr": 0.01}},
}  # fmt: skip


def test_advice_for_the_users_own_groups_is_a_valid_configuration(tmp_path):
    advisor = NormAdvisor(2)
    fit(tmp_path, Net(OWN), advisor)
    groups = {name: found.group for name, found in advisor.evidence.items()}
    assert groups["down.weight"] == "router" and groups["attention.in_proj_weight[1]"] == "qkv"
    fragment = yaml.safe_load(advisor.fragment)
    assert fragment["overrides"]["qkv"]["splits"] == 3
    merged = {**fragment, "matrix": {**OWN["matrix"], **fragment["matrix"]}}
    for config in (fragment, merged):
        made = configure_optimizers(Net(), config)["optimizer"]
        assert {"qkv.splits3", "router"} <= {group["name"] for group in made.param_groups}


def test_keyword_inputs_are_measured(tmp_path):
    class Named(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.embed(x).mT).mT
            x = x + self.attention(query=x, key=x, value=x, need_weights=False)[0]
            x = x + self.down(input=(x.unsqueeze(1) @ self.experts).relu().sum(1))
            return self.head(x.mean(1))

    plain, named = NormAdvisor(3), NormAdvisor(3)
    fit(tmp_path, Net(), plain)
    fit(tmp_path, Named(), named)
    assert {n: e.stable_rank for n, e in plain.evidence.items()} == {
        n: e.stable_rank for n, e in named.evidence.items()
    }


def test_compiled_modules_get_no_hooks(tmp_path):
    net = Net()
    net.attention.compile(backend="eager")
    advisor = NormAdvisor(3)
    fit(tmp_path, net, advisor)
    assert not advisor.evidence["attention.in_proj_weight[0]"].stable_rank
    assert advisor.evidence["conv.weight"].stable_rank


@pytest.mark.parametrize("decay", ["exponential", "power"])
def test_ranks_and_polar_methods_of_large_matrices_are_exact(decay, tmp_path):
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 150, generator=generator)).Q for n in (200, 150))
    i = torch.arange(1, 151.0)
    sigmas = torch.exp(-i / 20) if decay == "exponential" else i**-2
    g = (u * sigmas) @ v.T

    class Steered(Net):
        def __init__(self) -> None:
            super().__init__({"matrix": {"algorithm": "muon", "momentum": 0.0}})
            self.big = nn.Linear(150, 200, bias=False)
            self.big.weight.fanion_group = "matrix"  # the last layer would be a head

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return super().training_step(batch, index) + (self.big.weight * g).sum()

    advisor = NormAdvisor(2, parameters=["big.weight"])
    fit(tmp_path, Steered(), advisor)
    found = advisor.evidence["big.weight"]
    parts = sigmas.double().cumsum(0) / sigmas.double().sum()
    assert found.norm_rank[0] == pytest.approx(int((parts < 0.99).sum()) + 1, abs=1)
    assert found.low[0] == pytest.approx(float(sigmas.sort().values[15] / sigmas[0]), rel=0.1)
    exact = Spectrum(sigmas.double(), torch.ones(150).double(), sigmas.double().norm())
    assert found.polar[0] == sufficient_polar(exact)


def test_torch_optimizers_are_advised_too(tmp_path, capsys):
    advisor = NormAdvisor(2)
    fit(tmp_path, Net(torch_optimizer=True), advisor)
    assert set(advisor.evidence) == set(MATRICES)
    assert FanionConfig.from_dict(yaml.safe_load(advisor.fragment)).matrix.algorithm
    assert "heuristic" in capsys.readouterr().out


class Scaled(OneLayer):
    """A linear layer whose gradients are multiplied by a power of two."""

    def __init__(self, scale: float) -> None:
        super().__init__({"matrix": {"algorithm": "muon", "lr": 0.0, "weight_decay": 0.0}})
        self.scale = scale
        self.down.weight.fanion_group = "matrix"

    def on_after_backward(self) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad.div_(p.grad.abs().max()).mul_(self.scale)


@pytest.mark.parametrize("scale", [2.0**-125, 2.0**125])
def test_evidence_does_not_depend_on_the_scale_of_gradients(tmp_path, scale):
    plain, scaled = NormAdvisor(2), NormAdvisor(2)
    fit(tmp_path, Scaled(1.0), plain)
    fit(tmp_path, Scaled(scale), scaled)
    want, got = plain.evidence["down.weight"], scaled.evidence["down.weight"]
    assert got.nuclear_rank == pytest.approx(want.nuclear_rank, rel=1e-5)
    assert got.low == pytest.approx(want.low, rel=1e-5)
    assert got.agreement == pytest.approx(want.agreement, rel=1e-3)
    assert (got.norm_rank, got.polar) == (want.norm_rank, want.polar)


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps")
def test_fast_dev_run_prints_nothing(tmp_path, capsys):
    fit(tmp_path, Net(), NormAdvisor(1), fast_dev_run=True)
    assert "nuclear rank" not in capsys.readouterr().out


def test_groups_know_the_group_of_the_configuration():
    net = nn.ModuleDict({
        "up": nn.ConvTranspose2d(8, 8, 2), "grouped": nn.Conv2d(8, 8, 2, groups=2),
        "attention": nn.MultiheadAttention(8, 2), "down": nn.Linear(8, 8),
        "head": nn.Linear(8, 2),
    })  # fmt: skip
    config = {"overrides": {"cut.up": {"parameters": ["down.weight"], "splits": [2, 6]}}}
    for group in configure_optimizers(net, config)["optimizer"].param_groups:
        for name in group["param_names"]:
            (assigned,) = (a.group for a in split_parameters(net, config) if a.name == name)
            assert configured_group(group) == assigned
