"""FlexAttention: masks block by block, caps, one compilation for all lengths, what it refuses."""

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from budget import assert_attention_close, assert_bitwise
from gradient_budget import attention_gradient_budgets, check_gradients
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import DEVICE, AttentionCase, few_examples, normal, quick
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import ra_triton
from bench import ladder
from bench.harness import providers
from bench.harness.gate import Gate, admit
from bench.harness.providers import PROVIDERS, make_problem
from bench.harness.rungs import RUNGS, Factors
from bench.harness.shapes import Shape
from ra_triton.backend import BACKENDS, flex, sdpa
from ra_triton.call.options import AttentionOptions
from ra_triton.nn import Workspace
from ref import reciprocal_attention as ref

WINDOWS = ((-1, -1), (0, 0), (3, 0), (4, 2), (-1, 5), (7, -1))
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="each configuration compiles for seconds")


def check_flex(case: AttentionCase, **options) -> None:
    q, k, v = case.tensors()
    options = {"causal": case.causal, "softmax_scale": case.scale, **options}
    out, lse = ra_triton.packed_attention(q, k, v, return_lse=True, backend="flex", **options)
    assert_attention_close(out, q, k, v, lse=lse, **options)


# Options


@on_cpu
@pytest.mark.parametrize("T_k", [30, 41, 12])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window_size", WINDOWS)
def test_windows_include_both_ends(T_k, causal, window_size):
    check_flex(AttentionCase(B=2, T_q=30, T_k=T_k, causal=causal), window_size=window_size)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.3, 2.0, 30.0])
def test_softcap_is_the_references(softcap, dtype):
    case = AttentionCase(B=2, T_q=30, T_k=33, H_kv=2, group=2, D=20, dtype=dtype, values="large")
    check_flex(case, softcap=softcap)
    check_flex(replace(case, causal=False, scale=0.7), softcap=softcap, window_size=(9, 3))


@on_cpu
def test_rows_without_keys_in_a_window_give_zero_and_minus_infinity():
    q, k, v = AttentionCase(B=2, T_q=30, T_k=12).tensors()
    options = {"causal": False, "window_size": (4, 3), "softcap": 2.0, "backend": "flex"}
    out, lse = ra_triton.packed_attention(q, k, v, return_lse=True, **options)
    blind = 30 - 12 - 3
    assert_bitwise(out[:, :blind], torch.zeros_like(out[:, :blind]))
    assert lse[..., :blind].isneginf().all()
    assert lse[..., blind:].isfinite().all()


@on_cpu
def test_layer_is_projection_and_attention_and_takes_a_workspace():
    x, W, workspace = normal(2, 21, 24), normal(24, 4 * 20, seed=1, scale=0.2), Workspace()
    heads = {"n_head": 2, "n_kv_head": 1, "backend": "flex"}
    out = ra_triton.ra_attention(x, W, 3, **heads, softcap=2.0)
    packed = ra_triton.project(x, W, 3, **heads)
    expected = ra_triton.packed_attention(*packed, softcap=2.0, backend="flex")
    assert_bitwise(out, expected.flatten(2))
    again = ra_triton.ra_attention(x, W, 3, **heads, softcap=2.0, workspace=workspace)
    assert_bitwise(again, out)


@on_cpu
def test_leaves_that_ask_for_a_gradient_run_without_one():
    q, k, v = (t.requires_grad_() for t in AttentionCase(T_q=9, T_k=9).tensors())
    with torch.no_grad():
        out = ra_triton.packed_attention(q, k, v, backend="flex")
    assert not out.requires_grad
    assert_attention_close(out, *(t.detach() for t in (q, k, v)))


def test_projection_and_packing_train_everywhere():
    x, W = normal(1, 5, 12), normal(12, 48).requires_grad_()
    q, k, _ = ra_triton.project(x, W, n_head=1, backend="flex")
    packed = ra_triton.pack_qk(q, k, q[..., :4], k[..., :4], backend="flex")
    sum(t.square().sum() for t in packed).backward()
    assert W.grad.isfinite().all()


# Masks: the table of blocks, held against every single score


LENGTHS = st.sampled_from([1, 5, 127, 128, 129, 256, 300, 400])
SIDES = st.sampled_from([-1, 0, 1, 64, 127, 128, 129, 300])


