"""The accuracy page of int8 weights: a run on tiny sizes, and what is committed."""

import json
from pathlib import Path

import pytest
import torch

from bench import quantize, sparsity

RESULTS = Path(__file__).parents[2] / "bench" / "results"
TINY = ["--steps", "2", "--batch", "2", "--block", "8", "--layers", "1", "--heads", "2"]
TINY += ["--width", "32", "--batches", "2"]


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    pytest.importorskip("tqdm")
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert quantize.main([*TINY, "--out", str(folder)]) == 0
    torch.set_num_threads(threads)
    document = json.loads((folder / "int8-cpu.json").read_text())
    assert quantize.markdown(document) == (folder / "int8-cpu.md").read_text()
    return document


def test_every_way_has_a_row_and_its_lanes_differ_as_it_says(document):
    rows = {row["way"]: row for row in document["rows"]}
    assert list(rows) == list(quantize.WAYS)
    for way, row in rows.items():
        low, others = ([row["lanes"][n] for n in names] for names in (LOW, OTHERS))
        if way.startswith("reciprocal"):
            assert min(low) > 100 * max(others)  # the others are float32
        else:
            assert min(low + others) > 1e-4
    for which in ("reciprocal", "all"):
        weights, both = (rows[f"{which}, {a}"] for a in ("weight-only", "W8A8"))
        assert both["lanes"]["q_low"] > weights["lanes"]["q_low"]
    # int8 and a float32 scale for each of 32 channels, over two bytes.
    assert rows["all, weight-only"]["bytes"] == pytest.approx((1 + 4 / 32) / 2)
    assert rows["weights in bfloat16"]["bytes"] == 1.0


LOW, OTHERS = ("q_low", "k_low"), ("q_std", "k_std", "v")


def test_the_committed_page_is_that_of_the_committed_figures():
    page, figures = RESULTS / "int8-cpu.md", RESULTS / "int8-cpu.json"
    assert quantize.markdown(json.loads(figures.read_text())) == page.read_text()


def test_a_missing_folder_is_told(capsys):
    with pytest.raises(SystemExit):
        quantize.main([*TINY, "--out", "nowhere"])
    assert "no such folder: nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bench", "options", "message"),
    [
        (quantize, ["--heads", "3"], "n_embd=32 must be a multiple of n_head=3"),
        (quantize, ["--R", "99"], "R must be between 0 and the head dim 16, got 99"),
        (sparsity, ["--width", "30"], "W_fused must be [C, N] with C a multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_told_in_one_line(bench, options, message, tmp_path, capsys):
    pytest.importorskip("tqdm")
    with pytest.raises(SystemExit):
        bench.main([*TINY, *options, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
