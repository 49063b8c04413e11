"""What the paper claims: the list in statements.yaml, which commands refer to by id."""

from pathlib import Path
from typing import NamedTuple

import yaml


class Statement(NamedTuple):
    """A claim of the paper.

    Attributes:
        id: Name by which ``outcome.Claim`` refers to it.
        text: The claim.
        place: Where the paper makes it; the first section counts.
        command: The command that judges it.
        rule: How the verdict is computed, with fields for ``str.format``.
    """

    id: str
    text: str
    place: str
    command: str
    rule: str


STATEMENTS = tuple(
    Statement(**entry)
    for entry in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
)
BY_ID = {statement.id: statement for statement in STATEMENTS}
