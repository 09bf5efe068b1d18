"""The forward kernel for Hopper: which calls take it, its machine code, its numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budget import assert_attention_close, assert_bitwise
from gluon_interpreter import interpret
from strategies import normal, quick

from ra_triton.kernels.attention import forward as attention_forward
from ra_triton.kernels.attention.forward_hopper import (
    REGISTERS,
    SECTION_BYTES,
    forward_plan,
    heads_filling_rounds,
)
from ra_triton.launch.configs import launch_config, warp_specialised
from ra_triton.launch.plans import layout_of

ROOT = Path(__file__).parents[2]
ROWS = {  # name: heads of so many lanes, and the row
    name: (D, warp_specialised(D, torch.bfloat16, "sm_90", length, causal))
    for name, D, length, causal in (
        *(("short causal 64", 64, 1024, True), ("short full 64", 64, 1024, False)),
        *(("64", 64, 4096, True), ("128", 128, 4096, True)),
    )
}
rows = pytest.mark.parametrize("row", ROWS)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "target", "length", "taken"),
    [
        (64, torch.bfloat16, "sm_90", 256, True),
        (64, torch.bfloat16, "sm_90", 255, False),
        (128, torch.float16, "sm_90", 256, True),
        (128, torch.float16, "sm_90", 255, False),
        (128, torch.float32, "sm_90", 1 << 20, False),
        (128, torch.bfloat16, "sm_80", 1 << 20, False),
        (128, torch.bfloat16, "interpreter", 1 << 20, False),
        (96, torch.bfloat16, "sm_90", 1 << 20, False),
        (32, torch.bfloat16, "sm_90", 1 << 20, False),
    ],
)
def test_long_rows_of_16_bits_on_hopper_take_it(head_dim, dtype, target, length, taken):
    for causal in (True, False):
        config = warp_specialised(head_dim, dtype, target, length, causal)
        assert (config is not None) == taken


def test_newer_assemblers_get_tiles_of_two_groups_for_long_rows_of_64():
    """With three groups and 128 keys Triton 3.9 spills; the row is one that others have."""
    for causal in (True, False):
        rows = [
            warp_specialised(64, torch.bfloat16, "sm_90", 4096, causal, version)
            for version in ((3, 6), (3, 7), (3, 8), (3, 9), (4, 0))
        ]
        assert set(rows[:3]) == {ROWS["64"][1]}
        assert set(rows[3:]) == {ROWS["short full 64"][1]}
    for head_dim, length, causal in ((64, 1024, True), (128, 4096, True)):
        old, new = (
            warp_specialised(head_dim, torch.bfloat16, "sm_90", length, causal, version)
            for version in ((3, 7), (3, 9))
        )
        assert old == new


def test_its_rows_fit_the_registers_of_an_sm():
    for _, config in ROWS.values():
        # The threads of the copying warp's group, three warps of which are idle, have 24 each.
        assert 128 * (config.groups * REGISTERS[config.groups] + 24) <= 65536
        assert REGISTERS[config.groups] % 8 == 0
        assert config.use_tma
        assert config.pdl
    for head_dim in (64, 128):
        plain = launch_config("attention_forward", head_dim, torch.bfloat16, "sm_90", True)
        assert plain.groups == 1  # what says that the kernel is another


def kernel_of(
    D,
    *,
    T=1024,
    dtype=torch.bfloat16,
    target="sm_90",
    offset=0,
    dropout_p=0.0,
    window_size=(-1, 0),
    softcap=0.0,
    sequences=None,
    o=True,
):
    """Which kernel a call would launch on a target; ``offset`` and ``o`` say what is unaligned."""
    rows = torch.empty(2 * T * 3 * 2 * D + offset, dtype=dtype, device="meta")[offset:]
    q, k, v = (layout_of(t) for t in rows.view(2, T, 3, 2, D).unbind(2))
    if offset:
        q = q._replace(on_16_bytes=False)
    plan = attention_forward._plan.__wrapped__(
        *(torch.device("cpu"), dtype, q, k, v, (None, None, None, o, True), sequences),
        *(True, window_size, None, softcap, dropout_p, "ieee", target, None),
    )
    return plan.kernel.__name__


@pytest.mark.parametrize("D", [64, 128])
def test_what_suits_it_is_launched_with_it_and_nothing_else_is(D):
    plain, own = "_attention_forward_kernel", "_attention_forward_hopper_kernel"
    assert kernel_of(D) == kernel_of(D, dtype=torch.float16) == own
    others = [
        *({"T": 128}, {"dtype": torch.float32}, {"target": "sm_89"}),
        *({"offset": 1}, {"dropout_p": 0.1}, {"o": False}),
        *({"window_size": (5, 0)}, {"softcap": 2.0}, {"sequences": (3, 4096, 4096)}),
    ]
    assert {kernel_of(D, **other) for other in others} == {plain}


@pytest.mark.parametrize("causal", [True, False])
def test_programs_of_a_plan_cover_the_queries(causal):
    rows = (torch.empty(2, T, 3, 6, 64, device="meta") for T in (4097, 5000))
    q, k = (layout_of(t[:, :, 0]) for t in rows)
    n_m = 22  # 21 tiles of 192 are 4032
    for processors, programs in ((100, 100), (300, 2 * 6 * n_m)):
        plan = forward_plan(torch.bfloat16, q, k, k, causal, 0.5, ROWS["64"][1], processors)
        assert plan.grid == (programs, 1, 1)
        section, per_section, rounds = (
            plan.arguments[name] for name in ("section", "per_section", "rounds")
        )
        first = range(0, 2 * 6, section)
        tiles = [min(section, 2 * 6 - head) * n_m for head in first]
        assert sum(-(-n // programs) for n in tiles) == rounds
        assert -(-tiles[0] // programs) == per_section
    assert plan.bulk[6].strides == (4097 * 6 * 64, 64, 6 * 64, 1)  # o is contiguous
    assert [plan.bulk[i].block for i in (0, 1, 2, 6)] == [
        (1, 1, rows, 64) for rows in (64, 128, 128, 64)
    ]


def test_a_last_section_of_fewer_heads_has_rounds_too():
    q = layout_of(torch.empty(2, 4097, 7, 64, device="meta"))
    plan = forward_plan(torch.bfloat16, q, q, q, True, None, ROWS["64"][1], 30)
    section, per_section, rounds = (
        plan.arguments[name] for name in ("section", "per_section", "rounds")
    )
    assert (section, per_section) == (5, 4)  # 5 heads of 22 tiles, in rounds of 30
    assert rounds == 2 * 4 + 3  # and 4 heads


def loads(n_heads, weights, section, programs):
    """Key tiles of every program: the order of ``_tile``, written out."""
    found, i = [0] * programs, 0
    for first in range(0, n_heads, section):
        heads = min(section, n_heads - first)
        for start in range(0, heads * len(weights), programs):
            for p in range(programs):
                place = start + (p if i % 2 == 0 else programs - 1 - p)
                found[p] += weights[place // heads] if place < heads * len(weights) else 0
            i += 1
    return found


@pytest.mark.parametrize(
    ("n_heads", "T", "D", "queries"),
    [
        *((96, 1024, 64, 128), (512, 1024, 64, 128), (256, 2048, 64, 192), (128, 4096, 64, 192)),
        *((256, 1024, 128, 128), (128, 2048, 128, 128), (64, 4096, 128, 128), (67, 1024, 64, 128)),
    ],
)
def test_causal_work_is_even(n_heads, T, D, queries):
    weights = [-(-min(T, T - tile * queries) // 128) for tile in range(-(-T // queries))]
    section = heads_filling_rounds(n_heads, len(weights), 4 * T * D, 132)
    found = loads(n_heads, weights, section, 132)
    assert sum(found) == n_heads * sum(weights)
    assert max(found) <= 1.1 * sum(found) / 132 + 1


@pytest.mark.parametrize(
    ("n_heads", "section"),
    [(3, 3), (100, 66), (170, 66), (140, 70)],  # 66 heads of 8 tiles are 4 rounds of 132
)
def test_sections_fill_their_rounds_and_have_no_more_heads_than_there_are(n_heads, section):
    """But of a few heads that would remain each section takes some."""
    assert heads_filling_rounds(n_heads, 8, 2**18, 132) == section


def test_sections_stay_in_the_second_level_cache():
    assert heads_filling_rounds(1000, 8, 2**20, 132) * 2**20 <= 1.5 * SECTION_BYTES
    assert heads_filling_rounds(3, 1000, 2**30, 132) == 1


LOOK = """
import json
import re
from bench.machine_code.aot import shipped
from bench.machine_code.sass import Program

