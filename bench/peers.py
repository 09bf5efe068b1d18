"""Attention alone beside the fastest kernels there are: forward, backward, and both.

    python bench/peers.py
    python bench/peers.py --cases 64-4k 128-4k --providers ra cudnn fa4-deterministic --json p.json

Peers are cuDNN and FlashAttention-2 as PyTorch brings them, and, where they are installed,
FlashAttention-4 (``flash_attn.cute``), FlashAttention-3 (``flash_attn_interface``) and
FlashAttention-2 (``flash_attn``); where not, the row says so. Each is called as its users call it,
on ``[B, T, H, D]`` tensors. A provider whose numbers are wrong is not timed: the gate holds the
output and all gradients of the first and the last group of heads against ``ref`` in FP64.

TFLOP/s count the scores that the mask leaves: two products of each forward, five backward; the
seven of a backward that computes scores twice count as five.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness.gate import Gate, admit, answer
from bench.harness.options import (
    DTYPES,
    add_machine_options,
    check_outputs,
    check_runnable,
    parser_of,
    resolve_machine,
)
from bench.harness.providers import NO_TRITON_HERE, Attend, Layer
from bench.harness.report import (
    ERROR,
    FAILED_GATE,
    SKIPPED,
    environment,
    header,
    in_blocks,
    number,
    times,
    write_json,
)
from bench.harness.timing import Entrant, Outputs, Timing, measure
from ra_triton import packed_attention
from ref import reciprocal_attention as ref

PHASES = ("forward", "backward", "both")
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}


@dataclass(frozen=True)
class Case:
    """One attention: sizes, and what a query sees.

    Attributes:
        window: keys before a query's own, with those after it if it is not causal; None: all.
    """

    name: str
    B: int
    T: int
    H: int
    H_kv: int
    D: int
    causal: bool = True
    window: int | None = None

    @property
    def window_size(self) -> tuple[int, int]:
        """As :func:`ra_triton.packed_attention` takes it."""
        if self.window is None:
            return (-1, -1)
        return (self.window, 0 if self.causal else self.window)

    def flops(self, phase: str) -> int:
        """Of the products of one phase, over scores that are seen."""
        T = self.T
        w = T - 1 if self.window is None else min(self.window, T - 1)
        before = w * (w + 1) // 2 + (T - 1 - w) * w
        scores = T + before * (1 if self.causal else 2)
        return 2 * PRODUCTS[phase] * self.B * self.H * self.D * scores


def _wide(D: int, length: str, T: int, **more: Any) -> Case:
    """16384 tokens of width 2048, FlashAttention's own sweep."""
    H = 2048 // D
    return Case(f"{D}-{length}", 16384 // T, T, H, H, D, **more)


CASES = {
    case.name: case
    for case in (
        *(_wide(D, f"{T // 1024}k", T) for D in (64, 128) for T in (1024, 2048, 4096, 16384)),
        *(_wide(D, "4k-full", 4096, causal=False) for D in (64, 128)),
        Case("128-8k-gqa", 2, 8192, 32, 8, 128),
        _wide(64, "8k-window", 8192, window=127),
        Case("cpu", 1, 64, 4, 2, 64),
    )
}


@dataclass(frozen=True)
class Sampled(Layer):
    """A layer of which the gate sees the first and the last group of heads."""

    group: int = 1

    def packed_order(self, outputs: Outputs) -> tuple[Tensor, ...]:
        """The first group of the first batch element, and the last of the last one."""
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        heads = [self.group, self.group, 1, 1][: len(outputs)]
        return tuple(sample(t, n) for t, n in zip(outputs, heads, strict=True))


def sample(t: Tensor, heads: int) -> Tensor:
    """``[2, T, heads, D]`` of ``[B, T, H, D]``: its first heads, and its last."""
    return torch.stack((t[0, :, :heads], t[-1, :, -heads:]))


def _ra(backend: str, case: Case) -> Attend:
    return partial(
        packed_attention,
        causal=case.causal,
        window_size=case.window_size,
        backend=backend,
    )


def _sdpa(case: Case) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=case.H_kv != case.H
        )
        return out.transpose(1, 2)

    return attend


def _flash(module: str, case: Case, **options: Any) -> Attend:
    """``flash_attn_func`` of one of FlashAttention's packages."""
    function = import_module(module).flash_attn_func
    none = None if "cute" in module else -1
    window = tuple(none if side < 0 else side for side in case.window_size)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v, causal=case.causal, window_size=window, **options)
        return out[0] if isinstance(out, tuple) else out

    return attend


