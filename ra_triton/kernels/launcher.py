"""The last step of a launch: Triton's compiled launcher without the Python around it.

Triton wraps its C launcher in a loop over all arguments that replaces each tensor descriptor by an
encoded one, on every call; that takes longer than the launch. Here everything but the addresses is
put in place once, and a descriptor is encoded once for an address. What is passed is what Triton
would pass (``tests/test_launcher.py``); a Triton whose launcher looks different is called as usual.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

ADDRESSES = 256  # whose encoded descriptors a launch keeps: 128 bytes each

Launch = Callable[..., None]  # of the tensors alone
Encode = Callable[[Any], Sequence[Any]]  # a descriptor to what the kernel takes in its place


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

    def of(self, t: Any) -> Any:
        """A descriptor of ``t``: the class's constructor would check what does not change."""
        descriptor: Any = object.__new__(self.kind)
        descriptor.__dict__.update(self.fields, base=t)
        return descriptor

    def encoded(self, t: Any, encode: Encode) -> Any:
        """The hardware's form of it, which holds the address and no reference."""
        address = t.data_ptr()
        found = self._encoded.get(address)
        if found is None:
            if len(self._encoded) >= ADDRESSES:
                self._encoded.clear()
            found = self._encoded[address] = encode(self.of(t))[0]
        return found


def launcher(
    compiled: CompiledKernel,
    grid: tuple[int, ...],
    example: Sequence[Any],
    descriptors: Mapping[int, Descriptors],
    rest: Sequence[Any],
) -> Launch:
    """A function of a kernel's tensors, its first arguments, that launches it.

    Args:
        compiled: the kernel.
        grid: programs to launch.
        example: tensors that it could be called with.
        descriptors: which of them go through descriptors, by position.
        rest: the arguments after the tensors, in the kernel's order.
    """
    usual = _usual(compiled, grid, descriptors, rest)
    direct = None if torch.version.hip else _direct(compiled, grid, example, descriptors, rest)
    direct = direct or usual
    knobs = triton.knobs.runtime

    def launch(*tensors: Any) -> None:
        if _present(knobs.launch_enter_hook) or _present(knobs.launch_exit_hook):
            usual(*tensors)
        else:
            direct(*tensors)

    return launch


def _usual(
    compiled: CompiledKernel,
    grid: tuple[int, ...],
    descriptors: Mapping[int, Descriptors],
    rest: Sequence[Any],
) -> Launch:
    """``compiled[grid]``, as the JIT calls it; a profiler's hooks see it."""
    run = compiled[grid]

    def launch(*tensors: Any) -> None:
        first = list(tensors)
        for position, described in descriptors.items():
            first[position] = described.of(tensors[position])
        run(*first, *rest)

    return launch


def _direct(
    compiled: CompiledKernel,
    grid: tuple[int, ...],
    example: Sequence[Any],
    descriptors: Mapping[int, Descriptors],
    rest: Sequence[Any],
) -> Launch | None:
    """Triton's C launcher; None where it is not as it was in Triton 3.6 and 3.7."""
    run: Any = compiled.run
    known = hasattr(run, "launch") and hasattr(run, "launch_cooperative_grid")
    if not known or run.global_scratch_size or getattr(run, "profile_scratch_size", 0):
        return None
    c_launch = run.launch
    encoders: Iterator[Encode] = iter(())
    if descriptors:
        wrapped = inspect.getclosurevars(c_launch).nonlocals
        c_launch, metadata = wrapped.get("launcher"), wrapped.get("tensordesc_meta") or ()
        make = getattr(sys.modules[type(run).__module__], "make_tensordesc_arg", None)
        if c_launch is None or make is None or len(metadata) != len(descriptors):
            return None
        if None in metadata:  # this kernel reads the tensor through its pointer
            return None
        encoders = iter([partial(make, metadata=each) for each in metadata])

    arguments: list[Any] = []
    places: list[tuple[int, int]] = []  # where in arguments a tensor goes
    encoded: list[tuple[int, int, Descriptors, Encode]] = []
    for position, t in enumerate(example):
        if position not in descriptors:
            places.append((len(arguments), position))
            arguments.append(None)
            continue
        described, encode = descriptors[position], next(encoders)
        encoded.append((len(arguments), position, described, encode))
        arguments += encode(described.of(t))
    arguments += rest

    stream_of = triton.runtime.driver.active.get_current_stream
    device = torch.cuda.current_device()
    before = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
    packed = compiled.packed_metadata
    # Newer launchers take the kernel's arguments as one list, and how to read them.
    as_list = hasattr(run, "arg_annotations")
    if as_list:
        fixed = (packed, *[None] * 5, run.arg_annotations, run.kernel_signature)
    else:
        fixed = (None, None, packed, None, None, None)

    def launch(*tensors: Any) -> None:
        values = arguments.copy()
        for place, position in places:
            values[place] = tensors[position]
        for place, position, described, encode in encoded:
            values[place] = described.encoded(tensors[position], encode)
        stream = stream_of(device)
        if as_list:
            c_launch(*grid, stream, *before, *fixed, values)
        else:
            c_launch(*grid, stream, *before, *fixed, *values)

    return launch


def _present(hook: Any) -> bool:
    """Whether a hook, which newer versions of Triton make a chain of hooks, would do anything."""
    return bool(getattr(hook, "calls", hook))
