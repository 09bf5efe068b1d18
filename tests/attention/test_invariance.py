"""What must not change a result: neighbours, later tokens, layout, memory around, program order."""

import math
import operator
import random
from contextlib import nullcontext

import pytest
import torch
from budget import assert_agree, assert_bitwise, attention_sigma
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    HEAD_LAYOUTS,
    NAN,
    TOKEN_LAYOUTS,
    WEIGHT_LAYOUTS,
    AttentionCase,
    attention_cases,
    backend_dtypes,
    dtypes_for,
    few_examples,
    forward_backends,
    lay_out,
    normal,
    projection_cases,
    quick,
    redzoned,
)

import ra_triton


def attend(backend, q, k, v, **options):
    return ra_triton.packed_attention(q, k, v, backend=backend, **options)


def assert_unchanged(backend, actual, expected, q, k, v, **options):
    """Bitwise for our kernels; SDPA may choose another order of summation for another shape."""
    if backend == "triton":
        assert_bitwise(actual, expected)
    else:
        sigma = attention_sigma(q, k, v, **options)
        assert_agree(actual, expected, sigma, sigma)


def drawn(data, backend, **fixed):
    case = data.draw(attention_cases(dtypes_for(backend), **fixed))
    tensors = case.tensors()
    return case, tensors, attend(backend, *tensors, **case.options)


# Neighbours


@forward_backends
@few_examples
@given(data=st.data())
def test_each_batch_element_is_computed_as_if_alone(backend, data):
    case, tensors, out = drawn(data, backend, B=3)
    for b in range(3):
        alone = [t[b : b + 1] for t in tensors]
        got = attend(backend, *alone, **case.options)
        assert_unchanged(backend, got, out[b : b + 1], *alone, **case.options)


@forward_backends
@few_examples
@given(data=st.data())
def test_permuted_batch_and_heads_give_a_permuted_result(backend, data):
    case, tensors, out = drawn(data, backend, B=2, H_kv=3, group=1)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    permuted = [t.flip(0)[:, :, order] for t in tensors]
    got = attend(backend, *permuted, **case.options)
    assert_unchanged(backend, got, out.flip(0)[:, :, order], *permuted, **case.options)


@forward_backends
@few_examples
@given(data=st.data())
def test_a_prefix_of_the_tokens_gives_a_prefix_of_the_result(backend, data):
    case, tensors, out = drawn(data, backend, self_attention=True, causal=True)
    T = data.draw(st.integers(1, case.T_q), label="prefix")
    prefix = [t[:, :T] for t in tensors]
    got = attend(backend, *prefix, **case.options)
    assert_unchanged(backend, got, out[:, :T], *prefix, **case.options)


@forward_backends
@few_examples
@given(data=st.data())
def test_the_last_query_alone_gives_the_last_row(backend, data):
    """Decoding: bottom-right alignment makes a short query see what it saw in the full call."""
    case, (q, k, v), out = drawn(data, backend, self_attention=True, causal=True)
    last = q[:, -1:]
    got = attend(backend, last, k, v, **case.options)
    sigma = attention_sigma(last, k, v, **case.options)
    assert_agree(got, out[:, -1:], sigma, sigma)


@forward_backends
@few_examples
@given(data=st.data())
def test_later_tokens_do_not_reach_earlier_rows(backend, data):
    case, tensors, out = drawn(data, backend, self_attention=True, causal=True)
    t = data.draw(st.integers(0, case.T_q), label="first changed token")
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed:
        tensor[:, t:] = 7.0
    assert_bitwise(attend(backend, *changed, **case.options)[:, :t], out[:, :t])


@backend_dtypes
@pytest.mark.parametrize("value", quick([NAN, math.inf, -math.inf]))
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_bad_batch_element_leaves_the_others_alone(backend, dtype, value, which):
    tensors = AttentionCase(B=3, T_q=35, T_k=35, H_kv=2, dtype=dtype).tensors()
    out = attend(backend, *tensors)
    tensors[which][1] = value
    got = attend(backend, *tensors)
    assert_bitwise(got[::2], out[::2])
    assert not got[1].isfinite().all()


@forward_backends
@pytest.mark.parametrize("token", [0, 5, 16, 39])
def test_a_nan_token_gives_nan_from_its_row_on(backend, token):
    q, k, v = AttentionCase(B=1, T_q=40, T_k=40, H_kv=2).tensors()
    clean = attend(backend, q, k, v)
    k[:, token, 0] = NAN
    out = attend(backend, q, k, v)
    assert out[:, token:, 0].isnan().all()
    assert_bitwise(out[:, :token, 0], clean[:, :token, 0])
    assert_bitwise(out[:, :, 1], clean[:, :, 1], "the other head")


