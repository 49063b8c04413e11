r"""NanoGPT with each algorithm at its own best learning rate, on equal tokens (section 5.3).

Every recipe is trained at several learning rates of its matrices, multiples of the one that it
states, with seed 0; while the best is the smallest or the largest one, the next beyond is tried
too, up to three times: a best that is still the last one is marked. At the best, it is trained with
more seeds. Seed 0 is one of them, so that it both chooses and counts: a small bias in favour of
every recipe. The outcome: final validation losses in a table, curves as CSV, with the losses over
the learning rates as a picture, everything as JSON.

  python -m experiments.paper nanogpt --jobs 2 --data.data_dir data/fineweb_bytes

The folder has the tokens of `python -m datamodules.fineweb tokenize`; its --help tells how. Other
arguments are those of fit and hold for every run, except those that tell the runs apart.
"""

import functools

from experiments.paper import tuning, verdicts
from experiments.paper.outcome import Claim, untested

TIME = "an hour for eight recipes; quick: half a minute"
DATA = "web text, 4 layers of width 128"
MARGIN = 0.01  # nats, below which losses count as equal


def claims(finals: tuning.Finals, data: str) -> list[Claim]:
    """What the last losses say about Neon."""
    neon, adamw, muon = (finals.get(f"{name}_cpu") for name in ("neon", "adamw", "muon"))
    if not (neon and adamw and muon):
        return [untested("neon-training", data, tuning.NO_BEST)]
    return [
        Claim(
            "neon-training",
            verdicts.every(verdicts.larger(neon, other, MARGIN) for other in (adamw, muon)),
            f"Neon's loss minus AdamW's: {verdicts.told(neon, adamw)}; minus Muon's: "
            f"{verdicts.told(neon, muon)}; each at its own lr",
            data,
            len(neon),
            f"Confirmed if both 95 % intervals are above {MARGIN} nats, refuted if one is below.",
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
    claims=claims,
)

add_arguments = functools.partial(tuning.add_arguments, comparison=COMPARISON)
run = functools.partial(tuning.run, comparison=COMPARISON)
