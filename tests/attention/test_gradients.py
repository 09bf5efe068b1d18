"""Gradients against FP64: each stage through the gate, whatever the layouts, sizes and options."""

import pytest
import torch
from budget import assert_bitwise
from gradient_budget import (
    assert_gradient_promise,
    attention_gradient_budgets,
    check_gradients,
    projection_gradient_budgets,
    reference_gradients,
)
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    GRADIENT_LAYOUTS,
    HEAD_LAYOUTS,
    AttentionCase,
    ProjectionCase,
    attention_cases,
    backend_dtypes,
    backends,
    dtypes_for,
    few_examples,
    fewest_examples,
    gradient_layouts,
    normal,
    projection_cases,
    quick,
    small_head_dims,
)

import ra_triton
from ref import reciprocal_attention as ref

NAMES = ("dq", "dk", "dv")


def gate_dtypes(backend: str) -> list[torch.dtype]:
    """PyTorch's CPU kernels sum dk and dv of half-precision operands in half precision."""
    return dtypes_for(backend) if backend == "triton" else [torch.float32]


def attention_gradients(backend, tensors, do, dlse=None, **options):
    """``{"dq": ..., "dk": ..., "dv": ...}`` of ``packed_attention``, from the gradients given."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    results = ra_triton.packed_attention(
        *inputs, return_lse=dlse is not None, backend=backend, **options
    )
    results = (results,) if dlse is None else results
    pairs = [(o, g) for o, g in zip(results, (do, dlse), strict=False) if g is not None]
    outputs, grads = zip(*pairs, strict=True)
    return dict(
        zip(NAMES, torch.autograd.grad(outputs, inputs, grads, materialize_grads=True), strict=True)
    )


def check_attention(case, backend, layout="contiguous"):
    tensors, do = case.tensors(), case.gradient(layout)
    grads = attention_gradients(backend, tensors, do, **case.options)
    budgets = attention_gradient_budgets(*tensors, do, **case.options)
    check_gradients(grads, budgets, dtype=case.dtype, case=f"{case}, dO {layout}")


# Attention


@backends
@few_examples
@given(data=st.data())
def test_gradients_of_attention_match_the_definition(backend, data):
    case = data.draw(attention_cases(gate_dtypes(backend)))
    check_attention(case, backend, data.draw(gradient_layouts, label="dO"))


def gated(test):
    cases = [(b, d) for b in ("sdpa", "triton") for d in gate_dtypes(b)]
    ids = [f"{b}-{str(d).removeprefix('torch.')}" for b, d in cases]
    return pytest.mark.parametrize(("backend", "dtype"), cases, ids=ids)(test)


@gated
@pytest.mark.parametrize("T", [1, 2, 3, 17, 65])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_around_tile_boundaries(backend, dtype, T, causal):
    check_attention(AttentionCase(T_q=T, T_k=T, dtype=dtype, causal=causal), backend)


@gated
@pytest.mark.parametrize("D", [16, 20, 72, 80, 96, 128])
def test_head_dims_also_those_that_are_no_power_of_two(backend, dtype, D):
    case = AttentionCase(T_q=35, T_k=35, D=D, dtype=dtype, layouts=("sliced",) * 3)
    check_attention(case, backend, "offset")


@backends
@pytest.mark.parametrize("T_q_and_T_k", [(1, 70), (5, 37), (40, 7), (65, 1), (33, 34)])
@pytest.mark.parametrize("causal", [True, False])
def test_queries_and_keys_of_different_length(backend, T_q_and_T_k, causal):
    check_attention(AttentionCase(2, *T_q_and_T_k, H_kv=1, group=2, causal=causal), backend)


@pytest.mark.parametrize("causal", [True, False])
def test_every_offset_between_queries_and_keys_modulo_a_tile(causal):
    for T_k in range(1, 36, 3 if causal else 7):
        check_attention(AttentionCase(T_q=18, T_k=T_k, causal=causal), "triton")


@backends
@pytest.mark.parametrize(("n_kv_head", "group"), [(1, 4), (2, 3), (3, 2)])
def test_grouped_heads(backend, n_kv_head, group):
    check_attention(AttentionCase(2, 19, 19, n_kv_head, group), backend)


@backends
@pytest.mark.parametrize("scale", [1e-6, 0.37, 1.0, 40.0])
def test_softmax_scale(backend, scale):
    check_attention(AttentionCase(T_q=37, T_k=37, scale=scale), backend)


@gated
@pytest.mark.parametrize("values", ["zeros", "small", "large", "huge"])
def test_logits_of_every_size(backend, dtype, values):
    check_attention(AttentionCase(2, 50, 50, dtype=dtype, values=values), backend)


@backends
@pytest.mark.parametrize(("B", "T_q", "T_k"), [(0, 5, 5), (2, 0, 0), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_in_gives_gradients_of_zero(backend, B, T_q, T_k, causal):
    case = AttentionCase(B, T_q, T_k, causal=causal)
    grads = attention_gradients(backend, case.tensors(), case.gradient(), causal=causal)
    for grad, t in zip(grads.values(), case.tensors(), strict=True):
        assert_bitwise(grad, torch.zeros_like(t))


@backends
@pytest.mark.parametrize(("T_q", "T_k"), [(40, 7), (70, 3), (17, 16)])
def test_rows_without_keys_have_and_give_no_gradient(backend, T_q, T_k):
    case, blind = AttentionCase(2, T_q, T_k), T_q - T_k
    tensors, do = case.tensors(), case.gradient()
    grads = attention_gradients(backend, tensors, do)
    assert_bitwise(grads["dq"][:, :blind], torch.zeros_like(do[:, :blind]))
    seen = [tensors[0][:, blind:], *tensors[1:]]
    budgets = attention_gradient_budgets(*seen, do[:, blind:])
    grads["dq"] = grads["dq"][:, blind:]
    check_gradients(grads, budgets, dtype=case.dtype, case=case)


@backends
@pytest.mark.parametrize("with_do", [True, False])
@pytest.mark.parametrize(("T_q", "T_k"), [(20, 20), (5, 37), (37, 5)])
def test_gradients_reach_lse(backend, with_do, T_q, T_k):
    case = AttentionCase(2, T_q, T_k, group=2)
    tensors, dlse = case.tensors(), normal(T_q, 2, 2, seed=9).permute(1, 2, 0)
    do = case.gradient() if with_do else None
    grads = attention_gradients(backend, tensors, do, dlse)
    budgets = attention_gradient_budgets(*tensors, do, dlse)
    check_gradients(grads, budgets, dtype=case.dtype, case=f"{case}, with dlse")


@backend_dtypes
@pytest.mark.parametrize("causal", quick([True, False]))
def test_errors_are_within_the_promise_of_eager_pytorch(backend, dtype, causal):
    if backend == "sdpa" and DEVICE.type == "cuda" and dtype == torch.float32:
        pytest.skip("PyTorch's own float32 kernel is 2.8 times less precise than eager on an H200")
    case = AttentionCase(2, 70, 70, 2, D=32, dtype=dtype, causal=causal)
    tensors, do = case.tensors(), case.gradient()
    grads = attention_gradients(backend, tensors, do, causal=causal)
    exact = reference_gradients(tensors, do, causal=causal)
    eager = reference_gradients(tensors, do, dtype=dtype, causal=causal)
    for (name, grad), *others in zip(grads.items(), exact, eager, strict=True):
        assert_gradient_promise(name, grad, *others)


# Projection: dx, dW and dbias from the packed gradients


def projection_gradients(case, backend, layouts):
    """Gradients of ``project`` in every input, and the packed gradient they come from."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in case.tensors()]
    options = {"weight_layout": case.weight_layout, "backend": backend, **case.heads}
    outputs = ra_triton.project(*inputs[:2], case.R, bias=inputs[2], **options)
    grads = [
        GRADIENT_LAYOUTS[layout](normal(*t.shape, dtype=case.dtype, seed=60 + i))
        for i, (t, layout) in enumerate(zip(outputs, layouts, strict=True))
    ]
    present = [t for t in inputs if t is not None]
    got = dict(
        zip(("dx", "dW", "dbias"), torch.autograd.grad(outputs, present, grads), strict=False)
    )
    return got, torch.cat(grads, 2).flatten(2)


