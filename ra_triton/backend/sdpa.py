"""PyTorch's own kernels: a linear layer and ``scaled_dot_product_attention``; trains anywhere.

Packed operands make reciprocal attention plain attention, so this is exact, not an approximation.
What those kernels lack (``softcap``, logsumexps, second derivatives) is plain torch in float32.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ra_triton import internals
from ra_triton.call.norm_rope import NormRope
from ra_triton.call.offsets import Offsets
from ra_triton.call.options import AttentionOptions
from ra_triton.checks import autocast_dtype, in_dtype, needs_grad
from ra_triton.launch.recorded import Known
from ra_triton.weights import quantization, sparsity
from ra_triton.weights.factors import Factors
from ra_triton.weights.layout import RALayout
from ra_triton.weights.quantization import QuantizedWeight
from ra_triton.weights.sparsity import SparseWeight
from ra_triton.workspace import Workspace

MAX_PROGRAMS = 65_535  # along the second and the third axis of a CUDA grid
ALIGNMENT = 16  # bytes that one load of PyTorch's CUDA kernels reads
MAX_SCORES = 2**24  # that plain torch holds at once, 64 MiB in float32


def unsupported(
    tensors: tuple[Tensor | None, ...], options: AttentionOptions | None, head_dim: int | None
) -> str | None:
    """None: it runs every call."""
    return None


def project(
    x: Tensor,
    W_packed: Tensor | QuantizedWeight | SparseWeight,
    bias: Tensor | None,
    out: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x @ W_packed + bias``: ``[B, T, C] @ [C, N] -> [B, T, N]``."""
    x, W_packed, bias = in_dtype(dtype, x, W_packed, bias)  # type: ignore[arg-type]
    if isinstance(W_packed, QuantizedWeight):
        return quantization.project(x, W_packed, bias, out)
    if isinstance(W_packed, SparseWeight):
        return sparsity.project(x, W_packed, bias)
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
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over ``[B, T, H, D]`` operands: ``(out, lse [B, H, Tq] or None)``.

    With ``softcap`` it is plain torch, ``MAX_SCORES`` scores at a time; ``return_lse`` costs such a
    pass over the scores beside it. With ``offsets`` it is a loop over the sequences, whose bounds
    are read back from the device.
    """
    q_pack, k_pack, v = in_dtype(dtype, q_pack, k_pack, v)
    if offsets is not None:
        return by_sequence(packed_attention, q_pack, k_pack, v, options, offsets)
    if _on_cuda(q_pack):
        q_pack, k_pack, v = (_aligned(t) for t in (q_pack, k_pack, v))
    return _attention(q_pack, k_pack, v, options)


def _attention(
    q_pack: Tensor, k_pack: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor | None]:
    """:func:`packed_attention` of operands whose rows are aligned, as those of a projection are."""
    q, k, v = (t.transpose(1, 2) for t in (q_pack, k_pack, v))  # [B, H, T, D]
    lse = None
    if q.numel() == 0 or k.shape[2] == 0:
        # Zeros whatever q holds; the empty sums tie k and v to the autograd graph.
        out = q.masked_fill(q.new_ones((), dtype=torch.bool), 0.0) + 0 * (k.sum() + v.sum())
        lse = out.float().sum(-1) - math.inf if options.return_lse else None
    elif options.softcap or (options.dropout_p and options.return_lse):
        out, lse = _by_mathematics(q, k, v, options)
    else:
        out = _fused(q, k, v, _mask(q.shape[2], k.shape[2], options, q.device), options)
        # Compilers and torch.func differentiate the operators that they trace.
        traced = torch.compiler.is_compiling() or internals.transforms_active()
        if needs_grad(q, k, v) and not traced:
            out = _Differentiable.apply(out, q, k, v, options)
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
    out, lse = torch.cat(outs, 1), torch.cat(lses, -1) if options.return_lse else None
    behind = q_pack.shape[1] - out.shape[1]
    if behind > 0:  # tokens of no sequence
        out = F.pad(out, (0, 0, 0, 0, 0, behind))
        lse = None if lse is None else F.pad(lse, (0, behind), value=-math.inf)
    return out, lse


def layer(
    x: Tensor,
    W_packed: Tensor | QuantizedWeight | SparseWeight,
    bias: Tensor | None,
    layout: RALayout,
    options: AttentionOptions,
    workspace: Workspace | None,
    offsets: Offsets | None = None,
    dtype: torch.dtype | None = None,
    attend: Callable[..., tuple[Tensor, Tensor | None]] = _attention,
) -> Tensor:
    """Projection and attention: ``[B, T, C] -> [B, T, H * D]``.

    A workspace holds the projection; what ``attend`` returns is its own.
    """
    out = None
    if workspace is not None:
        out = workspace.buffer("packed", (*x.shape[:2], layout.columns), dtype or x.dtype, x.device)
    packed = layout.views(project(x, W_packed, bias, out, dtype))
    attend = attend if offsets is None else partial(by_sequence, attend, offsets=offsets)
    return attend(*packed, options=options)[0].flatten(2)


def known_layer(
    layout: RALayout,
    options: AttentionOptions,
    longest: int,
    dtype: torch.dtype | None,
    recorded: bool,
) -> Known | None:
    """:func:`layer` of ``(x, W_packed, bias, None, None)`` for calls that come again."""
    if longest:
        return None
    args = (layout, options, None, None, dtype)
    return Known(lambda x, W_packed, bias, *_: (layer(x, W_packed, bias, *args),))


def nothing_known(*_: object) -> None:
    """A call that comes again takes the way of the first."""


known_project = known_attention = known_decode = known_compose = nothing_known


def compose(factors: Factors) -> tuple[Tensor, Tensor | None]:
    """``W_fused [C, N]`` and its bias ``[N]`` or None, in plain torch."""
    W_q, W_k, W_v = (
        # One more row: a bias folds like a weight over a constant 1.
        w if b is None else torch.cat((w, b[None]))
        for w, b in zip(factors[:3], factors[6:9], strict=True)
    )
    W_fused = _composed(factors, W_q, W_k, W_v)
    return (W_fused, None) if factors.b_q is None else (W_fused[:-1], W_fused[-1])


def _composed(factors: Factors, W_q: Tensor, W_k: Tensor, W_v: Tensor) -> Tensor:
    """``[w_std Q_std | K_std | V | mean Q W_recip | w_rec K W_recip]``, packed if asked."""
    layout, recip = factors.layout, factors.W_recip
    H, H_kv, D = layout.n_head, layout.n_kv_head, layout.head_dim
    q, k, v = (w.unflatten(-1, (-1, D)) for w in (W_q, W_k, W_v))  # [C, H or H_kv, D]
    w_std, w_rec = (
        number if gate is None else gate
        for gate, number in ((factors.w_std, factors.std), (factors.w_rec, factors.rec))
    )
    recip = (q.new_empty(D, 0) if recip is None else recip).expand(H, D, layout.R)
    group = H // H_kv
    every_k = k if group == 1 else k.repeat_interleave(group, dim=1)
    with _no_autocast(q.device):  # the low lanes stay as exact as the rest
        q_low = torch.einsum("chd,hdr->chr", q, recip)
        k_low = torch.einsum("chd,hdr->chr", every_k, recip)
    if group > 1:
        q_low = q_low.unflatten(1, (H_kv, group)).mean(2)
    sections = {
        "q_std": _gated(w_std, q[..., : layout.d_std]),
        "k_std": k[..., : layout.d_std],
        "v": v,
        "q_low": q_low,
        "k_low": _gated(w_rec, k_low),
    }
    W_fused = layout.join_columns(sections)
    return (layout.pack(W_fused) if factors.packed else W_fused).to(factors.dtype)


def _gated(gate: Tensor | float | None, lanes: Tensor) -> Tensor:
    """``gate * lanes``: ``lanes [C, H, lanes]``, gate a number, a scalar tensor or ``[H]``."""
    if gate is None:
        return lanes
    if not isinstance(gate, Tensor):
        return lanes * gate
    gate = gate.to(lanes.dtype)
    return lanes * (gate[:, None] if gate.dim() else gate)


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

    On a CPU reading the lengths is free, and each sequence is a call on its own keys.
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
    """Whether reading them does not synchronize and nothing is traced."""
    return lengths.device.type == "cpu" and not torch.compiler.is_compiling()


def _decode_masked(
    q_pack: Tensor, k_pack: Tensor, v: Tensor, lengths: Tensor, options: AttentionOptions
) -> Tensor:
    """With a mask, for lengths that stay on the device.

    Values beyond a length are undefined, perhaps NaN, so a copy has zeros there.
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
    if _on_cuda(q):
        q = _aligned(q)  # k and v are copies
    attend = _plain if options.softcap else _fused
    out = attend(q, k, v, mask[:, None], options)
    return (out if isinstance(out, Tensor) else out[0]).transpose(1, 2)


