"""Prepared calls: what is known by its key runs as it ran when it was looked at."""

from types import SimpleNamespace

import pytest
import torch
from budget import assert_bitwise
from strategies import DEVICE, normal

import ra_triton
from ra_triton import api, launches, prepared
from ra_triton.backend import triton
from ra_triton.layout import RALayout
from ra_triton.options import AttentionOptions
from ra_triton.workspace import Workspace

C, H = 32, 2


@pytest.fixture(autouse=True)
def nothing_known():
    prepared.forget()
    yield
    prepared.forget()


@pytest.fixture
def spied(monkeypatch):
    """Prepares calls on this device too, as the backend's own ones, and counts what runs how."""
    monkeypatch.setattr(prepared, "DEVICE", DEVICE.type)
    seen = SimpleNamespace(looked_at=0, prepared=0)
    layer = triton.layer

    def looked_at(*args):
        seen.looked_at += 1
        return layer(*args)

    def prepare(x, W, bias, layout, options):
        def call(x, W, bias):
            seen.prepared += 1
            return layer(x, W, bias, layout, options, None).flatten(2)

        return call

    monkeypatch.setattr(triton, "layer", looked_at)
    monkeypatch.setattr(triton, "prepare_layer", prepare)
    return seen


def problem(B=2, T=5, dtype=torch.float32):
    return normal(B, T, C, dtype=dtype), normal(C, 3 * C, scale=C**-0.5, dtype=dtype)


def run(x, W, R=4, **options):
    options = {"n_head": H, "weight_layout": "packed", "backend": "triton", **options}
    return ra_triton.ra_attention(x, W, R, **options)


def test_a_call_is_looked_at_once(spied):
    x, W = problem()
    first = run(x, W)
    for _ in range(3):
        assert_bitwise(run(x.clone(), W.clone()), first)
    assert (spied.looked_at, spied.prepared) == (1, 3)


def _shifted(t, by=1):
    """The same numbers ``by`` elements further on."""
    flat = t.new_empty(t.numel() + by)
    return flat[by:].view(t.shape).copy_(t)


