"""The kernels of each function and of its gradient, on the right device; no autograd here.

Kernels are imported by the first call, so that a process that never launches needs no Triton.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ra_triton.checks import refuse_context_parallel
from ra_triton.layout import Columns, RALayout
from ra_triton.norm_rope import NormRope
from ra_triton.offsets import Offsets
from ra_triton.options import AttentionOptions
from ra_triton.quantization import QuantizedWeight
from ra_triton.workspace import Workspace


@cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def _device_of(t: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of ``t`` the current one; nothing to do with one GPU or none."""
    return torch.cuda.device_of(t) if _several_gpus() else nullcontext()


def new_seed(t: Tensor, options: AttentionOptions) -> Tensor | None:
    """Dropout's key, drawn on the device from PyTorch's generator: no synchronisation."""
    if options.dropout_p == 0:
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=t.device)


def project(
    x: Tensor,
    W_packed: Tensor | QuantizedWeight,
    bias: Tensor | None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """``x [B, T, C] @ W_packed [C, N] + bias``, into ``out`` if given."""
    if isinstance(W_packed, QuantizedWeight):
        return _project_quantized(x, W_packed, bias, out, workspace)
    from ra_triton.kernels.projection import projection

    with _device_of(x):
        return projection(x, W_packed, bias, out)


def _project_quantized(
    x: Tensor,
    W: QuantizedWeight,
    bias: Tensor | None,
    out: Tensor | None,
    workspace: Workspace | None,
) -> Tensor:
    """The int8 columns, then the others, into one buffer; int8 activations are rounded first."""
    from ra_triton.kernels.projection_int8 import int8_projection, quantize_rows

    B, T, _ = x.shape
    if out is None:
        out = torch.empty((B, T, W.layout.columns), dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    columns = Columns() if W.others is None else W.layout.low_columns
    x_int8, x_scale = x, None
    with _device_of(x):
        if W.activations == "int8":
            new = torch.empty if workspace is None else partial(workspace.buffer, "x_int8")
            x_int8 = new(x.shape, dtype=torch.int8, device=x.device)
            x_scale = new((B * T,), dtype=torch.float32, device=x.device)
            quantize_rows(x, x_int8, x_scale)
        int8_projection(x_int8, W.data, x_scale, W.scale, bias, out, columns)
        if W.others is not None:
            int8_projection(x, W.others, None, None, bias, out, W.layout.other_columns)
    return out


def project_gradients(
    x: Tensor, W_packed: Tensor, dy: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dW, dbias)``, each only if needed."""
    from ra_triton.kernels.projection import projection
    from ra_triton.kernels.projection_backward import bias_gradient, weight_gradient

    dy = dy.contiguous()
    with _device_of(x):
        return (
            projection(dy, W_packed.mT, None, stage="input_gradient") if needed[0] else None,
            weight_gradient(x, dy) if needed[1] else None,
            bias_gradient(dy) if needed[2] else None,
        )


def pack(q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor) -> tuple[Tensor, Tensor]:
    """``[q_std|k_low], [k_std|q_low]``, new."""
    from ra_triton.kernels import packing

    with _device_of(q):
        return packing.pack(q, k, q_low, k_low)


def pack_(q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor) -> None:
    """Overwrites the last lanes of q with k_low, and those of k with q_low."""
    from ra_triton.kernels import packing

    with _device_of(q):
        packing.pack_(q, k, q_low, k_low)


def norm_rope(call: NormRope) -> tuple[Tensor, Tensor]:
    """Lane exchange, norm and rotation: q and k, new."""
    from ra_triton.kernels import norm_rope

    with _device_of(call.q):
        return norm_rope.norm_rope(call)


def norm_rope_(call: NormRope) -> None:
    """The same, over q and k."""
    from ra_triton.kernels import norm_rope

    with _device_of(call.q):
        norm_rope.norm_rope_(call)


def norm_rope_gradients(
    call: NormRope, dq_pack: Tensor, dk_pack: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``q, k, q_low, k_low, q_weight, k_weight``, each only if needed."""
    from ra_triton.kernels.norm_rope_backward import norm_rope_backward

    with _device_of(call.q):
        return norm_rope_backward(call, dq_pack, dk_pack, needed)


def attend(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    options: AttentionOptions,
    seed: Tensor | None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    offsets: Offsets | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out [B, T_q, H, D], lse [B, H, T_q])``, new unless given; with ``offsets`` B is 1.

    A token behind the last sequence gives 0 and ``-inf``, as a query without keys.
    """
    from ra_triton.kernels.attention_forward import attention_forward

    refuse_context_parallel()  # here too, for a compiled call
    if offsets is not None and not offsets.complete:
        (B, T_q, H, _), device = q_pack.shape, q_pack.device
        out = torch.empty(q_pack.shape, dtype=q_pack.dtype, device=device) if out is None else out
        lse = torch.empty((B, H, T_q), dtype=torch.float32, device=device) if lse is None else lse
        out.zero_(), lse.fill_(-math.inf)
    with _device_of(q_pack):
        return attention_forward(
            q_pack,
            k_pack,
            v,
            causal=options.causal,
            softmax_scale=options.softmax_scale,
            window_size=options.reach,
            softcap=options.softcap,
            dropout_p=options.dropout_p,
            seed=seed,
            o=out,
            lse=lse,
            offsets=offsets,
        )


def decode(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    lengths: Tensor,
    options: AttentionOptions,
    max_length: int,
) -> Tensor:
    """``[B, T_q, H, D]`` over a cache, with the window, scale and softcap of the options."""
    from ra_triton.kernels.decode import decode

    with _device_of(q_pack):
        return decode(
            q_pack,
            k_pack,
            v,
            lengths.contiguous(),
            max_length=max_length,
            left=options.reach[0],
            softmax_scale=options.softmax_scale,
            softcap=options.softcap,
        )


def append_(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """Overwrites the caches after ``lengths``, and lengths."""
    from ra_triton.kernels.append import append_

    with _device_of(k):
        append_(k_cache, v_cache, lengths, k, v)


def attend_backward(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    options: AttentionOptions,
    seed: Tensor | None,
    offsets: Offsets | None = None,
) -> None:
    """Write the gradients into those of dq, dk and dv that are not None."""
    from ra_triton.kernels.attention_backward import attention_backward

    with _device_of(out):
        attention_backward(
            q_pack,
            k_pack,
            v,
            out,
            lse,
            do,
            dq,
            dk,
            dv,
            dlse=dlse,
            causal=options.causal,
            softmax_scale=options.softmax_scale,
            window_size=options.reach,
            softcap=options.softcap,
            dropout_p=options.dropout_p,
            seed=seed,
            offsets=offsets,
        )


def attention_gradients(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor | None,
    dlse: Tensor | None,
    seed: Tensor | None,
    options: AttentionOptions,
    offsets: Offsets | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dq, dk, dv)``, each only if needed; a ``do`` of None is zero, and so is a ``dlse``."""
    new = _gradient_of(offsets)
    dq, dk, dv = (
        new(t, memory_format=torch.contiguous_format) if need else None
        for t, need in zip((q_pack, k_pack, v), needed, strict=True)
    )
    do = torch.zeros_like(out) if do is None else do
    grads = (dq, dk, dv)
    attend_backward(q_pack, k_pack, v, out, lse, do, dlse, *grads, options, seed, offsets)
    return dq, dk, dv


def _gradient_of(offsets: Offsets | None) -> Callable[..., Tensor]:
    """Allocates gradients: zeros where no sequence may write some of them."""
    complete = offsets is None or offsets.complete
    return torch.empty_like if complete else torch.zeros_like


def layer(
    x: Tensor,
    W_packed: Tensor | QuantizedWeight,
    bias: Tensor | None,
    layout: RALayout,
    options: AttentionOptions,
    seed: Tensor | None,
    workspace: Workspace | None = None,
    offsets: Offsets | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Projection and attention: ``(out [B, T, H, D], lse [B, H, T], packed [B, T, N])``.

    With a workspace all three are buffers of it.
    """
    B, T, _ = x.shape
    buffers: list[Tensor | None] = [None, None, None]
    if workspace is not None:
        shapes = ((B, T, layout.columns), (B, T, layout.n_head, layout.head_dim))
        buffers = [
            workspace.buffer(name, shape, x.dtype, x.device)
            for name, shape in zip(("packed", "out"), shapes, strict=True)
        ]
        buffers.append(workspace.buffer("lse", (B, layout.n_head, T), torch.float32, x.device))
    packed = project(x, W_packed, bias, buffers[0], workspace)
    q_pack, k_pack, v = layout.views(packed)
    out, lse = attend(q_pack, k_pack, v, options, seed, buffers[1], buffers[2], offsets)
    return out, lse, packed


def layer_gradients(
    x: Tensor,
    W_packed: Tensor,
    packed: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    layout: RALayout,
    options: AttentionOptions,
    seed: Tensor | None,
    offsets: Offsets | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dW, dbias)``, each only if needed; dq, dk and dv share one buffer ``[B, T, N]``."""
    dpacked = _gradient_of(offsets)(packed)
    q_pack, k_pack, v = layout.views(packed)
    grads = layout.views(dpacked)
    attend_backward(q_pack, k_pack, v, out, lse, do, None, *grads, options, seed, offsets)
    return project_gradients(x, W_packed, dpacked, needed)


class Address:
    """Stands for a tensor where only the address matters: a view costs more than a launch."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        """In bytes."""
        self.address = address

    def data_ptr(self) -> int:
        """As of a tensor."""
        return self.address


class PreparedLayer:
    """:func:`layer` for tensors of one layout, without gradients and without looking at them.

    The projection and the logsumexp are one allocation, which ends with the call.

    Args:
        x: ``[B, T, C]``, on a GPU like the others; tensors of its layout will follow, and so on.
        W_packed: ``[C, N]``.
        bias: ``[N]`` or None.
        layout: of the columns.
        options: of the attention, without dropout.
    """

    def __init__(
        self,
        x: Tensor,
        W_packed: Tensor,
        bias: Tensor | None,
        layout: RALayout,
        options: AttentionOptions,
    ) -> None:
        """Find the plans that :func:`layer` made when it ran on tensors of these layouts."""
        from ra_triton.kernels.attention_forward import forward_plan
        from ra_triton.kernels.projection import projection_plan

        B, T, _ = x.shape
        H, D, item = layout.n_head, layout.head_dim, x.element_size()
        packed = x.new_empty(B, T, layout.columns)
        q_pack, k_pack, v = layout.views(packed)
        lse = torch.empty((B, H, T), dtype=torch.float32, device=x.device)
        out = x.new_empty(B, T, H, D)
        self.project = projection_plan(x, W_packed, bias, packed)
        numbers = (options.causal, options.softmax_scale, options.reach, options.softcap)
        self.attend = forward_plan(q_pack, k_pack, v, None, out, lse, *numbers)
        self.shape = (B, T, H * D)
        # Where things lie from the start of the scratch memory, in bytes; launches rely on 16.
        self.key, self.value = (t.data_ptr() - packed.data_ptr() for t in (k_pack, v))
        self.lse = -(-packed.nbytes // 16) * 16
        self.scratch = (self.lse + lse.nbytes) // item  # elements

    def __call__(self, x: Tensor, W_packed: Tensor, bias: Tensor | None) -> Tensor:
        """``[B, T, C] -> [B, T, H * D]``."""
        out, scratch = x.new_empty(self.shape), x.new_empty(self.scratch)
        start = scratch.data_ptr()
        packed = Address(start)
        self.project(x, W_packed, bias, packed)
        k_pack, v, lse = (Address(start + to) for to in (self.key, self.value, self.lse))
        self.attend(packed, k_pack, v, None, None, None, out, lse)
        return out


def prepare_layer(
    x: Tensor,
    W_packed: Tensor,
    bias: Tensor | None,
    layout: RALayout,
    options: AttentionOptions,
) -> PreparedLayer | None:
    """A prepared layer after a call, where all there is to it is two launches.

    That is on the only GPU, without dropout, whose seed is drawn anew.
    """
    if not x.is_cuda or _several_gpus() or options.dropout_p or x.numel() == 0:
        return None
    if bias is not None and not bias.is_contiguous():
        return None
    prepared = PreparedLayer(x, W_packed, bias, layout, options)
    return prepared if prepared.project.compiled and prepared.attend.compiled else None
