"""The page of verdicts: complete, in a fixed order, and made of the results alone."""

import json
import re
from pathlib import Path

import pytest

from experiments.paper import claims
from experiments.paper.__main__ import COMMANDS, main
from experiments.paper.claims import SECTIONS, read_results, render_page
from experiments.paper.execution import FINISHED
from experiments.paper.outcome import Claim, Outcome, judge
from experiments.paper.statements import STATEMENTS
from lit_fanions.cli import results


def save(folder, name, *found, arguments=()):
    Outcome([], ["x"], [], {}, claims=found, arguments=arguments).save(folder, name)


def claim(verdict="confirmed", **changes):
    facts = {"id": "neon-loss", "found": "1 ± 2", "data": "D", "n": 10, "rule": "R."}
    return Claim(verdict=verdict, **(facts | changes))


def rows(text):
    """Rows of the tables, by their first cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    cells = [[re.sub(r"\\([*_<|])", r"\1", cell).strip() for cell in row] for row in cells]
    return {row[0]: row for row in cells}


def test_statements_have_distinct_ids_and_a_section():
    assert len({s.id for s in STATEMENTS}) == len({s.text for s in STATEMENTS}) == len(STATEMENTS)
    assert all(SECTIONS[claims._section(s.place)] != "Elsewhere" for s in STATEMENTS)


def test_statements_name_a_command():
    assert {statement.command for statement in STATEMENTS} <= COMMANDS.keys()


def test_judge_fills_in_the_numbers_of_the_rule():
    claim = judge("airbench-equal", "confirmed", "0", "D", 3, margin=0.01)
    assert (
        claim.rule == "Confirmed if the 95 % interval is within ± 0.01; refuted if it is outside."
    )
    with pytest.raises(KeyError, match="margin"):
        judge("airbench-equal", "confirmed", "0", "D", 3)


def test_claims_without_a_verdict_are_not_run():
    text = render_page([])
    assert f": {len(STATEMENTS)} not run." in text
    for s in STATEMENTS:
        command = f"`python -m experiments.paper {s.command}`"
        assert rows(text)[s.text][1:] == [s.place, "not run", "", "", "", "", command]


def test_verdict_and_rule_have_columns_of_their_own(tmp_path):
    neon = next(s for s in STATEMENTS if s.id == "neon-loss")
    refuted = claim("refuted", rule="a | b\nc", remark="Also.")
    arguments = ["ls", "--out", "results/l s"]
    found = (refuted, claim(id=STATEMENTS[-1].id))
    save(tmp_path / "deep/er", "ls", *found, arguments=arguments)
    text = render_page(read_results(tmp_path))
    assert rows(text)[neon.text] == [
        *(neon.text, neon.place, "**refuted**", "a | b c", "1 ± 2. Also.", "D", "10"),
        "`python -m experiments.paper ls --out 'results/l s'`",
    ]
    assert rows(text)[STATEMENTS[-1].text][2:5] == ["**confirmed**", "R.", "1 ± 2"]
    assert f"{len(STATEMENTS) - 2} not run, 1 refuted" in text
    origin = rows(text)["`deep/er/ls.json`"]
    machine = json.loads((tmp_path / "deep/er/ls.json").read_text())["machine"]
    assert f"torch {machine['torch']}" in origin[3]
    assert str(tmp_path) not in text


def test_commits_of_the_runs_stand_beside_that_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "commit", lambda: "a" * 40)
    for i, commit in enumerate(("a" * 40, "b" * 40 + "-dirty", None)):
        (tmp_path / "runs" / str(i)).mkdir(parents=True)
        saved = {"args": [], "recipes": {}, "commit": commit}
        (tmp_path / "runs" / str(i) / FINISHED).write_text(json.dumps(saved))
    save(tmp_path, "ls", claim())
    expected = f"{'a' * 10}; runs: outside of git, {'b' * 10}-dirty"
    assert rows(render_page(read_results(tmp_path)))["`ls.json`"][1] == expected


def test_verdicts_of_several_commands_on_a_claim_stand_together(tmp_path):
    save(tmp_path, "b", claim("refuted", id="neon-loss", data="B"))
    save(tmp_path, "a", claim(id="neon-loss", data="A"))
    lines = render_page(read_results(tmp_path)).splitlines()
    about = [i for i, line in enumerate(lines) if line.startswith("| Neon converges worst")]
    assert [lines[i].split(" | ")[5] for i in about] == ["A", "B"]
    assert about[1] == about[0] + 1


def test_summary_counts_equal_verdicts_and_tells_different_ones_apart(tmp_path):
    for name in ("a", "b"):
        save(tmp_path, name, claim(id="neon-loss"), claim(id="trlan-faster", n=3))
    save(tmp_path, "c", claim("refuted", id="trlan-faster", n=5, found="other"))
    summary = [x for x in render_page(read_results(tmp_path)).splitlines() if x.startswith("- ")]
    n, found = claim().n, claim().found
    assert any(line.endswith(f"**confirmed** (n = {n}, 2 sets of data)") for line in summary)
    both = f"**confirmed** ({found}; n = 3), **confirmed** ({found}; n = 3)"
    assert any(line.endswith(f"{both}, **refuted** (other; n = 5)") for line in summary)


def test_page_does_not_depend_on_the_order_of_files(tmp_path):
    found = {"b": [claim(), claim(id="neon-gradient")], "a": [claim(id="lemmas")]}
    for folder, names in (("one", "ab"), ("two", "ba")):
        for name in names:
            save(tmp_path / folder, name, *found[name])
    one, two = (render_page(read_results(tmp_path / folder)) for folder in ("one", "two"))
    assert one == two


def test_json_files_of_other_kinds_are_ignored(tmp_path):
    (tmp_path / "result.json").write_text('{"args": []}')
    (tmp_path / "list.json").write_text("[1]")
    assert read_results(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a.json cannot be read"),
        ('{"command": "", "claims": [{"verdict": "x"}]}', "a.json cannot be read"),
    ],
)
def test_unreadable_result_is_named(text, message, tmp_path, capfd):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["claims", "--results", str(tmp_path), "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capfd.readouterr().err.splitlines()[-1]


def test_unknown_id_is_refused():
    with pytest.raises(ValueError, match="the paper has no claim with the id 'neon'"):
        claim(id="neon")


def test_missing_folder_is_named(tmp_path, capfd):
    with pytest.raises(SystemExit):
        main(["claims", "--results", str(tmp_path / "none")])
    assert "--results: there is no folder" in capfd.readouterr().err


def test_command_writes_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("results"), "a", claim(id="neon-loss"))
    assert main(["claims"]) == 0
    assert "**confirmed**" in Path("results/claims.md").read_text()
    assert main(["claims", "--out", "docs"]) == 0
    assert "**confirmed**" in Path("docs/claims.md").read_text()


def test_results_without_verdicts_overwrite_no_page(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    save(Path("results/quick"), "a")
    Path("results/claims.md").write_text("kept")
    with pytest.raises(SystemExit):
        main(["claims"])
    assert "no file below results has a verdict on a claim" in capfd.readouterr().err
    assert Path("results/claims.md").read_text() == "kept"


def test_page_in_docs_is_that_of_the_saved_results():
    docs = Path(__file__).parents[3] / "docs"
    assert render_page(read_results(docs / "results")) == (docs / "claims.md").read_text()
