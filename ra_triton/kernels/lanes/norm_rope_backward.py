"""Gradient of ``norm_rope``: rotate back, undo norm and weight, return the low lanes.

    dn = weight * rotateᵀ(dy)      dp = r (dn - n mean(dn n))      dweight = Σ_rows rotateᵀ(dy) n
    n = p r,  r = 1 / sqrt(mean(p²) + eps),  p = [x_std | low]

``[dx_std | 0]`` and ``dlow`` are written for q and k; the norm is computed again from the inputs.
Sums over rows go through a row of partial sums for each tile, ``[tiles, 2, D]`` float32, which are
added in a fixed order: no atomics. Grid and tiles are those of the forward.
"""

from collections.abc import Sequence

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
def _store_sums(sums_ptr, terms, FIRST: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr):
    """``sums[FIRST : FIRST + COUNT] = Σ_rows terms``."""
    lane = FIRST + tl.arange(0, LANES)
    tl.store(sums_ptr + lane, tl.sum(terms, 0), mask=lane < FIRST + COUNT)


@triton.jit
def _store_gradient(
    dx_rows,
    dlow_rows,
    value,
    rows,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
):
    """``dx = [value_std | 0]``, ``dlow = value_low``."""
    if FIRST + COUNT <= D - R:
        store_lanes(dx_rows, value, rows, FIRST, COUNT, LANES)
    else:
        lane = FIRST + tl.arange(0, LANES)[None, :]
        is_low = lane >= D - R
        store_lanes(dx_rows, tl.where(is_low, 0.0, value), rows, FIRST, COUNT, LANES)
        mask = rows & is_low & (lane < FIRST + COUNT)
        value = value.to(dlow_rows.dtype.element_ty)
        tl.store(dlow_rows + (lane - (D - R)), value, mask=mask)


@triton.jit
def _norm_rope_backward_rows(
    x_ptr,
    low_ptr,
    dy_ptr,
    dx_ptr,
    dlow_ptr,
    weight_ptr,
    sums_ptr,
    tables,  # cos, sin, positions
    x_strides,
    low_strides,
    dy_strides,
    strides,
    n_rows,
    T,
    H,
    T_max,
    eps,
    V: tl.constexpr,
):
    """``dp = r (dn - n mean(dn n))``, ``dn = weight * rotateᵀ(dy)``; dx and dlow are contiguous."""
    D: tl.constexpr = V.D
    R: tl.constexpr = V.R
    ROPE: tl.constexpr = V.ROPE
    PAIRS: tl.constexpr = ROPE // 2
    OTHERS: tl.constexpr = D - ROPE
    ROWS: tl.constexpr = V.ROWS
    HALF: tl.constexpr = V.HALF
    REST: tl.constexpr = V.REST
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, t, h = indices_of(row[:, None], T, H)
    rows = (row < n_rows)[:, None]
    x_rows = row_at(x_ptr, x_strides, b, t, h)
    low_rows = x_rows
    dx_rows = dx_ptr + tl.cast(row, tl.int64)[:, None] * D
    dlow_rows = dx_rows
    if R > 0:
        low_rows = row_at(low_ptr, low_strides, b, t, h)
        dlow_rows = dlow_ptr + tl.cast(row, tl.int64)[:, None] * R
    dy_rows = row_at(dy_ptr, dy_strides, b, t, h)
    if ROPE > 0:
        cos, sin = angles(tables, strides, b, t, rows, T_max, V)
        dy_first = packed_lanes(dy_rows, dy_rows, rows, 0, PAIRS, D, 0, HALF)
        dy_second = packed_lanes(dy_rows, dy_rows, rows, PAIRS, PAIRS, D, 0, HALF)
        d_first = dy_first * cos + dy_second * sin
        d_second = dy_second * cos - dy_first * sin
    if OTHERS > 0:
        d_rest = packed_lanes(dy_rows, dy_rows, rows, ROPE, OTHERS, D, 0, REST)
    if V.NORM:
        squares = tl.zeros([ROWS], tl.float32)
        if ROPE > 0:
            first = packed_lanes(x_rows, low_rows, rows, 0, PAIRS, D, R, HALF)
            second = packed_lanes(x_rows, low_rows, rows, PAIRS, PAIRS, D, R, HALF)
            squares += tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if OTHERS > 0:
            rest = packed_lanes(x_rows, low_rows, rows, ROPE, OTHERS, D, R, REST)
            squares += tl.sum(rest * rest, 1)
        r = tl.rsqrt(squares * (1.0 / D) + eps)[:, None]
        along = tl.zeros([ROWS], tl.float32)
        if ROPE > 0:
            first *= r
            second *= r
            if V.WEIGHTED:
                _store_sums(sums_ptr, d_first * first, 0, PAIRS, HALF)
                _store_sums(sums_ptr, d_second * second, PAIRS, PAIRS, HALF)
                d_first *= weight_lanes(weight_ptr, 0, PAIRS, HALF)
                d_second *= weight_lanes(weight_ptr, PAIRS, PAIRS, HALF)
            along += tl.sum(d_first * first, 1) + tl.sum(d_second * second, 1)
        if OTHERS > 0:
            rest *= r
            if V.WEIGHTED:
                _store_sums(sums_ptr, d_rest * rest, ROPE, OTHERS, REST)
                d_rest *= weight_lanes(weight_ptr, ROPE, OTHERS, REST)
            along += tl.sum(d_rest * rest, 1)
        mean = (along * (1.0 / D))[:, None]
        if ROPE > 0:
            d_first = r * (d_first - first * mean)
            d_second = r * (d_second - second * mean)
        if OTHERS > 0:
            d_rest = r * (d_rest - rest * mean)
    if ROPE > 0:
        _store_gradient(dx_rows, dlow_rows, d_first, rows, 0, PAIRS, D, R, HALF)
        _store_gradient(dx_rows, dlow_rows, d_second, rows, PAIRS, PAIRS, D, R, HALF)
    if OTHERS > 0:
        _store_gradient(dx_rows, dlow_rows, d_rest, rows, ROPE, OTHERS, D, R, REST)


