"""The benchmark of attention alone: what it counts, its gate, what is absent, its rows."""

import json
from contextlib import contextmanager

import pytest
import torch

from bench import peers, record
from ref import reciprocal_attention as ref

FAST = ["--device", "cpu", "--seconds", "0"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_phase_has_a_row_and_peers_that_are_absent_say_why(tmp_path, capsys):
    file = tmp_path / "peers.json"
    assert peers.main([*FAST, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    rows = {(row["phase"], row["provider"]): row for row in document["rows"]}
    assert set(rows) == {(p, n) for p in peers.PHASES for n in ("ra", "ra-sdpa", "sdpa")}
    for (phase, name), row in rows.items():
        assert row["status"] == ("skipped" if name == "ra" else "ok")
        if name != "ra":
            assert row["tflops"] == pytest.approx(peers.CASES["cpu"].flops(phase) / row["ms"] / 1e9)
    for phase in peers.PHASES:
        assert rows[phase, "sdpa"]["ratio"] == 1.0
        assert rows[phase, "ra-sdpa"]["ratio"] == (
            rows[phase, "ra-sdpa"]["ms"] / rows[phase, "sdpa"]["ms"]
        )
    page = record.markdown(record.Record.of([file]))
    assert "## Attention alone beside its peers: backward" in page
    assert page.count("| cpu | 1 | 64 | 4 over 2 | 64 | causal | fp32 |") == len(rows)
    assert "skipped: the Triton kernels are verified here" in capsys.readouterr().out
    assert peers.Peer(lambda case: None, "no_such_package", on_cpu=True).unavailable("cpu") == (
        "no no_such_package: No module named 'no_such_package'"
    )
    there = peers.Peer(lambda case: None, "torch", on_cpu=True, function="flash_attn_func")
    assert there.unavailable("cpu") == "no torch.flash_attn_func"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 0, 3, 100])
def test_flops_count_the_scores_that_the_mask_leaves(causal, window):
    case = peers.Case("", 2, 13, 4, 2, 16, causal, window)

    seen = ref.allowed_keys(13, 13, causal, case.window_size, torch.device("cpu")).sum().item()
    for phase, products in (("forward", 2), ("backward", 5), ("both", 7)):
        assert case.flops(phase) == 2 * products * 2 * 4 * 16 * seen


def test_a_gradient_that_is_wrong_in_the_last_head_gets_no_number(monkeypatch, capsys):
    def wrong(case):
        def attend(q, k, v):
            last = v[:, :, -1:]
            v = torch.cat((v[:, :, :-1], 1.1 * last - 0.1 * last.detach()), 2)
            return peers.PEERS["sdpa"].make(case)(q, k, v)

        return attend

    monkeypatch.setitem(peers.PEERS, "planted", peers.Peer(wrong, "torch", on_cpu=True))
    assert peers.main([*FAST, "--providers", "planted", "sdpa"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("failed the gate") == len(peers.PHASES)
    assert "planted at cpu: failed the gate: dv" in captured.err


def test_a_peer_without_windows_is_skipped(monkeypatch):
    monkeypatch.setitem(peers.CASES, "cpu", peers.Case("cpu", 1, 40, 2, 1, 16, window=7))
    args = peers._parser().parse_args(FAST)
    args.dtype, args.seconds = "fp32", 0.0
    rows = peers.measure_case(peers.CASES["cpu"], ["ra-sdpa", "sdpa"], args, torch.device("cpu"))
    assert {(row.provider, row.status, row.note) for row in rows} == {
        ("ra-sdpa", "ok", ""),
        ("sdpa", "skipped", "has no windows"),
    }


def test_every_forward_runs_in_its_peers_context(monkeypatch):
    """Also the one whose backward alone is timed: outside, PyTorch would choose a backend."""
    inside, outside = [], []

    @contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    def make(case):
        attend = peers.PEERS["sdpa"].make(case)

        def noted(q, k, v):
            if not inside:
                outside.append(q)
            return attend(q, k, v)

        return noted

    peer = peers.Peer(make, "torch", on_cpu=True, context=context)
    monkeypatch.setitem(peers.PEERS, "planted", peer)
    assert peers.main([*FAST, "--providers", "planted"]) == 0
    assert not outside
