"""Fast oracles of norm balls on batches of matrices: what the optimizer steps along.

``direction`` is the whole family of the paper in three numbers (rank, alpha, blend); ``polar`` and
``top_singular`` are its two engines, full rank and rank k; ``BALLS`` is the table of balls. The
exact counterparts are in ``lit_fanions.norms``.
"""

from lit_fanions.lmo.balls import BALLS, Ball
from lit_fanions.lmo.block_power import start_block, warmed, widened
from lit_fanions.lmo.directions import Oracle, direction
from lit_fanions.lmo.newton_schulz import polar, polar_dtype
from lit_fanions.lmo.presets import PolarMethod
from lit_fanions.lmo.problems import OVERSAMPLING, Answer, Case, Problem, Settings, Triplets
from lit_fanions.lmo.scaling import frobenius_norm, largest_entry, unit_frobenius
from lit_fanions.lmo.singular_triplets import SOLVERS, Search, Solver, lanczos_search, top_singular

__all__ = [
    "BALLS",
    "OVERSAMPLING",
    "SOLVERS",
    "Answer",
    "Ball",
    "Case",
    "Oracle",
    "PolarMethod",
    "Problem",
    "Search",
    "Settings",
    "Solver",
    "Triplets",
    "direction",
    "frobenius_norm",
    "lanczos_search",
    "largest_entry",
    "polar",
    "polar_dtype",
    "start_block",
    "top_singular",
    "unit_frobenius",
    "warmed",
    "widened",
]
