"""Public functions: check the arguments, choose a backend, call it."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ra_triton.backend import choose
from ra_triton.call.norm_rope import NormRope, QKNorm, Rope, check_norm_rope
from ra_triton.call.offsets import Offsets, checked, longest_of
from ra_triton.call.options import AttentionKeywords, AttentionOptions, DecodeOptions
from ra_triton.checks import (
    autocast_dtype,
    check_apart,
    check_attention_inputs,
    check_choice,
    check_decode_inputs,
    check_float_tensor,
    check_no_overlap,
    check_project_inputs,
    check_same,
    check_shape,
    have_addresses,
    needs_grad,
)
from ra_triton.launch import recorded
from ra_triton.weights.layout import WEIGHT_LAYOUTS, RALayout
from ra_triton.weights.quantization import QuantizedWeight
from ra_triton.weights.reduced import ReducedWeight, check_reduced_inputs, tensors_of
from ra_triton.weights.sparsity import SparseWeight
from ra_triton.workspace import Workspace

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's, from Python 3.11 on


def ra_attention(
    x: Tensor,
    W_fused: Tensor | QuantizedWeight | SparseWeight,
    R: int = 4,
    *,
    n_head: int | None = None,
    n_kv_head: int | None = None,
    bias: Tensor | None = None,
    weight_layout: str = "split",
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    check: bool = True,
    workspace: Workspace | None = None,
    backend: str = "auto",
) -> Tensor:
    """Reciprocal self-attention of ``x``: one projection, one flash attention.

    ``softmax(scale * (Q_std K_stdᵀ + K_low Q_lowᵀ)) V`` per head, with all lanes columns of
    ``x @ W_fused``. ``R=0`` is plain attention.

    Args:
        x: ``[B, T, C]`` in float16, bfloat16 or float32, last stride 1. With ``cu_seqlens`` the
            tokens of all sequences, ``[total, C]`` or ``[1, total, C]``.
        W_fused: ``[C, N]``, ``N = (n_head + 2 * n_kv_head) * D``, same dtype and device as ``x``.
            A weight in split order is reordered on each call; a model keeps it packed
            (:func:`pack_weight`) and passes ``weight_layout="packed"``. Or what
            :func:`quantize_weight` or :func:`sparsify_weight` returns, for inference; R and heads
            that are given must be its. The product of a sparse one is PyTorch's on every backend.
        R: reciprocal rank, ``0 <= R <= D``.
        n_head: query heads; ``None`` means heads of 64, GPT-2's. Pass it for heads of another size:
            the number of columns does not determine it.
        n_kv_head: key/value heads (GQA); ``None`` means ``n_head``.
        bias: ``[N]`` in the order of ``W_fused``'s columns.
        weight_layout: ``"split"`` for ``[Q_std|K_std|V|Q_low|K_low]``, ``"packed"`` for
            ``[q_pack|k_pack|V]``; beside a quantized weight the order of ``bias``.
        causal: whether token i sees tokens up to i only.
        softmax_scale: multiplies the scores; ``None`` means ``1/sqrt(D)``, D the packed head dim.
        window_size: ``(left, right)`` keys seen around the diagonal, both ends included; -1: all.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 is off.
        dropout_p: probability of dropping an attention weight; 0 is off.
        cu_seqlens: ``[B + 1]`` int32: sequence b is tokens ``cu_seqlens[b] ... cu_seqlens[b + 1]``
            and sees no other; see :func:`packed_attention_varlen`.
        max_seqlen: tokens of the longest sequence; ``None`` reads it from ``cu_seqlens``, which
            synchronizes.
        check: see :func:`packed_attention_varlen`; without it ``max_seqlen`` has to be given.
        workspace: buffers for a call without gradients, so that a steady state allocates nothing on
            the Triton backend; the result is then valid until the next call with the workspace.
            Compilers plan memory themselves and ignore it.
        backend: ``"triton"``, ``"sdpa"``, ``"flex"``, or ``"auto"``: Triton on a supported GPU,
            SDPA elsewhere.

    Returns:
        ``[B, T, n_head * D]`` in ``x``'s dtype (under autocast, in the autocast dtype); with
        ``cu_seqlens`` ``[total, n_head * D]`` or ``[1, total, n_head * D]``, like ``x``.

    Raises:
        TypeError: not a tensor, dtypes that differ or are not supported, counts that are no ints.
        ValueError: shapes that do not fit, values out of range, different devices; a workspace
            or a quantized weight where a gradient is needed.
        NotImplementedError: the backend lacks an option; the message names one that has it.

    Source: github.com/mcgrof/knlp; flash attention: arXiv:2205.14135, arXiv:2307.08691.
    """
    key = None
    if workspace is None and weight_layout == "packed" and (cu_seqlens is None or check is False):
        heads, numbers = (R, n_head, n_kv_head), (softmax_scale, softcap, dropout_p, max_seqlen)
        given = (*heads, causal, *numbers, repr(window_size), backend)
        key = recorded.key_of((x, W_fused, bias, cu_seqlens), given, 3)
        call = recorded.known(key)
        if call is not None:
            return call.run(x, W_fused, bias, cu_seqlens, cu_seqlens)[0]
    options = AttentionOptions(causal, softmax_scale, window_size, softcap, dropout_p)
    x, W_fused, bias, dtype = _autocast_weights(x, W_fused, bias)
    flattened = cu_seqlens is not None and isinstance(x, Tensor) and x.dim() == 2
    x = x.unsqueeze(0) if flattened else x
    sizes = (R, n_head, n_kv_head)
    layout = _projection_layout(x, W_fused, *sizes, bias, weight_layout, dtype, workspace=workspace)
    offsets = _layer_offsets(x, cu_seqlens, max_seqlen, check)
    if workspace is not None:
        if not isinstance(workspace, Workspace):
            raise TypeError(f"workspace must be a Workspace or None, got {workspace!r}")
        workspace.refuse_gradients(x, *tensors_of(W_fused), bias)
    module, _ = choose(backend, (x, *tensors_of(W_fused), bias), options, layout.head_dim)
    W_packed, bias = _packed(layout, W_fused, bias, weight_layout)
    out = module.layer(x, W_packed, bias, layout, options, workspace, offsets, dtype)
    if not flattened:
        longest = 0 if offsets is None else offsets.max_seqlen_q
        call = module.known_layer(layout, options, longest, dtype, out.requires_grad)
        recorded.keep(key, call)
    return out.squeeze(0) if flattened else out


def project(
    x: Tensor,
    W_fused: Tensor | QuantizedWeight | SparseWeight,
    R: int = 4,
    *,
    n_head: int | None = None,
    n_kv_head: int | None = None,
    bias: Tensor | None = None,
    weight_layout: str = "split",
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused projection: ``x @ W_fused + bias`` as the packed operands of attention.

    Args:
        x: ``[B, T, C]``, last stride 1.
        W_fused: ``[C, N]``, ``N = (n_head + 2 * n_kv_head) * D``, or a quantized or sparse weight.
        R: reciprocal rank, ``0 <= R <= D``.
        n_head: query heads ``H``; ``None`` means heads of 64, see :func:`ra_attention`.
        n_kv_head: key/value heads ``H_kv``; ``None`` means ``n_head``.
        bias: ``[N]`` in the order of ``W_fused``'s columns.
        weight_layout: ``"split"`` or ``"packed"``, see :func:`ra_attention`.
        out: contiguous buffer ``[B, T, H + 2 * H_kv, D]`` that receives the result; no gradients.
        backend: ``"triton"``, ``"sdpa"``, ``"flex"`` or ``"auto"``.

    Returns:
        ``q_pack [B, T, H, D]``, ``k_pack [B, T, H_kv, D]``, ``v [B, T, H_kv, D]``: views of one
        buffer ``[B, T, H + 2 * H_kv, D]`` in ``x``'s dtype.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit, values out of range, ``out`` or a quantized weight
            while a gradient is needed.
        NotImplementedError: the backend cannot run the call.
    """
    key = None
    if out is None and weight_layout == "packed":
        key = recorded.key_of((x, W_fused, bias), ("project", R, n_head, n_kv_head, backend))
        call = recorded.known(key)
        if call is not None:
            (y,) = call.run(x, W_fused, bias)
            return RALayout.from_columns(W_fused.shape[1], R, n_head, n_kv_head).views(y)
    x, W_fused, bias, dtype = _autocast_weights(x, W_fused, bias)
    sizes = (R, n_head, n_kv_head)
    layout = _projection_layout(x, W_fused, *sizes, bias, weight_layout, dtype, out=out)
    if out is not None:
        check_float_tensor("out", out)
        check_same("x", x if dtype is None else x.to(dtype), out=out)
        shape = (*x.shape[:2], layout.packed_heads, layout.head_dim)
        check_shape("out", out, shape, "[B, T, H + 2 * H_kv, D]")
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous, got strides {out.stride()}")
        read = [("x", x), *(("W_fused", t) for t in tensors_of(W_fused)), ("bias", bias)]
        for name, t in read:
            if t is not None and out.numel() and _shared(t, out):
                raise ValueError(f"out must not share memory with {name}")
        if needs_grad(x, *tensors_of(W_fused), bias, out):
            raise ValueError("out cannot be used while a gradient is needed; use torch.no_grad()")
        out = out.flatten(2)
    module, _ = choose(backend, (x, *tensors_of(W_fused), bias))
    W_packed, bias = _packed(layout, W_fused, bias, weight_layout)
    y = module.project(x, W_packed, bias, out, dtype)
    recorded.keep(key, module.known_project(dtype, y.requires_grad))
    return layout.views(y)


