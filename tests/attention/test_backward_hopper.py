"""The backward kernel for Hopper: its launches, the order of its sums, its numbers."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from budget import assert_bitwise
from gluon_interpreter import as_python, interpreted
from gradient_budget import attention_gradient_budgets, check_gradients, exact_attention
from strategies import DEVICE, NAN, normal, operands, quick

import ra_triton
from ra_triton.call.offsets import Offsets
from ra_triton.kernels.attention import backward, backward_hopper
from ra_triton.kernels.attention.arguments import mask_of
from ra_triton.kernels.attention.forward import attention_forward
from ra_triton.launch import gluon
from ra_triton.launch.configs import ONE_PASS, LaunchConfig
from ra_triton.launch.plans import Bulk, CannotCompile, Layout

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("integers_of_another")
heads = pytest.mark.parametrize("D", ONE_PASS)
MASKS = {
    "causal": (True, (-1, -1)),
    "full": (False, (-1, -1)),
    "left": (True, (70, 0)),
    "both": (False, (30, 150)),
    "right": (False, (-1, 40)),
    "own": (False, (0, 0)),
}


@triton.jit(do_not_specialize=["B"])  # as in the kernels; Triton 3.6 fails for a B of one
def _search(offsets_ptr, tile_ptr, found_ptr, n, B, ROWS: tl.constexpr):
    i = tl.arange(0, 512)
    tile = tl.load(tile_ptr + i, i < n, other=0)
    found = backward_hopper.sequence_of(offsets_ptr, tile, B, ROWS)
    tl.store(found_ptr + i, found, i < n)


@triton.jit
def _sort_out(offsets_ptr, out_ptr, B, total):
    backward_hopper._never_decreasing(offsets_ptr, out_ptr, B, total, 16)


@pytest.fixture(autouse=True)
def three_processors(monkeypatch):
    """So that a program takes keys of several tickets."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(backward, "processors_of", lambda device: 3)
        backward._one_pass_plans.cache_clear()


def gradients(D, q, k, v, do, mask="causal", dlse=None, scale=None, *, into=None, **order):
    """``{"dq": ..., ...}`` on a GPU; without one in the interpreter of Gluon, in some order."""
    causal, window_size = MASKS[mask]
    options = {"causal": causal, "softmax_scale": scale, "window_size": window_size}
    o, lse = exact_attention(q, k, v, **options)
    inputs = (q, k, v, o.to(q.dtype).contiguous(), lse.float().contiguous(), do)
    grads = into or [torch.full_like(t, NAN) for t in (q, k, v)]
    with nullcontext() if q.is_cuda else interpreted(**order):
        backward.attention_backward(*inputs, *grads, dlse=dlse, **options, config=ONE_PASS[D])
    return dict(zip(("dq", "dk", "dv"), grads, strict=True))


def check(D, q, k, v, do, mask="causal", dlse=None, scale=None, **order):
    causal, window_size = MASKS[mask]
    found = gradients(D, q, k, v, do, mask, dlse, scale, **order)
    options = {"causal": causal, "window_size": window_size, "softmax_scale": scale}
    budgets = attention_gradient_budgets(q, k, v, do, dlse, **options)
    check_gradients(found, budgets, dtype=q.dtype, case=f"{D} {mask} {q.shape} {k.shape}")


CASES = [
    *(("causal", 257, 257), ("full", 130, 387), ("both", 321, 65), ("left", 200, 333)),
    *(("right", 63, 129), ("own", 130, 130), ("causal", 1, 300), ("full", 300, 1)),
    *(("causal", 515, 130), ("full", 257, 257), ("left", 640, 640), ("both", 128, 128)),
    *(("causal", 130, 387), ("right", 321, 65), ("left", 1, 1), ("own", 400, 129)),
]


@heads
@pytest.mark.parametrize(("mask", "T_q", "T_k"), quick(CASES, 3))
def test_it_computes_the_gradients(D, mask, T_q, T_k):
    seed = T_q + T_k
    q, k, v, do = operands(D, T_q, T_k)
    check(D, q, k, v, do, mask, seed=seed, processors=1 + seed % 4)


@heads
@pytest.mark.parametrize("mask", quick(["both", "full", "causal"], 2))
def test_several_batches_grouped_heads_and_a_gradient_of_lse(D, mask):
    q, k, v, do = operands(D, 200, 260, torch.float16, B=2, H=4, H_kv=2)
    dlse = normal(2, 4, 200, seed=2)
    check(D, q, k, v, do, mask, dlse, 0.2, seed=5, processors=4)


