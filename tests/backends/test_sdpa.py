"""Backend "sdpa": its plain torch, second derivatives, what PyTorch's CUDA kernels are given."""

from contextlib import nullcontext

import pytest
import torch
from budget import assert_attention_close, assert_bitwise
from gradient_budget import (
    assert_gradient_promise,
    attention_gradient_budgets,
    check_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, NAN, AttentionCase, few_examples, gradient_layouts, lay_out, normal
from test_compile import leaf
from test_dropout import check_case as check_dropout
from test_window_and_softcap import cases
from torch.nn.attention import SDPBackend, sdpa_kernel

import ra_triton
from ra_triton.backend import sdpa
from ra_triton.call.options import AttentionOptions
from ref import reciprocal_attention as ref

NAMES = ("dq", "dk", "dv")
HALVES = (torch.float16, torch.bfloat16)
CHUNKED = 300  # scores at once, so that small cases take several steps


def attend(*tensors, **options):
    return ra_triton.packed_attention(*tensors, backend="sdpa", **options)


def check(case: AttentionCase, layout: str = "contiguous", with_lse: bool = True) -> None:
    """Output, logsumexp and all gradients against the definition."""
    tensors, do = case.tensors(), case.gradient(layout)
    leaves = [leaf(t) for t in tensors]
    results = attend(*leaves, return_lse=with_lse, **case.options)
    out, lse = results if with_lse else (results, None)
    found = {"lse": lse.detach()} if with_lse else {}
    assert_attention_close(out.detach(), *tensors, **found, **case.options)
    dlse = normal(*lse.shape, seed=9) * lse.isfinite() if with_lse else None
    outputs, given = ((out, lse), (do, dlse)) if with_lse else (out, do)
    grads = torch.autograd.grad(outputs, leaves, given)
    budgets = attention_gradient_budgets(*tensors, do, dlse, **case.options)
    named = dict(zip(NAMES, grads, strict=True))
    check_gradients(named, budgets, dtype=case.dtype, case=f"{case}, dO {layout}")


@pytest.fixture(params=[None, CHUNKED], ids=["whole", "chunked"])
def steps(request, monkeypatch):
    """Plain torch at once, and some queries at a time."""
    if request.param is not None:
        monkeypatch.setattr(sdpa, "MAX_SCORES", request.param)


# Plain torch: softcap, logsumexps


@pytest.mark.parametrize("chunked", [False, True])
@few_examples
@given(case=cases(spikes=()), layout=gradient_layouts, with_lse=st.booleans())
def test_windows_and_caps_match_the_definition(chunked, case, layout, with_lse):
    with pytest.MonkeyPatch.context() as patch:
        if chunked:
            patch.setattr(sdpa, "MAX_SCORES", CHUNKED)
        check(case, layout, with_lse or case.dtype != torch.float32)  # PyTorch's sum dk in half


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("T_q", "T_k"), [(20, 20), (9, 33), (33, 9)])
def test_softcap_of_every_dtype(dtype, T_q, T_k):
    case = AttentionCase(2, T_q, T_k, 2, 2, dtype=dtype, softcap=3.0)
    for window in ((-1, -1), (4, 2)):
        check(case.__class__(**{**vars(case), "window": window, "causal": window[0] < 0}))


@pytest.mark.usefixtures("steps")
def test_dropout_under_a_cap_drops_the_same_again_backward():
    check_dropout("sdpa", AttentionCase(2, 21, 37, 1, 2, softcap=2.0, window=(9, 3)), 0.5)


@pytest.mark.usefixtures("steps")
def test_dropout_leaves_the_logsumexp_alone():
    q, k, v = AttentionCase(1, 20, 20, 2).tensors()
    _, expected = attend(q, k, v, return_lse=True)
    out, lse = attend(q, k, v, return_lse=True, dropout_p=0.5)
    assert_bitwise(lse, expected)
    assert not torch.equal(out, attend(q, k, v))


