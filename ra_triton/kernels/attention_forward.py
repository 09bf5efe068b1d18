"""Flash attention forward over packed operands.

    o[b, t, h] = Σ_j p_j v[b, j, h'] / Σ_j p_j    p_j = exp(softmax_scale * q[b, t, h]·k[b, j, h'])
    lse[b, h, t] = log Σ_j p_j                    h' = h // (H // H_kv)

over all keys j, or those with j <= t + T_k - T_q if causal.

q ``[B, T_q, H, D]``, k and v ``[B, T_k, H_kv, D]`` → o ``[B, T_q, H, D]``, lse ``[B, H, T_q]``.
Grid ``(B * H * cdiv(T_q, BLOCK_M),)``: heads fastest, and the query tiles with most keys first, so
that the short ones fill the last wave. Overwrites nothing. After arXiv:2307.08691.
"""

import math

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
def _attend(
    acc,  # [BLOCK_M, BLOCK_D]
    l_i,  # [BLOCK_M]
    m_i,  # [BLOCK_M]
    q,  # [BLOCK_M, BLOCK_D]
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
    """Online softmax over keys ``begin ... end``: s = qkᵀ, m' = max(m, s), p = 2^(c(s - m'))."""
    for n in tl.range(begin, end, BLOCK_N):
        k = load_rows(
            k_source, b, h_kv, n, stride_kt, T_k,
            D, MASKED, USE_TMA, WIDE, ALIGNMENT, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        s = dot(q, k.T, None, PRECISION)  # [BLOCK_M, BLOCK_N]
        offs_n = n + tl.arange(0, BLOCK_N)
        if MASKED:
            s = tl.where(offs_n[None, :] < key_limit[:, None], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_scaled = m_new * scale_log2
        if MASKED:
            # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
            m_scaled = tl.where(m_new == float("-inf"), 0.0, m_scaled)
        p = tl.exp2(s * scale_log2 - m_scaled[:, None])
        alpha = tl.exp2(m_i * scale_log2 - m_scaled)
        l_i = l_i * alpha + tl.sum(p, 1)
        if DROPOUT:
            offs_m = m + tl.arange(0, BLOCK_M)
            p = tl.where(kept(seed, head, offs_m[:, None], offs_n[None, :], dropout_p), p, 0.0)
        acc = acc * alpha[:, None]
        v = load_rows(
            v_source, b, h_kv, n, stride_vt, T_k,
            D, MASKED, USE_TMA, WIDE, ALIGNMENT, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        acc = dot(p.to(v.dtype), v, acc, PRECISION)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit
def _attention_forward_kernel(
    q_source,  # pointers, or descriptors of [B, H, T, D] with USE_TMA
    k_source,
    v_source,
    seed_ptr,  # one int64, with DROPOUT
    o_ptr,
    lse_ptr,
    stride_qb,  # strides in units of ALIGNMENT elements
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
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
    """One query tile of one head: full key tiles, then the tiles that the mask cuts."""
    pid = tl.program_id(0)
    head = pid % (B * H)
    m = (tl.cdiv(T_q, BLOCK_M) - 1 - pid // (B * H)) * BLOCK_M
    b = head // H
    h = head % H
    h_kv = h // group
    if not USE_TMA:
        q_source += head_offset(b, h, stride_qb, stride_qh, ALIGNMENT)
        k_source += head_offset(b, h_kv, stride_kb, stride_kh, ALIGNMENT)
        v_source += head_offset(b, h_kv, stride_vb, stride_vh, ALIGNMENT)

    offs_m = m + tl.arange(0, BLOCK_M)
    key_limit, unmasked, end = key_range(m, T_q, T_k, CAUSAL, BLOCK_M, BLOCK_N)
    q = load_rows(
        q_source, b, h, m, stride_qt, T_q,
        D, True, USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    seed = tl.load(seed_ptr) if DROPOUT else 0
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, k_source, v_source, seed, b, head, h_kv, m, 0, unmasked, key_limit,
        stride_kt, stride_vt, T_k, scale_log2, dropout_p,
        D, PRECISION, False, DROPOUT, USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, k_source, v_source, seed, b, head, h_kv, m, unmasked, end, key_limit,
        stride_kt, stride_vt, T_k, scale_log2, dropout_p,
        D, PRECISION, True, DROPOUT, USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # a row without keys: o = 0, lse = -inf
    o = acc / (l_i * (1 - dropout_p))[:, None] if DROPOUT else acc / l_i[:, None]
    lse = (m_i * scale_log2 + tl.log2(l_i)) * LN2
    o_head = o_ptr + (tl.cast(b, tl.int64) * T_q * H + h) * D
    store_rows(o_head, o, m, H * D, T_q, D, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + tl.cast(head, tl.int64) * T_q + offs_m, lse, mask=offs_m < T_q)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    o: Tensor | None = None,
    lse: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``q [B, T_q, H, D]``, ``k, v [B, T_k, H_kv, D]`` → ``o [B, T_q, H, D]``, ``lse [B, H, T_q]``.

    Operands may have any strides but the last, which is 1; o and lse (float32) are contiguous, and
    new unless given. ``seed`` is one int64 on the device; the same seed drops the same scores.
    """
    B, T_q, H, D = q.shape
    T_k, H_kv = k.shape[1:3]
    if o is None:
        o = torch.empty((B, T_q, H, D), dtype=q.dtype, device=q.device)
    if lse is None:
        lse = torch.empty((B, H, T_q), dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse

    aligned = all(is_aligned(t) for t in (q, k, v))
    # Strides that are whole 16-byte units go to the kernel as such, so that it can rely on it.
    alignment = 16 // q.element_size() if aligned else 1
    if config is None:
        target = target_of(q.device)
        config = launch_config("attention_forward", D, q.dtype, target, aligned, dropout_p > 0)
    blocks = (config.block_m, config.block_n, config.block_n)
    q_source, k_source, v_source = (
        row_source(t, rows, config.use_tma) for t, rows in zip((q, k, v), blocks, strict=True)
    )
    if softmax_scale is None:
        softmax_scale = 1 / math.sqrt(D)
    grid = (B * H * triton.cdiv(T_q, config.block_m),)
    _attention_forward_kernel[grid](
        q_source=q_source,
        k_source=k_source,
        v_source=v_source,
        seed_ptr=seed,
        o_ptr=o,
        lse_ptr=lse,
        stride_qb=q.stride(0) // alignment,
        stride_qt=q.stride(1) // alignment,
        stride_qh=q.stride(2) // alignment,
        stride_kb=k.stride(0) // alignment,
        stride_kt=k.stride(1) // alignment,
        stride_kh=k.stride(2) // alignment,
        stride_vb=v.stride(0) // alignment,
        stride_vt=v.stride(1) // alignment,
        stride_vh=v.stride(2) // alignment,
        B=B,
        H=H,
        group=H // H_kv,
        T_q=T_q,
        T_k=T_k,
        scale_log2=softmax_scale * LOG2E.value,
        dropout_p=dropout_p,
        D=D,
        CAUSAL=causal,
        PRECISION=dot_precision(q.dtype),
        DROPOUT=dropout_p > 0,
        USE_TMA=config.use_tma,
        WIDE=any(is_wide(t.stride(1) * max(blocks)) for t in (q, k, v)),
        ALIGNMENT=alignment,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d_of(D),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return o, lse
