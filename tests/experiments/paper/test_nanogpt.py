"""Verdicts of the command nanogpt on last losses."""

from experiments.paper import nanogpt, tuning


def around(loss):
    return {0: loss - 0.001, 1: loss, 2: loss + 0.001}


def test_neon_is_compared_with_adamw_and_muon():
    finals = {"neon_cpu": around(3), "adamw_cpu": around(2), "muon_cpu": around(1)}
    (claim,) = nanogpt.judge_all(finals, "data")
    assert (claim.id, claim.verdict, claim.n) == ("neon-training", "confirmed", 3)
    (claim,) = nanogpt.judge_all({**finals, "adamw_cpu": around(4)}, "data")
    assert claim.verdict == "refuted"
    del finals["muon_cpu"]
    (claim,) = nanogpt.judge_all(finals, "data")
    assert (claim.verdict, claim.rule) == ("not testable here", tuning.NO_BEST)
