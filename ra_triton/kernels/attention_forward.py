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
    descriptor,
    dot,
    dot_precision,
    is_aligned,
    is_wide,
    load_rows,
    target_of,
)

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2))


@triton.jit
def _attend(
    acc,  # [BLOCK_M, BLOCK_D]
    l_i,  # [BLOCK_M]
    m_i,  # [BLOCK_M]
    q,  # [BLOCK_M, BLOCK_D]
    k_source,
    v_source,
    b,
    h_kv,
    begin,
    end,
    key_limit,  # [BLOCK_M]
    stride_kt,
    stride_vt,
    T_k,
    scale_log2,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    USE_TMA: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
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
        if MASKED:
            offs_n = n + tl.arange(0, BLOCK_N)
            s = tl.where(offs_n[None, :] < key_limit[:, None], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_scaled = m_new * scale_log2
        if MASKED:
            # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
            m_scaled = tl.where(m_new == float("-inf"), 0.0, m_scaled)
        p = tl.exp2(s * scale_log2 - m_scaled[:, None])
        alpha = tl.exp2(m_i * scale_log2 - m_scaled)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = load_rows(
            v_source, b, h_kv, n, stride_vt, T_k,
            D, MASKED, USE_TMA, WIDE, ALIGNMENT, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        acc = dot(p.to(v.dtype), v, acc, PRECISION)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit
def _head_offset(b, h, stride_b, stride_h, ALIGNMENT: tl.constexpr):
    """``(b * stride_b + h * stride_h) * ALIGNMENT`` in 64 bits."""
    return (tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h) * ALIGNMENT


@triton.jit
def _attention_forward_kernel(
    q_source,  # pointers, or descriptors of [B, H, T, D] with USE_TMA
    k_source,
    v_source,
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
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
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
        q_source += _head_offset(b, h, stride_qb, stride_qh, ALIGNMENT)
        k_source += _head_offset(b, h_kv, stride_kb, stride_kh, ALIGNMENT)
        v_source += _head_offset(b, h_kv, stride_vb, stride_vh, ALIGNMENT)

    offs_m = m + tl.arange(0, BLOCK_M)
    if CAUSAL:
        # Query i stands at key position i + T_k - T_q and sees the keys before key_limit.
        key_limit = tl.minimum(offs_m + 1 + (T_k - T_q), T_k)
        unmasked = tl.minimum(tl.maximum(m + 1 + (T_k - T_q), 0), T_k) // BLOCK_N * BLOCK_N
        end = tl.maximum(tl.minimum(m + BLOCK_M, T_q) + (T_k - T_q), 0)
    else:
        key_limit = tl.full([BLOCK_M], 0, tl.int32) + T_k
        unmasked = T_k // BLOCK_N * BLOCK_N
        end = T_k

    q = load_rows(
        q_source, b, h, m, stride_qt, T_q,
        D, True, USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, k_source, v_source, b, h_kv, 0, unmasked, key_limit,
        stride_kt, stride_vt, T_k, scale_log2,
        D, PRECISION, False, USE_TMA, WIDE, ALIGNMENT, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, k_source, v_source, b, h_kv, unmasked, end, key_limit,
        stride_kt, stride_vt, T_k, scale_log2,
        D, PRECISION, True, USE_TMA, WIDE, ALIGNMENT, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # a row without keys: o = 0, lse = -inf
    o = acc / l_i[:, None]
    lse = (m_i * scale_log2 + tl.log2(l_i)) * LN2
    offs_d = tl.arange(0, BLOCK_D)
    o_tile = o_ptr + ((tl.cast(b, tl.int64) * T_q + m) * H + h) * D
    o_pointers = o_tile + (tl.arange(0, BLOCK_M)[:, None] * (H * D) + offs_d[None, :])
    mask_m = offs_m < T_q
    tl.store(o_pointers, o.to(o_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_d[None, :] < D))
    tl.store(lse_ptr + tl.cast(head, tl.int64) * T_q + offs_m, lse, mask=mask_m)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``q [B, T_q, H, D]``, ``k, v [B, T_k, H_kv, D]`` → ``o [B, T_q, H, D]``, ``lse [B, H, T_q]``.

    Operands may have any strides but the last, which is 1; o is contiguous, lse float32.
    """
    B, T_q, H, D = q.shape
    T_k, H_kv = k.shape[1:3]
    o = torch.empty((B, T_q, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T_q), dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse

    aligned = all(is_aligned(t) for t in (q, k, v))
    # Strides that are whole 16-byte units go to the kernel as such, so that it can rely on it.
    alignment = 16 // q.element_size() if aligned else 1
    if config is None:
        config = launch_config("attention_forward", D, q.dtype, target_of(q.device), aligned)
    block_d = max(16, triton.next_power_of_2(D))
    blocks = (config.block_m, config.block_n, config.block_n)
    sources = (q, k, v)
    if config.use_tma:
        sources = tuple(
            descriptor(t.transpose(1, 2), [1, 1, rows, block_d])
            for t, rows in zip((q, k, v), blocks, strict=True)
        )
    if softmax_scale is None:
        softmax_scale = 1 / math.sqrt(D)
    grid = (B * H * triton.cdiv(T_q, config.block_m),)
    _attention_forward_kernel[grid](
        q_source=sources[0],
        k_source=sources[1],
        v_source=sources[2],
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
        scale_log2=softmax_scale * LOG2E,
        D=D,
        CAUSAL=causal,
        PRECISION=dot_precision(q.dtype),
        USE_TMA=config.use_tma,
        WIDE=any(is_wide(t.stride(1) * max(blocks)) for t in (q, k, v)),
        ALIGNMENT=alignment,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return o, lse
