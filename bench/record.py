"""One page and one JSON file per GPU, from the files of all benchmarks that time kernels.

    python bench/record.py sweep.json train.json ladder.json host.json
    python bench/record.py *.json --out bench/results --plots

Writes ``<gpu>.json`` and ``<gpu>.md``, with ``--plots`` also pictures ``<gpu>-*.png``. Every row of
the input is on the page: all providers, losses, and the reason of each that has no number. Files of
different machines, versions or commits are refused.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from bench.decode import DecodeRow
from bench.harness.options import check_outputs, parser_of
from bench.harness.report import Row, header, number, remark, subject, summary
from bench.harness.shapes import PHASES
from bench.host import HostRow
from bench.peers import PeerRow
from bench.train_speed import TrainRow, loss_share

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = ("sweep", "peers", "ladder", "host", "decode", "train-speed")
MACHINE = ("device", "driver", "torch", "triton", "ptxas", "commit")
DIGITS = 4  # significant ones, of every number in the JSON file
Line = list[str]
T = TypeVar("T")


@dataclass
class Record:
    """What was measured on one machine.

    Attributes:
        environment: device, driver, versions, commit.
        sweep: rows of all sweeps.
        peers: rows of attention alone beside other packages.
        ladder: rows of the ladder.
        seed: the original prototype's figures by rung, and their GPU.
        host: rows of the host cost.
        training: rows of a GPT's training step.
        decode: rows of decoding.
        copy_gbps: what a copy reached beside them.
        parts: what ran, with its outcome, if ``gpu.py`` ran it.
    """

    environment: dict[str, Any] = field(default_factory=dict)
    sweep: list[Row] = field(default_factory=list)
    peers: list[PeerRow] = field(default_factory=list)
    ladder: list[Row] = field(default_factory=list)
    seed: dict[str, Any] = field(default_factory=dict)
    host: list[HostRow] = field(default_factory=list)
    training: list[TrainRow] = field(default_factory=list)
    decode: list[DecodeRow] = field(default_factory=list)
    copy_gbps: float | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, paths: Iterable[Path]) -> "Record":
        """Read files.

        Raises:
            ValueError: a file that no benchmark wrote, files of different runs, or no figures.
        """
        record = cls()
        for path in paths:
            record._add(path)
        if not record.environment:
            raise ValueError("no file with figures was given")
        return record

    def _add(self, path: Path) -> None:
        try:
            self._add_document(path, json.loads(path.read_text()))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of {', '.join(BENCHMARKS)}") from error

    def _add_document(self, path: Path, document: dict[str, Any]) -> None:
        benchmark = document.get("benchmark", "sweep")
        if benchmark == "run":
            self.parts += document["parts"]
            return
        if benchmark not in BENCHMARKS or "rows" not in document:
            raise ValueError(f"{path}: not a file of {', '.join(BENCHMARKS)}")
        self._same_machine(path, document["environment"])
        rows = document["rows"]
        if benchmark == "sweep":
            self.sweep += [Row(**{"phase": "forward", **row}) for row in rows]
        elif benchmark == "peers":
            self.peers += [PeerRow(**row) for row in rows]
        elif benchmark == "ladder":
            self.ladder += [Row(**row) for row in rows]
            self.seed = document["seed"]
        elif benchmark == "decode":
            self.decode += [DecodeRow(**row) for row in rows]
            self.copy_gbps = document["copy_gbps"]
        elif benchmark == "train-speed":
            self.training += [TrainRow(**row) for row in rows]
        else:
            self.host += [HostRow(**row) for row in rows]

    def _same_machine(self, path: Path, environment: dict[str, Any]) -> None:
        self.environment = self.environment or environment
        for name in MACHINE:
            if environment[name] != self.environment[name]:
                raise ValueError(
                    f"{path}: {name} is {environment[name]!r}, another file has "
                    f"{self.environment[name]!r}"
                )

    @property
    def slug(self) -> str:
        """The device's name as the name of a file: ``nvidia-h200``."""
        return re.sub(r"[^a-z0-9]+", "-", self.environment["device"].lower()).strip("-")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.out.is_dir():
        parser.error(f"--out: no such folder: {args.out}")
    try:
        record = Record.of(args.files)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    check_outputs(parser, {}, *["matplotlib"] * args.plots)
    for path in write(record, args.out, args.plots):
        print(path)
    return 0


def write(record: Record, folder: Path, plots: bool) -> list[Path]:
    """Write the record; returns the files."""
    pictures = _draw(record, folder) if plots else []
    data, page = folder / f"{record.slug}.json", folder / f"{record.slug}.md"
    data.write_text(_json(record))
    page.write_text(markdown(record, [picture.name for picture in pictures]))
    return [data, page, *pictures]


