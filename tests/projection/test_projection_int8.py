"""Projections from int8 weights: the gate on the numbers they stand for, and exact integers."""

import pytest
import torch
from budget import assert_bitwise, assert_projection_close
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    NAN,
    TOKEN_LAYOUTS,
    ProjectionCase,
    backends,
    dtypes_for,
    few_examples,
    lay_out,
    normal,
    projection_cases,
    small_head_dims,
)

import ra_triton
from ra_triton.kernels.projection.int8 import int8_projection, quantize_rows
from ra_triton.launch.configs import LaunchConfig
from ra_triton.weights import quantization
from ra_triton.weights.layout import Columns, RALayout
from ref.reciprocal_attention import round_to_int8

WHICH = ("all", "reciprocal")
ACTIVATIONS = ("none", "int8")
ways = pytest.mark.parametrize(
    ("which", "activations"), [(w, a) for w in WHICH for a in ACTIVATIONS]
)


def quantized(case: ProjectionCase, which: str, activations: str):
    """``x``, the quantized weight and the bias of a case, and its options."""
    x, W, bias = case.tensors()
    weight_layout = case.weight_layout
    W = ra_triton.quantize_weight(
        W, case.R, which=which, activations=activations, weight_layout=weight_layout, **case.heads
    )
    return x, W, bias, {"bias": bias, "weight_layout": weight_layout, **case.heads}


def what_it_stands_for(x, W):
    """The operands that the integers and scales stand for, in FP64: ``(x, x beside int8, W)``."""
    rounded = x.double()
    if W.activations == "int8" and x.numel():
        q, scale = round_to_int8(x)
        rounded = q.double() * scale.double()
    return x.double(), rounded, W.dequantize(torch.float64)


def check_case(case: ProjectionCase, which: str, activations: str, backend: str) -> None:
    if which == "reciprocal" and case.R == 0:
        return  # refused, see test_quantization.py
    x, W, bias, options = quantized(case, which, activations)
    y = torch.cat(ra_triton.project(x, W, case.R, backend=backend, **options), 2).flatten(2)
    if bias is not None and case.weight_layout == "split":
        bias = ra_triton.pack_weight(bias, case.R, **case.heads)
    plain, rounded, exact = what_it_stands_for(x, W)
    if which == "all":
        assert_projection_close(y, rounded, exact, bias, dtype=x.dtype)
        return
    # Two products with operands of their own: one gate each.
    for part, operand in zip((0, 1), (rounded, plain), strict=True):
        columns = (t if t is None else W.layout.take_low(t)[part] for t in (y, exact, bias))
        found, weight, offset = columns
        if found.numel():
            assert_projection_close(found, operand, weight, offset, dtype=x.dtype)


@backends
@few_examples
@given(data=st.data())
def test_projections_pass_the_gate_on_what_the_integers_stand_for(backend, data):
    case = data.draw(projection_cases(dtypes_for(backend)))
    check_case(case, *data.draw(st.tuples(*map(st.sampled_from, (WHICH, ACTIVATIONS)))), backend)


@ways
@pytest.mark.parametrize("T", [1, 16, 17, 65])
@pytest.mark.parametrize("C", [33, 64])
def test_sizes_around_tile_boundaries(which, activations, T, C):
    case = ProjectionCase(T=T, C=C, dtype=torch.float16, with_bias=True, H_kv=2, D=20)
    check_case(case, which, activations, "triton")


@ways
@backends
@pytest.mark.parametrize("R", [1, 15, 16])
def test_every_rank_of_grouped_heads(which, activations, backend, R):
    case = ProjectionCase(H_kv=2, group=3, D=16, R=R, with_bias=True)
    check_case(case, which, activations, backend)


@ways
@backends
@pytest.mark.parametrize(("B", "T"), [(0, 3), (2, 0)])
def test_no_tokens(which, activations, backend, B, T):
    check_case(ProjectionCase(B=B, T=T), which, activations, backend)


@backends
@given(case=projection_cases(sizes=small_head_dims, weight_layout="split", with_bias=False))
@example(case=ProjectionCase(group=3, D=20, R=19))
@few_examples
def test_columns_land_where_dense_ones_do(backend, case):
    """W = 127 on the diagonal is exact in int8, so a misplaced column shows exactly."""
    if case.R == 0:
        return
    N = case.columns
    x = torch.arange(2.0 * N).reshape(1, 2, N).to(DEVICE)
    W = 127 * torch.eye(N, device=DEVICE)
    q = ra_triton.quantize_weight(W, case.R, which="reciprocal", **case.heads)
    options = {"backend": backend, **case.heads}
    for found, expected in zip(
        ra_triton.project(x, q, case.R, **options),
        ra_triton.project(x, W, case.R, **options),
        strict=True,
    ):
        assert_bitwise(found, expected)


# Integers, exactly


def integers(*shape, seed, low=-127):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 128, shape, generator=generator, dtype=torch.int8).to(DEVICE)


