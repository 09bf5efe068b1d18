"""Calls that have been looked at before.

How a call runs is decided by its options and by the layouts of its tensors, all but the addresses.
An eager call is therefore checked once; when it comes again it is known by its key. Without
gradients it is planned then too, and what is left to do is to allocate and to launch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ra_triton import internals
from ra_triton.checks import allows_tf32, context_parallel, needs_grad, observed

DEVICE = "cuda"  # elsewhere a call costs more than looking at it
CALLS = 1024  # that are known; beyond, all are forgotten and looked at again
Call = Callable[..., Tensor]

_known: dict[tuple[Any, ...], Call] = {}


def key_of(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Everything that decides how an eager call runs; None for another call.

    Args:
        tensors: what the call reads; None where there is none.
        options: everything else that it was given, as it was given.
    """
    for t in tensors:
        if t is not None and (not isinstance(t, Tensor) or t.layout is not torch.strided):
            return None
    if observed(*tensors) or context_parallel():
        return None
    first = tensors[0]
    if (
        first is None
        or first.device.type != DEVICE
        or torch.is_autocast_enabled(DEVICE)
        or internals.forward_mode()
    ):
        return None
    try:
        key: list[Any] = [
            None if t is None else (t.shape, t.stride(), t.data_ptr() % 16, t.dtype, t.device)
            for t in tensors
        ]
    except RuntimeError:  # a nested tensor has no shape
        return None
    if first.dtype is torch.float32:
        key.append(allows_tf32())
    # Types too: 1 is no bool, and 4.0 no rank, though they equal True and 4.
    return (*key, needs_grad(*tensors), options, *map(type, options))


def known(key: tuple[Any, ...] | None) -> Call | None:
    """What was kept for this key."""
    try:
        return _known.get(key)  # type: ignore[arg-type]
    except TypeError:  # an option that cannot be hashed: the checks will say what is wrong with it
        return None


def keep(key: tuple[Any, ...], call: Call) -> None:
    """Let ``call`` run what has this key from now on."""
    if len(_known) >= CALLS:
        _known.clear()
    _known[key] = call


def forget() -> None:
    """Look at every call anew."""
    _known.clear()
