"""Exchange with stock GPT-2: the same logits from folded weights, in both orientations."""

import copy

import pytest
import torch
from budget import assert_bitwise
from layers import C, D, H, R, assert_rounded, layer, parametrisations
from strategies import DEVICE, normal

import ra_triton
from bench.models.gpt import GPT, GPTConfig
from ra_triton.nn import from_gpt2, to_gpt2
from ra_triton.weights.fused import factor_weight

SIZES = {"block_size": 16, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32}
orientations = pytest.mark.parametrize("orientation", ["linear", "conv1d"])


def model(attention=None, seed=0, **options):
    """A nanoGPT-like model whose every parameter is drawn; plain attention if none is named."""
    from ra_triton.nn import RACausalSelfAttention

    config = GPTConfig(**{**SIZES, **options})
    if attention is None:
        gpt = GPT(config)
    else:
        gpt = GPT(
            config,
            lambda c: RACausalSelfAttention.from_config(
                c, R=3, parametrisation=attention, backend="sdpa"
            ),
        )
    with torch.no_grad():
        for i, p in enumerate(gpt.parameters()):
            p.copy_(normal(*p.shape, seed=100 * seed + i, scale=0.2))
    return gpt.eval().to(DEVICE)


def tokens():
    return torch.randint(SIZES["vocab_size"], (3, 16)).to(DEVICE)


# One layer


@pytest.mark.parametrize("rank", [0, 1, R, D])
@pytest.mark.parametrize("weight_layout", ["split", "packed"])
def test_factors_compose_to_the_weight_they_came_from(rank, weight_layout):
    W = normal(C, 3 * C)
    *weights, W_recip = factor_weight(W, rank, n_head=H, weight_layout=weight_layout)
    assert W_recip.shape == (D, rank)
    composed = ra_triton.compose_weights(
        *weights, W_recip, n_head=H, w_std=1.0, w_rec=torch.ones(H), weight_layout=weight_layout
    )
    assert_bitwise(composed, W)


def test_factor_weight_refuses_what_compose_weights_cannot_make():
    for arguments, error, message in (
        ({"R": D + 1}, ValueError, "R must be between 0 and the head dim"),
        ({"n_head": 5}, ValueError, "has 144 columns"),
        ({"weight_layout": "mixed"}, ValueError, "weight_layout must be one of split, packed"),
    ):
        with pytest.raises(error, match=message):
            factor_weight(normal(C, 3 * C), **{"R": R, "n_head": H, **arguments})


@orientations
@parametrisations
@pytest.mark.parametrize("target", ["free", "composed"])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_exchange_exactly(parametrisation, target, orientation, bias):
    """Another rank and parametrisation hold the same weight; 1 and 0 multiply exactly."""
    source, other = layer(parametrisation, bias=bias), layer(target, seed=3, R=R + 1, bias=bias)
    folded = to_gpt2(source, orientation=orientation)
    shape = (C, 3 * C) if orientation == "conv1d" else (3 * C, C)
    assert folded["c_attn.weight"].shape == shape
    assert all(t.is_contiguous() and not t.requires_grad for t in folded.values())
    assert from_gpt2(other, folded, orientation=orientation) is other
    x = normal(2, 9, C)
    assert_bitwise(other(x), source(x))
    for name, t in to_gpt2(other, orientation=orientation).items():
        assert_bitwise(t, folded[name], name)


def test_a_folded_layer_is_plain_attention():
    from bench.models.gpt import CausalSelfAttention

    source = layer("composed")
    plain = CausalSelfAttention(GPTConfig(n_head=H, n_embd=C)).to(DEVICE)
    plain.load_state_dict(to_gpt2(source))
    x = normal(2, 9, C)
    assert_rounded(plain(x), source(x).double(), "output")


def test_folding_leaves_the_layer_alone():
    source = layer("composed")
    before = copy.deepcopy(source.state_dict())
    folded = to_gpt2(source, orientation="conv1d")
    folded["c_attn.weight"].zero_()
    folded["c_proj.weight"].zero_()
    for name, t in source.state_dict().items():
        assert_bitwise(t, before[name], name)


# Models


@parametrisations
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_model_gives_the_same_logits_in_plain_nanogpt(parametrisation, bias):
    source, plain = model(parametrisation, bias=bias), model(seed=1, bias=bias)
    plain.load_state_dict(to_gpt2(source))
    ids = tokens()
    with torch.no_grad():
        expected = source(ids).double()
        assert_rounded(plain(ids), expected, "logits")
        back = from_gpt2(model(parametrisation, seed=2, bias=bias), plain.state_dict())
        assert_bitwise(back(ids), source(ids))


