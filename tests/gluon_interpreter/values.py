"""Numbers as a kernel has them: integers of 32 or 64 bits, tensors, pointers. Layouts say nothing.

NaN stays NaN in maxima too, where a GPU would drop it: it may come from memory that nobody wrote.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ra_triton.launch.gluon import gl

from . import scheduler
from .scheduler import Hazard

TORCH = {
    gl.int1.name: torch.bool,
    gl.int8.name: torch.int8,
    gl.int32.name: torch.int32,
    gl.int64.name: torch.int64,
    gl.float16.name: torch.float16,
    gl.bfloat16.name: torch.bfloat16,
    gl.float32.name: torch.float32,
}
GLUON = {TORCH[t.name]: t for t in vars(gl).values() if getattr(t, "name", None) in TORCH}


class Int(int):
    """A scalar whose quotients go towards zero, and which must not overflow."""

    kind = torch.int32

    @property
    def dtype(self) -> Any:
        return GLUON[self.kind]

    def to(self, dtype: Any) -> Any:
        kind = TORCH[dtype.name]
        if kind.is_floating_point:
            return Tensor(torch.tensor(float(self), dtype=kind))
        return integer(self, kind)

    def __invert__(self) -> Any:
        return integer(1 - int(self) if self.kind is torch.bool else ~int(self), self.kind)

    def __neg__(self) -> "Int":
        return integer(-int(self), self.kind)


def integer(value: int, kind: torch.dtype = torch.int32) -> Int:
    """A scalar of 32 bits, 64, or one."""
    if kind is torch.bool:
        value = bool(value)
    elif not -(2**31) <= value < 2**31 and kind is not torch.int64:
        raise Hazard(f"{value} is more than {kind} holds, at {scheduler.line()}")
    found = int.__new__(Int, value)
    if kind is not torch.int32:
        found.kind = kind
    return found


def _quotient(a: Any, b: Any) -> Any:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.div(a, b, rounding_mode="trunc")
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _rest(a: Any, b: Any) -> Any:
    return torch.fmod(a, b) if isinstance(a, torch.Tensor) else a - _quotient(a, b) * b


COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
BITS = ("and", "or", "xor")
ALIKE = (*COMPARISONS, *BITS, "add", "sub", "mul", "truediv", "lshift", "rshift")  # as in Python
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    **{name: getattr(operator, f"__{name}__") for name in ALIKE},
    **{"floordiv": _quotient, "mod": _rest},
}


def _of_integers(name: str, f: Callable[[Any, Any], Any], swapped: bool) -> Callable[..., Any]:
    def method(self: Int, other: Any) -> Any:
        if isinstance(other, float):
            other = Tensor(torch.tensor(other, dtype=torch.float32))
            return f(other, float(self)) if swapped else f(float(self), other)
        if not isinstance(other, int):
            return NotImplemented
        a, b = (int(other), int(self)) if swapped else (int(self), int(other))
        value = f(a, b)
        if name == "truediv":
            return Tensor(torch.tensor(value, dtype=torch.float32))
        kinds = (self.kind, getattr(other, "kind", type(other) is bool and torch.bool))
        if name in COMPARISONS or (name in BITS and kinds == (torch.bool, torch.bool)):
            return integer(value, torch.bool)
        return integer(value, torch.int64 if torch.int64 in kinds else torch.int32)

    return method


class Tensor:
    """A tile, or a scalar that is no integer."""

    __slots__ = ("data",)
    layout = None  # of no meaning here
    data: torch.Tensor

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @property
    def type(self) -> "Tensor":
        return self

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> Any:
        return GLUON[self.data.dtype]

    def __bool__(self) -> bool:
        return bool(self.data)

    def __getitem__(self, index: Any) -> "Tensor":
        return Tensor(self.data[index])

    def __neg__(self) -> "Tensor":
        return Tensor(-self.data)

    def __invert__(self) -> "Tensor":
        return Tensor(~self.data)

    def to(self, dtype: Any) -> Any:
        return wrapped(self.data.to(TORCH[dtype.name]))

    def reshape(self, *shape: Any) -> "Tensor":
        return Tensor(self.data.reshape(flat(shape)))

    def permute(self, *order: Any) -> "Tensor":
        return Tensor(self.data.permute(flat(order)))

    def split(self) -> tuple["Tensor", "Tensor"]:
        """Its two halves along the last dim, which has two elements."""
        left, right = self.data.unbind(-1)
        return Tensor(left), Tensor(right)


def flat(shape: Sequence[Any]) -> list[int]:
    """``(2, 3)`` of ``f(2, 3)`` as of ``f((2, 3))``."""
    (shape,) = shape if len(shape) == 1 and not isinstance(shape[0], int) else (shape,)
    return [int(n) for n in shape]


def _of_tensors(f: Callable[[Any, Any], Any], swapped: bool) -> Callable[..., Any]:
    def method(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        a, b = self.data, raw(other)
        if type(other) is Int and other.kind is torch.int64 and a.dtype is torch.int32:
            a = a.to(torch.int64)
        if isinstance(b, torch.Tensor) and a.dtype is not b.dtype:
            dtype = torch.promote_types(a.dtype, b.dtype)  # a scalar's too
            a, b = a.to(dtype), b.to(dtype)
        return wrapped(f(b, a) if swapped else f(a, b))

    return method


for _name, _f in OPERATORS.items():
    for _swapped in (False, True)[: 1 if _name in COMPARISONS else 2]:
        _method = f"__{'r' * _swapped}{_name}__"
        setattr(Int, _method, _of_integers(_name, _f, _swapped))
        setattr(Tensor, _method, _of_tensors(_f, _swapped))


def raw(value: Any) -> Any:
    """What torch computes with."""
    return value.data if isinstance(value, Tensor) else int(value) if type(value) is Int else value


def wrapped(value: torch.Tensor) -> Any:
    """What a kernel gets: integers without dims are scalars."""
    if value.ndim or value.is_floating_point():
        return Tensor(value)
    return integer(int(value), value.dtype)


class Pointer:
    """Elements of a tensor, by their place in its memory.

    Attributes:
        tensor: whose memory it is.
        memory: keeps accesses to it.
    """

    def __init__(self, tensor: torch.Tensor, memory: Any, offset: Any = None) -> None:
        self.tensor, self.memory = tensor, memory
        self.offset = integer(0, torch.int64) if offset is None else offset

    def __add__(self, elements: Any) -> "Pointer":
        return Pointer(self.tensor, self.memory, self.offset + elements)

    __radd__ = __add__

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All of its memory, where in it that is, 0 outside of the mask, and the mask."""
        memory = torch.empty(0, dtype=self.tensor.dtype).set_(self.tensor.untyped_storage())
        first = self.tensor.storage_offset()
        offsets = torch.as_tensor(raw(self.offset), dtype=torch.int64) + first
        mask = torch.as_tensor(True if mask is None else raw(mask), dtype=torch.bool)
        offsets, mask = torch.broadcast_tensors(offsets, mask)
        offsets = offsets.masked_fill(~mask, 0)
        if not 0 <= offsets.min() <= offsets.max() < len(memory) and mask.any():
            raise Hazard(f"an address outside of its tensor, at {scheduler.line()}")
        return memory, offsets, mask
