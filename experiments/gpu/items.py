"""The items of a GPU run and the line that each one's results make in the table."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from experiments.gpu.schedule import Item
from lit_fanions.cli import console

AIRBENCH = ("configs/airbench/muon.yaml", "configs/airbench/f_muon.yaml")
TRACK3 = "configs/nanogpt/track3_muon.yaml"
_ON_GPU = "--trainer.accelerator=gpu"


def full_items(out: Path, cifar10: Path) -> list[Item]:
    """Return the items of a run on a GPU, the most valuable first.

    Args:
        out: Folder for their results.
        cifar10: Folder of CIFAR-10; without it the items that train on it are left out.
    """

    def bench(name: str, *args: str, most: float, least: float = 15) -> Item:
        given = "-m", "experiments.bench", name, *args, f"--json={out / name}.json"
        return Item(name, given, most, least)

    def airbench(name: str, *args: str, most: float) -> Item:
        given = "-m", "experiments.gpu.seeds", f"--json={out / name}.jsonl", *args
        recipes = "--config", *AIRBENCH, f"--data.data_dir={cifar10}", _ON_GPU
        return Item(name, (*given, *recipes), most, least=20)

    track3 = "-m", "experiments.gpu.throughput", f"--config={TRACK3}", _ON_GPU
    checks = "tests/gpu_check.py", "-k", "not nanogpt", f"--junit-xml={out / 'checks.xml'}"
    race = "--device=cuda", "--longest=2"
    loop = f"--config={AIRBENCH[1]}", f"--data.data_dir={cifar10}", _ON_GPU, "--epochs=4"
    items = [
        Item("machine", ("-m", "experiments.gpu.machine", f"--json={out / 'machine.json'}"), 40, 5),
        # Fills the compiler's cache while the checks run.
        Item("compile", (*track3, "--steps=1"), 150, 60, background=True),
        Item("checks", checks, 170, 30, alone=False),
        bench("step", *race, "--repeats=20", most=60),
        airbench("airbench_time", "--seeds=3", most=60),
        Item("nanogpt", (*track3, f"--json={out / 'nanogpt.json'}"), 100, 30),
        bench("polar", *race, most=45),
        bench("topk", *race, "--budget=4", "--seeds=2", most=80, least=30),
        bench("overhead", *loop, most=40, least=20),
        airbench("airbench", "--seeds=40", "--first=3", "--jobs=4", most=math.inf),
    ]
    needs_images = "airbench_time", "overhead", "airbench"
    return [item for item in items if cifar10.is_dir() or item.name not in needs_images]


def quick_items(out: Path) -> list[Item]:
    """Return the same items in a tiny form for a CPU, to see that all of them work.

    Args:
        out: Folder for their results.
    """
    small = "--trainer.accelerator=cpu", "--trainer.precision=32-true"
    images = "--model.widths=[2,2,2]", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"
    digits = "--config=configs/quickstart.yaml", *small, *images
    text = (
        *("--model.network.layers=1", "--model.network.width=8", "--model.network.heads=1"),
        *("--model.network.mlp_width=16", "--model.network.context_length=16"),
        *("--data.sequence_length=16", "--data.batch_tokens=64", "--data.val_tokens=64"),
    )
    gpt = "--config=configs/nanogpt/muon_cpu.yaml", *small, *text, "--steps=4", "--tokens=5000"
    commands: dict[str, tuple[str, ...]] = {
        "machine": ("experiments.gpu.machine", "--quick", "--device=cpu"),
        "step": ("experiments.bench", "step", "--quick", "--device=cpu", "--repeats=1"),
        "airbench": ("experiments.gpu.seeds", *digits, "--seeds=2"),
        "nanogpt": ("experiments.gpu.throughput", *gpt),
        "polar": ("experiments.bench", "polar", "--quick", "--device=cpu", "--repeats=1"),
        "topk": (
            "experiments.bench",
            "topk",
            "--quick",
            "--device=cpu",
            "--cases=gaussian",
            "--k=2",
        ),
        "overhead": ("experiments.bench", "overhead", *digits, "--epochs=1"),
    }
    items = [Item("checks", ("tests/gpu_check.py",), 60, 1)]
    for name, command in commands.items():
        suffix = "jsonl" if name == "airbench" else "json"
        given = "-m", *command, f"--json={out / name}.{suffix}"
        items.append(Item(name, given, 120, 1))
    return items


def summary(name: str, out: Path) -> str:
    """Return the results of an item in one line; empty if it has saved none.

    Args:
        name: Name of the item.
        out: Folder of the results.
    """
    for suffix, read in ((".json", _read_json), (".jsonl", _read_lines), (".xml", _read_checks)):
        path = out / f"{name}{suffix}"
        if path.is_file() and name in SUMMARIES:
            return SUMMARIES[name](read(path))
    return ""


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _read_lines(path: Path) -> Any:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _read_checks(path: Path) -> Any:
    suites = ElementTree.parse(path).getroot().iter("testsuite")
    return {key: value for suite in suites for key, value in suite.attrib.items()}


def _machine(found: Mapping[str, Any]) -> str:
    rate = max(found["bf16_TFLOP_s"].values())
    return (
        f"{found['copy_GB_s']:.4g} GB/s, {rate:.4g} TFLOP/s in bf16, "
        f"{found['launch_us']:.3g} us a launch"
    )


def _checks(found: Mapping[str, str]) -> str:
    return ", ".join(f"{found[key]} {key}" for key in ("tests", "failures", "errors", "skipped"))


def _step(found: Mapping[str, Any]) -> str:
    shown = ("torch.optim.Muon", "muon", "fanion, rank 8", "fanion, rank 32")
    seconds = {each["optimizer"]: each["median_seconds"] for each in found["results"]}
    times = [f"{name} {1e3 * seconds[name]:.3g} ms" for name in shown if name in seconds]
    triton = [
        f"{name} x{seconds[name] / seconds[name.removesuffix(', triton')]:.3g} plain"
        for name in seconds
        if name.endswith(", triton")
    ]
    return "; ".join([*times, *triton])


def _polar(found: Mapping[str, Any]) -> str:
    return "auto: " + "; ".join(
        f"{'x'.join(map(str, each['shape']))} {1e3 * each['median_seconds']:.3g} ms "
        f"(x{each['ratio_to_torch']:.2g} torch)"
        for each in found["results"]
        if each["method"] == "auto" and each["batch"] == 1
    )


def _topk(found: Mapping[str, Any]) -> str:
    fastest: dict[int, Mapping[str, Any]] = {}
    for each in (each for each in found["results"] if each["case"] == "gaussian"):
        best = fastest.get(each["k"])
        if each["reached"] and (best is None or each["median_seconds"] < best["median_seconds"]):
            fastest[each["k"]] = each
    return "; ".join(
        f"k = {k}: {each['solver']} {1e3 * each['median_seconds']:.3g} ms"
        for k, each in fastest.items()
    )


def _overhead(found: Mapping[str, Any]) -> str:
    return f"fit takes {found['ratio']:.3g} x the bare steps"


def _nanogpt(found: Mapping[str, Any]) -> str:
    utilization = found["model_flops_utilization"]
    share = f", MFU {utilization:.1%}" if utilization else ""
    memory = f", {found['peak_GiB']:.3g} GiB" if found["peak_GiB"] else ""
    return f"{found['recipe']}: {found['tokens_per_second']:.4g} tokens/s{share}{memory}"


def _airbench(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean and spread of each recipe, and the paired difference of two recipes."""
    accuracies: dict[str, dict[int, float]] = {}
    for run in runs:
        accuracies.setdefault(run["recipe"], {})[run["seed"]] = 100 * run["test/acc"]
    parts = []
    for recipe, found in accuracies.items():
        values = list(found.values())
        spread = f" +- {statistics.stdev(values):.3g}" if len(values) > 1 else ""
        own = [run["train_seconds"] for run in runs if run["recipe"] == recipe]
        seconds = f"{statistics.median(own):.3g} s"
        parts.append(
            f"{recipe}: {statistics.fmean(values):.2f}{spread} % of {len(values)}, {seconds}"
        )
    if len(accuracies) == 2:
        first, second = accuracies.values()
        pairs = [(second[seed], first[seed]) for seed in first if seed in second]
        parts.append(f"difference {_paired_interval(pairs)}")
    return "; ".join(parts)


def _paired_interval(pairs: Sequence[tuple[float, float]]) -> str:
    """Return the mean difference of pairs and its 95 % interval by Student's t."""
    mean = statistics.fmean(a - b for a, b in pairs) if pairs else math.nan
    if len(pairs) < 2:
        return f"{mean:+.3f}"
    try:
        stats: Any = console.require("scipy.stats", "its interval")
    except console.Refused as error:
        return f"{mean:+.3f} ({error})"
    interval = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval(0.95)
    return f"{mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


SUMMARIES: dict[str, Callable[[Any], str]] = {
    "machine": _machine,
    "checks": _checks,
    "step": _step,
    "polar": _polar,
    "topk": _topk,
    "overhead": _overhead,
    "nanogpt": _nanogpt,
    "airbench": _airbench,
    "airbench_time": _airbench,
}