def append_(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """``k, v [B, T, H_kv, D]`` after the ``lengths [B]`` tokens of each sequence, which grow by T.

    A replayed graph cannot raise: tokens beyond the end overwrite the last row.
    """
    (B, T), max_len = k.shape[:2], k_cache.shape[1]
    places = lengths.long()[:, None] + torch.arange(T, device=k.device)
    index = torch.arange(B, device=k.device)[:, None], places.clamp(max=max_len - 1)
    k_cache[index] = k
    v_cache[index] = v
    lengths.add_(T).clamp_(max=max_len)


# Masks


def _mask(T_q: int, T_k: int, options: AttentionOptions, device: torch.device) -> Tensor | None:
    """``[T_q, T_k]``, True where allowed; None where ``is_causal`` or nothing says the same."""
    causal_alone = options.causal and T_q == T_k and options.reach[0] < 0
    return None if causal_alone else _allowed(0, T_q, T_q, T_k, options, device)


def _allowed(
    first: int, last: int, T_q: int, T_k: int, options: AttentionOptions, device: torch.device
) -> Tensor | None:
    """``[last - first, T_k]`` of these queries, True where allowed; None where everything is."""
    left, right = options.reach
    if left < 0 and right < 0:
        return None
    positions = torch.arange(first, last, device=device)[:, None] + (T_k - T_q)
    ahead = torch.arange(T_k, device=device) - positions  # bottom-right
    mask = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        mask &= ahead >= -left
    if right >= 0:
        mask &= ahead <= right
    return mask


def _without_a_key(mask: Tensor) -> Tensor:
    """``[..., T_q, 1]``, True for a query without an allowed key, which gives 0."""
    return ~mask.any(dim=-1, keepdim=True)


# Plain torch


def _by_mathematics(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor | None]:
    """Output and logsumexp of ``[B, H, T, D]`` operands, differentiable to any order."""
    parts = _in_steps(_plain, q, (k, v), options)
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2) if options.return_lse else None


