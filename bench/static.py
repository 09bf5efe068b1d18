"""What the machine code of every shipped kernel says, without a GPU.

    python bench/static.py                                         # all kernels and targets
    python bench/static.py --target sm_90 --kernel "bfloat16 D=64 causal=True" --json static.json
    python bench/static.py --stage projection --config projection '{"block_m": 64, ...}'
    python bench/static.py --check                                 # against the committed budget
    python bench/static.py --target sm_90 --spills-only            # under any Triton version
    python bench/static.py --changed --check                       # without compiling the rest
    python bench/static.py --changed --update-budget               # change the budget on purpose
    python bench/static.py --update-budget                         # and compile all for it

Registers, spills, CTAs per SM and their limit; of the hot loop (machine_code/sass.py says which one
that is) the instructions and the clocks that each pipe of an SM needs for one tile
(machine_code/pipes.py has the rates and what they leave out). The pipe with most clocks binds.
"peak" is the share of the tensor peak (WGMMA's on sm_90) that the binding pipe leaves to the FLOP
that the tile needs; "work" is how often the kernel computes them: 2 if two groups of warps compute
the same products. Kernels without matrix instructions, or that multiply in tensor memory (sm_100),
have no peak; without a loop, the clocks are those of the whole CTA.

Of each kernel the budget has a key beside the numbers: of the code that Triton's front end makes of
it, of the options, of Triton, assembler and disassembler, and of what reads the machine code here.
The same key means the same numbers, so --changed takes these from the budget. One kernel in sixteen
is compiled all the same, and --check wants the numbers of its line to the last.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import triton

from bench.machine_code import static_budget
from bench.machine_code.aot import TARGETS, shipped
from bench.machine_code.inspection import Compiled, Row, inspect
from bench.machine_code.pipes import PIPES
from ra_triton.launch.configs import LaunchConfig, launch_config

HOPPER = (  # stages of sm_90 alone
    "attention_forward_hopper",
    *("delta_and_lse", "attention_backward_hopper"),
)
ONE_PASS = ("attention_backward_one_pass", "round_query_gradient")  # of targets that have a row
STAGES = (
    *(*HOPPER, *ONE_PASS),
    *("attention_forward", "key_value_gradient", "query_gradient", "delta"),
    *("pack", "projection", "weight_gradient", "column_sum", "add_splits"),
    *("int8_projection", "quantize_rows", "norm_rope", "norm_rope_backward"),
    *("decode", "decode_combine", "append"),
    *("compose", "compose_backward", "compose_sums"),
)


def _row(known: dict[str, Row], compiled: Compiled) -> Row:
    """Of a kernel, or what the budget has of its key."""
    if compiled.kernel is not None:
        return {**inspect(compiled), "compiled": True}
    names = {"target": compiled.target, "stage": compiled.name, "label": compiled.label}
    return {**known[compiled.key], **names, "compiled": False}


def table(rows: Iterable[Row]) -> str:
    """The rows, aligned."""
    head = ["kernel", "regs", "spill", "smem", "CTA/SM", "limit", "instr", "async", "sync", "work"]
    head += [*PIPES, "bound", "peak"]
    lines = [head, *([_cells(row) for row in rows])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in ("kernel", "limit", "bound") else cell.rjust(width)
            for name, cell, width in zip(head, line, widths, strict=True)
        )
        for line in lines
    )


def _cells(row: Row) -> list[str]:
    share = row["tensor_peak_share"]
    spill = f"{row['spilled_bytes']}" + "!" * row["serialised_wgmma"]
    cells = [row["label"], row["registers"], spill, row["shared_memory"], row["ctas_per_sm"]]
    cells += [row["limited_by"], row["instructions"], row["async_copies"], row["sync_loads"]]
    cells += [f"{row['work']:.2f}" if row["work"] else "-"]
    cells += [f"{row['clocks_per_tile'][pipe]:.0f}" for pipe in PIPES]
    return [*map(str, cells), row["bound"], "-" if share is None else f"{share:.0%}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if the budget is exceeded."""
    args = _parse(argv)
    only = f"^({'|'.join(args.stage)}) .*" * bool(args.stage) + f"({args.kernel})"
    if args.spills_only:
        return max(_no_spills(target, only, args.config) for target in args.target)
    rows: list[Row] = []
    for target in args.target:
        known = static_budget.known(target, static_budget.read()) if args.changed else {}
        kernels = shipped(target, only=only, configs=args.config, known=known)
        # The assembler and the disassembler are processes; one more thread keeps two cores busy.
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(partial(_row, known), kernels))
        if not found:
            print(f"no kernel of {target} matches", file=sys.stderr)
            return 2
        rows += found
        compiled = [row for row in found if row["compiled"]]
        print(f"{target}: {len(compiled)} of {len(found)} kernels compiled")
        print(f"{table(compiled)}\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1))
    if args.update_budget:
        static_budget.write(rows)
        print(f"{static_budget.PATH.name}: {len(rows)} kernels recorded")
    return _check(rows, complete=not args.partial) if args.check else 0


def spills(compiled: Compiled) -> str | None:
    """What no kernel may do under any Triton version, in a sentence."""
    found = []
    if compiled.spilled_bytes:
        found.append(f"spills {compiled.spilled_bytes} bytes")
    if compiled.serialised_wgmma:
        found.append("the assembler serialises WGMMA (C751x)")
    if compiled.overwritten_operands:
        found.append(f"{compiled.overwritten_operands} writes over operands of products in flight")
    return f"{compiled.target} {compiled.label}: {', '.join(found)}" if found else None


def _no_spills(target: str, only: str, configs: dict[str, LaunchConfig]) -> int:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(spills, shipped(target, only=only, configs=configs)))
    if not found:
        print(f"no kernel of {target} matches", file=sys.stderr)
        return 2
    bad = list(filter(None, found))
    summary = f"{target}, Triton {triton.__version__}: {len(bad)} of {len(found)} kernels at fault"
    print("\n".join([*bad, summary]), flush=True)
    return 1 if bad else 0


