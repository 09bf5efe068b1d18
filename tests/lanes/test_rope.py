"""pack_qk and pack_qk_ with rotation and QK-norm: the definition, gradients, views, positions."""

from dataclasses import dataclass, replace

import pytest
import torch
from budget import FP32_STEPS, Budget, _rounding, assert_bitwise, check_budget
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    GRADIENT_LAYOUTS,
    HEAD_LAYOUTS,
    WRITABLE_LAYOUTS,
    backend_dtypes,
    backends,
    dtypes_for,
    few_examples,
    gradient_layouts,
    lay_out,
    lengths,
    normal,
    ranks,
)
from test_packing import outside

import ra_triton
from ref import reciprocal_attention as ref

EPS = 1e-6
NAMES = ("q", "k", "q_low", "k_low", "q_weight", "k_weight")


def tables(length, rope_dims, theta=10000.0):
    """``cos, sin`` ``[length, rope_dims / 2]`` float32."""
    frequencies = theta ** -(torch.arange(0, rope_dims, 2, device=DEVICE) / rope_dims)
    angles = torch.arange(length, device=DEVICE)[:, None] * frequencies
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class Case:
    """A recipe for the tensors and options of one call."""

    B: int = 2
    T: int = 5
    H_kv: int = 1
    group: int = 2
    D: int = 16
    R: int | None = 4  # None: packed already
    rope_dims: int | None = 16  # None: no rotation
    norm: str = "none"  # or "bare", "weighted"
    position: str = "int"  # or "zero", "start", "scalar", "each"
    whole: bool = False  # tables of rope_dims, not rope_dims / 2 lanes
    half_tables: bool = False  # in the dtype of the operands
    dtype: torch.dtype = torch.float32
    layouts: tuple[str, ...] = ("contiguous",) * 4
    seed: int = 0

    def tensors(self):
        """``q, k, q_low, k_low``, the latter None where they come packed."""
        H, D = self.H_kv * self.group, self.D
        sizes = [(H, D), (self.H_kv, D)]
        sizes += [] if self.R is None else [(self.H_kv, self.R), (H, self.R)]
        made = [
            lay_out(normal(self.B, self.T, *size, dtype=self.dtype, seed=7 * self.seed + i), layout)
            for i, (size, layout) in enumerate(zip(sizes, self.layouts, strict=False))
        ]
        return made + [None] * (4 - len(made))

    def weights(self):
        if self.norm != "weighted":
            return [None, None]
        w = [normal(self.D, seed=90 + i) for i in range(2)]
        return [t.to(self.dtype) if self.half_tables else t for t in w]

    def options(self, weights):
        """What is passed, and ``cos, sin`` ``[B, T, pairs]`` as the tokens see them."""
        options = {}
        if self.norm != "none":
            options["qk_norm"] = True if self.norm == "bare" else tuple(weights)
        if self.rope_dims is None:
            return options, None
        at = torch.arange(self.T, device=DEVICE).expand(self.B, self.T)
        starts = (3 + 4 * torch.arange(self.B, device=DEVICE)) % 11
        position = {
            "zero": 0,
            "int": 7,
            "scalar": torch.tensor(5, device=DEVICE, dtype=torch.int32),
            "start": starts,
            "each": ((at * 5 + starts[:, None]) % 13).mT.contiguous().mT,
        }[self.position]
        if self.position == "each":
            at = position
        else:
            at = at + (position[:, None] if self.position == "start" else position)
        cos, sin = tables(self.T + 13, self.rope_dims)
        if self.half_tables:
            cos, sin = cos.to(self.dtype), sin.to(self.dtype)
        seen = cos[at], sin[at]
        if self.whole:
            cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
        options["rope"] = cos, sin
        if self.position != "zero":
            options["position"] = position
        if self.rope_dims != self.D:
            options["rope_dims"] = self.rope_dims
        return options, seen


