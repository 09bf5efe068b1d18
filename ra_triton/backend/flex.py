"""PyTorch's FlexAttention over packed operands: masks as block masks, ``softcap`` as a score_mod.

A score_mod sees one score, never the transposed one; packed operands need nothing else
(``docs/flex.md``). Compiled by torch.compile, once for each configuration and for any lengths, and
once more where keys are not as many as queries; the compiler and FlexAttention are imported by the
first call. On a CPU it has a forward alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from operator import index
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ra_triton import internals
from ra_triton.backend import sdpa
from ra_triton.call.offsets import Offsets
from ra_triton.call.options import AttentionOptions, DecodeOptions
from ra_triton.checks import distributed, in_dtype, may_keep, needs_grad, too_old

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MIN_HEAD_DIM = 16  # on a GPU: what Triton's products need
BLOCK = 128  # queries, and keys, in a block of a mask; FlexAttention's own size
KEPT = 64  # masks, and caps, in the cache

# Projection and packing have nothing to do with FlexAttention: PyTorch's own, differentiable.
project = sdpa.project
compose = sdpa.compose
pack_qk = sdpa.pack_qk
pack_qk_ = sdpa.pack_qk_
norm_rope = sdpa.norm_rope
norm_rope_ = sdpa.norm_rope_
append_ = sdpa.append_
decode_attention = sdpa.decode_attention  # never called: `unsupported` refuses it
known_project = known_attention = known_layer = known_decode = sdpa.nothing_known
known_compose = sdpa.nothing_known


def unsupported(
    tensors: tuple[Tensor | None, ...], options: AttentionOptions | None, head_dim: int | None
) -> str | None:
    """Why this backend cannot run the call, or None."""
    if options is None:
        return None
    if distributed(*tensors):
        return "flex_attention is compiled for local tensors, got a DTensor; call .to_local() on it"
    if isinstance(options, DecodeOptions):
        return "block masks of a cache's lengths would have to be built for each token"
    device = tensors[0].device  # type: ignore[union-attr]
    reason = _device_unsupported(device)
    if reason is not None:
        return reason
    if options.dropout_p:
        return "flex_attention has no dropout_p"
    if device.type == "cpu":
        return "flex_attention has no backward on a CPU" if needs_grad(*tensors) else None
    if head_dim is None or head_dim < MIN_HEAD_DIM:
        return f"head dim {head_dim} is below {MIN_HEAD_DIM}, the least of flex_attention on a GPU"
    return None


def packed_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    options: AttentionOptions,
    offsets: Offsets | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over ``[B, T, H, D]`` operands: ``(out, lse [B, H, Tq] or None)``.

    On a CPU ``return_lse`` costs a second pass over the scores, as in the backend ``sdpa``; and as
    there, with ``offsets`` it is a loop over the sequences.
    """
    q_pack, k_pack, v = in_dtype(dtype, q_pack, k_pack, v)
    if offsets is not None:
        return sdpa.by_sequence(packed_attention, q_pack, k_pack, v, options, offsets)
    T_q, T_k = q_pack.shape[1], k_pack.shape[1]
    if q_pack.numel() == 0 or T_k == 0:
        return sdpa.packed_attention(q_pack, k_pack, v, options)  # zeros: nothing to attend to
    left, right = options.reach
    # The first rows may have no key. FlexAttention's releases treat such rows differently, so they
    # are left out; a copy, as the compiler takes rows with gaps for another layout.
    blind = max(0, T_q - T_k - right) if right >= 0 else 0
    if blind:
        q_pack = q_pack[:, blind:].contiguous()
    q, k, v = (t.transpose(1, 2) for t in (q_pack, k_pack, v))  # [B, H, T, D]
    if not torch.is_grad_enabled():
        q, k, v = (t.detach() for t in (q, k, v))  # on a CPU a leaf that asks for one is refused
    with_lse = options.return_lse and q.device.type != "cpu"
    mask = (T_q - blind, T_k, left, right, q.device)
    make_mask, make_cap = kept(_mask, q.device), kept(_cap, q.device)
    if torch.compiler.is_compiling():
        numbers = _numbers(q, k, options, make_mask(*mask), make_cap)
        out, lse = _attend(q, k, v, with_lse, numbers)
    else:
        with torch.inference_mode(False):  # a later call may train with the cached mask
            numbers = _numbers(q, k, options, make_mask(*mask), make_cap)
        for t in (q, k, v):
            internals.mark_static(t, (1, 3))
            internals.mark_varying(t, (0, 2))
        out, lse = _compiled(Configuration.of(q, k, options, with_lse))(q, k, v, with_lse, numbers)
    if options.return_lse and not with_lse:
        lse = sdpa.logsumexp(q, k, options)
    out = out.transpose(1, 2)
    if blind:
        out = F.pad(out, (0, 0, 0, 0, blind, 0))
        lse = None if lse is None else F.pad(lse, (blind, 0), value=-math.inf)
    return out, lse


# Projection and attention: to ``[B, T, H * D]``; a workspace holds the projection.
layer = partial(sdpa.layer, attend=packed_attention)


def _numbers(
    q: Tensor, k: Tensor, options: AttentionOptions, mask: "BlockMask", cap: Callable[..., Any]
) -> dict[str, Any]:
    """The keyword arguments of flex_attention."""
    return {
        "score_mod": cap(options.softcap, q.device) if options.softcap else None,
        "block_mask": mask,
        "scale": options.softmax_scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }


# The compiled function


