"""Shared memory and tensors in global memory, and who may touch them when."""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from types import SimpleNamespace
from typing import Any

import torch

from . import scheduler
from .scheduler import Hazard, Known
from .values import GLUON, TORCH, Tensor, flat

SHARED_BYTES = 227 * 1024  # that a program may have on Hopper

Region = tuple[int, tuple[int, ...], tuple[int, ...]]  # offset, shape, strides


def region_of(t: torch.Tensor) -> Region:
    return t.storage_offset(), tuple(t.shape), t.stride()


@lru_cache(None)
def _overlap(*regions: Region) -> bool:
    """Of two of them, of one memory."""
    spans = [(r[0], r[0] + sum((n - 1) * s for n, s in zip(*r[1:], strict=True))) for r in regions]
    (a, a_last), (b, b_last) = spans
    if a_last < b or b_last < a:
        return False
    begin = min(a, b)
    elements = torch.zeros(max(a_last, b_last) - begin + 1, dtype=torch.bool)
    first, second = (elements.as_strided(r[1], r[2], r[0] - begin) for r in regions)
    first.fill_(True)
    return bool(second.any())


class _Accesses:
    """Events of a region: its last write, additions and reads since; ``stored``: by registers."""

    __slots__ = ("adds", "reads", "stored", "writes")

    def __init__(self) -> None:
        self.writes = self.adds = self.reads = self.stored = 0


class Accessed:
    """Memory, and which accesses to its parts are ordered."""

    def __init__(self, name: str) -> None:
        self.name, self.atomics = name, dict[int, Known]()
        self._regions: dict[Region, list[_Accesses]] = {}  # a region's, then those that overlap

    def _at(self, region: Region) -> list[_Accesses]:
        found = self._regions.get(region)
        if found is None:
            found = [_Accesses()]
            for other, accesses in self._regions.items():
                if _overlap(other, region):
                    found.append(accesses[0])
                    accesses.append(found[0])
            self._regions[region] = found
        return found

    def read(self, region: Region, event: int, by_engine: bool = False, bulk: bool = False) -> None:
        """The current agent reads, or has an asynchronous engine do so.

        ``bulk``: of global memory, here and below.
        """
        me, accesses = scheduler.run.current, self._at(region)
        for a in accesses:
            self._check((a.writes | a.adds) & ~me.known, event, "reads what may still be written")
            if by_engine:
                missed = "reads past a missing fence_async_shared what was written"
                self._check(a.stored & ~me.fenced, event, missed)
            self._check_fence(a, event, bulk)
        accesses[0].reads |= event

    def write(
        self, region: Region, event: int, by_engine: bool = False, bulk: bool = False
    ) -> None:
        """It writes."""
        me, accesses = scheduler.run.current, self._at(region)
        for a in accesses:
            used = (a.writes | a.adds | a.reads) & ~me.known
            self._check(used, event, "overwrites what is used")
            self._check_fence(a, event, bulk)
        mine = accesses[0]
        mine.writes, mine.adds, mine.reads, mine.stored = event, 0, 0, 0 if by_engine else event

    def add(self, region: Region, event: int, bulk: bool = False) -> None:
        """It adds, in any order with others that do."""
        me, accesses = scheduler.run.current, self._at(region)
        for a in accesses:
            self._check((a.writes | a.reads) & ~me.known, event, "adds to what is used")
            self._check_fence(a, event, bulk)
        accesses[0].adds |= event

    def _check_fence(self, a: _Accesses, event: int, bulk: bool) -> None:
        """What this agent's own copies wrote needs none."""
        me = scheduler.run.current
        if bulk:
            missed = "follows past a missing fence_async_global what was written"
            unseen = (a.writes | a.adds) & me.known & ~(me.fenced_global | me.written)
            self._check(unseen, event, missed)

    def _check(self, unknown: int, event: int, what: str) -> None:
        if unknown:
            run = scheduler.run
            raise Hazard(f"{self.name}: {run.first(event)} {what} by {run.first(unknown)}")


