"""Rank-k directions of a large matrix: Lanczos, randomised SVD, power iterations (Table 2).

A 5000x5000 Gaussian matrix, k = 1, 10 and 100: every solver gets the cheapest setting whose error
of the rank-k direction, |U_k V_k^T - exact|_F / sqrt(k), is at most .01, and these race. The
paper's figures stand beside, with ratios, as its GPU is not at hand. The outcome also says how far
the singular values and the matrix are off at equal time, and from which size on Lanczos is faster
than Newton-Schulz.

  python -m experiments.paper topk
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from experiments.bench import polar, race, topk
from experiments.paper import verdicts
from experiments.paper.outcome import Claim, Outcome, Verdict, untested
from lit_fanions import lmo
from lit_fanions.cli.console import Table
from lit_fanions.cli.results import logarithmic
from lit_fanions.cli.runner import spread
from lit_fanions.lmo import Triplets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TIME = "eight minutes; quick: a few seconds"
RSVD = (topk.PCA, topk.RANDOMIZED)
SOLVERS = (topk.LANCZOS, topk.CUPY, topk.ARPACK, *RSVD, topk.POWER)
# As Muon has it: five steps with Keller Jordan's coefficients.
NEWTON_SCHULZ = "Newton-Schulz 5"
LARGEST = 3  # sizes that show how times grow
MUCH = 2.0  # times faster, to be much faster
SIZES, QUICK_SIZES = (256, 512, 1024, 2048, 5000), (32, 64)
ERRORS = {"error": topk.rank_k_error, "sigma_error": topk.sigma_error}
Entry = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    topk.add_search(parser, budget=40.0, seeds=3)
    race.add_turns(parser, repeats=3)


def run(options: argparse.Namespace) -> int:
    """Race, tabulate and plot.

    Args:
        options: See ``add_arguments``.

    Returns:
        The exit status, 0.
    """
    (case,) = topk.cases(options, ["gaussian"])
    exact = topk.exact(case.matrix, max(case.ranks))
    entries = topk.race_case(case, exact, options, SOLVERS)
    equal = [
        found for k in case.ranks if (found := _at_equal_time(case, exact, k, entries, options))
    ]
    outcome = _outcome(case, entries, equal, _directions(case, entries, options), options)
    print(outcome)
    outcome.save(options.out, "topk")
    return 0


def _directions(
    case: topk.Case, entries: Sequence[Entry], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Times of rank-k and of full-rank directions by size, of leading blocks of the matrix.

    Lanczos has the cheapest setting by which a size reaches the error.
    """
    full = len(case.matrix)
    known = {e["k"]: e["setting"] for e in entries if _is(e, topk.LANCZOS) and e["reached"]}
    found = []
    for size in (*(s for s in (QUICK_SIZES if options.quick else SIZES) if s < full), full):
        block = dataclasses.replace(case, matrix=case.matrix[:size, :size].contiguous())
        ranks = [k for k in known if k < size]
        settings = known if size == full else _settings(block, ranks, options)
        turns = {_rank(k): _rank_k(block, k, settings[k]) for k in ranks if k in settings}
        turns[NEWTON_SCHULZ] = _turn(block.matrix)
        seconds = race.take_turns(turns, repeats=options.repeats, device=options.device)
        medians = race.medians(seconds)
        found += [
            {
                "size": size,
                "direction": name,
                "seconds": taken,
                "median_seconds": medians[name],
                "ratio": medians[name] / medians[NEWTON_SCHULZ],
            }
            for name, taken in seconds.items()
        ]
    return found


def _settings(case: topk.Case, ranks: Sequence[int], options: argparse.Namespace) -> dict[int, str]:
    """The cheapest settings of Lanczos that reach the error, by rank."""
    exact, found = topk.exact(case.matrix, max(ranks, default=1)), {}
    for k in ranks:
        trial = race.cheapest(
            topk.solvers(case, k)[topk.LANCZOS].levels,
            lambda triplets, k=k: topk.rank_k_error(triplets, exact, k),  # type: ignore[misc]
            goal=options.error,
            seeds=options.seeds,
            budget=options.budget,
            device=options.device,
            ordered=True,
        )
        if trial.reached:
            found[k] = trial.level.setting
    return found


def _rank(k: int) -> str:
    return f"rank {k}"


def _rank_k(case: topk.Case, k: int, setting: str) -> race.Turn:
    """Lanczos at a setting, and the product that makes its triplets a direction."""
    level = _level(case, k, topk.LANCZOS, setting)

    def turn(seed: int) -> Tensor:
        found = level.solve(seed)
        return found.U @ found.Vh

    return turn


