"""from_config: nanoGPT's names and those of Hugging Face, and what a layer is not."""

from types import SimpleNamespace as Config

import pytest

from ra_triton.nn import RACausalSelfAttention

GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_head": 3, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "head_dim": 16,
}


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


def seen(module):
    rope = None if module.rope is None else (module.rope.theta, module.rope.rope_dims)
    sizes = module.n_embd, module.n_head, module.n_kv_head, module.dropout
    return *sizes, module.c_proj.bias is not None, rope, module.q_norm is not None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2, (48, 3, 3, 0.1, True, None, False)),
        (without(GPT2, "model_type"), (48, 3, 3, 0.1, True, None, False)),
        (LLAMA, (64, 4, 2, 0.0, False, (5e5, 16), False)),
        (without(LLAMA, "model_type", "head_dim"), (64, 4, 2, 0.0, False, (5e5, 16), False)),
        (without(LLAMA, "num_key_value_heads"), (64, 4, 4, 0.0, False, (5e5, 16), False)),
        (LLAMA | {"attention_bias": True}, (64, 4, 2, 0.0, True, (5e5, 16), False)),
        (LLAMA | {"model_type": "qwen3"}, (64, 4, 2, 0.0, False, (5e5, 16), True)),
        (LLAMA | {"model_type": "qwen2"}, (64, 4, 2, 0.0, True, (5e5, 16), False)),
        (LLAMA | {"partial_rotary_factor": 0.5}, (64, 4, 2, 0.0, False, (5e5, 8), False)),
        (
            without(LLAMA, "rope_theta")
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            (64, 4, 2, 0.0, False, (1e4, 16), False),
        ),
        (LLAMA | {"rope_scaling": None, "sliding_window": None, "use_sliding_window": True},
         (64, 4, 2, 0.0, False, (5e5, 16), False)),
        (LLAMA | {"sliding_window": 4096, "use_sliding_window": False},
         (64, 4, 2, 0.0, False, (5e5, 16), False)),
    ],
)  # fmt: skip
def test_a_config_gives_the_layer_of_its_model(config, expected):
    module = RACausalSelfAttention.from_config(Config(**config), R=2)
    assert seen(module) == expected
    assert module.R == 2


def test_options_come_before_what_the_config_says():
    options = {"dropout": 0.5, "bias": False}
    config = Config(**GPT2 | {"resid_pdrop": 0.3})
    assert seen(RACausalSelfAttention.from_config(config, **options))[3:5] == (0.5, False)
    config = Config(**without(LLAMA, "rope_theta"))
    assert RACausalSelfAttention.from_config(config, rope=100.0).rope.theta == 100.0
    scaled = Config(**LLAMA, rope_scaling={"rope_type": "yarn"})
    assert RACausalSelfAttention.from_config(scaled, rope=False).rope is None
    assert RACausalSelfAttention.from_config(Config(**LLAMA)).q_norm is None
    qk_norm = RACausalSelfAttention.from_config(Config(**LLAMA), qk_norm=True).q_norm
    assert qk_norm.eps == 1e-5


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({}, AttributeError, "config, a SimpleNamespace, lacks n_embd, n_head, bias, dropout"),
        ({"n_embd": 48, "n_head": 3}, AttributeError, "lacks bias, dropout"),
        (without(GPT2, "n_head", "attn_pdrop"), AttributeError, "lacks n_head, attn_pdrop"),
        ({"hidden_size": 64}, AttributeError, "lacks num_attention_heads"),
        (without(LLAMA, "rope_theta"), AttributeError, "lacks rope_theta or rope_parameters; pass"),
        (GPT2 | {"resid_pdrop": 0.3}, ValueError, "attn_pdrop=0.1 and config.resid_pdrop=0.3"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, ValueError, "layer_idx must be F"),
        (LLAMA | {"head_dim": 32}, ValueError, "config.head_dim=32 with hidden_size=64"),
        (LLAMA | {"model_type": "olmo2"}, ValueError, "must be one of gpt2, llama, .* got 'olmo2'"),
        (LLAMA | {"sliding_window": 4096}, ValueError, "sliding_window=4096, and this layer"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, ValueError,
         "config.rope_scaling must be of type 'default', got 'linear'"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn"}}, ValueError, "'default', got 'yarn'"),
    ],
)  # fmt: skip
def test_what_a_config_lacks_or_a_layer_is_not_has_its_name_in_the_error(config, error, match):
    with pytest.raises(error, match=match):
        RACausalSelfAttention.from_config(Config(**config))


def test_configs_of_transformers():
    transformers = pytest.importorskip("transformers", reason="Hugging Face is a test-only extra")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    for name, given in {
        "GPT2": {"n_embd": 64, "n_head": 4},
        "Llama": sizes,
        "Mistral": {**sizes, "sliding_window": None},
        "Qwen2": sizes,
        "Qwen3": {**sizes, "head_dim": 16},
    }.items():
        module = RACausalSelfAttention.from_config(getattr(transformers, f"{name}Config")(**given))
        assert (module.n_embd, module.n_head) == (64, 4)
        assert module.n_kv_head == (4 if name == "GPT2" else 2)
        assert (module.q_norm is not None) == (name == "Qwen3")
        assert (module.rope is None) == (name == "GPT2")