@dataclass(frozen=True)
class Configuration:
    """What the compiled code depends on besides lengths, bounds of masks and caps.

    ``ones``: which sizes are 1, as the compiler takes those for numbers: the batch, and queries,
    keys, blocks of either. ``one_length``: of queries and keys, as it takes equal sizes of views'
    bases for one.
    """

    device: torch.device
    dtype: torch.dtype
    heads: tuple[int, int, int]  # H, H_kv, D
    softmax_scale: float | None
    bounded: tuple[bool, bool]  # to the left, to the right
    capped: bool
    with_lse: bool
    ones: tuple[bool, ...]
    one_length: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, options: AttentionOptions, with_lse: bool) -> "Configuration":
        """That of a call on ``q [B, H, T, D]`` and ``k [B, H_kv, T, D]``."""
        left, right = options.reach
        return cls(
            q.device,
            q.dtype,
            (q.shape[1], k.shape[1], q.shape[3]),
            options.softmax_scale,
            (left >= 0, right >= 0),
            options.softcap > 0,
            with_lse,
            (
                q.shape[0] == 1,
                *(size >= T for T in (q.shape[2], k.shape[2]) for size in (1, BLOCK)),
            ),
            q.shape[2] == k.shape[2],
        )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, with_lse: bool, numbers: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """``softmax(mask(cap(scale * q kᵀ))) v`` over ``[B, H, T, D]``, and its logsumexp."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    if not with_lse:
        return flex_attention(q, k, v, **numbers), None
    out, aux = flex_attention(q, k, v, **numbers, return_aux=AuxRequest(lse=True))
    return out, aux.lse


@cache
def _compiled(configuration: Configuration) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """:func:`_attend`, compiled for any lengths."""

    def attend(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        return _attend(*arguments)

    # The compiler counts and limits what it compiles by code object: each configuration has one.
    attend.__code__ = attend.__code__.replace()
    return torch.compile(attend, dynamic=True, fullgraph=True)


# Masks and score_mods. Bounds are tensors, so a new value does not recompile.


def kept(make: Any, device: torch.device) -> Callable[..., Any]:
    """``_mask`` or ``_cap``; uncached where tensors made now must not be reused (tracing)."""
    return make if may_keep(device) else make.__wrapped__


@lru_cache(maxsize=KEPT)
def _mask(T_q: int, T_k: int, left: int, right: int, device: torch.device) -> "BlockMask":
    """Keys from ``left`` before to ``right`` after a query, bottom-right aligned; -1: all.

    Written down block by block: a mask of single scores would have ``T_q * T_k`` elements.
    """
    from torch.nn.attention.flex_attention import BlockMask

    q_first, k_first = (torch.arange(0, T, BLOCK, device=device) for T in (T_q, T_k))
    q_last, k_last = q_first + BLOCK - 1, k_first + BLOCK - 1
    # Key position minus query position: least and greatest of each block, [q_blocks, k_blocks].
    least = k_first - q_last.clamp(max=T_q - 1)[:, None]
    most = k_last.clamp(max=T_k - 1) - q_first[:, None]
    some = torch.ones_like(least, dtype=torch.bool)
    whole = (q_last < T_q)[:, None] & (k_last < T_k)  # the last ones are cut off
    offset = index(T_k - T_q)  # never a tracer's symbol: code for CPUs cannot hold one
    lowest, highest = offset - left, offset + right
    if left >= 0:
        some, whole = some & (most >= lowest), whole & (least >= lowest)
    if right >= 0:
        some, whole = some & (least <= highest), whole & (most <= highest)
    mask = BlockMask.from_kv_blocks(
        *_counted(some & ~whole),
        *_counted(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=_rule(
            _number(lowest, torch.int32, device) if left >= 0 else None,
            _number(highest, torch.int32, device) if right >= 0 else None,
        ),
        seq_lengths=(T_q, T_k),
    )
    if not torch.compiler.is_compiling():
        for t in mask.as_tuple():
            if isinstance(t, Tensor):
                internals.mark_varying(t, range(2, t.dim()))
    return mask


def _counted(table: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row, and all of the row's indices, those first."""
    table = table[None, None].int()
    order = table.argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32), order.int()


def _rule(lowest: Any, highest: Any) -> Callable[..., Tensor] | None:
    """The mask_mod: keys from ``lowest`` to ``highest`` ahead of a query; None is no bound."""

    def from_lowest(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k - q >= lowest

    def to_highest(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k - q <= highest

    def between(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k - q >= lowest) & (k - q <= highest)

    if lowest is None:
        return None if highest is None else to_highest
    return from_lowest if highest is None else between


@lru_cache(maxsize=KEPT)
def _cap(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    """The score_mod of ``softcap * tanh(score / softcap)``."""
    cap = _number(softcap, torch.float32, device)

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor | float:
    """A scalar on the device, without a copy from the host; in a tracer's code, the number."""
    if torch.compiler.is_compiling():
        return value
    return torch.full((), value, dtype=dtype, device=device)


# Devices


@internals.constant
def _device_unsupported(device: torch.device) -> str | None:
    return _look_at(device)


@cache
def _look_at(device: torch.device) -> str | None:
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        if not capability.startswith("AVX"):
            return f"flex_attention on a CPU needs AVX2, this one has {capability}"
        return None
    if device.type != "cuda":
        return f"flex_attention is for CUDA and CPU tensors here, got tensors on {device}"
    if find_spec("triton") is None:
        return "flex_attention on a GPU needs triton, which is not installed"
    return too_old("flex_attention needs", device)
