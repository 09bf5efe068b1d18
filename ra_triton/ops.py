"""Autograd over the kernels in eager mode: what is saved, which launches run when.

Four differentiable functions: the projection, what stands between it and attention (``norm_rope``),
the attention, and the whole layer, whose backward writes dq, dk and dv into one ``[B, T, N]``
buffer, so that dx and dW are one GEMM each. Without a gradient to record, the launches run
directly. What is traced (``torch.compile``, ``torch.export``) takes the registered operators
instead, which do the same at a higher cost per call. So does a backward that is itself recorded
(``create_graph=True``, ``torch.func``): the operators see through wrappers, and raise when somebody
differentiates a second time.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ra_triton import internals, launches, library
from ra_triton.checks import needs_grad
from ra_triton.layout import RALayout
from ra_triton.norm_rope import NormRope
from ra_triton.offsets import Offsets, flat, unflat
from ra_triton.options import AttentionOptions
from ra_triton.quantization import QuantizedWeight
from ra_triton.workspace import Workspace

Grads = tuple[Tensor | None, ...]


def project(x: Tensor, W_packed: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """``x [B, T, C] @ W_packed [C, N] + bias``; ``out`` only where no gradient is needed."""
    _refuse_tangents(x, W_packed, bias)
    recorded = needs_grad(x, W_packed, bias)
    if out is None and (_traced(x, W_packed) or (_transformed() and not recorded)):
        return library.project(x, W_packed, bias)
    if recorded:
        return _function(_Projection).apply(x, W_packed, bias)
    return launches.project(x, W_packed, bias, out)


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
    recorded = needs_grad(q_pack, k_pack, v)
    if _traced(q_pack, k_pack, v) or (_transformed() and not recorded):
        numbers = library.numbers(options)
        return library.attention(q_pack, k_pack, v, seed, *numbers, *flat(offsets))
    if recorded:
        return _function(_Attention).apply(q_pack, k_pack, v, options, seed, *flat(offsets))
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
    recorded = needs_grad(x, W_packed, bias)
    if _traced(x, W_packed) or (_transformed() and not recorded):
        heads = (layout.n_head, layout.n_kv_head)
        numbers = (*heads, *library.numbers(options), *flat(offsets))
        return library.layer(x, W_packed, bias, seed, *numbers)[0]
    if recorded:
        args = (x, W_packed, bias, layout, options, seed, *flat(offsets))
        return _function(_Layer).apply(*args)[0]
    return launches.layer(x, W_packed, bias, layout, options, seed, workspace, offsets)[0]


def prepare_layer(
    x: Tensor,
    W_packed: Tensor,
    bias: Tensor | None,
    layout: RALayout,
    options: AttentionOptions,
) -> Callable[..., Tensor] | None:
    """:func:`layer` for later calls alike, where no gradient is needed and nothing looks on."""
    return launches.prepare_layer(x, W_packed, bias, layout, options)


def project_quantized(
    x: Tensor, W: QuantizedWeight, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """``x [B, T, C] @ W + bias`` ``[B, T, N]`` from an int8 weight; no gradient is needed."""
    if out is None and (_traced(x, *W.tensors) or _transformed()):
        return library.project_quantized_of(x, W, bias)
    return launches.project(x, W, bias, out)


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
    if _traced(x, *W.tensors) or _transformed():
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


def norm_rope(call: NormRope) -> tuple[Tensor, Tensor]:
    """Lane exchange, norm and rotation of q and k; cos, sin and positions have no gradient."""
    _refuse_tangents(*call[:6])
    recorded = needs_grad(*call[:6])
    if _traced(call.q, call.k) or (_transformed() and not recorded):
        return library.norm_rope(*call)
    if recorded:
        return _function(_NormRope).apply(*call)
    return launches.norm_rope(call)


def norm_rope_(call: NormRope) -> None:
    """The same over q and k, where no gradient is needed."""
    _refuse_tangents(*call[:6])
    if _traced(call.q, call.k) or _transformed():
        q, k = library.norm_rope(*call)
        call.q.copy_(q)
        call.k.copy_(k)
        return
    launches.norm_rope_(call)


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
    if _traced(q_pack, k_pack, v) or _transformed():
        numbers = (options.reach[0], options.softmax_scale, options.softcap, max_length)
        return library.decode(q_pack, k_pack, v, lengths, *numbers)
    return launches.decode(q_pack, k_pack, v, lengths, options, max_length)


def append_(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """Overwrites the caches after ``lengths``, and lengths, where no gradient is needed."""
    _refuse_tangents(k, v)
    append = library.append_ if _traced(k, v) else launches.append_
    append(k_cache, v_cache, lengths, k, v)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Forward-mode differentiation would lose its tangents in the kernels: raise instead."""
    if torch.compiler.is_compiling() or not internals.forward_mode():
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "backend='triton': the kernels have no forward-mode derivative; use reverse mode"
        )


