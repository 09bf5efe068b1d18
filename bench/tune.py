"""Time candidate launch configurations on the GPU at hand, and print rows for ``configs.py``.

    python bench/tune.py                                          # every stage at its usual shapes
    python bench/tune.py --stage attention_forward --D 64 --T 1024 4096 --json tune.json

Every candidate is compiled first, in parallel, and dropped if it spills registers or does not fit.
It is then run on a small problem of odd sizes and compared with the FP64 reference; only one that
passes is timed, as replays of a CUDA graph, in turns with the others; times of the attention
gradients hold the launch of delta, which comes before each. attention_backward is Hopper's kernel
for dq, dk and dv at once; where there is none, that is printed instead. The package itself never
measures anything: what this prints is copied into its table on purpose.
"""

import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.harness.gate import RMS_FACTOR, ROW_FACTOR
from bench.harness.options import DTYPES, check_outputs, count, parser_of, seconds
from bench.harness.report import environment
from bench.harness.timing import Entrant, Timing, measure
from ra_triton.kernels.tiles import TRITON_VERSION, target_of
from ra_triton.launch.configs import LaunchConfig, launch_config, one_pass, warp_specialised
from ref import reciprocal_attention as ref

TOKENS = 16384  # B * T of a problem that is timed
HEADS = 12  # width 768 with heads of 64
Launch = Callable[[LaunchConfig | None], Sequence[Tensor]]
Allocate = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """What one stage is timed on.

    Attributes:
        stage: a stage of ``configs.py``.
        dtype: a key of ``DTYPES``.
        D: head dim.
        T: tokens per batch element.
        B: batch elements.
        H: heads; the projection multiplies ``[B * T, H * D]`` by ``[H * D, 3 * H * D]``.
    """

    stage: str
    dtype: str
    D: int
    T: int
    B: int
    H: int = HEADS

    def small(self) -> "Problem":
        """Odd sizes that reach the masked edges of every tile."""
        return replace(self, T=397, B=2, H=2)

    @property
    def flops(self) -> int:
        """Floating-point operations, half of them masked away where attention is causal."""
        products = {
            "attention_forward": 2,
            "key_value_gradient": 4,
            "query_gradient": 3,
            "attention_backward": 5,
        }
        C = self.H * self.D
        if self.stage in products:
            return products[self.stage] * self.B * self.T * self.T * C
        return 2 * self.B * self.T * C * 3 * C


def attention_candidates(warps: Sequence[int] = (4, 8)) -> list[LaunchConfig]:
    """Tiles of queries by keys."""
    sizes = itertools.product((64, 128), (32, 64, 128), warps, (2, 3, 4))
    return [LaunchConfig(m, w, s, block_n=n) for m, n, w, s in sizes]


def warp_specialised_candidates() -> list[LaunchConfig]:
    """Of the forward kernel for Hopper: warpgroups of 64 queries, keys, and buffers of keys."""
    sizes = itertools.product((2, 3), (64, 128), (2, 3))
    return [LaunchConfig(64, 4, s, block_n=n, groups=g) for g, n, s in sizes]


def gradient_candidates() -> list[LaunchConfig]:
    """Backward tiles: no dim of 128 with 4 warps, whose accumulators do not fit."""
    sizes = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3))
    return [LaunchConfig(m, w, s, block_n=n) for m, n, w, s in sizes if m * n < 128 * 64 * w / 4]


def one_pass_candidates() -> list[LaunchConfig]:
    """Of the backward kernel for Hopper: queries, keys, buffers of queries, and warpgroups.

    Today it has one of these for each head dim, and says so of the others.
    """
    sizes = itertools.product((64, 128), (64, 128), (2, 3), (2, 3))
    return [LaunchConfig(m, 4, s, block_n=n, groups=g) for m, n, s, g in sizes]


