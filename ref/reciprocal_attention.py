"""Reciprocal attention, written out: the definition every kernel and backend is held against.

Per head, with head dim D, rank R and D_std = D - R:

    Q, K, V  = x W_q, x W_k, x W_v                       [B, T, H, D]
    Q_low    = Q W_recip,  K_low = K W_recip             [B, T, H, R]
    S        = scale * (w_std * Q_std K_stdᵀ + w_rec * K_low Q_lowᵀ)
    out      = softmax(S) V                              scale = 1/sqrt(D)

The idea is github.com/mcgrof/knlp's. Any dtype up to FP64; every step is one torch operation.
"""

import math
from typing import Any

import torch
from torch import Tensor


def reciprocal_scores(
    Q: Tensor,  # [B, T, H, D]
    K: Tensor,  # [B, T, H_kv, D]
    W_recip: Tensor,  # [D, R] or [H, D, R]
    w_std: Tensor | float = 1.0,  # number or [H]
    w_rec: Tensor | float = 1.0,
) -> Tensor:
    """Both terms, unscaled: ``w_std * Q_std K_stdᵀ + w_rec * K_low Q_lowᵀ``, ``[B, H, T, T]``.

    Grouped heads share K, and what their keys carry: the mean of their Q_low.
    """
    H, D = Q.shape[2:]
    H_kv = K.shape[2]
    K = K.repeat_interleave(H // H_kv, dim=2)
    recip = W_recip.expand(H, D, W_recip.shape[-1])
    d_std = D - recip.shape[-1]
    Q_low = torch.einsum("bthd,hdr->bthr", Q, recip)
    K_low = torch.einsum("bthd,hdr->bthr", K, recip)
    Q_low = Q_low.unflatten(2, (H_kv, -1)).mean(3).repeat_interleave(H // H_kv, dim=2)
    standard = torch.einsum("bihd,bjhd->bhij", Q[..., :d_std], K[..., :d_std])
    reciprocal = torch.einsum("bihr,bjhr->bhij", K_low, Q_low)  # row i is the query: K_low(i)
    gate_std = torch.as_tensor(w_std, dtype=Q.dtype).reshape(-1, 1, 1)
    gate_rec = torch.as_tensor(w_rec, dtype=Q.dtype).reshape(-1, 1, 1)
    return gate_std * standard + gate_rec * reciprocal


def attend(
    S: Tensor,  # [B, H, Tq, Tk], unscaled
    V: Tensor,  # [B, Tk, H_kv, D]
    *,
    scale: float,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``softmax(mask(cap(scale * S))) V`` ``[B, Tq, H, D]`` and its logsumexp ``[B, H, Tq]``."""
    S = scale * S
    if softcap:
        S = softcap * torch.tanh(S / softcap)
    allowed = allowed_keys(S.shape[-2], S.shape[-1], causal, window_size, S.device)
    S = S.masked_fill(~allowed, -math.inf)
    lse = torch.logsumexp(S, dim=-1)
    empty = torch.isneginf(lse)  # a row without any allowed key gives 0
    P = torch.exp(S - lse.masked_fill(empty, 0.0).unsqueeze(-1))
    P = torch.nn.functional.dropout(P, dropout_p)
    V = V.repeat_interleave(S.shape[1] // V.shape[2], dim=2)  # grouped heads
    return torch.einsum("bhij,bjhd->bihd", P, V), lse


def allowed_keys(
    T_q: int, T_k: int, causal: bool, window_size: tuple[int, int], device: torch.device
) -> Tensor:
    """``[T_q, T_k]`` mask; query i stands at key position i + T_k - T_q (bottom-right)."""
    left, right = window_size
    ahead = torch.arange(T_k, device=device) - (
        torch.arange(T_q, device=device)[:, None] + T_k - T_q
    )
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        allowed &= ahead <= 0
    if left >= 0:
        allowed &= ahead >= -left
    if right >= 0:
        allowed &= ahead <= right
    return allowed


def packed_attention(
    q_pack: Tensor,  # [B, Tq, H, D]
    k_pack: Tensor,  # [B, Tk, H_kv, D]
    v: Tensor,  # [B, Tk, H_kv, D]
    *,
    softmax_scale: float | None = None,
    **options: Any,  # causal, window_size, softcap, dropout_p
) -> tuple[Tensor, Tensor]:
    """Plain attention over packed operands: ``(out [B, Tq, H, D], lse [B, H, Tq])``."""
    H, D = q_pack.shape[2:]
    k = k_pack.repeat_interleave(H // k_pack.shape[2], dim=2)
    S = torch.einsum("bihd,bjhd->bhij", q_pack, k)
    return attend(
        S, v, scale=1 / math.sqrt(D) if softmax_scale is None else softmax_scale, **options
    )


def norm_rope(
    p: Tensor,  # [B, T, H, D], packed
    *,
    weight: Tensor | None = None,  # [D]
    eps: float | None = None,  # None: no norm
    cos: Tensor | None = None,  # [B, T, pairs], at the tokens' positions; None: no rotation
    sin: Tensor | None = None,
) -> Tensor:
    """What may follow packing: an RMS norm of each head, then lane i turns with ``i + pairs``."""
    if eps is not None:
        p = p / torch.sqrt(p.square().mean(-1, keepdim=True) + eps)
        p = p if weight is None else p * weight
    if cos is None or sin is None:
        return p
    cos, sin, pairs = cos[:, :, None], sin[:, :, None], cos.shape[-1]
    a, b, rest = p[..., :pairs], p[..., pairs : 2 * pairs], p[..., 2 * pairs :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def split_lanes(
    y: Tensor, R: int, n_head: int, n_kv_head: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``x W_fused (+ bias)`` in split order to ``(q_pack, k_pack, v)``."""
    H, H_kv = n_head, n_kv_head or n_head
    D = y.shape[-1] // (H + 2 * H_kv)
    Q_std, K_std, V, Q_low, K_low = y.split(
        [H * (D - R), H_kv * (D - R), H_kv * D, H_kv * R, H * R], dim=-1
    )
    B, T = y.shape[:2]
    q_pack = torch.cat((Q_std.reshape(B, T, H, D - R), K_low.reshape(B, T, H, R)), dim=-1)
    k_pack = torch.cat((K_std.reshape(B, T, H_kv, D - R), Q_low.reshape(B, T, H_kv, R)), dim=-1)
    return q_pack, k_pack, V.reshape(B, T, H_kv, D)


def compose(
    W_q: Tensor,  # [C, H*D]
    W_k: Tensor,  # [C, H_kv*D]
    W_v: Tensor,  # [C, H_kv*D]
    W_recip: Tensor,  # [D, R] or [H, D, R]
    *,
    n_head: int,
    n_kv_head: int | None = None,
    w_std: Tensor | float = 1.0,  # number, [] or [H]
    w_rec: Tensor | float = 1.0,
) -> Tensor:
    """The factors as one ``W_fused``, ``[C, N]`` in split order: both terms from one product."""
    H, H_kv = n_head, n_kv_head or n_head
    D, R = W_q.shape[1] // H, W_recip.shape[-1]
    Q, K = W_q.unflatten(1, (H, D)), W_k.unflatten(1, (H_kv, D))
    recip = W_recip.expand(H, D, R)
    Q_low = torch.einsum("chd,hdr->chr", Q, recip).unflatten(1, (H_kv, H // H_kv)).mean(2)
    K_low = torch.einsum("chd,hdr->chr", K.repeat_interleave(H // H_kv, dim=1), recip)
    gate_std, gate_rec = (torch.as_tensor(g, dtype=Q.dtype).reshape(-1, 1) for g in (w_std, w_rec))
    sections = (gate_std * Q[..., : D - R], K[..., : D - R], W_v, Q_low, gate_rec * K_low)
    return torch.cat([section.flatten(1) for section in sections], dim=1)


def round_to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8: ``rows [..., C] ≈ scale [..., 1] * q [..., C]``, as ``(q, scale)``.

    Defined in float32, whose last bit decides between two integers; ties go to the even one.
    """
    rows = rows.float()
    # A tensor on its device: to PyTorch on a GPU, / 127 is a product with the rounded 1 / 127.
    scale = (rows.abs().amax(-1, keepdim=True) / rows.new_full((), 127)).clamp_min(2.0**-126)
    return torch.round(rows / scale), scale


def reciprocal_attention(
    x: Tensor,  # [B, T, C]
    W_q: Tensor,  # [C, H*D]
    W_k: Tensor,  # [C, H_kv*D]
    W_v: Tensor,
    W_recip: Tensor,  # [D, R] or [H, D, R]
    *,
    n_head: int,
    n_kv_head: int | None = None,
    w_std: Tensor | float = 1.0,
    w_rec: Tensor | float = 1.0,
    softmax_scale: float | None = None,
    **options: Any,
) -> Tensor:
    """The definition, from the factors: ``[B, T, H*D]``."""
    B, T, _ = x.shape
    H_kv = n_kv_head or n_head
    heads = zip((W_q, W_k, W_v), (n_head, H_kv, H_kv), strict=True)
    Q, K, V = ((x @ W).reshape(B, T, H, -1) for W, H in heads)
    S = reciprocal_scores(Q, K, W_recip, w_std, w_rec)
    scale = 1 / math.sqrt(Q.shape[-1]) if softmax_scale is None else softmax_scale
    return attend(S, V, scale=scale, **options)[0].flatten(2)


def reciprocal_attention_fused(
    x: Tensor,  # [B, T, C]
    W_fused: Tensor,  # [C, N], split order
    R: int = 4,
    *,
    n_head: int,
    n_kv_head: int | None = None,
    bias: Tensor | None = None,  # [N]
    **options: Any,
) -> Tensor:
    """The same from the fused projection: ``[B, T, H*D]``."""
    y = x @ W_fused if bias is None else x @ W_fused + bias
    return packed_attention(*split_lanes(y, R, n_head, n_kv_head), **options)[0].flatten(2)
