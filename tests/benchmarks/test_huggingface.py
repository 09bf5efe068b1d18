"""Directories of Hugging Face's GPT-2: loaded, saved back, the same logits in transformers."""

import json
import sys

import pytest
import torch
from budget import assert_bitwise
from layers import assert_rounded
from strategies import DEVICE, normal

from bench.huggingface import load_gpt2, main, save_gpt2
from bench.models.gpt import GPT, GPTConfig
from ra_triton.nn import RACausalSelfAttention

safetensors = pytest.importorskip("safetensors.torch", reason="an optional extra")
SIZES = {"n_positions": 16, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32}
attentions = pytest.mark.parametrize("attention", ["plain", "free", "composed"])


def tokens():
    return torch.randint(SIZES["vocab_size"], (3, 16)).to(DEVICE)


@pytest.fixture(scope="module")
def stock():
    """A random GPT2LMHeadModel, every parameter drawn."""
    transformers = pytest.importorskip("transformers", reason="Hugging Face is a test-only extra")
    config = transformers.GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=i, scale=0.2))
    return model


@pytest.fixture
def saved(stock, tmp_path):
    stock.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.fixture
def ours(tmp_path):
    """A directory that needs no transformers."""
    config = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config, lambda c: RACausalSelfAttention.from_config(c, parametrisation="composed"))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=i, scale=0.2))
    save_gpt2(model.eval(), tmp_path / "ours")
    return tmp_path / "ours"


def logits(model, ids):
    with torch.no_grad():
        out = model.to(DEVICE)(ids)
    return getattr(out, "logits", out)


@attentions
def test_a_checkpoint_goes_into_reciprocal_attention_and_back(attention, stock, saved, tmp_path):
    model, ids = load_gpt2(saved, attention, R=3), tokens()
    assert not model.training
    assert_rounded(logits(model, ids), logits(stock, ids).double(), "logits")
    save_gpt2(model, tmp_path / "back")
    again = type(stock).from_pretrained(tmp_path / "back").eval()
    assert_bitwise(logits(again, ids), logits(stock, ids), "logits of what was saved back")
    for name, t in again.state_dict().items():
        assert_bitwise(t.cpu(), stock.state_dict()[name].cpu(), name)


@attentions
def test_what_is_saved_loads_with_the_same_bits(attention, ours):
    first, ids = load_gpt2(ours, attention), tokens()
    save_gpt2(first, ours)
    assert_bitwise(logits(load_gpt2(ours, attention), ids), logits(first, ids))


def test_a_trained_composed_model_is_a_stock_gpt2(stock, tmp_path):
    config = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=32, bias=False)
    model = GPT(
        config, lambda c: RACausalSelfAttention.from_config(c, R=5, parametrisation="composed")
    ).to(DEVICE)
    ids = tokens()
    optimizer = model.adamw(0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(ids).backward()
        optimizer.step()
    save_gpt2(model, tmp_path)
    again = type(stock).from_pretrained(tmp_path).eval()
    assert_rounded(logits(again, ids), logits(model.eval(), ids).double(), "logits")


def test_shards_and_checkpoints_without_a_head_load(stock, saved, tmp_path):
    ids = tokens()
    expected = logits(load_gpt2(saved), ids)
    stock.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_bitwise(logits(load_gpt2(tmp_path / "shards"), ids), expected)
    stock.transformer.save_pretrained(tmp_path / "body")
    assert_bitwise(logits(load_gpt2(tmp_path / "body"), ids), expected)


def as_bin(folder, change=lambda state: state):
    """The same directory with pytorch_model.bin."""
    path = folder / "model.safetensors"
    torch.save(change(safetensors.load_file(path)), folder / "pytorch_model.bin")
    path.unlink()
    return folder


def test_bin_files_load_as_tensors_alone(ours):
    ids = tokens()
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    expected = logits(load_gpt2(ours), ids)
    as_bin(ours, lambda state: {**state, **{f"transformer.{n}": t for n, t in masks.items()}})
    assert_bitwise(logits(load_gpt2(ours), ids), expected)
    torch.save({"x": print}, ours / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_gpt2(ours)


def test_half_precision_checkpoints_become_float32(ours):
    state = safetensors.load_file(ours / "model.safetensors")
    half = {name: t.half() for name, t in state.items()}
    safetensors.save_file(half, ours / "model.safetensors")
    model = load_gpt2(ours, "plain")
    assert_bitwise(model.lm_head.weight.detach(), half["transformer.wte.weight"].float())


# Errors


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "llama"}, "must hold a gpt2, got 'llama'"),
        ({"model_type": None}, "must hold a gpt2, got None"),
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new', got 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon must be 1e-05, got 1e-06"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx must be False",
        ),
        ({"n_inner": 96}, "n_inner must be None, got 96"),
        ({"n_layer": 3}, r"missing \['transformer.h.2.attn.c_attn.bias'"),
        ({"n_layer": 1}, r"transformer.h.1.attn.c_attn.bias is not zero, but the module has no"),
        ({"vocab_size": 60}, r"must be \(60, 32\) as nn.Linear has it, got \(61, 32\)"),
        ({"n_embd": 64}, "must be"),
        ({"n_embd": 33}, "n_embd=33 must be a multiple of n_head=2"),
    ],
)
def test_another_model_is_named(change, match, ours):
    path = ours / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=match):
        load_gpt2(ours)


