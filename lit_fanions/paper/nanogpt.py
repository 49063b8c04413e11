r"""NanoGPT with each algorithm at its own best learning rate, on equal tokens (section 5.3).

Every recipe is trained at several learning rates of its matrices, multiples of the one that it
states, with seed 0; while the best is the smallest or the largest one, the next beyond is tried
too, up to three times: a best that is still the last one is marked. At the best, it is trained with
more seeds. Seed 0 is one of them, so that it both chooses and counts: a small bias in favour of
every recipe. The outcome: final validation losses in a table, curves as CSV, with the losses over
the learning rates as a picture, everything as JSON.

  python -m lit_fanions.paper nanogpt --jobs 2 --data.data_dir data/fineweb_bytes

Other arguments are those of fit and hold for every run, except those that tell the runs apart.
"""

import functools

from lit_fanions.paper import tuning, verdicts
from lit_fanions.paper.outcome import Claim

TIME = "an hour for eight recipes; quick: half a minute"
MARGIN = 0.01  # nats, below which losses count as equal


def claims(finals: tuning.Finals) -> list[Claim]:
    """What the last losses say about Neon."""
    neon, adamw = finals.get("neon_cpu"), finals.get("adamw_cpu")
    if not neon or not adamw:
        return []
    return [
        Claim(
            "neon-training",
            verdicts.larger(neon, adamw, MARGIN),
            f"Neon's loss minus AdamW's, each at its own lr: {verdicts.told(neon, adamw)}",
            "web text, 4 layers of width 128",
            len(neon),
            f"Confirmed if the 95 % interval is above 0, refuted if it is below {MARGIN} nats.",
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
    claims=claims,
)

add_arguments = functools.partial(tuning.add_arguments, comparison=COMPARISON)
run = functools.partial(tuning.run, comparison=COMPARISON)
