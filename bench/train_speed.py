"""What a training step of a GPT costs with reciprocal attention, beside nanoGPT's own attention.

    python bench/train_speed.py                           # four shapes of 124M, some minutes
    python bench/train_speed.py --shape b12 --mode compile --attention plain free
    python bench/train_speed.py --device cpu              # a tiny one, seconds

A step is what nanoGPT does: bf16 autocast around the forward, backward, gradients clipped to norm
1, fused AdamW; no bias, no dropout, tied embeddings, a vocabulary of 50,304. ``plain`` is nanoGPT's
CausalSelfAttention, ``free`` and ``composed`` are RACausalSelfAttention with that parametrisation.
Models of one shape and mode live in one process and take turns; all start from equal weights and
see equal batches.

A model whose first losses and gradients are not those of plain PyTorch, within what bf16 rounds,
gets no time: see bench/models/trainees.py.

``first s`` is the first step with empty compile caches, so with all that Inductor compiles; this
package's own kernels compile once in a process, in the first row that launches them. ``GB`` is the
most that a model allocated, its parameters and optimizer included, without the other models.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.harness.gate import why_it_broke
from bench.harness.options import check_outputs, count, parser_of, resolve_device, seconds
from bench.harness.report import (
    ERROR,
    FAILED_GATE,
    OK,
    SKIPPED,
    environment,
    header,
    in_blocks,
    number,
    times,
    write_json,
)
from bench.harness.timing import MIN_ROUNDS, Quantiles, turns, without_garbage_collection
from bench.models.attentions import ATTENTIONS, PLAIN
from bench.models.data import Text, load_text
from bench.models.trainees import GATE_STEPS, MODES, Batch, Setting, Size, Trainee, distance

TURN_STEPS = 5  # timed steps of a turn, after one that is not
TEXT_BYTES = 2**20  # of Python's standard library, bytes as tokens
SECONDS = 4.0  # of timing per shape and mode
LIMIT = {"cuda": 400.0, "cpu": math.inf}  # seconds after which no case is begun


SIZES = {
    size.name: size
    for size in (
        Size("b12", B=12, T=1024),
        Size("b64", B=64, T=1024),
        Size("4k", B=8, T=4096),
        Size("4k-d128", B=8, T=4096, H=6),
        Size("tiny", B=2, T=64, layers=2, H=2, C=64, vocab=256),
    )
}
DEFAULT_SIZES = {"cuda": ("b12", "b64", "4k", "4k-d128"), "cpu": ("tiny",)}

DEFAULT_MODES = {"cuda": tuple(MODES), "cpu": ("eager",)}


@dataclass
class TrainRow:
    """One attention in one mode at one size. Numbers are None where there are none.

    Times are milliseconds a step; ``ratio`` is over plain attention in the same mode and size. The
    losses are in nats; ``loss_error`` is the RMS distance of the loss curve from the float32 one,
    and ``loss_allowed`` the most that passes; ``gradient_share`` is the worst gradient's error over
    what passes. ``graphs`` and ``graph_breaks`` are Dynamo's.
    """

    shape: str
    B: int
    T: int
    layers: int
    C: int
    H: int
    D: int
    R: int
    mode: str
    attention: str
    plain: bool
    status: str = OK
    note: str = ""
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    samples: int | None = None
    ratio: float | None = None
    tokens_per_s: float | None = None
    peak_gb: float | None = None
    first_s: float | None = None
    graphs: int | None = None
    graph_breaks: int | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    loss_error: float | None = None
    loss_allowed: float | None = None
    gradient_share: float | None = None

    @classmethod
    def of(cls, size: Size, R: int, mode: str, attention: str) -> "TrainRow":
        """A row without numbers."""
        sizes = (size.name, size.B, size.T, size.layers, size.C, size.H, size.D, R)
        return cls(*sizes, mode, attention, attention == PLAIN)

    def fill(self, found: Quantiles) -> None:
        """Take over what the clock says."""
        self.ms, self.ms_p20, self.ms_p80 = found.median, found.p20, found.p80
        self.samples = found.n
        self.tokens_per_s = self.B * self.T / found.median * 1e3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a model failed the gate or broke."""
    parser = _parser()
    args = _parse(parser, argv)
    check_outputs(parser, {"json": args.json})
    sizes = _sizes(parser, args)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as nanoGPT does
    env = environment(device)
    print(header(env, "a training step, bf16 autocast", "plain attention of the same mode"))
    rows: list[TrainRow] = []
    stopped = False
    try:
        for found in measure(sizes, args, device):
            rows += found
            if args.json:
                write_json(args.json, "train-speed", env, rows)
    except KeyboardInterrupt:
        stopped = True
        print("stopped: only the cases below are timed", file=sys.stderr)
    print(f"\n{table(rows)}")
    bad = [row for row in rows if row.status in (FAILED_GATE, ERROR)]
    for row in bad:
        where = f"{row.attention}, {row.shape}, {row.mode}"
        print(f"{where}: {row.status}: {row.note}", file=sys.stderr)
    return 1 if bad or stopped else 0