@parametrisations
@pytest.mark.parametrize("bias", [True, False])
def test_logits_equal_those_of_a_hugging_face_gpt2(parametrisation, bias):
    transformers = pytest.importorskip("transformers", reason="Hugging Face is a test-only extra")
    config = transformers.GPT2Config(
        vocab_size=SIZES["vocab_size"],
        n_positions=SIZES["block_size"],
        n_embd=SIZES["n_embd"],
        n_layer=SIZES["n_layer"],
        n_head=SIZES["n_head"],
        bos_token_id=0,
        eos_token_id=0,
    )
    stock = transformers.GPT2LMHeadModel(config).eval().to(DEVICE)
    source, ids = model(parametrisation, bias=bias), tokens()
    state = to_gpt2(source, orientation="conv1d")
    assert state.keys() == stock.state_dict().keys()
    stock.load_state_dict(state)
    with torch.no_grad():
        expected = source(ids)
        assert_rounded(stock(ids).logits, expected.double(), "logits")
        back = model(parametrisation, seed=2, bias=bias)
        from_gpt2(back, stock.state_dict(), orientation="conv1d")
        assert_bitwise(back(ids), expected)


@parametrisations
def test_a_hugging_face_gpt2_loads_into_reciprocal_attention(parametrisation):
    transformers = pytest.importorskip("transformers", reason="Hugging Face is a test-only extra")
    names = {"n_positions": 16, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32}
    config = transformers.GPT2Config(**names, bos_token_id=0, eos_token_id=0)
    stock = transformers.GPT2LMHeadModel(config).eval().to(DEVICE)
    state = {**stock.state_dict(), "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    ours, ids = model(parametrisation), tokens()
    from_gpt2(ours, state, orientation="conv1d")
    with torch.no_grad():
        assert_rounded(ours(ids), stock(ids).logits.double(), "logits")


def test_a_trained_layer_folds_within_rounding():
    source, ids = model("composed").train(), tokens()
    optimizer = torch.optim.AdamW(source.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        source.loss(ids).backward()
        optimizer.step()
    plain = model()
    plain.load_state_dict(to_gpt2(source))
    with torch.no_grad():
        assert_rounded(plain(ids), source.eval()(ids).double(), "logits")


# Errors


def without(state, name):
    return {key: t for key, t in state.items() if key != name}


def test_states_that_do_not_fit_raise_and_load_nothing():
    module = layer("composed", bias=False)
    state, before = to_gpt2(module), copy.deepcopy(module.state_dict())
    for wrong, message in (
        (without(state, "c_attn.weight"), r"missing \['c_attn.weight'\], left over \[\]"),
        ({**state, "c_fc.weight": normal(2)}, r"missing \[\], left over \['c_fc.weight'\]"),
        ({**state, "c_attn.bias": normal(3 * C)}, "c_attn.bias is not zero, but the module has no"),
        ({**state, "c_proj.weight": normal(C, 2)}, r"c_proj.weight must be \(48, 48\)"),
        (to_gpt2(layer(), orientation="conv1d"), "c_proj.bias is not zero|c_attn.bias is not zero"),
        (
            without(without(to_gpt2(layer(), orientation="conv1d"), "c_attn.bias"), "c_proj.bias"),
            r"c_attn.weight must be \(144, 48\) as nn.Linear has it, got \(48, 144\) with "
            "orientation='linear'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            from_gpt2(module, wrong)
    with pytest.raises(TypeError, match=r"state\['c_attn.weight'\] must be a tensor, got list"):
        from_gpt2(module, {**state, "c_attn.weight": [1.0]})
    with pytest.raises(
        TypeError, match="state must be a mapping of names to tensors, got NoneType"
    ):
        from_gpt2(module, None)
    for call in (to_gpt2, lambda m: from_gpt2(m, state)):
        with pytest.raises(TypeError, match=r"module must be an nn.Module, got dict"):
            call(state)
    for name, t in module.state_dict().items():
        assert_bitwise(t, before[name], name)


@pytest.mark.parametrize("call", [to_gpt2, lambda m, **options: from_gpt2(m, {}, **options)])
def test_unknown_orientations_raise(call):
    with pytest.raises(ValueError, match="orientation must be one of linear, conv1d, got 'rows'"):
        call(layer(), orientation="rows")
