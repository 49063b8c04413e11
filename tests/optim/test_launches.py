"""Operations that a step makes on an accelerator, counted on fake CUDA tensors, and their results.

A launch takes a few microseconds of the host, so the number of launches bounds a step where
matrices are small. Fake tensors have no memory and run no kernels: a step that read a number
on the device would raise, and factorisations that wait are refused here. docs/gpu/README.md has the
counts.
"""

import collections
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_fanions import Fanion
from lit_fanions.lmo import newton_schulz
from lit_fanions.optim import buckets, matrix_step
from lit_fanions.optim.together import moves_together
from tests.lmo.conftest import DeviceBranches
from tests.optim.steps import FACTORISATIONS

# Operations that launch nothing: views and allocations.
FREE = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "chunk",
    "detach",
    "device",
    "diagonal",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}
GPT2_LAYER = [*[(768, 768)] * 4, (768, 3072), (3072, 768)]
VECTORS = [*[(768,)] * 86, *[(3072,)] * 12, (50304,)]
AIRBENCH = [(64, 24, 3, 3), (64, 64, 3, 3), (256, 64, 3, 3), *[(256, 256, 3, 3)] * 3]


PRODUCTS = {"addmm", "addmm_", "baddbmm", "baddbmm_", "bmm", "mm", "symmetric_product"}


class CountOperations(TorchDispatchMode):
    """Count operations on fake CUDA tensors but views and allocations, and the bytes they move."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.calls = 0  # views and allocations too, on any device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls += name != "device"  # which only fake tensors ask for
        kwargs = dict(kwargs or {})
        # The one operation without an implementation for fake tensors; it returns nothing.
        out = None if name == "_fused_sgd_" else func(*args, **kwargs)
        kwargs.pop("out", None)
        overwrites = "copy_" in name or name == "symmetric_product"
        read = _tensors((args[1:] if overwrites else args, kwargs))
        written = _tensors(args[0] if out is None else out)
        if name == "momentum_pass":  # it returns N and writes the momenta too
            written += args[0]
        if name not in FREE and any(x.device.type == "cuda" for x in [*read, *written]):
            assert name not in FACTORISATIONS, f"{name} waits for the device"
            self.counts[name] += _loops(args) if name.startswith("_foreach_") else 1
            self.bytes[name] += sum(map(_bytes, [*read, *written]))
        return out


def _tensors(tree: object) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _bytes(x: Tensor) -> int:
    """Return the bytes of a tensor's entries; expanded ones are read once."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return math.prod(sizes) * x.element_size()


def _loops(args: Sequence[object]) -> int:
    """Return how many operations one on lists is: one for each tensor if layouts differ."""
    lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
    rows = list(zip(*lists, strict=True))
    together = all(len({x.stride() for x in row}) == 1 for row in rows) and all(
        len({x.dtype for x in column}) == 1 for column in lists
    )
    return 1 if together else len(rows)


def parameters(shapes: Sequence[tuple[int, ...]], channels_last: bool = False) -> list[Tensor]:
    tensors = [torch.empty(shape, device="cuda") for shape in shapes]
    return [torch.nn.Parameter(memory_order(x) if channels_last else x) for x in tensors]


def memory_order(x: Tensor) -> Tensor:
    """Return a tensor in channels_last if it is one of a convolution."""
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


Groups = Sequence[tuple[Sequence[tuple[int, ...]], dict]]


