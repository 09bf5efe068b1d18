"""Attention over sequences of different lengths, concatenated without padding."""

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from ra_triton.api import _autocast
from ra_triton.backend import choose
from ra_triton.call.offsets import checked
from ra_triton.call.options import AttentionKeywords, AttentionOptions
from ra_triton.checks import (
    check_attention_inputs,
    check_float_tensor,
    check_shape,
    check_unit_stride,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's, from Python 3.11 on


@overload
def packed_attention_varlen(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[False] = ...,
    check: bool = ...,
    **options: "Unpack[AttentionKeywords]",
) -> Tensor: ...
@overload
def packed_attention_varlen(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[True],
    check: bool = ...,
    **options: "Unpack[AttentionKeywords]",
) -> tuple[Tensor, Tensor]: ...
@overload
def packed_attention_varlen(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool,
    check: bool = ...,
    **options: "Unpack[AttentionKeywords]",
) -> Tensor | tuple[Tensor, Tensor]: ...
def packed_attention_varlen(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    check: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`packed_attention` of each of ``B`` sequences, with FlashAttention's arguments.

    Queries ``cu_seqlens_q[b] ... cu_seqlens_q[b + 1]`` see keys ``cu_seqlens_k[b] ...
    cu_seqlens_k[b + 1]`` and no others: not even a NaN passes from one sequence to the next. A
    sequence may be empty, and its numbers of queries and keys may differ. The kernels load through
    pointers, on Hopper too: a TMA load would read on into the next sequence.

    Args:
        q_pack: ``[total_q, H, D]``, the queries of all sequences, last stride 1.
        k_pack: ``[total_k, H_kv, D]``; ``H_kv`` divides ``H`` (GQA).
        v: ``[total_k, H_kv, D]``.
        cu_seqlens_q: ``[B + 1]`` int32 on the same device: 0, then where each sequence ends.
        cu_seqlens_k: likewise for the keys.
        max_seqlen_q: queries of the longest sequence, or more.
        max_seqlen_k: keys of the longest sequence, or more.
        causal: bottom-right aligned in each sequence.
        softmax_scale: see :func:`ra_attention`.
        window_size: see :func:`ra_attention`.
        softcap: see :func:`ra_attention`.
        dropout_p: see :func:`ra_attention`.
        return_lse: also return the logsumexp of the scaled scores.
        check: validate the values of the offsets, which synchronizes. Without it (and where a
            compiler traces the call) the Triton backend never synchronizes; wrong offsets then give
            wrong results, but no access outside of the operands. Tokens behind the last sequence
            then give 0, a logsumexp of ``-inf``, and no gradient.
        backend: ``"triton"``, ``"sdpa"`` (a loop over the sequences) or ``"auto"``.

    Returns:
        ``[total_q, H, D]`` in the operands' dtype; with ``return_lse`` also ``[H, total_q]``
        float32, natural logarithm. A query with no allowed key gives 0 and ``-inf``.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit, values out of range; offsets that do not begin with 0,
            decrease, or do not end with the number of tokens; a sequence longer than its
            ``max_seqlen``.
        NotImplementedError: the backend lacks an option; the message names one that has it.

    Source: ``flash_attn_varlen_func`` of github.com/Dao-AILab/flash-attention.
    """
    q_pack, k_pack, v = _autocast(q_pack, k_pack, v)
    tensors = {"q_pack": q_pack, "k_pack": k_pack, "v": v}
    for name, t in tensors.items():
        check_float_tensor(name, t)
        if t.dim() != 3:
            raise ValueError(f"{name} must be [total, H, D], got {tuple(t.shape)}")
        check_unit_stride(name, t)
    D = q_pack.shape[-1]
    check_shape("k_pack", k_pack, (*k_pack.shape[:2], D), "[total_k, H_kv, D] like q_pack")
    check_shape("v", v, tuple(k_pack.shape), "[total_k, H_kv, D] like k_pack")
    q_pack, k_pack, v = (t.unsqueeze(0) for t in tensors.values())
    check_attention_inputs(q_pack, k_pack, v)
    options = AttentionOptions(causal, softmax_scale, window_size, softcap, dropout_p, return_lse)
    offsets = checked(
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        (q_pack.shape[1], k_pack.shape[1]),
        q_pack.device,
        check=check,
    )
    module, _ = choose(backend, (q_pack, k_pack, v), options, q_pack.shape[-1])
    out, lse = module.packed_attention(q_pack, k_pack, v, options, offsets)
    return (out.squeeze(0), lse.squeeze(0)) if return_lse else out.squeeze(0)