@overload
def packed_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: "Unpack[AttentionKeywords]",
) -> Tensor: ...
@overload
def packed_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    **options: "Unpack[AttentionKeywords]",
) -> tuple[Tensor, Tensor]: ...
@overload
def packed_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    *,
    return_lse: bool,
    **options: "Unpack[AttentionKeywords]",
) -> Tensor | tuple[Tensor, Tensor]: ...
def packed_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Flash attention over packed operands: ``softmax(scale * q_pack k_packᵀ) v``.

    Args:
        q_pack: ``[B, T_q, H, D]``, ``[w_std * Q_std | w_rec * K_low]`` per head, last stride 1.
        k_pack: ``[B, T_k, H_kv, D]``, ``[K_std | Q_low]``; ``H_kv`` divides ``H`` (GQA).
        v: ``[B, T_k, H_kv, D]``.
        causal: bottom-right aligned: query i sees keys up to ``i + T_k - T_q``.
        softmax_scale: see :func:`ra_attention`.
        window_size: see :func:`ra_attention`.
        softcap: see :func:`ra_attention`.
        dropout_p: see :func:`ra_attention`.
        return_lse: also return the logsumexp of the scaled scores.
        backend: ``"triton"``, ``"sdpa"``, ``"flex"`` or ``"auto"``.

    Returns:
        ``[B, T_q, H, D]`` in the operands' dtype; with ``return_lse`` also ``[B, H, T_q]`` float32,
        natural logarithm. A query with no allowed key gives 0 and ``-inf``.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit, values out of range.
        NotImplementedError: the backend lacks an option; the message names one that has it.
    """
    given = (causal, softmax_scale, repr(window_size), softcap, dropout_p, return_lse, backend)
    key = recorded.key_of((q_pack, k_pack, v), given)
    call = recorded.known(key)
    if call is not None:
        results = call.run(q_pack, k_pack, v)
        return results if return_lse else results[0]
    dtype = _autocast_of(q_pack)
    check_attention_inputs(q_pack, k_pack, v, dtype)
    options = AttentionOptions(causal, softmax_scale, window_size, softcap, dropout_p, return_lse)
    module, _ = choose(backend, (q_pack, k_pack, v), options, q_pack.shape[-1])
    out, lse = module.packed_attention(q_pack, k_pack, v, options, None, dtype)
    recorded.keep(key, module.known_attention(options, (0, 0), dtype, out.requires_grad))
    return (out, lse) if return_lse else out


def decode_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    max_length: int | None = None,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of each sequence's last tokens over a key/value cache, for generation.

    What FlashAttention calls ``flash_attn_with_kvcache``, without the writing: the new tokens'
    keys and values are in the cache already (``nn.KVCache.append``). Causal per sequence: query i
    of ``T_q`` sees the keys up to ``lengths - T_q + i``. The lengths are read on the device, so a
    captured call follows them.

    Args:
        q_pack: ``[B, T_q, H, D]``, last stride 1; ``T_q <= 16`` with the Triton kernels.
        k_pack: ``[B, max_len, H_kv, D]``; ``H_kv`` divides ``H``, and the query heads of a group
            share one load of a key. What lies beyond a length is never read.
        v: ``[B, max_len, H_kv, D]``.
        lengths: ``[B]`` int32, valid keys of each sequence, the new ones included. Their values are
            not checked, which would synchronize: one below 0 counts as 0, one beyond the cache as
            ``max_len``.
        max_length: an upper bound of the lengths, if the host knows one: fewer programs to launch,
            the same bits. Of a sequence beyond it the result is wrong, but read within the cache.
        softmax_scale: see :func:`ra_attention`.
        window_size: see :func:`ra_attention`; the right side is 0 at most, as without a window.
        softcap: see :func:`ra_attention`.
        backend: ``"triton"``, ``"sdpa"`` or ``"auto"``.

    Returns:
        ``[B, T_q, H, D]`` in the operands' dtype. A query with no key gives 0. On the Triton
        backend the bits of a sequence depend neither on the others nor on their number.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit, values out of range, a gradient that is needed.
        NotImplementedError: the backend lacks an option; the message names one that has it.

    Source: Flash-Decoding, pytorch.org/blog/flash-decoding.
    """
    given = (max_length, softmax_scale, repr(window_size), softcap, backend)
    key = recorded.key_of((q_pack, k_pack, v, lengths), ("decode", *given))
    call = recorded.known(key)
    if call is not None:
        return call.run(q_pack, k_pack, v, lengths)[0]
    q_pack, k_pack, v = _autocast(q_pack, k_pack, v)
    check_decode_inputs(q_pack, k_pack, v, lengths, max_length)
    T_q, D = q_pack.shape[1], q_pack.shape[-1]
    options = DecodeOptions(True, softmax_scale, window_size, softcap, n_queries=T_q)
    if needs_grad(q_pack, k_pack, v):
        raise ValueError(
            "decode_attention has no gradient; use torch.no_grad(), or packed_attention"
        )
    module, _ = choose(backend, (q_pack, k_pack, v), options, D)
    max_length = k_pack.shape[1] if max_length is None else max_length
    out = module.decode_attention(q_pack, k_pack, v, lengths, options, max_length)
    if _autocast_of(q_pack) is None:
        recorded.keep(key, module.known_decode(options, max_length))
    return out


