"""What a training step of a GPT costs with reciprocal attention, beside nanoGPT's own attention.

    python bench/train_speed.py                           # four shapes of 124M, some minutes
    python bench/train_speed.py --shape b12 --mode compile --attention plain free
    python bench/train_speed.py --device cpu              # a tiny one, seconds

A step is what nanoGPT does: bf16 autocast around the forward, backward, gradients clipped to norm
1, fused AdamW; no bias, no dropout, tied embeddings, a vocabulary of 50,304. ``plain`` is nanoGPT's
CausalSelfAttention, ``free`` and ``composed`` are RACausalSelfAttention with that parametrisation.
Models of one shape and mode live in one process and take turns; all start from equal weights and
see equal batches.

The gate is the loss curve of the first steps and the gradient of the first. The answer is float32,
from plain PyTorch that trains the same parameters. The scale is how far bf16 autocast takes plain
PyTorch from it, by that kernel of SDPA which goes furthest. A model whose losses are more than
twice as far away, or a gradient of its more than four times, gets no time.

``first s`` is the first step with empty compile caches, so with all that Inductor compiles; this
package's own kernels compile once in a process, in the first row that launches them. ``GB`` is the
most that a model allocated, its parameters and optimizer included, without the other models.
"""

import argparse
import gc
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.attentions import (
    ATTENTIONS,
    PLAIN,
    REFERENCES,
    Maker,
    let_attention_matter,
    start_from,
)
from bench.data import Text, batch_of, load_text
from bench.gate import RMS_FACTOR, ROW_FACTOR, why_it_broke
from bench.gpt import GPT, GPTConfig
from bench.options import check_outputs, count, parser_of, resolve_device, seconds
from bench.report import (
    ERROR,
    FAILED_GATE,
    OK,
    SKIPPED,
    aligned,
    environment,
    header,
    number,
    remark,
    times,
    write_json,
)
from bench.timing import MIN_ROUNDS, Quantiles, turns, without_garbage_collection

GATE_STEPS = 10  # of the loss curves
TURN_STEPS = 5  # timed steps of a turn, after one that is not
TEXT_BYTES = 2**20  # of Python's standard library, bytes as tokens
BATCHES = 16  # on the device before the first step
REFERENCE_TOKENS = 2**14  # of one micro-batch: float32 activations of 64 sequences do not fit
LEARNING_RATE = 6e-4
KERNELS = {
    "cuda": (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    ),
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
}
SECONDS = 4.0  # of timing per shape and mode
LIMIT = {"cuda": 400.0, "cpu": math.inf}  # seconds after which no case is begun


@dataclass(frozen=True)
class Size:
    """A GPT and its batch: ``B`` sequences of ``T`` tokens, ``H`` heads of ``D``."""

    name: str
    B: int
    T: int
    layers: int = 12
    H: int = 12
    C: int = 768
    vocab: int = 50304

    @property
    def D(self) -> int:
        """Lanes of a head."""
        return self.C // self.H

    @property
    def config(self) -> GPTConfig:
        """Of the model: nanoGPT's for training from scratch."""
        return GPTConfig(self.T, self.vocab, self.layers, self.H, self.C, 0.0, bias=False)


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

MODES: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda model: model,
    "compile": torch.compile,
    "reduce-overhead": partial(torch.compile, mode="reduce-overhead"),
}
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


