"""Results: one row per case and provider, the machine they come from, table, JSON and CSV."""

import csv
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.harness.shapes import PHASES, Case, flops
from bench.harness.timing import Timing

OK = "ok"
SKIPPED = "skipped"
FAILED_GATE = "failed the gate"
ERROR = "error"


@dataclass
class Row:
    """One provider on one case. Numbers are None unless ``status`` is ``"ok"``.

    Times are milliseconds. ``ratio`` and ``graph_ratio`` are time over the fastest plain attention
    of the same case in the same mode: below 1 is faster than plain. ``phase`` is ``"forward"`` or
    ``"train"``, forward and backward. ``tflops`` is of the graph where there is one, else of the
    eager call. ``peak_mb`` is what a call allocates at its peak, its outputs included.
    """

    shape: str
    B: int
    T: int
    C: int
    H: int
    D: int
    R: int
    stage: str
    phase: str
    dtype: str
    provider: str
    plain: bool
    status: str
    note: str = ""
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    samples: int | None = None
    ratio: float | None = None
    graph_ms: float | None = None
    graph_ms_p20: float | None = None
    graph_ms_p80: float | None = None
    graph_ratio: float | None = None
    tflops: float | None = None
    host_us: float | None = None
    peak_mb: float | None = None

    @classmethod
    def of(
        cls,
        case: Case,
        stage: str,
        phase: str,
        dtype: str,
        provider: str,
        plain: bool,
        status: str,
        note: str,
    ) -> "Row":
        """A row without numbers."""
        s = case.shape
        sizes = (s.name, s.B, s.T, s.C, s.H, s.D, case.R)
        return cls(*sizes, stage, phase, dtype, provider, plain, status, note)

    def fill(self, timing: Timing, case: Case) -> None:
        """Take over what the clocks say."""
        eager, graph = timing.eager, timing.graph
        self.ms, self.ms_p20, self.ms_p80 = eager.median, eager.p20, eager.p80
        self.samples = eager.n
        if graph is not None:
            self.graph_ms, self.graph_ms_p20, self.graph_ms_p80 = graph.median, graph.p20, graph.p80
        work = flops(case.shape, self.stage, self.phase)
        self.tflops = work / (graph or eager).median / 1e9
        self.host_us, self.peak_mb = timing.host_us, timing.peak_mb
        self.note = timing.note


def add_ratios(rows: Iterable[Row]) -> None:
    """Fill the ratios of the rows of one case; without a plain provider there are none."""
    rows = list(rows)
    for time, ratio in (("ms", "ratio"), ("graph_ms", "graph_ratio")):
        plain = [getattr(row, time) for row in rows if row.plain and getattr(row, time)]
        for row in rows:
            if plain and getattr(row, time):
                setattr(row, ratio, getattr(row, time) / min(plain))


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure has to be quoted with."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else "none",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **_triton_versions(),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def header(env: dict[str, Any], what: str, versus: str = "the fastest plain attention") -> str:
    """The lines above the table: machine, versions, what is timed, what the ratio is over."""
    threads = "" if env["driver"] != "none" else f" ({env['threads']} threads)"
    driver = f", driver {env['driver']}" if env["driver"] != "none" else ""
    return (
        f"{env['device']}{threads}{driver}\n"
        f"torch {env['torch']}, triton {env['triton']}, ptxas {env['ptxas']}, "
        f"python {env['python']}, commit {env['commit']}\n"
        f"{what}; median (p20..p80); ratios are time over {versus}"
    )


def subject(stage: str, phase: str, dtype: str) -> str:
    """What a sweep times, for its header."""
    return f"stage {stage}, causal {PHASES[phase]}, {dtype}"


def table(rows: Sequence[Row]) -> str:
    """Aligned columns; the GPU's own columns only where they hold something."""
    on_gpu = any(row.host_us is not None for row in rows)
    cells = [_cells(row, on_gpu) for row in rows]
    return in_blocks(_titles(on_gpu), cells, rows, _case)


def in_blocks(
    titles: Sequence[str],
    cells: Sequence[Sequence[str]],
    rows: Sequence[Any],
    block: Callable[[Any], Any],
    text_columns: int = 2,
) -> str:
    """Aligned columns with each row's remark behind them, a blank line between blocks of rows."""
    title, *body = aligned([titles, *cells], text_columns)
    lines = [title]
    for i, row in enumerate(rows):
        if i and block(row) != block(rows[i - 1]):
            lines.append("")
        lines.append(f"{body[i]}  {remark(row.status, row.note)}".rstrip())
    return "\n".join(lines)