def gemm_candidates() -> list[LaunchConfig]:
    """Tiles of rows by columns, and the depth of a step."""
    sizes = itertools.product((64, 128, 256), (64, 128, 256), (32, 64), (4, 8), (3, 4))
    return [
        LaunchConfig(m, w, s, block_n=n, block_k=k)
        for m, n, k, w, s in sizes
        if 64 * 128 <= m * n <= 64 * 128 * w
    ]


KERNELS = {"input_gradient": "projection"}  # where the kernel's name is not the stage's
ONE_PASS_IS_FOR = (
    "sm_80, sm_89, sm_90 and sm_120, 16 bits, heads of 64 or 128, and 256 tokens or more"
)
GEMMS = ("projection", "input_gradient", "weight_gradient")
CANDIDATES = {
    "attention_forward": attention_candidates,
    "key_value_gradient": gradient_candidates,
    "query_gradient": gradient_candidates,
    "attention_backward": one_pass_candidates,
    "projection": gemm_candidates,
    "input_gradient": gemm_candidates,
    "weight_gradient": gemm_candidates,
}


def launcher(problem: Problem, allocate: Allocate) -> tuple[Launch, Callable[..., Any]]:
    """``(launch, exact)``: the stage as a function of its config, and its reference by dtype.

    ``exact(dtype)`` computes the same tensors with ``ref`` and autograd in that dtype. ``allocate``
    is :func:`torch.randn` on a device, or :func:`torch.empty` where kernels are only compiled.
    """
    stage = _gemm if problem.stage in GEMMS else _attention
    return stage(problem, partial(allocate, dtype=DTYPES[problem.dtype]))


def _gemm(problem: Problem, allocate: Allocate) -> tuple[Launch, Callable[..., Any]]:
    from ra_triton.kernels.projection.backward import weight_gradient
    from ra_triton.kernels.projection.forward import projection

    C = problem.H * problem.D
    x = allocate(problem.B, problem.T, C)
    if problem.stage == "projection":
        w = allocate(C, 3 * C) * C**-0.5
        return (
            lambda config: [projection(x, w, None, config=config)],
            lambda dtype: [x.to(dtype) @ w.to(dtype)],
        )
    g = allocate(problem.B, problem.T, 3 * C)
    if problem.stage == "input_gradient":
        w = allocate(C, 3 * C) * C**-0.5
        return (
            lambda config: [projection(g, w.mT, None, config=config)],
            lambda dtype: [g.to(dtype) @ w.mT.to(dtype)],
        )
    return (
        lambda config: [weight_gradient(x, g, config=config)],
        lambda dtype: [x.to(dtype).flatten(0, 1).mT @ g.to(dtype).flatten(0, 1)],
    )


def _attention(problem: Problem, allocate: Allocate) -> tuple[Launch, Callable[..., Any]]:
    from ra_triton.kernels.attention.backward import attention_backward
    from ra_triton.kernels.attention.forward import attention_forward

    B, T, H, D = problem.B, problem.T, problem.H, problem.D
    qkv = allocate(B, T, 3, H, D)
    q, k, v = qkv.unbind(2)
    do = allocate(B, T, H, D)

    def forward(config: LaunchConfig | None) -> Sequence[Tensor]:
        return attention_forward(q, k, v, causal=True, softmax_scale=None, config=config)

    if problem.stage == "attention_forward":
        return forward, lambda dtype: ref.packed_attention(*(t.to(dtype) for t in (q, k, v)))

    of = {"key_value_gradient": (1, 2), "query_gradient": (0,), "attention_backward": (0, 1, 2)}
    wanted = of[problem.stage]  # of dq, dk and dv
    saved: list[Tensor] = []

    def backward(config: LaunchConfig | None) -> Sequence[Tensor]:
        if not saved:
            saved.extend(forward(None))
        grads = torch.empty_like(qkv).unbind(2)
        dq, dk, dv = (t if i in wanted else None for i, t in enumerate(grads))
        o, lse = saved
        attention_backward(
            q, k, v, o, lse, do, dq, dk, dv, causal=True, softmax_scale=None, config=config
        )
        return [grads[i] for i in wanted]

    def exact(dtype: torch.dtype) -> Sequence[Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (q, k, v)]
        out, _ = ref.packed_attention(*leaves)
        grads = torch.autograd.grad(out, leaves, do.to(dtype))
        return [grads[i] for i in wanted]

    return backward, exact


