"""Gluon as the kernels for Hopper use it: its names, some of which differ between minor versions.

Gluon is experimental, so it may change under these kernels. Where a name is missing, or a kernel
does not compile, the plain kernel of the same function runs, and a warning says so, once.
"""

from typing import Any

import torch
import triton

from ra_triton.internals import warn_once

_broken: set[str] = set()  # kernels that were given up

try:
    from triton.experimental.gluon import jit
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    _KINDS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
    if hasattr(tma, "async_load"):  # from Triton 3.8 on; in 3.9 the older names raise
        async_load, async_store = tma.async_load, tma.async_store
    else:
        async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
    store_wait = tma.store_wait
    if hasattr(tma, "async_atomic_add"):  # from Triton 3.8 on
        async_reduce_add = tma.async_atomic_add
    else:
        from triton._C.libtriton import ir
        from triton.experimental.gluon.language._core import builtin

        @builtin
        def async_reduce_add(tensor_desc, coord, src, _semantic=None):  # type: ignore[no-untyped-def]
            """Add a tile in shared memory to global memory by a bulk copy."""
            coord = _semantic._convert_to_ir_values(coord, require_i64=False)
            add = ir.DESCRIPTOR_REDUCE_KIND.ADD
            _semantic.builder.create_async_tma_reduce(add, tensor_desc.handle, coord, src.handle)

    # Whether it is called ``reinterpret``, as from Triton 3.9 on.
    REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

    @jit
    def arrive_at(barrier, threads):  # type: ignore[no-untyped-def]
        """Count the calling threads at a named barrier, and go on."""
        gl.inline_asm_elementwise(
            "bar.arrive $1, $2; // $0", "=r,r,r", [barrier, threads],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    @jit
    def await_at(barrier, threads):  # type: ignore[no-untyped-def]
        """Count the calling threads at a named barrier, and wait until ``threads`` have come."""
        gl.inline_asm_elementwise(
            "bar.sync $1, $2; // $0", "=r,r,r", [barrier, threads],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    @jit
    def fence_async_global():  # type: ignore[no-untyped-def]
        """What this warp has acquired comes ahead of its bulk copies to global memory."""
        gl.inline_asm_elementwise(
            "fence.proxy.async.global; mov.u32 $0, $1;", "=r,r", [gl.to_tensor(0)],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    @jit
    def store_wait_written():  # type: ignore[no-untyped-def]
        """Wait until this warp's bulk stores are written, where ``store_wait`` has them read."""
        gl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; mov.u32 $0, $1;", "=r,r",
            [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    @jit
    def opaque_zero():  # type: ignore[no-untyped-def]
        """0, which the compiler takes for anything, and for another number each time."""
        return gl.inline_asm_elementwise(
            "mov.u32 $0, 0; // $1", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
        )
except (ImportError, AttributeError) as error:
    MISSING: str | None = str(error)
else:
    MISSING = None

__all__ = [
    "MISSING",
    "REINTERPRET",
    "TensorDescriptor",
    "arrive_at",
    "async_load",
    "async_reduce_add",
    "async_store",
    "await_at",
    "fence_async_global",
    "fence_async_shared",
    "gdc_launch_dependents",
    "gdc_wait",
    "give_up",
    "gl",
    "jit",
    "mbarrier",
    "opaque_zero",
    "store_wait",
    "store_wait_written",
    "swizzled",
    "unswizzled",
    "warpgroup_mma",
    "warpgroup_mma_wait",
    "works",
]


def swizzled(bulk: Any, dtype: torch.dtype) -> Any:
    """A :class:`~ra_triton.launch.plans.Bulk` whose blocks lie as the tensor cores read them."""
    return bulk._replace(
        layout=gl.NVMMASharedLayout.get_default_for(list(bulk.block), _KINDS[dtype])
    )


def unswizzled(bulk: Any, dtype: torch.dtype) -> Any:
    """One whose blocks lie row after row."""
    bits = 8 * dtype.itemsize
    return bulk._replace(layout=gl.NVMMASharedLayout(0, bits, rank=len(bulk.block)))


def works(kernel: str) -> bool:
    """Whether a kernel in Gluon may be planned; a warning, once, if not."""
    if MISSING is not None and kernel not in _broken:
        give_up(kernel, MISSING)
    return kernel not in _broken


def give_up(kernel: str, reason: object) -> None:
    """Launch the plain kernel instead of this one from now on."""
    if kernel in _broken:
        return
    _broken.add(kernel)
    lines = [line for line in str(reason).splitlines() if any(map(str.isalpha, line))]
    said = lines[-1].strip() if lines else type(reason).__name__  # below the lines of a kernel
    warn_once(
        f"ra_triton: {kernel} runs without its kernel for Hopper, which Triton "
        f"{triton.__version__} cannot compile: {said}"
    )
