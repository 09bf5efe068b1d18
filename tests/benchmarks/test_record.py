import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench import gpu, record
from bench.harness.report import Row, write_json
from bench.harness.shapes import Case, Shape
from bench.harness.timing import Quantiles, Timing
from bench.host import HostRow
from bench.peers import PeerRow
from bench.record import Record

ROOT = Path(__file__).parents[2]
SHAPE = Shape("tiny", B=2, T=24, H=3, D=16)
MACHINE = {
    "device": "Imaginary GPU 9000",
    "driver": "1.2",
    "threads": 2,
    "torch": "2.13.0",
    "triton": "3.7.1",
    "ptxas": "12.8",
    "python": "3.11",
    "commit": "0123abc",
}


def row(name, status="ok", note="", ms=0.3, stage="op", phase="forward", plain=False):
    case = Case(SHAPE, 4, ())
    made = Row.of(case, stage, phase, "bf16", name, plain, status, note)
    if status == "ok":
        eager, graph = Quantiles(ms, ms * 0.9, ms * 1.2, 9), Quantiles(ms / 2, ms / 3, ms, 9)
        made.fill(Timing(eager, graph, 12.0, 3.0), case)
        made.ratio, made.graph_ratio = ms / 0.2, ms / 0.4
    return made


def host_row():
    sizes = ("call", 1, 8, 64, 1, 64, 4)
    numbers = (40.0, 39.0, 44.0, 20, 12.5)
    return HostRow(*sizes, "bf16", "ra-triton", False, "train", "ok", "", *numbers)


def peer_row(name, phase):
    sizes = ("64-1k", 16, 1024, 32, 32, 64, True, None)
    return PeerRow(*sizes, "bf16", phase, name, "ok", "", 0.2, 0.19, 0.21, 650.0, 0.9, 330.0)


@pytest.fixture
def files(tmp_path):
    """One file of each benchmark."""
    folder = tmp_path / "parts"
    folder.mkdir()
    sweep = [row("ra-triton"), row("plain-flash", ms=0.2, plain=True)]
    sweep.append(row("plain-cudnn", "skipped", "no such SDPA kernel", plain=True))
    seed = {"gpu": "A10G", "figures": {"v2": "2.00 ms"}}
    ladder = [row("v2", stage="layer", phase=phase) for phase in ("forward", "train")]
    write_json(folder / "sweep.json", "sweep", MACHINE, sweep)
    write_json(folder / "ladder.json", "ladder", MACHINE, ladder, seed=seed)
    write_json(folder / "host.json", "host", MACHINE, [host_row()])
    return sorted(folder.glob("*.json"))


def test_a_page_and_a_file_are_written(files, tmp_path, capsys):
    assert record.main([*map(str, files), "--out", str(tmp_path)]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(p).name for p in written] == ["imaginary-gpu-9000.json", "imaginary-gpu-9000.md"]
    page = (tmp_path / "imaginary-gpu-9000.md").read_text()
    for fact in ("driver 1.2", "torch 2.13.0", "triton 3.7.1", "ptxas 12.8", "commit 0123abc"):
        assert fact in page
    assert "| ra-triton | 0.3 (0.27..0.36) | 1.500 |" in page
    assert "skipped: no such SDPA kernel" in page
    forward, train = page.split("## Ladder: tiny, forward + backward")
    assert "2.00 ms" in forward
    assert "2.00 ms" not in train
    assert "the prototype's, on an A10G" in forward
    assert "40.0 (39.0..44.0) | +12.5" in train


def test_the_file_is_small_and_exact_to_four_digits(files, tmp_path):
    record.write(Record.of(files), tmp_path, plots=False)
    document = json.loads((tmp_path / "imaginary-gpu-9000.json").read_text())
    assert document["environment"] == MACHINE
    ours, plain, skipped = document["sweep"]
    assert ours["ms"] == 0.3
    assert ours["tflops"] == float(f"{row('ra-triton').tflops:.4g}")
    assert plain["ms_p80"] == 0.24
    assert "ms" not in skipped
    assert skipped["note"] == "no such SDPA kernel"
    assert document["host"][0]["extra_us"] == 12.5


def test_losses_come_first(files):
    page = record.markdown(Record.of(files))
    losses = page.split("## Where plain attention is faster")[1].split("##")[0]
    assert "| op | forward | tiny | 2 | 24 | 3 | 16 | 4 | ra-triton | 1.500 | 0.750 |" in losses
    assert "plain-flash" not in losses


def test_no_loss_means_no_such_section(files):
    found = Record.of(files)
    found.sweep = [replace(r, ratio=0.9, graph_ratio=0.8) for r in found.sweep]
    assert "Where plain attention is faster" not in record.markdown(found)


