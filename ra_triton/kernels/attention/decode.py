"""Attention of a few last tokens over a key/value cache, split over the cache.

    o[b, t, h] = Σ_j p_j v[b, j, h'] / Σ_j p_j     p_j = exp(softmax_scale * q[b, t, h]·k[b, j, h'])
                                                   h' = h // (H // H_kv)

over the keys ``i - left <= j <= i``, where ``i = lengths[b] - T_q + t`` is the position of query t.
With a softcap the exponent is softcap * tanh(softmax_scale * q·k / softcap).

q ``[B, T_q, H, D]``, ``T_q <= 16``; k and v ``[B, max_len, H_kv, D]``, of which sequence b has
``lengths[b]`` (int32, on the device) → o ``[B, T_q, H, D]``. Two kernels:

``_decode_kernel``          grid ``(splits * B * H_kv * row tiles,)``. The rows of a tile are all
                            queries of all heads of a group, ``r = t * group + g``, so a key or a
                            value is loaded once for them. A split is a fixed range of keys; it
                            leaves the largest score m, the sum l of its weights, and its weighted
                            sum of values, in float32.
``_decode_combine_kernel``  grid ``(B * H * T_q,)``: adds the splits up, in their order.

Which keys make a split depends on ``max_len`` alone, never on the batch or on a length, so the
bits of a sequence do not depend on its neighbours; splits without keys end at once and are not
read. Overwrites nothing. After Flash-Decoding (pytorch.org/blog/flash-decoding).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels.attention.arguments import (
    ForwardStrides,
    Variant,
    block_d_of,
    scores_of,
)
from ra_triton.kernels.tiles import (
    dot,
    dot_precision,
    follow,
    head_of,
    is_aligned,
    is_wide,
    load_rows,
    raw_scores,
    strides_of,
    target_of,
)
from ra_triton.launch.configs import LaunchConfig, launch_config
from ra_triton.launch.plans import Layout, Plan, layout_of, on_16_bytes, planned

MAX_QUERIES = 16  # per sequence and call; more of them are a prefill
MAX_SPLITS = 128  # enough for one sequence with one key head to fill a GPU


class Heads(NamedTuple):
    """Of q ``[B, T_q, H_kv * group, D]``."""

    B: int
    H_kv: int
    group: int
    T_q: int


def keys_per_split(max_len: int, least: int) -> int:
    """Keys of a split: a power of two, at least ``least``, for at most ``MAX_SPLITS`` splits."""
    return max(least, triton.next_power_of_2(triton.cdiv(max_len, MAX_SPLITS)))


@triton.jit
def _length_of(lengths_ptr, b, max_len):
    """``lengths[b]``, never beyond the cache."""
    return tl.minimum(tl.load(lengths_ptr + b), max_len)


@triton.jit
def _first_key(length, T_q, left):
    """The first key that the window of any query includes; ``left < 0``: no window."""
    return tl.where(left < 0, 0, tl.maximum(length - T_q - left, 0))


@triton.jit(do_not_specialize=["max_len", "n_splits", "left"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    acc_ptr,  # [B, H_kv, splits, rows, D], rows = T_q * group
    stats_ptr,  # [B, H_kv, splits, 2, rows]: m, l
    strides,  # those of k and v in units of ALIGNMENT elements
    heads,
    max_len,
    n_splits,
    left,
    scores,
    V: tl.constexpr,
):
    """One split of one key head: m = max s, l = Σ 2^(c(s - m)), acc = Σ 2^(c(s - m)) v."""
    PRECISION: tl.constexpr = V.PRECISION
    BLOCK_M: tl.constexpr = V.BLOCK_M
    BLOCK_D: tl.constexpr = V.BLOCK_D
    B, H_kv, group, T_q = heads
    rows = T_q * group
    n_m = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    tile = pid % n_m
    head = pid // n_m % (B * H_kv)
    split = pid // n_m // (B * H_kv)
    b = head // H_kv
    h_kv = head % H_kv
    follow(V.PDL)
    length = _length_of(lengths_ptr, b, max_len)
    # Whole tiles of keys, so that which keys share a tile does not depend on the window's place.
    begin = tl.maximum(split * V.SPLIT, _first_key(length, T_q, left) // V.BLOCK_N * V.BLOCK_N)
    end = tl.minimum((split + 1) * V.SPLIT, length)
    if begin >= end:
        return

    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = r // group
    lanes = tl.arange(0, BLOCK_D)
    in_row = (r < rows)[:, None] & (lanes < V.D)[None, :]
    q_offset = t.to(tl.int64) * strides.q.t
    q_offset += (h_kv * group + r % group).to(tl.int64) * strides.q.h
    q_head = q_ptr + tl.cast(b, tl.int64) * strides.q.b
    q = tl.load(q_head + q_offset[:, None] + lanes[None, :], mask=in_row, other=0.0)
    k_ptr = head_of(k_ptr, b, h_kv, strides.k, V)
    v_ptr = head_of(v_ptr, b, h_kv, strides.v, V)
    last = length - T_q + t  # [BLOCK_M], the last key that each row sees
    first = tl.where(left < 0, 0, last - left)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for n in tl.range(begin, end, V.BLOCK_N):
        k = load_rows(k_ptr, b, h_kv, n, length, strides.k.t, V.BLOCK_N, True, V)
        s = raw_scores(q, k, scores.cap_scale, V)  # [BLOCK_M, BLOCK_N]
        offs_n = n + tl.arange(0, V.BLOCK_N)[None, :]
        seen = (offs_n <= last[:, None]) & (offs_n >= first[:, None])
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
        m_known = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * scores.scale_log2 - (m_known * scores.scale_log2)[:, None])
        alpha = tl.exp2((m_i - m_known) * scores.scale_log2)  # see forward.py
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = load_rows(v_ptr, b, h_kv, n, length, strides.v.t, V.BLOCK_N, True, V)
        acc = dot(p.to(v.dtype), v, acc, PRECISION)
        m_i = m_new

    part = tl.cast(head, tl.int64) * n_splits + split
    tl.store(acc_ptr + (part * rows + r)[:, None] * V.D + lanes[None, :], acc, mask=in_row)
    tl.store(stats_ptr + part * 2 * rows + r, m_i, mask=r < rows)
    tl.store(stats_ptr + (part * 2 + 1) * rows + r, l_i, mask=r < rows)


@triton.jit(do_not_specialize=["max_len", "n_splits", "left"])
def _decode_combine_kernel(
    acc_ptr,  # [B, H_kv, splits, rows, D]
    stats_ptr,  # [B, H_kv, splits, 2, rows]
    lengths_ptr,
    o_ptr,  # [B, T_q, H, D]
    H_kv,
    group,
    T_q,
    max_len,
    n_splits,
    left,
    scale_log2,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of o: Σ_s w_s acc_s / Σ_s w_s l_s, w_s = 2^(c(m_s - max m))."""
    rows = T_q * group
    r = tl.program_id(0) % rows
    head = tl.program_id(0) // rows
    b = head // H_kv
    follow(PDL)
    length = _length_of(lengths_ptr, b, max_len)
    begin = _first_key(length, T_q, left) // SPLIT  # the splits that have keys
    end = tl.cdiv(length, SPLIT)
    first_part = tl.cast(head, tl.int64) * n_splits
    stats_ptr += first_part * 2 * rows + r
    acc_ptr += (first_part * rows + r) * D
    offs_s = tl.arange(0, BLOCK_S)
    lanes = tl.arange(0, BLOCK_D)

    largest = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for s in tl.range(begin, end, BLOCK_S):
        offset = (s + offs_s).to(tl.int64) * 2 * rows
        m = tl.load(stats_ptr + offset, mask=s + offs_s < end, other=float("-inf"))
        largest = tl.maximum(largest, m)
    m_all = tl.max(largest, 0)
    m_all = tl.where(m_all == float("-inf"), 0.0, m_all)  # a row without keys

    o = tl.zeros([BLOCK_D], tl.float32)
    l_all = 0.0
    for s in tl.range(begin, end, BLOCK_S):
        inside = s + offs_s < end
        offset = (s + offs_s).to(tl.int64) * rows
        m = tl.load(stats_ptr + 2 * offset, mask=inside, other=float("-inf"))
        l_s = tl.load(stats_ptr + 2 * offset + rows, mask=inside, other=0.0)
        in_tile = inside[:, None] & (lanes < D)[None, :]
        acc = tl.load(acc_ptr + offset[:, None] * D + lanes[None, :], mask=in_tile, other=0.0)
        w = tl.exp2((m - m_all) * scale_log2)
        l_all += tl.sum(w * l_s, 0)
        o += tl.sum(w[:, None] * acc, 0)
    o = o / tl.where(l_all == 0.0, 1.0, l_all)
    H = H_kv * group
    h = head % H_kv * group + r % group
    o_row = o_ptr + ((tl.cast(b, tl.int64) * T_q + r // group) * H + h) * D
    tl.store(o_row + lanes, o.to(o_ptr.dtype.element_ty), mask=lanes < D)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    max_length: int,
    left: int = -1,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    config: LaunchConfig | None = None,
) -> Tensor:
    """``q [B, T_q, H, D]``, ``k, v [B, max_len, H_kv, D]`` → ``o [B, T_q, H, D]``, contiguous.

    ``lengths`` is int32 ``[B]``, contiguous. None is above ``max_length``, which saves programs and
    changes no bit; a length that is counts as shorter.
    """
    B, T_q, H, D = q.shape
    max_len, H_kv = k.shape[1:3]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if o.numel() == 0 or max_length == 0:
        return o.zero_()
    plan, combine, n_splits = _plans(
        q.device,
        q.dtype,
        layout_of(q),
        layout_of(k),
        layout_of(v),
        on_16_bytes(lengths),
        min(max_len, triton.next_power_of_2(max_length)),  # so that few lengths make a plan
        left,
        softmax_scale,
        float(softcap),
        dot_precision(q.dtype),
        target_of(q.device),
        config,
    )
    parts, rows = (B, H_kv, n_splits), T_q * (H // H_kv)
    acc = torch.empty((*parts, rows, D), dtype=torch.float32, device=q.device)
    stats = torch.empty((*parts, 2, rows), dtype=torch.float32, device=q.device)
    plan(q, k, v, lengths, acc, stats)
    combine(acc, stats, lengths, o)
    return o


@planned
def _plans(
    device: torch.device,
    dtype: torch.dtype,
    q: Layout,
    k: Layout,
    v: Layout,
    others: tuple[bool | None, ...],
    longest: int,
    left: int,
    softmax_scale: float | None,
    softcap: float,
    precision: str,
    target: str,
    config: LaunchConfig | None,
) -> tuple[Plan, Plan, int]:
    """Both launches, for lengths up to ``longest``, and the number of splits."""
    B, T_q, H, D = q.shape
    max_len, H_kv = k.shape[1:3]
    aligned = is_aligned(k, dtype) and is_aligned(v, dtype)
    # Strides that are whole 16-byte units go to the kernel as such, so that it can rely on it.
    alignment = 16 // dtype.itemsize if aligned else 1
    if config is None:
        config = launch_config("decode", D, dtype, target, aligned)
    combine = launch_config("decode_combine", D, dtype, target, aligned)
    group = H // H_kv
    rows = T_q * group
    split = keys_per_split(max_len, config.block_k)
    n_splits = triton.cdiv(longest, split)
    block_m = min(config.block_m, max(16, triton.next_power_of_2(rows)))
    scores, BLOCK_D = scores_of(D, softmax_scale, softcap), block_d_of(D)
    shared = {"max_len": longest, "n_splits": n_splits, "left": left}
    arguments = {
        **shared,
        "heads": Heads(B, H_kv, group, T_q),
        "strides": ForwardStrides(strides_of(q), *(strides_of(t, alignment) for t in (k, v))),
        "scores": scores,
        "V": Variant(
            D=D,
            BLOCK_D=BLOCK_D,
            ALIGNMENT=alignment,
            PRECISION=precision,
            SOFTCAP=softcap > 0,
            BLOCK_M=block_m,
            BLOCK_N=config.block_n,
            WIDE=any(is_wide(t.strides[1] * config.block_n) for t in (k, v)),
            PDL=config.pdl,
            SPLIT=split,
        ),
        **config.compiler_options,
    }
    combined = {
        **shared,
        "H_kv": H_kv,
        "group": group,
        "T_q": T_q,
        "scale_log2": scores.scale_log2,
        "D": D,
        "SPLIT": split,
        "BLOCK_S": combine.block_m,
        "BLOCK_D": BLOCK_D,
        **combine.options,
    }
    programs = n_splits * B * H_kv * triton.cdiv(rows, block_m)
    return (
        Plan(_decode_kernel, (programs,), arguments),
        Plan(_decode_combine_kernel, (B * H_kv * rows,), combined),
        n_splits,
    )
