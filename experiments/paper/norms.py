r"""Each method as steepest descent in a norm, step by step (Table 1, Lemmas 1 to 6 and 9).

Every row of Table 1, and what the article adds to it, is a norm and an algorithm of Fanion. Steps
of Fanion with exact solvers, on random gradients in float64, are held against -lr times the exact
oracle of the norm, which is held against its definition: <m, d> is the dual norm, |d| is 1. A
vector is a matrix of one row; the last columns say what becomes of a method there, and which method
for vectors it is on the diagonal of a matrix.

  python -m experiments.paper norms --seeds 10
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.bench.race import whole
from experiments.paper import verdicts
from experiments.paper.outcome import Claim, Outcome
from lit_fanions import Fanion, norms
from lit_fanions.cli.console import Table

TIME = "half a minute; quick: a few seconds"
BLENDS: dict[str, str] = {"F": "frobenius", "S": "sign"}
K = 3  # rank of the k-Fanions
ALPHA = 0.5
SHAPES, QUICK_SHAPES = ((6, 4), (5, 5), (4, 8), (1, 7)), ((4, 3), (1, 3))
LR = 0.1
MOMENTUM = 0.9
EXACT = 1e-10  # errors of float64 arithmetic are below it


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        name: Its name.
        ball: The set of its steps, on matrices.
        norm: In norms.
        algorithm: Of Fanion.
        options: That it takes beside.
        lemma: Where the article has it.
    """

    name: str
    ball: str
    norm: norms.Norm
    algorithm: str
    options: Mapping[str, Any]
    lemma: str


_SPECTRAL, _NUCLEAR, _FANION = norms.Spectral(), norms.Nuclear(), norms.KyFanDual(K)
_RANK = {"rank": K}
_HEAVY = {"momentum": MOMENTUM}
TABLE_1 = (
    Method("NSGD", "Frobenius, S2 = l2", norms.Frobenius(), "nsgd", {}, "Lemma 1"),
    Method("momentum NSGD", "Frobenius, S2 = l2", norms.Frobenius(), "nsgd", _HEAVY, "Lemma 1"),
    Method("SignSGD", "largest entry, l_inf", norms.MaxEntry(), "signum", {}, "Table 1"),
    Method("Signum", "largest entry, l_inf", norms.MaxEntry(), "signum", _HEAVY, "Table 1"),
    Method("Muon", "spectral, S_inf", _SPECTRAL, "muon", {}, "Lemma 2"),
    Method("Gauss-Southwell", "sum of entries, l1", norms.SumEntry(), "coordinate", {}, "Table 1"),
    Method("Neon", "nuclear, S1", _NUCLEAR, "neon", {}, "Lemma 3"),
)
BEYOND = (
    Method(f"{K}-Fanion", f"dual of Ky Fan {K}", _FANION, "fanion", _RANK, "Lemma 6"),
    Method(f"Ky Fan {K}", f"Ky Fan {K}", norms.KyFan(K), "kyfan", _RANK, "–"),
    *(
        Method(
            f"{prefix}-{name}",
            f"dual of blend, alpha = {ALPHA}",
            norms.Blend(norm, ALPHA, blend),
            f"{prefix}_{name}".lower(),
            {**options, "alpha": ALPHA},
            lemma if prefix == "F" else "–",
        )
        for prefix, blend in BLENDS.items()
        for name, norm, options, lemma in (
            ("Muon", _SPECTRAL, {}, "Lemma 4"),
            ("Neon", _NUCLEAR, {}, "Lemma 5"),
            ("Fanion", _FANION, _RANK, "section 2.8"),
        )
    ),
)
METHODS = (*TABLE_1, *BEYOND)
# What they may be on vectors, and on the diagonal of a matrix.
VECTORS = {method.name: method.norm for method in (TABLE_1[0], TABLE_1[2], TABLE_1[5])}