@pytest.mark.parametrize("low", [-127, 127])  # all products at their largest, of one sign
@pytest.mark.parametrize(("M", "N", "C"), [(1, 1, 1), (1, 7, 33), (40, 33, 70), (5, 40, 1100)])
def test_sums_in_int32_are_exact(M, N, C, low):
    x, w = integers(1, M, C, seed=0, low=low), integers(N, C, seed=1, low=low)
    out = torch.full((1, M, N), NAN, device=DEVICE)
    ones = torch.ones(max(M, N), device=DEVICE)
    int8_projection(x, w, ones[:M], ones[:N], None, out, Columns())
    sums = x[0].cpu().int() @ w.cpu().int().T
    assert_bitwise(out[0].cpu(), sums.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "C"), [(1, 16), (19, 33), (40, 130)])
def test_w8a8_has_the_same_bits_on_both_backends(dtype, T, C):
    """Both round once after an exact sum, and then multiply by the same scales."""
    x, W, _, options = quantized(ProjectionCase(T=T, C=C, dtype=dtype), "all", "int8")
    both = (ra_triton.project(x, W, backend=name, **options) for name in ("sdpa", "triton"))
    for plain, kernel in zip(*both, strict=True):
        assert_bitwise(kernel, plain)


@few_examples
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40)),
    layout=st.sampled_from(TOKEN_LAYOUTS),
    scale=st.sampled_from([1.0, 1e-3, 3e38, 1e-37, 1e-44, 0.0]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 3),
)
def test_tokens_are_rounded_as_the_definition_says(shape, layout, scale, dtype, seed):
    scale = min(scale, torch.finfo(dtype).max)
    x = lay_out(normal(*shape, seed=seed, dtype=dtype).clamp(-1, 1) * scale, layout)
    x_int8 = torch.zeros(shape, dtype=torch.int8, device=DEVICE)
    found = torch.empty(shape[:2], device=DEVICE).flatten()
    quantize_rows(x, x_int8, found)
    q, expected = round_to_int8(x)
    assert_bitwise(x_int8.float(), q)
    assert_bitwise(found, expected.flatten())


def test_ties_go_to_the_even_integer():
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5, 126.5, 0.49999997]])[None].to(DEVICE)
    x_int8, scale = torch.zeros_like(x, dtype=torch.int8), torch.empty(1, device=DEVICE)
    quantize_rows(x, x_int8, scale)
    assert x_int8.flatten().tolist() == [127, 0, 2, 0, -2, 126, 0]
    assert scale.item() == 1.0


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_tokens_that_are_not_finite_have_no_integers_and_a_scale_of_nan(value):
    x = normal(1, 6, 40)
    x[0, 3, 33] = value
    x_int8, scale = torch.ones_like(x, dtype=torch.int8), torch.empty(6, device=DEVICE)
    quantize_rows(x, x_int8, scale)
    assert scale.isnan().nonzero().flatten().tolist() == [3]
    assert not x_int8[0, 3].any()
    plain, plain_scale = quantization.quantize_rows(x)
    assert_bitwise(x_int8.float(), plain.float())
    assert_bitwise(scale, plain_scale.flatten())


@ways
@backends
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_shows_and_leaves_the_others_alone(
    which, activations, backend, value
):
    clean, W, _, options = quantized(ProjectionCase(T=6, C=24), which, activations)
    dirty = clean.clone()
    dirty[0, 2, 5] = value
    before, after = (
        torch.cat(ra_triton.project(x, W, backend=backend, **options), 2) for x in (clean, dirty)
    )
    others = [0, 1, 3, 4, 5]
    assert_bitwise(after[:, others], before[:, others])
    assert not after[:, 2].isfinite().any()


@ways
def test_a_token_does_not_depend_on_its_neighbours(which, activations):
    x, W, _, options = quantized(ProjectionCase(B=2, T=40, C=32), which, activations)
    whole = ra_triton.project(x, W, backend="triton", **options)
    part = ra_triton.project(x[1:, 10:37], W, backend="triton", **options)
    for a, b in zip(part, whole, strict=True):
        assert_bitwise(a, b[1:, 10:37])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="Hopper alone has bulk copies")
@pytest.mark.parametrize("columns", ["low_columns", "other_columns"])
def test_bulk_copies_read_the_same(columns):
    layout = RALayout(2, 2, 20, 4)
    lanes, C = {"low_columns": 16, "other_columns": 104}[columns], 48
    x, w = integers(1, 35, C, seed=0), integers(lanes, C, seed=1)
    x_scale, w_scale = normal(35, seed=2), normal(lanes, seed=3)
    tiles = {"block_m": 32, "block_n": 16, "block_k": 32, "num_warps": 4}
    for operand, scale in ((x, x_scale), (x.half(), None)):
        found = []
        for use_tma in (False, True):
            out = torch.zeros(1, 35, layout.columns, device=DEVICE)
            config = LaunchConfig(**tiles, use_tma=use_tma)
            where = getattr(layout, columns)
            int8_projection(operand, w, scale, w_scale, None, out, where, config=config)
            found.append(out)
        assert_bitwise(found[1], found[0])
        assert torch.count_nonzero(found[0]) == 35 * lanes


