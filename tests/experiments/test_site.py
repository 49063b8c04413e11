"""Pages of the site that are made from the tables and from the checkout."""

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs")

from experiments import site
from lit_fanions.optim.algorithms import ALGORITHMS


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_page_with_its_use_and_source(name):
    page = site.algorithm_page(name)
    use, source = site.TEXTS[name]
    assert use and source
    assert use in page and f"| source | {source} |" in page


def test_texts_name_no_algorithm_that_does_not_exist():
    assert site.TEXTS.keys() == ALGORITHMS.keys()


def test_algorithm_without_a_text_is_refused(monkeypatch):
    monkeypatch.delitem(site.TEXTS, "muon")
    with pytest.raises(ValueError, match="no entry for the algorithm 'muon'"):
        site.algorithm_page("muon")


def test_length_and_cost_follow_from_the_table():
    assert f"| ‖D‖_F of a 768 × 3072 matrix | {768**0.5:.4g} |" in site.algorithm_page("muon")
    assert "none, entries only" in site.algorithm_page("nsgd")
    assert "depends on the matrix" in site.algorithm_page("kyfan")


def test_navigation_has_every_page():
    navigation = (site.ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    pages = [page.relative_to(site.ROOT / "docs") for page in (site.ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if not re.search(rf"[ \[]{page}", navigation)] == []


def test_llms_text_has_every_page_with_a_sentence():
    text = site.llms_text("lit_fanions", "a test")
    assert text.startswith("# lit_fanions\n\n> a test\n")
    pages = [path.relative_to(site.ROOT / "docs") for path in (site.ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f"]({page.with_suffix('').as_posix()}/)" not in text] == []
    assert "- [muon: spectral](algorithms/muon/): The default for the matrices" in text
    assert max(map(len, text.splitlines())) < 500


@pytest.mark.parametrize(
    ("page", "given", "expected"),
    [
        ("index.md", "[a](docs/faq.md#b)", "[a](faq.md#b)"),
        ("index.md", "[c](CHANGELOG.md) [l](LICENSE)", "[c](changelog.md) `l`"),
        ("faq.md", "[r](../README.md#use-it)", "[r](index.md#use-it)"),
        ("integrations.md", "[f.py](../examples/f.py)", "`f.py`"),
        ("faq.md", "```python runnable\n", "```python\n"),
    ],
)
def test_links_into_the_checkout_become_links_of_the_site(page, given, expected):
    file = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert site.on_page_markdown(given, file) == expected
