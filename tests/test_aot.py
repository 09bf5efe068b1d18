"""Every kernel in every shipped configuration, compiled for four architectures, without a GPU."""

import json
import os
import subprocess
import sys

import pytest

TARGETS = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227}  # KiB that one CTA may use

WITH_PRODUCTS = {
    "attention_forward",
    "key_value_gradient",
    "query_gradient",
    "projection",
    "weight_gradient",
}
WITHOUT_PRODUCTS = {"pack", "delta", "column_sum", "add_splits"}


def compiled(*arguments: str) -> list[dict]:
    """Rows of ``python -m bench.aot``, in a process where kernels are not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot", *arguments]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def faults(row: dict, limit: int) -> list[str]:
    """What is wrong with one compiled kernel."""
    found = []
    if row["spilled_bytes"]:
        found.append(f"spills {row['spilled_bytes']} bytes")
    if row["serialised_wgmma"]:
        found.append("serialised WGMMA (C751x)")
    if row["shared_memory"] > limit:
        found.append(f"needs {row['shared_memory']} bytes of shared memory, has {limit}")
    if row["stage"] not in WITH_PRODUCTS:
        return found
    aligned = "misaligned" not in row["label"]
    half = "float16" in row["label"]  # float16 and bfloat16
    hopper = half and aligned and row["target"] == "sm_90"
    if (half or "tf32" in row["label"]) and not (row["wgmma"] or (row["mma"] and not hopper)):
        found.append("no matrix instruction")
    if aligned and not row["bulk_copies" if hopper else "async_copies"]:
        found.append("no asynchronous loads")
    return found
    half = "float16" in row["label"]  # float16 and bfloat16
    hopper = half and row["target"] == "sm_90"
    if (half or "tf32" in row["label"]) and not (row["wgmma"] or (row["mma"] and not hopper)):
        found.append("no matrix instruction")
    if "misaligned" not in row["label"] and not row["bulk_copies" if hopper else "async_copies"]:
        found.append("no asynchronous loads")
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_shipped_kernels_compile_without_spills_and_with_asynchronous_loads(target):
    rows = compiled(target)
    bad = {
        row["label"]: faults(row, TARGETS[target] * 1024)
        for row in rows
        if faults(row, TARGETS[target] * 1024)
    }
    assert not bad
    assert {row["stage"] for row in rows} == WITH_PRODUCTS | WITHOUT_PRODUCTS


@pytest.mark.parametrize(
    ("target", "block_m", "block_n", "num_stages", "expected"),
    [
        ("sm_80", 128, 128, 1, "spills"),
        ("sm_90", 64, 64, 2, "serialised WGMMA"),
        ("sm_80", 64, 64, 1, "no asynchronous loads"),
        ("sm_86", 128, 64, 5, "shared memory"),
    ],
)
def test_the_inspection_finds_a_planted_bad_config(target, block_m, block_n, num_stages, expected):
    plan = {"block_m": block_m, "block_n": block_n, "num_warps": 4, "num_stages": num_stages}
    (row,) = compiled(target, "--attention", json.dumps(plan))
    assert any(expected in fault for fault in faults(row, 64 * 1024))
