"""What a call costs the host: CPU microseconds of ``ra_attention`` beside a plain SDPA layer.

    python bench/host.py
    python bench/host.py --shape call gpt2 --providers ra-triton plain-sdpa --json host.json

Three kinds of call: ``forward`` without gradients, ``recorded`` for a backward that is not run, and
``train``, forward and backward. On a GPU the clock stops when the work is enqueued, and bursts are
too short to fill the launch queue, so the GPU's own time is not in the numbers. On a CPU there is
no such moment: there, the shape ``call`` has so little to compute that the cost of calling is what
is left. Every call passes the gate before it is timed; providers take turns.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gate import Gate, admit
from bench.options import (
    DTYPES,
    add_machine_options,
    check_outputs,
    check_runnable,
    count,
    parser_of,
    resolve_machine,
)
from bench.providers import PROVIDERS, make_problem
from bench.report import (
    ERROR,
    FAILED_GATE,
    aligned,
    environment,
    header,
    number,
    remark,
    times,
    write_json,
)
from bench.shapes import SHAPES, Shape
from bench.timing import Entrant, Quantiles, turns, without_garbage_collection

KINDS = {"forward": "forward", "recorded": "train", "train": "train"}  # and the problem's phase
CALLS = 10  # of a burst: at most some 20 launches each, where a CUDA queue holds 1,000
MIN_BURSTS = 20
SECONDS = 3.0  # per shape and kind
GPU_PROVIDERS = ("ra-triton", "ra-sdpa", "plain-sdpa")
CPU_PROVIDERS = ("ra-sdpa", "plain-sdpa")


@dataclass
class HostRow:
    """One provider, shape and kind of call. Numbers are None unless ``status`` is ``"ok"``.

    Times are CPU microseconds per call; ``extra_us`` is the difference to plain attention.
    """

    shape: str
    B: int
    T: int
    C: int
    H: int
    D: int
    R: int
    dtype: str
    provider: str
    plain: bool
    kind: str
    status: str
    note: str
    us: float | None = None
    us_p20: float | None = None
    us_p80: float | None = None
    bursts: int | None = None
    extra_us: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a provider failed the gate or broke."""
    parser = _parser()
    args = parser.parse_args(argv)
    resolve_machine(parser, args)
    on_gpu = args.device == "cuda"
    check_outputs(parser, {"json": args.json})
    named = args.providers or ()
    reasons = {name: PROVIDERS[name].reason_to_skip(args.device, "op") for name in named}
    check_runnable(parser, "providers", reasons)
    shapes = [SHAPES[name] for name in args.shape or (["call", "gpt2"] if on_gpu else ["call"])]
    for shape in shapes:
        if args.R > shape.D:
            parser.error(f"R = {args.R} exceeds the head dim {shape.D} of {shape.name}")
    args.providers = args.providers or list(GPU_PROVIDERS if on_gpu else CPU_PROVIDERS)
    args.seconds = SECONDS if args.seconds is None else args.seconds

    env = environment(torch.device(args.device))
    print(header(env, f"CPU us of a call, {args.dtype}", "plain attention"))
    if not on_gpu:
        print("No GPU in this run: a call's own arithmetic is in these numbers.")
    rows = [row for shape in shapes for kind in KINDS for row in measure_kind(shape, kind, args)]
    print(f"\n{table(rows)}")
    if args.json:
        write_json(args.json, "host", env, rows)
    bad = [row for row in rows if row.status in (FAILED_GATE, ERROR)]
    for row in bad:
        print(f"{row.provider}, {row.kind}: {row.status}: {row.note}", file=sys.stderr)
    return 1 if bad else 0


