"""Gradients of flash attention over packed operands, deterministic: no atomics.

With p = exp(softmax_scale * qkᵀ - lse) recomputed tile by tile, and c = softmax_scale,

    delta = Σ_d o do     ds = p (do vᵀ - delta)     dv = pᵀ do     dk = c dsᵀ q     dq = c ds k

A gradient of lse adds ``p dlse`` to ds, so it is subtracted from delta and nothing else changes.
A softcap replaces the exponent by softcap * tanh(t) with t = softmax_scale * qkᵀ / softcap, and
multiplies ds by 1 - tanh²(t). With a window, tiles outside it are not visited.

q, o, do ``[B, T_q, H, D]``, k and v ``[B, T_k, H_kv, D]``, lse ``[B, H, T_q]`` → dq, dk, dv like
q, k and v. Most calls on Hopper are computed by ``backward_hopper.py``, and most without windows on
some other GPUs by ``backward_one_pass.py``. Elsewhere three launches:
delta; dk and dv, one program a key tile, which sums over the queries of its group of heads in a
fixed order; dq, one program a query tile. Scores are transposed where dk and dv are summed, so that
no accumulator is ever transposed. Overwrites only dq, dk and dv. After arXiv:2307.08691.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.call.offsets import Offsets, flat, lengths
from ra_triton.kernels.attention import backward_one_pass
from ra_triton.kernels.attention.arguments import Attention, as_tokens, attention_of
from ra_triton.kernels.tiles import (
    LN2,
    LOG2E,
    Place,
    block_d_of,
    dot,
    dot_precision,
    follow,
    head_and_tile,
    head_of,
    head_offset,
    indices_of,
    is_aligned,
    kept,
    key_range,
    load_rows,
    processors_of,
    query_range,
    raw_scores,
    row_at,
    sequence,
    sequence_of,
    store_rows,
    strides_of,
    target_of,
)
from ra_triton.launch import gluon
from ra_triton.launch.configs import LaunchConfig, launch_config, one_pass
from ra_triton.launch.plans import (
    CannotCompile,
    Layout,
    Plan,
    layout_of,
    on_16_bytes,
    planned,
)

ONE_PASS_STAGE = "attention_backward"  # as warnings call it
Operands = tuple[Layout, Layout, Layout, Layout]  # q, k, v, do


@triton.jit
def _delta_kernel(
    o_ptr,  # contiguous [B, T, H, D]
    do_ptr,
    dlse_ptr,  # contiguous [B, H, T], or None
    delta_ptr,  # [B, H, T]
    turns_ptr,  # int32 [counters], or None
    do_strides,
    T,
    H,
    n_rows,
    counters,  # that become 0, or None
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """``delta = Σ_d o do - dlse``, and turns of 0; a row is one token of one head."""
    follow(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, t, h = indices_of(row, T, H)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (row < n_rows)[:, None] & (offs_d[None, :] < D)
    o = tl.load(o_ptr + tl.cast(row, tl.int64)[:, None] * D + offs_d[None, :], mask, other=0.0)
    do_rows = row_at(do_ptr, do_strides, b, t, h)
    do = tl.load(do_rows[:, None] + offs_d[None, :], mask, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    out = (b * H + h) * T + t
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + out, mask=row < n_rows, other=0.0)
    tl.store(delta_ptr + out, delta, mask=row < n_rows)
    if turns_ptr is not None:
        tl.store(turns_ptr + row, 0, mask=row < counters)


@triton.jit
def _sum_over_queries(
    sums,  # dk and dv [BLOCK_N, BLOCK_D]
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
    q_source,
    do_source,
    lse_ptr,  # of this batch and head
    delta_ptr,
    begin,
    end,
    queries,
    at,
    strides,
    scores,
    V: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``dv += pᵀ do`` and ``dk += dsᵀ q`` over queries ``begin ... end``."""
    PRECISION: tl.constexpr = V.PRECISION
    dk, dv = sums
    for m in tl.range(begin, end, V.BLOCK_M):
        q = load_rows(q_source, at.b, at.h, m, queries.length, strides.q.t, V.BLOCK_M, True, V)
        offs_m = m + tl.arange(0, V.BLOCK_M)
        # Rows past the end get lse = inf, so their p and ds are 0.
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < queries.length, other=float("inf"))
        sT = raw_scores(k, q, scores.cap_scale, V)  # [BLOCK_N, BLOCK_M]
        pT = tl.exp2(sT * scores.scale_log2 - (lse * LOG2E)[None, :])
        if MASKED and (
            not V.USE_TMA or m < queries.full_begin or (V.WINDOW and m >= queries.full_end)
        ):
            pT = tl.where(offs_m[None, :] >= queries.first[:, None], pT, 0.0)
            if V.WINDOW:
                pT = tl.where(offs_m[None, :] < queries.limit[:, None], pT, 0.0)
        do = load_rows(do_source, at.b, at.h, m, queries.length, strides.do.t, V.BLOCK_M, True, V)
        zT = 1.0  # p is dropped or scaled up by this factor, and so is its gradient
        if V.DROPOUT:
            offs_n = at.row + tl.arange(0, V.BLOCK_N)
            keep = kept(at.seed, at.head, offs_m[None, :], offs_n[:, None], scores.dropout_p)
            zT = tl.where(keep, 1 / (1 - scores.dropout_p), 0.0)
        if V.NEED_DV:
            dv = dot((pT * zT).to(do.dtype), do, dv, PRECISION)
        if V.NEED_DK:
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < queries.length, other=0.0)
            dpT = dot(v, do.T, None, PRECISION) * zT
            dsT = pT * (dpT - delta[None, :])
            if V.SOFTCAP:
                dsT *= 1 - sT * sT
            dk = dot(dsT.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["section", "left", "right", "total_q", "total_k"])
