"""The last step of a launch: Triton's compiled launcher without the Python around it.

Triton wraps its C launcher in a loop over all arguments that replaces each tensor descriptor by an
encoded one, on every call; that takes longer than the launch. Here Triton's own path is followed
once, up to the C launcher, to see what it passes; later launches pass the same with other
addresses, and a descriptor is encoded once for an address. All that this package uses of Triton's
launcher without being promised it is here: where that is not as expected, every launch takes
Triton's own path, and a warning says so.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType
from typing import Any, NoReturn

import torch
import triton
from triton.compiler import CompiledKernel

from ra_triton.internals import warn_once

ADDRESSES = 256  # whose encoded descriptors a launch keeps: 128 bytes each

_STREAM = object()  # stands for the stream in a recorded call


class Descriptors:
    """The descriptors of one tensor argument, by address.

    Args:
        kind: Triton's or Gluon's descriptor class.
        fields: what its instances hold, but for the tensor, ``base``.
    """

    def __init__(self, kind: type, fields: Mapping[str, Any]) -> None:
        """Nothing is encoded yet."""
        self.kind, self.fields = kind, {**fields, "base": None}
        self._encoded: dict[int, Any] = {}

    @classmethod
    def like(cls, descriptor: Any) -> "Descriptors":
        """Of tensors laid out like the one that this descriptor is of."""
        return cls(type(descriptor), vars(descriptor))

    def of(self, t: Any) -> Any:
        """A descriptor of ``t``: the class's constructor would check what does not change."""
        descriptor: Any = object.__new__(self.kind)
        descriptor.__dict__.update(self.fields, base=Address(t) if type(t) is int else t)
        return descriptor

    def encoded(self, t: Any) -> Any:
        """The hardware's form of it, which holds the address and no reference; None if unknown."""
        return self._encoded.get(_address(t))

    def keep(self, t: Any, encoded: Any) -> None:
        """Remember the hardware's form of it."""
        if len(self._encoded) >= ADDRESSES:
            self._encoded.clear()
        self._encoded[_address(t)] = encoded


def _address(t: Any) -> int:
    """Of a tensor, or of what is one itself; 0 of None."""
    return t if type(t) is int else 0 if t is None else t.data_ptr()


class Address(int):
    """Stands for a tensor where a descriptor asks for its address."""

    def data_ptr(self) -> int:
        """As of a tensor."""
        return self


Place = tuple[int, int]  # of a tensor: the index of an address in a list, and bytes further on
OnAddresses = Callable[[Sequence[int]], None]  # launches on such a list


@dataclass(eq=False)
class Launch:
    """Launches a compiled kernel.

    Attributes:
        usual: launches through Triton's own path; a profiler's hooks see it.
        direct: launches by Triton's C launcher; None where that cannot be.
    """

    usual: Callable[..., None]
    direct: "_Direct | None"

    def __call__(self, *tensors: Any) -> None:
        """Launch on the kernel's tensors, its first arguments, or on their addresses."""
        if self.direct is None or hooked():
            self.usual(*tensors)
        else:
            self.direct(*tensors)

    def on(self, places: Sequence[Place | None]) -> tuple[OnAddresses, OnAddresses]:
        """Launches on the addresses of a list: by the C launcher, and as a profiler sees it.

        Args:
            places: of each of the kernel's tensors, None where there is none.
        """

        def usual(addresses: Sequence[int]) -> None:
            self.usual(*[None if p is None else addresses[p[0]] + p[1] for p in places])

        return usual if self.direct is None else self.direct.on(places), usual


def hooked() -> bool:
    """Whether a profiler's hooks want to see launches."""
    knobs = triton.knobs.runtime
    return _present(knobs.launch_enter_hook) or _present(knobs.launch_exit_hook)


def launcher(
    compiled: CompiledKernel,
    grid: tuple[int, ...],
    example: Sequence[Any],
    descriptors: Mapping[int, Descriptors],
    rest: Sequence[Any],
) -> Launch:
    """The launch of a kernel.

    Args:
        compiled: the kernel.
        grid: programs to launch.
        example: tensors that it could be called with.
        descriptors: which of them go through descriptors, by position.
        rest: the arguments after the tensors, in the kernel's order.
    """
    usual = _usual(compiled, grid, descriptors, rest)
    direct = None if torch.version.hip else _direct(compiled, grid, example, descriptors, rest)
    return Launch(usual, direct)


