"""What a call costs the host: CPU microseconds of ``ra_attention`` beside a plain SDPA layer.

    python bench/host.py
    python bench/host.py --shape call gpt2 --providers ra-triton plain-sdpa --json host.json

Three kinds of call: ``forward`` without gradients, ``recorded`` for a backward that is not run, and
``train``, forward and backward. On a GPU the clock stops when the work is enqueued, and bursts are
too short to fill the launch queue, so the GPU's own time is not in the numbers. On a CPU there is
no such moment: there, the shape ``call`` has so little to compute that the cost of calling is what
is left. Every call passes the gate before it is timed; providers take turns.

The shape ``layers`` is another measurement: twelve attention modules of GPT-2's width, each beside
a residual, on 64 tokens, in bf16 and under bf16 autocast, eager and compiled. Its numbers are
microseconds a layer, its providers nanoGPT's ``plain`` and the module's ``free`` and ``composed``;
``train`` is ``zero_grad``, forward and backward, as in a training loop.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.gate import Gate, admit, answer
from bench.harness.options import (
    DTYPES,
    add_machine_options,
    check_outputs,
    check_runnable,
    count,
    parser_of,
    resolve_machine,
)
from bench.harness.providers import PROVIDERS, Layer, make_problem
from bench.harness.report import (
    ERROR,
    FAILED_GATE,
    environment,
    header,
    in_blocks,
    number,
    times,
    write_json,
)
from bench.harness.shapes import SHAPES, Shape
from bench.harness.timing import Entrant, Quantiles, turns, without_garbage_collection
from bench.models.attentions import ATTENTIONS, PLAIN, Stack, let_attention_matter, start_from
from bench.models.gpt import GPTConfig

KINDS = {"forward": "forward", "recorded": "train", "train": "train"}  # and the problem's phase
CALLS = 10  # of a burst: at most some 20 launches each, where a CUDA queue holds 1,000
MIN_BURSTS = 20
SECONDS = 3.0  # per shape and kind
LAYERS = "layers"
STACK = Shape(LAYERS, B=1, T=64, H=12, D=64)  # one layer of it
DEPTH = 12
# By what they add to a kind.
COMPILERS: dict[str, Callable[[Stack], Any]] = {
    "": lambda stack: stack,
    ", compiled": torch.compile,
}
PRECISIONS = {"bf16": torch.bfloat16, "bf16 autocast": torch.float32}  # and the parameters' dtype
GPU_PROVIDERS = ("ra-triton", "ra-sdpa", "plain-sdpa")
CPU_PROVIDERS = ("ra-sdpa", "plain-sdpa")


@dataclass
class HostRow:
    """One provider, shape and kind of call. Numbers are None unless ``status`` is ``"ok"``.

    Times are CPU microseconds per call, of ``layers`` per layer; ``extra_us`` is the difference to
    plain attention.
    """

    shape: str
    B: int
    T: int
    C: int
    H: int
    D: int
    R: int
    dtype: str
    provider: str
    plain: bool
    kind: str
    status: str
    note: str
    us: float | None = None
    us_p20: float | None = None
    us_p80: float | None = None
    bursts: int | None = None
    extra_us: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a provider failed the gate or broke."""
    parser = _parser()
    args = parser.parse_args(argv)
    _check_layers(parser, args)
    resolve_machine(parser, args)
    on_gpu = args.device == "cuda"
    check_outputs(parser, {"json": args.json})
    named = args.providers or ()
    reasons = {name: PROVIDERS[name].reason_to_skip(args.device, "op") for name in named}
    check_runnable(parser, "providers", reasons)
    names = args.shape or (["call", "gpt2"] if on_gpu else ["call"])
    shapes = [SHAPES[name] for name in names if name != LAYERS]
    for shape in [*shapes, *[STACK] * (LAYERS in names)]:
        if args.R > shape.D:
            parser.error(f"R = {args.R} exceeds the head dim {shape.D} of {shape.name}")
    args.providers = args.providers or list(GPU_PROVIDERS if on_gpu else CPU_PROVIDERS)
    args.seconds = SECONDS if args.seconds is None else args.seconds

    env = environment(torch.device(args.device))
    dtypes = args.dtype if shapes else " and ".join(PRECISIONS)
    print(header(env, f"CPU us of a call, {dtypes}", "plain attention"))
    if not on_gpu:
        print("No GPU in this run: a call's own arithmetic is in these numbers.")
    rows = [row for shape in shapes for kind in KINDS for row in measure_kind(shape, kind, args)]
    if LAYERS in names:
        rows += measure_layers(args)
    print(f"\n{table(rows)}")
    if args.json:
        write_json(args.json, "host", env, rows)
    bad = [row for row in rows if row.status in (FAILED_GATE, ERROR)]
    for row in bad:
        print(f"{row.provider}, {row.kind}: {row.status}: {row.note}", file=sys.stderr)
    return 1 if bad else 0


