"""Trains a recipe at many settings with many seeds: `python -m lit_fanions.sweep --help`.

A room of its own beside `experiments.paper`, whose processes and outcomes it shares: it belongs to
no table or figure, takes any recipe, and needs Optuna, which they do not.
"""