def _key_value_gradient_kernel(
    q_source,  # pointers, or descriptors of [B, H, T, D] with USE_TMA
    k_source,
    v_source,
    do_source,
    lse_ptr,
    delta_ptr,
    seed_ptr,  # one int64, with DROPOUT
    cu_q_ptr,  # B + 1 offsets, with VARLEN
    cu_k_ptr,
    dk_ptr,  # with NEED_DK
    dv_ptr,  # with NEED_DV
    strides,
    dk_strides,  # in elements
    dv_strides,
    sizes,
    section,  # heads at a time
    left,  # keys seen before a query's own, and after, with WINDOW
    right,
    total_q,  # tokens of all sequences, with VARLEN
    total_k,
    scores,
    V: tl.constexpr,
):
    """Gradients dk and dv of one key tile: the queries that the mask cuts, and the others."""
    BLOCK_N: tl.constexpr = V.BLOCK_N
    BLOCK_D: tl.constexpr = V.BLOCK_D
    T_q, T_k, H_kv, group = sizes.T_q, sizes.T_k, sizes.H_kv, sizes.group
    n_n = tl.cdiv(T_k, BLOCK_N)
    head_kv, tile = head_and_tile(tl.program_id(0), sizes.B * H_kv, n_n, section, V.USE_TMA)
    b = head_kv // H_kv
    h_kv = head_kv % H_kv
    n = tile * BLOCK_N  # the first key tiles have most queries
    follow(V.PDL)
    if V.VARLEN:
        first_q, T_q = sequence(cu_q_ptr, b, total_q)
        first_k, T_k = sequence(cu_k_ptr, b, total_k)
        if n >= T_k:
            return
        q_source = sequence_of(q_source, first_q, strides.q, V)
        do_source = sequence_of(do_source, first_q, strides.do, V)
        k_source = sequence_of(k_source, first_k, strides.k, V)
        v_source = sequence_of(v_source, first_k, strides.v, V)
        if V.NEED_DK:
            dk_ptr += tl.cast(first_k, tl.int64) * dk_strides.t
        if V.NEED_DV:
            dv_ptr += tl.cast(first_k, tl.int64) * dv_strides.t
    k_source = head_of(k_source, b, h_kv, strides.k, V)
    v_source = head_of(v_source, b, h_kv, strides.v, V)
    k = load_rows(k_source, b, h_kv, n, T_k, strides.k.t, BLOCK_N, True, V)
    v = load_rows(v_source, b, h_kv, n, T_k, strides.v.t, BLOCK_N, True, V)

    queries = query_range(n, T_q, T_k, left, right, V)
    seed = tl.load(seed_ptr) if V.DROPOUT else 0
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for h in tl.range(h_kv * group, (h_kv + 1) * group):
        q_head = head_of(q_source, b, h, strides.q, V)
        do_head = head_of(do_source, b, h, strides.do, V)
        head = b * H_kv * group + h
        rows = tl.cast(head, tl.int64) * T_q
        if V.VARLEN:
            rows = tl.cast(h, tl.int64) * total_q + first_q
        inputs = (k, v, q_head, do_head, lse_ptr + rows, delta_ptr + rows)
        shared = (queries, Place(b, h, head, n, seed), strides, scores)
        sums = (dk, dv)
        begin, end = queries.begin, queries.end
        if (V.CAUSAL or V.WINDOW) and not V.USE_TMA:
            # Masks cost registers, so without TMA loads full blocks have a loop of their own.
            cut = tl.minimum(queries.full_begin, end) if V.WINDOW else queries.full_begin
            sums = _sum_over_queries(sums, *inputs, begin, cut, *shared, V, True)
            begin = queries.full_begin
        if V.WINDOW and not V.USE_TMA:
            cut = tl.minimum(queries.full_end, end)
            sums = _sum_over_queries(sums, *inputs, begin, cut, *shared, V, False)
            begin = queries.full_end
        masked: tl.constexpr = V.WINDOW or (V.CAUSAL and V.USE_TMA)
        dk, dv = _sum_over_queries(sums, *inputs, begin, end, *shared, V, masked)

    if V.NEED_DK:
        dk_ptr += head_offset(b, h_kv, dk_strides, 1)
        dk *= scores.scale_log2 * scores.cap_scale * LN2 if V.SOFTCAP else scores.scale_log2 * LN2
        store_rows(dk_ptr, dk, n, T_k, dk_strides.t, V)
    if V.NEED_DV:
        dv_ptr += head_offset(b, h_kv, dv_strides, 1)
        store_rows(dv_ptr, dv, n, T_k, dv_strides.t, V)


