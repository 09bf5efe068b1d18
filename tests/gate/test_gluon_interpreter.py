"""The interpreter of Gluon kernels: what is right runs, and each hazard is found and named."""

import pytest
import torch
from budget import assert_bitwise
from gluon_interpreter import Deadlock, Hazard, interpret, interpreted
from gluon_interpreter.hopper import async_reduce_add
from gluon_interpreter.language import Language
from gluon_interpreter.values import Tensor, integer
from strategies import NAN

from ra_triton.kernels.tiles import follow
from ra_triton.launch import gluon
from ra_triton.launch.gluon import (
    async_load,
    async_store,
    fence_async_global,
    fence_async_shared,
    gl,
    mbarrier,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ra_triton.launch.plans import Bulk, Plan

N = 64
SEEDS = range(8)
TILES = gl.constexpr(5)  # that a program doubles
STAGES = gl.constexpr(2)
FREE = gl.constexpr(8)  # named barriers, one a stage


def plan_of(kernel, grid, arguments, *tensors):
    """Of matrices, which go through descriptors, and of others; ``[64, 64]`` tiles."""
    bulk = {
        i: Bulk(t.shape, t.stride(), (N, N), _in_shared_memory(t))
        for i, t in enumerate(tensors)
        if t.ndim == 2
    }
    return Plan(kernel, grid, {"num_warps": 4, **arguments}, bulk)


def _in_shared_memory(t):
    kind = {torch.float32: gl.float32, torch.bfloat16: gl.bfloat16}[t.dtype]
    return gl.NVMMASharedLayout.get_default_for([N, N], kind)


def numbers(*shape):
    return torch.arange(torch.Size(shape).numel()).remainder(61).view(shape).bfloat16()


# A ring: one partition copies tiles of x, the other doubles them. Every fault is one line of it.


@gluon.jit
def _named(barrier, threads, WAIT: gl.constexpr):
    if WAIT:
        gl.inline_asm_elementwise(
            "bar.sync $1, $2; // $0", "=r,r,r", [barrier, threads],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        gl.inline_asm_elementwise(
            "bar.arrive $1, $2; // $0", "=r,r,r", [barrier, threads],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def _copy(x, tiles, full, FAULT: gl.constexpr):
    follow(FAULT != "memory ahead of the kernel before")
    for n in range(TILES):
        stage = n % STAGES
        if n >= STAGES and FAULT != "no wait for a free buffer":
            _named(FREE + stage, 128 + 32, True)
        nbytes: gl.constexpr = x.block_type.nbytes
        mbarrier.expect(
            full.index(stage), nbytes + 16 if FAULT == "more bytes than come" else nbytes
        )
        if FAULT == "an arrival too many":
            mbarrier.arrive(full.index(stage))
        row = (gl.program_id(0) * TILES + n) * 64
        row = row - 64 if FAULT == "a negative row" else row
        if FAULT == "a wrong buffer":
            async_load(x, [row, 0], full.index(stage), tiles.index(0))
        else:
            async_load(x, [row, 0], full.index(stage), tiles.index(stage))
    if FAULT != "arrivals nobody awaits":
        for n in range(TILES - STAGES, TILES):
            _named(FREE + n % STAGES, 128 + 32, True)
    if FAULT == "an end during a copy":
        mbarrier.expect(full.index(TILES % STAGES), x.block_type.nbytes)
        async_load(x, [0, 0], full.index(TILES % STAGES), tiles.index(TILES % STAGES))


@gluon.jit
def _double(x, y, tiles, doubled, full, FAULT: gl.constexpr):
    for n in range(TILES):
        stage = n % STAGES
        if FAULT == "a phase behind":
            mbarrier.wait(full.index(stage), n // STAGES + 1 & 1)
        elif FAULT != "no wait for a copy":
            mbarrier.wait(full.index(stage), n // STAGES & 1)
        if FAULT == "a buffer free before it is read":
            _named(FREE + stage, 128 + 32, False)
        tile = tiles.index(stage).load(gl.AutoLayout())
        if FAULT == "a thread count that differs":
            _named(FREE + stage, 128 + 64, False)
        elif FAULT == "two arrivals at once":
            _named(FREE + stage, 256, False)
            _named(FREE + stage, 256, False)
        elif FAULT == "a barrier of Triton":
            _named(1, 128 + 32, False)
        elif FAULT != "a buffer free before it is read" and FAULT != "no buffer is ever free":
            _named(FREE + stage, 128 + 32, False)
        if FAULT != "no wait for a store":
            store_wait(0)
        doubled.store((tile.to(gl.float32) * 2).to(gl.bfloat16))
        if FAULT != "no fence":
            fence_async_shared()
        if FAULT == "unknown assembly":
            gl.inline_asm_elementwise(
                "nanosleep.u32 $1;", "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1
            )
        async_store(y, [(gl.program_id(0) * TILES + n) * 64, 0], doubled)
    if FAULT != "an end during a store":
        store_wait(0)


@gluon.jit
def _ring_kernel(x, y, FAULT: gl.constexpr):
    tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], x.layout)
    doubled = gl.allocate_shared_memory(gl.bfloat16, [64, 64], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        if FAULT != "no barrier":
            mbarrier.init(full.index(stage), count=1)
    gl.warp_specialize(
        [(_double, (x, y, tiles, doubled, full, FAULT)), (_copy, (x, tiles, full, FAULT))],
        [1],
        [24],
    )


def ring(fault="", seed=0, processors=2, programs=3, rows=None):
    x = numbers(rows or programs * TILES.value * N, N)
    y = torch.full_like(x, NAN)
    early = fault in ("", "memory ahead of the kernel before")
    plan = plan_of(_ring_kernel, (programs,), {"FAULT": fault, "launch_pdl": early}, x, y)
    interpret(plan, (x, y), seed=seed, processors=processors)
    return x, y


@pytest.mark.parametrize("processors", [1, 2, 4])
def test_a_right_kernel_has_one_result_whatever_the_order(processors):
    for seed in SEEDS:
        x, y = ring(seed=seed, processors=processors)
        assert_bitwise(y, 2 * x)


def test_copies_fill_up_with_zeros_and_write_nothing_outside():
    x, y = ring(programs=1, rows=4 * N - 7)
    assert_bitwise(y, 2 * x)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no wait for a copy", "reads tiles.* may still|overwrites .*reads tiles|once each"),
        (
            "no wait for a free buffer",
            "_copy 1 copies to tiles.* overwrites what is used by|arrivals",
        ),
        ("a buffer free before it is read", "overwrites what is used by|may still be written"),
        ("a phase behind", "reads tiles.* may still|overwrites .*reads tiles|waits for phase 1"),
        ("a wrong buffer", r"copies to tiles\[0\].*(overwrites|may still be written)"),
        ("no wait for a store", "_double 0 stores to doubled .* overwrites what is used by"),
        ("no fence", "copies from doubled .* past a missing fence_async_shared .*stores to"),
        ("an end during a store", "_double 0 ends while program ., _double 0 copies from doubled"),
        ("an end during a copy", r"ends while program ., _copy 1 copies to tiles\[1\]"),
        ("an arrival too many", r"full\[0\]: 1 arrivals of .*_copy 1 .*, where 0 of 1 are left"),
        ("a thread count that differs", r"named barrier . is for \d+ threads, not \d+"),
        ("two arrivals at once", "named barrier .* is for .*, once each"),
        ("a barrier of Triton", "named barrier 1 is not the kernel's"),
        ("arrivals nobody awaits", "ends with arrivals at named barrier . unawaited"),
        ("memory ahead of the kernel before", "_copy 1 touches memory ahead of gdc_wait"),
        ("a negative row", r"a block of \[64, 64\] at \[-64, 0\]"),
        ("unknown assembly", "unknown assembly 'nanosleep"),
        ("no barrier", r"full\[0\] is no barrier yet"),
    ],
)
def test_a_hazard_is_found_in_every_order_and_named(fault, said):
    for seed in SEEDS:
        with pytest.raises(Hazard, match=said):
            ring(fault, seed)


@pytest.mark.parametrize(
    ("fault", "waiting"),
    [
        (
            "no buffer is ever free",
            r"program 0, _double 0 waits for phase 1 of full\[0\] at \S+ \(_double\).*; "
            r"program 0, _copy 1 waits for named barrier 8 at ",
        ),
        ("more bytes than come", r"_double 0 waits for phase 0 of full\[0\]"),
    ],
)
def test_a_deadlock_names_all_that_wait_and_for_what(fault, waiting):
    for seed in SEEDS:
        with pytest.raises(Deadlock, match=f"nothing can go on: .*{waiting}"):
            ring(fault, seed, processors=1)


# Tensor cores


@gluon.jit
def _product_kernel(a_source, b_source, c_source, FAULT: gl.constexpr):
    """c = (a b) b, the second product with its left operand in registers."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    tiles = gl.allocate_shared_memory(gl.bfloat16, [3, 64, 64], a_source.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.expect(ready, 2 * a_source.block_type.nbytes)
    async_load(a_source, [0, 0], ready, tiles.index(0))
    async_load(b_source, [0, 0], ready, tiles.index(1))
    mbarrier.wait(ready, 0)
    zeros = gl.zeros([64, 64], gl.float32, layout)
    c = warpgroup_mma(tiles.index(0), tiles.index(1), zeros, is_async=True)
    if FAULT == "an operand overwritten":
        tiles.index(1).store(zeros.to(gl.bfloat16))
    if FAULT == "no wait":
        left = c.to(gl.bfloat16)
    if FAULT == "a wait for others":
        c = warpgroup_mma_wait(1, deps=[c])
    elif FAULT == "a wait whose result is not taken":
        warpgroup_mma_wait(0, deps=[c])
    else:
        c = warpgroup_mma_wait(0, deps=[c])
    left = c.to(gl.bfloat16)
    d = warpgroup_mma(left, tiles.index(1), zeros, use_acc=False, is_async=True)
    store_wait(0)
    d = warpgroup_mma_wait(0, deps=[d])
    out = tiles.index(2)
    out.store(d.to(gl.bfloat16))
    fence_async_shared()
    if FAULT == "products at the end":
        warpgroup_mma(left, tiles.index(1), zeros, is_async=True)
    async_store(c_source, [0, 0], out)
    store_wait(0)


def product(fault="", seed=0):
    a, b = numbers(N, N) / 64, numbers(N, N).flip(0) / 64
    c = torch.full_like(a, NAN)
    plan = plan_of(_product_kernel, (1,), {"FAULT": fault}, a, b, c)
    interpret(plan, (a, b, c), seed=seed)
    return a, b, c


def test_products_are_those_of_float32():
    for seed in SEEDS:
        a, b, c = product(seed=seed)
        first = (a.float() @ b.float()).bfloat16()
        assert_bitwise(c, (first.float() @ b.float()).bfloat16())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("an operand overwritten", r"stores to tiles\[1\] .* overwrites .* multiplies at "),
        ("no wait", "a product is used before a wait has returned it"),
        ("a wait for others", "a product is used before a wait has returned it"),
        ("a wait whose result is not taken", "a product is used before a wait has returned it"),
        ("products at the end", "ends while products run"),
    ],
)
def test_a_product_that_is_not_awaited_is_found(fault, said):
    for seed in SEEDS:
        with pytest.raises(Hazard, match=said):
            product(fault, seed)


# Several programs


@gluon.jit
def _in_turns_kernel(turn_ptr, order_ptr, FAULT: gl.constexpr):
    """Programs append their number to a list, each after the one before."""
    me = gl.program_id(0)
    before = me + 1 if FAULT == "waits for one that has not begun" else me
    while gl.atomic_add(turn_ptr, 0, sem="acquire") != before:
        pass
    if FAULT == "outside":
        gl.store(order_ptr + 64, me)
    gl.store(order_ptr + me + gl.arange(0, 2, gl.AutoLayout()), me, mask=me >= 0)
    gl.atomic_add(turn_ptr, 1, sem="release")


def in_turns(fault="", seed=0, processors=2):
    turn, order = torch.zeros(1, dtype=torch.int32), torch.full((6,), -1, dtype=torch.int32)
    plan = plan_of(_in_turns_kernel, (5,), {"FAULT": fault}, turn, order)
    interpret(plan, (turn, order), seed=seed, processors=processors)
    return order.tolist()


def test_programs_wait_for_each_other_through_memory():
    for seed in SEEDS:
        assert in_turns(seed=seed, processors=1 + seed % 5) == [0, 1, 2, 3, 4, 4]


def test_a_livelock_names_the_programs_that_spin():
    for seed in SEEDS:
        with pytest.raises(
            Deadlock, match=r"program 0, _in_turns_kernel spins; program 1, .* spins"
        ):
            in_turns("waits for one that has not begun", seed)


def test_addresses_outside_of_a_tensor_are_an_error():
    with pytest.raises(Hazard, match="an address outside of its tensor"):
        in_turns("outside")


@gluon.jit
def _sum_kernel(x, y, count_ptr, FAULT: gl.constexpr):
    """Every program adds its tile of x to y; the one that comes last doubles the sum."""
    tile = gl.allocate_shared_memory(gl.float32, [64, 64], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.expect(ready, x.block_type.nbytes)
    async_load(x, [gl.program_id(0) * 64, 0], ready, tile)
    mbarrier.wait(ready, 0)
    if FAULT == "stores where others add":
        async_store(y, [0, 0], tile)
    else:
        async_reduce_add(y, [0, 0], tile)
    if FAULT == "read, but not written":
        store_wait(0)
    else:
        gl.inline_asm_elementwise(
            "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; mov.u32 $0, 0;", "=r", [],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    sem: gl.constexpr = "relaxed" if FAULT == "relaxed" else "acq_rel"
    if gl.atomic_add(count_ptr, 1, sem=sem) == gl.num_programs(0) - 1:
        if FAULT != "no fence":
            fence_async_global()
        mbarrier.expect(ready, x.block_type.nbytes)
        async_load(y, [0, 0], ready, tile)
        mbarrier.wait(ready, 1)
        async_reduce_add(y, [0, 0], tile)
        store_wait(0)


def summed(fault="", seed=0):
    x, y = numbers(5 * N, N).float(), torch.zeros(N, N)
    count = torch.zeros(1, dtype=torch.int32)
    plan = plan_of(_sum_kernel, (5,), {"FAULT": fault}, x, y, count)
    interpret(plan, (x, y, count), seed=seed, processors=3)
    return x, y


def test_programs_add_in_any_order():
    for seed in SEEDS:
        x, y = summed(seed=seed)
        assert_bitwise(y, 2 * x.view(5, N, N).sum(0))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "read, but not written",
            "y: .*copies to tile .* what may still be written by .* from tile",
        ),
        ("relaxed", "y: .*copies to tile .* what may still be written by .*copies from tile"),
        (
            "no fence",
            "y: .*copies to tile .* past a missing fence_async_global .* copies from tile",
        ),
        ("stores where others add", "y: .*copies from tile at .*overwrites what is used by"),
    ],
)
def test_what_others_write_to_memory_is_awaited(fault, said):
    for seed in SEEDS:
        with pytest.raises(Hazard, match=said):
            summed(fault, seed)


def test_plans_that_are_launched_are_interpreted():
    x = numbers(2 * TILES.value * N, N)
    y = torch.full_like(x, NAN)
    plan = plan_of(_ring_kernel, (2,), {"FAULT": ""}, x, y)
    with interpreted(seed=1, processors=2):
        plan(x, y)
    assert_bitwise(y, 2 * x)
    with pytest.raises(Hazard), interpreted():
        plan_of(_ring_kernel, (2,), {"FAULT": "no barrier"}, x, y)(x, y)


# Numbers


def test_integers_divide_towards_zero_and_do_not_overflow():
    assert [integer(-7) // 2, integer(-7) % 4, 7 // integer(-2), -7 % integer(4)] == [
        -3,
        -3,
        -3,
        -3,
    ]
    numbers = Tensor(torch.tensor([-7, 7], dtype=torch.int32))
    assert (numbers // 2).data.tolist() == [-3, 3]
    assert (numbers % 4).data.tolist() == [-3, 3]
    with pytest.raises(Hazard, match=r"more than torch\.int32 holds"):
        integer(2**30) * 2
    wide = integer(2**30).to(gl.int64) * 2
    assert wide == 2**31
    assert wide.dtype == (wide + 1).dtype == gl.int64
    assert (wide + numbers).data.tolist() == [2**31 - 7, 2**31 + 7]


def test_scalars_are_what_they_are_on_a_gpu():
    third = Tensor(torch.tensor(1 / 3, dtype=torch.float32))
    narrow = Tensor(torch.ones(2, dtype=torch.bfloat16))
    assert (third * narrow).dtype == gl.float32
    assert (narrow * 0.5).dtype == gl.bfloat16
    assert not ~(integer(1) < 2)
    assert Language.where(integer(1) < 2, integer(3), 4) == 3
    assert Language.maximum(integer(3), integer(4).to(gl.int64)).dtype == gl.int64
    assert Language.cdiv(integer(7), 2) == 4


def test_a_name_that_is_not_interpreted_is_an_error():
    with pytest.raises(Hazard, match=r"gl\.histogram is not interpreted"):
        _ = Language().histogram
