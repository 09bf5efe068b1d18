"""The operators: what each launches, forward and backward, and the shapes of its results.

Kernels are imported by the first call, so that a process that never launches needs no Triton.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ra_triton.backend.triton.flops import gemm, scores
from ra_triton.backend.triton.operator import (
    LONGEST,
    SCORES,
    Backward,
    Dtypes,
    Operator,
    Results,
    gradient_like,
    is_transposed,
)
from ra_triton.call.norm_rope import NormRope
from ra_triton.call.offsets import Offsets
from ra_triton.call.options import Scores
from ra_triton.checks import refuse_context_parallel
from ra_triton.weights.factors import TENSORS, Factors
from ra_triton.weights.layout import Columns, RALayout
from ra_triton.weights.quantization import QuantizedWeight
from ra_triton.workspace import Workspace

OFFSETS = "cu_seqlens_q?, cu_seqlens_k?"

# Projection: y = x W + bias


def launch_projection(
    x: Tensor,
    W_packed: Tensor | QuantizedWeight,
    bias: Tensor | None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> tuple[Tensor]:
    """``x [B, T, C] @ W_packed [C, N] + bias``, into ``out`` if given."""
    if isinstance(W_packed, QuantizedWeight):
        return (_launch_quantized(x, W_packed, bias, out, workspace),)
    from ra_triton.kernels.projection.forward import projection

    return (projection(x, W_packed, bias, out),)


def _project_fake(x: Tensor, W_packed: Tensor, bias: Tensor | None) -> Results:
    return (x.new_empty(x.shape[0], x.shape[1], W_packed.shape[1]),)


def _project_backward(call: Backward) -> Results:
    (x, W_packed, bias), (dy,) = call.tensors, call.incoming
    if dy is None:
        pairs = zip(call.tensors, call.needed, strict=True)
        return tuple(gradient_like(t).zero_() if need else None for t, need in pairs)
    return _projection_gradients(x, W_packed, bias, dy.contiguous(), call.needed, call.dtypes)


def _projection_gradients(
    x: Tensor,
    W_packed: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    needed: Sequence[bool],
    dtypes: Dtypes,
) -> Results:
    """``(dx, dW, dbias)`` for a contiguous ``dy [B, T, N]``."""
    from ra_triton.kernels.projection.backward import bias_gradient, weight_gradient
    from ra_triton.kernels.projection.forward import projection

    return (
        projection(dy, W_packed.mT, None, stage="input_gradient") if needed[0] else None,
        weight_gradient(x, dy, gradient_like(W_packed, dtypes[1])) if needed[1] else None,
        bias_gradient(dy, dtypes[2]) if needed[2] else None,
    )


project = Operator(
    "project",
    "x, W_packed, bias?",
    "",
    "y",
    forward=launch_projection,
    fake=_project_fake,
    backward=_project_backward,
    inputs=3,
    flops=lambda x, W_packed, *_, **__: gemm(x, W_packed.shape[1]),
    flops_backward=lambda tensors, needed: sum(needed[:2]) * gemm(tensors[0], tensors[1].shape[1]),
)


# Attention over packed operands


def launch_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    *constants: Any,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out [B, T_q, H, D], lse [B, H, T_q])``, new unless given; with offsets B is 1.

    A token behind the last sequence gives 0 and ``-inf``, as a query without keys.
    """
    from ra_triton.kernels.attention.forward import attention_forward

    refuse_context_parallel()  # here too, for a compiled call
    offsets = _offsets(q_pack, k_pack, cu_seqlens_q, cu_seqlens_k, constants[6:])
    if offsets is not None and not offsets.complete:
        (B, T_q, H, _), device = q_pack.shape, q_pack.device
        out = torch.empty(q_pack.shape, dtype=q_pack.dtype, device=device) if out is None else out
        lse = torch.empty((B, H, T_q), dtype=torch.float32, device=device) if lse is None else lse
        out.zero_(), lse.fill_(-math.inf)
    keywords = _keywords(Scores(*constants[:6]), seed, offsets)
    return attention_forward(q_pack, k_pack, v, o=out, lse=lse, **keywords)


