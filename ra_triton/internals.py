"""What this package uses of PyTorch that PyTorch does not document, all of it.

A release that lacks one of these names gets the answer that is right for any call, if at a higher
cost, and a warning that says so, once. What is used of Triton is in ``kernels/launcher.py`` and
``kernels/gluon.py``, because importing this package does not import Triton.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Constant = TypeVar("Constant", bound=Callable[..., Any])


@cache
def warn_once(message: str) -> None:
    """A UserWarning, the first time that there is this one to give."""
    warnings.warn(message, UserWarning, stacklevel=3)


def _missing(name: str, consequence: str) -> None:
    warn_once(f"ra_triton: torch {torch.__version__} has no {name}, so {consequence}")


def constant(function: Constant) -> Constant:
    """Decorates a function that a tracer calls instead of looking into it.

    Its arguments and its result are constants of the traced code. What
    ``torch.compiler.assume_constant_result`` does, without importing the compiler, and Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def transforms_active() -> bool:
    """Whether a transform of ``torch.func`` may have wrapped tensors; not to be traced."""
    try:
        return torch._C._are_functorch_transforms_active()
    except AttributeError:
        name = "torch._C._are_functorch_transforms_active"
        _missing(name, "each call goes through registered operators, which takes longer")
        return True


def active_transforms() -> list[str]:
    """The transforms of ``torch.func`` around this call, outermost first: ``["Grad", "Vmap"]``.

    Empty where a release does not say; what is called then has to raise by itself.
    """
    try:
        stack = torch._C._functorch.get_interpreter_stack()
        return [level.key().name for level in stack or ()]
    except AttributeError:
        name = "torch._C._functorch.get_interpreter_stack"
        _missing(name, "gradients inside torch.func may be refused")
        return []


def forward_mode() -> bool:
    """Whether tensors may have tangents of forward-mode differentiation."""
    try:
        return forward_ad._current_level >= 0
    except AttributeError:
        name = "torch.autograd.forward_ad._current_level"
        _missing(name, "every tensor is asked for a tangent, which takes longer")
        return True


def mark_static(t: Tensor, dims: Iterable[int]) -> None:
    """Tell the compiler that these sizes are part of what it compiles for."""
    try:
        torch._dynamo.mark_static(t, list(dims))
    except AttributeError:
        _missing("torch._dynamo.mark_static", "flex_attention may compile less efficient code")


def mark_varying(t: Tensor, dims: Iterable[int]) -> None:
    """Tell the compiler that these sizes vary, each on its own, whichever are equal now."""
    try:
        torch._dynamo.maybe_mark_dynamic(t, tuple(dims))
    except AttributeError:
        _missing("torch._dynamo.maybe_mark_dynamic", "flex_attention may compile more often")
