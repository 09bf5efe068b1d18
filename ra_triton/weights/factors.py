"""What a composed weight is made of: one checked call of :func:`ra_triton.compose_weights`."""

from typing import NamedTuple

import torch
from torch import Tensor

from ra_triton.weights.layout import RALayout

TENSORS = 9  # the first fields


class Factors(NamedTuple):
    """The factors of ``W_fused`` and its bias: tensors, then numbers.

    A gate is a tensor or a number; 1 where both are None.
    """

    W_q: Tensor  # [C, H*D]
    W_k: Tensor  # [C, H_kv*D]
    W_v: Tensor  # [C, H_kv*D]
    W_recip: Tensor | None  # [D, R] or [H, D, R]; None: R = 0
    w_std: Tensor | None  # [H] or []
    w_rec: Tensor | None
    b_q: Tensor | None  # [H*D]
    b_k: Tensor | None  # [H_kv*D]
    b_v: Tensor | None  # [H_kv*D]; all three or none
    std: float | None
    rec: float | None
    n_head: int
    n_kv_head: int
    packed: bool  # the order of the columns
    dtype: torch.dtype  # of the result

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What has gradients, in order."""
        return self[:TENSORS]  # type: ignore[return-value]

    @property
    def numbers(self) -> tuple[float | None, float | None, int, int, bool]:
        """What a launch depends on besides tensors and the result's dtype."""
        return self[TENSORS:-1]  # type: ignore[return-value]

    @property
    def layout(self) -> RALayout:
        """The columns of the result."""
        R = 0 if self.W_recip is None else self.W_recip.shape[-1]
        D = self.W_q.shape[1] // self.n_head
        return RALayout(self.n_head, self.n_kv_head, D, R)
