"""FLOP formulas of the operators, for ``torch.utils.flop_counter``: two a multiply-add.

Counted as PyTorch counts its own attention: all ``T_q * T_k`` scores, whatever a causal mask or a
window leaves out, two products of that size in the forward and five in the backward. Of a backward
only what is needed counts.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from ra_triton import internals


def register() -> None:
    """Give the formulas to PyTorch's counter if it was imported, and to those that count now.

    Not on import of this package, as the counter imports Triton. A counter copies the formulas
    when it is made, so one that is older than the first observed call gets them here.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    counters = (getattr(mode, "counter", None) for mode in internals.dispatch_modes())
    registries = [getattr(counter, "flop_registry", None) for counter in counters]
    for registry in (module.flop_registry, *registries):
        if registry is not None and torch.ops.ra_triton.layer not in registry:
            registry.update(_formulas())


@cache
def _formulas() -> dict[Any, Callable[..., int]]:
    """By operator, whose name a formula has."""
    forward = (_project, _project_quantized, _attention, _layer, _decode)
    backward = (_project_backward, _attention_backward, _layer_backward, _compose_backward)
    formulas = (*forward, _compose, *backward)
    return {getattr(torch.ops.ra_triton, f.__name__[1:]): f for f in formulas}


def _gemm(x: Tensor, columns: int) -> int:
    """``x [B, T, C]`` times ``[C, columns]``, or one of its gradients."""
    return 2 * prod(x.shape) * columns


def _scores(q: Tensor, T_k: int, offsets: Sequence[Any]) -> int:
    """One product of the queries ``q [B, T_q, H, D]`` and their keys.

    ``offsets``: nothing, or cu_seqlens and the longest sequences, which count where a fake tensor
    has no values.
    """
    B, T_q, H, D = q.shape
    pairs = B * T_q * T_k
    if offsets and offsets[0] is not None:
        cu_seqlens_q, cu_seqlens_k, most_q, most_k = offsets
        if type(cu_seqlens_q) is Tensor:
            pairs = int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff()).sum())
        else:
            pairs = (len(cu_seqlens_q) - 1) * most_q * most_k
    return 2 * pairs * H * D


def _project(x: Tensor, W_packed: Tensor, *_: Any, **__: Any) -> int:
    return _gemm(x, W_packed.shape[1])


def _project_quantized(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return _gemm(x, out_val.shape[-1])


def _project_backward(
    x: Tensor, W_packed: Tensor, dy: Tensor, needed: Sequence[bool], **_: Any
) -> int:
    return sum(needed[:2]) * _gemm(x, W_packed.shape[1])


def _attention(q_pack: Tensor, k_pack: Tensor, *args: Any, **_: Any) -> int:
    return 2 * _scores(q_pack, k_pack.shape[1], args[8:])  # beyond, what is not the default


def _attention_backward(q_pack: Tensor, k_pack: Tensor, *args: Any, **_: Any) -> int:
    *offsets, (dq, dk, dv) = args[12:]
    products = 1 + (dq or dk) + dq + dk + dv  # scores, dP, and the gradients
    return products * _scores(q_pack, k_pack.shape[1], offsets)


def _layer(x: Tensor, W_packed: Tensor, *args: Any, out_val: tuple[Tensor, ...], **_: Any) -> int:
    return _gemm(x, W_packed.shape[1]) + 2 * _scores(out_val[0], x.shape[1], args[10:])


def _layer_backward(
    x: Tensor, W_packed: Tensor, packed: Tensor, out: Tensor, *args: Any, **_: Any
) -> int:
    *offsets, needed = args[11:]
    attention = 5 * _scores(out, x.shape[1], offsets)
    return attention + sum(needed[:2]) * _gemm(x, W_packed.shape[1])


def _low_lanes(W_q: Tensor, W_recip: Tensor | None) -> int:
    """``W W_recip``, of the queries' heads, whose keys' are as many."""
    return 0 if W_recip is None else 2 * prod(W_q.shape) * W_recip.shape[-1]


def _compose(
    W_q: Tensor, W_k: Tensor, W_v: Tensor, W_recip: Tensor | None, *_: Any, **__: Any
) -> int:
    return 2 * _low_lanes(W_q, W_recip)


def _compose_backward(
    W_q: Tensor, W_k: Tensor, W_v: Tensor, W_recip: Tensor | None, *args: Any, **_: Any
) -> int:
    dW_q, dW_k, _, dW_recip, _, dw_rec, *_ = args[-1]
    products = dW_q + dW_k + dW_recip + (dW_recip or dw_rec)
    return products * _low_lanes(W_q, W_recip)


def _decode(q_pack: Tensor, *args: Any, **_: Any) -> int:
    return 2 * _scores(q_pack, args[-1], ())  # as if every sequence had the longest's length