def aligned(lines: Sequence[Sequence[str]], text_columns: int = 2) -> list[str]:
    """Cells as columns of equal width, the first ``text_columns`` aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if i < text_columns else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def remark(status: str, note: str) -> str:
    """What stands behind a line of a table."""
    return note if status == OK else f"{status}: {note}"


def summary(rows: Sequence[Row]) -> str:
    """One line per reciprocal provider and mode: its ratios over all cases, losses included."""
    lines = []
    for name in dict.fromkeys(row.provider for row in rows if not row.plain):
        for mode, field in (("eager", "ratio"), ("graph", "graph_ratio")):
            ratios = [getattr(row, field) for row in rows if row.provider == name]
            ratios = [ratio for ratio in ratios if ratio is not None]
            if ratios:
                lines.append(
                    f"{name}, {mode}: {min(ratios):.3f} to {max(ratios):.3f} of the time of the "
                    f"fastest plain attention, median {median(ratios):.3f} of {len(ratios)} cases"
                )
    return "\n".join(lines)


def _case(row: Row) -> tuple[str | int, ...]:
    return row.shape, row.B, row.T, row.D, row.R


def write_json(
    path: Path, benchmark: str, env: dict[str, Any], rows: Sequence[Any], **more: Any
) -> None:
    """``{"benchmark": ..., "environment": {...}, "rows": [{...}, ...]}``; rows are dataclasses."""
    rows = [asdict(row) for row in rows]
    document = {"benchmark": benchmark, "environment": env, **more, "rows": rows}
    unfinished = path.with_name(f"{path.name}.part")  # an interrupted run leaves no truncated file
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    unfinished.replace(path)


def write_csv(path: Path, env: dict[str, Any], rows: Sequence[Row]) -> None:
    """One line per row, the environment repeated in each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*Row.__dataclass_fields__, *env])
        writer.writeheader()
        writer.writerows({**asdict(row), **env} for row in rows)


def _titles(on_gpu: bool) -> list[str]:
    titles = ["shape", "provider", "B", "T", "H", "D", "R", "ms", "", "vs plain"]
    if on_gpu:
        titles += ["graph ms", "", "vs plain"]
    titles.append("TFLOP/s")
    return [*titles, "host us", "MB"] if on_gpu else titles


def _cells(row: Row, on_gpu: bool) -> list[str]:
    cells = [row.shape, row.provider, *map(str, (row.B, row.T, row.H, row.D, row.R))]
    cells += times(row.ms, row.ms_p20, row.ms_p80, row.ratio)
    if on_gpu:
        cells += times(row.graph_ms, row.graph_ms_p20, row.graph_ms_p80, row.graph_ratio)
    cells.append(number(row.tflops, ".1f" if on_gpu else ".3f"))
    if on_gpu:
        cells += [number(row.host_us, ".0f"), number(row.peak_mb, ".0f")]
    return cells


def times(
    median: float | None,
    p20: float | None,
    p80: float | None,
    ratio: float | None,
    form: str = ".3f",
) -> list[str]:
    """Three cells: ``0.123``, ``(0.120..0.130)``, ``1.000``."""
    spread = f"({number(p20, form)}..{number(p80, form)})" if median else ""
    return [number(median, form), spread, number(ratio, ".3f")]


def number(value: float | None, form: str) -> str:
    """A cell; what was not measured is a dash."""
    return "-" if value is None else format(value, form)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _triton_versions() -> dict[str, str]:
    try:
        import triton
    except ImportError:
        return {"triton": "none", "ptxas": "none"}
    try:
        ptxas = str(triton.knobs.nvidia.ptxas.version)
    except (AttributeError, OSError, RuntimeError):
        ptxas = "unknown"
    return {"triton": triton.__version__, "ptxas": ptxas}


def _commit() -> str:
    """``RA_TRITON_COMMIT``, for copies without git; else the checkout's short hash.

    ``-dirty`` is appended with uncommitted changes.
    """
    named = os.environ.get("RA_TRITON_COMMIT")
    if named:
        return named
    root = str(Path(__file__).parent)
    commit = _output("git", "-C", root, "rev-parse", "--short", "HEAD")
    dirty = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return commit if dirty in ("", "unknown") else f"{commit}-dirty"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]