def _keywords(options: Scores, seed: Tensor | None, offsets: Offsets | None) -> dict[str, Any]:
    """Options as the kernels of attention take them."""
    return {
        "causal": options.causal,
        "softmax_scale": options.softmax_scale,
        "window_size": (options.window_left, options.window_right),
        "softcap": options.softcap,
        "dropout_p": options.dropout_p,
        "seed": seed,
        "offsets": offsets,
    }


def _attention_fake(q_pack: Tensor, *others: Any) -> Results:
    B, T, H, _ = q_pack.shape
    return q_pack.new_empty(q_pack.shape), q_pack.new_empty((B, H, T), dtype=torch.float32)


def _attention_backward(call: Backward, *constants: Any) -> Results:
    q, k, v, cu_seqlens_q, cu_seqlens_k, seed = call.tensors
    offsets = _offsets(q, k, cu_seqlens_q, cu_seqlens_k, constants[6:])
    operands = (q, k, v)
    pairs = zip(operands, call.needed, strict=True)
    grads = tuple(_new_gradient(t, offsets) if need else None for t, need in pairs)
    options = Scores(*constants[:6])
    _attention_gradients(operands, call.outputs, call.incoming, grads, options, seed, offsets)
    return grads


def _attention_gradients(
    operands: Sequence[Tensor],
    outputs: Sequence[Tensor],
    incoming: Sequence[Tensor | None],
    grads: Results,
    options: Scores,
    seed: Tensor | None,
    offsets: Offsets | None,
) -> None:
    """Write the gradients into those of dq, dk and dv that are not None."""
    from ra_triton.kernels.attention.backward import attention_backward

    (q, k, v), (out, lse), (do, dlse), (dq, dk, dv) = operands, outputs, incoming, grads
    do = torch.zeros_like(out) if do is None else do
    keywords = _keywords(options, seed, offsets)
    attention_backward(q, k, v, out, lse, do, dq, dk, dv, dlse=dlse, **keywords)


def _new_gradient(t: Tensor, offsets: Offsets | None) -> Tensor:
    """Memory for a gradient of ``t``; zeros where no sequence may write some of it."""
    complete = offsets is None or offsets.complete
    return t.new_empty(t.shape) if complete else t.new_zeros(t.shape)


def _offsets(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    constants: Sequence[Any],
) -> Offsets | None:
    """The offsets of ``q [B, T_q, ...]`` and ``k [B, T_k, ...]``, whose lengths a trace lacked."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return None
    offsets = Offsets(cu_seqlens_q, cu_seqlens_k, *constants)
    return offsets.within(q.shape[1], k.shape[1])


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *args: Any, **_: Any) -> int:
    return 2 * scores(q, k.shape[1], (*args[:2], *args[9:11]))


def _attention_backward_flops(
    tensors: Sequence[Any], needed: Sequence[bool], *constants: Any
) -> int:
    dq, dk, dv = needed
    products = 1 + (dq or dk) + dq + dk + dv  # scores, dP, and the gradients
    T_k = tensors[1].shape[1]
    return products * scores(tensors[0], T_k, (*tensors[3:5], *constants[6:8]))


attention = Operator(
    "attention",
    f"q_pack, k_pack, v, {OFFSETS}, seed?",
    f"{SCORES}, {LONGEST}",
    "out, lse",
    forward=launch_attention,
    fake=_attention_fake,
    backward=_attention_backward,
    inputs=3,
    differentiable=2,
    saves_outputs=True,
    flops=_attention_flops,
    flops_backward=_attention_backward_flops,
)


# The layer: projection and attention


def launch_layer(
    x: Tensor,
    W_packed: Tensor | QuantizedWeight,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    n_head: int,
    n_kv_head: int,
    *constants: Any,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out [B, T, H * D], lse [B, H, T], packed [B, T, N])``, with a workspace its buffers."""
    (B, T, _), layout = x.shape, _layout(W_packed, n_head, n_kv_head)
    packed, out, lse = (
        torch.empty(shape, dtype=dtype, device=x.device)
        if workspace is None
        else workspace.buffer(name, shape, dtype, x.device)
        for name, shape, dtype in (
            ("packed", (B, T, layout.columns), x.dtype),
            ("out", (B, T, n_head, layout.head_dim), x.dtype),
            ("lse", (B, n_head, T), torch.float32),
        )
    )
    launch_projection(x, W_packed, bias, packed, workspace)
    operands = (*layout.views(packed), cu_seqlens_q, cu_seqlens_k, seed)
    launch_attention(*operands, *constants, out=out, lse=lse)
    return out.flatten(2), lse, packed