@heads
@pytest.mark.parametrize(("seed", "processors"), quick([(3, 9), (1, 1), (2, 2), (4, 4)]))
def test_same_bits_in_whatever_order_programs_and_warps_go_on(D, seed, processors):
    q, k, v, do = operands(D, 400, 400)
    once = gradients(D, q, k, v, do)
    again = gradients(D, q, k, v, do, seed=seed, processors=processors)
    for name, t in once.items():
        assert_bitwise(again[name], t, name)


@heads
def test_rows_without_keys_have_gradients_of_zero(D):
    q, k, v, do = operands(D, 400, 70)
    dq = gradients(D, q, k, v, do)["dq"]
    assert_bitwise(dq[:, :330], torch.zeros_like(dq[:, :330]))
    dlse = normal(1, 2, 400, seed=2)
    dlse[..., :330] = 0.0  # that of -inf does not count
    check(D, q, k, v, do, dlse=dlse)


@heads
def test_keys_without_queries_have_gradients_of_zero(D):
    q, k, v, do = operands(D, 100, 600)
    found = gradients(D, q, k, v, do, "own")
    for name in ("dk", "dv"):
        assert_bitwise(found[name][:, :500], torch.zeros_like(found[name][:, :500]), name)


@heads
def test_scores_that_no_key_has_do_not_count(D):
    """Behind the keys p would be exp(-lse), infinite here, and no number times a key of zeros."""
    q, k, v, do = operands(D, 150, 150)
    check(D, q.abs(), -4 * k.abs(), v, do, "full", scale=1.0)


@heads
def test_gradients_go_into_a_buffer_of_the_projection(D):
    q, k, v, do = operands(D, 200, 200)
    expected = gradients(D, q, k, v, do)
    wide = torch.full((1, 260, 7, D), NAN, dtype=q.dtype, device=q.device)
    views = wide[:, 30:230].split((2, 1, 1, 3), dim=2)[:3]
    gradients(D, q, k, v, do, into=views)
    for name, t in zip(expected, views, strict=True):
        assert_bitwise(t, expected[name], name)
    untouched = torch.ones(wide.shape, dtype=torch.bool)
    untouched[:, 30:230, :4] = False
    assert wide[untouched.to(wide.device)].isnan().all()


def test_calls_that_it_does_not_have_raise():
    q, k, v, do = operands(64, 40, 40)
    o, lse = exact_attention(q, k, v)
    o, lse = o.to(q.dtype).contiguous(), lse.float()
    grads = [torch.empty_like(t) for t in (q, k, v)]
    options = {"causal": True, "softmax_scale": None, "config": ONE_PASS[64]}
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for other in ({"dropout_p": 0.1, "seed": seed}, {"softcap": 3.0}):
        with pytest.raises(ValueError, match="neither dropout nor softcap"):
            backward.attention_backward(q, k, v, o, lse, do, *grads, **options, **other)
    with pytest.raises(ValueError, match="computes all of dq, dk and dv"):
        backward.attention_backward(q, k, v, o, lse, do, None, *grads[1:], **options)
    unaligned = torch.empty(k.numel() + 1, dtype=k.dtype, device=DEVICE)[1:].view(k.shape)
    with pytest.raises(ValueError, match="suit bulk copies"):
        backward.attention_backward(q, k, v, o, lse, do, grads[0], unaligned, grads[2], **options)


@heads
@pytest.mark.parametrize(
    "other",
    [
        *({"block_m": 32}, {"block_n": 64}, {"num_warps": 8}, {"num_stages": 3}, {"groups": 3}),
        {"num_stages": 1},  # would never end
    ],
)
def test_no_other_config_is_taken_for_its_own(D, other):
    inputs = operands(D, 40, 40)
    o, lse = exact_attention(*inputs[:3])
    o, lse = o.to(inputs[0].dtype).contiguous(), lse.float()
    grads = [torch.empty_like(t) for t in inputs[:3]]
    config = replace(ONE_PASS[D], **other)
    with pytest.raises(ValueError, match=f"heads of {D} has tiles of .* got LaunchConfig"):
        backward.attention_backward(
            *inputs[:3], o, lse, inputs[3], *grads, causal=True, softmax_scale=None, config=config
        )


@pytest.mark.parametrize(("D", "dtype"), [(64, torch.float32), (96, torch.float16)])
def test_other_heads_and_dtypes_with_its_config_raise(D, dtype):
    q, k, v, do = operands(D, 40, 40, dtype)
    o, lse = exact_attention(q, k, v)
    grads = [torch.empty_like(t) for t in (q, k, v)]
    with pytest.raises(ValueError, match="16-bit heads of 64 or 128 lanes, got D = "):
        backward.attention_backward(
            q, k, v, o.to(dtype).contiguous(), lse.float(), do, *grads,
            causal=True, softmax_scale=None, config=ONE_PASS[64],
        )  # fmt: skip


