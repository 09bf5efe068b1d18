"""Composing a weight with the kernels: the operator, its gradient, the eager Function.

A call that something has to see (``checks.observed``) takes the registered operators; any other one
autograd Function, or the launch alone where no gradient is recorded.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ra_triton import launches, library, ops
from ra_triton.checks import needs_grad, observed
from ra_triton.factors import TENSORS, Factors

Grads = tuple[Tensor | None, ...]
Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def compose(factors: Factors) -> tuple[Tensor, Tensor | None]:
    """``(W_fused [C, N], bias [N] or None)`` by the kernel, differentiable in every tensor."""
    tensors = factors.tensors
    ops._refuse_tangents(*tensors)
    if observed(*tensors):
        W_fused, bias = library.call(composed, *factors)
        return W_fused, None if factors.b_q is None else bias
    if needs_grad(*tensors):
        return _Composition.apply(*factors)
    return _launch(factors)


def _launch(factors: Factors) -> tuple[Tensor, Tensor | None]:
    from ra_triton.kernels.compose import compose

    with launches._device_of(factors.W_q):
        return compose(factors)


def _gradients(
    factors: Factors, dW: Tensor | None, dbias: Tensor | None, needed: Sequence[bool]
) -> Grads:
    """Of the nine tensors, each only if needed; a dW or dbias of None is zero."""
    from ra_triton.kernels.compose_backward import compose_gradients

    with launches._device_of(factors.W_q):
        return compose_gradients(factors, _present(factors, dW), dbias, needed)


def _present(factors: Factors, dW: Tensor | None) -> Tensor:
    """``dW``; zeros where only the bias was used."""
    if dW is not None:
        return dW
    W_q, layout = factors.W_q, factors.layout
    return W_q.new_zeros((W_q.shape[0], layout.columns), dtype=factors.dtype)


def _through_the_operator(
    factors: Factors, dW: Tensor | None, dbias: Tensor | None, needed: Sequence[bool]
) -> Grads:
    """:func:`_gradients` by the registered operator."""
    dW = _present(factors, dW)
    needed = [*needed[:6], *(need and dbias is not None for need in needed[6:])]
    grads = composed_backward(*factors, dW, dbias, needed)
    return tuple(t if need else None for t, need in zip(grads, needed, strict=True))


class _Composition(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        factors = Factors._make(args)
        _save(ctx, args, None)
        return _launch(factors)

    @staticmethod
    def backward(ctx: Any, dW: Tensor | None, dbias: Tensor | None) -> Grads:
        factors = Factors._make((*ctx.saved_tensors, *ctx.numbers))
        args = (factors, dW, dbias, ctx.needs_input_grad[:TENSORS])
        grads = ops._gradients(_gradients, _through_the_operator, (dW, dbias), *args)
        return (*grads, *[None] * len(ctx.numbers))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    W_q, W_k, _, W_recip, w_std, w_rec, b_q, b_k, _ = inputs[:TENSORS]
    ctx.numbers = inputs[TENSORS:]
    ctx.set_materialize_grads(False)
    # Of W_v and b_v only the shape matters, which others have: they may change before the backward.
    ctx.save_for_backward(W_q, W_k, W_k, W_recip, w_std, w_rec, b_q, b_k, b_k)


@torch.library.custom_op("ra_triton::compose", mutates_args=())
def composed(
    W_q: Tensor,
    W_k: Tensor,
    W_v: Tensor,
    W_recip: Tensor | None,
    w_std: Tensor | None,
    w_rec: Tensor | None,
    b_q: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
    std: float | None,
    rec: float | None,
    n_head: int,
    n_kv_head: int,
    packed: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``(W_fused [C, N], bias [N])``: :class:`Factors`, field by field; no bias has size 0."""
    args = (W_q, W_k, W_v, W_recip, w_std, w_rec, b_q, b_k, b_v)
    factors = Factors._make((*args, std, rec, n_head, n_kv_head, packed, dtype))
    W_fused, bias = _launch(factors)
    return W_fused, W_q.new_empty(0, dtype=dtype) if bias is None else bias


@composed.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    factors = Factors._make(args)
    W_q, N = factors.W_q, factors.layout.columns
    bias = 0 if factors.b_q is None else N
    return tuple(W_q.new_empty(s, dtype=factors.dtype) for s in ((W_q.shape[0], N), (bias,)))  # type: ignore[return-value]


@torch.library.custom_op("ra_triton::compose_backward", mutates_args=())
def composed_backward(
    W_q: Tensor,
    W_k: Tensor,
    W_v: Tensor,
    W_recip: Tensor | None,
    w_std: Tensor | None,
    w_rec: Tensor | None,
    b_q: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
    std: float | None,
    rec: float | None,
    n_head: int,
    n_kv_head: int,
    packed: bool,
    dtype: torch.dtype,
    dW: Tensor,
    dbias: Tensor | None,
    needed: Sequence[bool],
) -> Nine:
    """Gradients of the first nine arguments."""
    args = (W_q, W_k, W_v, W_recip, w_std, w_rec, b_q, b_k, b_v)
    factors = Factors._make((*args, std, rec, n_head, n_kv_head, packed, dtype))
    grads = _gradients(factors, dW, dbias, needed)
    return tuple(W_q.new_empty(0) if t is None else t for t in grads)  # type: ignore[return-value]


@composed_backward.register_fake
def _(*args: Any) -> Nine:
    return tuple(  # type: ignore[return-value]
        t.new_empty(t.shape) if t is not None and need else args[0].new_empty(0)
        for t, need in zip(args[:TENSORS], args[-1], strict=True)
    )


def _formula(ctx: Any, dW: Tensor | None, dbias: Tensor | None) -> Grads:
    factors = Factors._make((*ctx.saved_tensors, *ctx.numbers))
    dbias = None if factors.b_q is None else dbias
    grads = _through_the_operator(factors, dW, dbias, ctx.needs_input_grad[:TENSORS])
    return (*grads, *[None] * len(ctx.numbers))


library._differentiable(composed, _formula, _save)
composed_backward.register_autograd(library._refuse)
for _operator in (composed, composed_backward):
    _operator.register_vmap(partial(library._each_slice, _operator))
