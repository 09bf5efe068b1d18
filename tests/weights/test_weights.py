"""compose_weights: equal to the definition, differentiable in every factor, gates of any sign."""

import pytest
import torch
from budget import (
    MAX_Z,
    assert_attention_close,
    assert_bitwise,
    assert_projection_close,
    projection_budget,
)
from strategies import BACKENDS, DEVICE, normal

import ra_triton
from ref import reciprocal_attention as ref

H, D, C = 2, 16, 12


def factors(R=4, *, dtype=torch.float64, per_head=False, seed=0):
    W_q, W_k, W_v = (normal(C, H * D, seed=seed + i, scale=C**-0.5).to(dtype) for i in range(3))
    shape = (H, D, R) if per_head else (D, R)
    return W_q, W_k, W_v, normal(*shape, seed=seed + 3, scale=D**-0.5).to(dtype)


GATES = {
    "none": (None, None),
    "numbers": (0.5, 2),
    "negative": (-0.3, -1.0),
    "zero": (0.0, 0.0),
    "scalars": (torch.tensor(0.5), torch.tensor(-0.1)),
    "per head": (torch.tensor([0.5, -1.0]), torch.tensor([0.0, 1e-30])),
}


def gates_of(name, dtype=torch.float64):
    return {
        key: gate.to(DEVICE, dtype) if isinstance(gate, torch.Tensor) else gate
        for key, gate in zip(("w_std", "w_rec"), GATES[name], strict=True)
    }


def as_reference(gates):
    return {name: 1.0 if gate is None else gate for name, gate in gates.items()}


def scores(W_fused, x, R):
    """``S`` of the packed operands, ``[B, H, T, T]``."""
    q, k, _ = ref.split_lanes(x @ W_fused, R, H)
    return torch.einsum("bihd,bjhd->bhij", q, k)


