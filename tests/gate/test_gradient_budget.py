"""Calibration of the gradients' gate: an emulated backward passes, planted faults are caught."""

import math
from functools import cache

import pytest
import torch
from gradient_budget import (
    attention_gradient_budgets,
    check_gradients,
    projection_gradient_budgets,
)
from strategies import AttentionCase, ProjectionCase, normal
from test_budget import BLOCK, DTYPES, R, emulate, heads_first, mask

NAMES = ("dq", "dk", "dv")


def emulate_backward(
    q,
    k,
    v,
    do,
    *,
    causal=True,
    delta=True,
    dk_scale=True,
    allowed=None,
    rows=None,
    keep=None,
    p=0.0,
):
    """Flash backward after :func:`emulate`: P and dS in the storage dtype, float32 sums."""
    dtype, H_kv, D = q.dtype, k.shape[2], q.shape[-1]
    group, scale = q.shape[2] // H_kv, 1 / math.sqrt(D)
    allowed = mask(q, k, causal) if allowed is None else allowed
    out, lse = (emulate if keep is None else dropped_forward(keep, p))(q, k, v, causal=causal)
    heads = [heads_first(t).repeat_interleave(H_kv * group // t.shape[2], 1) for t in (k, v)]
    q, do, out, k, v = heads_first(q), heads_first(do), heads_first(out), *heads
    z = torch.ones(()) if keep is None else keep.float() / (1 - p)
    blind = lse.isneginf()  # no key
    P = torch.exp(scale * (q @ k.mT) - lse.masked_fill(blind, 0.0).unsqueeze(-1))
    P = P.masked_fill(~allowed, 0.0)
    dP = z * (do @ v.mT)
    Delta = (out * do).sum(-1, keepdim=True) if delta else 0.0
    dS = (P * (dP - Delta)).to(dtype).float()
    dq = scale * (dS @ k)
    if rows is not None:  # the queries that dk and dv are summed over
        P, dS = P * rows, dS * rows
    dk = (scale if dk_scale else 1.0) * (dS.mT @ q)
    dv = (P * z).to(dtype).float().mT @ do
    dk, dv = (t.unflatten(1, (H_kv, group)).sum(2) for t in (dk, dv))
    return [t.transpose(1, 2).to(dtype) for t in (dq, dk, dv)]


def dropped_forward(keep, p):
    """A forward that drops the scores where ``keep`` is False."""

    def forward(q, k, v, *, causal):
        _, lse = emulate(q, k, v, causal=causal)
        group = q.shape[2] // k.shape[2]
        heads = (heads_first(t).repeat_interleave(group, 1) for t in (k, v))
        q_, k_, v_ = heads_first(q), *heads
        P = torch.exp(q_ @ k_.mT / math.sqrt(q.shape[-1]) - lse.unsqueeze(-1))
        P = P.masked_fill(~mask(q, k, causal), 0.0) * keep
        out = P.to(q.dtype).float() @ v_ / (1 - p)
        return out.transpose(1, 2).to(q.dtype), lse

    return forward


def tensors(T, dtype, *, seed=0, values="normal", D=32, H_kv=2, group=1, T_k=None):
    T_k = T if T_k is None else T_k
    case = AttentionCase(2, T, T_k, H_kv, group, D, dtype=dtype, seed=seed, values=values)
    q, k, v = (t.cpu() for t in case.tensors())
    return q, k, v, normal(*q.shape, dtype=dtype, seed=100 + seed).cpu()


def check(grads, inputs, **options):
    budgets = attention_gradient_budgets(*inputs, **options)
    grads = dict(zip(NAMES, grads, strict=True))
    check_gradients(grads, budgets, dtype=inputs[0].dtype, case=f"{tuple(inputs[0].shape)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_a_correct_backward_raises_no_alarm(dtype, T, causal):
    for seed in range(3 if T < 64 else 1):
        for values in ("normal", "small", "large", "zeros"):
            inputs = tensors(T, dtype, seed=seed, values=values, group=1 + seed % 2)
            check(emulate_backward(*inputs, causal=causal), inputs, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "T_k"), [(5, 37), (40, 7), (64, 70)])
def test_a_correct_backward_of_other_lengths_raises_no_alarm(dtype, T, T_k):
    for causal in (True, False):
        inputs = tensors(T, dtype, T_k=T_k)
        check(emulate_backward(*inputs, causal=causal), inputs, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [3, 17, 64])
def test_a_correct_backward_with_dropout_raises_no_alarm_and_another_mask_does(dtype, T):
    inputs = tensors(T, dtype)
    keep = normal(2, 2, T, T, seed=5).cpu() > -0.5
    options = {"keep": keep, "dropout_p": 0.3}
    grads = emulate_backward(*inputs, keep=keep, p=0.3)
    check(grads, inputs, **options)
    with pytest.raises(AssertionError, match="max"):
        check(grads, inputs, keep=keep.roll(1, -1), dropout_p=0.3)


def _edit(which, change):
    """A fault in one gradient of a correct backward."""

    def fault(*inputs, causal):
        grads = emulate_backward(*inputs, causal=causal)
        changed = grads[NAMES.index(which)].clone()
        change(changed)
        grads[NAMES.index(which)] = changed
        return grads

    return fault


def _masked(wrong_mask):
    return lambda q, k, v, do, causal: emulate_backward(
        q, k, v, do, causal=causal, allowed=wrong_mask(q, k)
    )


def _backward(**changes):
    return lambda *inputs, causal: emulate_backward(*inputs, causal=causal, **changes)


def _given(change):
    """A backward that reads other operands than it was given."""
    return lambda *inputs, causal: emulate_backward(*change(*inputs), causal=causal)


def _rows_without(tile):
    def fault(q, k, v, do, causal):
        rows = torch.ones(q.shape[1], 1)
        rows[tile] = 0
        return emulate_backward(q, k, v, do, causal=causal, rows=rows)

    return fault


def _zero_last_row(t):
    t[:, -1] = 0


def _copy_last_row(t):
    t[:, -1] = t[:, -2]


def _zero_element(t):
    t[0, -1, 0, 3] = 0


def _swap_lanes(t):
    t[..., [0, 1]] = t[..., [1, 0]]


def _scale_low(t):
    t[..., -R:] *= 1.05


def _diagonal_tile_unmasked(q, k):
    token = torch.arange(q.shape[1])
    return mask(q, k) | (token[:, None] // BLOCK == token // BLOCK)


def _without_last_key_tile(q, k):
    return mask(q, k) & (torch.arange(k.shape[1]) < (k.shape[1] - 1) // BLOCK * BLOCK)


def _as_if_contiguous(q, k, v, do):
    """dO is head-major, read as token-major."""
    return q, k, v, do.transpose(1, 2).contiguous().view(do.shape)


def _one_head_of_the_group(q, k, v, do, causal):
    whole = emulate_backward(q, k, v, do, causal=causal)
    group = q.shape[2] // k.shape[2]
    first = emulate_backward(q[:, :, ::group], k, v, do[:, :, ::group], causal=causal)
    return [whole[0], *first[1:]]


FAULTS = {
    "delta missing": _backward(delta=False),
    "scale of dk missing": _backward(dk_scale=False),
    "last key tile dropped": _masked(_without_last_key_tile),
    "last query tile dropped from dk and dv": _rows_without(slice(-BLOCK, None)),
    "first query tile dropped from dk and dv": _rows_without(slice(BLOCK)),
    "last query dropped from dk and dv": _rows_without(slice(-1, None)),
    "mask off by one, ahead": _masked(lambda q, k: mask(q, k).roll(1, 1) | mask(q, k)),
    "mask off by one, behind": _masked(lambda q, k: mask(q, k).tril(-1)),
    "mask dropped": _masked(lambda q, k: mask(q, k, causal=False)),
    "diagonal tile not masked": _masked(_diagonal_tile_unmasked),
    "last row of dv zeroed": _edit("dv", _zero_last_row),
    "last row of dq zeroed": _edit("dq", _zero_last_row),
    "first row of dk zeroed": _edit("dk", lambda t: t[:, 0].zero_()),
    "last row of dq copied from above": _edit("dq", _copy_last_row),
    "one element of dq zeroed": _edit("dq", _zero_element),
    "one element of dk NaN": _edit("dk", lambda t: t[0, 2, 0, 0].fill_(math.nan)),
    "two lanes of dq swapped": _edit("dq", _swap_lanes),
    "two lanes of dk swapped": _edit("dk", _swap_lanes),
    "low lanes of dk scaled by 1.05": _edit("dk", _scale_low),
    "low lanes of dq scaled by 1.05": _edit("dq", _scale_low),
    "low lanes of dk dropped": _edit("dk", lambda t: t[..., -R:].zero_()),
    "dq of the next head": lambda *inputs, causal: _with_dq_of_the_next_head(*inputs, causal),
    "do assumed contiguous": _given(_as_if_contiguous),
    "do of the other batch element": _given(lambda q, k, v, do: (q, k, v, do.flip(0))),
    "do one token late": _given(lambda q, k, v, do: (q, k, v, do.roll(1, 1))),
    "a head missing in the sum over a group": _one_head_of_the_group,
}


def _with_dq_of_the_next_head(q, k, v, do, causal):
    dq, dk, dv = emulate_backward(q, k, v, do, causal=causal)
    return [dq.roll(1, 2), dk, dv]


@cache
def attacked(dtype, T):
    """Operands, and what their gradients' gate allows."""
    inputs = tensors(T, dtype, group=2)
    return inputs, attention_gradient_budgets(*inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [41, 73])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_planted_fault_is_caught(dtype, T, fault):
    inputs, budgets = attacked(dtype, T)
    grads = dict(zip(NAMES, FAULTS[fault](*inputs, causal=True), strict=True))
    with pytest.raises(AssertionError, match=r"max\|z\||isnan"):
        check_gradients(grads, budgets, dtype=dtype, case=fault)


@pytest.mark.parametrize("T", [17, 64])
def test_tf32_products_are_caught_in_a_float32_backward(T):
    inputs = tensors(T, torch.float32)
    q, k, v, do = (t.view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32) for t in inputs)
    for tf32 in ((q, k, *inputs[2:]), (*inputs[:2], v, do)):
        with pytest.raises(AssertionError, match="max"):
            check(emulate_backward(*tf32), inputs)


# Products


def gemm_gradients(x, W, dy):
    x, W, dy = (t.float() for t in (x, W, dy))
    dW = x.flatten(0, 1).mT @ dy.flatten(0, 1)
    return {"dx": dy @ W.mT, "dW": dW, "dbias": dy.sum((0, 1))}


def gemm_tensors(dtype, T, C=48, seed=0):
    x, W, _ = ProjectionCase(2, T, C, 2, D=16, dtype=dtype, seed=seed).tensors()
    dy = normal(2, T, W.shape[1], dtype=dtype, seed=7 + seed)
    return x.cpu(), W.cpu(), dy.cpu()


def check_gemm(grads, inputs):
    dtype = inputs[0].dtype
    grads = {name: t.to(dtype) for name, t in grads.items()}
    budgets = projection_gradient_budgets(*inputs)
    check_gradients(grads, budgets, dtype=dtype, case=tuple(inputs[0].shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, 65])
def test_correct_products_raise_no_alarm(dtype, C):
    for T in (1, 2, 17, 130):
        for seed in range(4):
            inputs = gemm_tensors(dtype, T, C, seed)
            check_gemm(gemm_gradients(*inputs), inputs)


GEMM_FAULTS = {
    "last token skipped": lambda x, W, dy: gemm_gradients(x, W, _without_last_token(dy)),
    "one batch element": lambda x, W, dy: gemm_gradients(x[:1], W, dy[:1]) | {"dx": dy @ W.mT},
    "batch elements of dy swapped": lambda x, W, dy: gemm_gradients(x, W, dy.flip(0)),
    "W not transposed by columns": lambda x, W, dy: gemm_gradients(x, W.roll(1, 1), dy),
    "bias of the next column": lambda x, W, dy: _rolled(gemm_gradients(x, W, dy), "dbias"),
    "dW of the next column": lambda x, W, dy: _rolled(gemm_gradients(x, W, dy), "dW"),
}


def _without_last_token(dy):
    dy = dy.clone()
    dy[:, -1] = 0
    return dy


def _rolled(grads, name):
    return grads | {name: grads[name].roll(1, -1)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [5, 130])
@pytest.mark.parametrize("fault", GEMM_FAULTS)
def test_every_planted_fault_of_the_products_is_caught(dtype, T, fault):
    inputs = gemm_tensors(dtype, T)
    with pytest.raises(AssertionError, match="max"):
        check_gemm(GEMM_FAULTS[fault](*inputs), inputs)
