"""The ladder: from plain attention through a prototype's v2 and v3 to packed emission, in one run.

    python bench/ladder.py                                 # forward, then forward + backward
    python bench/ladder.py --pass forward --json ladder.json --plot ladder.png
    python bench/ladder.py --rungs baseline v2 packed-triton

Every rung is a real implementation of one whole layer with its output projection (``rungs.py``),
held against the FP64 reference before it is timed. Ratios are time over the baseline of this run.
The prototype is what this project began with. The last column is what it reported or hoped for, on
another GPU: it is quoted, not measured here.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.harness.gate import Gate, admit, answer
from bench.harness.options import (
    DTYPES,
    add_machine_options,
    check_outputs,
    check_runnable,
    parser_of,
    resolve_machine,
)
from bench.harness.report import (
    ERROR,
    FAILED_GATE,
    SKIPPED,
    Row,
    add_ratios,
    aligned,
    environment,
    header,
    number,
    remark,
    times,
    write_json,
)
from bench.harness.rungs import RUNGS, Factors, Rung, Source
from bench.harness.shapes import PHASES, SHAPES, Case, Shape
from bench.harness.timing import Entrant, measure

BASELINE = "baseline"
SEED_GPU = "A10G"
SECONDS = {"cpu": 8.0, "cuda": 6.0}  # of timing per phase
GATES = dict[tuple[Source, str], Gate]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a rung failed the gate or broke."""
    parser = _parser()
    args = parser.parse_args(argv)
    resolve_machine(parser, args)
    check_outputs(parser, {"json": args.json, "plot": args.plot}, "tqdm")
    train_alone = set(args.phases) == {"train"}
    reasons = {name: _unavailable(name, args.device, train_alone) for name in args.rungs or ()}
    check_runnable(parser, "rungs", reasons)
    args.rungs = args.rungs or list(RUNGS)
    shape = SHAPES[args.shape or ("gpt2" if args.device == "cuda" else "cpu")]
    if shape.D < 8:
        parser.error(f"the rung v3-R8 needs a head dim of 8 or more, {shape.name} has {shape.D}")
    args.seconds = SECONDS[args.device] if args.seconds is None else args.seconds

    device = torch.device(args.device)
    env = environment(device)
    sizes = f"B={shape.B} T={shape.T} H={shape.H} D={shape.D} C={shape.C}"
    title = header(env, f"ladder at {shape.name} ({sizes}), {args.dtype}", f"this run's {BASELINE}")
    print(title)
    factors = Factors.draw(shape, device)
    rows = []
    for phase in dict.fromkeys(args.phases):
        found = run_phase(factors, phase, args, device)
        print(f"\ncausal {PHASES[phase]}\n{table(found)}")
        rows += found
    if args.json:
        theirs = {name: rung.theirs for name, rung in RUNGS.items() if rung.theirs}
        seed = {"gpu": SEED_GPU, "figures": theirs}
        write_json(args.json, "ladder", env, rows, seed=seed)
    if args.plot:
        from bench.harness.plot import plot_ladder

        plot_ladder(args.plot, title, rows)
    bad = [row for row in rows if row.status in (FAILED_GATE, ERROR)]
    for row in bad:
        print(f"{row.provider}, {row.phase}: {row.status}: {row.note}", file=sys.stderr)
    return 1 if bad else 0


def run_phase(
    factors: Factors, phase: str, args: argparse.Namespace, device: torch.device
) -> list[Row]:
    """Every rung through its gate, then all of them against each other."""
    from tqdm import tqdm

    gates: GATES = {}
    rows, entrants = [], []
    with torch.set_grad_enabled(phase == "train"):
        for name in tqdm(args.rungs, disable=None, leave=False, desc=f"gate {phase}"):
            row, entrant = _prepare(name, factors, phase, args.dtype, device, gates)
            rows.append(row)
            if entrant is not None:
                entrants.append(entrant)
        gates.clear()
        timings = measure(entrants, args.seconds, device.type == "cuda")
    for row in rows:
        if row.provider in timings:
            row.fill(timings[row.provider], _case(factors.shape, RUNGS[row.provider]))
    add_ratios(rows)
    return rows


