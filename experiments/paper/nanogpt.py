r"""NanoGPT with each algorithm at its own best learning rate, on equal tokens (section 5.3).

Every recipe is trained with seed 0 at seven learning rates of its matrices, from 1/64 to 64 times
the one that it states: a narrow grid stops in a local optimum. While the best is the smallest or
the largest one tried, the next one beyond is tried too, up to six times; a best that is still at
the edge is marked. Then the geometric means of the best and its neighbours are tried, three times,
so that neighbours differ by 20 %. At the best learning rate it is trained with more seeds. Seed 0
is one of them, so that it both chooses and counts: a small bias in favour of every recipe.

The outcome: final validation losses as a table, curves as CSV, both as a picture, everything as
JSON.

  python -m experiments.paper nanogpt --jobs 2 --data.data_dir data/fineweb_bytes

--data.data_dir is a folder made by `python -m datamodules.fineweb tokenize` (see its --help). All
other options are passed to `fit` for every run.
"""

import functools

from experiments.paper import tuning, verdicts
from experiments.paper.outcome import Claim, judge, untested

TIME = "four hours for eight recipes; quick: half a minute"
DATA = "web text, 4 layers of width 128"
MARGIN = 0.01  # nats; smaller differences of losses count as none


def judge_all(finals: tuning.Finals, data: str) -> list[Claim]:
    """Return the verdicts on Neon, and on F-Muon and S-Muon together.

    Args:
        finals: Last losses of the recipes whose best learning rate is certain.
        data: The data, in words.
    """
    neon, adamw, muon, f_muon, s_muon = (
        finals.get(f"{name}_cpu") for name in ("neon", "adamw", "muon", "f_muon", "s_muon")
    )
    claims = []
    if neon and adamw and muon:
        minus_adamw, minus_muon = (verdicts.mean_difference(neon, other) for other in (adamw, muon))
        claims.append(
            judge(
                "neon-training",
                verdicts.all_hold(verdicts.larger(neon, other, MARGIN) for other in (adamw, muon)),
                f"Neon's loss minus AdamW's: {minus_adamw}; minus Muon's: {minus_muon}; each at "
                "its own lr",
                data,
                len(neon),
                margin=MARGIN,
            )
        )
    else:
        claims.append(untested("neon-training", data, tuning.NO_BEST))
    if muon and f_muon and s_muon:
        differences = {
            "F-Muon": verdicts.mean_difference(f_muon, muon),
            "S-Muon": verdicts.mean_difference(s_muon, muon),
        }
        found = "; ".join(f"{name} minus Muon: {x}" for name, x in differences.items())
        equal = [verdicts.equal(blend, muon, MARGIN) for blend in (f_muon, s_muon)]
        claims.append(
            judge(
                "final-match",
                verdicts.all_hold(equal),
                f"{found}; each at its own lr",
                data,
                len(muon),
                margin=MARGIN,
            )
        )
    else:
        claims.append(untested("final-match", data, tuning.NO_BEST))
    return claims


COMPARISON = tuning.Comparison(
    name="nanogpt",
    metrics=["val/loss"],
    recipes=("configs/nanogpt/*_cpu.yaml",),
    quick=(
        "configs/nanogpt/quickstart.yaml",
        *("--trainer.max_steps=4", "--trainer.limit_val_batches=2"),
        *("--data.val_every_n_steps=2", "--test_after_fit=false"),
    ),
    seeds=3,
    data=DATA,
    judge=judge_all,
)

add_arguments = functools.partial(tuning.add_arguments, comparison=COMPARISON)
run = functools.partial(tuning.run, comparison=COMPARISON)
