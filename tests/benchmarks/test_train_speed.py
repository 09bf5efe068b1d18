"""Training speed: equal starts, a gate that notices wrong attention, turns, rows, early errors."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from budget import assert_bitwise

from bench import record, train_speed
from bench.harness.report import environment, write_json
from bench.models import attentions, trainees
from bench.models.attentions import ATTENTIONS, PLAIN, REFERENCES
from bench.models.data import load_text
from bench.models.trainees import Answer, Setting, Size, Trainee
from bench.train_speed import TrainRow

ROOT = Path(__file__).parents[2]
SMALL = Size("small", B=2, T=48, layers=2, H=2, C=32, vocab=256)
FAST = ["--device", "cpu", "--seconds", "0", "--layers", "1", "--width", "32", "--length", "32"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
    """Dynamo and AOTAutograd as ever, but their graphs run as they are: Inductor takes seconds."""
    quick = partial(torch.compile, backend="aot_eager")
    monkeypatch.setitem(trainees.MODES, "compile", quick)


@pytest.fixture(scope="module")
def text():
    return load_text(min_bytes=100, max_bytes=200_000)


@pytest.fixture
def setting(text):
    return Setting.of(SMALL, 4, torch.device("cpu"), text)


def run(*options):
    """Exit status and rows."""
    parser = train_speed._parser()
    args = train_speed._parse(parser, [*FAST, *options])
    sizes = train_speed._sizes(parser, args)
    found = train_speed.measure(sizes, args, torch.device("cpu"))
    return [row for rows in found for row in rows]


# Equal starts


def test_all_attentions_start_as_the_same_function(setting):
    tokens, _ = setting.batches[0]
    plain = setting.model(ATTENTIONS[PLAIN])
    exact = setting.model(ATTENTIONS[PLAIN]).double()(tokens)
    error = (plain(tokens) - exact).norm()
    for make in (*ATTENTIONS.values(), *REFERENCES.values()):
        gpt = setting.model(make)
        for block, expected in zip(gpt.transformer["h"], plain.transformer["h"], strict=True):
            assert_bitwise(block.attn.c_attn.weight, expected.attn.c_attn.weight)
        assert (gpt(tokens) - exact).norm() <= 4 * error  # the same numbers in another order


def first_steps(setting, make, tokens=None, autocast=True):
    """Losses, and errors of the first gradient against those of plain PyTorch."""
    errors = {}
    look = setting.answer(name_of(make)).look(errors)
    trainee = Trainee(setting.model(make), autocast=autocast)
    return list(trainee.losses(setting.batches[: trainees.GATE_STEPS], look, tokens)), errors


def name_of(make):
    return "composed" if make in (ATTENTIONS["composed"], REFERENCES["composed"]) else PLAIN


def test_pieces_of_a_batch_take_the_same_step_as_the_whole(setting):
    answer = setting.answer(PLAIN)
    losses, errors = first_steps(setting, ATTENTIONS[PLAIN], SMALL.T, autocast=False)
    assert 0 < trainees.distance(losses, answer.losses) < answer.allowed / 10
    assert 0 < answer.gradient_share(errors)[0] < 1 / 10  # float32's rounding, not bf16's


# The gate


class Scaled(torch.autograd.Function):
    """A tensor as it is, its gradient times a factor."""

    @staticmethod
    def forward(ctx, t, factor):
        ctx.factor = factor
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def no_mask(attend, q, k, v):
    return attend(q, k, v)


def scaled(attend, q, k, v):
    return attend(q * 1.25, k, v, is_causal=True)


def lost_low_lanes(attend, q, k, v):
    return attend(q, F.pad(k[..., :-4], (0, 4)), v, is_causal=True)


def a_head_is_another(attend, q, k, v):
    return attend(q, k, v.flip(1), is_causal=True)


def no_dk(attend, q, k, v):
    return attend(q, Scaled.apply(k, 0.0), v, is_causal=True)


def negated_dq(attend, q, k, v):
    return attend(Scaled.apply(q, -1.0), k, v, is_causal=True)


def half_dv(attend, q, k, v):
    return attend(q, k, Scaled.apply(v, 0.5), is_causal=True)


FAULTS = (no_mask, scaled, lost_low_lanes, a_head_is_another, no_dk, negated_dq, half_dv)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("attention", ["plain", "composed"])
def test_the_gate_fails_on_wrong_attention_and_on_wrong_gradients(
    attention, fault, setting, monkeypatch
):
    answer, make = setting.answer(attention), REFERENCES[attention]
    assert answer.failure(*first_steps(setting, make)) is None
    plain = F.scaled_dot_product_attention
    wrong = lambda q, k, v, is_causal: fault(plain, q, k, v)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    losses, errors = first_steps(setting, make)
    assert trainees.distance(losses, answer.losses) > answer.allowed  # by the losses alone
    assert answer.gradient_share(errors)[0] > 1  # and by the gradients alone
    assert "loss curve: RMS error" in answer.failure(losses, errors)


@pytest.mark.parametrize("factor", ["W_q", "W_k", "W_v", "W_recip", "w_std", "w_rec"])
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_the_gate_fails_on_a_wrong_gradient_of_a_factor(factor, share, setting):
    make = ATTENTIONS["composed"]

    def planted(config, R):
        attention = make(config, R)
        getattr(attention.c_attn, factor).register_hook(lambda grad: share * grad)
        return attention

    answer = setting.answer("composed")
    errors = {}
    list(Trainee(setting.model(planted)).losses(setting.batches[:1], answer.look(errors)))
    failure = answer.failure(answer.losses, errors)  # though no loss shows it
    assert f"gradient of attn.c_attn.{factor}: RMS error" in failure


def test_the_scale_is_what_rounding_does_to_plain_attention(setting):
    answer = setting.answer(PLAIN)
    assert len(answer.rounded) == 2  # the kernels of a CPU
    distances = [trainees.distance(losses, answer.losses) for losses in answer.rounded]
    assert answer.allowed == 2 * max(distances) > 0
    assert answer is setting.answer("free")  # the same parameters, so the same answer
    assert answer is not setting.answer("composed")
    pools = {trainees._pool(name) for name in answer.gradients}
    assert set(answer.errors) == pools
    assert {"attn.c_attn.weight", "wte.weight", "ln_f.weight"} <= pools


def test_the_largest_error_of_all_kernels_is_the_scale_of_a_gradient():
    gradients = {"transformer.h.0.a": torch.zeros(4), "transformer.h.1.a": torch.ones(4)}
    answer = Answer([2.0], gradients)
    answer.add_rounded([2.1], {"a": 0.5})
    answer.add_rounded([2.1], {"a": 0.25})
    assert answer.errors == {"a": 0.5}
    assert answer.gradient_share({"a": 1.0}) == (0.5, "a")
    tiny = Answer([2.0], gradients)
    tiny.add_rounded([2.1], {"a": 0.0})
    assert tiny.errors["a"] > 0  # bf16's own rounding


def test_what_is_no_number_fails():
    answer = Answer([3.0, 2.0], {"a": torch.ones(2), "b": torch.ones(2)})
    answer.add_rounded([3.0, 2.1], {"a": 0.1, "b": 0.1})
    right = {"a": 0.1, "b": 0.4}
    assert answer.failure([3.0, 2.1], right) is None
    assert "nan" in answer.failure([3.0, float("nan")], right)
    assert "gradient of a" in answer.failure([3.0, 2.1], {"a": float("nan"), "b": 0.9})
    assert "gradient of b" in answer.failure([3.0, 2.1], {"a": 0.1, "b": 0.9})


# Rows


@pytest.mark.slow
def test_every_attention_has_a_row_in_each_mode(tmp_path, capsys):
    file = tmp_path / "train.json"
    assert train_speed.main([*FAST, "--mode", "eager", "compile", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["benchmark"] == "train-speed"
    rows = document["rows"]
    expected = [(mode, name) for mode in ("eager", "compile") for name in ATTENTIONS]
    assert [(row["mode"], row["attention"]) for row in rows] == expected
    for row in rows:
        assert row["status"] == "ok", row
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["samples"] == train_speed.MIN_ROUNDS * train_speed.TURN_STEPS
        assert row["tokens_per_s"] == row["B"] * row["T"] / row["ms"] * 1e3
        assert row["first_s"] > 0
        assert row["loss_error"] <= row["loss_allowed"]
        assert row["gradient_share"] <= 1
        assert row["last_loss"] < row["first_loss"]
        assert row["graphs"] == (1 if row["mode"] == "compile" else None)
        assert row["graph_breaks"] == (0 if row["mode"] == "compile" else None)
    for mode in ("eager", "compile"):
        plain, *others = (row for row in rows if row["mode"] == mode)
        assert plain["plain"]
        assert [row["ratio"] for row in others] == [row["ms"] / plain["ms"] for row in others]
    output = capsys.readouterr().out
    title = next(line for line in output.splitlines() if line.startswith("shape"))
    assert title.split("  ")[0] == "shape"
    for column in (
        "vs plain",
        "tokens/s",
        "GB",
        "first s",
        "graphs",
        "breaks",
        "loss error",
        "gradient",
    ):
        assert column in title


@pytest.mark.slow
def test_a_wrong_model_gets_no_time_and_the_others_do(monkeypatch, capsys):
    class Wrong(attentions.PlainAttention):
        def forward(self, x):
            return super().forward(x) * 1.5

    monkeypatch.setitem(ATTENTIONS, "free", lambda config, R: Wrong(config))
    assert train_speed.main(FAST) == 1
    captured = capsys.readouterr()
    assert "free, tiny, eager: failed the gate: loss curve" in captured.err
    rows = run()
    by_name = {row.attention: row for row in rows}
    assert by_name["free"].status == "failed the gate"
    assert by_name["free"].ms is by_name["free"].ratio is None
    assert by_name["free"].loss_error > by_name["free"].loss_allowed
    assert by_name[PLAIN].ratio == 1.0
    assert by_name["composed"].ratio is not None


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (torch.OutOfMemoryError("no"), "skipped", "out of memory"),
        (RuntimeError("it broke\nbadly"), "error", "RuntimeError: it broke"),
    ],
)
@pytest.mark.slow
@pytest.mark.parametrize("calls", [0, 15])
def test_a_model_that_breaks_takes_no_other_with_it(calls, error, status, note, monkeypatch):
    """While it is built, or while it is timed."""

    class Broken(attentions.PlainAttention):
        left = calls

        def forward(self, x):
            Broken.left -= 1
            if Broken.left < 0:
                raise error
            return super().forward(x)

    monkeypatch.setitem(ATTENTIONS, "free", lambda config, R: Broken(config))
    plain, free, composed = run()
    assert (free.status, free.note, free.ms) == (status, note, None)
    assert plain.ratio == 1.0
    assert composed.ratio is not None


def test_graph_breaks_are_counted(monkeypatch):
    class Breaking(attentions.PlainAttention):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    monkeypatch.setitem(ATTENTIONS, "free", lambda config, R: Breaking(config))
    plain, free = run("--mode", "compile", "--attention", "plain", "free")
    assert (plain.graphs, plain.graph_breaks) == (1, 0)
    assert free.graph_breaks > 0
    assert free.graphs > 1


def test_models_take_turns(setting, monkeypatch):
    order = []
    monkeypatch.setattr(train_speed, "_turn", lambda name, batches: order.append(name) or [1.0])
    rows = [TrainRow.of(SMALL, 4, "eager", name) for name in "abc"]
    samples = train_speed._time(rows, {name: name for name in "abc"}, setting, 0.0)
    assert "".join(order) == "abcbcacababcbca"
    assert samples == {name: [1.0] * 5 for name in "abc"}


def test_the_first_step_of_a_turn_is_not_timed(setting):
    class Steps:
        device_type, taken = "cpu", 0

        def step(self, batch):
            self.taken += 1

    steps = Steps()
    assert len(train_speed._turn(steps, setting.batches)) == train_speed.TURN_STEPS
    assert steps.taken == train_speed.TURN_STEPS + 1


def test_what_does_not_fit_in_the_limit_says_so(monkeypatch):
    monkeypatch.setattr(train_speed, "measure_case", lambda *_: pytest.fail("it ran"))
    rows = run("--limit", "0")
    assert {row.status for row in rows} == {"skipped"}
    assert {row.note for row in rows} == {"no time left of --limit 0"}


def test_sizes_of_nanogpt_are_the_default_on_a_gpu():
    sizes = [train_speed.SIZES[name] for name in train_speed.DEFAULT_SIZES["cuda"]]
    assert [(s.B, s.T, s.D) for s in sizes] == [
        (12, 1024, 64),
        (64, 1024, 64),
        (8, 4096, 64),
        (8, 4096, 128),
    ]
    for size in sizes:
        assert (size.layers, size.C, size.vocab) == (12, 768, 50304)
        config = size.config
        assert (config.bias, config.dropout, config.block_size) == (False, 0.0, size.T)


def test_the_page_shows_every_row(tmp_path):
    size = replace(train_speed.SIZES["b12"], layers=3)
    rows = [TrainRow.of(size, 4, "compile", name) for name in ATTENTIONS]
    for row, ms in zip(rows, (2.0, 3.0), strict=False):
        row.fill(train_speed.Quantiles(ms, ms, ms, 5))
        row.ratio = ms / 2
        row.loss_error, row.loss_allowed, row.graph_breaks = 1e-4, 2e-4, 0
    rows[2].status, rows[2].note = "failed the gate", "loss curve: RMS error"
    write_json(tmp_path / "train.json", "train-speed", environment(torch.device("cpu")), rows)
    page = record.markdown(record.Record.of([tmp_path / "train.json"]))
    assert "| compile | 12 | 1024 | 12 of 64 | free | 3 (3..3) | 1.500 | 4096000 |" in page
    assert "failed the gate: loss curve: RMS error" in page
    assert "3 layers of width 768" in page
    assert record._training([]) == ""


# The command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "reduce-overhead"], "--mode reduce-overhead: CUDA graphs need a GPU"),
        (["--width", "32", "--heads", "3"], "--width 32 is not a multiple of --heads 3"),
        (["--R", "33"], "R = 33 exceeds the head dim 32 of tiny"),
        (["--vocab", "100"], "--vocab 100: the text is bytes, so at least 256"),
        (["--json", "/no/such/folder/x.json"], "--json: no such folder"),
        (["--attention", "other"], "invalid choice: 'other'"),
        (["--seconds", "-1"], "expected a number >= 0"),
    ],
)
def test_mistakes_are_errors_before_anything_runs(options, message, monkeypatch, capsys):
    monkeypatch.setattr(train_speed, "measure", None)
    with pytest.raises(SystemExit) as stop:
        train_speed.main(["--device", "cpu", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_interrupt_leaves_what_is_done(tmp_path, monkeypatch, capsys):
    def measure_case(rows, setting, seconds):
        if rows[0].mode == "compile":
            raise KeyboardInterrupt

    monkeypatch.setattr(train_speed, "measure_case", measure_case)
    file = tmp_path / "train.json"
    assert train_speed.main([*FAST, "--mode", "eager", "compile", "--json", str(file)]) == 1
    assert "stopped" in capsys.readouterr().err
    assert {row["mode"] for row in json.loads(file.read_text())["rows"]} == {"eager"}


def test_the_script_runs_by_its_path(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "train_speed.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "--attention" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("mode", list(trainees.MODES))
def test_it_times_a_small_model_on_a_gpu(mode, text, monkeypatch):
    monkeypatch.undo()  # Inductor itself
    size = Size("small", B=2, T=256, layers=2, H=2, C=128, vocab=256)
    setting = Setting.of(size, 4, torch.device("cuda"), text)
    rows = [TrainRow.of(size, 4, mode, name) for name in ATTENTIONS]
    train_speed.measure_case(rows, setting, 0.0)
    for row in rows:
        assert (row.status, row.note) == ("ok", ""), row
        assert row.ms > 0
        assert row.peak_gb > 0
        if mode != "eager":
            assert (row.graphs, row.graph_breaks) == (1, 0)
