"""Hopper's own: bulk copies, tensor cores, barriers, and the assembly that kernels use."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from . import scheduler
from .memory import Barrier, Descriptor, Shared, region_of
from .scheduler import Agent, Hazard, Known
from .values import Int, Tensor, integer

# Programs


class Program:
    """One of the grid, with its shared memory.

    Attributes:
        named: the named barriers by number; ``here``: who has come to them.
        follows: events after which the kernel before has ended; None if nothing has to wait for it.
        copies: events of bulk copies into shared memory.
    """

    def __init__(self, id: int, grid: tuple[int, ...], follows: bool) -> None:
        self.id, self.grid = id, grid
        self.place = (id % grid[0], id // grid[0] % grid[1], id // (grid[0] * grid[1]))
        self.memory: list[Any] = []
        self.named: dict[int, Barrier] = {}
        self.here: dict[int, set[Agent]] = {}
        self.follows = 0 if follows else None
        self.copies = self.workers = 0

    def end(self) -> None:
        """What may not be left over."""
        for barrier in self.named.values():
            if barrier.left < barrier.count:
                raise Hazard(f"program {self.id} ends with arrivals at {barrier.name} unawaited")
        if unknown := self.copies & ~scheduler.run.current.known:
            raise Hazard(f"program {self.id} ends while {scheduler.run.first(unknown)}")


def to_the_end(function: Callable[..., Any], args: Sequence[Any]) -> None:
    """A partition, and what may not be left over."""
    function(*args)
    me = scheduler.run.current
    for copy in me.copies:
        if not me.known & copy.events["read"]:
            raise Hazard(f"{me} ends while {scheduler.run.first(copy.events['read'])}")
    if me.products:
        raise Hazard(f"{me} ends while products run")


def touch(idle: bool = False) -> None:
    """The current agent reads or writes global memory."""
    scheduler.run.pause(idle=idle)
    me = scheduler.run.current
    follows = me.program.follows
    if follows is not None and not me.known & follows:
        raise Hazard(f"{me} touches memory ahead of gdc_wait, at {scheduler.line()}")


def gdc_wait() -> None:
    run = scheduler.run
    event = run.event("waits for the kernel before")
    run.current.known |= event
    if run.current.program.follows is not None:
        run.current.program.follows |= event


def gdc_launch_dependents() -> None:
    """Nothing: there is no kernel after."""


# Bulk copies


class Copy:
    """Out of shared memory: the events of its read and write, and whether they have happened."""

    def __init__(self, reads: int, writes: int) -> None:
        self.events, self.read, self.written = {"read": reads, "written": writes}, False, False


def async_load(
    source: Descriptor,
    coord: Sequence[Any],
    barrier: Shared,
    result: Shared,
    pred: Any = True,
    multicast: bool = False,
) -> None:
    """Fills ``result`` at some later time, and then counts its bytes at the barrier."""
    if not pred:
        return
    touch()
    run = scheduler.run
    program, counter = run.current.program, _barrier(barrier)
    event = run.event(f"copies to {result.name}")
    inside, part = source.part(coord, result)
    result.memory.write(region_of(result.data), event, by_engine=True)
    if inside.numel():
        source.memory.read(region_of(inside), event, bulk=True)
    result.data.fill_(float("nan"))
    me = run.current
    knows = Known(me.known | event, me.fenced, me.fenced_global)
    program.copies |= event

    def arrive() -> None:
        result.data.zero_()
        part.copy_(inside)
        counter.bytes -= source.block_type.nbytes
        counter.gathered.learn(knows)
        counter.settle()

    run.later(arrive)


def async_store(target: Descriptor, coord: Sequence[Any], src: Shared) -> None:
    """Reads ``src`` at some later time, and writes to memory later still."""
    _copy_out(target, coord, src, add=False)


def async_reduce_add(target: Descriptor, coord: Sequence[Any], src: Shared) -> None:
    """:func:`async_store` that adds to what is there."""
    _copy_out(target, coord, src, add=True)


def _copy_out(target: Descriptor, coord: Sequence[Any], src: Shared, add: bool) -> None:
    touch()
    run = scheduler.run
    inside, part = target.part(coord, src)
    reads, writes = (run.event(f"copies from {src.name}") for _ in range(2))
    src.memory.read(region_of(src.data), reads, by_engine=True)
    if add and inside.numel():
        target.memory.add(region_of(inside), writes, bulk=True)
    elif inside.numel():
        target.memory.write(region_of(inside), writes, by_engine=True, bulk=True)
    copy = Copy(reads, writes)
    run.current.copies.append(copy)

    def read() -> None:
        data = part.clone()
        copy.read = True
        run.later(partial(write, data))

    def write(data: torch.Tensor) -> None:
        inside.copy_(inside + data if add else data)
        copy.written = True

    run.later(read)


def store_wait(pendings: int) -> None:
    """Until all but the last so many copies of this partition have read shared memory."""
    _await_copies(int(pendings), "read")


def _await_copies(pendings: int, what: str) -> None:
    me = scheduler.run.current
    first = me.copies[: max(0, len(me.copies) - pendings)]
    waits = f"copies to have {what}"
    scheduler.run.pause(lambda: all(getattr(copy, what) for copy in first), waits)
    for copy in first:
        me.known |= copy.events["read"] | copy.events[what]
    if what == "written":
        me.written |= sum(copy.events[what] for copy in first)
        me.copies = me.copies[len(first) :]


def fence_async_shared(cluster: bool = False) -> None:
    """Make earlier stores to shared memory, also other partitions', visible to the async proxy.

    Within a CTA the fence may be on the reading side: it has to lie on the causality path from the
    store to the copy or product (PTX ISA, "Proxy-preserved base causality order").
    """
    me = scheduler.run.current
    me.fenced |= me.known


# Tensor cores


class Product:
    """``a b + acc`` of the tensor cores."""

    def __init__(self, a: Any, b: Shared, acc: Tensor, use_acc: bool, event: int) -> None:
        self.a, self.b, self.acc, self.use_acc, self.event = a, b, acc, use_acc, event
        self.result: torch.Tensor | None = None

    def run(self) -> None:
        if self.result is None:
            self.result = self.a.data.float() @ self.b.data.float()
            if self.use_acc:
                acc = self.acc
                self.result += acc.product.result if isinstance(acc, Unready) else acc.data


UNREADY = "a product is used before a wait has returned it, at "


class Unready(Tensor):
    """What a product will be; a wait makes a tensor of it."""

    __slots__ = ("product",)

    def __init__(self, product: Product) -> None:
        self.product = product

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        raise Hazard(UNREADY + scheduler.line())


def warpgroup_mma(
    a: Any,
    b: Shared,
    acc: Tensor,
    *,
    use_acc: Any = True,
    precision: Any = None,
    max_num_imprecise_acc: Any = None,
    is_async: bool = False,
) -> Tensor:
    """``a b + acc``; reads shared memory at some time before a wait covers it."""
    run = scheduler.run
    run.pause()
    me = run.current
    event = run.event("multiplies")
    for operand in (a, b):
        if isinstance(operand, Shared):
            operand.memory.read(region_of(operand.data), event, by_engine=True)
    if isinstance(a, Unready) or (isinstance(acc, Unready) and acc.product not in me.products):
        raise Hazard(UNREADY + scheduler.line())
    product = Product(a, b, acc, bool(use_acc), event)
    me.products.append(product)
    run.later(partial(_run_next, me))
    return Unready(product) if is_async else warpgroup_mma_wait(0, deps=[a, Unready(product)])[1]


def _run_next(agent: Agent) -> None:
    """The first product that has not run: they do so in their order."""
    for product in agent.products:
        if product.result is None:
            product.run()
            return


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    """Until all but the last so many products are there.

    Registers of left operands are the assembler's care; ``bench/machine_code/sass.py`` looks there.
    """
    run = scheduler.run
    run.pause()
    me = run.current
    count = max(0, len(me.products) - int(num_outstanding))
    done, me.products = me.products[:count], me.products[count:]
    for product in done:
        product.run()
        me.known |= product.event

    def after(value: Any) -> Any:
        if isinstance(value, Unready):
            product = value.product
            return Unready(product) if product in me.products else Tensor(product.result)
        return value

    found = tuple(map(after, deps))
    return found[0] if len(found) == 1 else found


# Barriers


def _barrier(place: Shared) -> Barrier:
    found = place.memory.barriers.get(place.data.storage_offset())
    if found is None:
        raise Hazard(f"{place.name} is no barrier yet, at {scheduler.line()}")
    return found


def _init(place: Shared, count: int) -> None:
    place.memory.barriers[place.data.storage_offset()] = Barrier(place.name, int(count))


def _expect(place: Shared, nbytes: int, pred: Any = True) -> None:
    if pred:
        scheduler.run.pause()
        barrier = _barrier(place)
        barrier.bytes += int(nbytes)
        barrier.arrive(1)


def _arrive(place: Shared, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        scheduler.run.pause()
        _barrier(place).arrive(int(count))


def _wait(place: Shared, phase: Any, pred: Any = True, deps: Sequence[Any] = ()) -> None:
    if not pred:
        return
    barrier, parity = _barrier(place), int(phase) & 1
    scheduler.run.pause(lambda: barrier.phase & 1 != parity, f"phase {parity} of {barrier.name}")
    scheduler.run.current.learn(barrier)


mbarrier = SimpleNamespace(
    MBarrierLayout=lambda *_: None,
    init=_init,
    expect=_expect,
    arrive=_arrive,
    wait=_wait,
)

# Assembly


def _named(barrier: Any, threads: Any) -> tuple[Barrier, int]:
    """Counts the current partition at a named barrier; the barrier, and its phase before."""
    scheduler.run.pause()
    me = scheduler.run.current
    i, count = int(barrier), int(threads)
    if not 2 + me.program.workers <= i < 16:
        raise Hazard(f"named barrier {i} is not the kernel's, at {scheduler.line()}")
    found = me.program.named.setdefault(i, Barrier(f"named barrier {i}", count))
    if found.left == found.count:  # the first to come
        found.left = found.count = count
        me.program.here[i] = set()
    if found.count != count or me in me.program.here[i]:
        here = f"{me} at {scheduler.line()}"
        raise Hazard(f"{found.name} is for {found.count} threads, not {count} of {here}, once each")
    me.program.here[i].add(me)
    phase = found.phase
    found.arrive(me.threads)
    return found, phase


def _bar_arrive(barrier: Any, threads: Any) -> Int:
    _named(barrier, threads)
    return integer(0)


def _bar_sync(barrier: Any, threads: Any) -> Int:
    found, phase = _named(barrier, threads)
    scheduler.run.pause(lambda: found.phase != phase, found.name)
    scheduler.run.current.learn(found)
    return integer(0)


def _fence_async_global(*_: Any) -> Int:
    """Bulk copies see what others wrote to global memory, as far as this agent knows of it."""
    me = scheduler.run.current
    me.fenced_global |= me.known
    return integer(0)


def _written(*_: Any) -> Int:
    _await_copies(0, "written")
    return integer(0)


ASSEMBLY: dict[str, Callable[..., Any]] = {
    "bar.arrive": _bar_arrive,
    "bar.sync": _bar_sync,
    "cp.async.bulk.wait_group 0": _written,
    "mov.u32 $0, 0": lambda *_: integer(0),
    "fence.proxy.async.global": _fence_async_global,
}


def assembly(
    asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int
) -> Any:
    """What a line of assembly does; one that is not known is an error."""
    text = re.sub(r"\s+", " ", asm)
    for known, handler in ASSEMBLY.items():
        if known in text:
            return handler(*args)
    raise Hazard(f"unknown assembly {asm!r}, at {scheduler.line()}")
