"""The outcome of a command about the paper: what it found about the paper's claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from experiments.paper.statements import STATEMENTS
from lit_fanions.cli import results

_IDS = {statement.id for statement in STATEMENTS}
Verdict = Literal["confirmed", "refuted", "not testable here"]


@dataclass(frozen=True)
class Claim:
    """What was found about a claim of the paper.

    Args:
        id: Of the claim in ``statements.STATEMENTS``.
        verdict: Whether it holds here.
        found: The result, with its spread.
        data: What it was tried on.
        n: Independent repetitions: problems, seeds, turns, or the points that were looked at; 0
            for a proof.
        why: Why it cannot be tested, or under which reading it holds; may be empty.

    Raises:
        ValueError: If there is no such claim.
    """

    id: str
    verdict: Verdict
    found: str
    data: str
    n: int
    why: str = ""

    def __post_init__(self) -> None:
        if self.id not in _IDS:
            raise ValueError(f"the paper has no claim with the id {self.id!r}")


def untested(id: str, data: str, why: str) -> Claim:
    """A claim about which a command found nothing out, and why."""
    return Claim(id, "not testable here", "-", data, 0, why)


@dataclass(frozen=True)
class Outcome(results.Outcome):
    """The outcome of a command, with what it says about the paper's claims.

    Args:
        claims: The verdicts; none with --quick, which proves nothing.
    """

    claims: Sequence[Claim] = ()
    program: str = "experiments.paper"

    def findings(self) -> dict[str, Any]:
        """Return the claims as JSON entries."""
        return {"claims": [vars(claim) for claim in self.claims]}
