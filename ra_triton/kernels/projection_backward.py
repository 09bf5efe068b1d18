"""Gradients of the fused projection with respect to its weight and bias, deterministic.

    dw[c, n] = Σ_r x[r, c] g[r, n]        dbias[n] = Σ_r g[r, n]        r = one token of one batch

x ``[B, T, C]``, g ``[B, T, N]`` (contiguous) → dw ``[C, N]``, dbias ``[N]``. The tokens are cut
into a number of splits that depends on the sizes alone; each sums its own tokens, and a second
launch adds the splits in order. Overwrites nothing. The gradient of x is the projection of g by wᵀ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels.configs import LaunchConfig, launch_config
from ra_triton.kernels.tiles import descriptor, dot, dot_precision, is_aligned, target_of

TOKENS_PER_SPLIT = 2048
MAX_SPLITS = 16


@triton.jit
def _weight_gradient_kernel(
    x_source,  # pointers, or descriptors of [B*T, C] and [B*T, N] with USE_TMA
    g_source,
    dw_ptr,  # [splits, C, N] float32, or [C, N] if there is one split
    stride_xb,
    stride_xt,
    M,  # B * T
    T,
    C,
    N,
    split_rows,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of ``xᵀ g`` over the tokens of one split."""
    n_c = tl.cdiv(C, BLOCK_M)
    c = tl.program_id(0) % n_c * BLOCK_M
    n = tl.program_id(0) // n_c * BLOCK_N
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * split_rows, M)
    offs_c, offs_n = c + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(split * split_rows, end, BLOCK_K):
        if USE_TMA:
            x = x_source.load([k, c])  # split_rows is a multiple of BLOCK_K, so none is read twice
            g = g_source.load([k, n])
        else:
            row = k + offs_k
            x_rows = x_source + tl.cast(row // T, tl.int64) * stride_xb
            x_rows += tl.cast(row % T, tl.int64) * stride_xt
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
):
    """``out[split, n] = Σ_r g[r, n]`` over the rows of one split."""
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
def _add_splits_kernel(parts_ptr, out_ptr, n_elements, splits, BLOCK: tl.constexpr):
    """``out[i] = Σ_s parts[s, i]``, s in order."""
    offs = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.range(0, splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * n_elements + offs, mask, other=0.0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def weight_gradient(x: Tensor, g: Tensor, *, config: LaunchConfig | None = None) -> Tensor:
    """``x [B, T, C]``, ``g [B, T, N]`` contiguous → ``xᵀ g``, ``[C, N]`` in their dtype."""
    B, T, C = x.shape
    N = g.shape[-1]
    dw = torch.empty((C, N), dtype=x.dtype, device=x.device)
    if B * T == 0 or dw.numel() == 0:
        return dw.zero_()
    if B == 1 or x.stride(0) == T * x.stride(1):  # one long batch element
        x = x.as_strided((1, B * T, C), (0, x.stride(1), 1))
    g_rows = g.view(B * T, N)
    aligned = x.shape[0] == 1 and is_aligned(x[0]) and is_aligned(g_rows)
    if config is None:
        config = launch_config("weight_gradient", 0, x.dtype, target_of(x.device), aligned)
    splits, split_rows = _splits(B * T, config.block_k)
    parts = dw if splits == 1 else torch.empty((splits, C, N), dtype=torch.float32, device=x.device)
    block = config.block_k
    grid = (triton.cdiv(C, config.block_m) * triton.cdiv(N, config.block_n), splits)
    _weight_gradient_kernel[grid](
        x_source=descriptor(x[0], [block, config.block_m]) if config.use_tma else x,
        g_source=descriptor(g_rows, [block, config.block_n]) if config.use_tma else g,
        dw_ptr=parts,
        stride_xb=x.stride(0),
        stride_xt=x.stride(1),
        M=B * T,
        T=x.shape[1],
        C=C,
        N=N,
        split_rows=split_rows,
        PRECISION=dot_precision(x.dtype),
        USE_TMA=config.use_tma,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return _add_splits(parts, dw) if splits > 1 else dw


def bias_gradient(g: Tensor, *, config: LaunchConfig | None = None) -> Tensor:
    """``g [B, T, N]`` contiguous → ``Σ g``, ``[N]`` in its dtype."""
    M, N = g.shape[0] * g.shape[1], g.shape[2]
    dbias = torch.empty(N, dtype=g.dtype, device=g.device)
    if M == 0:
        return dbias.zero_()
    if config is None:
        config = launch_config("bias_gradient", 0, g.dtype, target_of(g.device), False)
    splits, split_rows = _splits(M, config.block_m)
    parts = torch.empty((splits, N), dtype=torch.float32, device=g.device)
    _column_sum_kernel[(triton.cdiv(N, config.block_n), splits)](
        g_ptr=g,
        out_ptr=parts,
        M=M,
        N=N,
        split_rows=split_rows,
        ROWS=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )
    return _add_splits(parts, dbias)


def _splits(rows: int, multiple: int) -> tuple[int, int]:
    """How many splits, and the rows of each, a multiple of ``multiple``."""
    splits = min(MAX_SPLITS, triton.cdiv(rows, TOKENS_PER_SPLIT))
    split_rows = triton.cdiv(triton.cdiv(rows, splits), multiple) * multiple
    return triton.cdiv(rows, split_rows), split_rows


def _add_splits(parts: Tensor, out: Tensor) -> Tensor:
    config = launch_config("add_splits", 0, out.dtype, target_of(out.device), False)
    _add_splits_kernel[(triton.cdiv(out.numel(), config.block_m),)](
        parts_ptr=parts,
        out_ptr=out,
        n_elements=out.numel(),
        splits=parts.shape[0],
        BLOCK=config.block_m,
        num_warps=config.num_warps,
    )
    return out