def check_projection(case, backend, layouts=("contiguous",) * 3):
    x, W, _ = case.tensors()
    grads, dy = projection_gradients(case, backend, layouts)
    assert grads["dx"].shape == x.shape
    assert grads["dW"].shape == W.shape
    if case.weight_layout == "split":
        W = ra_triton.pack_weight(W, case.R, **case.heads)
        for name in grads.keys() - {"dx"}:
            grads[name] = ra_triton.pack_weight(grads[name], case.R, **case.heads)
    budgets = projection_gradient_budgets(x, W, dy)
    check_gradients(grads, budgets, dtype=case.dtype, case=f"{case}, dy {layouts}")


@backends
@few_examples
@given(data=st.data())
def test_gradients_of_the_projection_match_the_definition(backend, data):
    case = data.draw(projection_cases(gate_dtypes(backend)))
    check_projection(case, backend, [data.draw(gradient_layouts) for _ in range(3)])


@gated
@pytest.mark.parametrize("weight_layout", ["split", "packed"])
def test_gradients_of_a_projection_with_bias(backend, dtype, weight_layout):
    case = ProjectionCase(2, 37, 40, 1, 2, dtype=dtype, with_bias=True, weight_layout=weight_layout)
    check_projection(case, backend)


@pytest.mark.parametrize("tokens", [31, 32, 33, 70, 300])
def test_gradients_of_weight_and_bias_summed_in_several_splits(monkeypatch, tokens):
    from ra_triton.kernels.projection import backward as projection_backward
    from ra_triton.launch import plans

    plans.forget_plans()
    monkeypatch.setattr(projection_backward, "TOKENS_PER_SPLIT", 32)
    check_projection(ProjectionCase(2, tokens, 16, with_bias=True), "triton")


