"""Recorded calls: what was checked and planned once is only launched when it comes again.

How an eager call runs is decided by its options and by the layouts of its tensors, all but the
addresses: :func:`key_of`. A function that does nothing but launch kernels is recorded as a
:class:`Tape`, which repeats the launches on other tensors of the same layouts: two allocations for
what it returns and what it needs meanwhile, and one call of Triton's C launcher for each kernel.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ra_triton import internals
from ra_triton.checks import allows_tf32, context_parallel, needs_grad, observed

DEVICE = "cuda"  # elsewhere a call costs more than its checks
CALLS = 1024  # kept by key; when there are more, all are dropped
UNIT = 256  # bytes; what the scratch of a tape is cut into
Tensors = Sequence[Tensor | None]


@dataclass
class Known:
    """A call that was checked.

    Attributes:
        run: takes the tensors; returns a tuple.
    """

    run: Callable[..., tuple[Any, ...]]


_known: dict[tuple[Any, ...], Known] = {}


def key_of(
    tensors: tuple[Any, ...], options: tuple[Any, ...], gradients: int | None = None
) -> tuple[Any, ...] | None:
    """Everything that decides how an eager call runs; None for a call that is not kept.

    Args:
        tensors: what the call reads; None where there is none.
        options: everything else that it was given, as it was given.
        gradients: how many of the tensors may have a gradient; None: all.
    """
    for t in tensors:
        if t is not None and (not isinstance(t, Tensor) or t.layout is not torch.strided):
            return None
    if observed(*tensors) or context_parallel():
        return None
    first = tensors[0]
    if first is None or first.device.type != DEVICE or internals.forward_mode():
        return None
    try:
        key: list[Any] = [None if t is None else (*_layout(t), t.device) for t in tensors]
    except RuntimeError:  # a nested tensor has no shape
        return None
    if first.dtype is torch.float32:
        key.append(allows_tf32())
    if torch.is_autocast_enabled(DEVICE):
        key.append(torch.get_autocast_dtype(DEVICE))
    # Types too: 1 is no bool, and 4.0 no rank, though they equal True and 4.
    return (*key, needs_grad(*tensors[:gradients]), options, *map(type, options))


def known(key: tuple[Any, ...] | None) -> Known | None:
    """What was kept for this key."""
    if key is None:
        return None
    try:
        return _known.get(key)
    except TypeError:  # an option that cannot be hashed: the checks will say what is wrong with it
        return None


def keep(key: tuple[Any, ...] | None, call: Known | None) -> None:
    """Let ``call`` run what has this key from now on; nothing to do without either."""
    if key is None or call is None:
        return
    if len(_known) >= CALLS:
        _known.clear()
    _known[key] = call


def forget() -> None:
    """Check and plan every call anew."""
    _known.clear()
    for tapes in _tapes:
        tapes.clear()


def _layout(t: Tensor) -> tuple[Any, ...]:
    """All that a launch depends on of a tensor but its device."""
    return t.shape, t.stride(), t.data_ptr() & 15, t.dtype


@cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def device_of(t: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of ``t`` the current one; nothing to do with one GPU or none."""
    return torch.cuda.device_of(t) if _several_gpus() else nullcontext()


