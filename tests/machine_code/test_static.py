"""Shipped kernels, compiled without a GPU, against their budget: a few, and all (slow)."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton
from test_sass import AMPERE

from bench import static
from bench.machine_code import inspection, pipes, sass, static_budget
from bench.machine_code.inspection import Compiled, code_key, row_key
from bench.machine_code.pipes import ARCHITECTURES
from bench.machine_code.sass import Program

ROOT = Path(__file__).parents[2]
WITH_PRODUCTS = {
    *("attention_forward", "key_value_gradient", "query_gradient"),
    *("projection", "weight_gradient", "int8_projection"),
    *("decode", "attention_backward_one_pass"),
}


# Command lines of bench/static.py, one after the other: to import Triton takes as long as a kernel.
RUN_ALL = "import json, sys; from bench.static import main\n"
RUN_ALL += "for arguments in json.loads(sys.argv[1]): assert main(arguments) == 0"


def compiled(folder: Path, *command_lines: list[str], root: Path = ROOT) -> list[list[dict]]:
    """Rows of each command line, from a process where kernels are not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(root)
    files = [folder / str(i) for i in range(len(command_lines))]
    lines = [[*line, "--json", str(f)] for line, f in zip(command_lines, files, strict=True)]
    command = [sys.executable, "-c", RUN_ALL, json.dumps(lines)]
    run = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(file.read_text())["kernels"] for file in files]


def faults(row: dict) -> list[str]:
    """What no kernel may do, whatever its budget."""
    found = []
    if row["spilled_bytes"]:
        found.append(f"spills {row['spilled_bytes']} bytes")
    if row["serialised_wgmma"]:
        found.append("serialised WGMMA (C751x)")
    if row["overwritten_operands"]:
        found.append(f"{row['overwritten_operands']} operands overwritten in flight")
    limit = ARCHITECTURES[row["target"]].shared_per_cta
    if row["shared_memory"] > limit:
        found.append(f"needs {row['shared_memory']} bytes of shared memory, has {limit}")
    if row["stage"] not in WITH_PRODUCTS:
        return found
    by_pointer = "varlen" in row["label"] and row["target"] == "sm_90"
    aligned = "misaligned" not in row["label"] and not by_pointer
    half = "float16" in row["label"]  # float16 and bfloat16
    # For a few tokens no tile is as large as WGMMA's.
    few = "few" in row["label"] or row["stage"] == "decode"
    hopper = half and aligned and row["target"] == "sm_90" and not few
    if (half or "tf32" in row["label"]) and not row["wgmma" if hopper else "matrix_instructions"]:
        found.append("no matrix instruction in the hot loop")
    if aligned and not row["bulk_copies" if hopper else "async_copies"]:
        found.append("no asynchronous copies in the hot loop")
    return found


def assert_sound(rows: list[dict], complete: bool) -> None:
    """No fault, and within the budget; the counts are compared under the budget's Triton alone."""
    bad = [f"{row['target']} {row['label']}: {fault}" for row in rows for fault in faults(row)]
    assert not bad, "\n".join(bad)
    found = static_budget.violations(rows, static_budget.read(), complete=complete)
    assert not found, "\n".join([*found, f"If that is intended: {static_budget.UPDATE}"])


MAIN = [  # target, kernels, how many they are
    ("sm_90", "^attention_forward_hopper .* D=(64|128) causal=True( T=1024)?$", 3),
    ("sm_90", "^attention_backward_hopper bfloat16 D=(64|128) causal=True$", 2),
    ("sm_80", "^(attention_forward|key_value_gradient) bfloat16 D=64 causal=True", 2),
    ("sm_80", "^attention_backward_one_pass bfloat16 D=(64|128) causal=True T=1024$", 2),
    ("sm_120", "^(attention_forward|delta|pack) float16 D=64 (causal|in_place)=True$", 3),
]


def test_main_kernels_are_sound_and_within_their_budget(tmp_path):
    lines = (["--target", t, "--changed", "--kernel", kernels] for t, kernels, _ in MAIN)
    found = compiled(tmp_path, *lines)
    assert [len(rows) for rows in found] == [number for *_, number in MAIN]
    assert_sound([row for rows in found for row in rows], complete=False)


