"""Grouped heads: composed weights against the definition, the module, what has factors."""

import pytest
import torch
from budget import assert_attention_close, assert_bitwise, assert_projection_close
from hypothesis import given
from hypothesis import strategies as st
from layers import assert_rounded, gradients
from strategies import BACKENDS, DEVICE, backends, fewest_examples, normal, ranks
from test_weights import close64
from torch import nn

import ra_triton
from ra_triton.nn import RACausalSelfAttention, from_gpt2, to_gpt2
from ra_triton.weights.fused import factor_weight
from ref import reciprocal_attention as ref

GROUPS = [(4, 2), (3, 1), (4, 4), (6, 2)]  # n_head, n_kv_head
D, C = 16, 12


def factors(H, H_kv, R, *, per_head=False, dtype=torch.float64, seed=0):
    widths = (H * D, H_kv * D, H_kv * D)
    weights = [normal(C, n, seed=seed + i, scale=C**-0.5) for i, n in enumerate(widths)]
    recip = normal(*([H] if per_head else []), D, R, seed=seed + 3, scale=D**-0.5)
    return [w.to(dtype) for w in (*weights, recip)]


@given(data=st.data())
def test_composed_weights_are_the_definition(data):
    H, H_kv = data.draw(st.sampled_from(GROUPS))
    R, per_head = data.draw(ranks(D)), data.draw(st.booleans())
    weight_layout = data.draw(st.sampled_from(["split", "packed"]))
    weights = factors(H, H_kv, R, per_head=per_head, seed=data.draw(st.integers(0, 3)))
    gates = {name: normal(H, seed=i).double() for i, name in enumerate(("w_std", "w_rec"))}
    heads = {"n_head": H, "n_kv_head": H_kv}
    W = ra_triton.compose_weights(*weights, **heads, **gates, weight_layout=weight_layout)
    assert W.shape == (C, (H + 2 * H_kv) * D)
    if weight_layout == "packed":
        W = ra_triton.unpack_weight(W, R, **heads)
    x = normal(2, 7, C, seed=9).double()
    Q, K = ((x @ w).unflatten(-1, (-1, D)) for w in weights[:2])
    q, k, _ = ref.split_lanes(x @ W, R, H, H_kv)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(H // H_kv, dim=2))
    close64(scores, ref.reciprocal_scores(Q, K, weights[3], **gates))
    close64(
        ref.reciprocal_attention_fused(x, W, R, **heads),
        ref.reciprocal_attention(x, *weights, **heads, **gates),
    )


@pytest.mark.parametrize("per_head", [True, False])
def test_equal_queries_of_a_group_make_it_attention_per_head(per_head):
    """The operator differs from RA per head only in that a key carries its group's mean."""
    H, H_kv, R = 4, 2, 3
    _, W_k, W_v, W_recip = factors(H, H_kv, R, per_head=per_head)
    W_q = normal(C, H_kv * D).double()
    every = [w.unflatten(-1, (H_kv, D)).repeat_interleave(2, 1).flatten(1) for w in (W_q, W_k, W_v)]
    if per_head:
        W_recip = W_recip[::2].repeat_interleave(2, 0)
    x = normal(2, 7, C, seed=9).double()
    W = ra_triton.compose_weights(every[0], W_k, W_v, W_recip, n_head=H, n_kv_head=H_kv)
    close64(
        ref.reciprocal_attention_fused(x, W, R, n_head=H, n_kv_head=H_kv),
        ref.reciprocal_attention(x, *every, W_recip, n_head=H),
    )


@pytest.mark.parametrize("per_head", [True, False])
def test_gradients_reach_every_factor(per_head):
    inputs = [w[:2].clone() if w.shape[0] == C else w for w in factors(3, 1, 2, per_head=per_head)]
    inputs += [normal(3, seed=i).double() for i in range(2)]
    inputs = [t.requires_grad_() for t in inputs]

    def compose(*tensors):
        *weights, w_std, w_rec = tensors
        return ra_triton.compose_weights(*weights, n_head=3, n_kv_head=1, w_std=w_std, w_rec=w_rec)

    assert torch.autograd.gradcheck(compose, inputs)


def test_without_groups_the_bits_are_those_without_n_kv_head():
    weights = factors(4, 4, 3, dtype=torch.float32)
    assert_bitwise(
        ra_triton.compose_weights(*weights, n_head=4, n_kv_head=4),
        ra_triton.compose_weights(*weights, n_head=4),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_composed_weights_pass_the_gate(backend):
    H, H_kv, R = 6, 2, 5
    x, weights = normal(2, 21, C, seed=9), factors(H, H_kv, R, dtype=torch.float32)
    heads = {"n_head": H, "n_kv_head": H_kv, "weight_layout": "packed", "backend": backend}
    W = ra_triton.compose_weights(*weights, n_head=H, n_kv_head=H_kv, weight_layout="packed")
    packed = ra_triton.project(x, W, R, **heads)
    assert_projection_close(torch.cat(packed, 2).flatten(2), x, W)
    assert_attention_close(ra_triton.ra_attention(x, W, R, **heads).unflatten(-1, (H, D)), *packed)


# The module


def layer(parametrisation, n_head=4, n_kv_head=2, R=3, backend="sdpa", **options):
    module = RACausalSelfAttention(
        16 * n_head, n_head, R, n_kv_head=n_kv_head, parametrisation=parametrisation,
        backend=backend, **options,
    ).to(DEVICE)  # fmt: skip
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(normal(*p.shape, seed=i, scale=max(p.shape[-1], 1) ** -0.5))
    return module


@backends
@pytest.mark.parametrize("per_head", [True, False])
def test_the_composed_layer_and_its_gradients_are_the_definition(backend, per_head):
    module = layer("composed", backend=backend, recip_per_head=per_head)
    x, grad = normal(2, 9, 64, seed=8), normal(2, 9, 64, seed=9)
    exact = {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}
    x64 = x.double()
    one = torch.cat((x64, torch.ones_like(x64[..., :1])), -1)
    weights = [torch.cat((exact[f"c_attn.W_{n}"], exact[f"c_attn.b_{n}"][None])) for n in "qkv"]
    gates = {name: exact[f"c_attn.{name}"] for name in ("w_std", "w_rec")}
    W_recip = exact["c_attn.W_recip"]
    y = ref.reciprocal_attention(one, *weights, W_recip, n_head=4, n_kv_head=2, **gates)
    y = nn.functional.linear(y, exact["c_proj.weight"], exact["c_proj.bias"])
    y.backward(grad.double())

    out = module(x)
    assert_rounded(out, y, "output")
    for name, actual in gradients(module, (out * grad).sum()).items():
        rows = exact[name.replace(".b_", ".W_")].grad
        assert_rounded(actual, exact[name].grad, name, rows)


def test_sizes_of_the_parameters():
    free, composed = layer("free", bias=True), layer("composed")
    assert free.c_attn.weight.shape == composed.c_attn.weight.shape == (4 * 16 + 4 * 16, 64)
    assert free.c_attn.bias.shape == composed.c_attn.bias.shape == (128,)
    assert composed.c_attn.W_k.shape == composed.c_attn.W_v.shape == (64, 32)
    assert composed.c_attn.b_k.shape == (32,)
    assert "n_kv_head=2" in repr(free)
    assert "n_kv_head=2" in repr(composed.c_attn)


def test_reciprocal_scores_start_as_large_as_those_of_plain_attention():
    """The mean of a group is smaller, and the gate makes up for it: within six deviations."""
    module = RACausalSelfAttention(128, 8, 4, n_kv_head=2, parametrisation="composed")
    W = module.fused_weight()[0]
    q_pack, k_pack, _ = module.layout.views(W)
    for lanes, size in ((q_pack[..., -4:], 2.0), (k_pack[..., -4:], 0.5), (k_pack[..., :-4], 1.0)):
        # Lanes of one group repeat each other.
        lanes = lanes[:, ::4] if size == 2.0 else lanes
        assert abs(lanes.std().item() / (0.02 * size) - 1) < 6 / (2 * lanes.numel()) ** 0.5


def test_the_share_of_the_reciprocal_term_counts_every_query_head():
    module = layer("free")
    share = module.reciprocal_share(normal(1, 9, 64))
    assert share.shape == (4,)
    with torch.no_grad():
        W, bias = module.c_attn.weight, module.c_attn.bias
        for t in (W, bias):
            t.unflatten(0, (8, 16))[2:4, -3:] = 0  # K_low of the second group
    share = module.reciprocal_share(normal(1, 9, 64))
    assert (share[:2] > 0).all()
    assert (share[2:] == 0).all()


# What has factors, and what folds


@fewest_examples
@given(
    H=st.sampled_from([(4, 2), (3, 1), (2, 2)]), weight_layout=st.sampled_from(["split", "packed"])
)
def test_plain_grouped_attention_has_factors_at_rank_zero(H, weight_layout):
    heads = dict(zip(("n_head", "n_kv_head"), H, strict=True))
    W = normal(C, (H[0] + 2 * H[1]) * D)
    parts = factor_weight(W, 0, **heads, weight_layout=weight_layout)
    assert_bitwise(ra_triton.compose_weights(*parts, **heads, weight_layout=weight_layout), W)


def test_a_grouped_weight_has_no_factors_at_other_ranks():
    with pytest.raises(ValueError, match=r"n_kv_head=2 < n_head=4 has no factors with R=3"):
        factor_weight(normal(C, 8 * D), 3, n_head=4, n_kv_head=2)


@pytest.mark.parametrize("call", [to_gpt2, lambda module: from_gpt2(module, {})])
@pytest.mark.parametrize("parametrisation", ["free", "composed"])
def test_gpt2_has_no_grouped_heads(call, parametrisation):
    with pytest.raises(ValueError, match="GPT-2 has no grouped heads, but n_kv_head=2 < n_head=4"):
        call(layer(parametrisation))


@pytest.mark.parametrize(
    ("n_kv_head", "error", "match"),
    [
        (3, ValueError, "n_kv_head must divide n_head=4, got 3"),
        (0, ValueError, "n_kv_head must divide n_head=4, got 0"),
        (True, TypeError, "n_kv_head must be an int or None, got True"),
    ],
)
def test_head_counts_that_do_not_group_are_named(n_kv_head, error, match):
    with pytest.raises(error, match=match):
        RACausalSelfAttention(64, 4, n_kv_head=n_kv_head)