def compile_candidate(job: tuple[str, Problem, LaunchConfig]) -> str | None:
    """Compile for a target without touching the GPU; the reason to drop the candidate, or None."""
    from bench.machine_code.aot import STAGES, compile_for

    name, problem, config = job
    launch, _ = launcher(problem, torch.empty)
    try:
        with ExitStack() as stack:
            for stage in STAGES:
                stack.enter_context(mock.patch.object(stage, "target_of", return_value=name))
            recorded = stack.enter_context(compile_for(name))
            launch(config)
    except Exception as error:
        return f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    own = KERNELS.get(problem.stage, problem.stage)
    names = (own, f"{own}_hopper", f"{own}_one_pass")
    kernel = next(k for k in reversed(recorded) if k.name in names)
    if kernel.spilled_bytes:
        return f"spills {kernel.spilled_bytes} bytes"
    return "serialised WGMMA" if kernel.serialised_wgmma else None


def failure(problem: Problem, config: LaunchConfig, device: torch.device) -> str | None:
    """What is wrong with a candidate's numbers on a small problem of odd sizes, or None."""
    torch.manual_seed(0)
    launch, exact = launcher(problem.small(), partial(torch.randn, device=device))
    truth, eager = exact(torch.float64), exact(DTYPES[problem.dtype])
    for got, true, same_dtype in zip(launch(config), truth, eager, strict=True):
        for name, factor, dims in (("RMS", RMS_FACTOR, None), ("worst row", ROW_FACTOR, -1)):
            error, limit = (
                (t.double() - true).square().mean(dims).max().sqrt().item()
                for t in (got, same_dtype)
            )
            floor = torch.finfo(got.dtype).eps / 4 * true.square().mean().sqrt().item()
            if not error <= factor * max(limit, floor):
                return f"{name} error {error:.1e}, eager PyTorch's is {limit:.1e}"
    return None


def shipped_for(problem: Problem, name: str) -> LaunchConfig | None:
    """What a target launches a stage with, or None where it has no kernel for that."""
    of = (problem.D, DTYPES[problem.dtype], name)
    if problem.stage == "attention_backward":
        return one_pass(*of, problem.T)
    own = None
    if problem.stage == "attention_forward":
        own = warp_specialised(*of, problem.T, True, TRITON_VERSION)
    return own or launch_config(problem.stage, *of, True)


def tune(
    problem: Problem, shipped: LaunchConfig, budget: float, workers: int
) -> list[dict[str, Any]]:
    """One row per candidate, the fastest first, dropped ones last; the shipped one is marked."""
    device = torch.device("cuda")
    name = target_of(device)
    use_tma = name == "sm_90" and problem.dtype != "fp32"
    candidates = CANDIDATES[problem.stage]()
    if problem.stage == "attention_forward" and shipped.groups > 1:
        plain = launch_config(problem.stage, problem.D, DTYPES[problem.dtype], name, True)
        candidates = [plain, *candidates, *warp_specialised_candidates()]
    if shipped.one_pass:
        candidates = [replace(c, one_pass=True) for c in gradient_candidates()]
    candidates = [replace(c, use_tma=use_tma, pdl=shipped.pdl) for c in candidates]
    candidates = list(dict.fromkeys([shipped, *candidates]))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        jobs = [(name, problem, config) for config in candidates]
        reasons = dict(zip(candidates, pool.map(compile_candidate, jobs), strict=True))
    torch.manual_seed(1)
    launch, _ = launcher(problem, partial(torch.randn, device=device))
    entrants = []
    for config in candidates:
        if reasons[config] is None:
            reasons[config] = _run_failure(problem, config, device)
        if reasons[config] is None:
            call = lambda config=config: launch(config)[0]  # noqa: E731
            entrants.append(Entrant(str(config), call, torch.no_grad, tolerance=0.0))
    timings = measure(entrants, budget, on_gpu=True)
    rows = [_row(problem, c, c == shipped, reasons[c], timings.get(str(c))) for c in candidates]
    return sorted(rows, key=lambda row: row["ms"] or float("inf"))


