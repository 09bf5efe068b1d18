"""What may follow the lane exchange, in this order: an RMS norm of each head, a rotation (RoPE).

    p = [q_std | k_low]                          the exchange; or q as it is, packed already
    n = p / sqrt(mean(p²) + eps) * weight        QK-norm, over all D lanes of the packed head
    y = [a cos - b sin | b cos + a sin | rest]   [a | b | rest] = n, a and b of rope_dims / 2 lanes

and likewise for k. Norm and rotation see the packed head as any attention layer sees its head, so
packed weights with ``rope_dims = D`` are a Llama's, and with the norm a Qwen3's. Lane ``i`` turns
together with lane ``i + rope_dims / 2`` (the half split of Llama and GPT-NeoX): a rotation of all
lanes mixes a low lane with a standard one, in the scores ``k_low`` with ``k_std`` too. With
``rope_dims <= D - R`` the low lanes carry no position, and the reciprocal term stays what it was.

Norm and rotation are computed in float32 and rounded once, to the operands' dtype.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ra_triton.checks import (
    check_dims,
    check_float_tensor,
    check_pack_inputs,
    check_shape,
    may_keep,
    needs_grad,
)

Rope = tuple[Tensor, Tensor]
QKNorm = bool | tuple[Tensor, Tensor]


class NormRope(NamedTuple):
    """One checked call: its tensors, then its numbers."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, T, H_kv, D]
    q_low: Tensor | None  # [B, T, H_kv, R]; None: packed already
    k_low: Tensor | None  # [B, T, H, R]
    q_weight: Tensor | None  # [D]
    k_weight: Tensor | None
    cos: Tensor | None  # [T_max, rope_dims / 2 or more]; token t stands at row t ...
    sin: Tensor | None
    positions: Tensor | None  # ... or, [B, T], at row positions[b, t]; [B]: positions[b] + t
    rope_dims: int  # 0: no rotation
    eps: float | None  # None: no norm

    @property
    def R(self) -> int:
        """Lanes that are exchanged."""
        return 0 if self.q_low is None else self.q_low.shape[-1]


def check_norm_rope(
    q: Tensor,
    k: Tensor,
    q_low: Tensor | None,
    k_low: Tensor | None,
    rope: Rope | None,
    position: int | Tensor,
    rope_dims: int | None,
    qk_norm: QKNorm,
    norm_eps: float,
) -> NormRope:
    """The arguments of ``pack_qk`` as a call; TypeError and ValueError name what does not fit."""
    if q_low is None and k_low is None:
        for name, t in (("q", q), ("k", k)):
            check_float_tensor(name, t)
            check_dims(name, t, "[B, T, H, D]")
        none = q.new_empty(0)
        check_pack_inputs(q, k, none.expand(*k.shape[:3], 0), none.expand(*q.shape[:3], 0))
    else:
        check_pack_inputs(q, k, q_low, k_low)  # type: ignore[arg-type]
    weights, eps = _check_norm(q, qk_norm, norm_eps)
    tables = _check_rope(q, rope, position, rope_dims)
    return NormRope._make((q, k, q_low, k_low, *weights, *tables, eps))


def _check_norm(
    q: Tensor, qk_norm: QKNorm, eps: float
) -> tuple[tuple[Tensor | None, Tensor | None], float | None]:
    """``(q_weight, k_weight), eps``; eps is None without a norm."""
    check_norm_eps(eps)
    if qk_norm is False:
        return (None, None), None
    if qk_norm is True:
        return (None, None), float(eps)
    if not isinstance(qk_norm, tuple) or len(qk_norm) != 2:
        raise TypeError(f"qk_norm must be a bool or (q_weight, k_weight), got {_kind(qk_norm)}")
    for name, w in zip(("q_weight", "k_weight"), qk_norm, strict=True):
        name = f"{name} of qk_norm"
        _check_constant(name, w, q)
        check_shape(name, w, (q.shape[-1],), "[D], one value per lane,")
        if w.stride(0) != 1 and w.shape[0] > 1:
            raise ValueError(f"{name} must have stride 1, got {w.stride(0)}")
    return qk_norm, float(eps)


