"""Steps that a CUDA graph can replay: no number that changes is read on the host."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_fanions import Fanion
from lit_fanions.lmo import newton_schulz
from lit_fanions.optim import capturing
from lit_fanions.optim.algorithms import is_entrywise
from tests.matrices import gaussian
from tests.optim.steps import EVERY, FACTORISATIONS

SHAPES = [(8, 6), (8, 6), (5, 9)]
OPTIONS = {"weight_decay": 0.1, "capturable": True}


class Record(TorchDispatchMode):
    """Record the operations on fake CUDA tensors with their arguments that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[object]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        out = None if "_fused_" in name else func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        if any(isinstance(x, Tensor) and x.device.type == "cuda" for x in leaves):
            assert func.overloadpacket.__name__ not in FACTORISATIONS, f"{name} waits"
            self.calls.append((name, [x for x in leaves if not isinstance(x, Tensor)]))
        return out


def record_steps(changes: dict[str, float], **options) -> list[list]:
    """Return the operations of two steps, between which options of the group are changed."""
    calls = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in SHAPES]
        optimizer = Fanion(params, lr=0.1, **{"weight_decay": 0.1, **options})
        for p in params:
            p.grad = torch.empty_like(p)
        with Record():
            optimizer.step()
        for change in ({}, changes):
            optimizer.param_groups[0].update(change)
            with Record() as record:
                optimizer.step()
            calls.append(record.calls)
    return calls


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch):
    monkeypatch.setattr(newton_schulz, "_has_bf16", lambda device_type: device_type == "cuda")


FORMS = [
    *({"algorithm": name} for name in EVERY),
    {"algorithm": "muon", "renormalize": True},
    *({"algorithm": "schatten", "p": p} for p in (1.0, 2.0, 5.0, 17.0, float("inf"))),
    {"algorithm": "muon", "alpha": 0.5, "blend": "schatten", "p": 3.0},
    {"algorithm": "signum", "nesterov": False, "adapt": "rows", "scale": "match_rms_adamw"},
]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_capturable_step_reads_no_number_that_changes(options):
    entrywise = is_entrywise(options["algorithm"])
    changes = {"lr": 0.2} if entrywise else {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.3}
    first, second = record_steps(changes, capturable=True, **options)
    assert first == second


def test_a_plain_step_reads_numbers():
    first, second = record_steps({"lr": 0.2}, algorithm="nsgd")
    assert first != second


def train(capturable: bool, **options) -> list[Tensor]:
    """Return weights after steps with other numbers in each."""
    params = [nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    optimizer = Fanion(params, lr=0.1, weight_decay=0.1, capturable=capturable, **options)
    (group,) = optimizer.param_groups
    for i in range(4):
        group.update({"lr": 0.1 / (1 + i), "momentum": 0.95 - 0.1 * i, "weight_decay": 0.1 * i})
        for j, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=10 * i + j)
        if i == 2:
            params[1].grad[0, 0] = torch.nan
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_capturable_step_is_the_plain_one(options):
    for p, q in zip(train(True, **options), train(False, **options), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_numbers_of_a_capturable_step_are_not_rounded_to_the_weights_dtype(dtype, momentum):
    def direction(capturable: bool) -> Tensor:
        p = nn.Parameter(torch.zeros(8, 6, dtype=dtype))
        optimizer = Fanion(
            [p], algorithm="nsgd", lr=0.0123, momentum=momentum, scale="none", capturable=capturable
        )
        for i in range(3):
            p.grad = gaussian(8, 6, seed=i).to(dtype)
            with torch.no_grad():
                p.zero_()
            optimizer.step()
        return p.detach().double()

    # The momentum itself is rounded to bfloat16.
    atol = 1e-4 if dtype == torch.bfloat16 and momentum else 0.0
    torch.testing.assert_close(direction(True), direction(False), rtol=1e-12, atol=atol)


def test_a_learning_rate_of_zero_freezes_the_weights():
    p = nn.Parameter(gaussian(8, 6))
    before = p.detach().clone()
    optimizer = Fanion([p], lr=0.0, renormalize=True, **OPTIONS)
    p.grad = gaussian(8, 6)
    optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p]["momentum"].any()


