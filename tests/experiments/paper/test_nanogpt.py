"""Verdicts of the command nanogpt on last losses."""

from experiments.paper import nanogpt, tuning


def around(loss):
    return {0: loss - 0.001, 1: loss, 2: loss + 0.001}


def test_neon_is_compared_with_adamw_and_muon():
    finals = {"neon_cpu": around(3), "adamw_cpu": around(2), "muon_cpu": around(1)}
    claim, _ = nanogpt.judge_all(finals, "data")
    assert (claim.id, claim.verdict, claim.n) == ("neon-training", "confirmed", 3)
    claim, _ = nanogpt.judge_all({**finals, "adamw_cpu": around(4)}, "data")
    assert claim.verdict == "refuted"
    del finals["muon_cpu"]
    claim, _ = nanogpt.judge_all(finals, "data")
    assert (claim.verdict, claim.rule) == ("not testable here", tuning.NO_BEST)


def test_both_blends_must_match_muon():
    finals = {"muon_cpu": around(1), "f_muon_cpu": around(1.001), "s_muon_cpu": around(0.999)}
    _, claim = nanogpt.judge_all(finals, "data")
    assert (claim.id, claim.verdict, claim.n) == ("final-match", "confirmed", 3)
    assert "F-Muon minus Muon: +0.0010" in claim.found
    _, claim = nanogpt.judge_all({**finals, "s_muon_cpu": around(1.1)}, "data")
    assert claim.verdict == "refuted"
    del finals["s_muon_cpu"]
    _, claim = nanogpt.judge_all(finals, "data")
    assert (claim.verdict, claim.rule) == ("not testable here", tuning.NO_BEST)
