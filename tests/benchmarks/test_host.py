import json
from functools import partial

import pytest
import torch
from budget import assert_bitwise

from bench import host
from bench.harness.providers import PROVIDERS, Layer, Provider
from bench.harness.shapes import SHAPES, Shape
from bench.harness.timing import Entrant, Quantiles
from bench.models.attentions import PlainAttention, Stack
from bench.models.gpt import GPTConfig

FAST = ["--device", "cpu", "--seconds", "0", "--shape", "tiny"]


@pytest.fixture(autouse=True)
def one_thread():
    """Small operations on a shared machine: threads would wait for each other's time slices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", B=2, T=24, H=3, D=8))


def test_every_kind_of_call_is_timed(tmp_path, capsys):
    file = tmp_path / "host.json"
    assert host.main([*FAST, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["benchmark"] == "host"
    rows = document["rows"]
    assert [(row["kind"], row["provider"]) for row in rows] == [
        (kind, name) for kind in host.KINDS for name in host.CPU_PROVIDERS
    ]
    for row in rows:
        assert 0 < row["us_p20"] <= row["us"] <= row["us_p80"]
        assert row["bursts"] >= host.MIN_BURSTS
    plain = [row for row in rows if row["plain"]]
    assert [row["extra_us"] for row in plain] == [0.0] * 3
    assert "us more" in capsys.readouterr().out


def test_kinds_differ_in_what_they_record(monkeypatch):
    seen = []

    def make(problem):
        layer = PROVIDERS["plain-sdpa"].make(problem)

        def forward():
            out = layer.forward()
            seen.append(out.requires_grad)
            return out

        return Layer(forward, layer.inputs, layer.linear)

    monkeypatch.setitem(PROVIDERS, "spy", Provider(make))
    backward = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: backward.append(1) or grad(*a))
    counts = {}
    for kind in host.KINDS:
        seen.clear(), backward.clear()
        args = host._parser().parse_args([*FAST, "--providers", "spy"])
        args.dtype = "fp32"
        (row,) = host.measure_kind(SHAPES["tiny"], kind, args)
        assert row.status == "ok"
        assert set(seen) == {kind != "forward"}
        counts[kind] = len(seen), len(backward)
    calls = (host.MIN_BURSTS + 1) * host.CALLS
    assert counts["forward"] == (calls + 1, 0)
    assert counts["recorded"][1] < 5  # the gate's alone
    assert counts["train"][1] >= calls


def test_a_burst_stops_the_clock_before_the_gpu_is_done():
    order = []
    entrant = Entrant("a", lambda: order.append("call"), lambda: torch.no_grad())
    host._burst(entrant, lambda: order.append("wait"))
    assert order == ["wait", *["call"] * host.CALLS, "wait"]


def test_a_wrong_provider_gets_no_number(monkeypatch, capsys):
    def make(problem):
        layer = PROVIDERS["plain-sdpa"].make(problem)
        return Layer(lambda: layer.forward() * 1.01, layer.inputs, layer.linear)

    monkeypatch.setitem(PROVIDERS, "planted", Provider(make))
    assert host.main([*FAST, "--providers", "planted", "plain-sdpa"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("failed the gate") == 3
    assert "planted, train: failed the gate" in captured.err


def test_a_provider_without_a_gpu_is_an_error_at_once(monkeypatch, capsys):
    monkeypatch.setattr(host, "measure_kind", None)
    with pytest.raises(SystemExit) as stop:
        host.main([*FAST, "--providers", "plain-sdpa", "ra-triton"])
    assert stop.value.code == 2
    assert "--providers ra-triton: the Triton kernels are verified" in capsys.readouterr().err


@pytest.fixture
def short_stack(monkeypatch):
    monkeypatch.setattr(host, "STACK", Shape("layers", B=1, T=16, H=2, D=16))
    monkeypatch.setattr(host, "DEPTH", 2)
    quick = partial(torch.compile, backend="aot_eager")  # Inductor takes seconds
    monkeypatch.setitem(host.COMPILERS, ", compiled", quick)


LAYERS = ["--device", "cpu", "--seconds", "0", "--shape", "layers"]


@pytest.mark.slow
def test_layers_are_timed_compiled_or_not_in_both_precisions(short_stack, tmp_path):
    file = tmp_path / "host.json"
    assert host.main([*LAYERS, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    expected = [
        (kind + suffix, precision, name)
        for suffix in ("", ", compiled")
        for precision in ("bf16", "bf16 autocast")
        for kind in ("forward", "train")
        for name in ("plain", "free", "composed")
    ]
    assert [(row["kind"], row["dtype"], row["provider"]) for row in rows] == expected
    for row in rows:
        assert (row["shape"], row["status"]) == ("layers", "ok"), row
        assert 0 < row["us_p20"] <= row["us"] <= row["us_p80"]
        assert (row["extra_us"] == 0) == (row["provider"] == "plain")


@pytest.mark.slow
def test_layers_see_the_precision_that_their_row_names(short_stack, monkeypatch):
    seen = {}

    class Spy(PlainAttention):
        def forward(self, x):
            on_autocast = torch.is_autocast_enabled("cpu")
            seen.setdefault(on_autocast, set()).update((x.dtype, self.c_attn.weight.dtype))
            return super().forward(x)

    monkeypatch.setitem(host.ATTENTIONS, "free", lambda config, R: Spy(config))
    monkeypatch.delitem(host.COMPILERS, ", compiled")
    assert host.main(LAYERS) == 0
    assert seen == {False: {torch.bfloat16}, True: {torch.float32}}


def test_times_of_layers_are_of_one_layer():
    row = host.HostRow("layers", 1, 16, 32, 2, 16, 4, "bf16", "plain", True, "train", "ok", "")
    host._fill([row], {"plain": Quantiles(24.0, 12.0, 36.0, 20)}, layers=12)
    assert (row.us, row.us_p20, row.us_p80, row.bursts) == (2.0, 1.0, 3.0, 20)


def test_a_wrong_layer_gets_no_number(short_stack, monkeypatch, capsys):
    class Wrong(PlainAttention):
        def forward(self, x):
            return 1.1 * super().forward(x)

    monkeypatch.setitem(host.ATTENTIONS, "free", lambda config, R: Wrong(config))
    monkeypatch.delitem(host.COMPILERS, ", compiled")
    assert host.main(LAYERS) == 1
    assert capsys.readouterr().err.count("failed the gate: out: ") == 4


@pytest.mark.parametrize("option", [["--providers", "plain-sdpa"], ["--dtype", "fp32"]])
def test_options_that_layers_does_not_read_are_errors(option, capsys):
    with pytest.raises(SystemExit):
        host.main([*LAYERS, *option])
    assert f"{option[0]}: the shape layers has its own" in capsys.readouterr().err


def test_a_training_step_of_layers_leaves_fresh_gradients(short_stack):
    """As in a training loop: nothing is added to the gradients of the step before."""
    stack = Stack(host.ATTENTIONS["plain"], GPTConfig(16, 1, 2, 2, 32, bias=False), 4)
    x, dout = torch.randn(2, 1, 16, 32).unbind(0)
    x.requires_grad_()
    seen = []
    for _ in range(2):
        host._training_step(stack, stack, x, dout)
        seen.append([x.grad.clone(), *(p.grad.clone() for p in stack.parameters())])
    for first, second in zip(*seen, strict=True):
        assert_bitwise(second, first)


@pytest.mark.gpu
def test_layers_are_timed_on_a_gpu():
    assert host.main(["--device", "cuda", "--seconds", "0", "--shape", "layers"]) == 0
