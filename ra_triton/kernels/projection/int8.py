"""The fused projection from int8 weights: weight-only, or with int8 activations (W8A8).

    y[b, t, column(j)] = s_x[b, t] s_w[j] Σ_c x[b, t, c] w[j, c] + bias[column(j)]

w ``[N, C]`` int8, one row a column of W_fused, so that both operands have the summed dim innermost.
Weight-only: x in float16, bfloat16 or float32, w converted on its way into the product (which is
exact), sums in float32, no s_x. W8A8: x int8 with a scale per token, integer products, sums in
int32, exact. A w in the dtype of x, without s_w, is a plain product.

The tile computed is yᵀ: Hopper's tensor cores take only their first operand from registers, where
the converted weight lies, and a few tokens fill their second dim better than their first. y
``[B, T, width]`` contiguous, of which N columns are overwritten: j comes in heads of LANES, each
GAP columns further than dense ones would be (``layout.Columns``). Grid: one program a tile of y.

``quantize_rows``: s_x = max(max_c |x| / 127, 2⁻¹²⁶), x_int8 = round to nearest even of x / s_x, for
each token; a token that is not finite gets a scale of NaN. Grid: one program ROWS tokens.
"""

from typing import NamedTuple

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
from ra_triton.weights.layout import Columns

FEW_ROWS = 16  # up to so many tokens the narrow tile is taken
ROUNDING = tl.constexpr(1.5 * 2.0**23)  # x + this - this rounds |x| < 2²² to the nearest integer
SMALLEST_SCALE = tl.constexpr(2.0**-126)  # no scale is smaller, so that zeros divide


class Place(NamedTuple):
    """Where the rows of w go among the columns of y; see ``layout.Columns``."""

    width: int  # columns of y
    start: int  # column of j = 0
    heads: int  # that GAP follows


