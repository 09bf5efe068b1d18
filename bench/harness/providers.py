"""Providers: the ways to compute one attention layer that the benchmark times, by name.

All providers of a :class:`Problem` compute the same function of the same numbers: a reciprocal
weight in packed order *is* an ordinary ``[q|k|v]`` weight, so plain attention with that weight is
both the baseline and a second opinion. Two stages: ``op`` is projection and attention,
``x [B, T, C] -> [B, T, C]``; ``attention`` starts from the projected ``[B, T, H, D]`` operands.

A provider's ``make`` returns a :class:`Layer`: the forward call, and the tensors by which a
training step differentiates it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ra_triton
from bench.harness.shapes import STAGES, Shape
from bench.harness.timing import Outputs

Forward = Callable[[], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

NO_TRITON_HERE = (
    "the Triton kernels are verified here in Triton's interpreter (make test) "
    "and timed only on a GPU"
)


@dataclass(frozen=True)
class Layer:
    """A layer as one provider holds it.

    Attributes:
        forward: the call.
        inputs: what a training step differentiates by: ``(x, weight)``, or ``(q, k, v)``.
        linear: whether the weight is held as ``nn.Linear`` holds it, ``[3 * C, C]``.
    """

    forward: Forward
    inputs: tuple[Tensor, ...]
    linear: bool = False

    def run(self, dout: Tensor | None) -> Outputs:
        """What is timed: the forward, or with a ``dout`` a training step ``(out, *gradients)``.

        The output is detached: a graph that stayed alive would tie the next, captured, step to the
        stream of this one.
        """
        out = self.forward()
        if dout is None:
            return out
        return (out.detach(), *torch.autograd.grad(out, self.inputs, dout))

    def packed_order(self, outputs: Outputs) -> tuple[Tensor, ...]:
        """The outputs with the weight's gradient as ``[C, 3 * C]``."""
        if isinstance(outputs, Tensor):
            return (outputs,)
        if self.linear:
            out, dx, dW = outputs
            return out, dx, dW.mT
        return outputs


@dataclass(frozen=True)
class Problem:
    """The tensors of one case, in the working dtype; read by every provider, written by none.

    In a training step ``dout`` is there, and x, the packed weight and q, k, v are leaves that
    require a gradient.
    """

    shape: Shape
    R: int
    stage: str
    x: Tensor  # [B, T, C]
    W_split: Tensor  # [C, 3 * C], columns [Q_std|K_std|V|Q_low|K_low]
    W_packed: Tensor  # the same columns as [q_pack|k_pack|V]
    qkv: tuple[Tensor, ...]  # [B, T, H, D] each, views of one buffer [B, T, 3, H, D]
    dout: Tensor | None  # of the output's shape


@dataclass(frozen=True)
class Provider:
    """One way to compute the layer.

    Attributes:
        make: builds the layer for a problem; whatever can be prepared is prepared here.
        plain: whether this is plain attention, a baseline for the ratio.
        compiled: whether each new shape costs a ``torch.compile``.
        unavailable: why it cannot run on a device type, or None.
        context: entered around each run of calls, outside of what is timed.
        stages: what it can compute.
    """

    make: Callable[[Problem], Layer]
    plain: bool = False
    compiled: bool = False
    unavailable: Callable[[str], str | None] = lambda device: None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    stages: tuple[str, ...] = STAGES

    def reason_to_skip(self, device: str, stage: str) -> str | None:
        """Why it cannot run a stage on a device type, or None."""
        if stage not in self.stages:
            return f"has no stage {stage} of its own"
        return self.unavailable(device)


@torch.no_grad()
def make_problem(
    shape: Shape,
    R: int,
    stage: str,
    dtype: torch.dtype,
    device: torch.device,
    phase: str = "forward",
) -> Problem:
    """Random activations of unit variance and weights that keep it, composed from factors."""
    generator = torch.Generator(device).manual_seed(shape.T + R)

    def randn(*sizes: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(sizes, generator=generator, device=device)

    B, T, C, H, D = shape.B, shape.T, shape.C, shape.H, shape.D
    W_q, W_k, W_v = (randn(C, C, scale=C**-0.5) for _ in range(3))
    W_recip = randn(D, R, scale=D**-0.5)
    W_split = ra_triton.compose_weights(W_q, W_k, W_v, W_recip, n_head=H).to(dtype)
    W_packed = ra_triton.pack_weight(W_split, R, n_head=H)
    x = randn(B, T, C).to(dtype)
    qkv = (x @ W_packed).view(B, T, 3, H, D).unbind(2)
    if phase == "forward":
        return Problem(shape, R, stage, x, W_split, W_packed, qkv, None)
    dout = randn(B, T, C).to(dtype)
    dout = dout.view(B, T, H, D) if stage == "attention" else dout
    x, W_packed, q, k, v = (t.detach().requires_grad_() for t in (x, W_packed, *qkv))
    return Problem(shape, R, stage, x, W_split, W_packed, (q, k, v), dout)


def plain_layer(x: Tensor, weight: Tensor, n_head: int, attend: Attend) -> Tensor:
    """Attention as in nanoGPT, without its output projection: ``[B, T, C] -> [B, T, C]``."""
    B, T, C = x.shape
    q, k, v = F.linear(x, weight).split(C, dim=2)
    q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in (q, k, v))
    return attend(q, k, v).transpose(1, 2).contiguous().view(B, T, C)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention over ``[B, H, T, D]``, by whichever kernel PyTorch chooses."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def seed_layer(x: Tensor, weight: Tensor, n_head: int) -> Tensor:
    """Plain attention as the original prototype ran it: q, k and v each made contiguous."""
    B, T, C = x.shape
    q, k, v = F.linear(x, weight).split(C, dim=2)
    q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2).contiguous() for t in (q, k, v))
    return causal_sdpa(q, k, v).transpose(1, 2).contiguous().view(B, T, C)


