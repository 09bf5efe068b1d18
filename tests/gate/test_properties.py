"""Properties of attention: identities of the mathematics, bitwise where theory says bitwise."""

import math

import pytest
import torch
from budget import (
    assert_agree,
    assert_attention_close,
    assert_bitwise,
    attention_budget,
    attention_sigma,
)
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    AttentionCase,
    attention_cases,
    backend_dtypes,
    dtypes_for,
    few_examples,
    forward_backends,
    normal,
)

import ra_triton

# PyTorch's own matrix products have other last bits for operands at other alignments, so a test
# that compares bits keeps the layouts of both sides alike.
ALIKE = ("contiguous",) * 3


def attend(backend, q, k, v, **options):
    return ra_triton.packed_attention(q, k, v, backend=backend, **options)


def drawn(data, backend, **fixed):
    """A drawn case, its tensors and its output."""
    case = data.draw(attention_cases(dtypes_for(backend), **fixed))
    tensors = case.tensors()
    return case, *tensors, attend(backend, *tensors, **case.options)


def cut_low(t, R):
    return t[..., : t.shape[-1] - R]


def zero_low(t, R):
    return torch.cat((cut_low(t, R), torch.zeros_like(t[..., t.shape[-1] - R :])), -1)


# Lanes


@forward_backends
@few_examples
@given(data=st.data())
def test_zero_low_lanes_are_plain_attention_on_the_others_at_the_packed_scale(backend, data):
    case = data.draw(attention_cases(dtypes_for(backend)))
    q, k, v = case.tensors()
    out = attend(backend, zero_low(q, case.R), zero_low(k, case.R), v, **case.options)
    scale = case.scale or 1 / math.sqrt(case.D)
    assert_attention_close(
        out, cut_low(q, case.R), cut_low(k, case.R), v, causal=case.causal, softmax_scale=scale
    )


@forward_backends
@few_examples
@given(data=st.data())
def test_low_lanes_meet_low_lanes_only(backend, data):
    """Zeroing K_low, Q_low or both removes the same term: no lane meets any lane but its own."""
    case = data.draw(attention_cases(dtypes_for(backend), spikes=(), layouts=ALIKE))
    q, k, v = case.tensors()
    neither = attend(backend, zero_low(q, case.R), zero_low(k, case.R), v, **case.options)
    for pair in ((zero_low(q, case.R), k), (q, zero_low(k, case.R))):
        assert_bitwise(attend(backend, *pair, v, **case.options), neither)


@forward_backends
@pytest.mark.parametrize("R", [0, 4, 16])
def test_rank_zero_and_full_rank_are_plain_attention_of_what_is_there(backend, R):
    x, W = normal(2, 20, 12), normal(12, 3 * 2 * 16, seed=1)
    options = {"n_head": 2, "backend": backend}
    out = ra_triton.ra_attention(x, W, R, **options).unflatten(-1, (2, 16))
    q, k, v = ra_triton.project(x, W, R, **options)
    assert_attention_close(out, q, k, v)
    if R == 0:
        packed = (ra_triton.pack_weight(W, 0, n_head=2), W)
        assert_bitwise(*packed, "columns of R = 0 in both orders")


@forward_backends
@few_examples
@given(data=st.data())
def test_permuting_the_lanes_of_both_operands_changes_nothing(backend, data):
    case, q, k, v, out = drawn(data, backend)
    order = torch.randperm(case.D, generator=torch.Generator().manual_seed(case.seed)).to(DEVICE)
    permuted = attend(backend, q[..., order], k[..., order], v, **case.options)
    sigma = attention_sigma(q, k, v, **case.options)
    assert_agree(permuted, out, sigma, sigma)


