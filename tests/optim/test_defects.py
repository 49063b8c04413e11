"""Defects that other Muon-like optimizers have had: one section each, so that none comes back."""

import copy
import importlib
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.bench.step import peak_bytes
from lit_fanions import Fanion, configure_optimizers, split_parameters
from lit_fanions.optim import matrix_step

# The package's attribute of that name is the function.
polar_module = importlib.import_module("lit_fanions.lmo.newton_schulz")

MATRIX = [
    "muon", "neon", "fanion", "kyfan", "nsgd", "signum", "coordinate", "f_muon", "f_neon",
    "f_fanion", "s_muon", "s_neon", "s_fanion", "dion",
]  # fmt: skip
EVERY = [*MATRIX, "adamw", "sgd"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(normal(*shape, seed=seed).to(dtype))


def run(optimizer: Fanion, steps: int, start: int = 0) -> None:
    for i in range(start, start + steps):
        for j, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = normal(*p.shape, seed=100 * i + j).to(p.dtype)
        optimizer.step()


def polar(m: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(m.double(), full_matrices=False)
    return u @ vh


def cosine(a: Tensor, b: Tensor) -> float:
    return nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def groups_of(module: nn.Module, **options: Any) -> dict[str, str]:
    return {a.name: a.group for a in split_parameters(module, options or None)}


# 1. A stack of same-shape parameters flattened into one matrix.


STACKED = [
    *({"algorithm": name} for name in MATRIX),
    {"algorithm": "muon", "renormalize": True, "scale": "match_rms_adamw"},
    {"algorithm": "neon", "error_feedback": True},
    {"algorithm": "f_neon", "splits": 3, "scale": "match_rms_adamw"},
    {"algorithm": "s_muon", "splits": [4, 8]},
]


@pytest.mark.parametrize("options", STACKED, ids=str)
def test_parameters_of_one_shape_stay_separate_matrices(options, monkeypatch):
    def stacks(parameters: list[Tensor], group: object) -> list[list[Tensor]]:
        """How parameters are stacked on accelerators, and how they are not."""
        shapes = dict.fromkeys(p.shape for p in parameters)
        together = [[p for p in parameters if p.shape == shape] for shape in shapes]
        return together if stacked else [[p] for p in parameters]

    monkeypatch.setattr(matrix_step, "stacks", stacks)

    def train() -> list[Tensor]:
        ps = [parameter(12, 8, seed=i) for i in range(3)]
        ps.append(parameter(12, 4, 2, seed=3))
        optimizer = Fanion(ps, **options, lr=0.1)
        for i in range(4):
            for j, p in enumerate(ps):
                p.grad = normal(*p.shape, seed=10 * i + j)
            ps[1].grad[0] = math.nan if i == 2 else 0.0
            ps[2].grad = None if i == 1 else ps[2].grad
            optimizer.step()
        return [p.detach() for p in ps] + [optimizer.state[p]["momentum"] for p in ps]

    stacked = False
    separate = train()
    stacked = True
    for alone, together in zip(separate, train(), strict=True):
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


# 2. A preset cycled past its table: gradient ascent.


@pytest.mark.parametrize("polar_method", ["jordan", "polar_express", "cans", "convergent"])
def test_more_steps_than_a_preset_has_rows_are_still_descent(polar_method):
    grad = normal(24, 16) @ torch.diag(torch.logspace(0, -2, 16))
    for steps in range(5, 13):
        p = nn.Parameter(torch.zeros(24, 16))
        p.grad = grad.clone()
        Fanion([p], lr=1.0, polar=polar_method, polar_steps=steps).step()
        assert cosine(-p.detach(), polar(grad)) > 0.8, steps


@pytest.mark.parametrize("steps", [4, 6])
def test_a_preset_that_must_not_be_continued_refuses_other_counts(steps):
    with pytest.raises(ValueError, match="exactly 5 steps"):
        Fanion([parameter(4, 4)], polar="quintic", polar_steps=steps)


# 3. bf16 parameters without Nesterov momentum: the momentum normalised in place.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("algorithm", [name for name in MATRIX if name != "dion"])
def test_the_momentum_is_the_average_of_the_gradients_and_nothing_else(algorithm, nesterov, dtype):
    p = parameter(10, 6, dtype=dtype)
    optimizer = Fanion([p], algorithm=algorithm, nesterov=nesterov, momentum=0.9, lr=0.02)
    want = torch.zeros(10, 6, dtype=dtype)
    for i in range(4):
        p.grad = normal(10, 6, seed=i).to(dtype)
        optimizer.step()
        want.lerp_(p.grad, 1 - 0.9)
        assert torch.equal(optimizer.state[p]["momentum"], want)


# 4. Convolutions: the factor taken from the kernel's height and width.


@pytest.mark.parametrize(
    ("module", "rows", "cols"),
    [
        (nn.Conv2d(3, 64, 3), 64, 27),
        (nn.Conv2d(64, 8, 3), 8, 576),
        (nn.Conv2d(64, 8, (1, 7)), 8, 448),
        (nn.Conv1d(4, 32, 5), 32, 20),
        (nn.Conv3d(2, 64, 2), 64, 16),
        (nn.ConvTranspose2d(3, 64, 2), 64, 12),
        (nn.ConvTranspose1d(64, 3, 2), 3, 128),
        (nn.Conv2d(8, 64, 3, groups=2), 32, 36),
    ],
)
@pytest.mark.parametrize("scale", ["original", "spectral_unclamped", "match_rms_adamw"])
def test_convolutions_step_as_flattened_matrices(module, rows, cols, scale):
    want = {
        "original": math.sqrt(max(1.0, rows / cols)) * math.sqrt(min(rows, cols)),
        "spectral_unclamped": math.sqrt(rows / cols) * math.sqrt(min(rows, cols)),
        "match_rms_adamw": 0.2 * math.sqrt(rows * cols),
    }[scale]
    optimizer = configure_optimizers(module, scale=scale, polar="exact", lr=1.0)["optimizer"]
    before = module.weight.detach().clone()
    module.weight.grad = normal(*before.shape)
    optimizer.step()
    count = before.numel() / (rows * cols)
    norm = (before - module.weight.detach()).norm().item() / math.sqrt(count)
    assert norm == pytest.approx(want, rel=1e-4)


# 5. Heads and embeddings among the matrices; tied weights; in_proj_weight missed.


class Language(nn.Module):
    """Embedding, attention, head; tied in either order."""

    def __init__(self, tied: str = "") -> None:
        super().__init__()
        if tied == "head first":
            self.lm_head = nn.Linear(8, 20, bias=False)
        self.wte = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        if tied != "head first":
            self.lm_head = nn.Linear(8, 20, bias=False)
        if tied:
            self.wte.weight = self.lm_head.weight


def test_embedding_head_and_attention_go_where_they_belong():
    groups = groups_of(Language())
    assert groups["wte.weight"] == "embedding" and groups["lm_head.weight"] == "head"
    assert groups["attention.in_proj_weight"] == groups["attention.out_proj.weight"] == "matrix"


@pytest.mark.parametrize("tied", ["head first", "head last"])
def test_a_tied_weight_is_an_embedding_once(tied):
    module = Language(tied)
    (shared,) = (a for a in split_parameters(module) if a.parameter is module.wte.weight)
    assert shared.group == "embedding" and "tied" in shared.reason
    optimizer = configure_optimizers(module)["optimizer"]
    run(optimizer, 2)


def test_q_k_and_v_are_three_matrices():
    module = nn.MultiheadAttention(8, 2, bias=False)
    optimizer = configure_optimizers(module, polar="exact", lr=1.0, scale="none")["optimizer"]
    before = module.in_proj_weight.detach().clone()
    grad = normal(24, 8)
    module.in_proj_weight.grad = grad.clone()
    optimizer.step()
    taken = (before - module.in_proj_weight.detach()).double()
    for part, g in zip(taken.chunk(3), grad.chunk(3), strict=True):
        torch.testing.assert_close(part, polar(g), rtol=0, atol=1e-5)


# 6. Matrices left out of their group train silently at the other group's small lr.


def test_a_matrix_left_out_needs_an_lr_or_inherits_one_loudly(recwarn):
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    chosen = {"overrides": {"frozenish": {"parameters": ["0.weight"], "algorithm": "adamw"}}}
    with pytest.warns(UserWarning, match=r"frozenish.*no lr of its own.*overrides.frozenish.lr"):
        configure_optimizers(module, chosen)
    recwarn.clear()
    chosen["overrides"]["frozenish"]["lr"] = 1e-3
    configure_optimizers(module, chosen)
    assert not [w for w in recwarn if "no lr" in str(w.message)]


# 7. Weights re-initialised at the first step; gradients changed or cleared.


@pytest.mark.parametrize("algorithm", EVERY)
def test_the_first_step_starts_from_the_weights_it_was_given(algorithm):
    p = parameter(6, 4)
    before = p.detach().clone()
    optimizer = Fanion([p], algorithm=algorithm, lr=1e-6)
    assert torch.equal(p, before)
    run(optimizer, 1)
    assert not torch.equal(p, before)
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("options", [{}, {"nesterov": False}], ids=str)
@pytest.mark.parametrize("algorithm", EVERY)
def test_gradients_are_left_as_they_are(algorithm, options, nonfinite):
    if algorithm == "adamw":
        options = {}
    p, bad = parameter(6, 4), parameter(6, 4)
    optimizer = Fanion([p, bad], algorithm=algorithm, nonfinite=nonfinite, **options, lr=0.02)
    p.grad, bad.grad = normal(6, 4), torch.full((6, 4), math.nan)
    grad, before = p.grad, p.grad.clone()
    optimizer.step()
    optimizer.step()
    assert p.grad is grad and torch.equal(grad, before)
    assert bad.grad.isnan().all()


# 8. step() without a closure argument.


@pytest.mark.parametrize("algorithm", ["muon", "dion", "adamw"])
def test_a_closure_is_called_once_with_gradients_on(algorithm):
    p = parameter(6, 4)
    optimizer = Fanion([p], algorithm=algorithm, lr=0.02)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    want = before.square().sum()
    with torch.no_grad():
        assert torch.equal(optimizer.step(closure), want)
    want = p.detach().square().sum()
    assert torch.equal(optimizer.step(closure=closure), want)
    assert calls == [True, True]
    assert not torch.equal(p, before)
    assert optimizer.step() is None


# 9. Groups without names.


def test_groups_have_names_that_monitors_show():
    optimizer = configure_optimizers(Language(), total_steps=10)["optimizer"]
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names) and {"embedding", "head", "vector"} <= set(names)
    with pytest.raises(ValueError, match="name"):
        Fanion([{"params": [parameter(3, 3, seed=i)], "name": "same"} for i in range(2)])


# 10. Hyperparameters outside param_groups.

CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("muon", {"lr": 0.3}),
    ("muon", {"momentum": 0.5}),
    ("muon", {"nesterov": False}),
    ("muon", {"weight_decay": 0.5}),
    ("muon", {"rank": 2}),
    ("muon", {"alpha": 0.5}),
    ("f_muon", {"blend": "sign"}),
    ("s_muon", {"sign_scale": 0.1}),
    ("muon", {"polar": "jordan"}),
    ("muon", {"polar_steps": 2}),
    ("muon", {"scale": "match_rms_adamw"}),
    ("muon", {"renormalize": True}),
    ("muon", {"splits": 2}),
    ("adamw", {"beta2": 0.5}),
    ("adamw", {"eps": 0.1}),
    ("sgd", {"nesterov": True}),
]