def _level(case: topk.Case, k: int, solver: str, setting: str) -> race.Level:
    (level,) = (x for x in topk.solvers(case, k)[solver].levels if x.setting == setting)
    return level


def _turn(m: Tensor) -> race.Turn:
    return lambda turn: lmo.polar(m, method="jordan", steps=5)


def _is(entry: Entry, *solvers: str) -> bool:
    return entry["solver"] in solvers


def _outcome(
    case: topk.Case,
    entries: Sequence[Entry],
    equal: Sequence[Entry],
    directions: Sequence[Entry],
    options: argparse.Namespace,
) -> Outcome:
    packages = {topk.CUPY: ("cupy",), topk.ARPACK: ("scipy", "numpy")}
    timed = [p for e in entries for p in packages.get(e["solver"], ())]
    products = {"the solvers of rank k": "float32", **polar.products(options.device)}
    facts = race.conditions(options, products, *dict.fromkeys(timed))
    data = f"a Gaussian {polar.shape_text(case.matrix.shape)} matrix"
    claims = [
        _faster(entries, data),
        _better(equal, data),
        _beats_newton_schulz(directions, data),
        _cheaper(directions, data),
    ]
    return Outcome(
        tables=[
            topk.table(case, entries, options.error),
            _equal_table(equal),
            _size_table(directions),
        ],
        columns=["k", "solver", "setting", "seed", "seconds", "error", "sigma_error"],
        rows=[[e["k"], e["solver"], *t.values()] for e in entries for t in e["tried"]],
        settings={
            **facts,
            "error": options.error,
            "budget": options.budget,
            "seeds": list(range(options.seeds)),
            "solvers": [{k: v for k, v in e.items() if k != "tried"} for e in entries],
            "at equal time": equal,
            "directions": directions,
        },
        draw=lambda figure: _draw(figure, entries, directions, options.error),
        size=(5 * (len(case.ranks) + 1), 4.5),
        claims=() if options.quick else claims,
        notes=[
            "error: of the rank-k direction, |U V^T - exact|_F / sqrt(k), the worst of all runs",
            f"what is not reached was given up after {options.budget:g} s",
            "paper s: its SVDS is CuPy's thick-restart Lanczos on a GPU",
        ],
    )


def _at_equal_time(
    case: topk.Case,
    exact: Triplets,
    k: int,
    entries: Sequence[Entry],
    options: argparse.Namespace,
) -> dict[str, Any] | None:
    """Errors of Lanczos where it reaches the error, and of the best of RSVD in no more time.

    For each of the two errors that is the setting which had the smallest in the search. They are
    measured on seeds of their own, as the search has chosen by its: ranges, least and largest.
    None where nothing can be compared.
    """
    of_k = [entry for entry in entries if entry["k"] == k]
    (lanczos,) = (entry for entry in of_k if _is(entry, topk.LANCZOS))
    own = [t for t in lanczos["tried"] if t["setting"] == lanczos["setting"]]
    limit = max(t["seconds"] for t in own)
    in_time = [
        (tried, entry["solver"])
        for entry in of_k
        if _is(entry, *RSVD)
        for tried in entry["tried"]
        if tried["seconds"] <= limit
    ]
    if not (lanczos["reached"] and in_time):
        return None
    measured: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}

    def errors(solver: str, setting: str) -> dict[str, tuple[float, float]]:
        if (solver, setting) not in measured:
            level = _level(case, k, solver, setting)
            found = [level.solve(seed) for seed in range(options.seeds, 2 * options.seeds)]
            values = {name: [error(x, exact, k) for x in found] for name, error in ERRORS.items()}
            measured[solver, setting] = {n: (min(v), max(v)) for n, v in values.items()}
        return measured[solver, setting]

    best = {name: min(in_time, key=lambda pair: pair[0][name]) for name in ERRORS}
    return {
        "k": k,
        "seconds": limit,
        "n": options.seeds,
        "lanczos": errors(topk.LANCZOS, lanczos["setting"]),
        "rsvd": {n: errors(solver, tried["setting"])[n] for n, (tried, solver) in best.items()},
    }


def _equal_table(equal: Sequence[Entry]) -> Table:
    title = (
        "worst errors at equal time: of Lanczos, and of RSVD (torch's and ours) at the best of the "
        "settings that take no longer"
    )
    columns = ["k", "seconds", "matrix: Lanczos", "matrix: RSVD", "sigma: Lanczos", "sigma: RSVD"]
    return Table(
        title,
        columns,
        [
            [
                e["k"],
                e["seconds"],
                *(e[solver][name][1] for name in ERRORS for solver in ("lanczos", "rsvd")),
            ]
            for e in equal
        ],
    )


