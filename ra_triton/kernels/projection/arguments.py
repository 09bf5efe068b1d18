"""What the kernels of the projection and its gradients get besides tensors, in bundles.

As in ``attention/arguments.py``, which says what a bundle may hold.
"""

from typing import Any, NamedTuple

from ra_triton.launch.configs import LaunchConfig
from ra_triton.launch.plans import Layout


class Sizes(NamedTuple):
    """Of x ``[B, T, C]``, and of the N columns that its rows are multiplied into, or with."""

    M: int  # B * T
    T: int
    N: int
    C: int


class Strides(NamedTuple):
    """Of x ``[B, T, C]``, whose last stride is 1."""

    b: int
    t: int


class Variant(NamedTuple):
    """What the compiled code of a GEMM depends on."""

    PRECISION: str  # of float32 products
    USE_TMA: bool
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    PDL: bool
    GROUP_M: int = 8  # row tiles that share columns of w in L2
    EVEN_C: bool = False  # C % BLOCK_K == 0
    W_TRANSPOSED: bool = False
    WIDE: bool = False  # offsets inside a tile of w need 64 bits
    LANES: int = 1  # as in layout.Columns
    GAP: int = 0


def variant_of(config: LaunchConfig, precision: str, **more: Any) -> Variant:
    """The variant that a config asks for; ``more``: fields that depend on the operands."""
    blocks = (config.block_m, config.block_n, config.block_k)
    return Variant(precision, config.use_tma, *blocks, config.pdl, **more)


def as_one_batch(x: Layout) -> Layout:
    """``[B, T, C]`` as ``[1, B*T, C]`` where all rows follow each other at one stride."""
    (B, T, C), (stride_b, stride_t, stride_c) = x.shape, x.strides
    if B == 1 or stride_b == T * stride_t:
        return Layout((1, B * T, C), (0, stride_t, stride_c), x.on_16_bytes)
    return x
