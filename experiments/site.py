"""Pages of the site that do not stand in docs/: hooks of mkdocs, which mkdocs.yml names.

README.md becomes the first page and CHANGELOG.md the last, each algorithm of the table gets a page,
and llms.txt lists all pages with their first paragraphs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from experiments.reference import describe
from lit_fanions.optim.algorithms import ALGORITHMS, AlgorithmEntry, oracle
from lit_fanions.optim.options import default_options

ROOT = Path(__file__).parents[1]
SHAPE = (768, 3072)  # rows and columns of the matrix in the examples

# When to use the algorithm, and where it comes from.
TEXTS: dict[str, tuple[str, str]] = {
    "muon": (
        "The default for the matrices of transformers and convolutional networks.",
        "K. Jordan and others, Muon (2024)",
    ),
    "neon": (
        "For experiments with steps of rank 1; it trains networks worst of all here.",
        "Ky Fan Norms and Beyond, arXiv 2512.09678",
    ),
    "fanion": (
        "Where full rank costs too much: a fraction of Muon's time at a worse loss.",
        "Ky Fan Norms and Beyond, arXiv 2512.09678",
    ),
    "kyfan": (
        "For experiments: it steps like neon or like muon, whichever goes further.",
        "Ky Fan Norms and Beyond, arXiv 2512.09678",
    ),
    "nsgd": (
        "As a baseline: the direction of SGD with steps of one length.",
        "normalised SGD",
    ),
    "signum": (
        "For embeddings and heads in Scion's manner, or as a baseline near Adam.",
        "Bernstein and others, signSGD, arXiv 1802.04434",
    ),
    "coordinate": (
        "For experiments: one entry moves in each step (Gauss–Southwell).",
        "Ky Fan Norms and Beyond, Table 1",
    ),
    "row": (
        "For embeddings in Scion's manner: each row takes a step of length 1.",
        "Pethick and others, Scion, arXiv 2502.07529",
    ),
    "column": (
        "For first layers and embeddings in Scion's manner: each column takes a step of length 1.",
        "Pethick and others, Scion, arXiv 2502.07529",
    ),
    "f_muon": (
        "For the paper's blend: here equal to Muon on CIFAR-10 and behind it on NanoGPT.",
        "Ky Fan Norms and Beyond, arXiv 2512.09678",
    ),
    "f_neon": ("For experiments.", "Ky Fan Norms and Beyond, arXiv 2512.09678"),
    "f_fanion": ("For experiments.", "Ky Fan Norms and Beyond, arXiv 2512.09678"),
    "s_muon": (
        "For the final version's blend: on NanoGPT here between Muon and F-Muon.",
        "Ky Fan Norms and Beyond, arXiv 2512.09678",
    ),
    "s_neon": ("For experiments.", "Ky Fan Norms and Beyond, arXiv 2512.09678"),
    "s_fanion": ("For experiments.", "Ky Fan Norms and Beyond, arXiv 2512.09678"),
    "dion": (
        "To compare with Dion; fanion with error_feedback is its orthonormal relative.",
        "Ahn and others, Dion, arXiv 2504.05295",
    ),
    "cosmos": (
        "For experiments: Adam where the gradients are large, Muon or another ball in the rest.",
        "Liu and others, COSMOS, arXiv 2502.17410, version 3",
    ),
    "schatten": (
        "For experiments between neon (p = 1), nsgd (p = 2) and muon (p = ∞).",
        "the oracle of a Schatten ball",
    ),
    "adamw": (
        "For embeddings, heads, biases and gains.",
        "Loshchilov and Hutter, arXiv 1711.05101",
    ),
    "sgd": ("For parameters that SGD trained well before.", "torch.optim.SGD"),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of the algorithms to the navigation."""
    for entry in config.nav or []:
        if isinstance(entry, dict) and "Algorithms" in entry:
            entry["Algorithms"] += [f"algorithms/{name}.md" for name in ALGORITHMS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not stand in docs/."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        **{f"algorithms/{name}.md": algorithm_page(name) for name in ALGORITHMS},
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **others: Any) -> str:
    """Turn links into the checkout: to pages where they are some, to plain text elsewhere."""
    if page.file.src_uri in ("index.md", "changelog.md"):
        markdown = markdown.replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)")
    markdown = markdown.replace("```python runnable", "```python")  # a mark for the tests alone
    markdown = markdown.replace(" ± ", "\u00a0±\u00a0")  # a cell must not break there
    markdown = markdown.replace("](../README.md", "](index.md")
    markdown = markdown.replace("](../CHANGELOG.md", "](changelog.md")
    return re.sub(
        r"\[([^\]]+)\]\(((?:\.\./)+examples[^)]*|LICENSE|CITATION\.cff)\)", r"`\1`", markdown
    )


