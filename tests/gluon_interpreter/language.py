"""``gl`` of a kernel that is interpreted, and ``tl`` of the tile helpers."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl

from ra_triton.launch import gluon

from . import hopper, memory, scheduler
from .scheduler import Agent, Hazard
from .values import TORCH, Int, Pointer, Tensor, flat, integer, raw, wrapped


def _unary(f: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return staticmethod(lambda x: wrapped(f(torch.as_tensor(raw(x)))))


def _binary(of_integers: Any, of_tensors: Any) -> Any:
    def extreme(x: Any, y: Any, propagate_nan: Any = None) -> Any:
        if isinstance(x, int) and isinstance(y, int):
            return Language.where(of_integers(int(x), int(y)) == int(x), x, y)
        return wrapped(of_tensors(*(torch.as_tensor(raw(t)) for t in (x, y))))

    return staticmethod(extreme)


def _same(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _access(pointer: Pointer, mask: Any, what: str) -> tuple[torch.Tensor, ...]:
    """See :meth:`Pointer.places`; the order of accesses is seen where they are contiguous."""
    hopper.touch()
    run = scheduler.run
    elements, offsets, mask = pointer.places(mask)
    if count := int(mask.sum()):
        first, last = (int(end) for end in offsets[mask].aminmax())
        if last - first == count - 1:
            event = run.event(f"{what}s it")
            getattr(pointer.memory, what)((first, (count,), (1,)), event)
            run.current.known |= event
    return elements, offsets, mask


class Range:
    """``range`` whose numbers are those of a kernel."""

    def __init__(self, *bounds: Any) -> None:
        self.numbers = range(*map(int, bounds))

    def __iter__(self) -> Iterator[Int]:
        return map(integer, self.numbers)


class Layout:
    """Of no meaning here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    get_default_for = staticmethod(_nothing)


class Language:
    """Layouts are nothing, and names that it does not know are an error."""

    extra = SimpleNamespace(cuda=hopper)
    static_range = range
    convert_layout = staticmethod(_same)
    barrier = staticmethod(_nothing)  # the threads of a partition go in step
    allocate_shared_memory = staticmethod(memory.allocate_shared_memory)
    inline_asm_elementwise = staticmethod(hopper.assembly)
    exp2, log2, rsqrt = _unary(torch.exp2), _unary(torch.log2), _unary(torch.rsqrt)
    PropagateNan = tl.PropagateNan  # maximum and minimum always propagate it here
    maximum, minimum = _binary(max, torch.maximum), _binary(min, torch.minimum)

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return Layout
        dtype = getattr(gluon.gl, name, None)
        if getattr(dtype, "name", None) in TORCH:
            return dtype
        raise Hazard(f"gl.{name} is not interpreted")

    @staticmethod
    def max(x: Tensor, axis: int, keep_dims: bool = False) -> Any:
        return wrapped(x.data.amax(axis, keepdim=keep_dims))

    @staticmethod
    def sum(x: Tensor, axis: int, keep_dims: bool = False) -> Any:
        dtype = x.data.dtype if x.data.is_floating_point() else torch.int32
        return wrapped(x.data.sum(axis, keepdim=keep_dims, dtype=dtype))

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        if all(isinstance(value, int) for value in (condition, x, y)):
            kinds = [getattr(value, "kind", torch.int32) for value in (x, y)]
            kind = torch.int64 if torch.int64 in kinds else torch.int32
            return integer(int(x if condition else y), kind)
        return wrapped(torch.where(torch.as_tensor(raw(condition)) != 0, raw(x), raw(y)))

    @staticmethod
    def cdiv(x: int, y: int) -> Any:
        return (x + (y - 1)) // y

    @staticmethod
    def to_tensor(x: Any) -> Any:
        return integer(x) if isinstance(x, int) else x

    @staticmethod
    def full(shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Tensor:
        return Tensor(torch.full(flat((shape,)), raw(value), dtype=TORCH[dtype.name]))

    @staticmethod
    def zeros(shape: Sequence[int], dtype: Any, layout: Any = None) -> Tensor:
        return Language.full(shape, 0, dtype)

    @staticmethod
    def arange(start: int, end: int, layout: Any = None) -> Tensor:
        return Tensor(torch.arange(int(start), int(end), dtype=torch.int32))

    @staticmethod
    def program_id(axis: int) -> Int:
        return integer(scheduler.run.current.program.place[axis])

    @staticmethod
    def num_programs(axis: int) -> Int:
        return integer(scheduler.run.current.program.grid[axis])

    @staticmethod
    def static_assert(condition: Any, message: str = "") -> None:
        if not condition:
            raise Hazard(f"static_assert at {scheduler.line()}: {message}")

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Any:
        elements, offsets, mask = _access(pointer, mask, "read")
        missing = memory.poison(elements.dtype) if other is None else raw(other)
        return wrapped(elements[offsets].masked_fill(~mask, missing))

    @staticmethod
    def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
        elements, offsets, mask = _access(pointer, mask, "write")
        value = torch.as_tensor(raw(value)).to(elements.dtype).broadcast_to(offsets.shape)
        elements[offsets[mask]] = value[mask]

    @staticmethod
    def atomic_add(pointer: Pointer, value: int, sem: str = "acq_rel", scope: str = "gpu") -> Any:
        """Of a scalar; hands on what the partition knows, as ``sem`` says."""
        hopper.touch(idle=value == 0)
        me = scheduler.run.current
        elements, offset, _ = pointer.places(None)
        place = pointer.memory.atomics.setdefault(int(offset), scheduler.Known())
        if sem in ("acquire", "acq_rel"):
            me.learn(place)
        if sem in ("release", "acq_rel"):
            place.learn(me)
        before = elements[offset].clone()
        elements[offset] += int(value)
        return wrapped(before)

    @staticmethod
    def warp_specialize(
        functions_and_args: Sequence[tuple[Any, Any]],
        worker_num_warps: Sequence[int],
        worker_num_regs: Sequence[int] | None = None,
    ) -> Any:
        """Every function in a partition of its own; the first in the one that calls."""
        run = scheduler.run
        me, ((function, args), *others) = run.current, functions_and_args
        workers = []
        for (f, _), warps in zip(others, worker_num_warps, strict=True):
            name = f"{f.__name__} {len(workers) + 1}"
            workers.append(Agent(me.program, name, int(warps), run.weight()))
            workers[-1].learn(me)
        for worker, (f, a) in zip(workers, others, strict=True):
            run.start(worker, partial(hopper.to_the_end, f, a))
        # Triton numbers a barrier for each; partitions of one warp do not use theirs.
        wide = [i for i, worker in enumerate(workers, 1) if worker.threads > 32]
        me.program.workers, me.name = max(wide, default=0), f"{function.__name__} 0"
        run.pause()
        result = function(*args)
        run.pause(lambda: all(worker.ended for worker in workers), "the other partitions")
        for worker in workers:
            me.learn(worker)
        return result
