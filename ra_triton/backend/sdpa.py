"""PyTorch's own kernels: a linear layer and ``scaled_dot_product_attention``; trains anywhere.

Packed operands make reciprocal attention plain attention, so this is exact, not an approximation.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ra_triton import quantization
from ra_triton.layout import RALayout
from ra_triton.norm_rope import NormRope
from ra_triton.offsets import Offsets
from ra_triton.options import AttentionOptions
from ra_triton.quantization import QuantizedWeight
from ra_triton.workspace import Workspace


def unsupported(
    tensors: tuple[Tensor | None, ...], options: AttentionOptions | None, head_dim: int | None
) -> str | None:
    """Why this backend cannot run the call, or None."""
    if options is not None and options.softcap:
        return "scaled_dot_product_attention has no softcap"
    if options is not None and options.dropout_p and options.return_lse:
        return "dropout_p together with return_lse is not available"
    return None


def project(
    x: Tensor, W_packed: Tensor | QuantizedWeight, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """``x @ W_packed + bias``: ``[B, T, C] @ [C, N] -> [B, T, N]``."""
    if isinstance(W_packed, QuantizedWeight):
        return quantization.project(x, W_packed, bias, out)
    if out is None:
        return F.linear(x, W_packed.mT, bias)
    rows, out_rows = x.flatten(0, 1), out.view(-1, out.shape[-1])
    if bias is None:
        torch.mm(rows, W_packed, out=out_rows)
    else:
        torch.addmm(bias, rows, W_packed, out=out_rows)
    return out


def packed_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    options: AttentionOptions,
    offsets: Offsets | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over ``[B, T, H, D]`` operands: ``(out, lse [B, H, Tq] or None)``.

    ``return_lse`` costs a second pass over the scores, ``B * H * Tq * Tk`` of them in float32.
    With ``offsets`` it is a loop over the sequences, whose bounds are read back from the device.
    """
    if offsets is not None:
        return by_sequence(packed_attention, q_pack, k_pack, v, options, offsets)
    T_q, T_k = q_pack.shape[1], k_pack.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q_pack, k_pack, v))  # [B, H, T, D]
    mask = _mask(T_q, T_k, options, q.device)
    if q.numel() == 0 or T_k == 0:
        # Zeros whatever q holds; the empty sums tie k and v to the autograd graph.
        out = q.masked_fill(q.new_ones((), dtype=torch.bool), 0.0) + 0 * (k.sum() + v.sum())
    else:
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=options.dropout_p,
            is_causal=options.causal and mask is None,
            scale=options.softmax_scale,
            **({} if q.shape[1] == k.shape[1] else {"enable_gqa": True}),
        )
    if mask is not None:
        no_key = ~mask.any(dim=-1, keepdim=True)  # such a row gives 0
        out = out.masked_fill(no_key, 0.0)
    lse = logsumexp(q, k, options) if options.return_lse else None
    return out.transpose(1, 2), lse


def by_sequence(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    options: AttentionOptions,
    offsets: Offsets,
) -> tuple[Tensor, Tensor | None]:
    """``attend`` on each sequence of ``[1, total, H, D]`` operands, and the results as one."""
    parts = [
        attend(q_pack[:, queries], k_pack[:, keys], v[:, keys], options)
        for queries, keys in offsets.sequences() or [(slice(None), slice(None))]
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, -1) if options.return_lse else None


def layer(
    x: Tensor,
    W_packed: Tensor | QuantizedWeight,
    bias: Tensor | None,
    layout: RALayout,
    options: AttentionOptions,
    workspace: Workspace | None,
    offsets: Offsets | None = None,
) -> Tensor:
    """Projection and attention: ``[B, T, C] -> [B, T, H, D]``.

    A workspace holds the projection; what SDPA returns is its own.
    """
    out = None
    if workspace is not None:
        out = workspace.buffer("packed", (*x.shape[:2], layout.columns), x.dtype, x.device)
    packed = layout.views(project(x, W_packed, bias, out))
    return packed_attention(*packed, options, offsets)[0]


def prepare_layer(*_: object) -> None:
    """Nothing to prepare: PyTorch looks at every call itself."""


def pack_qk(q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor) -> tuple[Tensor, Tensor]:
    """``[q_std|k_low], [k_std|q_low]``, out of place."""
    d_std = q.shape[-1] - q_low.shape[-1]
    return torch.cat((q[..., :d_std], k_low), -1), torch.cat((k[..., :d_std], q_low), -1)


def pack_qk_(q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor) -> None:
    """Overwrites the last R lanes of ``q`` and ``k``."""
    R = q_low.shape[-1]
    if R:
        q[..., -R:].copy_(k_low)
        k[..., -R:].copy_(q_low)


def norm_rope(call: NormRope) -> tuple[Tensor, Tensor]:
    """Lane exchange, norm and rotation, out of place."""
    q, k = call.q, call.k
    if call.q_low is not None and call.k_low is not None:
        q, k = pack_qk(q, k, call.q_low, call.k_low)
    angles = None if call.cos is None or call.sin is None else _angles(call)
    return (
        _normed_and_turned(q, call.q_weight, angles, call),
        _normed_and_turned(k, call.k_weight, angles, call),
    )


def norm_rope_(call: NormRope) -> None:
    """Lane exchange, norm and rotation over ``q`` and ``k``."""
    q, k = norm_rope(call)
    call.q.copy_(q)
    call.k.copy_(k)