def _ra(backend: str, problem: Problem, compiled: bool = False) -> Layer:
    """``ra_attention`` on a packed weight, as a model calls it."""
    wrap = compile_static if compiled else _as_it_is
    if problem.stage == "attention":
        attend = partial(wrap(ra_triton.packed_attention), *problem.qkv, backend=backend)
        return Layer(attend, problem.qkv)
    forward = partial(
        wrap(ra_triton.ra_attention),
        problem.x,
        problem.W_packed,
        problem.R,
        n_head=problem.shape.H,
        weight_layout="packed",
        backend=backend,
    )
    return Layer(forward, (problem.x, problem.W_packed))


def _plain(problem: Problem, attend: Attend = causal_sdpa) -> Layer:
    """Plain attention with an ``nn.Linear`` weight, ``[3 * C, C]``."""
    if problem.stage == "attention":
        return _token_major(problem, attend)
    return _linear(problem, plain_layer, problem.shape.H, attend)


def _plain_compiled(problem: Problem) -> Layer:
    """The plain layer through ``torch.compile``."""
    if problem.stage == "attention":
        return _token_major(problem, compile_static(causal_sdpa))
    return _linear(problem, compile_static(plain_layer), problem.shape.H, causal_sdpa)


def _seed(problem: Problem) -> Layer:
    """The original baseline, up to its output projection."""
    return _linear(problem, seed_layer, problem.shape.H)


def _flex_captured(problem: Problem) -> Layer:
    """The reciprocal term as a score_mod over captured low lanes, see docs/flex.md."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, D, R = problem.shape.T, problem.shape.D, problem.R
    scale, D_std = D**-0.5, D - R
    mask = create_block_mask(_causal_rule, None, None, T, T, device=str(problem.x.device))
    compiled = compile_static(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_low, q_low = q[..., D_std:], k[..., D_std:]

        def reciprocal(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + scale * sum(k_low[b, h, i, r] * q_low[b, h, j, r] for r in range(R))

        q, k = q[..., :D_std], k[..., :D_std]
        return compiled(q, k, v, score_mod=reciprocal, block_mask=mask, scale=scale)

    return _token_major(problem, attend)


def _token_major(problem: Problem, attend: Attend) -> Layer:
    """Attention over ``[B, H, T, D]``, as a stage that takes and gives ``[B, T, H, D]``."""
    qkv = problem.qkv
    return Layer(lambda: attend(*(t.transpose(1, 2) for t in qkv)).transpose(1, 2), qkv)


def _linear(problem: Problem, layer: Callable[..., Tensor], *args: Any) -> Layer:
    """A layer ``layer(x, weight, *args)`` with the problem's weight as ``nn.Linear`` holds it."""
    weight = problem.W_packed.detach().mT.contiguous()
    weight.requires_grad_(problem.W_packed.requires_grad)
    return Layer(partial(layer, problem.x, weight, *args), (problem.x, weight), linear=True)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _causal_rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@cache
def compile_static(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for all shapes, specialised to each: dynamic shapes run slower."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False)


def _cuda_only(device: str) -> str | None:
    return None if device == "cuda" else "needs a CUDA device"


def _triton_only_on_gpu(device: str) -> str | None:
    return None if device == "cuda" else NO_TRITON_HERE


def _pinned(
    backend: SDPBackend,
    make: Callable[[Problem], Layer] = _plain,
    stages: tuple[str, ...] = STAGES,
) -> Provider:
    """Plain attention by one of SDPA's kernels."""
    context = partial(sdpa_kernel, backend)
    return Provider(make, plain=True, unavailable=_cuda_only, context=context, stages=stages)


PROVIDERS: dict[str, Provider] = {
    "ra-triton": Provider(partial(_ra, "triton"), unavailable=_triton_only_on_gpu),
    "ra-triton-compiled": Provider(
        partial(_ra, "triton", compiled=True), compiled=True, unavailable=_triton_only_on_gpu
    ),
    "ra-sdpa": Provider(partial(_ra, "sdpa")),
    "ra-flex": Provider(partial(_ra, "flex"), compiled=True),
    "ra-flex-compiled": Provider(
        partial(_ra, "flex", compiled=True), compiled=True, unavailable=_cuda_only
    ),
    "ra-flex-captured": Provider(_flex_captured, compiled=True, stages=("attention",)),
    "plain-sdpa": Provider(_plain, plain=True),
    "plain-seed": _pinned(SDPBackend.FLASH_ATTENTION, _seed, stages=("op",)),
    "plain-flash": _pinned(SDPBackend.FLASH_ATTENTION),
    "plain-cudnn": _pinned(SDPBackend.CUDNN_ATTENTION),
    "plain-efficient": _pinned(SDPBackend.EFFICIENT_ATTENTION),
    "plain-compiled": Provider(_plain_compiled, plain=True, compiled=True, unavailable=_cuda_only),
}


def available(device: str, stage: str) -> list[str]:
    """Names of the providers that run a stage on a device type, in the order of the registry."""
    here = PROVIDERS.items()
    return [name for name, provider in here if provider.reason_to_skip(device, stage) is None]
