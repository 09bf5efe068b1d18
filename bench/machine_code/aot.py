"""Compile what the launchers launch for a GPU that is not here, and read the machine code.

``compile_for("sm_90")`` stands in for Triton's driver: inside it a launcher runs as always, on CPU
tensors, but its launch stops after compilation, and the compiled kernel is recorded. So what is
inspected is exactly what a GPU of that kind would run, specialisation included. What
``inspection.py`` says of a kernel follows from its key, so it can also stop before Triton's passes.

``shipped("sm_90")`` goes through every configuration that the package launches on a target;
``bench/static.py`` prints what it finds there.
"""

import math
import re
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from bench.machine_code.inspection import SAME_PTX, Compiled, code_key, row_key
from ra_triton.call.norm_rope import NormRope
from ra_triton.call.offsets import Offsets
from ra_triton.kernels.attention import backward as attention_backward
from ra_triton.kernels.attention import decode
from ra_triton.kernels.attention import forward as attention_forward
from ra_triton.kernels.composition import backward as compose_backward
from ra_triton.kernels.composition import forward as compose
from ra_triton.kernels.lanes import append, norm_rope, norm_rope_backward, packing
from ra_triton.kernels.projection import backward as projection_backward
from ra_triton.kernels.projection import forward as projection
from ra_triton.kernels.projection import int8 as projection_int8
from ra_triton.kernels.tiles import TRITON_VERSION
from ra_triton.launch import plans
from ra_triton.launch.configs import ONE_PASS, LaunchConfig, one_pass, warp_specialised
from ra_triton.weights.factors import Factors
from ra_triton.weights.layout import Columns, RALayout

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
STAGES = (
    *(attention_forward, attention_backward, packing, norm_rope, norm_rope_backward),
    *(projection, projection_backward, projection_int8),
    *(append, decode, compose, compose_backward),
)
_HOPPER = "attention_forward_hopper"  # elsewhere these launches are those of _FORWARD
_HOPPER_BACKWARD = "delta_and_lse attention_backward_hopper"
_FORWARD = "attention_forward"
_BACKWARD = f"delta key_value_gradient query_gradient {_HOPPER_BACKWARD}"  # whichever a call takes
_ONE_PASS = "delta attention_backward_one_pass round_query_gradient"
_DECODE = "decode decode_combine"
_WEIGHT, _BIAS = "weight_gradient add_splits", "column_sum add_splits"
_COMPOSE = "compose_backward compose_sums"


class _CompileOnlyDriver:
    """Answers what the JIT asks of a driver before it launches."""

    def __init__(self, target: str) -> None:
        self.target = SAME_PTX.get(target, target)

    def get_current_target(self) -> GPUTarget:
        if self.target.startswith("gfx"):
            return GPUTarget("hip", self.target, 64)
        return GPUTarget("cuda", int(self.target.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return self.target  # the JIT keeps one cache of compiled kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Known(Exception):
    """Ends a compilation when its key is known."""


@contextmanager
def compile_for(target: str, known: Container[str] = ()) -> Iterator[list[Compiled]]:
    """Record, instead of launching, every kernel launched inside; see the module docstring.

    Triton stops at PTX, and :class:`Compiled` assembles: once, with the log, beside the next
    kernel's compilation. What Triton keeps of a kernel without machine code it keeps apart.

    Args:
        target: as for :func:`shipped`.
        known: keys of kernels of which no more than the key is wanted.
    """
    recorded: list[Compiled] = []
    run, add_stages = JITFunction.run, CUDABackend.add_stages

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = None
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            code = getattr(kernel.metadata, "code", None)
            key = row_key(target, code) if code else kernel.hash
        except _Known as found:
            (key,) = found.args
        name = self.__name__.strip("_").removesuffix("_kernel")
        # Triton may have had it from before, too.
        recorded.append(Compiled(target, name, key, None if key in known else kernel))
        return kernel

    def with_key(backend: CUDABackend, stages: dict[str, Any], options: Any, language: Any) -> None:
        add_stages(backend, stages, options, language)
        first, run_first = next(iter(stages.items()))

        def find_key(module: Any, metadata: dict[str, Any]) -> Any:
            metadata["code"] = code_key(module, backend, options)
            key = row_key(target, metadata["code"])
            if key in known:
                raise _Known(key)
            return run_first(module, metadata)

        stages |= {first: find_key, "cubin": lambda module, metadata: b"not assembled"}

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_CompileOnlyDriver(target))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(CUDABackend, "add_stages", with_key),
            knobs.cache.scope(),
        ):
            knobs.cache.dir = str(Path(knobs.cache.dir, "ra_triton_ptx"))
            yield recorded
    finally:
        driver._active = before


