"""What weights for inference share: some columns of a fused projection are in a cheaper form.

``weights/quantization.py`` has int8 columns, ``weights/sparsity.py`` 2:4 sparse ones.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ra_triton import internals
from ra_triton.checks import (
    check_dims,
    check_float_tensor,
    check_rows,
    check_same,
    check_shape,
    needs_grad,
)
from ra_triton.weights.layout import RALayout

WHICH = ("reciprocal", "all")


class ReducedWeight(ABC):
    """A fused projection whose matrices hold a column of W_fused per row, as ``nn.Linear`` does.

    ``data`` has all columns in packed order, or ``[K_low | Q_low]``; ``others`` the columns
    ``[Q_std | K_std | V]`` as they were, None where there are none.
    """

    data: Any
    others: Any
    layout: Any
    kind: ClassVar[tuple[str, str]]  # as errors call it
    has_forward_mode: ClassVar[bool]  # whether its product has tangents

    @property
    def which(self) -> str:
        """``"all"`` or ``"reciprocal"``: the columns that are reduced."""
        return "all" if self.others is None else "reciprocal"

    @property
    def shape(self) -> tuple[int, int]:
        """``(C, N)``, that of W_fused."""
        return self.data.shape[1], self.layout.columns

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self.data.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that a projection by this weight reads."""
        return (self.data,) if self.others is None else (self.data, self.others)

    @abstractmethod
    def check_dtype(self, dtype: torch.dtype) -> None:
        """TypeError if it cannot be multiplied with an x in this dtype."""


def tensors_of(W: Tensor | ReducedWeight) -> tuple[Tensor, ...]:
    """What a weight is made of."""
    return W.tensors if isinstance(W, ReducedWeight) else (W,)


def layout_of_columns(
    W_fused: Tensor, R: int, which: str, n_head: int | None, n_kv_head: int | None
) -> RALayout:
    """The columns of ``W_fused [C, N]``, some of which are to be reduced.

    Raises:
        ValueError: sizes that do not fit, or ``which="reciprocal"`` with R = 0.
    """
    layout = RALayout.from_columns(W_fused.shape[1], R, n_head, n_kv_head)
    if which == "reciprocal" and R == 0:
        raise ValueError("which='reciprocal' needs R >= 1, got R=0: there is no such column")
    return layout


def take_columns(
    W_fused: Tensor, layout: RALayout, which: str, weight_layout: str
) -> tuple[Tensor, Tensor | None]:
    """The columns to reduce and the others, each a row: ``[N_r, C]`` and ``[N - N_r, C]``."""
    if not W_fused.isfinite().all():
        raise ValueError("W_fused must be finite, got NaN or infinity")
    W_packed = layout.pack(W_fused) if weight_layout == "split" else W_fused
    if which == "all":
        return W_packed.mT.contiguous(), None
    low, others = layout.take_low(W_packed)
    return low.mT.contiguous(), others.mT.clone(memory_format=torch.contiguous_format)


def check_reduced_inputs(
    x: Tensor,
    W: ReducedWeight,
    bias: Tensor | None,
    R: int,
    n_head: int | None,
    n_kv_head: int | None,
) -> None:
    """Shapes, dtypes and devices; sizes that differ from those of the weight; gradients."""
    check_float_tensor("x", x)
    check_dims("x", x, "[B, T, C]")
    check_rows("x", x.shape[:2])
    if W.device != x.device:
        raise ValueError(f"W_fused must be on {x.device} like x, got {W.device}")
    W.check_dtype(x.dtype)
    if W.shape[0] != x.shape[-1]:
        raise ValueError(f"W_fused must be [C, N] with C = {x.shape[-1]} like x, got {W.shape}")
    for name, value in {"R": R, "n_head": n_head, "n_kv_head": n_kv_head}.items():
        expected = getattr(W.layout, name)
        if value is not None and (type(value) is not int or value != expected):
            error = ValueError if type(value) is int else TypeError
            raise error(f"{name} must be {expected} like the {W.kind[0]} weight's, got {value!r}")
    if bias is not None:
        check_float_tensor("bias", bias)
        check_same("x", x, bias=bias)
        check_shape("bias", bias, (W.shape[1],), "one value per column of W_fused")
    for name, t in (("x", x), ("bias", bias)):
        if needs_grad(t) or (not W.has_forward_mode and _has_tangent(t)):
            raise ValueError(
                f"{name} needs a gradient, and {W.kind[1]} weight is for inference: use "
                "torch.no_grad(), or the weight that it was made of"
            )


def _has_tangent(t: Tensor | None) -> bool:
    if t is None or torch.compiler.is_compiling() or not internals.forward_mode():
        return False
    return forward_ad.unpack_dual(t).tangent is not None
