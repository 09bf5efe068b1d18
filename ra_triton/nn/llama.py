"""Exchange with Llama-type attention: separate ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``.

Rotation and norm come after packing, so a stock layer treats packed heads as it treats its own, and
packed weights are its weights. What folds into what:

    rotation of all lanes                          Llama, Mistral
    rotation of all lanes and QK-norm              Qwen3
    rotation of the first ``rope_dims`` lanes      layers with a ``partial_rotary_factor``
    neither                                        GPT-2: :func:`ra_triton.nn.to_gpt2`
    QK-norm without rotation                       no stock model that we know of
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ra_triton.nn.attention import RACausalSelfAttention
from ra_triton.nn.composed import ComposedLinear
from ra_triton.nn.gpt2 import (
    check_loadable,
    check_names_and_shapes,
    check_state,
    composed_state,
)
from ra_triton.weights.quantization import QuantizedWeight

NORMS = ("q_norm", "k_norm")


@torch.no_grad()
def to_llama(module: RACausalSelfAttention, *, partial_rotary: bool = False) -> dict[str, Tensor]:
    """The state dict of the Llama-type attention layer that computes what ``module`` computes.

    It needs the same ``theta`` and head counts, a head dim of ``D`` and causal attention with scale
    ``1 / sqrt(D)``. Grouped heads and composed factors fold too.

    Args:
        module: a layer with ``rope``.
        partial_rotary: whether the stock layer turns ``rope_dims`` lanes alone, as those with a
            ``partial_rotary_factor`` of ``rope_dims / D`` do; a Llama turns all.

    Returns:
        ``q_proj.weight [H*D, C]``, ``k_proj.weight`` and ``v_proj.weight`` ``[H_kv*D, C]``,
        ``o_proj.weight [C, C]``, their biases if the module has them; with a QK-norm also
        ``q_norm.weight`` and ``k_norm.weight`` ``[D]``, as Qwen3 has them. Copies, and of an int8
        weight the numbers it stands for.

    Raises:
        TypeError: not a :class:`RACausalSelfAttention`.
        ValueError: a layer that no Llama-type layer computes: one without rotation, or with a
            rotation of some lanes and not ``partial_rotary``; a ``c_attn`` that is more than its
            weight.
    """
    _check_is_llama(module, partial_rotary)
    weight, bias = module.fused_weight()
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(module.c_proj.weight.dtype)
    state = {}
    for kind, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            for name, section in zip("qkv", module.layout.views(t), strict=True):
                state[f"{name}_proj.{kind}"] = (
                    section.flatten(-2).mT if t.dim() > 1 else section.flatten()
                )
    for ours, theirs in (("c_proj", "o_proj"), *((name, name) for name in NORMS)):
        for kind, t in getattr(module, ours).named_parameters() if getattr(module, ours) else ():
            state[f"{theirs}.{kind}"] = t
    return {
        name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in state.items()
    }


@torch.no_grad()
def from_llama(
    module: RACausalSelfAttention, state: Mapping[str, Tensor], *, partial_rotary: bool = False
) -> RACausalSelfAttention:
    """Load the weights of a Llama-type attention layer; ``module`` then computes the same.

    A composed layer takes them where :func:`ra_triton.weights.fused.factor_weight` has factors:
    without grouped heads, or with ``R = 0``. Biases that the state lacks (Qwen2 has none on
    ``o_proj``) are zeros.

    Args:
        module: a layer with ``rope``; overwritten.
        state: as :func:`to_llama` gives it, in any dtype and on any device.
        partial_rotary: see :func:`to_llama`.

    Returns:
        ``module``.

    Raises:
        TypeError: not a :class:`RACausalSelfAttention`; no mapping, or a value that is no tensor.
        ValueError: see :func:`to_llama`; names that are missing or left over, shapes that do not
            fit, grouped heads that have no factors, a layer that is quantized or fused. Nothing is
            loaded then.
    """
    _check_is_llama(module, partial_rotary)
    check_loadable(module)
    check_state(state)
    expected = to_llama(module, partial_rotary=partial_rotary)
    given = {
        name: torch.zeros_like(t) for name, t in expected.items() if name.endswith("_proj.bias")
    } | dict(state)
    check_names_and_shapes(given, expected)
    loaded = {}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in given:
            loaded[f"c_attn.{kind}"] = torch.cat([given[f"{name}_proj.{kind}"] for name in "qkv"])
    for name, t in given.items():
        owner, _, kind = name.rpartition(".")
        if owner == "o_proj" or owner in NORMS:
            loaded[f"{owner.replace('o_proj', 'c_proj')}.{kind}"] = t
    if isinstance(module.c_attn, ComposedLinear):
        weight, bias = loaded.pop("c_attn.weight"), loaded.pop("c_attn.bias", None)
        factors = composed_state(module.c_attn, weight, bias)
        loaded |= {f"c_attn.{name}": t for name, t in factors.items()}
    module.load_state_dict(loaded)
    return module


def _check_is_llama(module: RACausalSelfAttention, partial_rotary: bool) -> None:
    """TypeError or ValueError with the reason, if no such layer computes what the module does."""
    if not isinstance(module, RACausalSelfAttention):
        raise TypeError(f"module must be a RACausalSelfAttention, got {type(module).__name__}")
    if module.rope is None:
        raise ValueError(
            "Llama-type attention rotates its heads, and this layer has no rope; "
            + (
                "it folds into GPT-2: to_gpt2"
                if module.q_norm is None
                else "qk_norm alone is no stock model's"
            )
        )
    turned, D = module.rope.rope_dims, module.layout.head_dim
    if turned != D and not partial_rotary:
        raise ValueError(
            f"a Llama turns all {D} lanes of a head, this layer rope_dims={turned}; a stock layer "
            f"with partial_rotary_factor={turned / D:g} does it too: partial_rotary=True"
        )
