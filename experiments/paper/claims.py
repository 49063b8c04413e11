"""A verdict on every claim of the paper, from the results of the commands: claims.md.

Reads every JSON file below --results that a command saved. Claims that no command has judged yet
are listed too, as not run.

  python -m experiments.paper claims --results docs/results --out docs

docs/results keeps the files behind the page: copy NAME.json there after a command has run.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.paper.outcome import PROGRAM, Claim
from experiments.paper.statements import BY_ID, STATEMENTS, Statement
from lit_fanions.cli.console import Refused

NAME = "claims.md"
NOT_RUN = "not run"
# Sections of the article by their numbers, in the order of the page; its other versions come last.
SECTIONS = {
    "2": "2 and appendix D: norms and the updates they imply",
    "3": "3: the matrix side of updates",
    "4": "4: trust-region bounds",
    "5.1": "5.1: randomized linear least squares",
    "5.2": "5.2: CIFAR-10 airbench",
    "5.3": "5.3: NanoGPT",
    "6": "6: related work",
    "B": "Appendix B: duals of blends",
    "C": "Appendix C: the balls",
    "final": "The final version (arXiv 2512.09678 v2)",
    "draft": "The earlier draft",
    "": "Elsewhere",
}
# Ids of the claims that the page begins with.
SUMMARY = (
    "trlan-faster", "neon-loss", "f-muon-robust", "airbench-equal", "alpha-outside",
    "nanogpt-equal", "nanogpt-negative", "nanogpt-negative-blend", "final-match", "final-convex",
)  # fmt: skip
HEADINGS = ("claim", "where", "verdict", "rule", "result", "data", "n", "command")


class Result(NamedTuple):
    """What one command saved.

    Attributes:
        file: Path of the JSON file below the folder of results.
        contents: Contents of the file.
        claims: Its verdicts on claims of the paper.
    """

    file: str
    contents: Mapping[str, Any]
    claims: Sequence[Claim]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="folder with the outcomes of the commands, at any depth (default: results)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for claims.md (default: that of --results)"
    )


def run(options: argparse.Namespace) -> int:
    """Read the results and write the page.

    Args:
        options: See ``add_arguments``.

    Returns:
        The exit status, 0.

    Raises:
        Refused: If the folder does not exist, holds no verdict, or has a file that cannot be read.
    """
    if not options.results.is_dir():
        raise Refused(f"--results: there is no folder {options.results}")
    results = read_results(options.results)
    if not any(result.claims for result in results):
        raise Refused(
            f"--results: no file below {options.results} has a verdict on a claim: run commands "
            "without --quick, which proves nothing"
        )
    write_page(results, options.out or options.results)
    return 0


def write_page(results: Sequence[Result], out: Path) -> None:
    """Write claims.md.

    Args:
        results: What ``read_results`` returned.
        out: Folder of the page.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / NAME).write_text(render_page(results), encoding="utf-8")
    print(f"saved: {out / NAME}")


def read_results(folder: Path) -> list[Result]:
    """Return what commands saved below a folder, in the order of the files' names.

    Args:
        folder: The folder; JSON files of other kinds are ignored.

    Raises:
        Refused: If a file cannot be read, or has a claim of another form than ``Claim``.
    """
    results = []
    for path in sorted(folder.rglob("*.json")):
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(contents, dict) or not contents.keys() >= {"command", "claims"}:
                continue
            claims = [Claim(**claim) for claim in contents["claims"]]
        except (OSError, ValueError, TypeError) as error:
            raise Refused(
                f"{path} cannot be read ({error}): run its command again (finished trainings are "
                "not repeated), or delete it"
            ) from None
        results.append(Result(path.relative_to(folder).as_posix(), contents, claims))
    return results