@triton.jit
def _int8_projection_kernel(
    x_source,  # pointer, or descriptor of [B*T, C] with USE_TMA
    w_source,  # pointer, or descriptor of [N, C]
    x_scale_ptr,  # if x and w are int8, else None
    w_scale_ptr,  # if w is int8, else None
    bias_ptr,  # or None
    y_ptr,
    x_strides,
    sizes,
    place,
    V: tl.constexpr,
):
    """One tile of yᵀ = s_w s_x (w xᵀ) + bias, accumulated over C in steps of BLOCK_K."""
    PRECISION: tl.constexpr = V.PRECISION
    BLOCK_M: tl.constexpr = V.BLOCK_M
    BLOCK_N: tl.constexpr = V.BLOCK_N
    M, T, N, C = sizes
    follow(V.PDL)
    n_m, n_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(pid // n_n, pid % n_n, n_m, n_n, V.GROUP_M)
    m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
    offs_m = m + tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, V.BLOCK_K)
    if not V.USE_TMA:  # rows past the end repeat the last and are not stored
        row_m, row_n = tl.minimum(offs_m, M - 1), tl.minimum(offs_n, N - 1)
        x_rows = token_rows(x_source, row_m, T, x_strides)
        w_rows = w_source + tl.cast(row_n, tl.int64) * C

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32 if x_scale_ptr is None else tl.int32)
    for k in tl.range(0, C, V.BLOCK_K):
        if V.USE_TMA:
            x = x_source.load([m, k])
            w = w_source.load([n, k])
        elif V.EVEN_C:
            x = tl.load(x_rows[:, None] + (k + offs_k)[None, :])
            w = tl.load(w_rows[:, None] + (k + offs_k)[None, :])
        else:
            inside = offs_k[None, :] < C - k
            x = tl.load(x_rows[:, None] + (k + offs_k)[None, :], mask=inside, other=0)
            w = tl.load(w_rows[:, None] + (k + offs_k)[None, :], mask=inside, other=0)
        if x_scale_ptr is not None:
            acc = tl.dot(w, x.T, acc, out_dtype=tl.int32)
        else:
            acc = dot(w.to(x.dtype), x.T, acc, PRECISION)

    y = acc.to(tl.float32)
    if x_scale_ptr is not None:
        y *= tl.load(x_scale_ptr + offs_m, mask=offs_m < M, other=0.0)[None, :]
    if w_scale_ptr is not None:
        y *= tl.load(w_scale_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]
    column = place.start + offs_n
    if V.GAP > 0:
        column += tl.minimum(offs_n // V.LANES, place.heads) * V.GAP
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
    y_pointers = y_ptr + tl.cast(offs_m, tl.int64)[None, :] * place.width + column[:, None]
    mask = (offs_m[None, :] < M) & (offs_n[:, None] < N)
    tl.store(y_pointers, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    x_int8_ptr,
    scale_ptr,
    x_strides,
    M,  # B * T
    T,
    C,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """x_int8 = rint(x / s), s = max(max_c |x| / 127, 2⁻¹²⁶), of ROWS tokens."""
    follow(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    clamped = tl.minimum(row, M - 1)
    x_rows = token_rows(x_ptr, clamped, T, x_strides)
    offs_k = tl.arange(0, BLOCK_C)

    largest = tl.zeros([ROWS], tl.int32)  # as bits, which order like the numbers, NaN above all
    for k in tl.range(0, C, BLOCK_C):
        inside = offs_k[None, :] < C - k
        x = tl.load(x_rows[:, None] + (k + offs_k)[None, :], mask=inside, other=0.0)
        bits = tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)
        largest = tl.maximum(largest, tl.max(bits, axis=1))
    absmax = largest.to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(absmax, 127.0), SMALLEST_SCALE)
    finite = absmax < float("inf")
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")), mask=row < M)

    x_int8_rows = x_int8_ptr + tl.cast(row, tl.int64) * C
    for k in tl.range(0, C, BLOCK_C):
        inside = offs_k[None, :] < C - k
        x = tl.load(x_rows[:, None] + (k + offs_k)[None, :], mask=inside, other=0.0).to(tl.float32)
        quotient = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        rounded = tl.where(finite[:, None], quotient, 0.0) + ROUNDING - ROUNDING
        pointers = x_int8_rows[:, None] + (k + offs_k)[None, :]
        tl.store(pointers, rounded.to(tl.int8), mask=inside & (row < M)[:, None])


def int8_projection(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    columns: Columns,
    *,
    config: LaunchConfig | None = None,
) -> None:
    """Overwrites the columns of ``out [B, T, width]`` that the rows of ``w [N, C]`` are for.

    Weight-only: x ``[B, T, C]`` with any strides but the last, which is 1, and no ``x_scale``; w
    int8 with ``w_scale [N]`` float32, or in the dtype of x without. W8A8: x int8 with ``x_scale
    [B * T]`` float32. w, the scales, ``bias [width]`` and ``out`` are contiguous.
    """
    if x.shape[0] * x.shape[1] * w.shape[0] == 0:
        return
    plan = _plan(
        x.device,
        x.dtype,
        w.dtype,
        layout_of(x),
        layout_of(w),
        out.dtype,
        out.shape[-1],
        on_16_bytes(x_scale, w_scale, bias, out),
        columns,
        dot_precision(x.dtype),
        target_of(x.device),
        config,
    )
    plan(x, w, x_scale, w_scale, bias, out)


@planned
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    w_dtype: torch.dtype,
    x: Layout,
    w: Layout,
    out_dtype: torch.dtype,
    width: int,
    others: tuple[bool | None, ...],
    columns: Columns,
    precision: str,
    target: str,
    config: LaunchConfig | None,
) -> Plan:
    """The launch for operands of these layouts; ``others`` are both scales, bias and y."""
    x = as_one_batch(x)
    B, T, C = x.shape
    N = w.shape[0]
    rows = Layout(x.shape[1:], x.strides[1:], x.on_16_bytes)
    aligned = B == 1 and is_aligned(rows, dtype) and is_aligned(w, w_dtype)
    if config is None:
        stage = _stage(B * T, dtype, w_dtype)
        config = launch_config(stage, 0, dtype, target, aligned)
    bulk = {
        0: Bulk(rows.shape, rows.strides, (config.block_m, config.block_k)),
        1: Bulk(w.shape, w.strides, (config.block_n, config.block_k)),
    }
    arguments = {
        "x_strides": Strides(*x.strides[:2]),
        "sizes": Sizes(B * T, T, N, C),
        "place": Place(width, columns.start, columns.heads),
        "V": variant_of(
            config,
            precision,
            EVEN_C=C % config.block_k == 0,
            LANES=columns.lanes,
            GAP=columns.gap,
        ),
        **config.compiler_options,
    }
    grid = (triton.cdiv(B * T, config.block_m) * triton.cdiv(N, config.block_n),)
    return Plan(_int8_projection_kernel, grid, arguments, bulk if config.use_tma else None)


def _stage(tokens: int, dtype: torch.dtype, w_dtype: torch.dtype) -> str:
    """The row of the config table."""
    if dtype == torch.int8:
        return "w8a8"
    if tokens <= FEW_ROWS:
        return "weight_only_few"
    return "weight_only" if w_dtype == torch.int8 else "other_columns"


def quantize_rows(
    x: Tensor, x_int8: Tensor, scale: Tensor, *, config: LaunchConfig | None = None
) -> None:
    """Overwrites ``x_int8 [B, T, C]`` and ``scale [B * T]``, contiguous, from ``x [B, T, C]``.

    x may have any strides but the last, which is 1.
    """
    if scale.numel() == 0:
        return
    others = on_16_bytes(x_int8, scale)
    plan = _quantize_plan(x.device, x.dtype, layout_of(x), others, target_of(x.device), config)
    plan(x, x_int8, scale)


@planned
def _quantize_plan(
    device: torch.device,
    dtype: torch.dtype,
    x: Layout,
    others: tuple[bool | None, ...],
    target: str,
    config: LaunchConfig | None,
) -> Plan:
    """The launch for tokens of this layout; ``others`` are what is written."""
    x = as_one_batch(x)
    B, T, C = x.shape
    if config is None:
        config = launch_config("quantize_rows", 0, dtype, target, False)
    arguments = {
        "x_strides": Strides(*x.strides[:2]),
        "M": B * T,
        "T": T,
        "C": C,
        "ROWS": config.block_m,
        "BLOCK_C": config.block_k,
        **config.options,
    }
    return Plan(_quantize_rows_kernel, (triton.cdiv(B * T, config.block_m),), arguments)