class Check(NamedTuple):
    """What steps of one method on matrices of one shape show, one value a gradient.

    Attributes:
        step: Largest difference of an entry of a step from -lr times the oracle, over lr.
        dual: <m, d> over the dual norm, minus 1.
        norm: |d| - 1.
        fast: <m, d> over the dual norm for Fanion's default solvers.
    """

    step: Tensor
    dual: Tensor
    norm: Tensor
    fast: Tensor


Checks = dict[str, dict[tuple[int, int], Check]]  # method -> shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--seeds", type=whole, default=5, help="random gradients of each shape (default: 5)"
    )


def run(options: argparse.Namespace) -> int:
    """Step, compare and tabulate.

    Args:
        options: See ``add_arguments``.

    Returns:
        The exit status, 0.
    """
    shapes: Sequence[tuple[int, int]] = QUICK_SHAPES if options.quick else SHAPES
    seeds = min(options.seeds, 2) if options.quick else options.seeds
    found = {
        method.name: {shape: _check(method, shape, seeds) for shape in shapes} for method in METHODS
    }
    outcome = Outcome(
        tables=[_methods_table(), _checks_table(found)],
        columns=["method", "rows", "cols", "seed", "quantity", "value"],
        rows=[
            [name, *shape, seed, quantity, value]
            for name, checks in found.items()
            for shape, check in checks.items()
            for quantity, values in check._asdict().items()
            for seed, value in enumerate(values.tolist())
        ],
        settings={
            "seeds": list(range(seeds)),
            "shapes": shapes,
            "k": K,
            "alpha": ALPHA,
            "sign_scale": 1.0,
            "momentum": MOMENTUM,
        },
        claims=[] if options.quick else _claims(found, shapes, seeds),
        notes=NOTES,
    )
    print(outcome)
    outcome.save(options.out, "norms")
    return 0


def _gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1))


# Steps.


def _check(method: Method, shape: tuple[int, int], seeds: int) -> Check:
    exact = {"polar": "exact", "solver": "exact"}
    pairs = [_step(method, shape, seed, exact) for seed in range(seeds)]
    momentum, step = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    fast = torch.stack([_step(method, shape, seed, {})[1] for seed in range(seeds)])
    dual = method.norm.dual(momentum)
    return Check(
        step=(step + method.norm.lmo(momentum)).abs().amax((-2, -1)),
        dual=-_inner(momentum, step) / dual - 1,
        norm=method.norm.value(step) - 1,
        fast=-_inner(momentum, fast) / dual,
    )


