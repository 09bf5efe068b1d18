"""Quantized weights: rounding, the object, its errors, and the module that holds one."""

import copy
import io
import pickle

import pytest
import torch
from budget import assert_bitwise
from hypothesis import given
from hypothesis import strategies as st
from layers import C, D, H, R, layer, parametrisations
from strategies import DEVICE, NAN, ProjectionCase, backends, few_examples, normal, projection_cases

import ra_triton
from ra_triton import QuantizedWeight, quantize_weight
from ra_triton.nn import QuantizedLinear, RACausalSelfAttention, from_gpt2, to_gpt2
from ra_triton.weights.quantization import ACTIVATIONS, MAX_INT8_CHANNELS
from ref.reciprocal_attention import round_to_int8

WHICH = ("all", "reciprocal")
ways = pytest.mark.parametrize(
    ("which", "activations"), [(w, a) for w in WHICH for a in ("none", "int8")]
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def example(which="all", dtype=torch.float32, **options) -> QuantizedWeight:
    case = ProjectionCase(C=24, H_kv=2, D=16, dtype=dtype)
    return quantize_weight(case.tensors()[1], case.R, which=which, **case.heads, **options)


# Rounding


@few_examples
@given(
    case=projection_cases(DTYPES),
    which=st.sampled_from(WHICH),
    scale=st.sampled_from([1.0, 1e-6, 1e4]),
)
def test_no_element_is_further_off_than_half_a_scale(case, which, scale):
    if which == "reciprocal" and case.R == 0:
        return
    W = case.tensors()[1] * scale
    W[:, 0] = 0  # a column without any scale of its own
    weight_layout = case.weight_layout
    q = quantize_weight(W, case.R, which=which, weight_layout=weight_layout, **case.heads)
    if weight_layout == "split":
        W = ra_triton.pack_weight(W, case.R, **case.heads)
    exact = q.dequantize(torch.float64)
    expected = W if which == "all" else q.layout.take_low(W)[0]
    stands_for = exact if which == "all" else q.layout.take_low(exact)[0]
    # The division rounds once in float32, of a quotient of 127 at most.
    half = q.scale.double() * (0.5 + 127 * 2.0**-24)
    assert ((stands_for - expected.double()).abs() <= half).all()
    data, scales = round_to_int8(expected.mT)
    assert_bitwise(q.data.float(), data)
    assert_bitwise(q.scale, scales.flatten())
    assert int(q.data.abs().max()) <= 127
    if which == "reciprocal":
        assert_bitwise(q.layout.take_low(q.dequantize(W.dtype))[1], q.layout.take_low(W)[1])


def test_rounding_what_is_rounded_changes_nothing():
    q = example()
    again = quantize_weight(
        q.dequantize(), 4, which="all", n_head=2, n_kv_head=2, weight_layout="packed"
    )
    assert_bitwise(again.data, q.data)


def test_bytes_are_those_that_are_read():
    dense = 24 * 3 * 32 * 2  # [C, N] in 16 bits
    everything, reciprocal = (example(which, torch.bfloat16) for which in WHICH)
    assert everything.nbytes == dense // 2 + 96 * 4
    low = 2 * 2 * 4  # both sides, heads, ranks
    assert reciprocal.nbytes == dense - 24 * low + 4 * low


# The object


@ways
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_dict_comes_back_through_a_file(which, activations, dtype):
    q = example(which, dtype, activations=activations)
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    back = QuantizedWeight.from_state_dict(torch.load(file, weights_only=True))
    for same in (back, copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.to(DEVICE)):
        assert (same.layout, same.activations, same.which) == (q.layout, activations, which)
        for a, b in zip(same.tensors, q.tensors, strict=True):
            assert_bitwise(a, b)


def test_a_cast_leaves_integers_and_scales():
    q = example("reciprocal").to(dtype=torch.bfloat16)
    assert [t.dtype for t in q.tensors] == [torch.int8, torch.float32, torch.bfloat16]


def test_it_is_immutable_and_prints_sizes():
    q = example()
    with pytest.raises(AttributeError):
        q.scale = q.scale * 2
    assert "'all'" in repr(q)
    assert "(24, 96)" in repr(q)


def changed(q=None, **fields):
    state = (q or example()).state_dict()
    return QuantizedWeight.from_state_dict({**state, **fields})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"data": torch.zeros(96, 24)}, TypeError, "data must be a tensor of torch.int8"),
        ({"scale": None}, TypeError, "scale must be a tensor of torch.float32, got NoneType"),
        ({"data": torch.zeros(95, 24, dtype=torch.int8)}, ValueError, r"data must be \[96, C\]"),
        ({"scale": torch.ones(95)}, ValueError, "scale must be one value per row"),
        ({"R": 5, "others": torch.ones(76, 24)}, ValueError, r"data must be \[20, C\]"),
        ({"n_head": 3}, ValueError, "multiple of n_kv_head"),
        ({"n_head": "2"}, TypeError, "n_head of state must be an int, got '2'"),
        ({"activations": "fp8"}, ValueError, "activations must be one of none, int8"),
        ({"bits": 4}, ValueError, r"not \['bits'\]"),
    ],
)
def test_a_state_that_does_not_fit_is_told(fields, error, message):
    with pytest.raises(error, match=message):
        changed(**fields)


