"""FLOP formulas of the operators, for ``torch.utils.flop_counter``: two a multiply-add.

Counted as PyTorch counts its own attention: all ``T_q * T_k`` scores, whatever a causal mask or a
window leaves out, two products of that size in the forward and five in the backward. Of a backward
only what is needed counts.
"""

import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ra_triton import internals

_formulas: dict[str, Callable[..., int]] = {}


def count(name: str, formula: Callable[..., int]) -> None:
    """Give the operator of this name its formula: ``formula(*args, out_val=result)``."""
    _formulas[name] = formula


def count_all() -> None:
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
            registry.update({getattr(torch.ops.ra_triton, n): f for n, f in _formulas.items()})


def gemm(x: Tensor, columns: int) -> int:
    """``x [B, T, C]`` times ``[C, columns]``, or one of its gradients."""
    return 2 * prod(x.shape) * columns


def scores(q: Tensor, T_k: int, offsets: Sequence[Any]) -> int:
    """One product of the queries ``q [B, T_q, H, D]`` and their keys.

    ``offsets``: cu_seqlens and the longest sequences, which count where a fake tensor has no
    values; cu_seqlens of None where there are none.
    """
    B, T_q, H, D = q.shape
    pairs = B * T_q * T_k
    if offsets[0] is not None:
        cu_seqlens_q, cu_seqlens_k, most_q, most_k = offsets
        if type(cu_seqlens_q) is Tensor:
            pairs = int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff()).sum())
        else:
            pairs = (len(cu_seqlens_q) - 1) * most_q * most_k
    return 2 * pairs * H * D
