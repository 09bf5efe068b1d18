"""Int8 weights for inference: all columns of a fused projection, or the reciprocal ones alone.

A column w becomes ``scale * q``: ``scale = max(max|w| / 127, 2⁻¹²⁶)``, ``q = w / scale`` rounded to
the nearest integer, ties to even. No zero point, so zeros stay zeros, and an element is at most
half a scale off. Activations, where they are int8 too, are rounded the same way, token by token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ra_triton.checks import check_choice, check_float_tensor, check_shape
from ra_triton.weights.layout import WEIGHT_LAYOUTS, RALayout
from ra_triton.weights.reduced import WHICH, ReducedWeight, layout_of_columns, take_columns

ACTIVATIONS = ("none", "int8")
LARGEST = 127
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32, so that a zero column divides
MAX_INT8_CHANNELS = (2**31 - 1) // LARGEST**2  # that a sum in int32 holds
_SIZES = ("n_head", "n_kv_head", "head_dim", "R")


@dataclass(frozen=True, eq=False)
class QuantizedWeight(ReducedWeight):
    """A fused projection with int8 columns, made by :func:`quantize_weight`; never written.

    Both matrices hold a column of W_fused per row, as int8 tensor cores read them.

    Attributes:
        data: ``[N_q, C]`` int8, contiguous: all N columns in packed order, or ``[K_low | Q_low]``.
        scale: ``[N_q]`` float32.
        others: ``[N - N_q, C]``, contiguous: the columns ``[Q_std | K_std | V]`` in their own
            dtype, which x has to have; None where all columns are int8.
        layout: heads, head dim and R.
        activations: ``"none"`` (weight-only) or ``"int8"`` (W8A8).
    """

    data: Tensor
    scale: Tensor
    others: Tensor | None
    layout: RALayout
    activations: str = "none"
    kind: ClassVar = ("quantized", "an int8")
    has_forward_mode: ClassVar = False

    def __post_init__(self) -> None:
        """TypeError for types, ValueError for shapes."""
        check_choice("activations", self.activations, ACTIVATIONS)
        low = (self.layout.n_head + self.layout.n_kv_head) * self.layout.R
        columns = self.layout.columns if self.others is None else low
        for name, t, dtype in (
            ("data", self.data, torch.int8),
            ("scale", self.scale, torch.float32),
        ):
            if not isinstance(t, Tensor) or t.dtype != dtype:
                found = t.dtype if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(f"{name} must be a tensor of {dtype}, got {found}")
        if self.data.dim() != 2 or self.data.shape[0] != columns:
            raise ValueError(f"data must be [{columns}, C], got {tuple(self.data.shape)}")
        check_shape("scale", self.scale, (columns,), "one value per row of data")
        tensors = {"data": self.data, "scale": self.scale}
        if self.others is not None:
            check_float_tensor("others", self.others)
            shape = (self.layout.columns - low, self.data.shape[1])
            check_shape("others", self.others, shape, "[N - N_q, C]")
            tensors["others"] = self.others
        for name, t in tensors.items():
            if not t.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")
            if t.device != self.data.device:
                raise ValueError(f"{name} must be on {self.data.device} like data, got {t.device}")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that a projection reads."""
        return tuple(t for t in (self.data, self.scale, self.others) if t is not None)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """TypeError if it cannot be multiplied with an x in this dtype."""
        if self.others is not None and self.others.dtype != dtype:
            raise TypeError(
                f"W_fused must hold its other columns in {dtype} like x, got {self.others.dtype}; "
                f"use W_fused.to(dtype={dtype})"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``scale * q`` and the other columns as ``W_fused [C, N]`` in packed order.

        Args:
            dtype: of the result, a float; the products are exact in float64.

        Raises:
            TypeError: another dtype.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype!r}")
        wide = torch.promote_types(dtype, torch.float32)
        columns = (self.data.to(wide) * self.scale.to(wide)[:, None]).mT
        if self.others is not None:
            columns = self.layout.put_low(columns, self.others.mT.to(wide))
        return columns.to(dtype)

    def to(
        self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None
    ) -> "QuantizedWeight":
        """The same on another device, its float columns in another dtype; scales stay float32.

        Args:
            device: where to; None keeps it.
            dtype: of the columns that are not int8; None keeps it.
        """
        others = self.others
        if others is not None:
            others = others.to(device=device or others.device, dtype=dtype or others.dtype)
        data, scale = (t.to(device=device or t.device) for t in (self.data, self.scale))
        return QuantizedWeight(data, scale, others, self.layout, self.activations)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, ints and a string, as ``torch.load(..., weights_only=True)`` accepts them."""
        tensors = {"data": self.data, "scale": self.scale, "others": self.others}
        sizes = {name: getattr(self.layout, name) for name in _SIZES}
        return {**tensors, **sizes, "activations": self.activations}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "QuantizedWeight":
        """The inverse of :meth:`state_dict`; the tensors are shared, not copied.

        Raises:
            TypeError: a tensor that is none, or of another dtype; sizes that are no ints.
            ValueError: names that are missing or left over, sizes that do not fit.
        """
        expected = {"data", "scale", "others", *_SIZES, "activations"}
        if state.keys() != expected:
            missing, left_over = sorted(expected - state.keys()), sorted(state.keys() - expected)
            raise ValueError(f"state must have {missing} too, and not {left_over}")
        for name in _SIZES:
            if type(state[name]) is not int:
                raise TypeError(f"{name} of state must be an int, got {state[name]!r}")
        H, H_kv, D, R = (state[name] for name in _SIZES)
        layout = RALayout.from_columns((H + 2 * H_kv) * D, R, H, H_kv)
        data, scale, others = (state[name] for name in ("data", "scale", "others"))
        return cls(data, scale, others, layout, state["activations"])

    def __repr__(self) -> str:
        """Sizes, not values."""
        return (
            f"QuantizedWeight({self.which!r}, activations={self.activations!r}, "
            f"shape={self.shape}, {self.layout}, device={self.device})"
        )


@torch.no_grad()
def quantize_weight(
    W_fused: Tensor,
    R: int,
    *,
    which: str,
    n_head: int | None = None,
    n_kv_head: int | None = None,
    weight_layout: str = "split",
    activations: str = "none",
) -> QuantizedWeight:
    """Round the columns of a fused projection to int8, one scale a column; for inference.

    Weight-only int8 reads half the bytes of a 16-bit weight, which counts for a few tokens at a
    time; ``activations="int8"`` also multiplies in int8, which counts for many. ``"reciprocal"``
    rounds ``(n_head + n_kv_head) * R`` columns: of a weight without grouped heads R/D of two
    thirds, 4% at R = 4 and D = 64, so it saves 2% of the bytes and costs a second launch.

    Args:
        W_fused: ``[C, N]`` in float16, bfloat16 or float32, ``N = (n_head + 2 * n_kv_head) * D``.
        R: reciprocal rank, ``0 <= R <= D``.
        which: ``"reciprocal"`` for the columns Q_low and K_low, ``"all"``.
        n_head: query heads; ``None`` means heads of 64.
        n_kv_head: key/value heads (GQA); ``None`` means ``n_head``.
        weight_layout: column order of ``W_fused``, ``"split"`` or ``"packed"``.
        activations: ``"none"``: x stays as it is. ``"int8"``: x is rounded too wherever it meets
            int8 columns, with one scale a token, and the products are summed in int32, exactly.

    Returns:
        What :func:`ra_attention` and :func:`project` take for ``W_fused``, on the same device.

    Raises:
        TypeError: not a tensor, a dtype that is not supported, counts that are no ints.
        ValueError: shapes that do not fit, unknown choices, ``which="reciprocal"`` without
            reciprocal columns, more channels than int32 sums hold, a weight that is not finite.

    Source: per-channel symmetric quantisation, arXiv:1712.05877; W8A8 with a scale per token and
        per column, arXiv:2208.07339.
    """
    check_choice("which", which, WHICH)
    check_choice("weight_layout", weight_layout, WEIGHT_LAYOUTS)
    check_choice("activations", activations, ACTIVATIONS)
    check_float_tensor("W_fused", W_fused)
    if W_fused.dim() != 2 or W_fused.shape[0] < 1:
        raise ValueError(f"W_fused must be [C, N] with C >= 1, got {tuple(W_fused.shape)}")
    layout = layout_of_columns(W_fused, R, which, n_head, n_kv_head)
    if activations == "int8" and W_fused.shape[0] > MAX_INT8_CHANNELS:
        raise ValueError(
            f"W_fused must have at most {MAX_INT8_CHANNELS} rows with activations='int8', "
            f"whose sums are int32, got {W_fused.shape[0]}"
        )
    if W_fused.is_meta:
        raise ValueError("W_fused must hold numbers, got a tensor on meta")
    rows, others = take_columns(W_fused, layout, which, weight_layout)
    data, scale = quantize_rows(rows)
    return QuantizedWeight(data, scale, others, layout, activations)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(int8 like rows [..., C], scale [...])``; a row that is not finite has a scale of NaN."""
    rows = rows.float()
    absmax = rows.abs().amax(-1)
    finite = absmax.isfinite()
    # By a tensor: for a Python scalar, PyTorch on a GPU multiplies by its rounded reciprocal.
    scale = (absmax / torch.full_like(absmax, LARGEST)).clamp_min(SMALLEST_SCALE)
    rounded = torch.where(finite[..., None], rows / scale[..., None], 0.0).round()
    return rounded.to(torch.int8), scale.masked_fill(~finite, torch.nan)


def project(x: Tensor, W: QuantizedWeight, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """``x [B, T, C] @ W + bias`` ``[B, T, N]`` in plain torch: what the kernels compute.

    Products of x and int8 are exact in float32, as int32 sums are in float64.
    """
    with torch.autocast(x.device.type, enabled=False):
        if W.activations == "int8":
            x_int8, x_scale = quantize_rows(x)
            y = (x_int8.double() @ W.data.mT.double()).float() * x_scale[..., None]
        else:
            y = x.float() @ W.data.mT.float()
        y = y * W.scale
        if W.others is not None:
            y = W.layout.put_low(y, x.float() @ W.others.mT.float())
        if bias is not None:
            y = y + bias.float()
        return y.to(x.dtype) if out is None else out.copy_(y)
