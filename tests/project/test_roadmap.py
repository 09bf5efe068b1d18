"""The prototype's list: every figure is the record's, every rung and public name exists."""

import json
import re
from pathlib import Path

import pytest

import ra_triton
from bench.harness.rungs import RUNGS

RESULTS = Path(__file__).parents[2] / "bench" / "results"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (RESULTS / "roadmap.md").read_text().splitlines()
    if re.match(r"\| \d", line)
]


def test_all_items_have_a_row():
    assert [row[0] for row in ROWS] == ["1", "2", "3", "4", "5", "6", "7a", "7b", "8"]
    assert all(len(row) == 6 and all(row) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_times_are_the_records(row):
    ladder = json.loads((RESULTS / "nvidia-h200.json").read_text())["ladder"]
    for part in row[4].split(";"):
        clock = "ms" if re.search(r"\beager\b", part) else "graph_ms"
        phase = "train" if "training" in part else "forward"
        for rung, ms in re.findall(r"`([\w-]+)` (\d\.\d{3})", part):
            (found,) = (r for r in ladder if (r["provider"], r["phase"]) == (rung, phase))
            assert f"{found[clock]:.3f}" == ms, (rung, phase, clock)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_rungs_and_names_exist(row):
    rungs = re.findall(r"`([a-z]+\d?-[\w-]+|v2)`", row[4])
    assert set(rungs) <= set(RUNGS)
    names = re.findall(r"`([a-z_]+)`", row[2])
    assert set(names) <= set(ra_triton.__all__)


def test_accuracy_of_sparse_weights_is_its_pages():
    changes = {
        row["which"]: row["loss_change"]
        for row in json.loads((RESULTS / "sparsity-cpu.json").read_text())["rows"]
    }
    (row,) = (row for row in ROWS if row[0] == "7b")
    for change in changes.values():
        assert f"{change:+.4f} nats" in row[3] or f"{change:+.4f} for all" in row[3]
