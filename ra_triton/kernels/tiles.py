"""Tile helpers shared by the stages, and what a launcher needs to describe a tensor to a kernel."""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ra_triton.kernels.configs import target

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` in float32; the interpreter would multiply bf16 bit patterns, so it widens."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


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
def key_range(m, T_q, T_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys the queries ``m ... m + BLOCK_M`` see.

    Query i stands at key position i + T_k - T_q and sees the keys before ``key_limit[i - m]``; key
    tiles before ``unmasked`` are seen whole by all of them, those from there to ``end`` in part.
    """
    offs_m = m + tl.arange(0, BLOCK_M)
    if CAUSAL:
        key_limit = tl.minimum(offs_m + 1 + (T_k - T_q), T_k)
        unmasked = tl.minimum(tl.maximum(m + 1 + (T_k - T_q), 0), T_k) // BLOCK_N * BLOCK_N
        end = tl.maximum(tl.minimum(m + BLOCK_M, T_q) + (T_k - T_q), 0)
    else:
        key_limit = tl.full([BLOCK_M], 0, tl.int32) + T_k
        unmasked = T_k // BLOCK_N * BLOCK_N
        end = T_k
    return key_limit, unmasked, end


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


@cache
def target_of(device: torch.device) -> str:
    """The row of the config table for a device."""
    if INTERPRETED:
        return "interpreter"
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return target(torch.cuda.get_device_capability(index), properties["max_shared_mem"])


def dot_precision(dtype: torch.dtype) -> str:
    """IEEE float32 products unless the user has allowed TF32 in PyTorch."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def is_wide(elements: int) -> bool:
    """Whether offsets inside one tile leave the 32-bit range."""
    return elements >= 2**31


def is_aligned(t: Tensor) -> bool:
    """16-byte aligned base and strides, none of 0: what bulk copies and 16-byte loads need.

    Strides of dims of size 1 count too, so that a batch element alone takes the tiles, and so has
    the bits, that it has among others.
    """
    size = t.element_size()
    return (
        t.data_ptr() % 16 == 0
        and t.numel() > 0
        and all(stride > 0 and stride * size % 16 == 0 for stride in t.stride()[:-1])
    )


def block_d_of(D: int) -> int:
    """Lanes of a tile: the head dim rounded up to a power of two that a dot accepts."""
    return max(16, triton.next_power_of_2(D))


def row_source(t: Tensor, rows: int, use_tma: bool) -> Tensor | TensorDescriptor:
    """``t [B, T, H, D]`` as :func:`load_rows` reads it: itself, or a descriptor of ``rows``."""
    if not use_tma:
        return t
    return descriptor(t.transpose(1, 2), [1, 1, rows, block_d_of(t.shape[-1])])


def descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    """Host descriptor of a tensor that :func:`is_aligned`."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block)