def test_no_scores_are_kept_for_the_backward_pass(monkeypatch):
    """Of 64 x 64 scores of each of two heads, never more than ``MAX_SCORES`` at once."""
    monkeypatch.setattr(sdpa, "MAX_SCORES", 1024)
    leaves = [leaf(t) for t in AttentionCase(1, 64, 64, 2, softcap=2.0).tensors()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(*leaves, softcap=2.0, return_lse=True)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert kept
    assert sum(sizes.values()) < 2 * 64 * 64 * 4
    shapes = []

    class Shapes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            shapes.extend(t.numel() for t in (result,) if isinstance(t, torch.Tensor))
            return result

    with torch.no_grad(), Shapes():
        attend(*leaves, softcap=2.0)
    assert max(shapes) == 64 * 2 * 16


def test_autocast_does_not_round_the_scores():
    tensors = [t.bfloat16() for t in AttentionCase(1, 20, 20, 2).tensors()]
    expected = attend(*tensors, softcap=3.0, return_lse=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = attend(*tensors, softcap=3.0, return_lse=True)
    for a, b in zip(found, expected, strict=True):
        assert_bitwise(a, b)


@pytest.mark.parametrize("known", [True, False])
def test_decoding_under_a_cap(monkeypatch, known):
    """Each sequence as if alone, also where the device alone knows the lengths."""
    q, k, v = AttentionCase(3, 2, 9, 2, 2).tensors()
    lengths = torch.tensor([9, 4, 0], dtype=torch.int32, device=DEVICE)
    for t in (k, v):
        t[1, 4:] = NAN
    if not known:
        monkeypatch.setattr(sdpa, "_readable", lambda lengths: False)
    options = {"softcap": 2.0, "window_size": (3, 0)}
    out = ra_triton.decode_attention(q, k, v, lengths, backend="sdpa", **options)
    for b, n in enumerate(lengths.tolist()):
        parts = q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]
        assert_attention_close(out[b : b + 1], *parts, **options)


# Derivatives of derivatives


def second_derivatives(run, tensors, **options):
    """Of the squares of all first derivatives."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    first = torch.autograd.grad(run(*leaves, **options).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(t.square().sum() for t in first), leaves)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize(
    ("options", "T_q", "T_k"),
    [
        ({}, 20, 20),
        ({"causal": False}, 5, 37),
        ({}, 37, 5),
        ({"window_size": (5, 0)}, 20, 20),
        ({"softcap": 2.0}, 20, 20),
    ],
)
def test_second_derivatives_are_as_exact_as_eager_pytorchs(options, T_q, T_k):
    tensors = AttentionCase(2, T_q, T_k, 2, 2).tensors()

    def reference(*tensors, **options):
        return ref.packed_attention(*tensors, **options)[0]

    found = second_derivatives(attend, tensors, **options)
    exact = second_derivatives(reference, [t.double() for t in tensors], **options)
    eager = second_derivatives(reference, tensors, **options)
    for name, *each in zip(NAMES, found, exact, eager, strict=True):
        assert_gradient_promise(name, *each)


@pytest.mark.parametrize("same", [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)])
def test_recorded_gradients_of_operands_that_depend_on_each_other(same):
    """One tensor as several operands, and one that is computed from another."""
    tensors = AttentionCase(2, 9, 9, 2).tensors()

    def gradients(**how):
        leaves = [t.detach().requires_grad_() for t in tensors]
        operands = [leaves[i] for i in same]
        operands[2] = operands[2] + operands[0].tanh()
        loss = attend(*operands).square().sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True, **how)

    for a, b in zip(gradients(create_graph=True), gradients(), strict=True):
        if b is not None:
            assert_gradient_promise("dq", a.detach(), b.double(), b + 2**-20 * b.abs().mean())


def test_a_gradient_penalty_trains_the_layer():
    x, W = normal(2, 5, 32).requires_grad_(), normal(32, 96, seed=1).requires_grad_()
    y = ra_triton.ra_attention(x, W, 2, n_head=2, backend="sdpa")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    for t in (x, W):
        assert t.grad.isfinite().all()
        assert (t.grad != 0).any()


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"return_lse": True, "dropout_p": 0.2}])
def test_it_compiles_without_a_graph_break(options):
    leaves = [leaf(t) for t in AttentionCase(2, 9, 9, 2).tensors()]

    def run(*tensors):
        torch.manual_seed(0)
        results = attend(*tensors, **options)
        return results[0] if isinstance(results, tuple) else results

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    if "dropout_p" in options:
        compiled(*leaves, **options)[0].sum().backward()
        return
    out = compiled(*leaves, **options)
    assert_bitwise(out, run(*leaves))
    do = normal(*out.shape, seed=5)
    for a, b in zip(
        torch.autograd.grad(out, leaves, do),
        torch.autograd.grad(run(*leaves), leaves, do),
        strict=True,
    ):
        assert_bitwise(a, b)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_torch_func_takes_gradients_of_it_and_batches_them(softcap):
    tensors = AttentionCase(3, 9, 9, 2).tensors()

    def loss(*tensors):
        return attend(*(t[None] for t in tensors), softcap=softcap).square().sum()

    with nullcontext() if softcap else sdpa_kernel(SDPBackend.MATH):
        batched = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*tensors)
        for b in range(3):
            alone = torch.func.grad(loss, argnums=(0, 1, 2))(*(t[b] for t in tensors))
            leaves = [t[b].clone().requires_grad_() for t in tensors]
            eager = torch.autograd.grad(loss(*leaves), leaves)
            for name, *each in zip(NAMES, alone, eager, batched, strict=True):
                one, other, among = each[0], each[1], each[2][b]
                exact = other.double()
                assert_gradient_promise(name, one, exact, other * (1 + 2**-18))
                assert_gradient_promise(name, among, exact, other * (1 + 2**-18))
        hessian = torch.func.hessian(loss)(*(t[0] for t in tensors))
    assert hessian.isfinite().all()


# What PyTorch's CUDA kernels are given


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What is done to operands on a GPU, done here."""
    monkeypatch.setattr(sdpa, "_on_cuda", lambda t: True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("D", [4, 16, 18, 64])
@pytest.mark.parametrize(
    "layout",
    ["contiguous", "sliced", "offset", "apart", "transposed", "head_major", "fused", "expanded"],
)
def test_rows_of_whole_loads_are_aligned(dtype, D, layout):
    if layout == "apart":  # rows that begin well, and step off
        t = normal(2, 3, 2, D + 1, dtype=dtype)[..., :D]
    else:
        t = lay_out(normal(2, 3, 2, D, dtype=dtype), layout)
    found = sdpa._aligned(t)
    assert_bitwise(found, t)
    whole = D * t.element_size() % 16 == 0
    offsets = [found.data_ptr(), *(step * t.element_size() for step in found.stride()[:-1])]
    if whole:
        assert not any(offset % 16 for offset in offsets)
    moved = layout in ("sliced", "offset", "apart") and whole
    assert (found is not t) == moved
    lanes_apart = torch.stack((t, t), -1)[..., 0]
    assert not whole or sdpa._aligned(lanes_apart).stride(-1) == 1


def test_a_size_of_one_needs_no_stride():
    t = normal(40)[:32].as_strided((1, 1, 2, 16), (3, 5, 16, 1))
    assert sdpa._aligned(t) is t
    assert sdpa._aligned(t[:0]).shape == (0, 1, 2, 16)


def test_operands_without_addresses_are_judged_by_their_offset():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        t = torch.empty(1, 3, 2, 17)
        assert sdpa._aligned(t[..., 1:]) is not t
        wide = torch.empty(1, 3, 2, 20)
        view = wide[..., 4:]
        assert sdpa._aligned(view) is view
    seen = []
    torch.func.vmap(lambda t: seen.append(sdpa._aligned(t)) or t)(normal(3, 1, 3, 2, 16))
    assert seen


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("most", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("window", [(-1, -1), (5, 0)])
def test_pieces_of_a_large_batch_are_the_whole(monkeypatch, most, window):
    monkeypatch.setattr(sdpa, "MAX_PROGRAMS", most)
    sizes, original = [], sdpa._sdpa

    def counted(q, k, v, mask, options):
        sizes.append(q.shape[0] * q.shape[1])
        return original(q, k, v, mask, options)

    monkeypatch.setattr(sdpa, "_sdpa", counted)
    for group in (1, 2):
        case = AttentionCase(3, 9, 9, 2, group, window=window)
        check(case, with_lse=False)
        heads = 2 * group
        least = group if window == (-1, -1) and case.dtype != torch.float32 else 1
        assert max(sizes[-1:]) <= max(most, least)
        assert sum(sizes) == 3 * heads
        sizes.clear()
    q, k, v = AttentionCase(3, 1, 9, 2, 2).tensors()
    lengths = torch.tensor([9, 4, 0], dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(sdpa, "_readable", lambda lengths: False)
    out = ra_triton.decode_attention(q, k, v, lengths, backend="sdpa")
    for b, n in enumerate(lengths.tolist()):
        parts = q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]
        assert_attention_close(out[b : b + 1], *parts)


@given(
    B=st.integers(1, 9), H_kv=st.integers(1, 9), group=st.integers(1, 3), most=st.integers(3, 30)
)
def test_pieces_cover_each_head_of_each_sequence_once(B, H_kv, group, most):
    H, seen = H_kv * group, torch.zeros(B, H_kv * group)
    keys = torch.arange(H_kv)
    for sequences, heads in sdpa._pieces(B, H, H_kv, most):
        for of_q, of_k in heads:
            piece = seen[sequences, of_q]
            assert piece.numel() <= most
            piece += 1
            assert torch.arange(H)[of_q].tolist() == [
                k * group + i for k in keys[of_k].tolist() for i in range(group)
            ]
    assert (seen == 1).all()


FLASH, EFFICIENT, MATH, CUDNN = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
)


def allowed_now():
    flags = torch.backends.cuda
    names = {
        FLASH: flags.flash_sdp_enabled(),
        EFFICIENT: flags.mem_efficient_sdp_enabled(),
        MATH: flags.math_sdp_enabled(),
        CUDNN: flags.cudnn_sdp_enabled(),
    }
    return {name for name, allowed in names.items() if allowed}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("users", "masked"),
    [
        ({FLASH, EFFICIENT, MATH, CUDNN}, {FLASH, EFFICIENT, MATH}),
        ({CUDNN, MATH}, {MATH}),
        ({CUDNN}, {CUDNN}),  # the user's word
        ({EFFICIENT}, {EFFICIENT}),
    ],
)
def test_a_mask_takes_every_kernel_that_the_user_allows_but_cudnns(monkeypatch, users, masked):
    seen = []

    def looked(q, *_):
        seen.append(allowed_now())
        return torch.zeros_like(q)

    monkeypatch.setattr(sdpa, "_sdpa", looked)
    tensors = AttentionCase(1, 9, 9, 2).tensors()
    with sdpa_kernel(sorted(users, key=int)):
        attend(*tensors)
        attend(*tensors, window_size=(3, 0))
        assert allowed_now() == users
    assert seen == [users, masked]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("dtype", "window", "heads"),
    [
        (torch.float32, -1, 4),
        (torch.float32, 3, 4),
        (torch.bfloat16, 3, 4),
        (torch.bfloat16, -1, 2),
    ],
)
def test_grouped_heads_become_equal_where_no_fused_kernel_knows_groups(
    monkeypatch, dtype, window, heads
):
    seen, original = [], sdpa._sdpa

    def looked(q, k, v, mask, options):
        seen.append((k.shape[1], v.shape[1]))
        return original(q, k, v, mask, options)

    monkeypatch.setattr(sdpa, "_sdpa", looked)
    case = AttentionCase(1, 9, 9, 2, 2, dtype=dtype, window=(window, -1))
    attend(*case.tensors(), **case.options)
    assert seen == [(heads, heads)]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("window", [(-1, -1), (3, 0)])
