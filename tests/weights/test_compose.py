"""Composition by the kernels: forward and gradients against ``ref``, launches, bits, plans."""

import itertools
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from budget import FP32_STEPS, Budget, _rounding, assert_bitwise, check_budget
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    GRADIENT_LAYOUTS,
    HEADS,
    WEIGHT_LAYOUTS,
    dtypes_for,
    fewest_examples,
    lay_out,
    normal,
    ranks,
    small_head_dims,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import ra_triton
from ra_triton.kernels.composition import backward as compose_backward
from ra_triton.launch import plans, recorded
from ra_triton.nn import RACausalSelfAttention
from ra_triton.weights.layout import RALayout
from ref import reciprocal_attention as ref

GATES = ("none", "number", "scalar", "heads", "apart")
NAMES = ("W_q", "W_k", "W_v", "W_recip", "w_std", "w_rec", "b_q", "b_k", "b_v")
# Row- or column-major, as the projection's gradient comes, or anything else.
ARRIVING = {
    **GRADIENT_LAYOUTS,
    "column_major": lambda t: t.mT.contiguous().mT,
    "sliced_columns": lambda t: torch.cat((t, t), 0).mT.contiguous().mT[: len(t)],
}
for name in ("head_major", "fused", "of_a_sum"):  # equal numbers would be rounded alike
    del ARRIVING[name]


