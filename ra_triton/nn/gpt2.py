"""Exchange with stock GPT-2: reciprocal layers folded into plain ``c_attn`` weights, and back.

Two orientations of the same names: ``"linear"`` is nanoGPT's ``nn.Linear`` (``c_attn.weight
[3 * C, C]``), ``"conv1d"`` is Hugging Face's ``Conv1D`` (``[C, 3 * C]``), which always has biases.
"""

from collections.abc import Container, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ra_triton.checks import check_choice
from ra_triton.nn.attention import RACausalSelfAttention
from ra_triton.nn.composed import ComposedLinear
from ra_triton.nn.quantized import QuantizedLinear
from ra_triton.weights.fused import factor_weight
from ra_triton.weights.quantization import QuantizedWeight

ORIENTATIONS = ("linear", "conv1d")
PROJECTIONS = ("c_attn", "c_proj", "c_fc")  # transposed between the orientations
BIASED = (*PROJECTIONS, "ln_1", "ln_2", "ln_f")  # with a bias in every stock GPT-2
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers in old checkpoints, not weights
# What wrappers of a module put into its names, as do DataParallel and its like with "module".
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
REPLICATING = (nn.DataParallel, nn.parallel.DistributedDataParallel)
GATHER = "gather a full state dict and load it into a module that is not sharded"

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def to_gpt2(module: nn.Module, *, orientation: str = "linear") -> dict[str, Tensor]:
    """The state dict of the plain GPT-2 that computes what ``module`` computes.

    Args:
        module: a :class:`RACausalSelfAttention`, or a model with any number of them and nanoGPT's
            names; compiled, fused or wrapped in (Distributed)DataParallel or not.
        orientation: ``"linear"`` for nanoGPT, ``"conv1d"`` for Hugging Face; there biases that the
            model lacks are zeros.

    Returns:
        Names and detached tensors, ``c_attn`` folded, an int8 one as the numbers it stands for in
        the dtype of ``c_proj``; the rest may share memory with the module.

    Raises:
        TypeError: not a module.
        ValueError: unknown orientation; a layer that no GPT-2 computes: grouped heads,
            rotation, QK-norm; a ``c_attn`` that is more than its weight; sharded parameters.
    """
    check_choice("orientation", orientation, ORIENTATIONS)
    _check_module(module)
    state = {}
    for name, t in module.state_dict().items():
        if hasattr(t, "full_tensor"):
            raise ValueError(f"{name} is sharded, a {type(t).__name__}: {GATHER}")
        state[_plain_name(module, name)] = t.detach()
    for name, attention in _attentions(module):
        _check_is_gpt2(attention)
        W_fused, bias = attention.fused_weight()
        if isinstance(attention.c_attn, nn.Linear):
            continue  # its weight is in the state as it is
        for own in attention.c_attn.state_dict():
            del state[f"{name}c_attn.{own}"]
        if isinstance(W_fused, QuantizedWeight):
            W_fused = W_fused.dequantize(attention.c_proj.weight.dtype)
        state[f"{name}c_attn.weight"] = _transpose(W_fused)
        if bias is not None:
            state[f"{name}c_attn.bias"] = bias.clone()
    return _with_biases(_transposed(state)) if orientation == "conv1d" else state


@torch.no_grad()
def from_gpt2(
    module: Module, state: Mapping[str, Tensor], *, orientation: str = "linear"
) -> Module:
    """Load the weights of a plain GPT-2 into ``module``, which then computes the same function.

    A composed layer takes them too: the last R lanes of each head become the reciprocal ones, with
    both gates at 1 (:func:`ra_triton.weights.fused.factor_weight`).

    Args:
        module: a :class:`RACausalSelfAttention`, or a model with any number of them and nanoGPT's
            names; overwritten; compiled or wrapped as for :func:`to_gpt2`.
        state: the state dict of the layer or model, in any dtype and on any device; names may have
            the prefixes ``_orig_mod.`` of a compiled model and ``module.`` of DataParallel.
        orientation: that of ``state``.

    Returns:
        ``module``.

    Raises:
        TypeError: not a module, no mapping, a value of ``state`` that is not a tensor.
        ValueError: unknown orientation; names that are missing or left over, shapes that do not
            fit (nothing is loaded); a bias other than zero for a module without biases; a layer
            that is quantized or fused, or where :func:`to_gpt2` raises.
    """
    check_choice("orientation", orientation, ORIENTATIONS)
    _check_module(module)
    check_state(state)
    names = {_plain_name(module, name): name for name in module.state_dict()}
    expected = to_gpt2(module)
    loaded = {
        name: t
        for name, t in _without_prefixes(state, expected).items()
        if not f".{name}".endswith(MASKS)
    }
    if orientation == "conv1d":
        loaded = _transposed(loaded)
    for name, attention in _attentions(module):
        check_loadable(attention, name)
    loaded = _without_zero_biases(loaded, expected)
    check_names_and_shapes(loaded, expected, " as nn.Linear has it", f" with {orientation=}")
    for name, attention in _attentions(module):
        if isinstance(attention.c_attn, ComposedLinear):
            weight, bias = (loaded.pop(f"{name}c_attn.{key}", None) for key in ("weight", "bias"))
            assert weight is not None
            for factor, t in composed_state(attention.c_attn, weight, bias).items():
                loaded[f"{name}c_attn.{factor}"] = t
    module.load_state_dict({names[name]: t for name, t in loaded.items()})
    return module


