"""Identities that gradients obey, and what must not change a bit of them."""

import math

import pytest
import torch
from budget import MAX_Z, assert_bitwise, attention_budget
from gradient_budget import attention_gradient_budgets, projection_gradient_budgets
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    GRADIENT_LAYOUTS,
    NAN,
    AttentionCase,
    attention_cases,
    backend_dtypes,
    backends,
    fewest_examples,
    gradient_layouts,
    normal,
    quick,
    redzoned,
)

import ra_triton

NAMES = ("dq", "dk", "dv")


def backward(backend, tensors, do, **options):
    """``[dq, dk, dv]``."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    out = ra_triton.packed_attention(*inputs, backend=backend, **options)
    out.backward(do)
    return [t.grad for t in inputs]


def assert_identity(a, b, *variances, what):
    """``a`` and ``b`` differ by no more than the gate's limit on errors of these variances."""
    sigma = sum(variances).sqrt()
    z = ((a - b).abs() / sigma).max()
    assert z <= MAX_Z, f"{what}: off by {z:.3g} standard deviations, the limit is {MAX_Z}"


# Identities without a reference: the bounds are sums of the variances of the gate


def per_key_head(t, H_kv):
    """``[B, T, H, D]`` summed over tokens and the heads of a group: ``[B, H_kv, D]``."""
    return t.unflatten(2, (H_kv, -1)).sum((1, 3))


def identity_terms(backend, case):
    tensors, do = case.tensors(), case.gradient()
    grads = [t.double() for t in backward(backend, tensors, do, **case.options)]
    budgets = attention_gradient_budgets(*tensors, do, **case.options)
    sigmas = [budgets[name].sigma for name in NAMES]
    rows = [budgets[name].sigma.transpose(1, 2).unsqueeze(-1) for name in ("delta", "lse")]
    return [t.double() for t in (*tensors, do)], grads, sigmas, rows


@backends
@fewest_examples
@given(case=attention_cases(spikes=(), values="normal"))
def test_operands_and_gradients_pair_up(backend, case):
    """Per head and lane:  Σ q dq = Σ k dk,  Σ dk = 0,  Σ dv = Σ do,  Σ v dv = Σ o do."""
    (q, k, v, do), (dq, dk, dv), (sq, sk, sv), (delta, lse) = identity_terms(backend, case)
    out = ra_triton.packed_attention(*case.tensors(), backend=backend, **case.options).double()
    of_out = attention_budget(*case.tensors(), **case.options)[0].sigma
    scale = case.scale or 1 / math.sqrt(case.D)
    if case.causal:  # rows without a key send their gradient nowhere
        do[:, : max(case.T_q - case.T_k, 0)] = 0

    def by_query(t):
        return per_key_head(t, case.H_kv)

    # Delta's error reaches both sides through the same Σ p k: once more, as one sum over keys.
    of_queries, of_keys = by_query((q * sq).square()), (k * sk).square().sum(1)
    assert_identity(
        by_query(q * dq), (k * dk).sum(1), 2 * of_queries, of_keys, what=f"Σ q dq, {case}"
    )
    common = by_query((scale * q * delta).square())
    assert_identity(dk.sum(1), 0.0, sk.square().sum(1), common, what=f"Σ dk, {case}")
    common = by_query((do * lse).square())
    assert_identity(dv.sum(1), by_query(do), sv.square().sum(1), common, what=f"Σ dv, {case}")
    common = by_query((do * of_out).square() + (do * out * lse).square())
    of_values = (v * sv).square().sum(1)
    assert_identity((v * dv).sum(1), by_query(out * do), of_values, common, what=f"Σ v dv, {case}")


@backend_dtypes
def test_the_first_query_has_no_gradient(backend, dtype):
    """It sees one key, of weight 1 whatever the score."""
    case = AttentionCase(2, 20, 20, 2, 2, dtype=dtype)
    _, (dq, *_), (sq, *_), _ = identity_terms(backend, case)
    assert_identity(dq[:, 0], 0.0, sq[:, 0].square(), what="dq of row 0")


@backend_dtypes
def test_input_and_weight_pair_with_their_gradients_alike(backend, dtype):
    """Σ_t x dx = Σ_n W dW for each channel."""
    x, W = normal(2, 40, 33, dtype=dtype), normal(33, 96, dtype=dtype, seed=1, scale=33**-0.5)
    dy = normal(2, 40, 96, dtype=dtype, seed=2)
    leaves = x.requires_grad_(), W.requires_grad_()
    packed = ra_triton.project(*leaves, n_head=2, weight_layout="packed", backend=backend)
    packed = torch.cat(packed, 2).flatten(2)
    x, W, dx, dW = (
        t.detach().double() for t in (*leaves, *torch.autograd.grad(packed, leaves, dy))
    )
    budgets = projection_gradient_budgets(*(t.detach() for t in leaves), dy)
    variances = (x * budgets["dx"].sigma).square().sum((0, 1)), (W * budgets["dW"].sigma).square()
    assert_identity(
        (x * dx).sum((0, 1)), (W * dW).sum(1), variances[0], variances[1].sum(1), what=""
    )


# Bit for bit, for our kernels


def drawn(data, **fixed):
    case = data.draw(attention_cases([torch.float32, torch.float16], **fixed))
    tensors, do = case.tensors(), case.gradient()
    return case, tensors, do, backward("triton", tensors, do, **case.options)


