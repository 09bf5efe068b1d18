"""Launches decided once: everything of a launch but the tensors it works on.

Triton's JIT binds, specialises and hashes some thirty arguments on every call, which costs more
than the launch. So a stage derives a :class:`Plan` from the layouts of its tensors, a pure function
whose results are kept; a plan's first call goes through the JIT, and later ones hand the tensors to
the compiled kernel. What the compiler specialised on (sizes, strides, alignment) is in the layouts.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ra_triton.launch import gluon
from ra_triton.launch.launcher import (
    Descriptors,
    Launch,
    OnAddresses,
    Place,
    launcher,
    make_context_current,
)


class _Recording(threading.local):
    log: "list[tuple[Plan, tuple[Any, ...]]] | None" = None  # the launches of this thread, if kept


recording = _Recording()
PLANS = 1024  # that a stage keeps; the least recently used goes
_kept: list[Callable[[], None]] = []
Planner = TypeVar("Planner", bound=Callable[..., Any])


def planned(derive: Planner) -> Planner:
    """Keeps what a function derives from layouts and options alone."""
    cached = lru_cache(PLANS)(derive)
    _kept.append(cached.cache_clear)
    return cached  # type: ignore[return-value]


def forget_plans() -> None:
    """Derive every plan anew: for callers that have changed the config table or Triton's knobs.

    Recorded calls hold plans of their own: ``ra_triton.launch.recorded.forget()`` lets go of those.
    """
    for clear in _kept:
        clear()


class Layout(NamedTuple):
    """What a launch depends on of a tensor besides dtype and device."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    on_16_bytes: bool  # the address


def layout_of(t: Tensor) -> Layout:
    """The layout of a tensor."""
    return Layout(t.shape, t.stride(), t.data_ptr() % 16 == 0)


def on_16_bytes(*tensors: Tensor | None) -> tuple[bool | None, ...]:
    """Which addresses are 16-byte aligned; None for what is absent."""
    return tuple(None if t is None else t.data_ptr() % 16 == 0 for t in tensors)


class Bulk(NamedTuple):
    """How a descriptor describes a tensor, whose address the launch adds."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    layout: Any = None  # of the block in shared memory, for a kernel written in Gluon

    def of(self, t: Tensor | None) -> Any:
        """The descriptor of ``t``."""
        fields = t, list(self.shape), list(self.strides), list(self.block)
        if self.layout is None:
            return TensorDescriptor(*fields)
        return gluon.TensorDescriptor(*fields, self.layout)


class CannotCompile(Exception):
    """The compiler, or the driver, does not take a kernel."""


class Plan:
    """A kernel, its grid, and its arguments after the tensors, which come first.

    Args:
        kernel: the jit function.
        grid: programs to launch.
        arguments: what follows the tensors, by name, and the compiler's options.
        bulk: the tensors that go through descriptors, by their position.
    """

    def __init__(
        self,
        kernel: JITFunction,
        grid: tuple[int, ...],
        arguments: Mapping[str, Any],
        bulk: Mapping[int, Bulk] | None = None,
    ) -> None:
        """Nothing is compiled yet."""
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.arguments = dict(arguments)
        self.bulk = dict(bulk or {})
        self.instead: Callable[[Exception], Plan] | None = None  # see plan_in_gluon
        self._launch: Launch | None = None

    def __call__(self, *tensors: Any) -> None:
        """Launch on the current device and stream; each tensor has the layout of the plan."""
        log = recording.log
        if log is not None:
            log.append((self, tensors))
        (self._launch or self._compile)(*tensors)

    def on(self, places: Sequence[Place | None]) -> tuple[OnAddresses, OnAddresses] | None:
        """:meth:`Launch.on` of the kernel; None before it is compiled."""
        return None if self._launch is None else self._launch.on(places)

    def compile(self, *tensors: Tensor | None) -> None:
        """Compile and load without a launch, where tensors are on a GPU.

        Raises:
            CannotCompile: whatever the compiler raised is its cause.
        """
        if self._launch is not None or not any(t is not None and t.is_cuda for t in tensors):
            return
        try:
            self._launch = self._compiled(tensors)
        except Exception as error:
            raise CannotCompile from error

    def _compiled(self, tensors: tuple[Tensor | None, ...]) -> Launch:
        if self.bulk:
            make_context_current()
        described = self._described(tensors)
        compiled = self.kernel.warmup(*described, grid=self.grid, **self.arguments)
        return self._launcher(compiled, tensors)

    def _compile(self, *tensors: Tensor | None) -> None:
        """Launch through the JIT, and remember what it compiled."""
        launched = any(
            t is not None and t.is_cuda for t in tensors
        )  # else interpreted, or recorded
        if launched and self.bulk:
            make_context_current()
        if self.instead is not None:
            self._compile_or(self.instead, tensors, launched)
            return
        compiled = self.kernel[self.grid](*self._described(tensors), **self.arguments)
        if launched:
            self._launch = self._launcher(compiled, tensors)

    def _compile_or(
        self,
        instead: Callable[[Exception], "Plan"],
        tensors: tuple[Tensor | None, ...],
        launched: bool,
    ) -> None:
        """Compile, then launch; or launch another plan if this one does not compile or load."""
        try:
            described = self._described(tensors)
            compiled = self.kernel.warmup(*described, grid=self.grid, **self.arguments)
            launch = self._launcher(compiled, tensors) if launched else None
        except Exception as error:
            vars(self).update(vars(instead(error)))
            (self._launch or self._compile)(*tensors)
            return
        self._launch = launch
        if launch is not None:
            launch(*tensors)

    def _described(self, tensors: tuple[Tensor | None, ...]) -> list[Any]:
        """The tensors, some of them as descriptors."""
        first: list[Any] = list(tensors)
        for position, bulk in self.bulk.items():
            first[position] = bulk.of(tensors[position])
        return first

    def _launcher(self, compiled: CompiledKernel, tensors: tuple[Tensor | None, ...]) -> Launch:
        descriptors = {i: Descriptors.like(bulk.of(tensors[i])) for i, bulk in self.bulk.items()}
        rest = [self.arguments[name] for name in self.kernel.arg_names[len(tensors) :]]
        return launcher(compiled, self.grid, tensors, descriptors, rest)


def plan_in_gluon(kernel: str, make: Callable[[], Plan], instead: Callable[[], Plan]) -> Plan:
    """The plan of a kernel in Gluon, of which Triton promises nothing.

    Args:
        kernel: its stage.
        make: makes the plan.
        instead: makes that of the plain kernel, of the same tensors, for the case that the first
            raises, or that its kernel does not compile.
    """

    def plain(error: Exception) -> Plan:
        gluon.give_up(kernel, error)
        return instead()

    try:
        plan = make()
    except Exception as error:  # whatever a name or a signature that has changed leads to
        return plain(error)
    plan.instead = plain
    return plan