def _check(rows: list[Row], complete: bool) -> int:
    budget = static_budget.read()
    found = static_budget.violations(rows, budget, complete=complete)
    if not static_budget.holds_counts(budget):
        print(f"Only spills and serialised WGMMA compared: the budget is of {budget['triton']}.")
    print("\n".join(found) if found else "Within the budget.")
    return 1 if found else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("static.py", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--target", nargs="+", choices=TARGETS, default=TARGETS, help="default: all")
    add("--stage", nargs="+", choices=STAGES, default=[], help="default: all")
    add("--kernel", default="", metavar="REGEX", help="to be found in the label of a kernel")
    add("--config", nargs=2, action="append", default=[], metavar=("STAGE", "JSON"),
        help="launch a stage of the config table with this LaunchConfig instead")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="all rows, with the whole instruction mix")
    add("--check", action="store_true", help="compare with the committed budget")
    add(
        "--changed",
        action="store_true",
        help="compile what has changed since the budget was recorded, and one kernel in sixteen",
    )
    add("--spills-only", action="store_true",
        help="look for spills and serialised WGMMA alone, whatever the budget")  # fmt: skip
    add("--update-budget", action="store_true", help="record the numbers as the new budget")
    args = parser.parse_args(argv)
    args.partial = bool(args.stage or args.kernel or args.config)
    if args.update_budget and args.partial:
        parser.error("--update-budget records all kernels: leave out --stage, --kernel, --config")
    if args.spills_only and (args.json or args.check or args.update_budget or args.changed):
        parser.error("--spills-only goes without --json, --check, --update-budget and --changed")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: no such folder: {args.json.parent}")
    try:
        re.compile(args.kernel)
    except re.error as error:
        parser.error(f"--kernel: {args.kernel!r} is no regular expression: {error}")
    try:
        args.config = {stage: _launch_config(stage, text) for stage, text in args.config}
    except (TypeError, ValueError) as error:
        parser.error(f"--config: {error}")
    return args


def _launch_config(stage: str, text: str) -> LaunchConfig:
    try:
        launch_config(stage, 64, torch.bfloat16, TARGETS[0], True)
    except KeyError:
        raise ValueError(f"the config table has no stage {stage!r}") from None
    return LaunchConfig(**json.loads(text))


if __name__ == "__main__":
    sys.exit(main())
