"""The gate in front of the clock: a provider whose numbers are wrong is not timed.

The answer is ``ref`` in FP64 on exactly the (already rounded) tensors that the providers read, for
every element of every shape, gradients included where they are timed. The scale is the error that
``ref`` makes in the working dtype, eager PyTorch computing the same thing.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ra_triton
from bench.harness.providers import Layer, Problem
from bench.harness.report import ERROR, FAILED_GATE, OK, SKIPPED
from bench.harness.timing import Entrant
from ref import reciprocal_attention as ref

RMS_FACTOR = 2.0  # over all elements
ROW_FACTOR = 4.0  # over the D lanes of the worst row: one bad row cannot hide
SCORES_PER_CHUNK = 2**25  # 256 MiB of FP64 scores
NO_SDPA_KERNEL = ("No available kernel", "No viable backend")  # what PyTorch says, by device


@dataclass(frozen=True)
class Answer:
    """One exact tensor and how far from it a provider may be.

    Attributes:
        name: ``"out"`` or a gradient's.
        exact: in FP64.
        lanes: elements per row.
        rms: largest RMS error over all elements that passes.
        row: largest RMS error of a single row that passes.
    """

    name: str
    exact: Tensor
    lanes: int
    rms: float
    row: float

    @classmethod
    def of(cls, name: str, exact: Tensor, eager: Tensor, head_dim: int) -> "Answer":
        """Limits from the error of ``eager``, never below the rounding of its dtype."""
        lanes = head_dim if exact.shape[-1] % head_dim == 0 else exact.shape[-1]
        rounding = torch.finfo(eager.dtype).eps / 4 * math.sqrt(exact.square().mean().item())
        rms, row = (max(error, rounding) for error in _errors(eager, exact, lanes))
        return cls(name, exact, lanes, RMS_FACTOR * rms, ROW_FACTOR * row)

    def failure(self, found: Tensor) -> str | None:
        """What is wrong with a provider's tensor, or None."""
        if found.shape != self.exact.shape:
            return f"{self.name}: shape {tuple(found.shape)}, expected {tuple(self.exact.shape)}"
        rms, row = _errors(found, self.exact, self.lanes)
        for name, error, limit in (("RMS error", rms, self.rms), ("worst row", row, self.row)):
            if not error <= limit:  # a NaN fails
                return f"{self.name}: {name} {error:.1e}, at most {limit:.1e} passes"
        return None


@dataclass(frozen=True)
class Gate:
    """The exact outputs of a problem: ``out``, and in a training step every gradient."""

    answers: tuple[Answer, ...]

    @classmethod
    def of(cls, problem: Problem) -> "Gate":
        """The gate of a sweep's problem; gradients in the order of :func:`reference`."""
        attention = problem.stage == "attention"
        names = ("out", "dq", "dk", "dv") if attention else ("out", "dx", "dW")
        exact, eager = (reference(problem, dtype) for dtype in (torch.float64, problem.x.dtype))
        return cls.between(names, exact, eager, problem.shape.D)

    @classmethod
    def between(
        cls, names: Sequence[str], exact: Sequence[Tensor], eager: Sequence[Tensor], head_dim: int
    ) -> "Gate":
        """The gate with these answers, and limits from eager PyTorch's own error."""
        triples = zip(names, exact, eager, strict=False)  # without gradients there is out alone
        return cls(tuple(Answer.of(*triple, head_dim) for triple in triples))

    @property
    def tolerances(self) -> tuple[float, ...]:
        """How far two runs may be apart: both pass, so at most twice each limit."""
        return tuple(2 * answer.rms for answer in self.answers)

    def failure(self, found: Sequence[Tensor]) -> str | None:
        """What is wrong with a provider's outputs, or None."""
        if len(found) != len(self.answers):
            return f"{len(found)} outputs, expected {len(self.answers)}"
        for answer, t in zip(self.answers, found, strict=True):
            reason = answer.failure(t)
            if reason is not None:
                return reason
        return None


def admit(
    name: str,
    make: Callable[[], Layer],
    gate: Gate,
    dout: Tensor | None,
    context: Callable[[], AbstractContextManager[Any]],
) -> tuple[Entrant | None, str, str]:
    """Run a layer once: ``(entrant, "ok", "")``, or ``(None, status, why not)``."""
    try:
        with context():
            layer = make()
            # What the allocator hands out next is NaN: an element that is not written shows.
            for t in layer.inputs:
                torch.full_like(t, float("nan"), requires_grad=False)
            failure = gate.failure(layer.packed_order(layer.run(dout)))
    except Exception as error:
        return None, *why_it_broke(error)
    if failure is not None:
        return None, FAILED_GATE, failure
    call = layer.forward if dout is None else lambda: layer.run(dout)
    tolerances = gate.tolerances
    return Entrant(name, call, context, tolerances), OK, ""


def why_it_broke(error: Exception) -> tuple[str, str]:
    """``(status, note)`` of what a provider raised."""
    if isinstance(error, torch.OutOfMemoryError):
        return SKIPPED, "out of memory"
    message = str(error).strip().partition("\n")[0]
    if any(text in message for text in NO_SDPA_KERNEL):
        return SKIPPED, "no such SDPA kernel for this dtype, shape and GPU"
    return ERROR, f"{type(error).__name__}: {message}"


def reference(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A problem's answers by ``ref`` in ``dtype``.

    Returns:
        ``(out,)``; of a training problem ``(out, dx, dW)``, W in packed order, or of the stage
        ``attention`` ``(out, dq, dk, dv)``.
    """
    R, H = problem.R, problem.shape.H

    def layer(x: Tensor, W_packed: Tensor) -> Tensor:
        y = x @ ra_triton.unpack_weight(W_packed, R, n_head=H)
        return attention(*ref.split_lanes(y, R, H)).flatten(2)

    if problem.stage == "attention":
        return answer(attention, problem.qkv, problem.dout, dtype)
    return answer(layer, (problem.x, problem.W_packed), problem.dout, dtype)


def answer(
    layer: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dout: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """``(layer(*inputs),)`` in ``dtype``, with the gradients by all inputs if there is a dout."""
    train = dout is not None
    leaves = [t.detach().to(dtype).requires_grad_(train) for t in inputs]
    with torch.set_grad_enabled(train):
        out = layer(*leaves)
        if dout is None:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype)))


def attention(q_pack: Tensor, k_pack: Tensor, v: Tensor) -> Tensor:
    """Causal attention by ``ref``, ``[B, T, H, D]``: queries in chunks, differentiable."""
    B, T, H, _ = q_pack.shape
    rows = max(1, SCORES_PER_CHUNK // (B * H * T))
    k, v = k_pack.double(), v.double()  # the chunks' gradients add up in FP64
    chunks = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        operands = q_pack[:, start:stop], k[:, :stop], v[:, :stop]
        # Backward computes a chunk's scores again: those of all chunks do not fit.
        chunks.append(checkpoint(_chunk, *operands, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(chunks, dim=1)


def _chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last queries of the keys so far: causal attention is aligned bottom-right."""
    return ref.packed_attention(q, k.to(q.dtype), v.to(q.dtype))[0]


def _errors(found: Tensor, exact: Tensor, lanes: int) -> tuple[float, float]:
    """RMS over all elements, and the largest RMS over one row of ``lanes``."""
    squares = (found.to(exact.dtype) - exact).square_().unflatten(-1, (-1, lanes)).mean(-1)
    return math.sqrt(squares.mean().item()), math.sqrt(squares.max().item())
