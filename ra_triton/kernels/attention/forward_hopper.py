"""Flash attention forward on Hopper (sm_90), with one job for each group of warps.

What ``attention_forward.py`` computes, whose kernel is its specification, for 16-bit operands that
suit bulk copies, heads of 64 or 128 lanes, and no dropout:

    o[b, t, h] = Σ_j p_j v[b, j, h'] / Σ_j p_j    p_j = exp(softmax_scale * q[b, t, h]·k[b, j, h'])
    lse[b, h, t] = log Σ_j p_j                    h' = h // (H // H_kv)

One warp copies, and two or three warpgroups of four warps compute 64 queries each on key tiles that
they share. A warpgroup has two products in flight, ``q kᵀ`` of a key tile and ``p v`` of the one
before, and takes exponentials while the second runs; the warpgroups issue products in turns, so
that the softmax of one hides behind the products of another. Overwrites nothing.

Grid: one program an SM, each of which takes one query tile after another (:func:`_tile`), while
the copies run ahead into the next one. Tiles end where the queries end, so that the tile with most
keys is full and the one with fewest is cut.

Full: the copying warp has filled a buffer; an mbarrier, which counts bytes. Empty: all warpgroups
have read it; a named barrier, which costs a warp one instruction, where an mbarrier would stop its
warpgroup. After FlashAttention-3 (arXiv:2407.08608).
"""

import math

import torch
import triton

from ra_triton.kernels.attention.arguments import rows_in_bulk
from ra_triton.kernels.tiles import LN2, LOG2E, follow
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