def measure_kind(shape: Shape, kind: str, args: argparse.Namespace) -> list[HostRow]:
    """Gate and time all providers on one shape with one kind of call."""
    device = torch.device(args.device)
    with torch.set_grad_enabled(kind != "forward"):
        rows, entrants = _prepare(shape, kind, args, device)
        bursts = _measure(entrants, args.seconds, device.type == "cuda")
    _fill(rows, bursts)
    return rows


def measure_layers(args: argparse.Namespace) -> list[HostRow]:
    """Gate and time stacked attention modules: compiled or not, by precision, by kind."""
    rows = []
    for suffix in COMPILERS:
        for precision in PRECISIONS:
            torch.compiler.reset()
            stacks = _stacks(precision, args)
            for kind in ("forward", "train"):
                rows += _measure_stacks(stacks, kind, suffix, precision, args)
    torch.compiler.reset()
    return rows


def _stacks(precision: str, args: argparse.Namespace) -> dict[str, Stack]:
    """By attention: layers of equal weights, in the parameters' dtype."""
    config = GPTConfig(STACK.T, 1, DEPTH, STACK.H, STACK.C, bias=False)
    torch.manual_seed(0)
    made = {name: Stack(make, config, args.R) for name, make in ATTENTIONS.items()}
    state = let_attention_matter(made[PLAIN]).state_dict()
    return {
        name: start_from(stack, state).to(args.device, PRECISIONS[precision])
        for name, stack in made.items()
    }


def _measure_stacks(
    stacks: dict[str, Stack], kind: str, suffix: str, precision: str, args: argparse.Namespace
) -> list[HostRow]:
    """One kind of call; the gate's answer is the plain stack's output and dx in FP64."""
    device, train = torch.device(args.device), kind == "train"
    on_autocast = PRECISIONS[precision] is torch.float32
    generator = torch.Generator(device).manual_seed(1)
    x, gradient = (
        torch.randn(STACK.B, STACK.T, STACK.C, generator=generator, device=device) for _ in range(2)
    )
    x = x.to(PRECISIONS[precision]).requires_grad_(train)
    calls = {
        name: _under_autocast(COMPILERS[suffix](stack), on_autocast)
        for name, stack in stacks.items()
    }
    sizes = (STACK.name, STACK.B, STACK.T, STACK.C, STACK.H, STACK.D, args.R)
    with torch.set_grad_enabled(train):
        plain_call = _under_autocast(stacks[PLAIN], on_autocast)
        dout = gradient.to(plain_call(x).dtype) if train else None
        exact = answer(copy.deepcopy(stacks[PLAIN]).double(), (x,), dout, torch.float64)
        eager = answer(plain_call, (x,), dout, x.dtype)
        gate = Gate.between(("out", "dx"), exact, eager, STACK.D)
        rows, entrants = [], []
        for name, call in calls.items():
            make = partial(Layer, partial(call, x), (x,))
            entrant, status, note = admit(name, make, gate, dout, nullcontext)
            facts = (precision, name, name == PLAIN, kind + suffix, status, note)
            rows.append(HostRow(*sizes, *facts))
            if entrant is not None:
                if dout is not None:
                    entrant.call = partial(_training_step, stacks[name], call, x, dout)
                entrants.append(entrant)
        bursts = _measure(entrants, args.seconds, device.type == "cuda", calls=1)
    _fill(rows, bursts, DEPTH)
    return rows


