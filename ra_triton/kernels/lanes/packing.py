"""Lane packing, for operands that do not come out of one GEMM (RoPE, QK-norm, latents).

    q_pack[b, t, h] = [q[b, t, h, :D-R] | k_low[b, t, h]]     k_pack = [k[..., :D-R] | q_low]

q ``[B, T, H, D]``, k ``[B, T, H_kv, D]``, q_low ``[B, T, H_kv, R]``, k_low ``[B, T, H, R]``. Grid
``(row tiles, 2)``, a row being one token of one head: column 0 packs q, column 1 packs k.
``pack`` overwrites nothing; ``pack_`` overwrites the last R lanes of q and k and touches no other.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels.tiles import Strides, follow, indices_of, row_at, strides_of, target_of
from ra_triton.launch.configs import LaunchConfig, launch_config
from ra_triton.launch.plans import Layout, Plan, layout_of, planned


class PackStrides(NamedTuple):
    """Of the tensors, in the order of the kernel's arguments."""

    q: Strides
    k: Strides
    q_low: Strides
    k_low: Strides
    q_pack: Strides
    k_pack: Strides


class Sizes(NamedTuple):
    """Of q ``[B, T, H, D]`` and k ``[B, T, H_kv, D]``."""

    B: int
    T: int
    H: int
    H_kv: int


class Variant(NamedTuple):
    """What the compiled code depends on."""

    D: int
    R: int
    IN_PLACE: bool
    ROWS: int
    LANES: int
    PDL: bool


@triton.jit
def _pack_rows(
    std_ptr,
    low_ptr,
    out_ptr,
    std_strides,
    low_strides,
    out_strides,
    n_rows,
    T,
    H,
    V: tl.constexpr,
):
    """``out[row, lane] = std[row, lane] if lane < D - R else low[row, lane - (D - R)]``."""
    STD: tl.constexpr = V.D - V.R
    row = tl.program_id(0) * V.ROWS + tl.arange(0, V.ROWS)
    b, t, h = indices_of(row[:, None], T, H)
    lane = (STD if V.IN_PLACE else 0) + tl.arange(0, V.LANES)[None, :]
    is_low = lane >= STD
    inside = (row < n_rows)[:, None] & (lane < V.D)
    low_pointers = row_at(low_ptr, low_strides, b, t, h) + (lane - STD)
    value = tl.load(low_pointers, mask=inside & is_low, other=0.0)
    if not V.IN_PLACE:
        std_pointers = row_at(std_ptr, std_strides, b, t, h) + lane
        value = tl.where(is_low, value, tl.load(std_pointers, mask=inside & ~is_low, other=0.0))
    tl.store(row_at(out_ptr, out_strides, b, t, h) + lane, value, mask=inside)


@triton.jit
def _pack_kernel(
    q_ptr,
    k_ptr,
    q_low_ptr,
    k_low_ptr,
    q_pack_ptr,
    k_pack_ptr,
    strides,
    sizes,
    V: tl.constexpr,
):
    """Queries carry K_low, keys carry Q_low."""
    follow(V.PDL)
    B, T, H, H_kv = sizes
    if tl.program_id(1) == 0:
        places = (strides.q, strides.k_low, strides.q_pack)
        _pack_rows(q_ptr, k_low_ptr, q_pack_ptr, *places, B * T * H, T, H, V)
    else:
        places = (strides.k, strides.q_low, strides.k_pack)
        _pack_rows(k_ptr, q_low_ptr, k_pack_ptr, *places, B * T * H_kv, T, H_kv, V)


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
    arguments = {
        "strides": PackStrides(*map(strides_of, layouts)),
        "sizes": Sizes(B, T, H, H_kv),
        "V": Variant(
            D=D,
            R=R,
            IN_PLACE=in_place,
            ROWS=config.block_m,
            LANES=triton.next_power_of_2(R if in_place else D),
            PDL=config.pdl,
        ),
        **config.compiler_options,
    }
    grid = (triton.cdiv(B * T * max(H, H_kv), config.block_m), 2)
    return Plan(_pack_kernel, grid, arguments)
