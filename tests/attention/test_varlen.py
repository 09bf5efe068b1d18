"""Variable lengths: a loop over the sequences, bit for bit; neighbours, bad offsets, compilers."""

from dataclasses import dataclass, replace

import pytest
import torch
from budget import assert_attention_close, assert_bitwise
from gradient_budget import attention_gradient_budgets, check_gradients
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    HEADS,
    NAN,
    AttentionCase,
    backends,
    dtypes_for,
    few_examples,
    lay_out,
    normal,
    quick,
    small_head_dims,
)
from test_compile import assert_compiles, check_operator, leaf
from test_dropout import read_mask

import ra_triton
from ra_triton.backend import BACKENDS as MODULES
from ra_triton.kernels.attention import forward
from ra_triton.nn import Workspace

LENGTHS = (0, 1, 2, 15, 16, 17, 31, 33, 40)
TOKEN_LAYOUTS = ("contiguous", "sliced", "offset", "transposed")  # of [total, H, D]


ONE_HEAD = AttentionCase()


@dataclass(frozen=True)
class Sequences:
    """A recipe for sequences in a row; ``case`` holds everything but the lengths."""

    queries: tuple[int, ...] = (5, 0, 17, 1)
    keys: tuple[int, ...] = (5, 3, 17, 20)
    case: AttentionCase = ONE_HEAD
    layout: str = "contiguous"

    def tensors(self):
        """``q [total_q, H, D]``, ``k, v [total_k, H_kv, D]``."""
        case = replace(self.case, T_q=sum(self.queries), T_k=sum(self.keys))
        return tuple(lay_out(t.squeeze(0), self.layout) for t in case.tensors())

    def gradient(self):
        return replace(self.case, T_q=sum(self.queries)).gradient().squeeze(0)

    @property
    def offsets(self):
        """Positional arguments after the tensors."""
        return (
            *(offsets_of(n) for n in (self.queries, self.keys)),
            max(self.queries),
            max(self.keys),
        )

    def each(self):
        """``(queries, keys)`` slices of every sequence."""
        ends = zip(bounds(self.queries), bounds(self.keys), strict=True)
        return [(slice(*q), slice(*k)) for q, k in ends]


def bounds(lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(end - n, end) for end, n in zip(ends, lengths, strict=True)]


def offsets_of(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def varlen(backend, s: Sequences, *tensors, **options):
    options = {**s.case.options, "backend": backend, **options}
    return ra_triton.packed_attention_varlen(*tensors, *s.offsets, **options)


def one_by_one(backend, s: Sequences, q, k, v, **options):
    """Output and logsumexp of a loop."""
    options = {**s.case.options, "backend": backend, "return_lse": True, **options}
    parts = [
        ra_triton.packed_attention(q[None, a], k[None, b], v[None, b], **options)
        for a, b in s.each()
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1).squeeze(0), torch.cat(lses, -1).squeeze(0)


@st.composite
def recipes(draw, backend) -> Sequences:
    """Up to four sequences, simplest first."""
    n = draw(st.integers(1, 4))
    queries = draw(st.lists(st.sampled_from(LENGTHS), min_size=n, max_size=n))
    keys = draw(st.one_of(st.just(queries), st.permutations(queries)))
    H_kv, group = draw(HEADS)
    softcap = draw(st.sampled_from([0.0, 0.0, 2.0]))
    dtypes = dtypes_for(backend) if backend == "triton" else [torch.float32]
    sides = st.sampled_from([-1, -1, 0, 3, 16, 2**31])
    case = AttentionCase(
        H_kv=H_kv,
        group=group,
        D=draw(small_head_dims),
        dtype=draw(st.sampled_from(dtypes)),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.5])),
        window=(draw(sides), draw(sides)),
        softcap=softcap,
        seed=draw(st.integers(0, 3)),
    )
    return Sequences(tuple(queries), tuple(keys), case, draw(st.sampled_from(TOKEN_LAYOUTS)))


