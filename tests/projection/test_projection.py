"""project: the GEMM against FP64, the packed views it returns, its out argument."""

import pytest
import torch
from budget import assert_bitwise, assert_projection_close
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    BACKENDS,
    NAN,
    ProjectionCase,
    backend_dtypes,
    backends,
    dtypes_for,
    normal,
    projection_cases,
    small_head_dims,
)

import ra_triton
from ref.reciprocal_attention import split_lanes


def projected(case: ProjectionCase, backend: str):
    """Inputs in packed order, so that the product can be gated, and the result as one buffer."""
    x, W, bias = case.tensors()
    packed = ra_triton.project(
        x,
        W,
        case.R,
        bias=bias,
        weight_layout=case.weight_layout,
        backend=backend,
        **case.heads,
    )
    if case.weight_layout == "split":
        W = ra_triton.pack_weight(W, case.R, **case.heads)
        bias = None if bias is None else ra_triton.pack_weight(bias, case.R, **case.heads)
    return x, W, bias, torch.cat(packed, dim=2).flatten(2)


def check_case(case: ProjectionCase, backend: str) -> None:
    x, W, bias, y = projected(case, backend)
    assert_projection_close(y, x, W, bias, bias_rounds_too=backend == "sdpa")


@backends
@given(data=st.data())
def test_projection_matches_the_definition(backend, data):
    check_case(data.draw(projection_cases(dtypes_for(backend))), backend)


@backend_dtypes
@pytest.mark.parametrize("T", [1, 2, 3, 63, 65, 130])
@pytest.mark.parametrize("C", [1, 7, 32, 100])
def test_sizes_around_tile_boundaries(backend, dtype, T, C):
    check_case(ProjectionCase(T=T, C=C, dtype=dtype, with_bias=True), backend)


@backends
@pytest.mark.parametrize("C", [257, 768])
def test_long_reductions(backend, C):
    check_case(ProjectionCase(B=2, T=20, C=C), backend)


@backends
@pytest.mark.parametrize(("B", "T", "C"), [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_empty_sizes(backend, B, T, C, with_bias):
    check_case(ProjectionCase(B=B, T=T, C=C, with_bias=with_bias), backend)


@backends
@given(case=projection_cases(sizes=small_head_dims, weight_layout="split"))
@example(case=ProjectionCase(group=3, D=20, R=19))
def test_lanes_land_where_the_definition_says(backend, case):
    """With W = identity every output is one input, so any misplaced lane shows exactly."""
    N = case.columns
    x = torch.arange(2.0 * 3 * N).reshape(2, 3, N).to(case.tensors()[0].device)
    packed = ra_triton.project(
        x, torch.eye(N, device=x.device), case.R, backend=backend, **case.heads
    )
    for got, expected in zip(packed, split_lanes(x, case.R, **case.heads), strict=True):
        assert_bitwise(got, expected)


@backends
@pytest.mark.parametrize("heads", [{}, {"n_head": 4, "n_kv_head": 1}])
def test_the_operands_are_views_of_one_token_major_buffer(backend, heads):
    q, k, v = ra_triton.project(normal(2, 5, 8), normal(8, 384), 4, backend=backend, **heads)
    H, H_kv, D = q.shape[2], k.shape[2], q.shape[3]
    assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1
    for t, first_head in ((q, 0), (k, H), (v, H + H_kv)):
        assert t.stride() == (5 * 384, 384, D, 1)
        assert t.storage_offset() == first_head * D


@backends
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 19), (2, 0), (0, 3)])
def test_out_receives_the_result(backend, with_bias, shape):
    x, W = normal(*shape, 24), normal(24, 3 * 32, seed=1)
    bias = normal(96, seed=2) if with_bias else None
    out = torch.full((*shape, 6, 16), NAN, device=x.device)
    options = {"n_head": 2, "bias": bias, "backend": backend}
    packed = ra_triton.project(x, W, 4, out=out, **options)
    assert all(t.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() for t in packed)
    assert_bitwise(out, torch.cat(ra_triton.project(x, W, 4, **options), dim=2))


@backends
def test_the_inputs_may_be_any_views(backend):
    wide = normal(2, 9, 64)
    heads = {"n_head": 1, "backend": backend, "weight_layout": "packed"}
    weight = normal(48, 24, seed=1)  # nn.Linear's orientation
    for x in (wide[..., 20:44], wide[:, ::2, :24], wide[1:].expand(3, 9, 64)[..., :24]):
        y = torch.cat(ra_triton.project(x, weight.T, 4, **heads), 2).flatten(2)
        assert_projection_close(y, x, weight.T)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [2, 3])
def test_a_bias_with_any_stride(backend, step):
    x, W, bias = normal(2, 9, 24), normal(24, 48, seed=1), normal(48 * step, seed=2)[::step]
    options = {"n_head": 1, "weight_layout": "packed", "backend": backend}
    y = torch.cat(ra_triton.project(x, W, 4, bias=bias, **options), 2).flatten(2)
    assert_projection_close(y, x, W, bias)