@dataclass(frozen=True)
class Case:
    """A recipe for factors, options and the gradient that comes back."""

    C: int = 16
    H_kv: int = 1
    group: int = 1
    D: int = 16
    R: int = 4
    per_head: bool = False
    gates: tuple[str, str] = ("heads", "heads")
    with_bias: bool = True
    weight_layout: str = "packed"
    dtype: torch.dtype = torch.float32
    into: torch.dtype | None = None
    layouts: tuple[str, ...] = ("contiguous",) * 4
    arriving: str = "contiguous"
    seed: int = 0

    @property
    def heads(self) -> dict:
        return {"n_head": self.H_kv * self.group, "n_kv_head": self.H_kv}

    @property
    def layout(self) -> RALayout:
        return RALayout(self.H_kv * self.group, self.H_kv, self.D, self.R)

    @property
    def result(self) -> torch.dtype:
        return self.into or self.dtype

    def factors(self) -> dict:
        """What ``compose_weights`` takes, by name; gates in float32, absent ones None."""
        C, D, seed = self.C, self.D, 20 * self.seed
        H = self.H_kv * self.group
        widths = {"q": H * D, "k": self.H_kv * D, "v": self.H_kv * D}
        found = {f"W_{n}": normal(C, w, seed=seed + i) for i, (n, w) in enumerate(widths.items())}
        shape = (H, D, self.R) if self.per_head else (D, self.R)
        found["W_recip"] = normal(*shape, seed=seed + 3, scale=D**-0.5)
        found = {
            name: lay_out(t.to(self.dtype), layout)
            for (name, t), layout in zip(found.items(), self.layouts, strict=True)
        }
        for i, (name, kind) in enumerate(zip(("w_std", "w_rec"), self.gates, strict=True)):
            found[name] = {
                "none": None,
                "number": (-0.75, 2)[i],
                "scalar": normal(1, seed=seed + 4 + i)[0],
                "heads": normal(H, seed=seed + 4 + i),
                "apart": normal(H, 3, seed=seed + 4 + i)[:, 1],
            }[kind]
        for i, (n, w) in enumerate(widths.items()):
            bias = normal(w, dtype=self.dtype, seed=seed + 6 + i) if self.with_bias else None
            found[f"b_{n}"] = bias
        return found

    def incoming(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``dW [C, N]`` and ``dbias [N]`` or None, in the result's dtype."""
        N = self.layout.columns
        dW, dbias = (
            normal(*s, dtype=self.result, seed=50 + self.seed) for s in ((self.C, N), (N,))
        )
        dbias = torch.stack((dbias, dbias), -1)[:, 0] if self.seed % 2 else dbias
        return ARRIVING[self.arriving](dW), dbias if self.with_bias else None


def compose(case: Case, factors: dict, backend: str = "triton"):
    """``(W_fused, bias or None)``."""
    weights = {name: factors[name] for name in ("W_q", "W_k", "W_v", "W_recip", "w_std", "w_rec")}
    biases = tuple(factors[name] for name in NAMES[6:]) if case.with_bias else None
    options = {"weight_layout": case.weight_layout, "dtype": case.into, "backend": backend}
    found = ra_triton.compose_weights(**weights, biases=biases, **case.heads, **options)
    return found if case.with_bias else (found, None)


def gradients(case: Case, factors: dict, incoming, wanted=NAMES, backend="triton"):
    """Result and gradients by name, of those that are tensors."""
    factors = {
        name: t.detach().requires_grad_(name in wanted) if isinstance(t, torch.Tensor) else t
        for name, t in factors.items()
    }
    results = compose(case, factors, backend)
    leaves = {n: t for n, t in factors.items() if n in wanted and isinstance(t, torch.Tensor)}
    pairs = [(t, g) for t, g in zip(results, incoming, strict=True) if t is not None]
    pairs = [(t, g) for t, g in pairs if t.requires_grad and g is not None]
    grads = torch.autograd.grad(
        [t for t, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True
    )
    return [t if t is None else t.detach() for t in results], dict(zip(leaves, grads, strict=True))


def exactly(case: Case, factors: dict, incoming):
    """Results and gradients of ``ref`` in FP64, the biases as one more row; ``[rows, N]``."""
    leaves = {
        name: t.detach().double().requires_grad_()
        for name, t in factors.items()
        if isinstance(t, torch.Tensor)
    }
    weights = [leaves[f"W_{n}"] for n in "qkv"]
    dW, dbias = incoming
    rows = dW.double()
    if case.with_bias:
        weights = [
            torch.cat((w, leaves[f"b_{n}"][None])) for n, w in zip("qkv", weights, strict=True)
        ]
        rows = torch.cat((rows, dbias.double()[None]))
    gates = {
        name: leaves.get(name, 1.0 if factors[name] is None else factors[name])
        for name in ("w_std", "w_rec")
    }
    W = ref.compose(*weights, leaves["W_recip"], **case.heads, **gates)
    W = case.layout.pack(W) if case.weight_layout == "packed" else W
    grads = torch.autograd.grad(W, list(leaves.values()), rows, allow_unused=True)
    grads = zip(leaves.items(), grads, strict=True)
    return W.detach(), {n: torch.zeros_like(t) if g is None else g for (n, t), g in grads}


def budgets(case: Case, factors: dict, incoming):
    """Sums of products in float32, one rounding: of the result, and of each gradient.

    The result and each gradient are sums of products of factors with a sign or none, so that they
    are of the magnitudes what the sums are of the numbers.
    """
    W, grads = exactly(case, factors, incoming)
    sizes = {
        name: t.abs() if isinstance(t, torch.Tensor) else t if t is None else abs(t)
        for name, t in factors.items()
    }
    incoming = tuple(None if t is None else t.abs() for t in incoming)
    W_size, grad_sizes = exactly(case, sizes, incoming)

    def budget(exact, size, dtype):
        variance = (_rounding(dtype) * exact).square() + (FP32_STEPS * size).square()
        return Budget(exact, (variance + torch.finfo(dtype).tiny ** 2).sqrt())

    of_grads = {n: budget(g, grad_sizes[n], factors[n].dtype) for n, g in grads.items()}
    return budget(W, W_size, case.result), of_grads


def check(case: Case):
    factors, incoming = case.factors(), case.incoming()
    (W, bias), grads = gradients(case, factors, incoming)
    expected, of_grads = budgets(case, factors, incoming)
    rows = W if bias is None else torch.cat((W, bias[None]))
    check_budget(rows, expected, dtype=case.result, what=f"W_fused of {case}")
    assert grads.keys() == of_grads.keys()
    for name, grad in grads.items():
        check_budget(grad, of_grads[name], dtype=factors[name].dtype, what=f"d{name} of {case}")


@st.composite
def cases(draw, **fixed):
    H_kv, group = draw(HEADS)
    D = draw(small_head_dims)
    gates = st.sampled_from(GATES)
    dtype = draw(st.sampled_from(dtypes_for("triton")))
    case = Case(
        C=draw(st.one_of(st.sampled_from([16, 1, 33]), st.integers(0, 80))),
        H_kv=H_kv,
        group=group,
        D=D,
        R=draw(ranks(D)),
        per_head=draw(st.booleans()),
        gates=(draw(gates), draw(gates)),
        with_bias=draw(st.booleans()),
        weight_layout=draw(st.sampled_from(["packed", "split"])),
        dtype=dtype,
        into=draw(st.sampled_from([None, *dtypes_for("triton")])),
        layouts=tuple(draw(st.sampled_from(WEIGHT_LAYOUTS)) for _ in range(4)),
        arriving=draw(st.sampled_from(list(ARRIVING))),
        seed=draw(st.integers(0, 3)),
    )
    return replace(case, **fixed)


@fewest_examples
@given(case=cases())
@example(Case())
@example(Case(C=0))
@example(Case(C=0, with_bias=False))
@example(Case(C=70, H_kv=2, group=2, R=16, per_head=True, arriving="column_major"))
@example(Case(C=37, H_kv=1, group=3, D=20, R=20, gates=("scalar", "apart"), weight_layout="split"))
@example(Case(C=33, H_kv=2, D=32, R=0, arriving="column_major", gates=("apart", "scalar")))
@example(Case(C=33, dtype=torch.float16, into=torch.float32, arriving="expanded"))
@example(Case(C=40, into=torch.float16, gates=("number", "none"), arriving="column_major"))
@example(Case(C=21, arriving="lanes_apart", seed=1))
def test_composition_and_gradients_pass_the_gate(case):
    check(case)


@pytest.mark.parametrize("D", [72, 96, 128])
def test_wide_heads_pass_the_gate(D):
    check(Case(C=20, D=D, R=D - 1, group=2))
    check(Case(C=20, D=D, R=3, dtype=torch.float16, arriving="column_major"))


# Bits


def test_the_same_factors_give_the_same_bits():
    case = Case(C=70, H_kv=2, group=2, R=5)
    factors, incoming = case.factors(), case.incoming()
    first, second = (gradients(case, factors, incoming) for _ in range(2))
    for results in zip(first[0], second[0], strict=True):
        assert_bitwise(*results)
    for name, grad in first[1].items():
        assert_bitwise(second[1][name], grad, name)


@pytest.mark.parametrize("with_bias", [True, False])
def test_what_is_needed_passes_the_gate_whatever_else_is(with_bias):
    case = Case(C=21, H_kv=1, group=2, with_bias=with_bias)
    factors, incoming = case.factors(), case.incoming()
    names = NAMES if with_bias else NAMES[:6]
    expected = budgets(case, factors, incoming)[1]
    pairs = list(itertools.combinations(names, 2))
    for wanted in [*((name,) for name in names), *pairs[::5], names[:3], names[6:] or names[3:]]:
        grads = gradients(case, factors, incoming, wanted)[1]
        assert grads.keys() == set(wanted)
        for name, grad in grads.items():
            what = f"{name} of {wanted}"
            check_budget(grad, expected[name], dtype=torch.float32, what=what)


class Operators(TorchDispatchMode):
    """Makes a call go through the registered operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [nullcontext, Operators])
def test_a_gradient_of_one_result_alone(mode):
    case = Case(C=21)
    factors, (dW, dbias) = case.factors(), case.incoming()
    zero_W, zero_bias = torch.zeros_like(dW), torch.zeros_like(dbias)
    for given_, whole in (((dW, None), (dW, zero_bias)), ((None, dbias), (zero_W, dbias))):
        with mode():
            grads, expected = (gradients(case, factors, g)[1] for g in (given_, whole))
        for name, grad in grads.items():
            if grad is None:
                assert not expected[name].any()
            else:
                assert_bitwise(grad, expected[name], name)


def test_a_gate_of_another_dtype_has_its_gradient_rounded():
    case = Case(C=21)
    factors, incoming = case.factors(), case.incoming()
    factors |= {n: factors[n].half().float() for n in ("w_std", "w_rec")}
    exact = gradients(case, factors, incoming)
    for dtype in (torch.float16, torch.float64):
        other = factors | {n: factors[n].to(dtype) for n in ("w_std", "w_rec")}
        results, grads = gradients(case, other, incoming)
        for got, expected in zip(results, exact[0], strict=True):
            assert_bitwise(got, expected)
        for name, grad in grads.items():
            assert_bitwise(grad, exact[1][name].to(other[name].dtype), name)


def test_no_rank_is_a_rank_of_zero():
    case = Case(R=0)
    factors, incoming = case.factors(), case.incoming()
    expected, of_grads = gradients(case, factors, incoming)
    assert of_grads.pop("W_recip").shape == (16, 0)
    results, grads = gradients(case, factors | {"W_recip": None}, incoming)
    for got, want in zip(results, expected, strict=True):
        assert_bitwise(got, want)
    for name, grad in grads.items():
        assert_bitwise(grad, of_grads[name], name)


@pytest.mark.parametrize("with_bias", [True, False])
def test_lanes_that_are_copied_keep_their_bits(with_bias):
    case = Case(R=3, gates=("none", "none"), with_bias=with_bias, weight_layout="split")
    factors = case.factors()
    W, bias = compose(case, factors)
    for rows, kind in ((W, "W"), *(((bias[None], "b"),) if with_bias else ())):
        found = case.layout.split_columns(rows)
        q, k, v = (factors[f"{kind}_{n}"].view(len(rows), -1, case.D) for n in "qkv")
        assert_bitwise(found["q_std"], q[..., :-3])
        assert_bitwise(found["k_std"], k[..., :-3])
        assert_bitwise(found["v"], v)


# Launches


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that ran."""
    names, call = [], plans.Plan.__call__

    def record(self, *tensors):
        names.append(self.kernel.__name__)
        call(self, *tensors)

    monkeypatch.setattr(plans.Plan, "__call__", record)
    return names


FIRST, SECOND = "_compose_backward_kernel", "_compose_sums_kernel"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (NAMES, [FIRST, SECOND]),
        (NAMES[:3], [FIRST]),
        (("b_v",), [FIRST]),
        (("W_recip",), [FIRST, SECOND]),
        (("w_std",), [FIRST, SECOND]),
    ],
)
def test_one_launch_composes_and_at_most_two_differentiate(launched, wanted, expected):
    case = Case(C=40, H_kv=2, group=2)
    gradients(case, case.factors(), case.incoming(), wanted)
    assert launched == ["_compose_kernel", *expected]


