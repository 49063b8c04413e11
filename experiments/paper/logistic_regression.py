r"""Logistic regression, each algorithm at its own best lr (section 6.2 of the draft, only a title).

Multinomial logistic regression on the digits that come with scikit-learn, pixels and their products
as features, all examples in every step. Every recipe is trained at several learning rates,
multiples of the one that it states, with seed 0; while the best is the smallest or the largest one,
the next beyond is tried too, up to three times. At the best, it is trained with more seeds, which
are splits into training and test examples. The outcome: training loss and gradient norms.

  python -m experiments.paper logistic_regression --jobs 2

Other arguments are those of fit and hold for every run, except those that tell the runs apart.
"""

import functools

from experiments.paper import tuning

TIME = "about three minutes; quick: half a minute"
COMPARISON = tuning.Comparison(
    name="logistic_regression",
    metrics=["train/loss", "gradient/spectral", "gradient/frobenius", "gradient/nuclear"],
    recipes=("configs/logistic_regression/*.yaml",),
    quick=("configs/logistic_regression/f_muon.yaml", "--trainer.max_steps=5"),
    seeds=3,
    logarithmic=True,
)

add_arguments = functools.partial(tuning.add_arguments, comparison=COMPARISON)
run = functools.partial(tuning.run, comparison=COMPARISON)
