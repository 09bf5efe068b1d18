"""Gradients of flash attention on Hopper (sm_90): one pass over the scores, and deterministic.

What ``backward.py`` computes, whose kernels are its specification, for 16-bit operands that suit
bulk copies, heads of 64 or 128 lanes, and neither softcap nor dropout. Scores are computed once for
all three gradients, five products instead of seven:

    p = exp(softmax_scale * qkᵀ - lse)    ds = p (do vᵀ - delta)    delta = Σ_d o do - dlse
    dv = pᵀ do    dk = c dsᵀ q    dq = c ds k    c = softmax_scale

Two launches. The first writes delta and ``lse log2(e)``, padded to whole tiles. The second has one
program an SM, each of which takes 128 keys of a key/value head after another, and goes with them
through the queries of the group of heads. Two warpgroups compute, 64 keys each; one warp copies;
one adds tiles of dq to a workspace in float32; one scales and rounds tiles of dq to which all has
been added. Scores are transposed, so that pᵀ and dsᵀ are operands in registers of dv and dk; ds
also goes to shared memory, where the warpgroups meet once a tile, for each computes half of a tile
of dq: half of the lanes, or of the queries.

Sums have one order, so that the same call gives the same bits: what is added to a tile of queries
is added in turns, in the order in which keys are handed out, and a counter for each tile says whose
turn it is. The first one stores instead of adding, so that the workspace need not be zero.

Keys are handed out from the last to the first, and each visits its queries from the first on. So
under a causal mask programs that begin at once add to different tiles, and each tile that one comes
to has just been left by the one before: nobody waits. Were the first keys first, all would begin
with the last queries, in a queue. But then the longest work comes last, so the last section of
heads goes the other way, and all programs end together. So do heads of which L2 does not hold two:
programs in a queue read the same tiles.

No deadlock: keys are handed out by a counter of tickets, and a program works on them in the order
in which it got them. So the earliest keys that are not done wait for none, however few programs run
at once and in whatever order they begin.

Sequences of different lengths have tiles of their own, in each of which copies are cut where the
sequence ends. Those of sequence ``b`` begin at tile ``offsets[b] // ROWS + b`` of a head, so that
whose tile it is can be searched for (:func:`sequence_of`); a tile of a sequence may be empty.
That every tile is one sequence's, for whose keys others wait, is true of offsets that never
decrease, so the first launch makes such offsets of those that it gets.

After FlashAttention-3 (arXiv:2407.08608). Overwrites only dq, dk and dv.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels.attention.arguments import (
    SECTION_BYTES,
    Attention,
    heads_per_section,
    rows_in_bulk,
)
from ra_triton.kernels.attention.hopper_tiles import (
    columns_within,
    coordinates,
    rows_of_sequences,
)
from ra_triton.kernels.tiles import (
    LN2,
    LOG2E,
    follow,
    head_and_tile,
    is_aligned,
    row_at,
    sequence,
    strides_of,
)
from ra_triton.launch import gluon
from ra_triton.launch.configs import LaunchConfig, launch_config
from ra_triton.launch.gluon import (
    REINTERPRET,
    arrive_at,
    async_load,
    async_reduce_add,
    async_store,
    await_at,
    fence_async_global,
    fence_async_shared,
    gl,
    mbarrier,
    opaque_zero,
    store_wait,
    store_wait_written,
    swizzled,
    unswizzled,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ra_triton.launch.plans import Bulk, Layout, Plan

HALF = gl.constexpr(64)  # keys of a warpgroup: what one WGMMA takes
KEYS = gl.constexpr(128)  # of a program
# Of a thread that computes: what two warpgroups and one of 24 leave of the 65536 of an SM.
REGISTERS = gl.constexpr(240)
COPIER_REGISTERS = gl.constexpr(24)  # of one that copies, adds or rounds: the least there is
COMPUTING = gl.constexpr(256)  # threads
COMPUTING_AND_WARP = gl.constexpr(256 + 32)
ONE_GROUP_AND_WARP = gl.constexpr(128 + 32)
THREE_WARPS = gl.constexpr(96)
# Named barriers: the hardware has 16, and Triton uses those below 3; its later ones would be those
# of partitions of one warp, which need none.
KEYS_READ = gl.constexpr(4)  # k and v, for the last time
EMPTY = gl.constexpr(5)  # one for each stage of q and do
DS_READY = gl.constexpr(7)
DQ_FULL = gl.constexpr(8)  # one for each warpgroup, as the next
DQ_EMPTY = gl.constexpr(10)
RESULTS_READY = gl.constexpr(12)
WORK = gl.constexpr(13)  # is written: for the warpgroups
WORK_TO_ADD = gl.constexpr(14)  # the same, for the adding warp
WORK_READ = gl.constexpr(15)  # by the adding warp
# What the copying warp writes into Buffers.work, for the others to read:
TICKET = gl.constexpr(0)
STEPS = gl.constexpr(1)  # tiles of queries of the group of heads; -1 at the end
COLUMN = gl.constexpr(2)  # of the first tile from which the first key is seen; may be < 0
AHEAD = gl.constexpr(3)  # what the next tile adds to that
KEYS_LEFT = gl.constexpr(4)  # from the first on
K_PHASE = gl.constexpr(5)  # of the mbarrier of k and v


class Sizes(NamedTuple):
    """Of q ``[B, T_q, H_kv * group, D]``, and k and v ``[B, T_k, H_kv, D]``."""

    T_q: int  # with sequences those of all of them, or of one
    T_k: int
    H_kv: int
    group: int
    left: int  # keys seen before a query's own, and after; more than there are without a limit
    right: int


class Sequences(NamedTuple):
    """Where they begin: offsets that never decrease, and no more than there are tokens."""

    B: Any  # how many; None without
    cu_q: Any
    cu_k: Any


class One(NamedTuple):
    """What is of one batch element or sequence alone."""

    sizes: Any
    first_q: Any  # tokens before those of the sequence
    first_k: Any


class Buffers(NamedTuple):
    """Shared memory, and the mbarriers that count what copies have filled."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q: gl.shared_memory_descriptor  # one for each stage, as the next two
    do: gl.shared_memory_descriptor
    rows: gl.shared_memory_descriptor  # lse and delta
    ds: gl.shared_memory_descriptor
    dq: gl.shared_memory_descriptor  # one for each warpgroup
    sums: gl.shared_memory_descriptor  # two quarters of a tile of dq, added by all programs
    rounded: gl.shared_memory_descriptor  # the same, as they leave
    work: gl.shared_memory_descriptor  # what comes next
    k_full: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    do_full: gl.shared_memory_descriptor
    sums_full: gl.shared_memory_descriptor