def on_post_build(config: MkDocsConfig) -> None:
    """Write llms.txt: every page with its title and its first sentence."""
    Path(config.site_dir, "llms.txt").write_text(
        llms_text(config.site_name, str(config.site_description)), encoding="utf-8"
    )


def llms_text(name: str, description: str) -> str:
    """Return the list of pages in the form of llms.txt."""
    found = sorted((ROOT / "docs").rglob("*.md"))
    pages = {path.relative_to(ROOT / "docs").as_posix(): path.read_text() for path in found}
    pages |= {f"algorithms/{algorithm}.md": algorithm_page(algorithm) for algorithm in ALGORITHMS}
    start = f"# {name}\n\n> {description}\n\n## Pages\n\n- [Start](index.html): "
    lines = [f"{start}what it is, installation, the first lines of code"]
    for where, text in pages.items():
        title, *paragraphs = re.split(r"\n\n+", text.strip())
        paragraph = next((text for text in paragraphs if not text.startswith("![")), "")
        plain = " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph).split())
        first = re.split(r"(?<=[.:]) (?=[A-Z])", plain)[0].rstrip(".:")
        is_text = not plain.startswith((":::", "|", "```"))
        line = f"- [{title.removeprefix('# ')}]({where.removesuffix('.md')}/)"
        lines.append(f"{line}: {first}" if is_text else line)
    return "\n".join(lines) + "\n"


def algorithm_page(name: str) -> str:
    """Return the page of an algorithm.

    Raises:
        ValueError: If the algorithm has no text.
    """
    if name not in TEXTS:
        raise ValueError(f"experiments/site.py: TEXTS has no entry for the algorithm {name!r}")
    use, source = TEXTS[name]
    entry = ALGORITHMS[name]
    summary, direction, _ = describe(name, entry)
    facts = [("direction of M = U Σ Vᵀ", direction), *_direction_facts(name, entry)]
    facts.append(("source", source))
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts)
    options = "\n".join(f"| `{key}` | {value} |" for key, value in default_options(name).items())
    title = f"{name}: {summary}" if summary else name
    return (
        f"# {title}\n\n{use}\n\n| quantity | value |\n| --- | --- |\n{rows}\n\n## Defaults\n\n"
        f"| option | default |\n| --- | --- |\n{options}\n\n"
        "What the options do: [algorithms and options](../algorithms.md#options-of-a-group).\n"
    )


def _direction_facts(name: str, entry: AlgorithmEntry) -> list[tuple[str, str]]:
    """Return the length of directions and their cost, for matrices of one shape."""
    if entry.kind != "matrix":
        return []
    found = oracle({**default_options(name), "algorithm": name}, *SHAPE)
    length = "depends on the matrix" if found.length is None else f"{found.length:.4g}"
    products = f"{found.flops / 1e9:.3g} GFLOP" if found.flops else "none, entries only"
    shape = f"{SHAPE[0]} × {SHAPE[1]}"
    return [
        (f"‖D‖_F of a {shape} matrix", length),
        (f"products for a {shape} matrix", products),
    ]
