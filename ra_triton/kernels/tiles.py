"""Tile helpers shared by the stages, and what a launcher needs to describe a tensor to a kernel."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ra_triton.kernels.configs import target

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
    """16-byte aligned base and strides, none of 0: what bulk copies and 16-byte loads need."""
    size = t.element_size()
    return (
        t.data_ptr() % 16 == 0
        and t.numel() > 0
        and all(
            stride > 0 and stride * size % 16 == 0
            for stride, n in zip(t.stride()[:-1], t.shape[:-1], strict=True)
            if n > 1
        )
    )


def descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    """Host descriptor of a tensor that :func:`is_aligned`."""
    # The stride of a dim of size 1 is never used; any valid one will do.
    strides = [s if n > 1 else t.shape[-1] * 16 for s, n in zip(t.stride(), t.shape, strict=True)]
    strides[-1] = 1
    return TensorDescriptor(t, list(t.shape), strides, block)
