"""Calls that something besides autograd has to see: modes, traces, ``torch.func``, subclasses."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from budget import assert_bitwise
from strategies import DEVICE, backends, normal, quick
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import ra_triton
from ra_triton.backend.triton.operator import Operator
from ra_triton.kernels.attention import forward
from ra_triton.launch import recorded
from ra_triton.nn import KVCache, RACausalSelfAttention

B, T, H, D, C, R = 2, 5, 2, 16, 24, 4
CU = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)
TABLES = tuple(normal(T, D // 2, seed=seed) for seed in (7, 8))
K_WEIGHT = normal(D, seed=9)
W_K, W_V = (normal(C, D, seed=seed) for seed in (10, 11))


def layer(x, W, bias, **options):
    return ra_triton.ra_attention(x, W, R, n_head=H, bias=bias, weight_layout="packed", **options)


def varlen(x, W, bias, **options):
    return layer(x[0], W, bias, cu_seqlens=CU, max_seqlen=3, check=False, **options)


def project(x, W, bias, **options):
    packed = ra_triton.project(x, W, R, n_head=H, bias=bias, weight_layout="packed", **options)
    return torch.cat(packed, 2)


def attention(q, k, v, **options):
    out, lse = ra_triton.packed_attention(q, k, v, return_lse=True, **options)
    return out * lse.mT[..., None]


def norm_rope(q, k, weight, **options):
    weights = (weight, K_WEIGHT)
    return torch.cat(ra_triton.pack_qk(q, k, rope=TABLES, qk_norm=weights, **options), 2)


def compose(W_q, W_recip, w_rec, **options):
    heads = {"n_head": H, "n_kv_head": 1, "weight_layout": "packed"}
    return ra_triton.compose_weights(W_q, W_K, W_V, W_recip, w_rec=w_rec, **heads, **options)


def inputs_of(function, seed=0):
    shapes = [(B, T, C), (C, 3 * H * D), (3 * H * D,)]
    if function is compose:
        shapes = [(C, H * D), (H, D, R), (H,)]
    if function is attention:
        shapes = [(B, T, H, D)] * 3
    if function is norm_rope:
        shapes = [(B, T, H, D), (B, T, H, D), (D,)]
    return [normal(*s, seed=3 * seed + i, scale=0.5) for i, s in enumerate(shapes)]


FUNCTIONS = (layer, varlen, project, attention, norm_rope, compose)
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
# What vmap maps over: all inputs, the first one (a sample), the second (a weight).
DIMS = [(None, 1, None), (0, 0, 0), (0, None, None)]
mapped = pytest.mark.parametrize(
    "dims", [*DIMS[:2], pytest.param(DIMS[2], marks=pytest.mark.slow)], ids=str
)


def batches(inputs, dims, n=2):
    """Inputs with a batch where a dim says so, and the slices."""
    slices = [
        [t if dim is None else normal(*t.shape, seed=50 + 3 * i + j, scale=0.5)]
        + [normal(*t.shape, seed=90 + 3 * i + j, scale=0.5)] * (n - 1)
        for j, (i, t, dim) in enumerate(zip(range(3), inputs, dims, strict=True))
    ]
    stacked = [
        t if dim is None else torch.stack(s, dim)
        for t, s, dim in zip(inputs, slices, dims, strict=True)
    ]
    each = [
        [t if dim is None else s[i] for t, s, dim in zip(inputs, slices, dims, strict=True)]
        for i in range(n)
    ]
    return stacked, each


def assert_all_bitwise(actual, expected, what=""):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_bitwise(a, e, f"{what} {i}")


def gradients(function, inputs):
    leaves = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


# Transforms: the bits of a loop


@functions
@mapped
def test_vmap_and_its_gradients_are_those_of_a_loop(function, dims):
    run = partial(function, backend="triton")
    stacked, each = batches(inputs_of(function), dims)
    got = torch.func.vmap(run, dims)(*stacked)
    assert_bitwise(got, torch.stack([run(*inputs) for inputs in each]))
    expected = [torch.stack(g) for g in zip(*(gradients(run, i) for i in each), strict=True)]

    def loss(*inputs):
        return run(*inputs).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), dims)(*stacked)
    assert_all_bitwise(per_sample, expected, "vmap(grad)")
    leaves = [t.clone().requires_grad_() for t in stacked]
    total = torch.autograd.grad(torch.func.vmap(loss, dims)(*leaves).sum(), leaves)
    inside = torch.func.grad(lambda *t: torch.func.vmap(loss, dims)(*t).sum(), (0, 1, 2))(*stacked)
    for grads in (total, inside):
        for grad, want, dim in zip(grads, expected, dims, strict=True):
            assert_bitwise(grad, want.sum(0) if dim is None else want.movedim(0, dim))


@backends
@functions
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batches_of_gradients_are_those_of_a_loop(backend, function):
    run = partial(function, backend=backend)
    inputs = [t.requires_grad_() for t in inputs_of(function)]
    out = run(*inputs)
    rows = torch.stack([normal(*out.shape, seed=seed) for seed in range(2)])
    got = torch.autograd.grad(out, inputs, rows, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(out, inputs, row, retain_graph=True) for row in rows]
    for grad, expected in zip(got, zip(*each, strict=True), strict=True):
        if backend == "triton":
            assert_bitwise(grad, torch.stack(expected))
        assert grad.shape == (2, *expected[0].shape)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_every_kind_of_jacobian_is_the_same():
    x, W, bias = inputs_of(layer)
    x = x[:1, :2]

    def run(x):
        return layer(x, W, bias, backend="triton")[..., :3]

    expected = torch.autograd.functional.jacobian(run, x)
    assert_bitwise(torch.func.jacrev(run)(x), expected)
    assert_bitwise(torch.autograd.functional.jacobian(run, x, vectorize=True), expected)


def test_a_second_level_is_refused_under_vmap_too():
    x, W, bias = inputs_of(layer)

    def loss(x):
        return layer(x, W, bias, backend="triton").square().sum()

    first = torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())
    for function in (first, torch.func.vmap(first)):
        with pytest.raises(RuntimeError, match="differentiate twice"):
            function(x if function is first else x[None])


@torch.no_grad()
def test_vmap_over_a_cache_and_a_quantized_weight():
    x, W, bias = inputs_of(layer)
    q, k, v = inputs_of(attention)
    lengths = torch.tensor([3, 5], dtype=torch.int32, device=DEVICE)
    options = {"backend": "triton"}

    def decode(q, lengths):
        return ra_triton.decode_attention(q[:, :2], k, v, lengths, **options)

    queries, all_lengths = torch.stack((q, q.flip(0))), torch.stack((lengths, lengths.flip(0)))
    got = torch.func.vmap(decode)(queries, all_lengths)
    each = zip(queries, all_lengths, strict=True)
    assert_bitwise(got, torch.stack([decode(*i) for i in each]))
    for which in ("all", "reciprocal"):
        weight = ra_triton.quantize_weight(W, R, n_head=H, which=which, weight_layout="packed")
        run = partial(layer, W=weight, bias=bias, **options)
        xs = torch.stack((x, x.flip(1)))
        assert_bitwise(torch.func.vmap(run)(xs), torch.stack([run(x) for x in xs]))
    cache = KVCache(B, 8, H, D, device=DEVICE)
    with pytest.raises(NotImplementedError, match="under vmap"):
        torch.func.vmap(lambda k: cache.append(k, k, backend="triton"))(torch.stack((k, v)))


def test_dropout_under_vmap_follows_randomness():
    inputs = inputs_of(layer)
    xs = torch.stack((inputs[0], inputs[0]))

    def run(x):
        return layer(x, *inputs[1:], dropout_p=0.5, backend="triton")

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(run)(xs)
    first, second = torch.func.vmap(run, randomness="same")(xs)
    assert_bitwise(first, second)
    first, second = torch.func.vmap(run, randomness="different")(xs)
    assert not torch.equal(first, second)


# Modes


class Operators(TorchDispatchMode):
    """Names of our operators that were dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ra_triton":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


