"""window_size and softcap in the kernels: values, every gradient, what is skipped, compilers."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from budget import assert_agree, assert_attention_close, assert_bitwise, attention_sigma
from gradient_budget import attention_gradient_budgets, check_gradients
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    NAN,
    AttentionCase,
    attention_cases,
    dtypes_for,
    few_examples,
    fewest_examples,
    gradient_layouts,
    lengths,
    normal,
    quick,
    small_head_dims,
)
from test_compile import assert_compiles, check_operator, leaf
from test_dropout import check_case as check_dropout

import ra_triton
from ra_triton.call.options import AttentionOptions
from ra_triton.launch.configs import LaunchConfig

ROOT = Path(__file__).parents[2]
FAR = 64 if DEVICE.type == "cpu" else 256  # farther than any tile reaches past a window
SIDES = (-1, 0, 1, 3, 15, 16, 17, 31, 40, 1000)
windows = st.tuples(st.sampled_from(SIDES), st.sampled_from(SIDES))
softcaps = st.sampled_from([0.0, 2.0, 0.0, 30.0, 0.1])


@st.composite
def cases(draw, **fixed) -> AttentionCase:
    """Small recipes with a window, a softcap, or both."""
    fixed = {"D": draw(small_head_dims), "T_q": draw(lengths()), **fixed}
    case = draw(attention_cases(dtypes_for("triton"), **fixed))
    return replace(case, window=draw(windows), softcap=draw(softcaps))


def attend(case: AttentionCase, *tensors, **options):
    return ra_triton.packed_attention(*tensors, backend="triton", **case.options, **options)


def check(case: AttentionCase, layout: str = "contiguous") -> None:
    """Output, logsumexp and all gradients, of both, against the definition."""
    tensors, do = case.tensors(), case.gradient(layout)
    leaves = [leaf(t) for t in tensors]
    out, lse = attend(case, *leaves, return_lse=True)
    assert_attention_close(out.detach(), *tensors, lse=lse.detach(), **case.options)
    dlse = normal(*lse.shape, seed=9) * lse.isfinite()
    grads = torch.autograd.grad((out, lse), leaves, (do, dlse))
    budgets = attention_gradient_budgets(*tensors, do, dlse, **case.options)
    grads = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    check_gradients(grads, budgets, dtype=case.dtype, case=f"{case}, dO {layout}")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(100, 3), (-1, 40), (33, -1), (-1, -1)])
@pytest.mark.parametrize("D", [16, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_config_passes_the_gate_on_a_gpu(dtype, D, window):
    for T_q, T_k, softcap in ((300, 300, 0.0), (130, 400, 3.0), (400, 130, 0.0)):
        sizes = {"T_q": T_q, "T_k": T_k, "H_kv": 2, "group": 2, "D": D, "dtype": dtype}
        case = AttentionCase(B=2, causal=False, window=window, softcap=softcap, **sizes)
        for layout in ("contiguous", "offset"):
            check(replace(case, layouts=(layout,) * 3))


@given(case=cases())
def test_attention_matches_the_definition(case):
    tensors = case.tensors()
    out, lse = attend(case, *tensors, return_lse=True)
    assert_attention_close(out, *tensors, lse=lse, **case.options)


@few_examples
@example(case=AttentionCase(1, 70, 33, 1, 2, causal=False, window=(17, 3)), layout="of_a_sum")
@given(case=cases(spikes=()), layout=gradient_layouts)
def test_gradients_match_the_definition(case, layout):
    check(case, layout)


@pytest.mark.parametrize("window", [(0, 0), (1, 0), (15, -1), (16, 16), (31, 1), (32, 47), (-1, 9)])
@pytest.mark.parametrize(("T_q", "T_k"), [(65, 65), (20, 66), (66, 20)])
def test_windows_around_tile_boundaries(window, T_q, T_k):
    check(AttentionCase(T_q=T_q, T_k=T_k, window=window, causal=False))


@pytest.mark.parametrize("left", range(0, 36, 5))
def test_causal_windows_at_every_offset_modulo_a_tile(left):
    for T_k in range(3, 37, 11):
        check(AttentionCase(T_q=19, T_k=T_k, window=(left, 7)))


@pytest.mark.parametrize("values", ["zeros", "small", "large", "huge"])
@pytest.mark.parametrize("softcap", [1e-3, 0.7, 50.0, 1e6])
def test_scores_far_below_and_far_above_the_cap(values, softcap):
    check(AttentionCase(T_q=35, T_k=35, values=values, softcap=softcap))


@pytest.mark.parametrize("softcap", [1.0, 1024.0])
def test_every_score_is_capped_to_its_last_places(softcap):
    """One key: the logsumexp is the score."""
    x = torch.cat((torch.linspace(-2, 2, 401), torch.tensor([0.0, 1e-6, 1e-3, 9.0, 20.0, -1e30])))
    q, k, v = torch.zeros(1, len(x), 1, 16), torch.zeros(1, 1, 1, 16), torch.ones(1, 1, 1, 16)
    q[0, :, 0, 0], k[..., 0] = softcap * x, 1.0
    q, k, v = (t.to(DEVICE) for t in (q, k, v))
    options = {"softmax_scale": 1.0, "softcap": softcap, "causal": False}
    out, lse = ra_triton.packed_attention(q, k, v, return_lse=True, backend="triton", **options)
    assert_attention_close(out, q, k, v, lse=lse, **options)


def test_a_score_that_is_no_number_stays_none():
    q, k, v = (normal(1, 5, 1, 16, seed=seed) for seed in range(3))
    k[0, 3] = NAN
    out = ra_triton.packed_attention(q, k, v, softcap=2.0, backend="triton")
    assert out[0, 3:].isnan().all()
    assert out[0, :3].isfinite().all()


@pytest.mark.parametrize("window", [(-1, -1), (3, 0), (9, 4)])
@pytest.mark.parametrize("causal", quick([True, False]))
def test_dropout_in_a_window_under_a_cap(window, causal):
    case = AttentionCase(2, 21, 37, 1, 2, window=window, softcap=2.0, causal=causal)
    check_dropout("triton", case, 0.3)


def test_an_infinite_score_reaches_the_cap():
    q, k, v = AttentionCase(T_q=5, T_k=5).tensors()
    k[:, 2, :, 0] = float("inf")
    q[..., 0] = 1.0
    out, lse = ra_triton.packed_attention(
        q, k, v, softcap=2.0, causal=False, return_lse=True, backend="triton"
    )
    k[:, 2, :, 0] = 1e6  # far above the cap as well
    assert_attention_close(out, q, k, v, lse=lse, softcap=2.0, causal=False)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize(("T_q", "T_k"), [(40, 7), (70, 3), (5, 0)])
def test_rows_whose_window_is_empty_give_zero_and_minus_infinity(T_q, T_k):
    case = AttentionCase(2, T_q, T_k, window=(4, 2), causal=False, softcap=3.0)
    leaves = [leaf(t) for t in case.tensors()]
    out, lse = attend(case, *leaves, return_lse=True)
    blind = T_q - T_k - 2
    assert_bitwise(out[:, :blind], torch.zeros_like(out[:, :blind]))
    assert lse[..., :blind].isneginf().all()
    (dq,) = torch.autograd.grad(out, leaves[:1], case.gradient())
    assert_bitwise(dq[:, :blind], torch.zeros_like(dq[:, :blind]))


# Skipped, not masked: 0 times NaN would be NaN


@pytest.mark.parametrize("causal", quick([True, False]))
def test_tiles_outside_the_window_are_not_visited(causal):
    """NaN far from a query reaches neither its row nor the gradients of its keys."""
    T, window = 5 * FAR // 2, (20, 9)
    case = AttentionCase(1, T, T, 1, 2, window=window, causal=causal)
    tensors, do = case.tensors(), case.gradient()

    def run(*tensors):
        leaves = [leaf(t) for t in tensors]
        out = attend(case, *leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, do)

    clean = run(*tensors)
    for name, bad in (("early", slice(0, 5)), ("late", slice(T - 5, T))):
        spoilt = [t.clone() for t in tensors]
        for t in spoilt:
            t[:, bad] = NAN
        got = run(*spoilt)
        assert got[0][:, bad].isnan().all()
        for i, expected in enumerate(clean):
            far = FAR if i == 0 else 7 * FAR // 4  # a gradient is two windows away from NaN
            near = slice(5 + far, None) if name == "early" else slice(None, T - 5 - far)
            assert_bitwise(got[i][:, near], expected[:, near], f"{name} tokens, result {i}")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="Hopper alone has bulk copies")
@pytest.mark.parametrize("window", [(20, 9), (3, 0), (-1, 17), (30, -1)])
@pytest.mark.parametrize(("T_q", "T_k"), [(70, 70), (37, 66)])
def test_windows_through_bulk_copies(window, T_q, T_k):
    """The one loop over all tiles that Hopper runs; the interpreter has descriptors too."""
    from ra_triton.kernels.attention.backward import attention_backward
    from ra_triton.kernels.attention.forward import attention_forward

    case = AttentionCase(1, T_q, T_k, 1, 2, causal=False, window=window)
    tensors, do = case.tensors(), case.gradient()
    config = LaunchConfig(16, 4, block_n=16, use_tma=True)
    options = {**case.options, "config": config}
    out, lse = attention_forward(*tensors, **options)
    assert_attention_close(out, *tensors, lse=lse, **case.options)
    grads = {f"d{n}": torch.empty_like(t) for n, t in zip("qkv", tensors, strict=True)}
    attention_backward(*tensors, out, lse, do, *grads.values(), **options)
    budgets = attention_gradient_budgets(*tensors, do, **case.options)
    check_gradients(grads, budgets, dtype=case.dtype, case=case)


# The same numbers another way


def test_a_window_that_reaches_everything_changes_nothing():
    case = AttentionCase(2, 40, 50, 1, 2, causal=False)
    out = attend(case, *case.tensors())
    wide = attend(replace(case, window=(10**12, 10**12)), *case.tensors())
    sigma = attention_sigma(*case.tensors(), **case.options)
    assert_agree(wide, out, sigma, sigma)


@few_examples
@given(case=cases(self_attention=True, causal=True), data=st.data())
def test_a_prefix_of_the_tokens_gives_a_prefix_of_the_result(case, data):
    T = data.draw(st.integers(1, case.T_q), label="prefix")
    tensors = case.tensors()
    prefix = attend(case, *(t[:, :T] for t in tensors))
    assert_bitwise(prefix, attend(case, *tensors)[:, :T])


@fewest_examples
@given(case=cases(self_attention=True, causal=True, layouts=("contiguous",) * 3))
def test_the_last_query_alone_gives_the_last_row(case):
    q, k, v = case.tensors()
    sigma = attention_sigma(q[:, -1:], k, v, **case.options)
    assert_agree(attend(case, q[:, -1:], k, v), attend(case, q, k, v)[:, -1:], sigma, sigma)


def test_ra_attention_passes_window_and_softcap_on():
    x, W = normal(2, 40, 24), normal(24, 4 * 16, seed=1)
    options = {"window_size": (7, 0), "softcap": 1.5, "backend": "triton"}
    heads = {"n_head": 2, "n_kv_head": 1}
    results = []
    for staged in (True, False):
        leaves = leaf(x), leaf(W)
        if staged:
            packed = ra_triton.project(*leaves, 3, backend="triton", **heads)
            out = ra_triton.packed_attention(*packed, **options).flatten(2)
        else:
            out = ra_triton.ra_attention(*leaves, 3, **heads, **options)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for staged, whole in zip(*results, strict=True):
        assert_bitwise(whole, staged)


# Compilers


@pytest.mark.slow
def test_opcheck_with_a_window_and_a_softcap():
    q, k, v = (leaf(normal(2, 7, 3, 16, seed=seed)) for seed in range(3))
    options = AttentionOptions(False, window_size=(3, 1), softcap=2.0)
    check_operator("attention", q, k, v, options=options)
    x, W = leaf(normal(2, 7, 24)), leaf(normal(24, 3 * 2 * 16))
    options = AttentionOptions(window_size=(3, 0), softcap=2.0)
    check_operator("layer", x, W, heads=(2, 2), options=options)


@pytest.mark.slow
def test_window_and_softcap_compile():
    options = {"window_size": (5, 2), "softcap": 2.0, "backend": "triton"}

    def layer(x, W):
        return ra_triton.ra_attention(x, W, 3, n_head=2, **options)

    W = normal(24, 3 * 2 * 16, scale=0.2)
    assert_compiles(layer, lambda T: (normal(2, T, 24, seed=T), W))


def test_torch_func_grad_with_a_window_and_a_softcap():
    def loss(q, k, v):
        options = {"window_size": (3, 1), "softcap": 2.0, "causal": False, "backend": "triton"}
        return ra_triton.packed_attention(q, k, v, **options).square().sum()

    inputs = [normal(2, 9, 2, 16, seed=seed) for seed in range(3)]
    actual = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs)
    leaves = [leaf(t) for t in inputs]
    for a, e in zip(actual, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert_bitwise(a, e)


GENERIC = """
from ra_triton.kernels.attention import backward
from ra_triton.kernels.attention import forward
for kernel in (forward._attention_forward_kernel, backward._key_value_gradient_kernel,
               backward._query_gradient_kernel):
    print(*(p.do_not_specialize for p in kernel.params if p.name in ("left", "right")))
"""


def test_a_new_window_never_recompiles():
    """The sides are runtime numbers of which the compiler does not look at the values."""
    from ra_triton.kernels.attention.arguments import mask_of

    flags = [mask_of(64, 64, False, w) for w in ((3, 0), (1, 16), (0, 0), (-1, 5), (100, -1))]
    assert {(f.CAUSAL, f.WINDOW) for f in flags} == {(False, True)}
    assert mask_of(64, 64, True, (3, 5)) == mask_of(64, 64, True, (3, 0))
    assert mask_of(64, 64, True, (-1, 5)) == mask_of(64, 64, True, (-1, -1))
    assert not mask_of(64, 64, False, (-1, -1)).WINDOW
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", GENERIC],
        env={**env, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True"] * 6