@torch.no_grad()
def test_without_gradients_nothing_is_recorded(launched):
    case = Case()
    W, bias = compose(case, case.factors())
    assert launched == ["_compose_kernel"]
    assert not W.requires_grad
    assert W.is_contiguous()
    assert bias.is_contiguous()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_layer_composes_in_the_dtype_of_its_projection(launched, monkeypatch, bias, autocast):
    module = RACausalSelfAttention(
        32, 2, 4, parametrisation="composed", bias=bias, backend="triton", device=DEVICE
    )
    casts, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: casts.append(t) or to(t, *a, **k))
    with torch.autocast(DEVICE.type, torch.float16, enabled=autocast):
        q, _, _ = module.operands(normal(2, 5, 32))
    assert q.dtype == (torch.float16 if autocast else torch.float32)
    assert launched == ["_compose_kernel", "_projection_kernel"]
    cast = [tuple(t.shape) for t in casts if t.dtype == torch.float32 and autocast]
    assert set(cast) <= {(2, 5, 32)}  # x alone
    launched.clear()
    with torch.autocast(DEVICE.type, torch.float16, enabled=autocast):
        assert module.fused_weight()[0].dtype == torch.float32
        assert module.c_attn.weight.dtype == torch.float32
    q.sum().backward()
    assert all(
        p.grad.dtype == torch.float32 for p in module.c_attn.parameters() if p.grad is not None
    )


