"""pack_qk and pack_qk_: only lanes move, so every comparison is bitwise."""

import pytest
import torch
from budget import assert_bitwise
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    HEAD_LAYOUTS,
    NAN,
    WRITABLE_LAYOUTS,
    backend_dtypes,
    backends,
    few_examples,
    head_dims,
    lay_out,
    lengths,
    normal,
    ranks,
)

import ra_triton
from ra_triton.checks import check_apart


def expected(q, k, q_low, k_low):
    d_std = q.shape[-1] - q_low.shape[-1]
    return torch.cat((q[..., :d_std], k_low), -1), torch.cat((k[..., :d_std], q_low), -1)


@st.composite
def operands(draw, layouts):
    """``q, k, q_low, k_low``, each in a layout of its own; the first two from ``layouts``."""
    D = draw(head_dims)
    R, T = draw(ranks(D)), draw(lengths())
    B, H_kv, group = (draw(st.sampled_from([1, 2, 3])) for _ in range(3))
    heads = (H_kv * group, H_kv, H_kv, H_kv * group)
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    return tuple(
        lay_out(
            normal(B, T, H, lanes, dtype=dtype, seed=seed),
            draw(st.sampled_from(layouts if seed < 2 else HEAD_LAYOUTS)),
        )
        for seed, (H, lanes) in enumerate(zip(heads, (D, D, R, R), strict=True))
    )


@backends
@given(data=st.data())
def test_pack_qk_joins_lanes_and_leaves_its_inputs(backend, data):
    inputs = data.draw(operands(HEAD_LAYOUTS))
    before = [t.clone() for t in inputs]
    for got, want in zip(
        ra_triton.pack_qk(*inputs, backend=backend), expected(*inputs), strict=True
    ):
        assert_bitwise(got, want)
    for t, copy in zip(inputs, before, strict=True):
        assert_bitwise(t, copy)


@backends
@given(data=st.data())
def test_pack_qk_in_place_writes_the_low_lanes_alone(backend, data):
    q, k, q_low, k_low = data.draw(operands(WRITABLE_LAYOUTS))
    want_q, want_k = expected(q, k, q_low, k_low)
    fences = [outside(t) for t in (q, k)]
    got_q, got_k = ra_triton.pack_qk_(q, k, q_low, k_low, backend=backend)
    assert got_q is q
    assert got_k is k
    assert_bitwise(q, want_q)
    assert_bitwise(k, want_k)
    for t, fence in zip((q, k), fences, strict=True):
        assert_bitwise(outside(t), fence, "storage around the tensor")


def outside(t):
    """The storage of ``t`` with the tensor's own elements blanked."""
    storage = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage()).clone()
    storage.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(0)
    return storage


@backends
def test_packing_a_buffer_whose_low_lanes_are_views_of_itself(backend):
    """Swapping the last lanes of q and k in place: both are read before either is written."""
    q, k = normal(2, 9, 2, 16), normal(2, 9, 2, 16, seed=1)
    want = expected(q, k, q[..., -4:], k[..., -4:])
    ra_triton.pack_qk_(q, k, q[..., -4:], k[..., -4:], backend=backend)
    assert_bitwise(q, want[0])
    assert_bitwise(k, want[1])


@backends
def test_packing_slots_of_one_fused_buffer(backend):
    buffer = normal(2, 9, 4, 3, 16)
    q, k, low, rest = buffer.unbind(2)
    low = low[..., 4:8]
    want = (*expected(q, k, low, rest[..., :4]), buffer[:, :, 2:].clone())
    ra_triton.pack_qk_(q, k, low, rest[..., :4], backend=backend)
    for got, expect in zip((q, k, buffer[:, :, 2:]), want, strict=True):
        assert_bitwise(got, expect)


@backend_dtypes
def test_bits_survive_whatever_they_mean(backend, dtype):
    """NaN, infinities, signed zeros and subnormal numbers are copied, not computed."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    odd = torch.tensor([NAN, float("inf"), -float("inf"), -0.0, tiny], dtype=dtype, device=DEVICE)
    q, k = (normal(1, 3, 1, 16, dtype=dtype, seed=seed) for seed in (0, 1))
    low = odd.expand(1, 3, 1, 5)
    for packed in ra_triton.pack_qk(q, k, low, low, backend=backend):
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert_bitwise(packed[..., -5:].view(bits), low.contiguous().view(bits))


@backends
@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
@pytest.mark.parametrize("R", [0, 4])
def test_empty_tensors(backend, shape, R):
    q, k, low = normal(*shape, 16), normal(*shape, 16, seed=1), normal(*shape, R, seed=2)
    for got, want in zip(
        ra_triton.pack_qk(q, k, low, low, backend=backend), expected(q, k, low, low), strict=True
    ):
        assert_bitwise(got, want)
    assert ra_triton.pack_qk_(q, k, low, low, backend=backend)[0] is q


def test_pack_qk_is_differentiable_on_sdpa():
    q, k, q_low, k_low = (normal(2, 3, 1, D, seed=D).requires_grad_() for D in (6, 6, 2, 2))
    q_pack, k_pack = ra_triton.pack_qk(q, k, q_low, k_low)
    grads = normal(*q_pack.shape), normal(*k_pack.shape, seed=1)
    dq, dk, dq_low, dk_low = torch.autograd.grad((q_pack, k_pack), (q, k, q_low, k_low), grads)
    zeros = torch.zeros_like(q_low)
    assert_bitwise(dq, torch.cat((grads[0][..., :-2], zeros), -1))
    assert_bitwise(dk, torch.cat((grads[1][..., :-2], zeros), -1))
    assert_bitwise(dk_low, grads[0][..., -2:])
    assert_bitwise(dq_low, grads[1][..., -2:])


@few_examples
@given(
    strides=st.sampled_from([(200, 40, 8, 1), (40, 80, 8, 1), (90, 30, 4, 1)]),
    H_kv=st.sampled_from([1, 3]),
    offset=st.integers(-100, 100),
)
def test_operands_that_share_an_element_are_told_from_woven_ones(strides, H_kv, offset):
    """Views of one buffer; of another one, of indices, they show which elements they share."""
    places = torch.arange(900, device=DEVICE)
    q = places.as_strided((2, 3, 3, 4), strides, 100)
    k = places.as_strided((2, 3, H_kv, 4), strides, 100 + offset)
    if torch.isin(q.contiguous(), k.contiguous()).any():
        with pytest.raises(ValueError, match="k must share no memory with q"):
            check_apart("k", k, "q", q)
    else:
        check_apart("k", k, "q", q)


def test_q_and_k_that_share_memory_are_refused_and_nothing_is_written():
    rows, low = torch.zeros(1, 4, 3, 16, device=DEVICE), torch.ones(1, 4, 2, 4, device=DEVICE)
    same = rows[:, :, :2]
    for k in (same, rows[:, :, 1:], rows.view(1, 12, 16)[:, :8].view(1, 4, 2, 16)):
        with pytest.raises(ValueError, match="k must share no memory with q: both are written"):
            ra_triton.pack_qk_(same, k, low, low)
    assert not rows.any()
