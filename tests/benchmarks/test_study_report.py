"""The report: statistics against a second computation, pairs by seed, nothing mixed or hidden."""

import json
import math
from importlib.util import find_spec
from statistics import stdev

import pytest

from bench import train_ra_mla
from bench.study.results import T95, Interval, load_results

SETTINGS = {
    **{"n_layer": 1, "n_head": 2, "n_embd": 16, "block": 8, "vocab_size": 256, "steps": 20},
    **{"batch": 4, "lr": 0.1, "warmup": 2, "val_pieces": 4, "dropout": 0.0, "backend": "auto"},
    **{"compile": False, "log_every": 10},
}
ENVIRONMENT = {
    **{"device": "a machine", "driver": "none", "threads": 1, "torch": "2", "triton": "3"},
    **{"ptxas": "12", "python": "3.11", "commit": "abc"},
}


draws = pytest.mark.skipif(not find_spec("matplotlib"), reason="an optional extra")


def write_run(folder, arm, seed, losses, *, R=0, dtype="fp32", end=True, stop=None, **settings):
    """A log as the trainer writes it; losses at steps 0, 10, ..."""
    name = f"{arm}-R{R}-{dtype}-s{seed}"
    own = {"arm": arm, "R": R, "seed": seed, "dtype": dtype}
    lines = [
        {
            "kind": "run",
            "name": name,
            "settings": {**SETTINGS, **own, **settings},
            "parameters": 1000,
            "versus_baseline": 0.001,
            "corpus": "text",
            "fingerprint": "f",
            "train_tokens": 100,
            "val_tokens": 100,
            "processes": 1,
            "environment": ENVIRONMENT,
        }
    ]
    gated = {"ra-composed": {"h.0.attn.w_std": [1.0, 2.0]}, "output-gate": {"h.0.attn.gate": [0.5]}}
    for i, loss in enumerate(losses):
        seen = {
            "share": {"h.0.attn": [0.1, 0.2 + i]} if R else {},
            "gate": gated.get(arm, {}),
        }
        lines.append(
            {
                "kind": "eval",
                "step": 10 * i,
                "val_loss": loss,
                "bits_per_byte": loss / math.log(2),
                **seen,
            }
        )
        lines.append({"kind": "step", "step": 10 * i, "mfu": 0.5, "loss": loss})
    if stop:
        lines.append({"kind": "stop", "step": 3, "reason": stop})
    elif end:
        lines.append({"kind": "end", "step": 20, "step_ms": 10.0 + seed, "memory_mb": 100.0})
    (folder / name).mkdir(parents=True)
    (folder / name / "run.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    for seed, base in enumerate((2.0, 2.1, 2.2)):
        write_run(folder, "baseline", seed, [5, 3, base])
        write_run(folder, "ra", seed, [5, 3, base], R=4)
        write_run(folder, "ra-composed", seed, [5, 3, base - 0.1 - 0.001 * seed], R=4)
        write_run(folder, "ra-composed", seed, [5, 3, base + 0.5 * (-1) ** seed], R=8)
        write_run(folder, "baseline", seed, [5, 3, base + 0.01], dtype="bf16")
        write_run(folder, "mla", seed, [5, 3, base + 0.2 + 0.001 * seed])
    write_run(folder, "output-gate", 0, [5, 3, 1.9])
    write_run(folder, "output-gate", 1, [5], stop="step 3: not finite: loss (nan)")
    write_run(folder, "ra+mla", 0, [5, 3], R=4, end=False)
    return folder


def test_intervals_are_students():
    values = (1.0, 2.0, 4.0)
    interval = Interval.of(values)
    assert interval.mean == pytest.approx(7 / 3)
    assert interval.half == pytest.approx(4.303 * stdev(values) / 3**0.5)
    assert Interval.of([1.0]).half is None
    assert Interval.of(range(50)).half == pytest.approx(1.96 * stdev(range(50)) / 50**0.5)
    # With two degrees of freedom the quantile has a closed form.
    assert T95[1] == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), abs=5e-4)
    assert T95[0] == pytest.approx(math.tan(math.pi * 0.475), abs=5e-4)