def test_a_weight_is_read_where_the_kernels_cannot_run(monkeypatch):
    """As on a CPU without the interpreter, from where a layer goes to its GPU."""
    monkeypatch.setattr("ra_triton.backend.triton._device_unsupported", lambda device: "no GPU")
    options = {"parametrisation": "composed", "backend": "triton"}
    module = RACausalSelfAttention(32, 2, 4, **options).to(DEVICE).eval()
    assert_bitwise(module.fused_weight()[0].mT, module.c_attn.weight)
    with pytest.raises(NotImplementedError, match="no GPU; use backend='sdpa'"):
        module(normal(2, 5, 32))
    assert module.fuse_().is_fused


def test_parts_depend_on_sizes_alone():
    few = compose_backward._partial(768, 12, 256, 1, 16, True)
    assert few.parts == 17
    assert few.part_rows == 48
    assert few.programs == 17 * 12
    assert compose_backward._partial(0, 12, 256, 1, 16, False).programs == 0
    assert compose_backward._partial(4096, 128, 128 * 128, 4, 16, False).parts == 1


# The contract with PyTorch


def flat(case: Case) -> tuple:
    """The operator's arguments."""
    f = case.factors()
    tensors = [f[n] if isinstance(f[n], torch.Tensor) else None for n in NAMES]
    tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    numbers = [None if isinstance(f[n], torch.Tensor) else f[n] for n in ("w_std", "w_rec")]
    return (*tensors, *numbers, *case.heads.values(), case.weight_layout == "packed", case.result)


