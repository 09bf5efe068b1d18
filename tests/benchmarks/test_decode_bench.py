"""The decoding benchmark: what its figures are of, its gate, its errors, its page."""

import json

import pytest
import torch

from bench import decode, record

FAST = ["--device", "cpu", "--seconds", "0", "--heads", "4", "2", "16", "--batch", "2"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(decode.COPIED_BYTES, "cpu", 2**12)
    yield
    torch.set_num_threads(threads)


def test_rows_hold_bytes_bandwidth_and_share_and_make_a_page(tmp_path, capsys):
    file = tmp_path / "decode.json"
    assert decode.main([*FAST, "--length", "8", "33", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    rows = document["rows"]
    assert [(row["length"], row["provider"]) for row in rows] == [
        (length, name) for length in (8, 33) for name in decode.PROVIDERS
    ]
    for row in rows:
        assert row["cache_mb"] * 1e6 == 2 * 2 * row["length"] * 2 * 16 * 4
        if row["provider"] in decode.ON_GPU_ALONE:
            assert row["status"] == "skipped"
            continue
        assert row["gbps"] == pytest.approx(row["cache_mb"] / row["ms"])
        assert row["share"] == pytest.approx(row["gbps"] / document["copy_gbps"])
    assert "cache MB" in capsys.readouterr().out
    page = record.markdown(record.Record.of([file]))
    assert "## Decoding: one token over a cache" in page
    assert page.count("| 33 | 4 over 2 | 16 | fp32 |") == len(decode.PROVIDERS)
    assert "skipped: needs a CUDA device" in page


def test_every_call_reads_the_next_copy_of_the_cache():
    problem = decode.Problem.of(2, 8, (4, 2, 16), torch.float32, torch.device("cpu"))
    copies = tuple((k + i, v) for i, (k, v) in enumerate(problem.caches * 3))
    seen = []
    layer = decode.Problem(problem.q, copies, problem.lengths).layer(
        lambda q, k, v: seen.append(k) or v
    )
    for _ in range(4):
        layer.forward()
    assert [id(k) for k in seen] == [id(copies[i][0]) for i in (0, 1, 2, 0)]


def test_a_wrong_provider_gets_no_number(monkeypatch, capsys):
    def wrong(problem):
        return problem.layer(lambda q, k, v: torch.zeros_like(q))

    monkeypatch.setitem(decode.PROVIDERS, "planted", wrong)
    assert decode.main([*FAST, "--length", "8", "--providers", "planted", "sdpa"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("failed the gate") == 1
    assert "planted at B=2 length=8: failed the gate" in captured.err


def test_an_interrupt_keeps_what_is_timed(monkeypatch, tmp_path, capsys):
    measure_case = decode.measure_case

    def interrupted(B, length, *args):
        if length > 8:
            raise KeyboardInterrupt
        return measure_case(B, length, *args)

    monkeypatch.setattr(decode, "measure_case", interrupted)
    file = tmp_path / "decode.json"
    assert decode.main([*FAST, "--length", "8", "16", "--json", str(file)]) == 1
    assert {row["length"] for row in json.loads(file.read_text())["rows"]} == {8}
    assert "stopped" in capsys.readouterr().err


def test_a_provider_without_a_gpu_is_an_error_at_once(monkeypatch, capsys):
    monkeypatch.setattr(decode, "measure", None)
    with pytest.raises(SystemExit) as stop:
        decode.main([*FAST, "--providers", "sdpa", "flex"])
    assert stop.value.code == 2
    assert "--providers flex: needs a CUDA device" in capsys.readouterr().err


def test_heads_that_do_not_group_are_told(capsys):
    with pytest.raises(SystemExit):
        decode.main([*FAST, "--heads", "5", "2", "16"])
    assert "5 query heads must be a multiple of 2 key heads" in capsys.readouterr().err
