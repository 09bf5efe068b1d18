"""Flash attention forward on Hopper (sm_90), with one job for each group of warps.

What ``forward.py`` computes, whose kernel is its specification, for 16-bit operands that
suit bulk copies, heads of 64 or 128 lanes, and no dropout:

    o[b, t, h] = Σ_j p_j v[b, j, h'] / Σ_j p_j    p_j = exp(softmax_scale * q[b, t, h]·k[b, j, h'])
    lse[b, h, t] = log Σ_j p_j                    h' = h // (H // H_kv)

with the plain kernel's windows, softcap and sequences of different lengths.

One warp copies, and two or three warpgroups of four warps compute 64 queries each on key tiles that
they share. A warpgroup has two products in flight, ``q kᵀ`` of a key tile and ``p v`` of the one
before, and takes exponentials while the second runs; the warpgroups issue products in turns, so
that the softmax of one hides behind the products of another. Overwrites nothing.

Grid: one program an SM, each of which takes one query tile after another (:func:`_tile`), while
the copies run ahead into the next one. Tiles end where the queries end, so that the tile with most
keys is full and the one with fewest is cut. All warpgroups go through the key tiles of the whole
query tile; one whose queries see none of a key tile skips it, but takes its turn (:func:`_skip`).
With VARLEN each sequence has tiles of its own (:func:`_tile_of_sequences`), and copies are cut
where it ends (:func:`rows_of_sequences`).

Full: the copying warp has filled a buffer; an mbarrier, which counts bytes. Empty: all warpgroups
have read it; a named barrier, which costs a warp one instruction, where an mbarrier would stop its
warpgroup. After FlashAttention-3 (arXiv:2407.08608).
"""

from typing import Any, NamedTuple

import triton