def _layout(W_packed: Tensor | QuantizedWeight, n_head: int, n_kv_head: int) -> RALayout:
    return RALayout(n_head, n_kv_head, W_packed.shape[1] // (n_head + 2 * n_kv_head), 0)


def _layer_fake(x: Tensor, W_packed: Tensor, *args: Any) -> Results:
    B, T, _ = x.shape
    n_head, n_kv_head = args[4:6]
    D = _layout(W_packed, n_head, n_kv_head).head_dim
    lse = x.new_empty((B, n_head, T), dtype=torch.float32)
    return x.new_empty((B, T, n_head * D)), lse, x.new_empty((B, T, W_packed.shape[1]))


def _layer_backward(call: Backward, *constants: Any) -> Results:
    x, W_packed, bias, cu_seqlens_q, cu_seqlens_k, seed = call.tensors
    (out, lse, packed), (do,) = call.outputs, call.incoming
    offsets = _offsets(x, x, cu_seqlens_q, cu_seqlens_k, constants[8:])
    layout, options = _layout(W_packed, *constants[:2]), Scores(*constants[2:8])
    heads = (*x.shape[:2], layout.n_head, layout.head_dim)
    out, do = out.view(heads), None if do is None else do.reshape(heads)
    # dq, dk and dv share one buffer, so that dx and dW are one GEMM each.
    dpacked = _new_gradient(packed, offsets)
    operands, grads = layout.views(packed), layout.views(dpacked)
    _attention_gradients(operands, (out, lse), (do, None), grads, options, seed, offsets)
    return _projection_gradients(x, W_packed, bias, dpacked, call.needed, call.dtypes)


def _layer_flops(x: Tensor, W_packed: Tensor, *args: Any, out_val: Any = None, **_: Any) -> int:
    n_head, n_kv_head = args[4:6]
    D = W_packed.shape[1] // (n_head + 2 * n_kv_head)
    q = x.new_empty((*x.shape[:2], n_head, D), device="meta")
    offsets = (*args[1:3], *args[12:14])
    return gemm(x, W_packed.shape[1]) + 2 * scores(q, x.shape[1], offsets)


def _layer_backward_flops(tensors: Sequence[Any], needed: Sequence[bool], *constants: Any) -> int:
    x, W_packed = tensors[:2]
    layout = _layout(W_packed, *constants[:2])
    q = x.new_empty((*x.shape[:2], layout.n_head, layout.head_dim), device="meta")
    attention = 5 * scores(q, x.shape[1], (*tensors[3:5], *constants[8:10]))
    return attention + sum(needed[:2]) * gemm(x, W_packed.shape[1])


layer = Operator(
    "layer",
    f"x, W_packed, bias?, {OFFSETS}, seed?",
    f"SymInt n_head, SymInt n_kv_head, {SCORES}, {LONGEST}",
    "out, lse, packed",
    forward=launch_layer,
    fake=_layer_fake,
    backward=_layer_backward,
    inputs=3,
    saves_outputs=True,
    flops=_layer_flops,
    flops_backward=_layer_backward_flops,
)


# Lane exchange, norm and rotation: the tensors and constants of a NormRope, field by field


def _norm_rope(*fields: Any) -> Results:
    from ra_triton.kernels.lanes.norm_rope import norm_rope

    return norm_rope(NormRope._make(fields))


def _norm_rope_backward(call: Backward, *constants: Any) -> Results:
    from ra_triton.kernels.lanes.norm_rope_backward import norm_rope_backward

    dq_pack, dk_pack = (
        torch.zeros_like(t) if grad is None else grad
        for t, grad in zip(call.tensors[:2], call.incoming, strict=True)
    )
    fields = NormRope._make((*call.tensors, *constants))
    return norm_rope_backward(fields, dq_pack, dk_pack, call.needed)


norm_rope = Operator(
    "norm_rope",
    "q, k, q_low?, k_low?, q_weight?, k_weight?, cos?, sin?, positions?",
    "int rope_dims, float? eps",
    "q_pack, k_pack",
    forward=_norm_rope,
    fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    backward=_norm_rope_backward,
    inputs=6,
    differentiable=2,
)


# Composing a weight: the tensors and numbers of Factors, field by field


def _compose(*factors: Any) -> Results:
    from ra_triton.kernels.composition.forward import compose

    return compose(Factors._make(factors))


def _compose_fake(*args: Any) -> Results:
    factors = Factors._make(args)
    W_q, N = factors.W_q, factors.layout.columns
    W_fused = W_q.new_empty((W_q.shape[0], N), dtype=factors.dtype)
    return W_fused, None if factors.b_q is None else W_q.new_empty(N, dtype=factors.dtype)


def _compose_backward(call: Backward, *numbers: Any) -> Results:
    from ra_triton.kernels.composition.backward import compose_gradients

    factors, (dW, dbias) = Factors._make((*call.tensors, *numbers)), call.incoming
    W_q, N, dtype = factors.W_q, factors.layout.columns, factors.dtype
    if dW is None:  # only the bias was used
        dW = W_q.new_zeros((W_q.shape[0], N), dtype=dtype)
    if factors.b_q is None:
        dbias = None
    elif dbias is None and any(call.needed[6:]):
        dbias = W_q.new_zeros(N, dtype=dtype)
    grads = compose_gradients(factors, dW, dbias, call.needed)
    return tuple(
        g if g is None or not is_transposed(t) else gradient_like(t).copy_(g)
        for g, t in zip(grads, call.tensors, strict=True)
    )


def _compose_saved(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Of W_v and b_v only the shapes matter, which those of k have: they may change meanwhile."""
    W_q, W_k, _, W_recip, w_std, w_rec, b_q, b_k, _ = tensors
    return W_q, W_k, W_k, W_recip, w_std, w_rec, b_q, b_k, b_k


def _compose_flops(
    W_q: Tensor, W_k: Tensor, W_v: Tensor, W_recip: Tensor | None, *_: Any, **__: Any
) -> int:
    return 2 * _low_lanes(W_q, W_recip)


def _low_lanes(W_q: Tensor, W_recip: Tensor | None) -> int:
    """``W W_recip``, of the queries' heads, whose keys' are as many."""
    return 0 if W_recip is None else 2 * W_q.numel() * W_recip.shape[-1]


def _compose_backward_flops(tensors: Sequence[Any], needed: Sequence[bool], *numbers: Any) -> int:
    dW_q, dW_k, _, dW_recip, _, dw_rec, *_ = needed
    products = dW_q + dW_k + dW_recip + (dW_recip or dw_rec)
    return products * _low_lanes(tensors[0], tensors[3])


compose = Operator(
    "compose",
    "W_q, W_k, W_v, W_recip?, w_std?, w_rec?, b_q?, b_k?, b_v?",
    "float? std, float? rec, SymInt n_head, SymInt n_kv_head, bool packed, ScalarType dtype",
    "W_fused, bias",
    forward=_compose,
    fake=_compose_fake,
    backward=_compose_backward,
    inputs=TENSORS,
    differentiable=2,
    saved=_compose_saved,
    flops=_compose_flops,
    flops_backward=_compose_backward_flops,
)


# A key/value cache: reading and appending, without gradients


def _decode(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    lengths: Tensor,
    left: int,
    softmax_scale: float | None,
    softcap: float,
    max_length: int,
) -> Results:
    from ra_triton.kernels.attention.decode import decode

    numbers: Any = {"left": left, "softmax_scale": softmax_scale, "softcap": softcap}
    return (decode(q_pack, k_pack, v, lengths.contiguous(), max_length=max_length, **numbers),)


decode = Operator(
    "decode",
    "q_pack, k_pack, v, lengths",
    "int left, float? softmax_scale, float softcap, SymInt max_length",
    "out",
    forward=_decode,
    fake=lambda q_pack, *_: (q_pack.new_empty(q_pack.shape),),
    inputs=3,
    flops=lambda q, *args, **_: 2 * scores(q, args[-1], (None,)),  # as if all were the longest
)


@torch.library.custom_op("ra_triton::append_", mutates_args=("k_cache", "v_cache", "lengths"))
def append_(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """``k, v [B, T, H_kv, D]`` after ``lengths``."""
    launch_append(k_cache, v_cache, lengths, k, v)


def launch_append(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """Overwrites the caches after ``lengths``, and lengths."""
    from ra_triton.kernels.lanes import append

    append.append_(k_cache, v_cache, lengths, k, v)


@append_.register_fake
def _(*tensors: Tensor) -> None:
    return None


def _append_to_slices(*_: Any) -> Any:
    raise NotImplementedError("backend='triton': a cache cannot be appended to under vmap")


append_.register_vmap(_append_to_slices)


# Projection from an int8 weight: inference, so there is no gradient


def _launch_quantized(
    x: Tensor,
    W: QuantizedWeight,
    bias: Tensor | None,
    out: Tensor | None,
    workspace: Workspace | None,
) -> Tensor:
    """The int8 columns, then the others, into one buffer; int8 activations are rounded first."""
    from ra_triton.kernels.projection.int8 import int8_projection, quantize_rows

    B, T, _ = x.shape
    if out is None:
        out = torch.empty((B, T, W.layout.columns), dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    columns = Columns() if W.others is None else W.layout.low_columns
    x_int8, x_scale = x, None
    if W.activations == "int8":
        new = torch.empty if workspace is None else partial(workspace.buffer, "x_int8")
        x_int8 = new(x.shape, dtype=torch.int8, device=x.device)
        x_scale = new((B * T,), dtype=torch.float32, device=x.device)
        quantize_rows(x, x_int8, x_scale)
    int8_projection(x_int8, W.data, x_scale, W.scale, bias, out, columns)
    if W.others is not None:
        int8_projection(x, W.others, None, None, bias, out, W.layout.other_columns)
    return out


def _project_quantized(
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
) -> Results:
    layout = RALayout(n_head, n_kv_head, head_dim, R)
    W = QuantizedWeight(data, scale, others, layout, activations)
    return launch_projection(x, W, bias)


def _project_quantized_fake(x: Tensor, *args: Any) -> Results:
    n_head, n_kv_head, head_dim = args[4:7]
    return (x.new_empty(x.shape[0], x.shape[1], (n_head + 2 * n_kv_head) * head_dim),)


project_quantized = Operator(
    "project_quantized",
    "x, data, scale, others?, bias?",
    "SymInt n_head, SymInt n_kv_head, SymInt head_dim, int R, str activations",
    "y",
    forward=_project_quantized,
    fake=_project_quantized_fake,
    flops=lambda x, *_, out_val, **__: gemm(x, out_val.shape[-1]),
)


def of_quantized(W: QuantizedWeight) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """The tensors and constants of :data:`project_quantized` that stand for a weight."""
    layout = W.layout
    sizes = (layout.n_head, layout.n_kv_head, layout.head_dim, layout.R)
    return (W.data, W.scale, W.others), (*sizes, W.activations)
