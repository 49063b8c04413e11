"""README and docs: length, links, commands, code, and pages that follow from the code."""

import dataclasses
import importlib
import re
import shlex
import typing
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lit_fanions
from experiments import reference
from lit_fanions import FanionConfig, ScheduleConfig, lmo
from lit_fanions.cli import catalogue
from lit_fanions.cli.app import Reader
from lit_fanions.cli.console import FIT_OPTIONS
from lit_fanions.optim.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}

# What a reader replaces by something of their own, as in LOGDIR, CONFIG.yaml and logs/NAME.
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}[A-Z_]*\b")
SUBCOMMANDS = ("fit", "validate", "test", "predict", "params")


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page; the language may have a mark behind it."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE)


def every_block(language: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{page}-{number}")
        for page in TEXTS
        for number, block in enumerate(blocks(page, language))
    ]


def commands() -> list[str]:
    """Return every `python -m ...` of the pages, once, without placeholders in brackets."""
    found: dict[str, None] = {}
    for page, text in TEXTS.items():
        if page == "CHANGELOG.md":  # it names commands of earlier versions
            continue
        scripts = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
        for line in (*scripts, *inline):
            call = re.search(r"python -m .*", line)
            if call and "{" not in call.group():
                found.setdefault(shlex.join(shlex.split(call.group(), comments=True)[2:]))
    return list(found)


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(text) for text in re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)}


def test_readme_fits_on_a_page():
    assert len(TEXTS["README.md"].splitlines()) <= 170


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_exist(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[page])
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = folder / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_image_is_used():
    used = {
        Path(link).name
        for text in TEXTS.values()
        for link in re.findall(r"!\[.*?\]\((.*?)\)", text)
    }
    assert used == {path.name for path in IMAGES.iterdir()}


@pytest.mark.parametrize("block", every_block(r"python(?: runnable)?"))
def test_python_compiles(block):
    compile(block, "block", "exec")


@pytest.mark.parametrize("block", every_block("python runnable"))
def test_runnable_python_runs(block, capsys):
    torch.manual_seed(0)
    exec(compile(block, "block", "exec"), {"__name__": "example"})


def reader_names(page: str) -> dict[str, Any]:
    """Return what a reader of a page has before its fragments of code."""
    network = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(2)))
    names: dict[str, Any] = {"torch": torch, "Fanion": lit_fanions.Fanion, "network": network}
    names |= {"configure_optimizers": lit_fanions.configure_optimizers, "self": network}
    if page == "docs/configuration.md":
        names |= {"model": network, "schedule": unittest.mock.Mock()}
        old = lit_fanions.Fanion(network.named_parameters())
        torch.save({"optimizer": old.state_dict()}, "old.pt")
    if page == "docs/integrations.md":
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        names |= {"model": network, "arguments": transformers.TrainingArguments(use_cpu=True)}
    return {**names, "params": [torch.nn.Parameter(torch.ones(4, 3))]}


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page}-{number}")
        for page in TEXTS
        # tests/test_extending.py runs that page as a whole; a CUDA graph needs a GPU.
        if page not in ("docs/extending.md", "docs/gpu/README.md")
        for number, block in enumerate(blocks(page, "python"))
    ],
)
def test_fragment_runs_with_what_a_reader_has(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), reader_names(page))


def test_every_block_has_a_language_that_a_test_knows():
    """Blocks without a test: text shows what is printed, and none of bash is looked at."""
    found = {
        (page, mark)
        for page, text in TEXTS.items()
        for mark in re.findall(r"^```(\S.*)$", text, re.MULTILINE)
    }
    known = ("python", "python runnable", "sh", "yaml", "text")
    assert [each for each in sorted(found) if each[1] not in known] == []


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {
        (page, word)
        for page in TEXTS
        for line in "\n".join(blocks(page, "sh")).splitlines()
        if line.startswith("make ")
        for word in line.partition("#")[0].split()[1:]
        if "=" not in word
    }
    assert [each for each in sorted(used) if each[1] not in targets] == []
    assert len(used) > 5


@pytest.mark.parametrize("block", every_block("yaml"))
def test_yaml_names_classes_and_options_that_exist(block):
    config = yaml.safe_load(block)
    assert isinstance(config, dict)
    for node in mappings(config):
        if "class_path" in node:
            module, _, name = node["class_path"].rpartition(".")
            assert hasattr(importlib.import_module(module), name)
        if "optimizer" in node:
            FanionConfig.from_dict(node["optimizer"])


def mappings(node: Any) -> Iterator[dict[str, Any]]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict):
        yield node
    for child in children:
        yield from mappings(child)