@pytest.mark.slow
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_shipped_kernels_are_sound_and_within_their_budget(target, tmp_path):
    """Those are compiled whose key is not in the budget, and one in sixteen of the others."""
    (rows,) = compiled(tmp_path, ["--target", target, "--changed"])
    elsewhere = set() if target == "sm_90" else set(static.HOPPER)
    if target not in ("sm_80", "sm_89", "sm_120"):
        elsewhere |= set(static.ONE_PASS)
    assert {row["stage"] for row in rows} == set(static.STAGES) - elsewhere
    assert_sound(rows, complete=True)
    budget = static_budget.read()
    if not static_budget.holds_counts(budget):
        pytest.skip(f"the counts are of Triton {budget['triton']}, not {triton.__version__}")
    if changed := sum(row["key"] != budget[target][row["label"]].get("key") for row in rows):
        warnings.warn(f"{target}: {changed} kernels are not as recorded", stacklevel=1)


BOTH = """
import json, re, sys
from bench.machine_code import aot

same, aot.SAME_PTX = dict(aot.SAME_PTX), {}
found = {}
for target in {*same, *same.values()}:
    for kernel in aot.shipped(target, only=sys.argv[1]):
        code = re.split(r"\\.file|\\.section", kernel.kernel.asm["ptx"])[0]
        code = re.sub(r"//.*|\\.loc.*|\\.target \\w+", "", code)
        found.setdefault(target, {})[kernel.label] = code
for target, other in same.items():
    differ = [label for label in found[other] if found[target][label] != found[other][label]]
    print(json.dumps([target, len(found[target]), len(found[other]), differ]))
"""


@pytest.mark.slow
def test_targets_that_are_compiled_once_have_the_same_code():
    """That of the pinned Triton; the assembler alone tells them apart: see SAME_PTX of aot.py."""
    only = (
        "^(attention_forward|key_value_gradient|projection) bfloat16 (D=64 causal|transposed)=True$"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BOTH, only]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [json.loads(line) for line in run.stdout.splitlines()] == [["sm_89", 3, 3, []]]


BAD_CONFIGS = [  # target, BLOCK_M, BLOCK_N, stages, what is wrong with them
    ("sm_80", 128, 128, 1, "spills"),
    ("sm_90", 64, 64, 2, "serialised WGMMA"),
    ("sm_80", 64, 64, 1, "no asynchronous copies"),
    ("sm_86", 128, 64, 8, "shared memory"),
]


def test_the_inspection_finds_planted_bad_configs(tmp_path):
    """Also where what is as recorded is not compiled."""
    lines = []
    for target, block_m, block_n, num_stages, _ in BAD_CONFIGS:
        plan = {"block_m": block_m, "block_n": block_n, "num_warps": 4, "num_stages": num_stages}
        config = ["--config", "attention_forward", json.dumps(plan)]
        kernel = ["--kernel", "attention_forward bfloat16 D=64 causal=True", *config]
        lines.append(["--target", target, "--changed", *kernel])
    for (*config, expected), (row,) in zip(BAD_CONFIGS, compiled(tmp_path, *lines), strict=True):
        assert any(expected in fault for fault in faults(row)), config


@pytest.mark.slow
def test_a_kernel_is_compiled_again_once_its_code_has_changed(tmp_path, monkeypatch):
    """And not when a comment has, or its lines, or the order of Python's sets."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    tree = tmp_path / "tree"
    for name in ("ra_triton", "bench"):
        shutil.copytree(ROOT / name, tree / name)
    budget = tree / "bench" / "machine_code" / "static_budget.json"
    budget.unlink()
    which = ["--target", "sm_80", "--kernel", "^pack bfloat16 D=", "--changed"]
    (before,) = compiled(tmp_path, which, root=tree)
    static_budget.write(before, budget)
    file = tree / "ra_triton" / "kernels" / "lanes" / "packing.py"
    source = file.read_text()
    assert source.count("(row < n_rows)") == 1
    moved = source.replace("\n\n", "\n\n\n").replace("    tl.store", "    # all\n    tl.store")
    changed = source.replace("(row < n_rows)", "(row <= n_rows)")
    for text, again in ((source, False), (moved, False), (changed, True)):
        file.write_text(text)
        monkeypatch.setenv("PYTHONHASHSEED", str(len(text)))
        (rows,) = compiled(tmp_path, which, root=tree)
        checked = [again or row["key"].startswith(static_budget.SPOT_CHECK) for row in rows]
        assert [row["compiled"] for row in rows] == checked
        assert len(rows) == len(before) == 6
        assert again != ([row["key"] for row in rows] == [row["key"] for row in before])


def key(ir="add", assembler="13.0", options="4 warps", target="sm_90"):
    """Of a kernel that Triton's front end has turned into ``ir``."""
    module = SimpleNamespace(str_nodebug=lambda: ir)
    return row_key(target, code_key(module, *(hashed(h) for h in (assembler, options))))


def hashed(text):
    return SimpleNamespace(hash=lambda: text)