@pytest.mark.parametrize(("algorithm", "change"), CHANGES, ids=str)
def test_a_change_in_a_group_takes_effect_and_travels_with_checkpoints(algorithm, change):
    def start() -> tuple[nn.Parameter, Fanion]:
        p = parameter(10, 6)
        optimizer = Fanion([p], algorithm=algorithm, lr=0.1)
        run(optimizer, 2)
        return p, optimizer

    (p, plain), (q, changed), (r, loaded) = start(), start(), start()
    changed.param_groups[0].update(change)
    loaded.load_state_dict(copy.deepcopy(changed.state_dict()))
    for optimizer in (plain, changed, loaded):
        run(optimizer, 2, start=2)
    assert not torch.equal(p, q)
    assert torch.equal(q, r)


def test_every_group_keeps_its_own_options():
    ps = [parameter(8, 8, seed=i) for i in range(2)]
    both = Fanion([{"params": [ps[0]], "alpha": 0.3, "lr": 0.1}, {"params": [ps[1]]}],
                  algorithm="f_muon")  # fmt: skip
    alone = [parameter(8, 8, seed=i) for i in range(2)]
    first = Fanion([alone[0]], algorithm="f_muon", alpha=0.3, lr=0.1)
    second = Fanion([alone[1]], algorithm="f_muon")
    for i in range(3):
        for j in range(2):
            ps[j].grad = alone[j].grad = normal(8, 8, seed=10 * i + j)
        for optimizer in (both, first, second):
            optimizer.step()
    assert torch.equal(ps[0], alone[0]) and torch.equal(ps[1], alone[1])


