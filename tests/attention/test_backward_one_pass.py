"""The plain backward of one pass: its numbers, its turns, and which calls take it."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from budget import assert_bitwise
from gradient_budget import attention_gradient_budgets, check_gradients, exact_attention
from strategies import DEVICE, NAN, dtypes_for, normal, operands, quick
from triton.runtime import interpreter

import ra_triton
from ra_triton.call.offsets import Offsets
from ra_triton.kernels.attention import backward, backward_one_pass
from ra_triton.kernels.attention.forward import attention_forward
from ra_triton.launch.configs import LaunchConfig
from ra_triton.launch.plans import Layout, forget_plans
from ra_triton.launch.recorded import forget

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
M, N = (64, 64) if DEVICE.type == "cuda" else (32, 16)  # small, so that short inputs have turns
CONFIG = LaunchConfig(M, 4, 2, block_n=N, one_pass=True)
pytestmark = pytest.mark.usefixtures("integers_of_another")
heads = pytest.mark.parametrize("D", [64, 128])
masks = pytest.mark.parametrize("causal", [True, False])


def gradients(q, k, v, do, causal, dlse=None, scale=None, *, into=None, config=CONFIG):
    """``{"dq": ..., ...}``, from an exact forward."""
    o, lse = exact_attention(q, k, v, causal=causal, softmax_scale=scale)
    inputs = (q, k, v, o.to(q.dtype).contiguous(), lse.float().contiguous(), do)
    grads = into or [torch.full_like(t, NAN) for t in (q, k, v)]
    options = {"causal": causal, "softmax_scale": scale, "config": config}
    backward.attention_backward(*inputs, *grads, dlse=dlse, **options)
    return dict(zip(("dq", "dk", "dv"), grads, strict=True))


def check(q, k, v, do, causal, dlse=None, scale=None):
    found = gradients(q, k, v, do, causal, dlse, scale)
    options = {"causal": causal, "softmax_scale": scale}
    budgets = attention_gradient_budgets(q, k, v, do, dlse, **options)
    check_gradients(found, budgets, dtype=q.dtype, case=f"{causal} {q.shape} {k.shape}")


LENGTHS = [
    *((65, 65), (33, 90), (90, 33), (1, 1), (1, 50), (50, 1), (64, 64), (31, 97), (128, 48)),
    *((63, 64), (257, 300), (300, 257)),
]


@heads
@masks
@pytest.mark.parametrize(("T_q", "T_k"), quick(LENGTHS, 6))
def test_it_computes_the_gradients(D, causal, T_q, T_k):
    check(*operands(D, T_q, T_k), causal)


@masks
@pytest.mark.parametrize("dtype", [t for t in dtypes_for("triton") if t != torch.float32])
def test_several_batches_grouped_heads_and_a_gradient_of_lse(causal, dtype):
    q, k, v, do = operands(64, 50, 70, dtype, B=2, H=6, H_kv=2)
    check(q, k, v, do, causal, normal(2, 6, 50, seed=2), 0.2)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU starts programs in an order of its own")
@masks
def test_same_bits_in_whatever_order_programs_begin(causal, monkeypatch):
    """The other way round, too, every program finds that it is its turn, or the kernel raises."""
    inputs = operands(64, 90, 90, B=2, H=4, H_kv=2)
    once = gradients(*inputs, causal)
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx
    last_first = lambda x, y, z: place(builder.grid_dim[0] - 1 - x, y, z)  # noqa: E731
    monkeypatch.setattr(builder, "set_grid_idx", last_first)
    for name, t in gradients(*inputs, causal).items():
        assert_bitwise(t, once[name], name)


@masks
def test_same_bits_in_sections_of_heads_and_on_every_run(causal, monkeypatch):
    inputs = operands(64, 90, 90, B=2, H=4, H_kv=2)
    once = gradients(*inputs, causal)
    for section in (1, 3):
        monkeypatch.setattr(backward_one_pass, "heads_per_section", lambda *_, n=section: n)
        backward._one_pass_plans.cache_clear()
        for name, t in gradients(*inputs, causal).items():
            assert_bitwise(t, once[name], name)
    backward._one_pass_plans.cache_clear()


@masks
def test_a_batch_element_has_the_bits_that_it_has_alone(causal):
    inputs = operands(64, 70, 70, B=3)
    together = gradients(*inputs, causal)
    for name, t in gradients(*(t[1:2] for t in inputs), causal).items():
        assert_bitwise(t, together[name][1:2], name)


@heads
def test_rows_without_keys_have_gradients_of_zero(D):
    q, k, v, do = operands(D, 3 * M + 7, 20)
    blind = 3 * M + 7 - 20
    dq = gradients(q, k, v, do, True)["dq"]
    assert_bitwise(dq[:, :blind], torch.zeros_like(dq[:, :blind]))
    dlse = normal(1, 2, 3 * M + 7, seed=2)
    dlse[..., :blind] = 0.0  # that of -inf does not count
    check(q, k, v, do, True, dlse)


@heads
@masks
def test_scores_that_no_key_has_do_not_count(D, causal):
    """Behind the keys p would be exp(-lse), infinite here, and no number times a key of zeros."""
    q, k, v, do = operands(D, 2 * M + 5, 2 * N + 5)
    check(q.abs(), -4 * k.abs(), v, do, causal, scale=1.0)


@masks
def test_gradients_go_into_a_buffer_of_the_projection(causal):
    q, k, v, do = operands(64, 100, 100)
    expected = gradients(q, k, v, do, causal)
    wide = torch.full((1, 160, 7, 64), NAN, dtype=q.dtype, device=q.device)
    views = wide[:, 30:130].split((2, 1, 1, 3), dim=2)[:3]
    gradients(q, k, v, do, causal, into=views)
    for name, t in zip(expected, views, strict=True):
        assert_bitwise(t, expected[name], name)
    untouched = torch.ones(wide.shape, dtype=torch.bool)
    untouched[:, 30:130, :4] = False
    assert wide[untouched.to(wide.device)].isnan().all()


@triton.jit
def _there_and_back(in_ptr, moved_ptr, out_ptr, M: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    i = tl.arange(0, M)[:, None] * D + tl.arange(0, D)[None, :]
    moved = backward_one_pass._by_thread(tl.load(in_ptr + i), W)
    tl.store(moved_ptr + tl.arange(0, M * D), tl.reshape(moved, (M * D,)))
    again = tl.load(moved_ptr + tl.arange(0, M * D))
    tl.store(out_ptr + i, backward_one_pass._by_row(again, M, D, W))


SHARED = [(64, 64, 4, (2, 2)), (64, 64, 8, (2, 4)), (64, 128, 8, (2, 4)), (32, 128, 4, (1, 4))]


@pytest.mark.parametrize(("M", "D", "warps", "shared"), SHARED)
def test_the_order_of_the_workspace_is_that_of_the_threads(M, D, warps, shared):
    """Number r of a thread of mma.sync's 16 x 8 tiles, at [r, thread], by PTX's definition."""
    assert backward_one_pass.warps_of(M, D, warps) == shared
    tile = torch.arange(M * D, dtype=torch.int32, device=DEVICE).view(M, D)
    moved, again = torch.empty_like(tile), torch.empty_like(tile)
    _there_and_back[(1,)](tile, moved, again, M, D, backward_one_pass.Warps(*shared))
    assert_bitwise(again, tile)
    threads, (along_m, along_d) = 32 * warps, shared
    expected = torch.empty(M * D // threads, threads, dtype=torch.int32)
    for thread in range(threads):
        warp, lane = divmod(thread, 32)
        warp_m, warp_d = divmod(warp, along_d)
        numbers = itertools.product(
            range(M // (16 * along_m)), range(2), range(D // (8 * along_d)), range(2)
        )
        for r, (rows, half, columns, pair) in enumerate(numbers):
            m = 16 * (rows * along_m + warp_m) + 8 * half + lane // 4
            d = 8 * (columns * along_d + warp_d) + 2 * (lane % 4) + pair
            expected[r, thread] = m * D + d
    assert_bitwise(moved.cpu().view(expected.shape), expected)


ORDER = """
import re
from bench.machine_code.aot import shipped
names = {
    "ld.relaxed.gpu.global.u32": "ask", "bar.sync": "meet", "fence.acq_rel.gpu": "fence",
    "red.relaxed.gpu.global.add.u32": "pass on", "ld.acquire.gpu.global.u32": "await",
    "st.relaxed.gpu.global.f32": "store", "red.relaxed.gpu.global.add.f32": "add",
    "red.release.gpu.global.add.u32": "pass on the last",
}
for kernel in shipped("sm_80", only="^attention_backward_one_pass bfloat16 .* causal=True"):
    text = kernel.kernel.asm["ptx"]
    text = text[text.index("ld.relaxed.gpu.global.u32"):]
    found = [names[name] for name in re.findall("|".join(map(re.escape, names)), text)]
    order = ",".join(t for i, t in enumerate(found) if i == 0 or found[i - 1] != t)
    moved = re.findall(r"convert_layout .*xf32, #mma", kernel.kernel.asm["ttgir"])
    print(order, len(moved), sep=";")