@forward_backends
@few_examples
@given(data=st.data())
def test_a_rotation_of_both_operands_changes_nothing(backend, data):
    """Exact in the operands' dtype: H/2 for a Hadamard H of order 4, over small integers."""
    case = data.draw(attention_cases(dtypes_for(backend), spikes=(), values="normal", D=32))
    q, k, v = case.tensors()
    q, k = ((t * 4).round() for t in (q, k))
    hadamard = 0.5 * torch.tensor(
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], device=DEVICE
    )
    rotation = torch.block_diag(*[hadamard] * (case.D // 4)).to(q.dtype)
    out, rotated = (
        attend(backend, *pair, v, **case.options) for pair in ((q, k), (q @ rotation, k @ rotation))
    )
    sigma = attention_sigma(q, k, v, **case.options)
    assert_agree(rotated, out, sigma, sigma)


@forward_backends
@few_examples
@given(data=st.data())
def test_swapping_query_and_key_roles_transposes_the_scores(backend, data):
    """exp(lse) of one key is exp(score): lse with T_k = 1 reads single scores, both ways."""
    case = data.draw(attention_cases(self_attention=True, group=1, spikes=(), T_q=4, T_k=4, B=1))
    q, k, v = case.tensors()
    options = {"causal": False, "softmax_scale": case.scale, "return_lse": True}

    def score(a, b, i, j):
        row, key, value = (t[:, n : n + 1].clone() for t, n in ((a, i), (b, j), (v, j)))
        return attend(backend, row, key, value, **options)[1][..., 0]

    for i, j in ((0, 3), (2, 1)):
        assert_bitwise(score(q, k, i, j), score(k, q, j, i))


# Scaling and linearity


@forward_backends
@few_examples
@given(data=st.data(), power=st.sampled_from([1, -1, 3, -4]))
def test_powers_of_two_move_between_the_operands_bitwise(backend, data, power):
    case, q, k, v, out = drawn(
        data, backend, values="normal", spikes=(), dtype=torch.float32, layouts=ALIKE
    )
    for lanes in (slice(None), slice(0, case.D - case.R), slice(case.D - case.R, None)):
        factor = torch.ones(case.D, device=DEVICE)
        factor[lanes] = 2.0**power
        assert_bitwise(attend(backend, q * factor, k / factor, v, **case.options), out)


@forward_backends
@few_examples
@given(data=st.data(), power=st.sampled_from([1, -1, 3, -4]))
def test_a_power_of_two_of_v_scales_the_output_bitwise(backend, data, power):
    case, q, k, v, out = drawn(
        data, backend, values="normal", spikes=(), dtype=torch.float32, layouts=ALIKE
    )
    assert_bitwise(attend(backend, q, k, v * 2.0**power, **case.options), out * 2.0**power)


@forward_backends
@pytest.mark.parametrize("power", [1, -1, 4])
def test_a_power_of_two_moves_between_x_and_the_weight_bitwise(backend, power):
    x, W, scale = normal(2, 20, 12), normal(12, 48, seed=1), 2.0**power
    options = {"n_head": 1, "backend": backend}
    assert_bitwise(
        ra_triton.ra_attention(x * scale, W / scale, **options),
        ra_triton.ra_attention(x, W, **options),
    )


@forward_backends
@few_examples
@given(data=st.data())
def test_the_output_is_linear_in_v(backend, data):
    """v of small integers, so that sums of v and of w are exact."""
    case = data.draw(attention_cases(dtypes_for(backend), spikes=()))
    q, k, v = case.tensors()
    v = (v * 4).round()
    w = (normal(*v.shape, seed=99) * 4).round().to(v.dtype)
    total, *parts = (attend(backend, q, k, t, **case.options) for t in (v + w, v, w))
    sigmas = [attention_sigma(q, k, t, **case.options) for t in (v + w, v, w)]
    assert_agree(total.double(), parts[0].double() + parts[1].double(), *sigmas)


@forward_backends
@few_examples
@given(data=st.data(), shift=st.sampled_from([1.0, -4.0]))
def test_adding_a_constant_to_v_adds_it_to_the_output(backend, data, shift):
    case = data.draw(attention_cases(dtypes_for(backend), spikes=(), self_attention=True))
    q, k, v = case.tensors()
    v = (v * 4).round()  # so that v + shift is exact
    out, shifted = (attend(backend, q, k, t, **case.options) for t in (v, v + shift))
    sigmas = [attention_sigma(q, k, t, **case.options) for t in (v, v + shift)]
    assert_agree(shifted.double(), out.double() + shift, *sigmas)


@forward_backends
@few_examples
@given(data=st.data())
def test_one_vector_added_to_every_key_changes_nothing(backend, data):
    case = data.draw(attention_cases(dtypes_for(backend), spikes=(), values="normal"))
    q, k, v = case.tensors()
    k = (k * 4).round()
    moved = k + torch.arange(case.D, device=DEVICE).remainder(3).to(k.dtype)
    out, again = (attend(backend, q, keys, v, **case.options) for keys in (k, moved))
    assert_agree(again, out, *(attention_sigma(q, t, v, **case.options) for t in (k, moved)))


# Weights of the softmax


@forward_backends
@few_examples
@given(data=st.data())
def test_the_first_token_returns_its_own_value(backend, data):
    case, _, _, v, out = drawn(data, backend, self_attention=True, causal=True)
    value = v[:, 0].repeat_interleave(case.group, dim=1)
    if DEVICE.type == "cpu":
        assert_bitwise(out[:, 0], value)
    else:  # fused multiply-add leaves a weight that is 1 to a rounding, divided by itself
        slack = 2 * torch.finfo(case.dtype).eps * value.double().abs()
        assert ((out[:, 0].double() - value.double()).abs() <= slack).all()


@forward_backends
@few_examples
@example(case=AttentionCase(T_q=65, T_k=65, dtype=torch.float16, values="small"))
@given(case=attention_cases([torch.float32, torch.float16], self_attention=True, causal=True))
def test_outputs_stay_between_the_smallest_and_largest_value_seen(backend, case):
    q, k, v = case.tensors()
    out = attend(backend, q, k, v, **case.options).double()
    v = v.repeat_interleave(case.group, dim=2).double()
    lowest, highest = v.cummin(1).values, v.cummax(1).values
    # Weights sum to 1 within a unit of the dtype they are stored in.
    slack = 2 * torch.finfo(case.dtype).eps * v.abs().cummax(1).values
    assert (out >= lowest - slack).all()
    assert (out <= highest + slack).all()


@forward_backends
@few_examples
@given(data=st.data(), copies=st.sampled_from([2, 3]))
def test_copies_of_all_keys_share_their_weight(backend, data, copies):
    case = data.draw(attention_cases(dtypes_for(backend), causal=False))
    q, k, v = case.tensors()
    out, lse = attend(backend, q, k, v, return_lse=True, **case.options)
    k_copies, v_copies = (torch.cat([t] * copies, dim=1) for t in (k, v))
    again, lse_again = attend(backend, q, k_copies, v_copies, return_lse=True, **case.options)
    sigma = attention_sigma(q, k, v, **case.options)
    assert_agree(again, out, sigma, sigma)
    assert_attention_close(again, q, k_copies, v_copies, lse=lse_again, **case.options)
    assert (lse_again > lse).all()


@forward_backends
@pytest.mark.parametrize("T", [1, 16, 64])
def test_equal_scores_average_the_values_and_count_in_lse(backend, T):
    q, k, v = torch.zeros(3, 1, T, 1, 16, device=DEVICE)
    v = v + torch.arange(T, device=DEVICE)[None, :, None, None]
    out, lse = attend(backend, q, k, v, causal=False, return_lse=True)
    assert_attention_close(out, q, k, v, lse=lse, causal=False)
    assert_bitwise(out, torch.full_like(out, (T - 1) / 2))  # T is a power of two: exact


@forward_backends
@few_examples
@given(data=st.data())
def test_lse_does_not_depend_on_v(backend, data):
    case = data.draw(attention_cases(dtypes_for(backend)))
    q, k, v = case.tensors()
    _, lse = attend(backend, q, k, v, return_lse=True, **case.options)
    _, other = attend(backend, q, k, v.flip(1), return_lse=True, **case.options)
    assert_bitwise(other, lse)


@forward_backends
@few_examples
@given(data=st.data())
def test_splitting_the_keys_and_merging_by_lse_is_the_whole(backend, data):
    case, q, k, v, out = drawn(data, backend, causal=False, T_k=37)
    parts = [
        attend(backend, q, k[:, part], v[:, part], return_lse=True, **case.options)
        for part in (slice(0, 20), slice(20, None))
    ]
    lses = torch.stack([lse.double() for _, lse in parts])
    weights = lses.softmax(0).transpose(2, 3).unsqueeze(-1)  # [2, B, T, H, 1]
    merged = sum(w * o.double() for w, (o, _) in zip(weights, parts, strict=True))
    sigmas = [attention_sigma(q, k, v, **case.options)]
    for w, part in zip(weights, (slice(0, 20), slice(20, None)), strict=True):
        own, lse = attention_budget(q, k[:, part], v[:, part], **case.options)
        moved = lse.sigma.transpose(1, 2).unsqueeze(-1) * (parts[0][0] - parts[1][0]).double()
        sigmas += [w * own.sigma, w * (1 - w) * moved]  # an error of lse shifts weight
    assert_agree(merged, out.double(), *sigmas)


@backend_dtypes
def test_grouped_heads_equal_repeated_heads_bitwise(backend, dtype):
    case = AttentionCase(B=2, T_q=35, T_k=35, H_kv=2, group=3, dtype=dtype)
    q, k, v = case.tensors()
    repeated = (t.repeat_interleave(3, dim=2) for t in (k, v))
    assert_bitwise(attend(backend, q, *repeated), attend(backend, q, k, v))
