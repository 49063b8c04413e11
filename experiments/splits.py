"""Report how ``split_parameters`` treats every model family of a library.

``python -m experiments.splits --library timm`` builds one model of each family, with two layers
and without memory for its weights where the library allows that, and prints its output heads and
each decision that is a guess. The libraries are not dependencies of this project: install the one
that is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lit_fanions.optim.parameters import Assignment, assign
from lit_fanions.optim.usage import DOUBTFUL
from lit_fanions.progress import Meter

_TIMEOUT = 60  # seconds for a model

Models = Iterator[tuple[str, Callable[[], nn.Module]]]


def timm_models() -> Models:
    """Yield the first model of every family of timm."""
    timm = importlib.import_module("timm")
    for family in timm.list_modules():
        for name in timm.list_models(module=family)[:1]:
            yield f"{family}: {name}", functools.partial(timm.create_model, name)


def torchvision_models() -> Models:
    """Yield every model of torchvision."""
    models = importlib.import_module("torchvision.models")
    for name in models.list_models():

        def build(name: str = name) -> nn.Module:
            try:
                return models.get_model(name, weights=None, weights_backbone=None)
            except TypeError:  # no backbone
                return models.get_model(name, weights=None)

        yield name, build


# Classes of transformers with a head, and plain ones.
_AUTO = (
    "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "PRETRAINING",
    "IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION", "AUDIO_CLASSIFICATION",
    "CTC", "IMAGE_TEXT_TO_TEXT", "MULTIPLE_CHOICE",
)  # fmt: skip
_REFUSALS = (AttributeError, TypeError, ValueError, IndexError)
_DEPTHS = re.compile(r"^(num|n|encoder|decoder)_?(hidden_|encoder_|decoder_)?(layers?|blocks)$")


def transformers_models() -> Models:
    """Yield the classes of every model type of transformers, at most two layers deep."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    seen = set()
    for kind in _AUTO:
        mapping = getattr(auto, f"MODEL_FOR_{kind}_MAPPING")
        for config in mapping:
            classes = mapping[config]
            cls = classes[0] if isinstance(classes, (tuple, list)) else classes
            if cls not in seen:
                seen.add(cls)
                yield cls.__name__, functools.partial(_build, cls, config)


def _build(cls: Any, config: Any) -> nn.Module:
    """Return a model of transformers with two layers, or with all of them where two are refused."""
    if torch.empty(()).is_meta:  # elsewhere, a whole model may not fit into memory
        with contextlib.suppress(*_REFUSALS):
            return cls(_shallow(config()))
        with contextlib.suppress(*_REFUSALS):
            return cls(config())
        with contextlib.suppress(*_REFUSALS):
            return cls(_shallow(config().get_text_config()))
    return cls(_shallow(config()))


def _shallow(config: Any) -> Any:
    """Return a configuration of transformers with two layers, in its parts too."""
    for name, value in list(vars(config).items()):
        if _DEPTHS.match(name) and isinstance(value, int) and value > 2:
            with contextlib.suppress(Exception):
                setattr(config, name, 2)
        elif name == "layer_types" and isinstance(value, list):
            setattr(config, name, value[:2])
        elif name.endswith("_config") and hasattr(value, "to_dict"):
            _shallow(value)
    return config


def peft_models() -> Models:
    """Yield a small Llama with every kind of adapter of peft."""
    peft = importlib.import_module("peft")
    transformers = importlib.import_module("transformers")
    sizes = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    extra = {
        "PREFIX_TUNING": {"num_virtual_tokens": 4}, "P_TUNING": {"num_virtual_tokens": 4},
        "PROMPT_TUNING": {"num_virtual_tokens": 4}, "ADALORA": {"total_step": 10},
    }  # fmt: skip
    for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():

        def build(kind: Any = kind, config: Any = config) -> nn.Module:
            base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
            options = {"task_type": "CAUSAL_LM", **extra.get(kind.value, {})}
            with contextlib.suppress(Exception):
                return peft.get_peft_model(
                    base, config(**options, target_modules=["q_proj", "down_proj"])
                )
            return peft.get_peft_model(base, config(**options))

        yield kind.value, build


LIBRARIES = {
    "timm": timm_models,
    "torchvision": torchvision_models,
    "transformers": transformers_models,
    "peft": peft_models,
}


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def describe(assignments: list[Assignment], verbose: bool = False) -> list[str]:
    """Return a line for each head and each guess; repeated blocks share one.

    Args:
        assignments: The split of a model.
        verbose: Also show what is decided by the name or the shape of a parameter.
    """
    lines: dict[str, None] = {}
    for a in assignments:
        guess = a.reason.startswith(DOUBTFUL)
        by_kind = a.reason.startswith(("weight of", "gain of", "depthwise", "q, k, v")) or (
            a.reason in ("0-D", "1-D") or a.reason.endswith("is a vector")
        )
        if guess or a.role == "head" or (verbose and not by_kind):
            name = re.sub(r"(?<![^.])\d+(?![^.])", "*", a.name)
            shape = "x".join(map(str, a.parameter.shape))
            lines[f"  {a.group:9}  {name}  {shape}  {a.reason}"] = None
    return list(lines)


def split_of(build: Callable[[], nn.Module]) -> list[Assignment]:
    """Return the split of a model, built without memory for its weights where that works."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                module = build()
        except (TimeoutError, KeyboardInterrupt):
            raise
        except Exception:  # some models compute with their weights while they are made
            module = build()
        return assign(module)


def report(models: Models, match: str = "", verbose: bool = False) -> int:
    """Print the split of each model, and return the number of guesses.

    Args:
        models: Names and functions that build them.
        match: Pattern that the names must contain.
        verbose: As in ``describe``.
    """
    guesses = failed = count = 0
    chosen = [(name, build) for name, build in models if re.search(match, name)]
    meter = Meter("splitting models", len(chosen))
    for name, build in chosen:
        count += 1
        meter.advance()
        try:
            with _time_limit(_TIMEOUT):
                lines = describe(split_of(build), verbose)
        except Exception as error:
            failed += 1
            print(f"{name}: not built: {type(error).__name__}: {str(error).splitlines()[:1]}")
            continue
        guesses += sum(DOUBTFUL in line for line in lines)
        print(name, *lines, sep="\n", flush=True)
    print(f"{count} models, {failed} not built, {guesses} guesses")
    return guesses


def main() -> None:
    """Run the report for the libraries of the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.splits", description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, help="default: all of them")
    parser.add_argument("--match", default="", help="only models whose name contains this pattern")
    parser.add_argument("--verbose", action="store_true", help="also decisions by name or shape")
    options = parser.parse_args()
    for library in [options.library] if options.library else LIBRARIES:
        print(f"# {library}")
        report(LIBRARIES[library](), options.match, options.verbose)


if __name__ == "__main__":
    main()
