"""Workspace: the same memory on every call, its own for every key, refused where backward reads."""

import copy
import pickle
import threading

import pytest
import torch
from strategies import DEVICE

from ra_triton.nn import Workspace

F32, F16 = torch.float32, torch.float16


@pytest.fixture
def allocations(monkeypatch):
    """A list of the sizes that torch.empty is asked for."""
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append(a[0]) or empty(*a, **k))
    return sizes


def test_a_buffer_is_contiguous_and_as_asked():
    t = Workspace().buffer("packed", (2, 3, 4), F16, DEVICE)
    assert (t.shape, t.dtype, t.device.type) == ((2, 3, 4), F16, DEVICE.type)
    assert t.is_contiguous()
    assert not t.requires_grad


def test_calls_that_fit_allocate_nothing(allocations):
    ws = Workspace()
    first = ws.buffer("packed", (4, 5), F32, DEVICE)
    assert len(allocations) == 1
    for shape in ((4, 5), (5, 4), (2, 2), (20,), (), (0, 7)):
        t = ws.buffer("packed", shape, F32, DEVICE)
        assert t.shape == shape
        assert not t.numel() or t.data_ptr() == first.data_ptr()
    assert len(allocations) == 1
    assert ws.nbytes == 20 * 4


def test_a_larger_call_grows_and_leaves_earlier_views_alone(allocations):
    ws = Workspace()
    old = ws.buffer("packed", (4,), F32, DEVICE).fill_(1.0)
    new = ws.buffer("packed", (8,), F32, DEVICE).fill_(2.0)
    assert (old == 1).all()
    assert ws.buffer("packed", (4,), F32, DEVICE).data_ptr() == new.data_ptr()
    assert len(allocations) == 2
    assert ws.nbytes == 8 * 4


def test_names_and_dtypes_do_not_share_memory():
    ws = Workspace()
    keys = [("packed", F32), ("out", F32), ("packed", F16)]
    buffers = [ws.buffer(name, (8,), dtype, DEVICE) for name, dtype in keys]
    assert len({t.data_ptr() for t in buffers}) == len(keys)


def test_threads_do_not_share_memory():
    ws = Workspace()
    mine = ws.buffer("packed", (8,), F32, DEVICE)
    theirs = []
    thread = threading.Thread(target=lambda: theirs.append(ws.buffer("packed", (8,), F32, DEVICE)))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()


def test_memory_from_inference_mode_can_be_written_outside_of_it():
    ws = Workspace()
    with torch.inference_mode():
        inside = ws.buffer("packed", (8,), F32, DEVICE).fill_(1.0)
    outside = ws.buffer("packed", (8,), F32, DEVICE)
    assert outside.data_ptr() == inside.data_ptr()
    outside.fill_(2.0)
    assert not outside.is_inference()


def test_gradients_are_refused():
    ws = Workspace()
    x, W = torch.ones(2), torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="workspace cannot be used while a gradient is needed"):
        ws.refuse_gradients(x, None, W)
    ws.refuse_gradients(x, None)
    with torch.no_grad():
        ws.refuse_gradients(x, W)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda t: pickle.loads(pickle.dumps(t))]
)
def test_copies_start_empty(copied):
    ws = Workspace()
    ws.buffer("packed", (8,), F32, DEVICE)
    assert isinstance(copied(ws), Workspace)
    assert copied(ws).nbytes == 0
    assert ws.nbytes == 32
    ws.clear()
    assert ws.nbytes == 0


def test_negative_sizes_raise():
    with pytest.raises(ValueError, match=r"no negative size, got \(2, -1\)"):
        Workspace().buffer("packed", (2, -1), F32, DEVICE)


@pytest.mark.gpu
def test_streams_do_not_share_memory_and_names_of_one_gpu_do():
    ws = Workspace()
    mine = ws.buffer("packed", (8,), F32, "cuda")
    index = torch.cuda.current_device()
    assert ws.buffer("packed", (8,), F32, f"cuda:{index}").data_ptr() == mine.data_ptr()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert ws.buffer("packed", (8,), F32, "cuda").data_ptr() != mine.data_ptr()


@pytest.mark.gpu
def test_a_captured_graph_keeps_memory_of_its_own():
    ws = Workspace()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ws.buffer("packed", (8,), F32, "cuda").zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = ws.buffer("packed", (8,), F32, "cuda").fill_(1.0)
        result = captured + 1
    with torch.cuda.stream(stream):
        ws.buffer("packed", (1 << 20,), F32, "cuda").fill_(5.0)  # grows: the old storage is freed
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    assert (result == 2).all()