def _run_failure(problem: Problem, config: LaunchConfig, device: torch.device) -> str | None:
    from triton.runtime.errors import OutOfResources

    try:
        return failure(problem, config, device)
    except OutOfResources as error:
        return f"does not fit: {error}"


def _row(
    problem: Problem, config: LaunchConfig, shipped: bool, reason: str | None, timing: Timing | None
) -> dict[str, Any]:
    times = timing and (timing.graph or timing.eager)
    return {
        "problem": asdict(problem),
        "config": asdict(config),
        "shipped": shipped,
        "dropped": reason,
        "ms": times and times.median,
        "p20": times and times.p20,
        "p80": times and times.p80,
        "tflops": times and problem.flops / times.median / 1e9,
    }


def describe(row: dict[str, Any], device: str) -> str:
    """A candidate as a line for ``configs.py``, with the measurement behind it."""
    c = row["config"]
    tile = {"m": c["block_m"], "n": c["block_n"], "k": c["block_k"]}
    words = [f"{name}={size}" for name, size in tile.items() if size]
    words += [f"warps={c['num_warps']}", f"stages={c['num_stages']}"]
    words += ["tma=True"] * c["use_tma"]
    words += [f"groups={c['groups']}"] * (c["groups"] > 1)
    text = f"row({', '.join(words)})"
    if row["dropped"]:
        return f"{text}  # dropped: {row['dropped']}"
    mark = ", shipped" if row["shipped"] else ""
    figures = f"{row['ms'] * 1e3:.1f} us ({row['p20'] * 1e3:.1f}..{row['p80'] * 1e3:.1f})"
    return f"{text}  # {device}: {figures}, {row['tflops']:.0f} TFLOP/s{mark}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a shipped configuration is dropped."""
    parser = parser_of("tune.py", __doc__)
    add = parser.add_argument
    add("--stage", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    add("--D", nargs="+", type=count(1), default=[64, 128], help="head dims")
    add("--T", nargs="+", type=count(1), default=[1024, 4096], help=f"lengths; B * T = {TOKENS}")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--seconds", type=seconds, default=3.0, help="timing per problem")
    add("--workers", type=count(1), default=8, help="processes that compile")
    add("--top", type=count(1), default=5, help="candidates to print per problem")
    add("--json", type=Path, help="write every row")
    args = parser.parse_args(argv)
    check_outputs(parser, {"json": args.json})
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here, and there is nothing to tune without one")

    name = target_of(torch.device("cuda"))
    env = environment(torch.device("cuda"))
    print(", ".join(f"{key} {value}" for key, value in env.items()))
    rows = []
    for stage, D in itertools.product(args.stage, args.D):
        lengths = args.T[:1] if stage in GEMMS else args.T  # a GEMM sees B * T alone
        for T in lengths:
            problem = Problem(stage, args.dtype, D, T, max(1, TOKENS // T))
            print(f"\n# {problem}", flush=True)
            shipped = shipped_for(problem, name)
            if shipped is None:
                print(f"# no such kernel: it is for {ONE_PASS_IS_FOR}; this is {name}", flush=True)
                continue
            tuned = tune(problem, shipped, args.seconds, args.workers)
            rows += tuned
            shown = [r for i, r in enumerate(tuned) if i < args.top or r["shipped"]]
            print("\n".join(describe(row, env["device"]) for row in shown), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"environment": env, "rows": rows}, indent=1) + "\n")
    bad = [row for row in rows if row["shipped"] and row["dropped"]]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
