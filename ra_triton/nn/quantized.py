"""A ``c_attn`` that holds an int8 weight, for inference."""

from typing import Any

import torch
from torch import Tensor, nn

from ra_triton.api import project
from ra_triton.weights.quantization import ACTIVATIONS, QuantizedWeight


class QuantizedLinear(nn.Module):
    """An int8 fused projection and its bias as buffers, read by attention.

    What ``RACausalSelfAttention.quantize_`` leaves in the place of ``c_attn``. Its state dict loads
    into a layer that was quantized the same way, and into no other. A cast such as
    ``.to(torch.bfloat16)`` reaches the bias and the columns that are not int8; scales stay float32.

    Attributes:
        data: see :class:`ra_triton.QuantizedWeight`, like ``scale`` and ``others``.
        bias: ``[N]`` in packed order, or None.
        activations_code: uint8, what ``activations`` is, so that a state dict says it.
    """

    activations_code: Tensor
    data: Tensor
    scale: Tensor
    others: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        """Takes over the tensors of ``weight``; ``bias [N]`` is in packed order."""
        super().__init__()
        self.layout, self.activations = weight.layout, weight.activations
        tensors = {"data": weight.data, "scale": weight.scale, "others": weight.others}
        bias = None if bias is None else bias.detach().clone()
        for name, t in {**tensors, "bias": bias}.items():
            self.register_buffer(name, t)
        code = torch.tensor(ACTIVATIONS.index(self.activations), dtype=torch.uint8)
        self.register_buffer("activations_code", code.to(weight.device))

    def quantized(self) -> QuantizedWeight:
        """The weight; it shares the buffers."""
        return QuantizedWeight(self.data, self.scale, self.others, self.layout, self.activations)

    @property
    def weight(self) -> Tensor:
        """``[N, C]`` in packed order, as of ``nn.Linear``: float32, computed on each access."""
        return self.quantized().dequantize().mT

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W_fused + bias``: ``[..., C] -> [..., N]`` in packed order, for inference."""
        weight = self.quantized()
        options: Any = {"bias": self.bias, "weight_layout": "packed"}
        packed = project(x.reshape(1, -1, x.shape[-1]), weight, weight.layout.R, **options)
        return torch.cat(packed, dim=2).view(*x.shape[:-1], weight.layout.columns)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        which, (C, N) = self.quantized().which, self.quantized().shape
        return f"which={which!r}, activations={self.activations!r}, C={C}, N={N}"

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> "QuantizedLinear":
        """Moves and casts; a scale in 16 bits would undo the accuracy of 8."""
        scale = self.scale
        super()._apply(fn, *args, **kwargs)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuses int8 columns for other activations; states that do not say are taken."""
        name = f"{prefix}activations_code"
        code = state_dict.setdefault(name, self.activations_code)
        saved = self.activations if code.is_meta else ACTIVATIONS[int(code)]
        if saved != self.activations:
            error_msgs.append(
                f"{prefix}data was quantized with activations={saved!r}, this layer with "
                f"activations={self.activations!r}: quantize_ it like the one that was saved"
            )
            return
        errors = strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *errors)
