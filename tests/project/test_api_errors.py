"""Bad arguments: the right exception, a message that names the argument, and nothing launched."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from budget import assert_bitwise
from strategies import DEVICE, backends, normal
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import ra_triton
from ra_triton.backend import BACKENDS as MODULES
from ra_triton.nn import KVCache, RACausalSelfAttention
from ra_triton.weights.fused import factor_weight
from ra_triton.workspace import Workspace

H, D, C = 2, 16, 12


@pytest.fixture
def no_launch(monkeypatch):
    """Reaching any backend function is a failure."""

    def launched(*args, **kwargs):
        pytest.fail("a backend was called with bad arguments")

    for module in MODULES.values():
        for name in ("project", "packed_attention", "layer", "pack_qk", "pack_qk_", "compose"):
            monkeypatch.setattr(module, name, launched)


def projection_arguments():
    return {"x": normal(2, 5, C), "W_fused": normal(C, 3 * H * D), "R": 4, "n_head": H}


def attention_arguments():
    return {name: normal(2, 5, H, D) for name in ("q_pack", "k_pack", "v")}


def packing_arguments():
    lanes = {"q": D, "k": D, "q_low": 4, "k_low": 4}
    return {name: normal(2, 5, H, n) for name, n in lanes.items()}


def composing_arguments():
    return {
        **{name: normal(C, H * D) for name in ("W_q", "W_k", "W_v")},
        "W_recip": normal(D, 4),
        "n_head": H,
    }


def strided_last(t):
    return torch.stack((t, t), dim=-1)[..., 0]


BAD_TENSORS = [  # how to spoil a tensor, the error, the message after the argument's name
    ("no tensor", lambda t: t.tolist(), TypeError, "must be a tensor, got list"),
    ("None", lambda t: None, TypeError, "must be a tensor, got NoneType"),
    ("float64", lambda t: t.double(), TypeError, "must be .*float32, got torch.float64"),
    ("int64", lambda t: t.long(), TypeError, "must be .*float32, got torch.int64"),
    ("bool", lambda t: t.bool(), TypeError, "must be .*float32, got torch.bool"),
    ("complex", lambda t: t + 0j, TypeError, "must be .*float32, got torch.complex64"),
    ("float8", lambda t: t.to(torch.float8_e5m2), TypeError, "must be .*, got torch.float8_e5m2"),
    ("sparse", lambda t: t.to_sparse(), TypeError, "must be a dense tensor"),
]
BAD_DIMS = ("a dim too many", lambda t: t[None], ValueError, "must be .*, got \\(1, ")
BAD_STRIDE = ("strided lanes", strided_last, ValueError, "must have stride 1 in its last dim")
OTHER_DTYPE = ("float16", lambda t: t.half(), TypeError, "must be torch.float32 like .*, got")
ALONE = ("float16", lambda t: t.half(), TypeError, "must be torch.float16 like")

CALLS = {
    "ra_attention": (ra_triton.ra_attention, projection_arguments, ("x", "W_fused")),
    "project": (ra_triton.project, projection_arguments, ("x", "W_fused")),
    "packed_attention": (
        ra_triton.packed_attention,
        attention_arguments,
        ("q_pack", "k_pack", "v"),
    ),
    "which_backend": (ra_triton.which_backend, attention_arguments, ("q_pack", "k_pack", "v")),
    "pack_qk": (ra_triton.pack_qk, packing_arguments, ("q", "k", "q_low", "k_low")),
    "pack_qk_": (ra_triton.pack_qk_, packing_arguments, ("q", "k", "q_low", "k_low")),
}


def bad_tensor_cases():
    for call, (_, _, names) in CALLS.items():
        for i, name in enumerate(names):
            faults = [*BAD_TENSORS, BAD_DIMS]
            faults += [BAD_STRIDE] if name != "W_fused" else []  # weights may be transposed
            faults += [OTHER_DTYPE] if i else []
            for label, spoil, error, message in faults:
                match = f"^{name} {message}"
                yield pytest.param(call, name, spoil, error, match, id=f"{call}-{name}-{label}")


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(("call", "name", "spoil", "error", "match"), list(bad_tensor_cases()))
def test_a_bad_tensor_is_named(call, name, spoil, error, match):
    function, arguments, _ = CALLS[call]
    arguments = arguments()
    arguments[name] = spoil(arguments[name])
    with pytest.raises(error, match=match):
        function(**arguments)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("call", CALLS)
def test_a_first_tensor_of_another_dtype_is_reported_by_the_second(call):
    function, arguments, names = CALLS[call]
    arguments = arguments()
    arguments[names[0]] = arguments[names[0]].half()
    with pytest.raises(TypeError, match=f"^{names[1]} {ALONE[3]} {names[0]}"):
        function(**arguments)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("call", CALLS)
def test_a_tensor_on_another_device_is_named(call):
    function, arguments, names = CALLS[call]
    for name in names[1:]:
        bad = arguments()
        bad[name] = bad[name].to("meta")
        with pytest.raises(ValueError, match=f"^{name} must be on .* like {names[0]}, got meta"):
            function(**bad)


PROJECTION_ERRORS = [
    (TypeError, "R must be an int, got True", {"R": True}),
    (TypeError, "R must be an int, got 4.0", {"R": 4.0}),
    (TypeError, "R must be an int, got None", {"R": None}),
    (ValueError, "R must be between 0 and the head dim 16, got 17", {"R": 17}),
    (ValueError, "R must be between 0 and the head dim 16, got -1", {"R": -1}),
    (ValueError, "columns.*n_head=5", {"n_head": 5}),
    (ValueError, "pass n_head", {"n_head": None}),
    (ValueError, "n_head must be at least 1, got 0", {"n_head": 0}),
    (TypeError, "n_head must be an int or None, got 2.0", {"n_head": 2.0}),
    (ValueError, "n_kv_head must be at least 1, got -1", {"n_kv_head": -1}),
    (ValueError, "multiple of n_kv_head=3", {"n_kv_head": 3}),
    (TypeError, "n_kv_head must be an int or None", {"n_kv_head": True}),
    (ValueError, "W_fused must be .*C = 12", {"W_fused": normal(C + 1, 96)}),
    (ValueError, "W_fused must be .*C = 12", {"W_fused": normal(96, C)}),
    (ValueError, "weight_layout must be one of split, packed", {"weight_layout": "fused"}),
    (ValueError, "weight_layout must be one of split, packed", {"weight_layout": None}),
    (TypeError, "bias must be a tensor", {"bias": True}),
    (TypeError, "bias must be torch.float32 like x", {"bias": normal(96).half()}),
    (ValueError, "bias must be one value per column", {"bias": normal(95)}),
    (ValueError, "bias must be one value per column", {"bias": normal(1, 96)}),
    (ValueError, "bias must be on .* like x", {"bias": normal(96).to("meta")}),
]
OPTION_ERRORS = [
    (TypeError, "causal must be a bool, got 1", {"causal": 1}),
    (TypeError, "causal must be a bool, got None", {"causal": None}),
    (TypeError, "softmax_scale must be a number, got '1'", {"softmax_scale": "1"}),
    (TypeError, "softmax_scale must be a number, got True", {"softmax_scale": True}),
    (ValueError, "softmax_scale must be finite and above 0, got 0", {"softmax_scale": 0.0}),
    (ValueError, "softmax_scale must be finite and above 0", {"softmax_scale": float("nan")}),
    (ValueError, "softmax_scale must be finite and above 0", {"softmax_scale": float("inf")}),
    (TypeError, "window_size must be .left, right., two ints", {"window_size": 3}),
    (TypeError, "window_size must be .left, right., two ints", {"window_size": (1, 2, 3)}),
    (TypeError, "window_size must be .left, right., two ints", {"window_size": (1.0, 0)}),
    (ValueError, "window_size sides must be -1", {"window_size": (-2, 0)}),
    (TypeError, "softcap must be a number", {"softcap": None}),
    (ValueError, "softcap must be finite and at least 0", {"softcap": -1.0}),
    (ValueError, "softcap must be finite and at least 0", {"softcap": float("inf")}),
    (TypeError, "dropout_p must be a number", {"dropout_p": "0"}),
    (ValueError, "dropout_p must be in .0, 1.", {"dropout_p": 1.0}),
    (ValueError, "dropout_p must be in .0, 1.", {"dropout_p": -0.1}),
    (ValueError, "dropout_p must be in .0, 1.", {"dropout_p": float("nan")}),
]
BACKEND_ERRORS = [
    (ValueError, "backend must be one of auto, triton, sdpa", {"backend": "cuda"}),
    (ValueError, "backend must be one of auto, triton, sdpa", {"backend": None}),
    (ValueError, "backend must be one of auto, triton, sdpa", {"backend": "Triton"}),
]
OUT_ERRORS = [
    (TypeError, "out must be a tensor", {"out": []}),
    (TypeError, "out must be torch.float32 like x", {"out": normal(2, 5, 6, 16).half()}),
    (ValueError, "out must be on .* like x", {"out": normal(2, 5, 6, 16).to("meta")}),
    (ValueError, "out must be .*H . 2 . H_kv", {"out": normal(2, 5, 96)}),
    (ValueError, "out must be .*H . 2 . H_kv", {"out": normal(2, 4, 6, 16)}),
    (ValueError, "out must be contiguous", {"out": normal(5, 2, 6, 16).transpose(0, 1)}),
    (
        ValueError,
        "out cannot be used while a gradient is needed",
        {"out": normal(2, 5, 6, 16), "x": normal(2, 5, C).requires_grad_()},
    ),
    (
        ValueError,
        "out cannot be used while a gradient is needed",
        {"out": normal(2, 5, 6, 16).requires_grad_()},
    ),
]
MANY = normal(1, 1, 1, D).expand(2**16, 2**15, 1, D)  # 2³¹ rows in the memory of one
ROW_ERRORS = {
    "packed_attention": ("q_pack", MANY),
    "which_backend": ("q_pack", MANY),
    "pack_qk": ("q", MANY),
    "pack_qk_": ("q", MANY),
    "project": ("x", MANY[:, :, 0, :C]),
    "ra_attention": ("x", MANY[:, :, 0, :C]),
}
LSE_ERRORS = [(TypeError, "return_lse must be a bool", {"return_lse": 1})]
SHAPE_ERRORS = [
    (ValueError, "k_pack must be .* like q_pack", {"k_pack": normal(3, 5, H, D)}),
    (ValueError, "k_pack must be .* like q_pack", {"k_pack": normal(2, 5, H, D + 1)}),
    (ValueError, "k_pack must have a number of heads that divides", {"k_pack": normal(2, 5, 4, D)}),
    (ValueError, "k_pack must have a number of heads that divides", {"k_pack": normal(2, 5, 0, D)}),
    (ValueError, "v must be .* like k_pack", {"v": normal(2, 6, H, D)}),
    (ValueError, "v must be .* like k_pack", {"v": normal(2, 5, 1, D)}),
    (ValueError, "v must be .* like k_pack", {"v": normal(2, 5, H, D + 2)}),
    (ValueError, "q_pack must have at least one head and lane", {"q_pack": normal(2, 5, 0, D)}),
    (ValueError, "q_pack must have at least one head and lane", {"q_pack": normal(2, 5, H, 0)}),
]
PACK_ERRORS = [
    (ValueError, "k must be .* like q", {"k": normal(2, 6, H, D)}),
    (ValueError, "k must be .* like q", {"k": normal(2, 5, H, D - 1)}),
    (ValueError, "q_low must have at most D = 16 lanes", {"q_low": normal(2, 5, H, D + 1)}),
    (ValueError, "q_low must be .*one row per key head", {"q_low": normal(2, 5, H + 1, 4)}),
    (ValueError, "k_low must be .*one row per query head", {"k_low": normal(2, 5, H, 3)}),
    (ValueError, "k_low must be .*one row per query head", {"k_low": normal(2, 5, H + 1, 4)}),
]
IN_PLACE_ERRORS = [
    (
        ValueError,
        "q is written, so it must not be expanded",
        {"q": normal(1, 5, H, D).expand(2, 5, H, D)},
    ),
    (
        ValueError,
        "k is written, so it must not be expanded",
        {"k": normal(2, 1, H, D).expand(2, 5, H, D)},
    ),
    (ValueError, "pack_qk_ is for inference", {"q": normal(2, 5, H, D).requires_grad_()}),
    (ValueError, "pack_qk_ is for inference", {"k_low": normal(2, 5, H, 4).requires_grad_()}),
]
BIAS = normal(H * D)
COMPOSE_ERRORS = [
    (TypeError, "W_q must be a tensor", {"W_q": 1}),
    (TypeError, "W_recip must be a tensor", {"W_recip": 4}),
    (TypeError, "W_q must be a floating-point tensor", {"W_q": normal(C, H * D).int()}),
    (TypeError, "W_v must be torch.float32 like W_q", {"W_v": normal(C, H * D).double()}),
    (TypeError, "W_recip must be torch.float32 like W_q", {"W_recip": normal(D, 4).half()}),
    (ValueError, "W_k must be on .* like W_q", {"W_k": normal(C, H * D).to("meta")}),
    (TypeError, "n_head must be an int, got True", {"n_head": True}),
    (TypeError, "n_head must be an int, got None", {"n_head": None}),
    (ValueError, "W_q must be .*n_head = 3", {"n_head": 3}),
    (ValueError, "W_q must be .*n_head = 0", {"n_head": 0}),
    (ValueError, "W_q must be .C, H.D.", {"W_q": normal(H * D)}),
    (ValueError, "W_k must be .* like W_q", {"W_k": normal(C + 1, H * D)}),
    (ValueError, "W_k must be .* like W_q", {"W_k": normal(C, 2 * H * D)}),
    (ValueError, "W_v has fewer heads than W_q.*pass n_kv_head", {"W_v": normal(C, D)}),
    (ValueError, "W_k must be .12, 16. with n_kv_head = 1", {"n_kv_head": 1}),
    (ValueError, "n_kv_head must divide n_head=2, got 3", {"n_kv_head": 3}),
    (TypeError, "n_kv_head must be an int or None, got 1.0", {"n_kv_head": 1.0}),
    (ValueError, "W_recip must be .*D = 16", {"W_recip": normal(D + 1, 4)}),
    (ValueError, "W_recip must be .*D = 16", {"W_recip": normal(D)}),
    (ValueError, "W_recip must be .*H = 2 heads", {"W_recip": normal(3, D, 4)}),
    (ValueError, "R must be between 0 and the head dim 16, got 17", {"W_recip": normal(D, 17)}),
    (TypeError, "w_std must be a tensor, a number or None", {"w_std": "1"}),
    (TypeError, "w_rec must be a tensor, a number or None", {"w_rec": True}),
    (ValueError, "w_std must be a scalar or one value per head", {"w_std": normal(3)}),
    (TypeError, "w_std must be a floating-point tensor", {"w_std": normal(2).cfloat()}),
    (TypeError, "w_rec must be a floating-point tensor", {"w_rec": torch.ones(2).int()}),
    (ValueError, "w_rec must be on .* like W_q, got meta", {"w_rec": normal(2).to("meta")}),
    (ValueError, "w_rec must be a scalar or one value per head", {"w_rec": normal(1, H)}),
    (ValueError, "weight_layout must be one of", {"weight_layout": "other"}),
    (TypeError, "biases must be .b_q, b_k, b_v. or None, got .1, 2, 3", {"biases": [1, 2, 3]}),
    (TypeError, "biases must be .b_q, b_k, b_v. or None, got .tensor", {"biases": (BIAS, BIAS)}),
    (TypeError, "b_k must be a tensor, got NoneType", {"biases": (BIAS, None, BIAS)}),
    (TypeError, "b_v must be torch.float32 like W_q", {"biases": (BIAS, BIAS, BIAS.half())}),
    (ValueError, "b_q must be on .* like W_q, got meta", {"biases": (BIAS.to("meta"), BIAS, BIAS)}),
    (ValueError, "b_q must be .*column of W_q = .32", {"biases": (BIAS[1:], BIAS, BIAS)}),
    (ValueError, "b_k must be .*column of W_k = .32", {"biases": (BIAS, BIAS[None], BIAS)}),
    (ValueError, "b_v must be .*column of W_v = .32", {"biases": (BIAS, BIAS, BIAS[1:])}),
    (TypeError, "dtype must be a floating-point dtype or None, got", {"dtype": torch.int8}),
    (TypeError, "dtype must be a floating-point dtype or None, got", {"dtype": "float16"}),
]
ERRORS = [
    (ra_triton.ra_attention, projection_arguments, [*PROJECTION_ERRORS, *OPTION_ERRORS]),
    (ra_triton.project, projection_arguments, [*PROJECTION_ERRORS, *OUT_ERRORS]),
    (ra_triton.packed_attention, attention_arguments, [*OPTION_ERRORS, *SHAPE_ERRORS, *LSE_ERRORS]),
    (ra_triton.which_backend, attention_arguments, [*OPTION_ERRORS, *SHAPE_ERRORS, *LSE_ERRORS]),
    (ra_triton.pack_qk, packing_arguments, PACK_ERRORS),
    (ra_triton.pack_qk_, packing_arguments, [*PACK_ERRORS, *IN_PLACE_ERRORS]),
    (ra_triton.compose_weights, composing_arguments, COMPOSE_ERRORS),
]
ERRORS += [
    (function, arguments, BACKEND_ERRORS)
    for function, arguments, _ in ERRORS
    if function is not ra_triton.which_backend
]


def argument_cases():
    for function, arguments, errors in ERRORS:
        for i, (error, match, bad) in enumerate(errors):
            label = f"{function.__name__}-{'+'.join(bad)}-{i}"
            yield pytest.param(function, arguments, error, match, bad, id=label)


class NothingComputed(TorchDispatchMode):
    """Any operator that does more than make a view is a failure."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view:
            pytest.fail(f"{operator} before all arguments are checked")
        return operator(*args, **(kwargs or {}))


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(("function", "arguments", "error", "match", "bad"), list(argument_cases()))
def test_a_bad_argument_is_named(function, arguments, error, match, bad):
    given = {**arguments(), **bad}
    with NothingComputed(), pytest.raises(error, match=match):
        function(**given)