def make_context_current() -> None:
    """Give this thread the device's context, which a new one gets from its first work alone.

    Encoding a descriptor needs one and, unlike a launch, does not see to it.
    """
    torch.cuda.set_device(torch.cuda.current_device())


def _usual(
    compiled: CompiledKernel,
    grid: tuple[int, ...],
    descriptors: Mapping[int, Descriptors],
    rest: Sequence[Any],
) -> Callable[..., None]:
    """``compiled[grid]``, as the JIT calls it; a profiler's hooks see it."""
    run = compiled[grid]

    def launch(*tensors: Any) -> None:
        first = list(tensors)
        for position, described in descriptors.items():
            first[position] = described.of(tensors[position])
        if descriptors:
            make_context_current()
        run(*first, *rest)

    return launch


def _direct(
    compiled: CompiledKernel,
    grid: tuple[int, ...],
    example: Sequence[Any],
    descriptors: Mapping[int, Descriptors],
    rest: Sequence[Any],
) -> "_Direct | None":
    """Triton's C launcher; None where Triton has to be asked anew for each launch."""
    run: Any = compiled.run
    anew = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    if any(getattr(run, name, False) for name in anew):
        return None  # memory, or the sanitizer's state, of each launch
    try:
        c_launch, recording = _recording(compiled, bool(descriptors))
        passed_by = partial(_passed, _usual(recording, grid, descriptors, rest))
        call = passed_by(example)
        places, encoded = _places(call, passed_by(example), example, descriptors)
        stream_of = triton.runtime.driver.active.get_current_stream
    except Exception as error:  # whatever a launcher that has changed leads to
        warn_once(
            "ra_triton: launches go through Triton's own launcher, which takes longer, because "
            f"that of Triton {triton.__version__} is not as expected: {error!r}"
        )
        return None

    template = list(call[2])
    for index, _ in places:
        template[index] = None
    for index, position in encoded:
        descriptors[position].keep(example[position], template[index])
        template[index] = None
    described = [(index, position, descriptors[position]) for index, position in encoded]
    stream = partial(stream_of, torch.cuda.current_device())
    recorded = (*call[:2], template, call[3])
    present = [t is not None for t in example]
    return _Direct(c_launch, stream, recorded, places, described, passed_by, present)


@dataclass(eq=False)
class _Direct:
    """Triton's C launcher, and what it is passed."""

    c_launch: Callable[..., None]
    stream: Callable[[], Any]  # returns the current one
    call: "_Call"  # all but the stream and the addresses
    places: "_Places"  # where it takes addresses
    described: Sequence[tuple[int, int, Descriptors]]  # and descriptors, which tensor's, the known
    passed_by: "Callable[[Sequence[Any]], _Call]"  # what Triton would pass it for tensors
    present: Sequence[bool]  # which of the kernel's tensors there are

    def __post_init__(self) -> None:
        """For calls with the kernel's tensors in order."""
        places = [(i, 0) if there else None for i, there in enumerate(self.present)]
        self._in_order = self.on(places)

    def __call__(self, *tensors: Any) -> None:
        """Launch on tensors or their addresses."""
        self._in_order([_address(t) for t in tensors])

    def on(self, places: Sequence[Place | None]) -> OnAddresses:
        """See :meth:`Launch.on`."""
        before, fixed, template, nested = self.call
        c_launch, stream = self.c_launch, self.stream
        slots = [(i, *places[position]) for i, position in self.places]  # type: ignore[misc]
        described = [(i, *places[position], known) for i, position, known in self.described]  # type: ignore[misc]

        def launch(addresses: Sequence[int]) -> None:
            values: list[Any] = template.copy()  # type: ignore[attr-defined]
            for index, base, offset in slots:
                values[index] = addresses[base] + offset
            passed = None
            for index, base, offset, known in described:
                address = addresses[base] + offset
                found = known.encoded(address)
                if found is None:
                    passed = passed or self.passed_by(
                        [None if p is None else addresses[p[0]] + p[1] for p in places]
                    )
                    found = passed[2][index]  # all of them are encoded there
                    known.keep(address, found)
                values[index] = found
            if nested:
                c_launch(*before, stream(), *fixed, values)
            else:
                c_launch(*before, stream(), *values)

        return launch