"""


def test_in_machine_code_sums_have_their_turn_and_stay_where_they_are():
    """The interpreter has turns of its own; a pipeliner might move what it does not understand.

    Two loops, of tiles in full and of those that the mask cuts.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ORDER]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loop = "ask,meet,fence,pass on,await,meet," + ",".join(["store,add"] * 4)
    expected = f"{loop},meet,{loop},meet,pass on the last,meet;0"
    assert run.stdout.split("\n") == [expected, expected, ""]


# Which calls take it


@pytest.mark.parametrize(
    "option", [{"dropout_p": 0.1}, {"softcap": 3.0}, {"window_size": (7, 0)}, {"varlen": True}]
)
def test_calls_that_it_does_not_have_raise(option):
    q, k, v, do = operands(64, 40, 40)
    o, lse = exact_attention(q, k, v)
    grads = [torch.empty_like(t) for t in (q, k, v)]
    options = {"causal": False, "softmax_scale": None, "config": CONFIG} | option
    if options.pop("varlen", False):
        cu_seqlens = torch.tensor([0, 40], dtype=torch.int32, device=DEVICE)
        options["offsets"] = Offsets(cu_seqlens, cu_seqlens, 40, 40)
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    inputs = q, k, v, o.to(q.dtype).contiguous(), lse.float(), do
    with pytest.raises(ValueError, match="has neither dropout, softcap, windows nor sequences"):
        backward.attention_backward(*inputs, *grads, **options, seed=seed)


