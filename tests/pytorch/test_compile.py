"""The contract with PyTorch: opcheck, torch.compile, torch.export, torch.func, the workspace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budget import assert_bitwise
from strategies import DEVICE, backends, normal, quick
from torch._dynamo.testing import CompileCounterWithBackend

import ra_triton
from ra_triton.call.options import AttentionOptions
from ra_triton.nn import Workspace

LENGTHS = (9, 16, 17, 33, 40, 50)


def contiguous(t):
    return t


def heads_first(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def tokens_first(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(t):
    return torch.cat((t, t), dim=1)[:, : t.shape[1]]


def fused(t):
    return torch.stack((t, t, t), dim=2)[:, :, 1]


def offset(t):
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)


LAYOUTS = (contiguous, heads_first, tokens_first, sliced, fused, offset)


def leaf(t):
    return t.detach().requires_grad_()


OPTIONS = AttentionOptions()


def check_operator(
    name, *tensors, heads=(), options=OPTIONS, cu_seqlens=(None, None), longest=(0, 0)
):
    """opcheck of attention or a layer, on its three operands and a seed."""
    tensors = (*tensors[:3], *[None] * (3 - len(tensors)), *cu_seqlens, *(tensors[3:] or [None]))
    constants = (*heads, *options.scores, *longest, cu_seqlens[0] is None)
    operator = getattr(torch.ops.ra_triton, name).default
    torch.library.opcheck(operator, (*tensors, *constants))


@pytest.mark.parametrize("layout", quick(LAYOUTS))
def test_opcheck_of_attention(layout):
    q, k, v = (leaf(layout(normal(2, 7, 3, 16, seed=seed))) for seed in range(3))
    check_operator("attention", q, k, v)
    seed = torch.tensor([5], device=DEVICE)
    options = AttentionOptions(False, 0.3, dropout_p=0.2)
    check_operator("attention", q, k, v, seed, options=options)


@pytest.mark.parametrize("layout", quick([contiguous, tokens_first, sliced, offset]))
def test_opcheck_of_projection_and_layer(layout):
    x, W = leaf(layout(normal(2, 7, 24))), leaf(normal(24, 3 * 2 * 16))
    bias = leaf(normal(96))
    torch.library.opcheck(torch.ops.ra_triton.project.default, (x, W, bias))
    torch.library.opcheck(torch.ops.ra_triton.project.default, (x, W, None))
    check_operator("layer", x, W, bias, heads=(2, 2))
    transposed = leaf(W.mT.contiguous().mT)
    check_operator("layer", x, transposed, bias, heads=(2, 2))


def test_schemas_say_what_may_be_none():
    """A call with None would not show it, but exported programs and other languages read them."""
    may_be_none = {"bias", "cu_seqlens_q", "cu_seqlens_k", "seed", "softmax_scale"}
    for name, more in (("layer", set()), ("layer_backward", {"d_out"})):
        schema = getattr(torch.ops.ra_triton, name).default._schema
        optional = {a.name for a in schema.arguments if isinstance(a.type, torch.OptionalType)}
        assert optional == may_be_none | more


@pytest.mark.parametrize("layout", [contiguous, lambda t: t.mT.contiguous().mT])
def test_fake_gradients_lie_as_the_kernels_write_them(layout):
    x, W, bias = normal(2, 7, 24), layout(normal(24, 96)), normal(96)
    args = (x, W, bias, normal(2, 7, 96), [True] * 3)
    backward = torch.ops.ra_triton.project_backward.default
    torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))


def run(function, x, *others):
    """Output and gradients of a sum of squares."""
    inputs = [leaf(t) for t in (x, *others)]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)


def assert_compiles(function, make_inputs):
    """One graph, forward and backward; the bits of eager; at most two recompiles in six lengths."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for T in LENGTHS:
        inputs = make_inputs(T)
        for actual, expected in zip(run(compiled, *inputs), run(function, *inputs), strict=True):
            assert_bitwise(actual, expected, f"T={T}")
    assert counter.frame_count <= 3


@backends
@pytest.mark.parametrize("weight_layout", quick(["packed", "split"]))
def test_ra_attention_compiles(backend, weight_layout):
    W, bias = normal(24, 3 * 2 * 20, scale=0.2), normal(120)

    def function(x, W, bias):
        return ra_triton.ra_attention(
            x, W, 3, n_head=2, bias=bias, weight_layout=weight_layout, backend=backend
        )

    assert_compiles(function, lambda T: (normal(2, T, 24, seed=T), W, bias))


@backends
@pytest.mark.parametrize("causal", quick([True, False]))
def test_packed_attention_compiles(backend, causal):
    def function(q, k, v):
        out, lse = ra_triton.packed_attention(
            q, k, v, causal=causal, return_lse=True, backend=backend
        )
        return out * lse.transpose(1, 2).unsqueeze(-1)

    assert_compiles(function, lambda T: [normal(2, T, 2, 16, seed=s) for s in range(3)])


@backends
def test_project_compiles(backend):
    W = normal(24, 3 * 2 * 20, scale=0.2)

    def function(x, W):
        q, k, v = ra_triton.project(x, W, 3, n_head=2, backend=backend)
        return q * k + v

    assert_compiles(function, lambda T: (normal(2, T, 24, seed=T), W))


@backends
def test_ra_attention_exports(backend):
    class Layer(torch.nn.Module):
        def forward(self, x, W):
            return ra_triton.ra_attention(x, W, 3, n_head=2, backend=backend)

    W = normal(24, 3 * 2 * 20, scale=0.2)
    length = torch.export.Dim("T", min=2, max=512)
    program = torch.export.export(
        Layer(), (normal(2, 9, 24), W), dynamic_shapes={"x": {1: length}, "W": None}
    )
    for T in (5, 64):
        x = normal(2, T, 24, seed=T)
        assert_bitwise(program.module()(x, W), Layer()(x, W))


