"""Clocks. Entrants take turns (A B C, B C A, ...), so that drift falls on all of them alike.

CPU: ``perf_counter`` around each call, garbage collection off.

CUDA, two modes. *Eager*: events around each call, L2 flushed before it; while the GPU flushes, the
host runs ahead, so this is GPU time plus the launch gaps inside one call. *Graph*: replay of
captured calls back to back, L2 warm, no launch gaps; a kernel that supports dependent launches
also overlaps its launch with the end of the call before. What a call costs the host is reported
beside.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Outputs = Tensor | tuple[Tensor, ...]

MIN_ROUNDS = 5
FLUSH_BYTES = 256 * 2**20  # beyond any L2; also what triton.testing.do_bench writes
GRAPH_MS = 5.0  # length of one captured graph


@dataclass
class Entrant:
    """One call to be timed.

    Attributes:
        name: the provider's.
        call: what is timed; it returns all that it computes.
        context: entered around each run of calls.
        tolerance: how far, in RMS, a graph's replay may be from the eager outputs: one number for
            all of them, or one for each.
    """

    name: str
    call: Callable[[], Outputs]
    context: Callable[[], AbstractContextManager[Any]]
    tolerance: float | tuple[float, ...] = 0.0


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds: median and the percentiles 20 and 80 of ``n`` samples."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Quantiles":
        """Linear interpolation between order statistics."""
        at = torch.tensor(samples, dtype=torch.float64).quantile(
            torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        )
        median, p20, p80 = at.tolist()
        return cls(median, p20, p80, len(samples))


@dataclass(frozen=True)
class Timing:
    """What the clocks say about one entrant."""

    eager: Quantiles
    graph: Quantiles | None = None
    host_us: float | None = None
    peak_mb: float | None = None
    note: str = ""


def measure(entrants: Sequence[Entrant], seconds: float, on_gpu: bool) -> dict[str, Timing]:
    """Time entrants against each other for about ``seconds`` in all."""
    if not entrants:
        return {}
    with without_garbage_collection():
        return _measure_cuda(entrants, seconds) if on_gpu else _measure_cpu(entrants, seconds)


def _measure_cpu(entrants: Sequence[Entrant], seconds: float) -> dict[str, Timing]:
    samples: dict[str, list[float]] = {e.name: [] for e in entrants}
    for entrant in entrants:
        _repeat(entrant, 2)
    deadline = time.perf_counter() + seconds
    for order in turns(entrants):
        for entrant in order:
            with entrant.context():
                start = time.perf_counter()
                entrant.call()
                samples[entrant.name].append((time.perf_counter() - start) * 1e3)
        done = len(samples[entrants[0].name])
        if done >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
    return {name: Timing(Quantiles.of(times)) for name, times in samples.items()}


def _measure_cuda(entrants: Sequence[Entrant], seconds: float) -> dict[str, Timing]:
    budget_ms = seconds * 1e3 / (2 * len(entrants) * MIN_ROUNDS)  # of one turn in one mode
    flush = _flush_buffer()
    facts = {e.name: _facts(e) for e in entrants}
    graphs = {e.name: _capture(e, facts[e.name][0]) for e in entrants}
    eager: dict[str, list[float]] = {e.name: [] for e in entrants}
    graph: dict[str, list[float]] = {e.name: [] for e in entrants}
    for _, order in zip(range(MIN_ROUNDS), turns(entrants), strict=False):
        for entrant in order:
            estimate = facts[entrant.name][0]
            eager[entrant.name] += _time_eager(entrant, max(4, int(budget_ms / estimate)), flush)
        for entrant in order:
            replay, calls, _ = graphs[entrant.name]
            if replay is not None:
                repeats = max(2, int(budget_ms / (facts[entrant.name][0] * calls)))
                graph[entrant.name] += _time_graph(replay, calls, repeats)
    return {
        e.name: Timing(
            eager=Quantiles.of(eager[e.name]),
            graph=Quantiles.of(graph[e.name]) if graph[e.name] else None,
            host_us=facts[e.name][1],
            peak_mb=facts[e.name][2],
            note=graphs[e.name][2],
        )
        for e in entrants
    }


def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def _facts(entrant: Entrant) -> tuple[float, float, float]:
    """Milliseconds per call (an estimate), host microseconds per call, MB that a call allocates."""
    _repeat(entrant, 3)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _repeat(entrant, 1)
    torch.cuda.synchronize()
    peak_mb = (torch.cuda.max_memory_allocated() - before) / 1e6
    calls = 20
    start = time.perf_counter()
    _repeat(entrant, calls)
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    total = time.perf_counter() - start
    return total / calls * 1e3, host / calls * 1e6, peak_mb


def _time_eager(entrant: Entrant, repeats: int, flush: Tensor) -> list[float]:
    starts, ends = _events(repeats), _events(repeats)
    with entrant.context():
        for start, end in zip(starts, ends, strict=True):
            flush.zero_()
            start.record()
            entrant.call()
            end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def _capture(entrant: Entrant, estimate_ms: float) -> tuple[torch.cuda.CUDAGraph | None, int, str]:
    """A graph of several calls; or None and why. The replayed outputs are checked, not trusted."""
    calls = min(50, max(1, round(GRAPH_MS / estimate_ms)))
    graph = torch.cuda.CUDAGraph()
    with entrant.context():
        # Clones: a provider may return the same buffer again.
        expected = [t.clone() for t in _tensors(entrant.call())]
        try:
            # A backward runs on its forward's stream, which has to be the one that is captured.
            with torch.cuda.graph(graph, stream=_side_stream()):
                for _ in range(calls):
                    out = entrant.call()
        except RuntimeError as error:
            return None, 0, f"no graph: {str(error).splitlines()[0]}"
    found = _tensors(out)
    for t in found:
        t.fill_(float("nan"))
    graph.replay()
    same = entrant.tolerance
    tolerances = same if isinstance(same, tuple) else (same,) * len(found)
    for t, eager, tolerance in zip(found, expected, tolerances, strict=True):
        difference = (t.double() - eager.double()).square().mean().sqrt().item()
        if not difference <= tolerance:  # e.g. a launch on a stream that was not captured
            return None, 0, "no graph: replay does not reproduce the eager output"
    return graph, calls, ""


def _side_stream() -> torch.cuda.Stream | None:
    """The current stream; None, a new one, where that is the default one: nobody captures it."""
    stream = torch.cuda.current_stream()
    return None if stream == torch.cuda.default_stream() else stream


def _tensors(outputs: Outputs) -> Sequence[Tensor]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _time_graph(graph: torch.cuda.CUDAGraph, calls: int, repeats: int) -> list[float]:
    graph.replay()
    events = _events(repeats + 1)
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / calls for a, b in pairwise(events)]


def _events(n: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(n)]


def _repeat(entrant: Entrant, calls: int) -> None:
    with entrant.context():
        for _ in range(calls):
            entrant.call()


def turns(entrants: Sequence[T]) -> Iterator[list[T]]:
    """Rotations without end: no entrant always runs first or always after the same other one."""
    order = list(entrants)
    while True:
        yield order
        order = order[1:] + order[:1]


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """No collection runs while something is timed; reference counts still free memory."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
