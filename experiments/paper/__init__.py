"""The paper's tables and figures, one command each: `python -m experiments.paper --list`.

A command trains recipes, times solvers or evaluates norms, and saves its outcome in a folder: a
picture, a table (CSV), and all numbers with settings, seeds, versions and verdicts on the paper's
claims (JSON). A finished training is not repeated, so an interrupted command continues when it is
started again. The command `claims` makes one page of all verdicts.

To add a command:

1. Write a module (or a package, if it is long) in this folder. Its docstring is the `--help` text:
   the first line says what the command regenerates, and an indented line shows how to start it.
   It has `TIME` (how long it takes, for `--list`), `add_arguments(parser)`, and
   `run(options) -> int`, which returns the exit status. A command that trains recipes also takes
   the other arguments, those of fit: `run(options, recipe)`. `alphas` and `tuning` hold what such
   commands share.
2. List it in `COMMANDS` of `__main__.py`, and in `TRAINING` there if it trains recipes.
3. In `run`, print and save an `outcome.Outcome` (tables, all numbers as rows, a function that draws
   the picture), with `arguments=options.arguments`. With `--quick` use tiny sizes and no claims.
4. If it judges a claim of the paper, describe the claim in `statements.yaml`, compute the verdict
   by the rules in `verdicts`, and pass `outcome.judge(...)` among the outcome's claims.
"""
