"""Backends: which one runs, gradients on SDPA, autocast."""

import warnings

import pytest
import torch
from budget import assert_bitwise
from strategies import DEVICE, AttentionCase, backends, normal

import ra_triton
from ra_triton import backend as registry
from ref import reciprocal_attention as ref

H, D, C, R = 2, 16, 12, 4


def calls(monkeypatch):
    """Record which backend module runs."""
    ran = []
    for name, module in registry.BACKENDS.items():
        for function in ("project", "packed_attention"):
            original = getattr(module, function)

            def record(*args, _original=original, _name=name):
                ran.append(_name)
                return _original(*args)

            monkeypatch.setattr(module, function, record)
    return ran


def test_auto_runs_what_which_backend_says(monkeypatch):
    q, k, v = AttentionCase(T_q=5, T_k=5).tensors()
    ran = calls(monkeypatch)
    ra_triton.packed_attention(q, k, v)
    said = ra_triton.which_backend(q, k, v)
    assert ran == [said.split(":")[0]]
    if DEVICE.type == "cpu":
        assert said == "sdpa: cpu tensors"
    else:
        assert said.startswith("triton: ")


@backends
def test_an_explicit_backend_runs_alone(monkeypatch, backend):
    ran = calls(monkeypatch)
    ra_triton.ra_attention(normal(1, 5, C), normal(C, 3 * D), n_head=1, backend=backend)
    assert ran == [backend, backend]


def test_which_backend_gives_its_reason_and_takes_all_options():
    q, k, v = AttentionCase(T_q=5, T_k=5).tensors()
    said = ra_triton.which_backend(
        q, k, v, causal=False, softmax_scale=0.5, window_size=(2, 2), return_lse=True
    )
    name, _, reason = said.partition(": ")
    assert name == "sdpa"
    assert reason == (
        "cpu tensors" if DEVICE.type == "cpu" else "the kernels have no window_size yet"
    )


def test_which_backend_raises_what_the_call_would():
    q, k, v = AttentionCase(T_q=5, T_k=5).tensors()
    with pytest.raises(NotImplementedError, match=r"no backend can run this.*softcap"):
        ra_triton.which_backend(q, k, v, softcap=1.0)


def test_no_grad_and_detached_weights_run_on_triton():
    x, W = normal(1, 5, C), normal(C, 3 * D).requires_grad_()
    with torch.no_grad():
        out = ra_triton.ra_attention(x, W, n_head=1, backend="triton")
    assert not out.requires_grad
    again = ra_triton.ra_attention(x, W.detach(), n_head=1, backend="triton")
    assert_bitwise(again, out)


@pytest.mark.gpu
def test_auto_on_a_gpu_warns_once_when_it_cannot_use_triton():
    q, k, v = AttentionCase(T_q=5, T_k=5).tensors()
    registry._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            ra_triton.packed_attention(q, k, v, dropout_p=0.1)
    assert ["dropout_p" in str(warning.message) for warning in caught] == [True]


# Gradients on SDPA, against the FP64 definition


def gradients(function, inputs, grad):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*inputs), inputs, grad.to(inputs[0].dtype))


def assert_gradients_close(actual, exact, magnitudes):
    """Each within its float32 roundings: a gradient is a sum of products of this magnitude."""
    for i, (a, e, m) in enumerate(zip(actual, exact, magnitudes, strict=True)):
        assert a.shape == e.shape
        assert a.isfinite().all()
        error = (a.double() - e).abs()
        assert (error <= 64 * 2.0**-23 * m).all(), f"input {i}: {(error / m).max()}"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T_q", "T_k"), [(9, 9), (4, 9), (9, 4), (9, 0), (0, 9)])
@pytest.mark.parametrize("group", [1, 3])
def test_sdpa_gradients_of_packed_attention_are_those_of_the_definition(causal, T_q, T_k, group):
    inputs = AttentionCase(B=2, T_q=T_q, T_k=T_k, H_kv=2, group=group).tensors()
    grad = normal(*inputs[0].shape, seed=7)
    actual = gradients(
        lambda q, k, v: ra_triton.packed_attention(q, k, v, causal=causal, backend="sdpa"),
        inputs,
        grad,
    )
    doubles = [t.double() for t in inputs]
    exact = gradients(
        lambda q, k, v: ref.packed_attention(q, k, v, causal=causal)[0], doubles, grad
    )
    size = max((e.abs().max().item() for e in exact if e.numel()), default=0.0)
    assert_gradients_close(actual, exact, [torch.full_like(e, max(size, 1.0)) for e in exact])


