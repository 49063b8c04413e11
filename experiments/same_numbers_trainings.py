"""Train small cases with the lit_fanions that is on the path, and save their weights.

``experiments.same_numbers`` runs this file in two checkouts of different age. It therefore imports
nothing of its own checkout, and uses only names that both have.
"""

import contextlib
import functools
import importlib
import json
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, Tensor]

# Options that change what a step computes, beside the defaults of every algorithm. "dtype" is the
# parameters'.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *(("muon", {"polar": polar}) for polar in ("jordan", "quintic", "polar_express", "cans")),
    *(("muon", {"polar": polar}) for polar in ("convergent", "exact")),
    *(("muon", {"scale": scale}) for scale in ("none", "match_rms_adamw", "spectral_unclamped")),
    ("muon", {"polar": "jordan", "polar_steps": 3}),
    ("muon", {"nesterov": False}),
    ("muon", {"nesterov": False, "momentum": 0.0}),
    ("muon", {"weight_decay": 0.1}),
    ("muon", {"renormalize": True}),
    ("muon", {"stack_entries": 500}),
    ("muon", {"nonfinite": "propagate"}),
    ("muon", {"dtype": "bfloat16"}),
    ("muon", {"dtype": "bfloat16", "momentum_dtype": "float32"}),
    ("muon", {"dtype": "float64"}),
    ("muon", {"momentum_dtype": "bfloat16"}),
    ("muon", {"rank": 4}),
    ("muon", {"alpha": 0.5, "blend": "sign", "sign_scale": 0.03}),
    *(("f_muon", {"alpha": alpha}) for alpha in (-0.2, 0.0, 0.3, 1.2)),
    ("f_muon", {"polar": "jordan", "polar_steps": 3, "scale": "none", "renormalize": True}),
    ("f_muon", {"dtype": "bfloat16"}),
    ("f_muon", {"scale": "match_rms_adamw"}),
    ("s_muon", {"alpha": 0.8, "sign_scale": 0.02}),
    *(("fanion", {"rank": 4, "solver": s}) for s in ("lanczos", "subspace", "randomized")),
    *(("fanion", {"rank": 4, "solver": s}) for s in ("power", "exact")),
    *(("fanion", {"rank": rank}) for rank in (1, 0.5, 1.0, "full", 100)),
    ("fanion", {"rank": 3, "solver": "subspace", "solver_steps": 3, "oversampling": 2}),
    ("fanion", {"rank": 3, "error_feedback": True}),
    ("fanion", {"rank": 3, "scale": "match_rms_adamw", "weight_decay": 0.1}),
    ("fanion", {"rank": 3, "solver": "subspace", "seed": 3, "stack_entries": 0}),
    ("fanion", {"rank": 3, "solver": "subspace", "dtype": "bfloat16"}),
    ("fanion", {"rank": 3, "dtype": "float64"}),
    ("neon", {"solver": "lanczos"}),
    ("neon", {"error_feedback": True, "solver": "subspace"}),
    ("f_neon", {"alpha": 0.9, "solver": "subspace"}),
    ("s_neon", {"sign_scale": 0.02, "nesterov": False}),
    ("f_fanion", {"rank": 3, "alpha": 0.7, "scale": "match_rms_adamw"}),
    ("s_fanion", {"rank": 3, "alpha": 0.7, "sign_scale": 0.02, "solver": "subspace"}),
    ("kyfan", {"rank": 4, "solver": "subspace"}),
    ("kyfan", {"rank": 2, "alpha": 0.5}),
    ("kyfan", {"rank": 4, "scale": "match_rms_adamw", "dtype": "bfloat16"}),
    ("dion", {"rank": 4}),
    ("dion", {"rank": 4, "alpha": 0.7, "scale": "match_rms_adamw"}),
    ("dion", {"error_feedback": False, "rank": 4, "dtype": "bfloat16"}),
    ("nsgd", {"scale": "match_rms_adamw", "renormalize": True}),
    ("signum", {"sign_scale": 0.02, "weight_decay": 0.1}),
    ("coordinate", {"alpha": 0.5}),
    ("adamw", {"weight_decay": 0.1, "momentum": 0.8, "beta2": 0.95, "eps": 1e-10}),
    ("adamw", {"dtype": "bfloat16"}),
    ("sgd", {"momentum": 0.85, "nesterov": True, "weight_decay": 0.1}),
    ("sgd", {"dtype": "float64", "momentum": 0.0}),
    ("sgd", {"dtype": "bfloat16", "momentum": 0.85, "nesterov": True}),
]
# Shapes of the parameters of each group, by the options that only this group has.
SHAPES: list[tuple[dict[str, Any], list[tuple[int, ...]]]] = [
    ({}, [(24, 16), (24, 16), (24, 16), (64, 48), (12, 40), (8, 4, 3, 3)]),
    ({"layout": "batch"}, [(3, 10, 14)]),
    ({"layout": "transposed"}, [(6, 10, 3)]),
    ({"splits": 3}, [(48, 16)]),
    ({"splits": [16, 40]}, [(56, 40)]),
]
# The algorithms that step any shape have these as well; the entrywise ones have no layouts.
VECTORS = [(16,), (40,)]
ENTRYWISE = ("adamw", "sgd")
ANY_SHAPE = ("nsgd", "signum", "coordinate", *ENTRYWISE)
NAN_STEP = 5