def _under_autocast(call: Callable[[Tensor], Tensor], enabled: bool) -> Callable[[Tensor], Tensor]:
    """The call in bf16 autocast, entered each time as a training loop does."""

    def called(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return call(x)

    return called if enabled else call


def _training_step(
    stack: Stack, call: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor
) -> Tensor:
    """What a loop does without an optimizer."""
    stack.zero_grad(set_to_none=True)
    x.grad = None
    out = call(x)
    out.backward(dout)
    return out.detach()


def _fill(rows: Sequence[HostRow], bursts: dict[str, Quantiles], layers: int = 1) -> None:
    """Take over the times of one kind of call, and their difference to plain attention's."""
    for row in rows:
        if row.provider in bursts:
            found = bursts[row.provider]
            row.us, row.us_p20, row.us_p80 = (
                us / layers for us in (found.median, found.p20, found.p80)
            )
            row.bursts = found.n
    plain = [row.us for row in rows if row.plain and row.us is not None]
    for row in rows:
        if plain and row.us is not None:
            row.extra_us = row.us - min(plain)


def _prepare(
    shape: Shape, kind: str, args: argparse.Namespace, device: torch.device
) -> tuple[list[HostRow], list[Entrant]]:
    """Rows of all providers, entrants for those that pass the gate (and so are warm)."""
    problem = make_problem(shape, args.R, "op", DTYPES[args.dtype], device, KINDS[kind])
    gate = Gate.of(problem)
    sizes = (shape.name, shape.B, shape.T, shape.C, shape.H, shape.D, args.R)
    rows, entrants = [], []
    for name in args.providers:
        provider = PROVIDERS[name]
        make = partial(provider.make, problem)
        entrant, status, note = admit(name, make, gate, problem.dout, provider.context)
        rows.append(HostRow(*sizes, args.dtype, name, provider.plain, kind, status, note))
        if entrant is not None:
            if kind == "recorded":
                entrant.call = provider.make(problem).forward
            entrants.append(entrant)
    return rows, entrants


def _measure(
    entrants: Sequence[Entrant], seconds: float, on_gpu: bool, calls: int = CALLS
) -> dict[str, Quantiles]:
    """Microseconds per call, by provider."""
    if not entrants:
        return {}
    synchronize: Callable[[], Any] = torch.cuda.synchronize if on_gpu else _nothing
    samples: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for entrant in entrants:
        _burst(entrant, synchronize, calls)
    deadline = time.perf_counter() + seconds
    with without_garbage_collection():
        for done, order in enumerate(turns(entrants)):
            if done >= MIN_BURSTS and time.perf_counter() > deadline:
                break
            for entrant in order:
                samples[entrant.name].append(_burst(entrant, synchronize, calls))
    return {name: Quantiles.of(us) for name, us in samples.items()}


def _burst(entrant: Entrant, synchronize: Callable[[], Any], calls: int = CALLS) -> float:
    """Microseconds per call of one burst, from an idle GPU until all of it is enqueued."""
    with entrant.context():
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            entrant.call()
        elapsed = time.perf_counter() - start
        synchronize()
    return elapsed / calls * 1e6


def _nothing() -> None:
    """A CPU has nothing to wait for."""


def table(rows: Sequence[HostRow]) -> str:
    """Aligned columns, a blank line between kinds."""
    titles = ["shape", "dtype", "kind", "provider", "us", "", "vs plain", "us more"]
    cells = [
        [
            row.shape,
            row.dtype,
            row.kind,
            row.provider,
            *times(row.us, row.us_p20, row.us_p80, _ratio(row), ".1f"),
            number(row.extra_us, "+.1f"),
        ]
        for row in rows
    ]
    return in_blocks(titles, cells, rows, _case, text_columns=4)


def _case(row: HostRow) -> tuple[str, str, str]:
    return row.shape, row.dtype, row.kind


def _ratio(row: HostRow) -> float | None:
    if row.us is None or row.extra_us is None:
        return None
    return row.us / (row.us - row.extra_us)


def _check_layers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options that ``layers`` has no use for are errors where nothing else would use them."""
    if args.shape and set(args.shape) == {LAYERS}:
        for name, own in (("providers", ATTENTIONS), ("dtype", PRECISIONS)):
            if getattr(args, name):
                parser.error(f"--{name}: the shape {LAYERS} has its own: {', '.join(own)}")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("host.py", __doc__)
    add = parser.add_argument
    names = [*SHAPES, LAYERS]
    add("--shape", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    add("--R", type=count(0), default=4, metavar="N", help="reciprocal rank (default 4)")
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=", ".join(PROVIDERS))
    add_machine_options(parser)
    add("--json", type=Path, metavar="FILE", help="write every row")
    return parser


if __name__ == "__main__":
    sys.exit(main())
