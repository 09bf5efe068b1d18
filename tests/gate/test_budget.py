"""Calibration of the gate: an emulated correct kernel passes, every planted fault is caught."""

import math

import pytest
import torch
from budget import (
    assert_agree,
    assert_attention_close,
    assert_bitwise,
    assert_projection_close,
    assert_within_promise,
    attention_sigma,
)
from strategies import AttentionCase, ProjectionCase, normal

from ref.reciprocal_attention import allowed_keys

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK, R = 16, 4


def heads_first(t):
    return t.float().transpose(1, 2)  # [B, H, T, D]


def emulate(
    q, k, v, *, causal=True, scale=None, allowed=None, rescale=True, skip_last=False, pad=0
):
    """Flash forward: float32 accumulation, P in the storage dtype; ``(out, lse)``."""
    dtype, T_q, T_k = q.dtype, q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    q, k, v = heads_first(q), *(heads_first(t).repeat_interleave(group, 1) for t in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if allowed is None:
        allowed = allowed_keys(T_q, T_k, causal, (-1, -1), q.device)
    if pad:  # keys of zeros beyond the end that nothing masks
        k, v = (torch.nn.functional.pad(t, (0, 0, 0, pad)) for t in (k, v))
        allowed = torch.nn.functional.pad(allowed, (0, pad), value=True)
    m = torch.full((*q.shape[:-1], 1), -math.inf)
    l_i, acc = torch.zeros_like(m), torch.zeros_like(q)
    starts = range(0, k.shape[2], BLOCK)
    for n in starts[:-1] if skip_last else starts:
        tile = slice(n, n + BLOCK)
        s = scale * (q @ k[:, :, tile].mT)
        s = s.masked_fill(~allowed[:, tile], -math.inf)
        m_new = torch.maximum(m, s.amax(-1, keepdim=True))
        base = m_new.masked_fill(m_new.isneginf(), 0.0)
        p, alpha = torch.exp(s - base), torch.exp(m - base)
        l_i = l_i * alpha + p.sum(-1, keepdim=True)
        acc = (acc * alpha if rescale else acc) + p.to(dtype).float() @ v[:, :, tile]
        m = m_new
    empty = l_i == 0
    out = acc / l_i.masked_fill(empty, 1.0)
    return out.transpose(1, 2).to(dtype), (m + torch.log(l_i)).squeeze(-1)


def mask(q, k, causal=True):
    return allowed_keys(q.shape[1], k.shape[1], causal, (-1, -1), q.device)


def _changed(t, change):
    t = t.clone()
    change(t)
    return t


def _swap_low_lanes(q, k):
    return (
        torch.cat((q[..., :-R], k[..., -R:]), -1),
        torch.cat((k[..., :-R], q[..., -R:]), -1),
    )


def _lanes_swapped(t):
    return torch.cat((t[..., 1:2], t[..., :1], t[..., 2:]), -1)


def _edit(change):
    """A fault in the output of a correct kernel."""

    def fault(q, k, v, causal):
        out, lse = emulate(q, k, v, causal=causal)
        return _changed(out, change), lse

    return fault


def _mask_fault(wrong_mask):
    return lambda q, k, v, causal: emulate(q, k, v, allowed=wrong_mask(q, k))


def _diagonal_tile_unmasked(q, k):
    token = torch.arange(q.shape[1])
    return mask(q, k) | (token[:, None] // BLOCK == token // BLOCK)


def _copy_row(out):
    out[:, -1] = out[:, -2]


def _zero_row(out):
    out[:, -1] = 0


def _zero_element(out):
    out[0, -1, 0, 3] = 0


def _nan_element(out):
    out[0, 2, 0, 0] = float("nan")


# name: (causal, faulty kernel)
FAULTS = {
    "last row zeroed": (True, _edit(_zero_row)),
    "one element zeroed": (True, _edit(_zero_element)),
    "one element NaN": (True, _edit(_nan_element)),
    "last row copied from above": (True, _edit(_copy_row)),
    "tail keys wrap around": (
        False,
        lambda q, k, v, c: emulate(q, *(torch.cat((t, t[:, :3]), 1) for t in (k, v)), causal=False),
    ),
    "padded keys left in the softmax": (
        False,
        lambda q, k, v, c: emulate(q, k, v, causal=c, pad=7),
    ),
    "causal off by one, ahead": (
        True,
        _mask_fault(lambda q, k: mask(q, k).roll(1, 1) | mask(q, k)),
    ),
    "causal off by one, behind": (
        True,
        _mask_fault(lambda q, k: mask(q, k).tril(-1) | (torch.arange(k.shape[1]) == 0)),
    ),
    "causal dropped": (True, _mask_fault(lambda q, k: mask(q, k, causal=False))),
    "diagonal tile not masked": (True, _mask_fault(_diagonal_tile_unmasked)),
    "last key tile skipped": (False, lambda q, k, v, c: emulate(q, k, v, causal=c, skip_last=True)),
    "scale of D - R": (
        True,
        lambda q, k, v, c: emulate(q, k, v, scale=1 / math.sqrt(q.shape[-1] - R)),
    ),
    "no scale": (True, lambda q, k, v, c: emulate(q, k, v, scale=1.0)),
    "two lanes of k swapped": (True, lambda q, k, v, c: emulate(q, _lanes_swapped(k), v)),
    "K_low and Q_low swapped": (True, lambda q, k, v, c: emulate(*_swap_low_lanes(q, k), v)),
    "low lanes scaled by 1.05": (
        True,
        lambda q, k, v, c: emulate(torch.cat((q[..., :-R], q[..., -R:] * 1.05), -1), k, v),
    ),
    "low lanes dropped": (
        True,
        lambda q, k, v, c: emulate(_changed(q, lambda t: t[..., -R:].zero_()), k, v),
    ),
    "v one token late": (True, lambda q, k, v, c: emulate(q, k, v.roll(1, 1))),
    "k of the wrong head": (True, lambda q, k, v, c: emulate(q, k.roll(1, 2), v)),
    "v of the wrong batch element": (True, lambda q, k, v, c: emulate(q, k, v.roll(1, 0))),
    "accumulator not rescaled": (True, lambda q, k, v, c: emulate(q, k, v, rescale=False)),
    "lse in base 2": (True, lambda q, k, v, c: _times_lse(emulate(q, k, v), 1 / math.log(2))),
    "lse without its maximum": (True, lambda q, k, v, c: _times_lse(emulate(q, k, v), 0.5)),
}


def _times_lse(result, factor):
    return result[0], factor * result[1]


def tensors(T, dtype, *, seed=0, values="normal", D=32):
    case = AttentionCase(B=2, T_q=T, T_k=T, H_kv=2, D=D, dtype=dtype, seed=seed, values=values)
    return tuple(t.cpu() for t in case.tensors())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 17, 64, 130])