class Place(NamedTuple):
    """The keys of a ticket: batch or sequence, key/value head, and tile."""

    b: int
    h: int
    n: int
    down: bool  # whether it visits its queries from the last to the first


class Queries(NamedTuple):
    """Tiles of queries that see any of a program's keys."""

    begin: int
    end: int


@triton.jit
def sequence_of(offsets_ptr, tile, B, ROWS: tl.constexpr):
    """The last sequence whose tiles of ``ROWS`` tokens begin at or before ``tile``, or the first.

    ``tile`` is not its own where it lies before all sequences, or behind the tokens of this one.
    """
    b = tile * 0
    left = B  # to choose from: b and those after it
    while left > 1:
        middle = b + left // 2
        begin = tl.load(offsets_ptr + middle) // ROWS + middle
        b = tl.where(begin <= tile, middle, b)
        left -= left // 2
    return b


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _never_decreasing(offsets_ptr, out_ptr, B, total, BLOCK: tl.constexpr):
    """``B + 1`` offsets, each at least the one before and at most ``total``, whatever is there."""
    before = 0
    for first in range(0, B + 1, BLOCK):
        i = first + tl.arange(0, BLOCK)
        offset = tl.minimum(tl.load(offsets_ptr + i, i <= B, other=0), total)
        offset = tl.maximum(tl.associative_scan(offset, 0, _larger), before)
        tl.store(out_ptr + i, offset, i <= B)
        before = tl.max(offset, 0)