def _size_table(directions: Sequence[Entry]) -> Table:
    return Table(
        f"time of a direction by Lanczos over that by {NEWTON_SCHULZ}",
        ["size", "direction", "ms", f"x {NEWTON_SCHULZ}"],
        [[d["size"], d["direction"], 1e3 * d["median_seconds"], d["ratio"]] for d in directions],
    )


def _faster(entries: Sequence[Entry], data: str) -> Claim:
    """TRLan against RSVD and power iterations.

    What does not reach the error counts with the dearest setting that it tried in vain: it needs
    more.
    """
    found, signs, least = [], [], math.inf
    for k in dict.fromkeys(entry["k"] for entry in entries):
        of_k = {e["solver"]: e for e in entries if e["k"] == k}
        lanczos, *rivals = (
            of_k[name] for name in (topk.LANCZOS, *RSVD, topk.POWER) if name in of_k
        )
        least = min(least, len(lanczos["seconds"]))
        mean, deviation = spread(lanczos["seconds"])
        texts = [f"Lanczos {mean:.3g} ± {deviation:.2g} s"]
        if not lanczos["reached"]:
            texts = ["Lanczos not in time"]
        for rival in rivals:
            reached = rival["reached"]
            seconds = rival["seconds"] if reached else [max(t["seconds"] for t in rival["tried"])]
            texts.append(f"{rival['solver']} {'' if reached else '> '}{min(seconds):.3g} s")
            if lanczos["reached"]:
                sign = _sign(_much(lanczos["seconds"]), _range(seconds))
                signs.append(sign if reached else max(sign, 0))
            else:
                signs.append(-1 if reached else 0)
        found.append(f"k = {k}: {', '.join(texts)}")
    return Claim(
        "trlan-faster",
        _verdict(signs),
        "; ".join(found),
        data,
        int(least),
        f"Confirmed if for every k even its slowest turn takes less than 1 / {MUCH:g} of the "
        "fastest of each rival, refuted if for a k its fastest takes more than that of a rival's "
        "slowest; > marks the dearest setting tried, which does not reach the error",
    )


