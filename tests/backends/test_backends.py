"""Backends: which one runs, that it trains, autocast."""

import ast
import warnings
from pathlib import Path

import pytest
import torch
from budget import assert_attention_close, assert_bitwise
from gradient_budget import attention_gradient_budgets, check_gradients
from strategies import DEVICE, AttentionCase, backends, forward_backends, normal

import ra_triton
from ra_triton import backend as registry
from ra_triton import internals

H, D, C = 2, 16, 12


def calls(monkeypatch):
    """Record which function of which backend module runs."""
    ran = []
    for name, module in registry.BACKENDS.items():
        for function in ("project", "packed_attention", "layer"):
            original = getattr(module, function)

            def record(*args, _original=original, _name=f"{name}.{function}"):
                ran.append(_name)
                return _original(*args)

            monkeypatch.setattr(module, function, record)
    return ran


def test_auto_runs_what_which_backend_says(monkeypatch):
    q, k, v = AttentionCase(T_q=5, T_k=5).tensors()
    ran = calls(monkeypatch)
    ra_triton.packed_attention(q, k, v)
    said = ra_triton.which_backend(q, k, v)
    assert ran == [said.split(":")[0] + ".packed_attention"]
    if DEVICE.type == "cpu":
        assert said == "sdpa: cpu tensors"
    else:
        assert said.startswith("triton: ")


@backends
def test_an_explicit_backend_runs_alone(monkeypatch, backend):
    ran = calls(monkeypatch)
    ra_triton.ra_attention(normal(1, 5, C), normal(C, 3 * D), n_head=1, backend=backend)
    packed = ra_triton.project(normal(1, 5, C), normal(C, 3 * D), n_head=1, backend=backend)
    ra_triton.packed_attention(*packed, backend=backend)
    asked = [f"{backend}.{function}" for function in ("layer", "project", "packed_attention")]
    assert ran[0] == asked[0]
    assert {name.split(".")[0] for name in ran} == {backend}
    assert ran[-2:] == asked[1:]


def test_which_backend_gives_its_reason_and_takes_all_options():
    q, k, v = AttentionCase(T_q=5, T_k=5).tensors()
    said = ra_triton.which_backend(
        q, k, v, causal=False, softmax_scale=0.5, window_size=(2, 2), return_lse=True
    )
    name, _, reason = said.partition(": ")
    if DEVICE.type == "cpu":
        assert (name, reason) == ("sdpa", "cpu tensors")
    else:
        assert (name, reason) == ("triton", "supported GPU, shapes and options")


@pytest.mark.parametrize(
    "options", [{"softcap": 1.0}, {"dropout_p": 0.5, "return_lse": True}, {"window_size": (2, 2)}]
)
def test_auto_trains_with_every_option(options):
    q, k, v = AttentionCase(T_q=5, T_k=5).tensors()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    said = ra_triton.which_backend(*leaves, **options)
    assert said.partition(":")[0] == ("sdpa" if DEVICE.type == "cpu" else "triton")
    out = ra_triton.packed_attention(*leaves, **options)
    out = out[0] if isinstance(out, tuple) else out
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert grad.isfinite().all()
        assert (grad != 0).any()


def test_no_grad_and_detached_weights_run_on_triton():
    x, W = normal(1, 5, C), normal(C, 3 * D).requires_grad_()
    with torch.no_grad():
        out = ra_triton.ra_attention(x, W, n_head=1, backend="triton")
    assert not out.requires_grad
    again = ra_triton.ra_attention(x, W.detach(), n_head=1, backend="triton")
    assert_bitwise(again, out)


@pytest.mark.gpu
def test_auto_on_a_gpu_warns_once_when_it_cannot_use_triton():
    q, k, v = AttentionCase(T_q=5, T_k=5, D=8).tensors()
    internals.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            ra_triton.packed_attention(q, k, v)
    assert ["head dim 8" in str(warning.message) for warning in caught] == [True]


