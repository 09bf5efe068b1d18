"""The forward kernel for Hopper: which calls take it, its machine code, its numbers."""

import itertools
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from budget import assert_attention_close, assert_bitwise
from gluon_interpreter import interpret
from strategies import NAN, normal, quick

import ra_triton
from ra_triton.call.offsets import Offsets, lengths
from ra_triton.kernels.attention import forward as attention_forward
from ra_triton.kernels.attention.arguments import attention_of
from ra_triton.kernels.attention.forward_hopper import (
    REGISTERS,
    SECTION_BYTES,
    Sizes,
    Variant,
    _tile,
    forward_plan,
    sections_filling_rounds,
)
from ra_triton.launch import gluon
from ra_triton.launch.configs import launch_config, warp_specialised
from ra_triton.launch.gluon import gl
from ra_triton.launch.plans import Plan, layout_of

ROOT = Path(__file__).parents[2]
ROWS = {  # name: heads of so many lanes, and the row
    name: (D, warp_specialised(D, torch.bfloat16, "sm_90", length, causal))
    for name, D, length, causal in (
        *(("short causal 64", 64, 1024, True), ("short full 64", 64, 1024, False)),
        *(("64", 64, 4096, True), ("128", 128, 4096, True)),
    )
}
rows = pytest.mark.parametrize("row", ROWS)
_LONG = (128, torch.bfloat16, "sm_90", 4096, True)
_NARROW = {"narrow 128": (128, warp_specialised(*_LONG, keys=255))}
_CAPPED = {"capped 128": (128, warp_specialised(*_LONG, softcap=True, varlen=True))}
rows_of_windows = pytest.mark.parametrize("row", ROWS | _NARROW)
rows_of_caps = pytest.mark.parametrize("row", ROWS | _CAPPED)
ROWS = ROWS | _NARROW | _CAPPED


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


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [256, 1024, 4096])
@pytest.mark.parametrize("version", [(3, 6), (3, 9)])
def test_which_masks_caps_and_sequences_take_it(head_dim, length, version):
    """In the row that they have without, or in one of theirs; the table says why."""
    for keys in (None, 1, 255, 256, 4097):
        for causal, softcap, varlen in itertools.product((False, True), repeat=3):
            of = (head_dim, torch.bfloat16, "sm_90", length, causal, version)
            config = warp_specialised(*of, keys=keys, softcap=softcap, varlen=varlen)
            slower = keys is not None and not varlen and (softcap or head_dim == 64)
            slower = slower or (softcap and head_dim == 64)
            of_row = ROWS["capped 128"][1] if softcap else warp_specialised(*of)
            if varlen and head_dim == 64:
                of_row = ROWS["short full 64"][1]
            if keys in (1, 255) and not softcap and not varlen and version < (3, 9):
                of_row = ROWS["narrow 128"][1]
            assert config == (None if slower else of_row)


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


def launch_of(
    D,
    *,
    T=1024,
    causal=True,
    dtype=torch.bfloat16,
    target="sm_90",
    offset=0,
    dropout_p=0.0,
    window_size=(-1, 0),
    softcap=0.0,
    sequences=None,
    o=True,
):
    """What a call would launch on a target; ``offset`` and ``o`` say what is unaligned."""
    rows = torch.empty(2 * T * 3 * 2 * D + offset, dtype=dtype, device="meta")[offset:]
    q, k, v = (layout_of(t) for t in rows.view(2, T, 3, 2, D).unbind(2))
    if offset:
        q = q._replace(on_16_bytes=False)
    return attention_forward._plan.__wrapped__(
        *(torch.device("cpu"), dtype, q, k, v, (None, None, None, o, True), sequences),
        *(causal, window_size, None, softcap, dropout_p, "ieee", target, None),
    )


def kernel_of(D, **call):
    """Which kernel that is."""
    return launch_of(D, **call).kernel.__name__


