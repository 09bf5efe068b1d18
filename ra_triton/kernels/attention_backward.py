"""Gradients of flash attention over packed operands, deterministic: no atomics.

With p = exp(softmax_scale * qkᵀ - lse) recomputed tile by tile, and c = softmax_scale,

    delta = Σ_d o do     ds = p (do vᵀ - delta)     dv = pᵀ do     dk = c dsᵀ q     dq = c ds k

A gradient of lse adds ``p dlse`` to ds, so it is subtracted from delta and nothing else changes.

q, o, do ``[B, T_q, H, D]``, k and v ``[B, T_k, H_kv, D]``, lse ``[B, H, T_q]`` → dq, dk, dv like
q, k and v. Three launches: delta; dk and dv, one program a key tile, which sums over the queries of
its group of heads in a fixed order; dq, one program a query tile. Scores are transposed where dk
and dv are summed, so that no accumulator is ever transposed. Overwrites only dq, dk and dv.
After arXiv:2307.08691.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels.configs import LaunchConfig, launch_config
from ra_triton.kernels.tiles import (
    LN2,
    LOG2E,
    block_d_of,
    dot,
    dot_precision,
    head_offset,
    is_aligned,
    is_wide,
    kept,
    key_range,
    load_rows,
    row_source,
    store_rows,
    target_of,
)


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
):
    """``delta = Σ_d o do - dlse``; a row is one token of one head."""
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
    first_query,  # [BLOCK_N]: the first query that sees each key
    stride_qt,
    stride_gt,
    T_q,
    scale_log2,
    dropout_p,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
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
        pT = tl.exp2(sT * scale_log2 - (lse * LOG2E)[None, :])
        if MASKED:
            pT = tl.where(offs_m[None, :] >= first_query[:, None], pT, 0.0)
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
            dk = dot(dsT.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def _key_value_gradient_kernel(
    q_source,  # pointers, or descriptors of [B, H, T, D] with USE_TMA
    k_source,
    v_source,
    do_source,
    lse_ptr,
    delta_ptr,
    seed_ptr,  # one int64, with DROPOUT
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
    T_q,
    T_k,
    scale_log2,  # softmax_scale * log2(e)
    dropout_p,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
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
    """Gradients dk and dv of one key tile: the queries that the mask cuts, then all later ones."""
    pid = tl.program_id(0)
    b = pid % (B * H_kv) // H_kv
    h_kv = pid % H_kv
    n = pid // (B * H_kv) * BLOCK_N  # the first key tiles have most queries
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

    first_query = n + tl.arange(0, BLOCK_N) - (T_k - T_q)
    begin, unmasked = 0, 0
    if CAUSAL:
        begin = tl.maximum(n - (T_k - T_q), 0) // BLOCK_M * BLOCK_M
        last = tl.maximum(n + BLOCK_N - 1 - (T_k - T_q), 0)
        unmasked = tl.minimum(tl.cdiv(last, BLOCK_M) * BLOCK_M, T_q)
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
        if CAUSAL:
            dk, dv = _sum_over_queries(
                dk, dv, k, v, q_head, do_head, lse_ptr + rows, delta_ptr + rows,
                seed, b, head, h, n,
                begin, unmasked, first_query, stride_qt, stride_gt, T_q, scale_log2,
                dropout_p,
                D, PRECISION, True, DROPOUT, NEED_DK, NEED_DV,
                USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        dk, dv = _sum_over_queries(
            dk, dv, k, v, q_head, do_head, lse_ptr + rows, delta_ptr + rows,
                seed, b, head, h, n,
            unmasked, T_q, first_query, stride_qt, stride_gt, T_q, scale_log2,
                dropout_p,
            D, PRECISION, False, DROPOUT, NEED_DK, NEED_DV,
            USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    if NEED_DK:
        dk_head = dk_ptr + head_offset(b, h_kv, stride_dkb, stride_dkh, 1)
        store_rows(dk_head, dk * (scale_log2 * LN2), n, stride_dkt, T_k, D, BLOCK_N, BLOCK_D)
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
    key_limit,  # [BLOCK_M]
    stride_kt,
    stride_vt,
    T_k,
    scale_log2,
    dropout_p,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
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
        p = tl.exp2(s * scale_log2 - lse_log2[:, None])
        offs_n = n + tl.arange(0, BLOCK_N)
        if MASKED:
            p = tl.where(offs_n[None, :] < key_limit[:, None], p, 0.0)
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
        dq = dot(ds.to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit
def _query_gradient_kernel(
    q_source,  # pointers, or descriptors of [B, H, T, D] with USE_TMA
    k_source,
    v_source,
    do_source,
    lse_ptr,
    delta_ptr,
    seed_ptr,  # one int64, with DROPOUT
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
    T_q,
    T_k,
    scale_log2,  # softmax_scale * log2(e)
    dropout_p,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    USE_TMA: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient dq of one query tile: full key tiles, then the tiles that the mask cuts."""
    pid = tl.program_id(0)
    head = pid % (B * H)
    m = (tl.cdiv(T_q, BLOCK_M) - 1 - pid // (B * H)) * BLOCK_M
    b = head // H
    h = head % H
    h_kv = h // group
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
    rows = tl.cast(head, tl.int64) * T_q
    lse_log2 = tl.load(lse_ptr + rows + offs_m, mask=offs_m < T_q, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + rows + offs_m, mask=offs_m < T_q, other=0.0)

    key_limit, unmasked, end = key_range(m, T_q, T_k, CAUSAL, BLOCK_M, BLOCK_N)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _sum_over_keys(
        dq, q, do, lse_log2, delta, k_source, v_source, seed, b, head, h_kv, m,
        0, unmasked, key_limit, stride_kt, stride_vt, T_k, scale_log2, dropout_p,
        D, PRECISION, False, DROPOUT, USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _sum_over_keys(
        dq, q, do, lse_log2, delta, k_source, v_source, seed, b, head, h_kv, m,
        unmasked, end, key_limit, stride_kt, stride_vt, T_k, scale_log2, dropout_p,
        D, PRECISION, True, DROPOUT, USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq_head = dq_ptr + head_offset(b, h, stride_dqb, stride_dqh, 1)
    store_rows(dq_head, dq * (scale_log2 * LN2), m, stride_dqt, T_q, D, BLOCK_M, BLOCK_D)


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
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> None:
    """Write the gradients of ``Σ o do + Σ lse dlse`` into those of dq, dk, dv that are not None.

    ``q [B, T_q, H, D]``, ``k, v [B, T_k, H_kv, D]``; ``o``, contiguous, and ``lse [B, H, T_q]``
    from the forward; ``do`` like o and ``dlse`` like lse in any layout. dq, dk and dv have the
    shapes of q, k and v and unit last stride. ``dropout_p`` and ``seed`` are the forward's.
    ``config`` replaces the table's for both gradient kernels.
    """
    B, T_q, H, D = q.shape
    T_k, H_kv = k.shape[1:3]
    if q.numel() == 0 or k.numel() == 0:
        for t in (dq, dk, dv):
            if t is not None:
                t.zero_()
        return
    if do.stride(-1) != 1:  # e.g. the gradient of a sum: one number, expanded
        do = do.contiguous()
    delta = torch.empty_like(lse)
    if dq is not None or dk is not None:
        _launch_delta(o, do, dlse, delta)

    def table(stage: str) -> LaunchConfig:
        target = target_of(q.device)
        return config or launch_config(stage, D, q.dtype, target, aligned, dropout_p > 0)

    aligned = all(is_aligned(t) for t in (q, k, v, do))
    if dk is not None or dv is not None:
        inputs = _inputs(
            q,
            k,
            v,
            do,
            lse,
            delta,
            table("key_value_gradient"),
            aligned=aligned,
            causal=causal,
            softmax_scale=softmax_scale,
            dropout_p=dropout_p,
            seed=seed,
        )
        grid = (B * H_kv * triton.cdiv(T_k, inputs["BLOCK_N"]),)
        _key_value_gradient_kernel[grid](
            **inputs,
            dk_ptr=dk,
            dv_ptr=dv,
            **_strides(dk=dk, dv=dv),
            H_kv=H_kv,
            NEED_DK=dk is not None,
            NEED_DV=dv is not None,
        )
    if dq is not None:
        inputs = _inputs(
            q,
            k,
            v,
            do,
            lse,
            delta,
            table("query_gradient"),
            aligned=aligned,
            causal=causal,
            softmax_scale=softmax_scale,
            dropout_p=dropout_p,
            seed=seed,
        )
        grid = (B * H * triton.cdiv(T_q, inputs["BLOCK_M"]),)
        _query_gradient_kernel[grid](**inputs, dq_ptr=dq, **_strides(dq=dq), H=H)


def _launch_delta(o: Tensor, do: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
    B, T, H, D = o.shape
    config = launch_config("delta", D, o.dtype, target_of(o.device), False)
    _delta_kernel[(triton.cdiv(B * T * H, config.block_m),)](
        o_ptr=o,
        do_ptr=do,
        dlse_ptr=None if dlse is None else dlse.contiguous(),
        delta_ptr=delta,
        **_strides(g=do),
        T=T,
        H=H,
        n_rows=B * T * H,
        D=D,
        HAS_DLSE=dlse is not None,
        ROWS=config.block_m,
        BLOCK_D=block_d_of(D),
        num_warps=config.num_warps,
    )


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    config: LaunchConfig,
    *,
    aligned: bool,
    causal: bool,
    softmax_scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> dict[str, Any]:
    """The arguments that both gradient kernels share."""
    H, D = q.shape[2:]
    # Strides that are whole 16-byte units go to the kernel as such, so that it can rely on it.
    alignment = 16 // q.element_size() if aligned else 1
    by_query, by_key = config.block_m, config.block_n
    widest = max(t.stride(1) for t in (q, k, v, do)) * max(by_query, by_key)
    return {
        "q_source": row_source(q, by_query, config.use_tma),
        "k_source": row_source(k, by_key, config.use_tma),
        "v_source": row_source(v, by_key, config.use_tma),
        "do_source": row_source(do, by_query, config.use_tma),
        "lse_ptr": lse,
        "delta_ptr": delta,
        "seed_ptr": seed,
        **_strides(alignment, q=q, k=k, v=v, g=do),
        "B": q.shape[0],
        "group": H // k.shape[2],
        "T_q": q.shape[1],
        "T_k": k.shape[1],
        "scale_log2": (1 / math.sqrt(D) if softmax_scale is None else softmax_scale) * LOG2E.value,
        "dropout_p": dropout_p,
        "D": D,
        "CAUSAL": causal,
        "PRECISION": dot_precision(q.dtype),
        "DROPOUT": dropout_p > 0,
        "USE_TMA": config.use_tma,
        "WIDE": is_wide(widest),
        "ALIGNMENT": alignment,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d_of(D),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _strides(unit: int = 1, **tensors: Tensor | None) -> dict[str, int]:
    """``{"stride_qb": ..., "stride_qt": ..., "stride_qh": ...}`` for ``q=...``, in ``unit``s."""
    return {
        f"stride_{name}{dim}": 0 if t is None else t.stride(i) // unit
        for name, t in tensors.items()
        for i, dim in enumerate("bth")
    }