def shipped(
    target: str,
    *,
    only: str = "",
    configs: dict[str, LaunchConfig] | None = None,
    known: Container[str] = (),
) -> Iterator[Compiled]:
    """Every kernel in every configuration that the package launches on ``target``.

    Args:
        target: e.g. ``"sm_90"``, or ``"gfx942"``, whose machine code :class:`Compiled` cannot read.
        only: a regular expression that a label has to match somewhere, e.g. ``"projection bf"``;
            launches without such a kernel are not compiled.
        configs: what to launch a stage with instead of its row in the config table.
        known: keys of kernels of which no more than the key is wanted.
    """
    pattern = re.compile(only)
    row = "rocm" if target.startswith("gfx") else target
    seen = set()
    with ExitStack() as stack:
        for stage in STAGES:
            stack.enter_context(mock.patch.object(stage, "target_of", return_value=row))
            instead = partial(_config, configs or {}, stage.launch_config)
            stack.enter_context(mock.patch.object(stage, "launch_config", instead))
        if configs:
            plans.forget_plans()
            stack.callback(plans.forget_plans)
        for names, label, launch in _launches(target):
            if not any(pattern.search(f"{name} {label}") for name in names.split()):
                continue
            with compile_for(target, known) as recorded:
                launch()
            for compiled in recorded:
                full_label = f"{compiled.name} {label}"
                if pattern.search(full_label) and compiled.key not in seen:
                    seen.add(compiled.key)
                    yield replace(compiled, label=full_label)


def _config(
    configs: dict[str, LaunchConfig],
    table: Callable[..., LaunchConfig],
    stage: str,
    *args: Any,
    **kwargs: Any,
) -> LaunchConfig:
    return configs.get(stage) or table(stage, *args, **kwargs)


_Launch = tuple[str, str, Callable[[], Any]]  # names of its kernels, label, launch


def _int8_launches() -> Iterator[_Launch]:
    """Every row of the table, and the variants that differ in the loop or in what is stored."""
    bf16, fp32 = torch.bfloat16, torch.float32
    weight_only: list[tuple[torch.dtype, str, dict[str, Any]]] = [
        *((bf16, columns, {}) for columns in ("all", "low", "other")),
        *((bf16, columns, {"offset": 1}) for columns in ("all", "other")),
        (bf16, "all", {"tokens": 8}),
        (torch.float16, "all", {}),
        (fp32, "all", {}),
        (fp32, "all", {"tokens": 8}),
    ]
    for dtype, columns, sizes in weight_only:
        label = f"{str(dtype).removeprefix('torch.')} weight_only {columns}"
        label += " few" * ("tokens" in sizes) + " misaligned" * ("offset" in sizes)
        yield "int8_projection", label, partial(_int8_projection, dtype, columns, **sizes)
    launch = partial(_int8_projection, fp32, "all")
    yield "int8_projection", "tf32 weight_only all", _with_tf32(launch)
    for offset in (0, 1):
        launch = partial(_int8_projection, bf16, "all", activations=True, offset=offset)
        yield "int8_projection", "bfloat16 w8a8 all" + " misaligned" * offset, launch
    for dtype in (bf16, fp32):
        x, x_int8 = _tensor(dtype, 2, 1024, 768), _tensor(torch.int8, 2, 1024, 768)
        rows = partial(projection_int8.quantize_rows, x, x_int8, _tensor(fp32, 2048))
        yield "quantize_rows", str(dtype).removeprefix("torch."), rows


