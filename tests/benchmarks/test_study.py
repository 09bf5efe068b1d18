"""The study's trainer: equal starts and data, exact resume, processes, NaN by name."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from budget import assert_bitwise
from strategies import quick

from bench import train_ra_mla
from bench.models.data import load_corpus
from bench.models.gpt import GPTConfig
from bench.study import trainer
from bench.study.arms import ARMS, build_model, count_parameters, latent_size
from bench.study.probe import NonFiniteError, observe, reciprocal_share
from bench.study.runlog import CHECKPOINT, read_log
from bench.study.settings import PRESETS, Settings
from bench.study.trainer import batch_at, learning_rate, train
from bench.study.world import World
from ra_triton import project

ROOT = Path(__file__).parents[2]
CONFIG = GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=32, bias=False)
TINY = Settings(
    n_layer=1,
    n_head=2,
    n_embd=16,
    block=8,
    steps=6,
    batch=4,
    warmup=2,
    eval_every=3,
    val_pieces=4,
    log_every=1,
    sample=3,
    device="cpu",
    threads=1,
)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("for i in range(10): print(i)\n" * 100)
    return load_corpus([path], length=TINY.block + 1)


def lines(folder, kind):
    return [line for line in read_log(folder) if line["kind"] == kind]


# Arms


@pytest.mark.parametrize(("preset", "R"), quick([("cpu", 4), ("cpu", 8), ("h200", 4)], 2))
def test_every_arm_has_the_parameters_of_the_baseline_within_a_percent(preset, R):
    s = PRESETS[preset].base
    config = GPTConfig(s.block, s.vocab_size, s.n_layer, s.n_head, s.n_embd, bias=s.bias)
    counts = {arm: count_parameters(arm, R, config) for arm in ARMS}
    for arm, count in counts.items():
        assert abs(count / counts["baseline"] - 1) < 0.01, arm


def test_the_latent_of_gpt2_is_what_the_equation_gives():
    gpt2 = GPTConfig(n_head=12, n_embd=768)
    assert latent_size(gpt2, 0) == 512  # 2 C / 3
    assert latent_size(gpt2, 4) % 8 == 0


@pytest.mark.parametrize("arm", ARMS)
def test_values_of_equal_name_and_shape_start_equal(arm):
    baseline = build_model("baseline", 0, CONFIG, seed=3).state_dict()
    model = build_model(arm, 4, CONFIG, seed=3).state_dict()
    changed = {"c_attn"} if arm == "ra-tied-init" else set()
    shared = [
        name
        for name in baseline
        if name in model
        and model[name].shape == baseline[name].shape
        and changed.isdisjoint(name.split("."))
    ]
    assert len(shared) >= 8  # embeddings, norms, MLP, c_proj
    for name in shared:
        assert_bitwise(model[name], baseline[name])
    assert_bitwise(
        build_model(arm, 4, CONFIG, seed=3)(torch.arange(8)[None]),
        build_model(arm, 4, CONFIG, seed=3)(torch.arange(8)[None]),
    )
    other = build_model(arm, 4, CONFIG, seed=4).state_dict()
    assert not torch.equal(other["transformer.wte.weight"], model["transformer.wte.weight"])


@pytest.mark.parametrize("arm", ["ra", "ra-composed"])
def test_free_and_composed_ra_start_as_the_baselines_function(arm):
    tokens = torch.randint(256, (2, 16))
    expected = build_model("baseline", 0, CONFIG, seed=1)(tokens)
    assert_bitwise(build_model(arm, 4, CONFIG, seed=1)(tokens), expected)


def test_a_tied_start_repeats_the_standard_lanes():
    model = build_model("ra-tied-init", 4, CONFIG, seed=0)
    baseline = build_model("baseline", 0, CONFIG, seed=0)
    W = model.transformer["h"][0].attn.c_attn.weight.unflatten(0, (3, 2, 16))  # q, k, v; H; D
    plain = baseline.transformer["h"][0].attn.c_attn.weight.unflatten(0, (3, 2, 16))
    assert_bitwise(W[:, :, :12], plain[:, :, :12])
    k_low, K = W[0, :, 12:].double(), plain[1].double()  # the query side carries K W_recip
    spanned = (k_low @ torch.linalg.pinv(K)) @ K
    torch.testing.assert_close(spanned.float() * 100, k_low.float() * 100)


def test_latent_attention_starts_from_the_baselines_queries():
    baseline = build_model("baseline", 0, CONFIG, seed=0).transformer["h"][1].attn
    W_q = baseline.c_attn.weight.chunk(3)[0].unflatten(0, (2, 16))
    for arm, lanes in (("mla", 16), ("ra+mla", 12)):
        attention = build_model(arm, 4, CONFIG, seed=0).transformer["h"][1].attn
        assert_bitwise(attention.c_q.weight.unflatten(0, (2, -1)), W_q[:, :lanes])


def test_ra_mla_is_what_its_docstring_says():
    layer = build_model("ra+mla", 4, CONFIG, seed=0).transformer["h"][0].attn
    x = torch.randn(2, 7, 32)
    c = layer.norm(layer.c_down(x))
    q, k, v = (t.unflatten(-1, (2, -1)) for t in (layer.c_q(x), layer.c_k(c), layer.c_v(c)))
    q_low, k_low = layer.c_low(c).unflatten(-1, (2, 2, 4)).unbind(2)
    S = torch.einsum("bihd,bjhd->bhij", q, k) + torch.einsum("bihd,bjhd->bhij", k_low, q_low)
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    P = (S / 16**0.5).masked_fill(later, -torch.inf).softmax(-1)
    expected = layer.c_proj(torch.einsum("bhij,bjhd->bihd", P, v).flatten(2))
    torch.testing.assert_close(layer(x) * 100, expected * 100)


@pytest.mark.parametrize("arm", ARMS)
def test_no_arm_sees_later_tokens(arm):
    model = build_model(arm, 4, CONFIG, seed=0).eval()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 256
    with torch.no_grad():
        assert_bitwise(model(changed)[:, :9], model(tokens)[:, :9])


def test_the_probe_sees_shares_and_gates():
    tokens = torch.randint(256, (2, 16))
    for arm in ARMS:
        seen = observe(build_model(arm, 4, CONFIG, seed=0), tokens)
        assert len(seen["share"]) == (2 if ARMS[arm].has_rank else 0), arm
        assert len(seen["gate"]) == {"ra-composed": 4, "output-gate": 2}.get(arm, 0), arm
        assert all(0 < s < 1 for shares in seen["share"].values() for s in shares)


def test_the_share_is_that_of_the_layer():
    model = build_model("ra", 4, CONFIG, seed=0)
    layer, x = model.transformer["h"][0].attn, torch.randn(2, 16, 32)
    q_pack, k_pack, _ = project(x, layer.fused_weight()[0], 4, n_head=2, weight_layout="packed")
    torch.testing.assert_close(reciprocal_share(q_pack, k_pack, 4), layer.reciprocal_share(x))


# Order of data, schedule


def test_batches_depend_on_seed_and_step_alone(corpus):
    settings = replace(TINY, seed=5)
    batch = batch_at(corpus, settings, 3)
    torch.rand(7)
    assert_bitwise(batch_at(corpus, replace(settings, arm="mla", dtype="bf16"), 3), batch)
    assert not torch.equal(batch_at(corpus, settings, 4), batch)
    assert not torch.equal(batch_at(corpus, replace(settings, seed=6), 3), batch)


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    s = replace(TINY, steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(s, step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates == [*sorted(rates[:11]), *sorted(rates[11:], reverse=True)]
    assert rates[100] == pytest.approx(0.1)


# Runs


@pytest.mark.parametrize("arm", ["baseline", "ra-composed", "ra+mla"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_has_the_same_bits(corpus, tmp_path, arm, dtype):
    settings = replace(TINY, arm=arm, dtype=dtype, dropout=0.1)
    whole = train(settings, corpus, tmp_path / "whole")
    folder = tmp_path / "parts"
    train(settings, corpus, folder, stop_at=2)
    train(settings, corpus, folder, stop_at=5, resume=True)
    torch.rand(3)
    parts = train(settings, corpus, folder, resume=True)
    for name, p in whole.state_dict().items():
        assert_bitwise(parts.state_dict()[name], p)
    losses = [
        [(line["step"], line["loss"]) for line in lines(f, "step")]
        for f in (tmp_path / "whole", folder)
    ]
    assert losses[0] == losses[1]
    assert lines(folder, "eval") == lines(tmp_path / "whole", "eval")
    assert not (folder / CHECKPOINT).exists()


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(corpus, tmp_path):
    settings = replace(TINY, checkpoint_every=2)
    whole = train(settings, corpus, tmp_path / "whole")

    def killed(step, model):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, corpus, tmp_path / "cut", before_step=killed)
    with (tmp_path / "cut" / "run.jsonl").open("a") as file:
        file.write('{"kind": "st')  # the line that it was writing
    again = train(settings, corpus, tmp_path / "cut", resume=True)
    assert_bitwise(again.lm_head.weight, whole.lm_head.weight)
    assert [line["step"] for line in lines(tmp_path / "cut", "step")] == list(range(6))


def test_a_checkpoint_of_other_settings_is_refused(corpus, tmp_path):
    train(TINY, corpus, tmp_path / "run", stop_at=2)
    with pytest.raises(ValueError, match=r"other settings: lr was 0\.002, is 0\.1"):
        train(replace(TINY, lr=0.1), corpus, tmp_path / "run", resume=True)


def test_a_finished_run_keeps_its_model_if_asked(corpus, tmp_path):
    gpt = train(replace(TINY, keep_model=True), corpus, tmp_path / "run")
    state = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert state["step"] == TINY.steps
    assert_bitwise(state["model"]["lm_head.weight"], gpt.lm_head.weight)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_compiled(corpus, tmp_path, monkeypatch, arm):
    # The graph is captured as for any compiler; compiling it would need one.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    losses = []
    for name, compiled in (("eager", False), ("compiled", True)):
        settings = replace(TINY, arm=arm, steps=2, compile=compiled)
        train(settings, corpus, tmp_path / name)
        losses.append([line["loss"] for line in lines(tmp_path / name, "step")])
    torch.testing.assert_close(*map(torch.tensor, losses))


def test_micro_batches_add_up_to_the_batch(corpus, tmp_path):
    train(TINY, corpus, tmp_path / "whole")
    train(replace(TINY, micro_batch=3), corpus, tmp_path / "parts")
    whole, parts = (
        torch.tensor([[line["loss"], line["norm"]] for line in lines(tmp_path / f, "step")])
        for f in ("whole", "parts")
    )
    torch.testing.assert_close(parts, whole)


def test_fp16_scales_its_loss(corpus, tmp_path):
    train(replace(TINY, dtype="fp16"), corpus, tmp_path / "run")
    assert all(line["scale"] > 1 for line in lines(tmp_path / "run", "step"))


def test_fp16_leaves_out_steps_that_overflow(corpus, tmp_path):
    def huge(step, model):
        weight = model.transformer["wpe"].weight
        factor = torch.inf if step == 1 else 1.0
        handles.append(weight.register_hook(lambda g: g * factor))
        if len(handles) > 1:
            handles.pop(0).remove()

    handles = []
    train(replace(TINY, dtype="fp16"), corpus, tmp_path / "run", before_step=huge)
    scales = [line["scale"] for line in lines(tmp_path / "run", "step")]
    assert scales[2] == scales[1] / 2


# Not finite


def plant_gradient(model):
    model.transformer["h"][0].mlp.c_fc.weight.register_hook(lambda g: g * torch.nan)


def plant_gate(model):
    with torch.no_grad():
        model.transformer["h"][0].attn.c_attn.w_rec[1] = torch.nan


def plant_infinite_gate(model):
    with torch.no_grad():
        model.transformer["h"][0].attn.c_gate.weight[0, 0] = torch.inf


PLANTED = {
    "gradient": (
        "ra-composed",
        plant_gradient,
        r"gradient of transformer\.h\.0\.mlp\.c_fc\.weight \(\d+ of 1024 values: nan\)$",
    ),
    "gate": (
        "ra-composed",
        plant_gate,
        r"gate transformer\.h\.0\.attn\.c_attn\.w_rec \(1 of 2 values: nan\); ",
    ),
    "infinite gate": (
        "output-gate",
        plant_infinite_gate,
        r"gate transformer\.h\.0\.attn\.c_gate\.weight \(1 of 32 values: inf\)",
    ),
}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_nan_stops_the_run_by_name(corpus, tmp_path, planted, dtype):
    arm, plant, message = PLANTED[planted]

    def before(step, model):
        if step == 3:
            plant(model)

    # fp16 looks for its scale first, and gives up at last.
    steps = 3 + trainer.MAX_SKIPS + 2
    at = 3 + trainer.MAX_SKIPS if (planted, dtype) == ("gradient", "fp16") else 3
    settings = replace(TINY, arm=arm, dtype=dtype, steps=steps, eval_every=100)
    with pytest.raises(NonFiniteError, match=f"^step {at}: not finite: {message}"):
        train(settings, corpus, tmp_path / "run", before_step=before)
    last = read_log(tmp_path / "run")[-1]
    assert (last["kind"], last["step"]) == ("stop", at)


def test_a_loss_that_is_nan_stops_the_run(corpus, tmp_path, monkeypatch):
    real, calls = trainer.next_token_loss, []

    def planted(logits, tokens):
        calls.append(0)
        return real(logits, tokens) * (torch.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(trainer, "next_token_loss", planted)
    with pytest.raises(NonFiniteError, match=r"^step 2: not finite: loss \(nan\); gradient of"):
        train(replace(TINY, eval_every=100), corpus, tmp_path / "run")


# Two processes


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_the_double_batch(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("for i in range(10): print(i)\n" * 100)
    options = [
        *("--data", str(text), "--arms", "baseline", "ra-composed", "--seeds", "0"),
        *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block", "8", "--batch", "4"),
        *("--steps", "4", "--warmup", "2", "--eval-every", "2", "--val-pieces", "4"),
        *("--log-every", "1", "--sample", "3", "--micro-batch", "1", "--device", "cpu"),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = subprocess.run(
        [*command, str(ROOT / "bench/train_ra_mla.py"), *options, "--out", tmp_path / "two"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert two.returncode == 0, two.stderr
    assert train_ra_mla.main([*options, "--out", str(tmp_path / "one")]) == 0
    for run in ("baseline-fp32-s0", "ra-composed-R4-fp32-s0"):
        one, two_ = (
            torch.tensor(
                [[line["loss"], line["norm"]] for line in lines(tmp_path / f / run, "step")]
            )
            for f in ("one", "two")
        )
        torch.testing.assert_close(two_, one)
        assert (
            json.loads((tmp_path / "two" / run / "run.jsonl").open().readline())["processes"] == 2
        )


def test_a_batch_that_does_not_divide_is_told():
    with pytest.raises(ValueError, match="a batch of 5 does not divide by 2 processes"):
        World(0, 2).share(torch.zeros(5, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_on_a_gpu(corpus, tmp_path, arm, dtype):
    sizes = {"n_layer": 2, "n_embd": 128, "block": 8, "device": "cuda", "threads": 0}
    settings = replace(TINY, arm=arm, dtype=dtype, steps=30, lr=1e-3, **sizes)
    train(settings, corpus, tmp_path / "run")
    losses = [line["loss"] for line in lines(tmp_path / "run", "step")]
    assert losses[-1] < losses[0] - 1
    end = read_log(tmp_path / "run")[-1]
    assert end["kind"] == "end"
    assert end["memory_mb"] > 0
