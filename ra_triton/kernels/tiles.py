"""Tile helpers shared by the stages, and what a launcher needs to describe a tensor to a kernel."""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ra_triton.checks import allows_tf32
from ra_triton.launch.configs import target
from ra_triton.launch.plans import Layout

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


class Strides(NamedTuple):
    """Of ``[B, T, H, D]``, whose last stride is 1."""

    b: int
    t: int
    h: int


class Place(NamedTuple):
    """Which tile of which head a program computes, and where it streams from."""

    b: Any
    h: Any  # the head streamed: of k and v, or of q and do
    head: Any  # b * H + h of a query head
    row: Any  # the tile's first
    seed: Any  # of dropout


class Range(NamedTuple):
    """Which keys the queries of a tile see, or which queries see the keys of one.

    ``first`` and ``limit`` say it row by row: the first, and the one after the last. Blocks from
    ``begin`` to ``end`` are seen at all, those from ``full_begin`` to ``full_end`` in full, by the
    whole tile; all of them lie in ``0 ... length``.
    """

    first: Any  # [rows of the tile]
    limit: Any
    begin: Any
    full_begin: Any
    full_end: Any
    end: Any
    length: Any


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` in float32; the interpreter would multiply bf16 bit patterns, so it widens."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def follow(PDL: tl.constexpr):
    """Programmatic dependent launch: wait for the kernel before, and let the one after start.

    The kernel after waits here too, so only its launch overlaps with this kernel, no access.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def head_and_tile(pid, n_heads, n_tiles, section, SECTIONED: tl.constexpr):
    """Which head of ``B * H``, and which of its tiles, a program takes.

    Heads fastest, so that the heaviest tiles of all of them come first; but ``section`` heads at a
    time, so that what these programs read again and again stays in L2.
    """
    first = 0
    size = n_heads
    if SECTIONED or _INTERPRETED:  # measured on Hopper alone; elsewhere it costs registers
        first = pid // (section * n_tiles) * section
        size = tl.minimum(n_heads - first, section)
        pid -= first * n_tiles
    return first + pid % size, pid // size


@triton.jit
def head_of(source, b, h, strides, V: tl.constexpr):
    """``source`` from batch b and head h on; a descriptor stays as it is."""
    if not V.USE_TMA:
        source += head_offset(b, h, strides, V.ALIGNMENT)
    return source


@triton.jit
def sequence_of(source, first, strides, V: tl.constexpr):
    """``source`` from token ``first`` on."""
    return source + tl.cast(first, tl.int64) * strides.t * V.ALIGNMENT


@triton.jit
def load_rows(
    source,  # descriptor of [B, H, T, D], or pointer to row 0 of this batch and head
    b,
    h,
    row,
    n_rows,
    stride_t,  # in units of ALIGNMENT elements
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    V: tl.constexpr,
):
    """Rows ``row ... row + ROWS`` as ``[ROWS, BLOCK_D]``, 0 beyond ``n_rows`` and beyond ``D``."""
    if V.USE_TMA:
        tile = source.load([b, h, row, 0]).reshape(ROWS, V.BLOCK_D)
    else:
        offs_t = tl.arange(0, ROWS)
        offs_d = tl.arange(0, V.BLOCK_D)
        in_tile = offs_t.to(tl.int64) if V.WIDE else offs_t
        # A scalar base and small in-tile offsets: 2-D pointers carried by a loop spill registers.
        row_ptr = source + tl.cast(row, tl.int64) * stride_t * V.ALIGNMENT
        pointers = row_ptr + (in_tile[:, None] * stride_t * V.ALIGNMENT + offs_d[None, :])
        if MASKED:
            mask = (offs_t[:, None] < n_rows - row) & (offs_d[None, :] < V.D)
            tile = tl.load(pointers, mask=mask, other=0.0)
        elif V.D < V.BLOCK_D:
            tile = tl.load(pointers, mask=offs_d[None, :] < V.D, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def raw_scores(q, k, cap_scale, V: tl.constexpr):
    """``q kᵀ``; with SOFTCAP ``tanh(cap_scale q kᵀ)``."""
    PRECISION: tl.constexpr = V.PRECISION
    s = dot(q, k.T, None, PRECISION)
    return capped(s, cap_scale) if V.SOFTCAP else s


@triton.jit
def sequence(offsets_ptr, b, total):
    """First token of sequence ``b`` and its length, inside ``total`` tokens whatever is there."""
    begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + b), 0), total)
    end = tl.minimum(tl.maximum(tl.load(offsets_ptr + b + 1), begin), total)
    return begin, end - begin


@triton.jit
def key_range(m, T_q, T_k, left, right, V: tl.constexpr):
    """The keys that the queries ``m ... m + BLOCK_M`` see.

    Query i stands at key position i + T_k - T_q. It sees the keys before ``limit[i - m]``, with
    WINDOW those from ``first[i - m]`` on.
    """
    offs_m = m + tl.arange(0, V.BLOCK_M)
    first, begin, full_begin = 0, 0, 0
    if V.WINDOW:
        first = offs_m + (T_k - T_q) - left
        limit = tl.minimum(offs_m + 1 + (T_k - T_q) + right, T_k)
        last = tl.minimum(m + V.BLOCK_M, T_q) - 1 + (T_k - T_q)  # position of the last query
        begin = tl.maximum(m + (T_k - T_q) - left, 0) // V.BLOCK_N * V.BLOCK_N
        full_begin = tl.cdiv(tl.maximum(last - left, 0), V.BLOCK_N) * V.BLOCK_N
        full_end = tl.minimum(tl.maximum(m + 1 + (T_k - T_q) + right, 0), T_k)
        full_end = tl.maximum(full_end // V.BLOCK_N * V.BLOCK_N, full_begin)
        end = tl.minimum(tl.maximum(last + 1 + right, 0), T_k)
    elif V.CAUSAL:
        limit = tl.minimum(offs_m + 1 + (T_k - T_q), T_k)
        full_end = tl.minimum(tl.maximum(m + 1 + (T_k - T_q), 0), T_k) // V.BLOCK_N * V.BLOCK_N
        end = tl.maximum(tl.minimum(m + V.BLOCK_M, T_q) + (T_k - T_q), 0)
    else:
        limit = tl.zeros_like(offs_m) + T_k
        full_end = T_k // V.BLOCK_N * V.BLOCK_N
        end = T_k
    return Range(first, limit, begin, full_begin, full_end, end, T_k)


@triton.jit
def query_range(n, T_q, T_k, left, right, V: tl.constexpr):
    """The queries that see the keys ``n ... n + BLOCK_N``: :func:`key_range` from the other side.

    Key j is seen by the queries from ``first[j - n]`` on, with WINDOW by those before
    ``limit[j - n]``.
    """
    first = n + tl.arange(0, V.BLOCK_N) - (T_k - T_q)
    limit, begin, full_begin, full_end, end = 0, 0, 0, T_q, T_q
    if V.WINDOW:
        limit = first + left + 1
        first -= right
        last = tl.minimum(n + V.BLOCK_N, T_k) - 1 - (T_k - T_q)  # the query at the last key
        begin = tl.maximum(n - (T_k - T_q) - right, 0) // V.BLOCK_M * V.BLOCK_M
        full_begin = tl.cdiv(tl.maximum(last - right, 0), V.BLOCK_M) * V.BLOCK_M
        full_end = tl.maximum(n - (T_k - T_q) + left + 1, 0) // V.BLOCK_M * V.BLOCK_M
        full_end = tl.maximum(full_end, full_begin)
        end = tl.minimum(tl.maximum(last + left + 1, 0), T_q)
    elif V.CAUSAL:
        begin = tl.maximum(n - (T_k - T_q), 0) // V.BLOCK_M * V.BLOCK_M
        last = tl.maximum(n + V.BLOCK_N - 1 - (T_k - T_q), 0)
        full_begin = tl.minimum(tl.cdiv(last, V.BLOCK_M) * V.BLOCK_M, T_q)
    return Range(first, limit, begin, full_begin, full_end, end, T_q)


@triton.jit
def capped(s, cap_scale):
    """``tanh(cap_scale * s)`` to a few units of the last place, also near 0 and far from it.

    ``x p(x²) / q(x²)``, minimax: within 2^-26, relative, but for roundings. All coefficients are
    positive, so nothing cancels. One formula for all scores takes no predicates, of which a thread
    has seven, so the assembler is free to interleave scores.
    """
    x = s * cap_scale
    # Further out tanh is 1. NaN stays NaN, where other minima would return the limit.
    x = tl.maximum(x, -8.6, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, 8.6, propagate_nan=tl.PropagateNan.ALL)
    x2 = x * x
    p = 1.4146482e-08 * x2 + 2.1171425e-05
    p = p * x2 + 0.0035295186
    p = p * x2 + 0.1340955
    p = p * x2 + 1.0
    q = 8.0976547e-07 * x2 + 0.00033412691
    q = q * x2 + 0.026005911
    q = q * x2 + 0.46742876
    q = q * x2 + 1.0
    return x * p * tl.rsqrt(q * q)  # 1 / q: a division would first bring q into its range


@triton.jit
def kept(seed, head, rows, columns, dropout_p):
    """Whether dropout keeps each score: Philox at counter (column, row, head), keyed by ``seed``.

    ``rows`` and ``columns`` broadcast against each other. A function of the position alone, so the
    backward, whatever its tiles, drops what the forward dropped.
    """
    columns, rows = tl.broadcast(columns, rows)
    bits, _, _, _ = tl.philox(seed, columns, rows, head, 0)
    return tl.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def head_offset(b, h, strides, ALIGNMENT: tl.constexpr):
    """``(b * strides.b + h * strides.h) * ALIGNMENT`` in 64 bits."""
    return (tl.cast(b, tl.int64) * strides.b + tl.cast(h, tl.int64) * strides.h) * ALIGNMENT


@triton.jit
def indices_of(row, T, H):
    """Batch, token and head of rows of ``[B, T, H]``, in 64 bits."""
    b = tl.cast(row // (T * H), tl.int64)
    t = tl.cast(row // H % T, tl.int64)
    h = tl.cast(row % H, tl.int64)
    return b, t, h


@triton.jit
def row_at(pointer, strides, b, t, h):
    """Where the row ``[b, t, h]`` begins; the indices are of 64 bits."""
    return pointer + b * strides.b + t * strides.t + h * strides.h


@triton.jit
def token_rows(pointer, row, T, strides):
    """Where rows of ``[B * T, C]``, of which T lie at one stride, begin."""
    rows = pointer + tl.cast(row // T, tl.int64) * strides.b
    rows += tl.cast(row % T, tl.int64) * strides.t
    return rows


@triton.jit
def store_rows(
    pointer,  # to row 0 of this batch and head
    tile,  # [ROWS, BLOCK_D]
    row,
    n_rows,
    stride_t,
    V: tl.constexpr,
):
    """Write rows ``row ... row + ROWS``, up to ``n_rows`` and ``D``, in the pointer's dtype."""
    offs_t = tl.arange(0, tile.shape[0])
    offs_d = tl.arange(0, V.BLOCK_D)
    row_ptr = pointer + tl.cast(row, tl.int64) * stride_t
    mask = (offs_t[:, None] < n_rows - row) & (offs_d[None, :] < V.D)
    pointers = row_ptr + (offs_t[:, None] * stride_t + offs_d[None, :])
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


@cache
def target_of(device: torch.device) -> str:
    """The row of the config table for a device."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "rocm"  # whose capabilities, such as (9, 0), are others
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return target(torch.cuda.get_device_capability(index), properties["max_shared_mem"])


@cache
def processors_of(device: torch.device) -> int:
    """SMs of a GPU; those of an H100 where a kernel is only compiled."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """IEEE float32 products unless PyTorch's own on a GPU may round to TF32."""
    if torch.version.hip is not None:  # TF32 is NVIDIA's
        return "ieee"
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def is_wide(elements: int) -> bool:
    """Whether offsets inside one tile leave the 32-bit range."""
    return elements >= 2**31


def is_aligned(t: Layout, dtype: torch.dtype) -> bool:
    """16-byte aligned base and strides, none of 0: what bulk copies and 16-byte loads need.

    Strides of dims of size 1 count too, so that a batch element alone takes the tiles, and so has
    the bits, that it has among others.
    """
    size = dtype.itemsize
    return (
        t.on_16_bytes
        and 0 not in t.shape
        and all(stride > 0 and stride * size % 16 == 0 for stride in t.strides[:-1])
    )


def block_d_of(D: int) -> int:
    """Lanes of a tile: the head dim rounded up to a power of two that a dot accepts."""
    return max(16, triton.next_power_of_2(D))


def strides_of(t: Layout | None, unit: int = 1) -> Strides:
    """The strides of ``[B, T, H, D]`` in units of ``unit`` elements; 0 for what is absent."""
    return Strides(0, 0, 0) if t is None else Strides(*(s // unit for s in t.strides[:3]))
