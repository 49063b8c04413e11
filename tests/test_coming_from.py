"""docs/coming_from.md: each translated optimizer takes the steps of the other's formula."""

import re
from pathlib import Path

import pytest
import torch

from lit_fanions import Fanion
from lit_fanions.optim.options import NAMES

PAGE = (Path(__file__).parents[1] / "docs/coming_from.md").read_text()
SHAPES = [(6, 4), (4, 6), (5, 5)]
STEPS = 4


def translated_options(section):
    """Return the options of the optimizer that the section's code makes."""
    text = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[1]
    (block,) = re.findall(r"^```python runnable\n(.*?)^```", text, re.M | re.S)
    scope = {}
    exec(block, scope)
    (group,) = scope["optimizer"].param_groups
    return {name: group[name] for name in NAMES if name in group}


def polar(m):
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    return u @ vh


def jordan(w):
    """√max(1, out/in)."""
    return max(1.0, w.shape[0] / w.shape[1]) ** 0.5


def summed_step(w, g, state, *, lr, decay, mu, nesterov, scale):
    """Momentum as a sum, as dion and pytorch_optimizer have it; decay before the update."""
    state["m"] = mu * state.get("m", 0) + g
    d = polar(g + mu * state["m"] if nesterov else state["m"])
    return (1 - lr * decay) * w - lr * scale * d


def averaged_step(w, g, state, *, lr, decay, mu, scale):
    """Momentum as an average and its Nesterov form, as KellerJordan's Muon has it."""
    state["m"] = mu * state.get("m", 0) + (1 - mu) * g
    d = polar((1 - mu) * g + mu * state["m"])
    return (1 - lr * decay) * w - lr * scale * d


def constrained_scion_step(w, g, state, *, lr, weight, radius):
    """W <- (1 - lr) W - lr * radius * sqrt(out / in) * polar(M), M an average."""
    state["m"] = (1 - weight) * state.get("m", 0) + weight * g
    scale = (w.shape[0] / w.shape[1]) ** 0.5
    return (1 - lr) * w - lr * radius * scale * polar(state["m"])


OTHERS = {
    "KellerJordan/Muon": lambda w, g, s: averaged_step(
        w, g, s, lr=0.02, decay=0.0, mu=0.95, scale=jordan(w)
    ),
    "dion: Muon": lambda w, g, s: summed_step(
        w, g, s, lr=0.01, decay=0.01, mu=0.95, nesterov=False,
        scale=(w.shape[0] / w.shape[1]) ** 0.5,
    ),
    "Scion": lambda w, g, s: constrained_scion_step(w, g, s, lr=2**-12, weight=0.1, radius=50.0),
    "pytorch_optimizer": lambda w, g, s: summed_step(
        w, g, s, lr=0.02, decay=0.01, mu=0.95, nesterov=True, scale=0.2 * max(w.shape) ** 0.5
    ),
}  # fmt: skip


@pytest.mark.parametrize("section", OTHERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_translation_takes_the_same_steps(section, shape):
    torch.manual_seed(0)
    options = {**translated_options(section), "polar": "exact", "polar_steps": None}
    p = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer, expected, state = Fanion([p], **options), p.detach().clone(), {}
    for _ in range(STEPS):
        p.grad = torch.randn_like(p)
        expected = OTHERS[section](expected, p.grad, state)
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-10)


def test_translation_of_torchs_muon_takes_the_same_steps():
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(torch.ones(8, 4)) for _ in range(2))
    ours = Fanion([p], **translated_options("torch.optim.Muon"))
    theirs = torch.optim.Muon([q])
    for _ in range(STEPS):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    moved = (q - 1).abs().max()
    assert (p - q).abs().max() < 0.05 * moved  # torch computes directions in bfloat16


def test_first_step_of_optax_is_equal():
    torch.manual_seed(0)
    options = {**translated_options("optax"), "polar": "exact", "polar_steps": None}
    p = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    before, p.grad = p.detach().clone(), torch.randn_like(p)
    Fanion([p], **options).step()
    torch.testing.assert_close(p.detach(), before - 0.02 * 1.5**0.5 * polar(p.grad))


def cosmos_step(w, g, state, *, lr, ratio, betas, rank):
    """The authors' code: the subspace is on the rows, its state in three tensors."""
    b1, b2, b3 = betas
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    if t == 1:
        u = torch.linalg.svd(g @ g.mT)[0][:, :rank]
        s = (1 - b3) * u.mT @ g @ g.mT @ u
    else:
        old, s = state["u"], state["s"]
        u = torch.linalg.qr(b3 * old @ s + (1 - b3) * g @ (g.mT @ old))[0]
        turn = old.mT @ u
        s = b3 * turn.mT @ s @ turn + (1 - b3) * u.mT @ g @ g.mT @ u
    v = b2 * state.get("v", 0) + (1 - b2) * (u.mT @ g) ** 2
    state.update(u=u, s=s, v=v)
    inside = u.mT @ m
    adam = lr / (1 - b1**t) * u @ (inside / (v.sqrt() / (1 - b2**t) ** 0.5 + 1e-8))
    rest, size = polar_of_rank(m - u @ inside), w.numel() ** 0.5 * ratio * lr
    step = adam + size * rest / rest.norm()
    return w - size * step / step.norm()


def polar_of_rank(m):
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return u * (s > 1e-10 * s[0]) @ vh


def test_translation_of_cosmos_takes_the_same_steps_where_rows_are_the_smaller_side():
    torch.manual_seed(0)
    options = {**translated_options("COSMOS"), "polar": "exact", "polar_steps": None}
    p = torch.nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    optimizer, expected, state = Fanion([p], **options), p.detach().clone(), {}
    for _ in range(STEPS):
        p.grad = torch.randn_like(p)
        expected = cosmos_step(
            expected, p.grad, state, lr=1e-3, ratio=0.1, betas=(0.9, 0.96, 0.96), rank=2
        )
        optimizer.step()
    # The state is in float32 here; the weights have moved by some 1e-4.
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-8)


def test_momentum_of_torchs_adamw_is_found_by_names_that_are_added():
    model = torch.nn.Linear(8, 4, bias=False)
    theirs = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.randn(4, 8)
    theirs.step()
    state = theirs.state_dict()
    state["param_groups"][0]["param_names"] = [name for name, _ in model.named_parameters()]
    optimizer = Fanion(model.named_parameters(), algorithm="muon", on_mismatch="keep_momentum")
    with pytest.warns(UserWarning, match="1 of 1 parameters keep their momentum"):
        optimizer.load_state_dict(state)
    # After one step the mean of the gradients is the gradient.
    torch.testing.assert_close(optimizer.state[model.weight]["momentum"], model.weight.grad)


def test_every_section_with_code_is_tested():
    sections = re.findall(r"^## (.*)\n(?:(?!^## ).*\n)*?```python runnable", PAGE, re.M)
    assert {*sections} == {
        *OTHERS, "torch.optim.Muon", "optax", "COSMOS", "Checkpoints of torch's optimizers"
    }  # fmt: skip
