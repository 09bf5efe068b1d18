"""The kernels as registered operators, for what is traced: ``torch.ops.ra_triton.*``.

Each has a fake kernel (shapes and strides without data) and an autograd formula whose backward is
an operator too, so a compiled graph holds forward and backward as opaque calls. A gradient that
nobody needs comes back as a tensor of size 0, and leaves the formula as None.

``torch.func`` differentiates Functions alone, so each operator with a formula has one, which
:func:`call` takes under a transform. Under ``vmap`` an operator is a loop over the slices.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import CustomOpDef

from ra_triton import flops, internals, launches
from ra_triton.checks import transformed
from ra_triton.layout import RALayout
from ra_triton.norm_rope import NormRope
from ra_triton.offsets import Offsets, flat, unflat
from ra_triton.options import AttentionOptions
from ra_triton.quantization import QuantizedWeight

Grads = tuple[Tensor | None, ...]
Three = tuple[Tensor, Tensor, Tensor]
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


_functions: dict[CustomOpDef, type[Function]] = {}


def call(operator: CustomOpDef, *args: Any) -> Any:
    """``operator(*args)``, under the transforms of ``torch.func`` too."""
    if not torch.compiler.is_compiling():
        flops.register()
    if transformed() and operator in _functions:
        transforms = internals.active_transforms()
        if transforms and transforms[-1] != "Functionalize":
            return _functions[operator].apply(*args)
    return operator(*args)


def _differentiable(
    operator: CustomOpDef, gradients: Callable[..., Any], save: Callable[..., None]
) -> None:
    """Give an operator its formula: ``gradients(ctx, *incoming)`` after ``save``."""
    operator.register_autograd(gradients, setup_context=save)

    def backward(ctx: Any, *incoming: Any) -> Any:
        transforms = internals.active_transforms() if transformed() else []
        if not transforms:
            return gradients(ctx, *incoming)
        # No formula of a backward is recorded here, so another level would get no gradient.
        if sum(name != "Vmap" for name in transforms) > 1:
            _refuse(ctx)
        with torch.no_grad():
            return gradients(ctx, *incoming)

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _each_slice(_functions[operator].apply, info, in_dims, *args)

    methods = {"forward": lambda *args: operator(*args), "setup_context": save}
    methods |= {"backward": backward, "vmap": vmap}
    static = {name: staticmethod(method) for name, method in methods.items()}
    _functions[operator] = type(operator._name, (Function,), static)


def _each_slice(function: Callable[..., Any], info: Any, in_dims: Any, *args: Any) -> Any:
    """The rule of ``vmap``: ``function`` of each slice, and the results as one."""
    if info.batch_size == 0:
        raise NotImplementedError("backend='triton': no vmap over a dim of size 0")
    outs = [
        function(
            *(
                arg.select(dim, i) if isinstance(dim, int) else arg
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    if isinstance(outs[0], Tensor):
        return torch.stack(outs), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*outs, strict=True))
    return stacked, (0,) * len(stacked)


def _layout(W_packed: Tensor, n_head: int, n_kv_head: int) -> RALayout:
    return RALayout(n_head, n_kv_head, W_packed.shape[1] // (n_head + 2 * n_kv_head), 0)


def numbers(options: AttentionOptions) -> tuple[Any, ...]:
    """The options as operators take them, in their order."""
    scores = (options.causal, options.softmax_scale, options.dropout_p)
    return (*scores, *options.window_size, options.softcap)


def _options(
    causal: bool,
    softmax_scale: float | None,
    dropout_p: float,
    window_left: int,
    window_right: int,
    softcap: float,
) -> AttentionOptions:
    window_size = (window_left, window_right)
    return AttentionOptions(causal, softmax_scale, window_size, softcap, dropout_p)


def _present(grads: Grads, like: Tensor) -> Three:
    first, second, third = (like.new_empty(0) if t is None else t for t in grads)
    return first, second, third


def _wanted(grads: Three, needed: Sequence[bool]) -> Grads:
    return tuple(t if need else None for t, need in zip(grads, needed, strict=True))


def _fake_grads(like: Tensor, shapes: Sequence[Sequence[int]], needed: Sequence[bool]) -> Three:
    first, second, third = (
        like.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True)
    )
    return first, second, third


# Projection: y = x W + bias


@torch.library.custom_op("ra_triton::project", mutates_args=())
def project(x: Tensor, W_packed: Tensor, bias: Tensor | None) -> Tensor:
    """``[B, T, C] @ [C, N] -> [B, T, N]``."""
    return launches.project(x, W_packed, bias)


@project.register_fake
def _(x: Tensor, W_packed: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], W_packed.shape[1])


@torch.library.custom_op("ra_triton::project_backward", mutates_args=())
def project_backward(x: Tensor, W_packed: Tensor, dy: Tensor, needed: Sequence[bool]) -> Three:
    """``(dx, dW, dbias)``."""
    return _present(launches.project_gradients(x, W_packed, dy, needed), x)


@project_backward.register_fake
def _(x: Tensor, W_packed: Tensor, dy: Tensor, needed: Sequence[bool]) -> Three:
    return _fake_grads(x, (x.shape, W_packed.shape, W_packed.shape[1:]), needed)


def _save_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, W_packed, _ = inputs
    ctx.save_for_backward(x, W_packed)


def project_gradients(x: Tensor, W_packed: Tensor, dy: Tensor, needed: Sequence[bool]) -> Grads:
    """``launches.project_gradients`` through its operator."""
    return _wanted(project_backward(x, W_packed, dy, list(needed)), needed)


def _project_grads(ctx: Any, dy: Tensor) -> Grads:
    x, W_packed = ctx.saved_tensors
    return project_gradients(x, W_packed, dy, ctx.needs_input_grad)


_differentiable(project, _project_grads, _save_project)


# Attention over packed operands


@torch.library.custom_op("ra_triton::attention", mutates_args=())
def attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    seed: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    dropout_p: float,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """``(out [B, T_q, H, D], lse [B, H, T_q])``."""
    options = _options(causal, softmax_scale, dropout_p, window_left, window_right, softcap)
    offsets = unflat(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    offsets = offsets and offsets.within(q_pack.shape[1], k_pack.shape[1])
    return launches.attend(q_pack, k_pack, v, options, seed, offsets=offsets)


@attention.register_fake
def _(q_pack: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q_pack.shape
    return q_pack.new_empty(q_pack.shape), q_pack.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("ra_triton::attention_backward", mutates_args=())
def attention_backward(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
    seed: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    dropout_p: float,
    window_left: int,
    window_right: int,
    softcap: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    needed: Sequence[bool],
) -> Three:
    """``(dq, dk, dv)``."""
    options = _options(causal, softmax_scale, dropout_p, window_left, window_right, softcap)
    offsets = unflat(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    offsets = offsets and offsets.within(q_pack.shape[1], k_pack.shape[1])
    grads = launches.attention_gradients(
        q_pack, k_pack, v, out, lse, do, dlse, seed, options, offsets, needed
    )
    return _present(grads, v)


@attention_backward.register_fake
def _(q_pack: Tensor, k_pack: Tensor, v: Tensor, *others: Any) -> Three:
    return _fake_grads(v, (q_pack.shape, k_pack.shape, v.shape), others[-1])


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
) -> Grads:
    """``launches.attention_gradients`` through its operator."""
    do = torch.zeros_like(out) if do is None else do
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    saved = (q_pack, k_pack, v, out, lse, do, dlse, seed)
    rest = (*numbers(options), *flat(offsets), list(needed))
    return _wanted(attention_backward(*saved, *rest), needed)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_pack, k_pack, v, seed, *numbers, most_q, most_k = inputs
    ctx.numbers, ctx.longest = numbers[:-2], (most_q, most_k)  # a tracer's are symbols
    ctx.save_for_backward(q_pack, k_pack, v, *output, seed, *numbers[-2:])


def _attention_grads(ctx: Any, do: Tensor, dlse: Tensor) -> Grads:
    q_pack, k_pack, v, out, lse, seed, *begins = ctx.saved_tensors
    saved, needed = (q_pack, k_pack, v, out, lse, do, dlse, seed), ctx.needs_input_grad[:3]
    rest = (*ctx.numbers, *begins, *ctx.longest, list(needed))
    grads = _wanted(attention_backward(*saved, *rest), needed)
    return (*grads, *[None] * (len(ctx.needs_input_grad) - 3))


_differentiable(attention, _attention_grads, _save_attention)


# The layer: both of them


@torch.library.custom_op("ra_triton::layer", mutates_args=())
def layer(
    x: Tensor,
    W_packed: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    n_head: int,
    n_kv_head: int,
    causal: bool,
    softmax_scale: float | None,
    dropout_p: float,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> Three:
    """``(out [B, T, H, D], lse [B, H, T], packed [B, T, N])``; only out is differentiable."""
    layout = _layout(W_packed, n_head, n_kv_head)
    options = _options(causal, softmax_scale, dropout_p, window_left, window_right, softcap)
    offsets = unflat(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    offsets = offsets and offsets.within(x.shape[1], x.shape[1])
    return launches.layer(x, W_packed, bias, layout, options, seed, offsets=offsets)


@layer.register_fake
def _(
    x: Tensor,
    W_packed: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    n_head: int,
    n_kv_head: int,
    *others: Any,
) -> Three:
    B, T, _ = x.shape
    D = _layout(W_packed, n_head, n_kv_head).head_dim
    lse = x.new_empty((B, n_head, T), dtype=torch.float32)
    return x.new_empty((B, T, n_head, D)), lse, x.new_empty((B, T, W_packed.shape[1]))


@torch.library.custom_op("ra_triton::layer_backward", mutates_args=())
def layer_backward(
    x: Tensor,
    W_packed: Tensor,
    packed: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    seed: Tensor | None,
    n_head: int,
    n_kv_head: int,
    causal: bool,
    softmax_scale: float | None,
    dropout_p: float,
    window_left: int,
    window_right: int,
    softcap: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    needed: Sequence[bool],
) -> Three:
    """``(dx, dW, dbias)``."""
    layout = _layout(W_packed, n_head, n_kv_head)
    options = _options(causal, softmax_scale, dropout_p, window_left, window_right, softcap)
    offsets = unflat(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    offsets = offsets and offsets.within(x.shape[1], x.shape[1])
    grads = launches.layer_gradients(
        x, W_packed, packed, out, lse, do, layout, options, seed, offsets, needed
    )
    return _present(grads, x)


@layer_backward.register_fake
def _(x: Tensor, W_packed: Tensor, *others: Any) -> Three:
    return _fake_grads(x, (x.shape, W_packed.shape, W_packed.shape[1:]), others[-1])


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
) -> Grads:
    """``launches.layer_gradients`` through its operator."""
    saved = (x, W_packed, packed, out, lse, do, seed)
    heads = (layout.n_head, layout.n_kv_head)
    rest = (*heads, *numbers(options), *flat(offsets), list(needed))
    return _wanted(layer_backward(*saved, *rest), needed)


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    x, W_packed, _, seed, *numbers, most_q, most_k = inputs
    ctx.numbers, ctx.longest = numbers[:-2], (most_q, most_k)
    out, lse, packed = output
    ctx.mark_non_differentiable(lse, packed)
    ctx.set_materialize_grads(False)  # else backward gets zeros as large as packed
    ctx.save_for_backward(x, W_packed, packed, out, lse, seed, *numbers[-2:])


def _layer_grads(ctx: Any, do: Tensor | None, *_: Any) -> Grads:
    x, W_packed, packed, out, lse, seed, *begins = ctx.saved_tensors
    do = torch.zeros_like(out) if do is None else do
    saved, needed = (x, W_packed, packed, out, lse, do, seed), ctx.needs_input_grad[:3]
    rest = (*ctx.numbers, *begins, *ctx.longest, list(needed))
    grads = _wanted(layer_backward(*saved, *rest), needed)
    return (*grads, *[None] * (len(ctx.needs_input_grad) - 3))


_differentiable(layer, _layer_grads, _save_layer)


# Lane exchange, norm and rotation


@torch.library.custom_op("ra_triton::norm_rope", mutates_args=())
def norm_rope(
    q: Tensor,
    k: Tensor,
    q_low: Tensor | None,
    k_low: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    rope_dims: int,
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    """``(q [B, T, H, D], k [B, T, H_kv, D])``: a :class:`NormRope`, field by field."""
    tensors = (q, k, q_low, k_low, q_weight, k_weight, cos, sin, positions)
    return launches.norm_rope(NormRope._make((*tensors, rope_dims, eps)))


@norm_rope.register_fake
def _(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("ra_triton::norm_rope_backward", mutates_args=())
def norm_rope_backward(
    q: Tensor,
    k: Tensor,
    q_low: Tensor | None,
    k_low: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    rope_dims: int,
    eps: float | None,
    dq_pack: Tensor,
    dk_pack: Tensor,
    needed: Sequence[bool],
) -> Six:
    """``(dq, dk, dq_low, dk_low, dq_weight, dk_weight)``."""
    tensors = (q, k, q_low, k_low, q_weight, k_weight, cos, sin, positions)
    call = NormRope._make((*tensors, rope_dims, eps))
    grads = launches.norm_rope_gradients(call, dq_pack, dk_pack, needed)
    dq, dk, dq_low, dk_low, dq_w, dk_w = (q.new_empty(0) if t is None else t for t in grads)
    return dq, dk, dq_low, dk_low, dq_w, dk_w


@norm_rope_backward.register_fake
def _(*args: Any) -> Six:
    dq, dk, dq_low, dk_low, dq_w, dk_w = (
        t.new_empty(t.shape) if need else args[0].new_empty(0)
        for t, need in zip(args[:6], args[-1], strict=True)
    )
    return dq, dk, dq_low, dk_low, dq_w, dk_w


def norm_rope_gradients(
    call: NormRope, dq_pack: Tensor, dk_pack: Tensor, needed: Sequence[bool]
) -> Grads:
    """``launches.norm_rope_gradients`` through its operator."""
    grads = norm_rope_backward(*call, dq_pack, dk_pack, list(needed))
    return tuple(t if need else None for t, need in zip(grads, needed, strict=True))


def _save_norm_rope(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.rope_dims, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_rope_grads(ctx: Any, dq_pack: Tensor, dk_pack: Tensor) -> Grads:
    call = NormRope._make((*ctx.saved_tensors, ctx.rope_dims, ctx.eps))
    grads = norm_rope_gradients(call, dq_pack, dk_pack, ctx.needs_input_grad[:6])
    return (*grads, *[None] * 5)


_differentiable(norm_rope, _norm_rope_grads, _save_norm_rope)


# A key/value cache: reading and appending, without gradients


@torch.library.custom_op("ra_triton::decode", mutates_args=())
def decode(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    lengths: Tensor,
    left: int,
    softmax_scale: float | None,
    softcap: float,
    max_length: int,
) -> Tensor:
    """``[B, T_q, H, D]``."""
    options = AttentionOptions(softmax_scale=softmax_scale, window_size=(left, -1), softcap=softcap)
    return launches.decode(q_pack, k_pack, v, lengths, options, max_length)


@decode.register_fake
def _(q_pack: Tensor, *others: Any) -> Tensor:
    return q_pack.new_empty(q_pack.shape)


@torch.library.custom_op("ra_triton::append_", mutates_args=("k_cache", "v_cache", "lengths"))
def append_(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """``k, v [B, T, H_kv, D]`` after ``lengths``."""
    launches.append_(k_cache, v_cache, lengths, k, v)


@append_.register_fake
def _(*tensors: Tensor) -> None:
    return None


def _refuse(ctx: Any, *_: Any) -> Grads:
    raise RuntimeError("the Triton kernels cannot differentiate twice; use backend='sdpa'")


for _backward in (project_backward, attention_backward, layer_backward, norm_rope_backward):
    _backward.register_autograd(_refuse)


# Projection from an int8 weight: inference, so there is no formula for its gradient


@torch.library.custom_op("ra_triton::project_quantized", mutates_args=())
def project_quantized(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    others: Tensor | None,
    bias: Tensor | None,
    n_head: int,
    n_kv_head: int,
    head_dim: int,
    R: int,
    activations: str,
) -> Tensor:
    """``[B, T, C]`` to ``[B, T, N]``."""
    layout = RALayout(n_head, n_kv_head, head_dim, R)
    return launches.project(x, QuantizedWeight(data, scale, others, layout, activations), bias)


@project_quantized.register_fake
def _(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    others: Tensor | None,
    bias: Tensor | None,
    n_head: int,
    n_kv_head: int,
    head_dim: int,
    *_: Any,
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], (n_head + 2 * n_kv_head) * head_dim)


def project_quantized_of(x: Tensor, W: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """``x @ W + bias`` through the operator."""
    layout = W.layout
    sizes = (layout.n_head, layout.n_kv_head, layout.head_dim, layout.R)
    return project_quantized(x, W.data, W.scale, W.others, bias, *sizes, W.activations)


def _append_to_slices(*_: Any) -> Any:
    raise NotImplementedError("backend='triton': a cache cannot be appended to under vmap")


append_.register_vmap(_append_to_slices)
for _operator in (
    *(project, project_backward, attention, attention_backward, layer, layer_backward),
    *(norm_rope, norm_rope_backward, decode, project_quantized),
):
    _operator.register_vmap(partial(_each_slice, _operator))
