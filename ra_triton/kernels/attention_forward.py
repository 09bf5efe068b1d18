"""Flash attention forward over packed operands.

    o[b, t, h] = Σ_j p_j v[b, j, h'] / Σ_j p_j    p_j = exp(softmax_scale * q[b, t, h]·k[b, j, h'])
    lse[b, h, t] = log Σ_j p_j                    h' = h // (H // H_kv)

over all keys j, or those with -left <= j - (t + T_k - T_q) <= right; causal means right = 0. Key
tiles outside that range are not visited. With a softcap the exponent is
softcap * tanh(softmax_scale * q·k / softcap).

q ``[B, T_q, H, D]``, k and v ``[B, T_k, H_kv, D]`` → o ``[B, T_q, H, D]``, lse ``[B, H, T_q]``.
With VARLEN sequences of different lengths lie one after the other, as in FlashAttention: ``B`` of
them in q ``[1, total_q, H, D]``, k and v ``[1, total_k, H_kv, D]``, lse ``[1, H, total_q]``.
Grid ``(B * H * cdiv(T_q, BLOCK_M),)``: heads fastest, in sections that fit L2, and the query tiles
with most keys first, so that the short ones fill the last wave. Overwrites nothing. After
arXiv:2307.08691.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels import gluon
from ra_triton.kernels.configs import LaunchConfig, launch_config, warp_specialised
from ra_triton.kernels.plans import (
    Layout,
    Plan,
    layout_of,
    on_16_bytes,
    plan_in_gluon,
    planned,
)
from ra_triton.kernels.tiles import (
    LN2,
    TRITON_VERSION,
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
    processors_of,
    rows_in_bulk,
    score_arguments,
    sequence,
    store_rows,
    strides_by_name,
    target_of,
)
from ra_triton.offsets import Offsets, flat, lengths


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
    """Online softmax over keys ``begin ... end``: s = qkᵀ, m' = max(m, s), p = 2^(c(s - m'))."""
    for n in tl.range(begin, end, BLOCK_N):
        k = load_rows(
            k_source, b, h_kv, n, stride_kt, T_k,
            D, MASKED, USE_TMA, WIDE, ALIGNMENT, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        s = dot(q, k.T, None, PRECISION)  # [BLOCK_M, BLOCK_N]
        if SOFTCAP:
            s = capped(s, cap_scale)
        offs_n = n + tl.arange(0, BLOCK_N)
        if MASKED and (not USE_TMA or n >= unmasked or (WINDOW and n < whole)):
            s = tl.where(offs_n[None, :] < key_limit[:, None], s, float("-inf"))
            if WINDOW:
                s = tl.where(offs_n[None, :] >= first_key[:, None], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_known = m_new
        if MASKED:
            # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
            m_known = tl.where(m_new == float("-inf"), 0.0, m_new)
        # Exactly 1 where m stays, which a fused multiply-add with a rounded product would not be.
        alpha = tl.exp2((m_i - m_known) * scale_log2)
        p = tl.exp2(s * scale_log2 - (m_known * scale_log2)[:, None])
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


@triton.jit(do_not_specialize=["section", "left", "right", "total_q", "total_k"])
def _attention_forward_kernel(
    q_source,  # pointers, or descriptors of [B, H, T, D] with USE_TMA
    k_source,
    v_source,
    seed_ptr,  # one int64, with DROPOUT
    cu_q_ptr,  # B + 1 offsets, with VARLEN
    cu_k_ptr,
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
    T_q,  # with VARLEN of the longest sequence
    T_k,
    total_q,  # tokens of all sequences, with VARLEN
    total_k,
    section,  # heads at a time
    left,  # keys seen before a query's own, and after, with WINDOW
    right,
    scale_log2,  # softmax_scale * log2(e); with SOFTCAP softcap * log2(e)
    cap_scale,  # softmax_scale / softcap
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
    """One query tile of one head: full key tiles, and those that the mask cuts."""
    n_m = tl.cdiv(T_q, BLOCK_M)
    head, tile = head_and_tile(tl.program_id(0), B * H, n_m, section, USE_TMA)
    m = (n_m - 1 - tile) * BLOCK_M
    b = head // H
    h = head % H
    h_kv = h // group
    if not USE_TMA:
        q_source += head_offset(b, h, stride_qb, stride_qh, ALIGNMENT)
        k_source += head_offset(b, h_kv, stride_kb, stride_kh, ALIGNMENT)
        v_source += head_offset(b, h_kv, stride_vb, stride_vh, ALIGNMENT)

    follow(PDL)
    row = tl.cast(b, tl.int64) * T_q  # of o
    lse_row = tl.cast(head, tl.int64) * T_q
    if VARLEN:
        first_q, T_q = sequence(cu_q_ptr, b, total_q)
        first_k, T_k = sequence(cu_k_ptr, b, total_k)
        if m >= T_q:
            return
        row = tl.cast(first_q, tl.int64)
        lse_row = tl.cast(h, tl.int64) * total_q + first_q
        q_source += row * stride_qt * ALIGNMENT
        k_source += tl.cast(first_k, tl.int64) * stride_kt * ALIGNMENT
        v_source += tl.cast(first_k, tl.int64) * stride_vt * ALIGNMENT
    offs_m = m + tl.arange(0, BLOCK_M)
    first_key, key_limit, begin, whole, unmasked, end = key_range(
        m, T_q, T_k, left, right, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    q = load_rows(
        q_source, b, h, m, stride_qt, T_q,
        D, True, USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    seed = tl.load(seed_ptr) if DROPOUT else 0
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Bounds cost instructions, so without bulk copies full tiles have a loop of their own.
    if WINDOW and not USE_TMA:
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, q, k_source, v_source, seed, b, head, h_kv, m,
            begin, tl.minimum(whole, end), whole, unmasked, first_key, key_limit,
            stride_kt, stride_vt, T_k, scale_log2, cap_scale, dropout_p,
            D, PRECISION, True, WINDOW, SOFTCAP, DROPOUT,
            USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if not USE_TMA:
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, q, k_source, v_source, seed, b, head, h_kv, m,
            whole, unmasked, whole, unmasked, first_key, key_limit,
            stride_kt, stride_vt, T_k, scale_log2, cap_scale, dropout_p,
            D, PRECISION, False, WINDOW, SOFTCAP, DROPOUT,
            USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        begin = unmasked
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, k_source, v_source, seed, b, head, h_kv, m,
        begin, end, whole, unmasked, first_key, key_limit,
        stride_kt, stride_vt, T_k, scale_log2, cap_scale, dropout_p,
        D, PRECISION, True, WINDOW, SOFTCAP, DROPOUT,
        USE_TMA, WIDE, ALIGNMENT, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # a row without keys: o = 0, lse = -inf
    o = acc / (l_i * (1 - dropout_p))[:, None] if DROPOUT else acc / l_i[:, None]
    lse = (m_i * scale_log2 + tl.log2(l_i)) * LN2
    o_head = o_ptr + (row * H + h) * D
    store_rows(o_head, o, m, H * D, T_q, D, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + lse_row + offs_m, lse, mask=offs_m < T_q)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    o: Tensor | None = None,
    lse: Tensor | None = None,
    offsets: Offsets | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``q [B, T_q, H, D]``, ``k, v [B, T_k, H_kv, D]`` → ``o [B, T_q, H, D]``, ``lse [B, H, T_q]``.

    Operands may have any strides but the last, which is 1; o and lse (float32) are contiguous, and
    new unless given. ``seed`` is one int64 on the device; the same seed drops the same scores. With
    ``offsets`` B is 1, and T counts the tokens of all sequences.
    """
    B, T_q, H, _ = q.shape
    if o is None:
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if lse is None:
        lse = torch.empty((B, H, T_q), dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse
    options = (causal, softmax_scale, window_size, softcap, dropout_p, offsets, config)
    plan = forward_plan(q, k, v, seed, o, lse, *options)
    plan(q, k, v, seed, *flat(offsets)[:2], o, lse)
    return o, lse


def forward_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    offsets: Offsets | None = None,
    config: LaunchConfig | None = None,
) -> Plan:
    """The launch of :func:`attention_forward`.

    Of ``(q, k, v, seed, cu_seqlens_q, cu_seqlens_k, o, lse)``.
    """
    return _plan(
        q.device,
        q.dtype,
        layout_of(q),
        layout_of(k),
        layout_of(v),
        on_16_bytes(seed, *flat(offsets)[:2], o, lse),
        None if offsets is None else lengths(offsets),
        causal,
        window_size,
        softmax_scale,
        float(softcap),
        float(dropout_p),
        dot_precision(q.dtype),
        target_of(q.device),
        config,
    )