def _better(equal: Sequence[Entry], data: str) -> Claim:
    """RSVD for the singular values, TRLan for the matrix.

    Confirmed if for every k no seed of the better is as far off as any of the worse; refuted if for
    a k it is the other way round.
    """
    if not equal:
        return untested("rsvd-sigma", data, "no setting of RSVD takes as little time as Lanczos")
    signs = [
        sign
        for e in equal
        for sign in (
            _sign(e["rsvd"]["sigma_error"], e["lanczos"]["sigma_error"]),
            _sign(e["lanczos"]["error"], e["rsvd"]["error"]),
        )
    ]
    texts = [
        f"k = {e['k']}: singular values {e['lanczos']['sigma_error'][1]:.1g} (Lanczos) and "
        f"{e['rsvd']['sigma_error'][1]:.1g} (RSVD), matrix {e['lanczos']['error'][1]:.1g} and "
        f"{e['rsvd']['error'][1]:.1g}"
        for e in equal
    ]
    return Claim(
        "rsvd-sigma",
        _verdict(signs),
        "; ".join(texts),
        data,
        min(e["n"] for e in equal),
        "worst errors at equal time; confirmed if for every k all seeds are better, refuted if for "
        "a k all are worse",
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _much(seconds: Sequence[float]) -> tuple[float, float]:
    """The range that is to lie below that of what takes much longer."""
    return MUCH * min(seconds), MUCH * max(seconds)


def _verdict(signs: Sequence[int]) -> Verdict:
    """On something that has to hold in each of several comparisons, see ``_sign``."""
    by_sign: dict[int, Verdict] = {-1: "refuted", 0: "not testable here", 1: "confirmed"}
    return by_sign[min(signs, default=0)]


def _sign(better: tuple[float, float], worse: tuple[float, float]) -> int:
    """1 if a range lies below another, -1 if above, 0 if they overlap."""
    return (better[1] < worse[0]) - (better[0] > worse[1])


def _beats_newton_schulz(directions: Sequence[Entry], data: str) -> Claim:
    """Neon's direction on the largest matrix; of other ranks only the figures are told."""
    largest = max((d["size"] for d in directions), default=0)
    by = {d["direction"]: d for d in directions if d["size"] == largest}
    newton_schulz, neon = by.pop(NEWTON_SCHULZ), by.get(_rank(1))
    texts = [
        f"{name}: {d['ratio']:.2g} of the time; faster {_from(directions, name)}"
        for name, d in by.items()
    ]
    signs = [_sign(_much(neon["seconds"]), _range(newton_schulz["seconds"]))] if neon else []
    return Claim(
        "lanczos-newton-schulz",
        _verdict(signs),
        "; ".join(texts),
        f"{data} and its leading blocks",
        len(newton_schulz["seconds"]),
        "from a cold start, to the same error of the rank-k direction; confirmed if on the largest "
        f"matrix the slowest turn of rank 1 takes less than 1 / {MUCH:g} of the fastest of "
        "Newton-Schulz, refuted if its fastest takes more than that of the slowest",
    )


def _cheaper(directions: Sequence[Entry], data: str) -> Claim:
    """Whether the time of rank 1 grows with a smaller power of the size than Newton-Schulz's."""
    rank_1, newton_schulz = (
        dict(enumerate(_powers(directions, name))) for name in (_rank(1), NEWTON_SCHULZ)
    )
    data = f"{data} and its leading blocks"
    if not rank_1:
        return untested("draft-neon-cost", data, f"rank 1 was not timed for {LARGEST} sizes")
    return Claim(
        "draft-neon-cost",
        verdicts.larger(newton_schulz, rank_1, 0.0),
        f"power of Newton-Schulz minus that of rank 1: {verdicts.told(newton_schulz, rank_1)}; "
        f"rank 1: {spread([*rank_1.values()])[0]:.2f}",
        data,
        len(rank_1),
        f"time ~ size ** power over the {LARGEST} largest sizes, fitted for each turn (one matrix "
        "a size, a start of its own each turn); confirmed if the 95 % interval of the difference "
        "is above 0, refuted if it is below",
    )


def _powers(directions: Sequence[Entry], name: str) -> list[float]:
    """Slopes of log time over log size, one a turn."""
    timed = sorted((d["size"], d["seconds"]) for d in directions if d["direction"] == name)
    if len(timed) < LARGEST:
        return []
    sizes, seconds = zip(*timed[-LARGEST:], strict=True)
    fits = np.polyfit(np.log(sizes), np.log(np.array(seconds)), 1)
    return [float(slope) for slope in fits[0]]


def _from(directions: Sequence[Entry], name: str) -> str:
    """The size from which on a direction takes less time than Newton-Schulz."""
    ratios = {d["size"]: d["ratio"] for d in directions if d["direction"] == name}
    slower = [size for size, ratio in ratios.items() if ratio >= 1]
    faster = [size for size in ratios if size > max(slower, default=0)]
    return f"from {min(faster)} rows on" if faster else "at no size"


def _draw(
    figure: Figure, entries: Sequence[Entry], directions: Sequence[Entry], goal: float
) -> None:
    """Error over time of all that was tried, by k, and the times of directions by size."""
    ranks = list(dict.fromkeys(entry["k"] for entry in entries))
    *panels, last = figure.subplots(1, len(ranks) + 1)
    solvers = list(dict.fromkeys(entry["solver"] for entry in entries))
    for k, panel in zip(ranks, panels, strict=True):
        for entry in entries:
            if entry["k"] == k:
                color = f"C{solvers.index(entry['solver'])}"
                _draw_tried(panel, entry, color)
        panel.axhline(goal, color="black", linewidth=0.8, linestyle="--")
        panel.set(title=f"k = {k}", xlabel="seconds", yscale="log")
        logarithmic(panel)
    panels[0].set_ylabel("error of the rank-k direction")
    for name in dict.fromkeys(d["direction"] for d in directions):
        line = [d for d in directions if d["direction"] == name]
        times = [d["median_seconds"] for d in line]
        style = "k--" if name == NEWTON_SCHULZ else "-"
        label = name if name == NEWTON_SCHULZ else f"Lanczos, {name}"
        last.plot([d["size"] for d in line], times, style, marker="o", label=label)
    last.set(title="a direction", xlabel="rows = columns", ylabel="seconds")
    last.set(xscale="log", yscale="log")
    last.set_xticks(list(sizes := dict.fromkeys(d["size"] for d in directions)), map(str, sizes))
    last.minorticks_off()
    last.legend(fontsize="small")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(solvers))


def _draw_tried(axes: Axes, entry: Entry, color: str) -> None:
    """What a solver tried; the setting that it is given in the race is filled."""
    finite = [t for t in entry["tried"] if math.isfinite(t["error"])]
    for chosen in (False, True):
        points = [t for t in finite if (t["setting"] == entry["setting"]) is chosen]
        axes.scatter(
            [t["seconds"] for t in points],
            [max(t["error"], 1e-5) for t in points],
            s=40 if chosen else 20,
            edgecolors=color,
            facecolors=color if chosen else "none",
            label=entry["solver"] if chosen else None,
        )
