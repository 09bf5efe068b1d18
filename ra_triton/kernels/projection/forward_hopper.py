"""The fused projection GEMM on Hopper: the function of ``projection.py``, scheduled by hand.

    y[r, n] = Σ_c x[r, c] w[c, n] + bias[n]        r = one token of one batch

x ``[M, C]``, w ``[C, N]`` (or a view of ``[N, C]``) → y ``[M, N]``, contiguous; 16-bit, and aligned
for bulk copies. Grid: one program an SM, each of which takes one tile of y after another.
Overwrites y.

Three groups of four warps, or two, share a tile: 64 rows each, and 256 columns. Its accumulators
fill the registers, because smaller tiles read more of shared memory and L2 for the same products.
What is multiplied next waits in a ring of stages, which the first group refills by bulk copies,
across the borders between tiles. Only the ring's barriers tie the groups to each other, so that one
stores while others multiply. No element's sum depends on how many groups there are.
"""

import torch
import triton

from ra_triton.launch import gluon
from ra_triton.launch.configs import LaunchConfig
from ra_triton.launch.gluon import (
    async_load,
    async_store,
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    mbarrier,
    store_wait,
    swizzled,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ra_triton.launch.plans import Bulk, Layout, Plan

GROUP_M = 8
STORED = gl.constexpr(64)  # columns of y that a group stores at a time
BUFFERS = gl.constexpr(2)  # that it stores from, in turns


@gluon.jit
def _tile_of(tile, n_m, n_n, GROUP_M: gl.constexpr):
    """Row tile and column tile: down GROUP_M rows, then one column to the right."""
    per_group = GROUP_M * n_n
    first = tile // per_group * GROUP_M
    size = gl.minimum(n_m - first, GROUP_M)
    return first + tile % per_group % size, tile % per_group // size


@gluon.jit
def _after(stage, phase, STAGES: gl.constexpr):
    """The stage after this one, and the parity of its round."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _before(stage, STAGES: gl.constexpr):
    """The stage before this one."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _refill(
    x_source,
    w_source,
    x_tiles,
    w_tiles,
    loaded,
    free,
    tile,
    k,
    stage,
    phase,
    n_m,
    n_n,
    C,
    W_TRANSPOSED: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Load step ``k`` of ``tile`` into ``stage`` once that is free; the step and stage after."""
    STAGES: gl.constexpr = w_tiles.shape[0]
    GROUPS: gl.constexpr = x_tiles.shape[0] // STAGES
    BLOCK_M: gl.constexpr = x_tiles.shape[1]
    BLOCK_K: gl.constexpr = x_tiles.shape[2]
    BLOCK_N: gl.constexpr = w_tiles.shape[1] if W_TRANSPOSED else w_tiles.shape[2]
    if tile < n_m * n_n:
        tile_m, tile_n = _tile_of(tile, n_m, n_n, GROUP_M)
        m, n = tile_m * (GROUPS * BLOCK_M), tile_n * BLOCK_N
        mbarrier.wait(free.index(stage), phase)
        ready = loaded.index(stage)
        mbarrier.expect(ready, GROUPS * x_source.block_type.nbytes + w_source.block_type.nbytes)
        for i in gl.static_range(GROUPS):
            x_tile = x_tiles.index(stage * GROUPS + i)
            async_load(x_source, [m + i * BLOCK_M, k], ready, x_tile)
        if W_TRANSPOSED:
            async_load(w_source, [n, k], ready, w_tiles.index(stage))
        else:
            async_load(w_source, [k, n], ready, w_tiles.index(stage))
        stage, phase = _after(stage, phase, STAGES)
        k += BLOCK_K
        if k >= C:
            k = 0
            tile += gl.num_programs(0)
    return tile, k, stage, phase


@gluon.jit
def _halves(tile):
    """Left and right half of a tile's columns."""
    rows: gl.constexpr = tile.shape[0]
    half: gl.constexpr = tile.shape[1] // 2
    return tile.reshape([rows, 2, half]).permute([0, 2, 1]).split()


@gluon.jit
def _store(columns, bias_ptr, y_source, y_tile, m, n, N):
    """``y = columns + bias`` at row m and column n, once what ``y_tile`` held has been read."""
    if bias_ptr is not None:
        offs_n = n + gl.arange(0, STORED, gl.SliceLayout(0, columns.type.layout))
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        columns += bias.to(gl.float32)[None, :]
    store_wait(BUFFERS - 1)
    y_tile.store(columns.to(y_source.dtype))
    fence_async_shared()
    async_store(y_source, [m, n], y_tile)


@gluon.jit
def _multiply(
    GROUP: gl.constexpr,
    x_source,
    w_source,
    bias_ptr,
    y_source,
    x_tiles,
    w_tiles,
    y_tiles,
    loaded,
    free,
    M,
    N,
    C,
    W_TRANSPOSED: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """The rows of one group in each tile of this program; the first loads for all groups."""
    STAGES: gl.constexpr = w_tiles.shape[0]
    GROUPS: gl.constexpr = x_tiles.shape[0] // STAGES
    BLOCK_M: gl.constexpr = x_tiles.shape[1]
    BLOCK_K: gl.constexpr = x_tiles.shape[2]
    BLOCK_N: gl.constexpr = w_tiles.shape[1] if W_TRANSPOSED else w_tiles.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    n_m, n_n = gl.cdiv(M, GROUPS * BLOCK_M), gl.cdiv(N, BLOCK_N)
    if GROUP == 0:
        next_tile, next_k, next_stage, next_phase = gl.program_id(0), 0, 0, 1
        for _ in gl.static_range(STAGES - 1):
            next_tile, next_k, next_stage, next_phase = _refill(
                *(x_source, w_source, x_tiles, w_tiles, loaded, free),
                *(next_tile, next_k, next_stage, next_phase),
                *(n_m, n_n, C, W_TRANSPOSED, GROUP_M),
            )
    stage, phase = 0, 0
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    for tile in range(gl.program_id(0), n_m * n_n, gl.num_programs(0)):
        for k in range(0, C, BLOCK_K):
            mbarrier.wait(loaded.index(stage), phase)
            x, w = x_tiles.index(stage * GROUPS + GROUP), w_tiles.index(stage)
            if W_TRANSPOSED:
                w = w.permute((1, 0))
            acc = warpgroup_mma(x, w, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))  # for the step before
            # ``before = stage`` would not do: loops do not carry on a second name of a value.
            mbarrier.arrive(free.index(_before(stage, STAGES)), pred=k > 0)
            stage, phase = _after(stage, phase, STAGES)
            if GROUP == 0:
                next_tile, next_k, next_stage, next_phase = _refill(
                    *(x_source, w_source, x_tiles, w_tiles, loaded, free),
                    *(next_tile, next_k, next_stage, next_phase),
                    *(n_m, n_n, C, W_TRANSPOSED, GROUP_M),
                )
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index(_before(stage, STAGES)))

        tile_m, tile_n = _tile_of(tile, n_m, n_n, GROUP_M)
        m, n = (tile_m * GROUPS + GROUP) * BLOCK_M, tile_n * BLOCK_N
        left, right = _halves(acc)
        quarters = _halves(left) + _halves(right)
        for i in gl.static_range(4):
            y_tile = y_tiles.index(GROUP * BUFFERS + i % BUFFERS)
            _store(quarters[i], bias_ptr, y_source, y_tile, m, n + i * STORED, N)
    store_wait(0)


