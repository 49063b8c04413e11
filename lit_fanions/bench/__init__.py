"""The timings that the README quotes, one command each: `python -m lit_fanions.bench COMMAND`.

Every command prints a table that names the machine, and writes the same as JSON with `--json`.
A command is a module here with `add_arguments(parser)` and `run(options, recipe) -> Report`,
and a line in `__main__.COMMANDS`.
"""
