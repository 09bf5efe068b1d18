"""What the forward and the backward of ``norm_rope`` share: lanes of heads, angles, arguments."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ra_triton.call.norm_rope import NormRope
from ra_triton.kernels.tiles import Strides, strides_of
from ra_triton.launch.configs import LaunchConfig
from ra_triton.launch.plans import Layout

MIN_LANES = 16  # of a tile, so that no two threads of a CTA hold the same element


class Positions(NamedTuple):
    """Strides of ``[B]`` or ``[B, T]``."""

    b: int = 0
    t: int = 0


class NormRopeStrides(NamedTuple):
    """Of what forward and backward read; x is y in the forward and dy in the backward."""

    q: Strides
    k: Strides
    q_low: Strides
    k_low: Strides
    qx: Strides
    kx: Strides
    cos: int  # from row to row
    sin: int
    positions: Positions


class Sizes(NamedTuple):
    """Of q ``[B, T, H, D]``, k ``[B, T, H_kv, D]``, cos and sin ``[T_max, ROPE / 2]``."""

    B: int
    T: int
    H: int
    H_kv: int
    T_max: int


class Variant(NamedTuple):
    """What the compiled code depends on."""

    D: int
    R: int
    ROPE: int
    REST_FROM: int  # lanes in between stay as they are
    NORM: bool
    WEIGHTED: bool
    POSITIONS: int  # 0: t, 1: positions[b] + t, 2: positions[b, t]
    ROWS: int
    HALF: int  # lanes of a tile of half the rotated ones
    REST: int  # and of a tile of the rest
    PDL: bool


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
def angles(tables, strides, b, t, rows, T_max, V: tl.constexpr):
    """``cos, sin`` at the position of each row, ``[ROWS, HALF]`` float32; NaN beyond the tables."""
    cos_ptr, sin_ptr, position_ptr = tables
    at = t
    if V.POSITIONS > 0:
        place = b * strides.positions.b + t * strides.positions.t
        at = tl.load(position_ptr + place, mask=rows, other=0).to(tl.int64)
        if V.POSITIONS == 1:
            at += t
    known = rows & (at >= 0) & (at < T_max)
    pair = tl.arange(0, V.HALF)[None, :]
    mask = known & (pair < V.ROPE // 2)
    cos = tl.load(cos_ptr + at * strides.cos + pair, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at * strides.sin + pair, mask=mask, other=0.0).to(tl.float32)
    if V.POSITIONS > 0:
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
    layouts: tuple[Layout | None, ...],
    rope_dims: int,
    rest_from: int,
    eps: float | None,
    config: LaunchConfig,
) -> dict[str, Any]:
    """What forward and backward get; layouts in the order of a :class:`NormRope`, then y or dy."""
    q, k, q_low, k_low, q_weight, _, cos, sin, positions, qx, kx = layouts[:11]
    assert q is not None
    assert k is not None
    B, T, H, D = q.shape
    return {
        "strides": NormRopeStrides(
            q=strides_of(q),
            k=strides_of(k),
            q_low=strides_of(q_low),
            k_low=strides_of(k_low),
            qx=strides_of(qx),
            kx=strides_of(kx),
            cos=0 if cos is None else cos.strides[0],
            sin=0 if sin is None else sin.strides[0],
            positions=Positions(*() if positions is None else positions.strides),
        ),
        "sizes": Sizes(B, T, H, k.shape[2], 0 if cos is None else cos.shape[0]),
        "eps": 0.0 if eps is None else eps,
        "V": Variant(
            D=D,
            R=0 if q_low is None else q_low.shape[-1],
            ROPE=rope_dims,
            REST_FROM=rest_from,
            NORM=eps is not None,
            WEIGHTED=q_weight is not None,
            POSITIONS=0 if positions is None else len(positions.shape),
            ROWS=config.block_m,
            HALF=lanes_of(rope_dims // 2),
            REST=lanes_of(D - rest_from),
            PDL=config.pdl,
        ),
        **config.compiler_options,
    }


def lanes_of(count: int) -> int:
    """Lanes of a tile that holds ``count`` of them."""
    return max(MIN_LANES, triton.next_power_of_2(max(count, 1)))