@pytest.mark.parametrize("function", [ra_triton.pack_weight, ra_triton.unpack_weight])
@pytest.mark.parametrize(
    ("error", "match", "weight", "R", "n_head"),
    [
        (TypeError, "W_fused must be a tensor", [1.0], 4, 1),
        (ValueError, "W_fused must have at least one dim", torch.tensor(1.0), 4, 1),
        (TypeError, "R must be an int", torch.zeros(2, 48), True, 1),
        (ValueError, "R must be between 0 and", torch.zeros(2, 48), 17, 1),
        (ValueError, "W_fused has 47 columns", torch.zeros(2, 47), 4, 1),
        (ValueError, "pass n_head", torch.zeros(2, 48), 4, None),
    ],
)
def test_reordering_a_weight_refuses_what_is_none(function, error, match, weight, R, n_head):
    with pytest.raises(error, match=match):
        function(weight, R, n_head=n_head)


@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (-1, 7), [-1, -1]])
@backends
def test_windows_that_say_no_more_than_causal_are_taken(backend, window_size):
    arguments = attention_arguments()
    assert_bitwise(
        ra_triton.packed_attention(**arguments, window_size=window_size, backend=backend),
        ra_triton.packed_attention(**arguments, backend=backend),
    )


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("size", [8, 15, 129, 256])
def test_triton_refuses_head_dims_it_has_no_tiles_for(size):
    q, k, v = (normal(1, 3, 1, size) for _ in range(3))
    with pytest.raises(NotImplementedError, match=f"head dim {size} .*use backend='sdpa'"):
        ra_triton.packed_attention(q, k, v, backend="triton")


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("call", CALLS)
def test_more_rows_than_the_kernels_can_count_are_refused(call):
    function, arguments, _ = CALLS[call]
    name, many = ROW_ERRORS[call]
    with pytest.raises(ValueError, match=f"^{name} must have at most .* rows"):
        function(**{**arguments(), name: many})