def logsumexp(q: Tensor, k: Tensor, options: AttentionOptions) -> Tensor:
    """Natural logsumexp of the scores, ``[B, H, T_q]`` float32, which SDPA does not return."""
    parts = _in_steps(_logsumexp, q, (k,), options)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _in_steps(
    compute: Callable[..., Any], q: Tensor, others: tuple[Tensor, ...], options: AttentionOptions
) -> list[Any]:
    """``compute(q, *others, mask, options)`` of as many queries at once as have ``MAX_SCORES``.

    Where there are more, backward recomputes their scores: none are saved.
    """
    (B, H, T_q), T_k = q.shape[:3], others[0].shape[2]
    others = tuple(t.float() for t in others)  # gradients of steps add up in float32
    if B * H * T_q * T_k <= MAX_SCORES:  # no loop: a compiler would unroll it for each length
        return [compute(q, *others, _allowed(0, T_q, T_q, T_k, options, q.device), options)]
    if needs_grad(q, *others) and not internals.transforms_active():
        from torch.utils.checkpoint import checkpoint

        random = options.dropout_p > 0
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=random)
    step, parts = max(1, MAX_SCORES // (B * H * T_k)), []
    for first in range(0, T_q, step):
        last = min(first + step, T_q)
        mask = _allowed(first, last, T_q, T_k, options, q.device)
        parts.append(compute(q[:, :, first:last], *others, mask, options))
    return parts


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor | None]:
    """``dropout(softmax(mask(cap(scale * q kᵀ)))) v`` in float32, and the natural logsumexp."""
    with _no_autocast(q.device):
        scores = _scores(q, k, mask, options)
        weights = F.dropout(torch.softmax(scores, dim=-1), options.dropout_p)
        v = v.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        out = (weights @ v).to(q.dtype)
    if mask is not None:
        out = out.masked_fill(_without_a_key(mask), 0.0)
    return out, _row_sums(scores, mask) if options.return_lse else None


