"""The paper's tables and figures, one command each: `python -m experiments.paper --list`.

A command trains recipes, times solvers or draws norms, and leaves its outcome as a
picture, a table (CSV) and all numbers with settings, seeds and versions (JSON) in a folder. What
is finished there is not run again, so an interrupted command goes on where it stopped.
"""
