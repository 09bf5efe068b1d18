"""``bench/tune.py`` without a GPU: candidates, the gate before the clock, what it prints."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from gluon_interpreter import interpreted
from strategies import DEVICE

from bench import tune
from ra_triton.launch.configs import LaunchConfig
from ra_triton.launch.configs import row as table_row

SMALL = {"block_k": 16, "block_n": 16}
ROOT = Path(__file__).parents[2]


def problem(stage, dtype="fp16"):
    return tune.Problem(stage, dtype, D=16, T=1024, B=1, H=2)


@pytest.mark.parametrize("stage", tune.CANDIDATES)
def test_candidates_are_distinct_and_include_several_tiles(stage):
    candidates = tune.CANDIDATES[stage]()
    assert len(set(candidates)) == len(candidates) > 10
    assert len({(c.block_m, c.block_n) for c in candidates}) > 2


FORWARD = """
from bench import tune
from dataclasses import replace
problem = tune.Problem("attention_forward", "bf16", D=64, T=1024, B=1, H=2)
for config in tune.warp_specialised_candidates():
    config = replace(config, use_tma=True, pdl=True)
    reason = tune.compile_candidate(("sm_90", problem, config))
    print((config.groups, config.block_n, config.num_stages), reason, sep=": ")
"""
BACKWARD = """
from bench import tune
from dataclasses import replace
for D in (64, 128):
    problem = tune.Problem("attention_backward", "bf16", D=D, T=1024, B=1, H=2)
    shipped = tune.shipped_for(problem, "sm_90")
    for config in tune.one_pass_candidates():
        config = replace(config, use_tma=True, pdl=True)
        reason = tune.compile_candidate(("sm_90", problem, config))
        print((D, config == shipped), reason, sep=": ")
"""


def printed(code):
    """By a process where kernels are not interpreted, split at the first colon of a line."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [tuple(line.split(": ", 1)) for line in run.stdout.splitlines()]


@pytest.mark.slow
def test_candidates_for_hoppers_own_forward_compile_or_say_why_not():
    found = dict(printed(FORWARD))
    assert len(found) == 8
    assert "does not compile" in found["(3, 64, 2)"]  # the copies would wait for a warpgroup
    assert found["(3, 64, 3)"] == found["(2, 128, 3)"] == found["(3, 128, 2)"] == "None"


@pytest.mark.slow
def test_of_the_candidates_for_hoppers_own_backward_the_shipped_ones_compile():
    found = printed(BACKWARD)
    assert [reason for key, reason in found if "True" in key] == ["None"] * 2
    others = [(key, reason) for key, reason in found if "False" in key]
    assert len(others) == 2 * 15
    for key, reason in others:
        D = key[1:].split(",")[0]
        assert f"does not compile: ValueError: Hopper's backward of heads of {D} has" in reason


@pytest.mark.parametrize(
    ("target", "changed", "there"),
    [
        *(("sm_90", {}, True), ("sm_90", {"dtype": "fp16", "D": 128}, True)),
        *(("sm_80", {}, True), ("sm_89", {"D": 128}, True), ("sm_120", {"dtype": "fp16"}, True)),
        *(("sm_86", {}, False), ("sm_100", {}, False), ("interpreter", {}, False)),
        *(("sm_90", {"dtype": "fp32"}, False), ("sm_90", {"D": 96}, False)),
        ("sm_90", {"T": 255}, False),
    ],
)
def test_where_a_backward_of_one_pass_is_not_there_is_nothing_to_tune(target, changed, there):
    of = replace(tune.Problem("attention_backward", "bf16", D=64, T=1024, B=1), **changed)
    shipped = tune.shipped_for(of, target)
    assert (shipped is not None) == there
    candidates = [replace(c, use_tma=True, pdl=True) for c in tune.one_pass_candidates()]
    candidates += [replace(c, one_pass=True) for c in tune.gradient_candidates()]
    assert not there or shipped in candidates


