"""Options of a layer from the config of a model: nanoGPT's, or Hugging Face's.

    nanoGPT       n_embd, n_head, bias, dropout
    GPT-2         n_embd, n_head, attn_pdrop, resid_pdrop
    Llama, ...    hidden_size, num_attention_heads, num_key_value_heads, head_dim, attention_bias,
                  attention_dropout, rope_theta or rope_parameters, partial_rotary_factor,
                  rms_norm_eps

A config of Hugging Face names its ``model_type``. What a stock layer does and this one does not
(a sliding window, scaled rotation, heads that are not ``C / H`` wide) raises with its name.
"""

from collections.abc import Container
from typing import Any

NANOGPT = ("n_embd", "n_head", "bias", "dropout")
# model_type: what its attention has without its config saying so.
LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"bias": True},
    "qwen3": {"qk_norm": True},
}
# What a GPT-2 config may ask for, and the values that this layer stands for.
GPT2_ONLY = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def options_of(config: Any, given: Container[str] = ()) -> dict[str, Any]:
    """The arguments of ``RACausalSelfAttention`` that a config holds.

    Args:
        config: an object with the attributes that this module's docstring lists.
        given: names of arguments that the config need not have.

    Raises:
        AttributeError: attributes that are missing, by name.
        ValueError: another type of model; a layer that this one is not.
    """
    kind = getattr(config, "model_type", None) or _kind_by_names(config)
    if kind == "nanogpt":
        _check_names(config, NANOGPT, given)
        return {name: getattr(config, name) for name in NANOGPT if name not in given}
    if kind == "gpt2":
        return _gpt2(config, given)
    if kind in LLAMAS:
        return {**_llama(config, given), **LLAMAS[kind]}
    known = ", ".join(("gpt2", *LLAMAS))
    raise ValueError(f"config.model_type must be one of {known}, got {kind!r}")


def _kind_by_names(config: Any) -> str:
    """That of a config which does not say: plain nanoGPT, unless its names are another's."""
    if not hasattr(config, "n_embd") and hasattr(config, "hidden_size"):
        return "llama"
    return "gpt2" if hasattr(config, "attn_pdrop") else "nanogpt"


def _check_names(config: Any, names: tuple[str, ...], given: Container[str]) -> None:
    missing = [name for name in names if not hasattr(config, name) and name not in given]
    if missing:
        raise AttributeError(f"config, a {type(config).__name__}, lacks {', '.join(missing)}")


def _gpt2(config: Any, given: Container[str]) -> dict[str, Any]:
    pdrops = () if "dropout" in given else ("attn_pdrop", "resid_pdrop")
    _check_names(config, ("n_embd", "n_head", *pdrops), given)
    for name, value in GPT2_ONLY.items():
        if getattr(config, name, value) != value:
            raise ValueError(f"config.{name} must be {value}, got {getattr(config, name)}")
    options: dict[str, Any] = {"bias": True}
    options |= {n: getattr(config, n) for n in ("n_embd", "n_head") if n not in given}
    if pdrops:
        attn_pdrop, resid_pdrop = (getattr(config, name) for name in pdrops)
        if attn_pdrop != resid_pdrop:
            raise ValueError(
                f"a layer has one dropout, but config.attn_pdrop={attn_pdrop} and "
                f"config.resid_pdrop={resid_pdrop}; pass dropout="
            )
        options["dropout"] = attn_pdrop
    return options


def _llama(config: Any, given: Container[str]) -> dict[str, Any]:
    _check_names(config, ("hidden_size", "num_attention_heads"), ())
    options: dict[str, Any] = {
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_kv_head": getattr(config, "num_key_value_heads", None),
    }
    options["bias"] = bool(getattr(config, "attention_bias", False))
    options["dropout"] = getattr(config, "attention_dropout", 0.0)
    options["norm_eps"] = getattr(config, "rms_norm_eps", 1e-6)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None and head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"a layer has heads of n_embd / n_head lanes, but config.head_dim={head_dim} with "
            f"hidden_size={config.hidden_size} and num_attention_heads={config.num_attention_heads}"
        )
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ValueError(
            f"config.sliding_window={config.sliding_window}, and this layer has no window: set it "
            "to None where texts are no longer than that"
        )
    return {**options, **_rotation(config, given)}


def _rotation(config: Any, given: Container[str]) -> dict[str, Any]:
    """``rope`` and ``rope_dims``."""
    if "rope" in given:
        return {}
    # rope_parameters of newer releases; rope_theta and rope_scaling of older ones.
    parameters = getattr(config, "rope_parameters", None) or {}
    scaling = getattr(config, "rope_scaling", None) or {}
    for name, rope in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        scaled = rope.get("rope_type", rope.get("type", "default"))
        if scaled != "default":
            raise ValueError(f"config.{name} must be of type 'default', got {scaled!r}; pass rope=")
    theta = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    if theta is None:
        raise AttributeError(
            f"config, a {type(config).__name__}, lacks rope_theta or rope_parameters; pass rope="
        )
    partial = parameters.get(
        "partial_rotary_factor", getattr(config, "partial_rotary_factor", None)
    )
    if partial in (None, 1.0) or "rope_dims" in given:
        return {"rope": float(theta)}
    head_dim = config.hidden_size // config.num_attention_heads
    return {"rope": float(theta), "rope_dims": int(head_dim * partial)}
