import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import ladder
from bench.harness import rungs
from bench.harness.gate import admit, answer
from bench.harness.rungs import RUNGS, Factors, routed_heads
from bench.harness.shapes import SHAPES, Shape, flops
from ref import reciprocal_attention as ref

TINY = Shape("tiny", B=2, T=24, H=3, D=16)
FAST = ["--device", "cpu", "--seconds", "0", "--shape", "tiny"]
CPU = torch.device("cpu")
HERE = [name for name, rung in RUNGS.items() if rung.unavailable("cpu") is None]


@pytest.fixture(autouse=True)
def one_thread():
    """Small operations on a shared machine: threads would wait for each other's time slices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def right(rung, dtype, phase, shape=TINY):
    """The status and note of a rung that is computed here, wherever it is timed."""
    factors = Factors.draw(shape, CPU)
    inputs = rung.inputs(factors, dtype, phase == "train")
    dout = factors.dout.to(dtype) if phase == "train" else None
    gate = ladder._gate(rung.source, shape, inputs, dout)
    with torch.set_grad_enabled(phase == "train"):
        make = partial(rung.layer, shape, inputs)
        return admit("rung", make, gate, dout, rung.context)[1:]


def test_a_run_writes_every_rung_in_both_phases(tmp_path, capsys):
    file = tmp_path / "ladder.json"
    assert ladder.main([*FAST, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["seed"]["gpu"] == "A10G"
    rows = document["rows"]
    assert [row["provider"] for row in rows] == [*RUNGS] * 2
    for row in rows:
        if row["provider"] not in HERE:
            assert row["status"] == "skipped"
            assert "GPU" in row["note"]
        elif row["phase"] == "train" and RUNGS[row["provider"]].forward_only:
            assert row["status"] == "skipped"
            assert "forward only" in row["note"]
        else:
            assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
            work = flops(TINY, "layer", row["phase"])
            assert row["tflops"] == pytest.approx(work / row["ms"] / 1e9)
        if row["status"] == "skipped":
            assert row["ms"] is None
    baseline = [row["ratio"] for row in rows if row["provider"] == "baseline"]
    assert baseline == [1.0, 1.0]
    out = capsys.readouterr().out
    forward, train = out.split("causal forward + backward")
    assert "prototype, A10G" in forward
    assert "2.00 ms, 1.66x" in forward
    assert "1.66x" not in train  # the prototype timed the forward only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("phase", ["forward", "train"])
@pytest.mark.parametrize("name", HERE)
def test_rungs_are_right_in_every_dtype(name, phase, dtype):
    rung = RUNGS[name]
    if phase == "train" and rung.forward_only:
        pytest.skip("forward only")
    assert right(rung, dtype, phase) == ("ok", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need Triton's interpreter")
@pytest.mark.parametrize("phase", ["forward", "train"])
def test_the_triton_rung_is_right_in_the_interpreter(phase):
    assert right(RUNGS["packed-triton"], torch.float32, phase) == ("ok", "")


INT8 = {name: rung for name, rung in RUNGS.items() if name.startswith("int8-")}


@pytest.mark.parametrize("name", INT8)
def test_the_int8_rungs_are_right(name):
    rung = INT8[name]
    assert rung.unavailable("cpu")
    assert "no gradient" in rung.forward_only
    if not torch.cuda.is_available():  # in the interpreter
        assert right(rung, torch.float32, "forward") == ("ok", "")
    R, *way, _ = rung.make.args
    plain = replace(rung, make=partial(rungs._int8, R, *way, "sdpa"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert right(plain, dtype, "forward") == ("ok", "")


@pytest.mark.parametrize("name", INT8)
def test_the_gate_of_an_int8_rung_knows_what_was_rounded(name):
    """The dense weight, which is right on its own, is wrong as any of them."""
    dense = replace(INT8[name], make=partial(rungs._packed, 4, "sdpa"))
    status, note = right(dense, torch.float32, "forward")
    assert status == "failed the gate"
    assert note.startswith("out: ")


@pytest.mark.parametrize("phase", ["forward", "train"])
def test_the_compiled_rungs_are_right(phase, monkeypatch):
    compiled = partial(torch.compile, backend="aot_eager", dynamic=False)
    monkeypatch.setattr(rungs, "compile_static", compiled)
    assert right(RUNGS["baseline-compiled"], torch.float32, phase) == ("ok", "")
    ours = partial(rungs._compiled, partial(rungs._packed, 4, "sdpa"))
    rung = replace(RUNGS["packed-triton-compiled"], make=ours)
    assert right(rung, torch.float32, phase) == ("ok", "")


def test_the_answer_to_v2_is_the_definition():
    factors = Factors.draw(TINY, CPU)
    rung = RUNGS["v2"]
    inputs = rung.inputs(factors, torch.float64, True)
    found = answer(rung.source.exact(TINY), inputs, factors.dout, torch.float64)
    x, W_q, W_k, W_v, W_recip, W_out = inputs
    weights = (W_q.mT, W_k.mT, W_v.mT, W_recip)
    expected = ref.reciprocal_attention(x, *weights, n_head=TINY.H) @ W_out.mT
    grads = torch.autograd.grad(expected, inputs, factors.dout.double())
    torch.testing.assert_close(found, (expected, *grads))


def test_routing_leaves_the_other_heads_plain():
    shape = replace(TINY, H=4)
    factors = Factors.draw(shape, CPU)
    factors = replace(factors, W_out=torch.eye(shape.C))

    def heads(name):
        rung = RUNGS[name]
        inputs = rung.inputs(factors, torch.float64, False)
        out = rung.source.exact(shape)(*inputs)
        return out.unflatten(-1, (shape.H, shape.D))

    half, everywhere, plain = (heads(name) for name in ("v2-routed-50", "v2", "baseline"))
    chosen = routed_heads(4, 0.5)
    assert chosen == [0, 2]
    torch.testing.assert_close(half[:, :, chosen], everywhere[:, :, chosen])
    torch.testing.assert_close(half[:, :, [1, 3]], plain[:, :, [1, 3]])
    assert not torch.allclose(plain[:, :, chosen], everywhere[:, :, chosen])


@pytest.mark.parametrize(
    ("H", "share", "expected"),
    [(12, 1.0, list(range(12))), (12, 0.25, [0, 4, 8]), (3, 0.25, [0]), (1, 0.25, [0])],
)
def test_routed_heads_are_spread(H, share, expected):
    assert routed_heads(H, share) == expected


def test_v3_uses_its_buffers_again():
    factors = Factors.draw(TINY, CPU)
    rung = RUNGS["v3-R4"]
    inputs = rung.inputs(factors, torch.float32, False)
    layer = rung.layer(TINY, inputs)
    with torch.no_grad():
        first = layer.forward()
        inputs[0].neg_()
        second = layer.forward()
        inputs[0].neg_()
        torch.testing.assert_close(layer.forward(), first)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("phase", ["forward", "train"])
def test_a_wrong_rung_gets_no_number(phase, monkeypatch, capsys):
    def make(*sizes):
        layer = rungs._v2(*sizes)
        return lambda x, W_q, W_k, *rest: layer(x, W_k, W_q, *rest)  # the roles swapped

    monkeypatch.setitem(RUNGS, "v2", replace(RUNGS["v2"], make=make))
    assert ladder.main([*FAST, "--rungs", "baseline", "v2", "--pass", phase]) == 1
    captured = capsys.readouterr()
    line = next(line for line in captured.out.splitlines() if line.startswith("v2"))
    assert "failed the gate" in line
    assert f"v2, {phase}: failed the gate" in captured.err


def test_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "ladder.png"
    assert ladder.main([*FAST, "--rungs", "baseline", "v3-R4", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("phases", [["train"], ["forward", "train"]])
def test_a_rung_that_cannot_run_at_all_is_an_error_at_once(phases, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "run_phase", lambda *args: [])
    monkeypatch.setattr(ladder, "table", lambda rows: "")
    forward_only = next(name for name in HERE if RUNGS[name].forward_only)
    for name, reason in (
        (next(name for name in RUNGS if name not in HERE), "GPU"),
        (forward_only, "forward only"),
    ):
        arguments = [*FAST, "--pass", *phases, "--rungs", "baseline", name]
        if name == forward_only and "forward" in phases:
            assert ladder.main(arguments) == 0
            continue
        with pytest.raises(SystemExit) as stop:
            ladder.main(arguments)
        assert stop.value.code == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"--rungs {name}: " in error
        assert reason in error


def test_a_head_too_small_for_rank_8_is_an_error(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", replace(TINY, D=4))
    with pytest.raises(SystemExit):
        ladder.main(FAST)
    assert "needs a head dim of 8" in capsys.readouterr().err