@dataclass
class Answer:
    """The first steps in eager PyTorch.

    Attributes:
        losses: of each step in float32.
        rounded: the same under bf16 autocast, by each of SDPA's kernels that runs.
        gradients: of the first step in float32, by parameter.
        errors: the largest RMS error of a gradient among ``rounded``, by :func:`_pool`.
    """

    losses: list[float]
    gradients: dict[str, Tensor]
    rounded: list[list[float]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def add_rounded(self, losses: list[float], errors: dict[str, float]) -> None:
        """One more run under autocast; no error counts as smaller than bf16's own rounding."""
        self.rounded.append(losses)
        for pool, size in _pooled_rms(self.gradients.items()).items():
            rounding = torch.finfo(torch.bfloat16).eps / 4 * size
            self.errors[pool] = max(self.errors.get(pool, 0.0), errors[pool], rounding)

    @property
    def allowed(self) -> float:
        """How far in RMS a loss curve may be from the exact one."""
        return RMS_FACTOR * max(_distance(losses, self.losses) for losses in self.rounded)

    def gradient_share(self, errors: Mapping[str, float]) -> tuple[float, str]:
        """The worst gradient's error over what passes, and its pool; few elements need a margin."""
        shares = {pool: errors[pool] / (ROW_FACTOR * scale) for pool, scale in self.errors.items()}
        worst = max(shares, key=lambda pool: math.inf if math.isnan(shares[pool]) else shares[pool])
        return shares[worst], worst

    def failure(self, losses: Sequence[float], errors: Mapping[str, float]) -> str | None:
        """What is wrong with a model's losses or its first gradient, or None."""
        error = _distance(losses, self.losses)
        if not error <= self.allowed:  # a NaN fails
            return f"loss curve: RMS error {error:.1e}, at most {self.allowed:.1e} passes"
        share, pool = self.gradient_share(errors)
        if not share <= 1:
            return f"gradient of {pool}: RMS error is {share:.1f} times what passes"
        return None


def gradient_errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """RMS error of gradients, those of one parameter in all layers taken together."""
    return _pooled_rms((name, found[name] - t) for name, t in exact.items())


def _pooled_rms(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, t in tensors:
        pool = _pool(name)
        squares[pool] = squares.get(pool, 0.0) + t.square().sum().item()
        counts[pool] = counts.get(pool, 0) + t.numel()
    return {pool: math.sqrt(squares[pool] / counts[pool]) for pool in squares}


def _pool(name: str) -> str:
    """``transformer.h.3.attn.c_attn.weight`` → ``attn.c_attn.weight``."""
    return re.sub(r"^transformer\.(h\.\d+\.)?", "", name)


class Loss(nn.Module):
    """A model that returns its mean loss, as nanoGPT's does when it gets targets."""

    def __init__(self, gpt: GPT) -> None:
        """Around the model."""
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of tokens ``[B, T]`` and the ones that follow, ``[B, T]``."""
        logits = self.gpt(tokens)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


Batch = tuple[Tensor, Tensor]  # tokens and targets, [B, T]
Look = Callable[[dict[str, Tensor]], None]  # takes gradients by parameter


class Trainee:
    """A model in training."""

    def __init__(self, gpt: GPT, mode: str = "eager", autocast: bool = True) -> None:
        """``mode`` is one of :data:`MODES`."""
        self.gpt, self.mode, self.autocast = gpt, mode, autocast
        self.device_type = gpt.lm_head.weight.device.type
        self.optimizer = gpt.adamw(LEARNING_RATE, fused=True)
        self.model = MODES[mode](Loss(gpt))

    def step(self, *pieces: Batch, look: Look | None = None) -> list[Tensor]:
        """One step; the losses of the batch's pieces, which the next step may overwrite.

        ``look`` is called with the gradients before they are clipped.
        """
        whole = sum(len(tokens) for tokens, _ in pieces)
        losses = []
        for tokens, targets in pieces:
            if self.mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
                loss = self.model(tokens, targets)
            if len(pieces) > 1:
                loss = loss * (len(tokens) / whole)
            loss.backward()
            losses.append(loss.detach())
        if look is not None:
            look({n: p.grad for n, p in self.gpt.named_parameters() if p.grad is not None})
        nn.utils.clip_grad_norm_(self.gpt.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    def losses(
        self, batches: Sequence[Batch], look: Look, tokens: int | None = None
    ) -> Iterator[float]:
        """The loss of each step; ``look`` gets the first gradient.

        With ``tokens`` a batch goes in pieces of at most so many, whose gradients add up.
        """
        for i, batch in enumerate(batches):
            rows = len(batch[0]) if tokens is None else max(1, tokens // batch[0].shape[1])
            pieces = list(zip(*(t.split(rows) for t in batch), strict=True))
            yield sum(loss.item() for loss in self.step(*pieces, look=None if i else look))


@dataclass
class Bench:
    """What the cases of one size share.

    Attributes:
        size: of model and batch.
        R: reciprocal rank.
        device: of the models.
        batches: of which the first :data:`GATE_STEPS` make the loss curves.
        state: the plain model's weights, from which all start.
        answers: by the maker of the reference.
    """

    size: Size
    R: int
    device: torch.device
    batches: list[Batch]
    state: dict[str, Tensor]
    answers: dict[Maker, Answer] = field(default_factory=dict)

    @classmethod
    def of(cls, size: Size, R: int, device: torch.device, text: Text) -> "Bench":
        """Batches and weights, the same on each run."""
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(BATCHES):
            piece = batch_of(text.train, size.B, size.T + 1, generator)
            batches.append((piece[:, :-1].to(device), piece[:, 1:].to(device)))
        batches = [(x.contiguous(), y.contiguous()) for x, y in batches]
        with device:
            gpt = GPT(size.config, partial(_make, ATTENTIONS[PLAIN], R))
        state = let_attention_matter(gpt).state_dict()
        return cls(size, R, device, batches, state)

    def model(self, make: Maker) -> GPT:
        """A new model with these layers and the weights of :attr:`state`."""
        with self.device:
            gpt = GPT(self.size.config, partial(_make, make, self.R))
        return start_from(gpt, self.state)

    def answer(self, attention: str) -> Answer:
        """What an attention is held against; computed once."""
        make = REFERENCES[attention]
        if make not in self.answers:
            gradients: dict[str, Tensor] = {}
            losses = self._losses(
                make,
                lambda found: gradients.update((n, t.clone()) for n, t in found.items()),
                False,
            )
            answer = Answer(losses, gradients)
            for kernel in KERNELS[self.device.type]:
                self._add_rounded(answer, make, kernel)
            self.answers[make] = answer
        return self.answers[make]

    def _add_rounded(self, answer: Answer, make: Maker, kernel: Any) -> None:
        """The steps under autocast by one kernel of SDPA, where it runs."""
        errors: dict[str, float] = {}
        try:
            with sdpa_kernel(kernel):
                losses = self._losses(make, _into(errors, answer), autocast=True)
        except RuntimeError as error:
            if why_it_broke(error)[0] == ERROR:
                raise
        else:
            answer.add_rounded(losses, errors)

    def _losses(self, make: Maker, look: Look, autocast: bool) -> list[float]:
        trainee = Trainee(self.model(make), autocast=autocast)
        return list(trainee.losses(self.batches[:GATE_STEPS], look, REFERENCE_TOKENS))


def _into(errors: dict[str, float], answer: Answer) -> Look:
    return lambda found: errors.update(gradient_errors(found, answer.gradients))


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
        bench = Bench.of(size, args.R, device, text)
        for mode in args.mode:
            began = time.perf_counter()
            rows = [TrainRow.of(size, args.R, mode, name) for name in args.attention]
            if began - start + (0.0 if mode == "eager" else longest) > args.limit:
                for row in rows:
                    row.status, row.note = SKIPPED, f"no time left of --limit {args.limit:g}"
            else:
                print(f"{size.name}, {mode} ...", file=sys.stderr, flush=True)
                measure_case(rows, bench, args.seconds)
                longest = max(longest, time.perf_counter() - began)
            yield rows


def measure_case(rows: Sequence[TrainRow], bench: Bench, seconds: float) -> None:
    """Gate and time the models of one size and mode against each other; fills the rows."""
    _forget()
    trainees: dict[str, Trainee] = {}
    for row in rows:
        trainee = _guarded(row, partial(_prepare, row, bench))
        if trainee is not None:
            trainees[row.attention] = trainee
        else:
            _free_memory(bench.device)
    samples = _time(rows, trainees, bench, seconds)
    for row in rows:
        if row.attention in samples:
            row.fill(Quantiles.of(samples[row.attention]))
    plain = [row.ms for row in rows if row.plain and row.ms is not None]
    for row in rows:
        if plain and row.ms is not None:
            row.ratio = row.ms / plain[0]
    trainees.clear()
    _forget()
    _free_memory(bench.device)


def _prepare(row: TrainRow, bench: Bench) -> Trainee | None:
    """Build a model, train its first steps; None if its loss curve fails the gate."""
    answer, on_gpu = bench.answer(row.attention), bench.device.type == "cuda"
    _free_memory(bench.device)
    before = torch.cuda.memory_allocated() if on_gpu else 0
    trainee = Trainee(bench.model(ATTENTIONS[row.attention]), row.mode)
    counted = _graphs()
    with _empty_caches() if on_gpu or row.mode != "eager" else nullcontext():
        start = time.perf_counter()
        losses: list[float] = []
        errors: dict[str, float] = {}
        for loss in trainee.losses(bench.batches[:GATE_STEPS], _into(errors, answer)):
            if not losses:
                row.first_s = time.perf_counter() - start
            losses.append(loss)
    if on_gpu:
        row.peak_gb = (torch.cuda.max_memory_allocated() - before) / 1e9
    row.first_loss, row.last_loss = losses[0], losses[-1]
    row.loss_error, row.loss_allowed = _distance(losses, answer.losses), answer.allowed
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
    rows: Sequence[TrainRow], trainees: dict[str, Trainee], bench: Bench, seconds: float
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
                    turn = partial(_turn, trainees[name], bench.batches)
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
    bench = Bench.of(size, min(R, size.D), device, text)
    Trainee(bench.model(ATTENTIONS[PLAIN])).step(bench.batches[0])


def _forget() -> None:
    """Compiled functions and the memory of their CUDA graphs."""
    torch.compiler.reset()


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _make(make: Maker, R: int, config: GPTConfig) -> nn.Module:
    return make(config, R)


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """RMS difference."""
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))


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
    title, *body = aligned([titles, *cells], text_columns=3)
    lines = [title]
    for i, row in enumerate(rows):
        if i and (row.shape, row.mode) != (rows[i - 1].shape, rows[i - 1].mode):
            lines.append("")
        lines.append(f"{body[i]}  {remark(row.status, row.note)}".rstrip())
    return "\n".join([*lines, "", "loss error, gradient: 1 is the most that passes the gate"])


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