def _draw(record: Record, folder: Path) -> list[Path]:
    from bench.harness.plot import plot, plot_ladder, plot_peers

    drawn = []

    def path(name: str) -> Path:
        drawn.append(folder / f"{record.slug}-{name}.png")
        return drawn[-1]

    for (stage, phase, dtype), rows in _grouped(record.sweep, "stage", "phase", "dtype"):
        title = header(record.environment, subject(stage, phase, dtype))
        plot(path(f"{stage}-{phase}-{dtype}"), title, rows)
    if record.peers:
        title = header(record.environment, "attention alone beside its peers", "the fastest peer's")
        plot_peers(path("peers"), title, record.peers)
    if record.ladder:
        plot_ladder(
            path("ladder"), header(record.environment, "ladder", "its baseline"), record.ladder
        )
    return drawn


def _json(record: Record) -> str:
    """Small: rounded, without what is None or empty, one row per line."""
    sections = []
    for name, value in asdict(record).items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(_short(row))}" for row in value)
            text = f"[\n{rows}\n ]" if rows else "[]"
        else:
            text = json.dumps(value)
        sections.append(f' "{name}": {text}')
    return "{\n" + ",\n".join(sections) + "\n}\n"


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
        for name, value in row.items()
        if value is not None and value != ""
    }


def markdown(record: Record, pictures: Sequence[str] = ()) -> str:
    """The page: machine, what ran, wins and losses, then every row."""
    env = record.environment
    blocks = [f"# {env['device']}", _machine(env)]
    blocks += [f"![{name}]({name})" for name in pictures]
    blocks += _section("What ran", _parts(record.parts))
    blocks += _section("A training step of a GPT", _training(record.training))
    blocks += _section("Where plain attention is faster", _losses(record.sweep))
    for (stage, phase, dtype), rows in _grouped(record.sweep, "stage", "phase", "dtype"):
        lines = summary(rows).splitlines()
        overview = "\n".join(f"- {line}" for line in lines)
        title = f"Sweep: {stage}, {PHASES[phase]}, {dtype}"
        blocks += _section(title, "\n\n".join(filter(None, (overview, _sweep(rows)))))
    for (phase,), peers in _grouped(record.peers, "phase"):
        blocks += _section(f"Attention alone beside its peers: {phase}", _peers(peers))
    for (phase, shape), rows in _grouped(record.ladder, "phase", "shape"):
        blocks += _section(f"Ladder: {shape}, {PHASES[phase]}", _ladder(rows, record.seed))
    blocks += _section("Host cost of a call", _host(record.host))
    blocks += _section("Decoding: one token over a cache", _decode(record.decode, record.copy_gbps))
    return "\n\n".join(blocks) + "\n"


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}", text] if text else []


