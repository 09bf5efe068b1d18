"""The fused projection GEMM.

    y[b, t, n] = Σ_c x[b, t, c] w[c, n] + bias[n]

x ``[B, T, C]``, w ``[C, N]`` in packed column order → y ``[B, T, N]``, contiguous: read as
``[B, T, H + 2 * H_kv, D]`` it *is* q_pack, k_pack and v, so packing costs nothing. Grid: one
program a tile of y, in groups of GROUP_M row tiles that share columns of w in L2. Overwrites y.
``forward_hopper.py`` computes the same from aligned 16-bit operands on Hopper.
"""

from functools import partial

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
    is_wide,
    processors_of,
    target_of,
    token_rows,
)
from ra_triton.launch import gluon
from ra_triton.launch.configs import LaunchConfig, in_fewest_rounds, launch_config
from ra_triton.launch.plans import (
    Bulk,
    Layout,
    Plan,
    layout_of,
    on_16_bytes,
    plan_in_gluon,
    planned,
)


@triton.jit
def _tile_of(pid, n_m, n_n, GROUP_M: tl.constexpr):
    """Row tile and column tile of a program: down GROUP_M rows, then one column to the right."""
    per_group = GROUP_M * n_n
    first = pid // per_group * GROUP_M
    size = tl.minimum(n_m - first, GROUP_M)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def _projection_kernel(
    x_source,  # pointer, or descriptor of [B*T, C] with USE_TMA
    w_source,  # pointer, or descriptor of [C, N] ([N, C] with W_TRANSPOSED)
    bias_ptr,  # or None
    y_ptr,
    x_strides,
    w_strides,
    sizes,
    V: tl.constexpr,
):
    """One tile of y = x w + bias, accumulated over C in steps of BLOCK_K."""
    PRECISION: tl.constexpr = V.PRECISION
    BLOCK_M: tl.constexpr = V.BLOCK_M
    BLOCK_N: tl.constexpr = V.BLOCK_N
    M, T, N, C = sizes
    follow(V.PDL)
    pid = tl.program_id(0)
    n_m, n_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = _tile_of(pid, n_m, n_n, V.GROUP_M)
    m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
    offs_m = m + tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, V.BLOCK_K)
    if not V.USE_TMA:
        row = tl.minimum(offs_m, M - 1)  # rows past the end repeat the last and are not stored
        x_rows = token_rows(x_source, row, T, x_strides)
        stride_c, stride_n = w_strides
        w_base = w_source + tl.cast(n, tl.int64) * stride_n
        in_k = offs_k.to(tl.int64) if V.WIDE else offs_k
        in_n = tl.arange(0, BLOCK_N).to(tl.int64) if V.WIDE else tl.arange(0, BLOCK_N)
        in_tile = in_k[:, None] * stride_c + in_n[None, :] * stride_n

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, C, V.BLOCK_K):
        if V.USE_TMA:
            x = x_source.load([m, k])
            w = w_source.load([n, k]).T if V.W_TRANSPOSED else w_source.load([k, n])
        else:
            x_pointers = x_rows[:, None] + (k + offs_k)[None, :]
            w_pointers = w_base + tl.cast(k, tl.int64) * stride_c + in_tile
            if V.EVEN_C:
                x = tl.load(x_pointers)
                w = tl.load(w_pointers, mask=offs_n[None, :] < N, other=0.0)
            else:
                x = tl.load(x_pointers, mask=offs_k[None, :] < C - k, other=0.0)
                mask_w = (offs_k[:, None] < C - k) & (offs_n[None, :] < N)
                w = tl.load(w_pointers, mask=mask_w, other=0.0)
        acc = dot(x, w, acc, PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y_pointers = y_ptr + tl.cast(offs_m, tl.int64)[:, None] * N + offs_n[None, :]
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tl.store(y_pointers, acc.to(y_ptr.dtype.element_ty), mask=mask)


def projection(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor | None = None,
    *,
    stage: str = "projection",
    config: LaunchConfig | None = None,
) -> Tensor:
    """``x [B, T, C] @ w [C, N] + bias [N]`` → ``[B, T, N]``, written to ``out`` if given.

    x may have any strides but the last, which is 1; w and bias any strides at all; ``out`` is
    contiguous. ``stage`` names the row of the config table.
    """
    B, T, _ = x.shape
    if out is None:
        out = torch.empty((B, T, w.shape[1]), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    bias = None if bias is None else bias.contiguous()
    plan = _plan(
        x.device,
        x.dtype,
        layout_of(x),
        layout_of(w),
        on_16_bytes(bias, out),
        dot_precision(x.dtype),
        target_of(x.device),
        stage,
        config,
    )
    plan(x, w, bias, out)
    return out


@planned
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    x: Layout,
    w: Layout,
    others: tuple[bool | None, ...],
    precision: str,
    target: str,
    stage: str,
    config: LaunchConfig | None,
) -> Plan:
    """The launch for operands of these layouts; ``others`` are bias and y."""
    x = as_one_batch(x)
    B, T, C = x.shape
    N = w.shape[1]
    w_transposed = w.strides[1] != 1
    w_rows = Layout(w.shape[::-1], w.strides[::-1], w.on_16_bytes) if w_transposed else w
    rows = Layout(x.shape[1:], x.strides[1:], x.on_16_bytes)
    bulk_fits = B == 1 and w_rows.strides[1] == 1
    y = Layout((B * T, N), (N, 1), bool(others[1]))
    aligned = bulk_fits and all(is_aligned(t, dtype) for t in (rows, w_rows, y))
    processors = processors_of(device)
    in_gluon = partial(_plan_in_gluon, rows, w, dtype, processors)
    if config is not None and config.groups > 1:
        return in_gluon(config)
    if config is None:
        config = launch_config(stage, 0, dtype, target, aligned)
        if config.groups > 1:
            hopper = in_fewest_rounds(config, B * T, N, processors)
            config = launch_config(stage, 0, dtype, target, False)
            if gluon.works("projection"):
                plain = partial(_plan, device, dtype, x, w, others, precision, target, stage)
                return plan_in_gluon(
                    "projection", partial(in_gluon, hopper), partial(plain, config)
                )
    block_w = (config.block_k, config.block_n)
    bulk = {
        0: Bulk(rows.shape, rows.strides, (config.block_m, config.block_k)),
        1: Bulk(w_rows.shape, w_rows.strides, block_w[::-1] if w_transposed else block_w),
    }
    arguments = {
        "x_strides": Strides(*x.strides[:2]),
        "w_strides": w.strides,
        "sizes": Sizes(B * T, T, N, C),
        "V": variant_of(
            config,
            precision,
            EVEN_C=C % config.block_k == 0,
            W_TRANSPOSED=w_transposed,
            WIDE=is_wide(w.strides[0] * config.block_k + w.strides[1] * config.block_n),
        ),
        **config.compiler_options,
    }
    grid = (triton.cdiv(B * T, config.block_m) * triton.cdiv(N, config.block_n),)
    return Plan(_projection_kernel, grid, arguments, bulk if config.use_tma else None)


def _plan_in_gluon(
    x: Layout, w: Layout, dtype: torch.dtype, processors: int, config: LaunchConfig
) -> Plan:
    """The launch of Hopper's own kernel; not even imported where Gluon is not as it was."""
    from ra_triton.kernels.projection.forward_hopper import projection_plan

    return projection_plan(x, w, dtype, config, processors)