@pytest.mark.gpu
@ways
@pytest.mark.parametrize("C", [72, 768, 770])  # 770: rows of x and w off 16 bytes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_config_passes_the_gate(which, activations, C, dtype):
    for T in (1, 8, 16, 17, 129, 500):
        case = ProjectionCase(T=T, C=C, H_kv=3, D=64, dtype=dtype, with_bias=True)
        check_case(case, which, activations, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("C", [72, 768, 770])
def test_sums_in_int32_are_exact_on_tensor_cores(C):
    for M, N in ((1, 7), (300, 576)):
        x, w = integers(1, M, C, seed=0), integers(N, C, seed=1)
        out = torch.full((1, M, N), NAN, device=DEVICE)
        ones = torch.ones(max(M, N), device=DEVICE)
        int8_projection(x, w, ones[:M], ones[:N], None, out, Columns())
        assert_bitwise(out[0].double(), x[0].double() @ w.double().T)


@pytest.mark.gpu
@ways
def test_a_captured_graph_replays_on_new_data(which, activations):
    x, W, _, options = quantized(ProjectionCase(T=40, C=64, H_kv=2, D=64), which, activations)
    ra_triton.ra_attention(x, W, backend="triton", **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ra_triton.ra_attention(x, W, backend="triton", **options)
    x.copy_(normal(*x.shape, seed=9))
    graph.replay()
    assert_bitwise(found, ra_triton.ra_attention(x, W, backend="triton", **options))


# What stands around the kernels


@ways
@backends
def test_out_receives_the_result_and_nothing_is_written_but_that(which, activations, backend):
    x, W, bias, options = quantized(ProjectionCase(T=19, with_bias=True), which, activations)
    before = [t.clone() for t in (x, bias, *W.tensors)]
    expected = torch.cat(ra_triton.project(x, W, backend=backend, **options), 2)
    out = torch.full_like(expected, NAN)
    found = ra_triton.project(x, W, out=out, backend=backend, **options)
    assert all(t.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() for t in found)
    assert_bitwise(out, expected)
    for t, old in zip((x, bias, *W.tensors), before, strict=True):
        assert_bitwise(t, old)


@ways
@backends
def test_the_layer_is_its_stages_with_and_without_a_workspace(which, activations, backend):
    from ra_triton.nn import Workspace

    x, W, _, options = quantized(ProjectionCase(T=19, with_bias=True), which, activations)
    packed = ra_triton.project(x, W, backend=backend, **options)
    expected = ra_triton.packed_attention(*packed, backend=backend).flatten(2)
    assert_bitwise(ra_triton.ra_attention(x, W, backend=backend, **options), expected)
    workspace = Workspace()
    for _ in range(2):
        found = ra_triton.ra_attention(x, W, workspace=workspace, backend=backend, **options)
        assert_bitwise(found, expected)


@ways
@backends
def test_compiled_without_a_graph_break(which, activations, backend):
    x, W, _, options = quantized(ProjectionCase(T=19, with_bias=True), which, activations)

    @torch.no_grad()
    def layer(x):
        return ra_triton.ra_attention(x, W, backend=backend, **options)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_bitwise(compiled(x), layer(x))


@ways
@backends
def test_under_autocast_x_and_the_other_columns_are_cast(which, activations, backend):
    dtype = dtypes_for(backend)[1]
    x, W, _, options = quantized(ProjectionCase(T=9), which, activations)
    with torch.autocast(DEVICE.type, dtype=dtype):
        found = ra_triton.ra_attention(x, W, backend=backend, **options)
    x, W = x.to(dtype), W.to(dtype=dtype)
    assert_bitwise(found, ra_triton.ra_attention(x, W, backend=backend, **options))


@pytest.mark.parametrize("R", [0, 1, 7, 16])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
def test_columns_say_where_the_low_lanes_and_the_others_are(heads, R):
    layout = RALayout(*heads, 16, R)
    places = torch.arange(layout.columns)
    low, others = layout.take_low(places)
    assert_bitwise(layout.put_low(low, others), places)
    for part, (start, lanes, n, gap) in (
        (low, layout.low_columns),
        (others, layout.other_columns),
    ):
        found = [start + j + min(j // lanes, n) * gap for j in range(len(part))]
        assert part.tolist() == found
    assert layout.unpack(places)[layout.columns - len(low) :].sort().values.tolist() == low.tolist()


@backends
def test_one_shape_in_every_dtype_one_after_another(backend):
    """Integer products see the dtype of their result alone; one was taken for the other."""
    for dtype in (*dtypes_for(backend), torch.float32):
        check_case(ProjectionCase(T=5, dtype=dtype, with_bias=True), "all", "int8", backend)