def test_the_key_is_of_all_that_decides_the_machine_code(monkeypatch):
    assert key() == key()
    others = [{"ir": "mul"}, {"assembler": "13.1"}, {"options": "8 warps"}, {"target": "sm_80"}]
    keys = {key(), *(key(**other) for other in others)}
    with monkeypatch.context() as patch:
        patch.setenv("DISABLE_LLVM_OPT", "1")
        keys.add(key())
    with monkeypatch.context() as patch:
        patch.setattr("triton.runtime.cache.triton_key", lambda: "another Triton")
        keys.add(key())
    assert len(keys) == 7


@pytest.mark.parametrize("module", [inspection, sass, pipes])
def test_the_key_is_of_all_that_reads_the_machine_code(module, monkeypatch, tmp_path):
    def with_source(text):
        file = tmp_path / "module.py"
        file.write_text(text)
        monkeypatch.setattr(module, "__file__", str(file))
        inspection._reader.cache_clear()
        return key()

    before, source = key(), Path(module.__file__).read_text()
    try:
        assert with_source("# a comment\n" + source) == before
        assert with_source(source + "\nMORE = 1\n") != before
    finally:
        inspection._reader.cache_clear()


def test_the_key_is_of_the_disassembler(monkeypatch):
    before = key()
    monkeypatch.setattr(inspection, "knobs", SimpleNamespace(nvidia=SimpleNamespace()))
    inspection.knobs.nvidia.nvdisasm = SimpleNamespace(version="0.0")
    inspection._reader.cache_clear()
    try:
        assert key() != before
    finally:
        inspection._reader.cache_clear()


ROW = {
    "target": "sm_90",
    "label": "attention_forward bfloat16 D=64",
    "key": "1234",
    "registers": 187,
    "shared_memory": 49152,
    "ctas_per_sm": 2,
    "spilled_bytes": 0,
    "serialised_wgmma": False,
    "overwritten_operands": 0,
    "async_copies": 2,
    "sync_loads": 0,
    "instructions": 500,
    "matrix_instructions": 16,
    "wgmma": 16,
    "bulk_copies": 2,
}
NEW = {"key": "5678"}  # of code that has changed


@pytest.fixture
def budget(tmp_path):
    static_budget.write([ROW], tmp_path / "budget.json")
    return static_budget.read(tmp_path / "budget.json")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"instructions": 520}, r"520 instructions in the hot loop, were 500 \(\+4.0%"),
        ({"spilled_bytes": 8}, "spills 8 bytes, was 0"),
        ({"serialised_wgmma": True}, "serialises WGMMA"),
        ({"overwritten_operands": 1}, "1 writes over operands of products in flight"),
        ({"async_copies": 1}, "1 asynchronous copies in the hot loop, were 2"),
        ({"sync_loads": 2}, "2 synchronous loads in the hot loop, were 0"),
        ({"ctas_per_sm": 1}, "1 CTAs fit on an SM, were 2"),
    ],
)
def test_each_planted_regression_is_named(budget, change, expected):
    (found,) = static_budget.violations([ROW | change | NEW], budget)
    assert found.startswith("sm_90 attention_forward bfloat16 D=64: ")
    assert re.search(expected, found), found


@pytest.mark.parametrize("field", [name for name in ROW if name not in ("target", "label", "key")])
def test_a_line_that_is_not_what_its_code_has_is_named(budget, field):
    """Whether it is better or worse: such a line has not been recorded."""
    budget["sm_90"][ROW["label"]][field] = ROW[field] + 1
    found = static_budget.violations([ROW], budget)
    said = f"{ROW[field]} {field}, recorded of the same code: {ROW[field] + 1}"
    assert f"sm_90 {ROW['label']}: {said}" in found
    assert not any("recorded" in line for line in static_budget.violations([ROW | NEW], budget))


def test_what_is_known_has_the_numbers_of_its_line(budget):
    """But one in sixteen counts as unknown, as does a line without a key."""
    numbers = {name: value for name, value in ROW.items() if name not in ("target", "label")}
    assert static_budget.known("sm_90", budget) == {"1234": numbers}
    assert static_budget.known("sm_80", budget) == {}
    kernel = Compiled("sm_90", "attention_forward", "1234", None, ROW["label"])
    row = static._row(static_budget.known("sm_90", budget), kernel)
    assert row == ROW | {"stage": "attention_forward", "compiled": False}
    for first in ("0123", ""):
        budget["sm_90"][ROW["label"]]["key"] = first
        assert static_budget.known("sm_90", budget) == {}
    del budget["sm_90"][ROW["label"]]["key"]
    assert static_budget.known("sm_90", budget) == {}


