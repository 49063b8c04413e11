"""Grids and searches over the options of a recipe: `python -m lit_fanions.sweep --help`.

This package needs Optuna, and stands above `lit_fanions.cli`, whose child processes and results it
uses.
"""