@pytest.mark.parametrize(("target", "lengths"), [("sm_86", []), ("sm_90", [1024])])
def test_without_the_kernel_the_reason_is_printed_and_the_rest_is_tuned(
    target, lengths, monkeypatch, capsys, tmp_path
):
    """By the command line; with a kernel only for the longer of two lengths, and with none."""
    tuned = []

    def tune_it(problem, shipped, budget, workers):
        tuned.append((problem.stage, problem.T))
        return []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "environment", lambda device: {"device": "another GPU"})
    monkeypatch.setattr(tune, "target_of", lambda device: target)
    monkeypatch.setattr(tune, "tune", tune_it)
    file = tmp_path / "tune.json"
    stages = ["--stage", "attention_backward", "query_gradient"]
    assert tune.main([*stages, "--D", "64", "--T", "128", "1024", "--json", str(file)]) == 0
    assert [T for stage, T in tuned if stage == "attention_backward"] == lengths
    assert [T for stage, T in tuned if stage == "query_gradient"] == [128, 1024]
    expected = "no such kernel: it is for sm_80, sm_89, sm_90 and sm_120, 16 bits"
    assert capsys.readouterr().out.count(expected) == 2 - len(lengths)
    assert json.loads(file.read_text())["rows"] == []


@pytest.fixture
def short(monkeypatch):
    """A check that takes Triton's interpreter a second."""
    monkeypatch.setattr(tune.Problem, "small", lambda p: replace(p, T=70, B=2, H=2))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("stage", tune.CANDIDATES)
def test_a_right_candidate_passes_the_gate(stage):
    config = LaunchConfig(32, 4, **SMALL)
    assert tune.failure(problem(stage), config, torch.device(DEVICE)) is None


def of_hopper(D):
    """A problem of Hopper's backward, its shipped config, and what runs it here."""
    of = replace(problem("attention_backward"), D=D)
    shipped = tune.shipped_for(of, "sm_90")
    return of, shipped, nullcontext() if DEVICE.type == "cuda" else interpreted()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("D", [64, 128])
def test_hoppers_own_backward_passes_the_gate(D):
    of, shipped, run = of_hopper(D)
    with run:
        assert tune.failure(of, shipped, torch.device(DEVICE)) is None


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("which", range(3))
def test_hoppers_own_backward_is_gated_by_each_of_its_gradients(which, monkeypatch):
    of, shipped, run = of_hopper(64)
    right = tune.launcher

    def launcher(*args):
        launch, exact = right(*args)

        def wrong(config):
            results = list(launch(config))
            assert len(results) == 3
            results[which] = results[which].roll(1, 1)
            return results

        return wrong, exact

    monkeypatch.setattr(tune, "launcher", launcher)
    with run:
        assert "eager PyTorch's is" in tune.failure(of, shipped, torch.device(DEVICE))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("stage", tune.CANDIDATES)
def test_a_wrong_candidate_does_not(stage, monkeypatch):
    right = tune.launcher

    def launcher(*args):
        launch, exact = right(*args)

        def wrong(config):
            results = [t.clone() for t in launch(config)]
            results[0].view(-1)[-1] += 1.0  # one element
            return results

        return wrong, exact

    monkeypatch.setattr(tune, "launcher", launcher)
    reason = tune.failure(problem(stage), LaunchConfig(32, 4, **SMALL), torch.device(DEVICE))
    assert "eager PyTorch's is" in reason


@pytest.mark.slow
def test_a_candidate_that_spills_or_does_not_compile_is_dropped_with_the_reason():
    code = """
from bench.tune import Problem, compile_candidate
from ra_triton.launch.configs import LaunchConfig
p = Problem("attention_forward", "bf16", 64, 1024, 1)
for config in (
    LaunchConfig(128, 4, 3, block_n=64),
    LaunchConfig(256, 4, 2, block_n=128),
    LaunchConfig(100, 4, 2, block_n=64),
):
    print(compile_candidate(("sm_80", p, config)))
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    good, spilling, broken = run.stdout.splitlines()
    assert good == "None"
    assert spilling.startswith("spills ")
    assert broken.startswith("does not compile: ")


@pytest.mark.parametrize("use_tma", [True, False])
def test_a_row_is_python_for_the_table_with_its_measurement(use_tma):
    config = LaunchConfig(128, 4, 3, block_n=64, use_tma=use_tma)
    row = {
        "problem": asdict(problem("attention_forward")),
        "config": asdict(replace(config, pdl=use_tma)),
        "shipped": True,
        "dropped": None,
        "ms": 0.1,
        "p20": 0.09,
        "p80": 0.12,
        "tflops": 300.0,
    }
    line = tune.describe(row, "GPU")
    assert eval(line, {"row": table_row}).config == config
    assert line.endswith("# GPU: 100.0 us (90.0..120.0), 300 TFLOP/s, shipped")
    assert "dropped: spills" in tune.describe({**row, "dropped": "spills 8 bytes"}, "GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would tune")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "no CUDA device" in capsys.readouterr().err
