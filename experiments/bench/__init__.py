"""The timings that the README quotes, one command each: `python -m experiments.bench COMMAND`.

Every command prints a table that names the machine, and writes the same as JSON with `--json`; a
race of competitors also draws its medians with `--plot`. A command is a module here with
`add_arguments(parser)` and `run(options) -> Report`, and a line in `__main__.COMMANDS`. What
races share is in `race`, what all commands share in `report`.
"""
