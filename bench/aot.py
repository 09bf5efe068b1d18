"""Compile what the launchers launch for a GPU that is not here, and read the machine code.

``compile_for("sm_90")`` stands in for Triton's driver: inside it a launcher runs as always, on CPU
tensors, but its launch stops after compilation, and the compiled kernel is recorded. So what is
inspected is exactly what a GPU of that kind would run, specialisation included.

``python -m bench.aot sm_90`` compiles every shipped configuration and prints one JSON line each.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ra_triton.kernels import attention_forward, packing, projection

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90")
SHARED_MEMORY_LIMIT = {  # bytes one CTA may use
    target: kib * 1024 for target, kib in zip(TARGETS, (163, 99, 99, 227), strict=True)
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _CompileOnlyDriver:
    """Answers what the JIT asks of a driver before it launches."""

    def __init__(self, target: str) -> None:
        self.arch = int(target.removeprefix("sm_"))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # the JIT keeps one cache of compiled kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel and what the assembler and the disassembler say of it."""

    name: str
    target: str
    kernel: Any = field(repr=False)

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory a CTA needs."""
        return self.kernel.metadata.shared

    @cached_property
    def assembler_log(self) -> str:
        """``ptxas -v`` on the kernel's PTX, warnings included."""
        ptx = self.kernel.asm["ptx"]
        arch = re.search(r"^\.target (\S+?)(,|$)", ptx, re.M)
        assert arch, "PTX names no target"
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "kernel.ptx")
            source.write_text(ptx)
            command = [_tool("ptxas"), "-v", f"--gpu-name={arch[1]}", str(source)]
            command += ["-o", str(Path(folder, "kernel.cubin"))]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
        return run.stdout + run.stderr

    @property
    def registers(self) -> int:
        """Registers per thread."""
        return _number(r"Used (\d+) registers", self.assembler_log)

    @property
    def spilled_bytes(self) -> int:
        """Bytes of spill stores and loads."""
        return _number(r"(\d+) bytes spill stores", self.assembler_log) + _number(
            r"(\d+) bytes spill loads", self.assembler_log
        )

    @property
    def serialised_wgmma(self) -> bool:
        """Whether the assembler gave up on asynchronous WGMMA (warnings C7510 to C7519)."""
        return re.search(r"C751\d", self.assembler_log) is not None

    @cached_property
    def sass(self) -> str:
        """The machine code."""
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(self.kernel.asm["cubin"])
            command = [_tool("nvdisasm"), "-c", str(cubin)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def count(self, opcode: str) -> int:
        """How many instructions of the machine code have this opcode, e.g. ``"HGMMA"``."""
        return len(re.findall(rf"\b{opcode}\b", self.sass))


@contextmanager
def compile_for(target: str) -> Iterator[list[Compiled]]:
    """Record, instead of launching, every kernel launched inside; see the module docstring."""
    recorded: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        recorded.append(Compiled(self.fn.__name__, target, kernel))
        return kernel

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_CompileOnlyDriver(target))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield recorded
    finally:
        driver._active = before


def shipped(target: str) -> Iterator[tuple[str, Compiled]]:
    """Every kernel in every configuration that the package launches on ``target``, with a label."""
    with (
        mock.patch.multiple(attention_forward, target_of=lambda _: target),
        mock.patch.multiple(projection, target_of=lambda _: target),
        mock.patch.multiple(packing, target_of=lambda _: target),
    ):
        for label, launch in _launches():
            with compile_for(target) as recorded:
                launch()
            (compiled,) = recorded
            yield label, compiled


def _launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches that together reach every row of the config table and every kernel variant."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for D in (32, 64, 128):
            for causal in (True, False):
                yield f"attention {name} D={D} causal={causal}", _attention(dtype, D, causal)
            yield f"attention {name} D={D} misaligned", _attention(dtype, D, True, offset=1)
            for in_place in (True, False):
                yield f"packing {name} D={D} in_place={in_place}", _packing(dtype, D, in_place)
        for D in (16, 20, 72, 80, 96):
            yield f"attention {name} D={D}", _attention(dtype, D, True)
        for transposed in (False, True):
            for C, offset in ((768, 0), (768, 1), (770, 0)):
                label = f"projection {name} C={C} offset={offset} transposed={transposed}"
                yield label, _projection(dtype, C, transposed, offset)


def _tensor(dtype: torch.dtype, *shape: int, offset: int = 0) -> Tensor:
    """Uninitialised memory, ``offset`` elements away from an aligned address."""
    n = math.prod(shape)
    return torch.empty(n + offset, dtype=dtype)[offset:].view(shape)


def _attention(dtype: torch.dtype, D: int, causal: bool, offset: int = 0) -> Callable[[], Any]:
    q, k, v = _tensor(dtype, 2, 1024, 3, 12, D, offset=offset).unbind(2)
    return partial(attention_forward.attention_forward, q, k, v, causal=causal, softmax_scale=None)


def _packing(dtype: torch.dtype, D: int, in_place: bool) -> Callable[[], Any]:
    q, k, _ = _tensor(dtype, 2, 1024, 3, 12, D).unbind(2)
    low = _tensor(dtype, 2, 1024, 12, 4)
    return partial(packing.pack_ if in_place else packing.pack, q, k, low, low)


def _projection(dtype: torch.dtype, C: int, transposed: bool, offset: int) -> Callable[[], Any]:
    x = _tensor(dtype, 2, 1024, C, offset=offset)
    w = _tensor(dtype, 2304, C).mT if transposed else _tensor(dtype, C, 2304)
    return partial(projection.projection, x, w, _tensor(dtype, 2304))


def _tool(name: str) -> str:
    """A binary of Triton's wheel."""
    return str(_TOOLS / name)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in the assembler's log: {text}"
    return int(found[1])


def main() -> None:
    """Print what every shipped kernel needs on the targets named on the command line."""
    for target in sys.argv[1:] or TARGETS:
        for label, compiled in shipped(target):
            row = {
                "target": target,
                "label": label,
                "kernel": compiled.name,
                "registers": compiled.registers,
                "spilled_bytes": compiled.spilled_bytes,
                "shared_memory": compiled.shared_memory,
                "serialised_wgmma": compiled.serialised_wgmma,
                "HGMMA": compiled.count("HGMMA"),
                "HMMA": compiled.count("HMMA"),
                "LDGSTS": compiled.count("LDGSTS"),
                "UTMALDG": compiled.count("UTMALDG"),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