found = {}
for kernel in shipped("sm_90", only="attention_forward_hopper .* causal=True"):
    loop, steps = Program(kernel.sass).hot_loop(), []
    for i in loop.body:
        if i.opcode.startswith("WARPGROUP.DEPBAR"):
            steps.append(["wait", int(i.operands.split(",")[-1].strip(), 16)])
        elif i.base == "HGMMA":
            steps.append(["product", i.matrix_shape[1]])
        elif i.opcode == "MUFU.EX2":
            steps.append(["exp2", 1])
    ptx = kernel.kernel.asm["ptx"]
    copy = re.search(r"cp[.]async[.]bulk[.]tensor\\S*complete_tx", ptx).start()
    early = 0 <= ptx.find("griddepcontrol.wait") < copy
    found[kernel.label] = {"steps": steps, "waits_first": early}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def machine_code():
    """Of the kernel's hot loop by label, from a process where kernels are not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", LOOK],
        env={**env, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "keys"),
    [("D=64 causal=True", 128), ("D=64 causal=True T=1024", 64), ("D=128 causal=True", 128)],
)
def test_exponentials_run_while_a_product_does(machine_code, case, keys):
    """q kᵀ and p v are issued, the first is waited for, and exp2 comes before the second wait."""
    code = machine_code[f"attention_forward_hopper bfloat16 {case}"]
    steps = [tuple(step) for step in code["steps"]]
    first, second = steps.index(("wait", 1)), steps.index(("wait", 0))
    assert {kind for kind, _ in steps[:first]} == {"product"}
    assert first < second
    between = [kind for kind, _ in steps[first:second]]
    # A thread has one in 128 of a warpgroup's 64 x keys scores, and two rows to scale.
    assert between.count("exp2") == keys // 2 + 2
    assert "product" not in between
    assert steps.count(("wait", 0)) == steps.count(("wait", 1)) == 1


def test_it_waits_for_the_kernel_before_ahead_of_the_first_copy(machine_code):
    assert all(code["waits_first"] for code in machine_code.values())


def run(row, q, k, v, causal=True, scale=None, *, seed=0, processors=3):
    """On a GPU; without one in the interpreter of Gluon, in an order of ``seed``."""
    config = ROWS[row][1]
    if q.is_cuda:
        return attention_forward.attention_forward(
            q, k, v, causal=causal, softmax_scale=scale, config=config
        )
    o, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q[..., 0].mT.shape)
    layouts = (layout_of(t) for t in (q, k, v))
    plan = forward_plan(q.dtype, *layouts, causal, scale, config, processors)
    operands = (q, k, v, None, None, None, o, lse)
    interpret(plan, operands, seed=seed, processors=processors)
    return o, lse


def operands(row, T_q, T_k, dtype=torch.bfloat16, B=2, H=3, H_kv=3):
    """Views of one buffer, as the projection leaves them where ``T_q == T_k``."""
    D, _ = ROWS[row]
    rows = normal(B, max(T_q, T_k), H + 2 * H_kv, D, dtype=dtype)
    q, k, v = rows.split((H, H_kv, H_kv), dim=2)
    return q[:, :T_q], k[:, :T_k], v[:, :T_k]


@pytest.mark.parametrize(
    ("T_q", "T_k", "dtype", "seed", "processors"),
    quick(
        [
            *((257, 257, torch.bfloat16, 0, 3), (130, 387, torch.float16, 1, 2)),
            *((321, 65, torch.bfloat16, 2, 5), (1, 300, torch.bfloat16, 3, 4)),
            *((128, 128, torch.float16, 4, 1), (700, 515, torch.bfloat16, 5, 4)),
        ],
        3,
    ),
)
@rows
@pytest.mark.parametrize("causal", [True, False])
def test_cut_tiles_and_grouped_heads(row, T_q, T_k, dtype, seed, processors, causal):
    q, k, v = operands(row, T_q, T_k, dtype, B=1, H=4, H_kv=2)
    out, lse = run(row, q, k, v, causal, 0.3, seed=seed, processors=processors)
    assert_attention_close(out, q, k, v, lse=lse, causal=causal, softmax_scale=0.3)


@rows
def test_same_bits_in_whatever_order_programs_and_groups_go_on(row):
    q, k, v = operands(row, 200, 200, B=1)
    out, lse = run(row, q, k, v)
    for seed, processors in ((1, 1), (2, 2), (3, 9), (4, 4)):
        again, lse_again = run(row, q, k, v, seed=seed, processors=processors)
        assert_bitwise(again, out)
        assert_bitwise(lse_again, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 63, 64, 65, 127, 128, 129, 192, 193, 256, 257, 397, 1000])
@rows
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lengths_around_tile_boundaries(row, T, causal, dtype):
    q, k, v = operands(row, T, T, dtype)
    out, lse = run(row, q, k, v, causal)
    assert_attention_close(out, q, k, v, lse=lse, causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T_q", "T_k"), [(1, 300), (5, 129), (130, 515), (515, 130), (192, 64), (300, 1), (64, 4096)]
)
@rows
@pytest.mark.parametrize("causal", [True, False])
def test_queries_and_keys_of_different_length_and_grouped_heads(row, T_q, T_k, causal):
    q, k, v = operands(row, T_q, T_k, H=6, H_kv=2)
    out, lse = run(row, q, k, v, causal, scale=0.37)
    assert_attention_close(out, q, k, v, lse=lse, causal=causal, softmax_scale=0.37)


@pytest.mark.gpu
@rows
def test_same_bits_again_alone_and_as_a_prefix(row):
    q, k, v = operands(row, 700, 700, B=3)
    out, lse = run(row, q, k, v)
    for _ in range(3):
        again, lse_again = run(row, q, k, v)
        assert_bitwise(again, out)
        assert_bitwise(lse_again, lse)
    assert_bitwise(run(row, q[1:2], k[1:2], v[1:2])[0], out[1:2])
    for T in (1, 64, 65, 300, 512):
        assert_bitwise(run(row, q[:, :T], k[:, :T], v[:, :T])[0], out[:, :T])
    later = [t.clone() for t in (q, k, v)]
    for t in later:
        t[:, 300:] = 7.0
    assert_bitwise(run(row, *later)[0][:, :300], out[:, :300])


@pytest.mark.gpu
@rows
@pytest.mark.parametrize("causal", [True, False])
def test_more_tiles_than_fit_at_once_and_several_sections_of_heads(row, causal):
    """Programs take many tiles, some in their last rounds none; repeated runs would show a race."""
    T, H = (1024, 50) if row.startswith("short") else (4096, 13)
    q, k, v = operands(row, T, T, B=3, H=H, H_kv=H)
    out, _ = run(row, q, k, v, causal)
    for b, h in ((0, 0), (1, 7), (2, 11), (2, H - 1)):
        one = [t[b : b + 1, :, h : h + 1] for t in (q, k, v)]
        assert_attention_close(out[b : b + 1, :, h : h + 1], *one, causal=causal)
        assert_bitwise(out[b : b + 1, :, h : h + 1], run(row, *one, causal)[0], "alone")
    for _ in range(10):
        assert_bitwise(run(row, q, k, v, causal)[0], out)


@rows
def test_rows_without_keys_give_zero_and_minus_infinity(row):
    q, k, v = operands(row, 200, 70)
    out, lse = run(row, q, k, v)
    assert_bitwise(out[:, :130], torch.zeros_like(out[:, :130]))
    assert lse[..., :130].isneginf().all()
    assert lse[..., 130:].isfinite().all()


@rows
def test_memory_around_the_operands_does_not_matter(row):
    q, k, v = operands(row, 150, 150, B=1)
    out, lse = run(row, q, k, v)
    wide = torch.full((1, 400, 9, q.shape[3]), float("nan"), dtype=q.dtype, device=q.device)
    views = []
    for i, t in enumerate((q, k, v)):
        wide[:, 100:250, 3 * i : 3 * i + 3] = t
        views.append(wide[:, 100:250, 3 * i : 3 * i + 3])
    for got, expected in zip(run(row, *views), (out, lse), strict=True):
        assert_bitwise(got, expected)