def test_a_tensor_lr_is_read_on_the_device():
    p, q = nn.Parameter(gaussian(8, 6)), nn.Parameter(gaussian(8, 6))
    optimizer = Fanion([p], lr=torch.tensor(0.5), **OPTIONS)
    other = Fanion([q], lr=0.25, weight_decay=0.1)
    optimizer.param_groups[0]["lr"].fill_(0.25)
    p.grad = q.grad = gaussian(8, 6)
    optimizer.step()
    other.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"nonfinite": "error"}, "nonfinite"),
        ({"polar": "exact"}, "polar"),
        *(({"algorithm": "schatten", "p": p}, "p") for p in (1.5, 2.5, 4.0)),
        ({"algorithm": "muon", "alpha": 0.5, "blend": "schatten", "p": 4.0}, "p"),
        *(({"algorithm": "neon", "solver": solver}, "solver") for solver in
          ("exact", "lanczos", "cupy", "power", "randomized")),
    ],
)  # fmt: skip
def test_options_that_a_graph_cannot_capture_are_refused(options, name):
    with pytest.raises(ValueError, match=f"with {name}=.* cannot capture"):
        Fanion([nn.Parameter(gaussian(4, 3))], capturable=True, **options)
    Fanion([nn.Parameter(gaussian(4, 3))], **options)


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_capture_needs_capturable_groups_that_have_been_stepped(algorithm, monkeypatch):
    params = [nn.Parameter(gaussian(4, 3)) for _ in range(2)]
    optimizers = [Fanion([p], lr=0.1, algorithm=algorithm, capturable=c) for p, c in
                  zip(params, (False, True), strict=True)]  # fmt: skip
    for p in params:
        p.grad = gaussian(4, 3)
    optimizers[0].step()
    monkeypatch.setattr("lit_fanions.optim.fanion.is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=f"make group '{algorithm}' capturable"):
        optimizers[0].step()
    with pytest.raises(RuntimeError, match="step a few times before"):
        optimizers[1].step()


def test_numbers_reach_the_device_between_replays(monkeypatch):
    p, q = nn.Parameter(gaussian(8, 6)), nn.Parameter(gaussian(8, 6))
    optimizer, other = Fanion([p], lr=0.5, **OPTIONS), Fanion([q], lr=0.5, **OPTIONS)
    p.grad = q.grad = gaussian(8, 6)
    optimizer.step()
    other.step()
    for each in (optimizer, other):
        each.param_groups[0]["lr"] = 0.1
    optimizer.copy_options_to_device()
    monkeypatch.setattr("lit_fanions.optim.fanion.is_capturing", lambda: True)  # as a replay
    optimizer.step()
    monkeypatch.undo()
    other.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_numbers_of_their_own(how):
    p = nn.Parameter(gaussian(8, 6))
    optimizer = Fanion([p], lr=0.5, **OPTIONS)
    p.grad = gaussian(8, 6)
    optimizer.step()
    twin = how(optimizer)
    (q,) = twin.param_groups[0]["params"]
    q.grad = p.grad = gaussian(8, 6, seed=1)
    twin.param_groups[0]["lr"] = 0.0
    before = q.detach().clone()
    twin.step()
    assert torch.equal(q, before)
    optimizer.step()
    assert not torch.equal(p, before)


def test_parameters_of_a_capturable_group_are_on_one_device():
    group = {"params": [nn.Parameter(torch.empty(2, 2)),
                        nn.Parameter(torch.empty(2, 2, device="meta"))],
             "name": "both", "capturable": True}  # fmt: skip
    with pytest.raises(RuntimeError, match="on cpu, meta: give each device a group"):
        capturing.DeviceNumbers().upload([group])
