"""Autograd over the kernels in eager mode: what is saved, which launches run when.

Three differentiable functions: the projection, the attention, and the whole layer, whose backward
writes dq, dk and dv into one ``[B, T, N]`` buffer, so that dx and dW are one GEMM each. Without a
gradient to record, the launches run directly. Differentiating twice raises PyTorch's error. What is
traced (``torch.compile``, ``torch.export``) takes the registered operators instead, which do the
same at a higher cost per call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ra_triton import launches, library
from ra_triton.checks import needs_grad
from ra_triton.layout import RALayout
from ra_triton.options import AttentionOptions
from ra_triton.workspace import Workspace


def project(x: Tensor, W_packed: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """``x [B, T, C] @ W_packed [C, N] + bias``; ``out`` only where no gradient is needed."""
    recorded = needs_grad(x, W_packed, bias)
    if out is None and (_traced(x, W_packed) or (_transformed() and not recorded)):
        return library.project(x, W_packed, bias)
    if recorded:
        return _Projection.apply(x, W_packed, bias)
    return launches.project(x, W_packed, bias, out)


def attention(
    q_pack: Tensor, k_pack: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """``(out [B, T_q, H, D], lse [B, H, T_q])``; lse is differentiable too."""
    seed = launches.new_seed(v, options)
    recorded = needs_grad(q_pack, k_pack, v)
    if _traced(q_pack, k_pack, v) or (_transformed() and not recorded):
        numbers = (options.causal, options.softmax_scale, options.dropout_p)
        return library.attention(q_pack, k_pack, v, seed, *numbers)
    if recorded:
        return _Attention.apply(q_pack, k_pack, v, options, seed)
    return launches.attend(q_pack, k_pack, v, options, seed)


def layer(
    x: Tensor,
    W_packed: Tensor,
    bias: Tensor | None,
    layout: RALayout,
    options: AttentionOptions,
    workspace: Workspace | None,
) -> Tensor:
    """Projection and attention: ``[B, T, C] -> [B, T, H, D]``; a workspace needs no gradient."""
    seed = launches.new_seed(x, options)
    recorded = needs_grad(x, W_packed, bias)
    if _traced(x, W_packed) or (_transformed() and not recorded):
        heads = (layout.n_head, layout.n_kv_head)
        numbers = (options.causal, options.softmax_scale, options.dropout_p)
        return library.layer(x, W_packed, bias, seed, *heads, *numbers)[0]
    if recorded:
        return _Layer.apply(x, W_packed, bias, layout, options, seed)[0]
    return launches.layer(x, W_packed, bias, layout, options, seed, workspace)[0]


def _traced(*tensors: Tensor | None) -> bool:
    """Whether a compiler or an exporter looks on; it must not see addresses and launches."""
    return torch.compiler.is_compiling() or any(
        t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in tensors
    )


def _transformed() -> bool:
    """Whether ``torch.func`` has wrapped the tensors: only operators see through the wrappers."""
    return torch._C._are_functorch_transforms_active()


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, W_packed: Tensor, bias: Tensor | None) -> Tensor:
        return launches.project(x, W_packed, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, W_packed, _ = inputs
        ctx.save_for_backward(x, W_packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W_packed = ctx.saved_tensors
        if _transformed():
            return library.project_gradients(x, W_packed, dy, ctx.needs_input_grad)
        return launches.project_backward(x, W_packed, dy.contiguous(), ctx.needs_input_grad)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        q_pack: Tensor,
        k_pack: Tensor,
        v: Tensor,
        options: AttentionOptions,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return launches.attend(q_pack, k_pack, v, options, seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q_pack, k_pack, v, ctx.options, seed = inputs
        ctx.save_for_backward(q_pack, k_pack, v, *output, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q_pack, k_pack, v, out, lse, seed = ctx.saved_tensors
        if _transformed():
            saved = (q_pack, k_pack, v, out, lse, do, dlse, seed)
            needed = ctx.needs_input_grad[:3]
            return (*library.attention_gradients(*saved, ctx.options, needed), None, None)
        dq, dk, dv = (
            torch.empty_like(t, memory_format=torch.contiguous_format) if needed else None
            for t, needed in zip((q_pack, k_pack, v), ctx.needs_input_grad, strict=False)
        )
        do = torch.zeros_like(out) if do is None else do
        launches.attend_backward(
            q_pack, k_pack, v, out, lse, do, dlse, dq, dk, dv, ctx.options, seed
        )
        return dq, dk, dv, None, None


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        W_packed: Tensor,
        bias: Tensor | None,
        layout: RALayout,
        options: AttentionOptions,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return launches.layer(x, W_packed, bias, layout, options, seed)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, W_packed, _, ctx.layout, ctx.options, seed = inputs
        out, lse, packed = output
        ctx.mark_non_differentiable(lse, packed)
        ctx.save_for_backward(x, W_packed, packed, out, lse, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, W_packed, packed, out, lse, seed = ctx.saved_tensors
        backward = library.layer_gradients if _transformed() else launches.layer_backward
        grads = backward(
            x,
            W_packed,
            packed,
            out,
            lse,
            do,
            ctx.layout,
            ctx.options,
            seed,
            ctx.needs_input_grad[:3],
        )
        return (*grads, None, None, None)
