"""Backends: modules with one signature each, and the choice between them.

A backend is a module with ``project``, ``packed_attention``, ``layer`` (both of them), ``pack_qk``,
``pack_qk_``, ``compose``, ``norm_rope``, ``norm_rope_``, ``decode_attention``, ``append_``;
``known_project``, ``known_attention``, ``known_layer``, ``known_decode`` and ``known_compose``,
which return a shortcut for calls that come again, or None; and ``unsupported``, which returns the
reason why it cannot run a call, or None. ``dtype`` is what autocast brings operands to, None: as
they are.
"""

from types import ModuleType

import torch
from torch import Tensor

from ra_triton.backend import flex, sdpa, triton
from ra_triton.call.options import AttentionOptions
from ra_triton.checks import check_choice, distributed, refuse_context_parallel
from ra_triton.internals import warn_once

BACKENDS: dict[str, ModuleType] = {"triton": triton, "sdpa": sdpa, "flex": flex}
CHOICES = ("auto", *BACKENDS)


def choose(
    backend: str,
    tensors: tuple[Tensor | None, ...],
    options: AttentionOptions | None = None,
    head_dim: int | None = None,
) -> tuple[ModuleType, str]:
    """The backend that runs a call, and why.

    An explicit backend runs or raises. ``"auto"`` takes Triton where it can and SDPA, which runs
    every call, elsewhere; on a GPU it warns once per reason when it cannot use Triton. It never
    takes FlexAttention, which compiles on its first call.

    Args:
        backend: one of ``CHOICES``.
        tensors: what the call reads, the first one not None.
        options: of an attention call; None for a projection or packing call.
        head_dim: of an attention call.

    Raises:
        ValueError: unknown backend.
        NotImplementedError: the backend lacks the combination; the message names one that has it.
            Attention inside of ``context_parallel``, or over DTensors on a CPU.
    """
    check_choice("backend", backend, CHOICES)
    if options is not None and not torch.compiler.is_compiling():
        refuse_context_parallel()
    device = tensors[0].device  # type: ignore[union-attr]
    if options is not None and device.type == "cpu" and distributed(*tensors):
        raise NotImplementedError(
            "no backend has attention over DTensors on a CPU; call .to_local() on them"
        )
    if backend != "auto":
        reason = BACKENDS[backend].unsupported(tensors, options, head_dim)
        if reason is None:
            return BACKENDS[backend], "asked for"
        other = next(
            name
            for name, module in BACKENDS.items()
            if name != backend and module.unsupported(tensors, options, head_dim) is None
        )
        raise NotImplementedError(f"backend={backend!r}: {reason}; use backend={other!r}")

    on_gpu = device.type == "cuda"
    no_triton: str | None = f"{device} tensors"
    if on_gpu:
        no_triton = triton.untried() or triton.unsupported(tensors, options, head_dim)
    if no_triton is None:
        return triton, "supported GPU, shapes and options"
    if on_gpu:
        warn_once(f"ra_triton runs on SDPA, not on its Triton kernels: {no_triton}", 5)
    return sdpa, no_triton
