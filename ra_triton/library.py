"""The kernels as registered operators, for what is traced: ``torch.ops.ra_triton.*``.

Each has a fake kernel (shapes and strides without data) and an autograd formula whose backward is
an operator too, so a compiled graph holds forward and backward as opaque calls. A gradient that
nobody needs comes back as a tensor of size 0, and leaves the formula as None.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ra_triton import launches
from ra_triton.layout import RALayout
from ra_triton.options import AttentionOptions
from ra_triton.quantization import QuantizedWeight

Grads = tuple[Tensor | None, ...]
Three = tuple[Tensor, Tensor, Tensor]


def _layout(W_packed: Tensor, n_head: int, n_kv_head: int) -> RALayout:
    return RALayout(n_head, n_kv_head, W_packed.shape[1] // (n_head + 2 * n_kv_head), 0)


def _options(causal: bool, softmax_scale: float | None, dropout_p: float) -> AttentionOptions:
    return AttentionOptions(causal=causal, softmax_scale=softmax_scale, dropout_p=dropout_p)


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


project.register_autograd(_project_grads, setup_context=_save_project)


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
) -> tuple[Tensor, Tensor]:
    """``(out [B, T_q, H, D], lse [B, H, T_q])``."""
    return launches.attend(q_pack, k_pack, v, _options(causal, softmax_scale, dropout_p), seed)


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
    needed: Sequence[bool],
) -> Three:
    """``(dq, dk, dv)``."""
    options = _options(causal, softmax_scale, dropout_p)
    grads = launches.attention_gradients(
        q_pack, k_pack, v, out, lse, do, dlse, seed, options, needed
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
    needed: Sequence[bool],
) -> Grads:
    """``launches.attention_gradients`` through its operator."""
    do = torch.zeros_like(out) if do is None else do
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    numbers = (options.causal, options.softmax_scale, options.dropout_p)
    saved = (q_pack, k_pack, v, out, lse, do, dlse, seed)
    return _wanted(attention_backward(*saved, *numbers, list(needed)), needed)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_pack, k_pack, v, seed, *numbers = inputs
    ctx.options = _options(*numbers)
    ctx.save_for_backward(q_pack, k_pack, v, *output, seed)


def _attention_grads(ctx: Any, do: Tensor, dlse: Tensor) -> Grads:
    q_pack, k_pack, v, out, lse, seed = ctx.saved_tensors
    saved = (q_pack, k_pack, v, out, lse, do, dlse, seed)
    grads = attention_gradients(*saved, ctx.options, ctx.needs_input_grad[:3])
    return (*grads, None, None, None, None)


attention.register_autograd(_attention_grads, setup_context=_save_attention)


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
) -> Three:
    """``(out [B, T, H, D], lse [B, H, T], packed [B, T, N])``; only out is differentiable."""
    layout = _layout(W_packed, n_head, n_kv_head)
    return launches.layer(
        x, W_packed, bias, layout, _options(causal, softmax_scale, dropout_p), seed
    )


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
    needed: Sequence[bool],
) -> Three:
    """``(dx, dW, dbias)``."""
    layout = _layout(W_packed, n_head, n_kv_head)
    options = _options(causal, softmax_scale, dropout_p)
    grads = launches.layer_gradients(
        x, W_packed, packed, out, lse, do, layout, options, seed, needed
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
    needed: Sequence[bool],
) -> Grads:
    """``launches.layer_gradients`` through its operator."""
    saved = (x, W_packed, packed, out, lse, do, seed)
    heads = (layout.n_head, layout.n_kv_head)
    numbers = (options.causal, options.softmax_scale, options.dropout_p)
    return _wanted(layer_backward(*saved, *heads, *numbers, list(needed)), needed)


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    x, W_packed, _, seed, n_head, n_kv_head, *numbers = inputs
    out, lse, packed = output
    ctx.layout, ctx.options = _layout(W_packed, n_head, n_kv_head), _options(*numbers)
    ctx.mark_non_differentiable(lse, packed)
    ctx.set_materialize_grads(False)  # else backward gets zeros as large as packed
    ctx.save_for_backward(x, W_packed, packed, out, lse, seed)


def _layer_grads(ctx: Any, do: Tensor | None, *_: Any) -> Grads:
    x, W_packed, packed, out, lse, seed = ctx.saved_tensors
    do = torch.zeros_like(out) if do is None else do
    saved = (x, W_packed, packed, out, lse, do)
    grads = layer_gradients(*saved, ctx.layout, ctx.options, seed, ctx.needs_input_grad[:3])
    return (*grads, *[None] * 6)


layer.register_autograd(_layer_grads, setup_context=_save_layer)


# A key/value cache: reading and appending, without gradients


@torch.library.custom_op("ra_triton::decode", mutates_args=())
def decode(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    lengths: Tensor,
    left: int,
    softmax_scale: float | None,
    max_length: int,
) -> Tensor:
    """``[B, T_q, H, D]``."""
    options = AttentionOptions(softmax_scale=softmax_scale, window_size=(left, -1))
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


for _backward in (project_backward, attention_backward, layer_backward):
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
