"""Tables, masks and buffers that outlive a call are ordinary tensors, whatever came before."""

import pytest
import torch
from budget import assert_bitwise
from layers import C, layer
from strategies import DEVICE, backends, normal
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ra_triton.backend import flex
from ra_triton.checks import may_keep
from ra_triton.nn import Workspace


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def under_fake_tensors(f):
    with FakeTensorMode(allow_non_fake_inputs=True):
        f(torch.zeros(2, device=DEVICE))


def under_a_dispatch_mode(f):
    with Watching():
        f(torch.zeros(2, device=DEVICE))


def in_inference_mode(f):
    with torch.inference_mode():
        f(torch.zeros(2, device=DEVICE))


ONE = torch.ones(2, device=DEVICE)
TRACERS = {
    "grad": lambda f: torch.func.grad(lambda z: f(z).sum())(ONE),
    "vjp": lambda f: torch.func.vjp(f, ONE)[1](ONE),
    "jvp": lambda f: torch.func.jvp(f, (ONE,), (ONE,)),
    "vmap": lambda f: torch.func.vmap(f)(ONE[None]),
    "functionalize": lambda f: torch.func.functionalize(f)(ONE),
    "make_fx": lambda f: make_fx(f)(ONE),
    "make_fx, fake": lambda f: make_fx(f, tracing_mode="fake")(ONE),
    "fake tensors": under_fake_tensors,
    "dispatch mode": under_a_dispatch_mode,
    "compile": lambda f: torch.compile(f, backend="aot_eager")(ONE),
    "jit.trace": lambda f: torch.jit.trace(f, ONE, check_trace=False),
    "inference mode": in_inference_mode,
}


def assert_ordinary(t, length):
    """It computes, trains, and can be kept for any later call."""
    assert type(t) is torch.Tensor
    assert not t.is_inference()
    assert not torch._C._functorch.is_functorch_wrapped_tensor(t)
    t = t[:length].double()
    assert (torch.ones_like(t, requires_grad=True) * t).sum().isfinite()


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.filterwarnings("ignore")
def test_nothing_of_a_tracer_is_kept(tracer):
    rope, workspace = layer("free", rope=True).rope, Workspace()
    flex._mask.cache_clear()
    flex._cap.cache_clear()
    sizes = 7, 7, -1, 0, DEVICE

    def keepers(z):
        rope.rows(5, DEVICE)
        workspace.buffer("name", (4,), torch.float32, DEVICE)
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            with torch.inference_mode(False):  # as the backend makes them
                flex.kept(flex._mask, DEVICE)(*sizes)
                flex.kept(flex._cap, DEVICE)(2.0, DEVICE)
        return 2.0 * z

    TRACERS[tracer](keepers)
    for tables in rope._kept.values():
        for t in tables:
            assert_ordinary(t, 5)
    for t in workspace._storages().values():
        assert_ordinary(t.nan_to_num(), 4)
    keeps = tracer == "inference mode"
    assert flex._mask.cache_info().currsize == flex._cap.cache_info().currsize == int(keeps)
    assert len(rope._kept) == len(workspace._storages()) == int(keeps)
    for t in flex.kept(flex._mask, DEVICE)(*sizes).as_tuple():
        if isinstance(t, torch.Tensor):
            assert_ordinary(t, 1)
    assert_bitwise(
        rope.rows(5, DEVICE)[0][:5], layer("free", rope=True).rope.rows(5, DEVICE)[0][:5]
    )


def test_what_is_kept_is_used_again_and_only_in_ordinary_calls():
    rope = layer("free", rope=True).rope
    first = rope.rows(5, DEVICE)
    assert rope.rows(5, DEVICE) is first
    with Watching():
        assert rope.rows(5, DEVICE) is not first
    assert flex.kept(flex._mask, DEVICE)(9, 9, -1, 0, DEVICE) is flex._mask(9, 9, -1, 0, DEVICE)


def test_ordinary_calls_may_keep(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert may_keep(DEVICE)
    assert may_keep(device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not may_keep(device)
    assert may_keep(torch.device("cpu"))


@backends
@pytest.mark.parametrize("kind", ["free", "composed"])
def test_a_layer_is_as_before_after_a_transform_of_its_input(backend, kind):
    options = {"rope": True, "qk_norm": True, "backend": backend}
    module = layer(kind, **options).eval().requires_grad_(False)
    x, other = normal(2, 9, C), layer(kind, **options).eval()
    torch.func.grad(lambda z: module(z).sum())(x)
    module.requires_grad_(True)
    assert_bitwise(module(x).detach(), other(x).detach())
    module(x).sum().backward()
    assert module.c_proj.weight.grad.isfinite().all()


# What is float32 stays it


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_nothing_of_a_layer_that_there_is(backend, dtype):
    options = {"rope": True, "rope_dims": 8, "qk_norm": True, "backend": backend}
    module, x = layer(**options).eval(), normal(2, 20, C)
    with torch.no_grad():
        out, share = module(x), module.reciprocal_share(x)
        module.rope._kept.clear()
        torch.set_default_dtype(dtype)
        try:
            again, other = module(x), module.reciprocal_share(x)
        finally:
            torch.set_default_dtype(torch.float32)
    assert_bitwise(again, out)
    assert other.dtype == torch.float32
    assert_bitwise(other, share)