@gluon.jit
def _key_tiles(m, rows, T_q, T_k, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """Key tiles that any of the queries ``m ... m + rows`` sees, and at least one."""
    end = T_k
    if CAUSAL:
        end = gl.minimum(gl.minimum(m + rows, T_q) + (T_k - T_q), T_k)
    return gl.maximum(gl.cdiv(end, BLOCK_N), 1)


@gluon.jit
def _whole_key_tiles(m, T_q, T_k, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """Key tiles that the queries from ``m`` on see whole."""
    end = T_k
    if CAUSAL:
        end = gl.maximum(gl.minimum(m + 1 + (T_k - T_q), T_k), 0)
    return end // BLOCK_N


@gluon.jit
def _tile(i, schedule, H, T_q, BLOCK_M: gl.constexpr, CAUSAL: gl.constexpr):
    """Whether this program has a tile in round ``i``, its batch, head, and first query.

    Causal tiles differ: within a section, which begins with a round of its own, heads are fastest
    and tiles with most keys first, and every other round runs backwards, so that whoever had the
    heaviest tile of one round has the lightest of the next. Others go head after head.
    """
    n_heads, section, per_section, _ = schedule
    n_m = gl.cdiv(T_q, BLOCK_M)
    programs = gl.num_programs(0)
    first = i // per_section * section
    heads = gl.minimum(section, n_heads - first)
    p = gl.program_id(0)
    place = i % per_section * programs + gl.where(i % 2 == 0, p, programs - 1 - p)
    if CAUSAL:
        head, tile = first + place % heads, place // heads
    else:
        head, tile = first + place // n_m, place % n_m
    m = (gl.cdiv(T_q, ROWS) - (tile + 1) * (BLOCK_M // ROWS)) * ROWS
    return place < heads * n_m, head // H, head % H, m


@gluon.jit
def _copy(buffers, sources, sizes, schedule, group, CAUSAL: gl.constexpr, PDL: gl.constexpr):
    """The copying warp: of every tile q of each warpgroup, and key tile after key tile."""
    q_tiles, k_tiles, v_tiles, _, q_full, k_full, v_full = buffers
    q_source, k_source, v_source = sources
    H, T_q, T_k = sizes
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[3]
    WARPGROUPS: gl.constexpr = q_tiles.shape[0] // Q_BUFFERS
    BLOCK_M: gl.constexpr = WARPGROUPS * ROWS
    Q_EMPTY: gl.constexpr = EMPTY + 2 * STAGES
    threads = WARPGROUPS * 128 + 32
    follow(PDL)
    tiles = 0  # that were copied, and key tiles of all of them
    step = 0
    for i in range(schedule[3]):
        some, b, h, m = _tile(i, schedule, H, T_q, BLOCK_M, CAUSAL)
        if some:
            n_tiles = _key_tiles(m, BLOCK_M, T_q, T_k, CAUSAL, BLOCK_N)
            h_kv = h // group
            if tiles >= Q_BUFFERS:
                await_at(Q_EMPTY + tiles % Q_BUFFERS, threads)
            for w in gl.static_range(WARPGROUPS):
                buffer = tiles % Q_BUFFERS * WARPGROUPS + w
                mbarrier.expect(q_full.index(buffer), q_source.block_type.nbytes)
                # Rows before the first belong to nobody, and no copy may start there: any will do.
                row = gl.maximum(m + w * ROWS, 0)
                async_load(q_source, [b, h, row, 0], q_full.index(buffer), q_tiles.index(buffer))
            for n in range(n_tiles):
                stage = step % STAGES
                if step >= STAGES:
                    await_at(EMPTY + stage, threads)
                mbarrier.expect(k_full.index(stage), k_source.block_type.nbytes)
                async_load(
                    k_source, [b, h_kv, n * BLOCK_N, 0], k_full.index(stage), k_tiles.index(stage)
                )
                if step >= STAGES:
                    await_at(EMPTY + STAGES + stage, threads)
                mbarrier.expect(v_full.index(stage), v_source.block_type.nbytes)
                async_load(
                    v_source, [b, h_kv, n * BLOCK_N, 0], v_full.index(stage), v_tiles.index(stage)
                )
                step += 1
            tiles += 1
    for n in range(gl.maximum(step - STAGES, 0), step):  # every arrival is awaited
        await_at(EMPTY + n % STAGES, threads)
        await_at(EMPTY + STAGES + n % STAGES, threads)
    for n in range(gl.maximum(tiles - Q_BUFFERS, 0), tiles):
        await_at(Q_EMPTY + n % Q_BUFFERS, threads)


@gluon.jit
def _masked(s, limit, BLOCK_N: gl.constexpr):
    """``s`` where the column is less than its row's limit, -inf elsewhere.

    A thread holds two of every eight columns. With those eight as a dim of their own its columns
    are constants of the code plus one number, where a plain comparison takes 32 registers.
    """
    LAYOUT: gl.constexpr = s.type.layout
    s = s.reshape([ROWS, BLOCK_N // 8, 8])
    SPLIT: gl.constexpr = s.type.layout
    eights = gl.arange(0, BLOCK_N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, SPLIT))) * 8
    within = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, SPLIT)))
    limit = gl.convert_layout(limit, gl.SliceLayout(1, gl.SliceLayout(2, SPLIT)))
    left = limit[:, None, None] - within[None, None, :]
    s = gl.where(eights[None, :, None] < left, s, float("-inf"))
    return gl.convert_layout(s.reshape([ROWS, BLOCK_N]), LAYOUT)


@gluon.jit
def _softmax(s, m_i, scale_log2, BLOCK_N: gl.constexpr):
    """``m' = max(m, s)``, p = 2^(c(s - m')), α = 2^(c(m - m')), and each thread's row sums of p."""
    m_new = gl.maximum(m_i, gl.max(s, 1))
    # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
    m_known = gl.where(m_new == float("-inf"), 0.0, m_new)
    m_scaled = m_known * scale_log2
    p = gl.exp2(s * scale_log2 - m_scaled[:, None])
    alpha = gl.exp2((m_i - m_known) * scale_log2)  # 1 where m stays, whatever m_scaled rounds to
    sums = gl.sum(gl.sum(p.reshape([ROWS, BLOCK_N // 8, 4, 2]), 3), 1)  # [ROWS, 4]
    return p, alpha, m_new, sums


@gluon.jit
def _compute(
    buffers, results, sizes, schedule, scale_log2, WHICH: gl.constexpr, CAUSAL: gl.constexpr
):
    """One warpgroup: ``s = qkᵀ``, p = 2^(c(s - max s)), o = pv / Σp over the keys of every tile."""
    q_tiles, k_tiles, v_tiles, o_tiles, q_full, k_full, v_full = buffers
    o_source, lse_ptr = results
    H, T_q, T_k = sizes
    WARPGROUPS: gl.constexpr = o_tiles.shape[0]
    BLOCK_M: gl.constexpr = WARPGROUPS * ROWS
    threads = WARPGROUPS * 128 + 32
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[3]
    D: gl.constexpr = k_tiles.shape[4]
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
    for i in range(schedule[3]):
        some, b, h, first_row = _tile(i, schedule, H, T_q, BLOCK_M, CAUSAL)
        if some:
            all_tiles = _key_tiles(first_row, BLOCK_M, T_q, T_k, CAUSAL, BLOCK_N)
            m = first_row + WHICH * ROWS
            n_tiles = _key_tiles(m, ROWS, T_q, T_k, CAUSAL, BLOCK_N)
            whole = _whole_key_tiles(m, T_q, T_k, CAUSAL, BLOCK_N)
            offs_m = m + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
            # Keys before this one are seen. offs_m where it says nothing keeps it in two registers.
            limit = gl.minimum(offs_m + 1 + (T_k - T_q) if CAUSAL else offs_m + 1 + T_k, T_k)
            acc = gl.zeros([ROWS, D], gl.float32, layout=O_LAYOUT)
            m_i = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))

            buffer = tiles % Q_BUFFERS * WARPGROUPS + WHICH
            q = q_tiles.index(buffer).reshape((ROWS, D))
            mbarrier.wait(q_full.index(buffer), tiles // Q_BUFFERS & 1)
            stage = step % STAGES
            mbarrier.wait(k_full.index(stage), step // STAGES & 1)
            k = k_tiles.index(stage).reshape((BLOCK_N, D)).permute((1, 0))
            await_at(TURN + WHICH, 256)
            s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            arrive_at(TURN + NEXT, 256)
            s = warpgroup_mma_wait(0, deps=[s])
            arrive_at(EMPTY + stage, threads)
            if whole == 0:
                s = _masked(s, limit, BLOCK_N)
            p_wide, alpha, m_i, l_i = _softmax(s, m_i, scale_log2, BLOCK_N)
            p = gl.convert_layout(p_wide.to(DTYPE), P_LAYOUT)
            limit += step * BLOCK_N  # from here on key tiles are counted from the first tile's
            whole += step
            last = step + n_tiles - 1
            after = step + 1
            mbarrier.wait(k_full.index(after % STAGES), after // STAGES & 1, pred=step < last)
            for n in range(step + 1, last + 1):
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
                if n >= whole:
                    s = _masked(s, limit - n * BLOCK_N, BLOCK_N)
                p_wide, alpha, m_i, sums = _softmax(s, m_i, scale_log2, BLOCK_N)
                l_i *= gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None]
                l_i += sums
                # The assembler moves the wait for acc ahead of the exponentials, unless a basic
                # block ends between them, as it does where another barrier is waited for.
                after = n + 1
                mbarrier.wait(k_full.index(after % STAGES), after // STAGES & 1, pred=n < last)
                acc, p = warpgroup_mma_wait(0, deps=[acc, p])
                arrive_at(V_EMPTY + before, threads)
                acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
                p = gl.convert_layout(p_wide.to(DTYPE), P_LAYOUT)
            arrive_at(Q_EMPTY + tiles % Q_BUFFERS, threads)
            mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
            v = v_tiles.index(last % STAGES).reshape((BLOCK_N, D))
            acc = warpgroup_mma(p, v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            arrive_at(V_EMPTY + last % STAGES, threads)
            for n in range(last + 1, step + all_tiles):  # what only other warpgroups see
                stage = n % STAGES
                mbarrier.wait(k_full.index(stage), n // STAGES & 1)
                await_at(TURN + WHICH, 256)
                arrive_at(TURN + NEXT, 256)
                arrive_at(EMPTY + stage, threads)
                mbarrier.wait(v_full.index(stage), n // STAGES & 1)
                arrive_at(V_EMPTY + stage, threads)
            step += all_tiles
            tiles += 1

            total = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, S_LAYOUT))
            total = gl.where(total == 0.0, 1.0, total)  # a row without keys: o = 0, lse = -inf
            lse = (m_i * scale_log2 + gl.log2(total)) * LN2
            o = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
            store_wait(0)  # the tile before has been read from o_tile
            o_tile.reshape((ROWS, D)).store(o.to(DTYPE))
            fence_async_shared()
            if m >= 0:
                async_store(o_source, [b, h, m, 0], o_tile)
            head = (b * H + h).to(gl.int64)
            gl.store(lse_ptr + head * T_q + offs_m, lse, mask=(offs_m >= 0) & (offs_m < T_q))
    store_wait(0)
    if WHICH == 0:
        await_at(TURN, 256)  # the last arrival


@gluon.jit(do_not_specialize=["B", "H", "group", "T_q", "T_k", "section", "per_section", "rounds"])
def _attention_forward_hopper_kernel(
    q_source,  # descriptors of [B, H, T, D]
    k_source,
    v_source,
    seed_ptr,  # None, like the next two: the tensors are those of the plain kernel
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    o_source,
    lse_ptr,
    B,
    H,
    group,  # H // H_kv
    T_q,
    T_k,
    section,  # heads at a time
    per_section,  # rounds of a section, in each of which a program takes one query tile or none
    rounds,
    scale_log2,  # softmax_scale * log2(e)
    CAUSAL: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """One query tile of one head, ``ROWS`` queries for each warpgroup."""
    DTYPE: gl.constexpr = q_source.dtype
    BLOCK_N: gl.constexpr = k_source.block_type.shape[2]
    D: gl.constexpr = k_source.block_type.shape[3]
    # A warpgroup may be this many key tiles short of another; the copies must not wait for it.
    gl.static_assert((WARPGROUPS - 1) * ROWS <= (STAGES - 1) * BLOCK_N)
    gl.static_assert(TURN + WARPGROUPS <= EMPTY)
    gl.static_assert(EMPTY + 2 * STAGES + Q_BUFFERS <= 16)

    q_tiles = gl.allocate_shared_memory(
        DTYPE, [Q_BUFFERS * WARPGROUPS, 1, 1, ROWS, D], q_source.layout
    )
    o_tiles = gl.allocate_shared_memory(DTYPE, [WARPGROUPS, 1, 1, ROWS, D], o_source.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D], k_source.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D], v_source.layout)
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
    sizes = (H, T_q, T_k)
    schedule = (B * H, section, per_section, rounds)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (buffers, results, sizes, schedule, scale_log2, 0, CAUSAL)),
                (_compute, (buffers, results, sizes, schedule, scale_log2, 1, CAUSAL)),
                (_copy, (buffers, sources, sizes, schedule, group, CAUSAL, PDL)),
            ],
            [4, 1],
            [REGISTERS, COPIER_REGISTERS],
        )
    else:
        gl.static_assert(WARPGROUPS == 3)
        gl.warp_specialize(
            [
                (_compute, (buffers, results, sizes, schedule, scale_log2, 0, CAUSAL)),
                (_compute, (buffers, results, sizes, schedule, scale_log2, 1, CAUSAL)),
                (_compute, (buffers, results, sizes, schedule, scale_log2, 2, CAUSAL)),
                (_copy, (buffers, sources, sizes, schedule, group, CAUSAL, PDL)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, COPIER_REGISTERS],
        )


def forward_plan(
    dtype: torch.dtype,
    q: Layout,
    k: Layout,
    v: Layout,
    causal: bool,
    softmax_scale: float | None,
    config: LaunchConfig,
    processors: int,
) -> Plan:
    """The launch of ``attention_forward.py`` for operands that suit bulk copies, and o too.

    ``processors``: SMs of the GPU.
    """
    B, T_q, H, D = q.shape
    T_k, H_kv = k.shape[1:3]
    if softmax_scale is None:
        softmax_scale = 1 / math.sqrt(D)
    o = Layout(q.shape, (T_q * H * D, H * D, D, 1), True)
    rows = {
        0: (q, config.block_m),
        1: (k, config.block_n),
        2: (v, config.block_n),
        6: (o, config.block_m),
    }
    n_m = triton.cdiv(T_q, config.groups * config.block_m)
    programs = min(B * H * n_m, processors)
    bytes_per_head = 2 * T_k * D * dtype.itemsize * H_kv // H
    section = heads_filling_rounds(B * H, n_m, bytes_per_head, programs) if causal else B * H
    per_section = triton.cdiv(section * n_m, programs)
    sections, rest = divmod(B * H, section)
    arguments = {
        "B": B,
        "H": H,
        "group": H // H_kv,
        "T_q": T_q,
        "T_k": T_k,
        "section": section,
        "per_section": per_section,
        "rounds": sections * per_section + triton.cdiv(rest * n_m, programs),
        "scale_log2": softmax_scale * LOG2E.value,
        "CAUSAL": causal,
        "WARPGROUPS": config.groups,
        "STAGES": config.num_stages,
        "REGISTERS": REGISTERS[config.groups],
        **config.options,
    }
    bulk = {i: swizzled(rows_in_bulk(t, n), dtype) for i, (t, n) in rows.items()}
    return Plan(_attention_forward_hopper_kernel, (programs,), arguments, bulk)


def heads_filling_rounds(n_heads: int, n_m: int, bytes_per_head: int, programs: int) -> int:
    """Heads whose ``n_m`` tiles each the programs take before those of other heads.

    As many as leave few programs without a tile in their last round, and fit in L2; more if only a
    few heads would remain for a last section.
    """
    heads = 1
    for rounds in range(1, SECTION_ROUNDS + 1):
        full = rounds * programs // n_m
        if full * bytes_per_head <= SECTION_BYTES:
            heads = max(heads, full)
    sections = max(1, round(n_heads / heads))
    return min(n_heads, max(heads, triton.cdiv(n_heads, sections)))