# 11. One NaN gradient poisons the momentum for ever.


@pytest.mark.parametrize("algorithm", EVERY)
def test_training_survives_one_nan(algorithm):
    p = parameter(8, 6)
    optimizer = Fanion([p], algorithm=algorithm, lr=0.02)
    run(optimizer, 2)
    p.grad = torch.full((8, 6), math.nan)
    optimizer.step()
    before = p.detach().clone()
    run(optimizer, 2, start=2)
    assert p.isfinite().all() and not torch.equal(p, before)
    assert all(value.isfinite().all() for value in optimizer.state[p].values())
    assert optimizer.state[p]["skipped"] == 1


# 12. Resume: momentum of another dtype, lazily created state, settings lost after load.


@pytest.mark.parametrize("algorithm", ["muon", "neon", "dion", "adamw", "sgd"])
@pytest.mark.parametrize("loaded", [torch.float32, torch.float64, torch.bfloat16])
def test_a_momentum_of_another_dtype_can_be_loaded_and_stepped(algorithm, loaded):
    p = parameter(8, 6, dtype=torch.bfloat16)
    optimizer = Fanion([p], algorithm=algorithm, lr=0.02)
    run(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for value in (state["state"][0][key] for key in ("momentum", "exp_avg", "exp_avg_sq")
                  if key in state["state"][0]):  # fmt: skip
        value.data = value.data.to(loaded)
    other = Fanion([p], algorithm=algorithm, lr=0.02)
    other.load_state_dict(state)
    run(other, 2, start=2)
    assert p.isfinite().all()


@pytest.mark.parametrize("algorithm", EVERY)
def test_every_state_is_there_after_a_step_that_steps_nothing(algorithm):
    p = parameter(8, 6)
    before = p.detach().clone()
    optimizer = Fanion([p], algorithm=algorithm, lr=0.02)
    optimizer.step()
    keys = set(optimizer.state[p])
    assert torch.equal(p, before) and keys
    run(optimizer, 2)
    assert set(optimizer.state[p]) == keys


# 13. Shards orthogonalised as if they were matrices, [1, N] weights: see test_distributed.py.


# 14. Extreme aspect ratios need a decision that can be seen.


class Adapters(nn.Module):
    """What is far from square."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Linear(16, 2, bias=False)
        self.lora_B = nn.Linear(2, 16, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.one_row = nn.Linear(8, 1, bias=False)
        self.one_column = nn.Linear(1, 8, bias=False)
        self.head = nn.Linear(8, 4)


def test_extreme_matrices_get_a_reason_each():
    with pytest.warns(UserWarning, match=r"2 low-rank adapter matrices \(lora_A.weight"):
        split = split_parameters(Adapters())
    where = {a.name: (a.group, a.reason) for a in split}
    assert where["lora_A.weight"][0] == where["lora_B.weight"][0] == "matrix"
    assert where["depthwise.weight"] == (
        "other", "depthwise Conv2d: a filter per channel is no matrix"
    )  # fmt: skip
    assert where["one_row.weight"] == ("other", "1x8 is a vector")
    assert where["one_column.weight"] == ("other", "8x1 is a vector")


# 15. The effective lr after the shape rule cannot be seen.


@pytest.mark.parametrize("scale", ["none", "original", "spectral_unclamped", "match_rms_adamw"])
@pytest.mark.parametrize("rank", ["full", 2])
def test_the_table_shows_the_factor_that_the_step_uses(scale, rank):
    module = nn.Sequential(nn.Linear(6, 24, bias=False), nn.Linear(24, 8), nn.Linear(8, 3))
    options = {"scale": scale, "lr": 0.5, "rank": rank, "polar": "exact", "solver": "exact"}
    split = split_parameters(module, {"matrix": options})
    optimizer = configure_optimizers(module, {"matrix": options})["optimizer"]
    before = [p.detach().clone() for p in module.parameters()]
    run(optimizer, 1)
    header, *rows = str(split).splitlines()
    assert header.split() == ["parameter", "shape", "group", "algorithm", "lr", "factor", "reason"]
    for assignment, row, old in zip(split, rows, before, strict=True):
        if assignment.group != "matrix":
            continue
        _, shape, _, _, lr, factor = row.split()[:6]
        assert shape == "x".join(map(str, assignment.parameter.shape))
        norm = (old - assignment.parameter.detach()).norm().item()
        k = min(old.shape) if rank == "full" else rank
        assert float(lr) * float(factor) * math.sqrt(k) == pytest.approx(norm, rel=1e-3)


# Found in review: torch's fused kernels walk memory, whatever the strides.


def strided(shape: tuple[int, int]) -> Tensor:
    return torch.empty(shape[::-1]).t()


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
@pytest.mark.parametrize("odd", ["gradient", "state", "parameter"])
def test_entrywise_steps_do_not_depend_on_memory_layouts(algorithm, odd):
    def train(relayout: bool) -> Tensor:
        base = normal(6, 9)
        p = nn.Parameter(base[:, :4] if relayout and odd == "parameter" else base[:, :4].clone())
        optimizer = Fanion([p], algorithm=algorithm, lr=0.1)
        for i in range(4):
            p.grad = normal(6, 4, seed=i)
            if relayout and odd == "gradient":
                p.grad = strided((6, 4)).copy_(p.grad)
            if relayout and odd == "state" and i == 2:
                for key in ("momentum", "exp_avg", "exp_avg_sq"):
                    if key in optimizer.state[p]:
                        moved = strided((6, 4)).copy_(optimizer.state[p][key])
                        optimizer.state[p][key] = moved
            optimizer.step()
        assert torch.equal(base[:, 4:], normal(6, 9)[:, 4:])  # not this parameter's
        return p.detach().clone()

    torch.testing.assert_close(train(True), train(False), rtol=0, atol=1e-7)


def test_a_checkpoint_from_before_an_option_existed_can_be_stepped():
    p = parameter(6, 4)
    optimizer = Fanion([p])
    run(optimizer, 1)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["renormalize"]
    optimizer.load_state_dict(saved)
    run(optimizer, 1)
    assert optimizer.param_groups[0]["renormalize"] is False


YOUNGER = ["solver_steps", "oversampling", "stack_entries"]


@pytest.mark.parametrize("algorithm", EVERY)
def test_a_pickle_from_before_options_existed_can_be_stepped(algorithm):
    optimizer = Fanion([parameter(6, 4)], algorithm=algorithm, lr=0.02)
    run(optimizer, 1)
    straight = copy.deepcopy(optimizer)
    for option in YOUNGER:
        optimizer.param_groups[0].pop(option, None)
    old = pickle.loads(pickle.dumps(optimizer))
    run(old, 1, start=1)
    run(straight, 1, start=1)
    assert torch.equal(*(o.param_groups[0]["params"][0] for o in (old, straight)))
    assert old.param_groups[0].keys() == straight.param_groups[0].keys()


def test_an_old_state_dict_leaves_younger_options_as_they_were_configured():
    optimizer = Fanion([parameter(6, 4)], algorithm="fanion", rank=2)
    run(optimizer, 1)
    saved = optimizer.state_dict()
    for option in YOUNGER:
        del saved["param_groups"][0][option]
    other = Fanion([parameter(6, 4)], algorithm="fanion", rank=2, oversampling=1, stack_entries=7)
    other.load_state_dict(saved)
    run(other, 1)
    group = other.param_groups[0]
    assert [group[option] for option in YOUNGER] == [None, 1, 7]
    assert YOUNGER[0] not in saved["param_groups"][0]


def test_the_first_rank_k_step_is_as_good_as_the_next():
    p = parameter(256, 128)
    optimizer = Fanion([p], algorithm="fanion", rank=8, scale="none", nesterov=False, lr=1.0)
    grad, before = normal(256, 128, seed=1), p.detach().clone()
    p.grad = grad.clone()
    optimizer.step()
    captured = ((before - p.detach()) * grad).sum() / torch.linalg.svdvals(grad)[:8].sum()
    assert captured > 0.97


def test_renormalize_reaches_the_norm_in_bf16():
    p = parameter(64, 32, dtype=torch.bfloat16)
    optimizer = Fanion([p], renormalize=True, lr=1e-8)
    for i in range(5):
        p.grad = normal(64, 32, seed=i).bfloat16()
        optimizer.step()
    assert p.detach().float().norm().item() == pytest.approx(8.0, rel=1e-3)


# Found in review: a step must not need many times the memory of what it solves at once.


def peak(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> float:
    """The most memory that a second step takes, in tensors of the parameter's shape."""
    p = parameter(*shape, dtype=dtype)
    optimizer = Fanion([p], **options)
    run(optimizer, 1)
    return peak_bytes(optimizer.step, p.device) / (p.numel() * p.element_size())


@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize(
    ("options", "shape", "most"),
    [
        ({}, (256, 256), 3.1),
        ({}, (128, 512), 3.1),
        ({"nesterov": False}, (512, 128), 3.1),
        ({"algorithm": "f_muon"}, (256, 256), 4.1),
        ({"algorithm": "kyfan", "rank": 8}, (256, 256), 4.2),
        ({"algorithm": "fanion", "rank": 4}, (256, 256), 3.1),
        ({"algorithm": "nsgd"}, (256, 256), 2.1),
    ],
)
def test_the_memory_of_a_step(options, shape, most, has_bf16, monkeypatch):
    # This machine may have bfloat16 or not; with it products are smaller, but need workspaces.
    monkeypatch.setattr(polar_module, "_has_bf16", lambda device_type: has_bf16)
    assert peak(shape, **options) < most


@pytest.mark.parametrize("algorithm", ["muon", "neon", "kyfan", "nsgd"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [((32, 96, 96), {"layout": "batch"}), ((32 * 96, 96), {"splits": 32})],
)
def test_matrices_of_a_parameter_are_stepped_chunk_by_chunk(shape, options, algorithm):
    together = 2 * 96 * 96
    chunks = peak(shape, algorithm=algorithm, stack_entries=together, **options)
    assert 16 * chunks < 6  # of 16 chunks, the parameter's own size would be 16


@pytest.mark.parametrize("momentum_dtype", ["float32", "float16"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("algorithm", [*MATRIX, "fanion_feedback"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 12, 10), {"layout": "batch"}),
        ((6, 12, 10), {"layout": "batch", "splits": [4, 8]}),
        ((3, 2, 12, 10), {"layout": "batch", "splits": 2}),
        ((36, 10), {"splits": 3}),
        ((36, 10), {"splits": [12, 24]}),
        ((36, 10, 3), {"layout": "transposed", "splits": 3}),
    ],
)
def test_chunks_step_as_the_whole(shape, options, algorithm, nesterov, momentum_dtype):
    if algorithm == "fanion_feedback":
        options, algorithm = {**options, "error_feedback": True}, "fanion"

    def train(entries: int) -> tuple[Tensor, Fanion]:
        p = parameter(*shape)
        optimizer = Fanion(
            [p], algorithm=algorithm, nesterov=nesterov, weight_decay=0.1, renormalize=True,
            momentum_dtype=momentum_dtype, stack_entries=entries, **options, lr=0.02)  # fmt: skip
        run(optimizer, 2)
        p.grad.view(-1)[-1] = math.nan
        optimizer.step()
        run(optimizer, 1, start=2)
        return p.detach(), optimizer

    (whole, one), (chunked, other) = train(10**6), train(1)
    tolerance = 1e-3 if momentum_dtype == "float32" else 2e-2
    torch.testing.assert_close(chunked, whole, rtol=0, atol=tolerance)
    a, b = (o.state[o.param_groups[0]["params"][0]] for o in (one, other))
    assert a.keys() == b.keys()
    assert a["skipped"] == b["skipped"] == 1
    assert {key: value.shape for key, value in a.items()} == {k: v.shape for k, v in b.items()}


def test_flat_shards_are_refused():
    class FSDPStrategy:
        pass

    module = nn.Linear(4, 4)
    module._trainer = type("T", (), {"strategy": FSDPStrategy()})()
    with pytest.raises(ValueError, match="fully_shard"):
        split_parameters(module)