def test_unknown_options_are_refused_everywhere():
    for function, arguments, _ in CALLS.values():
        with pytest.raises(TypeError, match=re.escape("softmax")):
            function(**arguments(), softmax=1.0)
    with pytest.raises(TypeError, match="which_backend has no option 'cap', only causal, softmax_"):
        ra_triton.which_backend(**attention_arguments(), causal=True, cap=1.0)


def test_arguments_after_the_tensors_are_keyword_only():
    q, k, v = attention_arguments().values()
    with pytest.raises(TypeError, match="positional"):
        ra_triton.packed_attention(q, k, v, True)


# Remedies: what an error names as the way out is one


def layer(*, requires_grad=False, n_head=H, **options):
    """``ra_attention`` over a small weight."""
    x = normal(2, 5, C).requires_grad_(requires_grad)
    return ra_triton.ra_attention(x, options.pop("W", weight()), n_head=n_head, **options)


def attention(requires_grad=False, size=D, T_q=5, **options):
    q, k, v = (normal(2, T, H, size).requires_grad_(requires_grad) for T in (T_q, 5, 5))
    return ra_triton.packed_attention(q, k, v, **options)


def decoded(T_q=1, size=D, requires_grad=False, function=ra_triton.decode_attention, **options):
    q, k, v = (normal(2, T, H, size).requires_grad_(requires_grad) for T in (T_q, 40, 40))
    lengths = torch.full((2,), 40, dtype=torch.int32, device=DEVICE)
    return function(
        q, k, v, *([lengths] if function is ra_triton.decode_attention else []), **options
    )