@pytest.mark.parametrize(
    "case",
    [
        Case(C=21, H_kv=2, group=2, into=torch.float16),
        Case(with_bias=False, gates=("none", "number"), weight_layout="split", per_head=True),
        Case(R=0, gates=("scalar", "none"), layouts=("transposed", *["sliced"] * 3)),
    ],
    ids=["all", "few", "no rank"],
)
def test_opcheck(case):
    args = flat(case)
    torch.library.opcheck(torch.ops.ra_triton.compose.default, args)
    needed = [isinstance(t, torch.Tensor) for t in args[: len(NAMES)]]
    args = (*args[: len(NAMES)], *case.incoming(), *args[len(NAMES) :], needed)
    backward = torch.ops.ra_triton.compose_backward.default  # strides of gradients too
    torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["triton", pytest.param("sdpa", marks=pytest.mark.slow)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_compiles_to_one_graph_and_the_bits_of_eager(with_bias, backend):
    """Also where the sizes are symbols."""
    case = Case(H_kv=1, group=2, with_bias=with_bias, into=torch.float16)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(compose, fullgraph=True, dynamic=True, backend=counter)
    for C in (21, 16, 40):
        made = replace(case, C=C)
        factors, incoming = made.factors(), made.incoming()
        expected = gradients(case, factors, incoming, backend=backend)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "compose", compiled)
            got = gradients(case, factors, incoming, backend=backend)
        for a, e in zip(got[0], expected[0], strict=True):
            if e is not None:
                assert_bitwise(a, e)
        for name, grad in got[1].items():
            assert_bitwise(grad, expected[1][name], name)
    assert counter.frame_count == 1


