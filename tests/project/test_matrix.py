"""The matrix of versions: what it tests is what the metadata promise, and a failure is one."""

import re
from pathlib import Path

import matrix
import pytest

ROOT = Path(__file__).parents[2]


def version(text):
    return tuple(map(int, text.split(".")))


@pytest.mark.parametrize(("name", "of_pair"), [("torch", 0), ("triton", 1)])
def test_the_metadata_promise_what_the_matrix_tests(name, of_pair):
    tested = [version(pair.split("+")[of_pair]) for pair in matrix.PAIRS]
    text = (ROOT / "pyproject.toml").read_text()
    least, below = re.search(rf'"{name}>=([\d.]+),<([\d.]+)', text).groups()
    assert version(least) == min(tested)[:2]
    newest = max(tested)
    assert version(below) == (newest[0], newest[1] + 1)  # the next minor version is not tested


def test_the_pinned_pair_is_one_of_them():
    pins = dict(
        re.findall(r"^(torch|triton)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M)
    )
    assert f"{pins['torch']}+{pins['triton']}" in matrix.PAIRS


@pytest.mark.parametrize("failing", [None, "launcher", "sm_90"])
def test_one_failing_step_fails_the_whole(monkeypatch, capsys, tmp_path, failing):
    monkeypatch.setattr(matrix, "environment", lambda pair, folder: Path("python"))
    ran = []

    def run(python, step):
        if step.name == failing:
            ran.append(step)
        return step.name != failing, 0.0

    monkeypatch.setattr(matrix, "run", run)
    assert matrix.main(["--quick", "--pair", "2.11.0+3.6.0", "--pair", "newest"]) == bool(failing)
    out = capsys.readouterr().out
    assert out.count("FAILED") == 2 * len(ran)  # in the course of it and in the table
    assert len(ran) == 2 * bool(failing)
    assert "2.15.0+3.9.0" in out


def test_a_pair_that_cannot_be_installed_fails(monkeypatch, tmp_path):
    def install(*args, **kwargs):
        raise matrix.subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(matrix.subprocess, "run", install)
    assert matrix.main(["--pair", "newest", "--folder", str(tmp_path)]) == 1


def test_a_step_that_exits_with_an_error_has_failed(capsys):
    python = Path(matrix.sys.executable)
    assert matrix.run(python, matrix.Step("fine", ("-c", "print('unseen')")))[0]
    assert not matrix.run(python, matrix.Step("bad", ("-c", "raise SystemExit('seen')")))[0]
    out = capsys.readouterr().out
    assert "seen" in out
    assert "unseen" not in out


def test_an_environment_is_made_once_and_anew_for_other_requirements(monkeypatch, tmp_path):
    commands = []
    (tmp_path / "2.15.0+3.9.0").mkdir()
    monkeypatch.setattr(matrix.subprocess, "run", lambda command, check: commands.append(command))
    for _ in range(2):
        python = matrix.environment("2.15.0+3.9.0", tmp_path)
    assert python == tmp_path / "2.15.0+3.9.0" / "bin" / "python"
    assert [command[2] for command in commands] == ["venv", "pip"]
    assert {"torch==2.15.0", "triton==3.9.0"} < set(commands[1])
    monkeypatch.setitem(matrix.PAIRS, "2.15.0+3.9.0", ["numpy<2"])
    matrix.environment("2.15.0+3.9.0", tmp_path)
    assert len(commands) == 4