def _logsumexp(q: Tensor, k: Tensor, mask: Tensor | None, options: AttentionOptions) -> Tensor:
    with _no_autocast(q.device):
        return _row_sums(_scores(q, k, mask, options), mask)


def _row_sums(scores: Tensor, mask: Tensor | None) -> Tensor:
    lse = torch.logsumexp(scores, dim=-1)
    return lse if mask is None else lse.masked_fill(_without_a_key(mask).squeeze(-1), -math.inf)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, options: AttentionOptions) -> Tensor:
    """``[B, H, T_q, T_k]`` float32; -inf where not allowed, but in rows without a key finite."""
    scale = 1 / math.sqrt(q.shape[-1]) if options.softmax_scale is None else options.softmax_scale
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = scale * (q.float() @ k.mT)
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores = scores.masked_fill(~(mask | _without_a_key(mask)), -math.inf)
    return scores


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    on = autocast_dtype(device) is not None
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


class _Differentiable(torch.autograd.Function):
    """``out``, whose gradient is that of the fused kernel, or of plain torch if it is recorded.

    No fused kernel of PyTorch's has a second derivative, and on a GPU each reads the gradient of
    ``out`` as it reads its operands. Only the backward pass knows what it gets: that gradient, and
    with ``create_graph=True`` gradients that are enabled. (What dropout dropped is the kernel's.)
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
    ) -> Tensor:
        """``out`` as it is."""
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """To ``out``, or past it to ``q, k, v``."""
        if ctx.options.dropout_p or not torch.is_grad_enabled():
            return _aligned(d_out) if _on_cuda(d_out) else d_out, None, None, None, None
        # Views that this call made, so no gradient runs on from one operand into another.
        q, k, v = operands = ctx.saved_tensors
        out, _ = _by_mathematics(q, k, v, ctx.options)
        wanted = [t for t in operands if t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, d_out, create_graph=True))
        return None, *(next(found) if t.requires_grad else None for t in operands), None


# PyTorch's kernels


def _on_cuda(t: Tensor) -> bool:
    return t.device.type == "cuda"


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """``scaled_dot_product_attention`` of ``[B, H, T, D]`` operands: with a kernel that is right.

    ``mask`` is ``[T_q, T_k]`` or ``[B, 1, T_q, T_k]``; without one ``options.causal`` counts.
    """
    blind = None
    if mask is not None:
        blind = _without_a_key(mask)
        mask = mask | blind  # kernels differ in what they make of such a row and of its gradient
    if _on_cuda(q):
        # Of the kernels that save no scores flash attention alone supports grouped heads, and only
        # in 16 bits without a mask.
        if k.shape[1] != q.shape[1] and (q.dtype == torch.float32 or mask is not None):
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        with nullcontext() if mask is None else _no_cudnn():
            out = _in_pieces(q, k, v, mask, options, MAX_PROGRAMS)
    else:
        out = _sdpa(q, k, v, mask, options)
    return out if blind is None else out.masked_fill(blind, 0.0)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=options.dropout_p,
        is_causal=options.causal and mask is None,
        scale=options.softmax_scale,
        **({} if q.shape[1] == k.shape[1] else {"enable_gqa": True}),
    )


def _aligned(t: Tensor) -> Tensor:
    """``t [..., D]``, or a copy where rows of whole loads lie off a load's alignment.

    The kernels do not check, and a misaligned load ends the process's CUDA context. Rows that are
    not whole loads are refused, or padded by PyTorch. A compiler has no data pointers: it copies.
    """
    size = t.element_size()
    if t.shape[-1] * size % ALIGNMENT or not t.numel():
        return t
    if not torch.compiler.is_compiling():
        rows = zip(t.stride()[:-1], t.shape[:-1], strict=True)
        offsets = [_address(t), *(step * size for step, n in rows if n > 1)]
        if t.stride(-1) == 1 and not any(offset % ALIGNMENT for offset in offsets):
            return t
    return t.clone(memory_format=torch.contiguous_format)


def _address(t: Tensor) -> int:
    """The data pointer of ``t``; its storage offset where it has none."""
    if type(t) in (Tensor, Parameter):  # not a tracer's
        try:
            return t.data_ptr()
        except RuntimeError:  # a wrapper of torch.func
            pass
    return int(t.storage_offset()) * t.element_size()


def _no_cudnn() -> AbstractContextManager[Any]:
    """The kernels that are allowed now, without cuDNN's, if that leaves one.

    cuDNN gives gradients of NaN with some masks (github.com/pytorch/pytorch/issues/196678).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = _others_than_cudnn()
    return sdpa_kernel([getattr(SDPBackend, name) for name in names]) if names else nullcontext()


