import csv
import json
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ra_triton
from bench import sweep
from bench.harness import providers, timing
from bench.harness.gate import Gate, reference
from bench.harness.providers import PROVIDERS, Layer, Provider, make_problem
from bench.harness.report import Row, add_ratios, environment, summary, table
from bench.harness.shapes import SHAPES, Case, Shape, default_cases, flops
from bench.harness.timing import Quantiles, Timing
from ref import reciprocal_attention as ref

ROOT = Path(__file__).parents[2]
TINY = Shape("tiny", B=2, T=24, H=3, D=8)
FAST = ["--device", "cpu", "--seconds", "0"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def plant(monkeypatch, spoil, name="planted"):
    """Register a provider whose output ``spoil`` changes."""

    def make(problem):
        right = PROVIDERS["plain-sdpa"].make(problem)
        return Layer(lambda: spoil(right.forward().clone()), right.inputs, right.linear)

    monkeypatch.setitem(PROVIDERS, name, Provider(make))


class WrongGradient(torch.autograd.Function):
    """The identity, whose gradient ``spoil`` changes."""

    @staticmethod
    def forward(ctx, t, spoil):
        ctx.spoil = spoil
        return t.view_as(t)

    @staticmethod
    def backward(ctx, dt):
        return ctx.spoil(dt.clone()), None


def problem(stage="op", dtype=torch.float32, R=4, shape=TINY, phase="forward"):
    return make_problem(shape, R, stage, dtype, CPU, phase)


def test_script_prints_a_table_from_any_directory(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "sweep.py"), *FAST]
    command += ["--shape", "cpu", "--T", "64", "--R", "0", "4", "--csv", "rows.csv"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "vs plain" in run.stdout
    assert run.stdout.count("ra-sdpa ") == 2
    assert run.stdout.count("timed only on a GPU") == 1
    assert torch.__version__ in run.stdout
    assert "gate" not in run.stderr  # no progress bar where nobody looks
    assert run.stdout.endswith("`make gpu` times the Triton kernels, on a machine with a GPU.\n")
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["R"] for row in rows] == ["0", "0", "4", "4"]
    assert {row["torch"] for row in rows} == {torch.__version__}