def check(backend, s: Sequences) -> None:
    """Output, logsumexp and gradients: those of a loop, and the definition's."""
    tensors, do = s.tensors(), s.gradient()
    dlse = normal(s.case.H_kv * s.case.group, sum(s.queries), seed=9)
    results = []
    for function in (varlen, one_by_one):
        leaves = [leaf(t) for t in tensors]
        out, lse = function(backend, s, *leaves, return_lse=True)
        finite = dlse.masked_fill(lse.detach().isinf(), 0.0)
        grads = torch.autograd.grad((out, lse), leaves, (do, finite))
        results.append((out.detach(), lse.detach(), *grads))
    names = ("out", "lse", "dq", "dk", "dv")
    if DEVICE.type == "cpu":  # a GPU may launch a single sequence with other tiles
        for name, got, expected in zip(names, *results, strict=True):
            assert_bitwise(got, expected, f"{name} of {s}")
    out, lse, *grads = results[0]
    for a, b in s.each():
        mine = [t[None, part] for t, part in zip(tensors, (a, b, b), strict=True)]
        options = s.case.options
        assert_attention_close(out[None, a], *mine, lse=lse[None, :, a], **options)
        grad = dict(
            zip(names[2:], (grads[0][None, a], *(g[None, b] for g in grads[1:])), strict=True)
        )
        finite = dlse[:, a].masked_fill(lse[:, a].isinf(), 0.0)
        budgets = attention_gradient_budgets(*mine, do[None, a], finite[None], **options)
        check_gradients(grad, budgets, dtype=s.case.dtype, case=s)


@backends
@few_examples
@given(data=st.data())
def test_sequences_are_computed_as_if_alone(backend, data):
    check(backend, data.draw(recipes(backend)))


@backends
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((5, 0, 17, 1), (5, 3, 17, 20)),
        ((1, 1, 1), (70, 1, 16)),
        ((33, 40, 2), (5, 0, 70)),
        ((0, 0), (3, 0)),
        ((40,), (40,)),
    ],
)
def test_lengths(backend, queries, keys):
    check(backend, Sequences(queries, keys, AttentionCase(H_kv=1, group=2)))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(-1, -1), (100, 3)])
