"""Gluon as the kernels for Hopper use it: its names, some of which differ between minor versions.

Gluon is experimental, so it may change under these kernels. Where a name is missing, or a kernel
does not compile, the plain kernel of the same function runs, and a warning says so, once.
"""

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

    if hasattr(tma, "async_load"):  # from Triton 3.8 on; in 3.9 the older names raise
        async_load, async_store = tma.async_load, tma.async_store
    else:
        async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
    store_wait = tma.store_wait
except (ImportError, AttributeError) as error:
    MISSING: str | None = str(error)
else:
    MISSING = None

__all__ = [
    "MISSING",
    "TensorDescriptor",
    "async_load",
    "async_store",
    "fence_async_shared",
    "gdc_launch_dependents",
    "gdc_wait",
    "give_up",
    "gl",
    "jit",
    "mbarrier",
    "store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
    "works",
]


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
