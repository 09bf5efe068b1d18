"""The study's command line, presets, TOML and data: what runs, and what is told in one line."""

import re
import sys
from array import array

import pytest
import torch
from budget import assert_bitwise

from bench import train_ra_mla
from bench.models.data import Corpus, batch_of, count_places, load_corpus, pieces_at
from bench.study.arms import ARMS
from bench.study.runlog import read_log
from bench.study.settings import PRESETS, Settings, make_study, read_toml

SHORT = [
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block", "16", "--batch", "2"),
    *("--steps", "3", "--warmup", "1", "--eval-every", "2", "--val-pieces", "2", "--sample", "3"),
    *("--corpus-bytes", "100000", "--device", "cpu"),
]


def told(capsys, arguments):
    with pytest.raises(SystemExit):
        train_ra_mla.main(arguments)
    return capsys.readouterr().err


# The presets


def test_the_cpu_preset_runs_every_arm_in_short(tmp_path, capsys):
    assert train_ra_mla.main([*SHORT, "--seeds", "0", "--out", str(tmp_path / "runs")]) == 0
    folders = {folder.name: folder for folder in (tmp_path / "runs").iterdir()}
    assert {run.name for run in PRESETS["cpu"].runs() if run.seed == 0} == set(folders)
    assert {run.arm for run in PRESETS["cpu"].runs()} == set(ARMS)
    for folder in folders.values():
        lines = read_log(folder)
        assert [line["kind"] for line in lines] == ["run", "eval", "step", "eval", "eval", "end"]
        assert lines[0]["environment"]["torch"] == torch.__version__
        assert lines[0]["environment"]["commit"]
        assert lines[-2]["step"] == 3
        assert 4 < lines[-2]["val_loss"] < 6
        assert lines[-1]["step_ms"] > 0
        assert lines[-1]["memory_mb"] > 0
        assert lines[-1]["sample"].startswith("def ")
    output = capsys.readouterr().out
    assert "12 runs of 12 to do" in output
    assert re.search(r"mla-fp32-s0: [\d,]+ parameters \([+-][\d.]+% against the baseline\)", output)


def test_ra_repeats_the_baseline_bit_by_bit_on_a_cpu(tmp_path):
    arguments = [*SHORT, "--seeds", "0", "--arms", "baseline", "ra", "--backend", "sdpa"]
    assert train_ra_mla.main([*arguments, "--out", str(tmp_path)]) == 0
    losses = [
        [line["val_loss"] for line in read_log(tmp_path / run) if line["kind"] == "eval"]
        for run in ("baseline-fp32-s0", "ra-R4-fp32-s0")
    ]
    assert losses[0] == losses[1]


def test_presets_hold_the_arms_three_times():
    for name, study in PRESETS.items():
        runs = study.runs()
        for run in runs:
            run.check()
        assert len({run.name for run in runs}) == len(runs)
        for arm in ARMS:
            assert {run.seed for run in runs if run.arm == arm} == {0, 1, 2}, name


def test_an_arm_without_reciprocal_lanes_runs_once_for_all_ranks():
    study = make_study("cpu", {"arms": ["baseline", "ra"], "R": [4, 8], "seeds": [0]})
    assert [run.name for run in study.runs()] == [
        "baseline-fp32-s0",
        "ra-R4-fp32-s0",
        "ra-R8-fp32-s0",
    ]


def test_finished_runs_are_skipped_and_others_go_on(tmp_path, capsys):
    arguments = [*SHORT, "--seeds", "0", "--out", str(tmp_path), "--arms", "baseline", "mla"]
    assert train_ra_mla.main([*arguments, "--stop-at", "2"]) == 0
    assert "goes on at step 2 with --resume" in capsys.readouterr().out
    assert "--resume goes on with what is unfinished" in told(capsys, arguments)
    assert train_ra_mla.main([*arguments, "--resume"]) == 0
    assert "2 runs of 2 to do" in capsys.readouterr().out
    assert train_ra_mla.main([*arguments, "--resume"]) == 0
    assert "0 runs of 2 to do" in capsys.readouterr().out


def test_the_list_names_arms_and_presets(capsys):
    assert train_ra_mla.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*ARMS, *PRESETS))


# TOML


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python 3.11")
def test_toml_changes_the_preset_and_options_change_both(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text('preset = "h200"\narms = ["mla"]\nseeds = [7]\nlr = 1\nsteps = 9\n')
    study = make_study(None, read_toml(path), {"steps": 11})
    assert [run.name for run in study.runs()] == ["mla-bf16-s7"]
    assert (study.base.lr, study.base.steps, study.base.n_layer) == (1.0, 11, 12)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python 3.11")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "is not TOML"),
        ("lurning_rate = 1", "no such setting: 'lurning_rate'; settings are"),
        ("steps = 1.5", "steps must be int, got 1.5"),
        ('steps = "many"', "steps must be int, got 'many'"),
        ("compile = 1", "compile must be bool, got 1"),
        ('arms = "ra"', "arms must be a list of str, got 'ra'"),
        ("seeds = []", "seeds must be a list of int"),
        ("R = [true]", "R must be a list of int"),
        ('preset = "gpu"', "no such preset: 'gpu'; presets are cpu, h200"),
        ('arms = ["rra"]', "no such arm: 'rra'; arms are baseline, ra,"),
        ('data = "x.txt"', "data must be a list of file names"),
        ("seed = 1", "no such setting: 'seed'"),
    ],
)
def test_bad_toml_is_told(tmp_path, capsys, text, message):
    path = tmp_path / "study.toml"
    path.write_text(text)
    assert message in told(capsys, [str(path), "--out", str(tmp_path / "runs")])


