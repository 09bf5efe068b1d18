"""Shared memory and tensors in global memory, and who may touch them when."""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from types import SimpleNamespace
from typing import Any

import torch

from . import scheduler
from .scheduler import Hazard, Known
from .values import GLUON, TORCH, Tensor, flat, raw

SHARED_BYTES = 227 * 1024  # that a program may have on Hopper

Region = tuple[int, tuple[int, ...], tuple[int, ...]]  # offset, shape, strides


@lru_cache(None)
def _overlap(size: int, a: Region, b: Region) -> bool:
    elements = torch.zeros(size, dtype=torch.bool)
    for (offset, shape, strides), value in ((a, True), (b, False)):
        part = elements.as_strided(shape, strides, offset)
        if not value:
            return bool(part.any())
        part.fill_(True)
    raise AssertionError


class _Accesses:
    """Of a region: events of the last write, of reads since, and whether registers wrote it."""

    __slots__ = ("by_registers", "reads", "writes")

    def __init__(self) -> None:
        self.writes = self.reads = self.by_registers = 0


class Memory:
    """An allocation, full of NaN, and the accesses to its parts."""

    def __init__(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.name, self.size = name, prod(shape)
        self.data = torch.full(tuple(shape), poison(dtype), dtype=dtype)
        self.barriers: dict[int, Barrier] = {}
        self._accesses: dict[Region, _Accesses] = {}

    def _others(self, region: Region) -> list[_Accesses]:
        found = self._accesses
        if region not in found:
            found[region] = _Accesses()
        return [a for r, a in found.items() if r == region or _overlap(self.size, r, region)]

    def read(self, name: str, region: Region, event: int, by_engine: bool) -> None:
        """The current agent reads, or has an asynchronous engine do so."""
        me = scheduler.run.current
        for other in self._others(region):
            _check(other.writes & ~me.known, name, event, "reads what may still be written")
            if by_engine:
                _check(
                    other.by_registers & ~me.fenced,
                    *(name, event, "reads past a missing fence_async_shared what was written"),
                )
        self._accesses[region].reads |= event

    def write(self, name: str, region: Region, event: int, by_engine: bool) -> None:
        """The current agent writes, or has an asynchronous engine do so."""
        me = scheduler.run.current
        for other in self._others(region):
            _check((other.writes | other.reads) & ~me.known, name, event, "overwrites what is used")
        mine = self._accesses[region]
        mine.writes, mine.reads, mine.by_registers = event, 0, 0 if by_engine else event


def _check(unknown: int, name: str, event: int, what: str) -> None:
    if unknown:
        run = scheduler.run
        raise Hazard(f"{name}: {run.first(event)} {what} by {run.first(unknown)}")


def poison(dtype: torch.dtype) -> float:
    """What memory holds that nobody has written."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


class Shared:
    """A view of shared memory."""

    layout = None

    def __init__(self, memory: Memory, data: torch.Tensor, name: str) -> None:
        self.memory, self.data, self.name = memory, data, name

    @property
    def type(self) -> "Shared":
        return self

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> Any:
        return GLUON[self.data.dtype]

    @property
    def region(self) -> Region:
        return self.data.storage_offset(), tuple(self.data.shape), self.data.stride()

    def _view(self, data: torch.Tensor, name: str | None = None) -> "Shared":
        return Shared(self.memory, data, name or self.name)

    def index(self, i: int) -> "Shared":
        if not 0 <= i < len(self.data):
            raise Hazard(f"{self.name} has no element {i}, at {scheduler.line()}")
        return self._view(self.data[int(i)], f"{self.name}[{i}]")

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return self._view(self.data.narrow(dim, int(start), int(length)))

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return self._view(self.data.view(flat(shape)))

    def permute(self, order: Sequence[int]) -> "Shared":
        return self._view(self.data.permute(flat(order)))

    def load(self, layout: Any = None) -> Tensor:
        me, event = scheduler.run.current, scheduler.run.event("reads it")
        self.memory.read(self.name, self.region, event, by_engine=False)
        me.known |= event
        return Tensor(self.data.clone())

    def store(self, value: Tensor) -> None:
        me, event = scheduler.run.current, scheduler.run.event("stores to it")
        if value.data.dtype is not self.data.dtype or value.data.shape != self.data.shape:
            raise Hazard(f"{self.name} takes {self.data.dtype} {self.shape}, not {value.data}")
        self.memory.write(self.name, self.region, event, by_engine=False)
        me.known |= event
        me.stored |= event
        self.data.copy_(raw(value))


class Barrier(Known):
    """What counts arrivals and then lets those go on that wait.

    Attributes:
        count: arrivals of a phase.
        left: those that are missing.
        bytes: that copies have yet to bring.
        phase: 0 or 1.
        gathered: what those that have arrived know.
    """

    def __init__(self, name: str, count: int) -> None:
        super().__init__()
        self.name, self.count, self.left = name, int(count), int(count)
        self.bytes, self.phase, self.gathered = 0, 0, Known()

    def arrive(self, arrivals: int) -> None:
        """Of the current agent."""
        if arrivals > self.left:
            raise Hazard(
                f"{self.name}: {arrivals} arrivals of {scheduler.run.current} at "
                f"{scheduler.line()}, where {self.left} of {self.count} are left"
            )
        self.gathered.learn(scheduler.run.current)
        self.left -= arrivals
        self.settle()

    def settle(self) -> None:
        """Begin the next phase once all is there."""
        if self.left == self.bytes == 0:
            self.left, self.phase = self.count, self.phase ^ 1
            self.learn(self.gathered)
            self.gathered = Known()


class Descriptor:
    """A tensor in global memory that is copied block by block."""

    def __init__(self, t: torch.Tensor, bulk: Any) -> None:
        self.data = t.as_strided(bulk.shape, bulk.strides)
        self.block_shape, self.layout = list(bulk.block), bulk.layout
        self.dtype = GLUON[t.dtype]
        nbytes = prod(bulk.block) * t.element_size()
        self.nbytes_per_cta = nbytes
        self.block_type = SimpleNamespace(
            shape=self.block_shape, nbytes=nbytes, element_ty=self.dtype
        )

    def part(self, begin: Sequence[int]) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """What of a block lies inside of the tensor, and where in the block that is."""
        first = [int(i) for i in begin]
        if min(first) < 0:
            raise Hazard(f"a block begins at {first}, at {scheduler.line()}")
        shape = self.data.shape
        ends = [min(i + n, size) for i, n, size in zip(first, self.block_shape, shape, strict=True)]
        spans = list(zip(first, ends, strict=True))
        inside = self.data[tuple(slice(i, max(i, end)) for i, end in spans)]
        return inside, tuple(slice(0, max(0, end - i)) for i, end in spans)


def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any, value: Any = None) -> Any:
    """Shared memory of the program, named as the variable it goes to."""
    program = scheduler.run.current.program
    memory = Memory(scheduler.target(), TORCH[dtype.name], flat((shape,)))
    program.memory.append(memory)
    taken = sum(m.size * m.data.element_size() for m in program.memory)
    if taken > SHARED_BYTES:
        raise Hazard(f"{taken} bytes of shared memory, at {scheduler.line()}")
    shared = Shared(memory, memory.data, memory.name)
    if value is not None:
        shared.store(value)
    return shared
