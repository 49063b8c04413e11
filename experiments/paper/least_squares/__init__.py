r"""Randomised linear least squares, loss and gradient in each norm (section 5.1, Figure 1).

Every recipe solves the same random problems, each problem with a matrix of its own, in five
settings: that of the article's figure (50 x 50, lr 1e-2, 5,000 steps), that of its text (10 x 10),
that of its earlier draft (10 x 10, lr 1e-3, 100,000 steps), and, for nsgd, muon and neon, with the
article's printed theoretical step sizes (50 x 50) and with those that Lemma 7 gives for these
problems. --seeds is the number of problems; problem i is the same for any number of them.

  python -m experiments.paper least_squares --jobs 2

All other options are passed to `fit` for every run. The article does not say how S is drawn:
--data.target uniform draws it in another way, and --data.target_scale 0.1 moves it ten times nearer
to the start.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from experiments.paper import repetitions
from experiments.paper.least_squares import claims, figure, tables, theory, trainings
from experiments.paper.least_squares.traces import (
    QUANTITIES,
    Setting,
    Traces,
    count_leads,
    ranked_traces,
    setting_traces,
)
from experiments.paper.outcome import Outcome
from lit_fanions.cli.console import Refused

TIME = "half an hour; quick: half a minute"
COMPARED: tuple[Setting, ...] = ("article", "text", "draft")  # with equally many steps for all
NOTES = (
    "Steps of constant length do not converge: they end in a cycle around the solution whose size "
    "is proportional to lr, and its loss to lr². After the bend the curves show this cycle, not a "
    "speed; a smaller or falling lr would lower all of them.",
    "own dual: the dual of the norm in whose ball the algorithm steps, which theory bounds: "
    "spectral for neon, Frobenius for nsgd, nuclear for muon.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command; all others are those of fit."""
    repetitions.add_arguments(parser, trainings.RECIPES, seeds=10)


def run(options: argparse.Namespace, recipe: Sequence[str]) -> int:
    """Train, tabulate and plot.

    Args:
        options: See ``add_arguments``.
        recipe: Further arguments of fit.

    Returns:
        The exit status: 0, or 1 if a run failed.
    """
    paths, recipe = repetitions.plan(options, recipe, trainings.RESERVED, trainings.QUICK)
    problems: int = options.seeds
    plain = trainings.plain_trainings(paths, with_printed=not options.quick)
    traces = trainings.train(plain, paths, recipe, options)
    planned = trainings.planned_trainings(traces)
    traces |= trainings.train(planned, paths, recipe, options)
    if not traces:
        raise Refused(f"every run failed: see {options.out}/runs/*/output.txt")
    outcome = _outcome(traces, problems, recipe, options)
    print(outcome)
    outcome.save(options.out, "least_squares")
    failed = len(plain) + len(planned) - len(traces)
    if failed:
        print(f"failed runs: {failed}; see {options.out}/runs/*/output.txt")
    return int(bool(failed))


def _outcome(
    traces: Traces, problems: int, recipe: Sequence[str], options: argparse.Namespace
) -> Outcome:
    compared = {s: found for s in COMPARED if (found := setting_traces(traces, s))}
    ranked = {s: found for s in trainings.SIZES if (found := ranked_traces(traces, s))}
    leads = {setting: count_leads(found) for setting, found in ranked.items()}
    promises = theory.list_promises(traces)
    shown = [tables.last_table(setting, found) for setting, found in compared.items()]
    if not options.quick:
        shown += [tables.leads_table(s, ranked[s], leads[s], problems) for s in leads]
    if promises:
        shown.append(tables.theory_table(promises))
    return Outcome(
        tables=shown,
        columns=["setting", "recipe", "lr", "problem", "step", *QUANTITIES],
        rows=[
            [setting, name, trace.lr, problem, step, *numbers[i, problem].tolist()]
            for (setting, name), trace in traces.items()
            for numbers in [np.stack([trace.values[q] for q in QUANTITIES], -1)]
            for problem in range(problems)
            for i, step in enumerate(trace.steps)
        ],
        settings={"problems": problems, "seed": 0, "arguments": list(recipe)},
        draw=lambda canvas: figure.draw(canvas, traces, problems),
        size=(17, 3.6 * len({setting for setting, _ in traces} - {"printed"}) + 0.6),
        claims=[
            replace(claim, data=repetitions.describe_data(claim.data, recipe))
            for claim in claims.judge_all(compared, ranked, leads, promises)
        ]
        if repetitions.has_claims(options, some=True)
        else [],
        notes=NOTES,
        arguments=options.arguments,
    )
