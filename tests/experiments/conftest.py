"""What the tests of the laboratory share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def wide_terminal() -> Iterator[None]:
    """Let every row of a table stay in one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "250")
        yield