def second_step_of(optimizer: torch.optim.Optimizer) -> CountOperations:
    """Return what the second step of an optimizer of fake tensors does."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p)
    with CountOperations():
        optimizer.step()
    with CountOperations() as second:
        optimizer.step()
    return second


def count_operations(groups: Groups, channels_last: bool = False) -> int:
    """Return the operations of the second step of groups of shapes and options."""
    return second_step(groups, channels_last).counts.total()


def second_step(groups: Groups, channels_last: bool = False) -> CountOperations:
    """Return what the second step of groups of shapes and options does."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer = Fanion(
            [
                {"params": parameters(shapes, channels_last), "lr": 0.01, **options}
                for shapes, options in groups
            ]
        )
        return second_step_of(optimizer)


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch):
    monkeypatch.setattr(newton_schulz, "_has_bf16", lambda device_type: device_type == "cuda")


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"algorithm": "muon"}, 122),
        ({"algorithm": "muon", "polar": "convergent"}, 194),
        ({"algorithm": "f_muon"}, 122),
        ({"algorithm": "s_muon"}, 125),
        ({"algorithm": "muon", "renormalize": True}, 136),
        ({"algorithm": "fanion", "rank": 32}, 460),
        ({"algorithm": "fanion", "rank": 32, "solver": "polar"}, 305),
        ({"algorithm": "neon"}, 460),
        ({"algorithm": "f_fanion"}, 478),
        ({"algorithm": "dion", "rank": 32}, 210),
        ({"algorithm": "kyfan", "rank": 32}, 578),
        ({"algorithm": "nsgd"}, 56),
        ({"algorithm": "signum"}, 68),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else str(x),
)
def test_a_step_of_the_matrices_of_gpt2_makes_few_launches(options, most):
    # The first step of a rank-k group takes its time for each matrix: two layers stand for twelve.
    layers = 2 if "rank" in options or options["algorithm"].endswith(("neon", "fanion")) else 12
    matrices = GPT2_LAYER * layers
    assert count_operations([(matrices, {"weight_decay": 0.05, **options})]) <= most


@pytest.mark.parametrize("algorithm", ["muon", "fanion"])
def test_launches_do_not_grow_with_the_number_of_matrices(algorithm):
    few, many = (count_operations([([(32, 128)] * n, {"algorithm": algorithm})]) for n in (2, 9))
    assert few == many


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_a_step_of_muon_makes_less_than_half_of_the_calls_of_torchs():
    """Views count, too: they take the host as long as a launch."""
    matrices, options = GPT2_LAYER * 12, {"lr": 0.1, "weight_decay": 0.1}
    with FakeTensorMode(allow_non_fake_inputs=True):
        others = second_step_of(torch.optim.Muon(parameters(matrices), **options))
    mine = second_step([(matrices, {"algorithm": "muon", **options})])
    assert mine.calls < others.calls / 2


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
def test_a_step_of_99_vectors_makes_few_launches(algorithm):
    assert count_operations([(VECTORS, {"algorithm": algorithm})]) <= 12


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
def test_calls_of_a_step_do_not_grow_with_the_number_of_vectors(algorithm):
    """Views count, too: they take the host as long as a launch."""
    few, many = (second_step([([(8,), (9,)] * n, {"algorithm": algorithm})]).calls for n in (2, 20))
    assert few == many


def test_a_step_of_a_whole_gpt2_makes_few_launches():
    groups = [
        (GPT2_LAYER * 12, {"algorithm": "muon", "polar": "convergent", "weight_decay": 0.05}),
        (VECTORS, {"algorithm": "adamw"}),
        ([(50304, 768)], {"algorithm": "adamw", "name": "embedding"}),
        ([(50304, 768)], {"algorithm": "adamw", "name": "head"}),
    ]
    assert count_operations(groups) <= 212


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_of_airbench_makes_few_launches(channels_last):
    assert count_operations(airbench_groups(), channels_last) <= 120


def airbench_groups(**options) -> Groups:
    muon = {"algorithm": "muon", "polar": "jordan", "polar_steps": 3, "renormalize": True}
    return [
        (AIRBENCH, {**muon, **options}),
        ([(64,)] * 2 + [(256,)] * 4, {"algorithm": "sgd"}),
        ([(24,)], {"algorithm": "sgd", "name": "whitening_bias"}),
        ([(10, 256)], {"algorithm": "sgd", "name": "head"}),
    ]


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"algorithm": "muon"}, 71),
        ({"algorithm": "muon", "weight_decay": 0.1}, 91),
        ({"algorithm": "muon", "scale": "match_rms_adamw"}, 71),
        ({"algorithm": "f_muon"}, 71),
        ({"algorithm": "fanion", "rank": 32}, 85),
        ({"algorithm": "neon"}, 73),
        ({"algorithm": "nsgd"}, 81),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else str(x),
)
def test_passes_over_the_matrices_of_gpt2_move_few_bytes(options, most):
    assert bytes_of_passes(options) <= most