def _int8_projection(
    dtype: torch.dtype,
    columns: str,
    tokens: int = 2048,
    activations: bool = False,
    offset: int = 0,
) -> None:
    """Launch one for GPT-2's layer at R = 4; ``offset`` misaligns x."""
    layout, C = RALayout(12, 12, 64, 4), 768
    which, N = {
        "all": (Columns(), layout.columns),
        "low": (layout.low_columns, 96),
        "other": (layout.other_columns, layout.columns - 96),
    }[columns]
    w = _tensor(dtype if columns == "other" else torch.int8, N, C)
    w_scale = None if columns == "other" else _tensor(torch.float32, N)
    x = _tensor(torch.int8 if activations else dtype, 1, tokens, C, offset=offset)
    x_scale = _tensor(torch.float32, tokens) if activations else None
    bias, out = _tensor(dtype, layout.columns), _tensor(dtype, 1, tokens, layout.columns)
    projection_int8.int8_projection(x, w, x_scale, w_scale, bias, out, which)


def _launches(target: str) -> Iterator[_Launch]:
    """Launches that together reach every row of the config table and every kernel variant.

    float16 and bfloat16 share their rows, so what is special is compiled for one of them.
    """
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        special = dtype != torch.float16
        for D in (32, 64, 128):
            plain = getattr(one_pass(D, dtype, target, 1024), "one_pass", False)
            for causal in (True, False):
                label = f"{name} D={D} causal={causal}"
                yield _FORWARD, label, _attention(dtype, D, causal)
                # Short ones take two kernels everywhere.
                yield _BACKWARD, label, _attention_grad(dtype, D, causal, T=128 if plain else 1024)
                if plain:
                    yield _ONE_PASS, f"{label} T=1024", _attention_grad(dtype, D, causal)
            for offset in (0, 1) if special else ():
                label = f"{name} D={D} dropout" + " misaligned" * offset
                yield _FORWARD, label, _with_dropout(_attention(dtype, D, offset=offset))
                yield _BACKWARD, label, _with_dropout(_attention_grad(dtype, D, offset=offset))
                if offset:
                    label = f"{name} D={D} misaligned"
                    yield _FORWARD, label, _attention(dtype, D, offset=1)
                    yield _BACKWARD, label, _attention_grad(dtype, D, offset=1)
            for in_place in (True, False):
                yield "pack", f"{name} D={D} in_place={in_place}", _packing(dtype, D, in_place)
            for norm in (True, False) if D == 128 or (D == 64 and dtype == torch.bfloat16) else ():
                if special:
                    label = f"{name} D={D} norm={norm}"
                    yield "norm_rope", label, _norm_rope(dtype, D, norm)
                    yield "norm_rope_backward", label, _norm_rope_grad(dtype, D, norm)
        if special:
            yield _DECODE, f"{name} D=64", _decode(dtype, 64)
            yield _DECODE, f"{name} D=128 rows=32", _decode(dtype, 128, group=8, T_q=4)
            yield _DECODE, f"{name} D=128 misaligned", _decode(dtype, 128, offset=1)
            softcap = partial(_decode(dtype, 128, group=8, T_q=4), softcap=30.0)
            yield "decode", f"{name} D=128 rows=32 softcap", softcap
            yield "append", f"{name} D=64", _append(dtype, 64)
        for D in (16, 20, 72, 80, 96) if special else ():
            label = f"{name} D={D}" + " misaligned" * (D == 20)
            yield _FORWARD, label, _attention(dtype, D)
            yield _BACKWARD, label, _attention_grad(dtype, D)
        for D in (64, 128) if dtype == torch.bfloat16 else ():
            for causal in (True, False):
                label = f"{name} D={D} causal={causal}"
                yield _HOPPER, label, _attention(dtype, D, causal, T=4096)
                if D == 64:
                    yield _HOPPER, f"{label} T=1024", _attention(dtype, D, causal, T=1024)
        for transposed in (False, True):
            label = f"{name} transposed={transposed}"
            misaligned = f"{label} misaligned"
            yield "projection", label, _projection(dtype, 768, transposed)
            yield "projection", misaligned, _projection(dtype, 768, transposed, offset=1)
            label = f"{label} C=770 misaligned"
            yield "projection", label, _projection(dtype, 770, transposed)
        yield "projection", f"{name} input_gradient", _input_gradient(dtype)
        if dtype != torch.float32:  # too few tiles for three groups of warps on Hopper
            yield "projection", f"{name} N=1024", _projection(dtype, 768, False, N=1024)
        for offset in (0, 1):
            label = f"{name} misaligned" if offset else name
            yield (
                _WEIGHT,
                label,
                partial(projection_backward.weight_gradient, *_rows(dtype, offset)),
            )
        yield _BIAS, name, partial(projection_backward.bias_gradient, _rows(dtype, 0)[1])
    yield from _windowed()
    if target == "sm_90":
        yield from _in_one_pass()
        yield from _specialised()
    for D in (32, 64, 128):
        yield _FORWARD, f"tf32 D={D}", _with_tf32(_attention(torch.float32, D))
        yield _BACKWARD, f"tf32 D={D}", _with_tf32(_attention_grad(torch.float32, D))
    yield "decode", "tf32 D=128", _with_tf32(_decode(torch.float32, 128))
    yield "projection", "tf32", _with_tf32(_projection(torch.float32, 768, False))
    weight_gradient = partial(projection_backward.weight_gradient, *_rows(torch.float32, 0))
    yield _WEIGHT, "tf32", _with_tf32(weight_gradient)
    yield from _int8_launches()
    yield from _composing()


