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

from ra_triton.kernels.configs import launch_config
from ra_triton.kernels.norm_rope_tiles import (
    angles,
    common_arguments,
    dtypes_of,
    lanes_of,
    packed_lanes,
    store_lanes,
    weight_lanes,
)
from ra_triton.kernels.plans import Layout, Plan, layout_of, planned
from ra_triton.kernels.tiles import follow, strides_by_name, target_of
from ra_triton.norm_rope import NormRope


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
    sums_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_lb,
    stride_lt,
    stride_lh,
    stride_dyb,
    stride_dyt,
    stride_dyh,
    stride_ct,
    stride_st,
    stride_pb,
    stride_pt,
    n_rows,
    T,
    H,
    T_max,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """``dp = r (dn - n mean(dn n))``, ``dn = weight * rotateᵀ(dy)``; dx and dlow are contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.cast(row // (T * H), tl.int64)[:, None]
    t = tl.cast(row // H % T, tl.int64)[:, None]
    h = tl.cast(row % H, tl.int64)[:, None]
    rows = (row < n_rows)[:, None]
    x_rows = x_ptr + b * stride_xb + t * stride_xt + h * stride_xh
    low_rows = x_rows
    dx_rows = dx_ptr + tl.cast(row, tl.int64)[:, None] * D
    dlow_rows = dx_rows
    if R > 0:
        low_rows = low_ptr + b * stride_lb + t * stride_lt + h * stride_lh
        dlow_rows = dlow_ptr + tl.cast(row, tl.int64)[:, None] * R
    dy_rows = dy_ptr + b * stride_dyb + t * stride_dyt + h * stride_dyh
    PAIRS: tl.constexpr = ROPE // 2
    OTHERS: tl.constexpr = D - ROPE
    if ROPE > 0:
        cos, sin = angles(
            cos_ptr, sin_ptr, position_ptr, b, t, rows,
            stride_ct, stride_st, stride_pb, stride_pt, T_max, ROPE, POSITIONS, HALF,
        )  # fmt: skip
        dy_first = packed_lanes(dy_rows, dy_rows, rows, 0, PAIRS, D, 0, HALF)
        dy_second = packed_lanes(dy_rows, dy_rows, rows, PAIRS, PAIRS, D, 0, HALF)
        d_first = dy_first * cos + dy_second * sin
        d_second = dy_second * cos - dy_first * sin
    if OTHERS > 0:
        d_rest = packed_lanes(dy_rows, dy_rows, rows, ROPE, OTHERS, D, 0, REST)
    if NORM:
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
            if WEIGHTED:
                _store_sums(sums_ptr, d_first * first, 0, PAIRS, HALF)
                _store_sums(sums_ptr, d_second * second, PAIRS, PAIRS, HALF)
                d_first *= weight_lanes(weight_ptr, 0, PAIRS, HALF)
                d_second *= weight_lanes(weight_ptr, PAIRS, PAIRS, HALF)
            along += tl.sum(d_first * first, 1) + tl.sum(d_second * second, 1)
        if OTHERS > 0:
            rest *= r
            if WEIGHTED:
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
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_qlb,
    stride_qlt,
    stride_qlh,
    stride_klb,
    stride_klt,
    stride_klh,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    stride_dkb,
    stride_dkt,
    stride_dkh,
    stride_ct,
    stride_st,
    stride_pb,
    stride_pt,
    B,
    T,
    H,
    H_kv,
    T_max,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Queries gave their low lanes to K_low, keys to Q_low."""
    follow(PDL)
    tile_sums = sums_ptr
    if WEIGHTED:
        tile_sums += (tl.cast(tl.program_id(0), tl.int64) * 2 + tl.program_id(1)) * D
    if tl.program_id(1) == 0:
        _norm_rope_backward_rows(
            q_ptr, k_low_ptr, dq_out_ptr, dq_ptr, dk_low_ptr, tile_sums,
            q_weight_ptr, cos_ptr, sin_ptr, position_ptr,
            stride_qb, stride_qt, stride_qh, stride_klb, stride_klt, stride_klh,
            stride_dqb, stride_dqt, stride_dqh, stride_ct, stride_st, stride_pb, stride_pt,
            B * T * H, T, H, T_max, eps,
            D, R, ROPE, NORM, WEIGHTED, POSITIONS, ROWS, HALF, REST,
        )  # fmt: skip
    else:
        _norm_rope_backward_rows(
            k_ptr, q_low_ptr, dk_out_ptr, dk_ptr, dq_low_ptr, tile_sums,
            k_weight_ptr, cos_ptr, sin_ptr, position_ptr,
            stride_kb, stride_kt, stride_kh, stride_qlb, stride_qlt, stride_qlh,
            stride_dkb, stride_dkt, stride_dkh, stride_ct, stride_st, stride_pb, stride_pt,
            B * T * H_kv, T, H_kv, T_max, eps,
            D, R, ROPE, NORM, WEIGHTED, POSITIONS, ROWS, HALF, REST,
        )  # fmt: skip


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
    q, k, q_low, k_low = layouts[:4]
    assert q is not None
    D = q.shape[-1]
    config = launch_config("norm_rope_backward", D, dtypes[0], target, False)  # type: ignore[arg-type]
    arguments = {
        **strides_by_name(1, q=q, k=k, ql=q_low, kl=k_low, dq=layouts[9], dk=layouts[10]),
        **common_arguments(layouts, rope_dims, eps, config),
        "REST": lanes_of(D - rope_dims),
    }
    return Plan(_norm_rope_backward_kernel, (tiles, 2), arguments)
