"""The handwritten kernels. Triton itself is imported by the first call that launches one.

On ROCm they run where ``backend="triton"`` asks for them: compiled for gfx942, never run. There
every launch goes through Triton's own launcher, and ``backend="auto"`` stays with SDPA.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ra_triton import internals
from ra_triton.backend import sdpa
from ra_triton.backend.triton import operators
from ra_triton.backend.triton.operator import Call, refuse_tangents
from ra_triton.call.norm_rope import NormRope
from ra_triton.call.offsets import Offsets, flat
from ra_triton.call.options import AttentionOptions, DecodeOptions
from ra_triton.checks import DTYPES, distributed, in_dtype, needs_grad, observed, too_old
from ra_triton.launch.recorded import Known, device_of
from ra_triton.weights import sparsity
from ra_triton.weights.factors import TENSORS, Factors
from ra_triton.weights.layout import RALayout
from ra_triton.weights.quantization import QuantizedWeight
from ra_triton.weights.reduced import ReducedWeight, tensors_of
from ra_triton.weights.sparsity import SparseWeight
from ra_triton.workspace import Workspace

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
    if options is None and head_dim is None:
        return None
    if options is None and first.dtype not in DTYPES:
        return f"the kernels take {', '.join(map(str, DTYPES))}, got {first.dtype}"
    if head_dim is None or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return f"head dim {head_dim} is outside {MIN_HEAD_DIM}..{MAX_HEAD_DIM}"
    if isinstance(options, DecodeOptions) and options.n_queries > MAX_QUERIES:
        return f"decoding takes at most {MAX_QUERIES} queries, got {options.n_queries}"
    return None


def untried() -> str | None:
    """Why the kernels, where they can run, are for those who ask for them, or None."""
    return "on ROCm they were compiled, but never run" if torch.version.hip is not None else None


def project(
    x: Tensor,
    W_packed: Tensor | QuantizedWeight | SparseWeight,
    bias: Tensor | None,
    out: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x @ W_packed + bias``: ``[B, T, C] @ [C, N] -> [B, T, N]``; ``out`` needs no gradient."""
    if isinstance(W_packed, SparseWeight):
        return sparsity.project(x, W_packed, bias)
    if out is not None and not observed(x, *tensors_of(W_packed), bias, out):
        refuse_tangents(x, *tensors_of(W_packed), bias)
        x, W, bias = in_dtype(dtype, x, W_packed, bias)
        with device_of(x):
            operators.launch_projection(x, W, bias, out)
        increment_version(out)  # autograd has not seen the launch
        return out
    if isinstance(W_packed, QuantizedWeight):
        tensors, constants = operators.of_quantized(W_packed)
        y = operators.project_quantized((x, *tensors, bias), constants)
    else:
        y = operators.project((x, W_packed, bias), (), dtype)
    return y if out is None else out.copy_(y)  # no operator writes into a caller's memory


def packed_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    options: AttentionOptions,
    offsets: Offsets | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over ``[B, T, H, D]`` operands: ``(out, lse [B, H, Tq])``."""
    begins, constants = _flat(options, offsets)
    tensors = (q_pack, k_pack, v, *begins, _new_seed(v, options))
    return operators.attention(tensors, constants, dtype)


def layer(
    x: Tensor,
    W_packed: Tensor | QuantizedWeight | SparseWeight,
    bias: Tensor | None,
    layout: RALayout,
    options: AttentionOptions,
    workspace: Workspace | None,
    offsets: Offsets | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Projection and attention: ``[B, T, C] -> [B, T, H * D]``; a workspace needs no gradient."""
    begins, constants = _flat(options, offsets)
    constants = (layout.n_head, layout.n_kv_head, *constants)
    weights = tensors_of(W_packed)
    direct = isinstance(W_packed, QuantizedWeight) or workspace is not None
    direct = direct and not observed(x, *weights, bias, *begins)
    if direct and not isinstance(W_packed, SparseWeight):
        refuse_tangents(x, *weights, bias)
        tensors = (*in_dtype(dtype, x, W_packed, bias), *begins, _new_seed(x, options))
        with device_of(x):
            return operators.launch_layer(*tensors, *constants, workspace=workspace)[0]
    if isinstance(W_packed, ReducedWeight):
        packed = project(x, W_packed, bias, None)
        return packed_attention(*layout.views(packed), options, offsets)[0].flatten(2)
    tensors = (x, W_packed, bias, *begins, _new_seed(x, options))
    return operators.layer(tensors, constants, dtype)[0]


# Calls that come again, without checks: of the operator's tensors


def known_project(dtype: torch.dtype | None, recorded: bool) -> Call:
    """:func:`project` of ``(x, W_packed, bias)`` into new memory."""
    return Call(operators.project, (), dtype, recorded)


def known_attention(
    options: AttentionOptions, longest: tuple[int, int], dtype: torch.dtype | None, recorded: bool
) -> Call | Known:
    """:func:`packed_attention` of ``(q_pack, k_pack, v, cu_seqlens_q, cu_seqlens_k)``."""
    constants = (*options.scores, *longest, longest == (0, 0))
    wanted = 2 if options.return_lse else 1
    return _seeded(Call(operators.attention, constants, dtype, recorded, wanted), options)