@triton.jit
def _norm_rope_backward_kernel(
    q_ptr,
    k_ptr,
    q_low_ptr,
    k_low_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    dq_out_ptr,
    dk_out_ptr,
    dq_ptr,
    dk_ptr,
    dq_low_ptr,
    dk_low_ptr,
    sums_ptr,
    strides,
    sizes,
    eps,
    V: tl.constexpr,
):
    """Queries gave their low lanes to K_low, keys to Q_low."""
    follow(V.PDL)
    B, T, H, H_kv, T_max = sizes
    if V.WEIGHTED:
        sums_ptr += (tl.cast(tl.program_id(0), tl.int64) * 2 + tl.program_id(1)) * V.D
    shared = (sums_ptr, (cos_ptr, sin_ptr, position_ptr))
    if tl.program_id(1) == 0:
        pointers = (q_ptr, k_low_ptr, dq_out_ptr, dq_ptr, dk_low_ptr, q_weight_ptr)
        places = (strides.q, strides.k_low, strides.qx, strides)
        _norm_rope_backward_rows(*pointers, *shared, *places, B * T * H, T, H, T_max, eps, V)
    else:
        pointers = (k_ptr, q_low_ptr, dk_out_ptr, dk_ptr, dq_low_ptr, k_weight_ptr)
        places = (strides.k, strides.q_low, strides.kx, strides)
        _norm_rope_backward_rows(*pointers, *shared, *places, B * T * H_kv, T, H_kv, T_max, eps, V)


def norm_rope_backward(
    call: NormRope, dq_out: Tensor, dk_out: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``q, k, q_low, k_low, q_weight, k_weight``, each only if needed."""
    q, k, q_weight, k_weight = call.q, call.k, call.q_weight, call.k_weight
    dq_out, dk_out = (t if t.stride(-1) == 1 else t.contiguous() for t in (dq_out, dk_out))
    dq, dk, dq_low, dk_low = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in call[:4]
    )
    D = q.shape[-1]
    target = target_of(q.device)
    rows = launch_config("norm_rope_backward", D, q.dtype, target, False).block_m
    tiles = triton.cdiv(q.shape[0] * q.shape[1] * max(q.shape[2], k.shape[2]), rows)
    sums = None
    if q_weight is not None:
        sums = torch.empty(tiles, 2, D, dtype=torch.float32, device=q.device)
    if tiles and D:
        tensors = (*call[:9], dq_out, dk_out, dq, dk, dq_low, dk_low, sums)
        layouts = tuple(None if t is None else layout_of(t) for t in tensors)
        _plan(q.device, dtypes_of(call), layouts, call.rope_dims, call.eps, tiles, target)(*tensors)
    dweights: list[Tensor | None] = [None, None]
    if sums is not None:
        dweights = [
            sums[:, i].sum(0).to(w.dtype)
            for i, w in enumerate((q_weight, k_weight))
            if w is not None
        ]
    grads = (dq, dk, dq_low, dk_low, *dweights)
    return tuple(t if need else None for t, need in zip(grads, needed, strict=True))


@planned
def _plan(
    device: torch.device,
    dtypes: tuple[torch.dtype | None, ...],
    layouts: tuple[Layout | None, ...],
    rope_dims: int,
    eps: float | None,
    tiles: int,
    target: str,
) -> Plan:
    """The launch for tensors of these layouts, in the order of the kernel's arguments."""
    assert layouts[0] is not None
    D = layouts[0].shape[-1]
    config = launch_config("norm_rope_backward", D, dtypes[0], target, False)  # type: ignore[arg-type]
    arguments = common_arguments(layouts, rope_dims, rope_dims, eps, config)
    return Plan(_norm_rope_backward_kernel, (tiles, 2), arguments)
