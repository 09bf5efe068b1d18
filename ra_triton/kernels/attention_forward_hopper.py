"""Flash attention forward on Hopper (sm_90), with one job for each group of warps.

What ``attention_forward.py`` computes, whose kernel is its specification, for 16-bit operands that
suit bulk copies, heads of 64 or 128 lanes, and no dropout:

    o[b, t, h] = Σ_j p_j v[b, j, h'] / Σ_j p_j    p_j = exp(softmax_scale * q[b, t, h]·k[b, j, h'])
    lse[b, h, t] = log Σ_j p_j                    h' = h // (H // H_kv)

One warp copies, and two or three warpgroups of four warps compute 64 queries each on key tiles that
they share. A warpgroup has two products in flight, ``q kᵀ`` of a key tile and ``p v`` of the one
before, and takes exponentials while the second runs; the softmax of one warpgroup hides behind the
products of another. Overwrites nothing. Grid ``(B * H * cdiv(T_q, BLOCK_M),)``, as there; but tiles
end where the queries end, so that the tile with most keys is full and the one with fewest is cut.

Full: the copying warp has filled a buffer; an mbarrier, which counts bytes. Empty: all warpgroups
have read it; a named barrier, which costs a warp one instruction, where an mbarrier would stop its
warpgroup. After FlashAttention-3 (arXiv:2407.08608).
"""

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ra_triton.kernels.configs import LaunchConfig
from ra_triton.kernels.plans import Bulk, Layout, Plan
from ra_triton.kernels.tiles import (
    LN2,
    LOG2E,
    follow,
    head_and_tile,
    heads_per_section,
    rows_in_bulk,
)

ROWS = gl.constexpr(64)  # queries of a warpgroup: what one WGMMA takes
# Of a thread that computes, by warpgroups: what the 65536 of an SM leave, in steps of eight.
REGISTERS = {2: 240, 3: 160}
COPIER_REGISTERS = gl.constexpr(24)  # of one that copies: the least there is
# Named barriers: those before are Triton's. One for each buffer of k, then one for each of v.
EMPTY = gl.constexpr(8)


