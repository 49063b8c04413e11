"""Parameters that other Muon-like optimizers put into wrong groups."""

import pytest
import torch
from torch import Tensor, nn

from lit_fanions import Fanion, configure_optimizers, split_parameters
from tests.matrices import gaussian, parameter
from tests.optim.networks import GPT


def polar(m: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(m.double(), full_matrices=False)
    return u @ vh


def test_q_k_and_v_are_three_matrices():
    module = nn.MultiheadAttention(8, 2, bias=False)
    optimizer = configure_optimizers(module, polar="exact", lr=1.0, scale="none")["optimizer"]
    before = module.in_proj_weight.detach().clone()
    grad = gaussian(24, 8)
    module.in_proj_weight.grad = grad.clone()
    optimizer.step()
    taken = (before - module.in_proj_weight.detach()).double()
    for part, g in zip(taken.chunk(3), grad.chunk(3), strict=True):
        torch.testing.assert_close(part, polar(g), rtol=0, atol=1e-5)


def test_a_matrix_left_out_needs_an_lr_or_inherits_one_loudly(recwarn):
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    chosen = {"overrides": {"frozenish": {"parameters": ["0.weight"], "algorithm": "adamw"}}}
    with pytest.warns(UserWarning, match=r"frozenish.*no lr of its own.*overrides.frozenish.lr"):
        configure_optimizers(module, chosen)
    recwarn.clear()
    chosen["overrides"]["frozenish"]["lr"] = 1e-3
    configure_optimizers(module, chosen)
    assert not [w for w in recwarn if "no lr" in str(w.message)]


def test_groups_have_names_that_monitors_show():
    optimizer = configure_optimizers(GPT(), total_steps=10)["optimizer"]
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names) and {"embedding", "head", "vector"} <= set(names)
    with pytest.raises(ValueError, match="name"):
        Fanion([{"params": [parameter(3, 3, seed=i)], "name": "same"} for i in range(2)])


class Adapters(nn.Module):
    """Matrices that are far from square."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Linear(16, 2, bias=False)
        self.lora_B = nn.Linear(2, 16, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.one_row = nn.Linear(8, 1, bias=False)
        self.one_column = nn.Linear(1, 8, bias=False)
        self.head = nn.Linear(8, 4)


def test_extreme_matrices_get_a_reason_each():
    with pytest.warns(UserWarning, match=r"2 low-rank adapter matrices \(lora_A.weight") as found:
        split = split_parameters(Adapters())
    assert {warning.filename for warning in found} == {__file__}
    where = {a.name: (a.group, a.reason) for a in split}
    assert where["lora_A.weight"][0] == where["lora_B.weight"][0] == "matrix"
    assert where["depthwise.weight"] == (
        "other", "depthwise Conv2d: a filter per channel is no matrix"
    )  # fmt: skip
    assert where["one_row.weight"] == ("other", "1x8 is a vector")
    assert where["one_column.weight"] == ("other", "8x1 is a vector")


def test_flat_shards_are_refused():
    class FSDPStrategy:
        pass

    module = nn.Linear(4, 4)
    module._trainer = type("T", (), {"strategy": FSDPStrategy()})()
    with pytest.raises(ValueError, match="fully_shard"):
        split_parameters(module)
