"""Bad arguments: the right exception, a message that names the argument, and nothing launched."""

import re

import pytest
import torch
from budget import assert_bitwise
from strategies import backends, normal

import ra_triton
from ra_triton.backend import BACKENDS as MODULES

H, D, C = 2, 16, 12


@pytest.fixture
def no_launch(monkeypatch):
    """Reaching any backend function is a failure."""

    def launched(*args, **kwargs):
        pytest.fail("a backend was called with bad arguments")

    for module in MODULES.values():
        for name in ("project", "packed_attention", "layer", "pack_qk", "pack_qk_"):
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
COMPOSE_ERRORS = [
    (TypeError, "W_q must be a tensor", {"W_q": 1}),
    (TypeError, "W_recip must be a tensor", {"W_recip": None}),
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
    if function not in (ra_triton.which_backend, ra_triton.compose_weights)
]


def argument_cases():
    for function, arguments, errors in ERRORS:
        for i, (error, match, bad) in enumerate(errors):
            label = f"{function.__name__}-{'+'.join(bad)}-{i}"
            yield pytest.param(function, arguments, error, match, bad, id=label)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(("function", "arguments", "error", "match", "bad"), list(argument_cases()))
def test_a_bad_argument_is_named(function, arguments, error, match, bad):
    with pytest.raises(error, match=match):
        function(**{**arguments(), **bad})


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