@pytest.mark.parametrize("weight_layout", ["split", "packed"])
@pytest.mark.parametrize("n_kv_head", [2, 1])
def test_sdpa_gradients_of_ra_attention_are_those_of_the_definition(weight_layout, n_kv_head):
    heads = {"n_head": H, "n_kv_head": n_kv_head}
    N = (H + 2 * n_kv_head) * D
    inputs = normal(2, 9, C), normal(C, N, seed=1, scale=C**-0.5), normal(N, seed=2)
    grad = normal(2, 9, H * D, seed=3)

    def ours(x, W, bias):
        if weight_layout == "packed":
            W, bias = (ra_triton.pack_weight(t, R, **heads) for t in (W, bias))
        return ra_triton.ra_attention(
            x, W, R, bias=bias, weight_layout=weight_layout, backend="sdpa", **heads
        )

    def definition(x, W, bias):
        return ref.reciprocal_attention_fused(x, W, R, bias=bias, **heads)

    actual = gradients(ours, inputs, grad)
    exact = gradients(definition, [t.double() for t in inputs], grad)
    assert_gradients_close(actual, exact, [e.abs().max().expand_as(e) for e in exact])


def test_auto_trains():
    x, W = normal(1, 5, C), normal(C, 3 * D).requires_grad_()
    ra_triton.ra_attention(x, W, n_head=1).sum().backward()
    assert W.grad.isfinite().all()
    assert (W.grad != 0).any()


def test_gradients_reach_lse_on_sdpa():
    q, k, v = (t.requires_grad_() for t in AttentionCase(T_q=9, T_k=9).tensors())
    _, lse = ra_triton.packed_attention(q, k, v, return_lse=True, backend="sdpa")
    dq, dk = torch.autograd.grad(lse.sum(), (q, k))
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = torch.autograd.grad(ref.packed_attention(*doubles)[1].sum(), doubles[:2])
    assert_gradients_close((dq, dk), exact, [e.abs().max().expand_as(e) for e in exact])


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype):
    x, W, bias = normal(2, 9, C), normal(C, 3 * H * D, seed=1), normal(3 * H * D, seed=2)
    options = {"n_head": H, "backend": "sdpa"}
    explicit = ra_triton.ra_attention(x.to(dtype), W.to(dtype), bias=bias.to(dtype), **options)
    with torch.autocast(DEVICE.type, dtype):
        out = ra_triton.ra_attention(x, W, bias=bias, **options)
        mixed = ra_triton.ra_attention(x.to(dtype), W, bias=bias, **options)
        packed = ra_triton.project(x, W, bias=bias, **options)
        attended = ra_triton.packed_attention(*(t.float() for t in packed), backend="sdpa")
    assert out.dtype == dtype
    for other in (mixed, explicit, attended.flatten(2)):
        assert_bitwise(other, out)


def test_autocast_fp16_runs_on_triton():
    x, W = normal(2, 9, C), normal(C, 3 * H * D, seed=1)
    options = {"n_head": H, "backend": "triton"}
    with torch.autocast(DEVICE.type, torch.float16):
        out = ra_triton.ra_attention(x, W, **options)
    assert_bitwise(out, ra_triton.ra_attention(x.half(), W.half(), **options))


def test_autocast_sends_gradients_back_in_the_dtype_of_the_parameter():
    x, W = normal(2, 9, C), normal(C, 3 * H * D, seed=1).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = ra_triton.ra_attention(x, W, n_head=H, backend="sdpa")
    out.float().sum().backward()
    assert W.grad.dtype == torch.float32
    assert W.grad.isfinite().all()


def test_autocast_leaves_integer_and_missing_arguments_to_the_checks():
    with torch.autocast(DEVICE.type, torch.bfloat16):
        with pytest.raises(TypeError, match="x must be"):
            ra_triton.ra_attention(torch.ones(1, 2, C, dtype=torch.int64), normal(C, 48))
        with pytest.raises(TypeError, match="x must be a tensor"):
            ra_triton.ra_attention(None, normal(C, 48))


def test_disabled_autocast_changes_nothing():
    q, k, v = AttentionCase(T_q=9, T_k=9).tensors()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=False):
        out = ra_triton.packed_attention(q, k, v)
    assert_bitwise(out, ra_triton.packed_attention(q, k, v))