# Every recipe is trained through the command line, on data and networks made small by these.
AIRBENCH = "--model.widths=[8,16,16]", "--trainer.precision=32-true", "--data.batch_size=50"
CIFAR10 = (*AIRBENCH, "--model.whiten=200", "--data.data_dir={data}")
NANOGPT = (
    *("--model.network.layers=2", "--model.network.width=32", "--model.network.mlp_width=64"),
    *("--model.network.context_length=64", "--data.sequence_length=64", "--data.batch_tokens=512"),
    *("--data.micro_batch_size=4", "--data.val_tokens=512", "--trainer.precision=32-true"),
    "--model.sample_tokens=0",
)
SQUARES = "--model.rows=12", "--model.cols=12", "--data.rows=12", "--data.cols=12"
RECIPES: dict[str, tuple[str, ...]] = {
    "quickstart": AIRBENCH,
    "nanogpt/quickstart": (*NANOGPT, "--data.data_dir={data}/pydoc"),
    **{
        f"airbench/{name}": CIFAR10
        for name in ("muon", "f_muon", "s_muon", "fanion", "neon", "nsgd", "signum", "adamw")
    },
    **{
        f"nanogpt/{name}_cpu": (*NANOGPT, "--data.data_dir={data}")
        for name in ("muon", "f_muon", "f_neon", "fanion", "s_muon", "adamw")
    },
    **{f"least_squares/{name}": SQUARES for name in ("muon", "f_muon", "s_neon", "nsgd")},
    **{f"logistic_regression/{name}": () for name in ("muon", "f_neon")},
}


def algorithm_names() -> list[str]:
    """Return the names of all algorithms that the lit_fanions on the path has."""
    for room, table in (("algorithms", "ALGORITHMS"), ("fanion", "Algorithm")):  # 0.1.0: the latter
        with contextlib.suppress(ModuleNotFoundError):
            found = getattr(importlib.import_module(f"lit_fanions.optim.{room}"), table, None)
            if found is not None:
                return [str(name) for name in get_args(found) or found]
    raise RuntimeError("lit_fanions.optim has no ALGORITHMS: which names are there?")


def cases(data: Path, steps: int) -> dict[str, Callable[[], Weights]]:
    """Return what trains each case, by the case's name.

    Args:
        data: Folder for the data of recipes and their logs.
        steps: Number of optimizer steps.
    """
    names = algorithm_names()
    variants = [*((name, {}) for name in names), *(v for v in VARIANTS if v[0] in names)]
    trainings: dict[str, Callable[[], Weights]] = {}
    for algorithm, options in variants:
        chosen = "".join(f" {key}={value}" for key, value in options.items())
        trainings[f"algorithms/{algorithm}{chosen}"] = functools.partial(
            train_algorithm, algorithm, options, steps
        )
    for recipe, arguments in RECIPES.items():
        given = [argument.format(data=data) for argument in arguments]
        trainings[f"recipes/{recipe}"] = functools.partial(train_recipe, recipe, given, data, steps)
    return trainings


