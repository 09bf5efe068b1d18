"""Autograd over the kernels: what is saved, which launches run when.

Three differentiable functions, each a launch or two: the projection, the attention, and the whole
layer, whose backward writes dq, dk and dv into one ``[B, T, N]`` buffer, so that dx and dW are one
GEMM each. Without a gradient to record, the launches run directly. Nothing here is differentiable
twice: that raises PyTorch's error. Kernels are imported by the first call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ra_triton.checks import needs_grad
from ra_triton.layout import RALayout
from ra_triton.options import AttentionOptions


def project(x: Tensor, W_packed: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """``x [B, T, C] @ W_packed [C, N] + bias``; ``out`` only where no gradient is needed."""
    if needs_grad(x, W_packed, bias):
        return _Projection.apply(x, W_packed, bias)
    return _project(x, W_packed, bias, out)


def attention(
    q_pack: Tensor, k_pack: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """``(out [B, T_q, H, D], lse [B, H, T_q])``; lse is differentiable too."""
    if needs_grad(q_pack, k_pack, v):
        return _Attention.apply(q_pack, k_pack, v, options)
    return _attend(q_pack, k_pack, v, options, _new_seed(v, options))


def layer(
    x: Tensor, W_packed: Tensor, bias: Tensor | None, layout: RALayout, options: AttentionOptions
) -> Tensor:
    """Projection and attention: ``[B, T, C] -> [B, T, H, D]``."""
    if needs_grad(x, W_packed, bias):
        return _Layer.apply(x, W_packed, bias, layout, options)
    q_pack, k_pack, v = layout.views(_project(x, W_packed, bias))
    return _attend(q_pack, k_pack, v, options, _new_seed(v, options))[0]


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W_packed)
        return _project(x, W_packed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W_packed = ctx.saved_tensors
        return _project_backward(x, W_packed, dy.contiguous(), ctx.needs_input_grad)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_pack: Tensor, k_pack: Tensor, v: Tensor, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        seed = _new_seed(v, options)
        out, lse = _attend(q_pack, k_pack, v, options, seed)
        ctx.save_for_backward(q_pack, k_pack, v, out, lse, seed)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q_pack, k_pack, v, out, lse, seed = ctx.saved_tensors
        dq, dk, dv = (
            torch.empty_like(t, memory_format=torch.contiguous_format) if needed else None
            for t, needed in zip((q_pack, k_pack, v), ctx.needs_input_grad, strict=False)
        )
        do = torch.zeros_like(out) if do is None else do
        _attend_backward(q_pack, k_pack, v, out, lse, do, dlse, dq, dk, dv, ctx.options, seed)
        return dq, dk, dv, None


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_packed: Tensor,
        bias: Tensor | None,
        layout: RALayout,
        options: AttentionOptions,
    ) -> Tensor:
        packed = _project(x, W_packed, bias)
        q_pack, k_pack, v = layout.views(packed)
        seed = _new_seed(v, options)
        out, lse = _attend(q_pack, k_pack, v, options, seed)
        ctx.save_for_backward(x, W_packed, packed, out, lse, seed)
        ctx.layout, ctx.options = layout, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        x, W_packed, packed, out, lse, seed = ctx.saved_tensors
        dpacked = torch.empty_like(packed)
        q_pack, k_pack, v = ctx.layout.views(packed)
        dq, dk, dv = ctx.layout.views(dpacked)
        _attend_backward(q_pack, k_pack, v, out, lse, do, None, dq, dk, dv, ctx.options, seed)
        return (*_project_backward(x, W_packed, dpacked, ctx.needs_input_grad), None, None)


def _project(x: Tensor, W_packed: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    from ra_triton.kernels.projection import projection

    with torch.cuda.device_of(x):
        return projection(x, W_packed, bias, out)


def _project_backward(
    x: Tensor, W_packed: Tensor, dy: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dW, dbias)``, each only if needed; ``dy`` is contiguous."""
    from ra_triton.kernels.projection import projection
    from ra_triton.kernels.projection_backward import bias_gradient, weight_gradient

    with torch.cuda.device_of(x):
        return (
            projection(dy, W_packed.mT, None) if needed[0] else None,
            weight_gradient(x, dy) if needed[1] else None,
            bias_gradient(dy) if needed[2] else None,
        )


def _new_seed(t: Tensor, options: AttentionOptions) -> Tensor | None:
    """Dropout's key, drawn on the device from PyTorch's generator: no synchronisation."""
    if options.dropout_p == 0:
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=t.device)


def _attend(
    q_pack: Tensor, k_pack: Tensor, v: Tensor, options: AttentionOptions, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    from ra_triton.kernels.attention_forward import attention_forward

    with torch.cuda.device_of(q_pack):
        return attention_forward(
            q_pack,
            k_pack,
            v,
            causal=options.causal,
            softmax_scale=options.softmax_scale,
            dropout_p=options.dropout_p,
            seed=seed,
        )


def _attend_backward(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    options: AttentionOptions,
    seed: Tensor | None,
) -> None:
    """Write the gradients into those of dq, dk and dv that are not None."""
    from ra_triton.kernels.attention_backward import attention_backward

    with torch.cuda.device_of(out):
        attention_backward(
            q_pack,
            k_pack,
            v,
            out,
            lse,
            do,
            dq,
            dk,
            dv,
            dlse=dlse,
            causal=options.causal,
            softmax_scale=options.softmax_scale,
            dropout_p=options.dropout_p,
            seed=seed,
        )
