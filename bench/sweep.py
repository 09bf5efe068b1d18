"""Time reciprocal attention against plain attention, forward, on this machine.

    python bench/sweep.py                                  # the default sweep for this device
    python bench/sweep.py --quick
    python bench/sweep.py --shape gpt2 --R 0 4 8 --T 512 1024 --json sweep.json --plot sweep.png
    python bench/sweep.py --list                           # shapes and providers

Every case is computed, compared with the FP64 reference and warmed before any is timed. A provider
whose numbers are wrong gets no time, and the exit status says so.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gate import Gate
from bench.providers import NO_TRITON_HERE, PROVIDERS, Problem, available, make_problem
from bench.report import (
    ERROR,
    FAILED_GATE,
    OK,
    SKIPPED,
    Row,
    add_ratios,
    environment,
    header,
    summary,
    table,
    write_csv,
    write_json,
)
from bench.shapes import SHAPES, STAGES, Case, chosen_cases, default_cases
from bench.timing import Entrant, measure

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CPU_PROVIDERS = ("ra-sdpa", "plain-sdpa")
SECONDS = {"cpu": 6.0, "cuda": 3.0}  # of timing per case
QUICK_SECONDS = {"cpu": 3.0, "cuda": 1.0}
NO_SDPA_KERNEL = ("No available kernel", "No viable backend")  # what PyTorch says, by device
BENCH_EXTRA = "python -m pip install -e '.[bench]'"


@dataclass
class Prepared:
    """A case after its gate: rows for all its providers, entrants for those that passed."""

    case: Case
    rows: list[Row]
    entrants: list[Entrant]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a provider failed the gate or broke."""
    parser = _parser()
    args = _parse(parser, argv)
    if args.list:
        print(_listing(args.device))
        return 0
    device = torch.device(args.device)
    try:
        cases = _cases(args)
    except ValueError as error:
        parser.error(str(error))
    _check_outputs(parser, args)

    env = environment(device)
    print(header(env, args.stage, args.dtype))
    if device.type == "cpu":
        print(f"No GPU in this run: {NO_TRITON_HERE}.")
    rows = _run(cases, args, device)
    print(f"\n{table(rows)}\n\n{summary(rows)}".rstrip())
    if args.json:
        write_json(args.json, env, rows)
    if args.csv:
        write_csv(args.csv, env, rows)
    if args.plot:
        from bench.plot import plot

        plot(args.plot, header(env, args.stage, args.dtype), rows)
    bad = [row for row in rows if row.status in (FAILED_GATE, ERROR)]
    for row in bad:
        print(f"{row.provider} at T={row.T} R={row.R}: {row.status}: {row.note}", file=sys.stderr)
    return 1 if bad else 0


