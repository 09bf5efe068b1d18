"""Gradients of ``compose`` with respect to every factor, deterministic, in two launches.

    dW_q[h] = [w_std dQ_std | 0] + dQ_low[h / G] W_recipᵀ / G       dW_v = dV
    dW_k    = [dK_std | 0] + Σ_h w_rec dK_low[h] W_recipᵀ           h: the query heads of a key head
    dW_recip[h] = W_q[h]ᵀ dQ_low[h / G] / G + w_rec W_kᵀ dK_low[h]
    dw_std[h] = Σ W_q[h] dQ_std[h]           dw_rec[h] = Σ W_recip * (W_kᵀ dK_low[h])

G = H / H_kv query heads to a key head. dW ``[C, N]``, whose columns or rows have stride 1, and
dbias ``[N]`` → the gradients of W_q, W_k, W_v, W_recip, w_std, w_rec, b_q, b_k, b_v, contiguous.
A bias is one more row of its weight. The first launch writes the gradients of weights and biases,
tile by tile, and beside them partial sums of the others: C is cut into a number of parts that
depends on sizes and tiles alone, the biases being one more. The second adds the parts in a fixed
order, and the heads where W_recip or a gate is one for all. No atomics; overwrites nothing.
"""

from collections.abc import Sequence
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
from ra_triton.launch.configs import launch_config
from ra_triton.launch.plans import Layout, Plan, layout_of, planned
from ra_triton.weights.factors import Factors
from ra_triton.weights.layout import RALayout

MAX_PARTS = 16  # of C
PROGRAMS = 256  # that cutting it into parts aims at
Grads = tuple[Tensor | None, ...]


class Partial(NamedTuple):
    """Partial sums of W_recip ``[parts, H, D, R]``, then of gates ``[2, parts * r_tiles, H]``."""

    parts: int
    part_rows: int
    r_tiles: int
    gates: int  # where those of the gates begin
    programs: int  # that compute them


class Sums(NamedTuple):
    """One gradient, ``[groups, elements]``, as sums of parts."""

    begin: int  # of the parts, in the scratch memory
    elements: int
    parts: int
    stride_g: int
    stride_p: int
    programs: int


class Variant(NamedTuple):
    """What the compiled code depends on."""

    D: int
    R: int
    STD: int  # NO_GATE, NUMBER or TENSOR
    REC: int
    BIAS: bool  # whether a gradient of the result's bias came
    PACKED: bool
    TRANSPOSED: bool  # whether dW's rows have stride 1, instead of its columns
    NEED_Q: bool  # which gradients are written
    NEED_K: bool
    NEED_V: bool
    NEED_RECIP: bool
    NEED_STD: bool
    NEED_REC: bool
    NEED_BQ: bool
    NEED_BK: bool
    NEED_BV: bool
    BLOCK_M: int
    BLOCK_D: int
    BLOCK_R: int
    BLOCK_K: int
    PDL: bool


@triton.jit
def _gradient(rows, first, lanes, mask, stride, V: tl.constexpr):
    """``dW[row, first + lane]``, 0 where masked; ``rows`` point to column 0."""
    column = first + lanes
    if V.TRANSPOSED:
        column = column.to(tl.int64) * stride
    return tl.load(rows + column, mask=mask, other=0.0)


