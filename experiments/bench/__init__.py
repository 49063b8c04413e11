"""The timings that README and docs quote, one command each: `python -m experiments.bench COMMAND`.

Every command prints a table that names the machine. `--json` saves the same numbers, and `--plot`
draws the medians of a race. A command is a module here with `add_arguments(parser)` and
`run(options) -> Report`, and an entry in `__main__.COMMANDS`. Races share `race`; commands that
train a recipe share `recipe`; tables, plots and JSON files are those of `lit_fanions.cli.console`.
"""
