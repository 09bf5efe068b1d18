"""Compose the factors of a projection into one weight, ``W_fused`` and its bias.

    q_pack = [w_std Q_std | w_rec K W_recip]    k_pack = [K_std | mean Q W_recip]    v = V

per head, where ``Q_std, K_std`` are the first D - R lanes of W_q and W_k and the mean is over the
query heads of a key head. W_q ``[C, H*D]``, W_k and W_v ``[C, H_kv*D]``, W_recip ``[D, R]`` or
``[H, D, R]``, gates numbers, ``[]`` or ``[H]`` → ``[C, (H + 2*H_kv)*D]`` in packed or split order
(:mod:`ra_triton.weights.layout`), and of b_q, b_k and b_v, which fold as one more row, ``[N]``.
Grid ``(row tiles * heads,)``, heads of the packed result and fastest; the biases are the last row
tile.
Sums in float32, products of float32 factors in IEEE float32, one rounding to the result's dtype.
Overwrites nothing.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels.composition.tiles import (
    Dtypes,
    Given,
    Layouts,
    columns,
    common_arguments,
    gate,
    key_of,
    product,
    variant_of,
    with_unit_strides,
)
from ra_triton.kernels.tiles import block_d_of, follow, target_of
from ra_triton.launch.configs import LaunchConfig, launch_config
from ra_triton.launch.plans import Plan, planned
from ra_triton.weights.factors import Factors


class Variant(NamedTuple):
    """What the compiled code depends on."""

    D: int
    R: int
    STD: int  # NO_GATE, NUMBER or TENSOR
    REC: int
    BIAS: bool
    PACKED: bool
    BLOCK_M: int
    BLOCK_D: int
    BLOCK_R: int
    BLOCK_K: int
    PDL: bool


@triton.jit
def _copy(rows, out_rows, inside, scale, LANES: tl.constexpr, GATED: tl.constexpr, V: tl.constexpr):
    """``out = scale * w`` for the first LANES lanes of a head."""
    lane = tl.arange(0, V.BLOCK_D)[None, :]
    mask = inside & (lane < LANES)
    value = tl.load(rows + lane, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        value *= scale
    tl.store(out_rows + lane, value.to(out_rows.dtype.element_ty), mask=mask)


@triton.jit
def _multiply(
    rows,  # of the first head
    recip_ptr,  # of the first head
    out_rows,
    inside,
    scale,
    n_heads,
    stride_h,
    stride_d,
    V: tl.constexpr,
):
    """``out = scale * Σ_i w_i W_recip_i`` over ``n_heads`` heads next to each other."""
    BLOCK_M: tl.constexpr = V.BLOCK_M
    BLOCK_R: tl.constexpr = V.BLOCK_R
    offs_k = tl.arange(0, V.BLOCK_K)
    for first in tl.range(0, V.R, V.BLOCK_R):
        r = first + tl.arange(0, V.BLOCK_R)[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for i in tl.range(0, n_heads):
            head_rows = rows + i * V.D
            head_recip = recip_ptr + tl.cast(i, tl.int64) * stride_h
            for k in tl.range(0, V.D, V.BLOCK_K):
                d = k + offs_k
                w = tl.load(head_rows + d[None, :], mask=inside & (d < V.D)[None, :], other=0.0)
                recip_mask = (d < V.D)[:, None] & (r < V.R)
                recip = tl.load(
                    head_recip + d[:, None].to(tl.int64) * stride_d + r, mask=recip_mask, other=0.0
                )
                acc = product(w, recip, acc)
        out = (acc * scale).to(out_rows.dtype.element_ty)
        tl.store(out_rows + r, out, mask=inside & (r < V.R))


@triton.jit
def _compose_kernel(
    W_q_ptr,
    W_k_ptr,
    W_v_ptr,
    W_recip_ptr,
    w_std_ptr,
    w_rec_ptr,
    b_q_ptr,
    b_k_ptr,
    b_v_ptr,
    out_ptr,  # [C, N]
    bias_ptr,  # [N]
    strides,
    sizes,
    numbers,
    V: tl.constexpr,
):
    """``[w_std Q_std | w_rec K W_recip]``, ``[K_std | mean Q W_recip]`` or ``V`` for some rows."""
    follow(V.PDL)
    C, H, H_kv = sizes.C, sizes.H, sizes.H_kv
    heads = H + 2 * H_kv
    group = H // H_kv
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    n_rows = C
    if V.BIAS:  # the last tile: one row, which begins elsewhere
        is_bias = tile == tl.cdiv(C, V.BLOCK_M)
        W_q_ptr = tl.where(is_bias, b_q_ptr, W_q_ptr)
        W_k_ptr = tl.where(is_bias, b_k_ptr, W_k_ptr)
        W_v_ptr = tl.where(is_bias, b_v_ptr, W_v_ptr)
        out_ptr = tl.where(is_bias, bias_ptr, out_ptr)
        tile = tl.where(is_bias, 0, tile)
        n_rows = tl.where(is_bias, 1, C)
    row = tile * V.BLOCK_M + tl.arange(0, V.BLOCK_M)[:, None]
    inside = row < n_rows
    row = row.to(tl.int64)
    out_rows = out_ptr + row * (heads * V.D)
    q_rows = W_q_ptr + row * strides.q
    k_rows = W_k_ptr + row * strides.k
    LANES: tl.constexpr = V.D - V.R
    if head < H:
        if LANES > 0:
            w_std = gate(w_std_ptr, numbers.std, head, strides.std, V.STD)
            first = columns(head, sizes, "q_std", V)
            _copy(q_rows + head * V.D, out_rows + first, inside, w_std, LANES, V.STD > 0, V)
        if V.R > 0:
            w_rec = gate(w_rec_ptr, numbers.rec, head, strides.rec, V.REC)
            first = columns(head, sizes, "k_low", V)
            _multiply(
                k_rows + head // group * V.D,
                W_recip_ptr + tl.cast(head, tl.int64) * strides.recip_h,
                out_rows + first, inside, w_rec, 1, strides.recip_h, strides.recip_d, V,
            )  # fmt: skip
    elif head < H + H_kv:
        head -= H
        if LANES > 0:
            first = columns(head, sizes, "k_std", V)
            _copy(k_rows + head * V.D, out_rows + first, inside, 1.0, LANES, False, V)
        if V.R > 0:
            first = columns(head, sizes, "q_low", V)
            _multiply(
                q_rows + head * group * V.D,
                W_recip_ptr + tl.cast(head * group, tl.int64) * strides.recip_h,
                out_rows + first, inside, numbers.mean, group, strides.recip_h, strides.recip_d, V,
            )  # fmt: skip
    else:
        head -= H + H_kv
        v_rows = W_v_ptr + row * strides.v
        first = columns(head, sizes, "v", V)
        _copy(v_rows + head * V.D, out_rows + first, inside, 1.0, V.D, False, V)


def compose(
    factors: Factors, *, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor | None]:
    """``(W_fused [C, N], bias [N] or None)``, new, in ``factors.dtype``."""
    W_q = factors.W_q
    C, N = W_q.shape[0], factors.layout.columns
    out = W_q.new_empty((C, N), dtype=factors.dtype)
    bias = None if factors.b_q is None else W_q.new_empty(N, dtype=factors.dtype)
    tensors = with_unit_strides(factors)
    if C or bias is not None:
        key = key_of(tensors, factors)
        _plan(W_q.device, *key, factors.dtype, target_of(W_q.device), config)(*tensors, out, bias)
    return out, bias


@planned
def _plan(
    device: torch.device,
    dtypes: Dtypes,
    layouts: Layouts,
    numbers: Given,
    dtype: torch.dtype,
    target: str,
    config: LaunchConfig | None,
) -> Plan:
    """The launch for factors of these layouts and numbers, in the order of :class:`Factors`."""
    layout, arguments = common_arguments(layouts, numbers)
    if config is None:
        config = launch_config("compose", layout.head_dim, dtypes[0], target, False)
    variant = Variant(
        **variant_of(layouts, numbers, layout),
        BLOCK_M=config.block_m,
        BLOCK_D=block_d_of(layout.head_dim),
        BLOCK_R=min(config.block_n, block_d_of(layout.R)),
        BLOCK_K=config.block_k,
        PDL=config.pdl,
    )
    tiles = triton.cdiv(arguments["sizes"].C, config.block_m) + variant.BIAS
    return Plan(
        _compose_kernel,
        (tiles * layout.packed_heads,),
        {**arguments, "V": variant, **config.compiler_options},
    )