@pytest.mark.parametrize("D", [64, 128])
def test_what_suits_it_is_launched_with_it_and_nothing_else_is(D):
    plain, own = "_attention_forward_kernel", "_attention_forward_hopper_kernel"
    assert kernel_of(D) == kernel_of(D, dtype=torch.float16) == own
    others = [
        *({"T": 128}, {"dtype": torch.float32}, {"target": "sm_89"}),
        *({"offset": 1}, {"dropout_p": 0.1}, {"o": False}),
    ]
    assert {kernel_of(D, **other) for other in others} == {plain}
    assert kernel_of(D, softcap=2.0) == (own if D == 128 else plain)
    window, sequences = {"window_size": (5, 0)}, {"sequences": (3, 4096, 4096)}
    assert kernel_of(D, **window) == (own if D == 128 else plain)
    assert kernel_of(D, **window, softcap=2.0) == plain
    assert kernel_of(D, **sequences) == kernel_of(D, **sequences, **window) == own
    assert kernel_of(D, **sequences, **window, softcap=2.0) == (own if D == 128 else plain)
    few = [{"sequences": (0, 4096, 4096)}, {"sequences": (9, 255, 4096)}]
    few += [
        {"sequences": (9, 4096, 255)},
        {**sequences, "dropout_p": 0.1},
        {**sequences, "offset": 1},
    ]
    assert {kernel_of(D, **other) for other in few} == {plain}


@pytest.mark.parametrize(
    ("causal", "window_size", "keys"),
    [
        *((True, (254, 0), 64), (True, (254, -1), 64), (True, (255, 0), 128)),
        *((False, (100, 154), 64), (False, (100, 155), 128), (False, (0, 0), 64)),
        *((False, (100, -1), 128), (False, (-1, 100), 128), (True, (-1, -1), 128)),
    ],
)
def test_windows_of_fewer_than_256_keys_have_tiles_of_half_as_many(
    causal, window_size, keys, monkeypatch
):
    """With heads of 128; a query's own key counts, and a side without a limit is wide."""

    def tile_of(version, **call):
        monkeypatch.setattr(attention_forward, "TRITON_VERSION", version)
        launch = launch_of(128, causal=causal, window_size=window_size, **call)
        return launch.bulk[1].block[-2]

    assert tile_of((3, 8)) == keys
    assert tile_of((3, 8), sequences=(3, 4096, 4096)) == 128
    assert tile_of((3, 9)) == 128  # there the smaller ones spill


def plan_of(q, k, v, config, processors, causal=True, scale=None, sequences=None, **options):
    """The kernel's launch for these layouts."""
    window_size, softcap = options.get("window_size", (-1, -1)), options.get("softcap", 0.0)
    mask = (causal, window_size, scale, softcap, options.get("dropout_p", 0.0))
    call = attention_of(options.get("dtype", torch.bfloat16), (q, k, v), sequences, *mask, "ieee")
    return forward_plan(call, config, processors)


