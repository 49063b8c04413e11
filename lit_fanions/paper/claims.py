"""A verdict on every claim of the paper, from what the commands left: docs/claims.md.

Every JSON below --results that a command saved is read. What no command has looked at yet is listed
as well, as not run.

  python -m lit_fanions.paper claims --results results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_fanions.bench.report import Refused
from lit_fanions.paper.outcome import Claim

NAME = "claims.md"
NOT_RUN = "not run"
# As they are numbered in the article; the earlier draft's own claims come last.
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
    "draft": "The earlier draft",
    "": "Elsewhere",
}


class Statement(NamedTuple):
    """What the paper claims.

    Attributes:
        id: By which ``Claim.id`` refers to it.
        text: The claim.
        place: Where it stands; its first section counts.
    """

    id: str
    text: str
    place: str


# All that the paper says and that numbers can decide, in its order.
STATEMENTS = (
    Statement("lemmas", "The updates of Lemmas 1 to 6 attain the dual norms", "section 2"),
    Statement(
        "ky-fan-dual",
        "The dual of the Ky Fan k-norm is max(nuclear norm / k, spectral norm)",
        "section 2.8",
    ),
    Statement(
        "table-1",
        "NSGD, SignSGD, Signum, Muon, coordinate descent and Neon are steepest descents in the "
        "balls of Table 1",
        "section 2.9, Table 1",
    ),
    Statement("neon-training", "Neon underperforms in training networks", "section 2.9"),
    Statement(
        "trlan-faster",
        "TRLan is much faster than RSVD and power iterations at equal error",
        "section 3, Table 2",
    ),
    Statement(
        "rsvd-sigma",
        "RSVD approximates singular values better, TRLan the matrix of rank k",
        "section 3",
    ),
    Statement(
        "gaussian-norms",
        "Norms of Gaussian m x n matrices: nuclear ~ n sqrt(m), Frobenius ~ sqrt(mn), spectral ~ "
        "sqrt(m) + sqrt(n)",
        "section 4",
    ),
    Statement(
        "square-norms",
        "On square Gaussian matrices Frobenius ~ sqrt(n)/2 spectral and nuclear ~ n/2 spectral",
        "section 4",
    ),
    Statement(
        "smoothness",
        "L is |M|_F |N|_F (NSGD), 2/n |M|_* |N|_* (Muon), n |M|_op |N|_op (Neon): for n = 50 "
        "16.2, 171.4, 47.7",
        "section 5.1",
    ),
    Statement(
        "step-sizes",
        "Lemma 7 gives the learning rates 2.33e-4 (Muon), 2.10e-2 (Neon), 1.75e-2 (NSGD) and 68, "
        "11919, 323 iterations",
        "section 5.1",
    ),
    Statement(
        "theory-practice",
        "The theoretical L and step sizes do not relate well to practice",
        "section 5.1",
    ),
    Statement("neon-loss", "Neon converges worst in terms of the loss", "section 5.1, Figure 1"),
    Statement(
        "neon-gradient",
        "Neon is a leader in terms of the norm of the gradient",
        "section 5.1, Figure 1",
    ),
    Statement(
        "f-muon-robust", "F-Muon is more robust than Muon on least squares", "section 5.1, Figure 1"
    ),
    Statement(
        "airbench-equal",
        "Tuned F-Muon (94.01 ± 0.14 %) and Muon (94.00 ± 0.13 %) are equal",
        "section 5.2",
    ),
    Statement(
        "alpha-0.1",
        "At the tuned settings alpha = 0.1 is far more accurate than NSGD",
        "section 5.2, Figure 2b",
    ),
    Statement(
        "alpha-outside",
        "Alpha > 1 and alpha < 0, which are no norms, reach almost the accuracy of Muon",
        "section 5.2, Figure 2",
    ),
    Statement(
        "nanogpt-equal",
        "F-Muon with alpha = 0.5 is only marginally worse than Muon (3.281, 3.279)",
        "section 5.3",
    ),
    Statement(
        "nanogpt-negative",
        "Alpha = -0.1, which is no norm, is not worse than alpha = 0.3 (3.2818)",
        "section 5.3",
    ),
    Statement(
        "lanczos-newton-schulz",
        "The Lanczos algorithm is much faster than Newton-Schulz iterations on large matrices",
        "section 6",
    ),
    Statement(
        "error-feedback",
        "Error feedback may be necessary for low-rank updates, F-Neon's among them (left open)",
        "section 6",
    ),
    Statement(
        "lemma-9",
        "The dual ball of a sum of norms is the Minkowski sum of their dual balls",
        "appendix B, Lemma 9",
    ),
    Statement(
        "blend-duals",
        "The duals of F* and F2 are the minima of equations (22) and (23)",
        "appendix B",
    ),
    Statement(
        "blend-balls",
        "The ball of the dual of F* (F2) is the sum of alpha times the nuclear (spectral) ball and "
        "1 - alpha times the Frobenius ball",
        "appendix C.1, Figure 4",
    ),
    Statement(
        "ky-fan-balls",
        "The Ky Fan 2-ball is an intersection of three l1-balls, its dual that of an l_inf-ball of "
        "radius 1 and an l1-ball of radius 1/2",
        "appendix C.2, Figure 5",
    ),
    Statement(
        "draft-ahead",
        "F-Muon surpasses Muon's accuracy on CIFAR-10 by a margin",
        "draft, section 1",
    ),
    Statement(
        "draft-neon-cost",
        "Neon's updates are asymptotically cheaper than Muon's by Newton-Schulz iterations",
        "draft, section 1",
    ),
)


class Result(NamedTuple):
    """What one command left.

    Attributes:
        file: Where, below the folder of results.
        contents: Of the JSON.
        claims: What it says about the paper's.
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
        help="what the commands left, at any depth (default: results)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs"), metavar="DIR", help="of claims.md (default: docs)"
    )


