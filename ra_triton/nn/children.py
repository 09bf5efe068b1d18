"""Which children a layer may read, and which it has to call.

A layer that reads the weight of a child never calls it, so it would silently ignore anything around
the child: hooks, adapters, parametrisations, weights that a hook loads.
"""

from collections.abc import Collection

from torch import Tensor, nn

from ra_triton import internals

Kinds = Collection[type[nn.Module]]


def is_readable(child: nn.Module | None, kinds: Kinds) -> bool:
    """Whether the weights of ``child`` are all there is to its output.

    One of ``kinds`` itself, not a subclass or a wrapper (a parametrisation makes a subclass),
    without forward hooks and with the forward of its class.
    """
    return (
        type(child) in kinds
        and not child._forward_pre_hooks  # type: ignore[union-attr]
        and not child._forward_hooks  # type: ignore[union-attr]
        and "forward" not in child.__dict__
    )


def is_plain(child: nn.Module | None, kinds: Kinds) -> bool:
    """Whether reading ``child`` is indistinguishable from calling it: readable, without hooks."""
    return is_readable(child, kinds) and not (
        child._backward_hooks  # type: ignore[union-attr]
        or child._backward_pre_hooks  # type: ignore[union-attr]
        or child._compiled_call_impl is not None  # type: ignore[union-attr]
        or internals.hooks_of_all_modules()
    )


def is_ordinary(weight: Tensor | None) -> bool:
    """Whether a weight is a plain tensor: no sharded, quantized or other subclass."""
    return weight is not None and not hasattr(type(weight), "__tensor_flatten__")
