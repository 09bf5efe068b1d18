"""Gradients of the fused projection with respect to its weight and bias, deterministic.

    dw[c, n] = Σ_r x[r, c] g[r, n]        dbias[n] = Σ_r g[r, n]        r = one token of one batch

x ``[B, T, C]``, g ``[B, T, N]`` (contiguous) → dw ``[C, N]``, dbias ``[N]``. The tokens are cut
into a number of splits that depends on sizes and tiles alone; each sums its own tokens, and a
second launch adds the splits in order. Overwrites nothing. The gradient of x is the projection of g
by wᵀ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels.projection.arguments import Sizes, Strides, as_one_batch, variant_of
from ra_triton.kernels.tiles import (
    dot,
    dot_precision,
    follow,
    is_aligned,
    target_of,
    token_rows,
)
from ra_triton.launch.configs import LaunchConfig, launch_config
from ra_triton.launch.plans import Bulk, Layout, Plan, layout_of, on_16_bytes, planned

TOKENS_PER_SPLIT = 1024  # at least
MAX_SPLITS = 16
PROGRAMS = 256  # that splitting aims at: about two CTAs per SM


@triton.jit
def _weight_gradient_kernel(
    x_source,  # pointers, or descriptors of [B*T, C] and [B*T, N] with USE_TMA
    g_source,
    dw_ptr,  # [splits, C, N] float32, or [C, N] if there is one split
    x_strides,
    sizes,
    split_rows,
    FLAT: tl.constexpr,  # one stride leads from row to row
    V: tl.constexpr,
):
    """One tile of ``xᵀ g`` over the tokens of one split."""
    PRECISION: tl.constexpr = V.PRECISION
    BLOCK_M: tl.constexpr = V.BLOCK_M
    BLOCK_N: tl.constexpr = V.BLOCK_N
    M, T, N, C = sizes
    follow(V.PDL)
    n_c = tl.cdiv(C, BLOCK_M)
    c = tl.program_id(0) % n_c * BLOCK_M
    n = tl.program_id(0) // n_c * BLOCK_N
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * split_rows, M)
    offs_c, offs_n = c + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, V.BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(split * split_rows, end, V.BLOCK_K):
        if V.USE_TMA:
            x = x_source.load([k, c])  # split_rows is a multiple of BLOCK_K, so none is read twice
            g = g_source.load([k, n])
        else:
            row = k + offs_k
            if FLAT:
                x_rows = x_source + tl.cast(row, tl.int64) * x_strides.t
            else:
                x_rows = token_rows(x_source, row, T, x_strides)
            inside = (row < end)[:, None]
            x = tl.load(
                x_rows[:, None] + offs_c[None, :], inside & (offs_c < C)[None, :], other=0.0
            )
            g_rows = g_source + tl.cast(row, tl.int64) * N
            g = tl.load(
                g_rows[:, None] + offs_n[None, :], inside & (offs_n < N)[None, :], other=0.0
            )
        acc = dot(x.T, g, acc, PRECISION)
    pointers = dw_ptr + (tl.cast(split, tl.int64) * C + offs_c)[:, None] * N + offs_n[None, :]
    mask = (offs_c < C)[:, None] & (offs_n < N)[None, :]
    tl.store(pointers, acc.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _column_sum_kernel(
    g_ptr,
    out_ptr,  # [splits, N] float32
    M,
    N,
    split_rows,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """``out[split, n] = Σ_r g[r, n]`` over the rows of one split."""
    follow(PDL)
    split = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.minimum((split + 1) * split_rows, M)
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for k in tl.range(split * split_rows, end, ROWS):
        row = k + tl.arange(0, ROWS)
        pointers = g_ptr + tl.cast(row, tl.int64)[:, None] * N + offs_n[None, :]
        mask = (row < end)[:, None] & (offs_n < N)[None, :]
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    out = tl.sum(total, 0)
    tl.store(out_ptr + tl.cast(split, tl.int64) * N + offs_n, out, mask=offs_n < N)


@triton.jit
def _add_splits_kernel(
    parts_ptr,  # [splits, n_elements] float32
    out_ptr,
    n_elements,
    splits,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """``out[i] = Σ_s parts[s, i]``, s in order."""
    follow(PDL)
    offs = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.range(0, splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * n_elements + offs, mask, other=0.0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def weight_gradient(
    x: Tensor, g: Tensor, dw: Tensor | None = None, *, config: LaunchConfig | None = None
) -> Tensor:
    """``x [B, T, C]``, ``g [B, T, N]`` contiguous → ``xᵀ g``, ``[C, N]``, written to dw if given.

    dw has any dtype; it is contiguous or, as the gradient of a transposed weight, its transpose is.
    That is ``gᵀ x``: the same product with x and g in each other's place.
    """
    if dw is None:
        dw = torch.empty((x.shape[-1], g.shape[-1]), dtype=x.dtype, device=x.device)
    result = dw
    if dw.stride(1) != 1 and dw.stride(0) == 1:
        x, g, dw = g, x.contiguous(), dw.mT
    B, T, C = x.shape
    N = g.shape[-1]
    if B * T == 0 or dw.numel() == 0:
        dw.zero_()
        return result
    precision, target = dot_precision(x.dtype), target_of(x.device)
    dtypes, others = (x.dtype, dw.dtype), on_16_bytes(g, dw)
    plan, splits = _weight_plan(
        x.device, dtypes, layout_of(x), N, others, precision, target, config
    )
    if splits == 1:
        plan(x, g, dw)
        return result
    parts = torch.empty((splits, C, N), dtype=torch.float32, device=x.device)
    plan(x, g, parts)
    _add_splits(parts, dw)
    return result


@planned
def _weight_plan(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    x: Layout,
    N: int,
    others: tuple[bool | None, ...],
    precision: str,
    target: str,
    config: LaunchConfig | None,
) -> tuple[Plan, int]:
    """The launch of the weight's gradient, and its number of splits; ``others`` are g and dw.

    ``dtypes``: of x and g, and of dw.
    """
    dtype, _ = dtypes
    x = as_one_batch(x)
    B, T, C = x.shape
    rows = Layout(x.shape[1:], x.strides[1:], x.on_16_bytes)
    g_rows = Layout((B * T, N), (N, 1), bool(others[0]))
    aligned = B == 1 and is_aligned(rows, dtype) and is_aligned(g_rows, dtype)
    if config is None:
        config = launch_config("weight_gradient", 0, dtype, target, aligned)
    bulk = {
        0: Bulk(rows.shape, rows.strides, (config.block_k, config.block_m)),
        1: Bulk(g_rows.shape, g_rows.strides, (config.block_k, config.block_n)),
    }
    tiles = triton.cdiv(C, config.block_m) * triton.cdiv(N, config.block_n)
    splits, split_rows = _splits(B * T, config.block_k, tiles)
    arguments = {
        "x_strides": Strides(*x.strides[:2]),
        "sizes": Sizes(B * T, T, N, C),
        "split_rows": split_rows,
        "FLAT": B == 1,
        "V": variant_of(config, precision),
        **config.compiler_options,
    }
    plan = Plan(
        _weight_gradient_kernel, (tiles, splits), arguments, bulk if config.use_tma else None
    )
    return plan, splits


def bias_gradient(
    g: Tensor, dtype: torch.dtype | None = None, *, config: LaunchConfig | None = None
) -> Tensor:
    """``g [B, T, N]`` contiguous → ``Σ g``, ``[N]`` in ``dtype``, None: in that of g."""
    M, N = g.shape[0] * g.shape[1], g.shape[2]
    dbias = torch.empty(N, dtype=dtype or g.dtype, device=g.device)
    if M == 0:
        return dbias.zero_()
    plan, splits = _column_sum_plan(
        g.device, g.dtype, M, N, on_16_bytes(g), target_of(g.device), config
    )
    parts = torch.empty((splits, N), dtype=torch.float32, device=g.device)
    plan(g, parts)
    return _add_splits(parts, dbias)


@planned
def _column_sum_plan(
    device: torch.device,
    dtype: torch.dtype,
    M: int,
    N: int,
    others: tuple[bool | None, ...],
    target: str,
    config: LaunchConfig | None,
) -> tuple[Plan, int]:
    """The launch that sums columns, and its number of splits."""
    if config is None:
        config = launch_config("bias_gradient", 0, dtype, target, False)
    tiles = triton.cdiv(N, config.block_n)
    splits, split_rows = _splits(M, config.block_m, tiles)
    arguments = {
        "M": M,
        "N": N,
        "split_rows": split_rows,
        "ROWS": config.block_m,
        "BLOCK_N": config.block_n,
        **config.options,
    }
    return Plan(_column_sum_kernel, (tiles, splits), arguments), splits


def _splits(rows: int, multiple: int, tiles: int) -> tuple[int, int]:
    """How many splits, and the rows of each, a multiple of ``multiple``.

    Few tiles need many splits to fill the GPU; each split costs a pass over the result in float32.
    """
    most = min(MAX_SPLITS, triton.cdiv(rows, TOKENS_PER_SPLIT))
    splits = max(1, min(most, PROGRAMS // tiles))
    split_rows = triton.cdiv(triton.cdiv(rows, splits), multiple) * multiple
    return triton.cdiv(rows, split_rows), split_rows


def _add_splits(parts: Tensor, out: Tensor) -> Tensor:
    splits = parts.shape[0]
    _add_plan(out.device, out.dtype, out.numel(), splits, target_of(out.device))(parts, out)
    return out


@planned
def _add_plan(
    device: torch.device, dtype: torch.dtype, n_elements: int, splits: int, target: str
) -> Plan:
    """The launch that adds splits; both tensors are new, hence aligned."""
    config = launch_config("add_splits", 0, dtype, target, False)
    arguments = {
        "n_elements": n_elements,
        "splits": splits,
        "BLOCK": config.block_m,
        **config.options,
    }
    return Plan(_add_splits_kernel, (triton.cdiv(n_elements, config.block_m),), arguments)
