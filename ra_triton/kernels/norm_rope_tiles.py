"""What the forward and the backward of ``norm_rope`` share: lanes of heads, angles, arguments."""

from typing import Any

import torch
import triton
import triton.language as tl

from ra_triton.kernels.configs import LaunchConfig
from ra_triton.kernels.plans import Layout
from ra_triton.norm_rope import NormRope

MIN_LANES = 16  # of a tile, so that no two threads of a CTA hold the same element


@triton.jit
def packed_lanes(
    x_rows,
    low_rows,
    rows,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
):
    """``[x_std | low][FIRST : FIRST + COUNT]`` of each row, in float32; 0 where masked."""
    lane = FIRST + tl.arange(0, LANES)[None, :]
    mask = rows & (lane < FIRST + COUNT)
    if FIRST + COUNT <= D - R:
        value = tl.load(x_rows + lane, mask=mask, other=0.0)
    else:
        is_low = lane >= D - R
        value = tl.load(low_rows + (lane - (D - R)), mask=mask & is_low, other=0.0)
        if FIRST < D - R:
            std = tl.load(x_rows + lane, mask=mask & ~is_low, other=0.0)
            value = tl.where(is_low, value, std)
    return value.to(tl.float32)


@triton.jit
def weight_lanes(weight_ptr, FIRST: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr):
    """``weight[FIRST : FIRST + COUNT]`` as a row, in float32."""
    lane = FIRST + tl.arange(0, LANES)[None, :]
    return tl.load(weight_ptr + lane, mask=lane < FIRST + COUNT, other=0.0).to(tl.float32)


@triton.jit
def angles(
    cos_ptr,
    sin_ptr,
    position_ptr,
    b,
    t,
    rows,
    stride_ct,
    stride_st,
    stride_pb,
    stride_pt,
    T_max,
    ROPE: tl.constexpr,
    POSITIONS: tl.constexpr,  # 0: t, 1: positions[b] + t, 2: positions[b, t]
    HALF: tl.constexpr,
):
    """``cos, sin`` at the position of each row, ``[ROWS, HALF]`` float32; NaN beyond the tables."""
    at = t
    if POSITIONS > 0:
        at = tl.load(position_ptr + b * stride_pb + t * stride_pt, mask=rows, other=0)
        at = at.to(tl.int64)
        if POSITIONS == 1:
            at += t
    known = rows & (at >= 0) & (at < T_max)
    pair = tl.arange(0, HALF)[None, :]
    mask = known & (pair < ROPE // 2)
    cos = tl.load(cos_ptr + at * stride_ct + pair, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at * stride_st + pair, mask=mask, other=0.0).to(tl.float32)
    if POSITIONS > 0:
        cos = tl.where(rows & ~known, float("nan"), cos)
    return cos, sin


@triton.jit
def store_lanes(
    out_rows,
    value,
    rows,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    LANES: tl.constexpr,
):
    """``out[FIRST : FIRST + COUNT] = value``, in the pointer's dtype."""
    lane = FIRST + tl.arange(0, LANES)[None, :]
    value = value.to(out_rows.dtype.element_ty)
    tl.store(out_rows + lane, value, mask=rows & (lane < FIRST + COUNT))


def dtypes_of(call: NormRope) -> tuple[torch.dtype | None, ...]:
    """What a plan depends on besides layouts: dtypes of operands, weights, tables, positions."""
    tensors = (call.q, call.q_weight, call.k_weight, call.cos, call.positions)
    return tuple(None if t is None else t.dtype for t in tensors)


def common_arguments(
    layouts: tuple[Layout | None, ...], rope_dims: int, eps: float | None, config: LaunchConfig
) -> dict[str, Any]:
    """What forward and backward tell their kernels; layouts in the order of a :class:`NormRope`."""
    q, k, q_low, _, q_weight, _, cos, sin, positions = layouts[:9]
    assert q is not None
    assert k is not None
    B, T, H, D = q.shape
    position_strides = (0, 0) if positions is None else (*positions.strides, 0)[:2]
    return {
        "stride_ct": 0 if cos is None else cos.strides[0],
        "stride_st": 0 if sin is None else sin.strides[0],
        "stride_pb": position_strides[0],
        "stride_pt": position_strides[1],
        "B": B,
        "T": T,
        "H": H,
        "H_kv": k.shape[2],
        "T_max": 0 if cos is None else cos.shape[0],
        "eps": 0.0 if eps is None else eps,
        "D": D,
        "R": 0 if q_low is None else q_low.shape[-1],
        "ROPE": rope_dims,
        "NORM": eps is not None,
        "WEIGHTED": q_weight is not None,
        "POSITIONS": 0 if positions is None else len(positions.shape),
        "ROWS": config.block_m,
        "HALF": lanes_of(rope_dims // 2),
        **config.options,
    }


def lanes_of(count: int) -> int:
    """Lanes of a tile that holds ``count`` of them."""
    return max(MIN_LANES, triton.next_power_of_2(max(count, 1)))