@few_examples
@example(T_q=256, T_k=256, left=-1, right=1)  # of a block one corner
@example(T_q=256, T_k=256, left=1, right=-1)
@given(T_q=LENGTHS, T_k=LENGTHS, left=SIDES, right=SIDES)
def test_blocks_hold_what_the_mask_allows(T_q, T_k, left, right):
    mask = flex._mask(T_q, T_k, left, right, CPU)
    allowed = ref.allowed_keys(T_q, T_k, False, (left, right), CPU)
    index = torch.arange(T_q)[:, None], torch.arange(T_k)
    if left >= 0 or right >= 0:
        assert torch.equal(mask.mask_mod(None, None, *index), allowed)
    rows, columns = (math.ceil(T / flex.BLOCK) for T in (T_q, T_k))
    padded = allowed.new_zeros(rows * flex.BLOCK, columns * flex.BLOCK)
    padded[:T_q, :T_k] = allowed
    blocks = padded.view(rows, flex.BLOCK, columns, flex.BLOCK)
    some, whole = blocks.any(3).any(1), blocks.all(3).all(1)
    for count, order, table in (
        (mask.kv_num_blocks, mask.kv_indices, some & ~whole),
        (mask.full_kv_num_blocks, mask.full_kv_indices, whole),
        (mask.q_num_blocks, mask.q_indices, (some & ~whole).mT),
        (mask.full_q_num_blocks, mask.full_q_indices, whole.mT),
    ):
        for number, indices, row in zip(count[0, 0], order[0, 0], table, strict=True):
            assert sorted(indices[:number].tolist()) == row.nonzero().flatten().tolist()
    assert mask.shape == (1, 1, T_q, T_k)


def test_masks_are_kept_for_the_next_call_and_not_for_ever():
    arguments = (33, 44, 5, 0, CPU)
    assert flex._mask(*arguments) is flex._mask(*arguments)
    for kept in (flex._mask, flex._cap):
        assert kept.cache_info().maxsize == flex.KEPT


def test_what_is_kept_serves_inference_and_training():
    q, k, v = AttentionCase(T_q=77, T_k=91).tensors()
    flex._mask.cache_clear()
    flex._cap.cache_clear()
    with torch.inference_mode():
        ra_triton.packed_attention(q, k, v, softcap=5.5, backend="flex")
    mask = flex._mask(77, 91, -1, 0, q.device)
    assert flex._mask.cache_info().hits == 1
    (cap,) = (cell.cell_contents for cell in flex._cap(5.5, q.device).__closure__)
    for t in (mask.kv_indices, cap):
        assert not t.is_inference()


# Compilation


@pytest.fixture
def compiled_flex_attention(monkeypatch):
    """What users run; elsewhere the tests take FlexAttention's eager definition."""
    module = "torch.nn.attention.flex_attention"
    monkeypatch.setattr(f"{module}._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    monkeypatch.setattr(flex, "_compiled", COMPILED)


COMPILED = flex._compiled  # before the fixture of the session replaces it


@on_cpu
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_flex_attention")
def test_one_compilation_serves_all_lengths_caps_and_windows():
    def run(T_q, T_k, window_size, softcap):
        before = counters["stats"]["unique_graphs"]
        case = AttentionCase(B=2, T_q=T_q, T_k=T_k, group=2, D=20, causal=False)
        check_flex(case, window_size=window_size, softcap=softcap)
        return counters["stats"]["unique_graphs"] - before

    assert run(150, 190, (60, 3), 2.0) == 1
    assert run(300, 260, (9, 130), 2.0) == 0
    assert run(131, 700, (0, 1), 0.5) == 0
    assert run(300, 240, (7, 1), 0.5) == 0  # the first 59 queries see no key


@on_cpu
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_flex_attention")
def test_the_compiled_layer_in_half_precision():
    x = normal(2, 140, 24, dtype=torch.bfloat16)
    W = normal(24, 3 * 2 * 16, dtype=torch.bfloat16, scale=0.2)
    out = ra_triton.ra_attention(x, W, 3, n_head=2, backend="flex")
    packed = ra_triton.project(x, W, 3, n_head=2, backend="flex")
    assert_attention_close(out.unflatten(2, (2, 16)), *packed)


def test_each_configuration_has_compiled_code_of_its_own():
    q = torch.empty(2, 4, 9, 16)
    options = AttentionOptions()
    own = flex.Configuration.of(q, q, options, False)
    others = [
        flex.Configuration.of(q.double(), q, options, False),
        flex.Configuration.of(q.to("meta"), q, options, False),
        flex.Configuration.of(q[:, :2], q, options, False),
        flex.Configuration.of(q, q[:, :2], options, False),
        flex.Configuration.of(q[..., :8], q, options, False),
        flex.Configuration.of(q, q, options, True),
        flex.Configuration.of(q, q, replace(options, softmax_scale=0.5), False),
        flex.Configuration.of(q, q, replace(options, softcap=0.5), False),
        flex.Configuration.of(q, q, replace(options, causal=False), False),
        flex.Configuration.of(q, q, replace(options, window_size=(4, -1)), False),
        flex.Configuration.of(q[:1], q, options, False),
        flex.Configuration.of(q[:, :, :1], q, options, False),
        flex.Configuration.of(q, q[:, :, :1], options, False),
        flex.Configuration.of(q.repeat(1, 1, 15, 1), q, options, False),
        flex.Configuration.of(q, q.repeat(1, 1, 15, 1), options, False),
        flex.Configuration.of(q[:, :, :5], q, options, False),
    ]
    assert len({own, *others}) == 1 + len(others)
    q = q[:, :, :5]
    shorter = flex.Configuration.of(q, q, replace(options, window_size=(-1, 0)), False)
    assert COMPILED(shorter) is COMPILED(own)
    codes = [COMPILED(c)._torchdynamo_orig_callable.__code__ for c in (own, others[0])]
    assert codes[0] is not codes[1]


@on_cpu
@pytest.mark.parametrize("T_k", quick([None, 7]))
def test_the_layer_compiles_within_a_model(T_k):
    W = torch.nn.Parameter(normal(24, 3 * 2 * 20, scale=0.2))

    def function(x):
        q, k, v = ra_triton.project(x, W, 3, n_head=2, backend="flex")
        options = {"window_size": (5, 0), "softcap": 2.0, "return_lse": True, "backend": "flex"}
        out, lse = ra_triton.packed_attention(q, k[:, :T_k], v[:, :T_k], **options)
        return out * lse.transpose(1, 2).nan_to_num(0, 0, 0).unsqueeze(-1)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=T_k is None, backend=counter)
    lengths = (9, 16, 33) if T_k is None else (9,)
    with torch.no_grad():
        for T in lengths:
            x = normal(2, T, 24, seed=T)
            assert_bitwise(compiled(x), function(x), f"T={T}")