@gluon.jit
def _projection_kernel(
    x_source,  # descriptor of [M, C], in tiles of [BLOCK_M, BLOCK_K]
    w_source,  # descriptor of [C, N] ([N, C] with W_TRANSPOSED), in tiles of [BLOCK_K, BLOCK_N]
    bias_ptr,
    y_source,  # descriptor of [M, N], in tiles of [BLOCK_M, STORED]
    M,
    N,
    C,
    W_TRANSPOSED: gl.constexpr,
    GROUP_M: gl.constexpr,
    GROUPS: gl.constexpr,  # of four warps, BLOCK_M rows each
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Tiles of y = x w + bias, accumulated over C in steps of BLOCK_K."""
    gl.static_assert(BLOCK_N == 4 * STORED, "_multiply stores quarters of a tile")
    tiles: gl.constexpr = [STAGES * GROUPS, BLOCK_M, BLOCK_K]
    x_tiles = gl.allocate_shared_memory(x_source.dtype, tiles, x_source.layout)
    w_block: gl.constexpr = w_source.block_type.shape
    stages: gl.constexpr = [STAGES, w_block[0], w_block[1]]
    w_tiles = gl.allocate_shared_memory(w_source.dtype, stages, w_source.layout)
    buffers: gl.constexpr = [GROUPS * BUFFERS, BLOCK_M, STORED]
    y_tiles = gl.allocate_shared_memory(y_source.dtype, buffers, y_source.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()
    if PDL:  # as in tiles.follow: no access to global memory overlaps with the kernel before
        gdc_wait()
        gdc_launch_dependents()
    # fmt: off
    if GROUPS == 3:
        gl.warp_specialize([
            (_multiply, (0, x_source, w_source, bias_ptr, y_source, x_tiles, w_tiles, y_tiles,
                         loaded, free, M, N, C, W_TRANSPOSED, GROUP_M)),
            (_multiply, (1, x_source, w_source, bias_ptr, y_source, x_tiles, w_tiles, y_tiles,
                         loaded, free, M, N, C, W_TRANSPOSED, GROUP_M)),
            (_multiply, (2, x_source, w_source, bias_ptr, y_source, x_tiles, w_tiles, y_tiles,
                         loaded, free, M, N, C, W_TRANSPOSED, GROUP_M)),
        ], [4, 4], [168, 168])
    else:
        gl.warp_specialize([
            (_multiply, (0, x_source, w_source, bias_ptr, y_source, x_tiles, w_tiles, y_tiles,
                         loaded, free, M, N, C, W_TRANSPOSED, GROUP_M)),
            (_multiply, (1, x_source, w_source, bias_ptr, y_source, x_tiles, w_tiles, y_tiles,
                         loaded, free, M, N, C, W_TRANSPOSED, GROUP_M)),
        ], [4], [240])
    # fmt: on


def projection_plan(
    x: Layout, w: Layout, dtype: torch.dtype, config: LaunchConfig, processors: int
) -> Plan:
    """The launch on ``(x [M, C], w [C, N], bias, y [M, N])``.

    Args:
        x: rows, whose last stride is 1.
        w: one of its strides is 1.
        dtype: of all four.
        config: its ``groups`` are 2 or 3.
        processors: SMs of the GPU.
    """
    (M, C), N = x.shape, w.shape[1]
    w_transposed = w.strides[1] != 1
    w_block = (config.block_k, config.block_n)
    if w_transposed:
        w, w_block = Layout(w.shape[::-1], w.strides[::-1], w.on_16_bytes), w_block[::-1]
    bulk = {
        0: Bulk(x.shape, x.strides, (config.block_m, config.block_k)),
        1: Bulk(w.shape, w.strides, w_block),
        3: Bulk((M, N), (N, 1), (config.block_m, STORED.value)),
    }
    bulk = {i: swizzled(b, dtype) for i, b in bulk.items()}
    arguments = {
        "M": M,
        "N": N,
        "C": C,
        "W_TRANSPOSED": w_transposed,
        "GROUP_M": GROUP_M,
        "GROUPS": config.groups,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.num_stages,
        **config.options,
    }
    tiles = triton.cdiv(M, config.groups * config.block_m) * triton.cdiv(N, config.block_n)
    return Plan(_projection_kernel, (min(tiles, processors),), arguments, bulk)
