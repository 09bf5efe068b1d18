"""Recorded calls: what is known by its key runs as it ran when it was checked and planned."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from budget import assert_bitwise
from strategies import DEVICE, normal
from torch.utils._python_dispatch import _disable_current_modes

import ra_triton
from ra_triton import api
from ra_triton.backend import triton
from ra_triton.launch import recorded
from ra_triton.launch.plans import Plan
from ra_triton.workspace import Workspace

C, H = 32, 2


@pytest.fixture(autouse=True)
def nothing_known():
    recorded.forget()
    yield
    recorded.forget()


@pytest.fixture
def spied(monkeypatch):
    """Keeps calls on this device too; counts those that are checked and those that are known."""
    monkeypatch.setattr(recorded, "DEVICE", DEVICE.type)
    seen = SimpleNamespace(checked=0, known=0)
    check, known = api._projection_layout, recorded.known

    def checked(*args, **options):
        seen.checked += 1
        return check(*args, **options)

    def counted(key):
        call = known(key)
        seen.known += call is not None
        return call

    monkeypatch.setattr(api, "_projection_layout", checked)
    monkeypatch.setattr(recorded, "known", counted)
    return seen


def _at(address, shape, strides, dtype):
    """The tensor that lies there."""
    size = 1 + sum(stride * (n - 1) for n, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


@pytest.fixture
def taped(monkeypatch):
    """Plans that launch at addresses in the interpreter too, as compiled ones do; counts both."""
    monkeypatch.setattr(recorded, "DEVICE", DEVICE.type)
    counts = SimpleNamespace(by_tensors=0, by_addresses=0)
    if DEVICE.type == "cuda":
        return None
    layouts, call = {}, Plan.__call__

    def run(plan, *tensors):
        counts.by_tensors += 1
        layouts[plan] = [None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]
        with _disable_current_modes():  # the interpreter computes with torch
            call(plan, *tensors)

    def on(plan, places):
        like = layouts[plan]

        def launch(addresses):
            counts.by_addresses += 1
            pairs = zip(places, like, strict=True)
            plan._compile(
                *(None if p is None else _at(addresses[p[0]] + p[1], *t) for p, t in pairs)
            )

        return launch, launch

    monkeypatch.setattr(Plan, "__call__", run)
    monkeypatch.setattr(Plan, "on", on)
    return counts


def problem(B=2, T=5, dtype=torch.float32):
    return normal(B, T, C, dtype=dtype), normal(C, 3 * C, scale=C**-0.5, dtype=dtype)


def run(x, W, R=4, **options):
    options = {"n_head": H, "weight_layout": "packed", "backend": "triton", **options}
    return ra_triton.ra_attention(x, W, R, **options)


# Keys


def test_a_call_is_checked_once(spied):
    x, W = problem()
    first = run(x, W)
    for _ in range(3):
        assert_bitwise(run(x.clone(), W.clone()), first)
    assert (spied.checked, spied.known) == (1, 3)


def _shifted(t, by=1):
    """The same numbers ``by`` elements further on."""
    flat = t.new_empty(t.numel() + by)
    return flat[by:].view(t.shape).copy_(t)


def autocast(dtype, x, W, **options):
    with torch.autocast(DEVICE.type, dtype):
        return run(x, W, **options)


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
    "gradient": lambda x, W: run(x, W.clone().requires_grad_()),
    "autocast": lambda x, W: autocast(torch.bfloat16, x, W),
}


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_decides_how_a_call_runs_is_in_its_key(spied, other):
    x, W = problem()
    run(x, W)
    OTHERS[other](x, W)
    assert spied.known == 0


def test_the_precision_of_products_is_in_the_key(spied, monkeypatch):
    x, W = problem()
    run(x, W)
    monkeypatch.setattr(recorded, "allows_tf32", lambda: True)
    run(x, W)
    assert spied.checked == 2


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
    assert spied.known == 0


def test_calls_that_something_observes_are_not_known(spied):
    x, W = problem()
    run(x, W)
    with pytest.raises(NotImplementedError), torch.autograd.forward_ad.dual_level():
        run(torch.autograd.forward_ad.make_dual(x, x), W)
    torch.func.vmap(lambda x: run(x, W), randomness="error")(x[None])
    run(x, W, workspace=Workspace())
    run(x, W, weight_layout="split")
    assert spied.known == 0
    leaf = W.clone().requires_grad_()
    with torch.no_grad():
        run(x, leaf)
    assert spied.known == 1


def test_the_dtype_of_autocast_is_in_the_key(spied):
    x, W = problem()
    for _ in range(2):
        for dtype in (torch.float16, torch.bfloat16):
            assert autocast(dtype, x, W).dtype is dtype
    assert (spied.checked, spied.known) == (2, 2)


@pytest.mark.parametrize("autocast_to", [None, torch.float16])
def test_a_call_with_a_gradient_is_checked_once(spied, autocast_to):
    x, W = problem()
    results = []
    for _ in range(3):
        leaves = x.clone().requires_grad_(), W.clone().requires_grad_()
        out = run(*leaves) if autocast_to is None else autocast(autocast_to, *leaves)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    assert (spied.checked, spied.known) == (1, 2)
    for result in results[1:]:
        for got, first in zip(result, results[0], strict=True):
            assert_bitwise(got, first)
    with torch.no_grad():
        assert not run(*leaves).requires_grad
    assert (spied.checked, spied.known) == (2, 2)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_dropout_draws_anew_in_a_known_call(spied, backend):
    x, W = problem()
    leaf = W.clone().requires_grad_()
    first, second, third = (run(x, leaf, dropout_p=0.5, backend=backend) for _ in range(3))
    assert not torch.equal(second, third)
    assert not torch.equal(first, second)


def test_a_known_call_over_sequences_has_the_bits_of_the_first(spied):
    x, W = problem(B=1, T=7)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)
    options = {"cu_seqlens": cu_seqlens, "max_seqlen": 3, "check": False}
    first = run(x, W, **options)
    for _ in range(2):
        assert_bitwise(run(x.clone(), W, **options), first)
    assert (spied.checked, spied.known) == (1, 2)
    assert not first[:, 5:].any()  # tokens of no sequence
    run(x, W, **{**options, "max_seqlen": 4})
    with pytest.raises(ValueError, match="must end with the number of tokens 7, got 5"):
        run(x, W, **{**options, "check": True})
    assert spied.known == 2


DECODING = ({"max_length": 5}, {"window_size": (2, 0)}, {"softcap": 2.0}, {"softmax_scale": 0.5})


def test_a_known_decoding_call_has_the_bits_of_the_first(spied):
    q, k, v = (normal(2, T, H, 16, seed=i) for i, T in enumerate((1, 9, 9)))
    lengths = torch.tensor([4, 5], dtype=torch.int32, device=DEVICE)

    def decode(**options):
        options = {"max_length": 9, "backend": "triton", **options}
        return ra_triton.decode_attention(q, k, v, lengths, **options)

    first = decode()
    assert_bitwise(decode(), first)
    assert spied.known == 1
    for other in DECODING:
        decode(**other)
    for _ in range(2):
        with torch.autocast(DEVICE.type, torch.float16):
            assert decode().dtype is torch.float16
    assert spied.known == 1
    lengths -= 1  # is read by the kernel alone
    later = decode()
    assert spied.known == 2
    recorded.forget()
    assert_bitwise(later, decode())


def test_no_more_calls_are_known_than_fit(spied, monkeypatch):
    monkeypatch.setattr(recorded, "CALLS", 2)
    x, W = problem()
    for R in range(5):
        run(x, W, R=R)
        assert len(recorded._known) <= 2


# Tapes: the same launches at other addresses


def layer(x, W, bias, **options):
    return run(x, W, bias=bias, **options)


def transposed(x, W, bias):
    return run(x, W.mT.contiguous().mT, bias=bias)


def grouped(x, W, bias):
    return run(x, W, n_head=4, n_kv_head=1, bias=bias)


def project(x, W, bias):
    options = {"n_head": H, "bias": bias, "weight_layout": "packed", "backend": "triton"}
    return torch.cat(ra_triton.project(x, W, 4, **options), 2)


def attention(q, k, v, **options):
    return ra_triton.packed_attention(q, k, v, backend="triton", **options)


def with_lse(q, k, v):
    out, lse = attention(q, k, v, return_lse=True, causal=False)
    return torch.cat((out.flatten(), lse.flatten()))


def dropped(x, W, bias):
    torch.manual_seed(3)
    return layer(x, W, bias, dropout_p=0.3)


def dropped_attention(q, k, v):
    torch.manual_seed(3)
    return attention(q, k, v, dropout_p=0.3)


def windowed(x, W, bias):
    return layer(x, W, bias, window_size=(2, 0), softcap=3.0)


def halves(x, W, bias):
    with torch.autocast(DEVICE.type, torch.float16):
        return layer(x, W, bias)


OF_WEIGHTS = (layer, transposed, grouped, project, dropped, windowed, halves)
OF_OPERANDS = (attention, with_lse, dropped_attention)
FUNCTIONS = (*OF_WEIGHTS, *OF_OPERANDS)
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def inputs_of(function, seed):
    if function in OF_OPERANDS:
        return [normal(2, 5, H, 16, seed=seed + i) for i in range(3)]
    shapes = (2, 5, C), (C, 6 * 16), (6 * 16,)
    return [normal(*s, seed=seed + i, scale=0.3) for i, s in enumerate(shapes)]


@functions
def test_a_repeated_call_launches_from_its_tape_with_the_bits_of_the_first(taped, function):
    seeds = (0, 10, 20)
    expected = {}
    for seed in seeds:
        recorded.forget()
        expected[seed] = function(*inputs_of(function, seed))
    recorded.forget()
    for i in range(3):  # checked, recorded, repeated
        for seed in seeds[: 1 + 2 * (i == 2)]:
            if taped:
                taped.by_tensors = taped.by_addresses = 0
            assert_bitwise(function(*inputs_of(function, seed)), expected[seed])
            if taped:
                assert bool(taped.by_addresses) == (i == 2)
                assert bool(taped.by_tensors) == (i < 2)


@functions
def test_a_training_step_launches_from_tapes_with_the_bits_of_the_first(taped, function):
    def step(seed):
        leaves = [t.requires_grad_() for t in inputs_of(function, seed)]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)

    seeds = (0, 10, 20)
    expected = {}
    for seed in seeds:
        recorded.forget()
        expected[seed] = step(seed)
    recorded.forget()
    step(0), step(0)
    for seed in seeds:
        if taped:
            taped.by_tensors = taped.by_addresses = 0
        for got, want in zip(step(seed), expected[seed], strict=True):
            assert_bitwise(got, want)
        if taped:
            assert taped.by_tensors == 0
            assert taped.by_addresses >= 4


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_other_gradients_have_other_tapes(taped, needed):
    for _ in range(3):
        inputs = inputs_of(layer, 0)
        some = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        got = torch.autograd.grad(layer(*some).square().sum(), [some[i] for i in needed])
        everything = [t.clone().requires_grad_() for t in inputs]
        expected = torch.autograd.grad(layer(*everything).square().sum(), everything)
        for grad, i in zip(got, needed, strict=True):
            assert_bitwise(grad, expected[i])


def test_incoming_gradients_in_other_layouts_have_other_tapes(taped):
    grad = normal(2, 5, C, seed=7)
    layouts = (grad, torch.stack((grad, grad), -1)[..., 0], grad.mT.contiguous().mT, _shifted(grad))
    leaves = [t.requires_grad_() for t in inputs_of(layer, 0)]
    expected = torch.autograd.grad(layer(*leaves), leaves, grad)
    for _ in range(3):
        for other in layouts:
            for got, want in zip(
                torch.autograd.grad(layer(*leaves), leaves, other), expected, strict=True
            ):
                assert_bitwise(got, want)


def test_saved_tensors_may_come_back_elsewhere(taped):
    """Hooks on saved tensors return copies, which lie otherwise than what was saved."""

    def step():
        leaves = inputs_of(layer, 0)
        leaves[1] = leaves[1].mT.contiguous().mT
        leaves = [t.requires_grad_() for t in leaves]
        return torch.autograd.grad(layer(*leaves).square().sum(), leaves)

    step(), step()
    expected = step()
    hooks = torch.autograd.graph.saved_tensors_hooks
    for copy in (torch.clone, lambda t: t.contiguous().clone(), lambda t: _shifted(t.contiguous())):
        for _ in range(2):
            with hooks(lambda t: t, copy):
                got = step()
            for i, (g, e) in enumerate(zip(got, expected, strict=True)):
                if i != 1:
                    assert_bitwise(g, e)
                else:  # of a weight that lies otherwise: other splits, other sums
                    assert g.shape == e.shape


def test_views_of_one_buffer_are_told_apart(taped):
    """Operands in one buffer, then in others, then two that are the same tensor."""
    packed = normal(2, 5, 3 * H, 16)
    views = packed.split(H, 2)
    apart = [t.contiguous() for t in views]
    expected = attention(*apart)
    for _ in range(3):
        assert_bitwise(attention(*views), expected)
        swapped = torch.cat((views[2], views[0], views[1]), 2).split(H, 2)
        assert_bitwise(attention(swapped[1], swapped[2], swapped[0]), expected)
        assert_bitwise(attention(apart[0], apart[1], apart[1]), attention(*apart[:2], apart[1] * 1))


def test_operands_that_are_one_tensor_leave_no_tape_for_others(taped):
    q, k, v = inputs_of(attention, 0)
    expected = attention(q, k, v)
    recorded.forget()
    for _ in range(3):
        attention(q, k, k)
    assert_bitwise(attention(q, k, v), expected)


def test_a_place_is_a_base_and_an_offset():
    x, out = torch.zeros(4, 8), torch.zeros(2, 8)
    finder = recorded._Finder((out, None), (None, x))
    assert finder.place_of(None) is None
    assert finder.place_of(x) == (4, 0)
    assert finder.place_of(x[1, 2:]) == (4, 40)
    assert finder.place_of(out[1]) == (0, 32)
    first, second = torch.zeros(3), torch.zeros(100)
    assert finder.place_of(first) == (2, 0)
    assert finder.place_of(second[5:]) == (2, recorded.UNIT + 20)
    assert finder.place_of(first[1:]) == (2, 4)
    assert finder.scratch == 3 * recorded.UNIT
    upper, lower = x[:2], x[2:]
    finder = recorded._Finder((), (upper, lower))
    assert finder.place_of(lower) == (2, 0)
    for t in (x[1:2], lower[1:], torch.zeros(0)):
        with pytest.raises(LookupError):
            finder.place_of(t)
    with pytest.raises(LookupError):
        recorded._Finder((), (x, x)).place_of(x)


def test_a_tape_hands_over_the_addresses_of_outputs_scratch_and_inputs():
    seen, x = [], torch.zeros(4, device=DEVICE)
    outputs = [((2, 3), (1, 2), torch.float16), None]
    tape = recorded.Tape([(seen.append, None)], lambda: False, outputs, 512, x.device)
    out, absent = tape(x, None)
    (addresses,) = seen
    assert (out.shape, out.stride(), out.dtype, absent) == (*outputs[0], None)
    assert addresses[:2] == [out.data_ptr(), 0]
    assert addresses[2] not in (0, out.data_ptr(), x.data_ptr())
    assert addresses[3:] == [x.data_ptr(), 0]


@pytest.mark.parametrize("hooked", [False, True])
def test_a_profilers_hooks_see_the_launches_of_a_tape(hooked):
    seen = []

    def launch(i):
        return (lambda _: seen.append(("direct", i))), (lambda _: seen.append(("usual", i)))

    tape = recorded.Tape([launch(0), launch(1)], lambda: hooked, [], 0, DEVICE)
    assert tape(torch.zeros(1, device=DEVICE)) == ()
    assert seen == [("usual" if hooked else "direct", i) for i in range(2)]


def test_only_calls_of_equal_layouts_constants_and_precision_are_repeated(monkeypatch):
    monkeypatch.setattr(recorded, "DEVICE", DEVICE.type)
    monkeypatch.setattr(recorded, "record", lambda f, ts, cs: (f(*ts, *cs), lambda *ts: "taped"))
    run = recorded.Repeated(lambda *_: "new")
    x = normal(4, 8)
    calls = [((x,), (1, 0)), ((x,), (2, 0)), ((x,), (1, 1)), ((x.half(),), (1, 0))]
    calls += [((t,), (1, 0)) for t in (x[:2], x[:, ::2], x.mT.contiguous().mT, _shifted(x))]
    calls += [((x, t), (1, 0)) for t in (None, x, x.half(), _shifted(x))]
    for expected in ("new", "taped"):
        assert [run(*call) for call in calls] == [expected] * len(calls)
    monkeypatch.setattr(recorded, "allows_tf32", lambda: True)
    assert [run(*call) for call in calls[:4]] == ["new"] * 3 + ["taped"]
    with monkeypatch.context() as patch:
        patch.setattr(recorded, "context_parallel", lambda: True)
        assert run(*calls[0]) == "new"
    assert run(*calls[0]) == "taped"
    recorded.forget()
    assert run(*calls[0]) == "new"
    monkeypatch.setattr(recorded, "CALLS", 2)
    for call in calls:
        run(*call)
        assert len(run._tapes) <= 2


def test_what_has_no_tape_runs_each_time(taped):
    seen = []
    run = recorded.Repeated(lambda t, number: seen.append(number) or (t + number,))
    x = normal(4, 8)
    for i in range(3):
        assert_bitwise(run((x,), (2,))[0], x + 2)
        assert len(seen) == i + 1


def test_what_does_more_than_launch_has_no_tape(taped):
    def launches(t):
        return triton.operators.launch_projection(t, t[0].mT, None)

    x = normal(1, 16, 16)
    outputs, tape = recorded.record(launches, (x,), ())
    assert tape is not None
    assert_bitwise(tape(x.clone())[0], outputs[0])
    for function in (
        lambda t: (launches(t)[0].zero_(),),
        lambda t: launches(t + 0),
        lambda t: (launches(t)[0].sum(),),
    ):
        assert recorded.record(function, (x,), ())[1] is None


def test_what_is_not_compiled_has_no_tape(taped, monkeypatch):
    monkeypatch.setattr(Plan, "on", lambda plan, places: None)
    x = normal(1, 16, 16)
    launches = lambda t: triton.operators.launch_projection(t, t[0].mT, None)  # noqa: E731
    assert recorded.record(launches, (x,), ())[1] is None


def test_scratch_is_one_allocation_apart_from_the_outputs(taped, monkeypatch):
    x, W, bias = inputs_of(layer, 0)
    layer(x, W, bias), layer(x, W, bias)
    made = []
    for name in ("empty", "empty_strided"):
        original = getattr(torch, name)

        def allocate(*args, original=original, **options):
            made.append(original(*args, **options))
            return made[-1]

        monkeypatch.setattr(torch, name, allocate)
    out = layer(x, W, bias)
    assert [t is out for t in made] == [True, False]
    packed_and_lse = 2 * 5 * 96 * 4 + 2 * H * 5 * 4
    assert made[1].nbytes >= packed_and_lse


# Real launches


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_recorded_calls_have_the_bits_of_the_first(dtype, bias):
    for B, T, heads, D, H_kv in ((2, 100, 3, 64, 3), (1, 33, 4, 17, 2), (3, 1, 2, 128, 1)):
        x = normal(B, T, 64, dtype=dtype)
        columns = (heads + 2 * H_kv) * D
        W = normal(64, columns, scale=0.125, dtype=dtype)
        options = {"n_head": heads, "n_kv_head": H_kv, "weight_layout": "packed"}
        options |= {"bias": normal(columns, dtype=dtype) if bias else None, "backend": "triton"}
        first = ra_triton.ra_attention(x, W, 4, **options)
        assert len(recorded._known) == 1
        for _ in range(3):
            assert_bitwise(ra_triton.ra_attention(x.clone(), W.clone(), 4, **options), first)
        assert len(recorded._known) == 1
        recorded.forget()


@pytest.mark.gpu
def test_recorded_calls_follow_streams_and_graphs():
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