def _prepare(
    name: str,
    factors: Factors,
    phase: str,
    dtype: str,
    device: torch.device,
    gates: GATES,
) -> tuple[Row, Entrant | None]:
    """A rung's row, and its entrant if it runs here and is right."""
    rung = RUNGS[name]
    dtype = rung.dtype or dtype
    entrant: Entrant | None = None
    reason = _unavailable(name, device.type, phase == "train")
    if reason is not None:
        status, note = SKIPPED, reason
    else:
        inputs = rung.inputs(factors, DTYPES[dtype], phase == "train")
        dout = factors.dout.to(DTYPES[dtype]) if phase == "train" else None
        if (rung.source, dtype) not in gates:
            gates[rung.source, dtype] = _gate(rung.source, factors.shape, inputs, dout)
        make = partial(rung.layer, factors.shape, inputs)
        gate = gates[rung.source, dtype]
        entrant, status, note = admit(name, make, gate, dout, rung.context)
    plain = name == BASELINE  # what the ratios are over
    case = _case(factors.shape, rung)
    return Row.of(case, "layer", phase, dtype, name, plain, status, note), entrant


def _unavailable(name: str, device: str, train: bool) -> str | None:
    """Why a rung cannot run on a device type, or cannot train; or None."""
    rung = RUNGS[name]
    return rung.unavailable(device) or (train and rung.forward_only) or None


def _gate(
    source: Source, shape: Shape, inputs: tuple[torch.Tensor, ...], dout: torch.Tensor | None
) -> Gate:
    """The exact outputs on a rung's own, already rounded, inputs."""
    names = ("out", "dx", *(f"d{name}" for name in source.names), "dW_out")
    layer = source.exact(shape)
    exact, eager = (
        answer(layer, inputs, dout, dtype) for dtype in (torch.float64, inputs[0].dtype)
    )
    return Gate.between(names, exact, eager, shape.D)


def _case(shape: Shape, rung: Rung) -> Case:
    return Case(shape, rung.R, ())


def table(rows: Sequence[Row]) -> str:
    """One line per rung; the GPU's own columns only where they hold something."""
    on_gpu = any(row.host_us is not None for row in rows)
    titles = ["rung", "what it is", "dtype", "ms", "", "x baseline"]
    if on_gpu:
        titles += ["graph ms", "", "x baseline", "host us", "MB"]
    titles.append(f"prototype, {SEED_GPU}")
    title, *lines = aligned([titles, *(_cells(row, on_gpu) for row in rows)], text_columns=3)
    notes = [remark(row.status, row.note) for row in rows]
    return "\n".join(
        [title, *(f"{line}  {note}".rstrip() for line, note in zip(lines, notes, strict=True))]
    )


def _cells(row: Row, on_gpu: bool) -> list[str]:
    rung = RUNGS[row.provider]
    cells = [row.provider, rung.what, row.dtype]
    cells += times(row.ms, row.ms_p20, row.ms_p80, row.ratio)
    if on_gpu:
        cells += times(row.graph_ms, row.graph_ms_p20, row.graph_ms_p80, row.graph_ratio)
        cells += [number(row.host_us, ".0f"), number(row.peak_mb, ".0f")]
    # The prototype timed the forward only.
    return [*cells, (rung.theirs if row.phase == "forward" else "") or "-"]


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("ladder.py", __doc__)
    add: Any = parser.add_argument
    add("--shape", choices=SHAPES, metavar="NAME", help=", ".join(SHAPES))
    add("--rungs", nargs="+", choices=RUNGS, metavar="NAME", help=f"default all: {_listing()}")
    add("--pass", dest="phases", nargs="+", choices=PHASES, default=list(PHASES), help="both")
    add_machine_options(parser)
    add("--json", type=Path, metavar="FILE", help="write every row")
    add("--plot", type=Path, metavar="FILE", help="draw time by rung")
    return parser


def _listing() -> str:
    return ", ".join(RUNGS)


if __name__ == "__main__":
    sys.exit(main())