NAMES = {layer: "layer", varlen: "layer", project: "project", attention: "attention"}
NAMES |= {norm_rope: "norm_rope", compose: "compose"}


@functions
def test_dispatch_modes_see_forward_and_backward_and_change_no_bit(function):
    inputs, name = inputs_of(function), NAMES[function]
    expected = gradients(partial(function, backend="triton"), inputs)
    with Operators() as both:
        got = gradients(partial(function, backend="triton"), inputs)
    assert_all_bitwise(got, expected)
    assert both.names == [name, f"{name}_backward"]
    leaves = [t.detach().requires_grad_() for t in inputs]
    loss = function(*leaves, backend="triton").square().sum()
    with Operators() as backward:
        assert_all_bitwise(torch.autograd.grad(loss, leaves), expected)
    assert backward.names == [f"{name}_backward"]


@torch.no_grad()
def test_dispatch_modes_see_what_is_written():
    q, k, v = inputs_of(attention)
    x, W, bias = inputs_of(layer)
    weight = ra_triton.quantize_weight(W, R, n_head=H, which="all", weight_layout="packed")
    cache, out = KVCache(B, 8, H, D, device=DEVICE), torch.empty(B, T, 3 * H, D, device=DEVICE)
    options = {"backend": "triton"}
    calls = {
        "append_": lambda: cache.append(k, v, **options),
        "decode": lambda: ra_triton.decode_attention(q, k, v, cache.lengths, **options),
        "norm_rope": lambda: ra_triton.pack_qk_(q, k, rope=TABLES, **options),
        "project": lambda: ra_triton.project(
            x, W, R, n_head=H, bias=bias, weight_layout="packed", out=out, **options
        ),
        "project_quantized": lambda: layer(x, weight, bias, **options),
    }
    for name, call in calls.items():
        with Operators() as seen:
            call()
        assert seen.names[0] == name
    assert_bitwise(out, project(x, W, bias, **options))
    low = v[..., :R]
    expected = ra_triton.pack_qk(q, k, low, low, **options)
    with Operators():
        assert_all_bitwise(ra_triton.pack_qk_(q, k, low, low, **options), expected)