# What it refuses


def reason(options=None, *, device=CUDA, head_dim=64):
    return flex.unsupported(
        (SimpleNamespace(device=device, requires_grad=False),), options, head_dim
    )


def test_dropout_is_refused_with_a_backend_that_has_it():
    q, k, v = AttentionCase(T_q=5, T_k=5).tensors()
    options = {"dropout_p": 0.5, "backend": "flex"}
    match = r"flex.*no dropout_p; use backend='triton'"
    with pytest.raises(NotImplementedError, match=match):
        ra_triton.packed_attention(q, k, v, **options)
    with pytest.raises(NotImplementedError, match=match):
        ra_triton.ra_attention(q[:, :, 0], normal(16, 48), n_head=1, **options)


@on_cpu
def test_training_on_a_cpu_is_refused_with_a_backend_that_has_it():
    q, k, v = AttentionCase(T_q=5, T_k=5).tensors()
    match, W = "no backward on a CPU; use backend='triton'", normal(16, 48).requires_grad_()
    with pytest.raises(NotImplementedError, match=match):
        ra_triton.packed_attention(q, k.requires_grad_(), v, backend="flex")
    with pytest.raises(NotImplementedError, match=match):
        ra_triton.ra_attention(q[:, :, 0], W, n_head=1, backend="flex")