def test_nothing_is_launched_where_it_does_not_compile():
    class Kernel:
        launches, bulk = 0, {i: Bulk((2, 2, 256), (512, 256, 1), (1, 2, 128)) for i in (4, 5)}

        def compile(self, *tensors):
            assert len(tensors) == 11
            raise CannotCompile

        def __call__(self, *tensors):
            self.launches += 1

    plans = backward_hopper.Plans(Kernel(), Kernel())
    with pytest.raises(CannotCompile):
        plans(*[torch.zeros(1, device=DEVICE)] * 6, None, *[torch.zeros(1)] * 3)
    assert (plans.rows.launches, plans.one_pass.launches) == (0, 0)


CPU = torch.device("cpu")
PLAIN = LaunchConfig(64, 4, 2, block_n=64)
TAKEN = {
    "as it is": (True, {}),
    "fp32": (False, {"dtype": torch.float32}),
    "fp16": (True, {"dtype": torch.float16}),
    "Ampere with a small L2": (False, {"target": "sm_86"}),
    "heads of 128": (True, {"D": 128}),
    "heads of 96": (False, {"D": 96}),
    "heads of 32": (False, {"D": 32}),
    "a config of the plain kernels": (False, {"config": PLAIN}),
    "a config of its own": (True, {"config": ONE_PASS[64], "T_q": 255}),
    "few queries": (False, {"T_q": 255}),
    "few keys": (False, {"T_k": 255}),
    "a window": (True, {"window": (70, 0)}),
    "dropout": (False, {"dropout_p": 0.1}),
    "softcap": (False, {"softcap": 5.0}),
    "sequences": (True, {"sequences": (2, 256, 256)}),
    "sequences in a window": (True, {"sequences": (2, 256, 256), "window": (70, 0)}),
    "sequences of few queries": (False, {"sequences": (2, 255, 256)}),
    "sequences of few keys": (False, {"sequences": (2, 256, 255)}),
    "no sequences": (False, {"sequences": (0, 256, 256)}),
    "sequences of 64": (True, {"sequences": (4, 256, 256)}),
    "sequences of 51": (False, {"sequences": (5, 256, 256)}),
    "sequences under a softcap": (False, {"sequences": (2, 256, 256), "softcap": 5.0}),
    "do off 16 bytes": (False, {"off": 3}),
    "dq off 16 bytes": (False, {"off": 4}),
    "dv off 16 bytes": (False, {"off": 6}),
}


@pytest.mark.parametrize("case", TAKEN)
def test_which_calls_take_it(case, monkeypatch):
    """A call that does not has no part in it: nothing is tried and given up."""
    monkeypatch.setattr(gluon, "_broken", set())
    taken, changed = TAKEN[case]
    c = {"D": 64, "T_q": 256, "T_k": 300, "dtype": torch.bfloat16, "target": "sm_90"} | changed
    layouts = [
        Layout((1, T, 2, c["D"]), (T * 2 * c["D"], 2 * c["D"], c["D"], 1), i != c.get("off"))
        for i, T in enumerate([c[t] for t in ("T_q", "T_k", "T_k", "T_q", "T_q", "T_k", "T_k")])
    ]
    scores = (None, c.get("softcap", 0.0), c.get("dropout_p", 0.0), "ieee")
    mask = (c.get("sequences"), True, c.get("window", (-1, -1)))
    plans = backward._one_pass_plans.__wrapped__(
        CPU, c["dtype"], tuple(layouts[:4]), tuple(layouts[4:]),
        (True, True, None), *mask, *scores, c["target"], c.get("config"),
    )  # fmt: skip
    assert (plans is not None) == taken
    assert gluon.works("attention_backward")


@pytest.mark.parametrize(
    ("T", "B", "H_kv", "group", "section", "up"),
    [
        *((1024, 1, 1, 1, 1, 0), (1024, 1, 2, 1, 1, 1), (1024, 2, 4, 1, 4, 4)),
        *((1024, 1, 5, 1, 3, 3), (1024, 5, 21, 1, 53, 53), (1024, 8, 32, 1, 64, 192)),
        *((1024, 1, 20, 8, 7, 14), (32768, 1, 4, 1, 2, 2), (32769, 1, 4, 1, 2, 0)),
        *((4096, 1, 3, 8, 2, 2), (4097, 1, 3, 8, 2, 0)),
    ],
)
def test_the_last_section_goes_down_and_all_do_where_two_heads_do_not_fit(
    T, B, H_kv, group, section, up
):
    """In 32 MB, of which a query takes 8 bytes for each of 64 lanes."""
    q, k = (
        Layout((B, T, heads, 64), (T * heads * 64, heads * 64, 64, 1), True)
        for heads in (H_kv * group, H_kv)
    )
    plans = backward._one_pass_plans.__wrapped__(
        CPU, torch.bfloat16, (q, k, k, q), (q, k, k), (True, True, None),
        None, True, (-1, -1), None, 0.0, 0.0, "ieee", "sm_90", None,
    )  # fmt: skip
    found = plans.one_pass.arguments
    assert (found["section"], found["up"]) == (section, up)


