"""Verdicts on the claims about least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.paper.least_squares.tables import format_range, format_steps, title_of_setting
from experiments.paper.least_squares.theory import Promise
from experiments.paper.least_squares.traces import (
    QUANTITIES,
    THEORY,
    Leads,
    Setting,
    Trace,
    count_firsts,
)
from experiments.paper.outcome import Claim, judge
from experiments.paper.verdicts import LEVEL, all_hold, any_holds, holm, sign_test

Found = Mapping[str, Trace]  # traces of one setting by recipe


def judge_all(
    compared: Mapping[Setting, Found],
    ranked: Mapping[Setting, Found],
    leads: Mapping[Setting, Leads],
    promises: Sequence[Promise],
) -> list[Claim]:
    """Return all verdicts that the traces allow.

    Args:
        compared: Traces of the settings in which all recipes take equally many steps.
        ranked: Traces of the settings in which no recipe of the article is missing.
        leads: In how many problems each recipe has the smallest gradient.
        promises: Promised and needed iterations.
    """
    claims = []
    for setting, found in ranked.items():
        if setting in compared:
            claims += [
                _judge_neon_loss(setting, found),
                _judge_neon_gradient(setting, found, leads[setting]),
            ]
    claims += [
        _judge_robustness(setting, found["f_muon"], found["muon"])
        for setting, found in compared.items()
        if {"muon", "f_muon"} <= found.keys()
    ]
    claims += [
        _judge_blends(setting, {name: found[name] for name in ("muon", "f_muon", "s_muon")})
        for setting, found in compared.items()
        if {"muon", "f_muon", "s_muon"} <= found.keys()
    ]
    if {p.name for p in promises if p.source == "printed"} == set(THEORY):
        claims.append(_judge_theory(promises))
    return claims


def _describe_data(setting: Setting, found: Found) -> str:
    steps = sorted({trace.steps[-1] for trace in found.values()})
    counts = ", ".join(f"{step:,}" for step in steps)
    return f"random least squares, {title_of_setting(setting, found)}, {counts} steps"


def _judge_neon_loss(setting: Setting, found: Found) -> Claim:
    negated = {name: -trace.last("loss") for name, trace in found.items()}
    n = len(negated["neon"])
    count = count_firsts(negated)["neon"]
    losses = ", ".join(f"{name} {format_range(-values)}" for name, values in negated.items())
    return judge(
        "neon-loss",
        all_hold([sign_test(count, n)]),
        f"largest loss of the {len(found)} in {count} of {n} problems; "
        f"median (least – largest): {losses}",
        _describe_data(setting, found),
        n,
    )


def _judge_neon_gradient(setting: Setting, found: Found, leads: Leads) -> Claim:
    n = len(found["neon"].smoothness)
    counts = {reading: firsts["neon"] for reading, firsts in leads.items()}
    # The six readings of the paper's sentence; the others are reported only.
    tested = [r for r in counts if ("last" in r or "so far" in r) and not r.startswith("own")]
    corrected = holm([sign_test(count, n).holds for count in counts.values()])
    holding = [
        f"{reading} ({count} of {n})"
        for (reading, count), p in zip(counts.items(), corrected, strict=True)
        if p < LEVEL
    ]
    return judge(
        "neon-gradient",
        any_holds(sign_test(counts[reading], n) for reading in tested),
        f"smallest gradient of the {len(found)} recipes, in how many of {n} problems: "
        + "; ".join(f"{reading}: {counts[reading]}" for reading in tested),
        _describe_data(setting, found),
        n,
        f"Of all {len(counts)} readings tried, with Holm's correction for as many, it holds for: "
        f"{'; '.join(holding) or 'none'}.",
    )


def _judge_robustness(setting: Setting, f_muon: Trace, muon: Trace) -> Claim:
    n = len(muon.smoothness)
    counts = {q: int((f_muon.last(q) < muon.last(q)).sum()) for q in QUANTITIES[:4]}
    ratio = f_muon.last("loss") / muon.last("loss")
    steps = [t.first_step_below("loss", 0.01 * t.values["loss"][0]) for t in (f_muon, muon)]
    reached = bool(np.isfinite(steps).all())
    slower = format_range(steps[0] / steps[1]) if reached else "not reached"
    return judge(
        "f-muon-robust",
        all_hold(sign_test(count, n) for count in counts.values()),
        f"smaller than Muon's after the last step, in how many of {n} problems: "
        + ", ".join(f"{name} {count}" for name, count in counts.items())
        + f"; loss over Muon's: {format_range(ratio)}; steps to a hundredth of the first loss, "
        f"over Muon's: {slower}",
        _describe_data(setting, {"muon": muon, "f_muon": f_muon}),
        n,
        "With constant steps both end in a limit cycle; F-Muon's is smaller because its steps are "
        "shorter, and the way there is longer. As the loss of the cycle is proportional to lr "
        f"squared, Muon with {np.median(ratio**0.5):.2f} of its lr would have F-Muon's loss, and "
        f"take {np.median(ratio**-0.5):.2f} times the steps.",
    )


def _judge_blends(setting: Setting, found: Found) -> Claim:
    last = {name: trace.last("loss") for name, trace in found.items()}
    muon, n = last["muon"], len(last["muon"])
    counts = {name: int((last[name] < muon).sum()) for name in ("f_muon", "s_muon")}
    losses = ", ".join(f"{name} {format_range(values)}" for name, values in last.items())
    return judge(
        "final-convex",
        all_hold(sign_test(count, n) for count in counts.values()),
        f"loss below Muon's after the last step, in how many of {n} problems: "
        + ", ".join(f"{name} {count}" for name, count in counts.items())
        + f"; median (least – largest): {losses}",
        _describe_data(setting, found),
        n,
    )


def _judge_theory(promises: Sequence[Promise]) -> Claim:
    n = max(len(p.needed) for p in promises)
    known = [(p, wrong) for p in promises if (wrong := p.count_wrong()) is not None]
    printed = [sign_test(wrong, n) for p, wrong in known if p.source == "printed"]
    by_lemma = [(p.name, n - wrong) for p, wrong in known if p.source == "lemma 7"]
    corrected = holm([sign_test(right, n).holds for _, right in by_lemma])
    right = [name for (name, _), p in zip(by_lemma, corrected, strict=True) if p < LEVEL]
    return judge(
        "theory-practice",
        all_hold(printed) if len(printed) == len(THEORY) else "not testable here",
        "; ".join(
            f"{p.name}, {p.source}: lr {p.lr:.3g}, {p.promised:,} iterations, needed "
            f"{format_steps(p.needed, p.last)}"
            for p in promises
        ),
        "random least squares, 50 × 50",
        n,
        "Within a factor of 2 with the lr and iterations that Lemma 7 does give, by sign tests "
        f"with Holm's correction: {', '.join(right) or 'none'}.",
    )