@triton.jit
def _weight_rows(
    dw_rows,
    recip_ptr,  # of the first head
    scale_ptr,
    out_rows,
    inside,
    first_std,
    first_low,
    step_low,
    head,  # the first
    n_heads,
    std_scale,
    low_scale,
    stride,
    strides,
    GATED: tl.constexpr,  # whether each head has a scale of its own, w_rec
    V: tl.constexpr,
):
    """``[std_scale dstd | 0] + Σ_i low_scale_i dlow_i W_recip_iᵀ`` for some rows of a head."""
    BLOCK_M: tl.constexpr = V.BLOCK_M
    BLOCK_D: tl.constexpr = V.BLOCK_D
    lane = tl.arange(0, BLOCK_D)[None, :]
    offs_k = tl.arange(0, V.BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if V.R > 0:
        for i in tl.range(0, n_heads):
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            head_recip = recip_ptr + tl.cast(head + i, tl.int64) * strides.recip_h
            for k in tl.range(0, V.R, V.BLOCK_K):
                r = k + offs_k
                mask = inside & (r < V.R)[None, :]
                low = _gradient(dw_rows, first_low + i * step_low, r[None, :], mask, stride, V)
                mask = (r < V.R)[:, None] & (lane < V.D)
                pointers = head_recip + lane.to(tl.int64) * strides.recip_d + r[:, None]
                acc = product(low, tl.load(pointers, mask=mask, other=0.0), acc)
            scale = low_scale
            if GATED:
                scale = gate(scale_ptr, low_scale, head + i, strides.rec, V.REC)
            total += acc * scale
    LANES: tl.constexpr = V.D - V.R
    if LANES > 0:
        mask = inside & (lane < LANES)
        total += _gradient(dw_rows, first_std, lane, mask, stride, V).to(tl.float32) * std_scale
    tl.store(out_rows + lane, total.to(out_rows.dtype.element_ty), mask=inside & (lane < V.D))


@triton.jit
def _partial_sums(
    pid,
    W_q_ptr,
    W_k_ptr,
    W_recip_ptr,
    w_rec_ptr,
    b_q_ptr,
    b_k_ptr,
    dw_ptr,
    dbias_ptr,
    parts_ptr,
    stride,
    strides,
    sizes,
    numbers,
    partial,
    V: tl.constexpr,
):
    """``W_qᵀ dQ_low / G + w_rec W_kᵀ dK_low``, ``Σ W_q dQ_std``, ``Σ W_recip (W_kᵀ dK_low)``."""
    BLOCK_D: tl.constexpr = V.BLOCK_D
    BLOCK_R: tl.constexpr = V.BLOCK_R
    BLOCK_K: tl.constexpr = V.BLOCK_K
    C, H, group = sizes.C, sizes.H, sizes.H // sizes.H_kv
    head = pid % H
    r_tile = pid // H % partial.r_tiles
    part = pid // H // partial.r_tiles
    begin = part * partial.part_rows
    end = tl.minimum(begin + partial.part_rows, C)
    if V.BIAS:  # the last part: one row, which begins elsewhere
        is_bias = part == partial.parts - 1
        W_q_ptr = tl.where(is_bias, b_q_ptr, W_q_ptr)
        W_k_ptr = tl.where(is_bias, b_k_ptr, W_k_ptr)
        dw_ptr = tl.where(is_bias, dbias_ptr, dw_ptr)
        begin = tl.where(is_bias, 0, begin)
        end = tl.where(is_bias, 1, end)
        if V.TRANSPOSED:
            stride = tl.where(is_bias, 1, stride)
    W_q_ptr += head * V.D
    W_k_ptr += head // group * V.D
    lane = tl.arange(0, V.BLOCK_D)[None, :]
    r = r_tile * V.BLOCK_R + tl.arange(0, V.BLOCK_R)
    # Transposed: no tile has the 64 rows that Hopper and Blackwell multiply at a time, which would
    # mostly be padding, and which Triton 3.7.1 fails to compile here for sm_100.
    q_low = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    k_low = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    std = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    LANES: tl.constexpr = V.D - V.R
    WITH_STD: tl.constexpr = V.NEED_STD and LANES > 0
    for m in tl.range(begin, end, V.BLOCK_K):
        row = m + tl.arange(0, V.BLOCK_K)[:, None]
        inside = row < end
        row = row.to(tl.int64)
        mask = inside & (lane < V.D)
        q = tl.load(W_q_ptr + row * strides.q + lane, mask=mask, other=0.0)
        dw_rows = dw_ptr + row * (1 if V.TRANSPOSED else stride)
        if WITH_STD:
            first = columns(head, sizes, "q_std", V)
            grad = _gradient(dw_rows, first, lane, inside & (lane < LANES), stride, V)
            std += q.to(tl.float32) * grad.to(tl.float32)
        if V.R > 0:
            k = tl.load(W_k_ptr + row * strides.k + lane, mask=mask, other=0.0)
            mask = inside & (r < V.R)[None, :]
            first = columns(head // group, sizes, "q_low", V)
            q_low = product(_gradient(dw_rows, first, r[None, :], mask, stride, V).T, q, q_low)
            first = columns(head, sizes, "k_low", V)
            k_low = product(_gradient(dw_rows, first, r[None, :], mask, stride, V).T, k, k_low)
    if V.R > 0:
        mask = (lane < V.D) & (r < V.R)[:, None]
        if V.NEED_RECIP:
            w_rec = gate(w_rec_ptr, numbers.rec, head, strides.rec, V.REC)
            out_ptr = parts_ptr + (tl.cast(part, tl.int64) * H + head) * (V.D * V.R)
            tl.store(
                out_ptr + lane * V.R + r[:, None], q_low * numbers.mean + k_low * w_rec, mask=mask
            )
    gates_ptr = parts_ptr + partial.gates + (part * partial.r_tiles + r_tile) * H + head
    if V.NEED_STD:
        if r_tile > 0:
            std = tl.zeros_like(std)
        tl.store(gates_ptr, tl.sum(tl.sum(std, 0), 0))
    if V.NEED_REC:
        rec = tl.cast(0.0, tl.float32)
        if V.R > 0:
            recip_ptr = W_recip_ptr + tl.cast(head, tl.int64) * strides.recip_h
            pointers = recip_ptr + lane.to(tl.int64) * strides.recip_d + r[:, None]
            recip = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            rec = tl.sum(tl.sum(recip * k_low, 0), 0)
        tl.store(gates_ptr + partial.parts * partial.r_tiles * H, rec)


@triton.jit
def _wanted(is_bias, weight: tl.constexpr, bias: tl.constexpr, BIAS: tl.constexpr):
    """Whether the gradient of these rows, of a weight or of its bias, has a place."""
    wanted = weight
    if BIAS:
        wanted = tl.where(is_bias, bias, weight)
    return wanted


@triton.jit
def _weights(
    pid,
    W_recip_ptr,
    w_std_ptr,
    w_rec_ptr,
    dw_ptr,
    dbias_ptr,
    outs,  # dW_q, dW_k, dW_v, db_q, db_k, db_v
    stride,
    strides,
    sizes,
    numbers,
    V: tl.constexpr,
):
    """``[w_std dQ_std | 0] + dQ_low W_recipᵀ / G`` or its like for W_k, or dV: rows of a head."""
    dW_q_ptr, dW_k_ptr, dW_v_ptr, db_q_ptr, db_k_ptr, db_v_ptr = outs
    WRITE_Q: tl.constexpr = V.NEED_Q or V.NEED_BQ
    WRITE_K: tl.constexpr = V.NEED_K or V.NEED_BK
    WRITE_V: tl.constexpr = V.NEED_V or V.NEED_BV
    C, H, H_kv = sizes.C, sizes.H, sizes.H_kv
    heads, group = H + 2 * H_kv, H // H_kv
    tile, head = pid // heads, pid % heads
    n_rows = C
    is_bias = False
    if V.BIAS:  # the last tile: one row, which begins elsewhere
        is_bias = tile == tl.cdiv(C, V.BLOCK_M)
        dw_ptr = tl.where(is_bias, dbias_ptr, dw_ptr)
        if WRITE_Q:
            dW_q_ptr = tl.where(is_bias, db_q_ptr, dW_q_ptr)
        if WRITE_K:
            dW_k_ptr = tl.where(is_bias, db_k_ptr, dW_k_ptr)
        if WRITE_V:
            dW_v_ptr = tl.where(is_bias, db_v_ptr, dW_v_ptr)
        tile = tl.where(is_bias, 0, tile)
        n_rows = tl.where(is_bias, 1, C)
        if V.TRANSPOSED:
            stride = tl.where(is_bias, 1, stride)
    row = tile * V.BLOCK_M + tl.arange(0, V.BLOCK_M)[:, None]
    inside = row < n_rows
    row = row.to(tl.int64)
    dw_rows = dw_ptr + row * (1 if V.TRANSPOSED else stride)
    if head < H:
        if WRITE_Q:
            _weight_rows(
                dw_rows, W_recip_ptr, w_rec_ptr, dW_q_ptr + row * (H * V.D) + head * V.D,
                inside & _wanted(is_bias, V.NEED_Q, V.NEED_BQ, V.BIAS),
                columns(head, sizes, "q_std", V), columns(head // group, sizes, "q_low", V),
                0, head, 1, gate(w_std_ptr, numbers.std, head, strides.std, V.STD),
                numbers.mean, stride, strides, False, V,
            )  # fmt: skip
    elif head < H + H_kv:
        if WRITE_K:
            head -= H
            _weight_rows(
                dw_rows, W_recip_ptr, w_rec_ptr, dW_k_ptr + row * (H_kv * V.D) + head * V.D,
                inside & _wanted(is_bias, V.NEED_K, V.NEED_BK, V.BIAS),
                columns(head, sizes, "k_std", V), columns(head * group, sizes, "k_low", V),
                V.D if V.PACKED else V.R, head * group, group, 1.0,
                numbers.rec, stride, strides, True, V,
            )  # fmt: skip
    elif WRITE_V:
        head -= H + H_kv
        lane = tl.arange(0, V.BLOCK_D)[None, :]
        mask = inside & (lane < V.D) & _wanted(is_bias, V.NEED_V, V.NEED_BV, V.BIAS)
        dv = _gradient(dw_rows, columns(head, sizes, "v", V), lane, mask, stride, V)
        out_rows = dW_v_ptr + row * (H_kv * V.D) + head * V.D
        tl.store(out_rows + lane, dv.to(dW_v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _compose_backward_kernel(
    W_q_ptr,
    W_k_ptr,
    W_recip_ptr,
    w_std_ptr,
    w_rec_ptr,
    b_q_ptr,
    b_k_ptr,
    dw_ptr,  # [C, N]
    dbias_ptr,  # [N], contiguous
    dW_q_ptr,
    dW_k_ptr,
    dW_v_ptr,
    db_q_ptr,
    db_k_ptr,
    db_v_ptr,
    parts_ptr,
    stride,  # of dW's rows; TRANSPOSED: of its columns
    strides,
    sizes,
    numbers,
    partial,
    first_program,  # of those that write the gradients of weights and biases
    V: tl.constexpr,
):
    """Partial sums of what all rows share, and the gradients of weights and biases."""
    follow(V.PDL)
    pid = tl.program_id(0)
    if (V.NEED_RECIP or V.NEED_STD or V.NEED_REC) and pid < partial.programs:
        _partial_sums(
            pid, W_q_ptr, W_k_ptr, W_recip_ptr, w_rec_ptr, b_q_ptr, b_k_ptr, dw_ptr,
            dbias_ptr, parts_ptr, stride, strides, sizes, numbers, partial, V,
        )  # fmt: skip
    if pid >= partial.programs:
        pid += first_program - partial.programs
        outs = dW_q_ptr, dW_k_ptr, dW_v_ptr, db_q_ptr, db_k_ptr, db_v_ptr
        _weights(
            pid, W_recip_ptr, w_std_ptr, w_rec_ptr, dw_ptr, dbias_ptr, outs,
            stride, strides, sizes, numbers, V,
        )  # fmt: skip


@triton.jit
def _sum(parts_ptr, out_ptr, pid, sums, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """``out[g, i] = Σ_p parts[g, p, i]``."""
    tiles = tl.cdiv(sums.elements, BLOCK)
    g = tl.cast(pid // tiles, tl.int64)
    offs = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = offs < sums.elements
    pointers = parts_ptr + sums.begin + g * sums.stride_g + offs[None, :]
    total = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for first in tl.range(0, sums.parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)[:, None]
        mask = (part < sums.parts) & inside[None, :]
        total += tl.load(pointers + part.to(tl.int64) * sums.stride_p, mask=mask, other=0.0)
    out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + g * sums.elements + offs, out, mask=inside)


@triton.jit
def _compose_sums_kernel(
    parts_ptr,
    dW_recip_ptr,
    dw_std_ptr,
    dw_rec_ptr,
    recip,
    std,
    rec,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """``Σ_p`` over parts and, of what all heads share, over heads."""
    follow(PDL)
    pid = tl.program_id(0)
    if dW_recip_ptr is not None and pid < recip.programs:
        _sum(parts_ptr, dW_recip_ptr, pid, recip, BLOCK_P, BLOCK)
    pid -= recip.programs
    if dw_std_ptr is not None and (pid >= 0) & (pid < std.programs):
        _sum(parts_ptr, dw_std_ptr, pid, std, BLOCK_P, BLOCK)
    pid -= std.programs
    if dw_rec_ptr is not None and pid >= 0:
        _sum(parts_ptr, dw_rec_ptr, pid, rec, BLOCK_P, BLOCK)


def compose_gradients(
    factors: Factors, dw: Tensor, dbias: Tensor | None, needed: Sequence[bool]
) -> Grads:
    """Gradients of the nine tensors of ``factors``, each only if needed, in its dtype.

    ``dw [C, N]`` and ``dbias [N]`` are those of ``compose``'s results. A dbias of None is zero, and
    the biases have no gradient then.
    """
    if dw.stride(1) != 1 and dw.stride(0) != 1:
        dw = dw.contiguous()
    dbias = None if dbias is None else dbias.contiguous()
    tensors = with_unit_strides(factors)
    W_q = factors.W_q
    wanted = (*needed[:6], *(need and dbias is not None for need in needed[6:]))
    grads = [
        t.new_empty(t.shape) if t is not None and need else None
        for t, need in zip(tensors, wanted, strict=True)
    ]
    present = tuple(grad is not None for grad in grads)
    aligned = None if dbias is None else dbias.data_ptr() % 16 == 0
    key, target = key_of(tensors, factors), target_of(W_q.device)
    first, second, scratch = _plans(
        W_q.device, *key, layout_of(dw), dw.dtype, aligned, present, target
    )
    parts = W_q.new_empty(scratch, dtype=torch.float32) if second is not None else None
    if first is not None:
        pairs = list(zip(grads[:3], grads[6:], strict=True))  # one stands for both, unused
        weights = [weight if weight is not None else bias for weight, bias in pairs]
        biases = [bias if bias is not None else weight for weight, bias in pairs]
        first(*tensors[:2], *tensors[3:8], dw, dbias, *weights, *biases, parts)
    if second is not None:
        second(parts, *grads[3:6])
    return tuple(grads)


@planned
def _plans(
    device: torch.device,
    dtypes: Dtypes,
    layouts: Layouts,
    numbers: Given,
    dw: Layout,
    dw_dtype: torch.dtype,
    dbias: bool | None,  # whether its address is on 16 bytes; None: there is none
    present: tuple[bool, ...],
    target: str,
) -> tuple[Plan | None, Plan | None, int]:
    """Both launches, None where there is nothing to do, and the elements of their scratch memory.

    For factors of these layouts and numbers, in the order of :class:`Factors`; ``present`` says of
    each of its tensors whether its gradient is wanted.
    """
    layout, arguments = common_arguments(layouts, numbers)
    H, D, R = layout.n_head, layout.head_dim, layout.R
    C = arguments["sizes"].C
    transposed = dw.strides[1] != 1
    operands = dw_dtype if dw_dtype == dtypes[0] else torch.float32  # of the products
    config = launch_config("compose_backward", D, operands, target, not transposed)
    block_r = min(config.block_n, block_d_of(R))
    names = ("Q", "K", "V", "RECIP", "STD", "REC", "BQ", "BK", "BV")
    needs = dict(zip(names, present, strict=True))
    needs["RECIP"] = needs["RECIP"] and R > 0
    summed = needs["RECIP"] or needs["STD"] or needs["REC"]
    with_bias = dbias is not None
    variant = Variant(
        **variant_of(layouts, numbers, layout) | {"BIAS": with_bias},
        **{f"NEED_{name}": need for name, need in needs.items()},
        TRANSPOSED=transposed,
        BLOCK_M=config.block_m,
        BLOCK_D=block_d_of(D),
        BLOCK_R=block_r,
        BLOCK_K=config.block_k,
        PDL=config.pdl,
    )
    partial = Partial(0, 1, 1, 0, 0)
    if summed:
        partial = _partial(C, H, D * R, max(1, triton.cdiv(R, block_r)), config.block_k, with_bias)
    row_tiles, heads = triton.cdiv(C, config.block_m), layout.packed_heads
    tiles = row_tiles if any(present[:3]) else 0
    programs = partial.programs + (tiles + any(present[6:])) * heads
    arguments |= {
        "stride": dw.strides[1] if transposed else dw.strides[0],
        "partial": partial,
        "first_program": (row_tiles - tiles) * heads,
        "V": variant,
        **config.compiler_options,
    }
    first = Plan(_compose_backward_kernel, (programs,), arguments) if programs else None
    if not summed:
        return first, None, 0
    scratch = partial.gates + 2 * partial.parts * partial.r_tiles * H
    return first, _sums_plan(layouts, layout, partial, needs, dtypes[0], target), scratch


def _partial(
    C: int, H: int, elements: int, r_tiles: int, multiple: int, with_bias: bool
) -> Partial:
    """Parts of C in rows that are a multiple of ``multiple``; the biases are one more part."""
    most = min(MAX_PARTS, max(1, PROGRAMS // (H * r_tiles)))
    part_rows = max(1, triton.cdiv(triton.cdiv(C, most), multiple)) * multiple
    parts = triton.cdiv(C, part_rows) + with_bias
    return Partial(parts, part_rows, r_tiles, parts * H * elements, parts * H * r_tiles)


def _sums_plan(
    layouts: Layouts,
    layout: RALayout,
    partial: Partial,
    needs: dict[str, bool],
    dtype: torch.dtype,
    target: str,
) -> Plan:
    """The launch that adds partial sums."""
    config = launch_config("compose_sums", layout.head_dim, dtype, target, False)
    H, elements = layout.n_head, layout.head_dim * layout.R
    n_gates = partial.parts * partial.r_tiles

    def sums(need: str, begin: int, groups: int, elements: int, parts: int, stride_p: int) -> Sums:
        if not needs[need]:
            return Sums(0, 0, 0, 0, 0, 0)
        programs = groups * triton.cdiv(elements, config.block_n)
        return Sums(begin, elements, parts, elements, stride_p, programs)

    recip, w_std, w_rec = layouts[3:6]
    groups = H if recip is not None and len(recip.shape) == 3 else 1
    n_parts = partial.parts * H // groups
    all_sums = {"recip": sums("RECIP", 0, groups, elements, n_parts, elements * groups)}
    for i, (name, of) in enumerate((("std", w_std), ("rec", w_rec))):
        begin = partial.gates + i * n_gates * H
        width = H if of is not None and of.shape else 1
        all_sums[name] = sums(name.upper(), begin, 1, width, n_gates * H // width, width)
    arguments = {**all_sums, "BLOCK_P": config.block_m, "BLOCK": config.block_n, **config.options}
    programs = sum(one.programs for one in all_sums.values())
    return Plan(_compose_sums_kernel, (programs,), arguments)