def _traced(*tensors: Tensor | None) -> bool:
    """Whether a compiler or an exporter looks on; it must not see addresses and launches."""
    return torch.compiler.is_compiling() or any(
        t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in tensors
    )


def _transformed() -> bool:
    """Whether ``torch.func`` has wrapped the tensors: only operators see through the wrappers."""
    return internals.transforms_active()


def _function(function: type[Function]) -> type[Function]:
    """``function``; without ``setup_context`` where ``torch.func`` does not ask for it.

    With it PyTorch inspects and binds a signature on every call, which costs more than a launch.
    """
    return function if _transformed() else _without_binding(function)


@cache
def _without_binding(function: type[Function]) -> type[Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (Function,), methods)


def _gradients(direct: Callable[..., Grads], operator: Callable[..., Grads], *args: Any) -> Grads:
    """A backward: launched directly, or by its operator where it is itself recorded.

    The operator raises when it is differentiated; inside ``torch.func`` it cannot be, so there a
    second level of differentiation is refused right away.
    """
    if _transformed():
        transforms = internals.active_transforms()
        if sum(name != "Vmap" for name in transforms) > 1:
            raise RuntimeError("the Triton kernels cannot differentiate twice; use backend='sdpa'")
        if not transforms:  # unknown: the operator has to be recorded, so that it raises
            return operator(*args)
        with torch.no_grad():
            return operator(*args)
    return operator(*args) if torch.is_grad_enabled() else direct(*args)


class _Projection(Function):
    @staticmethod
    def forward(x: Tensor, W_packed: Tensor, bias: Tensor | None) -> Tensor:
        return launches.project(x, W_packed, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, W_packed, _ = inputs
        ctx.save_for_backward(x, W_packed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Grads:
        x, W_packed = ctx.saved_tensors
        args = (x, W_packed, dy, ctx.needs_input_grad)
        return _gradients(launches.project_gradients, library.project_gradients, *args)


class _Attention(Function):
    @staticmethod
    def forward(
        q_pack: Tensor,
        k_pack: Tensor,
        v: Tensor,
        options: AttentionOptions,
        seed: Tensor | None,
        *offsets: Any,
    ) -> tuple[Tensor, Tensor]:
        return launches.attend(q_pack, k_pack, v, options, seed, offsets=unflat(*offsets))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q_pack, k_pack, v, ctx.options, seed, *begins, most_q, most_k = inputs
        ctx.longest = most_q, most_k
        ctx.save_for_backward(q_pack, k_pack, v, *output, seed, *begins)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Grads:
        q_pack, k_pack, v, out, lse, seed, *begins = ctx.saved_tensors
        offsets, needed = unflat(*begins, *ctx.longest), ctx.needs_input_grad[:3]
        args = (q_pack, k_pack, v, out, lse, do, dlse, seed, ctx.options, offsets, needed)
        grads = _gradients(launches.attention_gradients, library.attention_gradients, *args)
        return (*grads, *[None] * 6)


class _Layer(Function):
    @staticmethod
    def forward(
        x: Tensor,
        W_packed: Tensor,
        bias: Tensor | None,
        layout: RALayout,
        options: AttentionOptions,
        seed: Tensor | None,
        *offsets: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        args = (x, W_packed, bias, layout, options, seed)
        return launches.layer(*args, offsets=unflat(*offsets))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, W_packed, _, ctx.layout, ctx.options, seed, *begins, most_q, most_k = inputs
        ctx.longest = most_q, most_k
        out, lse, packed = output
        ctx.mark_non_differentiable(lse, packed)
        ctx.set_materialize_grads(False)  # else backward gets zeros as large as packed
        ctx.save_for_backward(x, W_packed, packed, out, lse, seed, *begins)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, *_: Any) -> Grads:
        x, W_packed, packed, out, lse, seed, *begins = ctx.saved_tensors
        do = torch.zeros_like(out) if do is None else do
        offsets, needed = unflat(*begins, *ctx.longest), ctx.needs_input_grad[:3]
        args = (x, W_packed, packed, out, lse, do, ctx.layout, ctx.options, seed, offsets, needed)
        grads = _gradients(launches.layer_gradients, library.layer_gradients, *args)
        return (*grads, *[None] * 7)


class _NormRope(Function):
    @staticmethod
    def forward(*call: Any) -> tuple[Tensor, Tensor]:
        return launches.norm_rope(NormRope._make(call))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.rope_dims, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dq_pack: Tensor, dk_pack: Tensor) -> Grads:
        call = NormRope._make((*ctx.saved_tensors, ctx.rope_dims, ctx.eps))
        args = (call, dq_pack, dk_pack, ctx.needs_input_grad[:6])
        grads = _gradients(launches.norm_rope_gradients, library.norm_rope_gradients, *args)
        return (*grads, *[None] * 5)