OTHERS = {
    "longer": lambda x, W: run(normal(2, 6, C), W),
    "more sequences": lambda x, W: run(normal(3, 5, C), W),
    "strides of x": lambda x, W: run(torch.cat((x, x), 1)[:, ::2][:, :5], W),
    "address of x": lambda x, W: run(_shifted(x), W),
    "weight transposed": lambda x, W: run(x, W.mT.contiguous().mT),
    "address of W": lambda x, W: run(x, _shifted(W)),
    "bias": lambda x, W: run(x, W, bias=normal(3 * C)),
    "dtype": lambda x, W: run(x.half(), W.half()),
    "R": lambda x, W: run(x, W, R=5),
    "heads": lambda x, W: run(x, W, n_head=1),
    "grouped": lambda x, W: run(x, W, n_head=4, n_kv_head=1),
    "full": lambda x, W: run(x, W, causal=False),
    "scale": lambda x, W: run(x, W, softmax_scale=0.5),
    "window": lambda x, W: run(x, W, window_size=(2, 0)),
    "softcap": lambda x, W: run(x, W, softcap=2.0),
    "sequences": lambda x, W: run(
        x[:1], W, cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32, device=x.device)
    ),
    "automatic": lambda x, W: run(x, W, backend="auto"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_decides_how_a_call_runs_is_in_its_key(spied, other):
    x, W = problem()
    run(x, W)
    OTHERS[other](x, W)
    assert spied.prepared == 0


def test_the_precision_of_products_is_in_the_key(spied, monkeypatch):
    x, W = problem()
    run(x, W)
    monkeypatch.setattr(prepared, "allows_tf32", lambda: True)
    run(x, W)
    assert spied.looked_at == 2


WRONG = {
    "R of another type": {"R": 4.0},
    "R a bool": {"R": True},
    "causal a number": {"causal": 1},
    "softcap a bool": {"softcap": False},
    "dropout a bool": {"dropout_p": False},
    "scale a bool": {"softmax_scale": True},
    "heads of another type": {"n_head": 2.0},
    "window of floats": {"window_size": (-1.0, -1.0)},
    "window unhashable": {"window_size": (-1, [])},
    "options unhashable": {"n_head": [2]},
    "backend unhashable": {"backend": ["triton"]},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_equals_a_known_option_is_still_checked(spied, wrong):
    x, W = problem()
    run(x, W, R=1, softmax_scale=1.0), run(x, W)
    with pytest.raises((TypeError, ValueError)):
        run(x, W, **WRONG[wrong])
    assert spied.prepared == 0


def test_calls_that_something_looks_at_are_not_prepared(spied):
    x, W = problem()
    run(x, W)
    leaf = W.clone().requires_grad_()
    assert run(x, leaf).requires_grad
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert run(x, W).dtype == torch.bfloat16
    with pytest.raises(NotImplementedError), torch.autograd.forward_ad.dual_level():
        run(torch.autograd.forward_ad.make_dual(x, x), W)
    torch.func.vmap(lambda x: run(x, W), randomness="error")(x[None])
    run(x, W, workspace=Workspace())
    run(x, W, weight_layout="split")
    assert spied.prepared == 0
    with torch.no_grad():
        run(x, leaf)
    assert spied.prepared == 1


def test_a_recorded_call_is_checked_once(spied, monkeypatch):
    checked, check = [], api._projection_layout
    monkeypatch.setattr(api, "_projection_layout", lambda *args: checked.append(0) or check(*args))
    x, W = problem()
    results = []
    for _ in range(3):
        leaves = x.clone().requires_grad_(), W.clone().requires_grad_()
        out = run(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    assert len(checked) == 1
    for got, first in zip(results[-1], results[0], strict=True):
        assert_bitwise(got, first)
    with torch.no_grad():
        assert not run(*leaves).requires_grad
    assert (len(checked), spied.prepared) == (2, 0)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_dropout_draws_anew_in_a_known_call(spied, backend):
    x, W = problem()
    leaf = W.clone().requires_grad_()
    first, second, third = (run(x, leaf, dropout_p=0.5, backend=backend) for _ in range(3))
    assert not torch.equal(second, third)
    assert not torch.equal(first, second)


def test_no_more_calls_are_known_than_fit(spied, monkeypatch):
    monkeypatch.setattr(prepared, "CALLS", 2)
    x, W = problem()
    for R in range(5):
        run(x, W, R=R)
        assert len(prepared._known) <= 2


@pytest.mark.parametrize(("H", "H_kv", "D", "T"), [(2, 2, 16, 5), (4, 2, 24, 7), (3, 1, 17, 3)])
def test_a_prepared_layer_launches_on_the_places_of_the_views(monkeypatch, H, H_kv, D, T):
    """With plans that look only at addresses, as compiled ones do."""
    import ra_triton.kernels.attention_forward as forward
    import ra_triton.kernels.projection as projection

    layout = RALayout(H, H_kv, D, 4)
    x, W = normal(2, T, C, dtype=torch.float16), normal(C, layout.columns, dtype=torch.float16)
    planned, launched = {}, []

    def plan(name):
        def of(*args):
            planned[name] = args
            return lambda *tensors: launched.append((name, tensors))

        return of

    monkeypatch.setattr(projection, "projection_plan", plan("projection"))
    monkeypatch.setattr(forward, "forward_plan", plan("attention"))
    options = AttentionOptions(False, 0.5, window_size=(3, 1), softcap=2.0)
    layer = launches.PreparedLayer(x, W, None, layout, options)
    allocated = []
    new_empty = torch.Tensor.new_empty

    def allocate(*args):
        allocated.append(new_empty(*args))
        return allocated[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)
    out = layer(x, W, None)
    assert out.shape == (2, T, H * D)
    assert planned["attention"][6:] == (False, 0.5, (3, 1), 2.0)
    (first, (x_, W_, bias, packed)), (second, (q, k, v, *none, o, lse)) = launched
    assert (first, second) == ("projection", "attention")
    assert (x_ is x, W_ is W, bias, none, o is out) == (True, True, None, [None] * 3, True)
    assert any(t is out for t in allocated)
    (scratch,) = (t for t in allocated if t is not out)
    start = scratch.data_ptr()
    assert start == packed.data_ptr() == q.data_ptr()
    views = layout.views(scratch[: 2 * T * layout.columns].view(2, T, -1))
    assert [k.data_ptr(), v.data_ptr()] == [t.data_ptr() for t in views[1:]]
    assert (lse.data_ptr() - start) % 16 == 0
    assert lse.data_ptr() >= start + 2 * T * layout.columns * 2
    assert lse.data_ptr() + 4 * 2 * H * T <= start + scratch.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_prepared_calls_have_the_bits_of_the_first(dtype, bias):
    for B, T, heads, D, H_kv in ((2, 100, 3, 64, 3), (1, 33, 4, 17, 2), (3, 1, 2, 128, 1)):
        x = normal(B, T, 64, dtype=dtype)
        columns = (heads + 2 * H_kv) * D
        W = normal(64, columns, scale=0.125, dtype=dtype)
        options = {"n_head": heads, "n_kv_head": H_kv, "weight_layout": "packed"}
        options |= {"bias": normal(columns, dtype=dtype) if bias else None, "backend": "triton"}
        first = ra_triton.ra_attention(x, W, 4, **options)
        assert len(prepared._known) == 1
        for _ in range(3):
            assert_bitwise(ra_triton.ra_attention(x.clone(), W.clone(), 4, **options), first)
        assert len(prepared._known) == 1
        prepared.forget()


@pytest.mark.gpu
def test_prepared_calls_follow_streams_and_graphs():
    x, W = normal(2, 64, 384, dtype=torch.float16), normal(384, 1152, dtype=torch.float16)
    options = {"weight_layout": "packed", "backend": "triton"}
    first = ra_triton.ra_attention(x, W, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = ra_triton.ra_attention(x, W, **options)
    torch.cuda.current_stream().wait_stream(stream)
    assert_bitwise(again, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ra_triton.ra_attention(x, W, **options)
    x.copy_(x.flip(0))
    graph.replay()
    assert_bitwise(captured, first.flip(0))
