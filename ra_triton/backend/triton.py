"""The handwritten kernels. Triton itself is imported by the first call that launches one.

On ROCm they run where ``backend="triton"`` asks for them: compiled for gfx942, never run. There
every launch goes through Triton's own launcher, and ``backend="auto"`` stays with SDPA.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ra_triton import composition, internals, ops
from ra_triton.backend import sdpa
from ra_triton.checks import DTYPES, distributed, needs_grad, observed
from ra_triton.factors import Factors
from ra_triton.layout import RALayout
from ra_triton.norm_rope import NormRope
from ra_triton.offsets import Offsets
from ra_triton.options import AttentionOptions, DecodeOptions
from ra_triton.quantization import QuantizedWeight
from ra_triton.workspace import Workspace

MIN_CAPABILITY = (8, 0)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128
MAX_QUERIES = 16  # of a decoding call, per sequence


def unsupported(
    tensors: tuple[Tensor | None, ...], options: AttentionOptions | None, head_dim: int | None
) -> str | None:
    """Why the kernels cannot run the call, or None."""
    if distributed(*tensors):
        return "the kernels take local tensors, got a DTensor; call .to_local() on it"
    first = tensors[0]
    assert first is not None
    reason = _device_unsupported(first.device)
    if reason is not None:
        return reason
    if first.dtype not in DTYPES:
        return f"the kernels take {', '.join(map(str, DTYPES))}, got {first.dtype}"
    if options is None and head_dim is None:
        return None
    if head_dim is None or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return f"head dim {head_dim} is outside {MIN_HEAD_DIM}..{MAX_HEAD_DIM}"
    if isinstance(options, DecodeOptions) and options.n_queries > MAX_QUERIES:
        return f"decoding takes at most {MAX_QUERIES} queries, got {options.n_queries}"
    return None


def untried() -> str | None:
    """Why the kernels, where they can run, are for those who ask for them, or None."""
    return "on ROCm they were compiled, but never run" if torch.version.hip is not None else None


def project(
    x: Tensor, W_packed: Tensor | QuantizedWeight, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """``x @ W_packed + bias``: ``[B, T, C] @ [C, N] -> [B, T, N]``."""
    if isinstance(W_packed, QuantizedWeight):
        return ops.project_quantized(x, W_packed, bias, out)
    return ops.project(x, W_packed, bias, out)


def packed_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    options: AttentionOptions,
    offsets: Offsets | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over ``[B, T, H, D]`` operands: ``(out, lse [B, H, Tq])``."""
    return ops.attention(q_pack, k_pack, v, options, offsets)


def layer(
    x: Tensor,
    W_packed: Tensor | QuantizedWeight,
    bias: Tensor | None,
    layout: RALayout,
    options: AttentionOptions,
    workspace: Workspace | None,
    offsets: Offsets | None = None,
) -> Tensor:
    """Projection and attention: ``[B, T, C] -> [B, T, H, D]``."""
    if isinstance(W_packed, QuantizedWeight):
        return ops.layer_quantized(x, W_packed, bias, layout, options, workspace, offsets)
    return ops.layer(x, W_packed, bias, layout, options, workspace, offsets)


def prepare_layer(
    x: Tensor,
    W_packed: Tensor,
    bias: Tensor | None,
    layout: RALayout,
    options: AttentionOptions,
) -> Callable[..., Tensor] | None:
    """:func:`layer` for later calls alike, eager and without gradients: to ``[B, T, H * D]``."""
    return ops.prepare_layer(x, W_packed, bias, layout, options)


def pack_qk(q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor) -> tuple[Tensor, Tensor]:
    """``[q_std|k_low], [k_std|q_low]``, out of place."""
    tensors = q, k, q_low, k_low
    if needs_grad(*tensors) or observed(*tensors):
        return sdpa.pack_qk(*tensors)  # the same copies, differentiable and visible
    return ops.pack(q, k, q_low, k_low)


def pack_qk_(q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor) -> None:
    """Overwrites the last R lanes of ``q`` and ``k``."""
    if observed(q, k, q_low, k_low):
        sdpa.pack_qk_(q, k, q_low, k_low)
    else:
        ops.pack_(q, k, q_low, k_low)


def compose(factors: Factors) -> tuple[Tensor, Tensor | None]:
    """``W_fused [C, N]`` and its bias ``[N]`` or None."""
    return composition.compose(factors)


def norm_rope(call: NormRope) -> tuple[Tensor, Tensor]:
    """Lane exchange, norm and rotation, out of place."""
    return ops.norm_rope(call)


def norm_rope_(call: NormRope) -> None:
    """Lane exchange, norm and rotation over ``q`` and ``k``."""
    ops.norm_rope_(call)


def decode_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    lengths: Tensor,
    options: AttentionOptions,
    max_length: int,
) -> Tensor:
    """Attention of each sequence's last tokens over a cache: ``[B, T_q, H, D]``."""
    return ops.decode(q_pack, k_pack, v, lengths, options, max_length)


def append_(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """``k, v [B, T, H_kv, D]`` after the ``lengths`` tokens of each sequence, which grow by T."""
    if k.shape[1] > MAX_QUERIES:  # one program a sequence would take long
        sdpa.append_(k_cache, v_cache, lengths, k, v)
    else:
        ops.append_(k_cache, v_cache, lengths, k, v)


@internals.constant
def _device_unsupported(device: torch.device) -> str | None:
    return _look_at(device)


@cache
def _look_at(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        import triton

        if triton.knobs.runtime.interpret:
            return None
        return "the kernels need CUDA tensors, got cpu ones"
    if device.type != "cuda":
        return f"the kernels need an NVIDIA GPU, got tensors on {device}"
    if torch.version.hip is not None:
        return None  # see untried()
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "the kernels need compute capability 8.0 (Ampere) or newer, got {}.{}".format(
            *capability
        )
    return None