@pytest.mark.parametrize("causal", [True, False])
def test_a_correct_kernel_raises_no_alarm(dtype, T, causal):
    for seed in range(6):
        for values in ("normal", "small", "large", "zeros"):
            q, k, v = tensors(T, dtype, seed=seed, values=values)
            out, lse = emulate(q, k, v, causal=causal)
            assert_attention_close(out, q, k, v, lse=lse, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [41, 73, 200])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_planted_fault_is_caught(dtype, T, fault):
    causal, faulty = FAULTS[fault]
    q, k, v = tensors(T, dtype)
    out, lse = faulty(q, k, v, causal)
    with pytest.raises(AssertionError, match=r"max\|z\||isnan|isneginf"):
        assert_attention_close(out, q, k, v, lse=lse, causal=causal)


@pytest.mark.parametrize("T", [17, 64, 200])
def test_tf32_products_are_caught_in_float32(T):
    q, k, v = tensors(T, torch.float32)
    tf32 = (t.view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32) for t in (q, k))
    out, lse = emulate(*tf32, v)
    with pytest.raises(AssertionError, match="max"):
        assert_attention_close(out, q, k, v, lse=lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_dtype_or_shape_is_caught(dtype):
    q, k, v = tensors(5, dtype)
    out, lse = emulate(q, k, v)
    for wrong in (out.double(), out[:, :4], out.transpose(1, 2)):
        with pytest.raises(AssertionError, match=r"dtype|shape"):
            assert_attention_close(wrong, q, k, v)
    with pytest.raises(AssertionError, match="dtype"):
        assert_attention_close(out, q, k, v, lse=lse.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_correct_kernel_keeps_the_promise_and_a_sloppy_one_breaks_it(dtype):
    q, k, v = tensors(130, dtype)
    out, _ = emulate(q, k, v)
    assert_within_promise(out, q, k, v)
    coarse = out.to(torch.bfloat16) if dtype != torch.bfloat16 else out.to(torch.float8_e4m3fn)
    with pytest.raises(AssertionError, match="promise"):
        assert_within_promise(coarse.to(dtype), q, k, v)


def test_agreement_of_two_results_has_the_same_limits():
    q, k, v = tensors(64, torch.float16)
    out, _ = emulate(q, k, v)
    sigma = attention_sigma(q, k, v)
    assert_agree(out, emulate(q, k.clone(), v)[0], sigma, sigma)
    with pytest.raises(AssertionError, match="max"):
        assert_agree(_changed(out, _zero_row), out, sigma, sigma)


def test_bitwise_means_every_bit_and_nan_equals_nan():
    t = torch.tensor([1.0, float("nan"), 0.0])
    assert_bitwise(t, t.clone())
    with pytest.raises(AssertionError, match="1 of 3"):
        assert_bitwise(t, torch.nextafter(t, torch.tensor([2.0, 0.0, 0.0])))
    with pytest.raises(AssertionError, match="float16"):
        assert_bitwise(t, t.half())


# The projection's gate


def gemm(x, W, bias=None):
    y = x.float() @ W.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


GEMM_FAULTS = {
    "last row zeroed": lambda x, W, b: _changed(gemm(x, W, b), _zero_last_row),
    "one element zeroed": lambda x, W, b: _changed(gemm(x, W, b), _zero_last_element),
    "last channels skipped": lambda x, W, b: gemm(x[..., :-5], W[:-5], b),
    "bias dropped": lambda x, W, b: gemm(x, W),
    "two columns swapped": lambda x, W, b: gemm(
        x, torch.cat((W[:, 1:2], W[:, :1], W[:, 2:]), 1), b
    ),
    "token of another row": lambda x, W, b: gemm(x.roll(1, 1), W, b),
    "batch element of another row": lambda x, W, b: gemm(x.roll(1, 0), W, b),
    "accumulated in half precision": lambda x, W, b: _coarse(x, W, b),
}


def _zero_last_row(y):
    y[:, -1] = 0


def _zero_last_element(y):
    y[-1, -1, -1] = 0


def _coarse(x, W, bias):
    y = torch.zeros(*x.shape[:2], W.shape[1])
    for c in range(x.shape[-1]):
        y = (y + x[..., c : c + 1].float() * W[c].float()).to(torch.bfloat16).float()
    return (y + bias.float()).to(x.dtype)


def gemm_tensors(dtype, seed=0, **sizes):
    case = ProjectionCase(B=2, H_kv=2, D=16, dtype=dtype, with_bias=True, seed=seed, **sizes)
    return tuple(t.cpu() for t in case.tensors())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, 16, 65, 768])
def test_a_correct_product_raises_no_alarm(dtype, C):
    for T in (1, 2, 17, 100):
        for seed in range(4):
            x, W, bias = gemm_tensors(dtype, seed, T=T, C=C)
            assert_projection_close(gemm(x, W, bias), x, W, bias)
            assert_projection_close(gemm(x, W), x, W)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [5, 40])
@pytest.mark.parametrize("fault", GEMM_FAULTS)
def test_every_planted_fault_of_a_product_is_caught(dtype, T, fault):
    x, W, bias = gemm_tensors(dtype, T=T, C=48)
    with pytest.raises(AssertionError, match="max"):
        assert_projection_close(GEMM_FAULTS[fault](x, W, bias), x, W, bias)


def test_tf32_products_are_caught_in_a_float32_projection():
    x, W = normal(2, 30, 768), normal(768, 96, seed=1)
    tf32 = (t.view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32) for t in (x, W))
    with pytest.raises(AssertionError, match="max"):
        assert_projection_close(gemm(*tf32), x, W)
