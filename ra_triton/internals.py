"""What this package uses of PyTorch that PyTorch does not document, all of it.

A release that lacks one of these names gets the answer that is right for any call, if at a higher
cost, and a warning that says so, once. What is used of Triton is in ``launch/launcher.py`` and
``launch/gluon.py``, because importing this package does not import Triton.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._library import custom_ops
from torch.autograd import forward_ad
from torch.nn.modules import module
from torch.utils import _python_dispatch

OBSERVED = "each call goes through registered operators, which takes longer"
Constant = TypeVar("Constant", bound=Callable[..., Any])


@cache
def warn_once(message: str, stacklevel: int = 3) -> None:
    """A UserWarning, the first time that there is this one to give."""
    warnings.warn(message, UserWarning, stacklevel=stacklevel)


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
        _missing(name, OBSERVED)
        return True


def modes_active() -> bool:
    """Whether transforms, modes or ``torch.jit.trace`` see operators; not to be traced."""
    try:
        return bool(
            torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._is_tracing()
            or (torch._C._len_torch_function_stack() and _has_function_mode())
        )
    except AttributeError as error:
        _missing(f"torch._C.{error.name}", OBSERVED)
        return True


def _has_function_mode() -> bool:
    """Whether a mode sees functions of torch, besides that of ``torch.set_default_device``."""
    stack = range(torch._C._len_torch_function_stack())
    modes = (type(torch._C._get_function_stack_at(i)).__name__ for i in stack)
    return any(name != "DeviceContext" for name in modes)


def dispatch_modes() -> list[Any]:
    """The dispatch modes around this call; none where a release does not say."""
    try:
        return _python_dispatch._get_current_dispatch_mode_stack()
    except AttributeError:
        name = "torch.utils._python_dispatch._get_current_dispatch_mode_stack"
        _missing(name, "a FLOP counter may count nothing of ra_triton")
        return []


class OperatorLog(_python_dispatch.TorchDispatchMode):
    """Notices whether what runs inside does more than to allocate memory and to view it."""

    _ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self) -> None:
        """Nothing has run yet."""
        super().__init__()
        self.only_allocated = True

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """See one operator."""
        name = getattr(function, "_opname", "")
        if name not in self._ALLOCATIONS and not getattr(function, "is_view", False):
            self.only_allocated = False
        return function(*args, **(kwargs or {}))


def library_of(namespace: str, name: str) -> torch.library.Library:
    """Where an operator is registered; what an earlier import of its module registered is gone."""
    try:
        return custom_ops.get_library_allowing_overwrite(namespace, name)
    except AttributeError:
        name = "torch._library.custom_ops.get_library_allowing_overwrite"
        _missing(name, "ra_triton cannot be imported a second time in a process")
        return torch.library.Library(namespace, "FRAGMENT")


def is_batch_of_gradients(t: Tensor) -> bool:
    """Whether this is the wrapper of ``torch.autograd.grad(is_grads_batched=True)``."""
    try:
        return torch._C._functorch.is_legacy_batchedtensor(t)
    except AttributeError:
        name = "torch._C._functorch.is_legacy_batchedtensor"
        _missing(name, OBSERVED)
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


def hooks_of_all_modules() -> bool:
    """Whether ``torch.nn.modules.module.register_module_*_hook`` has registered one."""
    try:
        return bool(
            module._global_forward_hooks
            or module._global_forward_pre_hooks
            or module._global_backward_hooks
            or module._global_backward_pre_hooks
        )
    except AttributeError as error:
        name = f"torch.nn.modules.module.{error.name}"
        _missing(name, "a layer calls its projections instead of reading them, which is slower")
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