# Options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "gated"], "no such arm: 'gated'; arms are baseline"),
        (["--R", "33"], "R must be between 0 and the head dim 32, got 33"),
        (["--R", "-1"], "R must be a finite number >= 0, got -1"),
        (["--dtype", "fp8"], "dtype must be one of fp32, bf16, fp16; got 'fp8'"),
        (["--device", "tpu"], "device must be one of auto, cpu, cuda; got 'tpu'"),
        (["--backend", "flash"], "backend must be one of"),
        (["--n-head", "5"], "n_embd=96 must be a multiple of n_head=5"),
        (["--steps", "0"], "steps must be a finite number >= 1, got 0"),
        (["--lr", "nan"], "lr must be a finite number >= 0, got nan"),
        (["--dropout", "1"], "dropout must be in [0, 1), got 1.0"),
        (["missing.toml"], "no such file: missing.toml"),
        (["--data", "missing.txt"], "no such file: missing.txt"),
        (["--val-data", "missing.txt"], "validation files need training files"),
    ],
)
def test_bad_options_are_told_in_one_line(tmp_path, capsys, arguments, message):
    assert message in told(capsys, [*arguments, "--out", str(tmp_path / "runs")])


def test_runs_need_a_folder(capsys):
    assert "--out FOLDER is missing" in told(capsys, ["--steps", "1"])


def test_every_setting_has_an_option():
    options = train_ra_mla._parser().format_help()
    for name in Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in options.replace("--seeds", "--seed")


# Data


def tokens(path, values):
    path.write_bytes(array("H", values).tobytes())
    return path


def test_text_is_split_at_its_last_tenth(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(200)))
    corpus = load_corpus([path], length=5)
    assert_bitwise(corpus.train[0], torch.arange(180, dtype=torch.uint8))
    assert_bitwise(corpus.val[0], torch.arange(180, 200, dtype=torch.uint8))
    assert corpus.bytes_per_token == 1
    fingerprint = corpus.fingerprint()
    assert fingerprint == load_corpus([path], length=5).fingerprint()
    path.write_bytes(bytes(range(1, 201)))
    assert fingerprint != load_corpus([path], length=5).fingerprint()


def test_bin_files_are_uint16_tokens(tmp_path):
    train = tokens(tmp_path / "train.bin", range(50000, 50100))
    val = tokens(tmp_path / "val.bin", range(60000, 60010))
    corpus = load_corpus([train], [val], length=5, vocab_size=65536)
    batch = batch_of(corpus.train, 50, 5, torch.Generator().manual_seed(0))
    assert_bitwise(batch, batch[:, :1] + torch.arange(5))
    assert 50000 <= batch.min() <= batch.max() < 50100
    assert_bitwise(corpus.val[0].long(), torch.arange(60000, 60010))
    assert corpus.bytes_per_token is None


def test_pieces_stay_within_one_file():
    texts = [torch.arange(n, dtype=torch.uint8) + start for n, start in ((7, 0), (3, 50), (4, 100))]
    assert count_places(texts, 4) == 5
    pieces = pieces_at(texts, torch.arange(5), 4)
    assert pieces[:, 0].tolist() == [0, 1, 2, 3, 100]
    assert_bitwise(pieces, pieces[:, :1] + torch.arange(4))


def test_the_standard_library_is_the_default(tmp_path):
    corpus = load_corpus(length=129, max_bytes=300_000)
    assert isinstance(corpus, Corpus)
    assert "standard library" in corpus.name
    assert min(len(t) for t in (*corpus.train, *corpus.val)) >= 129


def test_bad_files_are_told(tmp_path):
    empty, short, odd = (tmp_path / name for name in ("empty.txt", "short.txt", "odd.bin"))
    empty.write_bytes(b"")
    short.write_bytes(b"abc")
    odd.write_bytes(b"abc")
    good = tmp_path / "good.txt"
    good.write_bytes(b"ab" * 500)
    ids = tokens(tmp_path / "ids.bin", [*range(100)] * 5)
    for files, options, message in [
        ([empty], {}, "empty.txt is empty"),
        ([short], {}, r"short\.txt has 3 tokens, a piece needs 9"),
        ([odd], {}, r"odd\.bin has 3 bytes: not a whole number of uint16 tokens"),
        ([good, ids], {}, r"text and \.bin files cannot be mixed"),
        ([good], {"length": 101}, "the text has 100 tokens, a piece needs 101"),
        (
            [ids],
            {"vocab_size": 90},
            r"ids\.bin: token 99 at 99 is beyond the vocabulary of 90; .* at least 100",
        ),
        ([good], {"vocab_size": 98}, "token 98 at 1 is beyond the vocabulary of 98"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_corpus(files, **{"length": 9, **options})
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.txt"):
        load_corpus([tmp_path / "none.txt"], length=9)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_corpus([tmp_path], length=9)


def test_a_bin_file_beyond_the_vocabulary_stops_the_command(tmp_path, capsys):
    ids = tokens(tmp_path / "ids.bin", [300] * 2000)
    error = told(capsys, ["--data", str(ids), "--out", str(tmp_path / "runs"), "--arms", "mla"])
    assert "token 300 at 0 is beyond the vocabulary of 256" in error
    arguments = ["--data", str(ids), "--arms", "mla", "--seeds", "0", "--vocab-size", "301"]
    assert train_ra_mla.main([*arguments, *SHORT, "--out", str(tmp_path / "runs")]) == 0
    end = read_log(tmp_path / "runs" / "mla-fp32-s0")[-1]
    assert end["sample"].startswith("[0, ")
