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

from ra_triton.call.offsets import Offsets, flat, lengths
from ra_triton.kernels.attention.arguments import Attention, attention_of
from ra_triton.kernels.tiles import (
    LN2,
    TRITON_VERSION,
    Place,
    dot,
    dot_precision,
    follow,
    head_and_tile,
    head_of,
    kept,
    key_range,
    load_rows,
    processors_of,
    raw_scores,
    sequence,
    sequence_of,
    store_rows,
    target_of,
)
from ra_triton.launch import gluon
from ra_triton.launch.configs import LaunchConfig, launch_config, warp_specialised
from ra_triton.launch.plans import (
    Layout,
    Plan,
    layout_of,
    on_16_bytes,
    plan_in_gluon,
    planned,
)


@triton.jit
def _attend(
    state,  # acc [BLOCK_M, BLOCK_D], l_i and m_i [BLOCK_M]
    q,  # [BLOCK_M, BLOCK_D]
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
    """Online softmax over keys ``begin ... end``: s = qkᵀ, m' = max(m, s), p = 2^(c(s - m'))."""
    PRECISION: tl.constexpr = V.PRECISION
    acc, l_i, m_i = state
    for n in tl.range(begin, end, V.BLOCK_N):
        k = load_rows(k_source, at.b, at.h, n, keys.length, strides.k.t, V.BLOCK_N, MASKED, V)
        s = raw_scores(q, k, scores.cap_scale, V)  # [BLOCK_M, BLOCK_N]
        offs_n = n + tl.arange(0, V.BLOCK_N)
        if MASKED and (not V.USE_TMA or n >= keys.full_end or (V.WINDOW and n < keys.full_begin)):
            s = tl.where(offs_n[None, :] < keys.limit[:, None], s, float("-inf"))
            if V.WINDOW:
                s = tl.where(offs_n[None, :] >= keys.first[:, None], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_known = m_new
        if MASKED:
            # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
            m_known = tl.where(m_new == float("-inf"), 0.0, m_new)
        # Exactly 1 where m stays, which a fused multiply-add with a rounded product would not be.
        alpha = tl.exp2((m_i - m_known) * scores.scale_log2)
        p = tl.exp2(s * scores.scale_log2 - (m_known * scores.scale_log2)[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        if V.DROPOUT:
            offs_m = at.row + tl.arange(0, V.BLOCK_M)
            rows, columns = offs_m[:, None], offs_n[None, :]
            p = tl.where(kept(at.seed, at.head, rows, columns, scores.dropout_p), p, 0.0)
        acc = acc * alpha[:, None]
        v = load_rows(v_source, at.b, at.h, n, keys.length, strides.v.t, V.BLOCK_N, MASKED, V)
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
    strides,
    sizes,
    section,  # heads at a time
    left,  # keys seen before a query's own, and after, with WINDOW
    right,
    total_q,  # tokens of all sequences, with VARLEN
    total_k,
    scores,
    V: tl.constexpr,
):
    """One query tile of one head: full key tiles, and those that the mask cuts."""
    BLOCK_M: tl.constexpr = V.BLOCK_M
    BLOCK_D: tl.constexpr = V.BLOCK_D
    T_q, T_k, H = sizes.T_q, sizes.T_k, sizes.H
    n_m = tl.cdiv(T_q, BLOCK_M)
    head, tile = head_and_tile(tl.program_id(0), sizes.B * H, n_m, section, V.USE_TMA)
    m = (n_m - 1 - tile) * BLOCK_M
    b = head // H
    h = head % H
    h_kv = h // sizes.group
    q_source = head_of(q_source, b, h, strides.q, V)
    k_source = head_of(k_source, b, h_kv, strides.k, V)
    v_source = head_of(v_source, b, h_kv, strides.v, V)
    follow(V.PDL)
    row = tl.cast(b, tl.int64) * T_q  # of o
    lse_row = tl.cast(head, tl.int64) * T_q
    if V.VARLEN:
        first_q, T_q = sequence(cu_q_ptr, b, total_q)
        first_k, T_k = sequence(cu_k_ptr, b, total_k)
        if m >= T_q:
            return
        row = tl.cast(first_q, tl.int64)
        lse_row = tl.cast(h, tl.int64) * total_q + first_q
        q_source = sequence_of(q_source, first_q, strides.q, V)
        k_source = sequence_of(k_source, first_k, strides.k, V)
        v_source = sequence_of(v_source, first_k, strides.v, V)
    offs_m = m + tl.arange(0, BLOCK_M)
    keys = key_range(m, T_q, T_k, left, right, V)
    q = load_rows(q_source, b, h, m, T_q, strides.q.t, BLOCK_M, True, V)
    at = Place(b, h_kv, head, m, tl.load(seed_ptr) if V.DROPOUT else 0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    state = (acc, l_i, m_i)
    shared = (keys, at, strides, scores)
    begin, end = keys.begin, keys.end
    # Bounds cost instructions, so without TMA loads full blocks have a loop of their own.
    if not V.USE_TMA:
        if V.WINDOW:
            cut = tl.minimum(keys.full_begin, end)
            state = _attend(state, q, k_source, v_source, begin, cut, *shared, V, True)
        begin = keys.full_end
        state = _attend(state, q, k_source, v_source, keys.full_begin, begin, *shared, V, False)
    acc, l_i, m_i = _attend(state, q, k_source, v_source, begin, end, *shared, V, True)

    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # a row without keys: o = 0, lse = -inf
    o = acc / (l_i * (1 - scores.dropout_p))[:, None] if V.DROPOUT else acc / l_i[:, None]
    lse = (m_i * scores.scale_log2 + tl.log2(l_i)) * LN2
    store_rows(o_ptr + (row * H + h) * V.D, o, m, T_q, H * V.D, V)
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
    begins = flat(offsets)[:2]
    plan = _plan(
        q.device,
        q.dtype,
        layout_of(q),
        layout_of(k),
        layout_of(v),
        on_16_bytes(seed, *begins, o, lse),
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
    plan(q, k, v, seed, *begins, o, lse)
    return o, lse


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
    scores = (softmax_scale, softcap, dropout_p)
    call = attention_of(dtype, (q, k, v), sequences, causal, window_size, *scores, precision)
    B, T_q, T_k, H, H_kv, _ = call.sizes
    aligned, dropout, window, varlen = call.traits
    o_on_16_bytes = others[3]
    in_gluon = partial(_plan_in_gluon, device, call)
    if config is not None and config.groups > 1:
        return in_gluon(config)
    if config is None:
        D = q.shape[3]
        config = launch_config("attention_forward", D, dtype, target, *call.traits)
        if aligned and o_on_16_bytes and B and not dropout:
            of = (D, dtype, target, min(T_q, T_k), causal, TRITON_VERSION)
            keys = call.mask.left + 1 + call.mask.right if window else None
            hopper = warp_specialised(*of, keys=keys, softcap=call.softcap, varlen=varlen)
            if hopper is not None and gluon.works("attention_forward"):
                options = (causal, window_size, *scores, precision)
                again = (device, dtype, q, k, v, others, sequences, *options, target)
                return plan_in_gluon(
                    "attention_forward", partial(in_gluon, hopper), partial(_plan, *again, config)
                )
    arguments = call.arguments(config) | {"section": call.section(H, T_k, H_kv)}
    grid = (B * H * triton.cdiv(T_q, config.block_m),)
    return Plan(_attention_forward_kernel, grid, arguments, call.bulk(config))


def _plan_in_gluon(device: torch.device, call: Attention, config: LaunchConfig) -> Plan:
    """The launch of Hopper's own kernel; not even imported where Gluon is not as it was."""
    from ra_triton.kernels.attention.forward_hopper import forward_plan

    return forward_plan(call, config, processors_of(device))