@backends
def test_torch_func_grad_is_autograds(backend):
    W, bias = normal(24, 3 * 2 * 20, scale=0.2), normal(120)

    def loss(x, W, bias):
        out = ra_triton.ra_attention(x, W, 3, n_head=2, bias=bias, backend=backend)
        return out.square().sum()

    x = normal(2, 9, 24)
    actual = torch.func.grad(loss, argnums=(0, 1, 2))(x, W, bias)
    inputs = [leaf(t) for t in (x, W, bias)]
    for a, e in zip(actual, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        assert_bitwise(a, e)


@backends
def test_torch_func_grad_of_attention_and_projection(backend):
    def loss(q, k, v, x, W):
        out, lse = ra_triton.packed_attention(q, k, v, return_lse=True, backend=backend)
        q_pack, _, _ = ra_triton.project(x, W, 3, n_head=2, backend=backend)
        return out.square().sum() + lse.sum() + q_pack.square().sum()

    inputs = [normal(2, 9, 2, 16, seed=seed) for seed in range(3)]
    inputs += [normal(2, 9, 24), normal(24, 3 * 2 * 20, scale=0.2)]
    actual = torch.func.grad(loss, argnums=tuple(range(5)))(*inputs)
    inputs = [leaf(t) for t in inputs]
    for a, e in zip(actual, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        assert_bitwise(a, e)


def test_vmap_is_a_loop():
    W, x = normal(24, 3 * 2 * 20, scale=0.2), normal(3, 2, 9, 24)

    def function(x):
        return ra_triton.ra_attention(x, W, 3, n_head=2, backend="triton")

    mapped = torch.func.vmap(function)(x)
    assert_bitwise(mapped, torch.stack([function(t) for t in x]))


@backends
def test_workspace_changes_no_bit(backend):
    workspace, W = Workspace(), normal(24, 3 * 2 * 20, scale=0.2)
    for T in (9, 33, 5, 33):
        x = normal(2, T, 24, seed=T)
        options = {"n_head": 2, "backend": backend}
        out = ra_triton.ra_attention(x, W, 3, workspace=workspace, **options)
        assert_bitwise(out, ra_triton.ra_attention(x, W, 3, **options))


def test_workspace_makes_a_steady_state_without_allocations(monkeypatch):
    workspace, W = Workspace(), normal(24, 3 * 2 * 20, scale=0.2)

    def call(T):
        return ra_triton.ra_attention(
            normal(2, T, 24),
            W,
            n_head=2,
            weight_layout="packed",
            workspace=workspace,
            backend="triton",
        )

    first = call(33)
    allocations = []
    for name in ("empty", "empty_like", "empty_strided", "zeros", "full"):
        allocate = getattr(torch, name)

        def counted(*args, allocate=allocate, **kwargs):
            allocations.append(args)
            return allocate(*args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    again = call(33)
    smaller = call(9)
    assert not allocations
    assert again.data_ptr() == first.data_ptr() == smaller.data_ptr()


@backends
def test_workspace_refuses_gradients(backend):
    x, W = normal(2, 9, 24), normal(24, 3 * 2 * 20).requires_grad_()
    with pytest.raises(ValueError, match="workspace cannot be used while a gradient is needed"):
        ra_triton.ra_attention(x, W, 3, n_head=2, workspace=Workspace(), backend=backend)
    with torch.no_grad():
        ra_triton.ra_attention(x, W, 3, n_head=2, workspace=Workspace(), backend=backend)


def test_workspace_must_be_one():
    with pytest.raises(TypeError, match="workspace must be a Workspace"):
        ra_triton.ra_attention(normal(2, 9, 24), normal(24, 120), n_head=2, workspace={})


# What PyTorch's float32 products may round to, in each of its ways to say so

TF32 = {
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('medium')": True,
    "B.cuda.matmul.allow_tf32 = True": True,
    "B.cuda.matmul.fp32_precision = 'tf32'": True,
    "B.fp32_precision = 'tf32'": True,
    "pass": False,
    "B.fp32_precision = 'ieee'": False,
    "B.fp32_precision = 'tf32'; B.cuda.matmul.fp32_precision = 'ieee'": False,
    "B.mkldnn.matmul.fp32_precision = 'bf16'": False,
    "B.mkldnn.matmul.fp32_precision = 'tf32'": False,
    "torch.set_float32_matmul_precision('high'); B.cuda.matmul.fp32_precision = 'ieee'": False,
}
PRECISION_SCRIPT = """
import json, os, sys, torch
from ra_triton import ra_attention
from ra_triton.kernels.tiles import dot_precision
B = torch.backends

def run(setting):
    exec(setting)
    layer = lambda x: ra_attention(x, torch.randn(16, 48), 2, n_head=1, backend="triton")
    layer(torch.randn(1, 3, 16))
    if "mkldnn" in setting and "tf32" in setting:
        torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(1, 3, 16))
    dtypes = torch.float32, torch.float16, torch.bfloat16
    print(setting, *(dot_precision(t) for t in dtypes), sep=", ", flush=True)

for setting in json.loads(sys.argv[1]):
    if os.fork() == 0:
        run(setting)
        os._exit(0)
    assert os.wait()[1] == 0, setting
"""


def test_tf32_is_what_pytorchs_products_on_a_gpu_may_use():
    """Each in a process of its own: the settings of the older and the newer kind do not mix."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", PRECISION_SCRIPT, json.dumps(list(TF32))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [f"{s}, {'tf32' if allowed else 'ieee'}, ieee, ieee" for s, allowed in TF32.items()]
    assert done.stdout.splitlines() == expected