def test_devices_and_head_dims_are_checked_first(monkeypatch):
    options = AttentionOptions()
    monkeypatch.setattr(flex, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    look = flex._look_at.__wrapped__
    assert "needs compute capability 8.0 (Ampere) or newer, got 7.5" in look(CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert look(CUDA) is None
    monkeypatch.setattr(flex, "find_spec", lambda name: None)
    assert "needs triton" in look(CUDA)
    assert "got tensors on mps" in look(torch.device("mps"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "needs AVX2, this one has DEFAULT" in look(CPU)
    monkeypatch.setattr(flex, "_look_at", lambda device: None)
    assert "head dim 15 is below 16" in reason(options, head_dim=15)
    assert reason(options, head_dim=16) is None
    assert reason(options, head_dim=15, device=CPU) is None
    monkeypatch.setattr(flex, "_look_at", lambda device: "no such device")
    assert reason(options) == "no such device"
    assert reason(None) is None  # projection and packing


def test_projection_and_packing_are_pytorchs():
    assert flex.project is sdpa.project
    assert flex.pack_qk is sdpa.pack_qk
    assert flex.pack_qk_ is sdpa.pack_qk_


# The page, and what the benchmark times


def python_of(page: str) -> str:
    """The code of a page, its fenced blocks one after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))


@on_cpu
def test_the_code_of_the_page_computes_the_same_twice():
    page = Path(__file__).parents[2] / "docs" / "flex.md"
    names = {}
    exec(python_of(page.read_text()), names)
    for form in ("packed", "captured"):
        assert_attention_close(names[form], names["q_pack"], names["k_pack"], names["v"])


@on_cpu
@pytest.mark.parametrize(
    ("name", "stage"),
    [("ra-flex", "op"), ("ra-flex", "attention"), ("ra-flex-captured", "attention")],
)
def test_providers_pass_their_gate(name, stage, monkeypatch):
    monkeypatch.setattr(providers, "compile_static", lambda function: function)
    problem = make_problem(Shape("tiny", 2, 24, 3, 16), 4, stage, torch.float32, CPU)
    make = partial(PROVIDERS[name].make, problem)
    assert admit(name, make, Gate.of(problem), None, nullcontext)[1:] == ("ok", "")


@on_cpu
def test_the_rung_passes_its_gate():
    rung, shape = RUNGS["packed-flex"], Shape("tiny", 2, 24, 3, 16)
    inputs = rung.inputs(Factors.draw(shape, CPU), torch.float32, False)
    gate = ladder._gate(rung.source, shape, inputs, None)
    make = partial(rung.layer, shape, inputs)
    assert admit("packed-flex", make, gate, None, nullcontext)[1:] == ("ok", "")


def test_every_backend_has_every_function():
    names = ("project", "packed_attention", "layer", "pack_qk", "pack_qk_", "compose", "norm_rope")
    names += ("norm_rope_", "decode_attention", "append_", "known_project", "known_attention")
    names += ("known_layer", "known_decode", "known_compose")
    for module in BACKENDS.values():
        for name in (*names, "unsupported"):
            assert callable(getattr(module, name))


# On a GPU: compiled, forward and backward


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "options", "group"),
    [
        (torch.bfloat16, {}, 1),
        (torch.float16, {"causal": False, "softmax_scale": 0.3}, 2),
        (torch.float32, {}, 2),
    ],
)
def test_gradients_pass_the_gate_for_any_lengths(dtype, options, group):
    for T_q, T_k in ((150, 150), (310, 310), (140, 333), (300, 260)):
        case = AttentionCase(B=2, T_q=T_q, T_k=T_k, H_kv=2, group=group, D=64, dtype=dtype)
        tensors = [t.requires_grad_() for t in case.tensors()]
        before = counters["stats"]["unique_graphs"]
        out, lse = ra_triton.packed_attention(*tensors, return_lse=True, backend="flex", **options)
        compiled = counters["stats"]["unique_graphs"] - before
        assert compiled == (T_q in (150, 140))  # the first of equal lengths, and of others
        q, k, v = (t.detach() for t in tensors)
        assert_attention_close(out.detach(), q, k, v, lse=lse.detach(), **options)
        do = normal(*out.shape, dtype=dtype, seed=9)
        grads = torch.autograd.grad(out, tensors, do)
        grads = dict(zip(("dq", "dk", "dv"), grads, strict=True))
        budgets = attention_gradient_budgets(q, k, v, do, **options)
        check_gradients(grads, budgets, dtype=dtype, case=f"{T_q}, {T_k}, {options}")


@pytest.mark.gpu
@pytest.mark.parametrize("D", [16, 80, 128])
def test_windows_and_caps_on_a_gpu(D):
    for T_q, T_k, window_size, softcap in ((150, 190, (60, 3), 2.0), (300, 260, (9, 130), 0.5)):
        case = AttentionCase(B=2, T_q=T_q, T_k=T_k, group=2, D=D, causal=False, dtype=torch.float16)
        check_flex(case, window_size=window_size, softcap=softcap)


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_layer_trains_within_a_compiled_model_on_a_gpu(dynamic):
    W = torch.nn.Parameter(normal(64, 3 * 64, dtype=torch.bfloat16, scale=0.2))

    def function(x):
        return ra_triton.ra_attention(x, W, n_head=1, softcap=20.0, backend="flex")

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for T in (130, 300):
        x = normal(2, T, 64, dtype=torch.bfloat16, seed=T)
        packed = ra_triton.project(x, W.detach(), n_head=1, backend="flex")
        out = compiled(x)
        assert_attention_close(out.detach().unflatten(2, (1, 64)), *packed, softcap=20.0)
        (gradient,) = torch.autograd.grad(out.square().sum(), W)
        assert gradient.isfinite().all()
        assert (gradient != 0).any()