@pytest.mark.parametrize("causal", [True, False])
def test_programs_of_a_plan_cover_the_queries(causal):
    rows = (torch.empty(2, T, 3, 6, 64, device="meta") for T in (4097, 5000))
    q, k = (layout_of(t[:, :, 0]) for t in rows)
    n_m = 22  # 21 tiles of 192 are 4032
    for processors, programs in ((100, 100), (300, 2 * 6 * n_m)):
        plan = plan_of(q, k, k, ROWS["64"][1], processors, causal, 0.5)
        assert plan.grid == (programs, 1, 1)
        heads = heads_of_sections(plan, 12)
        per_section = max(-(-of * n_m // programs) for of in heads)
        assert plan.arguments["per_section"] == per_section
        assert plan.arguments["rounds"] == len(heads) * per_section
    assert plan.bulk[6].strides == (4097 * 6 * 64, 64, 6 * 64, 1)  # o is contiguous
    assert [plan.bulk[i].block for i in (0, 1, 2, 6)] == [
        (1, 1, rows, 64) for rows in (64, 128, 128, 64)
    ]


def heads_of_sections(plan, n_heads):
    """How many there are in each section of a plan."""
    section, longer = (plan.arguments[name] for name in ("section", "longer"))
    heads = [section + 1] * longer
    return heads + [section] * ((n_heads - sum(heads)) // section)


def test_sections_have_as_many_heads_as_others_or_one_more():
    q = layout_of(torch.empty(2, 4097, 7, 64, device="meta"))
    plan = plan_of(q, q, q, ROWS["64"][1], 30)
    assert heads_of_sections(plan, 14) == [5, 5, 4]
    assert plan.arguments["per_section"] == 4  # 5 heads of 22 tiles, in rounds of 30
    assert plan.arguments["rounds"] == 3 * 4
    assert plan.arguments["shift"] == 30 // 3


def takers(n_heads, n_m, sections, programs):
    """(head, tile): program, the order of ``_tile`` written out."""
    found, first = {}, 0
    for s in range(sections):
        heads = n_heads // sections + (s < n_heads % sections)
        for place in range(heads * n_m):
            i, p = divmod(place, programs)
            p = p if i % 2 == 0 else programs - 1 - p
            tile = first + place % heads, place // heads
            found[tile] = (p - s * max(1, programs // sections)) % programs
        first += heads
    assert first == n_heads
    return found


@gluon.jit
def _take(found_ptr, schedule, sizes, n_m, V: gl.constexpr):
    for i in range(schedule[4]):
        tile = _tile(i, schedule, sizes, 64, V)
        if tile.some:
            at = (tile.b * sizes.H + tile.h) * n_m + (sizes.T_q - tile.m) // 64 - 1
            gl.store(found_ptr + at, gl.program_id(0))


@pytest.mark.parametrize("sections", [1, 3, 14])
@pytest.mark.parametrize("programs", [5, 30])
def test_programs_take_tiles_in_this_order(sections, programs):
    n_heads, n_m = 14, 22
    section, longer = divmod(n_heads, sections)
    per_section = -(-(section + (longer > 0)) * n_m // programs)
    schedule = (section, longer, max(1, programs // sections), per_section)
    found = torch.full((n_heads * n_m,), -1, dtype=torch.int32)
    arguments = {"schedule": (*schedule, sections * per_section, programs), "n_m": n_m}
    arguments |= {"sizes": Sizes(7, n_m * 64, n_m * 64, 0, 0), "num_warps": 1}
    arguments["V"] = Variant(CAUSAL=True, WINDOW=False, SOFTCAP=False, VARLEN=False)
    interpret(Plan(_take, (programs,), arguments, {}), [found])
    taken = takers(n_heads, n_m, sections, programs)
    assert found.tolist() == [taken[divmod(i, n_m)] for i in range(n_heads * n_m)]


@pytest.mark.parametrize(
    ("n_heads", "T", "D", "queries"),
    [
        *((96, 1024, 64, 128), (512, 1024, 64, 128), (256, 2048, 64, 192), (128, 4096, 64, 192)),
        *((256, 1024, 128, 128), (128, 2048, 128, 128), (64, 4096, 128, 128), (67, 1024, 64, 128)),
        *((32, 16384, 64, 192), (80, 3000, 128, 128), (16, 12000, 128, 128)),
    ],
)
def test_causal_work_is_even(n_heads, T, D, queries):
    weights = [-(-min(T, T - tile * queries) // 128) for tile in range(-(-T // queries))]
    sections = sections_filling_rounds(n_heads, len(weights), 4 * T * D, 132)
    found = [0] * 132
    for (_, tile), program in takers(n_heads, len(weights), sections, 132).items():
        found[program] += weights[tile]
    assert sum(found) == n_heads * sum(weights)
    assert max(found) <= 1.04 * sum(found) / 132 + 1


@pytest.mark.parametrize(
    ("n_heads", "sections"),
    [(3, 1), (98, 1), (100, 2), (170, 3), (140, 2)],  # 66 heads of 8 tiles are 4 rounds of 132
)
def test_sections_fill_their_rounds_and_have_no_more_heads_than_there_are(n_heads, sections):
    assert sections_filling_rounds(n_heads, 8, 2**18, 132) == sections


def test_sections_stay_in_the_second_level_cache():
    heads = -(-1000 // sections_filling_rounds(1000, 8, 2**20, 132))
    assert heads * 2**20 <= 1.5 * SECTION_BYTES
    assert sections_filling_rounds(3, 1000, 2**30, 132) == 3


BOTH_SIZES = "causal=True|varlen"
QUICK = "D=64 (causal=True|varlen|varlen.*softcap)$"
LOOK = """
import json
import re
import sys
from bench.machine_code.aot import shipped
from bench.machine_code.sass import Program

found = {}
for kernel in shipped("sm_90", only=f"attention_forward_hopper .*({sys.argv[1]})"):
    loop, steps = Program(kernel.sass).hot_loop(), []
    for i in loop.body:
        if i.opcode.startswith("WARPGROUP.DEPBAR"):
            steps.append(["wait", int(i.operands.split(",")[-1].strip(), 16)])
        elif i.base == "HGMMA":
            steps.append(["product", i.matrix_shape[1]])
        elif i.opcode == "MUFU.EX2":
            steps.append(["exp2", 1])
    ptx = kernel.kernel.asm["ptx"]
    first = re.search(r"ld[.]global|cp[.]async[.]bulk[.]tensor\\S*complete_tx", ptx).start()
    early = 0 <= ptx.find("griddepcontrol.wait") < first
    limits = [f"{limit}.NaN.f32" in ptx for limit in ("max", "min")]
    found[kernel.label] = {"steps": steps, "waits_first": early, "limits": limits}
print(json.dumps(found))
"""


@cache
def machine_code(kernels):
    """Of the hot loop by label, from a process where kernels are not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", LOOK, kernels],
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
def test_exponentials_run_while_a_product_does(case, keys):
    """q kᵀ and p v are issued, the first is waited for, and exp2 comes before the second wait."""
    code = machine_code(BOTH_SIZES)[f"attention_forward_hopper bfloat16 {case}"]
    steps = [tuple(step) for step in code["steps"]]
    first, second = steps.index(("wait", 1)), steps.index(("wait", 0))
    assert {kind for kind, _ in steps[:first]} == {"product"}
    assert first < second
    between = [kind for kind, _ in steps[first:second]]
    # A thread has one in 128 of a warpgroup's 64 x keys scores, and two rows to scale.
    assert between.count("exp2") == keys // 2 + 2
    assert "product" not in between
    assert steps.count(("wait", 0)) == steps.count(("wait", 1)) == 1


@pytest.mark.parametrize(
    ("kernels", "count"),
    [(QUICK, 3), pytest.param(BOTH_SIZES, 9, marks=pytest.mark.slow)],
)
def test_it_waits_for_the_kernel_before_ahead_of_the_first_copy(kernels, count):
    found = machine_code(kernels).values()
    assert len(found) == count
    assert all(code["waits_first"] for code in found)


@pytest.mark.parametrize(
    ("kernels", "capped"),
    [
        (QUICK, {False, True}),
        pytest.param(BOTH_SIZES, {False, True}, marks=pytest.mark.slow),
    ],
)
def test_capped_scores_that_are_no_number_stay_none(kernels, capped):
    """Where a GPU's other minima and maxima would return the limit; interpreters have none such."""
    found = machine_code(kernels)
    assert {"softcap" in label for label in found} == capped
    for label, code in found.items():
        assert code["limits"] == ["softcap" in label] * 2


def run(row, q, k, v, causal=True, scale=None, *, seed=0, processors=3, offsets=None, **options):
    """On a GPU; without one in the interpreter of Gluon, in an order of ``seed``."""
    config = ROWS[row][1]
    if q.is_cuda:
        return attention_forward.attention_forward(
            q, k, v, causal=causal, softmax_scale=scale, offsets=offsets, config=config, **options
        )
    o, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q[..., 0].mT.shape)
    layouts = [layout_of(t) for t in (q, k, v)]
    sequences = None if offsets is None else lengths(offsets)
    options["dtype"] = q.dtype
    plan = plan_of(*layouts, config, processors, causal, scale, sequences, **options)
    cu_seqlens = (None, None) if offsets is None else offsets[:2]
    interpret(plan, (q, k, v, None, *cu_seqlens, o, lse), seed=seed, processors=processors)
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


# Windows

WINDOWS = {  # name: causal, window
    "causal": (True, (70, 0)),
    "narrow": (True, (5, -1)),
    "own key": (False, (0, 0)),
    "both sides": (False, (100, 33)),
    "to the left": (False, (90, -1)),
    "to the right": (False, (-1, 65)),
}
windows = pytest.mark.parametrize("window", WINDOWS)


def check(row, q, k, v, causal, seed=0, processors=3, **options):
    """Output and logsumexp through the gate."""
    out, lse = run(row, q, k, v, causal, 0.3, seed=seed, processors=processors, **options)
    assert_attention_close(out, q, k, v, lse=lse, causal=causal, softmax_scale=0.3, **options)


@pytest.mark.parametrize(
    ("T_q", "T_k", "dtype", "seed", "processors"),
    quick(
        [
            *((321, 321, torch.bfloat16, 0, 3), (130, 387, torch.float16, 1, 2)),
            *((321, 65, torch.bfloat16, 2, 5), (700, 515, torch.float16, 3, 4)),
            *((1, 300, torch.bfloat16, 4, 1), (192, 192, torch.bfloat16, 5, 2)),
        ],
        2,
    ),
)
@rows_of_windows
@windows
def test_windows(row, window, T_q, T_k, dtype, seed, processors):
    causal, window_size = WINDOWS[window]
    q, k, v = operands(row, T_q, T_k, dtype, B=1, H=4, H_kv=2)
    check(row, q, k, v, causal, seed, processors, window_size=window_size)


@pytest.mark.gpu
@rows_of_windows
@pytest.mark.parametrize("left", [0, 1, 62, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300, 5000])
@pytest.mark.parametrize("right", [0, 1, 63, 64, 129, -1])
def test_windows_around_tile_boundaries(row, left, right):
    for T_q, T_k in ((500, 500), (1000, 130), (130, 1000), (1, 700)):
        q, k, v = operands(row, T_q, T_k, H=4, H_kv=2)
        check(row, q, k, v, False, window_size=(left, right))
        check(row, q, k, v, True, window_size=(left, right))


@rows_of_windows
@windows
def test_rows_whose_window_is_empty_give_zero_and_minus_infinity(row, window):
    causal, window_size = WINDOWS[window]
    q, k, v = operands(row, 300, 70, B=1, H=2, H_kv=1)
    out, lse = run(row, q, k, v, causal, window_size=window_size)
    blind = 230 - (0 if causal else window_size[1] if window_size[1] >= 0 else 230)
    assert_bitwise(out[:, :blind], torch.zeros_like(out[:, :blind]))
    assert lse[..., :blind].isneginf().all()
    assert lse[..., blind:].isfinite().all()


@rows_of_windows
def test_keys_far_outside_of_a_window_are_not_visited(row):
    q, k, v = operands(row, 600, 600, B=1, H=1, H_kv=1)
    options = {"causal": False, "window_size": (40, 20)}
    out, lse = run(row, q, k, v, **options)
    for far in (slice(0, 128), slice(384, 600)):
        k_bad, v_bad = k.clone(), v.clone()
        k_bad[:, far], v_bad[:, far] = NAN, NAN
        # The tile of 192 queries before the last, and keys of 128 around their windows
        bad, lse_bad = run(row, q, k_bad, v_bad, **options)
        part = slice(384, 600) if far.start == 0 else slice(0, 192)
        assert_bitwise(bad[:, part], out[:, part])
        assert_bitwise(lse_bad[..., part], lse[..., part])


# Softcap


@pytest.mark.parametrize(
    ("T", "causal", "window_size"),
    quick([(257, True, (-1, -1)), (200, False, (50, 7)), (321, False, (-1, -1))], 2),
)
@pytest.mark.parametrize("softcap", [0.5, 20.0])
@rows_of_caps
def test_softcap(row, T, causal, window_size, softcap):
    q, k, v = operands(row, T, T + 30, B=1, H=2, H_kv=1)
    check(row, q, k, v, causal, seed=T, window_size=window_size, softcap=softcap)


@pytest.mark.gpu
@rows_of_caps
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [1e-3, 0.7, 50.0, 1e6])
def test_scores_far_below_and_far_above_the_cap(row, dtype, softcap):
    for T_q, T_k in ((500, 500), (130, 1000), (700, 130)):
        q, k, v = operands(row, T_q, T_k, dtype)
        for factor in (0.01, 1.0, 30.0):
            for causal in (True, False):
                check(row, factor * q, k, v, causal, softcap=softcap)


# Variable lengths

SEQUENCES = {  # name: queries, keys
    "cut": ((257, 65, 63), (257, 65, 63)),
    "empty": ((0, 300, 0, 129, 64, 1, 0), (3, 300, 0, 0, 200, 1, 5)),
    "other keys": ((5, 200), (400, 130)),
    "one": ((390,), (390,)),
    "short": ((3,) * 20, (7,) * 20),
}
KINDS = {  # name: causal, options
    "causal": (True, {}),
    "full": (False, {}),
    "window": (True, {"window_size": (70, 0)}),
    "window and softcap": (False, {"window_size": (100, 33), "softcap": 2.0}),
}


def offsets_of(queries, keys, device, longer=0):
    cu_seqlens = (torch.tensor([0, *n], device=device).cumsum(0).int() for n in (queries, keys))
    return Offsets(*cu_seqlens, max(queries) + longer, max(keys) + longer)


def check_sequences(row, queries, keys, causal, dtype=torch.bfloat16, longer=0, seed=0, **options):
    """Each sequence through the gate."""
    q, k, v = operands(row, sum(queries), sum(keys), dtype, B=1, H=4, H_kv=2)
    offsets = offsets_of(queries, keys, q.device, longer)
    at = {"seed": seed, "processors": 1 + seed % 4}
    out, lse = run(row, q, k, v, causal, 0.3, offsets=offsets, **at, **options)
    for of_q, of_k in offsets.sequences():
        one = q[:, of_q], k[:, of_k], v[:, of_k]
        check_one = {"lse": lse[..., of_q], "causal": causal, "softmax_scale": 0.3, **options}
        assert_attention_close(out[:, of_q], *one, **check_one)


@pytest.mark.parametrize(
    ("sequences", "dtype", "longer", "seed"),
    quick(
        [
            *(("empty", torch.bfloat16, 0, 0), ("cut", torch.float16, 500, 1)),
            *(("other keys", torch.bfloat16, 0, 2), ("short", torch.bfloat16, 0, 3)),
            *(("one", torch.float16, 0, 4), ("cut", torch.bfloat16, 0, 5)),
        ],
        2,
    ),
)
@rows_of_caps
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_are_computed_as_if_alone(row, kind, sequences, dtype, longer, seed):
    causal, options = KINDS[kind]
    check_sequences(row, *SEQUENCES[sequences], causal, dtype, longer, seed, **options)


@pytest.mark.gpu
@rows_of_caps
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_many_sequences(row, kind, seed):
    causal, options = KINDS[kind]
    draw = torch.Generator().manual_seed(seed)
    queries = (torch.rand(40, generator=draw) ** 3 * 3000).int().tolist()
    for keys in (queries, queries[::-1]):
        check_sequences(row, queries, keys, causal, **options)


@rows
@pytest.mark.parametrize("causal", quick([True, False]))
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_nothing_passes_from_one_sequence_to_the_next(row, value, causal):
    queries = (70, 129, 1, 60)
    q, k, v = operands(row, sum(queries), sum(queries), B=1, H=2, H_kv=1)
    offsets = offsets_of(queries, queries, q.device)
    options = {"causal": causal, "offsets": offsets}
    out, lse = run(row, q, k, v, **options)
    for bad, _ in offsets.sequences():
        spoilt = [t.clone() for t in (q, k, v)]
        for t in spoilt:
            t[:, bad] = value
        others = [i for i in range(sum(queries)) if not bad.start <= i < bad.stop]
        got, got_lse = run(row, *spoilt, seed=bad.start, **options)
        assert_bitwise(got[:, others], out[:, others])
        assert_bitwise(got_lse[..., others], lse[..., others])


@rows
@pytest.mark.parametrize(
    "cu", [(1, 3, 5), (0, 4, 3), (0, 3, 4), (0, 3, 6), (-9, 2**31 - 1, -(2**31))]
)
def test_unchecked_offsets_lead_to_no_address_outside(row, cu):
    """The operands lie among NaN: what is read outside of them would show."""
    D = ROWS[row][0]
    q, k, v = (normal(1, 5, 2, D, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    wide = []
    for t in (q, k, v):
        wide.append(torch.full((1, 300, 2, D), NAN, dtype=t.dtype, device=t.device))
        wide[-1][:, 100:105] = t
    cu_seqlens = torch.tensor(cu, dtype=torch.int32, device=q.device)
    offsets = Offsets(cu_seqlens, cu_seqlens, 5, 5)
    out, _ = run(row, *(t[:, 100:105] for t in wide), offsets=offsets, processors=1)
    alone, _ = run(row, q, k, v, offsets=offsets, processors=1)
    written = ~alone.isnan().any(-1).any(-1)
    assert_bitwise(out[written], alone[written])


@rows
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_of_masks_and_sequences_in_whatever_order(row, kind):
    causal, options = KINDS[kind]
    q, k, v = operands(row, 250, 250, B=1, H=2, H_kv=1)
    options = options | {"offsets": offsets_of((200, 50), (200, 50), q.device)}
    out, lse = run(row, q, k, v, causal, **options)
    for seed, processors in ((1, 1), (2, 9)):
        again, lse_again = run(row, q, k, v, causal, seed=seed, processors=processors, **options)
        assert_bitwise(again, out)
        assert_bitwise(lse_again, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_public_calls_over_sequences_take_it_by_themselves(D, kind):
    """Also recorded ones, on other tensors and other offsets."""
    causal, options = KINDS[kind]
    options = {"causal": causal, "softmax_scale": None, **options}
    row = {64: "short full 64", 128: "128"}[D]
    row = "capped 128" if D == 128 and "softcap" in options else row
    for queries in ((300, 129, 71), (71, 129, 300), (0, 500, 0)):
        q, k, v = operands(row, 500, 500, B=1)
        offsets = offsets_of(queries, queries, q.device)._replace(
            max_seqlen_q=500, max_seqlen_k=500
        )
        given = (*(t[0] for t in (q, k, v)), *offsets[:2], 500, 500)
        out, lse = ra_triton.packed_attention_varlen(
            *given, **options, return_lse=True, check=False, backend="triton"
        )
        own = D == 128 or "softcap" not in options  # else the plain kernel
        config = ROWS[row][1] if own else None
        expected = attention_forward.attention_forward(
            q, k, v, offsets=offsets, config=config, **options
        )
        assert_bitwise(out, expected[0][0])
        assert_bitwise(lse, expected[1][0])


def test_sequences_have_as_many_rounds_as_they_may_need():
    q = layout_of(torch.empty(1, 5000, 3, 64, device="meta"))
    config = ROWS["64"][1]  # 192 queries
    for sequences, tiles in (((4, 5000, 5000), 26 + 4), ((4, 200, 200), 4 * 2), ((1, 5000, 1), 27)):
        plan = plan_of(q, q, q, config, 7, sequences=sequences)
        assert plan.grid == (7, 1, 1)
        assert plan.arguments["rounds"] == -(-3 * tiles // 7)


def test_dropout_is_refused():
    q = layout_of(torch.empty(1, 512, 3, 64, device="meta"))
    with pytest.raises(ValueError, match=r"no dropout, got dropout_p = 0\.1"):
        plan_of(q, q, q, ROWS["64"][1], 7, dropout_p=0.1)
