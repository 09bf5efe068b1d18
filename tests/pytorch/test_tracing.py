"""One graph, nowhere a break: functions, layers, a GPT; in and out of autocast, training and not.

A break needs no GPU to show. Training is traced wherever the kernels run, in the interpreter too,
which the operators hide; what ``"auto"`` decides on a GPU is traced with fake tensors there.
"""

from contextlib import nullcontext

import pytest
import torch
from strategies import DEVICE
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import ra_triton
from bench.models.gpt import GPT, GPTConfig
from ra_triton.backend import triton
from ra_triton.checks import autocast_dtype
from ra_triton.nn import RACausalSelfAttention

C, H, D = 32, 2, 16
LAYERS = {
    "free": {},
    "free, no bias": {"bias": False, "dropout": 0.25},
    "composed": {"parametrisation": "composed"},
    "composed, per head": {"parametrisation": "composed", "recip_per_head": True},
    "rope": {"rope": True},
    "rope and qk_norm": {"rope": True, "rope_dims": 12, "qk_norm": True},
    "grouped": {"n_kv_head": 1, "rope": True, "qk_norm": True, "parametrisation": "composed"},
}


def layer(x, W, bias, backend, **options):
    return ra_triton.ra_attention(x, W, 3, n_head=H, bias=bias, backend=backend, **options)


def project(x, W, bias, backend):
    q, k, v = ra_triton.project(x, W, 3, n_head=H, bias=bias, backend=backend)
    return q * k + v


def split(x, W, bias):
    return (x @ W + bias).unflatten(-1, (3, H, D)).unbind(2)


def attention(x, W, bias, backend, **options):
    return ra_triton.packed_attention(*split(x, W, bias), backend=backend, **options)


def with_rope(x, W, bias, backend):
    q, k, v = split(x, W, bias)
    rope = torch.ones(2, 64, D // 2, device=x.device).unbind()
    q, k = ra_triton.pack_qk(q, k, rope=rope, qk_norm=True, backend=backend)
    return ra_triton.packed_attention(q, k, v, backend=backend)


def exchanged(x, W, bias, backend):
    q, k, v = split(x, W, bias)
    q, k = ra_triton.pack_qk(q, k, q.narrow(3, 0, 3), k.narrow(3, 0, 3), backend=backend)
    return ra_triton.packed_attention(q, k, v, backend=backend)


def exchanged_in_place(x, W, bias, backend):
    q, k, v = split(x, W, bias)
    if torch.is_grad_enabled():
        return ra_triton.packed_attention(q, k, v, backend=backend)
    q, k = ra_triton.pack_qk_(q, k, q.narrow(3, 0, 3), k.narrow(3, 0, 3), backend=backend)
    return ra_triton.packed_attention(q, k, v, backend=backend)


def varlen(x, W, bias, backend):
    lengths = torch.zeros(3, dtype=torch.int32, device=x.device)
    options = {"cu_seqlens": lengths, "max_seqlen": 9, "check": False}
    return layer(x.narrow(0, 0, 1), W, bias, backend, **options)


FUNCTIONS = {
    "layer": layer,
    "layer, packed": lambda *args: layer(*args, weight_layout="packed"),
    "layer, dropout": lambda *args: layer(*args, dropout_p=0.25),
    "project": project,
    "attention": attention,
    "attention, lse": lambda *args: sum(t.sum() for t in attention(*args, return_lse=True)),
    "norm and rotation": with_rope,
    "lanes exchanged": exchanged,
    "in place": exchanged_in_place,
    "varlen": varlen,
}
modes = pytest.mark.parametrize(
    ("training", "autocast"),
    [(True, "none"), (True, "inside"), (False, "outside")],
    ids=["training", "training under autocast", "no grad under autocast"],
)


def graph_of(function, *args, autocast="none", device=DEVICE.type, backend="eager"):
    """What the function returns, and the only graph that it compiles to."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    on = torch.autocast(device, torch.bfloat16)

    def traced(*args):
        with on if autocast == "inside" else nullcontext():
            return function(*args)

    with on if autocast == "outside" else nullcontext():
        out = torch.compile(traced, fullgraph=True, backend=counter)(*args)
    assert counter.frame_count == 1
    return out, counter.graphs[0]


def operators(graph):
    """This package's operators in a graph."""
    targets = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return [target.split(".")[1] for target in targets if target.startswith("ra_triton.")]


@modes
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_one_graph(name, training, autocast):
    def function(*args):
        return FUNCTIONS[name](*args, "triton")

    with FakeTensorMode(), torch.set_grad_enabled(training):
        sizes = (2, 9, C), (C, 3 * H * D), (3 * H * D,)
        inputs = [torch.empty(size, device=DEVICE, requires_grad=training) for size in sizes]
        out, graph = graph_of(function, *inputs, autocast=autocast)
    assert operators(graph)
    assert out.requires_grad == training


@modes
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_one_graph(name, training, autocast):
    with FakeTensorMode(), torch.set_grad_enabled(training):
        layer = RACausalSelfAttention(C, H, 3, **LAYERS[name], backend="triton", device=DEVICE)
        x = torch.empty(2, 9, C, device=DEVICE)
        out, graph = graph_of(layer.train(training), x, autocast=autocast)
    assert operators(graph)
    assert out.requires_grad == training


@pytest.mark.parametrize("parametrisation", ["free", "composed"])
def test_a_gpt_trained_under_autocast_is_one_graph(parametrisation):
    """Two layers; the graph of their backward is the operators'."""

    def attention(config):
        options = {"parametrisation": parametrisation, "rope": True, "backend": "triton"}
        return RACausalSelfAttention.from_config(config, R=3, **options)

    with FakeTensorMode():
        with DEVICE:
            model = GPT(GPTConfig(16, 64, n_layer=2, n_head=H, n_embd=C), attention)
            tokens = torch.zeros(2, 16, dtype=torch.int64)
        out, graph = graph_of(model, tokens, autocast="inside")
        out.float().sum().backward()
    assert operators(graph).count("attention") == 2
    assert all(p.grad is not None for p in model.parameters())


# What "auto" decides on a GPU, where a compiler too has no more than fake tensors


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors on a GPU of compute capability 9.0, without their memory."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    triton._look_at.cache_clear()
    with FakeTensorMode(), torch.no_grad():  # autograd would look for the GPU
        yield
    triton._look_at.cache_clear()


@pytest.mark.parametrize("autocast", ["none", "outside"])
@pytest.mark.parametrize(
    "name", ["layer", "layer, packed", "layer, dropout", "attention", "varlen"]
)
def test_on_a_gpu_functions_are_one_graph_of_operators(fake_gpu, name, autocast):
    def function(*args):
        return FUNCTIONS[name](*args, "auto")

    sizes = (2, 9, C), (C, 3 * H * D), (3 * H * D,)
    inputs = [torch.empty(size, device="cuda") for size in sizes]
    out, graph = graph_of(function, *inputs, autocast=autocast, device="cuda")
    assert operators(graph)
    assert out.device.type == "cuda"


# Autocast


@pytest.mark.parametrize("device", ["cpu", "meta", "vulkan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_device_is_known_eagerly_and_traced(device, dtype):
    """Where there is none, as on "meta", it is off."""
    asked = []

    def function(x):
        asked.append(autocast_dtype(torch.device(device)))
        return x + 1

    for on in (False, True):
        expected = dtype if on and device == "cpu" else None
        with torch.autocast("cpu", dtype, enabled=on):
            assert autocast_dtype(torch.device(device)) == expected
            torch._dynamo.reset()
            torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(2))
        assert asked.pop() == expected
        asked.clear()