def test_function_modes_see_operators_and_a_default_device_is_none():
    class Functions(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    x, W, bias = inputs_of(layer)
    with Functions() as mode:
        layer(x, W, bias, backend="triton")
    assert any("ra_triton.layer" in name for name in mode.names)
    with torch.device(DEVICE), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Operator, "_observed", None)  # the launches, directly
        layer(x, W, bias, backend="triton")


# A symbolic trace takes no real tensor besides its inputs, as offsets and tables are here.
TRACES = [(f, "real") for f in FUNCTIONS] + [(f, "symbolic") for f in (layer, project, attention)]


@pytest.mark.parametrize(("function", "mode"), TRACES)
def test_make_fx_of_forward_and_backward_computes_on_new_data(function, mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    run = partial(gradients, partial(function, backend="triton"))
    first, second = inputs_of(function), inputs_of(function, seed=1)
    traced = make_fx(lambda *inputs: run(inputs), tracing_mode=mode)(*first)
    assert_all_bitwise(traced(*second), run(second))


@functions
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_computes_on_new_data(function):
    run = partial(function, backend="triton")
    first, second = inputs_of(function), inputs_of(function, seed=1)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            inputs = [t.requires_grad_(grad) for t in first]
            traced = torch.jit.trace(lambda *t: run(*t), inputs, check_trace=False)
            assert_bitwise(traced(*second), run(*second))


def scores(pairs):
    return 2 * pairs * H * D


LOW = 2 * C * H * D * R
GEMM = 2 * B * T * C * 3 * H * D
FLOPS = {
    layer: (GEMM + 2 * scores(B * T * T), 2 * GEMM + 5 * scores(B * T * T)),
    varlen: (GEMM // B + 2 * scores(4 + 9), 2 * GEMM // B + 5 * scores(4 + 9)),
    project: (GEMM, 2 * GEMM),
    attention: (2 * scores(B * T * T), 5 * scores(B * T * T)),
    norm_rope: (0, 0),
    compose: (2 * LOW, 3 * LOW),  # both low parts; W_q's gradient and W_recip's, of both
}


@functions
def test_flops_are_counted_as_pytorch_counts_attention(function):
    inputs = [t.requires_grad_() for t in inputs_of(function)]
    forward, backward = (FlopCounterMode(display=False) for _ in range(2))
    with forward:
        out = function(*inputs, backend="triton")
    with backward:
        torch.autograd.grad(out.sum(), inputs)
    assert (forward.get_total_flops(), backward.get_total_flops()) == FLOPS[function]


def test_flops_count_what_is_needed_and_inference():
    (x, W, bias), (q, k, v) = inputs_of(layer), inputs_of(attention)
    with FlopCounterMode(display=False) as frozen:
        project(x.requires_grad_(), W, bias, backend="triton").sum().backward()
        attention(q, k, v.requires_grad_(), backend="triton").sum().backward()
    assert frozen.get_total_flops() == 2 * GEMM + (2 + 2) * scores(B * T * T)
    weight = ra_triton.quantize_weight(W, R, n_head=H, which="all", weight_layout="packed")
    with torch.no_grad(), FlopCounterMode(display=False) as inference:
        layer(x, weight, bias, backend="triton")
        lengths = torch.full((B,), T, dtype=torch.int32, device=DEVICE)
        ra_triton.decode_attention(q[:, :2], k, v, lengths, max_length=4, backend="triton")
    assert inference.get_total_flops() == GEMM + 2 * scores(B * T * T) + 2 * scores(B * 2 * 4)


@pytest.mark.parametrize("saved", ["ra_triton", "mm", "nothing"])
def test_selective_checkpoints_save_what_they_name(monkeypatch, saved):
    module = RACausalSelfAttention(32, H, R=R, rope=True, backend="triton", device=DEVICE)
    launched, attend = [], forward.attention_forward
    counted = lambda *a, **k: launched.append(0) or attend(*a, **k)  # noqa: E731
    monkeypatch.setattr(forward, "attention_forward", counted)

    def policy(context, operator, *args, **kwargs):
        keep = saved in str(operator)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def run(function):
        module.zero_grad()
        x = normal(B, T, 32).requires_grad_()
        function(x).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in module.parameters())]

    expected = run(module)
    launched.clear()
    contexts = partial(create_selective_checkpoint_contexts, policy)
    got = run(lambda x: checkpoint(module, x, use_reentrant=False, context_fn=contexts))
    assert_all_bitwise(got, expected)
    assert len(launched) == (1 if saved == "ra_triton" else 2)