def measure_kind(shape: Shape, kind: str, args: argparse.Namespace) -> list[HostRow]:
    """Gate and time all providers on one shape with one kind of call."""
    device = torch.device(args.device)
    with torch.set_grad_enabled(kind != "forward"):
        rows, entrants = _prepare(shape, kind, args, device)
        bursts = _measure(entrants, args.seconds, device.type == "cuda")
    for row in rows:
        if row.provider in bursts:
            found = bursts[row.provider]
            row.us, row.us_p20, row.us_p80 = found.median, found.p20, found.p80
            row.bursts = found.n
    plain = [row.us for row in rows if row.plain and row.us is not None]
    for row in rows:
        if plain and row.us is not None:
            row.extra_us = row.us - min(plain)
    return rows


def _prepare(
    shape: Shape, kind: str, args: argparse.Namespace, device: torch.device
) -> tuple[list[HostRow], list[Entrant]]:
    """Rows of all providers, entrants for those that pass the gate (and so are warm)."""
    problem = make_problem(shape, args.R, "op", DTYPES[args.dtype], device, KINDS[kind])
    gate = Gate.of(problem)
    sizes = (shape.name, shape.B, shape.T, shape.C, shape.H, shape.D, args.R)
    rows, entrants = [], []
    for name in args.providers:
        provider = PROVIDERS[name]
        make = partial(provider.make, problem)
        entrant, status, note = admit(name, make, gate, problem.dout, provider.context)
        rows.append(HostRow(*sizes, args.dtype, name, provider.plain, kind, status, note))
        if entrant is not None:
            if kind == "recorded":
                entrant.call = provider.make(problem).forward
            entrants.append(entrant)
    return rows, entrants


def _measure(entrants: Sequence[Entrant], seconds: float, on_gpu: bool) -> dict[str, Quantiles]:
    """Microseconds per call, by provider."""
    if not entrants:
        return {}
    synchronize: Callable[[], Any] = torch.cuda.synchronize if on_gpu else _nothing
    samples: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for entrant in entrants:
        _burst(entrant, synchronize)
    deadline = time.perf_counter() + seconds
    with without_garbage_collection():
        for done, order in enumerate(turns(entrants)):
            if done >= MIN_BURSTS and time.perf_counter() > deadline:
                break
            for entrant in order:
                samples[entrant.name].append(_burst(entrant, synchronize))
    return {name: Quantiles.of(us) for name, us in samples.items()}


def _burst(entrant: Entrant, synchronize: Callable[[], Any]) -> float:
    """Microseconds per call of one burst, from an idle GPU until all of it is enqueued."""
    with entrant.context():
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            entrant.call()
        elapsed = time.perf_counter() - start
        synchronize()
    return elapsed / CALLS * 1e6


def _nothing() -> None:
    """A CPU has nothing to wait for."""


def table(rows: Sequence[HostRow]) -> str:
    """Aligned columns, a blank line between kinds."""
    titles = ["shape", "kind", "provider", "us", "", "vs plain", "us more"]
    cells = [
        [
            row.shape,
            row.kind,
            row.provider,
            *times(row.us, row.us_p20, row.us_p80, _ratio(row), ".1f"),
            number(row.extra_us, "+.1f"),
        ]
        for row in rows
    ]
    title, *body = aligned([titles, *cells], text_columns=3)
    lines = [title]
    for i, row in enumerate(rows):
        if i and (row.shape, row.kind) != (rows[i - 1].shape, rows[i - 1].kind):
            lines.append("")
        lines.append(f"{body[i]}  {remark(row.status, row.note)}".rstrip())
    return "\n".join(lines)


def _ratio(row: HostRow) -> float | None:
    if row.us is None or row.extra_us is None:
        return None
    return row.us / (row.us - row.extra_us)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("host.py", __doc__)
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES, metavar="NAME", help=", ".join(SHAPES))
    add("--R", type=count(0), default=4, metavar="N", help="reciprocal rank (default 4)")
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=", ".join(PROVIDERS))
    add_machine_options(parser)
    add("--json", type=Path, metavar="FILE", help="write every row")
    return parser


if __name__ == "__main__":
    sys.exit(main())
