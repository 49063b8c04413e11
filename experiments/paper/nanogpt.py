r"""NanoGPT with each algorithm at its own best learning rate, on equal tokens (section 5.3).

Every recipe is trained with seed 0 at several learning rates of its matrices, multiples of the one
that it states. While the best is the smallest or the largest one tried, the next one beyond is
tried too, up to three times; a best that is still at the edge is marked. At the best learning rate
it is trained with more seeds. Seed 0 is one of them, so that it both chooses and counts: a small
bias in favour of every recipe. The outcome: final validation losses as a table, curves as CSV, both
as a picture, everything as JSON.

  python -m experiments.paper nanogpt --jobs 2 --data.data_dir data/fineweb_bytes

--data.data_dir is a folder made by `python -m datamodules.fineweb tokenize` (see its --help). All
other options are passed to `fit` for every run.
"""

import functools

from experiments.paper import tuning, verdicts
from experiments.paper.outcome import Claim, judge, untested

TIME = "an hour for eight recipes; quick: half a minute"
DATA = "web text, 4 layers of width 128"
MARGIN = 0.01  # nats; smaller differences of losses count as none


def judge_all(finals: tuning.Finals, data: str) -> list[Claim]:
    """Return the verdict on Neon.

    Args:
        finals: Last losses of the recipes whose best learning rate is certain.
        data: The data, in words.
    """
    neon, adamw, muon = (finals.get(f"{name}_cpu") for name in ("neon", "adamw", "muon"))
    if not (neon and adamw and muon):
        return [untested("neon-training", data, tuning.NO_BEST)]
    return [
        judge(
            "neon-training",
            verdicts.all_hold(verdicts.larger(neon, other, MARGIN) for other in (adamw, muon)),
            f"Neon's loss minus AdamW's: {verdicts.mean_difference(neon, adamw)}; minus Muon's: "
            f"{verdicts.mean_difference(neon, muon)}; each at its own lr",
            data,
            len(neon),
            margin=MARGIN,
        )
    ]


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