def _in_one_pass() -> Iterator[_Launch]:
    """Hopper's backward, which is asked for by its config."""
    offsets = Offsets(_tensor(torch.int32, 3), _tensor(torch.int32, 3), 1024, 1024)
    for D, config in ONE_PASS.items():
        for kind, of in (("", None), (" varlen", offsets)):
            for name, window in (("", (-1, 0)), (" window", (255, 0))):
                call = _attention_grad(torch.bfloat16, D, B=2 if of is None else 1)
                launch = partial(call, window_size=window, offsets=of, config=config)
                yield _HOPPER_BACKWARD, f"bfloat16 D={D}{kind}{name}", launch


def _composing() -> Iterator[_Launch]:
    """GPT-2's layer under autocast and in one dtype, grouped heads of 128, and the widest rank."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for label, dtype, into, heads, D, R in (
        ("float32 to bfloat16 D=64", fp32, bf16, (12, 12), 64, 4),
        ("float32 D=64", fp32, fp32, (12, 12), 64, 4),
        ("bfloat16 D=64", bf16, bf16, (12, 12), 64, 4),
        ("float32 to bfloat16 D=128 R=128", fp32, bf16, (32, 8), 128, 128),
        ("float32 D=128 R=128", fp32, fp32, (32, 8), 128, 128),
        ("bfloat16 D=128 R=128", bf16, bf16, (32, 8), 128, 128),
    ):
        factors = _factors(dtype, into, *heads, D, R)
        yield "compose", label, partial(compose.compose, factors)
        N = (heads[0] + 2 * heads[1]) * D
        for transposed in (False, True):
            dw = _tensor(into, N, 768).mT if transposed else _tensor(into, 768, N)
            launch = partial(compose_backward.compose_gradients, factors, dw, _tensor(into, N))
            label += " transposed" * transposed
            yield _COMPOSE, label, partial(launch, [True] * 9)


def _factors(dtype: torch.dtype, into: torch.dtype, H: int, H_kv: int, D: int, R: int) -> Factors:
    """Of a layer of width 768 with gates per head and biases, packed."""
    widths = (H * D, H_kv * D, H_kv * D)
    weights = (_tensor(dtype, 768, n) for n in widths)
    biases = (_tensor(dtype, n) for n in widths)
    gates = _tensor(dtype, H), _tensor(dtype, H)
    numbers = None, None, H, H_kv, True, into
    return Factors._make((*weights, _tensor(dtype, D, R), *gates, *biases, *numbers))


def _windowed() -> Iterator[_Launch]:
    """Windows, softcaps and variable lengths, alone where that is usual, together at the widest."""
    bf16, fp32 = torch.bfloat16, torch.float32
    window, both = {"window_size": (255, 0)}, {"window_size": (255, 0), "softcap": 30.0}
    offsets = Offsets(_tensor(torch.int32, 3), _tensor(torch.int32, 3), 128, 128)
    for label, dtype, D, dropout, options in (
        ("bfloat16 D=64 window", bf16, 64, False, window),
        ("bfloat16 D=128 window softcap", bf16, 128, False, both),
        ("bfloat16 D=128 window softcap dropout", bf16, 128, True, both),
        ("bfloat16 D=64 varlen", bf16, 64, False, {"offsets": offsets}),
        ("bfloat16 D=128 varlen window softcap", bf16, 128, False, {"offsets": offsets, **both}),
        ("float32 D=128 window softcap", fp32, 128, False, both),
    ):
        for names, launch in (
            (_FORWARD, partial(_attention(dtype, D), **options)),
            (_BACKWARD, partial(_attention_grad(dtype, D), **options)),
        ):
            yield names, label, _with_dropout(launch) if dropout else launch


def _specialised() -> Iterator[_Launch]:
    """Windows, softcaps and sequences in Hopper's own forward kernel, by themselves or not."""
    bf16, window, softcap = torch.bfloat16, {"window_size": (255, 0)}, {"softcap": 30.0}
    for D, T in ((64, 1024), (64, 4096), (128, 4096)):
        row = warp_specialised(D, bf16, "sm_90", T, True, TRITON_VERSION)
        # Of three groups of long rows a softcap spills.
        two = warp_specialised(D, bf16, "sm_90", 1024, T < 2048, TRITON_VERSION)
        both = {"softcap": True, "varlen": True}
        capped = warp_specialised(D, bf16, "sm_90", T, True, TRITON_VERSION, **both) or two
        offsets = {"offsets": Offsets(_tensor(torch.int32, 3), _tensor(torch.int32, 3), T, T)}
        for kind, options in (
            ("window", window),
            ("varlen", offsets),
            ("softcap", softcap),
            ("varlen window softcap", {**offsets, **window, **softcap}),
        ):
            label = f"bfloat16 D={D} {kind}" + " T=1024" * (T == 1024)
            call = _attention(bf16, D, T=T, B=1 if "offsets" in options else 2)
            config = capped if "softcap" in options else row
            yield _HOPPER, label, partial(call, config=config, **options)
    narrow = _attention(bf16, 128, T=4096)
    yield _HOPPER, "bfloat16 D=128 narrow window", partial(narrow, window_size=(127, 0))