def bytes_of_passes(options: dict) -> float:
    """Return the bytes an entry, without the products: full rank is bound by their arithmetic."""
    matrices = GPT2_LAYER * 2
    moved = second_step([(matrices, options)]).bytes
    passes = sum(count for name, count in moved.items() if name not in PRODUCTS)
    return passes / sum(map(math.prod, matrices))


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"algorithm": "muon"}, 33),
        ({"algorithm": "muon", "weight_decay": 0.1}, 33),
        ({"algorithm": "f_muon"}, 33),
        ({"algorithm": "fanion", "rank": 32}, 48),
        ({"algorithm": "fanion", "rank": 32, "solver": "polar"}, 41),
        ({"algorithm": "neon"}, 37),
        ({"algorithm": "nsgd"}, 45),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else str(x),
)
def test_passes_by_triton_move_fewer_bytes(options, most):
    pytest.importorskip("triton")
    assert bytes_of_passes({**options, "kernels": "triton"}) <= most


def test_steps_by_triton_make_fewer_launches():
    pytest.importorskip("triton")
    muon = {"algorithm": "muon", "kernels": "triton"}
    assert count_operations([(GPT2_LAYER * 12, {**muon, "weight_decay": 0.05})]) <= 80
    for channels_last in (False, True):
        assert count_operations(airbench_groups(kernels="triton"), channels_last) <= 84


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 17.0, math.inf])
def test_a_step_in_a_schatten_ball_of_products_does_not_wait(p):
    assert count_operations([(GPT2_LAYER, {"algorithm": "schatten", "p": p})])


def test_a_factorisation_on_the_device_is_noticed():
    with pytest.raises(AssertionError, match="_linalg_eigh waits"):
        count_operations([(GPT2_LAYER, {"algorithm": "schatten", "p": 4.0})])
    with pytest.raises(AssertionError, match="_linalg_svd waits"):
        count_operations([(GPT2_LAYER, {"algorithm": "muon", "polar": "exact"})])


def test_large_parameters_are_not_copied_into_a_stack():
    def moves(shape):
        with FakeTensorMode():
            stack = parameters([shape] * 2)
            return moves_together(stack, stack)

    assert moves((768, 3072))
    assert not moves((2048, 2048))


# What these steps compute, by the kernels of the CPU.


def real_parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [torch.nn.Parameter(x) for x in draws]


def train(
    shapes, steps=3, broken: int | None = 1, dtype=torch.float32, channels_last=False, **options
):
    """Return parameters and states after steps by the branches for accelerators.

    The gradient of the parameter ``broken`` is infinite in the second step.
    """
    generator = torch.Generator().manual_seed(1)
    order = memory_order if channels_last else lambda x: x
    params = [torch.nn.Parameter(order(p.detach())) for p in real_parameters(shapes, dtype)]
    options = {"lr": 0.1, "weight_decay": 0.1, **options}
    optimizer = Fanion(params, **options)
    for step in range(steps):
        for i, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator).to(dtype)
            if i == broken and step == 1:
                gradient.view(-1)[0] = torch.inf
            p.grad = order(gradient)
        with DeviceBranches():
            optimizer.step()
    return [
        {"weight": p.detach(), **{key: x.clone() for key, x in optimizer.state[p].items()}}
        for p in params
    ]


def assert_same(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]], **close) -> None:
    """Assert that parameters and states are bit-equal, or close to tolerances."""
    tolerances = close or {"rtol": 0, "atol": 0}
    for mine, others in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, others, **tolerances)