def test_operands_have_to_be_dense_rows_on_one_device():
    transposed = torch.zeros(24, 96, dtype=torch.int8).T
    with pytest.raises(ValueError, match="data must be contiguous"):
        changed(data=transposed)
    with pytest.raises(ValueError, match="scale must be on"):
        changed(scale=torch.empty(96, device="meta"))


@pytest.mark.parametrize("dtype", [torch.int8, "float32"])
def test_numbers_that_are_stood_for_are_floats(dtype):
    with pytest.raises(TypeError, match="dtype must be a floating-point dtype"):
        example().dequantize(dtype)


# Errors before any launch


W96 = torch.ones(24, 96)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"which": "some"}, ValueError, "which must be one of reciprocal, all, got 'some'"),
        ({"activations": "fp8"}, ValueError, "activations must be one of none, int8"),
        ({"weight_layout": "rows"}, ValueError, "weight_layout must be one of"),
        ({"W_fused": W96.int()}, TypeError, "W_fused must be one of"),
        ({"W_fused": W96.double()}, TypeError, "W_fused must be one of"),
        ({"W_fused": W96[0]}, ValueError, r"W_fused must be \[C, N\]"),
        ({"W_fused": W96[:0]}, ValueError, "C >= 1"),
        ({"W_fused": W96 * NAN}, ValueError, "W_fused must be finite"),
        ({"W_fused": W96.to("meta")}, ValueError, "W_fused must hold numbers, got .* meta"),
        ({"R": 0, "which": "reciprocal"}, ValueError, "needs R >= 1"),
        ({"R": 17}, ValueError, "R must be between 0 and the head dim 16"),
        ({"R": 4.0}, TypeError, "R must be an int"),
        ({"n_head": 5}, ValueError, "expected a positive multiple"),
    ],
)
def test_wrong_arguments_of_quantize_weight(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize_weight(**{"W_fused": W96, "R": 4, "which": "all", "n_head": 2, **arguments})


def test_more_channels_than_int32_sums_hold_are_refused():
    assert 127**2 * MAX_INT8_CHANNELS < 2**31 <= 127**2 * (MAX_INT8_CHANNELS + 1)
    W = torch.zeros(MAX_INT8_CHANNELS + 1, 3)
    with pytest.raises(ValueError, match=f"at most {MAX_INT8_CHANNELS} rows"):
        quantize_weight(W, 1, which="all", n_head=1, activations="int8")
    quantize_weight(W, 1, which="all", n_head=1)


X = normal(2, 5, 24)


@backends
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"R": 5}, ValueError, "R must be 4 like the quantized weight's, got 5"),
        ({"R": True}, TypeError, "R must be 4"),
        ({"n_head": 4}, ValueError, "n_head must be 2 like"),
        ({"n_kv_head": 1}, ValueError, "n_kv_head must be 2 like"),
        ({"n_head": 2.0}, TypeError, "n_head must be 2 like"),
        ({"x": X[0]}, ValueError, r"x must be \[B, T, C\]"),
        ({"x": X[..., :23]}, ValueError, r"W_fused must be \[C, N\] with C = 23"),
        ({"x": X[..., ::2]}, ValueError, "stride 1 in its last dim"),
        ({"x": X.double()}, TypeError, "x must be one of"),
        ({"x": X.half()}, TypeError, r"use W_fused.to\(dtype=torch.float16\)"),
        ({"W_fused": example().to("meta")}, ValueError, "W_fused must be on .* like x, got meta"),
        ({"bias": normal(95)}, ValueError, "bias must be one value per column"),
        ({"bias": normal(96).half()}, TypeError, "bias must be torch.float32 like x"),
        ({"x": X.clone().requires_grad_()}, ValueError, r"use torch.no_grad\(\)"),
        ({"bias": normal(96).requires_grad_()}, ValueError, "bias needs a gradient"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
@pytest.mark.parametrize("function", ["ra_attention", "project"])
def test_wrong_calls_raise_before_any_launch(function, backend, arguments, error, message):
    call = {"x": X, "W_fused": example("reciprocal"), "R": 4, "backend": backend, **arguments}
    with pytest.raises(error, match=message):
        getattr(ra_triton, function)(**call)


def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(ValueError, match="x needs a gradient"):
            ra_triton.ra_attention(x, example())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a call that Triton cannot run")
def test_an_unsupported_device_is_told_before_any_launch(monkeypatch):
    from ra_triton.backend import triton

    monkeypatch.setattr(triton, "_look_at", lambda device: "compute capability 8.0, got 7.5")
    with pytest.raises(NotImplementedError, match=r"8\.0, got 7\.5; use backend='sdpa'"):
        ra_triton.ra_attention(X, example(), backend="triton")


# The module


@ways
@backends
@parametrisations
def test_a_quantized_layer_is_the_functions_it_is_made_of(
    which, activations, backend, parametrisation
):
    module = layer(parametrisation, backend=backend).eval()
    W_fused, bias = (t.detach() for t in module.fused_weight())
    options = {"n_head": H, "weight_layout": "packed"}
    W = quantize_weight(W_fused, R, which=which, activations=activations, **options)
    assert module.quantize_(which, activations=activations) is module
    x = normal(2, 9, C, seed=5)
    with torch.no_grad():
        y = ra_triton.ra_attention(x, W, R, bias=bias, backend=backend, **options)
        assert_bitwise(module(x), module.c_proj(y))
        assert_bitwise(module.c_attn.weight, W.dequantize().mT)
        assert module.reciprocal_share(x).isfinite().all()
        assert module.c_attn(x).shape == (2, 9, 3 * C)
    assert which in repr(module)
    assert module.gates() == {}


@ways
def test_a_layers_state_dict_comes_back(which, activations):
    module = layer("composed").quantize_(which, activations=activations).eval()
    fresh = layer("free", seed=1).quantize_(which, activations=activations).eval()
    fresh.load_state_dict(module.state_dict())
    x = normal(2, 9, C)
    with torch.no_grad():
        assert_bitwise(fresh(x), module(x))
        assert_bitwise(copy.deepcopy(module)(x), module(x))
    with pytest.raises(RuntimeError, match=r"c_attn\.data"):
        fresh.load_state_dict(layer("free").state_dict())


@pytest.mark.parametrize("which", WHICH)
def test_int8_columns_for_other_activations_are_refused(which):
    states = {a: layer().quantize_(which, activations=a).state_dict() for a in ACTIVATIONS}
    for saved, state in states.items():
        for wanted in ACTIVATIONS:
            module = layer(seed=1).quantize_(which, activations=wanted)
            before = {name: t.clone() for name, t in module.c_attn.state_dict().items()}
            if wanted == saved:
                module.load_state_dict(state)
                continue
            match = f"activations='{saved}', this layer with activations='{wanted}': quantize_ it"
            with pytest.raises(RuntimeError, match=match):
                module.load_state_dict(state)
            for name, t in module.c_attn.state_dict().items():
                assert_bitwise(t, before[name], name)
            # A state from before they were told apart says nothing.
            del (older := dict(state))["c_attn.activations_code"]
            module.load_state_dict(older)


@pytest.mark.parametrize("which", WHICH)
def test_a_cast_of_the_module_keeps_its_scales(which):
    module = layer().quantize_(which)
    scale = module.c_attn.scale.clone()
    module.to(torch.bfloat16)
    assert_bitwise(module.c_attn.scale, scale)
    assert module.c_attn.bias.dtype == torch.bfloat16
    with torch.no_grad():
        assert module(normal(2, 9, C, dtype=torch.bfloat16)).isfinite().all()


@backends
def test_a_gradient_is_refused_and_no_grad_is_the_remedy(backend):
    module = layer(backend=backend).quantize_("all")
    x = normal(2, 9, C).requires_grad_()
    with pytest.raises(ValueError, match=r"use torch.no_grad\(\)"):
        module(x)
    with torch.no_grad():
        module(x)
    with torch.inference_mode():
        module(normal(2, 9, C))


def test_a_layer_is_rounded_once():
    module = layer().quantize_("reciprocal")
    with pytest.raises(ValueError, match="quantized already"):
        module.quantize_("all")
    with pytest.raises(ValueError, match="needs R >= 1"):
        RACausalSelfAttention(C, H, 0).quantize_("reciprocal")


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("orientation", ["linear", "conv1d"])
def test_stock_gpt2_gets_the_numbers_that_the_integers_stand_for(which, orientation):
    module = layer().quantize_(which)
    plain = layer("free", seed=1)
    state = to_gpt2(module, orientation=orientation)
    from_gpt2(plain, state, orientation=orientation)
    assert_bitwise(plain.c_attn.weight.detach(), module.c_attn.weight)
    assert_bitwise(plain.c_attn.bias.detach(), module.c_attn.bias)
    with pytest.raises(ValueError, match="load first, then quantize_"):
        from_gpt2(module, state, orientation=orientation)


def test_the_linear_layer_has_buffers_alone():
    module = layer().quantize_("reciprocal").c_attn
    assert isinstance(module, QuantizedLinear)
    assert not list(module.parameters())
    assert set(module.state_dict()) == {"data", "scale", "others", "bias", "activations_code"}
    assert module.data.shape == (2 * H * R, C)
    assert module.others.shape == (3 * H * D - 2 * H * R, C)