@forward_backends
def test_a_nan_input_token_of_ra_attention_stays_in_its_batch_element(backend):
    x, W = normal(2, 20, 12), normal(12, 96, seed=1)
    clean = ra_triton.ra_attention(x, W, n_head=2, backend=backend)
    x[0, 7] = NAN
    out = ra_triton.ra_attention(x, W, n_head=2, backend=backend)
    assert_bitwise(out[1], clean[1])
    assert out[0, 7:].isnan().all()


# Addresses


@forward_backends
@few_examples
@given(data=st.data())
def test_every_layout_gives_the_result_of_its_contiguous_copy(backend, data):
    case, tensors, out = drawn(data, backend)
    copies = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    got = attend(backend, *copies, **case.options)
    assert_unchanged(backend, got, out, *tensors, **case.options)


@forward_backends
@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_operand_in_another_layout_than_the_others(backend, layout, which):
    tensors = list(AttentionCase(B=2, T_q=35, T_k=35, H_kv=2, D=20).tensors())
    tensors[which] = lay_out(tensors[which], layout)
    expected = attend(backend, *(t.clone() for t in tensors))
    contiguous = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    assert_unchanged(backend, attend(backend, *tensors), expected, *tensors)
    assert_unchanged(backend, attend(backend, *contiguous), expected, *tensors)


@few_examples
@given(case=projection_cases())
def test_projection_of_any_layout_is_bitwise_that_of_contiguous_copies(case):
    x, W, bias = case.tensors()
    options = {"bias": bias, "weight_layout": case.weight_layout, "backend": "triton"}
    copies = [t.clone(memory_format=torch.contiguous_format) for t in (x, W)]
    views = ra_triton.project(x, W, case.R, **options, **case.heads)
    for a, b in zip(
        views, ra_triton.project(*copies, case.R, **options, **case.heads), strict=True
    ):
        assert_bitwise(a, b)


@pytest.mark.parametrize("x_layout", TOKEN_LAYOUTS)
@pytest.mark.parametrize("W_layout", WEIGHT_LAYOUTS)
def test_x_and_weight_in_any_two_layouts(x_layout, W_layout):
    x, W = lay_out(normal(2, 9, 24), x_layout), lay_out(normal(24, 96, seed=1), W_layout)
    options = {"n_head": 2, "weight_layout": "packed", "backend": "triton"}
    copies = [t.clone(memory_format=torch.contiguous_format) for t in (x, W)]
    assert_bitwise(
        ra_triton.ra_attention(x, W, **options), ra_triton.ra_attention(*copies, **options)
    )


@forward_backends
@pytest.mark.parametrize("D", [20, 32])
def test_memory_around_the_operands_does_not_matter(backend, D):
    tensors = AttentionCase(B=2, T_q=19, T_k=19, D=D).tensors()
    outs = [attend(backend, *(redzoned(t, fill) for t in tensors)) for fill in (0.0, NAN, 1e30)]
    assert_bitwise(outs[1], outs[0])
    assert_bitwise(outs[2], outs[0])


@forward_backends
def test_memory_around_x_and_the_weight_does_not_matter(backend):
    x, W = normal(2, 19, 25), normal(25, 3 * 20, seed=1)
    options = {"n_head": 1, "weight_layout": "packed", "backend": backend}
    outs = [
        ra_triton.ra_attention(redzoned(x, fill), redzoned(W, fill), **options)
        for fill in (0.0, NAN, 1e30)
    ]
    assert_bitwise(outs[1], outs[0])
    assert_bitwise(outs[2], outs[0])


@forward_backends
@few_examples
@given(data=st.data())
def test_inputs_are_never_written(backend, data):
    case = data.draw(attention_cases(dtypes_for(backend)))
    tensors = case.tensors()
    before = [(t._version, t.clone()) for t in tensors]
    attend(backend, *tensors, return_lse=True, **case.options)
    for t, (version, copy) in zip(tensors, before, strict=True):
        assert t._version == version
        assert_bitwise(t, copy)


@forward_backends
@pytest.mark.parametrize("weight_layout", ["split", "packed"])
def test_ra_attention_never_writes_its_inputs(backend, weight_layout):
    inputs = normal(2, 9, 12), normal(12, 96, seed=1), normal(96, seed=2)
    before = [(t._version, t.clone()) for t in inputs]
    ra_triton.ra_attention(
        *inputs[:2], n_head=2, bias=inputs[2], weight_layout=weight_layout, backend=backend
    )
    for t, (version, copy) in zip(inputs, before, strict=True):
        assert t._version == version
        assert_bitwise(t, copy)


# Order and time


@backend_dtypes
def test_two_runs_give_the_same_bits(backend, dtype):
    x, W = normal(2, 70, 24, dtype=dtype), normal(24, 96, seed=1, dtype=dtype)
    first, second = (ra_triton.ra_attention(x, W, n_head=2, backend=backend) for _ in range(2))
    assert_bitwise(first, second)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the order of programs is the interpreter's")