def _run(cases: Sequence[Case], args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Prepare all cases, then time all cases."""
    from tqdm import tqdm

    prepared = []
    with torch.no_grad(), tqdm(total=2 * len(cases), disable=None, leave=False) as bar:
        for case in cases:
            bar.set_description(f"gate {case.shape.name} T={case.shape.T} R={case.R}")
            prepared.append(_prepare(case, args.stage, args.dtype, device))
            bar.update()
        for p in prepared:
            bar.set_description(f"time {p.case.shape.name} T={p.case.shape.T} R={p.case.R}")
            timings = measure(p.entrants, args.seconds, device.type == "cuda")
            for row in p.rows:
                if row.provider in timings:
                    row.fill(timings[row.provider], p.case)
            add_ratios(p.rows)
            bar.update()
    return [row for p in prepared for row in p.rows]


def _prepare(case: Case, stage: str, dtype: str, device: torch.device) -> Prepared:
    """Run every provider once: those that pass the gate are warm, the others get their reason."""
    problem = make_problem(case.shape, case.R, stage, DTYPES[dtype], device)
    gate = Gate.of(problem)
    rows, entrants = [], []
    for name in case.providers:
        provider = PROVIDERS[name]
        entrant, status, note = _admit(name, problem, gate)
        rows.append(Row.of(case, stage, dtype, name, provider.plain, status, note))
        if entrant is not None:
            entrants.append(entrant)
    return Prepared(case, rows, entrants)


def _admit(name: str, problem: Problem, gate: Gate) -> tuple[Entrant | None, str, str]:
    """``(entrant, "ok", "")``, or ``(None, status, why not)``."""
    provider = PROVIDERS[name]
    reason = provider.unavailable(problem.x.device.type)
    if reason is not None:
        return None, SKIPPED, reason
    try:
        with provider.context():
            call = provider.make(problem)
            # What the allocator hands out next is NaN: an element that is not written shows.
            torch.full_like(problem.x, float("nan"))
            failure = gate.failure(call())
    except torch.OutOfMemoryError:
        return None, SKIPPED, "out of memory"
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        if any(text in message for text in NO_SDPA_KERNEL):
            return None, SKIPPED, "no such SDPA kernel for this dtype, shape and GPU"
        return None, ERROR, f"{type(error).__name__}: {message}"
    if failure is not None:
        return None, FAILED_GATE, failure
    # Two outputs that both pass the gate differ by at most twice its limit.
    return Entrant(name, call, provider.context, tolerance=2 * gate.rms), OK, ""


def _cases(args: argparse.Namespace) -> list[Case]:
    """The user's combinations, or the default sweep if no size was named."""
    on_gpu = args.device == "cuda"
    here = available(args.device) if on_gpu else list(CPU_PROVIDERS)
    if not any((args.shape, args.T, args.D, args.R)):
        everyday = args.providers or [name for name in here if not PROVIDERS[name].compiled]
        compiled = [] if args.providers else [name for name in here if PROVIDERS[name].compiled]
        return default_cases(on_gpu, args.quick, everyday, compiled)
    shapes = args.shape or ["gpt2" if on_gpu else "cpu"]
    return chosen_cases(shapes, args.T, args.D, args.R or [4], args.providers or here)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES, metavar="NAME", help=", ".join(SHAPES))
    add("--R", nargs="+", type=_count(0), metavar="N", help="reciprocal ranks (default 4)")
    add("--T", nargs="+", type=_count(1), metavar="N", help="lengths; B*T of the shape is kept")
    add("--D", nargs="+", type=_count(1), metavar="N", help="head dims; the width C is kept")
    add("--dtype", choices=DTYPES, help="default bf16 on a GPU, fp32 on a CPU")
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=", ".join(PROVIDERS))
    add("--stage", choices=STAGES, default="op", help="projection and attention, or attention")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--seconds", type=_seconds, metavar="S", help="timing per case")
    add("--quick", action="store_true", help="fewer cases, shorter timing")
    add("--json", type=Path, metavar="FILE", help="write every row")
    add("--csv", type=Path, metavar="FILE", help="write every row")
    add("--plot", type=Path, metavar="FILE", help="draw time and TFLOP/s over T and R")
    add("--list", action="store_true", help="print shapes and providers, run nothing")
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and fill in what depends on the device."""
    args = parser.parse_args(argv)
    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        parser.error("--device cuda: PyTorch sees no CUDA device here; available: cpu")
    args.device = args.device or ("cuda" if has_cuda else "cpu")
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    defaults = QUICK_SECONDS if args.quick else SECONDS
    args.seconds = defaults[args.device] if args.seconds is None else args.seconds
    return args


def _count(least: int) -> Any:
    """An argparse type: an int of at least ``least``."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text!r}")
        return int(text)

    return count


def _seconds(text: str) -> float:
    """An argparse type: a finite float of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text!r}")
    return value


def _check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Missing packages and folders are told before minutes of timing, not after."""
    needed = ["tqdm", "matplotlib"] if args.plot else ["tqdm"]
    for package in needed:
        try:
            __import__(package)
        except ImportError:
            parser.error(f"{package} is not installed: {BENCH_EXTRA}")
    for option in ("json", "csv", "plot"):
        path = getattr(args, option)
        if path is not None and not path.parent.is_dir():
            parser.error(f"--{option}: no such folder: {path.parent}")


def _listing(device: str) -> str:
    lines = ["shapes (B, T, H, D, C):"]
    lines += [f"  {s.name:16} {s.B}, {s.T}, {s.H}, {s.D}, {s.C}" for s in SHAPES.values()]
    lines.append(f"providers on {device}:")
    for name, provider in PROVIDERS.items():
        lines.append(f"  {name:16} {provider.unavailable(device) or 'runs here'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