def test_what_is_absent_or_not_aligned_raises():
    q, k, v, do = operands(64, 40, 40)
    o, lse = exact_attention(q, k, v)
    grads = [torch.empty_like(t) for t in (q, k, v)]
    options = {"causal": True, "softmax_scale": None, "config": CONFIG}
    inputs = q, k, v, o.to(q.dtype).contiguous(), lse.float(), do
    with pytest.raises(ValueError, match="computes all of dq, dk and dv"):
        backward.attention_backward(*inputs, None, *grads[1:], **options)
    unaligned = torch.empty(k.numel() + 1, dtype=k.dtype, device=DEVICE)[1:].view(k.shape)
    with pytest.raises(ValueError, match="rows of whole 16 bytes"):
        backward.attention_backward(*inputs, grads[0], unaligned, grads[2], **options)


@pytest.mark.parametrize(("D", "dtype"), [(64, torch.float32), (96, torch.float16)])
def test_other_heads_and_dtypes_raise(D, dtype):
    q, k, v, do = operands(D, 40, 40, dtype)
    with pytest.raises(ValueError, match="16-bit heads of 64 or 128 lanes, got D = "):
        gradients(q, k, v, do, True)


@pytest.mark.parametrize(
    "other",
    [
        *({"block_m": 24}, {"num_warps": 3}, {"use_tma": True}, {"pdl": True}, {"groups": 2}),
    ],
)
def test_no_other_config_is_taken_for_its_own(other):
    q, k, v, do = operands(64, 40, 40)
    with pytest.raises(ValueError, match="in parts of 16 queries and 8 lanes, and neither TMA"):
        gradients(q, k, v, do, True, config=replace(CONFIG, **other))


