r"""Logistic regression, each algorithm at its own best lr (section 6.2 of the draft, only a title).

Multinomial logistic regression on the digits that come with scikit-learn, with pixels and their
products as features and all examples in every step. The best learning rate of each recipe is found
as by `nanogpt`; the seeds are splits into training and test examples. The outcome: training loss
and gradient norms.

  python -m experiments.paper logistic_regression --jobs 2

All other options are passed to `fit` for every run.
"""

import functools

from experiments.paper import tuning

TIME = "about ten minutes; quick: half a minute"
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