def poison(dtype: torch.dtype) -> float:
    """What memory holds that nobody has written."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


class Shared:
    """A view of shared memory, which begins as NaN."""

    layout = None

    def __init__(self, memory: "Memory", data: torch.Tensor, name: str) -> None:
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

    def index(self, i: int) -> "Shared":
        if not 0 <= i < len(self.data):
            raise Hazard(f"{self.name} has no element {i}, at {scheduler.line()}")
        return Shared(self.memory, self.data[int(i)], f"{self.name}[{int(i)}]")

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return self._view(self.data.narrow(dim, int(start), int(length)))

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return self._view(self.data.view(flat(shape)))

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> "Shared":
        if dtype != self.dtype:
            raise NotImplementedError("another dtype")
        return self._view(self.data.view(flat([shape])))

    reinterpret = _reinterpret  # its name from Triton 3.9 on

    def permute(self, order: Sequence[int]) -> "Shared":
        return self._view(self.data.permute(flat(order)))

    def _view(self, data: torch.Tensor) -> "Shared":
        return Shared(self.memory, data, self.name)

    def load(self, layout: Any = None) -> Tensor:
        run = scheduler.run
        event = run.event(f"reads {self.name}")
        self.memory.read(region_of(self.data), event)
        run.current.known |= event
        return Tensor(self.data.clone())

    def store(self, value: Tensor) -> None:
        run = scheduler.run
        event = run.event(f"stores to {self.name}")
        if (value.dtype, value.shape) != (self.dtype, self.shape):
            raise Hazard(f"{self.name} takes no {value.dtype} {value.shape}, {scheduler.line()}")
        self.memory.write(region_of(self.data), event)
        run.current.known |= event
        self.data.copy_(value.data)


class Memory(Accessed):
    """An allocation of shared memory, and barriers in it by their place."""

    def __init__(self, name: str, nbytes: int) -> None:
        super().__init__(name)
        self.nbytes, self.barriers = nbytes, dict[int, Barrier]()


def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
    """Named as the variable that it goes to."""
    kind, program = TORCH[dtype.name], scheduler.run.current.program
    data = torch.full(flat((shape,)), poison(kind), dtype=kind)
    memory = Memory(scheduler.target(), data.nbytes)
    program.memory.append(memory)
    if (taken := sum(m.nbytes for m in program.memory)) > SHARED_BYTES:
        raise Hazard(f"{taken} bytes of shared memory, at {scheduler.line()}")
    return Shared(memory, data, memory.name)


class Barrier(Known):
    """Counts arrivals, and lets those go on that wait when all are there.

    Attributes:
        count: arrivals of a phase.
        left: those that are missing.
        bytes: that copies have yet to bring.
        phase: how many have ended.
        gathered: what those that have arrived know.
    """

    def __init__(self, name: str, count: int) -> None:
        super().__init__()
        self.name, self.count, self.left = name, count, count
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
            self.left, self.phase = self.count, self.phase + 1
            self.learn(self.gathered)
            self.gathered = Known()


class Descriptor:
    """A tensor in global memory that is copied block by block."""

    layout = None

    def __init__(self, descriptor: Any, memory: Accessed) -> None:
        self.tensor = t = descriptor.base
        self.shape, self.strides = descriptor.shape, descriptor.strides
        self.block_shape, self.memory, self.dtype = descriptor.block_shape, memory, GLUON[t.dtype]
        nbytes = prod(self.block_shape) * t.element_size()
        self.block_type = SimpleNamespace(shape=self.block_shape, nbytes=nbytes)

    def part(self, begin: Sequence[int], tile: Shared) -> tuple[torch.Tensor, torch.Tensor]:
        """What of a block lies inside of the tensor, and that part of the tile."""
        first = [int(i) for i in begin]
        if min(first) < 0 or tile.shape != self.block_shape:
            block = f"a block of {self.block_shape} at {first}"
            raise Hazard(f"{block} for {tile.name} {tile.shape}, at {scheduler.line()}")
        sizes = [
            max(0, min(n, end - i))
            for i, n, end in zip(first, self.block_shape, self.shape, strict=True)
        ]
        place = sum(i * stride for i, stride in zip(first, self.strides, strict=True))
        # Addresses are of 64 bits, so that what leads beyond them comes back at the other end.
        half, size = 2**63, self.tensor.element_size()
        place = ((place * size + half) % (2 * half) - half) // size if all(sizes) else 0
        inside = self.tensor.as_strided(sizes, self.strides, self.tensor.storage_offset() + place)
        return inside, tile.data[tuple(map(slice, sizes))]