def which_backend(q_pack: Tensor, k_pack: Tensor, v: Tensor, **options: Any) -> str:
    """What ``packed_attention`` with ``backend="auto"`` would run, and why: ``"sdpa: ..."``.

    Args:
        q_pack: as for :func:`packed_attention`.
        k_pack: as for :func:`packed_attention`.
        v: as for :func:`packed_attention`.
        **options: the options of :func:`packed_attention`, ``return_lse`` included.

    Returns:
        The backend's name, a colon and the reason.

    Raises:
        TypeError: an unknown option; and whatever :func:`packed_attention` would raise.
    """
    known = [field.name for field in fields(AttentionOptions)]
    for name in options:
        if name not in known:
            raise TypeError(f"which_backend has no option {name!r}, only {', '.join(known)}")
    q_pack, k_pack, v = _autocast(q_pack, k_pack, v)
    check_attention_inputs(q_pack, k_pack, v)
    module, reason = choose(
        "auto", (q_pack, k_pack, v), AttentionOptions(**options), q_pack.shape[-1]
    )
    return f"{module.__name__.rpartition('.')[2]}: {reason}"


def pack_qk(
    q: Tensor,
    k: Tensor,
    q_low: Tensor | None = None,
    k_low: Tensor | None = None,
    *,
    rope: Rope | None = None,
    position: int | Tensor = 0,
    rope_dims: int | None = None,
    qk_norm: QKNorm = False,
    norm_eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exchange lanes, then norm, then rotate: ``[q_std|k_low]`` and ``[k_std|q_low]`` and on.

    For operands that do not come out of one GEMM, and for steps between the GEMM and attention;
    each is optional. The norm is an RMS norm over all D lanes of the packed head; the rotation
    turns lane i with lane ``i + rope_dims / 2``, as Llama does. So packed weights are those of a
    Llama with ``rope`` over all lanes, and of a Qwen3 with ``qk_norm`` too. A rotation of all lanes
    mixes low lanes with standard ones; ``rope_dims <= D - R`` leaves the low ones without position.
    Equations: :mod:`ra_triton.call.norm_rope`.

    Args:
        q: ``[B, T, H, D]``; its last R lanes are dropped where ``k_low`` is given.
        k: ``[B, T, H_kv, D]``; likewise.
        q_low: ``[B, T, H_kv, R]``, ``R <= D``: what the keys carry; None where q and k come packed.
        k_low: ``[B, T, H, R]``: what the queries carry; None together with ``q_low``.
        rope: ``(cos, sin)``, ``[T_max, rope_dims / 2]`` each, or ``[T_max, rope_dims]`` with both
            halves alike, as Hugging Face has them; float32 or q's dtype, no gradients. Tables for
            interleaved lanes (GPT-J's) are wrong here, which only a CPU detects.
        position: rows of the tables. An int: the first token's. An int32 or int64
            tensor on q's device: ``[B]`` (or a scalar), each sequence's first, or ``[B, T]``; it is
            read on the device alone, and rotated lanes of a position below 0 or beyond the tables
            are NaN.
        rope_dims: how many lanes turn, an even number; None: all D.
        qk_norm: True, or ``(q_weight, k_weight)``, ``[D]`` each, float32 or q's dtype.
        norm_eps: added to the mean square.
        backend: ``"triton"``, ``"sdpa"``, ``"flex"`` (both: plain torch) or ``"auto"``.

    Returns:
        New tensors ``[B, T, H, D]`` and ``[B, T, H_kv, D]``, differentiable in all but the tables.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit, values out of range, nothing to do.
        NotImplementedError: the backend cannot run the call.

    Source: RoPE: arXiv:2104.09864; QK-norm: arXiv:2010.04245.
    """
    call = _norm_rope_call(q, k, q_low, k_low, rope, position, rope_dims, qk_norm, norm_eps)
    module, _ = choose(backend, call[:6])
    if call.eps is not None or call.cos is not None:
        return module.norm_rope(call)
    return module.pack_qk(q, k, q_low, k_low)


def pack_qk_(
    q: Tensor,
    k: Tensor,
    q_low: Tensor | None = None,
    k_low: Tensor | None = None,
    *,
    rope: Rope | None = None,
    position: int | Tensor = 0,
    rope_dims: int | None = None,
    qk_norm: QKNorm = False,
    norm_eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`pack_qk` in place: ``q[..., D-R:] = k_low``, ``k[..., D-R:] = q_low``, norm, rotation.

    Inference only. One pass over q and k, which may be views of the GEMM's own buffer. The exchange
    alone writes the last R lanes, 2R of 2D; a rotation also those that turn, a norm all of them.
    The sources may be views of the same buffer, the lanes that are overwritten included.
    Arguments, their shapes and the errors are those of :func:`pack_qk`.

    Returns:
        ``(q, k)``, the same tensors, now packed.

    Raises:
        ValueError: also when a gradient is needed, when ``q`` or ``k`` is expanded, or when they
            share memory, which is noticed where their strides are the same.
    """
    call = _norm_rope_call(q, k, q_low, k_low, rope, position, rope_dims, qk_norm, norm_eps)
    check_no_overlap("q", q)
    check_no_overlap("k", k)
    if have_addresses(q, k):
        check_apart("k", k, "q", q)
    if needs_grad(*call[:6]):
        raise ValueError("pack_qk_ is for inference; use pack_qk, or torch.no_grad()")
    module, _ = choose(backend, call[:6])
    # Sources that overlap q or k are copied before those are written.
    sources = (None if t is None else _apart_from(t, (q, k)) for t in call[2:9])
    call = NormRope._make((q, k, *sources, call.rope_dims, call.eps))
    if call.eps is not None or call.cos is not None:
        module.norm_rope_(call)
    else:
        module.pack_qk_(q, k, call.q_low, call.k_low)
    return q, k


def _norm_rope_call(*args: Any) -> NormRope:
    """The checked arguments of ``pack_qk`` and ``pack_qk_``."""
    call = check_norm_rope(*args)
    if call.q_low is None and call.cos is None and call.eps is None:
        raise ValueError("nothing to do: give q_low and k_low, rope or qk_norm")
    return call


def _projection_layout(
    x: Tensor,
    W_fused: Tensor | ReducedWeight,
    R: int,
    n_head: int | None,
    n_kv_head: int | None,
    bias: Tensor | None,
    weight_layout: str,
    dtype: torch.dtype | None,
    **buffers: object,
) -> RALayout:
    """Check the arguments of a projection in ``dtype``, None: in theirs, and derive its sizes."""
    check_choice("weight_layout", weight_layout, WEIGHT_LAYOUTS)
    if isinstance(W_fused, ReducedWeight):
        check_reduced_inputs(x, W_fused, bias, R, n_head, n_kv_head)
        for name, buffer in buffers.items():
            if buffer is not None and isinstance(W_fused, SparseWeight):
                raise ValueError(
                    f"{name} cannot be used with a sparse weight, whose product is new"
                )
        return W_fused.layout
    check_project_inputs(x, W_fused, bias, dtype=dtype)
    return RALayout.from_columns(W_fused.shape[1], R, n_head, n_kv_head)


def _layer_offsets(
    x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, check: bool
) -> Offsets | None:
    """The offsets of self-attention over ``x [1, total, C]``, checked; None for ``[B, T, C]``."""
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"max_seqlen needs cu_seqlens, got {max_seqlen} alone")
        return None
    if len(x) != 1:
        raise ValueError(
            f"x must be [total, C] or [1, total, C] with cu_seqlens, got {tuple(x.shape)}"
        )
    total, twice = x.shape[1], (cu_seqlens, cu_seqlens)
    if max_seqlen is None:
        max_seqlen = longest_of(cu_seqlens, total, x.device, check=check)
    pairs = (twice, (max_seqlen, max_seqlen), (total, total))
    return checked(*pairs, x.device, check=check, names=("", ""))


def _packed(
    layout: RALayout,
    W_fused: Tensor | ReducedWeight,
    bias: Tensor | None,
    weight_layout: str,
) -> tuple[Tensor | ReducedWeight, Tensor | None]:
    """Weight and bias in packed order."""
    if weight_layout == "packed":
        return W_fused, bias
    bias = None if bias is None else layout.pack(bias)
    return W_fused if isinstance(W_fused, ReducedWeight) else layout.pack(W_fused), bias


def _autocast_weights(x: Any, W_fused: Any, bias: Any) -> tuple[Any, Any, Any, torch.dtype | None]:
    """The dtype that autocast asks for, or None, and what is not cast where it is multiplied.

    That is a weight that has no gradient, and what it is multiplied with.
    """
    if isinstance(W_fused, Tensor):
        return x, W_fused, bias, _autocast_of(x)
    return *_autocast(x, W_fused, bias), None


def _autocast_of(x: Any) -> torch.dtype | None:
    """The dtype that autocast asks for; None where it is off."""
    device = getattr(x, "device", None)
    return autocast_dtype(device) if isinstance(device, torch.device) else None


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """Float tensors in the autocast dtype where autocast is on; everything else unchanged."""
    dtype = _autocast_of(tensors[0])
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype=dtype)
        if isinstance(t, QuantizedWeight) or (isinstance(t, Tensor) and t.is_floating_point())
        else t
        for t in tensors
    )


def _apart_from(source: Tensor, written: tuple[Tensor, ...]) -> Tensor:
    """``source``, copied if it lives in the same storage as a tensor that will be written.

    A compiler has no data pointers, and drops the copies that it finds unnecessary.
    """
    known = have_addresses(source, *written)
    shared = not known or any(_shared(t, source) for t in written)
    return source.clone() if shared else source


def _shared(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of one memory, as far as they show it."""
    if not have_addresses(a, b):
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
