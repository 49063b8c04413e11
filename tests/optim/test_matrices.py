"""Parameters as matrices and back: layouts, splits and shapes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_fanions.optim.matrices import (
    LAYOUTS,
    from_matrices,
    gather,
    local,
    matrix_shapes,
    placed_as,
)
from lit_fanions.optim.matrices import to_matrices as convert


def counted(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


def all_matrices(batches: list[Tensor]) -> list[Tensor]:
    return [matrix for batch in batches for matrix in batch]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_weight_is_one_matrix():
    x = counted(4, 3)
    assert_same(all_matrices(convert(x)), [x])


@pytest.mark.parametrize("shape", [(6, 2, 3), (6, 2, 3, 5), (6, 2, 3, 2, 2)])
def test_a_convolution_is_out_by_the_rest(shape):
    x = counted(*shape)
    want = [torch.stack([x[i].flatten() for i in range(6)])]
    assert_same(all_matrices(convert(x)), want)


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 6, 3, 5)])
def test_a_transposed_convolution_is_out_by_the_rest_too(shape):
    x = counted(*shape)
    want = [torch.stack([x[:, i].flatten() for i in range(6)])]
    assert_same(all_matrices(convert(x, "transposed")), want)


def test_a_transposed_convolution_applies_its_matrix():
    """The same linear map, so the same rows: one for each output channel."""
    up, x = nn.ConvTranspose1d(3, 5, 1, bias=False), torch.randn(2, 3, 7)
    (matrix,) = all_matrices(convert(up.weight.detach(), "transposed"))
    torch.testing.assert_close(up(x), torch.einsum("oi,bil->bol", matrix, x))


def test_leading_dimensions_are_separate_matrices():
    x = counted(2, 3, 4, 5)
    want = [x[i, j] for i in range(2) for j in range(3)]
    assert_same(all_matrices(convert(x, "batch")), want)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_less_than_a_matrix_is_one_row(shape):
    x = counted(*shape)
    assert_same(all_matrices(convert(x)), [x.reshape(1, -1)])
    assert torch.equal(from_matrices(convert(x), x.shape), x)


def test_equal_parts_of_a_fused_weight():
    x = counted(6, 4)
    for splits in (3, [2, 2, 2]):
        assert_same(all_matrices(convert(x, splits=splits)), [x[:2], x[2:4], x[4:]])


def test_unequal_parts_of_a_fused_weight_are_batches_of_their_own():
    x = counted(6, 4)
    batches = convert(x, splits=[3, 2, 1])
    assert [tuple(batch.shape) for batch in batches] == [(1, 3, 4), (1, 2, 4), (1, 1, 4)]
    assert_same(all_matrices(batches), [x[:3], x[3:5], x[5:]])


def test_parts_of_a_stack_are_cut_from_the_rows():
    x = counted(2, 6, 4)
    want = [part for matrix in x for part in (matrix[:3], matrix[3:])]
    assert_same(all_matrices(convert(x, "batch", 2)), want)
    first, second = convert(x, "batch", [4, 2])
    assert_same([*first, *second], [x[0, :4], x[1, :4], x[0, 4:], x[1, 4:]])


def test_weights_stored_in_x_out_are_transposed():
    x = counted(4, 6)
    assert_same(all_matrices(convert(x, "transposed")), [x.T])
    assert_same(all_matrices(convert(x, "transposed", 3)), [x.T[:2], x.T[2:4], x.T[4:]])
    experts = counted(2, 4, 6)
    assert_same(all_matrices(convert(experts, "batch_transposed")), list(experts.mT))


def test_a_grouped_transposed_convolution_has_a_matrix_for_each_group():
    x = counted(6, 2, 3)  # torch's in x out / groups x kernel, 3 groups
    want = [torch.stack([g[:, i].flatten() for i in range(2)]) for g in x.chunk(3)]
    assert_same(all_matrices(convert(x, "transposed", 3)), want)


@st.composite
def cases(draw):
    layout = draw(st.sampled_from(LAYOUTS))
    ndim = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    rows = {"batch": ndim - 2, "batch_transposed": ndim - 1}
    dim = rows.get(layout, 1 if layout == "transposed" and ndim == 2 else 0)
    kind = draw(st.sampled_from(["none", "equal", "sizes"]))
    splits: int | list[int] | None = None
    if kind == "equal":
        splits = draw(st.integers(1, 3))
        shape[dim] *= splits
    if kind == "sizes":
        splits = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        shape[dim] = sum(splits)
    return tuple(shape), layout, splits


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
def test_from_matrices_inverts_to_matrices(case):
    shape, layout, splits = case
    x = counted(*shape)
    parts = convert(x, layout, splits)
    assert torch.equal(from_matrices(parts, x.shape, layout, splits), x)
    assert torch.equal(from_matrices([p.clone() for p in parts], x.shape, layout, splits), x)
    assert [p.shape for p in parts] == matrix_shapes(x.shape, layout, splits)
    entries = torch.cat([p.flatten() for p in parts]).sort().values
    assert torch.equal(entries, x.flatten())  # each entry in one place


@pytest.mark.parametrize(
    ("splits", "message"),
    [(4, "4 does not divide the 6 rows of 6x4"), ([2, 2], "do not add up to the 6 rows of 6x4")],
)
def test_splits_that_do_not_fit_are_refused(splits, message):
    with pytest.raises(ValueError, match=message):
        convert(counted(6, 4), splits=splits)
    with pytest.raises(ValueError, match=message):
        matrix_shapes(torch.Size((6, 4)), "flatten", splits)


def test_plain_tensors_are_their_own_shards():
    x = counted(3, 3)
    assert local(x) is gather(x, x) is placed_as(x, x) is x