def train_algorithm(algorithm: str, options: dict[str, Any], steps: int) -> Weights:
    """Step parameters of many forms with a plain Fanion.

    The gradients are those of a quadratic function with noise, and one has a NaN in step 5.

    Args:
        algorithm: Name of the algorithm.
        options: Options of its groups; "dtype" is the parameters'.
        steps: Number of optimizer steps.

    Returns:
        The weights after the last step.

    Raises:
        RuntimeError: If a parameter was never stepped, which would be equal in all checkouts.
    """
    from lit_fanions import Fanion

    options = {"algorithm": algorithm, "lr": 0.02, **options}
    dtype = getattr(torch, options.pop("dtype", "float32"))
    generator = torch.Generator().manual_seed(0)
    shapes = [] if algorithm in ENTRYWISE else SHAPES
    if algorithm in ANY_SHAPE:
        shapes = [*shapes, ({}, [*VECTORS, (24, 16)])]
    parameters, targets, groups = {}, {}, []
    for i, (own, group_shapes) in enumerate(shapes):
        group: dict[str, Any] = {"name": f"group{i}", "params": [], **options, **own}
        for j, shape in enumerate(group_shapes):
            name = f"{i}.{j}"
            start = torch.randn(shape, generator=generator)
            parameters[name] = torch.nn.Parameter((0.1 * start).to(dtype))
            targets[name] = torch.randn(shape, generator=generator)
            group["params"].append((name, parameters[name]))
        groups.append(group)
    starts = {name: p.detach().clone() for name, p in parameters.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # alpha outside [0, 1], a rank that is clamped
        optimizer = Fanion(groups)
        for step in range(1, steps + 1):
            for name, p in parameters.items():
                noise = torch.randn(p.shape, generator=generator)
                p.grad = (p.detach().float() - targets[name] + 0.3 * noise).to(dtype)
            if step == NAN_STEP and options.get("nonfinite", "skip") == "skip":
                grad = next(iter(parameters.values())).grad
                assert grad is not None
                grad.view(-1)[3] = torch.nan
            optimizer.step()
    for name, p in parameters.items():
        if torch.equal(p, starts[name]) or not p.isfinite().all():
            raise RuntimeError(f"parameter {name} was not stepped, or is not finite")
    return {name: p.detach().clone() for name, p in parameters.items()}


def train_recipe(recipe: str, arguments: list[str], data: Path, steps: int) -> Weights:
    """Train a recipe of configs/ by ``python -m lit_fanions fit``, in this process.

    Args:
        recipe: Path of the recipe in configs/, without its suffix.
        arguments: Arguments that make it small.
        data: Folder of its data and logs.
        steps: Number of optimizer steps.

    Returns:
        The weights and buffers of the trained module.

    Raises:
        RuntimeError: If the command fails or takes another number of steps.
    """
    arguments = [
        *("fit", f"--config=configs/{recipe}.yaml", "--trainer.accelerator=cpu"),
        *(
            f"--trainer.max_steps={steps}",
            "--test_after_fit=false",
            "--trainer.limit_val_batches=1",
        ),
        *(f"--trainer.logger.init_args.save_dir={data / 'logs'}", *arguments),
    ]
    status: Any = 0
    with recorded_fit() as trained:
        before, sys.argv = sys.argv, ["lit_fanions", *arguments]
        try:
            runpy.run_module("lit_fanions", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
        finally:
            sys.argv = before
    if status or not trained:
        raise RuntimeError(f"fit ended with status {status}")
    (trainer,) = trained
    if trainer.global_step != steps:
        raise RuntimeError(f"fit took {trainer.global_step} steps instead of {steps}")
    return {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}


@contextlib.contextmanager
def recorded_fit() -> Iterator[list[Any]]:
    """Collect the Trainers whose ``fit`` has ended, whoever made them."""
    from lightning.pytorch import Trainer

    trained: list[Any] = []
    fit = Trainer.fit

    def fit_and_record(trainer: Any, *args: Any, **options: Any) -> None:
        fit(trainer, *args, **options)
        trained.append(trainer)

    with mock.patch.object(Trainer, "fit", fit_and_record):
        yield trained


def make_data(folder: Path) -> None:
    """Write random images in the form of CIFAR-10 and random text as shards of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 400), ("test", 50)):
        images = torch.from_numpy(random.integers(0, 256, (count, 32, 32, 3), np.uint8))
        labels = torch.from_numpy(random.integers(0, 10, count))
        classes = [str(label) for label in range(10)]
        torch.save({"images": images, "labels": labels, "classes": classes}, folder / f"{split}.pt")
    for split, count in (("train", 20_000), ("val", 2_000)):
        tokens = (97 + random.integers(0, 26, count)).astype("<u2")
        tokens[::200] = 256  # the start of a document
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count  # magic number, version, tokens
        shard = folder / f"bytes_{split}_000000.bin"
        shard.write_bytes(header.tobytes() + tokens.tobytes())


def main() -> None:
    """Train the chosen cases: CHECKOUT FOLDER STEPS PREFIXES, the last as a JSON list."""
    checkout, folder, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    prefixes = tuple(json.loads(sys.argv[4]))
    import lit_fanions

    if checkout.resolve() not in Path(lit_fanions.__file__).resolve().parents:
        raise RuntimeError(f"{lit_fanions.__file__} was imported, which is not in {checkout}")
    torch.set_num_threads(1)
    make_data(folder / "data")
    results: dict[str, Weights | str] = {}
    every = cases(folder / "data", steps).items()
    chosen = {name: train for name, train in every if name.startswith(prefixes)}
    for i, (name, train) in enumerate(chosen.items()):
        (folder / "share.txt").write_text(f"{i / len(chosen)}")
        try:
            results[name] = train()
        except Exception as error:
            traceback.print_exc()
            results[name] = f"{type(error).__name__}: {error}"
    torch.save(results, folder / "weights.pt")


if __name__ == "__main__":
    main()
