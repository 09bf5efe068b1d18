"""packed_attention and ra_attention against FP64: values, logsumexp, masks, edge shapes."""

import pytest
import torch
from budget import (
    assert_attention_close,
    assert_bitwise,
    assert_within_promise,
    attention_budget,
    check_budget,
)
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    AttentionCase,
    attention_cases,
    backend_dtypes,
    dtypes_for,
    forward_backends,
    lay_out,
    normal,
)

import ra_triton


def check_case(case: AttentionCase, backend: str) -> None:
    q, k, v = case.tensors()
    out, lse = ra_triton.packed_attention(q, k, v, return_lse=True, backend=backend, **case.options)
    assert_attention_close(out, q, k, v, lse=lse, **case.options)


@forward_backends
@given(data=st.data())
def test_attention_matches_the_definition(backend, data):
    check_case(data.draw(attention_cases(dtypes_for(backend))), backend)


@backend_dtypes
@pytest.mark.parametrize("T", [1, 2, 3, 17, 65, 128, 129, 200])
def test_lengths_around_tile_boundaries(backend, dtype, T):
    check_case(AttentionCase(T_q=T, T_k=T, D=32, dtype=dtype), backend)


@backend_dtypes
@pytest.mark.parametrize("D", [16, 20, 64, 72, 80, 96, 100, 128])
def test_head_dims_also_those_that_are_no_power_of_two(backend, dtype, D):
    check_case(AttentionCase(T_q=35, T_k=35, D=D, dtype=dtype, layouts=("sliced",) * 3), backend)


@forward_backends
@pytest.mark.parametrize(("T_q", "T_k"), [(1, 70), (5, 37), (33, 34), (40, 7), (65, 1), (70, 64)])
@pytest.mark.parametrize("causal", [True, False])
def test_queries_and_keys_of_different_length(backend, T_q, T_k, causal):
    check_case(AttentionCase(B=2, T_q=T_q, T_k=T_k, causal=causal), backend)


@forward_backends
@pytest.mark.parametrize("causal", [True, False])
def test_every_offset_between_queries_and_keys_modulo_a_tile(backend, causal):
    for T_k in range(3, 37):
        check_case(AttentionCase(T_q=3, T_k=T_k, causal=causal), backend)


@forward_backends
@pytest.mark.parametrize(("n_kv_head", "group"), [(1, 4), (2, 3), (3, 2)])
def test_grouped_heads(backend, n_kv_head, group):
    check_case(AttentionCase(B=2, T_q=19, T_k=19, H_kv=n_kv_head, group=group), backend)


@forward_backends
@pytest.mark.parametrize(("T_q", "T_k"), [(40, 7), (70, 3), (17, 16), (5, 0)])
def test_rows_without_keys_give_zero_and_minus_infinity(backend, T_q, T_k):
    q, k, v = AttentionCase(B=2, T_q=T_q, T_k=T_k).tensors()
    out, lse = ra_triton.packed_attention(q, k, v, return_lse=True, backend=backend)
    blind = T_q - T_k
    assert_bitwise(out[:, :blind], torch.zeros_like(out[:, :blind]))
    assert lse[..., :blind].isneginf().all()
    assert lse[..., blind:].isfinite().all()


@forward_backends
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("causal", [True, False])
def test_no_keys_gives_zero_whatever_the_query(backend, value, causal):
    q, k, v = AttentionCase(T_q=3, T_k=0, causal=causal).tensors()
    q.fill_(value)
    out, lse = ra_triton.packed_attention(q, k, v, causal=causal, return_lse=True, backend=backend)
    assert_bitwise(out, torch.zeros_like(q))
    assert lse.isneginf().all()