def _angles(call: NormRope) -> tuple[Tensor, Tensor]:
    """``cos, sin`` of each token, ``[B or 1, T, 1, rope_dims / 2]``; NaN beyond the tables."""
    assert call.cos is not None
    assert call.sin is not None
    cos, sin = (t[:, : call.rope_dims // 2].float() for t in (call.cos, call.sin))
    if call.positions is None:
        return cos[None, :, None], sin[None, :, None]
    at = call.positions
    if at.dim() == 1:
        at = at[:, None] + torch.arange(call.q.shape[1], device=at.device)
    beyond = (at < 0) | (at >= len(cos))
    rows = at.clamp(0, len(cos) - 1)
    cos = cos[rows].masked_fill(beyond[..., None], math.nan)
    return cos[:, :, None], sin[rows][:, :, None]


def _normed_and_turned(
    x: Tensor, weight: Tensor | None, angles: tuple[Tensor, Tensor] | None, call: NormRope
) -> Tensor:
    """A packed head, normed and turned in float32, in the dtype of ``x``."""
    y = x.float()
    if call.eps is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + call.eps)
        y = y if weight is None else y * weight.float()
    if angles is not None:
        cos, sin = angles
        pairs = call.rope_dims // 2
        a, b, rest = y.split([pairs, pairs, x.shape[-1] - call.rope_dims], dim=-1)
        y = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
    return y.to(x.dtype)


def decode_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    lengths: Tensor,
    options: AttentionOptions,
    max_length: int,
) -> Tensor:
    """Attention of each sequence's last tokens over a cache: ``[B, T_q, H, D]``.

    On a CPU the lengths can be read for nothing, and each sequence is a call on its keys alone.
    """
    if q_pack.numel() == 0 or max_length == 0:
        return torch.zeros_like(q_pack, memory_format=torch.contiguous_format)
    if not _readable(lengths):
        return _decode_masked(q_pack, k_pack[:, :max_length], v[:, :max_length], lengths, options)
    known = [min(max(n, 0), max_length) for n in lengths.tolist()]
    if len(set(known)) == 1:
        return packed_attention(q_pack, k_pack[:, : known[0]], v[:, : known[0]], options)[0]
    each = zip(q_pack.split(1), k_pack.split(1), v.split(1), known, strict=True)
    return torch.cat([packed_attention(q, k[:, :n], v[:, :n], options)[0] for q, k, v, n in each])


def _readable(lengths: Tensor) -> bool:
    """Whether reading them waits for nothing and nothing is traced."""
    return lengths.device.type == "cpu" and not torch.compiler.is_compiling()


def _decode_masked(
    q_pack: Tensor, k_pack: Tensor, v: Tensor, lengths: Tensor, options: AttentionOptions
) -> Tensor:
    """With a mask, not knowing the lengths.

    What lies beyond a length may be anything, a NaN too, so it is set to zero in a copy.
    """
    (_, T_q), T_k, left = q_pack.shape[:2], k_pack.shape[1], options.reach[0]
    keys = torch.arange(T_k, device=lengths.device)
    lengths = lengths.clamp(max=T_k)[:, None]  # [B, 1]
    last = lengths - T_q + torch.arange(T_q, device=lengths.device)  # [B, T_q], that a query sees
    mask = keys <= last[..., None]  # [B, T_q, T_k]
    if left >= 0:
        mask &= keys >= last[..., None] - left
    unused = (keys >= lengths)[..., None, None]
    q, k, v = (
        t.transpose(1, 2)  # [B, H, T, D]
        for t in (q_pack, k_pack.masked_fill(unused, 0.0), v.masked_fill(unused, 0.0))
    )
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask[:, None],
        scale=options.softmax_scale,
        **({} if q.shape[1] == k.shape[1] else {"enable_gqa": True}),
    )
    out = out.masked_fill(~mask[:, None].any(dim=-1, keepdim=True), 0.0)  # a row without keys
    return out.transpose(1, 2)


def append_(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """``k, v [B, T, H_kv, D]`` after the ``lengths [B]`` tokens of each sequence, which grow by T.

    What a replayed graph appends beyond the end goes to the last place: it cannot raise.
    """
    (B, T), max_len = k.shape[:2], k_cache.shape[1]
    places = lengths.long()[:, None] + torch.arange(T, device=k.device)
    index = torch.arange(B, device=k.device)[:, None], places.clamp(max=max_len - 1)
    k_cache[index] = k
    v_cache[index] = v
    lengths.add_(T).clamp_(max=max_len)


def _mask(T_q: int, T_k: int, options: AttentionOptions, device: torch.device) -> Tensor | None:
    """``[T_q, T_k]``, True where allowed; None where ``is_causal`` or nothing says the same."""
    left, right = options.reach
    causal_alone = options.causal and T_q == T_k and left < 0
    if causal_alone or (left < 0 and right < 0):
        return None
    positions = torch.arange(T_q, device=device)[:, None] + (T_k - T_q)  # bottom-right
    ahead = torch.arange(T_k, device=device) - positions
    mask = torch.ones(T_q, T_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= ahead >= -left
    if right >= 0:
        mask &= ahead <= right
    return mask


def logsumexp(q: Tensor, k: Tensor, options: AttentionOptions) -> Tensor:
    """Natural logsumexp of the scores, ``[B, H, T_q]`` float32; ``q, k`` are ``[B, H, T, D]``.

    A second pass over the scores, for kernels of PyTorch's that do not return it.
    """
    mask = _mask(q.shape[2], k.shape[2], options, q.device)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scale = 1 / math.sqrt(q.shape[-1]) if options.softmax_scale is None else options.softmax_scale
    scores = scale * (q.float() @ k.float().mT)
    if options.softcap:  # flex_attention has it
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is None and options.causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.logsumexp(scores, dim=-1)