@pytest.mark.parametrize("D", [16, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_config_passes_the_gate_on_a_gpu(dtype, D, window):
    for causal, softcap, layout in ((True, 0.0, "contiguous"), (False, 3.0, "offset")):
        options = {"causal": causal, "window": window, "softcap": softcap}
        case = AttentionCase(H_kv=2, group=2, D=D, dtype=dtype, **options)
        check("triton", Sequences((300, 0, 129, 64), (300, 3, 70, 200), case, layout))


@backends
def test_no_sequences_and_no_tokens(backend):
    leaves = [leaf(normal(0, 2, 16)) for _ in range(3)]
    options = {"return_lse": True, "backend": backend}
    out, lse = ra_triton.packed_attention_varlen(*leaves, ints(0), ints(0), 0, 0, **options)
    assert (out.shape, lse.shape) == ((0, 2, 16), (2, 0))
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.shape == (0, 2, 16)


@backends
@pytest.mark.parametrize("value", quick([NAN, float("inf")]))
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_passes_from_one_sequence_to_the_next(backend, value, causal):
    s = Sequences((20, 9, 30), (20, 9, 30), AttentionCase(H_kv=1, group=2, causal=causal))
    do = s.gradient()

    def run(*tensors):
        leaves = [leaf(t) for t in tensors]
        out = varlen(backend, s, *leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, do)

    clean = run(*s.tensors())
    for b, (bad, _) in enumerate(s.each()):
        spoilt = [t.clone() for t in s.tensors()]
        for t in spoilt:
            t[bad] = value
        others = [
            i for c, (part, _) in enumerate(s.each()) if c != b for i in range(*part.indices(59))
        ]
        for got, expected in zip(run(*spoilt), clean, strict=True):
            assert_bitwise(got[others], expected[others], f"around sequence {b}")


@backends
def test_memory_around_the_tokens_does_not_matter(backend):
    s = Sequences(case=AttentionCase(H_kv=2, D=20))
    tensors, outs = s.tensors(), []
    for fill in (0.0, NAN):
        wide = [t.new_full((len(t) + 40, *t.shape[1:]), fill) for t in tensors]
        inner = [w[20 : 20 + len(t)].copy_(t) for w, t in zip(wide, tensors, strict=True)]
        outs.append(varlen(backend, s, *inner))
    assert_bitwise(outs[1], outs[0])


def test_each_sequence_and_head_drops_its_own_scores_and_the_backward_drops_them_too():
    s = Sequences((30, 30), (30, 30), AttentionCase(H_kv=2, D=32, causal=False))
    tensors, do, options = s.tensors(), s.gradient(), {"dropout_p": 0.4}

    def run(q, k, v):
        torch.manual_seed(3)
        out = varlen("triton", s, *(t.flatten(0, 1) for t in (q, k, v)), **options)
        return out.unflatten(0, (2, 30))

    batched = [t.unflatten(0, (2, 30)) for t in tensors]
    keep = read_mask(run, batched[0] * 0, batched[1] * 0)
    flattened = keep.flatten(0, 1)
    assert not any(torch.equal(a, b) for i, a in enumerate(flattened) for b in flattened[:i])
    leaves = [leaf(t) for t in batched]
    grads = torch.autograd.grad(run(*leaves), leaves, do.unflatten(0, (2, 30)))
    budgets = attention_gradient_budgets(
        *batched, do.unflatten(0, (2, 30)), keep=keep, causal=False, **options
    )
    grads = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    check_gradients(grads, budgets, dtype=torch.float32, case="dropout")


# The layer


@backends
@pytest.mark.parametrize("shape", [(23, 24), (1, 23, 24)])
@pytest.mark.parametrize("max_seqlen", quick([None, 17, 40]))
def test_ra_attention_over_flattened_tokens_is_that_of_its_stages(backend, shape, max_seqlen):
    cu, heads = offsets_of((5, 0, 17, 1)), {"n_head": 2, "n_kv_head": 1, "backend": backend}
    x, W = normal(*shape), normal(24, 4 * 16, seed=1, scale=0.2)
    do = normal(*shape[:-1], 32, seed=2)
    results = []
    for whole in (True, False):
        leaves = leaf(x), leaf(W)
        if whole:
            out = ra_triton.ra_attention(*leaves, 3, cu_seqlens=cu, max_seqlen=max_seqlen, **heads)
        else:
            packed = ra_triton.project(leaves[0].view(1, 23, 24), leaves[1], 3, **heads)
            tokens = [t.squeeze(0) for t in packed]
            out = ra_triton.packed_attention_varlen(*tokens, cu, cu, 17, 17, backend=backend)
            out = out.reshape(do.shape)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, do)))
    for got, expected in zip(*results, strict=True):
        assert_bitwise(got, expected)


def test_a_workspace_holds_flattened_tokens_too():
    x, W, cu = normal(23, 24), normal(24, 96, seed=1), offsets_of((5, 18))
    options = {"n_head": 2, "cu_seqlens": cu, "max_seqlen": 18, "backend": "triton"}
    expected = ra_triton.ra_attention(x, W, **options)
    assert_bitwise(ra_triton.ra_attention(x, W, workspace=Workspace(), **options), expected)


# Offsets


@pytest.fixture
def no_launch(monkeypatch):
    def launched(*args, **kwargs):
        pytest.fail("a backend was called with bad offsets")

    for module in MODULES.values():
        for name in ("packed_attention", "layer"):
            monkeypatch.setattr(module, name, launched)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