def test_verdicts_follow_the_protocol():
    assert Interval.of([-1.0, -1.1, -0.9]).verdict() == "lower"
    assert Interval.of([1.0, 1.1, 0.9]).verdict() == "higher"
    assert Interval.of([1.0, -1.1, 0.9]).verdict() == "no difference shown"
    assert Interval.of([0.0, 0.0]).verdict() == "identical"
    assert Interval.of([-1.0]).verdict() == "one pair, no interval"


def test_differences_pair_seeds_of_one_dtype(runs):
    results = load_results([runs])
    assert results.dtype == "fp32"
    key, baseline = ("ra-composed R=4", "fp32"), ("baseline", "fp32")
    assert results.difference(key, baseline).values == pytest.approx((-0.1, -0.101, -0.102))
    assert results.difference(("baseline", "bf16"), baseline).values == pytest.approx((0.01,) * 3)
    assert len(results.difference(("output-gate", "fp32"), baseline).values) == 1


@draws
def test_the_page_says_what_the_runs_say(runs, tmp_path, capsys):
    page = tmp_path / "study.md"
    assert train_ra_mla.main(["report", str(runs), "--out", str(page), "--note", "Cut short."]) == 0
    text = page.read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    table = text.partition("## Rank")[0].splitlines()
    rows = {tuple(c.strip() for c in line.split("|")[1:3]): line for line in table}
    assert rows["baseline", "fp32"].count("2.1000 ± 0.2484") == 1
    assert "identical" in rows["ra R=4", "fp32"]
    assert "-0.1010 ± 0.0025" in rows["ra-composed R=4", "fp32"]
    assert "lower" in rows["ra-composed R=4", "fp32"]
    assert "no difference shown" in rows["ra-composed R=8", "fp32"]
    assert "higher" in rows["mla", "fp32"]
    assert "one pair, no interval" in rows["output-gate", "fp32"]
    assert "| ra-composed | fp32 | R=8 minus R=4 |" in text
    assert "| baseline | bf16 minus fp32 | +0.0100 ± 0.0000 |" in text
    assert "output-gate-R0-fp32-s1: stopped, step 3: not finite: loss (nan)" in text
    assert "ra+mla-R4-fp32-s0: not finished" in text
    assert "function class" in text
    assert "Cut short." in text
    assert "a machine, 1 thread(s); torch 2" in text
    assert "commit abc" in text
    assert "![curves](study.png)" in text
    assert page.with_suffix(".png").stat().st_size > 10_000
    data = json.loads(page.with_suffix(".json").read_text())
    assert len(data["runs"]) == 21
    composed = next(r for r in data["runs"] if r["name"] == "ra-composed-R4-fp32-s1")
    assert composed["val_loss"] == pytest.approx(1.999)
    assert composed["watched"]["share"] == pytest.approx([0.15, 0.65, 1.15])
    assert composed["watched"]["w_std"] == [1.5] * 3


@draws
def test_one_arm_alone_makes_a_page(tmp_path):
    write_run(tmp_path / "runs", "mla", 0, [5, 3])
    page = tmp_path / "page.md"
    assert train_ra_mla.main(["report", str(tmp_path / "runs"), "--out", str(page)]) == 0
    assert "## Rank" not in page.read_text()


@draws
@pytest.mark.parametrize(
    ("change", "message"),
    [({"lr": 0.2}, "differ in lr: 0.1, 0.2"), ({"steps": 30}, "differ in steps: 20, 30")],
)
def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, capsys, change, message):
    write_run(tmp_path / "more", "mla", 9, [5, 3, 2], **change)
    arguments = ["report", str(runs), str(tmp_path / "more"), "--out", str(tmp_path / "page.md")]
    with pytest.raises(SystemExit):
        train_ra_mla.main(arguments)
    assert message in capsys.readouterr().err


@draws
def test_missing_and_double_runs_are_told(runs, tmp_path, capsys):
    page = str(tmp_path / "page.md")
    for arguments, message in [
        ([str(tmp_path / "none"), "--out", page], "no run (run.jsonl) below"),
        ([str(runs), str(runs), "--out", page], "two runs are called"),
        ([str(runs / "ra+mla-R4-fp32-s0"), "--out", page], "no run has finished yet"),
        ([str(runs), "--out", str(tmp_path / "none" / "page.md")], "no such folder"),
        ([str(runs), "--out", str(tmp_path / "page.png")], "--out must be a .md file"),
    ]:
        with pytest.raises(SystemExit):
            train_ra_mla.main(["report", *arguments])
        assert message in capsys.readouterr().err