class Tape:
    """Launches on tensors of one layout, and the memory that they need.

    Args:
        launches: on a list of addresses, which are those of outputs, scratch and inputs; each as
            Triton's C launcher has it, and as a profiler's hooks see it.
        hooked: whether a profiler's hooks want to see launches.
        outputs: shape, strides and dtype of each result, None for an absent one.
        scratch: bytes that are needed meanwhile.
        device: of all tensors.
    """

    def __init__(
        self,
        launches: Sequence[tuple[Callable[[list[int]], None], Callable[[list[int]], None]]],
        hooked: Callable[[], bool],
        outputs: Sequence[tuple[Any, ...] | None],
        scratch: int,
        device: torch.device,
    ) -> None:
        """Nothing is launched yet."""
        self.direct = [direct for direct, _ in launches]
        self.usual = [usual for _, usual in launches]
        self.hooked, self.outputs = hooked, tuple(outputs)
        self.scratch, self.device = scratch, device

    def __call__(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        """Launch on tensors with the layouts of those that were recorded; returns new outputs.

        None may be left out behind the last tensor.
        """
        device = self.device
        outputs = [
            None if like is None else torch.empty_strided(*like[:2], dtype=like[2], device=device)
            for like in self.outputs
        ]
        scratch = torch.empty(self.scratch, dtype=torch.uint8, device=device)
        addresses = [0 if t is None else t.data_ptr() for t in (*outputs, scratch, *tensors)]
        with device_of(scratch):
            for launch in self.usual if self.hooked() else self.direct:
                launch(addresses)
        return tuple(outputs)


def record(
    function: Callable[..., tuple[Any, ...]],
    tensors: Tensors,
    constants: tuple[Any, ...],
    wanted: int | None = None,
) -> tuple[tuple[Any, ...], Tape | None]:
    """``function(*tensors, *constants)``, and the tape of it; None where it cannot be repeated.

    That is where it did more than to allocate, to view and to launch compiled kernels.

    Args:
        function: returns tensors and Nones.
        tensors: its inputs; None where there is none.
        constants: its other arguments.
        wanted: how many of its results a repetition returns; None: all.
    """
    from ra_triton.launch.launcher import hooked
    from ra_triton.launch.plans import recording

    outer, recording.log = recording.log, []
    try:
        with internals.OperatorLog() as operators:
            outputs = function(*tensors, *constants)
        log = recording.log
    finally:
        recording.log = outer
    if not operators.only_allocated:
        return outputs, None
    results = outputs[:wanted]
    finder = _Finder(results, tensors)
    try:
        launches = [plan.on([finder.place_of(t) for t in launched]) for plan, launched in log]
    except LookupError:
        return outputs, None
    if None in launches:
        return outputs, None
    likes = [None if t is None else (t.shape, t.stride(), t.dtype) for t in results]
    device = next(t.device for t in tensors if t is not None)
    return outputs, Tape(launches, hooked, likes, finder.scratch, device)  # type: ignore[arg-type]


class _Finder:
    """Finds where tensors lie: so many bytes into an input, an output, or else the scratch."""

    def __init__(self, outputs: Tensors, inputs: Tensors) -> None:
        self.bases = [*outputs, None, *inputs]
        self.scratch_index = len(outputs)
        self.scratch = 0
        self._temporary: dict[int, tuple[Tensor, int]] = {}  # storage: a tensor of it, its place

    def place_of(self, t: Tensor | None) -> tuple[int, int] | None:
        """LookupError where a view could be of several inputs, which elsewhere lie elsewhere."""
        if t is None:
            return None
        storage, address = t.untyped_storage().data_ptr(), t.data_ptr()
        of = [
            (i, base)
            for i, base in enumerate(self.bases)
            if base is not None and base.untyped_storage().data_ptr() == storage
        ]
        if not t.numel():
            raise LookupError("a tensor without memory")
        if not of:
            return self._in_scratch(t, storage, address)
        chosen = [(i, base) for i, base in of if base is t] or of
        if len(chosen) > 1:
            chosen = [(i, base) for i, base in of if base.data_ptr() == address]
        if len(chosen) != 1:
            raise LookupError("a view of one of several inputs in the same memory")
        ((index, base),) = chosen
        return (index, address - base.data_ptr())

    def _in_scratch(self, t: Tensor, storage: int, address: int) -> tuple[int, int]:
        if storage not in self._temporary:  # kept alive, so that no later one gets its memory
            self._temporary[storage] = t, self.scratch
            self.scratch += -(-t.untyped_storage().nbytes() // UNIT) * UNIT
        return self.scratch_index, self._temporary[storage][1] + address - storage


_tapes: list[dict[Any, Tape | None]] = []


class Repeated:
    """A function that only launches, of tensors and constants: later calls alike are repeated.

    Args:
        function: ``function(*tensors, *constants)`` returns tensors and Nones.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]]) -> None:
        """Nothing is recorded yet."""
        self.function = function
        self._tapes: dict[Any, Tape | None] = {}
        _tapes.append(self._tapes)

    def __call__(self, tensors: Tensors, constants: tuple[Any, ...]) -> tuple[Any, ...]:
        """The function's results."""
        first = next(t for t in tensors if t is not None)
        with device_of(first):
            if first.device.type != DEVICE or context_parallel():
                return self.function(*tensors, *constants)
            key: list[Any] = [None if t is None else _layout(t) for t in tensors]
            if first.dtype is torch.float32:
                key.append(allows_tf32())
            whole = (first.device, constants, *key)
            if whole not in self._tapes:
                outputs, tape = record(self.function, tensors, constants)
                if len(self._tapes) >= CALLS:
                    self._tapes.clear()
                self._tapes[whole] = tape
                return outputs
            tape = self._tapes[whole]
            return self.function(*tensors, *constants) if tape is None else tape(*tensors)
