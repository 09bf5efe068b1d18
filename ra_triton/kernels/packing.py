"""Lane packing, for operands that do not come out of one GEMM (RoPE, QK-norm, latents).

    q_pack[b, t, h] = [q[b, t, h, :D-R] | k_low[b, t, h]]     k_pack = [k[..., :D-R] | q_low]

q ``[B, T, H, D]``, k ``[B, T, H_kv, D]``, q_low ``[B, T, H_kv, R]``, k_low ``[B, T, H, R]``. Grid
``(row tiles, 2)``, a row being one token of one head: column 0 packs q, column 1 packs k.
``pack`` overwrites nothing; ``pack_`` overwrites the last R lanes of q and k and touches no other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels.configs import LaunchConfig, launch_config
from ra_triton.kernels.plans import Layout, Plan, layout_of, planned
from ra_triton.kernels.tiles import follow, strides_by_name, target_of


@triton.jit
def _pack_rows(
    std_ptr,
    low_ptr,
    out_ptr,
    stride_sb,
    stride_st,
    stride_sh,
    stride_lb,
    stride_lt,
    stride_lh,
    stride_ob,
    stride_ot,
    stride_oh,
    n_rows,
    T,
    H,
    D: tl.constexpr,
    R: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """``out[row, lane] = std[row, lane] if lane < D - R else low[row, lane - (D - R)]``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.cast(row // (T * H), tl.int64)[:, None]
    t = tl.cast(row // H % T, tl.int64)[:, None]
    h = tl.cast(row % H, tl.int64)[:, None]
    lane = (D - R if IN_PLACE else 0) + tl.arange(0, LANES)[None, :]
    is_low = lane >= D - R
    inside = (row < n_rows)[:, None] & (lane < D)
    low_pointers = low_ptr + b * stride_lb + t * stride_lt + h * stride_lh + (lane - (D - R))
    value = tl.load(low_pointers, mask=inside & is_low, other=0.0)
    if not IN_PLACE:
        std_pointers = std_ptr + b * stride_sb + t * stride_st + h * stride_sh + lane
        value = tl.where(is_low, value, tl.load(std_pointers, mask=inside & ~is_low, other=0.0))
    out_pointers = out_ptr + b * stride_ob + t * stride_ot + h * stride_oh + lane
    tl.store(out_pointers, value, mask=inside)


@triton.jit
def _pack_kernel(
    q_ptr,
    k_ptr,
    q_low_ptr,
    k_low_ptr,
    q_pack_ptr,
    k_pack_ptr,
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
    stride_qpb,
    stride_qpt,
    stride_qph,
    stride_kpb,
    stride_kpt,
    stride_kph,
    B,
    T,
    H,
    H_kv,
    D: tl.constexpr,
    R: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Queries carry K_low, keys carry Q_low."""
    follow(PDL)
    if tl.program_id(1) == 0:
        _pack_rows(
            q_ptr, k_low_ptr, q_pack_ptr,
            stride_qb, stride_qt, stride_qh, stride_klb, stride_klt, stride_klh,
            stride_qpb, stride_qpt, stride_qph,
            B * T * H, T, H, D, R, IN_PLACE, ROWS, LANES,
        )  # fmt: skip
    else:
        _pack_rows(
            k_ptr, q_low_ptr, k_pack_ptr,
            stride_kb, stride_kt, stride_kh, stride_qlb, stride_qlt, stride_qlh,
            stride_kpb, stride_kpt, stride_kph,
            B * T * H_kv, T, H_kv, D, R, IN_PLACE, ROWS, LANES,
        )  # fmt: skip


def pack(
    q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor, *, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor]:
    """``q [B, T, H, D]``, ``k [B, T, H_kv, D]`` and the low lanes → new contiguous operands."""
    q_pack = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_pack = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    _launch(q, k, q_low, k_low, q_pack, k_pack, in_place=False, config=config)
    return q_pack, k_pack


def pack_(
    q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor, *, config: LaunchConfig | None = None
) -> None:
    """Overwrites ``q[..., D-R:]`` with ``k_low`` and ``k[..., D-R:]`` with ``q_low``.

    The sources must not overlap what is written.
    """
    _launch(q, k, q_low, k_low, q, k, in_place=True, config=config)


def _launch(
    q: Tensor,
    k: Tensor,
    q_low: Tensor,
    k_low: Tensor,
    q_pack: Tensor,
    k_pack: Tensor,
    *,
    in_place: bool,
    config: LaunchConfig | None,
) -> None:
    B, T, H, _ = q.shape
    if B * T * max(H, k.shape[2]) == 0 or (in_place and q_low.shape[-1] == 0):
        return
    tensors = (q, k, q_low, k_low, q_pack, k_pack)
    layouts = tuple(map(layout_of, tensors))
    _plan(q.device, q.dtype, layouts, in_place, target_of(q.device), config)(*tensors)


@planned
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    layouts: tuple[Layout, ...],
    in_place: bool,
    target: str,
    config: LaunchConfig | None,
) -> Plan:
    """The launch for tensors of these layouts, in the order of the kernel's arguments."""
    q, k, q_low = layouts[:3]
    B, T, H, D = q.shape
    H_kv, R = k.shape[2], q_low.shape[-1]
    if config is None:
        config = launch_config("packing", D, dtype, target, False)
    names = ("q", "k", "ql", "kl", "qp", "kp")
    arguments = {
        **strides_by_name(1, **dict(zip(names, layouts, strict=True))),
        "B": B,
        "T": T,
        "H": H,
        "H_kv": H_kv,
        "D": D,
        "R": R,
        "IN_PLACE": in_place,
        "ROWS": config.block_m,
        "LANES": triton.next_power_of_2(R if in_place else D),
        **config.options,
    }
    grid = (triton.cdiv(B * T * max(H, H_kv), config.block_m), 2)
    return Plan(_pack_kernel, grid, arguments)