TAKEN = {
    "an A100": (True, {}),
    "heads of 128": (True, {"D": 128}),
    "Ada": (True, {"target": "sm_89"}),
    "a small Blackwell": (True, {"target": "sm_120"}),
    "Ampere with a small L2": (False, {"target": "sm_86"}),
    "a large Blackwell": (False, {"target": "sm_100"}),
    "AMD": (False, {"target": "rocm"}),
    "the interpreter": (False, {"target": "interpreter"}),
    "fp32": (False, {"dtype": torch.float32}),
    "fp16": (True, {"dtype": torch.float16}),
    "heads of 96": (False, {"D": 96}),
    "heads of 32": (False, {"D": 32}),
    "few queries": (False, {"T_q": 255}),
    "few keys": (False, {"T_k": 255}),
    "a window": (False, {"window": (70, 0)}),
    "dropout": (False, {"dropout_p": 0.1}),
    "softcap": (False, {"softcap": 5.0}),
    "sequences": (False, {"sequences": (2, 256, 256)}),
    "do off 16 bytes": (False, {"off": 3}),
    "dq off 16 bytes": (False, {"off": 4}),
    "a config of the two kernels": (False, {"config": replace(CONFIG, one_pass=False)}),
    "a config of its own": (True, {"config": CONFIG, "T_q": 255, "target": "sm_86"}),
}


def plans_of(changed, H=2):
    c = {"D": 64, "T_q": 256, "T_k": 300, "dtype": torch.bfloat16, "target": "sm_80"} | changed
    layouts = [
        Layout((1, T, H, c["D"]), (T * H * c["D"], H * c["D"], c["D"], 1), i != c.get("off"))
        for i, T in enumerate([c[t] for t in ("T_q", "T_k", "T_k", "T_q", "T_q", "T_k", "T_k")])
    ]
    scores = (None, c.get("softcap", 0.0), c.get("dropout_p", 0.0), "ieee")
    mask = (c.get("sequences"), c.get("causal", True), c.get("window", (-1, -1)))
    return backward._one_pass_plans.__wrapped__(
        CPU, c["dtype"], tuple(layouts[:4]), tuple(layouts[4:]),
        (True, True, None), *mask, *scores, c["target"], c.get("config"),
    )  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_which_calls_take_it(case):
    taken, changed = TAKEN[case]
    plans = plans_of(changed)
    assert (plans is not None) == taken
    assert not taken or isinstance(plans, backward_one_pass.Plans)


def test_public_calls_take_it_where_the_table_says_so(monkeypatch):
    """On a GPU also recorded ones, on other tensors."""
    monkeypatch.setattr(backward, "one_pass", lambda *_: CONFIG)
    forget()
    forget_plans()
    q, k, v, do = operands(64, 5 * N, 5 * N, H=4, H_kv=2)
    for scale in (1, 2, 3) if DEVICE.type == "cuda" else (1,):
        leaves = [(t * scale).requires_grad_() for t in (q, k, v)]
        out = ra_triton.packed_attention(*leaves, causal=True, backend="triton")
        found = torch.autograd.grad(out, leaves, do)
        options = {"causal": True, "softmax_scale": None}
        alone = [t.detach() for t in leaves]
        o, lse = attention_forward(*alone, **options)
        grads = [torch.full_like(t, NAN) for t in leaves]
        backward.attention_backward(*alone, o, lse, do, *grads, **options, config=CONFIG)
        for t, expected in zip(found, grads, strict=True):
            assert_bitwise(t, expected)
    forget()
    forget_plans()


