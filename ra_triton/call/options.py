"""The keyword options of attention, with FlashAttention's names, checked once on construction."""

import math
from dataclasses import dataclass
from typing import NamedTuple, TypedDict


class AttentionKeywords(TypedDict, total=False):
    """What the overloads of an attention function have in common, for type checkers."""

    causal: bool
    softmax_scale: float | None
    window_size: tuple[int, int]
    softcap: float
    dropout_p: float
    backend: str


NO_LIMIT = 2**30  # a window this wide is none: kernels add sides to positions in 32 bits


class Scores(NamedTuple):
    """What operators and kernels take of the options: how scores become weights.

    The window is that after ``causal``, -1 without limit: :attr:`AttentionOptions.reach`.
    """

    causal: bool
    softmax_scale: float | None
    dropout_p: float
    window_left: int
    window_right: int
    softcap: float


@dataclass(frozen=True)
class AttentionOptions:
    """Options of one attention call.

    Attributes:
        causal: bottom-right aligned: query i sees keys up to ``i + T_k - T_q``.
        softmax_scale: multiplies the scores; ``None`` means ``1/sqrt(D)``.
        window_size: ``(left, right)`` keys seen around the diagonal, both ends included; -1, or
            ``NO_LIMIT`` and more: all.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 is off.
        dropout_p: probability of dropping an attention weight.
        return_lse: also return the logsumexp of the scaled scores.
    """

    causal: bool = True
    softmax_scale: float | None = None
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    dropout_p: float = 0.0
    return_lse: bool = False

    def __post_init__(self) -> None:
        """TypeError for types, ValueError for ranges."""
        for name in ("causal", "return_lse"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if self.softmax_scale is not None:
            _check_number("softmax_scale", self.softmax_scale)
            if not 0 < self.softmax_scale < math.inf:
                raise ValueError(
                    f"softmax_scale must be finite and above 0, got {self.softmax_scale}"
                )
        window = self.window_size
        if (
            not isinstance(window, (tuple, list))
            or len(window) != 2
            or any(type(side) is not int for side in window)
        ):
            raise TypeError(f"window_size must be (left, right), two ints, got {window!r}")
        if any(side < -1 for side in window):
            raise ValueError(f"window_size sides must be -1 (no limit) or more, got {window}")
        _check_number("softcap", self.softcap)
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"softcap must be finite and at least 0 (off), got {self.softcap}")
        _check_number("dropout_p", self.dropout_p)
        if not 0 <= self.dropout_p < 1:
            raise ValueError(f"dropout_p must be in [0, 1), got {self.dropout_p}")

    @property
    def reach(self) -> tuple[int, int]:
        """``(left, right)`` after ``causal``: how far a query sees each way, -1 without limit.

        A side of ``NO_LIMIT`` or more, which other libraries write for -1, is -1 here.
        """
        left, right = (-1 if side >= NO_LIMIT else side for side in self.window_size)
        return (left, 0) if self.causal else (left, right)

    @property
    def scores(self) -> Scores:
        """As operators and kernels take them."""
        numbers = (self.causal, self.softmax_scale, float(self.dropout_p))
        return Scores(*numbers, *self.reach, float(self.softcap))


@dataclass(frozen=True)
class DecodeOptions(AttentionOptions):
    """Options of attention over a cache; causal, with queries that are each sequence's last tokens.

    Attributes:
        n_queries: tokens per sequence, ``T_q``.
    """

    n_queries: int = 1


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
