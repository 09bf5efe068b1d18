"""Autograd over the kernels in eager mode: what is saved, which launches run when.

Four differentiable functions: the projection, what stands between it and attention (``norm_rope``),
the attention, and the whole layer, whose backward writes dq, dk and dv into one ``[B, T, N]``
buffer, so that dx and dW are one GEMM each. Without a gradient to record, the launches run
directly. A call that something else has to see (``checks.observed``: compilers, modes,
``torch.func``, subclasses) takes the registered operators instead, which do the same at a higher
cost per call. So does a backward that is observed, or itself recorded (``create_graph=True``): the
operators raise when they are differentiated a second time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.graph import increment_version

from ra_triton import internals, launches, library
from ra_triton.checks import needs_grad, observed
from ra_triton.layout import RALayout
from ra_triton.norm_rope import NormRope
from ra_triton.offsets import Offsets, flat
from ra_triton.options import AttentionOptions
from ra_triton.quantization import QuantizedWeight
from ra_triton.workspace import Workspace

Grads = tuple[Tensor | None, ...]


def project(x: Tensor, W_packed: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """``x [B, T, C] @ W_packed [C, N] + bias``; ``out`` only where no gradient is needed."""
    _refuse_tangents(x, W_packed, bias)
    if observed(x, W_packed, bias, out):
        return _into(out, library.call(library.project, x, W_packed, bias))
    if needs_grad(x, W_packed, bias):
        return _Projection.apply(x, W_packed, bias)
    return _written(launches.project(x, W_packed, bias, out), out)


def attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    options: AttentionOptions,
    offsets: Offsets | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out [B, T_q, H, D], lse [B, H, T_q])``; lse is differentiable too."""
    _refuse_tangents(q_pack, k_pack, v)
    seed = launches.new_seed(v, options)
    if observed(q_pack, k_pack, v, *flat(offsets)[:2]):
        args = (q_pack, k_pack, v, seed, *library.numbers(options), *flat(offsets))
        return library.call(library.attention, *args)
    if needs_grad(q_pack, k_pack, v):
        return _Attention.apply(q_pack, k_pack, v, options, seed, offsets)
    return launches.attend(q_pack, k_pack, v, options, seed, offsets=offsets)


def layer(
    x: Tensor,
    W_packed: Tensor,
    bias: Tensor | None,
    layout: RALayout,
    options: AttentionOptions,
    workspace: Workspace | None,
    offsets: Offsets | None = None,
) -> Tensor:
    """Projection and attention: ``[B, T, C] -> [B, T, H, D]``; a workspace needs no gradient."""
    _refuse_tangents(x, W_packed, bias)
    seed = launches.new_seed(x, options)
    if observed(x, W_packed, bias, *flat(offsets)[:2]):
        heads = (layout.n_head, layout.n_kv_head)
        numbers = (*heads, *library.numbers(options), *flat(offsets))
        return library.call(library.layer, x, W_packed, bias, seed, *numbers)[0]
    if needs_grad(x, W_packed, bias):
        return _Layer.apply(x, W_packed, bias, layout, options, seed, offsets)[0]
    return launches.layer(x, W_packed, bias, layout, options, seed, workspace, offsets)[0]


def prepare_layer(
    x: Tensor,
    W_packed: Tensor,
    bias: Tensor | None,
    layout: RALayout,
    options: AttentionOptions,
) -> Callable[..., Tensor] | None:
    """:func:`layer` for later calls alike, without gradients and with nothing to observe it."""
    return launches.prepare_layer(x, W_packed, bias, layout, options)