@triton.jit
def _sum_over_keys(
    dq,  # [BLOCK_M, BLOCK_D]
    q,  # [BLOCK_M, BLOCK_D]
    do,  # [BLOCK_M, BLOCK_D]
    lse_log2,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    k_source,
    v_source,
    begin,
    end,
    keys,
    at,
    strides,
    scores,
    V: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``dq += ds k`` over keys ``begin ... end``."""
    PRECISION: tl.constexpr = V.PRECISION
    for n in tl.range(begin, end, V.BLOCK_N):
        k = load_rows(k_source, at.b, at.h, n, keys.length, strides.k.t, V.BLOCK_N, MASKED, V)
        s = raw_scores(q, k, scores.cap_scale, V)  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scores.scale_log2 - lse_log2[:, None])
        offs_n = n + tl.arange(0, V.BLOCK_N)
        if MASKED and (not V.USE_TMA or n >= keys.full_end or (V.WINDOW and n < keys.full_begin)):
            p = tl.where(offs_n[None, :] < keys.limit[:, None], p, 0.0)
            if V.WINDOW:
                p = tl.where(offs_n[None, :] >= keys.first[:, None], p, 0.0)
        v = load_rows(v_source, at.b, at.h, n, keys.length, strides.v.t, V.BLOCK_N, MASKED, V)
        dp = dot(do, v.T, None, PRECISION)
        if V.DROPOUT:
            offs_m = at.row + tl.arange(0, V.BLOCK_M)
            keep = kept(at.seed, at.head, offs_m[:, None], offs_n[None, :], scores.dropout_p)
            dp = tl.where(keep, dp / (1 - scores.dropout_p), 0.0)
        ds = p * (dp - delta[:, None])
        if V.SOFTCAP:
            ds *= 1 - s * s
        dq = dot(ds.to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["section", "left", "right", "total_q", "total_k"])
def _query_gradient_kernel(
    q_source,  # pointers, or descriptors of [B, H, T, D] with USE_TMA
    k_source,
    v_source,
    do_source,
    lse_ptr,
    delta_ptr,
    seed_ptr,  # one int64, with DROPOUT
    cu_q_ptr,  # B + 1 offsets, with VARLEN
    cu_k_ptr,
    dq_ptr,
    strides,
    dq_strides,  # in elements
    sizes,
    section,  # heads at a time
    left,  # keys seen before a query's own, and after, with WINDOW
    right,
    total_q,  # tokens of all sequences, with VARLEN
    total_k,
    scores,
    V: tl.constexpr,
):
    """Gradient dq of one query tile: full key tiles, and those that the mask cuts."""
    BLOCK_M: tl.constexpr = V.BLOCK_M
    BLOCK_D: tl.constexpr = V.BLOCK_D
    T_q, T_k, H = sizes.T_q, sizes.T_k, sizes.H
    n_m = tl.cdiv(T_q, BLOCK_M)
    head, tile = head_and_tile(tl.program_id(0), sizes.B * H, n_m, section, V.USE_TMA)
    m = (n_m - 1 - tile) * BLOCK_M
    b = head // H
    h = head % H
    h_kv = h // sizes.group
    follow(V.PDL)
    rows = tl.cast(head, tl.int64) * T_q
    if V.VARLEN:
        first_q, T_q = sequence(cu_q_ptr, b, total_q)
        first_k, T_k = sequence(cu_k_ptr, b, total_k)
        if m >= T_q:
            return
        rows = tl.cast(h, tl.int64) * total_q + first_q
        q_source = sequence_of(q_source, first_q, strides.q, V)
        do_source = sequence_of(do_source, first_q, strides.do, V)
        k_source = sequence_of(k_source, first_k, strides.k, V)
        v_source = sequence_of(v_source, first_k, strides.v, V)
        dq_ptr += tl.cast(first_q, tl.int64) * dq_strides.t
    q_source = head_of(q_source, b, h, strides.q, V)
    do_source = head_of(do_source, b, h, strides.do, V)
    k_source = head_of(k_source, b, h_kv, strides.k, V)
    v_source = head_of(v_source, b, h_kv, strides.v, V)
    q = load_rows(q_source, b, h, m, T_q, strides.q.t, BLOCK_M, True, V)
    do = load_rows(do_source, b, h, m, T_q, strides.do.t, BLOCK_M, True, V)
    offs_m = m + tl.arange(0, BLOCK_M)
    lse_log2 = tl.load(lse_ptr + rows + offs_m, mask=offs_m < T_q, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + rows + offs_m, mask=offs_m < T_q, other=0.0)

    keys = key_range(m, T_q, T_k, left, right, V)
    at = Place(b, h_kv, head, m, tl.load(seed_ptr) if V.DROPOUT else 0)
    inputs = (q, do, lse_log2, delta, k_source, v_source)
    shared = (keys, at, strides, scores)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, end = keys.begin, keys.end
    # Bounds cost instructions, so without TMA loads full blocks have a loop of their own.
    if not V.USE_TMA:
        if V.WINDOW:
            dq = _sum_over_keys(
                dq, *inputs, begin, tl.minimum(keys.full_begin, end), *shared, V, True
            )
        begin = keys.full_end
        dq = _sum_over_keys(dq, *inputs, keys.full_begin, begin, *shared, V, False)
    dq = _sum_over_keys(dq, *inputs, begin, end, *shared, V, True)
    dq_ptr += head_offset(b, h, dq_strides, 1)
    dq *= scores.scale_log2 * scores.cap_scale * LN2 if V.SOFTCAP else scores.scale_log2 * LN2
    store_rows(dq_ptr, dq, m, T_q, dq_strides.t, V)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    dlse: Tensor | None = None,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offsets: Offsets | None = None,
    config: LaunchConfig | None = None,
) -> None:
    """Write the gradients of ``Σ o do + Σ lse dlse`` into those of dq, dk, dv that are not None.

    ``q [B, T_q, H, D]``, ``k, v [B, T_k, H_kv, D]``; ``o``, contiguous, and ``lse [B, H, T_q]``
    from the forward; ``do`` like o and ``dlse`` like lse in any layout. dq, dk and dv have the
    shapes of q, k and v and unit last stride. Options, seed and offsets are the forward's.
    ``config`` replaces the table's for both gradient kernels; one of ``configs.ONE_PASS`` is that
    of Hopper's own kernel, ``backward_hopper.py``, which long calls there take by themselves, and
    one with ``one_pass`` that of ``backward_one_pass.py``.

    Raises:
        ValueError: a config of one pass where one of dq, dk and dv is None, or for a call that
            the kernel does not have; one of several groups that is not in ``ONE_PASS``.
    """
    if q.numel() == 0 or k.numel() == 0:
        for t in (dq, dk, dv):
            if t is not None:
                t.zero_()
        return
    if do.stride(-1) != 1:  # e.g. the gradient of a sum: one number, expanded
        do = do.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    device, dtype, target = q.device, q.dtype, target_of(q.device)
    operands = (layout_of(q), layout_of(k), layout_of(v), layout_of(do))
    sequences = None if offsets is None else lengths(offsets)
    scores = (softmax_scale, float(softcap), float(dropout_p), dot_precision(dtype))
    options = (sequences, causal, window_size, *scores, target, config)
    if dq is not None and dk is not None and dv is not None:
        gradients = (layout_of(dq), layout_of(dk), layout_of(dv))
        others = on_16_bytes(o, lse, dlse, *flat(offsets)[:2])
        of = (device, dtype, operands, gradients, others, *options)
        plans = _one_pass_plans(*of)
        plain = isinstance(plans, backward_one_pass.Plans)
        if plans is not None and (plain or config is not None or gluon.works(ONE_PASS_STAGE)):
            try:
                plans(q, k, v, o, lse, do, dlse, dq, dk, dv, *flat(offsets)[:2])
                return
            except CannotCompile as error:
                if config is not None:
                    raise
                gluon.give_up(ONE_PASS_STAGE, error.__cause__)
    elif config is not None and (config.one_pass or config.groups > 1):
        raise ValueError("one pass computes all of dq, dk and dv")
    delta = torch.empty_like(lse)
    if dq is not None or dk is not None:
        others = on_16_bytes(o, dlse, delta)
        _delta_plan(device, dtype, operands[3], others, target)(o, do, dlse, delta, None)
    inputs = (q, k, v, do, lse, delta, seed, *flat(offsets)[:2])
    others = on_16_bytes(*inputs[4:])
    if dk is not None or dv is not None:
        dk_layout, dv_layout = (None if t is None else layout_of(t) for t in (dk, dv))
        layouts = (operands, dk_layout, dv_layout)
        _key_value_plan(device, dtype, *layouts, others, *options)(*inputs, dk, dv)
    if dq is not None:
        _query_plan(device, dtype, operands, layout_of(dq), others, *options)(*inputs, dq)


@planned
def _delta_plan(
    device: torch.device,
    dtype: torch.dtype,
    do: Layout,
    others: tuple[bool | None, ...],
    target: str,
    counters: int | None = None,
) -> Plan:
    """The launch of delta; ``others`` are o, dlse and delta, ``counters`` what it zeroes."""
    B, T, H, D = do.shape
    config = launch_config("delta", D, dtype, target, False)
    arguments = {
        "do_strides": strides_of(do),
        "T": T,
        "H": H,
        "n_rows": B * T * H,
        "counters": counters,
        "D": D,
        "ROWS": config.block_m,
        "BLOCK_D": block_d_of(D),
        **config.options,
    }
    rows = max(B * T * H, counters or 0)
    return Plan(_delta_kernel, (triton.cdiv(rows, config.block_m),), arguments)


@planned
def _one_pass_plans(
    device: torch.device,
    dtype: torch.dtype,
    operands: Operands,
    gradients: tuple[Layout, Layout, Layout],
    others: tuple[bool | None, ...],
    *options: Any,
) -> Any:
    """The launches of a kernel of one pass, where the table or ``config`` asks for it; or None."""
    *of, target, config = options
    call = attention_of(dtype, operands, *of)
    if config is not None and config.one_pass:
        return _in_plain_triton(device, call, gradients, others, target, config)
    if config is not None:
        return _in_gluon(device, call, gradients, target, config) if config.groups > 1 else None
    B, T_q, T_k, *_ = call.sizes
    row = one_pass(operands[0].shape[3], dtype, target, min(T_q, T_k))
    aligned = call.aligned and all(is_aligned(t, dtype) for t in gradients)
    plain = call.scores.dropout_p or call.softcap or not B
    if row is None or plain or not aligned:
        return None
    if row.one_pass:
        cut = call.mask.WINDOW or call.varlen
        return None if cut else _in_plain_triton(device, call, gradients, others, target, row)
    if not gluon.works(ONE_PASS_STAGE):
        return None
    if call.varlen and B * row.block_m > 2 * operands[0].shape[1]:
        return None  # a tile more for each sequence would make the workspace three times as large
    try:
        return _in_gluon(device, call, gradients, target, row)
    except Exception as error:  # whatever a name or a signature that has changed leads to
        gluon.give_up(ONE_PASS_STAGE, error)
        return None


def _in_plain_triton(
    device: torch.device,
    call: Attention,
    gradients: tuple[Layout, Layout, Layout],
    others: tuple[bool | None, ...],
    target: str,
    config: LaunchConfig,
) -> backward_one_pass.Plans:
    """The launches of the plain kernel of one pass."""
    delta = partial(_delta_plan, device, call.dtype, call.inputs[3], (others[0], others[2], True))
    return backward_one_pass.backward_plans(call, gradients, config, partial(delta, target))


def _in_gluon(
    device: torch.device,
    call: Attention,
    gradients: tuple[Layout, Layout, Layout],
    target: str,
    config: LaunchConfig,
) -> Any:
    """The launches of Hopper's own kernel; not even imported where Gluon is not as it was."""
    from ra_triton.kernels.attention.backward_hopper import backward_plans

    return backward_plans(call, gradients, config, target, processors_of(device))


@planned
def _key_value_plan(
    device: torch.device,
    dtype: torch.dtype,
    operands: Operands,
    dk: Layout | None,
    dv: Layout | None,
    others: tuple[bool | None, ...],
    *options: Any,
) -> Plan:
    """The launch of dk and dv; see :func:`_call` for ``options``."""
    call, config = _call("key_value_gradient", dtype, operands, *options)
    B, T_q, T_k, H, H_kv, _ = call.sizes
    if call.varlen:
        dk, dv = (None if t is None else as_tokens(t) for t in (dk, dv))
    arguments = call.arguments(config, NEED_DK=dk is not None, NEED_DV=dv is not None)
    arguments |= {"dk_strides": strides_of(dk), "dv_strides": strides_of(dv)}
    arguments["section"] = call.section(H_kv, T_q, H)
    grid = (B * H_kv * triton.cdiv(T_k, config.block_n),)
    return Plan(_key_value_gradient_kernel, grid, arguments, call.bulk(config))


@planned
def _query_plan(
    device: torch.device,
    dtype: torch.dtype,
    operands: Operands,
    dq: Layout,
    others: tuple[bool | None, ...],
    *options: Any,
) -> Plan:
    """The launch of dq; see :func:`_call` for ``options``."""
    call, config = _call("query_gradient", dtype, operands, *options)
    B, T_q, T_k, H, H_kv, _ = call.sizes
    dq_strides = strides_of(as_tokens(dq) if call.varlen else dq)
    arguments = call.arguments(config) | {"dq_strides": dq_strides}
    arguments["section"] = call.section(H, T_k, H_kv)
    grid = (B * H * triton.cdiv(T_q, config.block_m),)
    return Plan(_query_gradient_kernel, grid, arguments, call.bulk(config))


def _call(
    stage: str, dtype: torch.dtype, operands: Operands, *options: Any
) -> tuple[Attention, LaunchConfig]:
    """What both gradients are of, and the config of one.

    ``options``: those of :func:`attention_of`, then target and config.
    """
    *of, target, config = options
    call = attention_of(dtype, operands, *of)
    if config is None:
        config = launch_config(stage, operands[0].shape[3], dtype, target, *call.traits)
    return call, config