def _check_module(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    for name, m in module.named_modules():
        if "_fsdp_wrapped_module" in m._modules:
            raise ValueError(f"{name or 'module'} is sharded (FSDP): {GATHER}")


def _plain_name(module: nn.Module, name: str) -> str:
    """``name``, of a tensor or a module in ``module``, without what wrappers put into it."""
    kept, owner = [], module
    for part in name.split("."):
        if part not in WRAPPED and not (part == "module" and isinstance(owner, REPLICATING)):
            kept.append(part)
        owner = getattr(owner, part, None)  # type: ignore[assignment]
    return ".".join(kept)


def _without_prefixes(state: Mapping[str, Tensor], expected: Container[str]) -> dict[str, Tensor]:
    """``state``, its names without the prefixes of wrappers, unless the module has them itself."""

    def plain(name: str) -> str:
        parts = [part for part in name.split(".") if part not in WRAPPED]
        short = ".".join(parts[1:] if parts[0] == "module" else parts)
        return name if name in expected else short

    return {plain(name): t for name, t in state.items()}


def check_state(state: Mapping[str, Tensor]) -> None:
    """Names and tensors, else TypeError."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to tensors, got {type(state).__name__}")
    for name, t in state.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"state[{name!r}] must be a tensor, got {type(t).__name__}")


def check_loadable(attention: RACausalSelfAttention, name: str = "") -> None:
    """ValueError where the weight of ``c_attn`` is derived from another one."""
    if isinstance(attention.c_attn, QuantizedLinear):
        raise ValueError(f"{name}c_attn is quantized: load first, then quantize_")
    if attention.is_fused:
        raise ValueError(f"{name}c_attn is fused: load first, then fuse_")


def check_names_and_shapes(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], like: str = "", got: str = ""
) -> None:
    """``state`` has the names and shapes of ``expected``, else ValueError, with these remarks."""
    missing, left_over = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected)
    if missing or left_over:
        raise ValueError(f"state does not fit the module: missing {missing}, left over {left_over}")
    for name, t in expected.items():
        found = tuple(state[name].shape)
        if found != t.shape:
            raise ValueError(f"{name} must be {tuple(t.shape)}{like}, got {found}{got}")


def _attentions(module: nn.Module) -> list[tuple[str, RACausalSelfAttention]]:
    """``[(prefix of its names, layer)]``, a layer that is used twice under each of its names."""
    return [
        (f"{_plain_name(module, name)}.".lstrip("."), m)
        for name, m in module.named_modules(remove_duplicate=False)
        if isinstance(m, RACausalSelfAttention)
    ]


def _check_is_gpt2(attention: RACausalSelfAttention) -> None:
    """ValueError with the reason, if no GPT-2 computes what the layer computes."""
    H, H_kv = attention.n_head, attention.n_kv_head
    if H_kv != H:
        raise ValueError(f"GPT-2 has no grouped heads, but n_kv_head={H_kv} < n_head={H}")
    if attention.rope is not None:
        raise ValueError("GPT-2 does not rotate its heads, but this layer has rope; see to_llama")
    if attention.q_norm is not None:
        raise ValueError("GPT-2 has no norm between projection and attention, but qk_norm is on")


def composed_state(
    c_attn: ComposedLinear, weight: Tensor, bias: Tensor | None
) -> dict[str, Tensor]:
    """State of a :class:`ComposedLinear` that composes ``weight [N, C]`` and ``bias``."""
    sizes = {"R": c_attn.R, "n_head": c_attn.n_head, "n_kv_head": c_attn.n_kv_head}
    *weights, W_recip = factor_weight(weight.mT, **sizes, weight_layout="packed")
    state = dict(zip(("W_q", "W_k", "W_v"), weights, strict=True))
    if c_attn.W_recip is not None:
        state["W_recip"] = W_recip.expand_as(c_attn.W_recip)
    if bias is not None:
        *biases, _ = factor_weight(bias, **sizes, weight_layout="packed")
        state |= zip(("b_q", "b_k", "b_v"), biases, strict=True)
    gates = {"w_std": c_attn.w_std, "w_rec": c_attn.w_rec}
    return state | {name: torch.ones_like(gate) for name, gate in gates.items()}


def _owner(name: str) -> str:
    """``transformer.h.0.mlp.c_fc.weight`` → ``c_fc``."""
    return name.split(".")[-2] if "." in name else ""


def _transposed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Projection weights in the other orientation."""
    return {
        name: _transpose(t)
        if _owner(name) in PROJECTIONS and name.endswith("weight") and t.dim() == 2
        else t
        for name, t in state.items()
    }


def _transpose(t: Tensor) -> Tensor:
    """A contiguous copy: files hold no strides, and the layer keeps its own weight."""
    return t.mT.clone(memory_format=torch.contiguous_format)


def _with_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for the biases that stock GPT-2 has; ``Conv1D`` weights are ``[in, out]``."""
    full = dict(state)
    for name, t in state.items():
        bias = name.removesuffix("weight") + "bias"
        if _owner(name) in BIASED and name.endswith("weight") and bias not in state:
            full[bias] = t.new_zeros(t.shape[-1])
    return full


def _without_zero_biases(
    state: dict[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Drop biases that the module lacks; ValueError where that would change the function."""
    kept = dict(state)
    for name, t in state.items():
        if name not in expected and name.endswith(".bias") and _owner(name) in BIASED:
            if t.count_nonzero():
                raise ValueError(f"{name} is not zero, but the module has no such bias")
            del kept[name]
    return kept
