"""Tables of cosines and sines for rotary position embedding, made on demand."""

from typing import Any

import torch
from torch import Tensor

from ra_triton.call.norm_rope import check_positions
from ra_triton.checks import may_keep
from ra_triton.workspace import stream_id

THETA = 10000.0  # Llama's and GPT-NeoX's
Tables = tuple[Tensor, Tensor]


class RotaryTables:
    """``cos, sin`` ``[positions, rope_dims / 2]`` in float32, as Hugging Face computes them.

    They are no buffers of the module, so casting a model leaves them in float32, and no checkpoint
    holds them. Tables are cached for each device and stream, twice as long as they had to be; not
    while tracing, in a transform or in a capture.

    Attributes:
        rope_dims: lanes that turn.
        theta: the longest wave length is about ``2 pi theta`` positions.
    """

    def __init__(self, rope_dims: int, theta: float) -> None:
        """No tables yet."""
        self.rope_dims, self.theta = rope_dims, theta
        self._kept: dict[tuple[torch.device, int], Tables] = {}

    def options(self, position: int | Tensor, q: Tensor) -> dict[str, Any]:
        """The arguments of ``pack_qk`` for ``q [B, T, H, D]``.

        An int position is 0 or more. Those of a tensor are not read; negative ones turn backwards.
        """
        B, T = q.shape[:2]
        if isinstance(position, Tensor):
            # One row for each token, so the host need not know the largest position.
            position = check_positions(position, q)
            if position.dim() == 1:
                position = position[:, None] + torch.arange(T, device=q.device)
            rows = torch.arange(B * T, device=q.device).view(B, T)
            rope = self.at(position.flatten())
            return {"rope": rope, "position": rows, "rope_dims": self.rope_dims}
        if type(position) is int and position < 0:
            raise ValueError(f"position must be at least 0, got {position}")
        end = position + T if type(position) is int else T
        return {
            "rope": self.rows(max(end, 1), q.device),
            "position": position,
            "rope_dims": self.rope_dims,
        }

    def rows(self, length: int, device: torch.device) -> Tables:
        """At least ``length`` rows: those of positions 0, 1, ..."""
        if not may_keep(device):
            return self.at(torch.arange(length, device=device))
        key = (device, stream_id(device))
        if key not in self._kept or len(self._kept[key][0]) < length:
            # A tensor born in inference mode could not take part in a graph later.
            with torch.inference_mode(False), torch.no_grad():
                self._kept[key] = self.at(torch.arange(2 * length, device=device))
        return self._kept[key]

    def at(self, positions: Tensor) -> Tables:
        """One row for each of ``positions [n]``."""
        exponents = torch.arange(0, self.rope_dims, 2, device=positions.device).float()
        angles = positions[:, None].float() * (1.0 / self.theta ** (exponents / self.rope_dims))
        return angles.cos(), angles.sin()

    def __repr__(self) -> str:
        """Lanes and theta, for ``print(model)``."""
        return f"RotaryTables({self.rope_dims}, theta={self.theta:g})"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without tables."""
        return {**self.__dict__, "_kept": {}}