def known_layer(
    layout: RALayout,
    options: AttentionOptions,
    longest: int,
    dtype: torch.dtype | None,
    recorded: bool,
) -> Call | Known:
    """:func:`layer` of ``(x, W_packed, bias, cu_seqlens, cu_seqlens)``."""
    heads = (layout.n_head, layout.n_kv_head)
    constants = (*heads, *options.scores, longest, longest, longest == 0)
    return _seeded(Call(operators.layer, constants, dtype, recorded, 1), options)


def known_decode(options: AttentionOptions, max_length: int) -> Call:
    """:func:`decode_attention` of ``(q_pack, k_pack, v, lengths)``."""
    return Call(operators.decode, _decode_constants(options, max_length), None, False)


def known_compose(numbers: tuple[Any, ...], recorded: bool) -> Call:
    """:func:`compose` of the tensors of ``Factors``, whose numbers these are."""
    return Call(operators.compose, numbers, None, recorded)


def _seeded(call: Call, options: AttentionOptions) -> Call | Known:
    """With a new seed for each call, if there is dropout."""
    if not options.dropout_p:
        return call
    before = len(call.operator.tensors) - 1  # the seed is the last tensor

    def run(*tensors: Tensor | None) -> Any:
        absent = (None,) * (before - len(tensors))
        return call.run(*tensors, *absent, _new_seed(tensors[0], options))  # type: ignore[arg-type]

    return Known(run)


def pack_qk(q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor) -> tuple[Tensor, Tensor]:
    """``[q_std|k_low], [k_std|q_low]``, out of place."""
    tensors = q, k, q_low, k_low
    if needs_grad(*tensors) or observed(*tensors):
        return sdpa.pack_qk(*tensors)  # the same copies, differentiable and visible
    from ra_triton.kernels.lanes import packing

    refuse_tangents(*tensors)
    with device_of(q):
        return packing.pack(*tensors)


def pack_qk_(q: Tensor, k: Tensor, q_low: Tensor, k_low: Tensor) -> None:
    """Overwrites the last R lanes of ``q`` and ``k``."""
    tensors = q, k, q_low, k_low
    if observed(*tensors):
        sdpa.pack_qk_(*tensors)
        return
    from ra_triton.kernels.lanes import packing

    refuse_tangents(*tensors)
    with device_of(q):
        packing.pack_(*tensors)
    increment_version((q, k))


def compose(factors: Factors) -> tuple[Tensor, Tensor | None]:
    """``W_fused [C, N]`` and its bias ``[N]`` or None."""
    W_fused, bias = operators.compose(factors.tensors, factors[TENSORS:])
    return W_fused, None if factors.b_q is None else bias


def norm_rope(call: NormRope) -> tuple[Tensor, Tensor]:
    """Lane exchange, norm and rotation, out of place; differentiable in the first six."""
    return operators.norm_rope(call[:9], call[9:])


def norm_rope_(call: NormRope) -> None:
    """Lane exchange, norm and rotation over ``q`` and ``k``, where no gradient is needed."""
    if observed(*call[:9]):
        q, k = norm_rope(call)
        call.q.copy_(q)
        call.k.copy_(k)
        return
    from ra_triton.kernels.lanes import norm_rope as kernels

    refuse_tangents(*call[:6])
    with device_of(call.q):
        kernels.norm_rope_(call)
    increment_version((call.q, call.k))


def decode_attention(
    q_pack: Tensor,
    k_pack: Tensor,
    v: Tensor,
    lengths: Tensor,
    options: AttentionOptions,
    max_length: int,
) -> Tensor:
    """Attention of each sequence's last tokens over a cache: ``[B, T_q, H, D]``, no gradient."""
    constants = _decode_constants(options, max_length)
    return operators.decode((q_pack, k_pack, v, lengths), constants)


def append_(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """``k, v [B, T, H_kv, D]`` after the ``lengths`` tokens of each sequence, which grow by T."""
    tensors = k_cache, v_cache, lengths, k, v
    if k.shape[1] > MAX_QUERIES:  # one program a sequence would take long
        sdpa.append_(*tensors)
    elif observed(*tensors):
        operators.append_(*tensors)
    else:
        refuse_tangents(k, v)
        with device_of(k):
            operators.launch_append(*tensors)
        increment_version((k_cache, v_cache, lengths))


def _new_seed(t: Tensor, options: AttentionOptions) -> Tensor | None:
    """Dropout's key, drawn on the device from PyTorch's generator: no synchronisation."""
    if options.dropout_p == 0:
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=t.device)


def _flat(
    options: AttentionOptions, offsets: Offsets | None
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """Offsets and options as operators take them: tensors and constants."""
    *begins, most_q, most_k, complete = flat(offsets)
    return tuple(begins), (*options.scores, most_q, most_k, complete)


def _decode_constants(options: AttentionOptions, max_length: int) -> tuple[Any, ...]:
    return options.reach[0], options.softmax_scale, float(options.softcap), max_length


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
    return too_old("the kernels need", device)