def test_what_a_gpu_is_given_compiles_without_a_graph_break(window):
    leaves = [leaf(t) for t in AttentionCase(2, 9, 9, 2, 2).tensors()]
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    before = allowed_now()
    out = compiled(*leaves, window_size=window)
    assert allowed_now() == before
    assert_attention_close(out.detach(), *(t.detach() for t in leaves), window_size=window)
    out.sum().backward()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("layout", ["offset", "of_a_concatenation", "lanes_apart"])
def test_the_gradient_of_the_output_is_aligned_too(monkeypatch, layout):
    found, original = [], sdpa._aligned

    def looked(t):
        found.append(original(t))
        return found[-1]

    monkeypatch.setattr(sdpa, "_aligned", looked)
    check(AttentionCase(2, 9, 9, 2), layout, with_lse=False)
    assert len(found) == 4
    assert all(t.data_ptr() % 16 == 0 and t.stride(-1) == 1 for t in found)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("layout", ["offset", "sliced", "fused", "head_major"])
def test_operands_off_sixteen_bytes(dtype, layout):
    """The misaligned load of a kernel would take the process's CUDA context with it."""
    for window in ((-1, -1), (50, 0)):
        case = AttentionCase(2, 130, 130, 2, D=64, dtype=dtype, window=window)
        tensors = [lay_out(t, layout) for t in case.tensors()]
        do = lay_out(case.gradient(), layout)
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = attend(*leaves, **case.options)
        assert_attention_close(out.detach(), *tensors, **case.options)
        for grad in torch.autograd.grad(out, leaves, do):
            assert grad.isfinite().all()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("group", [1, 4])