# Gradients, held against the definition in test_gradients.py


def test_auto_trains():
    x, W = normal(1, 5, C), normal(C, 3 * D).requires_grad_()
    ra_triton.ra_attention(x, W, n_head=1).sum().backward()
    assert W.grad.isfinite().all()
    assert (W.grad != 0).any()


@backends
def test_an_explicit_backend_trains(backend):
    x, W = normal(1, 5, C), normal(C, 3 * D).requires_grad_()
    ra_triton.ra_attention(x, W, n_head=1, backend=backend).sum().backward()
    assert W.grad.isfinite().all()
    assert (W.grad != 0).any()


# The same answers


GRID = [  # (T_q, T_k), causal, window, softcap, group
    ((20, 20), True, (-1, -1), 0.0, 1),
    ((20, 20), False, (4, 2), 2.0, 2),
    ((20, 20), True, (4, 2), 2.0, 2),
    ((7, 21), True, (-1, -1), 2.0, 2),
    ((7, 21), False, (4, 2), 0.0, 1),
    ((7, 21), False, (-1, -1), 2.0, 1),
    ((21, 7), True, (4, 2), 0.0, 2),
    ((21, 7), False, (-1, -1), 2.0, 1),
    ((21, 7), True, (2**31, 0), 2.0, 1),
    ((20, 20), False, (2**40, 2**63 - 1), 0.0, 2),
]
grid = pytest.mark.parametrize(
    "case",
    [
        AttentionCase(2, T_q, T_k, 2, group, causal=causal, window=window, softcap=softcap)
        for (T_q, T_k), causal, window, softcap, group in GRID
    ],
    ids=[str(row) for row in GRID],
)


@forward_backends
@grid
@pytest.mark.parametrize("with_lse", [False, True])
def test_every_backend_gives_what_the_definition_says(backend, with_lse, case):
    tensors = case.tensors()
    options = case.options | {"dropout_p": 0.0, "backend": backend}
    results = ra_triton.packed_attention(*tensors, return_lse=with_lse, **options)
    out, lse = results if with_lse else (results, None)
    assert_attention_close(out, *tensors, **({"lse": lse} if with_lse else {}), **case.options)


@backends
@grid
def test_every_backend_that_trains_has_the_gradients_of_the_definition(backend, case):
    tensors, do = case.tensors(), case.gradient()
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, lse = ra_triton.packed_attention(*leaves, return_lse=True, backend=backend, **case.options)
    dlse = normal(*lse.shape, seed=9) * lse.isfinite()
    grads = torch.autograd.grad((out, lse), leaves, (do, dlse))
    budgets = attention_gradient_budgets(*tensors, do, dlse, **case.options)
    named = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    check_gradients(named, budgets, dtype=case.dtype, case=case)


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


def test_tensors_without_numbers_have_no_autocast_and_give_shapes():
    x, W = torch.empty(2, 9, C, device="meta"), torch.empty(C, 3 * H * D, device="meta")
    factors = [torch.empty(C, H * D, device="meta") for _ in "qkv"]
    assert ra_triton.ra_attention(x, W, n_head=H).shape == (2, 9, H * D)
    W_recip = torch.empty(D, 4, device="meta")
    assert ra_triton.compose_weights(*factors, W_recip, n_head=H).shape == W.shape
    with pytest.raises(NotImplementedError, match="NVIDIA GPU, got tensors on meta"):
        ra_triton.ra_attention(x, W, n_head=H, backend="triton")


def test_every_backend_has_every_function_that_is_asked_of_one():
    tree = ast.parse(Path(registry.__file__).parents[1].joinpath("api.py").read_text())
    asked = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "module" and not node.attr.startswith("__")
    }
    assert {"layer", "project", "packed_attention"} <= asked
    for module in registry.BACKENDS.values():
        for name in asked:
            assert callable(getattr(module, name, None)), f"{module.__name__} has no {name}"
