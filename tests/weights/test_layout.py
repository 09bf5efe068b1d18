"""RALayout: sizes solved from a column count, and the two column orders."""

import pytest
import torch
from budget import assert_bitwise
from hypothesis import given
from hypothesis import strategies as st

import ra_triton
from ra_triton.weights.layout import RALayout


@st.composite
def layouts(draw):
    D = draw(st.sampled_from([1, 2, 5, 16, 64]))
    H_kv, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    return RALayout(H_kv * group, H_kv, D, draw(st.sampled_from([0, D, D // 2, D - 1])))


@given(layout=layouts())
def test_sizes_follow_from_the_columns(layout):
    assert layout == RALayout.from_columns(
        layout.columns, layout.R, layout.n_head, layout.n_kv_head
    )
    assert layout.columns == (layout.n_head + 2 * layout.n_kv_head) * layout.head_dim
    sections = layout.split_sections.values()
    assert sum(heads * lanes for heads, lanes in sections) == layout.columns


@pytest.mark.parametrize(
    ("columns", "n_kv_head", "n_head"),
    [(192, None, 1), (2304, None, 12), (192, 1, 1), (64 * 16, 2, 12), (64 * 20, 4, 12)],
)
def test_heads_of_64_where_none_are_given(columns, n_kv_head, n_head):
    layout = RALayout.from_columns(columns, 4, None, n_kv_head)
    assert (layout.n_head, layout.n_kv_head) == (n_head, n_kv_head or n_head)
    assert layout.head_dim == 64


@given(layout=layouts())
def test_packing_is_a_permutation_and_unpacking_its_inverse(layout):
    columns = torch.arange(layout.columns)
    packed = layout.pack(columns)
    assert_bitwise(packed.sort().values, columns)
    assert_bitwise(layout.unpack(packed), columns)
    assert_bitwise(layout.pack(layout.unpack(columns)), columns)


@given(layout=layouts())
def test_packed_heads_hold_the_lanes_of_the_split_sections(layout):
    columns = torch.arange(layout.columns)
    split = layout.split_columns(columns)
    q_pack, k_pack, v = layout.views(layout.pack(columns))
    d_std = layout.d_std
    for packed, std, low in ((q_pack, "q_std", "k_low"), (k_pack, "k_std", "q_low")):
        assert_bitwise(packed[..., :d_std], split[std])
        assert_bitwise(packed[..., d_std:], split[low])
    assert_bitwise(v, split["v"])


def test_the_split_sections_are_where_the_readme_of_the_layout_says():
    """H=2, D=3, R=1: [Q_std 4 | K_std 4 | V 6 | Q_low 2 | K_low 2]."""
    packed = RALayout(2, 2, 3, 1).pack(torch.arange(18))
    q_pack = [[0, 1, 16], [2, 3, 17]]
    k_pack = [[4, 5, 14], [6, 7, 15]]
    v = [[8, 9, 10], [11, 12, 13]]
    assert packed.view(3, 2, 3).tolist() == [q_pack, k_pack, v]


def test_the_grouped_sections_are_where_the_layout_says():
    """H=2, H_kv=1, D=2, R=1: [Q_std 2 | K_std 1 | V 2 | Q_low 1 | K_low 2]."""
    packed = RALayout(2, 1, 2, 1).pack(torch.arange(8))
    assert packed.view(4, 2).tolist() == [[0, 6], [1, 7], [2, 5], [3, 4]]


@pytest.mark.parametrize("R", [0, 64])
def test_rank_zero_and_full_rank(R):
    layout = RALayout.from_columns(192, R)
    q_pack, k_pack, _ = layout.views(layout.pack(torch.arange(192)))
    split = layout.split_columns(torch.arange(192))
    assert_bitwise(q_pack, split["q_std" if R == 0 else "k_low"])
    assert_bitwise(k_pack, split["k_std" if R == 0 else "q_low"])


@given(layout=layouts(), leading=st.sampled_from([(), (3,), (0,), (2, 3)]))
def test_public_pack_and_unpack_are_exact_inverses(layout, leading):
    W = torch.randn(*leading, layout.columns, dtype=torch.float16)
    heads = {"n_head": layout.n_head, "n_kv_head": layout.n_kv_head}
    packed = ra_triton.pack_weight(W, layout.R, **heads)
    assert_bitwise(packed, layout.pack(W))
    assert_bitwise(ra_triton.unpack_weight(packed, layout.R, **heads), W)


def test_packing_a_weight_is_differentiable():
    W = torch.randn(2, 192, requires_grad=True)
    grad = torch.randn(2, 192)
    ra_triton.pack_weight(W, 4).backward(grad)
    assert_bitwise(W.grad, ra_triton.unpack_weight(grad, 4))


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "n_head", (192, 4, 1.0)),
        (TypeError, "n_head", (192, 4, True)),
        (TypeError, "n_kv_head", (192, 4, 1, "1")),
        (TypeError, "R must be an int", (192, True)),
        (TypeError, "R must be an int", (192, 4.0)),
        (TypeError, "R must be an int", (192, None)),
        (ValueError, "n_head must be at least 1", (192, 4, 0)),
        (ValueError, "n_kv_head must be at least 1", (192, 4, 1, -1)),
        (ValueError, "n_head=3 must be a multiple of n_kv_head=2", (192, 4, 3, 2)),
        (ValueError, "n_head=1 must be a multiple of n_kv_head=2", (192, 4, 1, 2)),
        (ValueError, "columns", (193, 4, 1)),
        (ValueError, "columns", (0, 0, 1)),
        (ValueError, "pass n_head", (100, 4)),
        (ValueError, "pass n_head", (128, 4, None, 1)),
        (ValueError, "R must be between 0 and the head dim 64", (192, 65)),
        (ValueError, "R must be between 0 and the head dim 64", (192, -1)),
    ],
)
def test_sizes_that_do_not_fit_are_refused(error, match, arguments):
    with pytest.raises(error, match=match):
        RALayout.from_columns(*arguments)