def test_decoding_in_every_dtype_on_a_gpu(dtype, group):
    for T_q, T_k in ((1, 33), (3, 130)):
        q, k, v = AttentionCase(2, T_q, T_k, 2, group, D=64, dtype=dtype).tensors()
        lengths = torch.tensor([T_k, T_k // 2], dtype=torch.int32, device=DEVICE)
        for kernels in ([EFFICIENT], [FLASH, EFFICIENT, MATH, CUDNN]):
            with sdpa_kernel(kernels):
                out = ra_triton.decode_attention(q, k, v, lengths, backend="sdpa")
            for b, n in enumerate(lengths.tolist()):
                parts = q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]
                assert_attention_close(out[b : b + 1], *parts)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    ("T_q", "T_k", "window"),
    [(192, 192, 100), (320, 320, 400), (704, 704, 200), (64, 192, -1), (192, 64, -1)],
)
def test_masked_gradients_with_very_negative_logsumexps(D, T_q, T_k, window):
    case = AttentionCase(1, T_q, T_k, 2, D=D, dtype=torch.bfloat16, window=(window, -1))
    q, k, v = case.tensors()
    q[..., 0], k[..., 0] = 1.0, -120 * D**0.5
    leaves = [t.requires_grad_() for t in (q, k, v)]
    grads = torch.autograd.grad(attend(*leaves, **case.options), leaves, case.gradient())
    for name, grad in zip(NAMES, grads, strict=True):
        assert grad.isfinite().all(), name
        assert (grad != 0).any(), name


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "H"), [(70_000, 1), (1, 70_000), (300, 300)])
@pytest.mark.parametrize("window", [(-1, -1), (1, 0)])
def test_more_heads_of_sequences_than_a_grid_is_wide(B, H, window):
    case = AttentionCase(B, 4, 4, H, dtype=torch.bfloat16, window=window)
    tensors, do = case.tensors(), case.gradient()
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = attend(*leaves, **case.options)
    grads = torch.autograd.grad(out, leaves, do)
    for b, h in ((0, 0), (B // 2, H // 2), (B - 1, H - 1)):
        at = slice(b, b + 1), slice(None), slice(h, h + 1)
        part = [t[at] for t in tensors]
        assert_attention_close(out.detach()[at], *part, **case.options)
        for grad in grads:
            assert grad[at].isfinite().all()
            assert (grad[at] != 0).any()


def test_options_have_one_name_for_no_window():
    for side in (2**30, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**100):
        assert AttentionOptions(False, window_size=(side, side)).reach == (-1, -1)
        assert AttentionOptions(True, window_size=(side, side)).reach == (-1, 0)
        assert AttentionOptions(False, window_size=(side, 3)).reach == (-1, 3)
    assert AttentionOptions(False, window_size=(2**30 - 1, 0)).reach == (2**30 - 1, 0)
