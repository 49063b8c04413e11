"""Verdicts on the claims about Lanczos, RSVD, power iterations and Newton-Schulz."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.bench import topk as bench
from experiments.paper import verdicts
from experiments.paper.outcome import Claim, Verdict, judge, untested
from experiments.paper.topk.measure import NEWTON_SCHULZ, RSVD, Entry, Range, rank_name
from lit_fanions.cli.curves import spread

MUCH = 2.0  # "much faster" means by more than this factor
LARGEST = 3  # number of sizes, the largest, that show how times grow


def judge_all(
    entries: Sequence[Entry], equal: Sequence[Entry], directions: Sequence[Entry], data: str
) -> list[Claim]:
    """Return all verdicts of the command.

    Args:
        entries: Results of the race.
        equal: Errors at equal time, by rank.
        directions: Times of directions by size.
        data: The matrix, in words.
    """
    return [
        judge_race(entries, data),
        judge_errors(equal, data),
        judge_newton_schulz(directions, data),
        judge_growth(directions, data),
    ]


# Comparisons of ranges: 1 if one range lies below another, -1 if above, 0 if they overlap.


def _compare(better: Range, worse: Range) -> int:
    return (better[1] < worse[0]) - (better[0] > worse[1])


def _compare_much_faster(fast: Sequence[float], slow: Sequence[float]) -> int:
    """Compare times, the faster ones multiplied by the factor that counts as much."""
    return _compare((MUCH * min(fast), MUCH * max(fast)), (min(slow), max(slow)))


def _verdict(comparisons: Sequence[int]) -> Verdict:
    """Return the verdict on a claim that must hold in each of several comparisons."""
    verdict: dict[int, Verdict] = {-1: "refuted", 0: "not testable here", 1: "confirmed"}
    return verdict[min(comparisons, default=0)]


def judge_race(entries: Sequence[Entry], data: str) -> Claim:
    """Return the verdict on Lanczos (TRLan) against RSVD and power iterations.

    Args:
        entries: Results of the race.
        data: The matrix, in words.
    """
    found, comparisons, turns = [], [], []
    for k in dict.fromkeys(entry["k"] for entry in entries):
        of_rank = {e["solver"]: e for e in entries if e["k"] == k}
        lanczos = of_rank[bench.LANCZOS]
        rivals = [of_rank[name] for name in (*RSVD, bench.POWER) if name in of_rank]
        turns.append(len(lanczos["seconds"]))
        comparisons += [_compare_with_rival(lanczos, rival) for rival in rivals]
        mean, deviation = spread(lanczos["seconds"])
        own = f"{mean:.3g} ± {deviation:.2g} s" if lanczos["reached"] else "not in time"
        texts = [f"Lanczos {own}"]
        for rival in rivals:
            bound = "" if rival["reached"] else "> "
            texts.append(f"{rival['solver']} {bound}{min(_rival_seconds(rival)):.3g} s")
        found.append(f"k = {k}: {', '.join(texts)}")
    return judge(
        "trlan-faster", _verdict(comparisons), "; ".join(found), data, min(turns), much=MUCH
    )


def _rival_seconds(rival: Entry) -> Sequence[float]:
    """Return the times of a rival.

    A rival that misses the error counts with the dearest setting that it tried: it needs more.
    """
    seconds: Sequence[float] = rival["seconds"]
    return seconds if rival["reached"] else [max(t["seconds"] for t in rival["tried"])]


def _compare_with_rival(lanczos: Entry, rival: Entry) -> int:
    if not lanczos["reached"]:
        return -1 if rival["reached"] else 0
    comparison = _compare_much_faster(lanczos["seconds"], _rival_seconds(rival))
    # The time of a rival that misses the error is a lower bound, which refutes nothing.
    return comparison if rival["reached"] else max(comparison, 0)


def judge_errors(equal: Sequence[Entry], data: str) -> Claim:
    """Return the verdict on RSVD for the singular values and Lanczos (TRLan) for the matrix.

    Args:
        equal: Errors at equal time, by rank.
        data: The matrix, in words.
    """
    if not equal:
        return untested("rsvd-sigma", data, "No setting of RSVD takes as little time as Lanczos.")
    comparisons = [
        comparison
        for e in equal
        for comparison in (
            _compare(e["rsvd"]["sigma_error"], e["lanczos"]["sigma_error"]),
            _compare(e["lanczos"]["error"], e["rsvd"]["error"]),
        )
    ]
    found = [
        f"k = {e['k']}: singular values {e['lanczos']['sigma_error'][1]:.1g} (Lanczos) and "
        f"{e['rsvd']['sigma_error'][1]:.1g} (RSVD), matrix {e['lanczos']['error'][1]:.1g} and "
        f"{e['rsvd']['error'][1]:.1g}"
        for e in equal
    ]
    n = min(e["n"] for e in equal)
    return judge("rsvd-sigma", _verdict(comparisons), "; ".join(found), data, n)


def judge_newton_schulz(directions: Sequence[Entry], data: str) -> Claim:
    """Return the verdict on Lanczos against Newton-Schulz, by Neon's direction (rank 1).

    Args:
        directions: Times of directions by size; other ranks are reported only.
        data: The matrix, in words.
    """
    largest = max((d["size"] for d in directions), default=0)
    at_largest: Mapping[str, Entry] = {
        d["direction"]: d for d in directions if d["size"] == largest
    }
    newton_schulz, neon = at_largest[NEWTON_SCHULZ], at_largest.get(rank_name(1))
    found = [
        f"{name}: {d['ratio']:.2g} of the time; faster {_sizes_where_faster(directions, name)}"
        for name, d in at_largest.items()
        if name != NEWTON_SCHULZ
    ]
    comparisons = [_compare_much_faster(neon["seconds"], newton_schulz["seconds"])] if neon else []
    return judge(
        "lanczos-newton-schulz",
        _verdict(comparisons),
        "; ".join(found),
        f"{data} and its leading blocks",
        len(newton_schulz["seconds"]),
        much=MUCH,
    )


def _sizes_where_faster(directions: Sequence[Entry], name: str) -> str:
    """Return from which size on a direction takes less time than Newton-Schulz, in words."""
    ratios = {d["size"]: d["ratio"] for d in directions if d["direction"] == name}
    slower = [size for size, ratio in ratios.items() if ratio >= 1]
    faster = [size for size in ratios if size > max(slower, default=0)]
    return f"from {min(faster)} rows on" if faster else "at no size"


def judge_growth(directions: Sequence[Entry], data: str) -> Claim:
    """Return the verdict on how the times of rank 1 and of Newton-Schulz grow with the size.

    Args:
        directions: Times of directions by size.
        data: The matrix, in words.
    """
    rank_1, newton_schulz = (
        dict(enumerate(_powers(directions, name))) for name in (rank_name(1), NEWTON_SCHULZ)
    )
    data = f"{data} and its leading blocks"
    if not rank_1:
        return untested("draft-neon-cost", data, f"Rank 1 was not timed for {LARGEST} sizes.")
    difference = verdicts.mean_difference(newton_schulz, rank_1)
    return judge(
        "draft-neon-cost",
        verdicts.all_hold([difference.is_above(0.0)]),
        f"power of Newton-Schulz minus that of rank 1: {difference}; rank 1: "
        f"{spread([*rank_1.values()])[0]:.2f}",
        data,
        len(rank_1),
        largest=LARGEST,
    )


def _powers(directions: Sequence[Entry], name: str) -> list[float]:
    """Return the slopes of log time over log size, one per turn; none with too few sizes."""
    timed = sorted((d["size"], d["seconds"]) for d in directions if d["direction"] == name)
    if len(timed) < LARGEST:
        return []
    sizes, seconds = zip(*timed[-LARGEST:], strict=True)
    fits = np.polyfit(np.log(sizes), np.log(np.array(seconds)), 1)
    return [float(slope) for slope in fits[0]]