def test_what_it_allocates_holds_whole_tiles_their_turns_and_the_ticket():
    plans = plans_of({"T_q": 257, "causal": False}, H=3)
    tiles = 3 * 5
    assert plans.sums == tiles * 64 * 64
    assert plans.counters == 1 + tiles + 3 == plans.delta.arguments["counters"]
    assert plans.one_pass.grid == (3 * 5, 1, 1)
    assert plans.rounding.grid == (tiles, 1, 1)


def test_sections_hold_what_a_group_of_heads_reads_and_adds():
    """Of 32 MB: two bytes for each number of q and do, and four for those of dq."""
    assert plans_of({"T_q": 512, "T_k": 512}, H=64).one_pass.arguments["section"] == 64
    q, k = (Layout((1, 8192, h, 64), (8192 * h * 64, h * 64, 64, 1), True) for h in (64, 16))
    plans = backward._one_pass_plans.__wrapped__(
        CPU, torch.bfloat16, (q, k, k, q), (q, k, k), (True, True, None), None, False, (-1, -1),
        None, 0.0, 0.0, "ieee", "sm_80", None,
    )  # fmt: skip
    assert plans.one_pass.arguments["section"] == 2  # of 16 groups, each of 16 MB


def test_delta_zeroes_all_counters_where_there_are_more_than_rows():
    q, _, _, do = operands(64, 1, 1, H=1)
    counters = torch.full((80,), 7, dtype=torch.int32, device=DEVICE)
    delta = torch.full((1, 1, 1), NAN, device=DEVICE)
    of = (DEVICE, q.dtype, Layout(do.shape, do.stride(), True), (True, None, True))
    target = backward.target_of(DEVICE)
    plan = backward._delta_plan(*of, target, 77)
    plan(do.contiguous(), do, None, delta, counters)
    expected = torch.tensor([0] * 77 + [7] * 3, dtype=torch.int32)
    assert_bitwise(counters.cpu(), expected)


# On a GPU alone, of whatever kind: the assembly, with that one's products


@pytest.mark.gpu
@heads
@masks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 127, 129, 257, 640, 1000])
def test_lengths_around_tile_boundaries(D, causal, dtype, T):
    q, k, v, do = operands(D, T, T, dtype, B=2, H=4, H_kv=2)
    check(q, k, v, do, causal, normal(2, 4, T, seed=2), 0.2)


@pytest.mark.gpu
@heads
@masks
@pytest.mark.parametrize("busy", [False, True])
def test_the_same_bits_a_hundred_times(D, causal, busy):
    """Far more programs than run at once; while another stream takes SMs, too."""
    q, k, v, do = operands(D, 1500, 1500, B=4, H=16, H_kv=8)
    options = {"causal": causal, "softmax_scale": None}
    o, lse = attention_forward(q, k, v, **options)
    other, square = torch.cuda.Stream(), normal(4096, 4096, dtype=torch.float16)
    first = None
    for _ in range(100):
        if busy:
            with torch.cuda.stream(other):
                square @ square
        grads = [torch.full_like(t, NAN) for t in (q, k, v)]
        backward.attention_backward(q, k, v, o, lse, do, *grads, **options, config=CONFIG)
        first = first or grads
        for t, expected in zip(grads, first, strict=True):
            assert torch.equal(t, expected)
    for b, h in ((0, 0), (3, 7)):
        one = [t[b : b + 1, :, 2 * h : 2 * h + 2] for t in (q, do)]
        one[1:1] = [t[b : b + 1, :, h : h + 1] for t in (k, v)]
        found = [first[0][b : b + 1, :, 2 * h : 2 * h + 2]]
        found += [t[b : b + 1, :, h : h + 1] for t in first[1:]]
        budgets = attention_gradient_budgets(*one, None, causal=causal)
        named = dict(zip(("dq", "dk", "dv"), found, strict=True))
        check_gradients(named, budgets, dtype=q.dtype, case=f"{D} {causal} {b} {h}")
