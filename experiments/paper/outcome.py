"""The outcome of a command about the paper: its numbers, and what they say about the claims."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.paper.execution import run_commits
from experiments.paper.statements import BY_ID
from lit_fanions.cli import results

PROGRAM = "experiments.paper"
Verdict = Literal["confirmed", "refuted", "not testable here"]


@dataclass(frozen=True)
class Claim:
    """The verdict on a claim of the paper; ``judge`` makes it.

    Args:
        id: Id of the claim in statements.yaml.
        verdict: Whether it holds here.
        found: The result, with its spread.
        data: The data it was tried on.
        n: Number of independent repetitions (problems, seeds, turns) or of points that were tried;
            0 for a proof.
        rule: How the verdict was computed, or why the claim cannot be tested.
        remark: What else the numbers say; may be empty.

    Raises:
        ValueError: If the paper has no claim with this id.
    """

    id: str
    verdict: Verdict
    found: str
    data: str
    n: int
    rule: str
    remark: str = ""

    def __post_init__(self) -> None:
        if self.id not in BY_ID:
            raise ValueError(f"the paper has no claim with the id {self.id!r}")


def judge(
    id: str, verdict: Verdict, found: str, data: str, n: int, remark: str = "", **numbers: object
) -> Claim:
    """Return a claim with the rule that statements.yaml has for it.

    Args:
        id: See ``Claim``.
        verdict: See ``Claim``.
        found: See ``Claim``.
        data: See ``Claim``.
        n: See ``Claim``.
        remark: See ``Claim``.
        **numbers: Values of the fields in the rule.
    """
    return Claim(id, verdict, found, data, n, BY_ID[id].rule.format(**numbers), remark)


def untested(id: str, data: str, reason: str) -> Claim:
    """Return the verdict on a claim that a command could not test."""
    return Claim(id, "not testable here", "-", data, 0, reason)


@dataclass(frozen=True)
class Outcome(results.Outcome):
    """The outcome of a command, with its verdicts on the paper's claims.

    Args:
        claims: The verdicts; none with --quick, which proves nothing.
        arguments: The command line that was given, kept in the JSON file.
    """

    claims: Sequence[Claim] = ()
    arguments: Sequence[str] = ()
    program: str = PROGRAM

    def findings(self, folder: Path) -> dict[str, Any]:
        """Return the entries that this outcome adds to the JSON file in a folder."""
        # Finished runs may be older than the results.
        commits = run_commits(folder / "runs")
        return {
            "command": shlex.join(["python", "-m", self.program, *self.arguments]),
            **({"commits of runs": commits} if commits else {}),
            "claims": [vars(claim) for claim in self.claims],
        }