@dataclass(frozen=True)
class Peer:
    """One way to compute attention.

    Attributes:
        make: ``attend(q, k, v)`` of a case.
        module: what has to be installed.
        function: what it has to have: flash_attn can be there for its ``cute`` alone.
        on_cpu: whether it runs there.
        windows: whether it has them.
        context: entered around each run of calls.
    """

    make: Callable[[Case], Attend]
    module: str | None = None
    on_cpu: bool = False
    windows: bool = True
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    function: str = ""

    def unavailable(self, device: str) -> str | None:
        """Why it cannot run on a device type, or None."""
        if device == "cpu" and not self.on_cpu:
            return NO_TRITON_HERE if self.module is None else "needs a CUDA device"
        try:
            module = import_module(self.module or "ra_triton")
        except Exception as error:  # a package may break in any way where it does not fit
            return f"no {self.module}: {str(error).partition(chr(10))[0]}"
        if self.function and not hasattr(module, self.function):
            return f"no {self.module}.{self.function}"
        return None


def _pinned(backend: SDPBackend) -> Peer:
    context = partial(sdpa_kernel, backend)
    return Peer(_sdpa, module="torch", windows=False, context=context)


def _flash_peer(module: str, **options: Any) -> Peer:
    return Peer(partial(_flash, module, **options), module=module, function="flash_attn_func")


FA4 = "flash_attn.cute.interface"
PEERS = {
    "ra": Peer(partial(_ra, "triton")),
    "ra-sdpa": Peer(partial(_ra, "sdpa"), on_cpu=True),
    "sdpa": Peer(_sdpa, module="torch", on_cpu=True, windows=False),
    "cudnn": _pinned(SDPBackend.CUDNN_ATTENTION),
    "flash": _pinned(SDPBackend.FLASH_ATTENTION),
    "fa4": _flash_peer(FA4),
    "fa4-deterministic": _flash_peer(FA4, deterministic=True),
    "fa3": _flash_peer("flash_attn_interface"),
    "fa2": _flash_peer("flash_attn"),
}
NOT_BY_DEFAULT = ("ra-sdpa", "sdpa")
DEFAULT = tuple(name for name in PEERS if name not in NOT_BY_DEFAULT)


@dataclass
class PeerRow:
    """One provider in one phase of a case. Numbers are None unless ``status`` is ``"ok"``.

    Times are milliseconds, of a graph's replays where there is one, else of the eager call.
    """

    case: str
    B: int
    T: int
    H: int
    H_kv: int
    D: int
    causal: bool
    window: int | None
    dtype: str
    phase: str
    provider: str
    status: str
    note: str
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    tflops: float | None = None
    ratio: float | None = None
    peak_mb: float | None = None

    def fill(self, timing: Timing, flops: int) -> None:
        """Take over what the clocks say."""
        ms = timing.graph or timing.eager
        self.ms, self.ms_p20, self.ms_p80 = ms.median, ms.p20, ms.p80
        self.tflops = flops / ms.median / 1e9
        self.peak_mb, self.note = timing.peak_mb, timing.note


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a provider failed the gate or broke."""
    parser = _parser()
    args = parser.parse_args(argv)
    resolve_machine(parser, args)
    check_outputs(parser, {"json": args.json})
    on_cpu = args.device == "cpu"
    reasons = {name: PEERS[name].unavailable(args.device) for name in args.providers or ()}
    check_runnable(parser, "providers", reasons)
    names = args.providers or (("ra", "ra-sdpa", "sdpa") if on_cpu else DEFAULT)
    cases = args.cases or (["cpu"] if on_cpu else [name for name in CASES if name != "cpu"])
    args.seconds = (0.3 if on_cpu else 1.0) if args.seconds is None else args.seconds
    device = torch.device(args.device)

    env = environment(device)
    print(header(env, f"attention alone, {args.dtype}", "the fastest peer's"))
    rows: list[PeerRow] = []
    stopped = False
    try:
        with side_stream(device):
            for name in cases:
                rows += measure_case(CASES[name], names, args, device)
    except KeyboardInterrupt:
        stopped = True
        print("stopped: only the cases below are timed", file=sys.stderr)
    print(f"\n{table(rows)}")
    if args.json:
        write_json(args.json, "peers", env, rows)
    bad = [row for row in rows if row.status in (FAILED_GATE, ERROR)]
    for row in bad:
        print(f"{row.provider} at {row.case}: {row.status}: {row.note}", file=sys.stderr)
    return 1 if bad or stopped else 0


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """One that graphs can capture, so that a backward is captured whose forward was not."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def measure_case(
    case: Case, names: Sequence[str], args: argparse.Namespace, device: torch.device
) -> list[PeerRow]:
    """Gate and time all providers on one case, the phases one after the other."""
    inputs, dout = tensors(case, DTYPES[args.dtype], device)
    gate = gate_of(case, inputs, dout)
    sizes = asdict(case)
    row = partial(PeerRow, case=sizes.pop("name"), dtype=args.dtype, **sizes)
    rows: list[PeerRow] = []
    layers: dict[str, tuple[Layer, Peer]] = {}
    for name in names:
        peer = PEERS[name]
        reason = peer.unavailable(device.type)
        if reason is None and case.window is not None and not peer.windows:
            reason = "has no windows"
        status, note = SKIPPED, reason or ""
        if reason is None:
            make = partial(_layer, peer, case, inputs)
            entrant, status, note = admit(name, make, gate, dout, peer.context)
            if entrant is not None:
                layers[name] = make(), peer
        rows += [row(phase=p, provider=name, status=status, note=note) for p in PHASES]
    for phase in PHASES:
        entrants = [
            Entrant(name, _call(phase, layer, peer, dout), peer.context, _tolerances(gate, phase))
            for name, (layer, peer) in layers.items()
        ]
        for name, timing in measure(entrants, args.seconds, device.type == "cuda").items():
            (timed,) = (r for r in rows if (r.phase, r.provider) == (phase, name))
            timed.fill(timing, case.flops(phase))
    compare(rows)
    return rows