@gluon.jit
def _arrive(barrier, threads):
    """Count the calling threads at a named barrier, and go on."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, $2; // $0", "=r,r,r", [barrier, threads],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _await(barrier, threads):
    """Count the calling threads at a named barrier, and wait until ``threads`` have come."""
    gl.inline_asm_elementwise(
        "bar.sync $1, $2; // $0", "=r,r,r", [barrier, threads],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _key_tiles(m, rows, T_q, T_k, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """Key tiles that the queries ``m ... m + rows`` see, at least one, and those seen whole."""
    if CAUSAL:
        end = gl.minimum(gl.minimum(m + rows, T_q) + (T_k - T_q), T_k)
        whole = gl.maximum(gl.minimum(m + 1 + (T_k - T_q), T_k), 0) // BLOCK_N
    else:
        end = T_k
        whole = T_k // BLOCK_N
    return gl.maximum(gl.cdiv(end, BLOCK_N), 1), whole


@gluon.jit
def _copy(buffers, what, PDL: gl.constexpr):
    """The copying warp: q of every warpgroup, then key tile after key tile."""
    q_tiles, k_tiles, v_tiles, _, q_full, k_full, v_full = buffers
    q_source, k_source, v_source, b, h, h_kv, m, n_tiles = what
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[3]
    WARPGROUPS: gl.constexpr = q_tiles.shape[0]
    threads = WARPGROUPS * 128 + 32
    follow(PDL)
    for w in gl.static_range(WARPGROUPS):
        mbarrier.expect(q_full.index(w), q_source.block_type.nbytes)
        # Rows before the first belong to nobody, and no copy may start there: any will do.
        row = gl.maximum(m + w * ROWS, 0)
        tma.async_copy_global_to_shared(q_source, [b, h, row, 0], q_full.index(w), q_tiles.index(w))
    for n in range(n_tiles):
        stage = n % STAGES
        if n >= STAGES:
            _await(EMPTY + stage, threads)
        mbarrier.expect(k_full.index(stage), k_source.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k_source, [b, h_kv, n * BLOCK_N, 0], k_full.index(stage), k_tiles.index(stage)
        )
        if n >= STAGES:
            _await(EMPTY + STAGES + stage, threads)
        mbarrier.expect(v_full.index(stage), v_source.block_type.nbytes)
        tma.async_copy_global_to_shared(
            v_source, [b, h_kv, n * BLOCK_N, 0], v_full.index(stage), v_tiles.index(stage)
        )
    for n in range(gl.maximum(n_tiles - STAGES, 0), n_tiles):  # every arrival is awaited
        _await(EMPTY + n % STAGES, threads)
        _await(EMPTY + STAGES + n % STAGES, threads)


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
    m_scaled = gl.where(m_new == float("-inf"), 0.0, m_new * scale_log2)
    p = gl.exp2(s * scale_log2 - m_scaled[:, None])
    alpha = gl.exp2(m_i * scale_log2 - m_scaled)
    sums = gl.sum(gl.sum(p.reshape([ROWS, BLOCK_N // 8, 4, 2]), 3), 1)  # [ROWS, 4]
    return p, alpha, m_new, sums


@gluon.jit
def _compute(buffers, what, WHICH: gl.constexpr, CAUSAL: gl.constexpr):
    """One warpgroup: ``s = qkᵀ``, p = 2^(c(s - max s)), o = pv / Σp over its key tiles."""
    q_tiles, k_tiles, v_tiles, o_tiles, q_full, k_full, v_full = buffers
    o_source, lse_ptr, b, h, H, first_row, all_tiles, T_q, T_k, scale_log2 = what
    WARPGROUPS: gl.constexpr = q_tiles.shape[0]
    threads = WARPGROUPS * 128 + 32
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[3]
    D: gl.constexpr = k_tiles.shape[4]
    DTYPE: gl.constexpr = k_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    V_EMPTY: gl.constexpr = EMPTY + STAGES

    m = first_row + WHICH * ROWS
    n_tiles, whole = _key_tiles(m, ROWS, T_q, T_k, CAUSAL, BLOCK_N)
    offs_m = m + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    # Keys before this one are seen. Adding offs_m where it says nothing keeps it in two registers.
    limit = offs_m + 1 + (T_k - T_q) if CAUSAL else offs_m + 1 + T_k
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S_LAYOUT)
    acc = gl.zeros([ROWS, D], gl.float32, layout=O_LAYOUT)
    m_i = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))

    q = q_tiles.index(WHICH).reshape((ROWS, D))
    mbarrier.wait(q_full.index(WHICH), 0)
    mbarrier.wait(k_full.index(0), 0)
    k = k_tiles.index(0).reshape((BLOCK_N, D)).permute((1, 0))
    s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    _arrive(EMPTY, threads)
    if whole == 0:
        s = _masked(s, gl.minimum(limit, T_k), BLOCK_N)
    p_wide, alpha, m_i, l_i = _softmax(s, m_i, scale_log2, BLOCK_N)
    p = gl.convert_layout(p_wide.to(DTYPE), P_LAYOUT)
    mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES, pred=n_tiles > 1)
    for n in range(1, n_tiles):
        stage = n % STAGES
        before = (n - 1) % STAGES
        k = k_tiles.index(stage).reshape((BLOCK_N, D)).permute((1, 0))
        s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((n - 1) // STAGES) & 1)
        v = v_tiles.index(before).reshape((BLOCK_N, D))
        acc = warpgroup_mma(p, v, acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        _arrive(EMPTY + stage, threads)
        if n >= whole:
            s = _masked(s, gl.minimum(limit, T_k) - n * BLOCK_N, BLOCK_N)
        p_wide, alpha, m_i, sums = _softmax(s, m_i, scale_log2, BLOCK_N)
        l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None] + sums
        # The assembler moves the wait for acc ahead of the exponentials, unless a basic block ends
        # between them, as it does where another barrier is waited for.
        after = n + 1
        mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, pred=after < n_tiles)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        _arrive(V_EMPTY + before, threads)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
        p = gl.convert_layout(p_wide.to(DTYPE), P_LAYOUT)
    last = n_tiles - 1
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    v = v_tiles.index(last % STAGES).reshape((BLOCK_N, D))
    acc = warpgroup_mma(p, v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    _arrive(V_EMPTY + last % STAGES, threads)
    for n in range(n_tiles, all_tiles):  # what only other warpgroups see
        stage = n % STAGES
        mbarrier.wait(k_full.index(stage), (n // STAGES) & 1)
        _arrive(EMPTY + stage, threads)
        mbarrier.wait(v_full.index(stage), (n // STAGES) & 1)
        _arrive(V_EMPTY + stage, threads)

    total = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, S_LAYOUT))
    total = gl.where(total == 0.0, 1.0, total)  # a row without keys: o = 0, lse = -inf
    lse = (m_i * scale_log2 + gl.log2(total)) * LN2
    o = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
    o_tile = o_tiles.index(WHICH)
    o_tile.reshape((ROWS, D)).store(o.to(DTYPE))
    fence_async_shared()
    if m >= 0:
        tma.async_copy_shared_to_global(o_source, [b, h, m, 0], o_tile)
    head = (b * H + h).to(gl.int64)
    gl.store(lse_ptr + head * T_q + offs_m, lse, mask=(offs_m >= 0) & (offs_m < T_q))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["B", "H", "group", "T_q", "T_k", "section"])
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
    scale_log2,  # softmax_scale * log2(e)
    CAUSAL: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """One query tile of one head, ``ROWS`` queries for each warpgroup."""
    DTYPE: gl.constexpr = q_source.dtype
    BLOCK_M: gl.constexpr = WARPGROUPS * ROWS
    BLOCK_N: gl.constexpr = k_source.block_type.shape[2]
    D: gl.constexpr = k_source.block_type.shape[3]
    # A warpgroup may be this many key tiles short of another; the copies must not wait for it.
    gl.static_assert((WARPGROUPS - 1) * ROWS <= (STAGES - 1) * BLOCK_N)

    n_m = gl.cdiv(T_q, BLOCK_M)
    head, tile = head_and_tile(gl.program_id(0), B * H, n_m, section, True)
    b = head // H
    h = head % H
    m = (gl.cdiv(T_q, ROWS) - (tile + 1) * WARPGROUPS) * ROWS
    n_tiles, _ = _key_tiles(m, BLOCK_M, T_q, T_k, CAUSAL, BLOCK_N)

    q_tiles = gl.allocate_shared_memory(DTYPE, [WARPGROUPS, 1, 1, ROWS, D], q_source.layout)
    o_tiles = gl.allocate_shared_memory(DTYPE, [WARPGROUPS, 1, 1, ROWS, D], o_source.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D], k_source.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D], v_source.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for w in gl.static_range(WARPGROUPS):
        mbarrier.init(q_full.index(w), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)

    buffers = (q_tiles, k_tiles, v_tiles, o_tiles, q_full, k_full, v_full)
    compute = (o_source, lse_ptr, b, h, H, m, n_tiles, T_q, T_k, scale_log2)
    copy = (q_source, k_source, v_source, b, h, h // group, m, n_tiles)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (buffers, compute, 0, CAUSAL)),
                (_compute, (buffers, compute, 1, CAUSAL)),
                (_copy, (buffers, copy, PDL)),
            ],
            [4, 1],
            [REGISTERS, COPIER_REGISTERS],
        )
    else:
        gl.static_assert(WARPGROUPS == 3)
        gl.warp_specialize(
            [
                (_compute, (buffers, compute, 0, CAUSAL)),
                (_compute, (buffers, compute, 1, CAUSAL)),
                (_compute, (buffers, compute, 2, CAUSAL)),
                (_copy, (buffers, copy, PDL)),
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
) -> Plan:
    """The launch of ``attention_forward.py`` for operands that suit bulk copies, and o too."""
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
    arguments = {
        "B": B,
        "H": H,
        "group": H // H_kv,
        "T_q": T_q,
        "T_k": T_k,
        "section": heads_per_section(B * H, 2 * T_k * D * dtype.itemsize * H_kv // H),
        "scale_log2": softmax_scale * LOG2E.value,
        "CAUSAL": causal,
        "WARPGROUPS": config.groups,
        "STAGES": config.num_stages,
        "REGISTERS": REGISTERS[config.groups],
        **config.options,
    }
    grid = (B * H * triton.cdiv(T_q, config.groups * config.block_m),)
    bulk = {i: _in_shared_memory(rows_in_bulk(t, n), dtype) for i, (t, n) in rows.items()}
    return Plan(_attention_forward_hopper_kernel, grid, arguments, bulk)


def _in_shared_memory(bulk: Bulk, dtype: torch.dtype) -> Bulk:
    """With how a block lies in shared memory."""
    kind = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    return bulk._replace(layout=gl.NVMMASharedLayout.get_default_for(list(bulk.block), kind))