@st.composite
def cases(draw, layouts=HEAD_LAYOUTS, **fixed):
    D = draw(st.sampled_from([16, 20, 64, 18, 72, 130]))
    rope_dims = draw(st.sampled_from([D, D - 4, None, 2, 2 * (D // 4)]))
    norms = ["none", "weighted", "bare"] if rope_dims is not None else ["weighted", "bare"]
    case = Case(
        B=draw(st.sampled_from([2, 1, 3])),
        T=draw(lengths(blocks=2)),
        H_kv=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from([2, 1, 3])),
        D=D,
        R=draw(st.one_of(st.none(), ranks(D))),
        rope_dims=rope_dims,
        norm=draw(st.sampled_from(norms)),
        position=draw(st.sampled_from(["zero", "int", "start", "each", "scalar"])),
        whole=draw(st.booleans()),
        half_tables=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes_for("triton"))),
        layouts=tuple(draw(st.sampled_from(layouts if i < 2 else HEAD_LAYOUTS)) for i in range(4)),
        seed=draw(st.integers(0, 2)),
    )
    return replace(case, **fixed)


def packed(q, k, q_low, k_low):
    if q_low is None:
        return q, k
    d_std = q.shape[-1] - q_low.shape[-1]
    return torch.cat((q[..., :d_std], k_low), -1), torch.cat((k[..., :d_std], q_low), -1)


def definition(inputs, case, seen):
    """``ref`` in the dtype of the inputs: ``(q, k)``."""
    seen = (None, None) if seen is None else seen
    tables = {
        name: None if t is None else t.to(inputs[0].dtype)
        for name, t in zip(("cos", "sin"), seen, strict=True)
    }
    eps = None if case.norm == "none" else EPS
    return tuple(
        ref.norm_rope(p, weight=w, eps=eps, **tables)
        for p, w in zip(packed(*inputs[:4]), inputs[4:], strict=True)
    )


def double(tensors):
    return [None if t is None else t.detach().double() for t in tensors]


def turned_size(z, seen):
    """Sizes of the two products that make each lane of a turned (or turned back) ``z``."""
    if seen is None:
        return z.abs()
    cos, sin = (t.double().abs()[:, :, None] for t in seen)
    pairs = cos.shape[-1]
    a, b, rest = z.abs().split([pairs, pairs, z.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat((a * cos + b * sin, b * cos + a * sin, rest), dim=-1)


def budgets(inputs, case, seen):
    exact = double(inputs)
    for y, p, w in zip(definition(exact, case, seen), packed(*exact[:4]), exact[4:], strict=True):
        z = ref.norm_rope(p, weight=w, eps=None if case.norm == "none" else EPS)
        sigma = (
            (_rounding(case.dtype) * y).square()
            + (FP32_STEPS * turned_size(z, seen)).square()
            + torch.finfo(case.dtype).tiny ** 2
        ).sqrt()
        yield Budget(y, sigma)


def check(case, backend, inputs, results, seen):
    for name, got, budget in zip("qk", results, budgets(inputs, case, seen), strict=True):
        check_budget(got, budget, dtype=case.dtype, what=f"{name} of {case} on {backend}")


@backends
@given(case=cases())
@example(case=Case())
@example(case=Case(R=16, rope_dims=2, norm="weighted"))
@example(case=Case(D=20, R=3, rope_dims=14, norm="bare", T=33))
@example(case=Case(rope_dims=8, position="start"))
def test_new_operands_are_the_definition_and_the_inputs_stay(backend, case):
    check_operands(backend, case)


def check_operands(backend, case):
    inputs, weights = case.tensors(), case.weights()
    before = [None if t is None else t.clone() for t in inputs]
    options, seen = case.options(weights)
    results = ra_triton.pack_qk(*inputs, **options, backend=backend)
    check(case, backend, (*inputs, *weights), results, seen)
    for t, copy in zip(inputs, before, strict=True):
        if t is not None:
            assert_bitwise(t, copy)


@few_examples
@backends
@given(case=cases(layouts=WRITABLE_LAYOUTS))
@example(case=Case(R=None, rope_dims=8, layouts=("fused",) * 4))
@example(case=Case(D=20, R=7, rope_dims=8))
@example(case=Case(D=20, R=14, rope_dims=8))
@example(case=Case(R=3, rope_dims=8, norm="weighted"))
def test_in_place_has_the_same_bits_and_writes_nothing_else(backend, case):
    q, k, *low = case.tensors()
    options, _ = case.options(case.weights())
    expected = ra_triton.pack_qk(q, k, *low, **options, backend=backend)
    fences = [outside(t) for t in (q, k)]
    result = ra_triton.pack_qk_(q, k, *low, **options, backend=backend)
    assert result[0] is q
    assert result[1] is k
    for t, want, fence in zip((q, k), expected, fences, strict=True):
        assert_bitwise(t, want)
        assert_bitwise(outside(t), fence, "storage around the tensor")


def gradient_budgets(inputs, case, seen, grads):
    """FP64 autograd through ``ref``; the terms of each sum in absolute value."""
    leaves = [None if t is None else t.requires_grad_() for t in double(inputs)]
    outputs = definition(leaves, case, seen)
    present = [t for t in leaves if t is not None]
    made = torch.autograd.grad(outputs, present, [g.double() for g in grads], allow_unused=True)
    exact = dict(
        zip([n for n, t in zip(NAMES, leaves, strict=True) if t is not None], made, strict=True)
    )
    R = 0 if inputs[2] is None else inputs[2].shape[-1]
    sizes = {}
    with torch.no_grad():
        for name, other, p, w, dy in zip(
            "qk", "kq", packed(*leaves[:4]), leaves[4:], grads, strict=True
        ):
            back = None if seen is None else (seen[0], -seen[1])
            dz = turned_size(dy.double(), back)
            size = dz
            if case.norm != "none":
                r = 1 / torch.sqrt(p.square().mean(-1, keepdim=True) + EPS)
                n = (p * r).abs()
                dn = dz if w is None else dz * w.abs()
                size = r * (dn + n * (dn * n).mean(-1, keepdim=True))
                sizes[f"{name}_weight"] = (dz * n).sum((0, 1, 2))
            d_std = case.D - R
            zeros = torch.zeros_like(size[..., d_std:])
            sizes[name] = torch.cat((size[..., :d_std], zeros), -1)
            sizes[f"{other}_low"] = size[..., d_std:]
    for name, expected in exact.items():
        dtype = inputs[NAMES.index(name)].dtype
        sigma = (
            (_rounding(dtype) * expected).square()
            + (FP32_STEPS * sizes[name]).square()
            + torch.finfo(dtype).tiny ** 2
        ).sqrt()
        yield name, dtype, Budget(expected, sigma)


@few_examples
@backends
@given(case=cases(), layouts=st.tuples(gradient_layouts, gradient_layouts))
@example(case=Case(R=16, rope_dims=2, norm="weighted"), layouts=("contiguous",) * 2)
@example(case=Case(R=5, norm="weighted", T=40, group=1), layouts=("contiguous",) * 2)
@example(case=Case(D=20, R=None, rope_dims=14), layouts=("lanes_apart", "expanded"))
def test_gradients_are_those_of_the_definition(backend, case, layouts):
    check_gradients(backend, case, layouts)


def check_gradients(backend, case, layouts):
    inputs = (*case.tensors(), *case.weights())
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    options, seen = case.options(leaves[4:])
    outputs = ra_triton.pack_qk(*leaves[:4], **options, backend=backend)
    grads = [
        GRADIENT_LAYOUTS[layout](normal(*y.shape, dtype=case.dtype, seed=60 + i))
        for i, (y, layout) in enumerate(zip(outputs, layouts, strict=True))
    ]
    present = [t for t in leaves if t is not None]
    made = iter(torch.autograd.grad(outputs, present, grads))
    for name, dtype, budget in gradient_budgets(inputs, case, seen, grads):
        check_budget(next(made), budget, dtype=dtype, what=f"d{name} of {case} on {backend}")


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["none", "weighted"])
@pytest.mark.parametrize("D", [16, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_config_passes_the_gate_on_a_gpu(dtype, D, norm):
    for R, rope_dims, T in ((4, D, 300), (None, D // 2, 1), (D // 2, D, 1000)):
        case = Case(T=T, H_kv=2, D=D, R=R, rope_dims=rope_dims, norm=norm, dtype=dtype)
        check_operands("triton", case)
        check_gradients("triton", case, ("contiguous", "contiguous"))


@backends
def test_only_the_gradients_that_are_needed_come_back(backend):
    case = Case(norm="weighted")
    inputs = [
        t.requires_grad_(i in (1, 3, 4)) for i, t in enumerate((*case.tensors(), *case.weights()))
    ]
    options, _ = case.options(inputs[4:])
    outputs = ra_triton.pack_qk(*inputs[:4], **options, backend=backend)
    sum(y.square().sum() for y in outputs).backward()
    assert [t.grad is not None for t in inputs] == [i in (1, 3, 4) for i in range(6)]
    assert all(t.grad.isfinite().all() for t in inputs if t.grad is not None)


def test_the_kernels_refuse_to_differentiate_twice():
    case = Case(norm="weighted")
    inputs = [t.requires_grad_() for t in (*case.tensors(), *case.weights())]
    options, _ = case.options(inputs[4:])
    y = ra_triton.pack_qk(*inputs[:4], **options, backend="triton")[0]
    (grad,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot differentiate twice; use backend='sdpa'"):
        grad.sum().backward()


def test_the_kernels_refuse_forward_mode():
    case = Case(R=None)
    q, k, *_ = case.tensors()
    options, _ = case.options([])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ra_triton.pack_qk(dual, k, **options, backend="triton")


# Properties


@backend_dtypes
def test_rotated_scores_depend_on_distance_alone(backend, dtype):
    """The same token pair at positions 0 and 9: products agree within two roundings a lane."""
    case = Case(B=1, T=9, group=1, R=3, dtype=dtype)
    inputs = case.tensors()
    scores = []
    for position in (0, 9):
        q, k = ra_triton.pack_qk(*inputs, rope=tables(18, 16), position=position, backend=backend)
        scores.append(torch.einsum("bihd,bjhd->bhij", q.double(), k.double()))
        size = torch.einsum("bihd,bjhd->bhij", q.double().abs(), k.double().abs())
    unit = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps  # angles of float32 too
    assert ((scores[0] - scores[1]).abs() <= 4 * unit * size + 4 * unit).all()


@backends
def test_low_lanes_beyond_rope_dims_carry_no_position(backend):
    case = Case(R=4, rope_dims=12, T=9)
    inputs = case.tensors()
    options, _ = case.options([])
    for got, low in zip(
        ra_triton.pack_qk(*inputs, **options, backend=backend), (inputs[3], inputs[2]), strict=True
    ):
        assert_bitwise(got[..., -4:], low)


@backends
def test_position_zero_changes_nothing(backend):
    q, k, q_low, k_low = Case(T=1).tensors()
    rope = tables(1, 16)
    for got, want in zip(
        ra_triton.pack_qk(q, k, q_low, k_low, rope=rope, backend=backend),
        packed(q, k, q_low, k_low),
        strict=True,
    ):
        assert_bitwise(got, want)


@backends
@pytest.mark.parametrize("position", ["start", "each"])
def test_ways_to_say_a_position_have_the_same_bits(backend, position):
    inputs = Case(B=2, T=6, R=3).tensors()
    rope = tables(30, 16)
    first = torch.tensor([4, 4], device=DEVICE)
    said = first if position == "start" else first[:, None] + torch.arange(6, device=DEVICE)
    said = said.int() if position == "each" else said
    expected = ra_triton.pack_qk(*inputs, rope=rope, position=4, backend=backend)
    for got, want in zip(
        ra_triton.pack_qk(*inputs, rope=rope, position=said, backend=backend), expected, strict=True
    ):
        assert_bitwise(got, want)


@backends
@pytest.mark.parametrize("in_place", [True, False])
def test_tokens_beyond_the_tables_turn_to_nan_and_others_do_not(backend, in_place):
    """A device tensor of positions is not read on the host, so no error can name it."""
    q, k, *_ = Case(B=2, T=6, R=None, group=1).tensors()
    position = torch.tensor([[0, 1, 2, 3, 4, 5], [0, -1, 8, 7, 10**9, -(10**12)]], device=DEVICE)
    pack = ra_triton.pack_qk_ if in_place else ra_triton.pack_qk
    lost = torch.zeros(2, 6, 1, 16, dtype=torch.bool, device=DEVICE)
    lost[1, [1, 2, 4, 5], :, :12] = True
    for got in pack(q, k, rope=tables(8, 12), rope_dims=12, position=position, backend=backend):
        assert_bitwise(got.isnan().float(), lost.float())


@backends
def test_decoding_a_token_at_a_time_has_the_bits_of_all_at_once(backend):
    case = Case(B=2, T=7, R=4, norm="weighted")
    inputs = case.tensors()
    options = {"rope": tables(7, 16), "qk_norm": tuple(case.weights()), "backend": backend}
    whole = ra_triton.pack_qk(*inputs, **options)
    for t in range(7):
        one = [x[:, t : t + 1] for x in inputs]
        for position in (t, torch.full((2,), t, device=DEVICE)):
            for got, want in zip(
                ra_triton.pack_qk(*one, **options, position=position), whole, strict=True
            ):
                assert_bitwise(got, want[:, t : t + 1])


def test_decoding_plans_one_launch_wherever_the_token_stands():
    from ra_triton.kernels.lanes.norm_rope import _plan

    q, k, *_ = Case(B=1, T=1, R=None, D=48).tensors()  # sizes that no other test has
    before = _plan.cache_info().misses
    for position in range(5):
        ra_triton.pack_qk_(q, k, rope=tables(5, 48), position=position, backend="triton")
    assert _plan.cache_info().misses == before + 1


@backends
def test_sources_and_tables_may_be_views_of_what_is_overwritten(backend):
    buffer = normal(2, 9, 4, 16)
    q, k = buffer[:, :, :2], buffer[:, :, 2:]
    low = (k[..., -4:], q[..., -4:])
    weights = q[0, 0, 0], k[0, 0, 0]
    rope = tuple(q[0, :, 0, :8] for _ in range(2))
    options = {"rope": rope, "qk_norm": weights, "backend": backend}
    expected = ra_triton.pack_qk(q, k, *low, **options)
    for got, want in zip(ra_triton.pack_qk_(q, k, *low, **options), expected, strict=True):
        assert_bitwise(got, want)


@backends
@pytest.mark.parametrize("norm", ["none", "weighted"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_in_gives_nothing_out(backend, norm, shape):
    case = Case(B=shape[0], T=shape[1], norm=norm, position="start")
    leaves = [None if t is None else t.requires_grad_() for t in (*case.tensors(), *case.weights())]
    options, _ = case.options(leaves[4:])
    outputs = ra_triton.pack_qk(*leaves[:4], **options, backend=backend)
    assert [y.shape for y in outputs] == [t.shape for t in leaves[:2]]
    present = [t for t in leaves if t is not None]
    for grad in torch.autograd.grad(outputs, present, [torch.zeros_like(y) for y in outputs]):
        assert not grad.any()


# Compilers


def test_opcheck_of_the_operator():
    case = Case(norm="weighted", position="start")
    inputs = [t.requires_grad_() for t in (*case.tensors(), *case.weights())]
    options, _ = case.options(inputs[4:])
    call = (*inputs, *options["rope"], options["position"], 16, EPS)
    torch.library.opcheck(torch.ops.ra_triton.norm_rope, call)
    bare = (*Case(R=None).tensors()[:2], *[None] * 4, *options["rope"], None, 16, None)
    torch.library.opcheck(torch.ops.ra_triton.norm_rope, bare)


@backends
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_code_sees_one_operator(backend, in_place):
    case = Case(norm="weighted", position="start")
    inputs, weights = case.tensors(), case.weights()
    options, _ = case.options(weights)
    pack = ra_triton.pack_qk_ if in_place else ra_triton.pack_qk

    def run(q, k, *low):
        return pack(q.clone(), k.clone(), *low, **options, backend=backend)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(*inputs), run(*inputs), strict=True):
        assert_bitwise(got, want)


def test_functional_gradients_are_those_of_autograd():
    case = Case(norm="weighted")
    inputs = (*case.tensors(), *case.weights())

    def loss(*leaves):
        options, _ = case.options(leaves[4:])
        return sum(
            y.square().sum() for y in ra_triton.pack_qk(*leaves[:4], **options, backend="triton")
        )

    got = torch.func.grad(loss, argnums=tuple(range(6)))(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert_bitwise(a, b)


# Errors


def arguments(**changes):
    q, k, q_low, k_low = Case().tensors()
    rope = tables(9, 16)
    return {"q": q, "k": k, "q_low": q_low, "k_low": k_low, "rope": rope, **changes}


def wrong_tables():
    cos, sin = tables(9, 16)
    return [
        (TypeError, "rope must be .cos, sin. or None, got Tensor", {"rope": cos}),
        (TypeError, "cos of rope must be a tensor, got list", {"rope": ([1.0], sin)}),
        (TypeError, "sin of rope must be torch.float32 like q, or", {"rope": (cos, sin.half())}),
        (ValueError, r"cos of rope must be \[T_max, rope_dims / 2\], got", {"rope": (cos[0], sin)}),
        (ValueError, r"cos of rope must be \[T_max, 8\] or, .*16\]", {"rope": (cos[:, :7], sin)}),
        (ValueError, r"cos of rope .*rope_dims = 12", {"rope_dims": 12}),
        (ValueError, r"sin of rope must be \(9, 8\) like cos", {"rope": (cos, sin[:8])}),
        (ValueError, "cos of rope must have stride 1", {"rope": (cos.mT.contiguous().mT, sin)}),
        (ValueError, "sin of rope must be on", {"rope": (cos, sin.to("meta"))}),
        (ValueError, "cos of rope is a constant", {"rope": (cos.clone().requires_grad_(), sin)}),
        (
            TypeError,
            "sin of rope must be torch.float16 like cos",
            {"rope": (cos.half(), sin), "half": True},
        ),
        (ValueError, "position=5 and 5 tokens need rows 5 to 10 .* have 9", {"position": 5}),
        (ValueError, "position must be at least 0, got -1", {"position": -1}),
        (TypeError, "position must be an int or an int tensor, got True", {"position": True}),
        (TypeError, "position must be an int or an int tensor, got 1.0", {"position": 1.0}),
        (TypeError, "position must be an int32 or int64", {"position": torch.tensor([1.0, 1.0])}),
        (ValueError, r"position must be .*\[2, 5\]", {"position": torch.zeros(5).long()}),
        (ValueError, "position must be on", {"position": torch.zeros(2).long().to("meta")}),
        (ValueError, "position needs rope", {"rope": None, "qk_norm": True, "position": 1}),
        (ValueError, "rope_dims=8 needs rope", {"rope": None, "rope_dims": 8}),
        (TypeError, "rope_dims must be an int or None, got 8.0", {"rope_dims": 8.0}),
        (ValueError, "rope_dims must be even, from 2 to D = 16, got 7", {"rope_dims": 7}),
        (ValueError, "rope_dims must be even, from 2 to D = 16, got 18", {"rope_dims": 18}),
        (ValueError, "rope_dims must be even, from 2 to D = 16, got 0", {"rope_dims": 0}),
        (ValueError, "cos of rope must have at least one row",
         {"rope": (cos[:0], sin[:0]), "position": torch.zeros(2).long()}),
    ]  # fmt: skip


ERRORS = [
    *wrong_tables(),
    (TypeError, "qk_norm must be a bool or .q_weight, k_weight.", {"qk_norm": "rms"}),
    (TypeError, "qk_norm must be a bool or .*, got tuple of 1", {"qk_norm": (1,)}),
    (TypeError, "q_weight of qk_norm must be a tensor", {"qk_norm": (None, None)}),
    (
        ValueError,
        r"k_weight of qk_norm must be \[D\], one value per lane, = \(16,\)",
        {"qk_norm": (normal(16), normal(15))},
    ),
    (
        ValueError,
        "q_weight of qk_norm must have stride 1",
        {"qk_norm": (normal(32)[::2], normal(16))},
    ),
    (TypeError, "q_weight of qk_norm must be torch.float32 like q, or torch.float32",
     {"qk_norm": (normal(16).half(), normal(16))}),
    (TypeError, "norm_eps must be a number", {"qk_norm": True, "norm_eps": "0"}),
    (ValueError, "norm_eps must be finite and above 0, got 0", {"qk_norm": True, "norm_eps": 0}),
    (ValueError, "nothing to do", {"q_low": None, "k_low": None, "rope": None}),
    (TypeError, "q_low must be a tensor, got NoneType", {"q_low": None}),
    (TypeError, "k_low must be a tensor, got NoneType", {"k_low": None}),
    (TypeError, "q must be a tensor", {"q": 1, "q_low": None, "k_low": None}),
    (ValueError, "k must be .* like q", {"k": normal(2, 6, 1, 16), "q_low": None, "k_low": None}),
    (ValueError, "rope turns pairs of lanes, and D = 15 is odd",
     {"q": normal(2, 5, 2, 15), "k": normal(2, 5, 1, 15)}),
]  # fmt: skip


@backends
@pytest.mark.parametrize("pack", [ra_triton.pack_qk, ra_triton.pack_qk_])
@pytest.mark.parametrize(("error", "match", "changes"), ERRORS)
def test_a_wrong_argument_is_named(pack, backend, error, match, changes):
    changes = dict(changes)
    if changes.pop("half", False):
        changes |= {name: t.half() for name, t in arguments().items() if name not in ("rope",)}
    given_ = arguments(**changes)
    before = given_["q"].clone() if isinstance(given_["q"], torch.Tensor) else None
    with pytest.raises(error, match=match):
        pack(**given_, backend=backend)
    if before is not None:
        assert_bitwise(given_["q"], before)


def test_in_place_refuses_gradients_of_weights():
    options = {"qk_norm": (normal(16).requires_grad_(), normal(16))}
    with pytest.raises(ValueError, match="pack_qk_ is for inference"):
        ra_triton.pack_qk_(**arguments(**options))


@backends
@pytest.mark.parametrize("table", [0, 1])
def test_tables_of_neighbouring_lanes_are_named_on_a_cpu(backend, table):
    """[c0, c0, c1, c1, ...], as GPT-J has them, turn other pairs of lanes than ours."""
    q = normal(1, 5, 2, 16)
    angles = torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    halves = [torch.cat((t, t), -1).to(DEVICE) for t in (angles.cos(), angles.sin())]
    pairs = [t.repeat_interleave(2, -1).to(DEVICE) for t in (angles.cos(), angles.sin())]
    rope = tuple(pairs[i] if i == table else halves[i] for i in (0, 1))
    options = {"rope_dims": 8, "backend": backend}
    ra_triton.pack_qk(q, q, rope=tuple(halves), **options)
    if DEVICE.type == "cpu":  # elsewhere reading would wait for the device
        for position in (0, 3, torch.tensor([2])):
            with pytest.raises(ValueError, match=f"{('cos', 'sin')[table]} of rope must have both"):
                ra_triton.pack_qk(q, q, rope=rope, position=position, **options)