@planned
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    q: Layout,
    k: Layout,
    v: Layout,
    others: tuple[bool | None, ...],
    sequences: tuple[int, int, int] | None,
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    softcap: float,
    dropout_p: float,
    precision: str,
    target: str,
    config: LaunchConfig | None,
) -> Plan:
    """The launch for operands of these layouts; ``sequences``: how many, most queries and keys."""
    B, T_q, H, D = q.shape
    T_k, H_kv = k.shape[1:3]
    aligned = all(is_aligned(t, dtype) for t in (q, k, v))
    varlen, totals = sequences is not None, {"total_q": T_q, "total_k": T_k}
    if sequences is not None:
        B, T_q, T_k = sequences
        q, k, v = (as_tokens(t) for t in (q, k, v))
    mask = mask_arguments(T_q, T_k, causal, window_size)
    # Strides that are whole 16-byte units go to the kernel as such, so that it can rely on it.
    alignment = 16 // dtype.itemsize if aligned else 1
    special = dropout_p > 0 or mask["WINDOW"] or softcap > 0 or varlen
    in_gluon = partial(_plan_in_gluon, device, dtype, q, k, v, causal, softmax_scale)
    if config is not None and config.groups > 1:
        return in_gluon(config)
    if config is None:
        flags = (dropout_p > 0, mask["WINDOW"], varlen)
        config = launch_config("attention_forward", D, dtype, target, aligned, *flags)
        if aligned and others[3] and not special:
            hopper = warp_specialised(D, dtype, target, min(T_q, T_k), causal, TRITON_VERSION)
            if hopper is not None and gluon.works("attention_forward"):
                options = (causal, window_size, softmax_scale, softcap, dropout_p, precision)
                of = (device, dtype, q, k, v, others, sequences, *options, target)
                return plan_in_gluon(
                    "attention_forward", partial(in_gluon, hopper), partial(_plan, *of, config)
                )
    blocks = (config.block_m, config.block_n, config.block_n)
    rows = zip((q, k, v), blocks, strict=True)
    bulk = {i: rows_in_bulk(t, n) for i, (t, n) in enumerate(rows)}
    arguments = {
        **strides_by_name(alignment, q=q, k=k, v=v),
        "B": B,
        "H": H,
        "group": H // H_kv,
        "T_q": T_q,
        "T_k": T_k,
        **totals,
        "section": heads_per_section(B * H, 2 * T_k * D * dtype.itemsize * H_kv // H),
        **mask,
        **score_arguments(D, softmax_scale, softcap),
        "dropout_p": dropout_p,
        "D": D,
        "PRECISION": precision,
        "DROPOUT": dropout_p > 0,
        "VARLEN": varlen,
        "USE_TMA": config.use_tma,
        "WIDE": any(is_wide(t.strides[1] * max(blocks)) for t in (q, k, v)),
        "ALIGNMENT": alignment,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d_of(D),
        **config.options,
    }
    grid = (B * H * triton.cdiv(T_q, config.block_m),)
    return Plan(_attention_forward_kernel, grid, arguments, bulk if config.use_tma else None)


def _plan_in_gluon(
    device: torch.device,
    dtype: torch.dtype,
    q: Layout,
    k: Layout,
    v: Layout,
    causal: bool,
    softmax_scale: float | None,
    config: LaunchConfig,
) -> Plan:
    """The launch of Hopper's own kernel; not even imported where Gluon is not as it was."""
    from ra_triton.kernels.attention_forward_hopper import forward_plan

    processors = processors_of(device)
    return forward_plan(dtype, q, k, v, causal, softmax_scale, config, processors)
