"""Everything that has a CUDA path, on a GPU; `make gpu-check` runs this and prints the results.

What a test measures it records as the property "measured", which becomes its line of the table.
Tests that train a recipe are skipped where jsonargparse is missing; the others need torch and
Lightning only.
"""

import copy
import dataclasses
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from datamodules.shards import write_shard
from lit_fanions import Fanion, lmo, norms
from lit_fanions.callbacks import SpectralMonitor
from models import gpt
from tests.callbacks.nets import Net, fit
from tests.conftest import TESTS

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(400)]

DEVICE = "cuda"
ROOT = TESTS.parent
CIFAR10 = Path(os.environ.get("CIFAR10_DIR", ROOT / "data" / "cifar10"))
SHAPES = [(64, 216), (256, 2304), (768, 768), (3, 512, 128), (10, 1)]
POLAR_METHODS = [
    "jordan",
    "quintic",
    "polar_express",
    "cans",
    "fast",
    "convergent",
    "exact",
    "auto",
]
SOLVERS = ["lanczos", "subspace", "randomized", "power", "exact", "cupy", "auto"]
FULL_RANK = ["muon", "f_muon", "s_muon"]
RANK_K = ["neon", "fanion", "kyfan", "f_neon", "s_fanion", "dion"]
ENTRYWISE = ["nsgd", "signum", "coordinate", "adamw", "sgd"]
GPU = ["--trainer.accelerator", "gpu", "--trainer.devices", "1"]


def lightning_cli(args: list[str]) -> int:
    """Run `python -m lit_fanions` in this process; skip the test without jsonargparse."""
    pytest.importorskip("jsonargparse")
    from lit_fanions.cli.app import main

    return main(args)


def bench(args: list[str]) -> int:
    """Run `python -m experiments.bench` in this process."""
    from experiments.bench.__main__ import main

    return main(args)


