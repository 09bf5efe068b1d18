"""Decoding: attention of one new token over a key/value cache, against SDPA and FlexAttention.

    python bench/decode.py
    python bench/decode.py --length 4096 65536 --batch 1 64 --heads 32 8 128 --json decode.json

A decoding step reads the cache once, so its time should be the cache's bytes over the bandwidth of
the memory: each row shows the bytes, the GB/s that they make of its time, and the share of what
copying a large tensor reaches in the same run (its bytes count twice, read and written). Copies of
the cache take turns, so that no call finds its own in L2. ``sdpa`` gets no lengths, as all
sequences are full; ``sdpa-masked`` and ``flex`` get each sequence's length, as ``ra-triton`` does,
which reads it on the device. Every provider passes the gate before it is timed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count as numbers
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.gate import Gate, admit
from bench.harness.options import (
    DTYPES,
    add_machine_options,
    check_outputs,
    check_runnable,
    count,
    parser_of,
    resolve_machine,
)
from bench.harness.providers import NO_TRITON_HERE, Layer
from bench.harness.report import (
    ERROR,
    FAILED_GATE,
    SKIPPED,
    environment,
    header,
    in_blocks,
    number,
    times,
    write_json,
)
from bench.harness.timing import FLUSH_BYTES, Entrant, Timing, measure
from ra_triton import decode_attention
from ref import reciprocal_attention as ref

LENGTHS = {"cuda": (1024, 4096, 16384, 65536), "cpu": (256, 1024)}
BATCHES = {"cuda": (1, 8, 64), "cpu": (1, 4)}
HEADS = {"cuda": (32, 8, 128), "cpu": (12, 12, 64)}  # H, H_kv, D
SECONDS = {"cuda": 1.0, "cpu": 0.3}
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**26}


@dataclass(frozen=True)
class Problem:
    """One new token for each of B sequences that fill their caches.

    Attributes:
        q: ``[B, 1, H, D]``.
        caches: copies of ``(k, v)``, ``[B, length, H_kv, D]`` each; a call takes the next one.
        lengths: ``[B]`` int32, all equal.
    """

    q: Tensor
    caches: tuple[tuple[Tensor, Tensor], ...]
    lengths: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, B: int, length: int, heads: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> "Problem":
        """Random numbers of unit variance; on a GPU so many copies that L2 holds none."""
        H, H_kv, D = heads
        generator = torch.Generator(device).manual_seed(length + B)
        randn = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        k, v = (randn(B, length, H_kv, D) for _ in range(2))
        copies = max(1, FLUSH_BYTES // (2 * k.nbytes)) if device.type == "cuda" else 1
        caches = ((k, v), *((k.clone(), v.clone()) for _ in range(copies - 1)))
        lengths = torch.full((B,), length, dtype=torch.int32, device=device)
        return cls(randn(B, 1, H, D), caches, lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of one cache."""
        return sum(t.nbytes for t in self.caches[0])

    def layer(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Layer:
        """``attend(q, k, v)``, on the next copy of the cache in each call."""
        turn = numbers()

        def forward() -> Tensor:
            return attend(self.q, *self.caches[next(turn) % len(self.caches)])

        return Layer(forward, (self.q,))


def _ra(backend: str, problem: Problem) -> Layer:
    """``decode_attention``; the host knows no length, as in a captured step."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return decode_attention(q, k, v, problem.lengths, backend=backend)

    return problem.layer(attend)


def _sdpa(problem: Problem, masked: bool) -> Layer:
    """SDPA over the whole cache, or with a mask of each sequence's length."""
    length = problem.caches[0][0].shape[1]
    inside = torch.arange(length, device=problem.q.device) < problem.lengths[:, None]
    mask = inside[:, None, None] if masked else None  # [B, 1, 1, length]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)
        return out.transpose(1, 2)

    return problem.layer(attend)


def _flex(problem: Problem) -> Layer:
    """Compiled ``flex_attention`` with a block mask of each sequence's length: Flex decoding."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = problem.lengths
    B, length = problem.caches[0][0].shape[:2]

    def inside(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < lengths[b]

    mask = create_block_mask(inside, B, None, 1, length, device=str(lengths.device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)

    return problem.layer(attend)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """Compiled once for all lengths: compiling for each would take longer than the rest."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


PROVIDERS: dict[str, Callable[[Problem], Layer]] = {
    "ra-triton": partial(_ra, "triton"),
    "ra-sdpa": partial(_ra, "sdpa"),
    "flex": _flex,
    "sdpa-masked": partial(_sdpa, masked=True),
    "sdpa": partial(_sdpa, masked=False),
}
ON_GPU_ALONE = {"ra-triton": NO_TRITON_HERE, "flex": "needs a CUDA device"}


@dataclass
class DecodeRow:
    """One provider on one case. Numbers are None unless ``status`` is ``"ok"``.

    Times are milliseconds; GB/s are the cache's bytes over the time of the graph where there is
    one, else of the eager call; ``share`` is over the bandwidth of a copy.
    """

    B: int
    length: int
    H: int
    H_kv: int
    D: int
    dtype: str
    provider: str
    status: str
    note: str
    cache_mb: float | None = None
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    graph_ms: float | None = None
    graph_ms_p20: float | None = None
    graph_ms_p80: float | None = None
    gbps: float | None = None
    share: float | None = None

    def fill(self, timing: Timing, nbytes: int, copy_gbps: float) -> None:
        """Take over what the clocks say."""
        eager, graph = timing.eager, timing.graph
        self.ms, self.ms_p20, self.ms_p80 = eager.median, eager.p20, eager.p80
        if graph is not None:
            self.graph_ms, self.graph_ms_p20, self.graph_ms_p80 = graph.median, graph.p20, graph.p80
        self.gbps = nbytes / (graph or eager).median / 1e6
        self.share, self.note = self.gbps / copy_gbps, timing.note


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a provider failed the gate or broke."""
    parser = _parser()
    args = parser.parse_args(argv)
    resolve_machine(parser, args)
    check_outputs(parser, {"json": args.json})
    reasons = {name: _unavailable(name, args.device) for name in args.providers or ()}
    check_runnable(parser, "providers", reasons)
    H, H_kv, _ = args.heads = args.heads or HEADS[args.device]
    if H % H_kv:
        parser.error(f"--heads: {H} query heads must be a multiple of {H_kv} key heads")
    args.seconds = SECONDS[args.device] if args.seconds is None else args.seconds
    device = torch.device(args.device)

    env = environment(device)
    copy_gbps = copy_bandwidth(device, args.seconds)
    print(header(env, f"decoding, one token, {args.dtype}", "a copy's bandwidth"))
    print(f"copy bandwidth: {copy_gbps:.0f} GB/s")
    rows: list[DecodeRow] = []
    stopped = False
    try:
        for B in args.batch or BATCHES[args.device]:
            for length in args.length or LENGTHS[args.device]:
                rows += measure_case(B, length, args, device, copy_gbps)
    except KeyboardInterrupt:
        stopped = True
        print("stopped: only the cases below are timed", file=sys.stderr)
    print(f"\n{table(rows)}")
    if args.json:
        write_json(args.json, "decode", env, rows, copy_gbps=copy_gbps)
    bad = [row for row in rows if row.status in (FAILED_GATE, ERROR)]
    for row in bad:
        where = f"{row.provider} at B={row.B} length={row.length}"
        print(f"{where}: {row.status}: {row.note}", file=sys.stderr)
    return 1 if bad or stopped else 0


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """GB/s of copying a large tensor, read and written."""
    source = torch.zeros(COPIED_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    entrant = Entrant("copy", lambda: target.copy_(source), torch.no_grad)
    median = measure([entrant], seconds, device.type == "cuda")["copy"].eager.median
    return 2 * source.nbytes / median / 1e6


@torch.no_grad()
def measure_case(
    B: int, length: int, args: argparse.Namespace, device: torch.device, copy_gbps: float
) -> list[DecodeRow]:
    """Gate and time all providers on one batch and length."""
    H, H_kv, D = args.heads
    sizes = (B, length, H, H_kv, D, args.dtype)
    names = args.providers or list(PROVIDERS)
    try:
        problem = Problem.of(B, length, args.heads, DTYPES[args.dtype], device)
        gate = gate_of(problem)
    except torch.OutOfMemoryError:
        return [DecodeRow(*sizes, name, SKIPPED, "out of memory") for name in names]
    rows, entrants = [], []
    for name in names:
        reason = _unavailable(name, device.type)
        entrant, status, note = None, SKIPPED, reason or ""
        if reason is None:
            make = partial(PROVIDERS[name], problem)
            entrant, status, note = admit(name, make, gate, None, torch.no_grad)
        rows.append(DecodeRow(*sizes, name, status, note, problem.nbytes / 1e6))
        if entrant is not None:
            entrants.append(entrant)
    timings = measure(entrants, args.seconds, device.type == "cuda")
    for row in rows:
        if row.provider in timings:
            row.fill(timings[row.provider], problem.nbytes, copy_gbps)
    return rows


def _unavailable(name: str, device: str) -> str | None:
    """Why a provider cannot run on a device type, or None."""
    return ON_GPU_ALONE.get(name) if device == "cpu" else None


def gate_of(problem: Problem) -> Gate:
    """The exact output by ``ref``, a sequence at a time, and eager PyTorch's error."""
    k, v = problem.caches[0]

    def out(dtype: torch.dtype) -> Tensor:
        each = zip(problem.q, k, v, strict=True)
        return torch.cat(
            [ref.packed_attention(*(t[None].to(dtype) for t in some))[0] for some in each]
        )

    D = problem.q.shape[-1]
    return Gate.between(["out"], [out(torch.float64)], [out(problem.q.dtype)], D)


def table(rows: Sequence[DecodeRow]) -> str:
    """Aligned columns, a blank line between cases."""
    titles = ["provider", "dtype", "B", "length", "H", "H_kv", "D", "cache MB", "ms", ""]
    titles += ["graph ms", "", "GB/s", "share"]
    cells = [
        [
            *(row.provider, row.dtype),
            *map(str, (row.B, row.length, row.H, row.H_kv, row.D)),
            number(row.cache_mb, ".1f"),
            *times(row.ms, row.ms_p20, row.ms_p80, None)[:2],
            *times(row.graph_ms, row.graph_ms_p20, row.graph_ms_p80, None)[:2],
            number(row.gbps, ".1f"),
            number(row.share, ".2f"),
        ]
        for row in rows
    ]
    return in_blocks(titles, cells, rows, lambda row: (row.B, row.length))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("decode.py", __doc__)
    add = parser.add_argument
    add("--length", nargs="+", type=count(1), metavar="N", help="tokens in each cache")
    add("--batch", nargs="+", type=count(1), metavar="B", help="sequences")
    heads = "; ".join(f"{' '.join(map(str, HEADS[where]))} on {where}" for where in HEADS)
    add("--heads", nargs=3, type=count(1), metavar=("H", "H_KV", "D"), help=f"default {heads}")
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=", ".join(PROVIDERS))
    add_machine_options(parser)
    add("--json", type=Path, metavar="FILE", help="write every row")
    return parser


if __name__ == "__main__":
    sys.exit(main())
