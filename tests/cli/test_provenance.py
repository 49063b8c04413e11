"""A result tells which commit made it."""

from lit_fanions.cli import provenance


def test_no_commit_outside_of_git(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.commit.__wrapped__() is None
