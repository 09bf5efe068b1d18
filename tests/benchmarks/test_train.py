"""The training example: it learns, it repeats, its data are split cleanly, its errors are clear."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budget import assert_bitwise

from bench import train_tiny
from bench.models import data
from bench.models.data import batch_of, load_text, split_of
from bench.models.gpt import GPT, GPTConfig

ROOT = Path(__file__).parents[2]
TINY = [
    "--batch",
    "4",
    "--block",
    "16",
    "--layers",
    "1",
    "--heads",
    "2",
    "--width",
    "32",
    "--sample",
    "5",
    "--lr",
    "0.01",
]


@pytest.fixture
def folder(tmp_path):
    """Forty files of one repeated line, in both splits."""
    for i in range(40):
        (tmp_path / f"{i}.py").write_text("for i in range(10): print(i)\n" * 20)
    return tmp_path


def losses(output):
    """``{step: [loss of each run]}`` of the printed curve."""
    rows = re.findall(r"^ *(\d+)((?: +\d+\.\d{4})+)$", output, re.MULTILINE)
    return {int(step): [float(value) for value in values.split()] for step, values in rows}


@pytest.mark.parametrize(
    "options",
    [["--parametrisation", "composed"], ["--parametrisation", "free"], ["--attention", "plain"]],
)
def test_the_loss_falls_far_below_that_of_guessing(folder, capsys, options):
    arguments = [*TINY, "--steps", "40", "--text", str(folder), *options]
    assert train_tiny.main(arguments) == 0
    output = capsys.readouterr().out
    curve = losses(output)
    assert list(curve) == list(range(0, 41, 4))
    assert curve[0][0] > 5  # ln 256 = 5.5
    assert curve[40][0] < 2.5
    assert "A sample after 'def '" in output
    assert ("w_rec" in output) == ("composed" in options)


def test_a_run_repeats_bitwise_and_follows_its_seed(folder, capsys):
    outputs = []
    for seed in ("0", "0", "1"):
        train_tiny.main([*TINY, "--steps", "3", "--text", str(folder), "--seed", seed])
        outputs.append(losses(capsys.readouterr().out))
    assert outputs[0] == outputs[1] != outputs[2]


def test_two_backends_are_printed_side_by_side(folder, capsys):
    arguments = [*TINY, "--steps", "2", "--text", str(folder), "--backend", "sdpa", "auto"]
    assert train_tiny.main(arguments) == 0
    output = capsys.readouterr().out
    assert all(len(row) == 2 for row in losses(output).values())
    if not torch.cuda.is_available():  # auto is sdpa
        assert "largest difference between two losses of one step: 0\n" in output


@pytest.mark.slow
def test_the_script_runs_from_any_directory(tmp_path, folder):
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "bench" / "train_tiny.py"),
            *TINY,
            "--steps",
            "1",
            "--text",
            folder,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert losses(run.stdout).keys() == {0, 1}


def test_a_backend_that_cannot_train_here_says_so_before_another_trains(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr(train_tiny, "train", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        train_tiny.main([*TINY, "--text", str(folder), "--backend", "sdpa", "flex"])
    assert stop.value.code == 2
    assert "backend='flex'" in capsys.readouterr().err


def test_training_says_at_once_what_it_does_and_goes_on_saying_it(folder, capsys):
    """Where there is no terminal for a bar."""
    assert train_tiny.main([*TINY, "--steps", "2", "--text", str(folder)]) == 0
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("training on sdpa: 2 steps of ")
    assert [line.partition(":")[0] for line in others] == ["step 0", "step 1"]


# Data


def test_the_standard_library_is_there_and_split():
    text = load_text(max_bytes=300_000)
    assert text.train.dtype == text.val.dtype == torch.uint8
    assert len(text.train) + len(text.val) >= 300_000
    assert len(text.train) > len(text.val) > 0


def test_a_file_is_in_one_split_by_its_name_alone(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.py").write_bytes(bytes([i]) * 3)
    before = load_text(tmp_path)
    files = {split: set(t.tolist()) for split, t in vars(before).items()}
    assert not files["train"] & files["val"]
    assert files["val"] == {i for i in range(40) if split_of(f"{i}.py") == "val"}
    (tmp_path / "0.py").write_text("changed")
    (tmp_path / "more.py").write_text("")
    after = load_text(tmp_path)
    assert files["val"] - {0} <= set(after.val.tolist())
    assert len(before.train) + len(before.val) == 3 * 40


def test_tests_are_not_read(tmp_path, folder):
    hidden = folder / "test" / "inner"
    hidden.mkdir(parents=True)
    before = load_text(folder)
    for i in range(40):
        (hidden / f"{i}.py").write_text("secret")
    assert_bitwise(load_text(folder).train, before.train)


def test_batches_are_pieces_of_the_text():
    text = torch.arange(50, dtype=torch.uint8)
    batch = batch_of(text, 100, 8, torch.Generator().manual_seed(0))
    assert batch.shape == (100, 8)
    assert batch.dtype == torch.int64
    assert_bitwise(batch, batch[:, :1] + torch.arange(8))
    assert {0, 42} <= set(batch[:, 0].tolist())  # the first and the last start
    assert_bitwise(batch_of(text, 1, 50, torch.Generator())[0], torch.arange(50))


def test_bad_texts_raise(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_text(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no text in \.py files below"):
        load_text(tmp_path / "empty")
    (tmp_path / "empty" / "one.py").write_text("one")
    with pytest.raises(ValueError, match=r"the (train|val) text from .* has 0 bytes, needs 1"):
        load_text(tmp_path / "empty")
    with pytest.raises(ValueError, match="the text has 3 tokens, a piece needs 4"):
        batch_of(torch.zeros(3, dtype=torch.uint8), 1, 4, torch.Generator())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "expected an integer >= 1, got '0'"),
        (["--heads", "3", "--width", "32"], "n_embd=32 must be a multiple of n_head=3"),
        (["--R", "99"], "R must be between 0 and the head dim"),
        (["--dropout", "1"], r"dropout must be in \[0, 1\)"),
        (["--text", "no/such/folder"], "no such folder: no/such/folder"),
        (["--block", "100000000"], "bytes, needs 100000001"),
        (["--prompt", ""], "--prompt must have at least one byte"),
    ],
)
def test_bad_arguments_are_told_in_one_line(folder, capsys, arguments, message):
    with pytest.raises(SystemExit):
        train_tiny.main(["--steps", "1", "--text", str(folder), *TINY, *arguments])
    assert re.search(message, capsys.readouterr().err)


# The model


def test_the_model_is_tied_causal_and_bounded():
    config = GPTConfig(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
    gpt = GPT(config).eval()
    assert gpt.lm_head.weight is gpt.transformer["wte"].weight
    ids = torch.randint(31, (2, 8))
    changed = ids.clone()
    changed[:, 5:] += 1
    changed %= 31
    with torch.no_grad():
        assert_bitwise(gpt(changed)[:, :5], gpt(ids)[:, :5])
        assert (gpt(changed)[:, 5:] != gpt(ids)[:, 5:]).any()
    with pytest.raises(ValueError, match="at most 8 tokens, got 9"):
        gpt(torch.zeros(1, 9, dtype=torch.int64))
    drawn = gpt.generate(ids, 5, torch.Generator().manual_seed(0))
    assert_bitwise(drawn[:, :8], ids)
    assert drawn.shape == (2, 13)


def test_the_vocabulary_is_that_of_bytes():
    assert GPTConfig().vocab_size == data.VOCAB_SIZE == 256