def render_page(results: Sequence[Result]) -> str:
    """Return the page as Markdown.

    Args:
        results: What ``read_results`` returned.
    """
    judged = [(claim, result) for result in results for claim in result.claims]
    rows: dict[str, list[Sequence[object]]] = {section: [] for section in SECTIONS}
    for statement in STATEMENTS:
        own = [_row(statement, *pair) for pair in judged if pair[0].id == statement.id]
        rows[_section(statement.place)] += own or [_row_not_run(statement)]
    lines = [
        "# What the paper claims, and what was found here",
        "",
        f"Generated by `python -m {PROGRAM} claims`. Every verdict is computed by the rule beside "
        "it from the numbers of the command in the last column. "
        f"Verdicts, one for each set of data: {_count_verdicts(judged)}. n: number of independent "
        "repetitions.",
        "",
        "The ten that matter most, with what was found where verdicts differ:",
        "",
        *(_summarise(BY_ID[id], [c for c, _ in judged if c.id == id]) for id in SUMMARY),
    ]
    for section, title in SECTIONS.items():
        if rows[section]:
            lines += ["", f"## {title}", "", *_table(HEADINGS, rows[section])]
    if judged:
        origins = [_origin(result) for result in results if result.claims]
        lines += ["", "## Where the numbers come from", ""]
        lines += _table(["result", "commit", "processor", "versions"], origins)
    return "\n".join([*lines, ""])


def _count_verdicts(judged: Sequence[tuple[Claim, Result]]) -> str:
    counts = Counter[str](claim.verdict for claim, _ in judged)
    if not_run := len({statement.id for statement in STATEMENTS} - {c.id for c, _ in judged}):
        counts[NOT_RUN] = not_run
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))


def _summarise(statement: Statement, claims: Sequence[Claim]) -> str:
    counts = Counter((claim.verdict, claim.n) for claim in claims)
    if len({claim.verdict for claim in claims}) > 1:
        verdicts = [f"**{c.verdict}** ({_escape(c.found)}; n = {c.n})" for c in claims]
    else:
        verdicts = [
            f"**{verdict}** (n = {n}{f', {count} sets of data' if count > 1 else ''})"
            for (verdict, n), count in counts.items()
        ]
    found = ", ".join(verdicts or [NOT_RUN])
    return f"- {_escape(statement.text)} ({_escape(statement.place)}): {found}"


def _section(place: str) -> str:
    """Return the key in SECTIONS of a place such as "section 5.1, Figure 1"."""
    for version in ("final", "draft"):
        if version in place.casefold():
            return version
    match = re.search(r"(?:section|appendix)\s+([\dA-E][\d.]*)", place, re.IGNORECASE)
    number = match[1].upper().rstrip(".") if match else ""
    while number and number not in SECTIONS:
        number = number.rpartition(".")[0]
    return number


def _row(statement: Statement, claim: Claim, result: Result) -> Sequence[object]:
    found = f"{claim.found}. {claim.remark}" if claim.remark else claim.found
    return [
        _escape(statement.text),
        _escape(statement.place),
        f"**{claim.verdict}**",
        *map(_escape, (claim.rule, found, claim.data)),
        claim.n or "",
        _code(result.contents["command"]),
    ]


def _row_not_run(statement: Statement) -> Sequence[object]:
    command = _code(f"python -m {PROGRAM} {statement.command}")
    return [_escape(statement.text), _escape(statement.place), NOT_RUN, *[""] * 4, command]


def _origin(result: Result) -> Sequence[object]:
    """Return the cells that say with which commits, machine and versions a result was made."""
    machine = dict(result.contents.get("machine") or {})
    device = machine.get("gpu") or machine.get("processor") or ""
    versions = [
        f"{name} {machine[name]}" for name in ("python", "torch", "lightning") if name in machine
    ]
    own = result.contents.get("commit") or ""
    others = {*result.contents.get("commits of runs", ())} - {own}
    runs = ", ".join(map(_abbreviate, sorted(others)))
    commit = _abbreviate(own) + (f"; runs: {runs}" if runs else "")
    return [f"`{result.file}`", commit, device, ", ".join(versions)]


def _abbreviate(commit: str) -> str:
    """Return an abbreviated commit; the suffix "-dirty" of changed files is kept."""
    name, dash, suffix = commit.partition("-")
    return f"{name[:10]}{dash}{suffix}" if commit else "outside of git"


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _escape(text: str) -> str:
    """Return Markdown that shows the text as it is."""
    return re.sub(r"([\\`*_<|])", r"\\\1", " ".join(text.split()))
