"""The committed budget of the machine code: what a change may not make worse unnoticed.

``static_budget.json`` has one line per kernel and target; what a line leaves out is 0. It holds for
the Triton version that it names, because the compiler decides how many instructions there are. The
key of a line (``inspection.row_key``) says what it was recorded from: the same key, the same line.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton

from bench.machine_code.inspection import Row

Budget = dict[str, Any]  # {"triton": version, target: {label: {field: number}}}

PATH = Path(__file__).with_suffix(".json")
GROWTH_ALLOWED = 0.03  # of the instructions in a hot loop
UPDATE = "python bench/static.py --changed --update-budget"
SPOT_CHECK = "0"  # a line whose key begins so, one in sixteen, is never taken as known

_FIELDS = (
    "key",
    "registers",  # on record only; what they decide is ctas_per_sm
    "shared_memory",  # likewise; it and what comes last say whether a line is sound at all
    "ctas_per_sm",
    "spilled_bytes",
    "serialised_wgmma",
    "overwritten_operands",
    "async_copies",
    "sync_loads",
    "instructions",
    "matrix_instructions",
    "wgmma",
    "bulk_copies",
)


def read(path: Path = PATH) -> Budget:
    """The budget on record; an empty one, of this Triton version, if there is none."""
    return json.loads(path.read_text()) if path.exists() else {"triton": triton.__version__}


def known(target: str, budget: Budget) -> dict[str, Row]:
    """The numbers on record by key, but for those of the spot check."""
    lines = [{"key": "", **line} for line in budget.get(target, {}).values()]
    return {
        line["key"]: {name: line.get(name, 0) for name in _FIELDS}
        for line in lines
        if line["key"] and not line["key"].startswith(SPOT_CHECK)
    }


def write(rows: Iterable[Row], path: Path = PATH) -> None:
    """Record the rows of whole targets; other targets keep what is on record.

    Raises:
        ValueError: if that would mix the numbers of two Triton versions.
    """
    before, rows = read(path), list(rows)
    targets = {target: lines for target, lines in before.items() if target != "triton"}
    targets.update({row["target"]: {} for row in rows})
    for row in rows:
        targets[row["target"]][row["label"]] = {name: row[name] for name in _FIELDS if row[name]}
    kept = set(targets) - {row["target"] for row in rows}
    if kept and before["triton"] != triton.__version__:
        raise ValueError(
            f"{path.name} is of Triton {before['triton']}, this is {triton.__version__}: "
            f"record all targets at once, {', '.join(sorted(kept))} too"
        )
    path.write_text(_text(targets))


def _text(targets: dict[str, dict[str, dict[str, int]]]) -> str:
    """JSON with a line per kernel, so that a diff shows which kernels changed."""
    parts = [f'  "triton": {json.dumps(triton.__version__)}']
    for target, lines in sorted(targets.items()):
        entries = [f"    {json.dumps(k)}: {json.dumps(line)}" for k, line in sorted(lines.items())]
        parts.append(f'  "{target}": {{\n' + ",\n".join(entries) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def holds_counts(budget: Budget) -> bool:
    """Whether its counts are of the Triton version that runs here."""
    return budget["triton"] == triton.__version__


def violations(rows: Iterable[Row], budget: Budget, *, complete: bool = True) -> list[str]:
    """What is worse than the budget allows, one sentence each.

    Under another Triton version than the budget's, only spills and serialised WGMMA are compared.

    Args:
        rows: what was compiled.
        budget: from :func:`read`.
        complete: whether the rows are all kernels of their targets, so that one that is missing
            has left its line behind.
    """
    rows, found = list(rows), []
    for row in rows:
        line = budget.get(row["target"], {}).get(row["label"])
        where = f"{row['target']} {row['label']}"
        found += [f"{where}: {problem}" for problem in _problems(row, line, holds_counts(budget))]
    if complete and holds_counts(budget):
        for target in sorted({row["target"] for row in rows}):
            labels = {row["label"] for row in rows if row["target"] == target}
            gone = sorted(set(budget.get(target, {})) - labels)
            found += [f"{target} {label}: in the budget, but not compiled" for label in gone]
    return found


def _problems(row: Row, line: dict[str, int] | None, counts: bool) -> list[str]:
    if line is None:
        return ["has no line in the budget"] if counts else []
    found = []
    if row["spilled_bytes"] > line.get("spilled_bytes", 0):
        found.append(f"spills {row['spilled_bytes']} bytes, was {line.get('spilled_bytes', 0)}")
    if row["serialised_wgmma"] and not line.get("serialised_wgmma"):
        found.append("the assembler serialises WGMMA (C751x)")
    if row["overwritten_operands"]:
        found.append(f"{row['overwritten_operands']} writes over operands of products in flight")
    if not counts:
        return found
    if row["key"] == line.get("key"):
        wrong = [name for name in _FIELDS if row[name] != line.get(name, 0)]
        found += [
            f"{row[name]} {name}, recorded of the same code: {line.get(name, 0)}" for name in wrong
        ]
    if row["ctas_per_sm"] < line["ctas_per_sm"]:
        found.append(f"{row['ctas_per_sm']} CTAs fit on an SM, were {line['ctas_per_sm']}")
    if row["async_copies"] < line.get("async_copies", 0):
        what = f"{row['async_copies']} asynchronous copies in the hot loop"
        found.append(f"{what}, were {line['async_copies']}")
    if row["sync_loads"] > line.get("sync_loads", 0):
        what = f"{row['sync_loads']} synchronous loads in the hot loop"
        found.append(f"{what}, were {line.get('sync_loads', 0)}")
    if row["instructions"] > line["instructions"] * (1 + GROWTH_ALLOWED):
        growth = row["instructions"] / line["instructions"] - 1
        what = f"{row['instructions']} instructions in the hot loop, were {line['instructions']}"
        found.append(f"{what} ({growth:+.1%}, {GROWTH_ALLOWED:.0%} allowed)")
    return found
