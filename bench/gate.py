"""The gate in front of the clock: a provider whose numbers are wrong is not timed.

The answer is ``ref`` in FP64 on exactly the (already rounded) tensors that the providers read, for
every element of every shape, in chunks of queries. The scale is the error that ``ref`` makes in the
working dtype, eager PyTorch computing the same thing.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.providers import Problem
from ref import reciprocal_attention as ref

RMS_FACTOR = 2.0  # over all elements
ROW_FACTOR = 4.0  # over the D lanes of the worst (token, head): one bad row cannot hide
SCORES_PER_CHUNK = 2**25  # 256 MiB of FP64 scores


@dataclass(frozen=True)
class Gate:
    """The exact answer of a problem and how far from it a provider may be.

    Attributes:
        exact: ``[B, T, C]`` or ``[B, T, H, D]`` in FP64.
        head_dim: lanes per row.
        rms: largest RMS error over all elements that passes.
        row: largest RMS error of a single row that passes.
    """

    exact: Tensor
    head_dim: int
    rms: float
    row: float

    @classmethod
    def of(cls, problem: Problem) -> "Gate":
        """Compute both references; the tolerance is never below the rounding of the output."""
        exact = reference(problem, torch.float64)
        eager = reference(problem, problem.x.dtype)
        D = problem.shape.D
        rounding = torch.finfo(problem.x.dtype).eps / 4 * _rms(exact)
        rms, row = (max(error, rounding) for error in _errors(eager, exact, D))
        return cls(exact, D, RMS_FACTOR * rms, ROW_FACTOR * row)

    def failure(self, out: Tensor) -> str | None:
        """What is wrong with a provider's output, or None."""
        if out.shape != self.exact.shape:
            return f"shape {tuple(out.shape)}, expected {tuple(self.exact.shape)}"
        rms, row = _errors(out, self.exact, self.head_dim)
        for name, error, limit in (("RMS error", rms, self.rms), ("worst row", row, self.row)):
            if not error <= limit:  # a NaN fails
                return f"{name} {error:.1e}, at most {limit:.1e} passes"
        return None


def reference(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The problem's answer by ``ref`` in ``dtype``: ``[B, T, C]``, or ``[B, T, H, D]``."""
    H = problem.shape.H
    if problem.stage == "attention":
        q, k, v = (t.to(dtype) for t in problem.qkv)
    else:
        y = problem.x.to(dtype) @ problem.W_split.to(dtype)
        q, k, v = ref.split_lanes(y, problem.R, H)
    B, T = q.shape[:2]
    rows = max(1, SCORES_PER_CHUNK // (B * H * T))
    chunks = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        # The last queries of the keys so far: causal attention is aligned bottom-right.
        out, _ = ref.packed_attention(q[:, start:stop], k[:, :stop], v[:, :stop])
        chunks.append(out)
    out = torch.cat(chunks, dim=1)
    return out if problem.stage == "attention" else out.flatten(2)


def _errors(out: Tensor, exact: Tensor, head_dim: int) -> tuple[float, float]:
    """RMS over all elements, and the largest RMS over one row of ``head_dim`` lanes."""
    squares = (out.to(exact.dtype) - exact).square_().unflatten(-1, (-1, head_dim)).mean(-1)
    return math.sqrt(squares.mean().item()), math.sqrt(squares.max().item())


def _rms(t: Tensor) -> float:
    return math.sqrt(t.square().mean().item())