def weight():
    return normal(C, 3 * H * D, seed=1)


def twice(backend, **options):
    """A gradient of a gradient."""
    x = normal(2, 5, C).requires_grad_()
    y = ra_triton.ra_attention(x, weight(), n_head=H, backend=backend, **options)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x)


def without_gradients(call):
    def run(**options):
        with torch.no_grad():
            return call(requires_grad=True, **options)

    return run


def compose(**options):
    W_k = W_v = normal(C, D)
    return ra_triton.compose_weights(**composing_arguments() | {"W_k": W_k, "W_v": W_v} | options)


def pack(function=ra_triton.pack_qk, requires_grad=False, **options):
    tensors = {n: t.requires_grad_(requires_grad) for n, t in packing_arguments().items()}
    return function(**tensors, **options)


def rotated(size, **options):
    q, k = normal(1, 5, H, size), normal(1, 5, H, size)
    return ra_triton.pack_qk(q, k, rope=(torch.ones(9, 8, device=DEVICE),) * 2, **options)


def projected(out=False, requires_grad=False):
    out = torch.empty(2, 5, 3 * H, D, device=DEVICE) if out else None
    x = normal(2, 5, C).requires_grad_(requires_grad)
    return ra_triton.project(x, weight(), n_head=H, out=out)


def cached(dtype=torch.float32, requires_grad=False):
    cache = KVCache(2, 9, H, D, device=DEVICE)
    k, v = (normal(2, 5, H, D).requires_grad_(requires_grad) for _ in "kv")
    return cache.append(k, v)


