"""What forward and backward of ``compose`` share: bundles, gates, products, columns."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ra_triton.kernels.tiles import dot
from ra_triton.launch.plans import Layout, layout_of
from ra_triton.weights.factors import Factors
from ra_triton.weights.layout import RALayout

Layouts = tuple[Layout | None, ...]  # of the tensors of Factors
Dtypes = tuple[torch.dtype, torch.dtype | None, torch.dtype | None]  # of weights and gates
Given = tuple[float | None, float | None, int, int, bool]  # the numbers of Factors

NO_GATE, NUMBER, TENSOR = 0, 1, 2  # what a gate is
_NUMBER, _TENSOR = tl.constexpr(NUMBER), tl.constexpr(TENSOR)


class Strides(NamedTuple):
    """Of rows; of heads and lanes of W_recip; of gates. Last dims have stride 1."""

    q: int
    k: int
    v: int
    recip_h: int  # 0: one for all heads
    recip_d: int
    std: int  # 0: one for all heads
    rec: int


class Sizes(NamedTuple):
    """What the grid is made of."""

    C: int
    H: int
    H_kv: int


class Numbers(NamedTuple):
    """Gates that are numbers, and H_kv / H."""

    std: float
    rec: float
    mean: float


@triton.jit
def gate(ptr, number, h, stride, KIND: tl.constexpr):
    """``w[h]`` in float32."""
    value = tl.cast(1.0, tl.float32)
    if KIND == _NUMBER:
        value = tl.cast(number, tl.float32)
    elif KIND == _TENSOR:
        value = tl.load(ptr + tl.cast(h, tl.int64) * stride).to(tl.float32)
    return value


@triton.jit
def product(a, b, acc):
    """``acc + a b`` in float32, exactly what the operands hold: IEEE, widened if they differ."""
    if a.dtype == b.dtype:
        acc = dot(a, b, acc, "ieee")
    else:
        acc = dot(a.to(tl.float32), b.to(tl.float32), acc, "ieee")
    return acc


@triton.jit
def columns(h, sizes, SECTION: tl.constexpr, V: tl.constexpr):
    """First column of head ``h`` of a section of ``RALayout.split_sections``, in either order."""
    H, H_kv = sizes.H, sizes.H_kv
    D: tl.constexpr = V.D
    STD: tl.constexpr = V.D - V.R
    if V.PACKED:
        if SECTION == "q_std":
            first = h * D
        elif SECTION == "k_low":
            first = h * D + STD
        elif SECTION == "k_std":
            first = (H + h) * D
        elif SECTION == "q_low":
            first = (H + h) * D + STD
        else:
            first = (H + H_kv + h) * D
    elif SECTION == "q_std":
        first = h * STD
    elif SECTION == "k_std":
        first = (H + h) * STD
    elif SECTION == "v":
        first = (H + H_kv) * STD + h * D
    elif SECTION == "q_low":
        first = (H + H_kv) * STD + H_kv * D + h * V.R
    else:
        first = (H + H_kv) * STD + H_kv * (D + V.R) + h * V.R
    return first


def with_unit_strides(factors: Factors) -> tuple[Tensor | None, ...]:
    """The tensors, copied where the last dim of one has another stride than 1; gates may."""
    return tuple(
        t if t is None or i in (4, 5) or t.stride(-1) == 1 else t.contiguous()
        for i, t in enumerate(factors.tensors)
    )


def key_of(tensors: tuple[Tensor | None, ...], factors: Factors) -> tuple[Dtypes, Layouts, Given]:
    """What a plan depends on besides device, target and result: dtypes, layouts, numbers."""
    layouts = tuple(None if t is None else layout_of(t) for t in tensors)
    w_std, w_rec = (None if gate is None else gate.dtype for gate in tensors[4:6])
    return (factors.W_q.dtype, w_std, w_rec), layouts, factors.numbers


def common_arguments(layouts: Layouts, numbers: Given) -> tuple[RALayout, dict[str, Any]]:
    """The columns, and the kernel arguments that forward and backward share."""
    q, k, v, recip, w_std, w_rec = layouts[:6]
    std, rec, H, H_kv, _ = numbers
    assert q is not None
    assert k is not None
    assert v is not None
    R = 0 if recip is None else recip.shape[-1]
    recip_h, recip_d = (0, 0) if recip is None else (0, *recip.strides)[-3:-1]
    of_std, of_rec = (0 if g is None or not g.shape else g.strides[0] for g in (w_std, w_rec))
    rows = (t.strides[0] for t in (q, k, v))
    return RALayout(H, H_kv, q.shape[1] // H, R), {
        "strides": Strides._make((*rows, recip_h, recip_d, of_std, of_rec)),
        "sizes": Sizes(q.shape[0], H, H_kv),
        "numbers": Numbers(
            1.0 if std is None else float(std), 1.0 if rec is None else float(rec), H_kv / H
        ),
    }


def variant_of(layouts: Layouts, numbers: Given, layout: RALayout) -> dict[str, Any]:
    """What the code of both directions depends on."""

    def kind(tensor: Layout | None, number: float | None) -> int:
        return TENSOR if tensor is not None else NO_GATE if number is None else NUMBER

    return {
        "D": layout.head_dim,
        "R": layout.R,
        "STD": kind(layouts[4], numbers[0]),
        "REC": kind(layouts[5], numbers[1]),
        "BIAS": layouts[6] is not None,
        "PACKED": numbers[4],
    }