@backends
@pytest.mark.parametrize(("B", "T", "C"), [(0, 5, 8), (2, 0, 8)])
def test_a_projection_of_nothing_has_a_weight_gradient_of_zero(backend, B, T, C):
    case = ProjectionCase(B, T, C, with_bias=True)
    grads, _ = projection_gradients(case, backend, ("contiguous",) * 3)
    for grad, t in zip(grads.values(), case.tensors(), strict=True):
        assert_bitwise(grad, torch.zeros_like(t))


# The layer: its stages, in one call


@backends
@fewest_examples
@example(case=ProjectionCase(2, 33, 20, 1, 2, with_bias=True), causal=True, layout="of_a_sum")
@given(
    case=projection_cases([torch.float32, torch.float16], small_head_dims),
    causal=st.booleans(),
    layout=gradient_layouts,
)
def test_gradients_of_ra_attention_are_those_of_its_stages(backend, case, causal, layout):
    tensors = case.tensors()
    do = normal(case.B, case.T, case.H_kv * case.group, case.D, dtype=case.dtype, seed=50)
    do = GRADIENT_LAYOUTS[layout](do)
    heads = {"weight_layout": case.weight_layout, "backend": backend, **case.heads}
    results = []
    for staged in (True, False):
        x, W, bias = (None if t is None else t.detach().requires_grad_() for t in tensors)
        if staged:
            packed = ra_triton.project(x, W, case.R, bias=bias, **heads)
            out = ra_triton.packed_attention(*packed, causal=causal, backend=backend)
        else:
            out = ra_triton.ra_attention(x, W, case.R, bias=bias, causal=causal, **heads)
            out = out.view(do.shape)
        present = [t for t in (x, W, bias) if t is not None]
        results.append(torch.autograd.grad(out, present, do))
    for staged, whole in zip(*results, strict=True):
        assert_bitwise(whole, staged)


@backend_dtypes
@pytest.mark.parametrize("weight_layout", quick(["packed", "split"]))
def test_errors_of_the_layer_are_within_the_promise_of_eager_pytorch(backend, dtype, weight_layout):
    case = ProjectionCase(2, 70, 48, 1, 2, D=32, dtype=dtype, with_bias=True)
    inputs, heads = case.tensors(), case.heads
    do = normal(2, 70, 64, dtype=dtype, seed=9)

    def ours(x, W, bias):
        return ra_triton.ra_attention(x, W, case.R, bias=bias, backend=backend, **heads)

    def definition(x, W, bias):
        return ref.reciprocal_attention_fused(x, W, case.R, bias=bias, **heads)

    def gradients(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves), leaves, do.to(dtype))

    results = gradients(ours, dtype), gradients(definition, torch.float64)
    results += (gradients(definition, dtype),)
    for name, *grads in zip(("dx", "dW", "dW"), *results, strict=True):
        assert_gradient_promise(name, *grads)


@backends
@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
def test_gradients_are_dense_whatever_the_layout_of_the_operand(backend, layout):
    case = AttentionCase(2, 9, 9, layouts=(layout,) * 3)
    for grad in attention_gradients(backend, case.tensors(), case.gradient()).values():
        assert grad.numel() == grad.untyped_storage().nbytes() // grad.element_size()
