"""Generation: cached steps are the model's own, chance is asked for by name, errors come first."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from budget import assert_bitwise
from strategies import DEVICE

from bench import generate
from bench.harness.gate import Answer
from bench.models import sampling
from bench.models.gpt import GPT, GPTConfig
from ra_triton.nn import RACausalSelfAttention

ROOT = Path(__file__).parents[2]
CONFIG = GPTConfig(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=32)


def model(backend="sdpa", config=CONFIG, **options):
    """A model in eval, with weights large enough that its choices differ."""
    torch.manual_seed(0)
    make = partial(RACausalSelfAttention.from_config, R=4, backend=backend, **options)
    gpt = GPT(config, make).to(DEVICE).eval()
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if p.dim() == 2 and "recip" not in name:
                p.mul_(4)
    return gpt


def prompt(B=2, T=5, seed=0):
    drawn = torch.randint(31, (B, T), generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE)


def in_double(gpt):
    """The same function as plain attention in float64: reciprocal weights are ordinary ones."""
    plain = GPT(CONFIG).to(DEVICE).eval()
    state = {name: t for name, t in gpt.state_dict().items() if ".c_attn." not in name}
    plain.load_state_dict(state, strict=False)
    for ours, theirs in zip(gpt.transformer["h"], plain.transformer["h"], strict=True):
        W, bias = ours.attn.fused_weight()
        theirs.attn.c_attn.weight.copy_(W.mT)
        theirs.attn.c_attn.bias.copy_(bias)
    return plain.double()


@pytest.mark.parametrize(("backend", "steps"), [("sdpa", [5] + [1] * 19), ("triton", [3, 1, 2])])
@pytest.mark.parametrize("parametrisation", ["free", "composed"])
@torch.no_grad()
def test_logits_with_caches_are_those_without(backend, steps, parametrisation):
    gpt = model(backend, parametrisation=parametrisation)
    tokens = prompt(T=sum(steps))
    caches = gpt.caches(2)
    pieces = [gpt(piece, caches) for piece in tokens.split(steps, dim=1)]
    exact = in_double(gpt)(tokens)
    # No further from the truth than the model without caches, by the benchmarks' gate.
    answer = Answer.of("logits", exact, gpt(tokens), exact.shape[-1])
    assert answer.failure(torch.cat(pieces, dim=1)) is None


@pytest.mark.parametrize("count", [0, 1, 2, 7, 19, 20, 21, 30])
def test_the_same_text_with_a_cache_and_without(count):
    """Also beyond the block, where both go on with its last tokens."""
    options = {"temperature": 0.9, "top_k": 5, "seed": 3}
    cached = model().generate(prompt(), count, **options)
    assert_bitwise(cached, model().generate(prompt(), count, use_cache=False, **options))
    assert_bitwise(cached[:, :5], prompt())
    assert cached.shape == (2, 5 + count)


def test_a_prompt_as_long_as_the_block_or_longer():
    for T in (23, 24, 25, 40):
        texts = [model().generate(prompt(T=T), 4, seed=0, use_cache=c) for c in (True, False)]
        assert_bitwise(*texts)


def test_a_step_with_a_cache_computes_one_token(monkeypatch):
    gpt, seen = model(), []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT,
        "forward",
        lambda self, tokens, *c: seen.append(tokens.shape[1]) or forward(self, tokens, *c),
    )
    gpt.generate(prompt(), 6)
    assert seen == [5, 1, 1, 1, 1, 1]
    seen.clear()
    gpt.generate(prompt(), 3, use_cache=False)
    assert seen == [5, 6, 7]


def test_chance_follows_the_seed_or_the_generator_alone():
    gpt, tokens = model(), prompt()

    def written(**options):
        return gpt.generate(tokens, 12, **options)

    first = written(seed=1)
    torch.rand(7)
    assert_bitwise(written(seed=1), first)
    assert_bitwise(written(generator=torch.Generator(DEVICE).manual_seed(1)), first)
    assert not torch.equal(written(seed=2), first)
    torch.manual_seed(5)
    chance = written()
    torch.manual_seed(5)
    assert_bitwise(written(), chance)


def test_temperature_and_top_k():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(4000, 4)

    def shares(temperature, top_k):
        draw = sampling.sampler(temperature, top_k, torch.Generator().manual_seed(0))
        return draw(logits).flatten().bincount(minlength=4) / 4000

    assert shares(0, None).tolist() == shares(1.0, 1).tolist() == [0, 1, 0, 0]
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 3), (1.0, 2), (1.0, 9)):
        kept = logits[0].clone()
        kept[kept.argsort(descending=True)[top_k or 4 :]] = -float("inf")
        expected = (kept / temperature).softmax(-1)
        spread = (expected * (1 - expected) / 4000).sqrt()
        assert ((shares(temperature, top_k) - expected).abs() <= 4 * spread).all()


def test_plain_layers_go_on_without_a_cache():
    gpt = GPT(CONFIG).to(DEVICE).eval()
    assert not gpt.takes_caches
    assert gpt.generate(prompt(), 3, seed=0).shape == (2, 8)
    with pytest.raises(NotImplementedError, match="only RACausalSelfAttention takes a cache"):
        gpt.generate(prompt(), 3, use_cache=True)


def test_dropout_in_training_goes_without_a_cache():
    gpt = model(config=GPTConfig(24, 31, 1, 2, 32, dropout=0.5)).train()
    assert gpt.generate(prompt(), 3, seed=0).shape == (2, 8)
    with pytest.raises(ValueError, match="call eval"):
        gpt.generate(prompt(), 3, use_cache=True)


def test_caches_are_in_the_dtype_of_the_model_or_of_autocast():
    gpt = model()
    assert [c.k_pack.dtype for c in gpt.caches(2)] == [torch.float32] * 2
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert gpt.caches(2)[0].v.dtype == torch.bfloat16
        assert gpt.generate(prompt(), 4, seed=0).shape == (2, 9)
    assert gpt.half().caches(2, 7)[1].k_pack.shape == (2, 7, 2, 16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature must be finite and at least 0, got -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
        ({"temperature": "1"}, TypeError, "temperature must be a number"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int or None"),
        ({"count": -1}, ValueError, "count must be at least 0, got -1"),
        ({"count": 1.0}, TypeError, "count must be an int"),
        ({"tokens": prompt(T=0)}, ValueError, r"tokens must be \[B, T\] with T > 0"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "exclude each other"),
        ({"cuda_graph": True, "use_cache": False}, ValueError, "cuda_graph needs a cache"),
    ],
)
def test_bad_arguments_are_told_before_anything_runs(monkeypatch, change, error, message):
    gpt = model()
    monkeypatch.setattr(GPT, "forward", None)
    with pytest.raises(error, match=message):
        gpt.generate(**{"tokens": prompt(), "count": 3} | change)


@torch.no_grad()
def test_a_position_without_an_embedding_is_refused(monkeypatch):
    gpt = model()
    with pytest.raises(ValueError, match="caches of at most 24 tokens, got 25"):
        gpt.caches(2, 25)
    caches = gpt.caches(2)
    gpt(prompt(T=20), caches)
    monkeypatch.setattr(torch.nn.Embedding, "forward", None)
    with pytest.raises(ValueError, match="its longest has 20, and 5 more do not fit"):
        gpt(prompt(T=5), caches)


# The example


def test_the_example_trains_and_writes(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.py").write_text("for i in range(10): print(i)\n" * 20)
    sizes = "--batch 2 --block 32 --layers 1 --heads 2 --width 32 --steps 4 --sample 20"
    command = [sys.executable, str(ROOT / "bench" / "generate.py"), *sizes.split()]
    run = subprocess.run(
        [*command, "--text", str(tmp_path), "--prompt", "for i", "--top-k", "5", "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"with a cache: \d+\.\d\d ms\n\nfor i", run.stdout)
    assert "     4" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt must have 1 to 127 bytes, got 0"),
        (["--text", "nowhere"], "no such folder: nowhere"),
        (["--device", "cuda"], "PyTorch sees no CUDA device"),
        (["--temperature", "-1"], "temperature must be finite and at least 0, got -1.0"),
        (["--top-k", "0"], "top_k must be at least 1, got 0"),
    ],
)
def test_the_example_tells_bad_arguments_in_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(generate, "train", None)  # it is not reached
    with pytest.raises(SystemExit):
        generate.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("parametrisation", ["free", "composed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_and_eager_steps_generate_the_same_tokens(dtype, parametrisation):
    config = GPTConfig(block_size=128, vocab_size=31, n_layer=2, n_head=2, n_embd=64)
    gpt = model("triton", config, parametrisation=parametrisation).to(dtype)
    for count in (1, 2, 3, 100, 140):
        options = {"temperature": 0.9, "top_k": 7, "seed": 1}
        eager, graph = (
            gpt.generate(prompt(), count, cuda_graph=g, **options) for g in (False, True)
        )
        assert_bitwise(graph, eager)