STACKS = {
    "muon": {"algorithm": "muon"},
    "plain momentum": {"algorithm": "muon", "nesterov": False},
    "signum": {"algorithm": "signum"},
    "plain momentum, overwriting": {"algorithm": "signum", "nesterov": False},
    "plain momentum, a blend of rank k": {"algorithm": "f_fanion", "rank": 2, "nesterov": False},
    "renormalised": {"algorithm": "f_muon", "renormalize": True},
    "fanion": {"algorithm": "fanion", "rank": 2},
    "dion": {"algorithm": "dion", "rank": 2},
    "not skipping": {"algorithm": "nsgd", "nonfinite": "propagate"},
    "transposed": {"algorithm": "muon", "layout": "transposed"},
    "batch": {"algorithm": "muon", "layout": "batch"},
    "equal splits": {"algorithm": "muon", "splits": 2},
    "unequal splits": {"algorithm": "muon", "splits": [6, 2], "renormalize": True},
    "second moments": {"algorithm": "muon", "adapt": "rows"},
    "float64 momentum": {"algorithm": "muon", "momentum_dtype": "float64"},
}


@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("shape", [(8, 12), (8, 3, 2, 2)])
def test_a_stack_steps_as_each_parameter_alone_does(shape, options, monkeypatch):
    broken = None if "nonfinite" in options else 1
    found = train([shape] * 3, broken=broken, **options)
    monkeypatch.setattr(matrix_step, "moves_together", lambda stack, momenta: False)
    # The norm of a transposed matrix sums up in another order.
    close = {"rtol": 1e-5, "atol": 1e-6} if "layout" in options else {}
    assert_same(found, train([shape] * 3, broken=broken, **options), **close)
    assert found[1]["skipped"] == (broken is not None)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
def test_weights_in_channels_last_step_as_contiguous_ones(options, count):
    options = {"broken": None, "renormalize": "rank" not in options, **options}
    found = train([(8, 3, 2, 2)] * count, channels_last=True, **options)
    assert all(state["weight"].is_contiguous(memory_format=torch.channels_last) for state in found)
    # Products sum up in another order.
    assert_same(found, train([(8, 3, 2, 2)] * count, **options), rtol=1e-4, atol=1e-5)


def test_observers_of_weights_in_channels_last_see_columns_in_the_given_order():
    def observe(order):
        shown, p = [], torch.nn.Parameter(order(torch.randn(8, 3, 2, 2)))
        optimizer = Fanion([p], algorithm="f_muon")
        optimizer.observers = (shown.append,)
        p.grad = order(torch.randn(8, 3, 2, 2))
        with DeviceBranches():
            optimizer.step()
        return p, shown[0]

    torch.manual_seed(0)
    p, found = observe(memory_order)
    torch.manual_seed(0)
    _, wanted = observe(lambda x: x)
    assert torch.equal(found.after, p.detach().flatten(1)[None])
    for mine, others in zip(found[3:6], wanted[3:6], strict=True):
        torch.testing.assert_close(mine, others, rtol=1e-5, atol=1e-6)


def test_a_stack_of_bfloat16_parameters_steps_as_each_alone_does(monkeypatch):
    found = train([(8, 12)] * 3, dtype=torch.bfloat16, momentum_dtype="float32")
    monkeypatch.setattr(matrix_step, "moves_together", lambda stack, momenta: False)
    wanted = train([(8, 12)] * 3, dtype=torch.bfloat16, momentum_dtype="float32")
    assert_same(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
@pytest.mark.parametrize("broken", [None, 1])
def test_small_parameters_step_as_each_alone_does(broken, algorithm, dtype, monkeypatch):
    shapes = [(5,), (7,), (3, 4), ()]
    options = {"broken": broken, "algorithm": algorithm, "dtype": dtype}
    found = train(shapes, **options)
    monkeypatch.setattr(buckets, "_SMALL", 0)
    assert_same(found, train(shapes, **options))
    assert [int(state["skipped"]) for state in found] == [0, broken or 0, 0, 0]