# Turns


def visits(T_q, T_k, mask, M):
    """Of the tiles of queries those that see some key of each tile, by the definition."""
    causal, window = MASKS[mask]
    left, right = (t if t >= 0 else T_q + T_k for t in window)
    right = 0 if causal else right
    own = T_k - T_q
    seen = {}
    for n in range(-(-T_k // 128)):
        keys = range(128 * n, min(128 * n + 128, T_k))
        for m in range(-(-T_q // M)):
            queries = range(M * m, min(M * m + M, T_q))
            low, high = queries[0] + own - left, queries[-1] + own + right
            if keys[0] <= high and keys[-1] >= low:
                seen.setdefault(m, []).append(n)
    return seen


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("T_q", "T_k"), [(1, 1), (257, 257), (130, 387), (1000, 1500), (1500, 1000), (2048, 2048)]
)
def test_turns_count_the_programs_that_add_to_a_tile(mask, T_q, T_k):
    """0, 1, 2 ... in the order in which tickets hand out keys, whichever it is."""
    causal, window_size = MASKS[mask]
    limits = mask_of(T_q, T_k, causal, window_size)
    sizes = backward_hopper.Sizes(T_q, T_k, 2, 1, limits.left, limits.right)
    one_length = backward_hopper.Sequences(None, None, None)
    names = ("_place", "_queries", "_adding", "_turn", "_visited")
    place_of, queries, adding, turn, visited = (
        as_python(getattr(backward_hopper, name).fn) for name in names
    )
    n_n, seen = -(-T_k // 128), visits(T_q, T_k, mask, 128)
    taken = [place_of(ticket, 2, 1, 1, sizes, one_length) for ticket in range(2 * n_n)]
    for h, down in ((0, False), (1, True)):
        of_head = taken[h * n_n : (h + 1) * n_n]
        assert [place.h for place in of_head] == [h] * n_n
        assert [place.n for place in of_head] == list(range(n_n))[:: 1 if down else -1]
        for m in range(-(-T_q // 128)):
            assert adding(m, sizes, 128)[1] == len(seen.get(m, ()))
            turns = [turn(m, place, sizes, 128) for place in of_head if place.n in seen.get(m, ())]
            assert turns == list(range(len(turns)))
        for place in of_head:
            own = queries(place.n, sizes, 128)
            tiles = sorted(m for m, keys in seen.items() if place.n in keys)
            assert list(range(own.begin, own.end)) == tiles
            order = [visited(place, own, i) for i in range(len(tiles))]
            assert order == tiles[:: -1 if down else 1]


# Variable lengths


def offsets_of(queries, keys, longer=0):
    cu_seqlens = (torch.tensor([0, *n], device=DEVICE).cumsum(0).int() for n in (queries, keys))
    return Offsets(*cu_seqlens, max(queries) + longer, max(keys) + longer)


def of_sequences(D, q, k, v, do, offsets, mask="causal", dlse=None, *, into=None, **order):
    """:func:`gradients` of sequences, each with the output that it has alone."""
    causal, window_size = MASKS[mask]
    options = {"causal": causal, "softmax_scale": 0.3, "window_size": window_size}
    o, lse = torch.zeros_like(do).contiguous(), torch.zeros(do[..., 0].mT.shape, device=do.device)
    for of_q, of_k in offsets.sequences():
        one = exact_attention(q[:, of_q], k[:, of_k], v[:, of_k], **options)
        o[:, of_q], lse[..., of_q] = one[0].to(o.dtype), one[1].float()
    grads = into or [torch.full_like(t, NAN) for t in (q, k, v)]
    with nullcontext() if q.is_cuda else interpreted(**order):
        backward.attention_backward(
            q, k, v, o, lse, do, *grads, dlse=dlse, offsets=offsets, config=ONE_PASS[D], **options
        )
    return dict(zip(("dq", "dk", "dv"), grads, strict=True))


def check_sequences(D, queries, keys, mask, dtype=None, longer=0, seed=0, H=2, H_kv=1):
    """Each sequence through the gate, as if it were alone."""
    q, k, v, do = operands(D, sum(queries), sum(keys), dtype, H=H, H_kv=H_kv)
    dlse = normal(1, H, sum(queries), seed=2)
    offsets = offsets_of(queries, keys, longer)
    order = {"seed": seed, "processors": 1 + seed % 4}
    causal, window_size = MASKS[mask]
    options = {"causal": causal, "window_size": window_size, "softmax_scale": 0.3}
    for of_q, of_k in offsets.sequences():
        _, lse = exact_attention(q[:, of_q], k[:, of_k], v[:, of_k], **options)
        dlse[..., of_q].masked_fill_(lse.isneginf(), 0.0)  # that of -inf does not count
    found = of_sequences(D, q, k, v, do, offsets, mask, dlse, **order)
    for of_q, of_k in offsets.sequences():
        one = (q[:, of_q], k[:, of_k], v[:, of_k], do[:, of_q], dlse[..., of_q])
        budgets = attention_gradient_budgets(*one, **options)
        mine = {name: t[:, of_q if name == "dq" else of_k] for name, t in found.items()}
        check_gradients(mine, budgets, dtype=q.dtype, case=f"{D} {mask} {of_q} {of_k}")


SEQUENCES = {  # name: queries, keys
    "cut": ((257, 65, 63), (257, 65, 63)),
    "empty": ((0, 300, 0, 129, 64, 1, 0), (3, 300, 0, 0, 200, 1, 5)),
    "other keys": ((5, 200), (400, 130)),
    "whole tiles": ((128, 256, 64), (128, 256, 64)),
    "short": ((3,) * 20, (7,) * 20),
    "one": ((390,), (390,)),
}
OF_SEQUENCES = [
    *(("causal", "cut", None, 500, 1), ("both", "empty", torch.float16, 0, 2)),
    *(("full", "other keys", None, 0, 3), ("left", "whole tiles", None, 0, 4)),
    *(("causal", "short", torch.float16, 0, 5), ("own", "cut", None, 0, 6)),
    *(("causal", "empty", None, 0, 7), ("full", "whole tiles", torch.float16, 9, 0)),
    *(("right", "other keys", None, 0, 1), ("both", "one", None, 0, 2)),
    *(("full", "short", None, 0, 3), ("left", "other keys", None, 0, 4)),
]


@heads
@pytest.mark.parametrize(("mask", "sequences", "dtype", "longer", "seed"), quick(OF_SEQUENCES, 3))
def test_sequences_have_the_gradients_that_they_have_alone(D, mask, sequences, dtype, longer, seed):
    check_sequences(D, *SEQUENCES[sequences], mask, dtype, longer, seed)


@heads
@pytest.mark.parametrize("mask", quick(["causal", "full"]))
def test_sequences_of_several_key_value_heads(D, mask):
    """One of which has whole tiles of keys, so that the tile behind them has none."""
    check_sequences(D, (100, 70, 30), (128, 70, 30), mask, H=4, H_kv=2, seed=3)


@heads
@pytest.mark.parametrize("mask", quick(["causal", "both"], 1))
@pytest.mark.parametrize(("seed", "processors"), quick([(3, 9), (1, 1), (2, 2)]))
def test_same_bits_of_sequences_in_whatever_order(D, mask, seed, processors):
    lengths = (200, 50, 0, 130)
    q, k, v, do = operands(D, 380, 380)
    offsets = offsets_of(lengths, lengths)
    once = of_sequences(D, q, k, v, do, offsets, mask)
    again = of_sequences(D, q, k, v, do, offsets, mask, seed=seed, processors=processors)
    for name, t in once.items():
        assert_bitwise(again[name], t, name)


@pytest.mark.parametrize("D", quick([128, 64]))
@pytest.mark.parametrize("value", quick([NAN, float("inf")]))
def test_nothing_passes_from_one_sequence_to_the_next(D, value):
    lengths = (70, 129, 1, 60)
    q, k, v, do = operands(D, 260, 260)
    offsets = offsets_of(lengths, lengths)
    expected = of_sequences(D, q, k, v, do, offsets)
    for bad, _ in offsets.sequences():
        spoilt = [t.clone() for t in (q, k, v, do)]
        for t in spoilt:
            t[:, bad] = value
        others = [i for i in range(260) if not bad.start <= i < bad.stop]
        found = of_sequences(D, *spoilt, offsets, seed=bad.start)
        for name, t in found.items():
            assert_bitwise(t[:, others], expected[name][:, others], name)


@heads
@pytest.mark.parametrize("first", [20, 150])
def test_rows_of_no_sequence_are_left_alone(D, first):
    last, T = first + 150, first + 400
    q, k, v, do = operands(D, T, T)
    cu = torch.tensor([first, first + 70, last], dtype=torch.int32, device=q.device)
    found = of_sequences(D, q, k, v, do, Offsets(cu, cu, 100, 100))
    inside = [t[:, first:last] for t in (q, k, v, do)]
    alone = of_sequences(D, *inside, offsets_of((70, 80), (70, 80)))
    for name, t in found.items():
        assert t[:, :first].isnan().all()
        assert t[:, last:].isnan().all()
        assert_bitwise(t[:, first:last], alone[name], name)


@heads
def test_gradients_of_sequences_go_into_a_buffer_of_the_projection(D):
    q, k, v, do = operands(D, 200, 200)
    offsets = offsets_of((130, 70), (130, 70))
    expected = of_sequences(D, q, k, v, do, offsets)
    wide = torch.full((1, 260, 7, D), NAN, dtype=q.dtype, device=q.device)
    views = wide[:, 30:230].split((2, 1, 1, 3), dim=2)[:3]
    of_sequences(D, q, k, v, do, offsets, into=views)
    for name, t in zip(expected, views, strict=True):
        assert_bitwise(t, expected[name], name)
    untouched = torch.ones(wide.shape, dtype=torch.bool)
    untouched[:, 30:230, :4] = False
    assert wide[untouched.to(wide.device)].isnan().all()


@heads
def test_offsets_at_any_address_have_a_launch_of_their_own(D):
    """Else one that loads 16 bytes at a time would be launched on those that lie elsewhere."""
    lengths = (30, 100)
    q, k, v, do = operands(D, 130, 130)
    expected = of_sequences(D, q, k, v, do, offsets_of(lengths, lengths))
    one, other = offsets_of((7, *lengths), (7, *lengths))[:2]
    shifted = Offsets(one[1:] - 7, (other - 7)[1:], 100, 100)
    assert shifted.cu_seqlens_k.data_ptr() % 16
    before = backward._one_pass_plans.cache_info().currsize
    found = of_sequences(D, q, k, v, do, shifted)
    assert backward._one_pass_plans.cache_info().currsize == before + 1
    for name, t in found.items():
        assert_bitwise(t, expected[name], name)


UNSOUND = [
    *([0, 300, 100, 400], [-9, 2**31 - 1, -(2**31)], [400, 200, 0], [1, 3, 5], [0, 3, 1000]),
    *([300, 0, 300, 0, 300], [0, -5, 2**30, 50, 390], [390, 0, 400], [2**31 - 1] * 4),
]


@heads
@pytest.mark.parametrize("cu", quick(UNSOUND))
@pytest.mark.parametrize("of", quick(["both", "queries", "keys"]))
def test_unchecked_offsets_lead_to_no_address_outside_and_to_an_end(D, cu, of):
    """The operands lie among NaN: what is read outside of them would show."""
    T, around = 400, 150
    q, k, v, do = operands(D, T, T)
    unsound = torch.tensor(cu, dtype=torch.int32, device=q.device)
    sound = torch.linspace(0, T, len(cu), device=q.device).int()
    of_q, of_k = (sound if of == other else unsound for other in ("keys", "queries"))
    options = {"causal": True, "softmax_scale": None, "config": ONE_PASS[D]}
    o, lse = torch.zeros_like(do).contiguous(), torch.zeros(1, 2, T, device=q.device)
    results = []
    for rows in (slice(0, T), slice(around, around + T)):
        wide = [t.new_full((1, rows.stop + rows.start, *t.shape[2:]), NAN) for t in (q, k, v, do)]
        wide += [torch.full_like(t, NAN) for t in wide[:3]]
        views = [t[:, rows] for t in wide]
        for t, source in zip(views[:4], (q, k, v, do), strict=True):
            t.copy_(source)
        with nullcontext() if q.is_cuda else interpreted(processors=2):
            backward.attention_backward(
                *views[:3], o, lse, views[3], *views[4:],
                offsets=Offsets(of_q, of_k, T, T), **options,
            )  # fmt: skip
        results.append([t.clone() for t in views[4:]])
        for t, inside in zip(wide[4:], views[4:], strict=True):
            inside.fill_(NAN)
            assert t.isnan().all()
    for alone, among in zip(*results, strict=True):
        assert_bitwise(among, alone)


@pytest.mark.parametrize("ROWS", [64, 128])
def test_tiles_of_sequences_do_not_meet_and_are_found(ROWS):
    """Also where sequences are empty, and the last one ends with the tiles of a head."""
    draw = torch.Generator().manual_seed(ROWS)
    for B in (1, 2, 3, 7, 20):
        lengths = (torch.rand(B, generator=draw) ** 4 * 700).int()
        cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0).int()])
        tile = torch.arange(int(cu[-1]) // ROWS + B, dtype=torch.int32)
        owner = torch.full_like(tile, -1)
        for b in range(B):
            begin = int(cu[b]) // ROWS + b
            own = owner[begin : begin + -(-int(lengths[b]) // ROWS)]
            assert len(own) == -(-int(lengths[b]) // ROWS)
            assert (own == -1).all()
            own.fill_(b)
        given, asked = cu.to(DEVICE), tile.to(DEVICE)
        found = torch.empty_like(asked)
        _search[(1,)](given, asked, found, len(tile), B, ROWS=ROWS)
        assert torch.equal(found.cpu()[owner >= 0], owner[owner >= 0])


@pytest.mark.parametrize("B", [1, 15, 16, 40])
def test_whatever_offsets_there_are_those_of_the_kernel_never_decrease(B):
    draw = torch.Generator().manual_seed(B)
    cu = torch.randint(-300, 1300, (B + 1,), generator=draw, dtype=torch.int32)
    cu[B // 2 :: 7] = 2**31 - 1 if B == 40 else -(2**31)
    for offsets in (cu, cu.clamp(0, 1000).sort().values):
        given, found = (t.to(DEVICE) for t in (offsets, torch.full_like(offsets, -1)))
        _sort_out[(1,)](given, found, B, 1000)
        assert torch.equal(found.cpu(), offsets.clamp(0, 1000).cummax(0).values)


# On a GPU alone


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 63, 64, 65, 127, 128, 129, 255, 257, 640, 1000])
@heads
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lengths_around_tile_boundaries(D, T, mask, dtype):
    q, k, v, do = operands(D, T, T, dtype, B=2, H=4, H_kv=2)
    check(D, q, k, v, do, mask, normal(2, 4, T, seed=2), 0.2)


@pytest.mark.gpu
@heads
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seed", range(6))
def test_many_sequences(D, mask, seed):
    draw = torch.Generator().manual_seed(seed)
    queries = (torch.rand(40, generator=draw) ** 3 * 3000).int().tolist()
    for keys in (queries, queries[::-1]):
        check_sequences(D, queries, keys, mask, H=4, H_kv=2)


def many_programs_of_sequences(D, mask, times):
    """Thousands of short sequences and a few long ones; each time the same gradients."""
    draw = torch.Generator().manual_seed(D)
    lengths = [*(torch.rand(1500, generator=draw) * 60).int().tolist(), 5000, 0, 3000, 1]
    q, k, v, do = operands(D, sum(lengths), sum(lengths), H=8, H_kv=4)
    causal, window_size = MASKS[mask]
    offsets = offsets_of(lengths, lengths)
    options = {"causal": causal, "softmax_scale": None, "window_size": window_size}
    options |= {"offsets": offsets}
    o, lse = attention_forward(q, k, v, **options)
    first = None
    for _ in range(times):
        grads = [torch.full_like(t, NAN) for t in (q, k, v)]
        backward.attention_backward(q, k, v, o, lse, do, *grads, **options, config=ONE_PASS[D])
        first = first or grads
        for t, expected in zip(grads, first, strict=True):
            assert torch.equal(t, expected)
    return (q, k, v, do), offsets, first


@pytest.mark.gpu
@heads
@pytest.mark.parametrize("mask", ["causal", "full", "both"])
def test_the_same_bits_of_many_sequences_a_hundred_times(D, mask):
    (q, k, v, do), offsets, found = many_programs_of_sequences(D, mask, 100)
    causal, window_size = MASKS[mask]
    options = {"causal": causal, "softmax_scale": None, "window_size": window_size}
    for b in (0, 700, 1499, 1502, 1503):
        (of_q, of_k), h = offsets.sequences()[b], b % 4
        grouped = slice(2 * h, 2 * h + 2)
        one = [t[:, of_q, grouped if t.shape[2] == 8 else slice(h, h + 1)] for t in (q, k, v, do)]
        budgets = attention_gradient_budgets(*one, None, **options)
        mine = {
            name: t[:, of_q, grouped if name == "dq" else slice(h, h + 1)]
            for name, t in zip(("dq", "dk", "dv"), found, strict=True)
        }
        check_gradients(mine, budgets, dtype=q.dtype, case=f"{D} {mask} {b} {of_k}")


@pytest.mark.gpu
@heads
@pytest.mark.parametrize("mask", ["causal", "left"])
def test_public_calls_over_sequences_take_it_by_themselves(D, mask):
    """Also recorded ones, on other tensors and other offsets."""
    causal, window_size = MASKS[mask]
    options = {"causal": causal, "softmax_scale": None, "window_size": window_size}
    for lengths in ((300, 129, 71), (71, 129, 300), (0, 500, 0)):
        q, k, v, do = operands(D, 500, 500, H=4, H_kv=2)
        offsets = offsets_of(lengths, lengths)._replace(max_seqlen_q=500, max_seqlen_k=500)
        leaves = [t[0].detach().requires_grad_() for t in (q, k, v)]
        out = ra_triton.packed_attention_varlen(
            *leaves, *offsets[:2], 500, 500, check=False, backend="triton", **options
        )
        found = torch.autograd.grad(out, leaves, do[0])
        o, lse = attention_forward(q, k, v, offsets=offsets, **options)
        grads = [torch.full_like(t, NAN) for t in (q, k, v)]
        backward.attention_backward(
            q, k, v, o, lse, do, *grads, offsets=offsets, config=ONE_PASS[D], **options
        )
        for t, expected in zip(found, grads, strict=True):
            assert_bitwise(t, expected[0])


def many_programs(D, mask="causal", times=1):
    """Far more programs than run at once; each time the gradients of the first time."""
    q, k, v, do = operands(D, 2048, 2048, B=4, H=16, H_kv=16)
    causal, window_size = MASKS[mask]
    options = {"causal": causal, "softmax_scale": None, "window_size": window_size}
    o, lse = attention_forward(q, k, v, **options)
    first = None
    for _ in range(times):
        grads = [torch.full_like(t, NAN) for t in (q, k, v)]
        backward.attention_backward(q, k, v, o, lse, do, *grads, **options, config=ONE_PASS[D])
        first = first or grads
        for t, expected in zip(grads, first, strict=True):
            assert torch.equal(t, expected)
    return (q, k, v, do), first


@pytest.mark.gpu
@heads
@pytest.mark.parametrize("mask", ["causal", "full", "both"])
def test_the_same_bits_five_hundred_times(D, mask):
    many_programs(D, mask, 500)


@pytest.mark.gpu
@heads
@pytest.mark.parametrize("mask", ["causal", "full", "both"])
def test_heads_of_many_are_right(D, mask):
    (q, k, v, do), grads = many_programs(D, mask)
    causal, window_size = MASKS[mask]
    options = {"causal": causal, "softmax_scale": None, "window_size": window_size}
    for b, h in ((0, 0), (2, 7), (3, 15)):
        one = [t[b : b + 1, :, h : h + 1] for t in (q, k, v, do)]
        budgets = attention_gradient_budgets(*one, None, **options)
        found = {
            name: t[b : b + 1, :, h : h + 1]
            for name, t in zip(("dq", "dk", "dv"), grads, strict=True)
        }
        check_gradients(found, budgets, dtype=q.dtype, case=f"{D} {mask} {b} {h}")


@pytest.mark.gpu
@heads
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_it_ends_while_another_stream_takes_the_processors(D, mask):
    """A program waits only for keys that were handed out before its own, however few run."""
    _, expected = many_programs(D, mask)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(other):
            for _ in range(20):
                a @ a
        _, grads = many_programs(D, mask)
        for t, quiet in zip(grads, expected, strict=True):
            assert torch.equal(t, quiet)
    torch.cuda.synchronize()


BARRIERS = r"""
import json, re
from bench.machine_code.aot import shipped

found = {}
for kernel in shipped("sm_90", only="attention_backward_hopper bfloat16"):
    barriers = re.findall(r"BAR[.]\S+ (0x[0-9a-f]+)(?:, (0x[0-9a-f]+))?", kernel.sass)
    found[kernel.label] = sorted({(int(i, 16), int(n or "0", 16)) for i, n in barriers})
print(json.dumps(found))
"""


@pytest.mark.slow
def test_named_barriers_are_not_those_of_the_compiler():
    """Triton's of its partitions are below 3: those of one warp, the later ones, have none."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", BARRIERS],
        env={**env, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) >= 2 * len(ONE_PASS)
    b = backward_hopper
    own = {
        **{int(b.KEYS_READ.value): 288, int(b.DS_READY.value): 256, int(b.WORK.value): 288},
        **{int(b.DQ_FULL.value) + w: 160 for w in range(2)},
        **{int(b.DQ_EMPTY.value) + w: 160 for w in range(2)},
        **{int(b.EMPTY.value) + stage: 288 for stage in range(2)},
        **{int(b.RESULTS_READY.value): 288, int(b.WORK_TO_ADD.value): 96},
        **{int(b.WORK_READ.value): 96},
    }
    assert len(own) == 12
    for barriers in found.values():
        assert {i for i, _ in barriers} >= {0, 2, int(b.DS_READY.value)}
        for i, threads in barriers:
            assert threads == own[i] if i in own else i < 3