@pytest.mark.parametrize("seed", quick(range(3)))
def test_programs_in_any_order_give_the_same_bits(monkeypatch, seed):
    from triton.runtime.interpreter import interpreter_builder as builder

    x, W = normal(2, 70, 40), normal(40, 96, seed=1)

    def run():
        q, k, v = ra_triton.project(x, W, n_head=2, backend="triton")
        packed = ra_triton.pack_qk(q, k, v[..., :3], v[..., 3:6], backend="triton")
        in_place = ra_triton.pack_qk_(
            q.clone(), k.clone(), v[..., :3], v[..., 3:6], backend="triton"
        )
        out, lse = attend("triton", *packed, v, return_lse=True)
        leaves = x.clone().requires_grad_(), W.clone().requires_grad_()
        torch.manual_seed(0)
        layer = ra_triton.ra_attention(*leaves, n_head=2, dropout_p=0.2, backend="triton")
        grads = torch.autograd.grad(layer.square().sum(), leaves)
        return q, k, v, *packed, *in_place, out, lse, *grads

    expected = run()
    place, visited = builder.set_grid_idx, []

    def shuffled(x, y, z):
        nx, ny, nz = builder.grid_dim
        order = list(range(nx * ny * nz))
        random.Random(seed).shuffle(order)
        program = order[(x * ny + y) * nz + z]
        visited.append(program)
        place(program // (ny * nz), program // nz % ny, program % nz)

    monkeypatch.setattr(builder, "set_grid_idx", shuffled)
    for got, want in zip(run(), expected, strict=True):
        assert_bitwise(got, want)
    assert visited != sorted(visited)


# The interpreter's products, which must not be what breaks a promise of the kernels


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the products are the interpreter's")
@given(
    rows=st.integers(1, 70),
    depth=st.integers(1, 140),
    columns=st.integers(16, 70),
    offset=st.integers(0, 4),
    transposed=st.booleans(),
)
def test_a_product_of_the_interpreter_sums_in_one_order(rows, depth, columns, offset, transposed):
    """Whatever the tile's other rows, its addresses and strides; a BLAS fails each of these."""
    a, b = normal(rows, depth), normal(depth, columns, seed=1)

    def moved(t):
        """The same numbers ``offset`` elements further, by columns where ``transposed``."""
        t = t.mT if transposed else t
        moved = torch.empty(t.numel() + offset)[offset:].view(t.shape).copy_(t)
        return moved.mT if transposed else moved

    whole = interpreted_dot(a, b)
    assert_bitwise(interpreted_dot(moved(a), moved(b)), whole)
    for row in (0, rows // 2, rows - 1):
        assert_bitwise(interpreted_dot(a[row : row + 1], b), whole[row : row + 1])
    assert_bitwise(interpreted_dot(a, b[:, -16:]), whole[:, -16:])
    batch = interpreted_dot(torch.stack((a, -a)), torch.stack((b, b)))
    assert_bitwise(batch, torch.stack((whole, -whole)))


def interpreted_dot(a, b):
    """``tl.dot(a, b)`` as the interpreter computes it."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    a, b = (TensorHandle(t.numpy(), tl.float32) for t in (a, b))
    zeros = torch.zeros(*a.data.shape[:-1], b.data.shape[-1]).numpy()
    dot = interpreter_builder.create_dot(a, b, TensorHandle(zeros, tl.float32), None, None)
    return torch.from_numpy(dot.data)


OVERFLOWS = [
    ("add", 2**31 - 1, 1),
    ("sub", -(2**31), 1),
    ("mul", 2**16, 2**15),
    ("mul", -46341, 46341),
]
NONE = [
    ("add", 2**31 - 1, 0),
    ("sub", -(2**31), 0),
    ("mul", -(2**16), 2**15),
    ("mul", 46340, 46340),
]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU wraps around without a word")
@pytest.mark.parametrize(
    ("operation", "a", "b", "overflows"),
    [*((*case, True) for case in OVERFLOWS), *((*case, False) for case in NONE)],
)
def test_the_interpreter_notices_an_overflow(operation, a, b, overflows):
    """In 32 bits and not in 64: of a number, and of the last element of a tile."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_semantic

    for width, count in ((32, 1), (32, 4), (64, 4)):
        dtype = getattr(tl, f"int{width}")
        values = [torch.zeros(count, dtype=getattr(torch, f"int{width}")) for _ in range(2)]
        for value, last in zip(values, (a, b), strict=True):
            value[-1] = last
        kind = dtype if count == 1 else tl.block_type(dtype, [count])
        tensors = [tl.tensor(TensorHandle(value.numpy(), dtype), kind) for value in values]
        raises = pytest.raises(AssertionError, match="overflow of int32")
        with raises if overflows and width == 32 else nullcontext():
            result = getattr(interpreter_semantic, operation)(*tensors, True)
            assert result.handle.data[-1] == getattr(operator, operation)(a, b)
