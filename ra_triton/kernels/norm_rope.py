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
def _norm_rope_rows(
    x_ptr,
    low_ptr,
    out_ptr,
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
    stride_ob,
    stride_ot,
    stride_oh,
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
    REST_FROM: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """``y = rotate(p / sqrt(mean(p²) + eps) * weight)`` of ``ROWS`` rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.cast(row // (T * H), tl.int64)[:, None]
    t = tl.cast(row // H % T, tl.int64)[:, None]
    h = tl.cast(row % H, tl.int64)[:, None]
    rows = (row < n_rows)[:, None]
    x_rows = x_ptr + b * stride_xb + t * stride_xt + h * stride_xh
    low_rows = x_rows
    if R > 0:
        low_rows = low_ptr + b * stride_lb + t * stride_lt + h * stride_lh
    out_rows = out_ptr + b * stride_ob + t * stride_ot + h * stride_oh
    PAIRS: tl.constexpr = ROPE // 2
    if ROPE > 0:
        first = packed_lanes(x_rows, low_rows, rows, 0, PAIRS, D, R, HALF)
        second = packed_lanes(x_rows, low_rows, rows, PAIRS, PAIRS, D, R, HALF)
    if REST_FROM < D:
        rest = packed_lanes(x_rows, low_rows, rows, REST_FROM, D - REST_FROM, D, R, REST)
    if NORM:
        squares = tl.zeros([ROWS], tl.float32)
        if ROPE > 0:
            squares += tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST_FROM < D:
            squares += tl.sum(rest * rest, 1)
        r = tl.rsqrt(squares * (1.0 / D) + eps)[:, None]
        if ROPE > 0:
            first *= r
            second *= r
            if WEIGHTED:
                first *= weight_lanes(weight_ptr, 0, PAIRS, HALF)
                second *= weight_lanes(weight_ptr, PAIRS, PAIRS, HALF)
        if REST_FROM < D:
            rest *= r
            if WEIGHTED:
                rest *= weight_lanes(weight_ptr, REST_FROM, D - REST_FROM, REST)
    if ROPE > 0:
        cos, sin = angles(
            cos_ptr, sin_ptr, position_ptr, b, t, rows,
            stride_ct, stride_st, stride_pb, stride_pt, T_max, ROPE, POSITIONS, HALF,
        )  # fmt: skip
        store_lanes(out_rows, first * cos - second * sin, rows, 0, PAIRS, HALF)
        store_lanes(out_rows, second * cos + first * sin, rows, PAIRS, PAIRS, HALF)
    if REST_FROM < D:
        store_lanes(out_rows, rest, rows, REST_FROM, D - REST_FROM, REST)


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
    stride_qob,
    stride_qot,
    stride_qoh,
    stride_kob,
    stride_kot,
    stride_koh,
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
    REST_FROM: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Queries carry K_low, keys carry Q_low."""
    follow(PDL)
    if tl.program_id(1) == 0:
        _norm_rope_rows(
            q_ptr, k_low_ptr, q_out_ptr, q_weight_ptr, cos_ptr, sin_ptr, position_ptr,
            stride_qb, stride_qt, stride_qh, stride_klb, stride_klt, stride_klh,
            stride_qob, stride_qot, stride_qoh, stride_ct, stride_st, stride_pb, stride_pt,
            B * T * H, T, H, T_max, eps,
            D, R, ROPE, REST_FROM, NORM, WEIGHTED, POSITIONS, ROWS, HALF, REST,
        )  # fmt: skip
    else:
        _norm_rope_rows(
            k_ptr, q_low_ptr, k_out_ptr, k_weight_ptr, cos_ptr, sin_ptr, position_ptr,
            stride_kb, stride_kt, stride_kh, stride_qlb, stride_qlt, stride_qlh,
            stride_kob, stride_kot, stride_koh, stride_ct, stride_st, stride_pb, stride_pt,
            B * T * H_kv, T, H_kv, T_max, eps,
            D, R, ROPE, REST_FROM, NORM, WEIGHTED, POSITIONS, ROWS, HALF, REST,
        )  # fmt: skip


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
    q, k, q_low, k_low = layouts[:4]
    assert q is not None
    assert k is not None
    B, T, H, D = q.shape
    config = launch_config("norm_rope", D, dtypes[0], target, False)  # type: ignore[arg-type]
    rest_from = max(rope_dims, touched)
    arguments = {
        **strides_by_name(1, q=q, k=k, ql=q_low, kl=k_low, qo=layouts[9], ko=layouts[10]),
        **common_arguments(layouts, rope_dims, eps, config),
        "REST_FROM": rest_from,
        "REST": lanes_of(D - rest_from),
    }
    grid = (triton.cdiv(B * T * max(H, k.shape[2]), config.block_m), 2)
    return Plan(_norm_rope_kernel, grid, arguments)
