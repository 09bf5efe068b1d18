"""The attention module: the definition, gradients, initialisation, diagnostics, arguments."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from budget import assert_attention_close, assert_bitwise, assert_projection_close
from layers import C, D, H, R, assert_rounded, gradients, layer, parametrisations
from strategies import DEVICE, backends, normal
from torch import nn

import ra_triton
from ra_triton.nn import ComposedLinear, RACausalSelfAttention
from ref import reciprocal_attention as ref


def definition(x, p, bias=True):
    """The composed layer in the dtype of ``x``, from its named parameters: ref/ and c_proj."""
    weights = [p[f"c_attn.W_{name}"] for name in "qkv"]
    if bias:  # biases are a row of weights over a constant 1
        biases = [p[f"c_attn.b_{name}"] for name in "qkv"]
        weights = [torch.cat((w, b[None])) for w, b in zip(weights, biases, strict=True)]
        x = torch.cat((x, torch.ones_like(x[..., :1])), -1)
    gates = {name: p[f"c_attn.{name}"] for name in ("w_std", "w_rec")}
    W_recip = p.get("c_attn.W_recip", x.new_empty(D, 0))  # without elements it is no parameter
    y = ref.reciprocal_attention(x, *weights, W_recip, n_head=H, **gates)
    return nn.functional.linear(y, p["c_proj.weight"], p["c_proj.bias"] if bias else None)


# The definition


@backends
@parametrisations
@pytest.mark.parametrize("bias", [True, False])
def test_stages_pass_the_gate(backend, parametrisation, bias):
    module = layer(parametrisation, bias=bias, backend=backend).eval()
    x = normal(2, 20, C, seed=9)
    with torch.no_grad():
        W_fused, b = module.fused_weight()
        packed = ra_triton.project(
            x, W_fused, R, n_head=H, bias=b, weight_layout="packed", backend=backend
        )
        assert_projection_close(torch.cat(packed, 2).flatten(2), x, W_fused, b)
        attended = ra_triton.packed_attention(*packed, backend=backend)
        assert_attention_close(attended, *packed)
        assert_bitwise(module(x), module.c_proj(attended.flatten(2)))


def check_gradients(module, bias=True):
    x, grad = normal(2, 9, C, seed=8), normal(2, 9, C, seed=9)
    inputs = {"x": x, **dict(module.named_parameters())}
    leaves = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    exact = definition(leaves["x"], leaves, bias)
    exact.backward(grad.double())

    x.requires_grad_()
    out = module(x)
    out.backward(grad)
    assert_rounded(out, exact, "output")
    for name, t in inputs.items():
        # A bias is a row of its weight; softmax may cancel its gradient to 0.
        rows = leaves[name.replace(".b_", ".W_")].grad
        assert_rounded(t.grad, leaves[name].grad, name, rows)


@pytest.mark.parametrize("recip_per_head", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 1, R, D])
def test_composed_output_and_gradients_are_those_of_the_definition(rank, bias, recip_per_head):
    check_gradients(layer(R=rank, bias=bias, recip_per_head=recip_per_head), bias)


def test_gradients_of_the_kernels_reach_every_factor():
    check_gradients(layer(backend="triton"))


@pytest.mark.parametrize("value", [0.0, -1e-30, -0.5])
def test_gates_have_finite_gradients_at_zero_and_below(value):
    module = layer()
    with torch.no_grad():
        module.c_attn.w_std.fill_(value)
        module.c_attn.w_rec.fill_(value)
    grads = gradients(module, module(normal(2, 9, C)).square().sum())
    for name in ("c_attn.w_std", "c_attn.w_rec"):
        assert grads[name].isfinite().all()
        assert (grads[name] != 0).all()


def test_nanogpt_computes_the_same_from_a_free_layer():
    from bench.models.gpt import CausalSelfAttention, GPTConfig

    plain = CausalSelfAttention(GPTConfig(n_head=H, n_embd=C)).to(DEVICE)
    module = layer("free")
    plain.load_state_dict(module.state_dict())  # the same names and shapes
    x = normal(2, 9, C)
    assert_rounded(module(x), plain(x).double(), "output")


# Initialisation and diagnostics


def test_both_parametrisations_start_with_the_scale_of_gpt2():
    """Standard deviations of n numbers are within six of their own: 0.02 / sqrt(2 n)."""
    for parametrisation in ("free", "composed"):
        module = RACausalSelfAttention(C, H, R, parametrisation=parametrisation)
        W_fused, bias = module.fused_weight()
        assert not bias.any()
        for section in ra_triton.weights.layout.RALayout(H, H, D, R).views(W_fused):
            for lanes in (section[..., :-R], section[..., -R:]):
                n = lanes.numel()
                assert abs(lanes.std().item() / 0.02 - 1) < 6 / (2 * n) ** 0.5
                assert abs(lanes.mean().item()) < 6 * 0.02 / n**0.5


def test_low_lanes_start_uncorrelated_with_standard_ones():
    """Every column of the composed weight is another column of W_q, W_k or W_v."""
    module = RACausalSelfAttention(C, H, R, parametrisation="composed")
    columns = module.fused_weight()[0].mT
    factors = torch.cat((module.c_attn.W_q, module.c_attn.W_k, module.c_attn.W_v), 1).mT
    matches = (columns[:, None] == factors[None]).all(-1)
    assert (matches.sum(0) == 1).all()
    assert (matches.sum(1) == 1).all()


@parametrisations
def test_reciprocal_share_is_that_of_the_scores(parametrisation):
    module, x = layer(parametrisation), normal(2, 9, C)
    W_fused, bias = module.fused_weight()
    q, k, _ = (x @ W_fused + bias).detach().double().unflatten(-1, (3, H, D)).unbind(2)
    parts = []
    for lanes in (slice(None, D - R), slice(D - R, None)):
        S = torch.einsum("bihd,bjhd->bhij", q[..., lanes], k[..., lanes])
        rows = [S[..., i, : i + 1].var(-1, correction=0) for i in range(9)]
        parts.append(torch.stack(rows).sum((0, 1)))
    share = module.reciprocal_share(x)
    assert share.shape == (H,)
    assert_rounded(share, parts[1] / (parts[0] + parts[1]), "share")


def test_reciprocal_share_follows_the_gates_and_is_defined_without_variation():
    module, x = layer(), normal(2, 9, C)
    for gate, share in (("w_rec", 0.0), ("w_std", 1.0)):
        module = layer()
        with torch.no_grad():
            getattr(module.c_attn, gate).zero_()
        assert_bitwise(module.reciprocal_share(x), torch.full((H,), share, device=DEVICE))
    assert_bitwise(layer().reciprocal_share(x[:, :1]), torch.zeros(H, device=DEVICE))


def test_gates_are_detached_copies():
    module = layer()
    gates = module.gates()
    assert_bitwise(gates["w_rec"], module.c_attn.w_rec.detach())
    gates["w_rec"].zero_()
    assert (module.c_attn.w_rec != 0).all()
    assert layer("free").gates() == {}


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_head": 5}, ValueError, "n_embd=48 must be a multiple of n_head=5"),
        ({"n_head": 0}, ValueError, "n_head must be at least 1, got 0"),
        ({"n_head": 3.0}, TypeError, "n_head must be an int, got 3.0"),
        ({"n_embd": -48}, ValueError, "n_embd must be at least 1, got -48"),
        ({"n_embd": True}, TypeError, "n_embd must be an int, got True"),
        ({"R": -1}, ValueError, "R must be between 0 and the head dim 16, got -1"),
        ({"R": 17}, ValueError, "R must be between 0 and the head dim 16, got 17"),
        ({"R": 4.0}, TypeError, "R must be an int, got 4.0"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, ValueError, r"dropout must be in \[0, 1\), got nan"),
        ({"dropout": None}, TypeError, "dropout must be a number, got None"),
        ({"parametrisation": "tied"}, ValueError, "parametrisation must be one of free, composed"),
        ({"recip_per_head": True}, ValueError, "recip_per_head needs parametrisation='composed'"),
        ({"recip_per_head": "no"}, TypeError, "recip_per_head must be a bool, got 'no'"),
        ({"bias": None}, TypeError, "bias must be a bool, got None"),
        ({"qk_norm": "no"}, TypeError, "qk_norm must be a bool, got 'no'"),
        ({"norm_eps": "1"}, TypeError, "norm_eps must be a number, got '1'"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps must be finite and above 0, got -1.0"),
    ],
)
def test_bad_arguments_raise(options, error, message):
    with pytest.raises(error, match=message):
        RACausalSelfAttention(**{"n_embd": C, "n_head": H, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_embd": 49}, ValueError, "n_embd=49 must be a multiple of n_head=3"),
        ({"n_embd": 48.0}, TypeError, "n_embd must be an int, got 48.0"),
        ({"R": 17}, ValueError, "R must be between 0 and the head dim 16, got 17"),
        ({"n_kv_head": 2}, ValueError, "n_kv_head must divide n_head=3, got 2"),
    ],
)
def test_a_composed_projection_by_itself_checks_its_sizes(options, error, message):
    with pytest.raises(error, match=message):
        ComposedLinear(**{"n_embd": C, "n_head": H, "R": R, **options})


@parametrisations
def test_bad_inputs_raise(parametrisation):
    module = layer(parametrisation)
    for x, error, message in (
        (normal(9, C), ValueError, r"x must be \[B, T, C\], got \(9, 48\)"),
        (normal(2, 9, C + 1), ValueError, r"x must be \[B, T, n_embd\] with n_embd = 48, got"),
        (normal(2, 9, C).half(), TypeError, "must be torch.float16 like x"),
        (None, TypeError, "x must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            module(x)
        with pytest.raises(error, match=message):
            module.reciprocal_share(x)
    module.backend = "cuda"
    with pytest.raises(ValueError, match="backend must be one of"):
        module(normal(2, 9, C))


def test_from_config_reads_a_nanogpt_config():
    config = SimpleNamespace(n_embd=C, n_head=H, dropout=0.25, bias=False, block_size=8)
    module = RACausalSelfAttention.from_config(config, R=2, parametrisation="composed")
    assert (module.n_embd, module.n_head, module.R, module.dropout) == (C, H, 2, 0.25)
    assert module.c_proj.bias is module.c_attn.b_q is None
    assert module.resid_dropout.p == 0.25
    assert not hasattr(module, "bias")  # nanoGPT's crop_block_size would take it for its mask
    with pytest.raises(AttributeError, match="dropout"):
        RACausalSelfAttention.from_config(SimpleNamespace(n_embd=C, n_head=H, bias=True))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch
from ra_triton.nn import RACausalSelfAttention, Workspace
module = RACausalSelfAttention(48, 3, parametrisation="composed")
module(torch.randn(2, 9, 48)).sum().backward()
assert module.c_attn.w_rec.grad.isfinite().all()
"""