class _Passed(Exception):
    """Carries what would have been passed to the C launcher, past all that stands before it."""


class _Recording:
    """A compiled kernel that launches nothing: it raises what its C launcher would be passed."""

    def __init__(self, compiled: CompiledKernel, run: Any) -> None:
        self._compiled, self.run = compiled, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(type(self._compiled).__getitem__(self, grid), stream=_STREAM)  # type: ignore[arg-type]

    def launch_metadata(self, *_: Any) -> None:
        """For hooks, of which there are none where it is called."""


def _recording(compiled: CompiledKernel, described: bool) -> tuple[Callable[..., None], Any]:
    """The C launcher, and the kernel with another one in its place, for :func:`_passed`."""

    def record(*args: Any) -> NoReturn:
        raise _Passed(args)

    run: Any = copy(compiled.run)
    c_launch = run.launch
    if described:  # a function around the C launcher encodes descriptors
        cells = dict(zip(c_launch.__code__.co_freevars, c_launch.__closure__, strict=True))
        closure = tuple((cells | {"launcher": CellType(record)}).values())
        run.launch = FunctionType(c_launch.__code__, c_launch.__globals__, closure=closure)
        c_launch = cells["launcher"].cell_contents
    else:
        run.launch = record
    return c_launch, _Recording(compiled, run)


_Call = tuple[tuple[Any, ...], tuple[Any, ...], Sequence[Any], bool]


def _passed(launch: Callable[..., None], tensors: Sequence[Any]) -> _Call:
    """What Triton passes its C launcher: before the stream, after it, then the varying values.

    Newer launchers take the kernel's arguments as one tuple or list, which the last value says; a
    bundle, which is a NamedTuple, says nothing.
    """
    try:
        launch(*tensors)
    except _Passed as passed:
        (call,) = passed.args
    else:
        raise LookupError("the C launcher is not where it was")
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    call = tuple(None if any(value is hook for hook in hooks) else value for value in call)
    at = next(i for i, value in enumerate(call) if value is _STREAM)
    before, after = call[:at], call[at + 1 :]
    if type(after[-1]) in (list, tuple):
        return before, after[:-1], after[-1], True
    return before, (), after, False


_Places = list[tuple[int, int]]  # indices among the values, and positions among the tensors


def _places(
    call: _Call, again: _Call, example: Sequence[Any], descriptors: Mapping[int, Any]
) -> tuple[_Places, _Places]:
    """Where a call has the tensors, and where what was encoded; nothing else may differ.

    Args:
        call: what was passed for the example.
        again: what was passed for it a second time.
        example: the tensors.
        descriptors: those of them that go through descriptors.
    """
    places: _Places = []
    encoded: _Places = []
    if (*call[:2], len(call[2]), call[3]) != (*again[:2], len(again[2]), again[3]):
        raise LookupError("what the C launcher is passed differs from launch to launch")
    left = [i for i, t in enumerate(example) if t is not None]
    for index, (value, other) in enumerate(zip(call[2], again[2], strict=True)):
        if isinstance(value, torch.Tensor):
            if not left or value is not example[left[0]]:
                raise LookupError(f"argument {index} of the C launcher is an unknown tensor")
            places.append((index, left.pop(0)))
        elif value is not other and value != other:
            if not left or left[0] not in descriptors:
                raise LookupError(f"argument {index} of the C launcher is no descriptor")
            encoded.append((index, left.pop(0)))
    if left:
        raise LookupError(f"tensors {left} are not passed to the C launcher")
    return places, encoded


def _present(hook: Any) -> bool:
    """Whether a hook, which newer versions of Triton make a chain of hooks, would do anything."""
    return bool(getattr(hook, "calls", hook))