BAD_OFFSETS = [  # what to replace cu_seqlens by, the error, the message; whether values matter
    ([0, 3, 5], TypeError, "must be a tensor, got list", False),
    (None, TypeError, "must be a tensor, got NoneType", False),
    (ints(0, 3, 5, dtype=torch.int64), TypeError, "must be torch.int32, got torch.int64", False),
    (ints(0, 3, 5).float(), TypeError, "must be torch.int32, got torch.float32", False),
    (ints(0, 3, 5).to("meta"), ValueError, "must be on .*, got meta", False),
    (ints(0, 3, 5)[None], ValueError, "must be .B . 1., got .1, 3.", False),
    (ints(0, 3, 5)[:0], ValueError, "must be .B . 1., got .0,.", False),
    (ints(0), ValueError, "must end with the number of tokens 5", False),
    (ints(1, 3, 5), ValueError, "must begin with 0, got 1", True),
    (ints(-1, 3, 5), ValueError, "must begin with 0, got -1", True),
    (ints(0, 4, 3), ValueError, "must not decrease, got 3 after 4 at 2", True),
    (ints(0, 3, 4), ValueError, "must end with the number of tokens 5, got 4", True),
    (ints(0, 3, 6), ValueError, "must end with the number of tokens 5, got 6", True),
]
BAD_LONGEST = [
    (2, ValueError, "must be at least 3, the longest sequence of .*, got 2"),
    (0, ValueError, "must be at least 1 with 5 tokens, got 0"),
    (-1, ValueError, "must be at least 1 with 5 tokens, got -1"),
    (3.0, TypeError, "must be an int, got 3.0"),
    (True, TypeError, "must be an int, got True"),
]


def arguments():
    tensors = {name: normal(5, 2, 16) for name in ("q_pack", "k_pack", "v")}
    offsets = {f"cu_seqlens_{side}": ints(0, 3, 5) for side in "qk"}
    return {**tensors, **offsets, "max_seqlen_q": 3, "max_seqlen_k": 3}


def layer_arguments(cu=None, longest=3):
    cu = ints(0, 3, 5) if cu is None else cu
    heads = {"n_head": 2, "cu_seqlens": cu, "max_seqlen": longest}
    return {"x": normal(5, 12), "W_fused": normal(12, 96), **heads}


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("side", "qk")
@pytest.mark.parametrize(("bad", "error", "match", "_"), BAD_OFFSETS)
def test_bad_offsets_are_named_before_any_launch(side, bad, error, match, _):
    with pytest.raises(error, match=f"^cu_seqlens_{side} {match}"):
        ra_triton.packed_attention_varlen(**{**arguments(), f"cu_seqlens_{side}": bad})


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(("bad", "error", "match", "_"), BAD_OFFSETS)
@pytest.mark.parametrize("longest", [3, None])
def test_bad_offsets_of_the_layer_are_named(longest, bad, error, match, _):
    if bad is None:
        pytest.skip("no offsets: not over flattened tokens")
    if longest is None and bad.__class__ is torch.Tensor and bad.shape == (1,):
        match = "must end with the number of tokens 5, got 0"
    with pytest.raises(error, match=f"^cu_seqlens {match}"):
        ra_triton.ra_attention(**layer_arguments(bad, longest))


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(("bad", "error", "match"), BAD_LONGEST)
def test_a_bad_longest_length_is_named(bad, error, match):
    for side in "qk":
        with pytest.raises(error, match=f"^max_seqlen_{side} {match}"):
            ra_triton.packed_attention_varlen(**{**arguments(), f"max_seqlen_{side}": bad})
    with pytest.raises(error, match=f"^max_seqlen {match}"):
        ra_triton.ra_attention(**layer_arguments(longest=bad))


MORE_ERRORS = [
    (ValueError, "cu_seqlens_k must be .B . 1. = .3. like", {"cu_seqlens_k": ints(0, 1, 3, 5)}),
    (TypeError, "check must be a bool, got 1", {"check": 1}),
    (ValueError, "q_pack must be .total, H, D.", {"q_pack": normal(1, 5, 2, 16)}),
    (
        ValueError,
        r"v must be \[total_k, H_kv, D\] like k_pack = \(5, 2, 16\), got \(4, 2, 16\)",
        {"v": normal(4, 2, 16)},
    ),
    (
        ValueError,
        r"k_pack must be \[total_k, H_kv, D\] like q_pack = \(5, 2, 16\), got \(5, 2, 8\)",
        {"k_pack": normal(5, 2, 8)},
    ),
    (
        ValueError,
        "k_pack must have a number of heads",
        {"k_pack": normal(5, 3, 16), "v": normal(5, 3, 16)},
    ),
    (TypeError, "v must be torch.float32 like q_pack", {"v": normal(5, 2, 16).half()}),
    (TypeError, "q_pack must be a tensor", {"q_pack": None}),
    (ValueError, "dropout_p must be in", {"dropout_p": 1.0}),
    (ValueError, "backend must be one of", {"backend": "cuda"}),
]


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(("error", "match", "bad"), MORE_ERRORS)
def test_other_bad_arguments_are_named(error, match, bad):
    with pytest.raises(error, match=f"^{match}"):
        ra_triton.packed_attention_varlen(**{**arguments(), **bad})


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(
    ("match", "bad"),
    [
        ("x must be .total, C. or .1, total, C. with cu_seqlens", {"x": normal(2, 5, 12)}),
        ("max_seqlen needs cu_seqlens", {"cu_seqlens": None, "x": normal(1, 5, 12)}),
        ("max_seqlen must be an int with check=False", {"max_seqlen": None, "check": False}),
    ],
)
def test_offsets_of_the_layer_that_do_not_fit_its_tokens(match, bad):
    with pytest.raises(ValueError, match=match):
        ra_triton.ra_attention(**{**layer_arguments(), **bad})