def _check_rope(
    q: Tensor, rope: Rope | None, position: int | Tensor, rope_dims: int | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """``cos, sin, positions, rope_dims``; an int position has been sliced off the tables."""
    if rope is None:
        if rope_dims is not None:
            raise ValueError(f"rope_dims={rope_dims} needs rope=(cos, sin)")
        if isinstance(position, Tensor) or type(position) is not int or position != 0:
            raise ValueError("position needs rope=(cos, sin)")
        return None, None, None, 0
    if not isinstance(rope, tuple) or len(rope) != 2:
        raise TypeError(f"rope must be (cos, sin) or None, got {_kind(rope)}")
    D = q.shape[-1]
    dims = check_rope_dims(rope_dims, D)
    cos, sin = rope
    for name, t in (("cos of rope", cos), ("sin of rope", sin)):
        _check_constant(name, t, q)
        check_dims(name, t, "[T_max, rope_dims / 2]")
        if t.shape[1] not in (dims // 2, dims):
            raise ValueError(
                f"{name} must be [T_max, {dims // 2}] or, both halves alike, [T_max, {dims}] with "
                f"rope_dims = {dims}, got {tuple(t.shape)}"
            )
        if needs_grad(t):
            raise ValueError(f"{name} is a constant, but requires a gradient: detach it")
    if sin.dtype != cos.dtype:
        raise TypeError(f"sin of rope must be {cos.dtype} like cos, got {sin.dtype}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin of rope must be {tuple(cos.shape)} like cos, got {tuple(sin.shape)}")
    if cos.shape[1] == dims:
        _check_halves(cos, sin)
    T = q.shape[1]
    if isinstance(position, Tensor):
        positions = check_positions(position, q)
        if cos.shape[0] < 1:
            raise ValueError("cos of rope must have at least one row")
        return cos, sin, positions, dims
    if type(position) is not int:
        raise TypeError(f"position must be an int or an int tensor, got {position!r}")
    if position < 0:
        raise ValueError(f"position must be at least 0, got {position}")
    if position + T > cos.shape[0]:
        raise ValueError(
            f"position={position} and {T} tokens need rows {position} to {position + T} of cos and "
            f"sin, which have {cos.shape[0]}"
        )
    # The launch sees the same layout wherever the rows begin, so decoding plans it once.
    return cos[position : position + T], sin[position : position + T], None, dims


def _check_halves(cos: Tensor, sin: Tensor) -> None:
    """Tables for neighbouring lanes, ``[c0, c0, c1, c1, ...]``, raise where reading costs nothing.

    One row on a CPU: the last, as all tables are alike at position 0.
    """
    readable = cos.device.type == "cpu" and may_keep(cos.device) and len(cos)
    for name, t in (("cos", cos), ("sin", sin)) if readable else ():
        first, second = t[-1].chunk(2)
        if ((first != second) & ~first.isnan()).any():
            raise ValueError(
                f"{name} of rope must have both halves alike, [c0, c1, ..., c0, c1, ...]: this "
                "rotation turns lane i with lane i + rope_dims / 2, not neighbours"
            )


def check_norm_eps(eps: float) -> None:
    """``eps`` is a number above 0."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"norm_eps must be a number, got {eps!r}")
    if not 0 < eps < math.inf:
        raise ValueError(f"norm_eps must be finite and above 0, got {eps}")


def check_rope_dims(rope_dims: int | None, D: int) -> int:
    """``rope_dims``, or all ``D`` lanes for None: an even number of them."""
    if rope_dims is None:
        if D % 2 or D < 2:
            raise ValueError(f"rope turns pairs of lanes, and D = {D} is odd: pass rope_dims")
        return D
    if type(rope_dims) is not int:
        raise TypeError(f"rope_dims must be an int or None, got {rope_dims!r}")
    if rope_dims < 2 or rope_dims % 2 or rope_dims > D:
        raise ValueError(f"rope_dims must be even, from 2 to D = {D}, got {rope_dims}")
    return rope_dims


def check_positions(position: Tensor, q: Tensor) -> Tensor:
    """``[B]`` or ``[B, T]``; a scalar tensor is that of every sequence."""
    if position.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"position must be an int32 or int64 tensor, got {position.dtype}")
    if position.device != q.device:
        raise ValueError(f"position must be on {q.device} like q, got {position.device}")
    B, T = q.shape[:2]
    if position.dim() == 0:
        return position.expand(B)
    if tuple(position.shape) not in ((B,), (B, T)):
        raise ValueError(
            f"position must be [], [B] = [{B}] or [B, T] = [{B}, {T}], got {tuple(position.shape)}"
        )
    return position


def _kind(value: object) -> str:
    """What an argument is, without its numbers."""
    length = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return type(value).__name__ + length


def _check_constant(name: str, t: Tensor, q: Tensor) -> None:
    """Float32 or q's dtype, on q's device."""
    check_float_tensor(name, t)
    if t.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"{name} must be {q.dtype} like q, or torch.float32, got {t.dtype}")
    if t.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got {t.device}")