def tensors(
    case: Case, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, ...], Tensor]:
    """``(q, k, v)`` that require gradients, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(case.T)
    randn = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    sizes = [(case.B, case.T, heads, case.D) for heads in (case.H, case.H_kv, case.H_kv, case.H)]
    *inputs, dout = (randn(*size) for size in sizes)
    return tuple(t.requires_grad_() for t in inputs), dout


def gate_of(case: Case, inputs: Sequence[Tensor], dout: Tensor) -> Gate:
    """The exact output and gradients of the heads that are sampled, and eager PyTorch's error."""
    group = case.H // case.H_kv
    q, k, v = (sample(t.detach(), n) for t, n in zip(inputs, (group, 1, 1), strict=True))
    attend = partial(_exact, case)
    exact, eager = (
        answer(attend, (q, k, v), sample(dout, group), dtype) for dtype in (torch.float64, q.dtype)
    )
    return Gate.between(("out", "dq", "dk", "dv"), exact, eager, case.D)


def _exact(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ref.packed_attention(q, k, v, causal=case.causal, window_size=case.window_size)[0]


def _layer(peer: Peer, case: Case, inputs: tuple[Tensor, ...]) -> Sampled:
    attend = peer.make(case)
    return Sampled(lambda: attend(*inputs), inputs, group=case.H // case.H_kv)


def _call(phase: str, layer: Layer, peer: Peer, dout: Tensor) -> Callable[[], Outputs]:
    """What is timed: the backward alone starts from one forward that stays, the peer's own."""
    if phase == "both":
        return partial(layer.run, dout)
    if phase == "forward":
        return torch.no_grad()(layer.forward)
    with peer.context():
        out = layer.forward()
    return lambda: torch.autograd.grad(out, layer.inputs, dout, retain_graph=True)


def _tolerances(gate: Gate, phase: str) -> tuple[float, ...]:
    return {"forward": gate.tolerances[:1], "backward": gate.tolerances[1:]}.get(
        phase, gate.tolerances
    )


def compare(rows: Sequence[PeerRow]) -> None:
    """Ratios of one case's times over those of the fastest peer in each phase."""
    for phase in PHASES:
        timed = [(row, row.ms) for row in rows if row.phase == phase and row.ms is not None]
        best = min((ms for row, ms in timed if not row.provider.startswith("ra")), default=None)
        for row, ms in timed:
            row.ratio = ms / best if best else None


def table(rows: Sequence[PeerRow]) -> str:
    """Aligned columns, a blank line between phases and cases."""
    rows = sorted(rows, key=lambda row: (list(CASES).index(row.case), PHASES.index(row.phase)))
    titles = ["case", "phase", "provider", "ms", "", "ratio", "TFLOP/s", "peak MB"]
    cells = [
        [
            *(row.case, row.phase, row.provider),
            *times(row.ms, row.ms_p20, row.ms_p80, row.ratio),
            number(row.tflops, ".0f"),
            number(row.peak_mb, ".0f"),
        ]
        for row in rows
    ]
    return in_blocks(titles, cells, rows, lambda row: (row.case, row.phase))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("peers.py", __doc__)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, metavar="NAME", help=", ".join(CASES))
    add("--providers", nargs="+", choices=PEERS, metavar="NAME", help=", ".join(PEERS))
    add_machine_options(parser)
    add("--json", type=Path, metavar="FILE", help="write every row")
    return parser


if __name__ == "__main__":
    sys.exit(main())