@triton.jit(do_not_specialize=["tiles", "sequences", "total_k"])
def _delta_and_lse_kernel(
    o_ptr,  # contiguous [B, T, H, D]
    do_ptr,
    lse_ptr,  # contiguous [B, H, T], as the next
    dlse_ptr,  # or None
    rows_ptr,  # [B * H, 2, whole tiles]
    turns_ptr,  # [1 + 2 * B * H * tiles], with offsets [2, sequences + 1] behind
    cu_q_ptr,  # offsets of sequences, or None
    cu_k_ptr,
    do_strides,
    T,
    H,
    tiles,  # of queries of a head
    n_rows,  # B * H whole tiles
    sequences,
    total_k,  # tokens of all of them
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """``delta = Σ_d o do - dlse`` and ``lse log2(e)``; the counter of tickets and all turns are 0.

    Rows behind the queries get 0: any number would do, because copies fill their q and do with 0.
    """
    follow(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    whole = tiles * BLOCK_M
    head, in_head = row // whole, row % whole
    t = in_head  # the token
    there = (row < n_rows) & (t < T)
    if cu_q_ptr is not None:
        s = sequence_of(cu_q_ptr, in_head // BLOCK_M, sequences, BLOCK_M)
        first, length = sequence(cu_q_ptr, s, T)
        in_sequence = in_head - (first // BLOCK_M + s) * BLOCK_M
        there = (row < n_rows) & (in_sequence >= 0) & (in_sequence < length)
        t = first + in_sequence
        if tl.program_id(0) == 0:
            offsets_ptr = turns_ptr + 1 + 2 * (n_rows // BLOCK_M)
            _never_decreasing(cu_q_ptr, offsets_ptr, sequences, T, 128)
            _never_decreasing(cu_k_ptr, offsets_ptr + sequences + 1, sequences, total_k, 128)
    b, h, t_wide = (head // H).to(tl.int64), (head % H).to(tl.int64), t.to(tl.int64)
    offs_d = tl.arange(0, D)
    o_rows = o_ptr + ((b * T + t_wide) * H + h) * D
    o = tl.load(o_rows[:, None] + offs_d[None, :], there[:, None], other=0.0)
    do_rows = row_at(do_ptr, do_strides, b, t_wide, h)
    do = tl.load(do_rows[:, None] + offs_d[None, :], there[:, None], other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse = tl.load(lse_ptr + head * T + t, there, other=0.0)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + head * T + t, there, other=0.0)
    out = rows_ptr + head * (2 * whole) + in_head
    tl.store(out, lse * LOG2E, row < n_rows)
    tl.store(out + whole, delta, row < n_rows)
    begins = (row < n_rows) & (in_head % BLOCK_M == 0)
    for i in tl.static_range(2):
        tl.store(turns_ptr + 1 + 2 * (row // BLOCK_M) + i, 0, begins)
    tl.store(turns_ptr + row, 0, row == 0)


@gluon.jit
def _tiles(length, sequences, ROWS: gl.constexpr):
    """How many tiles a head has; of sequences the most that there may be, wherever each begins."""
    if sequences.B is None:
        return gl.cdiv(length, ROWS)
    else:
        return length // ROWS + sequences.B


@gluon.jit
def _one(b, sizes, sequences) -> One:
    """Sizes of a batch element, or those of a sequence and where it begins."""
    if sequences.B is None:
        return One(sizes, 0, 0)
    else:
        first_q, first_k = gl.load(sequences.cu_q + b), gl.load(sequences.cu_k + b)
        T_q = gl.load(sequences.cu_q + b + 1) - first_q
        T_k = gl.load(sequences.cu_k + b + 1) - first_k
        sizes = Sizes(T_q, T_k, sizes.H_kv, sizes.group, sizes.left, sizes.right)
        return One(sizes, first_q, first_k)


@gluon.jit
def _place(ticket, n_heads, section, up, sizes, sequences) -> Place:
    """The keys of a ticket: heads fastest, ``section`` of them at a time.

    Up to head ``up`` the last keys come first. From it on the first keys do: most work, where the
    mask is causal. Sequences come one after another, as keys of one length do.
    """
    n_n = _tiles(sizes.T_k, sequences, KEYS)
    head, n = head_and_tile(ticket, n_heads, n_n, section, True)
    down = head >= up
    n = gl.where(down, n, n_n - 1 - n)
    if sequences.B is None:
        return Place(head // sizes.H_kv, head % sizes.H_kv, n, down)
    else:
        b = sequence_of(sequences.cu_k, n, sequences.B, KEYS)
        return Place(b, head, n - gl.load(sequences.cu_k + b) // KEYS - b, down)


@gluon.jit
def _next_ticket(turns_ptr, tickets, n_heads, section, up, sizes, sequences):
    """A ticket that no program has had; of sequences one whose tile has keys, if any is left."""
    ticket = gl.atomic_add(turns_ptr, 1, sem="relaxed")
    if sequences.B is not None:
        while _is_empty(ticket, tickets, n_heads, section, up, sizes, sequences):
            ticket = gl.atomic_add(turns_ptr, 1, sem="relaxed")
    return ticket


@gluon.jit
def _is_empty(ticket, tickets, n_heads, section, up, sizes, sequences):
    """Whether there is such a ticket, whose tile has no keys of its sequence."""
    place = _place(gl.minimum(ticket, tickets - 1), n_heads, section, up, sizes, sequences)
    one = _one(place.b, sizes, sequences)
    return (ticket < tickets) & ((place.n < 0) | (place.n * KEYS >= one.sizes.T_k))


@gluon.jit
def _first_tile(b, h, one, sizes, sequences, BLOCK_M: gl.constexpr):
    """Tiles of queries before those of a head of a batch element or sequence; those of a head."""
    n_m = _tiles(sizes.T_q, sequences, BLOCK_M)
    if sequences.B is None:
        return (b * sizes.H_kv * sizes.group + h) * n_m, n_m
    else:
        return h * n_m + one.first_q // BLOCK_M + b, n_m


@gluon.jit
def _visited(place, queries, i):
    """The tile of queries that a program visits after ``i`` others."""
    return gl.where(place.down, queries.end - 1 - i, queries.begin + i)


@gluon.jit
def _queries(n, sizes, BLOCK_M: gl.constexpr) -> Queries:
    """The tiles of queries that see any key of tile ``n``; none if ``end <= begin``."""
    own = sizes.T_k - sizes.T_q  # the key of query 0
    first = n * KEYS
    end = gl.minimum(first + KEYS, sizes.T_k)
    n_m = gl.cdiv(sizes.T_q, BLOCK_M)
    return Queries(
        gl.minimum(gl.maximum(first - own - sizes.right, 0) // BLOCK_M, n_m),
        gl.minimum(gl.cdiv(gl.maximum(end - own + sizes.left, 0), BLOCK_M), n_m),
    )


@gluon.jit
def _adding(m, sizes, BLOCK_M: gl.constexpr):
    """The first key tile that adds to query tile ``m``, and how many do."""
    own = sizes.T_k - sizes.T_q
    begin = gl.maximum(m * BLOCK_M + own - sizes.left, 0)  # keys that it sees
    end = gl.minimum((m + 1) * BLOCK_M + own + sizes.right, sizes.T_k)
    first = begin // KEYS
    return first, gl.where(begin < end, (end - 1) // KEYS - first + 1, 0)


@gluon.jit
def _turn(m, place, sizes, BLOCK_M: gl.constexpr):
    """How many key tiles add to query tile ``m`` before that of a program."""
    first, turns = _adding(m, sizes, BLOCK_M)
    after_first = place.n - first
    return gl.where(place.down, after_first, turns - 1 - after_first)


@gluon.jit
def _staging(buffers, step, i):
    """Where dk (0, 1) and dv (2, 3) of the warpgroups lie: in ds of the step before ``step``."""
    ds = buffers.ds.index((step + 1) % 2)
    part: gl.constexpr = buffers.v.index(0).shape
    if REINTERPRET:
        four = ds.reinterpret(ds.dtype, [4] + part, buffers.v.layout)  # noqa: RUF005
    else:
        four = ds._reinterpret(ds.dtype, [4] + part, buffers.v.layout)  # noqa: RUF005
    return four.index(i)


@gluon.jit
def _write(work, i: gl.constexpr, value):
    """``work[i] = value``, by one warp."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    work.index(i).store(gl.full([1], value, gl.int32, LAYOUT))


@gluon.jit
def _read(work, i: gl.constexpr, WARPS: gl.constexpr):
    """``work[i]`` as a scalar, by ``WARPS`` warps."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.sum(work.index(i).load(LAYOUT), 0)


@gluon.jit
def _copy_results(buffers, results, place, sizes, sequences, step):
    """Send dk and dv of a ticket whose steps end before ``step``."""
    VARLEN: gl.constexpr = sequences.B is not None
    dk_source, dv_source = results
    one = _one(place.b, sizes, sequences)
    # Whether a buffer of ds holds dk and dv, so that k and v of the next ticket need not wait.
    STAGED: gl.constexpr = buffers.ds.shape[1] >= 2 * buffers.q.shape[-1]
    b, h, key, first, length = place.b, place.h, place.n * KEYS, one.first_k, one.sizes.T_k
    await_at(RESULTS_READY, COMPUTING_AND_WARP)
    if STAGED:
        for w in gl.static_range(2):
            at = coordinates(b, h, key + w * HALF, first, length, VARLEN)
            async_store(dk_source, at, _staging(buffers, step, w))
            async_store(dv_source, at, _staging(buffers, step, 2 + w))
    else:
        at = coordinates(b, h, key, first, length, VARLEN)
        async_store(dk_source, at, buffers.k.index(0))
        for w in gl.static_range(2):
            at = coordinates(b, h, key + w * HALF, first, length, VARLEN)
            async_store(dv_source, at, buffers.v.index(w))
    store_wait(0)


@gluon.jit
def _copy(buffers, sources, results, turns_ptr, tickets, n_heads, section, up, sizes, sequences):
    """The copying warp: k and v; q, do, lse and delta tile after tile; and dk and dv from there."""
    VARLEN: gl.constexpr = sequences.B is not None
    q_source, k_source, v_source, do_source, rows_source = sources
    STAGES: gl.constexpr = buffers.q.shape[0]
    BLOCK_M: gl.constexpr = buffers.q.shape[-2]
    STAGED: gl.constexpr = buffers.ds.shape[1] >= 2 * buffers.q.shape[-1]
    step = 0
    k_phase = 0
    before = Place(0, 0, -1, True)  # whose results have not been sent; n < 0: none
    ticket = _next_ticket(turns_ptr, tickets, n_heads, section, up, sizes, sequences)
    while ticket < tickets:
        place = _place(ticket, n_heads, section, up, sizes, sequences)
        one = _one(place.b, sizes, sequences)
        T_q, T_k = one.sizes.T_q, one.sizes.T_k
        queries = _queries(place.n, one.sizes, BLOCK_M)
        key = place.n * KEYS
        tiles = gl.maximum(queries.end - queries.begin, 0)
        steps = sizes.group * tiles
        if before.n >= 0:
            await_at(WORK_READ, THREE_WARPS)
            await_at(KEYS_READ, COMPUTING_AND_WARP)
            if steps == 0 or not STAGED:
                _copy_results(buffers, results, before, sizes, sequences, step)
        _write(buffers.work, TICKET, ticket)
        _write(buffers.work, STEPS, steps)
        column = key - (T_k - T_q) - sizes.right
        _write(buffers.work, COLUMN, column - _visited(place, queries, 0) * BLOCK_M)
        _write(buffers.work, AHEAD, gl.where(place.down, BLOCK_M, -BLOCK_M))
        _write(buffers.work, KEYS_LEFT, T_k - key)
        _write(buffers.work, K_PHASE, k_phase)
        k_phase ^= 1
        arrive_at(WORK, COMPUTING_AND_WARP)
        arrive_at(WORK_TO_ADD, THREE_WARPS)
        full = buffers.k_full.index(0)
        mbarrier.expect(full, 2 * k_source.block_type.nbytes)
        at = coordinates(place.b, place.h, key, one.first_k, T_k, VARLEN)
        async_load(k_source, at, full, buffers.k.index(0))
        for w in gl.static_range(2):
            at = coordinates(place.b, place.h, key + w * HALF, one.first_k, T_k, VARLEN)
            async_load(v_source, at, full, buffers.v.index(w))
        first = step
        for i in range(tiles):
            row = _visited(place, queries, i) * BLOCK_M
            for g in range(sizes.group):
                h = place.h * sizes.group + g
                at = coordinates(place.b, h, row, one.first_q, T_q, VARLEN)
                if VARLEN:
                    of_row = [h, 0, (one.first_q // BLOCK_M + place.b) * BLOCK_M + row]
                else:
                    of_row = [place.b * sizes.H_kv * sizes.group + h, 0, row]
                stage = step % STAGES
                if step >= STAGES:
                    await_at(EMPTY + stage, COMPUTING_AND_WARP)
                full = buffers.q_full.index(stage)
                mbarrier.expect(full, q_source.block_type.nbytes + rows_source.block_type.nbytes)
                async_load(q_source, at, full, buffers.q.index(stage))
                async_load(rows_source, of_row, full, buffers.rows.index(stage))
                full = buffers.do_full.index(stage)
                mbarrier.expect(full, do_source.block_type.nbytes)
                async_load(do_source, at, full, buffers.do.index(stage))
                if STAGED:
                    to_send = (step == first) & (before.n >= 0)
                    if to_send:  # the next step, which is loaded after it, writes where they lie
                        _copy_results(buffers, results, before, sizes, sequences, first)
                step += 1
        before = place
        ticket = _next_ticket(turns_ptr, tickets, n_heads, section, up, sizes, sequences)
    if before.n >= 0:
        await_at(WORK_READ, THREE_WARPS)
        await_at(KEYS_READ, COMPUTING_AND_WARP)
        _copy_results(buffers, results, before, sizes, sequences, step)
    _write(buffers.work, TICKET, ticket)
    _write(buffers.work, STEPS, -1)
    arrive_at(WORK, COMPUTING_AND_WARP)
    arrive_at(WORK_TO_ADD, THREE_WARPS)
    for i in range(gl.maximum(step - STAGES, 0), step):  # every arrival is awaited
        await_at(EMPTY + i % STAGES, COMPUTING_AND_WARP)


@gluon.jit
def _add(
    buffers,
    half_source,
    turns_ptr,
    tickets,
    n_heads,
    section,
    up,
    sizes,
    sequences,
    WHICH: gl.constexpr,
):
    """An adding warp: tiles of dq to the workspace, when those before have been added.

    Halves ``w`` with ``w % ADDERS == WHICH``. With tiles of 128 queries the first one takes both
    and the other has nothing to do: on an H200 0% to 4% faster. With 64 queries a warp for each
    half is 2% to 21% faster.
    """
    BLOCK_M: gl.constexpr = buffers.q.shape[-2]
    ADDERS: gl.constexpr = 128 // BLOCK_M
    for w in gl.static_range(2):
        if w % ADDERS == WHICH:
            arrive_at(DQ_EMPTY + w, ONE_GROUP_AND_WARP)
    await_at(WORK_TO_ADD, THREE_WARPS)
    ticket = _read(buffers.work, TICKET, 1)
    while ticket < tickets:
        arrive_at(WORK_READ, THREE_WARPS)
        place = _place(ticket, n_heads, section, up, sizes, sequences)
        one = _one(place.b, sizes, sequences)
        queries = _queries(place.n, one.sizes, BLOCK_M)
        h = place.h * sizes.group
        first, n_m = _first_tile(place.b, h, one, sizes, sequences, BLOCK_M)
        tiles = queries.end - queries.begin
        if WHICH >= ADDERS:
            tiles = 0
        i = 0
        g = 0
        m = _visited(place, queries, i)
        tile = first + m
        done = -1
        while i < tiles:
            turn = _turn(m, place, one.sizes, BLOCK_M)
            while done != turn:
                done = gl.atomic_add(turns_ptr + 1 + ADDERS * tile + WHICH, 0, sem="acquire")
            fence_async_global()
            for w in gl.static_range(2):
                if w % ADDERS == WHICH:
                    await_at(DQ_FULL + w, ONE_GROUP_AND_WARP)
                    fence_async_shared()  # here, for in a warpgroup it would hold that up
                    at = [2 * tile + w, 0, 0]
                    if turn == 0:
                        async_store(half_source, at, buffers.dq.index(w))
                    else:
                        async_reduce_add(half_source, at, buffers.dq.index(w))
            store_wait(0)
            for w in gl.static_range(2):
                if w % ADDERS == WHICH:
                    arrive_at(DQ_EMPTY + w, ONE_GROUP_AND_WARP)
            added = tile
            g += 1
            i = gl.where(g == sizes.group, i + 1, i)
            g = gl.where(g == sizes.group, 0, g)
            m = _visited(place, queries, gl.minimum(i, tiles - 1))
            tile = first + g * n_m + m
            # On its way while the one before is written.
            done = gl.atomic_add(turns_ptr + 1 + ADDERS * tile + WHICH, 0, sem="acquire")
            store_wait_written()
            gl.atomic_add(turns_ptr + 1 + ADDERS * added + WHICH, 1, sem="release")
        await_at(WORK_TO_ADD, THREE_WARPS)
        ticket = _read(buffers.work, TICKET, 1)


@gluon.jit
def _by_thread(half):
    """Half a tile of dq ``[64, 64]`` in the order of the workspace: by what a thread holds.

    Four numbers of a thread side by side, beside those of the next thread: stores of 16 bytes
    without bank conflicts.
    """
    # Of rows: warp, which of two, eight. Of lanes: eight, thread, pair.
    half = half.reshape([4, 2, 8, 8, 4, 2]).permute([0, 3, 2, 4, 1, 5])
    return half.reshape([HALF, HALF])


@gluon.jit
def _by_row(part):
    """``[16, 16]``: 256 numbers ``[4, 64]`` of the workspace, as rows and lanes."""
    return part.reshape([2, 8, 4, 2, 2]).permute([3, 1, 0, 2, 4]).reshape([16, 16])


@gluon.jit
def _load_sums(buffers, sums_source, tile, i, stage):
    """Quarter ``i`` of a tile, of one half or of both."""
    HALVES: gl.constexpr = buffers.sums.shape[1]
    ROWS: gl.constexpr = buffers.sums.shape[2]
    full = buffers.sums_full.index(stage)
    mbarrier.expect(full, sums_source.block_type.nbytes)
    at = [2 * tile, i * ROWS, 0]
    if HALVES == 1:
        at = [2 * tile + i // 2, i % 2 * ROWS, 0]
    async_load(sums_source, at, full, buffers.sums.index(stage))


@gluon.jit
def _round(
    buffers, sums_source, dq_source, turns_ptr, n_heads, section, scale_log2, sizes, sequences
):
    """The rounding warp: ``dq = c sums`` of tiles of queries to which all has been added.

    Whichever program added last. 0 where a tile sees no key, whose sums nobody has written.
    """
    BLOCK_M: gl.constexpr = buffers.q.shape[-2]
    D: gl.constexpr = buffers.q.shape[-1]
    VARLEN: gl.constexpr = sequences.B is not None
    ADDERS: gl.constexpr = 128 // BLOCK_M
    HALVES: gl.constexpr = buffers.sums.shape[1]
    ROWS: gl.constexpr = buffers.sums.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [1, 1], [1, 0])
    # Each of two stages twice, so that phases are as before.
    gl.static_assert(BLOCK_M == 4 * ROWS)
    n_m = _tiles(sizes.T_q, sequences, BLOCK_M)
    H = sizes.H_kv * sizes.group
    n_heads *= sizes.group
    for i in range(gl.program_id(0), n_heads * n_m, gl.num_programs(0)):
        head, m = head_and_tile(i, n_heads, n_m, section * sizes.group, True)
        tile = head * n_m + m
        b = head // H
        if VARLEN:
            b = sequence_of(sequences.cu_q, m, sequences.B, BLOCK_M)
        one = _one(b, sizes, sequences)
        if VARLEN:
            m -= one.first_q // BLOCK_M + b
        if not VARLEN or (m >= 0) & (m * BLOCK_M < one.sizes.T_q):
            _, turns = _adding(m, one.sizes, BLOCK_M)
            done = turns
            for w in gl.static_range(ADDERS):
                counter = turns_ptr + 1 + ADDERS * tile + w
                while gl.atomic_add(counter, 0, sem="relaxed") != turns:
                    pass
                # Once, for it empties L1.
                done = gl.minimum(done, gl.atomic_add(counter, 0, sem="acquire"))
            fence_async_global()
            written = gl.where(done > 0, tile, n_heads * n_m)  # copies from outside bring 0
            for quarter in gl.static_range(2):
                _load_sums(buffers, sums_source, written, quarter, quarter)
            for quarter in range(4):
                stage = quarter % 2
                mbarrier.wait(buffers.sums_full.index(stage), quarter // 2)
                store_wait(1)  # the one of this stage has been read
                sums = buffers.sums.index(stage).reshape((HALVES * ROWS, HALF))
                rounded = buffers.rounded.index(stage).reshape((ROWS, D))
                for j in gl.static_range(ROWS * D // 256):
                    x = sums.slice(4 * j, 4, 0).load(LAYOUT) * (scale_log2 * LN2)
                    x = _by_row(x.to(rounded.dtype))
                    to = rounded.slice(j // 4 * 16 % ROWS, 16, 0)
                    to.slice(j // 4 * 16 // ROWS * HALF + j % 4 * 16, 16, 1).store(x)
                fence_async_shared()
                row = m * BLOCK_M + quarter * ROWS
                at = coordinates(b, head % H, row, one.first_q, one.sizes.T_q, VARLEN)
                async_store(dq_source, at, buffers.rounded.index(stage))
                if quarter < 2:
                    _load_sums(buffers, sums_source, written, quarter + 2, stage)
    store_wait(0)


@gluon.jit
def _rows_of(buffers, step):
    """The stage of a step, its q, its do, and its lse and delta."""
    STAGES: gl.constexpr = buffers.q.shape[0]
    BLOCK_M: gl.constexpr = buffers.q.shape[-2]
    D: gl.constexpr = buffers.q.shape[-1]
    stage = step % STAGES
    return (
        stage,
        buffers.q.index(stage).reshape((BLOCK_M, D)),
        buffers.do.index(stage).reshape((BLOCK_M, D)),
        buffers.rows.index(stage).reshape((2, BLOCK_M)),
    )


@gluon.jit
def _keys_of(buffers, WHICH: gl.constexpr):
    """The k of all keys, k of the warpgroup's own, and v of those."""
    # Else the descriptors of k and v, one for each step of a product, stay in registers.
    zero = opaque_zero()
    D: gl.constexpr = buffers.q.shape[-1]
    k = buffers.k.index(zero).reshape((KEYS, D))
    v = buffers.v.index(WHICH + zero).reshape((HALF, D))
    return k, k.slice(WHICH * HALF, HALF, 0), v


@gluon.jit
def _scores(keys, queries, full, step, S_LAYOUT: gl.constexpr):
    """``k qᵀ`` or ``v doᵀ`` of a step, when its q or do is there; still being computed."""
    STAGES: gl.constexpr = full.shape[0]
    BLOCK_M: gl.constexpr = queries.shape[0]
    mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
    nothing = gl.zeros([HALF, BLOCK_M], gl.float32, layout=S_LAYOUT)
    return warpgroup_mma(keys, queries.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _first_scores(buffers, step, WHICH: gl.constexpr, S_LAYOUT: gl.constexpr):
    """``k qᵀ`` of a step."""
    _, q, _, _ = _rows_of(buffers, step)
    _, k, _ = _keys_of(buffers, WHICH)
    return _scores(k, q, buffers.q_full, step, S_LAYOUT)


@gluon.jit
def _go_on(
    dk,
    dv,
    s,  # k qᵀ
    step,
    column,
    keys,
    width,  # how many queries see a key
    scale_log2,
    buffers,
    WHICH: gl.constexpr,
    WINDOW: gl.constexpr,
    LAST: gl.constexpr,
):
    """One tile of queries: its share of dk and dv, half of dq; and the next tile's scores."""
    BLOCK_M: gl.constexpr = buffers.q.shape[-2]
    D: gl.constexpr = buffers.q.shape[-1]
    DTYPE: gl.constexpr = buffers.q.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 2)
    EARLY: gl.constexpr = 1 if BLOCK_M == 128 and not LAST else 0
    dq_zero = gl.zeros([HALF, HALF], gl.float32, layout=DQ_LAYOUT)
    stage, q, do, rows = _rows_of(buffers, step)
    _, _, v = _keys_of(buffers, WHICH)
    dp = _scores(v, do, buffers.do_full, step, S_LAYOUT)
    # Loaded after the wait: before it they would hold registers while products run.
    p = gl.exp2(s * scale_log2 - rows.slice(0, 1, 0).load(S_LAYOUT))
    cut = (column > 1 - HALF) | (keys < HALF)
    if WINDOW:
        cut = cut | (column + width < BLOCK_M)
    if cut:  # bounds are computed here, so that no register holds them for most tiles
        zero = opaque_zero()
        rows_n = gl.arange(0, HALF, layout=gl.SliceLayout(1, S_LAYOUT)) + zero
        first = gl.where(rows_n < keys, rows_n + column, BLOCK_M)
        if WINDOW:
            p = columns_within(p, first, rows_n + (column + width), 0.0)
        else:
            p = columns_within(p, first, None, 0.0)
    p_narrow = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
    dv = warpgroup_mma(p_narrow, do, dv, is_async=True)
    if BLOCK_M == 128:  # else registers spill
        dp, dv, p_narrow = warpgroup_mma_wait(0, deps=[dp, dv, p_narrow])
    else:
        dp = warpgroup_mma_wait(1, deps=[dp])
    ds = (p * (dp - rows.slice(1, 1, 0).load(S_LAYOUT))).to(DTYPE)
    # [queries, keys]: with keys as rows, these stores would have the addresses of those of
    # dk and dv below, and the compiler would keep them in registers throughout.
    ds_tile = buffers.ds.index(step % 2)
    ds_tile.slice(WHICH * HALF, HALF, 1).permute((1, 0)).store(ds)
    await_at(DS_READY, COMPUTING)
    fence_async_shared()  # after the meeting, where stores need no longer be waited for
    k_all, _, _ = _keys_of(buffers, WHICH)
    if BLOCK_M > HALF:
        dq = warpgroup_mma(
            ds_tile.slice(WHICH * HALF, HALF, 0), k_all, dq_zero,
            use_acc=False, is_async=True,
        )  # fmt: skip
    else:
        dq = warpgroup_mma(
            ds_tile, k_all.slice(WHICH * HALF, HALF, 1), dq_zero,
            use_acc=False, is_async=True,
        )  # fmt: skip
    ds_narrow = gl.convert_layout(ds, P_LAYOUT)
    dk = warpgroup_mma(ds_narrow, q, dk, is_async=True)
    if EARLY:
        s = _first_scores(buffers, step + 1, WHICH, S_LAYOUT)
    dq, dv, p_narrow = warpgroup_mma_wait(1 + EARLY, deps=[dq, dv, p_narrow])
    await_at(DQ_EMPTY + WHICH, ONE_GROUP_AND_WARP)
    zero = opaque_zero()
    buffers.dq.index(WHICH + zero).reshape((HALF, HALF)).store(_by_thread(dq))
    arrive_at(DQ_FULL + WHICH, ONE_GROUP_AND_WARP)
    if LAST:
        arrive_at(KEYS_READ, COMPUTING_AND_WARP)
    if not EARLY and not LAST:
        s = _first_scores(buffers, step + 1, WHICH, S_LAYOUT)
    if LAST:
        dk, ds_narrow = warpgroup_mma_wait(0, deps=[dk, ds_narrow])
    else:
        dk, ds_narrow, s = warpgroup_mma_wait(0, deps=[dk, ds_narrow, s])
    arrive_at(EMPTY + stage, COMPUTING_AND_WARP)
    return dk, dv, s


@gluon.jit
def _compute(
    buffers,
    group,
    width,  # how many queries see a key
    scale_log2,
    WHICH: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """One warpgroup: dk and dv of its 64 keys, and its half of every tile of dq."""
    BLOCK_M: gl.constexpr = buffers.q.shape[-2]
    D: gl.constexpr = buffers.q.shape[-1]
    DTYPE: gl.constexpr = buffers.q.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    STAGED: gl.constexpr = buffers.ds.shape[1] >= 2 * D
    begin = 0
    await_at(WORK, COMPUTING_AND_WARP)
    steps = _read(buffers.work, STEPS, 4)
    while steps >= 0:
        column = _read(buffers.work, COLUMN, 4) + WHICH * HALF
        ahead = _read(buffers.work, AHEAD, 4)
        keys = _read(buffers.work, KEYS_LEFT, 4) - WHICH * HALF
        dk = gl.zeros([HALF, D], gl.float32, layout=ACC_LAYOUT)
        dv = gl.zeros([HALF, D], gl.float32, layout=ACC_LAYOUT)
        mbarrier.wait(buffers.k_full.index(0), _read(buffers.work, K_PHASE, 4))
        if steps > 0:
            last = begin + steps - 1
            s = _first_scores(buffers, begin, WHICH, S_LAYOUT)
            s = warpgroup_mma_wait(0, deps=[s])
            heads = group
            for step in range(begin, last):
                dk, dv, s = _go_on(
                    dk, dv, s, step, column, keys, width, scale_log2, buffers,
                    WHICH, WINDOW, False,
                )  # fmt: skip
                heads -= 1
                column = gl.where(heads == 0, column + ahead, column)
                heads = gl.where(heads == 0, group, heads)
            dk, dv, s = _go_on(
                dk, dv, s, last, column, keys, width, scale_log2, buffers, WHICH, WINDOW, True
            )
        else:
            arrive_at(KEYS_READ, COMPUTING_AND_WARP)
        begin += steps
        await_at(DS_READY, COMPUTING)  # both have read ds and k
        dk_out = (dk * (scale_log2 * LN2)).to(DTYPE)
        if STAGED:
            _staging(buffers, begin, WHICH).reshape((HALF, D)).store(dk_out)
            _staging(buffers, begin, 2 + WHICH).reshape((HALF, D)).store(dv.to(DTYPE))
        else:
            zero = opaque_zero()
            k = buffers.k.index(zero).reshape((KEYS, D)).slice(WHICH * HALF, HALF, 0)
            k.store(dk_out)
            buffers.v.index(WHICH + zero).reshape((HALF, D)).store(dv.to(DTYPE))
        fence_async_shared()
        arrive_at(RESULTS_READY, COMPUTING_AND_WARP)
        await_at(WORK, COMPUTING_AND_WARP)
        steps = _read(buffers.work, STEPS, 4)
    await_at(DQ_EMPTY + WHICH, ONE_GROUP_AND_WARP)  # every arrival is awaited


@gluon.jit(do_not_specialize=["B", "H_kv", "group", "T_q", "T_k", "left", "right", "section", "up"])
def _attention_backward_hopper_kernel(
    q_source,  # descriptors of [B, H, T, D], or with VARLEN of rows_of_sequences
    k_source,
    v_source,
    do_source,
    rows_source,  # descriptor of fp32 [B * H, 2, whole tiles]: lse log2(e), delta
    half_source,  # of an fp32 workspace [halves of tiles, 64, 64]: what a warpgroup adds
    sums_source,  # of the same: what the rounding warp reads at once
    dq_source,
    dk_source,
    dv_source,
    turns_ptr,  # int32 [1 + 2 * B * H * query tiles], zeros: the next ticket, and the turns
    B,  # with VARLEN of the sequences, whose offsets [2, B + 1] are behind the turns of H heads
    H_kv,
    group,  # H // H_kv
    T_q,
    T_k,
    left,
    right,
    section,  # key/value heads at a time
    up,  # key/value heads whose last keys come first
    scale_log2,  # softmax_scale * log2(e)
    WINDOW: gl.constexpr,  # whether keys long before a query's own are not seen
    VARLEN: gl.constexpr,  # T_q and T_k are the tokens of all sequences
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Key tiles of key/value heads, ticket after ticket."""
    DTYPE: gl.constexpr = q_source.dtype
    BLOCK_M: gl.constexpr = q_source.block_type.shape[-2]
    D: gl.constexpr = q_source.block_type.shape[-1]
    HALVES: gl.constexpr = sums_source.block_type.shape[0]
    ROWS: gl.constexpr = sums_source.block_type.shape[1]
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, KEYS], DTYPE)
    gl.static_assert(EMPTY + STAGES <= DS_READY)
    gl.static_assert(2 * HALF * HALF == BLOCK_M * D)
    # A jit function knows no [STAGES, *q_block].
    q_block: gl.constexpr = q_source.block_type.shape
    k_block: gl.constexpr = k_source.block_type.shape
    v_block: gl.constexpr = v_source.block_type.shape
    dq_block: gl.constexpr = dq_source.block_type.shape
    buffers = Buffers(
        gl.allocate_shared_memory(DTYPE, [1] + k_block, k_source.layout),  # noqa: RUF005
        gl.allocate_shared_memory(DTYPE, [2] + v_block, v_source.layout),  # noqa: RUF005
        gl.allocate_shared_memory(DTYPE, [STAGES] + q_block, q_source.layout),  # noqa: RUF005
        gl.allocate_shared_memory(DTYPE, [STAGES] + q_block, do_source.layout),  # noqa: RUF005
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2, BLOCK_M], rows_source.layout),
        gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, KEYS], DS_LAYOUT),
        gl.allocate_shared_memory(gl.float32, [2, 1, HALF, HALF], half_source.layout),
        gl.allocate_shared_memory(gl.float32, [2, HALVES, ROWS, HALF], sums_source.layout),
        gl.allocate_shared_memory(DTYPE, [2] + dq_block, dq_source.layout),  # noqa: RUF005
        gl.allocate_shared_memory(gl.int32, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
    )
    mbarrier.init(buffers.k_full.index(0), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(buffers.q_full.index(stage), count=1)
        mbarrier.init(buffers.do_full.index(stage), count=1)
    for stage in gl.static_range(2):
        mbarrier.init(buffers.sums_full.index(stage), count=1)
    follow(PDL)
    sizes = Sizes(T_q, T_k, H_kv, group, left, right)
    n_heads = B * H_kv
    sequences = Sequences(None, None, None)
    if VARLEN:
        n_heads = H_kv
        tiles = H_kv * group * (T_q // BLOCK_M + B)
        cu_q = turns_ptr + 1 + 2 * tiles
        sequences = Sequences(B, cu_q, cu_q + B + 1)
    tickets = n_heads * _tiles(T_k, sequences, KEYS)
    width = left + 1 + right
    sources = (q_source, k_source, v_source, do_source, rows_source)
    results = (dk_source, dv_source)
    gl.warp_specialize(
        [
            (_compute, (buffers, group, width, scale_log2, 0, WINDOW)),
            (_compute, (buffers, group, width, scale_log2, 1, WINDOW)),
            (_copy, (
                buffers, sources, results, turns_ptr, tickets, n_heads, section, up, sizes,
                sequences,
            )),
            (_add, (
                buffers, half_source, turns_ptr, tickets, n_heads, section, up, sizes, sequences, 0,
            )),
            (_add, (
                buffers, half_source, turns_ptr, tickets, n_heads, section, up, sizes, sequences, 1,
            )),
            (_round, (
                buffers, sums_source, dq_source, turns_ptr, n_heads, section, scale_log2, sizes,
                sequences,
            )),
        ],
        [4, 1, 1, 1, 1],
        [REGISTERS, COPIER_REGISTERS, COPIER_REGISTERS, COPIER_REGISTERS, COPIER_REGISTERS],
    )  # fmt: skip


class Plans(NamedTuple):
    """The launches of one backward, in their order."""

    rows: Plan  # on (o, do, lse, dlse, rows, turns, cu_q, cu_k)
    one_pass: Plan  # on (q, k, v, do, rows, sums, sums, dq, dk, dv, turns)

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
        cu_q: Tensor | None = None,
        cu_k: Tensor | None = None,
    ) -> None:
        """Write dq, dk and dv.

        Raises:
            CannotCompile: the compiler does not take the second kernel; nothing was launched.

        Allocates for the queries in whole tiles 4 bytes of sums for each number, 8 for each row
        and 8 for each tile; of sequences for one tile more each, and for their offsets.
        """
        bulk, device = self.one_pass.bulk, q.device
        rows, sums = (
            torch.empty(bulk[i].shape, dtype=torch.float32, device=device) for i in (4, 5)
        )
        tiles = rows[:, 0].numel() // bulk[4].block[2]
        offsets = 0 if cu_q is None else 2 * len(cu_q)
        turns = torch.empty(1 + 2 * tiles + offsets, dtype=torch.int32, device=device)
        of_one_pass = (q, k, v, do, rows, sums, sums, dq, dk, dv, turns)
        self.one_pass.compile(*of_one_pass)  # ahead of all launches, so that others can be instead
        self.rows(o, do, lse, dlse, rows, turns, cu_q, cu_k)
        self.one_pass(*of_one_pass)


def backward_plans(
    call: Attention,
    gradients: tuple[Layout, Layout, Layout],
    config: LaunchConfig,
    target: str,
    processors: int,
) -> Plans:
    """The launches for operands and ``(dq, dk, dv)`` that suit bulk copies, on so many SMs.

    Raises:
        ValueError: dropout, a softcap, memory that does not suit bulk copies, or a head dim, dtype
            or config that the kernel does not have.
    """
    (q, k, v, do), (dq, dk, dv) = call.inputs, gradients
    (B, T_q, _, H, H_kv, group), D, dtype = call.sizes, q.shape[3], call.dtype
    if call.scores.dropout_p or call.softcap:
        raise ValueError(
            "Hopper's backward has neither dropout nor softcap, got dropout_p = "
            f"{call.scores.dropout_p}, softcap: {call.softcap}"
        )
    if not call.aligned or not all(is_aligned(t, dtype) for t in gradients):
        raise ValueError("Hopper's backward takes q, k, v, do, dq, dk and dv that suit bulk copies")
    if D not in (64, 128) or dtype.itemsize != 2:
        raise ValueError(
            f"Hopper's backward has 16-bit heads of 64 or 128 lanes, got D = {D} in {dtype}"
        )
    # With one stage q would wait for scores that wait for the next q; more have no barriers.
    M = 2 * HALF.value**2 // D
    has = LaunchConfig(M, 4, 2, block_n=KEYS.value, groups=2)
    if replace(config, use_tma=False, pdl=False) != has:
        raise ValueError(
            f"Hopper's backward of heads of {D} has tiles of {M} queries by {KEYS.value} keys, two "
            f"stages and two groups of 4 warps, got {config}"
        )
    options = config.options
    # With sequences all of them are of one batch element, and B, T_q and T_k of the sequences.
    batches, total_q, total_k = q.shape[0], q.shape[1], k.shape[1]
    n_heads = batches * H_kv
    tiles, keys = triton.cdiv(total_q, M), triton.cdiv(total_k, KEYS.value)
    if call.varlen:
        tiles, keys = total_q // M + B, total_k // KEYS.value + B
    whole = tiles * M
    by_row = launch_config("delta", D, dtype, target, True)
    row: dict[str, Any] = {"H": H, "D": D, "ROWS": by_row.block_m, "BLOCK_M": M, **by_row.options}
    n_rows = batches * H * whole
    of_rows = {"do_strides": strides_of(do), "T": total_q, "tiles": tiles, "n_rows": n_rows}
    of_rows |= {"sequences": B, "total_k": total_k}
    rows = Plan(_delta_and_lse_kernel, (triton.cdiv(n_rows, by_row.block_m),), of_rows | row)

    # Half a tile has 64 lanes: those of 64 rows, or half of those of as many.
    halves, rows_at_once = (1, 32) if M == 128 else (2, 16)
    sums = Bulk((2 * batches * H * tiles, 64, 64), (64 * 64, 64, 1), (halves, rows_at_once, 64))
    in_bulk = rows_of_sequences if call.varlen else rows_in_bulk
    bulk = {
        i: swizzled(in_bulk(t, n), dtype)
        for i, t, n in (
            *((0, q, M), (1, k, KEYS.value), (2, v, HALF.value), (3, do, M)),
            *((7, dq, rows_at_once), (8, dk, KEYS.value if M < 2 * D else 64), (9, dv, 64)),
        )
    }
    bulk |= {
        4: unswizzled(
            Bulk((batches * H, 2, whole), (2 * whole, whole, 1), (1, 2, M)), torch.float32
        ),
        5: unswizzled(sums._replace(block=(1, 64, 64)), torch.float32),
        6: unswizzled(sums, torch.float32),
    }
    # Read again and again: q, do and, in float32, dq.
    head_bytes = 2 * T_q * D * (dtype.itemsize + 2) * group
    section = min(heads_per_section(n_heads, head_bytes), triton.cdiv(n_heads, 2))
    # The last section goes down; all do if two heads do not fit, for then each tile is read again.
    up = 0 if 2 * head_bytes > SECTION_BYTES else (n_heads - 1) // section * section
    arguments = {
        "B": B,
        "H_kv": H_kv,
        "group": group,
        "T_q": total_q,
        "T_k": total_k,
        "left": call.mask.left,
        "right": call.mask.right,
        "section": section,
        "up": up,
        "scale_log2": call.scores.scale_log2,
        "WINDOW": call.mask.WINDOW,
        "VARLEN": call.varlen,
        "STAGES": config.num_stages,
        **options,
    }
    grid = (min(n_heads * keys, processors),)
    one_pass = Plan(_attention_backward_hopper_kernel, grid, arguments, bulk)
    return Plans(rows, one_pass)