@pytest.mark.parametrize("check", [True, False])
def test_values_are_looked_at_only_when_asked_for(monkeypatch, check):
    looked = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: looked.append(t) or original(t))
    for name in ("item", "__bool__", "__int__", "cpu", "numpy"):
        if DEVICE.type == "cuda":
            monkeypatch.setattr(torch.Tensor, name, None)
    launched = lambda q, *_, **__: (q, q[..., 0])  # noqa: E731
    monkeypatch.setattr(forward, "attention_forward", launched)
    ra_triton.packed_attention_varlen(**arguments(), check=check, backend="triton")
    assert bool(looked) == check


@pytest.mark.parametrize(
    "cu", [bad for bad, _, _, by_value in BAD_OFFSETS if by_value] + [ints(-9, 2**31 - 1, -(2**31))]
)
def test_unchecked_offsets_lead_to_no_address_outside(cu):
    """The operands lie among NaN: what is read outside of them would show."""
    tensors = []
    for name in ("q_pack", "k_pack", "v"):
        wide = torch.full((200, 2, 16), NAN, device=DEVICE)
        wide[100:105] = arguments()[name]
        tensors.append(leaf(wide[100:105]))
    out = ra_triton.packed_attention_varlen(*tensors, cu, cu, 5, 5, check=False, backend="triton")
    written = ~out.detach().isnan().any(-1).any(-1)
    alone = [t.detach().clone() for t in tensors]
    again = ra_triton.packed_attention_varlen(*alone, cu, cu, 5, 5, check=False, backend="triton")
    assert_bitwise(again[written], out.detach()[written])
    torch.autograd.grad(out, tensors, torch.zeros_like(out))


# Compilers


@pytest.mark.slow
def test_opcheck_of_variable_lengths():
    q, k, v = (leaf(normal(1, 9, 2, 16, seed=seed)) for seed in range(3))
    offsets = {"cu_seqlens": (ints(0, 4, 9), ints(0, 4, 9)), "longest": (5, 5)}
    check_operator("attention", q, k, v, **offsets)
    x, W = leaf(normal(1, 9, 24)), leaf(normal(24, 96))
    check_operator("layer", x, W, heads=(2, 2), **offsets)


@pytest.mark.slow
def test_variable_lengths_compile():
    W = normal(24, 3 * 2 * 16, scale=0.2)

    def function(x, W):
        cu = torch.arange(3, dtype=torch.int32, device=x.device) * (len(x) // 2)
        cu[2] = len(x)
        return ra_triton.ra_attention(
            x, W, 3, n_head=2, cu_seqlens=cu, max_seqlen=len(x), backend="triton"
        )

    assert_compiles(function, lambda T: (normal(T, 24, seed=T), W))


def test_torch_func_grad_of_variable_lengths():
    s = Sequences(case=AttentionCase(H_kv=2))

    def loss(*tensors):
        return varlen("triton", s, *tensors, check=False).square().sum()

    actual = torch.func.grad(loss, argnums=(0, 1, 2))(*s.tensors())
    leaves = [leaf(t) for t in s.tensors()]
    for a, e in zip(actual, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert_bitwise(a, e)
