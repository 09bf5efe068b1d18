"""Providers: the ways to compute one attention layer that the benchmark times, by name.

All providers of a :class:`Problem` compute the same function of the same numbers: a reciprocal
weight in packed order *is* an ordinary ``[q|k|v]`` weight, so plain attention with that weight is
both the baseline and a second opinion. Two stages: ``op`` is projection and attention,
``x [B, T, C] -> [B, T, C]``; ``attention`` starts from the projected ``[B, T, H, D]`` operands.

A provider's ``make`` returns the forward call; a backward would be a second maker beside it.
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
from bench.shapes import Shape

Forward = Callable[[], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

NO_TRITON_HERE = (
    "the Triton kernels are verified here in Triton's interpreter (make test) "
    "and timed only on a GPU"
)


@dataclass(frozen=True)
class Problem:
    """The tensors of one case, in the working dtype; read by every provider, written by none."""

    shape: Shape
    R: int
    stage: str
    x: Tensor  # [B, T, C]
    W_split: Tensor  # [C, 3 * C], columns [Q_std|K_std|V|Q_low|K_low]
    W_packed: Tensor  # the same columns as [q_pack|k_pack|V]
    qkv: tuple[Tensor, Tensor, Tensor]  # [B, T, H, D], views of one buffer [B, T, 3, H, D]


@dataclass(frozen=True)
class Provider:
    """One way to compute the layer.

    Attributes:
        make: builds the forward call for a problem; whatever can be prepared is prepared here.
        plain: whether this is plain attention, a baseline for the ratio.
        compiled: whether each new shape costs a ``torch.compile``.
        unavailable: why it cannot run on a device type, or None.
        context: entered around each run of calls, outside of what is timed.
    """

    make: Callable[[Problem], Forward]
    plain: bool = False
    compiled: bool = False
    unavailable: Callable[[str], str | None] = lambda device: None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def make_problem(
    shape: Shape, R: int, stage: str, dtype: torch.dtype, device: torch.device
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
    q, k, v = (x @ W_packed).view(B, T, 3, H, D).unbind(2)
    return Problem(shape, R, stage, x, W_split, W_packed, (q, k, v))


def plain_layer(x: Tensor, weight: Tensor, n_head: int, attend: Attend) -> Tensor:
    """Attention as in nanoGPT, without its output projection: ``[B, T, C] -> [B, T, C]``."""
    B, T, C = x.shape
    q, k, v = F.linear(x, weight).split(C, dim=2)
    q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in (q, k, v))
    return attend(q, k, v).transpose(1, 2).contiguous().view(B, T, C)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention over ``[B, H, T, D]``, by whichever kernel PyTorch chooses."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _ra(backend: str, problem: Problem) -> Forward:
    """``ra_attention`` on a packed weight, as a model calls it."""
    if problem.stage == "attention":
        return partial(ra_triton.packed_attention, *problem.qkv, backend=backend)  # type: ignore
    return partial(
        ra_triton.ra_attention,
        problem.x,
        problem.W_packed,
        problem.R,
        n_head=problem.shape.H,
        weight_layout="packed",
        backend=backend,
    )


def _plain(problem: Problem, attend: Attend = causal_sdpa) -> Forward:
    """Plain attention with an ``nn.Linear`` weight, ``[3 * C, C]``."""
    if problem.stage == "attention":
        return lambda: attend(*(t.transpose(1, 2) for t in problem.qkv)).transpose(1, 2)
    weight = problem.W_packed.mT.contiguous()
    return lambda: plain_layer(problem.x, weight, problem.shape.H, attend)


def _plain_compiled(problem: Problem) -> Forward:
    """The plain layer through ``torch.compile``."""
    if problem.stage == "attention":
        attend = _compile(causal_sdpa)
        return lambda: attend(*(t.transpose(1, 2) for t in problem.qkv)).transpose(1, 2)
    layer, weight = _compile(plain_layer), problem.W_packed.mT.contiguous()
    return lambda: layer(problem.x, weight, problem.shape.H, causal_sdpa)


def _flex(problem: Problem) -> Forward:
    """Reciprocal attention by compiled ``flex_attention`` over the packed operands."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = problem.shape.T
    mask = create_block_mask(_causal_rule, None, None, T, T, device=str(problem.x.device))
    compiled = _compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=mask)

    return _plain(problem, attend)


def _causal_rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@cache
def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One compiled function for all shapes, specialised to each: dynamic shapes run slower."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False)


def _cuda_only(device: str) -> str | None:
    return None if device == "cuda" else "needs a CUDA device"


def _pinned(backend: SDPBackend) -> Provider:
    """Plain attention by one of SDPA's kernels."""
    return Provider(
        _plain, plain=True, unavailable=_cuda_only, context=partial(sdpa_kernel, backend)
    )


PROVIDERS: dict[str, Provider] = {
    "ra-triton": Provider(
        partial(_ra, "triton"),
        unavailable=lambda device: None if device == "cuda" else NO_TRITON_HERE,
    ),
    "ra-sdpa": Provider(partial(_ra, "sdpa")),
    "ra-flex": Provider(_flex, compiled=True, unavailable=_cuda_only),
    "plain-sdpa": Provider(_plain, plain=True),
    "plain-flash": _pinned(SDPBackend.FLASH_ATTENTION),
    "plain-cudnn": _pinned(SDPBackend.CUDNN_ATTENTION),
    "plain-efficient": _pinned(SDPBackend.EFFICIENT_ATTENTION),
    "plain-compiled": Provider(_plain_compiled, plain=True, compiled=True, unavailable=_cuda_only),
}


def available(device: str) -> list[str]:
    """Names of the providers that run on a device type, in the order of the registry."""
    return [name for name, provider in PROVIDERS.items() if provider.unavailable(device) is None]