def measure(
    sizes: Sequence[Size], args: argparse.Namespace, device: torch.device
) -> Iterator[list[TrainRow]]:
    """The rows of each case, one size after the other; a case that has no time left says so."""
    start, longest = time.perf_counter(), 0.0
    text = load_text(min_bytes=max(size.T for size in sizes) + 1, max_bytes=TEXT_BYTES)
    _warm_up(args.R, device, text)
    for size in sizes:
        setting = Setting.of(size, args.R, device, text)
        for mode in args.mode:
            began = time.perf_counter()
            rows = [TrainRow.of(size, args.R, mode, name) for name in args.attention]
            if began - start + (0.0 if mode == "eager" else longest) > args.limit:
                for row in rows:
                    row.status, row.note = SKIPPED, f"no time left of --limit {args.limit:g}"
            else:
                print(f"{size.name}, {mode} ...", file=sys.stderr, flush=True)
                measure_case(rows, setting, args.seconds)
                longest = max(longest, time.perf_counter() - began)
            yield rows


def measure_case(rows: Sequence[TrainRow], setting: Setting, seconds: float) -> None:
    """Gate and time the models of one size and mode against each other; fills the rows."""
    _forget()
    trainees: dict[str, Trainee] = {}
    for row in rows:
        trainee = _guarded(row, partial(_prepare, row, setting))
        if trainee is not None:
            trainees[row.attention] = trainee
        else:
            _free_memory(setting.device)
    samples = _time(rows, trainees, setting, seconds)
    for row in rows:
        if row.attention in samples:
            row.fill(Quantiles.of(samples[row.attention]))
    plain = [row.ms for row in rows if row.plain and row.ms is not None]
    for row in rows:
        if plain and row.ms is not None:
            row.ratio = row.ms / plain[0]
    trainees.clear()
    _forget()
    _free_memory(setting.device)


def _prepare(row: TrainRow, setting: Setting) -> Trainee | None:
    """Build a model, train its first steps; None if its loss curve fails the gate."""
    answer, on_gpu = setting.answer(row.attention), setting.device.type == "cuda"
    _free_memory(setting.device)
    before = torch.cuda.memory_allocated() if on_gpu else 0
    trainee = Trainee(setting.model(ATTENTIONS[row.attention]), row.mode)
    counted = _graphs()
    with _empty_caches() if on_gpu or row.mode != "eager" else nullcontext():
        start = time.perf_counter()
        losses: list[float] = []
        errors: dict[str, float] = {}
        for loss in trainee.losses(setting.batches[:GATE_STEPS], answer.look(errors)):
            if not losses:
                row.first_s = time.perf_counter() - start
            losses.append(loss)
    if on_gpu:
        row.peak_gb = (torch.cuda.max_memory_allocated() - before) / 1e9
    row.first_loss, row.last_loss = losses[0], losses[-1]
    row.loss_error, row.loss_allowed = distance(losses, answer.losses), answer.allowed
    row.gradient_share, _ = answer.gradient_share(errors)
    if row.mode != "eager":
        row.graphs, row.graph_breaks, skipped = (
            now - was for now, was in zip(_graphs(), counted, strict=True)
        )
        if skipped:
            row.note = f"CUDA graphs were skipped {skipped} times"
    failure = answer.failure(losses, errors)
    if failure is not None:
        row.status, row.note = FAILED_GATE, failure
        return None
    return trainee