def test_a_second_derivative_and_a_forward_mode_one_are_refused():
    case = Case()
    factors = {n: t.requires_grad_() for n, t in case.factors().items()}
    W, bias = compose(case, factors)
    loss = W.square().sum() + bias.sum()
    (grad,) = torch.autograd.grad(loss, factors["W_q"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot differentiate twice; use backend='sdpa'"):
        torch.autograd.grad(grad.sum(), factors["W_k"])
    with torch.autograd.forward_ad.dual_level():
        W_q = torch.autograd.forward_ad.make_dual(factors["W_q"], torch.ones_like(factors["W_q"]))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            compose(case, factors | {"W_q": W_q})


def test_a_factor_that_changes_before_the_backward_is_noticed():
    case = Case()
    factors = {n: t.requires_grad_() for n, t in case.factors().items()}
    for name in ("W_q", "W_recip", "w_rec"):
        W, _ = compose(case, factors | {name: (changed := factors[name] * 1)})
        changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            W.sum().backward()
    free = {name: factors[name] * 1 for name in ("W_v", "b_v")}  # no other gradient needs them
    W, bias = compose(case, factors | free)
    for t in free.values():
        t.mul_(2)
    (W.sum() + bias.sum()).backward()


def test_what_the_kernels_do_not_take_is_named_and_auto_takes_torch():
    case = Case(with_bias=False)
    double = {n: t if t is None else t.double() for n, t in case.factors().items()}
    with pytest.raises(NotImplementedError, match=r"got torch\.float64; use backend='sdpa'"):
        compose(case, double)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is no kernel to miss
        assert compose(case, double, "auto")[0].dtype == torch.float64
    with pytest.raises(NotImplementedError, match=r"dtype must be .*, got torch.float64; use"):
        compose(replace(case, into=torch.float64), case.factors())
    wide = replace(case, D=130, R=4)
    with pytest.raises(NotImplementedError, match=r"head dim 130 is outside 16..128"):
        compose(wide, wide.factors())


@pytest.mark.parametrize("backend", ["sdpa", "flex", "auto"])
def test_other_backends_give_what_the_definition_gives(backend):
    case = Case(C=21, H_kv=1, group=2, gates=("scalar", "heads"), into=torch.float16)
    factors, incoming = case.factors(), case.incoming()
    results, grads = gradients(case, factors, incoming, backend=backend)
    expected, of_grads = budgets(case, factors, incoming)
    rows = torch.cat((results[0], results[1][None]))
    check_budget(rows, expected, dtype=torch.float16, what="W_fused")
    for name, grad in grads.items():
        check_budget(grad, of_grads[name], dtype=torch.float32, what=name)


def test_a_composition_that_was_checked_is_known(monkeypatch):
    monkeypatch.setattr(recorded, "DEVICE", DEVICE.type)
    recorded.forget()
    case = Case()
    factors = case.factors()
    expected = compose(case, factors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ra_triton.weights.fused._check_factors", None)
        for got, want in zip(compose(case, factors), expected, strict=True):
            assert_bitwise(got, want)
    biases = [factors[name] for name in NAMES[6:]]
    weights = [factors[name] for name in NAMES[:4]]
    options = {"n_head": 1, "backend": "triton"}
    ra_triton.compose_weights(*weights, **options)
    with pytest.raises(TypeError, match="biases must be"):  # and not forgotten
        ra_triton.compose_weights(*weights, biases=biases, **options)
    recorded.forget()


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("D", [16, 20, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_config_passes_the_gate(dtype, D):
    for R, into in itertools.product((0, 4, D), (torch.bfloat16, torch.float32)):
        for arriving in ("contiguous", "column_major"):
            case = Case(C=200, H_kv=2, group=3, D=D, R=R, dtype=dtype, into=into, arriving=arriving)
            check(case)


@pytest.mark.gpu
def test_a_scalar_gate_may_be_on_the_cpu():
    case = Case(C=40, gates=("scalar", "heads"))
    factors, incoming = case.factors(), case.incoming()
    expected = gradients(case, factors, incoming)[1]
    grads = gradients(case, factors | {"w_std": factors["w_std"].cpu()}, incoming)[1]
    assert grads["w_std"].device.type == "cpu"
    for name, grad in grads.items():
        assert_bitwise(grad.to(DEVICE), expected[name], name)


@pytest.mark.gpu
def test_float32_products_are_not_rounded_to_tf32(monkeypatch):
    case = Case(C=100, D=64, R=16)
    expected = compose(case, case.factors())[0]
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert_bitwise(compose(case, case.factors())[0], expected)


@pytest.mark.gpu
def test_a_step_of_a_composed_weight_is_three_kernels():
    """In the dtype of autocast: no cast of a factor, no concatenation, no sum beside them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    module = RACausalSelfAttention(768, 12, 4, parametrisation="composed", device=DEVICE).c_attn
    incoming = [torch.ones_like(t) for t in module.fused(torch.bfloat16)]

    def step():
        module.zero_grad()
        torch.autograd.backward(module.fused(torch.bfloat16), incoming)
        torch.cuda.synchronize()

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
    kernels = [e.name for e in seen.events() if e.device_type == DeviceType.CUDA]
    kernels = [name for name in kernels if "FillFunctor" not in name]  # allocations are poisoned
    assert kernels == ["_compose_kernel", FIRST, SECOND]


@pytest.mark.gpu
def test_a_captured_step_replays_on_new_factors():
    case = Case(C=200, H_kv=2, group=2, D=64, into=torch.bfloat16)
    factors, incoming = case.factors(), case.incoming()

    def step():
        results, grads = gradients(case, factors, incoming)
        return [*results, *grads.values()]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = step()
    for name, t in factors.items():
        t.copy_(replace(case, seed=2).factors()[name])
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(found, step(), strict=True):
        assert_bitwise(got, expected)