def test_a_config_without_sizes_is_named(ours):
    path = ours / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({n: v for n, v in config.items() if n not in ("n_head", "n_embd")}))
    with pytest.raises(ValueError, match=r"config.json lacks n_embd, n_head"):
        load_gpt2(ours)


def test_an_untied_head_is_named(ours):
    state = safetensors.load_file(ours / "model.safetensors")
    safetensors.save_file({**state, "lm_head.weight": normal(61, 32)}, ours / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight is not tied to transformer.wte.weight"):
        load_gpt2(ours)


def test_missing_files_are_named(ours, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nowhere/config.json"):
        load_gpt2(tmp_path / "nowhere")
    (ours / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_gpt2(ours)
    index = {"weight_map": {"transformer.wte.weight": "model-1.safetensors"}}
    (ours / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"no such file: .*model-1.safetensors"):
        load_gpt2(ours)
    index["weight_map"] = {"x": "../model-1.safetensors"}
    (ours / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="a shard must lie beside it"):
        load_gpt2(ours)


def test_a_missing_package_says_what_to_install(ours, tmp_path, monkeypatch):
    model = load_gpt2(ours)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: load_gpt2(ours), lambda: save_gpt2(model, tmp_path / "out")):
        with pytest.raises(ImportError, match="safetensors is needed: pip install safetensors"):
            call()


def test_an_unknown_attention_is_named(ours):
    with pytest.raises(ValueError, match="attention must be one of plain, free, composed"):
        load_gpt2(ours, "reciprocal")


def test_what_no_gpt2_computes_is_not_saved(ours, tmp_path):
    config = GPTConfig(block_size=16, vocab_size=61, n_layer=1, n_head=2, n_embd=32)
    model = GPT(config, lambda c: RACausalSelfAttention.from_config(c, rope=True))
    with pytest.raises(ValueError, match="GPT-2 does not rotate its heads"):
        save_gpt2(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_folds_a_directory(ours, tmp_path, capsys):
    target = tmp_path / "folded"
    assert main([str(ours), str(target), "--attention", "composed", "-R", "2"]) == 0
    assert "composed, R=2" in capsys.readouterr().out
    ids = tokens()
    assert_bitwise(logits(load_gpt2(target), ids), logits(load_gpt2(ours), ids))
    assert main([str(tmp_path / "nowhere"), str(target)]) == 1
    assert "error: no such file" in capsys.readouterr().err


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_line_does_not_overwrite_its_source(ours, tmp_path, capsys):
    before = files_of(ours)
    (tmp_path / "link").symlink_to(ours)
    for target in (ours, ours / ".." / ours.name, tmp_path / "link"):
        with pytest.raises(SystemExit) as stop:
            main([str(ours), str(target)])
        assert stop.value.code == 2
        assert "target must be another directory than the source" in capsys.readouterr().err
    assert files_of(ours) == before


@attentions
def test_the_command_line_keeps_the_dtype_of_each_tensor(attention, ours, tmp_path, capsys):
    """Also where a checkpoint mixes them, and has no prefix before its names."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    state = safetensors.load_file(ours / "model.safetensors")
    mixed = {name: t.to(dtypes[i % 3]) for i, (name, t) in enumerate(sorted(state.items()))}
    bare = {name.removeprefix("transformer."): t for name, t in mixed.items()}
    safetensors.save_file(bare, ours / "model.safetensors")
    before, target = files_of(ours), tmp_path / "folded"
    assert main([str(ours), str(target), "--attention", attention]) == 0
    assert files_of(ours) == before
    after = safetensors.load_file(target / "model.safetensors")
    assert {name: t.dtype for name, t in after.items()} == {n: t.dtype for n, t in mixed.items()}
    if attention == "plain":
        for name, t in mixed.items():
            assert_bitwise(after[name], t, name)
    embedding = str(mixed["transformer.wte.weight"].dtype).removeprefix("torch.")
    assert json.loads((target / "config.json").read_text())["dtype"] == embedding
    assert "each tensor in its dtype" in capsys.readouterr().out