@pytest.mark.parametrize("command", commands())
def test_command_exists(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    module, *args = shlex.split(command)
    if module == "lit_fanions":
        check_lightning_command(args)
        return
    if module == "pytest":
        assert [arg for arg in args if not (ROOT / arg).exists()] == []
        return
    check_config_files(args)
    names = args[0].split("|") if args and re.fullmatch(r"[a-z_|]+", args[0]) else [""]
    # Those of "--config" are of fit; so are options with a dot, and what stands in FIT_OPTIONS.
    options = [a.partition("=")[0] for a in args if a.startswith("--") and "." not in a]
    for name in names:
        text = help_text(module, [name] if name else [], capsys)
        known = {*FIT_OPTIONS, *re.findall(r"--[\w-]+", text)}
        unknown = [one for one in options if one not in known]
        assert unknown == []


def check_config_files(args: list[str]) -> list[str]:
    """Check the recipes that a command names, and return their patterns."""
    after = args[args.index("--config") + 1 :] if "--config" in args else []
    files = [arg for arg in after if arg.endswith(".yaml")]
    for file in files:
        assert PLACEHOLDER.search(file) or list(ROOT.glob(file)), file
    return files


def help_text(module: str, args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command prints for --help; it must have the subcommand."""
    package = importlib.import_module(module)
    main = getattr(package, "main", None) or importlib.import_module(f"{module}.__main__").main
    if module == "experiments.reference":  # it has no options
        return ""
    with pytest.raises(SystemExit) as stop:
        main([*args, "--help"])
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def check_lightning_command(args: list[str]) -> None:
    """Read the arguments of a fit or an evaluation as the command would, and go no further."""
    if args[:1] in ([], ["report"], ["compare"], ["export"]):
        return
    if args[0] == "list":
        assert catalogue.main(["presets"]) == 0
        return
    assert args[0] in SUBCOMMANDS
    files = check_config_files(args)
    if any(PLACEHOLDER.search(file) for file in files) or "--model.help" in args:
        return
    plain = list(args)
    for option in ("--ckpt_path", "--model.init_from"):  # files that a reader has
        if option in plain:
            at = plain.index(option)
            del plain[at : at + 2]
    if args[0] in ("validate", "test", "predict"):
        plain.append("--allow_untrained")
    if "--print_config" in plain:
        with pytest.raises(SystemExit) as stop:
            Reader(plain)
        assert stop.value.code in (0, None)
    else:
        Reader(plain)


def test_reference_page_is_current():
    assert reference.PAGE.read_text() == reference.render(), "run python -m experiments.reference"


@pytest.mark.parametrize("field", ["summary", "direction"])
def test_ball_without_text_is_refused(field, monkeypatch):
    bare = dataclasses.replace(lmo.BALLS["row"], **{field: ""})
    monkeypatch.setitem(lmo.BALLS, "row", bare)
    with pytest.raises(ValueError, match="'row' has no text"):
        reference.render()


def test_option_without_text_is_refused(monkeypatch):
    field = reference.FIELDS[0]
    monkeypatch.setattr(field, "metadata", {**field.metadata, "help": ""})
    with pytest.raises(ValueError, match="'algorithm' has no text"):
        reference.render()


@pytest.mark.parametrize("texts", ["ADAPT_TEXTS", "SCALE_TEXTS", "SOLVER_TEXTS"])
def test_choice_without_text_is_refused(texts, monkeypatch):
    name = next(iter(getattr(reference, texts)))
    monkeypatch.delitem(getattr(reference, texts), name)
    with pytest.raises(ValueError, match=f"{name!r} has no text"):
        reference.render()


def test_page_follows_the_tables(monkeypatch):
    monkeypatch.setitem(reference.SCALES, "new_rule", lambda rows, cols, length: 1.0)
    monkeypatch.setitem(reference.SCALE_TEXTS, "new_rule", ("1", "a test"))
    assert "| `new_rule` | 1 | a test |" in reference.render()


def test_readme_names_algorithms_that_exist():
    table = TEXTS["README.md"].partition("| --- | --- | --- |")[2].partition("\n\n")[0]
    named = [
        name
        for row in table.splitlines()
        for name in re.findall(r"`(\w+)`", row[: row.find("|", 1)])
    ]
    assert len(named) > 10
    assert [name for name in named if name not in (*ALGORITHMS, "rank")] == []


@pytest.mark.parametrize("package", [lit_fanions, lmo])
def test_api_pages_have_every_public_name_and_each_has_a_docstring(package):
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    for name in package.__all__:
        public = getattr(package, name)
        # Tables and aliases of types have comments.
        if callable(public) and typing.get_origin(public) is None:
            assert re.search(rf"[\[ .]{name}\b", pages), name
            assert public.__doc__, name


def test_configuration_names_every_option_of_a_schedule():
    names = [field.name for field in dataclasses.fields(ScheduleConfig)]
    assert [name for name in names if f"| `{name}` |" not in TEXTS["docs/configuration.md"]] == []


def test_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lit_fanions.__version__
    assert citation["license"] == "Apache-2.0"
    assert len(citation["preferred-citation"]["authors"]) == 6


def test_licence_is_the_whole_of_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