@pytest.mark.parametrize(
    "change", [{}, {"instructions": 515}, {"registers": 190}, {"async_copies": 4}]
)
def test_what_is_within_the_budget_passes(budget, change):
    assert static_budget.violations([ROW | change | NEW], budget) == []


def test_kernels_and_lines_have_to_match(budget):
    (new, gone) = static_budget.violations([ROW | {"label": "pack float32"}], budget)
    assert new == "sm_90 pack float32: has no line in the budget"
    assert gone == "sm_90 attention_forward bfloat16 D=64: in the budget, but not compiled"
    assert static_budget.violations([], budget) == []
    assert static_budget.violations([ROW], budget, complete=False) == []


@pytest.mark.parametrize(
    ("spilled", "serialised", "overwritten", "expected"),
    [
        (0, False, 0, None),
        (8, False, 0, "sm_90 pack bfloat16: spills 8 bytes"),
        (0, True, 0, "sm_90 pack bfloat16: the assembler serialises WGMMA (C751x)"),
        (0, False, 3, "sm_90 pack bfloat16: 3 writes over operands of products in flight"),
    ],
)
def test_spills_alone_are_looked_for_whatever_the_budget(
    monkeypatch, capsys, spilled, serialised, overwritten, expected
):
    kernel = SimpleNamespace(target="sm_90", label="pack bfloat16")
    kernel.spilled_bytes, kernel.serialised_wgmma = spilled, serialised
    kernel.overwritten_operands = overwritten
    monkeypatch.setattr(static, "shipped", lambda target, **kwargs: [kernel])
    assert static.main(["--target", "sm_90", "--spills-only"]) == (expected is not None)
    found = capsys.readouterr().out.splitlines()
    assert found[:-1] == ([expected] if expected else [])
    assert found[-1].endswith(f"{len(found) - 1} of 1 kernels at fault")


def test_under_another_triton_only_spills_and_serialisation_count(budget):
    budget["triton"] = "0.0"
    worse = ROW | {"instructions": 1000, "async_copies": 0}
    assert static_budget.violations([worse, ROW | {"label": "new"}], budget) == []
    found = static_budget.violations(
        [worse | {"spilled_bytes": 4, "serialised_wgmma": True}], budget
    )
    assert len(found) == 2


def test_the_budget_keeps_other_targets_of_the_same_triton(tmp_path):
    path = tmp_path / "budget.json"
    static_budget.write([ROW], path)
    static_budget.write([ROW | {"target": "sm_80"}], path)
    kept = static_budget.read(path)
    assert set(kept) == {"triton", "sm_80", "sm_90"}
    path.write_text(json.dumps(kept | {"triton": "0.0"}))
    with pytest.raises(ValueError, match="record all targets at once, sm_80 too"):
        static_budget.write([ROW], path)


def test_a_copy_that_turned_synchronous_shows_in_the_counts():
    loop = Program(AMPERE.replace("LDGSTS.E.BYPASS.128 [R4]", "LDG.E.128 R4")).hot_loop()
    assert (loop.count("LDGSTS"), loop.count("LDG")) == (0, 1)


@pytest.mark.parametrize(
    ("products", "copies", "tiles"),
    [(2, 2, 1), (4, 4, 2), (4, 2, 1), (2, 4, 1)],
    ids=["plain", "unrolled", "computed twice", "copied twice"],
)
def test_tiles_of_an_iteration(products, copies, tiles):
    product = "/*0010*/ HGMMA.64x64x16.F32.BF16 R56, gdesc[UR8], R56 ;\n"
    copy = "/*0020*/ UTMALDG.4D [UR24], [UR30] ;\n"
    text = f".L_x_0:\n{product * products}{copy * copies}/*0030*/ @P0 BRA `(.L_x_0) ;\n"
    loop = Program(text).hot_loop()
    flops = 2 * (2 * 64 * 64 * 16)
    assert inspection.tiles_per_iteration(loop, 4, flops, 2048, 2) == tiles


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--target", "sm_70"], "invalid choice: 'sm_70'"),
        (["--stage", "softmax"], "invalid choice: 'softmax'"),
        (["--kernel", "("], "no regular expression"),
        (["--config", "softmax", "{}"], "the config table has no stage 'softmax'"),
        (["--config", "projection", '{"block": 1}'], "block"),
        (["--update-budget", "--stage", "pack"], "records all kernels"),
        (["--json", "nowhere/rows.json"], "no such folder: nowhere"),
        (["--spills-only", "--check"], "--spills-only goes without"),
        (["--spills-only", "--changed"], "--spills-only goes without"),
    ],
)
def test_wrong_arguments_are_told(arguments, expected, capsys):
    with pytest.raises(SystemExit):
        static.main(arguments)
    assert expected in capsys.readouterr().err
