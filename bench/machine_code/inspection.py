"""What is known of a compiled kernel: registers, spills, shared memory, and its hot loop.

All of it follows from the kernel's key, which also stands for the code that reads it, here, in
``sass.py`` and in ``pipes.py``.
"""

import ast
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler.compiler import get_cache_invalidating_env_vars, get_cache_key

from bench.machine_code import pipes, sass
from bench.machine_code.pipes import ARCHITECTURES, PIPES
from bench.machine_code.sass import TENSOR_MEMORY, Loop, Program

Row = dict[str, Any]  # a kernel's numbers by name

SAME_PTX = {"sm_89": "sm_86"}  # but for the line that names the target, so it is made once
ATTENTION = {  # products of a tile, and the size that counts the rows it streams, twice
    "attention_forward": (2, "BLOCK_N"),  # s, o; k and v
    "key_value_gradient": (4, "BLOCK_M"),  # s, dp, dv, dk; q and do
    "query_gradient": (3, "BLOCK_N"),  # s, dp, dq; k and v
    "decode": (2, "BLOCK_N"),  # s, o; k and v
}


def code_key(module: Any, backend: Any, options: Any) -> str:
    """Of all that decides the PTX: Triton's own cache key, with the IR in place of the source.

    So it also stands for Triton's binary, the assembler's version, every option, and the variables
    of the environment that Triton heeds. The IR is that of the front end, before any pass and
    without line numbers: Python, comments and names do not matter.

    Args:
        module: what the front end has made.
        backend: Triton's, of the target.
        options: of the backend.
    """
    ir = hashlib.sha256(module.str_nodebug().encode()).hexdigest()
    source, variables = SimpleNamespace(hash=lambda: ir), get_cache_invalidating_env_vars()
    return get_cache_key(source, backend, options, env_vars=variables)


def row_key(target: str, code: str) -> str:
    """Of all that decides a kernel's row.

    Args:
        target: that it is assembled for.
        code: its :func:`code_key`.
    """
    return hashlib.sha256("\n".join((target, code, _reader())).encode()).hexdigest()[:16]


@cache
def _reader() -> str:
    """What reads the machine code: the disassembler, and this package but for comments."""
    files = [Path(str(module)) for module in (__file__, sass.__file__, pipes.__file__)]
    trees = [ast.dump(ast.parse(file.read_text())) for file in files]
    return "\n".join((str(knobs.nvidia.nvdisasm.version), *trees))