MODULES = {  # the first has all operators but those of the last
    "composed": {"parametrisation": "composed", "rope": True},
    "module": {},
    "rope and norm": {"rope": True, "qk_norm": True},
}


@pytest.mark.parametrize("name", quick(["varlen", *MODULES, "project"], 2))
def test_compiled_autograd_of_an_eager_forward(name):
    from torch._dynamo import compiled_autograd

    x, W, bias = inputs_of(layer)
    if name in MODULES:
        module = RACausalSelfAttention(C, 1, R=R, backend="triton", **MODULES[name]).to(DEVICE)
        parameters, function = list(module.parameters()), module
    else:
        parameters = [W.requires_grad_(), bias.requires_grad_()]
        function = partial({"varlen": varlen, "project": project}[name], backend="triton")
        function = (lambda f: lambda x: f(x, W, bias))(function)

    def run(compiled):
        leaf = x.clone().requires_grad_()
        for p in parameters:
            p.grad = None
        loss = function(leaf).square().sum()
        if compiled:
            compiler = torch.compile(backend="aot_eager", fullgraph=True)
            with compiled_autograd._enable(compiler):
                loss.backward()
        else:
            loss.backward()
        return [leaf.grad, *(p.grad.clone() for p in parameters)]

    expected = run(compiled=False)
    torch._dynamo.reset()
    assert_all_bitwise(run(compiled=True), expected)