def matrices(*shape: int, condition: float = 1e3) -> Tensor:
    """Return random matrices whose singular values fall from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(5)
    *batch, rows, cols = shape
    k = min(rows, cols)
    u = torch.linalg.qr(torch.randn(*batch, rows, k, generator=generator).double()).Q
    v = torch.linalg.qr(torch.randn(*batch, cols, k, generator=generator).double()).Q
    s = torch.logspace(0, -torch.tensor(condition).log10().item(), k).double()
    return (u * s @ v.mT).float().to(DEVICE)


def alignment(m: Tensor, d: Tensor, norm: norms.Norm) -> float:
    """Return the smallest <m, d> / |m|* of the batch, |m|* the dual norm: 1 if exact."""
    inner = (m.double() * d.double()).sum((-2, -1))
    return float((inner / norm.dual(m)).min())


@pytest.mark.parametrize("method", POLAR_METHODS)
def test_polar(method, record_property):
    inputs = [matrices(*shape) for shape in SHAPES]
    worst = min(alignment(m, lmo.polar(m, method=method), norms.Spectral()) for m in inputs)
    record_property("measured", f"<M, D> / dual norm at least {worst:.5f}")
    # By design, Jordan's coefficients leave singular values between .65 and 1.2, and five steps of
    # CANS up to 12 % away from 1.
    assert worst >= {"exact": 0.999, "jordan": 0.65, "cans": 0.87, "fast": 0.6}.get(method, 0.97)


@pytest.mark.parametrize("solver", SOLVERS)
def test_top_singular(solver, record_property):
    if solver == "cupy":
        pytest.importorskip("cupy", exc_type=ImportError)
    worst = 1.0
    for shape in SHAPES:
        m = matrices(*shape)
        k = min(4, *shape[-2:])
        u, s, vh = lmo.top_singular(m, k, solver=solver)
        assert (u.shape[-1], s.shape[-1], vh.shape[-2]) == (k, k, k)
        worst = min(worst, alignment(m, u @ vh, norms.KyFanDual(k)))
    record_property("measured", f"<M, D> / dual norm at least {worst:.5f}")
    assert worst >= (0.999 if solver == "exact" else 0.97)


def network() -> nn.Module:
    """Return a network of convolutions and a linear layer, some of equal shape."""
    layers = [nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10)).to(DEVICE)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(64, 3, 8, 8, generator=generator).to(DEVICE)
    return images, torch.randint(10, (64,), generator=generator).to(DEVICE)


def optimizer_for(model: nn.Module, algorithm: str) -> Fanion:
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": weights, "algorithm": algorithm, "lr": 0.01, "name": "matrix"},
        {"params": biases, "algorithm": "adamw", "lr": 0.01, "name": "other"},
    ]
    return Fanion(groups)


@pytest.mark.parametrize("algorithm", [*FULL_RANK, *RANK_K, *ENTRYWISE])
def test_step_does_not_wait_for_the_device(algorithm):
    model, (images, labels) = network(), batch()
    optimizer = optimizer_for(model, algorithm)
    cross_entropy(model(images), labels).backward()
    optimizer.step()  # the first step creates the state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("algorithm", ["muon", "f_muon", "fanion", "dion", "nsgd"])
def test_steps_by_triton_agree_with_plain_ones(algorithm, dtype, record_property):
    pytest.importorskip("triton")
    results = []
    for kernels in ("plain", "triton"):
        generator = torch.Generator(DEVICE).manual_seed(3)
        draw = {"generator": generator, "device": DEVICE}
        params = [nn.Parameter(torch.randn(130, 301, **draw).to(dtype)) for _ in range(3)]
        optimizer = Fanion(
            params, algorithm=algorithm, kernels=kernels, lr=0.1, weight_decay=0.1, seed=0
        )
        for step in range(3):
            for p in params:
                p.grad = torch.randn(130, 301, **draw).to(dtype)
            if step == 1:
                params[1].grad[0, 0] = torch.nan
            optimizer.step()
        results.append(torch.stack([p.detach().float() for p in params]))
    plain, triton = results
    apart = float((plain - triton).norm() / plain.norm())
    record_property("measured", f"weights {apart:.2g} apart")
    assert apart < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("algorithm", ["f_muon", "f_fanion"])
def test_autocast(algorithm, dtype, record_property):
    model, (images, labels) = network(), batch()
    optimizer = optimizer_for(model, algorithm)
    # A scale that overflows at first: the scaler must be able to skip steps.
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**24, enabled=dtype == torch.float16)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype):
            loss = cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    record_property("measured", f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in 60 steps")
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_resumed_run_equals_uninterrupted_run(precision, project, record_property):
    fit = ["fit", "--config", "recipe.yaml", *GPU, "--trainer.precision", precision]
    assert lightning_cli(fit) == 0
    assert lightning_cli([*fit, "--model", "toy_zoo.Interrupted"]) == 130
    saved = "lightning_logs/version_1/checkpoints/interrupted.ckpt"
    assert lightning_cli([*fit, "--ckpt_path", saved]) == 0
    first, last = (
        torch.load(
            next(project.glob(f"lightning_logs/version_{version}/checkpoints/epoch*.ckpt")),
            map_location="cpu",
            weights_only=True,
        )["state_dict"]
        for version in (0, 2)
    )
    apart = max(float((first[name] - last[name]).abs().max()) for name in first)
    record_property("measured", f"weights up to {apart:.3g} apart")
    assert apart < 1e-5


def fit_result(recipe: str, options: list[str], capfd) -> tuple[float, float]:
    """Train a recipe; return its test accuracy in % and its seconds, start-up included."""
    start = time.perf_counter()
    assert lightning_cli(["fit", "--config", str(ROOT / recipe), *GPU, *options]) == 0
    seconds = time.perf_counter() - start
    accuracy = re.search(r"test accuracy: ([\d.]+) %", capfd.readouterr().out)
    assert accuracy
    return float(accuracy[1]), seconds


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Work in a temporary folder, from which models and datamodules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))


def test_quickstart(checkout, capfd, record_property):
    accuracy, seconds = fit_result("configs/quickstart.yaml", [], capfd)
    record_property("measured", f"{accuracy:.2f} % in {seconds:.1f} s")
    assert accuracy >= 97


@pytest.mark.parametrize("name", ["muon", "f_muon"])
def test_airbench(name, checkout, capfd, record_property):
    if not CIFAR10.is_dir():
        pytest.skip(f"no CIFAR-10 in {CIFAR10}; set CIFAR10_DIR")
    options = ["--data.data_dir", str(CIFAR10)]
    accuracy, seconds = fit_result(f"configs/airbench/{name}.yaml", options, capfd)
    record_property("measured", f"{accuracy:.2f} % in {seconds:.1f} s, start-up included")
    assert accuracy >= 90


def test_overhead_of_the_loop(checkout, capfd, record_property):
    pytest.importorskip("jsonargparse")
    recipe = ["--config", str(ROOT / "configs/quickstart.yaml"), *GPU]
    assert bench(["overhead", *recipe, "--epochs", "3"]) == 0
    (ratio,) = re.findall(r"^ratio +([\d.]+)", capfd.readouterr().out, re.M)
    record_property("measured", f"fit takes {ratio} x the bare steps of the quickstart")


@pytest.mark.parametrize("command", ["topk", "polar", "step"])
def test_bench(command, tmp_path, capsys, record_property):
    start = time.perf_counter()
    args = [command, "--quick", "--device", "cuda", "--longest", "5"]
    assert bench([*args, "--json", str(tmp_path / "out.json")]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
    record_property("measured", f"{time.perf_counter() - start:.1f} s")


@pytest.mark.parametrize("window", [None, 2])
def test_flex_attention(window, record_property):
    length = 8 * 128
    tokens = torch.randint(0, 50, (2, length), device="cuda")
    tokens[:, 0] = tokens[0, 300] = 0
    document = gpt.documents(tokens, 0)
    limit = None if window is None else torch.tensor(window, device="cuda")
    q, k, v = torch.randn(3, 2, 2, length, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for mask in (gpt.block_mask(document, limit), gpt.dense_mask(document, limit)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = gpt.attend(*inputs, mask, 0.12)
        out.float().square().sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
    record_property("measured", f"flex and dense up to {apart:.2g} apart")
    assert apart < 0.03


def test_compiled_gpt_agrees_with_the_cpu(record_property):
    """Compare losses and gradients, with FlexAttention on the GPU and dense masks on the CPU."""
    config = dataclasses.replace(
        gpt.GPTConfig.speedrun(), vocab_size=64, width=64, heads=2, mlp_width=128, bos=0,
        window=300, embedding_dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    network = gpt.GPT(config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.05, 0.2)
    tokens = torch.randint(0, 64, (2, 5 * 128))
    results = []
    for device in ("cpu", DEVICE):
        each = copy.deepcopy(network).to(device)
        if device == DEVICE:
            each.compile()
        given = tokens.to(device)
        losses = each(given, given.roll(-1, 1), each.windows(0.7))
        losses.sum().backward()
        grads = [p.grad.cpu() for p in each.parameters()]
        results.append([losses.detach().cpu(), *grads])
    apart = max(float((a - b).norm() / (b.norm() + 1e-6)) for b, a in zip(*results, strict=True))
    record_property("measured", f"losses and gradients up to {apart:.2g} apart")
    assert apart < 0.02


@pytest.mark.parametrize("preset", ["track3", "speedrun"])
def test_nanogpt(preset, checkout, tmp_path, capfd, record_property):
    """Train at full size for three steps, on random bytes, which need no tokenizer."""
    rng = np.random.default_rng(0)
    for name in ("fineweb_train_000001", "fineweb_val_000000"):
        noise = rng.integers(0, 256, 700_000).astype(np.uint16)
        noise[::1000] = 256
        write_shard(tmp_path / f"{name}.bin", noise)
    options = {
        "data.data_dir": tmp_path, "data.tokenizer": "bytes", "data.shards": 1,
        "model.network.bos": 256, "trainer.max_steps": 3, "data.val_every_n_steps": 3,
    }  # fmt: skip
    given = [f"--{key}={value}" for key, value in options.items()]
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    recipe = ROOT / f"configs/nanogpt/{preset}_muon.yaml"
    assert lightning_cli(["fit", "--config", str(recipe), *GPU, *given]) == 0
    seconds = time.perf_counter() - start
    memory = torch.cuda.max_memory_allocated() / 2**30
    (loss,) = re.findall(r"val/loss=([\d.]+)", capfd.readouterr().out)[-1:]
    record_property("measured", f"loss {loss}, {memory:.0f} GiB, {seconds:.0f} s with compiling")
    assert float(loss) < 10


@pytest.mark.filterwarnings("ignore:SpectralMonitor has no logger")
def test_monitor_agrees_with_the_cpu_and_changes_no_weights(tmp_path, record_property):
    metrics, weights = [], []
    for accelerator, callbacks in (("cpu", True), ("gpu", True), ("gpu", False)):
        monitors = [SpectralMonitor(1)] if callbacks else []
        options = {"accelerator": accelerator, "devices": 1, "max_steps": 1}
        run = fit(tmp_path, Net({"matrix": {"polar": "exact"}}), *monitors, **options)
        metrics.append({k: float(v) for k, v in run.callback_metrics.items() if "/" in k})
        weights.append([p.detach().cpu() for p in run.lightning_module.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*weights[1:], strict=True))
    shown = [key for key in metrics[0] if "momentum_quantile" not in key]
    apart = max(abs(metrics[1][key] - metrics[0][key]) / (abs(metrics[0][key]) + 1e-6)
                for key in shown)  # fmt: skip
    record_property("measured", f"{len(shown)} values, CPU and GPU {apart:.2g} apart")
    assert apart < 0.05