@dataclass(frozen=True)
class Compiled:
    """One kernel and what the assembler and the disassembler say of it.

    Attributes:
        target: that it is for.
        name: of the jit function, without underscores and ``_kernel``: the stage.
        key: its :func:`row_key`; on another vendor's GPU, Triton's hash.
        kernel: what Triton has compiled; None if that was not asked for.
        label: which launch it comes from.
    """

    target: str
    name: str
    key: str
    kernel: Any = field(repr=False)
    label: str = ""

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory a CTA needs."""
        return self.kernel.metadata.shared

    @property
    def warps(self) -> int:
        """Warps of a CTA, those of all partitions of a specialised kernel included."""
        return _number(r"\.reqntid (\d+)", self.kernel.asm["ptx"]) // 32

    @property
    def specialised(self) -> bool:
        """Whether its warps run code of their own in groups."""
        return "ttg.warp_specialize" in self.kernel.asm["ttgir"]

    @property
    def constants(self) -> dict[str, Any]:
        """The values of its constexpr arguments, e.g. ``{"BLOCK_M": 128}``, bundles opened."""
        source: Any = self.kernel.src
        found: dict[str, Any] = {}
        for path, value in source.constants.items():
            if hasattr(value, "_asdict"):
                found |= value._asdict()
            elif len(path) == 1:  # others are sizes and strides of 1
                found[source.fn.arg_names[path[0]]] = value
        return found

    @property
    def element_size(self) -> int:
        """Bytes of an element of its first operand."""
        operand = next(iter(self.kernel.src.signature.values()))
        return 4 if "fp32" in operand else 1 if "i8" in operand else 2

    @cached_property
    def _assembled(self) -> tuple[str, bytes]:
        """What ``ptxas -v`` says of the kernel's PTX, warnings included, and the machine code.

        The assembler that Triton takes for the target, with Triton's options: the same bits.
        """
        ptx = self.kernel.asm["ptx"]
        if self.target in SAME_PTX:
            ptx = re.sub(
                rf"^\.target {SAME_PTX[self.target]}\b", f".target {self.target}", ptx, flags=re.M
            )
        arch = re.search(r"^\.target (\S+?)(,|$)", ptx, re.M)
        assert arch, "PTX names no target"
        with tempfile.TemporaryDirectory() as folder:
            source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            source.write_text(ptx)
            assembler = get_ptxas(int(self.target.removeprefix("sm_"))).path
            command = [assembler, "-v", f"--gpu-name={arch[1]}", str(source)]
            command += ["-lineinfo", "-o", str(cubin)]
            if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
                command.append("--regAllocOptLevel=2")
            if not self.kernel.metadata.enable_fp_fusion:
                command.append("--fmad=false")
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            return run.stdout + run.stderr, cubin.read_bytes()

    @property
    def assembler_log(self) -> str:
        """What the assembler says of registers, spills and serialised WGMMA."""
        return self._assembled[0]

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

    @property
    def overwritten_operands(self) -> int:
        """How many instructions write what a product in flight may still read: none may."""
        return len(Program(self.sass).overwritten_operands) if self.specialised else 0

    @cached_property
    def sass(self) -> str:
        """The machine code."""
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(self._assembled[1])
            # -ndf: a third faster
            command = [knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(cubin)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def tile_of(stage: str, sizes: dict[str, Any]) -> tuple[int, int]:
    """FLOP of a tile's matrix products, and how many elements it streams in; 0 if it has none.

    Args:
        stage: name of the kernel.
        sizes: its constexpr arguments.
    """
    if stage in ATTENTION:
        products, rows = ATTENTION[stage]
        flops = 2 * products * sizes["BLOCK_M"] * sizes["BLOCK_N"] * sizes["BLOCK_D"]
        return flops, 2 * sizes[rows] * sizes["BLOCK_D"]
    axes = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    if all(axis in sizes for axis in axes):
        m, n, k = (sizes[axis] for axis in axes)
        m *= sizes.get("GROUPS", 1)  # of warps, with the same loop each
        return 2 * m * n * k, (m + n) * k
    return 0, 0


def tiles_per_iteration(
    loop: Loop, warps: int, flops: int, elements: int, element_size: int
) -> int:
    """How many tiles both the products and the copies of an iteration suffice for.

    More products than copies are products computed twice, not an unrolled loop.

    Args:
        loop: the hot loop.
        warps: of the CTA.
        flops: of a tile.
        elements: that a tile streams in.
        element_size: bytes of one.
    """
    if flops == 0:
        return 1
    products = warps * (loop.matrix_flops or loop.vector_flops) / flops
    # Tiles come in 16 bytes or one element at a time; what comes with them (lse, delta) does not.
    widths = [i.bytes_per_lane for i in loop.body if i.base in ("LDG", "LDGSTS")]
    copied = 32 * warps * sum(width for width in widths if width in (16, element_size))
    bulk = loop.count("UTMALDG") / 2  # every tile streams two operands
    return max(1, int(min(products, copied / (elements * element_size) + bulk)))


def inspect(compiled: Compiled) -> Row:
    """One row of the table: everything that is known of a compiled kernel."""
    architecture, warps = ARCHITECTURES[compiled.target], compiled.warps
    program = Program(compiled.sass)
    loop = program.hot_loop()
    # Where groups of warps share a tile, another group's loop may copy for this one's.
    copying = Loop("all", tuple(program.code)) if compiled.specialised else loop
    flops, elements = tile_of(compiled.name, compiled.constants)
    if loop.tensor_memory_products:
        flops = elements = 0
    tiles = tiles_per_iteration(loop, warps, flops, elements, compiled.element_size)
    bulk = tiles * elements * compiled.element_size if copying.count("UTMALDG") else 0
    totals = architecture.clocks(loop.body, warps, bulk)
    clocks = {pipe: total / tiles for pipe, total in totals.items()}
    bound = max(PIPES, key=lambda pipe: clocks[pipe])
    work = warps * loop.matrix_flops / (tiles * flops) if flops else 0.0
    peak = max((architecture.tensor_peak(i) for i in loop.body if i.matrix_shape), default=1)
    ctas, limit = architecture.ctas_per_sm(compiled.registers, compiled.shared_memory, warps)
    return {
        "target": compiled.target,
        "stage": compiled.name,
        "label": compiled.label,
        "key": compiled.key,
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
        "shared_memory": compiled.shared_memory,
        "warps": warps,
        "ctas_per_sm": ctas,
        "limited_by": limit,
        "serialised_wgmma": compiled.serialised_wgmma,
        "overwritten_operands": len(program.overwritten_operands),
        "loop": loop.name,
        "instructions": len(loop.body),
        "mix": dict(Counter(instruction.base for instruction in loop.body).most_common()),
        "matrix_instructions": loop.count("HGMMA", "HMMA", "IGMMA", "IMMA", *TENSOR_MEMORY),
        "wgmma": loop.count("HGMMA", "IGMMA"),
        "async_copies": copying.count("LDGSTS", "UTMALDG"),
        "bulk_copies": copying.count("UTMALDG"),
        "sync_loads": loop.count("LDG"),
        "tiles_per_iteration": tiles,
        "work": round(work, 3),
        "clocks_per_tile": {pipe: round(amount, 1) for pipe, amount in clocks.items()},
        "bound": bound,
        "tensor_peak_share": round(flops / peak / clocks[bound], 3) if work else None,
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in the assembler's log: {text}"
    return int(found[1])