@forward_backends
@pytest.mark.parametrize(
    ("B", "T_q", "T_k"), [(0, 5, 5), (2, 0, 0), (2, 0, 5), (0, 0, 0), (0, 5, 7)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_in_nothing_out(backend, B, T_q, T_k, causal):
    check_case(AttentionCase(B=B, T_q=T_q, T_k=T_k, causal=causal), backend)


@backend_dtypes
@pytest.mark.parametrize("log_size", [0, 4, 7, 10])
def test_one_hot_logits_up_to_two_to_the_twentieth_pick_one_value(backend, dtype, log_size):
    T = D = 32
    eye = torch.eye(D, device=DEVICE, dtype=dtype)[None, :, None] * 2.0**log_size
    v = normal(1, T, 1, D, dtype=dtype)
    out, lse = ra_triton.packed_attention(
        eye, eye, v, causal=False, return_lse=True, backend=backend
    )
    assert_attention_close(out, eye, eye, v, lse=lse, causal=False)
    # From here on every other weight is 0; fused multiply-add on a GPU rounds the last bit.
    if log_size >= 7 and DEVICE.type == "cpu":
        assert_bitwise(out, v)


@backend_dtypes
@pytest.mark.parametrize("scale", [1e-6, 0.37, 1.0, 40.0])
def test_softmax_scale(backend, dtype, scale):
    check_case(AttentionCase(T_q=37, T_k=37, dtype=dtype, scale=scale), backend)


@backend_dtypes
@pytest.mark.parametrize("values", ["zeros", "small", "large", "huge"])
def test_logits_of_every_size(backend, dtype, values):
    check_case(AttentionCase(B=2, T_q=50, T_k=50, dtype=dtype, values=values), backend)


@backend_dtypes
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_error_is_within_the_promise_of_eager_pytorch(backend, dtype, causal, seed):
    case = AttentionCase(B=2, T_q=130, T_k=130, H_kv=2, D=32, dtype=dtype, seed=seed)
    q, k, v = case.tensors()
    out = ra_triton.packed_attention(q, k, v, causal=causal, backend=backend)
    assert_within_promise(out, q, k, v, causal=causal)


@forward_backends
def test_lse_is_returned_only_when_asked_for(backend):
    q, k, v = AttentionCase(T_q=9, T_k=9, group=2).tensors()
    out, lse = ra_triton.packed_attention(q, k, v, return_lse=True, backend=backend)
    assert lse.shape == (1, 2, 9)
    assert lse.dtype == torch.float32
    assert_bitwise(ra_triton.packed_attention(q, k, v, backend=backend), out)


@pytest.mark.parametrize("T_k", [30, 41, 12])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window_size", [(-1, -1), (0, 0), (3, 0), (4, 2), (-1, 5), (7, -1)])
def test_sdpa_windows_include_both_ends(T_k, causal, window_size):
    q, k, v = AttentionCase(B=2, T_q=30, T_k=T_k).tensors()
    options = {"causal": causal, "window_size": window_size}
    out, lse = ra_triton.packed_attention(q, k, v, return_lse=True, backend="sdpa", **options)
    assert_attention_close(out, q, k, v, lse=lse, **options)


def test_sdpa_dropout_drops_or_scales_by_its_inverse_and_follows_the_seed():
    q, k, v = AttentionCase(B=4, T_q=6, T_k=6, H_kv=8).tensors()

    def first_rows():
        torch.manual_seed(1)
        return ra_triton.packed_attention(q, k, v, dropout_p=0.5, backend="sdpa")[:, 0]

    rows = first_rows()  # row 0 has one key, of weight 1
    dropped = (rows == 0).all(-1)
    assert dropped.any()
    assert not dropped.all()
    assert_bitwise(rows[~dropped], 2 * v[:, 0][~dropped])
    assert_bitwise(first_rows(), rows)


@forward_backends
@pytest.mark.parametrize("layout", ["transposed", "sliced", "fused", "expanded"])
def test_the_output_is_contiguous_and_new(backend, layout):
    q, k, v = (lay_out(t, layout) for t in AttentionCase(B=2, T_q=9, T_k=9).tensors())
    out = ra_triton.packed_attention(q, k, v, backend=backend)
    assert out.shape == q.shape
    assert out.untyped_storage().data_ptr() not in {
        t.untyped_storage().data_ptr() for t in (q, k, v)
    }


@forward_backends
@pytest.mark.parametrize("weight_layout", ["split", "packed"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_ra_attention_is_attention_over_the_projection(backend, weight_layout, with_bias):
    x, W = normal(2, 21, 24), normal(24, 6 * 16, seed=1)
    bias = normal(6 * 16, seed=2) if with_bias else None
    heads = {"n_head": 4, "n_kv_head": 1, "weight_layout": weight_layout, "bias": bias}
    packed = ra_triton.project(x, W, 3, backend=backend, **heads)
    for options in ({}, {"causal": False}, {"softmax_scale": 0.5}):
        out = ra_triton.ra_attention(x, W, 3, backend=backend, **heads, **options)
        assert out.shape == (2, 21, 64)
        expected = ra_triton.packed_attention(*packed, backend=backend, **options)
        assert_bitwise(out, expected.flatten(2))


@forward_backends
def test_heads_of_64_are_the_default(backend):
    x, W = normal(1, 5, 8), normal(8, 3 * 2 * 64, seed=1)
    assert_bitwise(
        ra_triton.ra_attention(x, W, backend=backend),
        ra_triton.ra_attention(x, W, 4, n_head=2, n_kv_head=2, backend=backend),
    )


@forward_backends
def test_large_fp16_activations_overflow_only_where_they_must(backend):
    x, W = normal(2, 20, 32, dtype=torch.float16), normal(32, 48, dtype=torch.float16, seed=1)
    x[0] *= 300
    packed = ra_triton.project(x, W, 4, n_head=1, backend=backend)
    out, lse = ra_triton.packed_attention(*packed, return_lse=True, backend=backend)
    assert_attention_close(out, *packed, lse=lse)
    assert out.isfinite().all()


@example(case=AttentionCase(T_q=17, T_k=17, D=20, layouts=("sliced", "fused", "offset")))
@given(case=attention_cases())
def test_the_budget_is_never_zero_and_the_reference_obeys_it(case):
    q, k, v = case.tensors()
    budget, lse_budget = attention_budget(q, k, v, **case.options)
    assert (budget.sigma > 0).all()
    assert (lse_budget.sigma > 0).all()
    check_budget(budget.expected.float(), budget, dtype=torch.float32, what="reference")