def _time(
    rows: Sequence[TrainRow], trainees: dict[str, Trainee], setting: Setting, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of steps by attention, in turns; a model that breaks is left out."""
    samples: dict[str, list[float]] = {name: [] for name in trainees}
    by_name = {row.attention: row for row in rows}
    deadline = time.perf_counter() + seconds
    with without_garbage_collection():
        for done, order in enumerate(turns(list(trainees))):
            if not samples or (done >= MIN_ROUNDS and time.perf_counter() > deadline):
                break
            for name in order:
                if name in samples:
                    turn = partial(_turn, trainees[name], setting.batches)
                    found = _guarded(by_name[name], turn)
                    if found is None:
                        del samples[name], trainees[name]
                    else:
                        samples[name] += found
    return samples


def _turn(trainee: Trainee, batches: Sequence[Batch]) -> list[float]:
    """Milliseconds of each of a few steps back to back; the first, after a switch, is not timed."""
    clock: Callable[[], Any] = _event if trainee.device_type == "cuda" else time.perf_counter
    trainee.step(batches[0])
    marks = [clock()]
    for i in range(TURN_STEPS):
        trainee.step(batches[(i + 1) % len(batches)])
        marks.append(clock())
    if trainee.device_type == "cpu":
        return [(b - a) * 1e3 for a, b in pairwise(marks)]
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _guarded(row: TrainRow, call: Callable[[], Any]) -> Any:
    """What ``call`` returns; None if it raised, with the reason in the row."""
    try:
        return call()
    except Exception as error:
        row.status, row.note = why_it_broke(error)
        return None


def _graphs() -> tuple[int, int, int]:
    """Graphs that Dynamo has compiled, breaks between them, CUDA graphs that Inductor left out."""
    from torch._dynamo.utils import counters

    breaks = sum(counters["graph_break"].values())
    return counters["stats"]["unique_graphs"], breaks, counters["inductor"]["cudagraph_skips"]


@contextmanager
def _empty_caches() -> Iterator[None]:
    """Compilers find nothing of earlier runs and models: what comes first would pay for all."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


def _warm_up(R: int, device: torch.device, text: Text) -> None:
    """One step of a small model: the workspaces of the libraries belong to no row's memory."""
    size = replace(SIZES["tiny"], T=min(64, len(text.train) - 1))
    setting = Setting.of(size, min(R, size.D), device, text)
    Trainee(setting.model(ATTENTIONS[PLAIN])).step(setting.batches[0])


def _forget() -> None:
    """Compiled functions and the memory of their CUDA graphs."""
    torch.compiler.reset()


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def table(rows: Sequence[TrainRow]) -> str:
    """Aligned columns, a blank line between modes and sizes."""
    titles = ["shape", "mode", "attention", "B", "T", "H", "D", "ms", "", "vs plain"]
    titles += ["tokens/s", "GB", "first s", "graphs", "breaks", "loss error", "gradient"]
    cells = [
        [
            *(row.shape, row.mode, row.attention, *map(str, (row.B, row.T, row.H, row.D))),
            *times(row.ms, row.ms_p20, row.ms_p80, row.ratio, ".2f"),
            *(number(row.tokens_per_s, ".0f"), number(row.peak_gb, ".2f")),
            *(number(row.first_s, ".1f"), number(row.graphs, "d"), number(row.graph_breaks, "d")),
            *(number(loss_share(row), ".2f"), number(row.gradient_share, ".2f")),
        ]
        for row in rows
    ]
    text = in_blocks(titles, cells, rows, lambda row: (row.shape, row.mode), text_columns=3)
    return f"{text}\n\nloss error, gradient: 1 is the most that passes the gate"


def loss_share(row: TrainRow) -> float | None:
    """The loss curve's error over what passes the gate."""
    if row.loss_error is None or row.loss_allowed is None:
        return None
    return row.loss_error / row.loss_allowed if row.loss_allowed else math.inf


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and fill in what depends on the device."""
    args = parser.parse_args(argv)
    resolve_device(parser, args)
    args.mode = args.mode or list(DEFAULT_MODES[args.device])
    args.attention = args.attention or list(ATTENTIONS)
    args.limit = LIMIT[args.device] if args.limit is None else args.limit
    if args.device == "cpu" and "reduce-overhead" in args.mode:
        parser.error("--mode reduce-overhead: CUDA graphs need a GPU; here: eager, compile")
    return args


def _sizes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Size]:
    """The named shapes, with what the user changes in all of them."""
    changes = {"B": args.batch, "T": args.length, "layers": args.layers, "H": args.heads}
    changes |= {"C": args.width, "vocab": args.vocab}
    given = {name: value for name, value in changes.items() if value is not None}
    sizes = [replace(SIZES[name], **given) for name in args.shape or DEFAULT_SIZES[args.device]]
    for size in sizes:
        if size.C % size.H:
            parser.error(f"{size.name}: --width {size.C} is not a multiple of --heads {size.H}")
        if args.R > size.D:
            parser.error(f"R = {args.R} exceeds the head dim {size.D} of {size.name}")
        if size.vocab < 256:
            parser.error(f"--vocab {size.vocab}: the text is bytes, so at least 256")
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("train_speed.py", __doc__)
    add = parser.add_argument
    add("--shape", nargs="+", choices=SIZES, metavar="NAME", help=", ".join(SIZES))
    add("--mode", nargs="+", choices=MODES, metavar="NAME", help=", ".join(MODES))
    add("--attention", nargs="+", choices=ATTENTIONS, metavar="NAME", help=", ".join(ATTENTIONS))
    add("--R", type=count(0), default=4, metavar="N", help="reciprocal rank (default 4)")
    for name, what in (
        ("batch", "sequences a step"),
        ("length", "tokens of a sequence"),
        ("layers", "blocks"),
        ("heads", "of a layer"),
        ("width", "channels"),
        ("vocab", "tokens to choose from"),
    ):
        add(f"--{name}", type=count(1), metavar="N", help=f"{what}, in every shape")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--seconds", type=seconds, default=SECONDS, metavar="S", help="timing per shape and mode")
    add("--limit", type=seconds, metavar="S", help="begin no case that would end after that")
    add("--json", type=Path, metavar="FILE", help="write every row")
    return parser


if __name__ == "__main__":
    sys.exit(main())
