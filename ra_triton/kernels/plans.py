"""Launches decided once: everything of a launch but the tensors it works on.

Triton's JIT binds, specialises and hashes some thirty arguments on every call, which costs more
than the launch. So a stage derives a :class:`Plan` from the layouts of its tensors, a pure function
whose results are kept; a plan's first call goes through the JIT, and later ones hand the tensors to
the compiled kernel. What the compiler specialised on (sizes, strides, alignment) is in the layouts.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ra_triton.kernels.launcher import Descriptors, Launch, launcher

PLANS = 1024  # that a stage keeps; the least recently used goes
_kept: list[Callable[[], None]] = []
Planner = TypeVar("Planner", bound=Callable[..., Any])


def planned(derive: Planner) -> Planner:
    """Keeps what a function derives from layouts and options alone."""
    cached = lru_cache(PLANS)(derive)
    _kept.append(cached.cache_clear)
    return cached  # type: ignore[return-value]


def forget_plans() -> None:
    """Derive every plan anew, for who has changed the config table or Triton's knobs.

    Prepared calls hold plans of their own: ``ra_triton.prepared.forget()`` lets go of those.
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
        self._launch: Launch | None = None

    def __call__(self, *tensors: Any) -> None:
        """Launch on the current device and stream; each tensor has the layout of the plan.

        Once :attr:`compiled`, anything that has an address (``data_ptr()``) stands for a tensor.
        """
        if self._launch is None:
            self._compile(tensors)
        else:
            self._launch(*tensors)

    @property
    def compiled(self) -> bool:
        """Whether a launch needs no more than the tensors' addresses."""
        return self._launch is not None

    def _compile(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Launch through the JIT, and remember what it compiled."""
        first: list[Any] = list(tensors)
        for position, bulk in self.bulk.items():
            first[position] = TensorDescriptor(tensors[position], *map(list, bulk))
        compiled = self.kernel[self.grid](*first, **self.arguments)
        if not any(t is not None and t.is_cuda for t in tensors):
            return  # interpreted, or only compiled
        descriptors = {i: Descriptors(type(first[i]), vars(first[i])) for i in self.bulk}
        rest = [self.arguments[name] for name in self.kernel.arg_names[len(tensors) :]]
        self._launch = launcher(compiled, self.grid, tensors, descriptors, rest)
