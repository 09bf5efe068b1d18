"""Lane exchange, RMS norm and rotation (RoPE) of q and k in one pass, in place or not.

    p = [x_std | low]        n = p / sqrt(mean(p²) + eps) * weight
    y = [a cos - b sin | b cos + a sin | rest]        [a | b | rest] = n, a and b of ROPE / 2 lanes

q ``[B, T, H, D]``, k ``[B, T, H_kv, D]``; low lanes, norm and rotation are each optional. cos and
sin ``[T_max, ROPE / 2]``; token t of sequence b stands at row t, ``positions[b] + t`` or
``positions[b, t]``, and beyond the tables its rotated lanes are NaN. Grid ``(row tiles, 2)``, a row
being one token of one head: column 0 does q, column 1 does k. In place, lanes that do not change
are neither read nor written. Each thread stores where it has loaded before: both halves and the
rest are tiles of their own, so that one thread holds a pair of lanes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.call.norm_rope import NormRope
from ra_triton.kernels.lanes.norm_rope_tiles import (
    angles,
    common_arguments,
    dtypes_of,
    packed_lanes,
    store_lanes,
    weight_lanes,
)
from ra_triton.kernels.tiles import follow, indices_of, row_at, target_of
from ra_triton.launch.configs import launch_config
from ra_triton.launch.plans import Layout, Plan, layout_of, planned


@triton.jit
def _norm_rope_rows(
    x_ptr,
    low_ptr,
    out_ptr,
    weight_ptr,
    tables,  # cos, sin, positions
    x_strides,
    low_strides,
    out_strides,
    strides,
    n_rows,
    T,
    H,
    T_max,
    eps,
    V: tl.constexpr,
):
    """``y = rotate(p / sqrt(mean(p²) + eps) * weight)`` of ``ROWS`` rows."""
    D: tl.constexpr = V.D
    R: tl.constexpr = V.R
    ROPE: tl.constexpr = V.ROPE
    PAIRS: tl.constexpr = ROPE // 2
    REST_FROM: tl.constexpr = V.REST_FROM
    OTHERS: tl.constexpr = D - REST_FROM
    ROWS: tl.constexpr = V.ROWS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, t, h = indices_of(row[:, None], T, H)
    rows = (row < n_rows)[:, None]
    x_rows = row_at(x_ptr, x_strides, b, t, h)
    low_rows = row_at(low_ptr, low_strides, b, t, h) if R > 0 else x_rows
    out_rows = row_at(out_ptr, out_strides, b, t, h)
    if ROPE > 0:
        first = packed_lanes(x_rows, low_rows, rows, 0, PAIRS, D, R, V.HALF)
        second = packed_lanes(x_rows, low_rows, rows, PAIRS, PAIRS, D, R, V.HALF)
    if OTHERS > 0:
        rest = packed_lanes(x_rows, low_rows, rows, REST_FROM, OTHERS, D, R, V.REST)
    if V.NORM:
        squares = tl.zeros([ROWS], tl.float32)
        if ROPE > 0:
            squares += tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if OTHERS > 0:
            squares += tl.sum(rest * rest, 1)
        r = tl.rsqrt(squares * (1.0 / D) + eps)[:, None]
        if ROPE > 0:
            first *= r
            second *= r
            if V.WEIGHTED:
                first *= weight_lanes(weight_ptr, 0, PAIRS, V.HALF)
                second *= weight_lanes(weight_ptr, PAIRS, PAIRS, V.HALF)
        if OTHERS > 0:
            rest *= r
            if V.WEIGHTED:
                rest *= weight_lanes(weight_ptr, REST_FROM, OTHERS, V.REST)
    if ROPE > 0:
        cos, sin = angles(tables, strides, b, t, rows, T_max, V)
        store_lanes(out_rows, first * cos - second * sin, rows, 0, PAIRS, V.HALF)
        store_lanes(out_rows, second * cos + first * sin, rows, PAIRS, PAIRS, V.HALF)
    if OTHERS > 0:
        store_lanes(out_rows, rest, rows, REST_FROM, OTHERS, V.REST)


@triton.jit
def _norm_rope_kernel(
    q_ptr,
    k_ptr,
    q_low_ptr,
    k_low_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    q_out_ptr,
    k_out_ptr,
    strides,
    sizes,
    eps,
    V: tl.constexpr,
):
    """Queries carry K_low, keys carry Q_low."""
    follow(V.PDL)
    B, T, H, H_kv, T_max = sizes
    tables = (cos_ptr, sin_ptr, position_ptr)
    if tl.program_id(1) == 0:
        pointers = (q_ptr, k_low_ptr, q_out_ptr, q_weight_ptr, tables)
        places = (strides.q, strides.k_low, strides.qx, strides)
        _norm_rope_rows(*pointers, *places, B * T * H, T, H, T_max, eps, V)
    else:
        pointers = (k_ptr, q_low_ptr, k_out_ptr, k_weight_ptr, tables)
        places = (strides.k, strides.q_low, strides.kx, strides)
        _norm_rope_rows(*pointers, *places, B * T * H_kv, T, H_kv, T_max, eps, V)


def norm_rope(call: NormRope) -> tuple[Tensor, Tensor]:
    """New contiguous ``q [B, T, H, D]`` and ``k [B, T, H_kv, D]``."""
    q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (call.q, call.k))
    _launch(call, q_out, k_out, in_place=False)
    return q_out, k_out


def norm_rope_(call: NormRope) -> None:
    """Overwrites q and k, which overlap no other tensor of the call."""
    _launch(call, call.q, call.k, in_place=True)


def _launch(call: NormRope, q_out: Tensor, k_out: Tensor, *, in_place: bool) -> None:
    if call.q.numel() + call.k.numel() == 0:
        return
    # With a norm all lanes change; without, those that turn and those that are exchanged.
    touched = call.q.shape[-1] - call.R if in_place and call.eps is None else 0
    tensors = (*call[:9], q_out, k_out)
    layouts = tuple(None if t is None else layout_of(t) for t in tensors)
    target = target_of(call.q.device)
    _plan(call.q.device, dtypes_of(call), layouts, call.rope_dims, touched, call.eps, target)(
        *tensors
    )


@planned
def _plan(
    device: torch.device,
    dtypes: tuple[torch.dtype | None, ...],
    layouts: tuple[Layout | None, ...],
    rope_dims: int,
    touched: int,
    eps: float | None,
    target: str,
) -> Plan:
    """The launch for tensors of these layouts, in the order of the kernel's arguments."""
    q, k = layouts[:2]
    assert q is not None
    assert k is not None
    B, T, H, D = q.shape
    config = launch_config("norm_rope", D, dtypes[0], target, False)  # type: ignore[arg-type]
    arguments = common_arguments(layouts, rope_dims, max(rope_dims, touched), eps, config)
    grid = (triton.cdiv(B * T * max(H, k.shape[2]), config.block_m), 2)
    return Plan(_norm_rope_kernel, grid, arguments)