def _machine(env: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {env[name]}" for name in MACHINE[1:])
    return (
        f"{facts}, python {env['python']}. Times are ms, median (p20..p80) of CUDA events around "
        "each call (eager) and of a CUDA graph's replay (graph) where there is a GPU; "
        "ratios are time over plain attention's, so below 1 is faster than plain. "
        "A row without a number says why."
    )


def _parts(parts: Sequence[dict[str, Any]]) -> str:
    return _table(
        ["part", "outcome", "s", ""],
        [[p["name"], p["status"], f"{p['seconds']:.0f}", p.get("note", "")] for p in parts],
    )


def _training(rows: Sequence[TrainRow]) -> str:
    titles = ["mode", "B", "T", "heads", "attention", "ms a step", "ratio", "tokens/s", "GB"]
    titles += ["first s", "graph breaks", "loss error", "gradient", ""]
    lines = [
        [
            *(row.mode, str(row.B), str(row.T), f"{row.H} of {row.D}", row.attention),
            *(_spread(row.ms, row.ms_p20, row.ms_p80, ".4g"), number(row.ratio, ".3f")),
            *(number(row.tokens_per_s, ".0f"), number(row.peak_gb, ".2f")),
            *(number(row.first_s, ".1f"), number(row.graph_breaks, "d")),
            *(
                number(loss_share(row), ".2f"),
                number(row.gradient_share, ".2f"),
                remark(row.status, row.note),
            ),
        ]
        for row in rows
    ]
    text = _table(titles, lines)
    if not text:
        return ""
    layers = " and ".join(sorted({f"{row.layers} layers of width {row.C}" for row in rows}))
    return (
        f"{text}\n\nA GPT of {layers}: bf16 autocast, gradients clipped to norm 1, fused AdamW. "
        "Ratios are over plain attention in the same mode, models taking turns; the first step "
        "includes compilation without caches. Loss error and gradient: how far from float32 the "
        "loss curve and the worst gradient are, where 1 is the most that passes the gate."
    )


def _losses(rows: Sequence[Row]) -> str:
    """Every reciprocal row that is slower than the fastest plain attention, in either mode."""
    lines = []
    for row in rows:
        ratios = [r for r in (row.ratio, row.graph_ratio) if r is not None]
        if not row.plain and any(r > 1 for r in ratios):
            lines.append([row.stage, row.phase, *_case(row), *_ratios(row)])
    return _table(["stage", "phase", *CASE_TITLES, "eager ratio", "graph ratio"], lines)


def _sweep(rows: Sequence[Row]) -> str:
    titles = [*CASE_TITLES, "eager ms", "ratio", "graph ms", "ratio", "TFLOP/s", "MB", ""]
    return _table(titles, [[*_case(row), *_numbers(row)] for row in rows])


def _ladder(rows: Sequence[Row], seed: dict[str, Any]) -> str:
    theirs = seed["figures"]
    titles = ["rung", "R", "dtype", "eager ms", "ratio", "graph ms", "ratio", "TFLOP/s", "MB", ""]
    lines = []
    for row in rows:
        figure = theirs.get(row.provider, "-") if row.phase == "forward" else "-"
        lines.append([row.provider, str(row.R), row.dtype, *_numbers(row), figure])
    text = _table([*titles, f"the prototype's, on an {seed['gpu']}"], lines)
    return (
        f"{text}\n\nRatios are over this run's baseline. The last column is quoted from the "
        f"prototype, on another GPU ({seed['gpu']}); targets and best cases are what it hoped for."
    )


def _host(rows: Sequence[HostRow]) -> str:
    titles = ["shape", "dtype", "kind", "provider", "CPU us", "more than plain", ""]
    lines = [
        [
            row.shape,
            row.dtype,
            row.kind,
            row.provider,
            _spread(row.us, row.us_p20, row.us_p80, ".1f"),
            number(row.extra_us, "+.1f"),
            remark(row.status, row.note),
        ]
        for row in rows
    ]
    return _table(titles, lines)


def _peers(rows: Sequence[PeerRow]) -> str:
    titles = ["case", "B", "T", "heads", "D", "mask", "dtype", "provider", "ms", "TFLOP/s"]
    lines = [
        [
            *(row.case, str(row.B), str(row.T), f"{row.H} over {row.H_kv}", str(row.D)),
            "causal" * row.causal + (f" window {row.window}" if row.window is not None else ""),
            *(row.dtype, row.provider, _spread(row.ms, row.ms_p20, row.ms_p80, ".4g")),
            *(number(row.tflops, ".4g"), number(row.ratio, ".3f"), number(row.peak_mb, ".4g")),
            remark(row.status, row.note),
        ]
        for row in rows
    ]
    return _table([*titles, "over the fastest peer's ms", "peak MB", ""], lines)


def _decode(rows: Sequence[DecodeRow], copy_gbps: float | None) -> str:
    titles = ["B", "length", "heads", "D", "dtype", "provider", "cache MB", "eager ms", "graph ms"]
    lines = [
        [
            *(str(row.B), str(row.length), f"{row.H} over {row.H_kv}", str(row.D)),
            *(row.dtype, row.provider, number(row.cache_mb, ".4g")),
            _spread(row.ms, row.ms_p20, row.ms_p80, ".4g"),
            _spread(row.graph_ms, row.graph_ms_p20, row.graph_ms_p80, ".4g"),
            *(number(row.gbps, ".4g"), number(row.share, ".2f")),
            remark(row.status, row.note),
        ]
        for row in rows
    ]
    text = _table([*titles, "GB/s of the cache", "share of a copy's", ""], lines)
    if not text:
        return ""
    return f"{text}\n\nA copy of a large tensor reaches {number(copy_gbps, '.4g')} GB/s here."


CASE_TITLES = ["shape", "B", "T", "H", "D", "R", "provider"]


def _case(row: Row) -> Line:
    return [row.shape, *map(str, (row.B, row.T, row.H, row.D, row.R)), row.provider]


def _ratios(row: Row) -> Line:
    return [number(row.ratio, ".3f"), number(row.graph_ratio, ".3f")]


def _numbers(row: Row) -> Line:
    eager, graph = _ratios(row)
    return [
        _spread(row.ms, row.ms_p20, row.ms_p80, ".4g"),
        eager,
        _spread(row.graph_ms, row.graph_ms_p20, row.graph_ms_p80, ".4g"),
        graph,
        number(row.tflops, ".4g"),
        number(row.peak_mb, ".0f"),
        remark(row.status, row.note),
    ]


def _spread(median: float | None, p20: float | None, p80: float | None, form: str) -> str:
    if median is None:
        return "-"
    return f"{number(median, form)} ({number(p20, form)}..{number(p80, form)})"


def _grouped(rows: Sequence[T], *fields: str) -> list[tuple[tuple[Any, ...], list[T]]]:
    def key(row: T) -> tuple[Any, ...]:
        return tuple(getattr(row, name) for name in fields)

    return [(k, list(group)) for k, group in groupby(sorted(rows, key=key), key)]


def _table(titles: Line, lines: Sequence[Line]) -> str:
    """A Markdown table; empty without lines."""
    if not lines:
        return ""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in r) + " |" for r in rows)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("record.py", __doc__)
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="JSON files of one machine")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="default bench/results")
    add("--plots", action="store_true", help="draw the pictures too; needs matplotlib")
    return parser


if __name__ == "__main__":
    sys.exit(main())