def _step(
    method: Method, shape: tuple[int, int], seed: int, solver: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The momentum, and the step over lr, of the second of two steps of Fanion."""
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    options = {"algorithm": method.algorithm, "momentum": 0.0, **method.options, **solver}
    if "rank" in options:
        options["rank"] = min(options["rank"], *shape)
    optimizer = Fanion([weight], lr=LR, nesterov=False, scale="none", **options)
    decay, momentum = options["momentum"], torch.zeros(shape, dtype=torch.float64)
    for gradient in _gaussian(2, *shape, seed=seed):
        before = weight.detach().clone()
        weight.grad = gradient
        momentum = decay * momentum + (1 - decay) * gradient
        optimizer.step()
    return momentum, (weight.detach() - before) / LR


def _methods_table() -> Table:
    cells = []
    for method in METHODS:
        options = [f"{name}={value}" for name, value in method.options.items()]
        algorithm = ", ".join([f'"{method.algorithm}"', *options])
        norm, (on_rows, on_diagonals) = repr(method.norm), _analogues(method.norm)
        cells.append(
            [method.name, method.ball, norm, algorithm, method.lemma, on_rows, on_diagonals]
        )
    columns = ["method", "ball of the step", "norm", "Fanion", "where", "on 1 × n", "on diagonals"]
    return Table("Table 1, and beyond", columns, cells)


def _analogues(norm: norms.Norm) -> tuple[str, str]:
    """Which method for vectors a norm's is on 1 × n matrices, and on diagonals of square ones."""
    vector = _gaussian(1, 7, seed=0)
    on_rows, on_diagonals = norm.lmo(vector), norm.lmo(torch.diag(vector[0]))
    names = {name: of.lmo(vector) for name, of in VECTORS.items()}
    rows = [name for name, d in names.items() if torch.allclose(on_rows, d)]
    diagonals = [n for n, d in names.items() if torch.allclose(on_diagonals, torch.diag(d[0]))]
    return rows[0] if rows else "a mixture", diagonals[0] if diagonals else "–"


def _worst(checks: Mapping[tuple[int, int], Check]) -> Check:
    """Of all shapes and gradients."""
    step, dual, norm, fast = (torch.cat(values) for values in zip(*checks.values(), strict=True))
    return Check(step.amax(), dual.abs().amax(), norm.abs().amax(), fast.amin())


def _checks_table(found: Checks) -> Table:
    cells = []
    for name, checks in found.items():
        worst = _worst(checks)
        cells.append([name, *(f"{e.item():.0e}" for e in worst[:3]), f"{worst.fast.item():.4f}"])
    columns = ["method", "step + lr d", "<m, d> / dual - 1", "|d| - 1", "default solvers"]
    return Table("Largest errors of all steps; least <m, d> / dual norm", columns, cells)


NOTES = (
    "step + lr d: largest entry, over lr, of the difference of Fanion's step (exact solvers) from "
    "-lr d, with d the exact oracle. |d| of sign blends is known within 1e-6.",
    "On 1 × n matrices all norms of singular values are the Euclidean one: Muon, Neon and "
    "k-Fanions of a vector are NSGD.",
)


# Claims.


def _claims(found: Checks, shapes: Sequence[tuple[int, int]], seeds: int) -> list[Claim]:
    data = "random gradients, " + ", ".join(f"{m} × {n}" for m, n in shapes)
    n = len(shapes) * seeds
    return [
        _steps_claim(
            "lemmas",
            {m.name: found[m.name] for m in METHODS if m.lemma.startswith("Lemma")},
            data,
            n,
        ),
        _ky_fan_dual(n),
        _ends(n),
        _steps_claim(
            "table-1",
            {m.name: found[m.name] for m in TABLE_1},
            data,
            n,
            f" Coordinate descent takes the largest |g_i|, with its sign; the printed largest g_i "
            f"is another entry for {_other_entry(1000):.0%} of 1000 random vectors.",
        ),
        _lemma_9(n),
        _minima(n),
    ]


_RULE = f"Confirmed if no error is above {EXACT:.0e}."


def _steps_claim(id: str, found: Checks, data: str, n: int, more: str = "") -> Claim:
    worst = {name: max(e.item() for e in _worst(checks)[:3]) for name, checks in found.items()}
    return Claim(
        id,
        verdicts.of(max(worst.values()) <= EXACT),
        "largest error of the step, of <m, d> / dual norm and of |d|: "
        + ", ".join(f"{name} {error:.0e}" for name, error in worst.items()),
        data,
        n,
        _RULE + more,
    )


def _other_entry(count: int) -> float:
    """How often the largest entry is not the one of the largest absolute value."""
    g = _gaussian(count, 10, seed=0)
    return (g.argmax(-1) != g.abs().argmax(-1)).double().mean().item()


def _ky_fan_dual(n: int) -> Claim:
    # From below by a point of the Ky Fan ball, from above by many.
    attained, exceeded = 0.0, 0.0
    for k in (1, 2, 3, 4, 5):
        x, others = _gaussian(n, 6, 5, seed=0), _gaussian(n, 200, 6, 5, seed=1)
        others = torch.cat([others, others.sign(), norms.Spectral().lmo(others)], 1)
        dual = torch.maximum(norms.Nuclear().value(x) / k, norms.Spectral().value(x))
        ball = norms.KyFan(k)
        point = ball.lmo(x)
        reached = _inner(x, point) / ball.value(point)
        attained = max(attained, (reached / dual - 1).abs().max().item())
        ratio = _inner(x.unsqueeze(1), others) / ball.value(others) / dual.unsqueeze(1)
        exceeded = max(exceeded, ratio.max().item())
    return Claim(
        "ky-fan-dual",
        verdicts.of(attained <= EXACT and exceeded <= 1 + EXACT),
        f"attained in the Ky Fan ball within {attained:.0e}; of other points at most "
        f"{exceeded:.3f} of it",
        "random 6 × 5 matrices, k = 1 to 5, 600 other points each",
        n,
        f"{_RULE} And no point of the ball goes beyond it.",
    )


def _ends(n: int) -> Claim:
    x = _gaussian(n, 6, 5, seed=2)
    ends = ((norms.KyFanDual(5), _SPECTRAL), (norms.KyFanDual(1), _NUCLEAR))
    errors = [
        max(
            (fanion.lmo(x) - other.lmo(x)).abs().max().item(),
            (fanion.value(x) / other.value(x) - 1).abs().max().item(),
        )
        for fanion, other in ends
    ]
    return Claim(
        "fanion-ends",
        verdicts.of(max(errors) <= EXACT),
        f"largest difference of updates and norms: {errors[0]:.0e}, {errors[1]:.0e}",
        "random 6 × 5 matrices",
        n,
        _RULE,
    )


_ALPHAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def _lemma_9(n: int) -> Claim:
    # Points of the sum are in the ball, and points of the ball's surface are sums, of parts of
    # the full sizes.
    beyond, apart = 0.0, 0.0
    for norm in (_SPECTRAL, _NUCLEAR, _FANION):
        for alpha in _ALPHAS:
            blend = norms.Blend(norm, alpha)
            a, b = _gaussian(2, n, 6, 5, seed=3)
            a, b = (x / of.value(x)[:, None, None] for x, of in ((a, norm), (b, norms.Frobenius())))
            beyond = max(beyond, blend.value(alpha * a + (1 - alpha) * b).max().item())
            a = _gaussian(n, 6, 5, seed=4)
            a = a / blend.value(a)[:, None, None]
            z = blend.split(a)
            sizes = (norm.value(z) - alpha, norms.Frobenius().value(a - z) - (1 - alpha))
            apart = max(apart, *(size.max().item() for size in sizes))
    return Claim(
        "lemma-9",
        verdicts.of(beyond <= 1 + EXACT and apart <= EXACT),
        f"largest norm of a sum of points of the two balls: {beyond:.10f}; points of norm 1 are "
        f"such sums, the parts' norms above alpha and 1 - alpha by at most {max(apart, 0.0):.0e}",
        f"F-Muon, F-Neon and F-{K}-Fanion, alpha = {', '.join(f'{a:g}' for a in _ALPHAS)}, random "
        "6 × 5 matrices",
        n,
        _RULE,
    )


def _minima(n: int) -> Claim:
    # <y, d> of a point d of norm 1 in F* (F2) is below the dual, Z and t of (22) and (23) above.
    gap, ends = 0.0, 0.0
    for norm in (_SPECTRAL, _NUCLEAR):
        y = _gaussian(n, 6, 5, seed=5).requires_grad_()
        for alpha in _ALPHAS:
            blend = norms.Blend(norm, alpha)
            value = blend.value(y)
            (d,) = torch.autograd.grad(value.sum(), y)
            x, z, t = y.detach(), blend.split(y.detach()), value.detach()
            below = _inner(x, d) / blend.dual(d)
            if 0 < alpha < 1:
                sizes = (norm.value(z) / alpha, norms.Frobenius().value(x - z) / (1 - alpha))
                gap = max(gap, (torch.maximum(*sizes) / below - 1).max().item())
            else:
                limit = norm if alpha == 1 else norms.Frobenius()
                ends = max(ends, (t / limit.value(x) - 1).abs().max().item())
    return Claim(
        "blend-duals",
        verdicts.of(gap <= EXACT and ends <= EXACT),
        f"the minimum is above the dual norm's lower bound by at most {gap:.0e}; at alpha = 1 and "
        f"0 it differs from the spectral or nuclear and the Frobenius norm by at most {ends:.0e}",
        f"alpha = {', '.join(f'{a:g}' for a in _ALPHAS)}, random 6 × 5 matrices",
        n,
        _RULE,
    )