def same_tiles(*calls):
    """On a GPU unaligned operands take other tiles than aligned ones, hence other bits."""
    if DEVICE.type == "cpu":
        return True
    from ra_triton.kernels.tiles import is_aligned
    from ra_triton.launch.plans import layout_of

    return len({all(is_aligned(layout_of(t), t.dtype) for t in tensors) for tensors in calls}) == 1


def assert_all_bitwise(actual, expected, what="gradient"):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_bitwise(a, e, f"{what} {name}")


@fewest_examples
@given(data=st.data())
def test_two_runs_give_the_same_bits_whatever_the_layouts(data):
    case, tensors, do, _ = drawn(data)
    do = GRADIENT_LAYOUTS[data.draw(gradient_layouts, label="dO")](do)
    first = backward("triton", tensors, do, **case.options)
    assert_all_bitwise(backward("triton", tensors, do, **case.options), first)
    copies = [t.clone(memory_format=torch.contiguous_format) for t in (*tensors, do)]
    if same_tiles((*tensors, do), copies):
        assert_all_bitwise(backward("triton", copies[:3], copies[3], **case.options), first)


@pytest.mark.parametrize("layout", quick(GRADIENT_LAYOUTS, 4))
def test_a_gradient_in_any_layout_gives_the_bits_of_its_copy(layout):
    case = AttentionCase(2, 20, 20, 2, D=20, dtype=torch.float16)
    do, tensors = case.gradient(layout), case.tensors()
    expected = backward("triton", tensors, do.clone(memory_format=torch.contiguous_format))
    assert_all_bitwise(backward("triton", tensors, do), expected)


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_the_gradient_of_a_sum_equals_that_of_ones(reduce):
    case = AttentionCase(2, 20, 20, 2)
    inputs = [t.requires_grad_() for t in case.tensors()]
    out = ra_triton.packed_attention(*inputs, backend="triton")
    got = torch.autograd.grad(reduce(out), inputs, retain_graph=True)
    value = 1.0 if reduce is torch.sum else 1 / out.numel()
    assert_all_bitwise(got, torch.autograd.grad(out, inputs, torch.full_like(out, value)))


@fewest_examples
@given(data=st.data())
def test_each_batch_element_is_computed_as_if_alone(data):
    case, tensors, do, grads = drawn(data, B=3)
    for b in range(3):
        alone = [t[b : b + 1] for t in (*tensors, do)]
        if not same_tiles((*tensors, do), alone):
            continue
        got = backward("triton", alone[:3], alone[3], **case.options)
        assert_all_bitwise(got, [g[b : b + 1] for g in grads])


@fewest_examples
@given(data=st.data())
def test_later_tokens_do_not_reach_earlier_rows(data):
    case, tensors, do, _ = drawn(data, causal=True, self_attention=True)
    t = data.draw(st.integers(0, case.T_q), label="first changed token")
    do = do.clone()
    do[:, t:] = 0
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed:
        tensor[:, t:] = 7.0
    if not same_tiles((*tensors, do), (*changed, do)):
        return
    results = [backward("triton", ts, do, **case.options) for ts in (tensors, changed)]
    assert_all_bitwise(*([g[:, :t] for g in grads] for grads in results))


@fewest_examples
@given(data=st.data(), power=st.sampled_from([1, -3, 6]))
def test_a_power_of_two_of_the_gradient_scales_the_result(data, power):
    case, tensors, do, grads = drawn(data, values="normal", spikes=(), dtype=torch.float32)
    got = backward("triton", tensors, do * 2.0**power, **case.options)
    assert_all_bitwise(got, [g * 2.0**power for g in grads])


@backends
@pytest.mark.parametrize("value", quick([NAN, math.inf]))
@pytest.mark.parametrize("which", range(4))
def test_a_bad_batch_element_leaves_the_others_alone(backend, value, which):
    case = AttentionCase(3, 17, 17)
    tensors = [*case.tensors(), case.gradient()]
    grads = backward(backend, tensors[:3], tensors[3])
    tensors[which][1] = value
    got = backward(backend, tensors[:3], tensors[3])
    assert_all_bitwise([g[::2] for g in got], [g[::2] for g in grads])
    assert not all(g[1].isfinite().all() for g in got)


@pytest.mark.parametrize("D", [20, 32])
def test_memory_around_the_operands_does_not_matter(D):
    case = AttentionCase(2, 19, 19, D=D)
    tensors = [*case.tensors(), case.gradient()]
    results = []
    for fill in (0.0, NAN, 1e30):
        *inputs, do = (redzoned(t, fill) for t in tensors)
        results.append(backward("triton", inputs, do))
    assert_all_bitwise(results[1], results[0])
    assert_all_bitwise(results[2], results[0])


def test_grouped_heads_have_the_query_gradient_of_repeated_heads():
    case = AttentionCase(2, 35, 35, 2, 3)
    q, k, v = case.tensors()
    grads = backward("triton", (q, k, v), case.gradient())
    repeated = (t.repeat_interleave(3, dim=2) for t in (k, v))
    assert_bitwise(backward("triton", (q, *repeated), case.gradient())[0], grads[0])


@backends
@fewest_examples
@given(data=st.data())
def test_inputs_are_never_written(backend, data):
    case = data.draw(attention_cases())
    layout = data.draw(gradient_layouts)
    tensors = [*case.tensors(), case.gradient(layout)]
    before = [(t._version, t.clone()) for t in tensors]
    backward(backend, tensors[:3], tensors[3], **case.options)
    for t, (version, copy) in zip(tensors, before, strict=True):
        assert t._version == version
        assert_bitwise(t, copy)