def _with_dropout(launch: Callable[..., Any]) -> Callable[[], Any]:
    return partial(launch, dropout_p=0.1, seed=_tensor(torch.int64, 1))


def _with_tf32(launch: Callable[[], Any]) -> Callable[[], Any]:
    """The launch as it is after ``torch.set_float32_matmul_precision("high")``."""

    def run() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            launch()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def _tensor(dtype: torch.dtype, *shape: int, offset: int = 0) -> Tensor:
    """Uninitialised memory, ``offset`` elements away from an aligned address."""
    n = math.prod(shape)
    return torch.empty(n + offset, dtype=dtype)[offset:].view(shape)


def _attention(
    dtype: torch.dtype, D: int, causal: bool = True, offset: int = 0, T: int = 128, B: int = 2
) -> Callable[..., Any]:
    q, k, v = _tensor(dtype, B, T, 3, 12, D, offset=offset).unbind(2)
    return partial(attention_forward.attention_forward, q, k, v, causal=causal, softmax_scale=None)


def _attention_grad(
    dtype: torch.dtype, D: int, causal: bool = True, offset: int = 0, B: int = 2, T: int = 1024
) -> Callable[..., Any]:
    q, k, v = _tensor(dtype, B, T, 3, 12, D, offset=offset).unbind(2)
    dq, dk, dv = _tensor(dtype, B, T, 3, 12, D).unbind(2)
    o, do = _tensor(dtype, B, T, 12, D), _tensor(dtype, B, T, 12, D)
    lse = _tensor(torch.float32, B, 12, T)
    return partial(
        attention_backward.attention_backward,
        *(q, k, v, o, lse, do, dq, dk, dv),
        causal=causal,
        softmax_scale=None,
    )


