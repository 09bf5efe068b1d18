"""Time reciprocal attention against plain attention on this machine, forward or a training step.

    python bench/sweep.py                                  # the default sweep for this device
    python bench/sweep.py --quick
    python bench/sweep.py --pass train                     # forward + backward
    python bench/sweep.py --shape gpt2 --R 0 4 8 --T 512 1024 --json sweep.json --plot sweep.png
    python bench/sweep.py --list                           # shapes and providers

Every case is computed, compared with the FP64 reference and warmed before any is timed. A provider
whose numbers are wrong gets no time, and the exit status says so.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

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
from bench.harness.providers import NO_TRITON_HERE, PROVIDERS, available, make_problem
from bench.harness.report import (
    ERROR,
    FAILED_GATE,
    Row,
    add_ratios,
    environment,
    header,
    subject,
    summary,
    table,
    write_csv,
    write_json,
)
from bench.harness.shapes import PHASES, SHAPES, STAGES, Case, chosen_cases, default_cases
from bench.harness.timing import Entrant, measure

CPU_PROVIDERS = ("ra-sdpa", "plain-sdpa")
SECONDS = {"cpu": 6.0, "cuda": 3.0}  # of timing per case
QUICK_SECONDS = {"cpu": 3.0, "cuda": 1.0}


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
    check_outputs(parser, {"json": args.json, "csv": args.csv, "plot": args.plot}, "tqdm")
    named = args.providers or ()
    reasons = {name: PROVIDERS[name].reason_to_skip(args.device, args.stage) for name in named}
    check_runnable(parser, "providers", reasons)

    env = environment(device)
    title = header(env, subject(args.stage, args.phase, args.dtype))
    print(title)
    if device.type == "cpu":
        print(f"No GPU in this run: {NO_TRITON_HERE}.")
    rows, stopped = _run(cases, args, device)
    print(f"\n{table(rows)}\n\n{summary(rows)}".rstrip())
    if stopped:
        print("stopped: only the cases above are timed", file=sys.stderr)
    if args.json:
        write_json(args.json, "sweep", env, rows)
    if args.csv:
        write_csv(args.csv, env, rows)
    if args.plot:
        from bench.harness.plot import plot

        plot(args.plot, title, rows)
    if device.type == "cpu":
        print("\n`make gpu` times the Triton kernels, on a machine with a GPU.")
    bad = [row for row in rows if row.status in (FAILED_GATE, ERROR)]
    for row in bad:
        print(f"{row.provider} at T={row.T} R={row.R}: {row.status}: {row.note}", file=sys.stderr)
    return 1 if bad or stopped else 0


def _run(
    cases: Sequence[Case], args: argparse.Namespace, device: torch.device
) -> tuple[list[Row], bool]:
    """Prepare all cases, then time all cases; ``True`` if an interrupt left some untimed."""
    from tqdm import tqdm

    prepared = []
    rows: list[Row] = []
    recording = torch.set_grad_enabled(args.phase == "train")
    with recording, tqdm(total=2 * len(cases), disable=None, leave=False) as bar:
        for case in cases:
            bar.set_description(f"gate {case.shape.name} T={case.shape.T} R={case.R}")
            prepared.append(_prepare(case, args, device))
            bar.update()
        for p in prepared:
            bar.set_description(f"time {p.case.shape.name} T={p.case.shape.T} R={p.case.R}")
            try:
                timings = measure(p.entrants, args.seconds, device.type == "cuda")
            except KeyboardInterrupt:
                return rows, True
            for row in p.rows:
                if row.provider in timings:
                    row.fill(timings[row.provider], p.case)
            add_ratios(p.rows)
            rows += p.rows
            bar.update()
    return rows, False


def _prepare(case: Case, args: argparse.Namespace, device: torch.device) -> Prepared:
    """Run every provider once: those that pass the gate are warm, the others get their reason."""
    stage, phase, dtype = args.stage, args.phase, args.dtype
    problem = make_problem(case.shape, case.R, stage, DTYPES[dtype], device, phase)
    gate = Gate.of(problem)
    rows, entrants = [], []
    for name in case.providers:
        provider = PROVIDERS[name]
        make = partial(provider.make, problem)
        entrant, status, note = admit(name, make, gate, problem.dout, provider.context)
        rows.append(Row.of(case, stage, phase, dtype, name, provider.plain, status, note))
        if entrant is not None:
            entrants.append(entrant)
    return Prepared(case, rows, entrants)


def _cases(args: argparse.Namespace) -> list[Case]:
    """The user's combinations, or the default sweep if no size was named."""
    on_gpu = args.device == "cuda"
    here = available(args.device, args.stage) if on_gpu else list(CPU_PROVIDERS)
    if not any((args.shape, args.T, args.D, args.R)):
        everyday = args.providers or [name for name in here if not PROVIDERS[name].compiled]
        compiled = [] if args.providers else [name for name in here if PROVIDERS[name].compiled]
        return default_cases(on_gpu, args.quick, everyday, compiled)
    shapes = args.shape or ["gpt2" if on_gpu else "cpu"]
    return chosen_cases(shapes, args.T, args.D, args.R or [4], args.providers or here)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("sweep.py", __doc__)
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES, metavar="NAME", help=", ".join(SHAPES))
    add("--R", nargs="+", type=count(0), metavar="N", help="reciprocal ranks (default 4)")
    add("--T", nargs="+", type=count(1), metavar="N", help="lengths; B*T of the shape is kept")
    add("--D", nargs="+", type=count(1), metavar="N", help="head dims; the width C is kept")
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=", ".join(PROVIDERS))
    add("--stage", choices=STAGES, default="op", help="projection and attention, or attention")
    add("--pass", dest="phase", choices=PHASES, default="forward", help="train: with backward")
    add_machine_options(parser)
    add("--quick", action="store_true", help="fewer cases, shorter timing")
    add("--json", type=Path, metavar="FILE", help="write every row")
    add("--csv", type=Path, metavar="FILE", help="write every row")
    add("--plot", type=Path, metavar="FILE", help="draw time and TFLOP/s over T and R")
    add("--list", action="store_true", help="print shapes and providers, run nothing")
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and fill in what depends on the device."""
    args = parser.parse_args(argv)
    resolve_machine(parser, args)
    defaults = QUICK_SECONDS if args.quick else SECONDS
    args.seconds = defaults[args.device] if args.seconds is None else args.seconds
    return args


def _listing(device: str) -> str:
    lines = ["shapes (B, T, H, D, C):"]
    lines += [f"  {s.name:16} {s.B}, {s.T}, {s.H}, {s.D}, {s.C}" for s in SHAPES.values()]
    lines.append(f"providers on {device}:")
    for name, provider in PROVIDERS.items():
        lines.append(f"  {name:18} {provider.unavailable(device) or 'runs here'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