@internals.constant
def _others_than_cudnn() -> tuple[str, ...]:
    """Members of ``SDPBackend`` that are allowed now; none where cuDNN's is not, or is alone."""
    found = torch.backends.cuda
    if not found.cudnn_sdp_enabled():
        return ()
    others = {
        "FLASH_ATTENTION": found.flash_sdp_enabled(),
        "EFFICIENT_ATTENTION": found.mem_efficient_sdp_enabled(),
        "MATH": found.math_sdp_enabled(),
    }
    return tuple(name for name, allowed in others.items() if allowed)


def _in_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
    most: int,
) -> Tensor:
    """:func:`_sdpa` on at most ``most`` heads of sequences at once."""
    B, H, H_kv = q.shape[0], q.shape[1], k.shape[1]
    if most >= B * H:
        return _sdpa(q, k, v, mask, options)
    batches = []
    for sequences, groups in _pieces(B, H, H_kv, most):
        part = mask if mask is None or mask.dim() == 2 else mask[sequences]
        heads = [
            _sdpa(q[sequences, of_q], k[sequences, of_k], v[sequences, of_k], part, options)
            for of_q, of_k in groups
        ]
        batches.append(torch.cat(heads, 1))
    return torch.cat(batches)


def _pieces(
    B: int, H: int, H_kv: int, most: int
) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Sequences, and of each the heads ``(of queries, of keys)``, at most ``most`` at once."""
    group = H // H_kv
    sequences, heads = max(1, most // H), max(1, most // group)
    firsts = range(0, H_kv, heads)
    for b in range(0, B, sequences):
        ends = [(first, min(first + heads, H_kv)) for first in firsts]
        yield (
            slice(b, b + sequences),
            [(slice(i * group, j * group), slice(i, j)) for i, j in ends],
        )