def test_known_calls_are_not_taken_where_something_observes(monkeypatch):
    monkeypatch.setattr(recorded, "DEVICE", DEVICE.type)
    x, W, bias = inputs_of(layer)
    key = recorded.key_of((x, W, bias), ())
    assert key is not None

    class Nothing(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    for context in (Operators(), Nothing(), FlopCounterMode(display=False)):
        with context:
            assert recorded.key_of((x, W, bias), ()) is None
    for other in (torch._neg_view(x), x.as_subclass(Plain), torch.nested.nested_tensor([x[0]])):
        assert recorded.key_of((other, W, bias), ()) is None
    with torch.device(DEVICE):
        assert recorded.key_of((x, W, bias), ()) == key


# Memory that is not simply the values


class Plain(torch.Tensor):
    """A subclass without rules of its own."""


class Wrapper(torch.Tensor):
    """Has no memory: its values are those of another tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device,
            requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrap = lambda t: t.inner if isinstance(t, cls) else t  # noqa: E731
        tree_map = torch.utils._pytree.tree_map
        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, out)


HIDDEN = {
    "negated": lambda t: torch._neg_view(-t),
    "imaginary part": lambda t: torch.complex(t, -t).conj().imag,
    "subclass": lambda t: t.as_subclass(Plain),
    "wrapper": Wrapper,
}


def visible(t):
    return (t.inner if isinstance(t, Wrapper) else t).as_subclass(torch.Tensor).resolve_neg()


@backends
@functions
@pytest.mark.parametrize("hide", [h for h in HIDDEN if h != "imaginary part"])
@pytest.mark.parametrize("hidden", range(3))
def test_values_that_memory_does_not_show(backend, function, hide, hidden):
    inputs = inputs_of(function)
    expected = function(*inputs, backend=backend)
    with torch.no_grad():
        args = [HIDDEN[hide](t) if i == hidden else t for i, t in enumerate(inputs)]
        assert_bitwise(visible(function(*args, backend=backend)), expected)
    if hide == "negated":
        grads = gradients(lambda *t: function(*args_of(t, hidden), backend=backend), inputs)
        assert_all_bitwise(grads, gradients(partial(function, backend=backend), inputs))


def args_of(inputs, hidden):
    return [HIDDEN["negated"](t) if i == hidden else t for i, t in enumerate(inputs)]


@functions
def test_a_lazily_negated_gradient(function):
    inputs = [t.requires_grad_() for t in inputs_of(function)]
    out = function(*inputs, backend="triton")
    do = normal(*out.shape, seed=9)
    expected = torch.autograd.grad(out, inputs, do, retain_graph=True)
    assert_all_bitwise(torch.autograd.grad(out, inputs, torch._neg_view(-do)), expected)


@backends
@torch.no_grad()
@pytest.mark.parametrize("hide", HIDDEN)
def test_what_is_written_through_a_view_that_hides_its_values(backend, hide):
    q, k, v = inputs_of(attention)
    low = v[..., :R].contiguous()
    expected = ra_triton.pack_qk(q, k, low, low, backend=backend)
    turned = ra_triton.pack_qk(q, k, rope=TABLES, backend=backend)
    for want, options in ((expected, {"q_low": low, "k_low": low}), (turned, {"rope": TABLES})):
        args = [HIDDEN[hide](t.clone()) for t in (q, k)]
        if any(t.stride(-1) != 1 for t in args):
            continue  # refused by its strides
        ra_triton.pack_qk_(*args, **options, backend=backend)
        assert_all_bitwise(map(visible, args), want)
    cache = KVCache(B, 8, H, D, device=DEVICE)
    key = HIDDEN[hide](k)
    key = key.contiguous() if key.stride(-1) != 1 else key
    cache.append(key, v, backend=backend)
    assert_bitwise(cache.k_pack[:, :T], k)


NESTED = {
    "ra_attention": lambda n, W: ra_triton.ra_attention(n, W, R, n_head=H),
    "project": lambda n, W: ra_triton.project(n, W, R, n_head=H),
    "packed_attention": lambda n, W: ra_triton.packed_attention(n, n, n),
    "varlen": lambda n, W: ra_triton.packed_attention_varlen(n, n, n, CU, CU, 3, 3),
    "decode_attention": lambda n, W: ra_triton.decode_attention(n, n, n, CU),
    "pack_qk": lambda n, W: ra_triton.pack_qk(n, n, n, n),
    "pack_qk_": lambda n, W: ra_triton.pack_qk_(n, n, n, n),
    "which_backend": lambda n, W: ra_triton.which_backend(n, n, n),
    "append": lambda n, W: KVCache(B, 8, H, D).append(n, n),
    "weight": lambda n, W: ra_triton.ra_attention(normal(B, T, C), n, R),
    "quantize_weight": lambda n, W: ra_triton.quantize_weight(n, R, which="all"),
    "pack_weight": lambda n, W: ra_triton.pack_weight(n, R),
    "module": lambda n, W: RACausalSelfAttention(C, 1, R=R, rope=True)(n),
}


@pytest.mark.parametrize("call", NESTED)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name(call, layout):
    parts = [normal(2, C), normal(3, C)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    with pytest.raises(TypeError, match=r"\w+ must be a dense tensor, got a nested one"):
        NESTED[call](nested, normal(C, 3 * H * D))


SPARSE = {
    "decode_attention": lambda q, k, v: ra_triton.decode_attention(q, k, v, CU[1:].to_sparse()),
    "packed_attention_varlen": lambda *t: ra_triton.packed_attention_varlen(
        *(x[0] for x in t), CU.to_sparse(), CU, 3, 3
    ),
}


@pytest.mark.parametrize("call", SPARSE)
def test_integers_that_are_not_dense_are_refused(call):
    with pytest.raises(TypeError, match="must be a dense tensor, got layout"):
        SPARSE[call](*inputs_of(attention))


@pytest.mark.parametrize("function", [layer, project, norm_rope], ids=lambda f: f.__name__)
@pytest.mark.parametrize("changed", range(2))
@pytest.mark.parametrize("mode", [nullcontext, Operators])
def test_a_layer_whose_operand_changes_is_noticed(function, changed, mode):
    leaves = [t.requires_grad_() for t in inputs_of(function)]
    operands = [t * 1 for t in leaves]
    with mode():
        out = function(*operands, backend="triton")
    operands[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_operators_get_what_autocast_multiplies():
    inputs = inputs_of(layer)
    with torch.autocast(DEVICE.type, torch.float16):
        expected = layer(*inputs, backend="triton")
        with Operators():
            got = layer(*inputs, backend="triton")
    assert expected.dtype is torch.float16
    assert_bitwise(got, expected)
