"""Tile helpers shared by the stages, and what a launcher needs to describe a tensor to a kernel."""

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from ra_triton.checks import allows_tf32
from ra_triton.kernels.configs import target
from ra_triton.kernels.plans import Bulk, Layout

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)
# What the programs of one section of heads share. On an H200, whose L2 holds 60 MB, sections took
# 6% to 8% off the forward over 50 and 100 MB; a second one over 25 MB would have cost 14%.
SECTION_BYTES = 32 * 2**20


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
def load_rows(
    source,  # descriptor of [B, H, T, D], or pointer to row 0 of this batch and head
    b,
    h,
    row,
    stride_t,  # in units of ALIGNMENT elements
    n_rows,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    USE_TMA: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows ``row ... row + ROWS`` as ``[ROWS, BLOCK_D]``, 0 beyond ``n_rows`` and beyond ``D``."""
    if USE_TMA:
        tile = source.load([b, h, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        offs_t = tl.arange(0, ROWS)
        offs_d = tl.arange(0, BLOCK_D)
        in_tile = offs_t.to(tl.int64) if WIDE else offs_t
        # A scalar base and small in-tile offsets: 2-D pointers carried by a loop spill registers.
        row_ptr = source + tl.cast(row, tl.int64) * stride_t * ALIGNMENT
        pointers = row_ptr + (in_tile[:, None] * stride_t * ALIGNMENT + offs_d[None, :])
        if MASKED:
            mask = (offs_t[:, None] < n_rows - row) & (offs_d[None, :] < D)
            tile = tl.load(pointers, mask=mask, other=0.0)
        elif D < BLOCK_D:
            tile = tl.load(pointers, mask=offs_d[None, :] < D, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def sequence(offsets_ptr, b, total):
    """First token of sequence ``b`` and its length, inside ``total`` tokens whatever is there."""
    begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + b), 0), total)
    end = tl.minimum(tl.maximum(tl.load(offsets_ptr + b + 1), begin), total)
    return begin, end - begin


@triton.jit
def key_range(
    m,
    T_q,
    T_k,
    left,
    right,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Which keys the queries ``m ... m + BLOCK_M`` see.

    Query i stands at key position i + T_k - T_q. It sees the keys before ``key_limit[i - m]``, with
    WINDOW those from ``first_key[i - m]`` on. Key tiles in ``begin ... end`` are seen at all, those
    in ``whole ... unmasked`` whole and by all of the queries.
    """
    offs_m = m + tl.arange(0, BLOCK_M)
    first_key, begin, whole = 0, 0, 0
    if WINDOW:
        first_key = offs_m + (T_k - T_q) - left
        key_limit = tl.minimum(offs_m + 1 + (T_k - T_q) + right, T_k)
        last = tl.minimum(m + BLOCK_M, T_q) - 1 + (T_k - T_q)  # position of the last query
        begin = tl.maximum(m + (T_k - T_q) - left, 0) // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.maximum(last - left, 0), BLOCK_N) * BLOCK_N
        unmasked = tl.minimum(tl.maximum(m + 1 + (T_k - T_q) + right, 0), T_k) // BLOCK_N * BLOCK_N
        unmasked = tl.maximum(unmasked, whole)
        end = tl.minimum(tl.maximum(last + 1 + right, 0), T_k)
    elif CAUSAL:
        key_limit = tl.minimum(offs_m + 1 + (T_k - T_q), T_k)
        unmasked = tl.minimum(tl.maximum(m + 1 + (T_k - T_q), 0), T_k) // BLOCK_N * BLOCK_N
        end = tl.maximum(tl.minimum(m + BLOCK_M, T_q) + (T_k - T_q), 0)
    else:
        key_limit = tl.full([BLOCK_M], 0, tl.int32) + T_k
        unmasked = T_k // BLOCK_N * BLOCK_N
        end = T_k
    return first_key, key_limit, begin, whole, unmasked, end


@triton.jit
def query_range(
    n,
    T_q,
    T_k,
    left,
    right,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Which queries see the keys ``n ... n + BLOCK_N``: :func:`key_range` from the other side.

    Key j is seen by the queries from ``first_query[j - n]`` on, with WINDOW by those before
    ``query_limit[j - n]``. Query tiles in ``begin ... end`` see any of the keys, those in
    ``whole ... unmasked`` all of them.
    """
    first_query = n + tl.arange(0, BLOCK_N) - (T_k - T_q)
    query_limit, begin, whole, unmasked, end = 0, 0, 0, T_q, T_q
    if WINDOW:
        query_limit = first_query + left + 1
        first_query -= right
        last = tl.minimum(n + BLOCK_N, T_k) - 1 - (T_k - T_q)  # the query at the last key
        begin = tl.maximum(n - (T_k - T_q) - right, 0) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(last - right, 0), BLOCK_M) * BLOCK_M
        unmasked = tl.maximum(n - (T_k - T_q) + left + 1, 0) // BLOCK_M * BLOCK_M
        unmasked = tl.maximum(unmasked, whole)
        end = tl.minimum(tl.maximum(last + left + 1, 0), T_q)
    elif CAUSAL:
        begin = tl.maximum(n - (T_k - T_q), 0) // BLOCK_M * BLOCK_M
        last = tl.maximum(n + BLOCK_N - 1 - (T_k - T_q), 0)
        whole = tl.minimum(tl.cdiv(last, BLOCK_M) * BLOCK_M, T_q)
    return first_query, query_limit, begin, whole, unmasked, end


@triton.jit
def capped(s, cap_scale):
    """``tanh(cap_scale * s)`` to a few units of the last place, also near 0 and far from it."""
    x = s * cap_scale
    # Near 0 the quotient cancels. The odd polynomial, minimax there, is within half a unit.
    x2 = x * x
    near = 0.016232982 * x2 - 0.052565154
    near = near * x2 + 0.1331908
    near = near * x2 - 0.33332875
    near = x + x * (x2 * near)
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))  # in 0 ... 1, however large x is
    far = 1 - 2 * e / (1 + e)
    return tl.where(x2 < 0.5625 * 0.5625, near, tl.where(x < 0, -far, far))


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
def head_offset(b, h, stride_b, stride_h, ALIGNMENT: tl.constexpr):
    """``(b * stride_b + h * stride_h) * ALIGNMENT`` in 64 bits."""
    return (tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h) * ALIGNMENT


@triton.jit
def store_rows(
    pointer,  # to row 0 of this batch and head
    tile,  # [ROWS, BLOCK_D]
    row,
    stride_t,
    n_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write rows ``row ... row + ROWS``, up to ``n_rows`` and ``D``, in the pointer's dtype."""
    offs_t = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    row_ptr = pointer + tl.cast(row, tl.int64) * stride_t
    mask = (offs_t[:, None] < n_rows - row) & (offs_d[None, :] < D)
    pointers = row_ptr + (offs_t[:, None] * stride_t + offs_d[None, :])
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


def heads_per_section(n_heads: int, bytes_per_head: int) -> int:
    """Heads that :func:`head_and_tile` takes at a time, in sections of about the same size."""
    sections = max(1, triton.cdiv(n_heads * bytes_per_head, SECTION_BYTES))
    return triton.cdiv(n_heads, sections)


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


def score_arguments(D: int, softmax_scale: float | None, softcap: float) -> dict[str, Any]:
    """How scores become exponents of 2, for the kernels of attention."""
    scale = 1 / math.sqrt(D) if softmax_scale is None else softmax_scale
    return {
        "scale_log2": (softcap or scale) * LOG2E.value,
        "cap_scale": scale / softcap if softcap else 1.0,
        "SOFTCAP": softcap > 0,
    }


def mask_arguments(
    T_q: int, T_k: int, causal: bool, window_size: tuple[int, int]
) -> dict[str, Any]:
    """Which keys a query sees, for the kernels of attention; causal alone is not a window."""
    left, right = window_size
    right = 0 if causal else right
    return {
        "left": left if 0 <= left < T_k else T_k,  # no query has more keys before it
        "right": right if 0 <= right < T_q else T_q,
        "CAUSAL": (left < 0) and right == 0,
        "WINDOW": left >= 0 or right > 0,
    }


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


def as_tokens(t: Layout) -> Layout:
    """``[1, total, H, D]`` with a batch stride of 0: every sequence begins at an offset."""
    return t._replace(strides=(0, *t.strides[1:]))


def as_one_batch(x: Layout) -> Layout:
    """``[B, T, C]`` as ``[1, B*T, C]`` where all rows follow each other at one stride."""
    (B, T, C), (stride_b, stride_t, stride_c) = x.shape, x.strides
    if B == 1 or stride_b == T * stride_t:
        return Layout((1, B * T, C), (0, stride_t, stride_c), x.on_16_bytes)
    return x


def rows_in_bulk(t: Layout, rows: int) -> Bulk:
    """``[B, T, H, D]`` as :func:`load_rows` reads it: ``rows`` of one head of ``[B, H, T, D]``."""
    (B, T, H, D), (b, t_, h, d) = t.shape, t.strides
    return Bulk((B, H, T, D), (b, h, t_, d), (1, 1, rows, block_d_of(D)))


def strides_by_name(unit: int = 1, **tensors: Layout | None) -> dict[str, int]:
    """``{"stride_qb": ..., "stride_qt": ..., "stride_qh": ...}`` for ``q=...``, in ``unit``s."""
    return {
        f"stride_{name}{dim}": 0 if t is None else t.strides[i] // unit
        for name, t in tensors.items()
        for i, dim in enumerate("bth")
    }
