"""What the machine code of every shipped kernel says, without a GPU.

    python bench/static.py                                         # all kernels and targets
    python bench/static.py --target sm_90 --kernel "bfloat16 D=64 causal=True" --json static.json
    python bench/static.py --stage projection --config projection '{"block_m": 64, ...}'
    python bench/static.py --check                                 # against the committed budget
    python bench/static.py --target sm_90 --spills-only            # under any Triton version
    python bench/static.py --update-budget                         # change the budget on purpose

Registers, spills, CTAs per SM and their limit; of the hot loop (machine_code/sass.py says which one
that is) the instructions and the clocks that each pipe of an SM needs for one tile
(machine_code/pipes.py has the rates and what they leave out). The pipe with most clocks binds.
"peak" is the share of the tensor peak (WGMMA's on sm_90) that the binding pipe leaves to the FLOP
that the tile needs; "work" is how often the kernel computes them: 2 if two groups of warps compute
the same products. Kernels without matrix instructions, or that multiply in tensor memory (sm_100),
have no peak; without a loop, the clocks are those of the whole CTA.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from bench.machine_code import static_budget
from bench.machine_code.aot import TARGETS, Compiled, shipped
from bench.machine_code.pipes import ARCHITECTURES, PIPES
from bench.machine_code.sass import TENSOR_MEMORY, Loop, Program
from bench.machine_code.static_budget import Row
from ra_triton.launch.configs import LaunchConfig, launch_config

HOPPER = (  # stages of sm_90 alone
    "attention_forward_hopper",
    *("delta_and_lse", "attention_backward_hopper", "round_dq"),
)
STAGES = (
    *HOPPER,
    *("attention_forward", "key_value_gradient", "query_gradient", "delta"),
    *("pack", "projection", "weight_gradient", "column_sum", "add_splits"),
    *("int8_projection", "quantize_rows", "norm_rope", "norm_rope_backward"),
    *("decode", "decode_combine", "append"),
    *("compose", "compose_backward", "compose_sums"),
)
ATTENTION = {  # products of a tile, and the size that counts the rows it streams, twice
    "attention_forward": (2, "BLOCK_N"),  # s, o; k and v
    "key_value_gradient": (4, "BLOCK_M"),  # s, dp, dv, dk; q and do
    "query_gradient": (3, "BLOCK_N"),  # s, dp, dq; k and v
    "decode": (2, "BLOCK_N"),  # s, o; k and v
}


def tile_of(stage: str, sizes: dict[str, Any]) -> tuple[int, int]:
    """FLOP of a tile's matrix products, and how many elements it streams in; 0 if it has none.

    Args:
        stage: name of the kernel.
        sizes: its constexpr arguments.
    """
    if stage in ATTENTION:
        products, rows = ATTENTION[stage]
        flops = 2 * products * sizes["BLOCK_M"] * sizes["BLOCK_N"] * sizes["BLOCK_D"]
        return flops, 2 * sizes[rows] * sizes["BLOCK_D"]
    axes = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    if all(axis in sizes for axis in axes):
        m, n, k = (sizes[axis] for axis in axes)
        m *= sizes.get("GROUPS", 1)  # of warps, with the same loop each
        return 2 * m * n * k, (m + n) * k
    return 0, 0


def tiles_per_iteration(
    loop: Loop, warps: int, flops: int, elements: int, element_size: int
) -> int:
    """How many tiles both the products and the copies of an iteration suffice for.

    More products than copies are products computed twice, not an unrolled loop.

    Args:
        loop: the hot loop.
        warps: of the CTA.
        flops: of a tile.
        elements: that a tile streams in.
        element_size: bytes of one.
    """
    if flops == 0:
        return 1
    products = warps * (loop.matrix_flops or loop.vector_flops) / flops
    # Tiles come in 16 bytes or one element at a time; what comes with them (lse, delta) does not.
    widths = [i.bytes_per_lane for i in loop.body if i.base in ("LDG", "LDGSTS")]
    copied = 32 * warps * sum(width for width in widths if width in (16, element_size))
    bulk = loop.count("UTMALDG") / 2  # every tile streams two operands
    return max(1, int(min(products, copied / (elements * element_size) + bulk)))


def inspect(compiled: Compiled) -> Row:
    """One row of the table: everything that is known of a compiled kernel."""
    architecture, warps = ARCHITECTURES[compiled.target], compiled.warps
    program = Program(compiled.sass)
    loop = program.hot_loop()
    # Where groups of warps share a tile, another group's loop may copy for this one's.
    copying = Loop("all", tuple(program.code)) if "GROUPS" in compiled.constants else loop
    flops, elements = tile_of(compiled.name, compiled.constants)
    if loop.tensor_memory_products:
        flops = elements = 0
    tiles = tiles_per_iteration(loop, warps, flops, elements, compiled.element_size)
    bulk = tiles * elements * compiled.element_size if copying.count("UTMALDG") else 0
    totals = architecture.clocks(loop.body, warps, bulk)
    clocks = {pipe: total / tiles for pipe, total in totals.items()}
    bound = max(PIPES, key=lambda pipe: clocks[pipe])
    work = warps * loop.matrix_flops / (tiles * flops) if flops else 0.0
    peak = max((architecture.tensor_peak(i) for i in loop.body if i.matrix_shape), default=1)
    ctas, limit = architecture.ctas_per_sm(compiled.registers, compiled.shared_memory, warps)
    return {
        "target": compiled.target,
        "stage": compiled.name,
        "label": compiled.label,
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
        "shared_memory": compiled.shared_memory,
        "warps": warps,
        "ctas_per_sm": ctas,
        "limited_by": limit,
        "serialised_wgmma": compiled.serialised_wgmma,
        "loop": loop.name,
        "instructions": len(loop.body),
        "mix": dict(Counter(instruction.base for instruction in loop.body).most_common()),
        "matrix_instructions": loop.count("HGMMA", "HMMA", "IGMMA", "IMMA", *TENSOR_MEMORY),
        "wgmma": loop.count("HGMMA", "IGMMA"),
        "async_copies": copying.count("LDGSTS", "UTMALDG"),
        "bulk_copies": copying.count("UTMALDG"),
        "sync_loads": loop.count("LDG"),
        "tiles_per_iteration": tiles,
        "work": round(work, 3),
        "clocks_per_tile": {pipe: round(amount, 1) for pipe, amount in clocks.items()},
        "bound": bound,
        "tensor_peak_share": round(flops / peak / clocks[bound], 3) if work else None,
    }


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
        # The assembler and the disassembler are processes; one more thread keeps two cores busy.
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(inspect, shipped(target, only=only, configs=args.config)))
        if not found:
            print(f"no kernel of {target} matches", file=sys.stderr)
            return 2
        rows += found
        print(f"{target}\n{table(found)}\n", flush=True)
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
    add("--spills-only", action="store_true",
        help="look for spills and serialised WGMMA alone, whatever the budget")  # fmt: skip
    add("--update-budget", action="store_true", help="record the numbers as the new budget")
    args = parser.parse_args(argv)
    args.partial = bool(args.stage or args.kernel or args.config)
    if args.update_budget and args.partial:
        parser.error("--update-budget records all kernels: leave out --stage, --kernel, --config")
    if args.spills_only and (args.json or args.check or args.update_budget):
        parser.error("--spills-only goes without --json, --check and --update-budget")
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
