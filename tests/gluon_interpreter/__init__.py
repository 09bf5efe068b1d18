"""Runs the package's Gluon kernels on a CPU: their numbers, barriers and races.

A kernel is run as Python, with other functions behind Gluon's names. A seed decides who goes on
when: partitions and programs, and what copies and tensor cores do on their own. Accesses that
nothing orders are found in whatever order they came, see :mod:`.scheduler`.

Not modelled: layouts, registers, clusters, time, the threads of a partition, which go in step, and
the order of accesses to global memory through pointers that are not contiguous.
"""

import builtins
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from math import prod
from types import CodeType, FunctionType
from typing import Any

import torch
import triton.language as tl
from triton.runtime.jit import KernelInterface

from ra_triton.launch import gluon
from ra_triton.launch.plans import Plan

from . import hopper, scheduler
from .hopper import Program, to_the_end
from .language import Language, Range
from .memory import Accessed, Descriptor
from .scheduler import Agent, Deadlock, Hazard, Scheduler
from .values import Pointer, Tensor, integer

__all__ = ["Deadlock", "Hazard", "as_python", "interpret", "interpreted"]

LANGUAGE = Language()
MODULES = (gluon.gl, tl)
# What the package calls by the names of launch/gluon.py
NAMES = {id(getattr(gluon, n)): getattr(hopper, n) for n in gluon.__all__ if hasattr(hopper, n)}


def interpret(plan: Plan, tensors: Sequence[Any], *, seed: int = 0, processors: int = 4) -> None:
    """Launch a plan of a Gluon kernel.

    Args:
        plan: the launch.
        tensors: as the plan would be called with, on the CPU.
        seed: of the order in which things happen.
        processors: programs that run at a time; they begin in their order.
    """
    kernel: Any = plan.kernel
    described = dict(enumerate(tensors)) | {i: b.of(tensors[i]) for i, b in plan.bulk.items()}
    memories: dict[int, Accessed] = {}
    values = []
    for i, p in enumerate(kernel.params):
        value = described[i] if i in described else plan.arguments[p.name]
        values.append(value if p.is_constexpr else _argument(p.name, value, memories))
    run, options = Scheduler(seed), plan.arguments
    ids = iter(range(prod(plan.grid)))

    def work(program: Program) -> None:
        to_the_end(as_python(kernel.fn), values)
        program.end()
        start()

    def start() -> None:
        if (id := next(ids, None)) is not None:
            program = Program(id, plan.grid, bool(options.get("launch_pdl")))
            agent = Agent(program, kernel.__name__, options.get("num_warps", 4), run.weight())
            run.start(agent, partial(work, program))

    for _ in range(processors):
        start()
    before, scheduler.run = scheduler.run, run
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or every partition starts some of its own
    try:
        run.run()
    finally:
        torch.set_num_threads(threads)
        scheduler.run = before


@contextmanager
def interpreted(*, seed: int = 0, processors: int = 4) -> Iterator[None]:
    """Interpret the Gluon kernels of all plans that are launched in here."""
    launch = Plan.__call__

    def launch_or_interpret(plan: Plan, *tensors: Any) -> None:
        if getattr(plan.kernel, "is_gluon", bool)():
            interpret(plan, tensors, seed=seed, processors=processors)
        else:
            launch(plan, *tensors)

    Plan.__call__ = launch_or_interpret  # type: ignore[method-assign]
    try:
        yield
    finally:
        Plan.__call__ = launch  # type: ignore[method-assign]


def _argument(name: str, value: Any, memories: dict[int, Accessed]) -> Any:
    """As a kernel gets it."""
    if isinstance(value, (torch.Tensor, gluon.TensorDescriptor)):
        t = value if isinstance(value, torch.Tensor) else value.base
        memory = memories.setdefault(t.untyped_storage().data_ptr(), Accessed(name))
        return Pointer(t, memory) if value is t else Descriptor(value, memory)
    if isinstance(value, tuple):
        items = (_argument(name, item, memories) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, float):
        return Tensor(torch.tensor(value, dtype=torch.float32))
    if isinstance(value, int):
        return integer(value, torch.int32 if -(2**31) <= value < 2**31 else torch.int64)
    return value


@cache
def as_python(f: FunctionType) -> Callable[..., Any]:
    """A jit function as a function of Python, by the names of this interpreter."""
    scope = {n: _replaced(f.__globals__[n]) for n in _names(f.__code__) if n in f.__globals__}
    scope |= {"__builtins__": vars(builtins) | {"range": Range}}
    python = FunctionType(f.__code__, scope, f.__name__, f.__defaults__, f.__closure__)
    python.__kwdefaults__ = f.__kwdefaults__
    return python


def _names(code: CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return {*code.co_names, *(name for c in inner for name in _names(c))}


def _replaced(value: Any) -> Any:
    """What a global of a kernel is here."""
    if any(value is module for module in MODULES):
        return LANGUAGE
    if id(value) in NAMES:
        return NAMES[id(value)]
    if isinstance(value, KernelInterface):
        return as_python(value.fn)
    return value.value if isinstance(value, tl.constexpr) else value