def project_quantized(
    x: Tensor, W: QuantizedWeight, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """``x [B, T, C] @ W + bias`` ``[B, T, N]`` from an int8 weight; no gradient is needed."""
    if observed(x, *W.tensors, bias, out):
        return _into(out, library.project_quantized_of(x, W, bias))
    return _written(launches.project(x, W, bias, out), out)


def layer_quantized(
    x: Tensor,
    W: QuantizedWeight,
    bias: Tensor | None,
    layout: RALayout,
    options: AttentionOptions,
    workspace: Workspace | None,
    offsets: Offsets | None,
) -> Tensor:
    """Projection from an int8 weight, and attention; no gradient is needed."""
    if observed(x, *W.tensors, bias, *flat(offsets)[:2]):
        packed = library.project_quantized_of(x, W, bias)
        return attention(*layout.views(packed), options, offsets)[0]
    seed = launches.new_seed(x, options)
    return launches.layer(x, W, bias, layout, options, seed, workspace, offsets)[0]


def pack(q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor) -> tuple[Tensor, Tensor]:
    """``[q_std|k_low], [k_std|q_low]``, where no gradient is needed."""
    _refuse_tangents(q, k, q_low, k_low)
    return launches.pack(q, k, q_low, k_low)


def pack_(q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor) -> None:
    """Overwrites the last lanes of q and k, where no gradient is needed."""
    _refuse_tangents(q, k, q_low, k_low)
    launches.pack_(q, k, q_low, k_low)
    increment_version((q, k))


def norm_rope(call: NormRope) -> tuple[Tensor, Tensor]:
    """Lane exchange, norm and rotation of q and k; cos, sin and positions have no gradient."""
    _refuse_tangents(*call[:6])
    if observed(*call[:9]):
        return library.call(library.norm_rope, *call)
    if needs_grad(*call[:6]):
        return _NormRope.apply(*call)
    return launches.norm_rope(call)


def norm_rope_(call: NormRope) -> None:
    """The same over q and k, where no gradient is needed."""
    _refuse_tangents(*call[:6])
    if observed(*call[:9]):
        q, k = library.call(library.norm_rope, *call)
        call.q.copy_(q)
        call.k.copy_(k)
        return
    launches.norm_rope_(call)
    increment_version((call.q, call.k))


def decode(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    lengths: Tensor,
    options: AttentionOptions,
    max_length: int,
) -> Tensor:
    """``[B, T_q, H, D]`` over a cache, where no gradient is needed."""
    _refuse_tangents(q_pack, k_pack, v)
    if observed(q_pack, k_pack, v, lengths):
        numbers = (options.reach[0], options.softmax_scale, options.softcap, max_length)
        return library.call(library.decode, q_pack, k_pack, v, lengths, *numbers)
    return launches.decode(q_pack, k_pack, v, lengths, options, max_length)


def append_(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """Overwrites the caches after ``lengths``, and lengths, where no gradient is needed."""
    _refuse_tangents(k, v)
    if observed(k_cache, v_cache, lengths, k, v):
        library.call(library.append_, k_cache, v_cache, lengths, k, v)
    else:
        launches.append_(k_cache, v_cache, lengths, k, v)
        increment_version((k_cache, v_cache, lengths))


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Forward-mode differentiation would lose its tangents in the kernels: raise instead."""
    if torch.compiler.is_compiling() or not internals.forward_mode():
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "backend='triton': the kernels have no forward-mode derivative; use reverse mode"
        )


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    """``result``, copied into ``out`` if given: no operator writes into a caller's memory."""
    return result if out is None else out.copy_(result)


def _written(result: Tensor, out: Tensor | None) -> Tensor:
    """``result``, which is ``out`` if given; autograd has not seen the launch that wrote it."""
    if out is not None:
        increment_version(out)
    return result


def _gradients(
    direct: Callable[..., Grads],
    operator: Callable[..., Grads],
    incoming: tuple[Tensor | None, ...],
    *args: Any,
) -> Grads:
    """A backward: launched directly, or by its operator where it is recorded or observed."""
    if torch.is_grad_enabled() or observed(*incoming):
        return operator(*args)
    return direct(*args)


class _Projection(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W_packed)
        return launches.project(x, W_packed, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Grads:
        x, W_packed = ctx.saved_tensors
        args = (x, W_packed, dy, ctx.needs_input_grad)
        return _gradients(launches.project_gradients, library.project_gradients, (dy,), *args)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_pack: Tensor,
        k_pack: Tensor,
        v: Tensor,
        options: AttentionOptions,
        seed: Tensor | None,
        offsets: Offsets | None,
    ) -> tuple[Tensor, Tensor]:
        output = launches.attend(q_pack, k_pack, v, options, seed, offsets=offsets)
        _save(ctx, offsets, q_pack, k_pack, v, *output, seed)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Grads:
        (q_pack, k_pack, v, out, lse, seed), offsets = _saved(ctx)
        needed = ctx.needs_input_grad[:3]
        args = (q_pack, k_pack, v, out, lse, do, dlse, seed, ctx.options, offsets, needed)
        functions = launches.attention_gradients, library.attention_gradients
        return (*_gradients(*functions, (do, dlse), *args), None, None, None)


class _Layer(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_packed: Tensor,
        bias: Tensor | None,
        layout: RALayout,
        options: AttentionOptions,
        seed: Tensor | None,
        offsets: Offsets | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        args = (x, W_packed, bias, layout, options, seed)
        out, lse, packed = launches.layer(*args, offsets=offsets)
        ctx.mark_non_differentiable(lse, packed)
        ctx.set_materialize_grads(False)  # else backward gets zeros as large as packed
        _save(ctx, offsets, x, W_packed, packed, out, lse, seed)
        ctx.layout, ctx.options = layout, options
        return out, lse, packed

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, *_: Any) -> Grads:
        (x, W_packed, packed, out, lse, seed), offsets = _saved(ctx)
        do = torch.zeros_like(out) if do is None else do
        needed = ctx.needs_input_grad[:3]
        args = (x, W_packed, packed, out, lse, do, ctx.layout, ctx.options, seed, offsets, needed)
        grads = _gradients(launches.layer_gradients, library.layer_gradients, (do,), *args)
        return (*grads, None, None, None, None)


class _NormRope(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        call = NormRope._make(args)
        ctx.save_for_backward(*call[:9])
        ctx.rope_dims, ctx.eps = call.rope_dims, call.eps
        return launches.norm_rope(call)

    @staticmethod
    def backward(ctx: Any, dq_pack: Tensor, dk_pack: Tensor) -> Grads:
        call = NormRope._make((*ctx.saved_tensors, ctx.rope_dims, ctx.eps))
        functions = launches.norm_rope_gradients, library.norm_rope_gradients
        args = (call, dq_pack, dk_pack, ctx.needs_input_grad[:6])
        grads = _gradients(*functions, (dq_pack, dk_pack), *args)
        return (*grads, *[None] * 5)


def _save(ctx: Any, offsets: Offsets | None, *tensors: Tensor | None) -> None:
    """Keep tensors and offsets for the backward, where autograd watches them."""
    cu_seqlens_q, cu_seqlens_k, *ctx.offsets = offsets or (None, None)
    ctx.save_for_backward(*tensors, cu_seqlens_q, cu_seqlens_k)


def _saved(ctx: Any) -> tuple[tuple[Tensor, ...], Offsets | None]:
    """What :func:`_save` kept."""
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    offsets = None
    if cu_seqlens_q is not None:
        offsets = Offsets(cu_seqlens_q, cu_seqlens_k, *ctx.offsets)
    return tuple(tensors), offsets