def test_modules_need_neither_triton_nor_a_gpu():
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=120,
    )


@pytest.mark.parametrize("recip_per_head", [True, False])
def test_rank_0_has_no_parameter_without_elements_and_takes_older_states(recip_per_head):
    module, other = (layer(R=0, recip_per_head=recip_per_head, seed=seed) for seed in (0, 1))
    assert all(p.numel() for p in module.parameters())
    shape = (H, D, 0) if recip_per_head else (D, 0)
    state = {**module.state_dict(), "c_attn.W_recip": torch.empty(shape, device=DEVICE)}
    other.load_state_dict(state)
    assert "c_attn.W_recip" in state  # the caller's
    x = normal(2, 9, C)
    assert_bitwise(other(x), module(x))
    state["c_attn.W_recip"] = torch.empty(D, 1, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*c_attn.W_recip"):
        other.load_state_dict(state)
    folded = ra_triton.nn.to_gpt2(module)
    assert_bitwise(ra_triton.nn.from_gpt2(layer(R=0, seed=2), folded)(x), module(x))
    optimizer = torch.optim.Adafactor(module.parameters())
    module(x).square().sum().backward()
    optimizer.step()
    assert module(x).isfinite().all()
    assert module.eval().quantize_("all").c_attn.data.shape == (3 * C, C)