def run(options: argparse.Namespace) -> int:
    """Read the results and write the page.

    Args:
        options: Those of ``add_arguments``.

    Returns:
        The exit status, 0.

    Raises:
        Refused: If there is no such folder, or a result cannot be understood.
    """
    if not options.results.is_dir():
        raise Refused(f"--results: there is no folder {options.results}")
    write(options.results, options.out)
    return 0


def write(results: Path, out: Path) -> None:
    """Write claims.md.

    Args:
        results: The folder of the results.
        out: The folder of the page.

    Raises:
        Refused: If a result cannot be understood.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / NAME).write_text(page(read(results)))
    print(f"saved: {out / NAME}")


def read(folder: Path) -> list[Result]:
    """Return what commands saved below a folder, by the names of the files.

    Args:
        folder: Any other JSON below it is left out.

    Raises:
        Refused: If a claim is not written as ``Claim`` is.
    """
    found = []
    for path in sorted(folder.rglob("*.json")):
        file = path.relative_to(folder).as_posix()
        try:
            contents = json.loads(path.read_text())
            if not isinstance(contents, dict) or not contents.keys() >= {"command", "claims"}:
                continue
            claims = [Claim(**claim) for claim in contents["claims"]]
        except (OSError, ValueError, TypeError) as error:
            raise Refused(f"{path} cannot be read: {error}") from None
        for claim in claims:
            if claim.id and claim.id not in (statement.id for statement in STATEMENTS):
                raise Refused(f"{path}: the paper has no claim with the id {claim.id!r}")
        found.append(Result(file, contents, claims))
    return found


def page(results: Sequence[Result]) -> str:
    """Return the page.

    Args:
        results: As from ``read``.
    """
    found = [(claim, result) for result in results for claim in result.claims]
    rows: list[tuple[str, Sequence[object]]] = []  # of the tables, by section
    verdicts: Counter[str] = Counter()
    for statement in STATEMENTS:
        about = [pair for pair in found if _is_about(pair[0], statement)]
        section = _section(statement.place)
        for claim, result in about:
            named = dataclasses.replace(claim, statement=statement.text, place=statement.place)
            rows.append((section, _row(named, result)))
            verdicts[claim.verdict] += 1
        if not about:
            rows.append((section, [_text(statement.text), statement.place, NOT_RUN, *[""] * 4]))
            verdicts[NOT_RUN] += 1
    for claim, result in found:
        if not any(_is_about(claim, statement) for statement in STATEMENTS):
            rows.append((_section(claim.place), _row(claim, result)))
            verdicts[claim.verdict] += 1
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    lines = [
        "# What the paper claims, and what was found here",
        "",
        "Generated by `python -m lit_fanions.paper claims`. Every verdict is computed from the "
        "numbers of the command beside it, by a rule that allows for their spread. "
        f"Verdicts: {counts}.",
    ]
    headings = ["claim", "where", "verdict", "result", "data", "n", "command"]
    for section, title in SECTIONS.items():
        if own := [row for of, row in rows if of == section]:
            lines += ["", f"## {title}", "", *_table(headings, own)]
    if found:
        lines += ["", "## Where the numbers come from", ""]
        origins = [_origin(result) for result in results if result.claims]
        lines += _table(["result", "commit", "processor", "versions"], origins)
    return "\n".join([*lines, ""])


def _is_about(claim: Claim, statement: Statement) -> bool:
    if claim.id:
        return claim.id == statement.id
    return claim.statement.casefold() == statement.text.casefold()


def _section(place: str) -> str:
    """The key in SECTIONS of a place such as "section 5.1, Figure 1"."""
    if "draft" in place.casefold():
        return "draft"
    match = re.search(r"(?:section|appendix)\s+([\dA-E][\d.]*)", place, re.IGNORECASE)
    number = match[1].upper().rstrip(".") if match else ""
    while number and number not in SECTIONS:
        number = number.rpartition(".")[0]
    return number


def _row(claim: Claim, result: Result) -> Sequence[object]:
    verdict = f"**{claim.verdict}**" + (f": {_text(claim.why)}" if claim.why else "")
    texts = [_text(text) for text in (claim.statement, claim.place, claim.found, claim.data)]
    command = f"`{result.contents['command']}`".replace("|", "\\|")
    return [*texts[:2], verdict, *texts[2:], claim.n or "", command]


def _origin(result: Result) -> Sequence[object]:
    machine = dict(result.contents.get("machine") or {})
    device = machine.get("gpu") or machine.get("processor") or ""
    versions = [
        f"{name} {machine[name]}" for name in ("python", "torch", "lightning") if name in machine
    ]
    commit = result.contents.get("commit") or ""
    return [f"`{result.file}`", commit, device, ", ".join(versions)]


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def _text(text: str) -> str:
    """Text as Markdown, in which it looks the same."""
    return re.sub(r"([\\`*_<|])", r"\\\1", " ".join(text.split()))
