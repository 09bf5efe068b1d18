"""What is put around c_attn, q_norm and k_norm: it runs, is attended to, and gets its gradient."""

import copy
import itertools
import warnings

import pytest
import torch
from budget import assert_bitwise
from layers import C, D, H, assert_rounded, layer, parametrisations
from strategies import DEVICE, backends, normal
from torch import nn
from torch.nn.modules import module as everywhere
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from ra_triton.nn import KVCache, from_gpt2, to_gpt2, to_llama
from ref import reciprocal_attention as ref

N = 3 * C
KINDS = ("forward_pre", "forward", "full_backward_pre", "full_backward")  # of hooks
CHILDREN = ("c_attn", "q_norm", "k_norm")


class Adapted(nn.Module):
    """A low-rank adapter around a linear layer, as fine-tuning libraries make them."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = (nn.Parameter(normal(*s, seed=7, scale=0.2)) for s in ((C, 2), (2, N)))

    @property
    def weight(self):  # libraries forward attributes to what they wrap
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + x @ self.A @ self.B


class Scaled(nn.Module):
    def forward(self, weight):
        return 3.0 * weight


def adapted(module):
    module.c_attn = Adapted(module.c_attn)


def with_offload(module):
    """Numbers that are there between the hooks alone."""
    child = module.c_attn
    real = {name: p.detach().clone() for name, p in child.named_parameters()}

    def put(make):
        for name, t in real.items():
            child._parameters[name] = nn.Parameter(make(t), requires_grad=False)

    def drop(*_):
        put(lambda t: t.to("meta"))

    child.register_forward_pre_hook(lambda *_: put(lambda t: t))
    child.register_forward_hook(drop)
    drop()


def patched(module):
    forward = module.c_attn.forward
    module.c_attn.forward = lambda x: 2.0 * forward(x)


def subclassed(module):
    class Doubled(type(module.c_attn)):
        def forward(self, x):
            return 2.0 * super().forward(x)

    module.c_attn.__class__ = Doubled


CHANGES = {
    "adapter": adapted,
    "offload": with_offload,
    "patched_forward": patched,
    "subclass": subclassed,
    "changing_hook": lambda m: m.c_attn.register_forward_hook(lambda *a: 2.0 * a[2]),
    "changing_pre_hook": lambda m: m.c_attn.register_forward_pre_hook(lambda m, x: 2.0 * x[0]),
}
OF_A_WEIGHT = {
    "prune": lambda m, name: prune.l1_unstructured(m, name, amount=0.5),
    "spectral_norm": lambda m, name: spectral_norm(m, name),
    "spectral": lambda m, name: parametrizations.spectral_norm(m, name),
    "weight_norm": lambda m, name: parametrizations.weight_norm(m, name),
    "orthogonal": lambda m, name: parametrizations.orthogonal(m, name),
    "scaled": lambda m, name: parametrize.register_parametrization(m, name, Scaled()),
}


def attended(module, x):
    """The layer in float64, from what c_attn returns when it is called."""
    packed = module.c_attn(x).double().unflatten(-1, (3, H, D)).unbind(2)
    y = ref.packed_attention(*packed)[0].flatten(2)
    return nn.functional.linear(y, *(p.double() for p in module.c_proj.parameters()))


@backends
@parametrisations
@pytest.mark.parametrize("change", CHANGES)
def test_attention_reads_what_the_changed_child_returns(backend, parametrisation, change):
    module, x = layer(parametrisation, backend=backend).eval(), normal(2, 9, C)
    with torch.no_grad():
        before = module(x)
        CHANGES[change](module)
        after = module(x)
        assert_rounded(after, attended(module, x), change)
        if change == "offload":
            assert_rounded(after, before.double(), change)
        else:
            assert (after - before).abs().max() > 0.1 * before.abs().max()
        assert_rounded(in_two_chunks(module, x), after.double(), "with a cache")


def in_two_chunks(module, x):
    cache = KVCache(len(x), x.shape[1], H, D, device=DEVICE)
    return torch.cat([module(piece, cache) for piece in x.split(5, dim=1)], 1)


@pytest.mark.parametrize(
    ("backend", "change"), [*(("sdpa", name) for name in OF_A_WEIGHT), ("triton", "scaled")]
)
@pytest.mark.parametrize(("parametrisation", "name"), [("free", "weight"), ("composed", "W_k")])
def test_a_reparametrised_weight_is_fresh_on_each_step_and_trains(
    backend, change, parametrisation, name
):
    module, x = layer(parametrisation, backend=backend), normal(2, 9, C)
    OF_A_WEIGHT[change](module.c_attn, name)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
        seen.append(module.eval()(x).detach())
        assert_rounded(seen[-1], attended(module, x).detach(), change)
        module.train()
    names = dict(module.c_attn.named_parameters())
    for n, p in names.items():
        assert p.grad is not None, n
        assert (p.grad != 0).any() or n.startswith("b_"), n
    assert any(name in n for n in names)
    assert all((a != b).any() for a, b in itertools.pairwise(seen))


@backends
@pytest.mark.parametrize("kind", KINDS)
@parametrisations
def test_hooks_run_and_change_no_more_than_the_last_bits(backend, parametrisation, kind):
    options = {"qk_norm": True, "rope": True, "backend": backend}
    module, x = layer(parametrisation, **options), normal(2, 9, C)
    plain, ran, handles = module(x), [], []
    for name in (*CHILDREN, "c_proj"):
        register = getattr(getattr(module, name), f"register_{kind}_hook")
        handles.append(register(lambda *_, name=name: ran.append(name)))
    out = module(x)
    out.square().sum().backward()
    assert_rounded(out, plain.double(), "output")
    assert sorted(ran) == sorted((*CHILDREN, "c_proj"))
    for handle in handles:
        handle.remove()
    assert_bitwise(module(x), plain)


@pytest.mark.parametrize("register", KINDS)
def test_hooks_of_all_modules_see_the_children(register):
    module, x, seen = layer(qk_norm=True), normal(2, 9, C), []
    handle = getattr(everywhere, f"register_module_{register}_hook")(
        lambda m, *_: seen.append(m) and None
    )
    try:
        module(x).sum().backward()
    finally:
        handle.remove()
    for name in (*CHILDREN, "c_proj"):
        assert any(m is getattr(module, name) for m in seen), name


@backends
@parametrisations
def test_a_plain_child_is_read(backend, parametrisation, monkeypatch):
    """Else the fused kernels would be left without a word."""
    module, x = layer(parametrisation, qk_norm=True, backend=backend), normal(2, 9, C)
    called = []
    for kind in {nn.Linear, nn.RMSNorm, type(module.c_attn)}:
        forward = kind.forward
        monkeypatch.setattr(
            kind, "forward", lambda m, x, forward=forward: called.append(m) or forward(m, x)
        )
    module(x)
    assert len(called) == 1
    assert called[0] is module.c_proj


@parametrisations
def test_a_compiled_child_is_called(parametrisation):
    x, called = normal(2, 9, C), []
    for place in ("around", "within"):
        torch._dynamo.reset()
        module = layer(parametrisation).eval()
        expected = module(x)
        if place == "around":
            child = module.c_attn = torch.compile(module.c_attn, backend="eager")
            child.register_forward_hook(lambda *_: called.append("around") and None)
        else:
            child = module.c_attn
            child.compile(backend="eager")
            call = child._compiled_call_impl
            child._compiled_call_impl = lambda x, call=call: called.append("within") or call(x)
        assert_rounded(module(x), expected.double(), "output")
    assert called == ["around", "within"]


@pytest.mark.parametrize("which", ["all", "reciprocal"])
@pytest.mark.parametrize("activations", ["none", "int8"])
def test_an_int8_child_with_a_hook_multiplies_as_it_does_without(which, activations):
    module, x = layer().eval().quantize_(which, activations=activations), normal(2, 9, C)
    with torch.no_grad():
        plain, ran = module(x), []
        module.c_attn.register_forward_hook(lambda *_: ran.append(1) and None)
        assert_rounded(module(x), plain.double(), "output")
    assert ran == [1]


def test_a_dynamically_quantized_child_is_called():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engines = set(torch.backends.quantized.supported_engines) - {"none"}
        if DEVICE.type != "cpu" or not engines:
            pytest.skip("PyTorch's dynamic quantization is for CPUs with an engine for it")
        module, x = layer("free").eval(), normal(2, 9, C)
        quantized = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    assert type(quantized.c_attn) is not nn.Linear
    quantized.c_proj = module.c_proj  # its rounding would hide small errors
    with torch.no_grad():
        assert_rounded(quantized(x), attended(quantized, x), "output")
        assert (quantized(x) != module(x)).any()


@parametrisations
def test_autocast_is_the_called_childs_own(parametrisation):
    module, x = layer(parametrisation, rope=True, qk_norm=True).eval(), normal(2, 9, C)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        plain = module(x)
        for name in CHILDREN:
            getattr(module, name).register_forward_hook(lambda *_: None)
        called = module(x)
    assert called.dtype == plain.dtype == torch.bfloat16
    exact = layer(parametrisation, rope=True, qk_norm=True).eval()(x).detach()
    errors = [(t.float() - exact).square().mean().sqrt() for t in (plain, called)]
    assert errors[1] <= 2 * errors[0]


@parametrisations
def test_a_layer_with_hooks_compiles_without_a_graph_break(parametrisation):
    torch._dynamo.reset()
    module, x = layer(parametrisation, qk_norm=True, rope=True), normal(2, 9, C)
    for name in CHILDREN:
        getattr(module, name).register_forward_hook(lambda *a: 2.0 * a[2])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_rounded(compiled(x), module(x).double(), "output")


# Norms


def normed(module, x, q_norm, k_norm):
    """The layer in float64 around two functions of packed heads."""
    q, k, v = (x @ module.c_attn.weight.mT + module.c_attn.bias).unflatten(-1, (3, H, D)).unbind(2)
    q, k = q_norm(q).double(), k_norm(k).double()
    cos, sin = (t[None, :9].double() for t in module.rope.rows(9, DEVICE))
    q, k = (ref.norm_rope(t, weight=None, eps=None, cos=cos, sin=sin) for t in (q, k))
    y = ref.packed_attention(q, k, v.double())[0].flatten(2)
    return nn.functional.linear(y, *(p.double() for p in module.c_proj.parameters()))


NORMS = {
    "layer norms": (nn.LayerNorm(D), nn.LayerNorm(D)),
    "identity": (nn.Identity(), nn.Identity()),
    "another eps": (nn.RMSNorm(D, 1e-6), nn.RMSNorm(D, 0.5)),
    "eps of the dtype": (nn.RMSNorm(D), nn.RMSNorm(D)),
    "no weight": (nn.RMSNorm(D, 1e-6, elementwise_affine=False), nn.RMSNorm(D, 1e-6)),
    "keys alone": (None, nn.RMSNorm(D, 1e-6)),
    "one of the kernel's": (nn.RMSNorm(D, 1e-6), nn.LayerNorm(D)),
}


@backends
@pytest.mark.parametrize("norms", NORMS)
def test_any_norm_is_called_on_packed_heads_before_rotation(backend, norms):
    module, x = layer("free", rope=True, qk_norm=True, backend=backend).eval(), normal(2, 9, C)
    given = copy.deepcopy(NORMS[norms])
    for norm in given:
        for i, p in enumerate(norm.parameters() if norm is not None else ()):
            p.data = 1.0 + normal(*p.shape, seed=i, scale=0.5).cpu()
    module.q_norm, module.k_norm = (None if n is None else n.to(DEVICE) for n in given)
    with torch.no_grad():
        functions = [n or (lambda t: t) for n in (module.q_norm, module.k_norm)]
        assert_rounded(module(x), normed(module, x, *functions), norms)


@backends
def test_what_a_hook_has_kept_is_not_overwritten(backend):
    """Without gradients packed heads are rotated in place, but only those of the call itself."""
    for around in (("c_attn",), ("q_norm",)):
        module, x = layer("free", rope=True, qk_norm=True, backend=backend).eval(), normal(2, 9, C)
        kept = []
        for name in around:
            getattr(module, name).register_forward_hook(
                lambda *a, kept=kept: kept.append((a[2], a[2].clone())) and None
            )
        with torch.no_grad():
            module(x)
        for now, then in kept:
            assert_bitwise(now, then)


# What children return, and what cannot be read


@pytest.mark.parametrize(
    ("name", "make", "error", "match"),
    [
        ("c_attn", lambda y: (y, None), TypeError, "what c_attn returns must be a tensor, got tup"),
        ("c_attn", lambda y: y[..., :-1], ValueError, r"what c_attn returns must be \[B, T, N\] in "
         r"packed order = \(2, 9, 144\), got \(2, 9, 143\)"),
        ("c_attn", lambda y: y.half(), TypeError, "what c_attn returns must be torch.float32, got"),
        ("q_norm", lambda y: y.flatten(2), ValueError, r"what q_norm returns must be \[B, T, H, D"),
        ("k_norm", lambda y: y.long(), TypeError, "what k_norm returns must be a floating-point"),
        ("k_norm", lambda y: [y], TypeError, "what k_norm returns must be a tensor, got list"),
    ],
)  # fmt: skip
def test_what_a_child_returns_is_checked(name, make, error, match):
    module = layer(qk_norm=True)
    getattr(module, name).register_forward_hook(lambda *a: make(a[2]))
    with pytest.raises(error, match=match):
        module(normal(2, 9, C))


@pytest.mark.parametrize("change", CHANGES)
@parametrisations
def test_a_weight_that_is_not_all_is_never_read(parametrisation, change):
    module, state = layer(parametrisation).eval(), to_gpt2(layer("free"))
    CHANGES[change](module)
    before, reads = module.c_attn, [module.fused_weight, lambda: module.quantize_("all")]
    reads += [lambda: to_gpt2(module), lambda: from_gpt2(module, state)]
    for read in (*reads, *([module.fuse_] if parametrisation == "composed" else [])):
        with pytest.raises(ValueError, match="has no W_fused to read"):
            read()
        assert module.c_attn is before


def test_no_llama_is_made_of_an_adapter_and_one_of_its_merged_weight_is():
    module, x = layer("free", rope=True).eval(), normal(2, 9, C)
    adapted(module)
    with pytest.raises(ValueError, match="c_attn, a Adapted, has no W_fused to read"):
        to_llama(module)
    with torch.no_grad():
        expected, child = module(x), module.c_attn
        child.base.weight += (child.A @ child.B).mT
        module.c_attn = child.base
        to_llama(module)
        assert_rounded(module(x), expected.double(), "merged")


@backends
@parametrisations
def test_an_adapter_that_is_zero_changes_nothing_and_learns(backend, parametrisation):
    module, x = layer(parametrisation, backend=backend), normal(2, 9, C)
    plain = module(x)
    adapted(module)
    with torch.no_grad():
        module.c_attn.B.zero_()
    out = module(x)
    assert_rounded(out, plain.double(), "output")
    out.square().sum().backward()
    assert (module.c_attn.B.grad != 0).all()
    assert all(p.grad is None for p in module.c_attn.base.parameters())


def test_watching_alone_leaves_a_weight_readable():
    module = layer("free")
    module.c_attn.register_full_backward_hook(lambda *_: None)
    assert module.fused_weight()[0].shape == (C, N)


def test_a_weight_of_another_tensor_type_is_left_to_its_own_product():
    """Sharded and quantized tensors know how to multiply; their bytes are not the numbers."""

    class Coded(torch.Tensor):
        def __tensor_flatten__(self):
            return [], None

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is nn.functional.linear:
                x, weight, bias = args
                return function(x, 2.0 * weight.as_subclass(torch.Tensor), bias)
            return super().__torch_function__(function, types, args, kwargs or {})

    module, x = layer("free", bias=False).eval(), normal(2, 9, C)
    with torch.no_grad():
        doubled = copy.deepcopy(module)
        doubled.c_attn.weight *= 2.0
        coded = module.c_attn.weight.detach().as_subclass(Coded)
        del module.c_attn.weight
        module.c_attn.weight = coded
        assert module._plain_weight() is None
        assert_bitwise(module(x), doubled(x))