def module(train=False, grad=False):
    layer = RACausalSelfAttention(2 * D, H, dropout=0.5).to(DEVICE).train(train)
    cache = KVCache(2, 9, H, D, device=DEVICE)
    with torch.set_grad_enabled(grad):
        return layer(normal(2, 5, 2 * D), cache)


def int8(**how):
    return ra_triton.quantize_weight(weight(), 4, n_head=H, **{"which": "all"} | how)


def sparse():
    return ra_triton.sparsify_weight(weight(), 4, n_head=H, which="all")


def forward_mode(**options):
    x = normal(2, 5, C)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, normal(2, 5, C, seed=2))
        return ra_triton.ra_attention(dual, weight(), n_head=H, backend="triton")


def reverse_mode():
    x = normal(2, 5, C).requires_grad_()
    return ra_triton.ra_attention(x, weight(), n_head=H, backend="triton").sum().backward()


def factored(R, n_kv_head):
    W = normal(C, (H + 2 * n_kv_head) * D)
    return factor_weight(W, R, n_head=H, n_kv_head=n_kv_head)


def free_of_groups():
    layer = RACausalSelfAttention(2 * D, H, n_kv_head=1, parametrisation="free").to(DEVICE)
    return layer(normal(2, 5, 2 * D))


def configured(**options):
    config = SimpleNamespace(n_embd=2 * D, n_head=H, attn_pdrop=0.1, resid_pdrop=0.2)
    return RACausalSelfAttention.from_config(config, **options)


