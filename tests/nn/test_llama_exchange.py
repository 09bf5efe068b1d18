"""Exchange with Llama-type attention layers: folded weights, the same outputs in transformers."""

import copy

import pytest
import torch
from budget import assert_bitwise
from layers import C, D, H, R, assert_rounded, layer, parametrisations
from strategies import DEVICE, normal

from ra_triton.nn import from_gpt2, from_llama, to_gpt2, to_llama

STOCK = {  # class of transformers: options of ours, of its config
    "Llama": ({"bias": True}, {"attention_bias": True}),
    "Mistral": ({"bias": False, "n_kv_head": 1}, {"sliding_window": None}),
    "Qwen3": ({"bias": False, "n_kv_head": 1, "qk_norm": True}, {}),
    "Phi": ({"rope_dims": 8}, {"partial_rotary_factor": 0.5}),
}


def stock_attention(name, module):
    """The attention layer of a stock model, and what turns its heads."""
    transformers = pytest.importorskip("transformers", reason="Hugging Face is a test-only extra")
    family = getattr(transformers.models, name.lower())
    modeling = getattr(family, f"modeling_{name.lower()}")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=C,
        num_attention_heads=H,
        num_key_value_heads=module.n_kv_head,
        head_dim=D,
        rms_norm_eps=1e-6,
        **STOCK[name][1],
    )
    config._attn_implementation = "sdpa"
    rotary = getattr(modeling, f"{name}RotaryEmbedding")(config)
    return getattr(modeling, f"{name}Attention")(config, 0).eval().to(DEVICE), rotary.to(DEVICE)


@parametrisations
@pytest.mark.parametrize("name", STOCK)
def test_a_stock_layer_computes_the_same_from_folded_weights(name, parametrisation):
    options = {"rope": True, **STOCK[name][0]}
    module = layer(parametrisation, **options).eval()
    stock, rotary = stock_attention(name, module)
    state = to_llama(module, partial_rotary="rope_dims" in options)
    if name == "Phi":
        state = {n.replace("o_proj", "dense"): t for n, t in state.items()}
    assert {n: t.shape for n, t in state.items()} == {
        n: t.shape for n, t in stock.state_dict().items()
    }
    stock.load_state_dict(state)
    x = normal(2, 9, C)
    turn = rotary(x, torch.arange(9, device=DEVICE)[None])
    with torch.no_grad():
        out, expected = stock(x, turn, attention_mask=None)[0], module(x)
        assert_rounded(out, expected.double(), "output")


@parametrisations
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_exchange_exactly(parametrisation, qk_norm, bias):
    options = {"rope": True, "qk_norm": qk_norm, "bias": bias}
    source, other = layer("composed", **options), layer(parametrisation, seed=3, R=R + 1, **options)
    folded = to_llama(source)
    assert all(t.is_contiguous() and not t.requires_grad for t in folded.values())
    assert from_llama(other, folded) is other
    x = normal(2, 9, C)
    assert_bitwise(other(x), source(x))
    for name, t in to_llama(other).items():
        assert_bitwise(t, folded[name], name)


def test_grouped_heads_fold_into_free_layers_and_back():
    source, other = (
        layer(kind, rope=True, n_kv_head=1, seed=i) for i, kind in enumerate(("composed", "free"))
    )
    x = normal(2, 9, C)
    assert_bitwise(from_llama(other, to_llama(source))(x), source(x))
    flat = layer("composed", rope=True, n_kv_head=1, seed=4, R=0)
    assert_bitwise(from_llama(flat, to_llama(source))(x), source(x))
    before = copy.deepcopy(source.state_dict())
    with pytest.raises(ValueError, match="n_kv_head=1 < n_head=3 has no factors with R=4"):
        from_llama(source, to_llama(other))
    for name, t in source.state_dict().items():
        assert_bitwise(t, before[name], name)


def test_folding_leaves_the_layer_alone():
    source = layer("free", rope=True)
    before = copy.deepcopy(source.state_dict())
    for t in to_llama(source).values():
        t.zero_()
    for name, t in source.state_dict().items():
        assert_bitwise(t, before[name], name)


def test_biases_that_the_state_lacks_are_zeros():
    """Qwen2 has none on its output projection."""
    module = layer("free", rope=True)
    state = {n: t for n, t in to_llama(module).items() if n != "o_proj.bias"}
    assert not from_llama(module, state).c_proj.bias.any()


# What does not fold


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "this layer has no rope; it folds into GPT-2: to_gpt2"),
        ({"qk_norm": True}, "this layer has no rope; qk_norm alone is no stock model's"),
        ({"rope": True, "rope_dims": 12}, "turns all 16 lanes .* rope_dims=12; .*factor=0.75 "),
    ],
)
@pytest.mark.parametrize("call", [to_llama, lambda module: from_llama(module, {})])
def test_what_no_llama_computes_raises_with_the_reason(call, options, match):
    with pytest.raises(ValueError, match=match):
        call(layer("free", **options))


@pytest.mark.parametrize("call", [to_gpt2, lambda module: from_gpt2(module, {})])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rope": True}, "GPT-2 does not rotate its heads, but this layer has rope; see to_llama"),
        ({"qk_norm": True}, "GPT-2 has no norm between projection and attention, but qk_norm"),
    ],
)
def test_what_no_gpt2_computes_raises_with_the_reason(call, options, match):
    with pytest.raises(ValueError, match=match):
        call(layer("free", **options))


def test_states_that_do_not_fit_raise_and_load_nothing():
    module = layer("free", rope=True, bias=False)
    state, before = to_llama(module), copy.deepcopy(module.state_dict())
    for wrong, error, match in (
        ({**state, "v_proj.weight": [1]}, TypeError, r"state\['v_proj.weight'\] must be a tensor"),
        ({**state, "q_norm.weight": normal(D)}, ValueError, r"left over \['q_norm.weight'\]"),
        ({**state, "q_proj.bias": normal(C)}, ValueError, r"left over \['q_proj.bias'\]"),
        ({**state, "k_proj.weight": normal(D, C)}, ValueError, r"k_proj.weight must be \(48, 48\)"),
        ({}, ValueError, r"missing \['k_proj.weight', 'o_proj.weight', 'q_proj.weight', 'v_"),
        (None, TypeError, "state must be a mapping of names to tensors, got NoneType"),
    ):
        with pytest.raises(error, match=match):
            from_llama(module, wrong)
    for name, t in module.state_dict().items():
        assert_bitwise(t, before[name], name)
    with pytest.raises(TypeError, match="module must be a RACausalSelfAttention, got Linear"):
        to_llama(torch.nn.Linear(2, 2))


def test_an_int8_layer_folds_as_the_numbers_it_stands_for_and_loads_nothing():
    module = layer("free", rope=True, n_kv_head=1).eval()
    other = layer("free", rope=True, n_kv_head=1, seed=1).eval()
    module.quantize_("all")
    x = normal(2, 9, C)
    with torch.no_grad():
        from_llama(other, to_llama(module))
        assert_bitwise(other.c_attn.weight, module.c_attn.weight)
        assert_rounded(other(x), module(x).double(), "output")
    with pytest.raises(ValueError, match="c_attn is quantized: load first"):
        from_llama(module, to_llama(other))