def test_json_holds_versions_and_every_row(tmp_path):
    file = tmp_path / "sweep.json"
    assert sweep.main([*FAST, "--shape", "tiny", "--R", "0", "8", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    needed = {"device", "driver", "threads", "torch", "triton", "ptxas", "python", "commit"}
    assert needed <= set(document["environment"])
    assert len(document["rows"]) == 4
    for row in document["rows"]:
        assert set(row) == set(Row.__dataclass_fields__)
        assert row["status"] == "ok"
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["tflops"] == pytest.approx(flops(TINY) / row["ms"] / 1e9)
        assert row["graph_ms"] is None
        assert row["host_us"] is None


@pytest.mark.parametrize("stage", ["op", "attention"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stages_and_dtypes_run(stage, dtype, capsys):
    args = [*FAST, "--shape", "tiny", "--R", "2", "--stage", stage, "--dtype", dtype]
    assert sweep.main(args) == 0
    assert f"stage {stage}, causal forward, {dtype}" in capsys.readouterr().out
    assert sweep.main([*args, "--pass", "train"]) == 0
    assert f"stage {stage}, causal forward + backward, {dtype}" in capsys.readouterr().out


def test_training_rows_say_so_and_count_the_backward(tmp_path):
    file = tmp_path / "train.json"
    assert sweep.main([*FAST, "--shape", "tiny", "--pass", "train", "--json", str(file)]) == 0
    for row in json.loads(file.read_text())["rows"]:
        assert row["phase"] == "train"
        assert row["tflops"] == pytest.approx(flops(TINY, "op", "train") / row["ms"] / 1e9)


def test_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "sweep.png"
    assert sweep.main([*FAST, "--shape", "tiny", "--T", "8", "24", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_list_names_shapes_and_reasons(capsys):
    assert sweep.main(["--device", "cpu", "--list"]) == 0
    out = capsys.readouterr().out
    for name in (*SHAPES, *PROVIDERS):
        assert name in out
    assert "needs a CUDA device" in out


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--shape", "gpt5"], "choose from gpt2, "),
        (["--providers", "fast"], "choose from ra-triton, "),
        (["--dtype", "fp8"], "choose from fp16, bf16, fp32"),
        (["--R", "-1"], "expected an integer >= 0"),
        (["--T", "0"], "expected an integer >= 1"),
        (["--T", "1e3"], "expected an integer >= 1"),
        (["--R", "65", "--shape", "gpt2"], "exceeds the head dim 64 of gpt2"),
        (["--D", "100", "--shape", "gpt2"], "choose D from"),
        (["--json", "/no/such/folder/x.json"], "no such folder"),
        (["--csv", "/dev"], "--csv: cannot write to /dev"),
        (["--plot", "x.foo"], "--plot: x.foo must end in one of .avif, "),
        (["--plot", "x"], "--plot: x must end in one of .avif, "),
        (["--providers", "plain-sdpa", "plain-cudnn"], "--providers plain-cudnn: needs a CUDA"),
        (["--providers", "ra-triton"], "--providers ra-triton: the Triton kernels are verified"),
        (
            ["--providers", "plain-seed", "--stage", "attention"],
            "--providers plain-seed: has no stage attention of its own",
        ),
        (["--seconds", "-1"], "expected a number >= 0"),
        (["--seconds", "nan"], "expected a number >= 0"),
    ],
)
def test_bad_options_say_what_is_available(option, expected, capsys, monkeypatch):
    if "must end in" in expected:
        pytest.importorskip("matplotlib")  # which knows the endings
    monkeypatch.setattr(sweep, "make_problem", None)  # nothing has begun
    with pytest.raises(SystemExit) as stop:
        sweep.main([*FAST, *option])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error.replace("'", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_an_absent_gpu_is_an_error(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--device", "cuda"])
    assert "sees no CUDA device" in capsys.readouterr().err


def one_wrong_row(out):
    out[1, 17, 8:16] = 0
    return out


def unwritten_element(out):
    out[0, 0, 0] = float("nan")
    return out


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out * 1.01,
        lambda out: out.roll(1, dims=1),
        lambda out: out.flip(0),
        lambda out: out[:, :-1],
        one_wrong_row,
        unwritten_element,
    ],
    ids=["scaled", "late", "batch", "short", "row", "nan"],
)
def test_a_wrong_provider_gets_no_number(spoil, monkeypatch, capsys, tmp_path):
    plant(monkeypatch, spoil)
    file = tmp_path / "sweep.json"
    args = [*FAST, "--shape", "tiny", "--providers", "planted", "plain-sdpa", "--json", str(file)]
    assert sweep.main(args) == 1
    captured = capsys.readouterr()
    line = next(line for line in captured.out.splitlines() if "planted" in line)
    assert "failed the gate" in line
    assert "failed the gate" in captured.err
    bad, good = json.loads(file.read_text())["rows"]
    assert bad["status"] == "failed the gate"
    assert [bad[name] for name in ("ms", "ratio", "tflops", "graph_ms")] == [None] * 4
    assert good["ms"] > 0


def test_a_provider_that_raises_is_reported(monkeypatch, capsys):
    def explode(out):
        raise RuntimeError("illegal memory access")

    plant(monkeypatch, explode)
    assert sweep.main([*FAST, "--shape", "tiny", "--providers", "planted"]) == 1
    assert "error: RuntimeError: illegal memory access" in capsys.readouterr().out


def test_an_interrupt_keeps_what_is_timed(monkeypatch, capsys, tmp_path):
    timed = []

    def measure(entrants, *args):
        timed.append(entrants)
        if len(timed) == 2:
            raise KeyboardInterrupt
        return timing.measure(entrants, *args)

    monkeypatch.setattr(sweep, "measure", measure)
    file = tmp_path / "sweep.json"
    args = [*FAST, "--shape", "tiny", "--R", "0", "2", "4", "--json", str(file)]
    assert sweep.main(args) == 1
    assert {row["R"] for row in json.loads(file.read_text())["rows"]} == {0}
    assert "stopped" in capsys.readouterr().err


def test_without_plain_attention_there_is_no_ratio(capsys):
    assert sweep.main([*FAST, "--shape", "tiny", "--providers", "ra-sdpa"]) == 0
    out = capsys.readouterr().out
    ra_sdpa = next(line for line in out.splitlines() if "ra-sdpa" in line)
    assert " - " in ra_sdpa
    assert "of the time of the fastest plain" not in out


def test_a_kernel_that_sdpa_lacks_is_skipped_with_its_reason(monkeypatch, capsys):
    """Which shapes and dtypes a kernel of PyTorch's takes shows only when it is called."""

    def refuse(out):
        raise RuntimeError("No available kernel. Aborting execution.")

    plant(monkeypatch, refuse)
    assert sweep.main([*FAST, "--shape", "tiny", "--providers", "planted", "plain-sdpa"]) == 0
    assert "skipped: no such SDPA kernel for this dtype, shape and GPU" in capsys.readouterr().out


def test_the_seed_baseline_is_a_layer_and_has_no_attention_stage():
    assert "plain-seed" in providers.available("cuda", "op")
    assert "plain-seed" not in providers.available("cuda", "attention")


def test_a_copy_without_git_names_its_commit(monkeypatch):
    monkeypatch.setenv("RA_TRITON_COMMIT", "0123abc")
    assert environment(CPU)["commit"] == "0123abc"


@pytest.mark.parametrize("stage", ["op", "attention"])
@pytest.mark.parametrize("R", [0, 3, 8])
def test_the_gate_measures_against_the_definition(stage, R, monkeypatch):
    p = problem(stage, torch.float64, R, phase="train")
    whole = reference(p, torch.float64)
    five_queries = 5 * 2 * 3 * 24
    monkeypatch.setattr("bench.harness.gate.SCORES_PER_CHUNK", five_queries)
    torch.testing.assert_close(reference(p, torch.float64), whole)
    out, *grads = whole
    if stage == "attention":
        inputs = p.qkv
        expected, _ = ref.packed_attention(*inputs)
    else:
        inputs = (p.x, p.W_split.requires_grad_())
        expected = ref.reciprocal_attention_fused(*inputs, R, n_head=TINY.H)
        grads[1] = ra_triton.unpack_weight(grads[1], R, n_head=TINY.H)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(tuple(grads), torch.autograd.grad(expected, inputs, p.dout))


@pytest.mark.parametrize("phase", ["forward", "train"])
def test_the_gate_passes_the_reference_itself_in_each_dtype(phase):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        p = problem(dtype=dtype, phase=phase)
        found = reference(p, dtype)
        assert len(found) == (3 if phase == "train" else 1)
        assert Gate.of(p).failure(found) is None


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_gate_looks_at_every_gradient(wrong):
    for stage, names in (("op", ("out", "dx", "dW")), ("attention", ("out", "dq", "dk"))):
        p = problem(stage, phase="train")
        found = list(reference(p, torch.float32))
        found[wrong] = found[wrong] * 1.01
        assert Gate.of(p).failure(found).startswith(f"{names[wrong]}: RMS error")
    assert Gate.of(p).failure(found[:-1]) == "3 outputs, expected 4"


def test_a_provider_with_a_wrong_gradient_gets_no_number(monkeypatch, capsys):
    def make(problem):
        def forward():
            q, k, v = (t.transpose(1, 2) for t in problem.qkv)
            k = WrongGradient.apply(k, lambda dk: dk.roll(1, dims=2))
            return providers.causal_sdpa(q, k, v).transpose(1, 2)

        return Layer(forward, problem.qkv)

    monkeypatch.setitem(PROVIDERS, "planted", Provider(make))
    args = [*FAST, "--shape", "tiny", "--stage", "attention", "--providers", "planted"]
    assert sweep.main(args) == 0  # its forward is right
    assert sweep.main([*args, "--pass", "train"]) == 1
    assert "failed the gate: dk: RMS error" in capsys.readouterr().out


def test_one_token_passes_the_gate():
    assert sweep.main([*FAST, "--shape", "tiny", "--T", "1", "--dtype", "bf16"]) == 0


def test_all_providers_of_a_problem_read_the_same_numbers():
    p = problem(R=3)
    assert torch.equal(ra_triton.unpack_weight(p.W_packed, 3, n_head=TINY.H), p.W_split)
    plain = PROVIDERS["plain-sdpa"].make(p).forward()
    torch.testing.assert_close(PROVIDERS["ra-sdpa"].make(p).forward(), plain)
    torch.testing.assert_close(PROVIDERS["plain-seed"].make(p).forward(), plain)
    q, k, v = p.qkv
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    out = providers.causal_sdpa(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out.flatten(2), plain)


def test_flops_counts_what_a_hand_count_does():
    B, T, H, D = 2, 5, 3, 8
    shape = Shape("hand", B, T, H, D)
    scores_and_values = B * H * T * T * (2 * D + 2 * D)
    assert flops(shape, "attention") == scores_and_values // 2
    assert flops(shape) == scores_and_values // 2 + B * T * 2 * (H * D) * (3 * H * D)
    gpt2 = SHAPES["gpt2"]
    assert (gpt2.B, gpt2.T, gpt2.H, gpt2.D, gpt2.C) == (8, 1024, 12, 64, 768)
    attention, projection = flops(shape, "attention"), flops(shape) - flops(shape, "attention")
    assert flops(shape, "op", "train") == 3.5 * attention + 3 * projection
    assert flops(shape, "layer") == flops(shape) + B * T * 2 * (H * D) ** 2


def test_sizes_keep_width_and_tokens():
    long = SHAPES["gpt2"].with_tokens(4096)
    assert (long.B, long.T) == (2, 4096)
    assert SHAPES["gpt2"].with_tokens(16384).B == 1  # never none
    wide = SHAPES["gpt2"].with_head_dim(128)
    assert (wide.H, wide.D, wide.C) == (6, 128, 768)


@pytest.mark.parametrize("quick", [False, True])
def test_default_gpu_run_covers_ranks_lengths_and_head_dims(quick):
    cases = default_cases(True, quick, ["ra-triton"], ["ra-flex"])
    assert {0, 4} <= {case.R for case in cases if case.shape.name == "gpt2"}
    wide = [case.shape for case in cases if case.shape.name != "gpt2"]
    assert {shape.D for shape in wide} == {64, 128}
    assert {shape.B * shape.T for shape in wide} == {16384}
    compiled = [case for case in cases if "ra-flex" in case.providers]
    assert len(compiled) == (0 if quick else 5)


class FakeEvent:
    """A CUDA event on a device that finishes each call before the next line."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class FakeCUDA:
    """``torch.cuda`` as far as the clocks use it: captured calls run again on replay."""

    Event = FakeEvent

    def __init__(self, captures):
        self.captures = captures
        self.recording = None

    def CUDAGraph(self):
        calls = []
        return SimpleNamespace(calls=calls, replay=lambda: [call() for call in calls])

    def current_stream(self):
        return "the default one"

    default_stream = current_stream

    @contextmanager
    def graph(self, graph, stream):
        assert stream is None  # a new one: nobody captures the default one
        self.recording = graph.calls
        yield
        self.recording = None

    def launch(self, kernel):
        """Run a kernel now; under capture, or on a stream that is not captured, only record."""
        if self.recording is None:
            kernel()
        elif self.captures:
            self.recording.append(kernel)

    def synchronize(self):
        pass

    def reset_peak_memory_stats(self):
        pass

    def memory_allocated(self):
        return 0

    def max_memory_allocated(self):
        return 3_000_000


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("captures", [True, False])
def test_cuda_clocks_check_what_a_graph_replays(captures, outputs, monkeypatch):
    cuda = FakeCUDA(captures)
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    monkeypatch.setattr(timing, "_flush_buffer", lambda: torch.zeros(1))
    buffers = torch.zeros(4), torch.zeros(3)

    def call():
        cuda.launch(lambda: (time.sleep(2e-4), [t.fill_(1.0) for t in buffers]))
        return buffers if outputs == 2 else buffers[0]

    entrants = [timing.Entrant(name, call, nullcontext) for name in ("a", "b")]
    times = timing.measure(entrants, 0.02, on_gpu=True)
    assert list(times) == ["a", "b"]
    for t in times.values():
        assert t.eager.median >= 0.2
        assert t.eager.n >= 4 * timing.MIN_ROUNDS
        assert t.peak_mb == 3.0
        assert t.host_us >= 200
        if captures:
            assert t.graph.median >= 0.2
            assert t.note == ""
        else:  # an empty graph would be infinitely fast
            assert t.graph is None
            assert "does not reproduce" in t.note


def test_entrants_take_turns():
    calls = []
    entrants = [timing.Entrant(n, lambda n=n: calls.append(n), nullcontext) for n in "abc"]
    timing.measure(entrants, 0.0, on_gpu=False)
    rounds = "".join(calls)[-3 * timing.MIN_ROUNDS :]
    assert rounds.startswith("abcbcacab")


def gpu_rows():
    case = Case(TINY, 4, ("ra-triton", "plain-flash"))
    rows = [
        Row.of(case, "op", "forward", "bf16", name, "plain" in name, "ok", "")
        for name in case.providers
    ]
    for row, ms in zip(rows, (0.3, 0.2), strict=True):
        row.fill(Timing(Quantiles(ms, ms, ms, 9), Quantiles(ms / 2, ms, ms, 9), 12.0, 3.0), case)
    add_ratios(rows)
    return rows


def test_rows_show_losses_and_take_flops_from_the_graph():
    ours, plain = gpu_rows()
    assert ours.ratio == pytest.approx(1.5)
    assert ours.graph_ratio == pytest.approx(1.5)
    assert plain.ratio == 1.0
    assert ours.tflops == pytest.approx(flops(TINY) / 0.15e-3 / 1e12)


def test_summary_shows_losses():
    eager, graph = summary(gpu_rows()).splitlines()
    assert eager.startswith("ra-triton, eager: 1.500 to 1.500")
    assert graph.startswith("ra-triton, graph: 1.500 to 1.500")


def test_gpu_columns_line_up():
    lines = table(gpu_rows()).splitlines()
    assert "graph ms" in lines[0]
    assert len({len(line) for line in lines}) == 1


def test_quantiles():
    q = Quantiles.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (q.median, q.n) == (3.5, 6)
    assert (q.p20, q.p80) == (2.0, 5.0)
