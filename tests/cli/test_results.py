"""A result tells which commit made it."""

from lit_fanions.cli import results


def test_no_commit_outside_of_git(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    assert results.commit.__wrapped__() is None
