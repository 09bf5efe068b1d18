"""Gradients of flash attention in one pass over the scores, in plain Triton, and deterministic.

What ``backward.py`` computes, whose two kernels are its specification, for 16-bit operands of heads
of 64 or 128 lanes without window, softcap, dropout or sequences of different lengths, on GPUs whose
products are those of a warp (``mma.sync``). Scores are computed once for all three gradients, five
products instead of seven:

    s = k qᵀ    dp = v doᵀ    dv += p do    dk += ds q    dq = dsᵀ k

Three launches: delta, which also zeroes the counters; one program a key tile, which goes through
the queries of its group of heads from the last to the first and adds its share of dq to a workspace
in float32; and the rounding of dq. No tile of dq is ever moved: the workspace has the order in
which threads hold it.

Sums have one order, so that the same call gives the same bits: key tiles add to a tile of queries
in turns, the first keys first, and a counter for each tile of queries says whose turn it is. The
first one stores instead of adding, so that the workspace need not be zero. A program passes a turn
on when it has the next tile to add, by when its sums have arrived.

No deadlock, as in ``backward_hopper.py``: key tiles of a head are handed out from the first on, by
a counter of tickets, and a program that waits holds no turn. So the earliest key tile that is not
done waits for none, however few programs run at once and in whatever order they begin.

Turns and sums are inline assembly, whose order Triton keeps, but for its pipeliner, which does not
know what they write: so the address of the sums depends on the turn. The interpreter, where
programs run one after another, has a branch of its own, which asserts that it is a tile's turn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels.attention.arguments import Attention, heads_per_section
from ra_triton.kernels.tiles import (
    LN2,
    LOG2E,
    Place,
    Range,
    dot,
    head_and_tile,
    head_of,
    head_offset,
    is_aligned,
    load_rows,
    query_range,
    raw_scores,
    store_rows,
    strides_of,
)
from ra_triton.launch.configs import LaunchConfig
from ra_triton.launch.plans import Layout, Plan

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _eight(line: str) -> str:
    """Assembly of eight numbers: those of results, of addresses, and what goes there."""
    return " ".join(line.format(i, 8 + i, 16 + i) for i in range(8))


STORE_OR_ADD = tl.constexpr(  # eight behind one branch: stored if the last operands are 0
    "{ .reg .pred add; setp.ne.u32 add, $24, 0; @add bra ADD; "
    + _eight("st.relaxed.gpu.global.f32 [${1}], ${2};")
    + " bra DONE; ADD: "
    + _eight("red.relaxed.gpu.global.add.f32 [${1}], ${2};")
    + f" DONE: {_eight('mov.u32 ${0}, 0;')} }}"
)
OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["l"] * 8 + ["r"] * 16 + ["~{memory}"]))


class Warps(NamedTuple):
    """How many warps share the queries and the lanes of a tile of dq."""

    m: int
    n: int


@triton.jit
def _asked(turns_ptr):
    """How many key tiles have added to a tile of queries, perhaps some time ago."""
    if INTERPRETED:
        return tl.load(turns_ptr)
    return tl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.u32 $0, [$1];", "=r,l,~{memory}", [turns_ptr],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _await_turn(turns_ptr, turn, asked):
    """Pass on the turn of the next tile of queries, of which it comes, and await that of this one.

    ``asked``: the counter when it was asked before; if that was the turn, nothing is asked again.
    The fence releases the one and acquires the other. Returns 0, for what comes after to depend on.
    """
    if INTERPRETED:
        tl.atomic_add(turns_ptr + 1, 1)
        assert tl.load(turns_ptr) == turn, "a tile of queries is not at this turn"
        return asked * 0
    return tl.inline_asm_elementwise(
        """{
        .reg .pred others, wait;
        .reg .u32 thread, now;
        bar.sync 0;
        mov.u32 thread, %tid.x;
        setp.ne.u32 others, thread, 0;
        @others bra MEET;
        fence.acq_rel.gpu;
        red.relaxed.gpu.global.add.u32 [$1 + 4], 1;
        setp.eq.u32 wait, $3, $2;
        @wait bra MEET;
        AGAIN:
        ld.acquire.gpu.global.u32 now, [$1];
        setp.ne.u32 wait, now, $2;
        @wait bra AGAIN;
        MEET:
        bar.warp.sync 0xffffffff;
        bar.sync 0;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r,~{memory}", [turns_ptr, turn, asked],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _pass_on(turns_ptr):
    """The next key tile may add to this tile of queries. Returns 0."""
    if INTERPRETED:
        return tl.atomic_add(turns_ptr, 1) * 0
    return tl.inline_asm_elementwise(
        """{
        .reg .pred others;
        .reg .u32 thread;
        bar.sync 0;
        mov.u32 thread, %tid.x;
        setp.ne.u32 others, thread, 0;
        @!others red.release.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l,~{memory}", [turns_ptr], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _by_thread(dq, WARPS: tl.constexpr):
    """A tile as ``[numbers of a thread, threads]``: a thread keeps what mma.sync gives it.

    Of rows: 16 of an instruction, warp, two halves, eight; of lanes: eight of an instruction, warp,
    four, pair.
    """
    M: tl.constexpr = WARPS.m
    N: tl.constexpr = WARPS.n
    ROWS: tl.constexpr = dq.shape[0] // (16 * M)
    COLUMNS: tl.constexpr = dq.shape[1] // (8 * N)
    dq = tl.reshape(dq, (ROWS, M, 2, 8, COLUMNS, N, 4, 2))
    dq = tl.permute(dq, (0, 2, 4, 7, 1, 5, 3, 6))
    return tl.reshape(dq, (4 * ROWS * COLUMNS, 32 * M * N))


@triton.jit
def _by_row(sums, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WARPS: tl.constexpr):
    """The tile ``[BLOCK_M, BLOCK_D]`` again."""
    M: tl.constexpr = WARPS.m
    N: tl.constexpr = WARPS.n
    ROWS: tl.constexpr = BLOCK_M // (16 * M)
    COLUMNS: tl.constexpr = BLOCK_D // (8 * N)
    sums = tl.reshape(sums, (ROWS, 2, COLUMNS, 2, M, N, 8, 4))
    sums = tl.permute(sums, (0, 4, 1, 6, 2, 5, 7, 3))
    return tl.reshape(sums, (BLOCK_M, BLOCK_D))


@triton.jit
def _add(workspace, dq, turn, WARPS: tl.constexpr):
    """``workspace += dq``; the first one stores.

    Triton makes atomics of reductions, whose results come back, and gives a thread four numbers
    side by side, so that those of a warp are four times as far apart.
    """
    dq = _by_thread(dq, WARPS)
    rows, columns = tl.arange(0, dq.shape[0]), tl.arange(0, dq.shape[1])
    # Columns first: then rows are offsets in the instructions.
    pointers = (workspace + columns)[None, :] + (rows * dq.shape[1])[:, None]
    if INTERPRETED:
        if turn == 0:
            tl.store(pointers, dq)
        else:
            tl.atomic_add(pointers, dq)
    else:
        tl.inline_asm_elementwise(
            STORE_OR_ADD, OPERANDS, [pointers.to(tl.int64), dq, turn],
            dtype=tl.int32, is_pure=False, pack=8,
        )  # fmt: skip


@triton.jit
def _through_queries(
    sums,  # dk and dv [BLOCK_N, BLOCK_D]
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
    q_source,
    do_source,
    lse_ptr,  # of this batch and head, as all that follow
    delta_ptr,
    workspace_ptr,
    turns_ptr,
    begin,
    end,
    queries,
    at,
    strides,
    scores,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    WARPS: tl.constexpr,
):
    """``dv += pᵀ do``, ``dk += dsᵀ q`` and, in turns, ``dq += ds k`` over ``end ... begin``."""
    PRECISION: tl.constexpr = V.PRECISION
    dk, dv = sums
    turn = at.row // V.BLOCK_N
    tiles = tl.cdiv(end - begin, V.BLOCK_M)
    for i in tl.range(0, tiles):
        tile = begin // V.BLOCK_M + (tiles - 1 - i)
        m = tile * V.BLOCK_M
        asked = _asked(turns_ptr + tile)  # so early that the answer is there when it is needed
        q = load_rows(q_source, at.b, at.h, m, queries.length, strides.q.t, V.BLOCK_M, True, V)
        offs_m = m + tl.arange(0, V.BLOCK_M)
        # Rows past the end get lse = inf, so their p and ds are 0.
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < queries.length, other=float("inf"))
        sT = raw_scores(k, q, scores.cap_scale, V)  # [BLOCK_N, BLOCK_M]
        pT = tl.exp2(sT * scores.scale_log2 - (lse * LOG2E)[None, :])
        if MASKED:
            pT = tl.where(offs_m[None, :] >= queries.first[:, None], pT, 0.0)
        do = load_rows(do_source, at.b, at.h, m, queries.length, strides.do.t, V.BLOCK_M, True, V)
        dv = dot(pT.to(do.dtype), do, dv, PRECISION)
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < queries.length, other=0.0)
        dpT = dot(v, do.T, None, PRECISION)
        dsT = (pT * (dpT - delta[None, :])).to(q.dtype)
        dk = dot(dsT, q, dk, PRECISION)
        dq = dot(dsT.T, k, None, PRECISION)
        zero = _await_turn(turns_ptr + tile, turn, asked)
        workspace = workspace_ptr + tl.cast(tile + zero, tl.int64) * (V.BLOCK_M * V.BLOCK_D)
        _add(workspace, dq, turn, WARPS)
    return dk, dv


@triton.jit(do_not_specialize=["section"])
def _attention_backward_one_pass_kernel(
    q_source,  # pointers
    k_source,
    v_source,
    do_source,
    lse_ptr,
    delta_ptr,
    workspace_ptr,  # fp32 [B * H, query tiles, BLOCK_M * BLOCK_D], as _by_thread orders a tile
    turns_ptr,  # int32 [1 + B * H * (query tiles + 1)], zeros: the next ticket, and the turns of
    # a head's tiles and of none, which is passed on ahead of the first
    dk_ptr,
    dv_ptr,
    strides,
    dk_strides,  # in elements
    dv_strides,
    sizes,
    section,  # key/value heads at a time, but with CAUSAL
    scores,
    V: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Gradients dk and dv of one key tile, and its share of dq: cut query tiles, and the others."""
    BLOCK_N: tl.constexpr = V.BLOCK_N
    BLOCK_D: tl.constexpr = V.BLOCK_D
    T_q, T_k, H_kv, group = sizes.T_q, sizes.T_k, sizes.H_kv, sizes.group
    n_n = tl.cdiv(T_k, BLOCK_N)
    n_m = tl.cdiv(T_q, V.BLOCK_M)
    ticket = tl.atomic_add(turns_ptr, 1, sem="relaxed")
    head_kv, tile = head_and_tile(ticket, sizes.B * H_kv, n_n, section, not V.CAUSAL)
    b = head_kv // H_kv
    h_kv = head_kv % H_kv
    n = tile * BLOCK_N
    k_source = head_of(k_source, b, h_kv, strides.k, V)
    v_source = head_of(v_source, b, h_kv, strides.v, V)
    k = load_rows(k_source, b, h_kv, n, T_k, strides.k.t, BLOCK_N, True, V)
    v = load_rows(v_source, b, h_kv, n, T_k, strides.v.t, BLOCK_N, True, V)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    zero = 0  # of assembly after each head: what depends on it does not stay in registers meanwhile
    for h in tl.range(h_kv * group, (h_kv + 1) * group, disable_licm=True):
        queries = query_range(n + zero, T_q, T_k, 0, 0, V)
        begin, cut = queries.begin, tl.minimum(queries.full_begin, T_q)
        if not V.CAUSAL:  # p of a key that is not there may be infinite
            cut = tl.where(n + zero + BLOCK_N > T_k, T_q, 0)
            first = tl.where(n + zero + tl.arange(0, BLOCK_N) < T_k, 0, T_q)
            queries = Range(first, 0, 0, cut, T_q, T_q, T_q)
        head = b * H_kv * group + h
        rows = tl.cast(head, tl.int64) * T_q
        q_head = head_of(q_source, b, h, strides.q, V)
        do_head = head_of(do_source, b, h, strides.do, V)
        workspace = workspace_ptr + tl.cast(head, tl.int64) * n_m * (V.BLOCK_M * BLOCK_D)
        turns = turns_ptr + 1 + tl.cast(head, tl.int64) * (n_m + 1)
        inputs = (k, v, q_head, do_head, lse_ptr + rows, delta_ptr + rows, workspace, turns)
        shared = (queries, Place(b, h, head, n, 0), strides, scores)
        sums = (dk, dv)
        sums = _through_queries(sums, *inputs, cut, T_q + zero, *shared, V, False, WARPS)
        dk, dv = _through_queries(sums, *inputs, begin, cut, *shared, V, True, WARPS)
        zero = _pass_on(turns + begin // V.BLOCK_M)
    dk_ptr += head_offset(b, h_kv, dk_strides, 1)
    store_rows(dk_ptr, dk * (scores.scale_log2 * LN2), n, T_k + zero, dk_strides.t, V)
    dv_ptr += head_offset(b, h_kv, dv_strides, 1)
    store_rows(dv_ptr, dv, n, T_k + zero, dv_strides.t, V)


@triton.jit
def _round_query_gradient_kernel(
    workspace_ptr,
    turns_ptr,
    dq_ptr,
    dq_strides,
    sizes,
    scores,
    V: tl.constexpr,
    WARPS: tl.constexpr,
):
    """``dq = c sums`` of one tile of queries; 0 where no key tile has added to it."""
    n_m = tl.cdiv(sizes.T_q, V.BLOCK_M)
    head = tl.program_id(0) // n_m
    tile = tl.program_id(0) % n_m
    turns = tl.load(turns_ptr + 1 + tl.cast(head, tl.int64) * (n_m + 1) + tile)
    workspace_ptr += tl.cast(tl.program_id(0), tl.int64) * (V.BLOCK_M * V.BLOCK_D)
    sums = tl.load(workspace_ptr + tl.arange(0, V.BLOCK_M * V.BLOCK_D))
    sums = tl.where(turns > 0, sums, 0.0)
    sums = _by_row(sums, V.BLOCK_M, V.BLOCK_D, WARPS)
    dq_ptr += head_offset(head // sizes.H, head % sizes.H, dq_strides, 1)
    dq = sums * (scores.scale_log2 * LN2)
    store_rows(dq_ptr, dq, tile * V.BLOCK_M, sizes.T_q, dq_strides.t, V)


class Plans(NamedTuple):
    """The launches of one backward, in their order."""

    delta: Plan  # on (o, do, dlse, delta, turns)
    one_pass: Plan  # on (q, k, v, do, lse, delta, workspace, turns, dk, dv)
    rounding: Plan  # on (workspace, turns, dq)
    counters: int
    sums: int  # numbers of the workspace

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        do: Tensor,
        dlse: Tensor | None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        *_: None,
    ) -> None:
        """Write dq, dk and dv.

        Allocates for the queries in whole tiles 4 bytes for each number, and 4 for each row and
        each tile.
        """
        delta = torch.empty_like(lse)
        workspace = torch.empty(self.sums, dtype=torch.float32, device=q.device)
        turns = torch.empty(self.counters, dtype=torch.int32, device=q.device)
        self.delta(o, do, dlse, delta, turns)
        self.one_pass(q, k, v, do, lse, delta, workspace, turns, dk, dv)
        self.rounding(workspace, turns, dq)


def warps_of(queries: int, lanes: int, warps: int) -> Warps:
    """As Triton shares a product of this size, of which mma.sync has 16 x 8; else sums would move.

    Twice as many where more parts are left to one.
    """
    shared = Warps(1, 1)
    while shared.m * shared.n < warps:
        more = queries // (16 * shared.m) >= lanes // (8 * shared.n)
        shared = Warps(2 * shared.m, shared.n) if more else Warps(shared.m, 2 * shared.n)
    return shared


def backward_plans(
    call: Attention,
    gradients: tuple[Layout, Layout, Layout],
    config: LaunchConfig,
    delta: Callable[[int], Plan],
) -> Plans:
    """The launches for operands and ``(dq, dk, dv)``; ``delta``: that of delta and so many zeros.

    Raises:
        ValueError: dropout, a softcap, a window, sequences of different lengths, memory that is not
            aligned, or a head dim, dtype or config that the kernel does not have.
    """
    (dq, dk, dv), D = gradients, call.inputs[0].shape[3]
    B, T_q, T_k, H, H_kv, group = call.sizes
    if call.scores.dropout_p or call.softcap or call.mask.WINDOW or call.varlen:
        raise ValueError(
            "one pass in plain Triton has neither dropout, softcap, windows nor sequences, got "
            f"dropout_p = {call.scores.dropout_p}, softcap: {call.softcap}, window: "
            f"{call.mask.WINDOW}, sequences: {call.varlen}"
        )
    if not call.aligned or not all(is_aligned(t, call.dtype) for t in gradients):
        raise ValueError("one pass takes q, k, v, do, dq, dk and dv in rows of whole 16 bytes")
    if D not in (64, 128) or call.dtype.itemsize != 2:
        raise ValueError(
            f"one pass has 16-bit heads of 64 or 128 lanes, got D = {D} in {call.dtype}"
        )
    warps = warps_of(config.block_m, D, config.num_warps)
    shared_out = not config.block_m % (16 * warps.m) and warps.m * warps.n == config.num_warps
    if not shared_out or config.use_tma or config.pdl or config.groups > 1:
        raise ValueError(
            "one pass in plain Triton has tiles that its warps share in parts of 16 queries and 8 "
            f"lanes, and neither TMA, PDL nor groups, got {config}"
        )
    everything = call.arguments(config)
    names = ("sizes", "scores", "V", "enable_fp_fusion", "num_warps")
    shared: dict[str, Any] = {name: everything[name] for name in names} | {"WARPS": warps}
    # Read, or added to, again and again: q, do and, in float32, dq. Under a causal mask short
    # queues are worth more: the more heads at a time, the fewer key tiles wait for each other.
    head_bytes = 2 * T_q * D * (call.dtype.itemsize + 2) * group
    arguments = shared | {
        "strides": everything["strides"],
        "dk_strides": strides_of(dk),
        "dv_strides": strides_of(dv),
        "section": heads_per_section(B * H_kv, head_bytes),
        "num_stages": config.num_stages,
    }
    tiles, keys = B * H * triton.cdiv(T_q, config.block_m), triton.cdiv(T_k, config.block_n)
    counters = 1 + tiles + B * H
    return Plans(
        delta(counters),
        Plan(_attention_backward_one_pass_kernel, (B * H_kv * keys,), arguments),
        Plan(_round_query_gradient_kernel, (tiles,), shared | {"dq_strides": strides_of(dq)}),
        *(counters, tiles * config.block_m * D),
    )