def close64(actual, expected):
    """Equal up to the order of FP64 sums."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= 256 * 2.0**-53 * max(expected.abs().max().item(), 1.0), error


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("R", [0, 1, 4, D])
def test_composed_scores_are_those_of_the_definition(gate, per_head, R):
    gates = gates_of(gate)
    W_q, W_k, W_v, W_recip = factors(R, per_head=per_head)
    W_fused = ra_triton.compose_weights(W_q, W_k, W_v, W_recip, n_head=H, **gates)
    assert W_fused.dtype == torch.float64
    assert W_fused.shape == (C, 3 * H * D)
    x = normal(2, 7, C, seed=9).double()
    Q, K = ((x @ W).unflatten(-1, (H, D)) for W in (W_q, W_k))
    expected = ref.reciprocal_scores(Q, K, W_recip, **as_reference(gates))
    close64(scores(W_fused, x, R), expected)
    close64(
        ref.reciprocal_attention_fused(x, W_fused, R, n_head=H),
        ref.reciprocal_attention(x, W_q, W_k, W_v, W_recip, n_head=H, **as_reference(gates)),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_layout", ["split", "packed"])
def test_composed_weights_run_as_the_definition(backend, weight_layout):
    """Stage by stage: the projection of the composed weight, then attention over its result."""
    R, x = 4, normal(2, 20, C, seed=9)
    W_fused = ra_triton.compose_weights(
        *factors(R, dtype=torch.float32), n_head=H, w_rec=0.5, weight_layout=weight_layout
    )
    options = {"n_head": H, "weight_layout": weight_layout, "backend": backend}
    packed = ra_triton.project(x, W_fused, R, **options)
    W_packed = W_fused
    if weight_layout == "split":
        W_packed = ra_triton.pack_weight(W_fused, R, n_head=H)
    assert_projection_close(torch.cat(packed, 2).flatten(2), x, W_packed)
    out = ra_triton.ra_attention(x, W_fused, R, **options)
    assert_attention_close(out.unflatten(-1, (H, D)), *packed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_weight_layouts_give_the_same_bits(backend):
    x = normal(2, 20, C, seed=9)
    outs = [
        ra_triton.ra_attention(
            x,
            ra_triton.compose_weights(
                *factors(dtype=torch.float32), n_head=H, weight_layout=weight_layout
            ),
            n_head=H,
            weight_layout=weight_layout,
            backend=backend,
        )
        for weight_layout in ("split", "packed")
    ]
    assert_bitwise(*outs)


def test_layouts_are_permutations_of_one_another():
    split, packed = (
        ra_triton.compose_weights(*factors(), n_head=H, weight_layout=layout)
        for layout in ("split", "packed")
    )
    assert_bitwise(ra_triton.pack_weight(split, 4, n_head=H), packed)
    assert_bitwise(ra_triton.unpack_weight(packed, 4, n_head=H), split)


def test_one_w_recip_for_all_heads_is_the_same_one_repeated():
    *weights, W_recip = factors()
    repeated = W_recip.expand(H, *W_recip.shape).clone()
    assert_bitwise(
        ra_triton.compose_weights(*weights, W_recip, n_head=H),
        ra_triton.compose_weights(*weights, repeated, n_head=H),
    )


@pytest.mark.parametrize("weight_layout", ["split", "packed"])
@pytest.mark.parametrize("per_head", [False, True])
def test_composition_passes_gradcheck_in_every_factor_and_gate(weight_layout, per_head):
    inputs = [
        w[:3].clone() if w.shape[0] == C else w.clone() for w in factors(2, per_head=per_head)
    ]
    gates = [torch.tensor([0.0, -0.7]).double().to(DEVICE), torch.tensor(0.0).double().to(DEVICE)]
    inputs = [t.requires_grad_() for t in (*inputs, *gates)]

    def compose(W_q, W_k, W_v, W_recip, w_std, w_rec):
        return ra_triton.compose_weights(
            W_q, W_k, W_v, W_recip,
            n_head=H, w_std=w_std, w_rec=w_rec, weight_layout=weight_layout,
        )  # fmt: skip

    assert torch.autograd.gradcheck(compose, inputs, fast_mode=False)


@pytest.mark.parametrize("value", [0.0, 1e-30, -0.1])
def test_gates_have_finite_gradients_through_attention_at_zero_and_below(value):
    gates = [torch.full((H,), value, device=DEVICE, requires_grad=True) for _ in range(2)]
    W_fused = ra_triton.compose_weights(
        *factors(dtype=torch.float32), n_head=H, w_std=gates[0], w_rec=gates[1]
    )
    out = ra_triton.ra_attention(normal(2, 9, C), W_fused, n_head=H, backend="sdpa")
    for grad in torch.autograd.grad(out.square().sum(), gates):
        assert grad.isfinite().all()
        assert (grad != 0).all()


def test_biases_compose_as_one_row_matrices():
    R = 4
    biases = [normal(1, H * D, seed=20 + i).double() for i in range(3)]
    *weights, W_recip = factors(R)
    W_fused = ra_triton.compose_weights(*weights, W_recip, n_head=H, w_std=0.5, w_rec=-0.2)
    bias = ra_triton.compose_weights(*biases, W_recip, n_head=H, w_std=0.5, w_rec=-0.2)[0]
    x = normal(2, 7, C, seed=9).double()
    one = torch.cat((x, torch.ones_like(x[..., :1])), -1)
    extended = [torch.cat((w, b)) for w, b in zip(weights, biases, strict=True)]
    close64(
        ref.reciprocal_attention_fused(x, W_fused, R, n_head=H, bias=bias),
        ref.reciprocal_attention(one, *extended, W_recip, n_head=H, w_std=0.5, w_rec=-0.2),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_composed_and_separate_products_agree(backend, dtype):
    """``x (W_q W_recip)`` and ``(x W_q) W_recip`` round differently and agree within the budget."""
    W_q, W_k, W_v, W_recip = factors(4, dtype=dtype)
    x = normal(2, 20, C, seed=9, dtype=dtype)
    W_fused = ra_triton.compose_weights(W_q, W_k, W_v, W_recip, n_head=H)
    q_pack, k_pack, _ = ra_triton.project(x, W_fused, 4, n_head=H, backend=backend)
    for low, W in ((k_pack[..., -4:], W_q), (q_pack[..., -4:], W_k)):
        exact = (x.double() @ W.double()).unflatten(-1, (H, D)) @ W_recip.double()
        composed = torch.einsum("chd,dr->chr", W.unflatten(-1, (H, D)), W_recip)
        sigma = projection_budget(x, composed.flatten(1)).sigma.unflatten(-1, (H, 4))
        # The composed weight was itself rounded: C products of one rounding each.
        unit = torch.finfo(dtype).eps
        rounded = unit * (x.double().square() @ composed.double().flatten(1).square()).sqrt()
        sigma = (sigma.square() + rounded.unflatten(-1, (H, 4)).square()).sqrt()
        assert ((low.double() - exact) / sigma).abs().max() <= MAX_Z


@pytest.mark.parametrize("weight_layout", ["split", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_take_their_own_columns(backend, weight_layout):
    n_head, n_kv_head, R = 4, 2, 3
    W, x = normal(C, (n_head + 2 * n_kv_head) * D), normal(2, 9, C, seed=1)
    heads = {"n_head": n_head, "n_kv_head": n_kv_head}
    given = W if weight_layout == "split" else ra_triton.pack_weight(W, R, **heads)
    packed = ra_triton.project(x, given, R, weight_layout=weight_layout, backend=backend, **heads)
    # Both rows of columns of one matrix product: lanes compare exactly with their own product.
    sections = ref.split_lanes(x.double() @ W.double(), R, n_head, n_kv_head)
    magnitudes = ref.split_lanes(x.double().abs() @ W.double().abs(), R, n_head, n_kv_head)
    for got, exact, size in zip(packed, sections, magnitudes, strict=True):
        assert got.shape == exact.shape
        assert ((got.double() - exact).abs() <= C * 2.0**-23 * size).all()
