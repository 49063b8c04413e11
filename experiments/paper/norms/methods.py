"""The methods of Table 1 and beyond: norms, and the algorithms of Fanion that step in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_fanions import norms
from lit_fanions.cli.console import Table

K = 3  # rank of the k-Fanions
ALPHA = 0.5
MOMENTUM = 0.9
BLENDS: dict[str, dict[str, Any]] = {
    "F": {"blend": "frobenius"},
    "S": {"blend": "sign", "sign_scale": 1.0},
}
SPECTRAL, NUCLEAR, FANION = norms.Spectral(), norms.Nuclear(), norms.KyFanDual(K)


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        name: Name of the method.
        ball: Ball of its steps on matrices, in words.
        norm: Norm of that ball.
        algorithm: Its name in Fanion.
        options: Further options of Fanion.
        lemma: Where the article derives it.
    """

    name: str
    ball: str
    norm: norms.Norm
    algorithm: str
    options: Mapping[str, Any]
    lemma: str


_RANK = {"rank": K}
_HEAVY = {"momentum": MOMENTUM}
TABLE_1 = (
    Method("NSGD", "Frobenius, S2 = l2", norms.Frobenius(), "nsgd", {}, "Lemma 1"),
    Method("momentum NSGD", "Frobenius, S2 = l2", norms.Frobenius(), "nsgd", _HEAVY, "Lemma 1"),
    Method("SignSGD", "largest entry, l_inf", norms.MaxEntry(), "signum", {}, "Table 1"),
    Method("Signum", "largest entry, l_inf", norms.MaxEntry(), "signum", _HEAVY, "Table 1"),
    Method("Muon", "spectral, S_inf", SPECTRAL, "muon", {}, "Lemma 2"),
    Method("Gauss-Southwell", "sum of entries, l1", norms.SumEntry(), "coordinate", {}, "Table 1"),
    Method("Neon", "nuclear, S1", NUCLEAR, "neon", {}, "Lemma 3"),
)
BEYOND = (
    Method(f"{K}-Fanion", f"dual of Ky Fan {K}", FANION, "fanion", _RANK, "Lemma 6"),
    Method(f"Ky Fan {K}", f"Ky Fan {K}", norms.KyFan(K), "kyfan", _RANK, "–"),
    *(
        Method(
            f"{prefix}-{name}",
            f"dual of blend, alpha = {ALPHA}",
            norms.Blend(norm, ALPHA, blend["blend"]),
            f"{prefix}_{name}".lower(),
            {**options, "alpha": ALPHA, **blend},
            lemma if prefix == "F" else "–",
        )
        for prefix, blend in BLENDS.items()
        for name, norm, options, lemma in (
            ("Muon", SPECTRAL, {}, "Lemma 4"),
            ("Neon", NUCLEAR, {}, "Lemma 5"),
            ("Fanion", FANION, _RANK, "section 2.8"),
        )
    ),
)
METHODS = (*TABLE_1, *BEYOND)
# Methods for vectors, which others become on vectors or on the diagonal of a matrix.
VECTORS = {method.name: method.norm for method in (TABLE_1[0], TABLE_1[2], TABLE_1[5])}


def random_matrices(*shape: int, seed: int) -> Tensor:
    """Return standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of matrices: (..., m, n) -> (...)."""
    return (a * b).sum((-2, -1))


def methods_table() -> Table:
    """Return the table of methods, balls and norms."""
    cells = []
    for method in METHODS:
        options = [f"{name}={value}" for name, value in method.options.items()]
        algorithm = ", ".join([f'"{method.algorithm}"', *options])
        norm, (on_rows, on_diagonals) = repr(method.norm), vector_methods(method.norm)
        cells.append(
            [method.name, method.ball, norm, algorithm, method.lemma, on_rows, on_diagonals]
        )
    columns = ["method", "ball of the step", "norm", "Fanion", "where", "on 1 × n", "on diagonals"]
    return Table("Table 1, and beyond", columns, cells)


def vector_methods(norm: norms.Norm) -> tuple[str, str]:
    """Return which methods for vectors a norm's is on 1 × n matrices and on square diagonals."""
    vector = random_matrices(1, 7, seed=0)
    on_rows, on_diagonals = norm.lmo(vector), norm.lmo(torch.diag(vector[0]))
    directions = {name: other.lmo(vector) for name, other in VECTORS.items()}
    rows = [name for name, d in directions.items() if torch.allclose(on_rows, d)]
    diagonals = [n for n, d in directions.items() if torch.allclose(on_diagonals, torch.diag(d[0]))]
    return rows[0] if rows else "a mixture", diagonals[0] if diagonals else "–"