def fused(train=True):
    return RACausalSelfAttention(2 * D, H, parametrisation="composed").train(train).fuse_()


REMEDIES = {  # what fails, how its error names the way out, the way out
    "flex, dropout": (
        lambda: attention(dropout_p=0.5, backend="flex"),
        r"no dropout_p; use backend='triton'",
        [lambda: attention(dropout_p=0.5, backend="triton")],
    ),
    "flex, decoding": (
        lambda: decoded(backend="flex"),
        r"block masks .*use backend='triton'",
        [lambda: decoded(backend="triton")],
    ),
    "flex, decoding many": (
        lambda: decoded(17, backend="flex"),
        r"block masks .*use backend='sdpa'",
        [lambda: decoded(17, backend="sdpa", softcap=3.0)],
    ),
    "triton, decoding many": (
        lambda: decoded(17, backend="triton", softcap=3.0),
        r"at most 16 queries, got 17; use backend='sdpa'",
        [lambda: decoded(17, backend="sdpa", softcap=3.0)],
    ),
    "triton, small heads": (
        lambda: attention(True, 8, softcap=3.0, backend="triton"),
        r"head dim 8 .*use backend='sdpa'",
        [lambda: attention(True, 8, softcap=3.0, backend="sdpa").sum().backward()],
    ),
    "triton, everything": (
        lambda: attention(size=136, softcap=3.0, dropout_p=0.5, return_lse=True, backend="triton"),
        r"head dim 136 .*use backend='sdpa'",
        [lambda: attention(size=136, softcap=3.0, dropout_p=0.5, return_lse=True, backend="sdpa")],
    ),
    "triton, twice": (
        lambda: twice("triton"),
        r"cannot differentiate twice; use backend='sdpa'",
        [lambda: twice("sdpa"), lambda: twice("sdpa", softcap=3.0)],
    ),
    "triton, forward mode": (forward_mode, "use reverse mode", [reverse_mode]),
    "decoding, gradient": (
        lambda: decoded(requires_grad=True),
        r"no gradient; use torch.no_grad\(\), or packed_attention",
        [
            without_gradients(decoded),
            lambda: decoded(requires_grad=True, function=ra_triton.packed_attention),
        ],
    ),
    "in place, gradient": (
        lambda: pack(ra_triton.pack_qk_, True),
        r"use pack_qk, or torch.no_grad\(\)",
        [
            lambda: pack(requires_grad=True),
            lambda: without_gradients(pack)(function=ra_triton.pack_qk_),
        ],
    ),
    "out, gradient": (
        lambda: projected(True, True),
        r"use torch.no_grad\(\)",
        [lambda: without_gradients(projected)(out=True)],
    ),
    "workspace, gradient": (
        lambda: layer(requires_grad=True, workspace=Workspace()),
        r"use torch.no_grad\(\), or pass workspace=None",
        [
            lambda: without_gradients(layer)(workspace=Workspace()),
            lambda: layer(requires_grad=True, workspace=None),
        ],
    ),
    "int8, gradient": (
        lambda: layer(requires_grad=True, W=int8()),
        r"use torch.no_grad\(\), or the weight that it was made of",
        [lambda: without_gradients(layer)(W=int8()), lambda: layer(requires_grad=True)],
    ),
    "sparse, gradient": (
        lambda: layer(requires_grad=True, W=sparse()),
        r"use torch.no_grad\(\), or the weight that it was made of",
        [lambda: without_gradients(layer)(W=sparse()), lambda: layer(requires_grad=True)],
    ),
    "int8, dtype": (
        lambda: ra_triton.ra_attention(normal(2, 5, C).half(), int8(which="reciprocal"), n_head=H),
        r"use W_fused.to\(dtype=torch.float16\)",
        [
            lambda: ra_triton.ra_attention(
                normal(2, 5, C).half(),
                int8(which="reciprocal").to(dtype=torch.float16),
                n_head=H,
            )
        ],
    ),
    "cache, gradient": (
        lambda: cached(requires_grad=True),
        r"use no_grad\(\)",
        [without_gradients(cached)],
    ),
    "module and cache, gradient": (lambda: module(grad=True), r"use no_grad\(\)", [module]),
    "module and cache, dropout": (lambda: module(train=True), r"call eval\(\)", [module]),
    "strides": (
        lambda: ra_triton.packed_attention(*(strided_last(normal(2, 5, H, D)) for _ in "qkv")),
        r"call \.contiguous\(\) on it",
        [
            lambda: ra_triton.packed_attention(
                *(strided_last(normal(2, 5, H, D)).contiguous() for _ in "qkv")
            )
        ],
    ),
    "heads of no width": (
        lambda: layer(n_head=None),
        r"do not make heads of 64 .*; pass n_head",
        [layer],
    ),
    "grouped heads": (compose, r"pass n_kv_head", [lambda: compose(n_kv_head=1)]),
    "factors of groups": (
        lambda: factored(4, 1),
        r"take R=0 or the free parametrisation",
        [lambda: factored(0, 1), free_of_groups],
    ),
    "odd lanes": (lambda: rotated(17), r"pass rope_dims", [lambda: rotated(17, rope_dims=16)]),
    "two dropouts": (configured, r"pass dropout=", [lambda: configured(dropout=0.1)]),
    "fused in training": (fused, r"call eval\(\) first", [lambda: fused(train=False)]),
}
TRIED_ELSEWHERE = (  # ways out
    "use the dense weight",  # what every GPU takes, said where one takes no sparse weight
    "call it outside of context_parallel, on whole sequences",  # test_local_tensors.py, like
    "call .to_local() on them",
)


@pytest.mark.parametrize("case", REMEDIES)
def test_what_an_error_names_as_the_way_out_is_one(case):
    wrong, match, remedies = REMEDIES[case]
    with pytest.raises((ValueError, TypeError, NotImplementedError, RuntimeError), match=match):
        wrong()
    for remedy in remedies:
        remedy()


def test_every_error_that_names_a_way_out_is_among_them():
    known = " ".join(match.replace("\\", "") for _, match, _ in REMEDIES.values())
    known += " ".join(TRIED_ELSEWHERE)
    way_out, found = re.compile(r"[;:,] ((?:use|call|pass|take) .*)"), []
    for path in Path(ra_triton.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                found += [(path.name, words) for words in way_out.findall(_words(node))]
    assert len(found) > 15
    assert [(name, words) for name, words in found if words.rstrip("=()'") not in known] == []


def _words(node):
    """The constant parts of a message, in the order of the source."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.FormattedValue):
        return ""
    return "".join(map(_words, ast.iter_child_nodes(node)))