@pytest.mark.parametrize("name", record.MACHINE)
def test_files_of_different_runs_are_refused(name, files, tmp_path, capsys):
    other = tmp_path / "other.json"
    write_json(other, "sweep", {**MACHINE, name: "another"}, [row("ra-triton")])
    with pytest.raises(SystemExit):
        record.main([*map(str, files), str(other)])
    assert f"{name} is 'another'" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "Expecting property name"),
        (
            '{"benchmark": "tune", "rows": []}',
            f"not a file of {', '.join(record.BENCHMARKS)}",
        ),
        ('{"benchmark": "run", "parts": []}', "no file with figures"),
    ],
)
def test_other_files_are_refused(text, expected, tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(SystemExit):
        record.main([str(file)])
    assert expected in capsys.readouterr().err


def test_figures_recorded_before_there_were_phases_can_be_read():
    found = Record.of([ROOT / "bench" / "results" / "cpu.json"])
    assert {r.phase for r in found.sweep} == {"forward"}
    assert "ra-sdpa" in record.markdown(found)


def test_pictures_keep_phases_apart(files, tmp_path):
    pytest.importorskip("matplotlib")
    train = tmp_path / "train.json"
    write_json(train, "sweep", MACHINE, [row("ra-triton", phase="train")])
    peers = tmp_path / "peers.json"
    write_json(peers, "peers", MACHINE, [peer_row("ra", p) for p in ("forward", "both")])
    written = record.write(Record.of([*files, train, peers]), tmp_path, plots=True)
    pictures = [path.name for path in written if path.suffix == ".png"]
    assert pictures == [
        "imaginary-gpu-9000-op-forward-bf16.png",
        "imaginary-gpu-9000-op-train-bf16.png",
        "imaginary-gpu-9000-peers.png",
        "imaginary-gpu-9000-ladder.png",
    ]
    page = (tmp_path / "imaginary-gpu-9000.md").read_text()
    assert all(f"({name})" in page for name in pictures)


# The driver


def part(code, name="sweep-forward", limit=60.0):
    """A part that is a line of Python; its last argument is its file."""
    return gpu.Part(name, ("-c", f"import sys; file = sys.argv[-1]; {code}"), limit)


def leave_figures(name="sweep-forward"):
    document = {"benchmark": "sweep", "environment": MACHINE, "rows": [asdict(row("ra-triton"))]}
    return part(f"open(file, 'w').write({json.dumps(document)!r})", name)


def drive(monkeypatch, tmp_path, *wanted):
    monkeypatch.setattr(gpu, "parts", lambda *_: list(wanted))
    return gpu.main(["--device", "cpu", "--out", str(tmp_path), "--commit", "0123abc"])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    monkeypatch.setenv("RA_TRITON_COMMIT", "")  # what --commit sets does not outlive a test


def test_a_failing_part_does_not_take_the_others_with_it(monkeypatch, tmp_path, capfd):
    failing = part("sys.exit(3)", "host")
    assert drive(monkeypatch, tmp_path, failing, leave_figures()) == 1
    page = (tmp_path / "imaginary-gpu-9000.md").read_text()
    assert "| host | failed: exit status 3 |" in page
    assert "| sweep-forward | ok |" in page
    assert "no pictures: matplotlib is not installed" in capfd.readouterr().out


def test_all_parts_right_is_success(monkeypatch, tmp_path):
    assert drive(monkeypatch, tmp_path, leave_figures()) == 0


def test_nothing_left_is_told(monkeypatch, tmp_path, capfd):
    assert drive(monkeypatch, tmp_path, part("sys.exit(1)")) == 1
    assert "no page: no file with figures was given" in capfd.readouterr().err


def test_the_parts_know_the_commit(monkeypatch, tmp_path):
    code = "import os; sys.exit(os.environ['RA_TRITON_COMMIT'] != '0123abc')"
    assert drive(monkeypatch, tmp_path, part(code, "host"), leave_figures()) == 0


def test_a_part_beyond_its_limit_is_interrupted_and_may_write(tmp_path):
    code = """
import sys, time, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    open(sys.argv[-1], "w").write("kept")
"""
    slow = gpu.Part("host", ("-c", code), limit=2)
    outcome = gpu.run(slow, tmp_path, slow.limit)
    assert outcome.status == "stopped after its 2 s"
    assert (tmp_path / "host.json").read_text() == "kept"


def test_a_part_that_does_not_heed_the_interrupt_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1)
    deaf = part("import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)")
    outcome = gpu.run(deaf, tmp_path, 2)
    assert outcome.status == "stopped after its 2 s"
    assert outcome.seconds < 30


def test_what_does_not_fit_in_the_time_is_told(tmp_path):
    outcomes = gpu.run_all([leave_figures()], tmp_path, seconds=gpu.GRACE_SECONDS)
    assert [o.status for o in outcomes] == ["not run: no time left"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_is_a_command_that_its_script_understands(device, tmp_path):
    from bench import decode, host, ladder, peers, sweep, train_speed

    parsers = {"sweep": sweep._parser(), "ladder": ladder._parser(), "host": host._parser()}
    parsers |= {"decode": decode._parser(), "train_speed": train_speed._parser()}
    parsers["peers"] = peers._parser()
    for p in gpu.parts(device, 8):
        _, script, *options = p.full_command(tmp_path)
        if p.suffix == "json":
            parsers[Path(script).stem].parse_args(options)
            assert options[-2:] == ["--json", str(p.file(tmp_path))]
        else:
            assert options[0] == "pytest"


def test_pytest_counts_are_read(tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    file = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={file}", str(test)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=120)
    assert gpu._counts(file) == "2 tests, 1 failures, 0 errors, 0 skipped"
    assert gpu._counts(tmp_path / "none.xml") == "no report"