def _decode(
    dtype: torch.dtype, D: int, group: int = 1, T_q: int = 1, offset: int = 0
) -> Callable[..., Any]:
    q = _tensor(dtype, 2, T_q, 8 * group, D)
    k, v = (_tensor(dtype, 2, 4096, 8, D, offset=offset) for _ in range(2))
    return partial(decode.decode, q, k, v, _tensor(torch.int32, 2), max_length=4096)


def _append(dtype: torch.dtype, D: int) -> Callable[[], Any]:
    new, cache = _tensor(dtype, 2, 1, 8, D), _tensor(dtype, 2, 4096, 8, D)
    return partial(append.append_, cache, cache, _tensor(torch.int32, 2), new, new)


def _rows(dtype: torch.dtype, offset: int) -> tuple[Tensor, Tensor]:
    return _tensor(dtype, 8, 1024, 768, offset=offset), _tensor(dtype, 8, 1024, 2304)


def _packing(dtype: torch.dtype, D: int, in_place: bool) -> Callable[[], Any]:
    q, k, _ = _tensor(dtype, 2, 1024, 3, 12, D).unbind(2)
    low = _tensor(dtype, 2, 1024, 12, 4)
    return partial(packing.pack_ if in_place else packing.pack, q, k, low, low)


def _norm_rope_call(dtype: torch.dtype, D: int, norm: bool) -> NormRope:
    """In a GEMM's buffer, all lanes turning; with a norm half of them, and low lanes come."""
    q, k, _ = _tensor(dtype, 2, 1024, 3, 12, D).unbind(2)
    low = _tensor(dtype, 2, 1024, 12, 4) if norm else None
    weight = _tensor(torch.float32, D) if norm else None
    rope_dims = D // 2 if norm else D
    table = _tensor(torch.float32, 1024, rope_dims // 2)
    eps = 1e-6 if norm else None
    return NormRope(q, k, low, low, weight, weight, table, table, None, rope_dims, eps)


def _norm_rope(dtype: torch.dtype, D: int, norm: bool) -> Callable[[], Any]:
    return partial(norm_rope.norm_rope_, _norm_rope_call(dtype, D, norm))


def _norm_rope_grad(dtype: torch.dtype, D: int, norm: bool) -> Callable[[], Any]:
    call, grad = _norm_rope_call(dtype, D, norm), _tensor(dtype, 2, 1024, 12, D)
    return partial(norm_rope_backward.norm_rope_backward, call, grad, grad, [True] * 6)


def _projection(
    dtype: torch.dtype, C: int, transposed: bool, offset: int = 0, N: int = 2304
) -> Callable[[], Any]:
    x = _tensor(dtype, 2, 1024, C, offset=offset)
    w = _tensor(dtype, N, C).mT if transposed else _tensor(dtype, C, N)
    return partial(projection.projection, x, w, _tensor(dtype, N))


def _input_gradient(dtype: torch.dtype) -> Callable[[], Any]:
    w, g = _tensor(dtype, 768, 2304), _rows(dtype, 0)[1]
    return partial(projection.projection, g, w.mT, None, stage="input_gradient")