from ra_triton.kernels.attention.arguments import Attention, rows_in_bulk
from ra_triton.kernels.attention.hopper_tiles import (
    anew,
    columns_within,
    coordinates,
    rows_of_sequences,
)
from ra_triton.kernels.tiles import LN2, capped, follow, sequence
from ra_triton.launch import gluon
from ra_triton.launch.configs import LaunchConfig
from ra_triton.launch.gluon import (
    arrive_at,
    async_load,
    async_store,
    await_at,
    fence_async_shared,
    gl,
    mbarrier,
    store_wait,
    swizzled,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ra_triton.launch.plans import Layout, Plan

ROWS = gl.constexpr(64)  # queries of a warpgroup: what one WGMMA takes
# Of a thread that computes, by warpgroups: what the 65536 of an SM leave, in steps of eight.
REGISTERS = {2: 240, 3: 160}
COPIER_REGISTERS = gl.constexpr(24)  # of one that copies: the least there is
Q_BUFFERS = gl.constexpr(2)  # of every warpgroup: for a tile and the next
# Named barriers: those before are Triton's, and there are 16.
TURN = gl.constexpr(5)  # one for each warpgroup
EMPTY = gl.constexpr(8)  # one for each buffer of k, then of v, then one for each of Q_BUFFERS
SECTION_BYTES = 17 * 2**20  # of k and v: what stays in L2 while all SMs read it
SECTION_ROUNDS = 4  # more would be no better balanced


class Variant(NamedTuple):
    """What the compiled code depends on besides dtype, tiles and warpgroups."""

    CAUSAL: bool
    WINDOW: bool
    SOFTCAP: bool
    VARLEN: bool


class Sizes(NamedTuple):
    """Of q ``[B, T_q, H, D]``, and k and v ``[B, T_k, H_kv, D]``."""

    H: int
    T_q: int  # with VARLEN the most of a sequence
    T_k: int
    left: int  # keys seen before a query's own, and after, with WINDOW
    right: int


class Sequences(NamedTuple):
    """Where sequences begin, with VARLEN."""

    B: int  # how many
    cu_q: Any  # B + 1 offsets
    cu_k: Any
    total_q: int  # tokens of all of them
    total_k: int


class Tile(NamedTuple):
    """A query tile of one head."""

    some: Any  # False: none, in this round
    b: Any
    h: Any
    m: Any  # its first query; negative where the tile is cut
    T_q: Any
    T_k: Any
    first_q: Any  # tokens before those of its sequence, with VARLEN
    first_k: Any
    passed: Any  # tiles of all sequences before


class Keys(NamedTuple):
    """Tiles of keys for a number of queries.

    ``begin ... end``: those that any of the queries sees, at least one. ``whole_begin ...
    whole_end``: those of them that every query sees in full.
    """

    begin: Any
    whole_begin: Any
    whole_end: Any
    end: Any


@gluon.jit
def _keys(m, rows, tile, sizes, V: gl.constexpr, BLOCK_N: gl.constexpr) -> Keys:
    """Those of the queries ``m ... m + rows``: query i sees ``-left <= j - (i + own) <= right``."""
    own = tile.T_k - tile.T_q  # the key of query 0
    begin, whole_begin, whole_end, end = 0, 0, tile.T_k, tile.T_k
    left, right = 0, 0
    if V.WINDOW:
        left, right = anew(sizes.left), anew(sizes.right)
    if V.CAUSAL or V.WINDOW:
        behind = gl.minimum(m + rows, tile.T_q) + own  # the key after the last query's
        end = gl.minimum(behind + right, tile.T_k)
        whole_end = gl.maximum(gl.minimum(m + 1 + own + right, tile.T_k), 0)
    if V.WINDOW:
        begin = gl.maximum(m + own - left, 0) // BLOCK_N
        whole_begin = gl.cdiv(gl.maximum(behind - 1 - left, 0), BLOCK_N)
    end = gl.maximum(gl.cdiv(end, BLOCK_N), begin + 1)
    return Keys(begin, whole_begin, whole_end // BLOCK_N, end)


@gluon.jit
def _cut(n, whole_begin, whole_end, V: gl.constexpr):
    """Whether any query of a warpgroup does not see all of key tile ``n``."""
    cut = n >= whole_end
    if V.WINDOW:
        cut = cut | (n < whole_begin)
    return cut


@gluon.jit
def _place(i, programs, shift):
    """This program's place among all in round ``i``, if programs are counted from ``-shift``.

    Every other round runs backwards, so that the program with the heaviest tile of one round gets
    the lightest of the next.
    """
    p = (gl.program_id(0) + shift) % programs
    return gl.where(i % 2 == 0, p, programs - 1 - p)


@gluon.jit
def _tile(i, schedule, sizes, BLOCK_M: gl.constexpr, V: gl.constexpr) -> Tile:
    """This program's tile in round ``i``.

    Masked tiles differ: within a section, which begins with a round of its own, heads are fastest
    and tiles with most keys first. Each section counts programs from another one on, because its
    last round has no tile for some of them. Others go head after head.
    """
    section, longer, shift, per_section, _, programs = schedule
    n_m = gl.cdiv(sizes.T_q, BLOCK_M)
    s = i // per_section
    first = s * section + gl.minimum(s, longer)
    heads = gl.where(s < longer, section + 1, section)
    i -= s * per_section
    place = i * programs + _place(i, programs, s * shift)
    if V.CAUSAL or V.WINDOW:
        head, tile = first + place % heads, place // heads
    else:
        head, tile = first + place // n_m, place % n_m
    m = (gl.cdiv(sizes.T_q, ROWS) - (tile + 1) * (BLOCK_M // ROWS)) * ROWS
    some = place < heads * n_m
    return Tile(some, head // sizes.H, head % sizes.H, m, sizes.T_q, sizes.T_k, 0, 0, 0)


@gluon.jit
def _tile_of_sequences(
    i, b, passed, schedule, sizes, sequences, BLOCK_M: gl.constexpr, V: gl.constexpr
) -> Tile:
    """:func:`_tile` with VARLEN: tiles are numbered sequence after sequence.

    ``b`` and ``passed`` are those of this program's tile before, from which the search goes on.
    """
    programs = schedule[5]
    place = i * programs + _place(i, programs, 0)
    first_q, T_q = sequence(sequences.cu_q, b, sequences.total_q)
    tiles = gl.cdiv(T_q, BLOCK_M) * sizes.H
    while (place >= passed + tiles) & (b + 1 < sequences.B):
        passed += tiles
        b += 1
        first_q, T_q = sequence(sequences.cu_q, b, sequences.total_q)
        tiles = gl.cdiv(T_q, BLOCK_M) * sizes.H
    first_k, T_k = sequence(sequences.cu_k, b, sequences.total_k)
    if V.CAUSAL or V.WINDOW:
        h, tile = (place - passed) % sizes.H, (place - passed) // sizes.H
    else:
        n_m = gl.maximum(tiles // sizes.H, 1)
        h, tile = (place - passed) // n_m, (place - passed) % n_m
    m = (gl.cdiv(T_q, ROWS) - (tile + 1) * (BLOCK_M // ROWS)) * ROWS
    return Tile(place < passed + tiles, b, h, m, T_q, T_k, first_q, first_k, passed)


@gluon.jit
def _copy(buffers, sources, sizes, sequences, schedule, group, V: gl.constexpr, PDL: gl.constexpr):
    """The copying warp: of every tile q of each warpgroup, and key tile after key tile."""
    q_tiles, k_tiles, v_tiles, _, q_full, k_full, v_full = buffers
    q_source, k_source, v_source = sources
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[-2]
    WARPGROUPS: gl.constexpr = q_tiles.shape[0] // Q_BUFFERS
    BLOCK_M: gl.constexpr = WARPGROUPS * ROWS
    Q_EMPTY: gl.constexpr = EMPTY + 2 * STAGES
    threads = WARPGROUPS * 128 + 32
    if not V.VARLEN:
        follow(PDL)
    tiles = 0  # that were copied, and key tiles of all of them
    step = 0
    b, passed = 0, 0  # of the last tile's sequence
    for i in range(schedule[4]):
        if V.VARLEN:
            tile = _tile_of_sequences(i, b, passed, schedule, sizes, sequences, BLOCK_M, V)
            b, passed = tile.b, tile.passed
        else:
            tile = _tile(i, schedule, sizes, BLOCK_M, V)
        if tile.some:
            keys = _keys(tile.m, BLOCK_M, tile, sizes, V, BLOCK_N)
            h_kv = tile.h // group
            if tiles >= Q_BUFFERS:
                await_at(Q_EMPTY + tiles % Q_BUFFERS, threads)
            for w in gl.static_range(WARPGROUPS):
                buffer = tiles % Q_BUFFERS * WARPGROUPS + w
                mbarrier.expect(q_full.index(buffer), q_source.block_type.nbytes)
                # Rows before the first do not exist, and no copy may start there: row 0 comes in
                # their place, and its results are not stored.
                row = gl.maximum(tile.m + w * ROWS, 0)
                at = coordinates(tile.b, tile.h, row, tile.first_q, tile.T_q, V.VARLEN)
                async_load(q_source, at, q_full.index(buffer), q_tiles.index(buffer))
            for n in range(keys.begin, keys.end):
                stage = step % STAGES
                if step >= STAGES:
                    await_at(EMPTY + stage, threads)
                at = coordinates(tile.b, h_kv, n * BLOCK_N, tile.first_k, tile.T_k, V.VARLEN)
                mbarrier.expect(k_full.index(stage), k_source.block_type.nbytes)
                async_load(k_source, at, k_full.index(stage), k_tiles.index(stage))
                if step >= STAGES:
                    await_at(EMPTY + STAGES + stage, threads)
                mbarrier.expect(v_full.index(stage), v_source.block_type.nbytes)
                async_load(v_source, at, v_full.index(stage), v_tiles.index(stage))
                step += 1
            tiles += 1
    for n in range(gl.maximum(step - STAGES, 0), step):  # every arrival is awaited
        await_at(EMPTY + n % STAGES, threads)
        await_at(EMPTY + STAGES + n % STAGES, threads)
    for n in range(gl.maximum(tiles - Q_BUFFERS, 0), tiles):
        await_at(Q_EMPTY + n % Q_BUFFERS, threads)


@gluon.jit
def _in_window(s, offs_m, n, tile, sizes, BLOCK_N: gl.constexpr):
    """``s`` of key tile ``n`` in the window of its row, -inf elsewhere."""
    end = tile.T_k - n * BLOCK_N
    own = end - tile.T_q
    limit = gl.minimum(offs_m + (own + 1 + anew(sizes.right)), end)
    first = offs_m + (own - anew(sizes.left))
    return columns_within(s, first, limit, float("-inf"))


@gluon.jit
def _softmax(s, m_i, scale_log2, BLOCK_N: gl.constexpr):
    """``m' = max(m, s)``, p = 2^(c(s - m')), α = 2^(c(m - m')), and each thread's row sums of p."""
    # In four parts of a row, because each maximum waits four cycles for the one before.
    parts = gl.max(s.reshape([ROWS, 2, BLOCK_N // 16, 4, 2]), 2)
    largest = gl.max(gl.max(gl.max(parts, 3), 1), 1)
    m_new = gl.maximum(m_i, gl.convert_layout(largest, m_i.type.layout))
    # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
    m_known = gl.where(m_new == float("-inf"), 0.0, m_new)
    m_scaled = m_known * scale_log2
    p = gl.exp2(s * scale_log2 - m_scaled[:, None])
    alpha = gl.exp2((m_i - m_known) * scale_log2)  # 1 where m stays, whatever m_scaled rounds to
    sums = gl.sum(gl.sum(p.reshape([ROWS, BLOCK_N // 8, 4, 2]), 3), 1)  # [ROWS, 4]
    return p, alpha, m_new, sums


@gluon.jit
def _skip(buffers, begin, end, WHICH: gl.constexpr):
    """Take the turns of key tiles that only other warpgroups need, by their steps; free buffers."""
    _, k_tiles, _, o_tiles, _, k_full, v_full = buffers
    WARPGROUPS: gl.constexpr = o_tiles.shape[0]
    STAGES: gl.constexpr = k_tiles.shape[0]
    threads = WARPGROUPS * 128 + 32
    for n in range(begin, end):
        stage = n % STAGES
        mbarrier.wait(k_full.index(stage), n // STAGES & 1)
        await_at(TURN + WHICH, 256)
        arrive_at(TURN + (WHICH + 1) % WARPGROUPS, 256)
        arrive_at(EMPTY + stage, threads)
        mbarrier.wait(v_full.index(stage), n // STAGES & 1)
        arrive_at(EMPTY + STAGES + stage, threads)


@gluon.jit
def _compute(
    buffers,
    results,
    sizes,
    sequences,
    schedule,
    scales,
    WHICH: gl.constexpr,
    V: gl.constexpr,
):
    """One warpgroup: ``s = qkᵀ``, p = 2^(c(s - max s)), o = pv / Σp over the keys of every tile."""
    q_tiles, k_tiles, v_tiles, o_tiles, q_full, k_full, v_full = buffers
    o_source, lse_ptr = results
    scale_log2, cap_scale = scales
    WARPGROUPS: gl.constexpr = o_tiles.shape[0]
    BLOCK_M: gl.constexpr = WARPGROUPS * ROWS
    threads = WARPGROUPS * 128 + 32
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[-2]
    D: gl.constexpr = k_tiles.shape[-1]
    DTYPE: gl.constexpr = k_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    V_EMPTY: gl.constexpr = EMPTY + STAGES
    Q_EMPTY: gl.constexpr = EMPTY + 2 * STAGES
    NEXT: gl.constexpr = (WHICH + 1) % WARPGROUPS

    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S_LAYOUT)
    o_tile = o_tiles.index(WHICH)
    if NEXT == 0:
        arrive_at(TURN, 256)  # the first may begin
    tiles = 0  # of this program so far, and key tiles of all of them, in the same buffers
    step = 0
    b, passed = 0, 0  # of the last tile's sequence
    for i in range(schedule[4]):
        if V.VARLEN:
            tile = _tile_of_sequences(i, b, passed, schedule, sizes, sequences, BLOCK_M, V)
            b, passed = tile.b, tile.passed
        else:
            tile = _tile(i, schedule, sizes, BLOCK_M, V)
        if tile.some:
            every = _keys(tile.m, BLOCK_M, tile, sizes, V, BLOCK_N)  # of all warpgroups
            m = tile.m + WHICH * ROWS
            keys = _keys(m, ROWS, tile, sizes, V, BLOCK_N)
            offs_m = m + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
            # Keys before this one are seen. offs_m where it says nothing keeps it in two registers.
            limit = offs_m + 1 + (tile.T_k - tile.T_q if V.CAUSAL else tile.T_k)
            limit = gl.minimum(limit, tile.T_k)
            acc = gl.zeros([ROWS, D], gl.float32, layout=O_LAYOUT)
            m_i = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))

            begin = step + (keys.begin - every.begin)
            if V.WINDOW:
                _skip(buffers, step, begin, WHICH)
            buffer = tiles % Q_BUFFERS * WARPGROUPS + WHICH
            q = q_tiles.index(buffer).reshape((ROWS, D))
            mbarrier.wait(q_full.index(buffer), tiles // Q_BUFFERS & 1)
            stage = begin % STAGES
            mbarrier.wait(k_full.index(stage), begin // STAGES & 1)
            k = k_tiles.index(stage).reshape((BLOCK_N, D)).permute((1, 0))
            await_at(TURN + WHICH, 256)
            s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            arrive_at(TURN + NEXT, 256)
            s = warpgroup_mma_wait(0, deps=[s])
            arrive_at(EMPTY + stage, threads)
            if V.SOFTCAP:
                s = capped(s, cap_scale)
            if V.WINDOW:
                if _cut(keys.begin, keys.whole_begin, keys.whole_end, V):
                    s = _in_window(s, offs_m, keys.begin, tile, sizes, BLOCK_N)
            elif keys.whole_end == 0:
                s = columns_within(s, None, limit, float("-inf"))
            p_wide, alpha, m_i, l_i = _softmax(s, m_i, scale_log2, BLOCK_N)
            p = gl.convert_layout(p_wide.to(DTYPE), P_LAYOUT)
            # From here on key tiles are counted by their steps, which are ahead of them.
            ahead = begin - keys.begin
            limit += ahead * BLOCK_N
            whole_begin = keys.whole_begin + ahead
            whole_end = keys.whole_end + ahead
            last = begin + (keys.end - keys.begin) - 1
            after = begin + 1
            mbarrier.wait(k_full.index(after % STAGES), after // STAGES & 1, pred=begin < last)
            for n in range(begin + 1, last + 1):
                stage = n % STAGES
                before = (n - 1) % STAGES
                k = k_tiles.index(stage).reshape((BLOCK_N, D)).permute((1, 0))
                await_at(TURN + WHICH, 256)
                s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(before), (n - 1) // STAGES & 1)
                v = v_tiles.index(before).reshape((BLOCK_N, D))
                acc = warpgroup_mma(p, v, acc, is_async=True)
                arrive_at(TURN + NEXT, 256)
                s = warpgroup_mma_wait(1, deps=[s])
                arrive_at(EMPTY + stage, threads)
                if V.SOFTCAP:
                    s = capped(s, cap_scale)
                if _cut(n, whole_begin, whole_end, V):
                    if V.WINDOW:
                        s = _in_window(s, offs_m, n - ahead, tile, sizes, BLOCK_N)
                    else:
                        s = columns_within(s, None, limit - n * BLOCK_N, float("-inf"))
                p_wide, alpha, m_i, sums = _softmax(s, m_i, scale_log2, BLOCK_N)
                l_i *= gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None]
                l_i += sums
                # The assembler moves the wait for acc ahead of the exponentials, unless a basic
                # block ends between them, as it does where another barrier is waited for.
                after = n + 1
                mbarrier.wait(k_full.index(after % STAGES), after // STAGES & 1, pred=n < last)
                # Without p: named here its halves would be kept apart, which costs a PRMT each.
                acc = warpgroup_mma_wait(0, deps=[acc])
                arrive_at(V_EMPTY + before, threads)
                acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
                p = gl.convert_layout(p_wide.to(DTYPE), P_LAYOUT)
            arrive_at(Q_EMPTY + tiles % Q_BUFFERS, threads)
            mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
            v = v_tiles.index(last % STAGES).reshape((BLOCK_N, D))
            acc = warpgroup_mma(p, v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            arrive_at(V_EMPTY + last % STAGES, threads)
            end = step + (every.end - every.begin)
            _skip(buffers, last + 1, end, WHICH)
            step = end
            tiles += 1

            total = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, S_LAYOUT))
            total = gl.where(total == 0.0, 1.0, total)  # a row without keys: o = 0, lse = -inf
            lse = (m_i * scale_log2 + gl.log2(total)) * LN2
            o = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
            store_wait(0)  # the tile before has been read from o_tile
            o_tile.reshape((ROWS, D)).store(o.to(DTYPE))
            fence_async_shared()
            if m >= 0:
                at = coordinates(tile.b, tile.h, m, tile.first_q, tile.T_q, V.VARLEN)
                async_store(o_source, at, o_tile)
            if V.VARLEN:
                lse_row = tile.h.to(gl.int64) * anew(sequences.total_q) + tile.first_q
            else:
                lse_row = (tile.b * sizes.H + tile.h).to(gl.int64) * sizes.T_q
            there = (offs_m >= 0) & (offs_m < tile.T_q)
            gl.store(lse_ptr + lse_row + offs_m, lse, mask=there)
    store_wait(0)
    if WHICH == 0:
        await_at(TURN, 256)  # the last arrival


@gluon.jit(
    do_not_specialize=[
        *("B", "H", "group", "T_q", "T_k", "section", "longer", "shift", "per_section", "rounds"),
        *("programs", "left", "right", "total_q", "total_k"),
    ]
)
def _attention_forward_hopper_kernel(
    q_source,  # descriptors of [B, H, T, D], or with VARLEN of :func:`rows_of_sequences`
    k_source,
    v_source,
    seed_ptr,  # None: the tensors are those of the plain kernel
    cu_q_ptr,  # B + 1 offsets, with VARLEN
    cu_k_ptr,
    o_source,
    lse_ptr,
    B,
    H,
    group,  # H // H_kv
    T_q,
    T_k,
    section,  # heads at a time,
    longer,  # in as many sections one more
    shift,  # programs from which one section counts and the next
    per_section,  # rounds of a section, in each of which a program takes one query tile or none
    rounds,
    programs,  # of the grid; as an argument it need not stay in a register
    scale_log2,  # softmax_scale * log2(e); with SOFTCAP softcap * log2(e)
    left,
    right,
    total_q,
    total_k,
    cap_scale,  # softmax_scale / softcap, with SOFTCAP
    V: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Query tiles of heads, ``ROWS`` queries for each warpgroup."""
    DTYPE: gl.constexpr = q_source.dtype
    BLOCK_N: gl.constexpr = k_source.block_type.shape[-2]
    # A warpgroup may be this many key tiles short of another; the copies must not wait for it.
    gl.static_assert((WARPGROUPS - 1) * ROWS <= (STAGES - 1) * BLOCK_N)
    gl.static_assert(TURN + WARPGROUPS <= EMPTY)
    gl.static_assert(EMPTY + 2 * STAGES + Q_BUFFERS <= 16)

    # A jit function knows no [STAGES, *k_block].
    q_block: gl.constexpr = q_source.block_type.shape
    k_block: gl.constexpr = k_source.block_type.shape
    q_tiles = gl.allocate_shared_memory(DTYPE, [Q_BUFFERS * WARPGROUPS] + q_block, q_source.layout)  # noqa: RUF005
    o_tiles = gl.allocate_shared_memory(DTYPE, [WARPGROUPS] + q_block, o_source.layout)  # noqa: RUF005
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES] + k_block, k_source.layout)  # noqa: RUF005
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES] + k_block, v_source.layout)  # noqa: RUF005
    q_full = gl.allocate_shared_memory(
        gl.int64, [Q_BUFFERS * WARPGROUPS, 1], mbarrier.MBarrierLayout()
    )
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for w in gl.static_range(Q_BUFFERS * WARPGROUPS):
        mbarrier.init(q_full.index(w), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)

    buffers = (q_tiles, k_tiles, v_tiles, o_tiles, q_full, k_full, v_full)
    sources = (q_source, k_source, v_source)
    results = (o_source, lse_ptr)
    sizes = Sizes(H, T_q, T_k, left, right)
    sequences = Sequences(B, cu_q_ptr, cu_k_ptr, total_q, total_k)
    schedule = (section, longer, shift, per_section, rounds, programs)
    scales = (scale_log2, cap_scale)
    if V.VARLEN:  # all partitions read the offsets
        follow(PDL)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (buffers, results, sizes, sequences, schedule, scales, 0, V)),
                (_compute, (buffers, results, sizes, sequences, schedule, scales, 1, V)),
                (_copy, (buffers, sources, sizes, sequences, schedule, group, V, PDL)),
            ],
            [4, 1],
            [REGISTERS, COPIER_REGISTERS],
        )
    else:
        gl.static_assert(WARPGROUPS == 3)
        gl.warp_specialize(
            [
                (_compute, (buffers, results, sizes, sequences, schedule, scales, 0, V)),
                (_compute, (buffers, results, sizes, sequences, schedule, scales, 1, V)),
                (_compute, (buffers, results, sizes, sequences, schedule, scales, 2, V)),
                (_copy, (buffers, sources, sizes, sequences, schedule, group, V, PDL)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, COPIER_REGISTERS],
        )


def forward_plan(call: Attention, config: LaunchConfig, processors: int) -> Plan:
    """The launch of ``forward.py``'s function for operands that suit bulk copies, and o too.

    ``processors``: SMs of the GPU.
    """
    if call.scores.dropout_p:
        raise ValueError(
            f"Hopper's forward has no dropout, got dropout_p = {call.scores.dropout_p}"
        )
    q, k, v = call.inputs
    B, T_q, T_k, H, H_kv, group = call.sizes
    D = q.shape[3]
    total_q, total_k = q.shape[1], k.shape[1]
    o = Layout(q.shape, (total_q * H * D, H * D, D, 1), True)
    rows = {
        0: (q, config.block_m),
        1: (k, config.block_n),
        2: (v, config.block_n),
        6: (o, config.block_m),
    }
    variant = Variant(call.mask.CAUSAL, call.mask.WINDOW, call.softcap, call.varlen)
    block_m = config.groups * config.block_m
    n_m = triton.cdiv(T_q, block_m)
    if call.varlen:  # every sequence may have a tile that is cut
        n_tiles = min(B * n_m, total_q // block_m + B) * H
        programs = min(n_tiles, processors)
        section = longer = shift = per_section = 0
        rounds = triton.cdiv(n_tiles, programs)
    else:
        programs = min(B * H * n_m, processors)
        bytes_per_head = 2 * T_k * D * call.dtype.itemsize * H_kv // H
        sections = 1
        if variant.CAUSAL or variant.WINDOW:
            sections = sections_filling_rounds(B * H, n_m, bytes_per_head, programs)
        section, longer = divmod(B * H, sections)
        shift = max(1, programs // sections)
        per_section = triton.cdiv((section + (longer > 0)) * n_m, programs)
        rounds = sections * per_section
    arguments = {
        "B": B,
        "H": H,
        "group": group,
        "T_q": T_q,
        "T_k": T_k,
        "section": section,
        "longer": longer,
        "shift": shift,
        "per_section": per_section,
        "rounds": rounds,
        "programs": programs,
        "scale_log2": call.scores.scale_log2,
        "left": call.mask.left,
        "right": call.mask.right,
        "total_q": total_q,
        "total_k": total_k,
        "cap_scale": call.scores.cap_scale,
        "V": variant,
        "WARPGROUPS": config.groups,
        "STAGES": config.num_stages,
        "REGISTERS": REGISTERS[config.groups],
        **config.options,
    }
    in_bulk = rows_of_sequences if call.varlen else rows_in_bulk
    bulk = {i: swizzled(in_bulk(t, n), call.dtype) for i, (t, n) in rows.items()}
    return Plan(_attention_forward_hopper_kernel, (programs,), arguments, bulk)


def sections_filling_rounds(n_heads: int, n_m: int, bytes_per_head: int, programs: int) -> int:
    """How many sections the heads are cut into, whose tiles the programs take one after another.

    A section has about as many heads, of ``n_m`` tiles each, as leave few programs without a tile
    in their last round, and fit in L2.
    """
    heads = 1
    for rounds in range(1, SECTION_ROUNDS + 1):
        full = rounds * programs // n_m
        if full * bytes_per_head <= SECTION_BYTES:
            heads = max(heads, full)
    return max(1, round(n_heads / heads))
