"""Gradients of flash attention over packed operands, deterministic: no atomics.

With p = exp(softmax_scale * qkᵀ - lse) recomputed tile by tile, and c = softmax_scale,

    delta = Σ_d o do     ds = p (do vᵀ - delta)     dv = pᵀ do     dk = c dsᵀ q     dq = c ds k

A gradient of lse adds ``p dlse`` to ds, so it is subtracted from delta and nothing else changes.
A softcap replaces the exponent by softcap * tanh(t) with t = softmax_scale * qkᵀ / softcap, and
multiplies ds by 1 - tanh²(t). With a window, tiles outside it are not visited.

q, o, do ``[B, T_q, H, D]``, k and v ``[B, T_k, H_kv, D]``, lse ``[B, H, T_q]`` → dq, dk, dv like
q, k and v. Three launches: delta; dk and dv, one program a key tile, which sums over the queries of
its group of heads in a fixed order; dq, one program a query tile. Scores are transposed where dk
and dv are summed, so that no accumulator is ever transposed. Overwrites only dq, dk and dv.
After arXiv:2307.08691.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels.configs import LaunchConfig, launch_config
from ra_triton.kernels.plans import Bulk, Layout, Plan, layout_of, on_16_bytes, planned
from ra_triton.kernels.tiles import (
    LN2,
    LOG2E,
    as_tokens,
    block_d_of,
    capped,
    dot,
    dot_precision,
    follow,
    head_and_tile,
    head_offset,
    heads_per_section,
    is_aligned,
    is_wide,
    kept,
    key_range,
    load_rows,
    mask_arguments,
    query_range,
    rows_in_bulk,
    score_arguments,
    sequence,
    store_rows,
    strides_by_name,
    target_of,
)
from ra_triton.offsets import Offsets, flat, lengths

Operands = tuple[Layout, Layout, Layout, Layout]  # q, k, v, do


@triton.jit
def _delta_kernel(
    o_ptr,  # contiguous [B, T, H, D]
    do_ptr,
    dlse_ptr,  # contiguous [B, H, T]
    delta_ptr,  # [B, H, T]
    stride_gb,
    stride_gt,
    stride_gh,
    T,
    H,
    n_rows,
    D: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """``delta = Σ_d o do - dlse``; a row is one token of one head."""
    follow(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.cast(row // (T * H), tl.int64)
    t = tl.cast(row // H % T, tl.int64)
    h = tl.cast(row % H, tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (row < n_rows)[:, None] & (offs_d[None, :] < D)
    o = tl.load(o_ptr + tl.cast(row, tl.int64)[:, None] * D + offs_d[None, :], mask, other=0.0)
    do_rows = do_ptr + b * stride_gb + t * stride_gt + h * stride_gh
    do = tl.load(do_rows[:, None] + offs_d[None, :], mask, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    out = (b * H + h) * T + t
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + out, mask=row < n_rows, other=0.0)
    tl.store(delta_ptr + out, delta, mask=row < n_rows)


@triton.jit
def _sum_over_queries(
    dk,  # [BLOCK_N, BLOCK_D]
    dv,  # [BLOCK_N, BLOCK_D]
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
    q_source,
    do_source,
    lse_ptr,  # of this batch and head
    delta_ptr,
    seed,
    b,
    head,  # b * H + h
    h,
    n,
    begin,
    end,
    whole,  # queries from this one to unmasked see every key of the tile
    unmasked,
    first_query,  # [BLOCK_N]: the first query that sees each key
    query_limit,  # [BLOCK_N], with WINDOW: the one after the last
    stride_qt,
    stride_gt,
    T_q,
    scale_log2,
    cap_scale,
    dropout_p,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
    USE_TMA: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``dv += pᵀ do`` and ``dk += dsᵀ q`` over queries ``begin ... end``."""
    for m in tl.range(begin, end, BLOCK_M):
        q = load_rows(
            q_source, b, h, m, stride_qt, T_q,
            D, True, USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        offs_m = m + tl.arange(0, BLOCK_M)
        # Rows past the end get lse = inf, so their p and ds are 0.
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < T_q, other=float("inf"))
        sT = dot(k, q.T, None, PRECISION)  # [BLOCK_N, BLOCK_M]
        if SOFTCAP:
            sT = capped(sT, cap_scale)
        pT = tl.exp2(sT * scale_log2 - (lse * LOG2E)[None, :])
        if MASKED and (not USE_TMA or m < whole or (WINDOW and m >= unmasked)):
            pT = tl.where(offs_m[None, :] >= first_query[:, None], pT, 0.0)
            if WINDOW:
                pT = tl.where(offs_m[None, :] < query_limit[:, None], pT, 0.0)
        do = load_rows(
            do_source, b, h, m, stride_gt, T_q,
            D, True, USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        zT = 1.0  # p is dropped or scaled up by this factor, and so is its gradient
        if DROPOUT:
            offs_n = n + tl.arange(0, BLOCK_N)
            keep = kept(seed, head, offs_m[None, :], offs_n[:, None], dropout_p)
            zT = tl.where(keep, 1 / (1 - dropout_p), 0.0)
        if NEED_DV:
            dv = dot((pT * zT).to(do.dtype), do, dv, PRECISION)
        if NEED_DK:
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < T_q, other=0.0)
            dpT = dot(v, do.T, None, PRECISION) * zT
            dsT = pT * (dpT - delta[None, :])
            if SOFTCAP:
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
    dk_ptr,
    dv_ptr,
    stride_qb,  # strides of inputs in units of ALIGNMENT elements
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_gb,  # of do
    stride_gt,
    stride_gh,
    stride_dkb,
    stride_dkt,
    stride_dkh,
    stride_dvb,
    stride_dvt,
    stride_dvh,
    B,
    H_kv,
    group,  # H // H_kv
    T_q,  # with VARLEN of the longest sequence
    T_k,
    total_q,  # tokens of all sequences, with VARLEN
    total_k,
    section,  # heads at a time
    left,  # keys seen before a query's own, and after, with WINDOW
    right,
    scale_log2,  # softmax_scale * log2(e); with SOFTCAP softcap * log2(e)
    cap_scale,  # softmax_scale / softcap; 1 without
    dropout_p,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
    USE_TMA: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gradients dk and dv of one key tile: the queries that the mask cuts, and the others."""
    n_n = tl.cdiv(T_k, BLOCK_N)
    head_kv, tile = head_and_tile(tl.program_id(0), B * H_kv, n_n, section, USE_TMA)
    b = head_kv // H_kv
    h_kv = head_kv % H_kv
    n = tile * BLOCK_N  # the first key tiles have most queries
    follow(PDL)
    if VARLEN:
        first_q, T_q = sequence(cu_q_ptr, b, total_q)
        first_k, T_k = sequence(cu_k_ptr, b, total_k)
        if n >= T_k:
            return
        q_source += tl.cast(first_q, tl.int64) * stride_qt * ALIGNMENT
        do_source += tl.cast(first_q, tl.int64) * stride_gt * ALIGNMENT
        k_source += tl.cast(first_k, tl.int64) * stride_kt * ALIGNMENT
        v_source += tl.cast(first_k, tl.int64) * stride_vt * ALIGNMENT
        if NEED_DK:
            dk_ptr += tl.cast(first_k, tl.int64) * stride_dkt
        if NEED_DV:
            dv_ptr += tl.cast(first_k, tl.int64) * stride_dvt
    if not USE_TMA:
        k_source += head_offset(b, h_kv, stride_kb, stride_kh, ALIGNMENT)
        v_source += head_offset(b, h_kv, stride_vb, stride_vh, ALIGNMENT)
    k = load_rows(
        k_source, b, h_kv, n, stride_kt, T_k,
        D, True, USE_TMA, WIDE, ALIGNMENT, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    v = load_rows(
        v_source, b, h_kv, n, stride_vt, T_k,
        D, True, USE_TMA, WIDE, ALIGNMENT, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    first_query, query_limit, begin, whole, unmasked, end = query_range(
        n, T_q, T_k, left, right, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for h in tl.range(h_kv * group, (h_kv + 1) * group):
        q_head, do_head = q_source, do_source
        if not USE_TMA:
            q_head += head_offset(b, h, stride_qb, stride_qh, ALIGNMENT)
            do_head += head_offset(b, h, stride_gb, stride_gh, ALIGNMENT)
        head = b * H_kv * group + h
        rows = tl.cast(head, tl.int64) * T_q
        if VARLEN:
            rows = tl.cast(h, tl.int64) * total_q + first_q
        first, last = begin, end
        if (CAUSAL or WINDOW) and not USE_TMA:
            # Masks cost registers, so without bulk copies full tiles have a loop of their own.
            dk, dv = _sum_over_queries(
                dk, dv, k, v, q_head, do_head, lse_ptr + rows, delta_ptr + rows,
                seed, b, head, h, n, begin, tl.minimum(whole, end) if WINDOW else whole,
                whole, unmasked, first_query, query_limit,
                stride_qt, stride_gt, T_q, scale_log2, cap_scale, dropout_p,
                D, PRECISION, True, WINDOW, SOFTCAP, DROPOUT, NEED_DK, NEED_DV,
                USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            first = whole
        if WINDOW and not USE_TMA:
            last = tl.minimum(unmasked, end)
        dk, dv = _sum_over_queries(
            dk, dv, k, v, q_head, do_head, lse_ptr + rows, delta_ptr + rows,
            seed, b, head, h, n, first, last,
            whole, unmasked, first_query, query_limit,
            stride_qt, stride_gt, T_q, scale_log2, cap_scale, dropout_p,
            D, PRECISION, (CAUSAL or WINDOW) and USE_TMA, WINDOW, SOFTCAP, DROPOUT,
            NEED_DK, NEED_DV, USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if WINDOW and not USE_TMA:
            dk, dv = _sum_over_queries(
                dk, dv, k, v, q_head, do_head, lse_ptr + rows, delta_ptr + rows,
                seed, b, head, h, n, unmasked, end,
                whole, unmasked, first_query, query_limit,
                stride_qt, stride_gt, T_q, scale_log2, cap_scale, dropout_p,
                D, PRECISION, True, WINDOW, SOFTCAP, DROPOUT, NEED_DK, NEED_DV,
                USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip

    if NEED_DK:
        dk_head = dk_ptr + head_offset(b, h_kv, stride_dkb, stride_dkh, 1)
        dk *= scale_log2 * cap_scale * LN2 if SOFTCAP else scale_log2 * LN2
        store_rows(dk_head, dk, n, stride_dkt, T_k, D, BLOCK_N, BLOCK_D)
    if NEED_DV:
        dv_head = dv_ptr + head_offset(b, h_kv, stride_dvb, stride_dvh, 1)
        store_rows(dv_head, dv, n, stride_dvt, T_k, D, BLOCK_N, BLOCK_D)


@triton.jit
def _sum_over_keys(
    dq,  # [BLOCK_M, BLOCK_D]
    q,  # [BLOCK_M, BLOCK_D]
    do,  # [BLOCK_M, BLOCK_D]
    lse_log2,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    k_source,
    v_source,
    seed,
    b,
    head,
    h_kv,
    m,
    begin,
    end,
    whole,  # keys from this one to unmasked are seen by every query of the tile
    unmasked,
    first_key,  # [BLOCK_M], with WINDOW
    key_limit,  # [BLOCK_M]
    stride_kt,
    stride_vt,
    T_k,
    scale_log2,
    cap_scale,
    dropout_p,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    USE_TMA: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``dq += ds k`` over keys ``begin ... end``."""
    for n in tl.range(begin, end, BLOCK_N):
        k = load_rows(
            k_source, b, h_kv, n, stride_kt, T_k,
            D, MASKED, USE_TMA, WIDE, ALIGNMENT, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        s = dot(q, k.T, None, PRECISION)  # [BLOCK_M, BLOCK_N]
        if SOFTCAP:
            s = capped(s, cap_scale)
        p = tl.exp2(s * scale_log2 - lse_log2[:, None])
        offs_n = n + tl.arange(0, BLOCK_N)
        if MASKED and (not USE_TMA or n >= unmasked or (WINDOW and n < whole)):
            p = tl.where(offs_n[None, :] < key_limit[:, None], p, 0.0)
            if WINDOW:
                p = tl.where(offs_n[None, :] >= first_key[:, None], p, 0.0)
        v = load_rows(
            v_source, b, h_kv, n, stride_vt, T_k,
            D, MASKED, USE_TMA, WIDE, ALIGNMENT, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        dp = dot(do, v.T, None, PRECISION)
        if DROPOUT:
            offs_m = m + tl.arange(0, BLOCK_M)
            keep = kept(seed, head, offs_m[:, None], offs_n[None, :], dropout_p)
            dp = tl.where(keep, dp / (1 - dropout_p), 0.0)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
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
    stride_qb,  # strides of inputs in units of ALIGNMENT elements
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_gb,  # of do
    stride_gt,
    stride_gh,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    B,
    H,
    group,  # H // H_kv
    T_q,  # with VARLEN of the longest sequence
    T_k,
    total_q,  # tokens of all sequences, with VARLEN
    total_k,
    section,  # heads at a time
    left,  # keys seen before a query's own, and after, with WINDOW
    right,
    scale_log2,  # softmax_scale * log2(e); with SOFTCAP softcap * log2(e)
    cap_scale,  # softmax_scale / softcap; 1 without
    dropout_p,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    USE_TMA: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gradient dq of one query tile: full key tiles, and those that the mask cuts."""
    n_m = tl.cdiv(T_q, BLOCK_M)
    head, tile = head_and_tile(tl.program_id(0), B * H, n_m, section, USE_TMA)
    m = (n_m - 1 - tile) * BLOCK_M
    b = head // H
    h = head % H
    h_kv = h // group
    follow(PDL)
    rows = tl.cast(head, tl.int64) * T_q
    if VARLEN:
        first_q, T_q = sequence(cu_q_ptr, b, total_q)
        first_k, T_k = sequence(cu_k_ptr, b, total_k)
        if m >= T_q:
            return
        rows = tl.cast(h, tl.int64) * total_q + first_q
        q_source += tl.cast(first_q, tl.int64) * stride_qt * ALIGNMENT
        do_source += tl.cast(first_q, tl.int64) * stride_gt * ALIGNMENT
        k_source += tl.cast(first_k, tl.int64) * stride_kt * ALIGNMENT
        v_source += tl.cast(first_k, tl.int64) * stride_vt * ALIGNMENT
        dq_ptr += tl.cast(first_q, tl.int64) * stride_dqt
    if not USE_TMA:
        q_source += head_offset(b, h, stride_qb, stride_qh, ALIGNMENT)
        do_source += head_offset(b, h, stride_gb, stride_gh, ALIGNMENT)
        k_source += head_offset(b, h_kv, stride_kb, stride_kh, ALIGNMENT)
        v_source += head_offset(b, h_kv, stride_vb, stride_vh, ALIGNMENT)
    q = load_rows(
        q_source, b, h, m, stride_qt, T_q,
        D, True, USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    do = load_rows(
        do_source, b, h, m, stride_gt, T_q,
        D, True, USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    offs_m = m + tl.arange(0, BLOCK_M)
    lse_log2 = tl.load(lse_ptr + rows + offs_m, mask=offs_m < T_q, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + rows + offs_m, mask=offs_m < T_q, other=0.0)

    first_key, key_limit, begin, whole, unmasked, end = key_range(
        m, T_q, T_k, left, right, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Bounds cost instructions, so without bulk copies full tiles have a loop of their own.
    if WINDOW and not USE_TMA:
        dq = _sum_over_keys(
            dq, q, do, lse_log2, delta, k_source, v_source, seed, b, head, h_kv, m,
            begin, tl.minimum(whole, end), whole, unmasked, first_key, key_limit,
            stride_kt, stride_vt, T_k, scale_log2, cap_scale, dropout_p,
            D, PRECISION, True, WINDOW, SOFTCAP, DROPOUT,
            USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if not USE_TMA:
        dq = _sum_over_keys(
            dq, q, do, lse_log2, delta, k_source, v_source, seed, b, head, h_kv, m,
            whole, unmasked, whole, unmasked, first_key, key_limit,
            stride_kt, stride_vt, T_k, scale_log2, cap_scale, dropout_p,
            D, PRECISION, False, WINDOW, SOFTCAP, DROPOUT,
            USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        begin = unmasked
    dq = _sum_over_keys(
        dq, q, do, lse_log2, delta, k_source, v_source, seed, b, head, h_kv, m,
        begin, end, whole, unmasked, first_key, key_limit,
        stride_kt, stride_vt, T_k, scale_log2, cap_scale, dropout_p,
        D, PRECISION, True, WINDOW, SOFTCAP, DROPOUT,
        USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq_head = dq_ptr + head_offset(b, h, stride_dqb, stride_dqh, 1)
    dq *= scale_log2 * cap_scale * LN2 if SOFTCAP else scale_log2 * LN2
    store_rows(dq_head, dq, m, stride_dqt, T_q, D, BLOCK_M, BLOCK_D)


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
    ``config`` replaces the table's for both gradient kernels.
    """
    if q.numel() == 0 or k.numel() == 0:
        for t in (dq, dk, dv):
            if t is not None:
                t.zero_()
        return
    if do.stride(-1) != 1:  # e.g. the gradient of a sum: one number, expanded
        do = do.contiguous()
    delta = torch.empty_like(lse)
    device, dtype, target = q.device, q.dtype, target_of(q.device)
    if dq is not None or dk is not None:
        dlse = None if dlse is None else dlse.contiguous()
        others = on_16_bytes(o, dlse, delta)
        _delta_plan(device, dtype, layout_of(do), others, target)(o, do, dlse, delta)
    operands = (layout_of(q), layout_of(k), layout_of(v), layout_of(do))
    sequences = None if offsets is None else lengths(offsets)
    scores = (softmax_scale, float(softcap), float(dropout_p), dot_precision(dtype))
    options = (sequences, causal, window_size, *scores, target, config)
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
) -> Plan:
    """The launch of delta; ``others`` are o, dlse and delta."""
    B, T, H, D = do.shape
    config = launch_config("delta", D, dtype, target, False)
    arguments = {
        **strides_by_name(g=do),
        "T": T,
        "H": H,
        "n_rows": B * T * H,
        "D": D,
        "HAS_DLSE": others[1] is not None,
        "ROWS": config.block_m,
        "BLOCK_D": block_d_of(D),
        **config.options,
    }
    return Plan(_delta_kernel, (triton.cdiv(B * T * H, config.block_m),), arguments)


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
    """The launch of dk and dv; see :func:`_shared` for ``options``."""
    config, arguments, bulk = _shared("key_value_gradient", dtype, operands, *options)
    (H, D), H_kv = operands[0].shape[2:], operands[1].shape[2]
    B, T_q, T_k = (arguments[name] for name in ("B", "T_q", "T_k"))
    group_bytes = 2 * T_q * D * dtype.itemsize * H // H_kv  # q and do
    arguments["section"] = heads_per_section(B * H_kv, group_bytes)
    if arguments["VARLEN"]:
        dk, dv = (None if t is None else as_tokens(t) for t in (dk, dv))
    arguments |= strides_by_name(dk=dk, dv=dv)
    arguments |= {"H_kv": H_kv, "NEED_DK": dk is not None, "NEED_DV": dv is not None}
    grid = (B * H_kv * triton.cdiv(T_k, config.block_n),)
    return Plan(_key_value_gradient_kernel, grid, arguments, bulk)


@planned
def _query_plan(
    device: torch.device,
    dtype: torch.dtype,
    operands: Operands,
    dq: Layout,
    others: tuple[bool | None, ...],
    *options: Any,
) -> Plan:
    """The launch of dq; see :func:`_shared` for ``options``."""
    config, arguments, bulk = _shared("query_gradient", dtype, operands, *options)
    (H, D), H_kv = operands[0].shape[2:], operands[1].shape[2]
    B, T_q, T_k = (arguments[name] for name in ("B", "T_q", "T_k"))
    head_bytes = 2 * T_k * D * dtype.itemsize * H_kv // H  # k and v
    arguments["section"] = heads_per_section(B * H, head_bytes)
    dq = as_tokens(dq) if arguments["VARLEN"] else dq
    arguments |= {**strides_by_name(dq=dq), "H": H}
    grid = (B * H * triton.cdiv(T_q, config.block_m),)
    return Plan(_query_gradient_kernel, grid, arguments, bulk)


def _shared(
    stage: str,
    dtype: torch.dtype,
    operands: Operands,
    sequences: tuple[int, int, int] | None,
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    softcap: float,
    dropout_p: float,
    precision: str,
    target: str,
    config: LaunchConfig | None,
) -> tuple[LaunchConfig, dict[str, Any], dict[int, Bulk] | None]:
    """The config of a gradient kernel, and the arguments and descriptors that both share.

    ``sequences``: how many there are, and the most queries and keys of one.
    """
    q, k, _, _ = operands
    B, total_q, H, D = q.shape
    total_k, varlen = k.shape[1], sequences is not None
    sizes = (B, total_q, total_k) if sequences is None else sequences
    mask = mask_arguments(*sizes[1:], causal, window_size)
    aligned = all(is_aligned(t, dtype) for t in operands)
    if config is None:
        flags = (dropout_p > 0, mask["WINDOW"], varlen)
        config = launch_config(stage, D, dtype, target, aligned, *flags)
    # Strides that are whole 16-byte units go to the kernel as such, so that it can rely on it.
    alignment = 16 // dtype.itemsize if aligned else 1
    by_query, by_key = config.block_m, config.block_n
    blocks = (by_query, by_key, by_key, by_query)
    widest = max(t.strides[1] for t in operands) * max(by_query, by_key)
    placed = [as_tokens(t) for t in operands] if varlen else operands
    arguments = {
        **strides_by_name(alignment, **dict(zip("qkvg", placed, strict=True))),
        **dict(zip(("B", "T_q", "T_k"), sizes, strict=True)),
        "group": H // k.shape[2],
        "total_q": total_q,
        "total_k": total_k,
        **mask,
        **score_arguments(D, softmax_scale, softcap),
        "dropout_p": dropout_p,
        "D": D,
        "PRECISION": precision,
        "DROPOUT": dropout_p > 0,
        "VARLEN": varlen,
        "USE_TMA": config.use_tma,
        "WIDE": is_wide(widest),
        "ALIGNMENT": alignment,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d_of(D),
        **config.options,
    }
    if not config.use_tma:
        return config, arguments, None
    rows = zip(operands, blocks, strict=True)
    return config, arguments, {i: rows_in_bulk(t, n) for i, (t, n) in enumerate(rows)}
