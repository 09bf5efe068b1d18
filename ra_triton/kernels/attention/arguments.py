"""What the kernels of attention get besides tensors, in bundles, built here for all of them.

Triton specialises on the fields of a NamedTuple as on arguments of their own; a :class:`Variant` is
one constant. ``section``, ``left``, ``right``, ``total_q`` and ``total_k``, whose values must not
recompile a kernel, stay arguments, because ``do_not_specialize`` does not reach into a bundle. A
kernel gives a field a name of its own (``BLOCK_M: tl.constexpr = V.BLOCK_M``) where it is part of a
shape, and a string, which Triton 3.6 passes on to no function otherwise.
"""

import math
from typing import Any, NamedTuple

import torch
import triton

from ra_triton.kernels.tiles import LOG2E, Strides, block_d_of, is_aligned, is_wide, strides_of
from ra_triton.launch.configs import LaunchConfig
from ra_triton.launch.plans import Bulk, Layout

# What the programs of one section of heads share. On an H200, whose L2 holds 60 MB, sections took
# 6% to 8% off the forward over 50 and 100 MB; a second one over 25 MB would have cost 14%.
SECTION_BYTES = 32 * 2**20


class Sizes(NamedTuple):
    """Of q ``[B, T_q, H, D]``, and k and v ``[B, T_k, H_kv, D]``."""

    B: int  # with VARLEN how many sequences, and the most queries and keys of one
    T_q: int
    T_k: int
    H: int
    H_kv: int
    group: int  # H // H_kv


class Scores(NamedTuple):
    """How scores become exponents of 2, and which share of the weights is dropped."""

    scale_log2: float  # softmax_scale * log2(e); with SOFTCAP softcap * log2(e)
    cap_scale: float  # softmax_scale / softcap; 1 without
    dropout_p: float


class Mask(NamedTuple):
    """Which keys a query sees; causal alone is not a window."""

    left: int  # keys seen before a query's own, and after, with WINDOW
    right: int
    CAUSAL: bool
    WINDOW: bool


class ForwardStrides(NamedTuple):
    """Of ``[B, T, H, D]`` inputs, in units of ALIGNMENT elements."""

    q: Strides
    k: Strides
    v: Strides


class BackwardStrides(NamedTuple):
    """Of ``[B, T, H, D]`` inputs, in units of ALIGNMENT elements."""

    q: Strides
    k: Strides
    v: Strides
    do: Strides


class Variant(NamedTuple):
    """What the compiled code of a kernel of attention depends on."""

    D: int
    BLOCK_D: int  # lanes of a tile
    ALIGNMENT: int  # elements of 16 bytes where strides are whole multiples of them, else 1
    PRECISION: str  # of float32 products
    SOFTCAP: bool
    # The config's:
    BLOCK_M: int  # queries of a tile
    BLOCK_N: int  # keys of a tile
    WIDE: bool  # offsets inside a tile need 64 bits
    PDL: bool
    USE_TMA: bool = False
    # Where whole sequences meet:
    CAUSAL: bool = False
    WINDOW: bool = False
    DROPOUT: bool = False
    VARLEN: bool = False
    NEED_DK: bool = False
    NEED_DV: bool = False
    SPLIT: int = 0  # keys of a split, in decoding


class Attention(NamedTuple):
    """One attention, forward or backward, as its launches see it.

    Attributes:
        dtype: of the inputs.
        inputs: q, k, v and, in the backward, do.
        sizes: see there.
        mask: see there.
        scores: see there.
        softcap: whether scores are capped.
        varlen: whether sequences of different lengths lie one after the other.
        precision: of float32 products.
    """

    dtype: torch.dtype
    inputs: tuple[Layout, ...]
    sizes: Sizes
    mask: Mask
    scores: Scores
    softcap: bool
    varlen: bool
    precision: str

    @property
    def aligned(self) -> bool:
        """Whether all inputs suit 16-byte loads and bulk copies."""
        return all(is_aligned(t, self.dtype) for t in self.inputs)

    @property
    def traits(self) -> tuple[bool, bool, bool, bool]:
        """What the config table distinguishes: aligned, dropout, windowed, varlen."""
        return self.aligned, self.scores.dropout_p > 0, self.mask.WINDOW, self.varlen

    def section(self, heads: int, rows: int, other_heads: int) -> int:
        """Of so many heads a batch, how many at a time read what fits L2.

        Together they read ``rows`` rows of ``other_heads`` heads, twice: k and v, or q and do.
        """
        row_bytes = self.inputs[0].shape[3] * self.dtype.itemsize
        return heads_per_section(self.sizes.B * heads, 2 * rows * row_bytes * other_heads // heads)

    def arguments(self, config: LaunchConfig, **flags: bool) -> dict[str, Any]:
        """What all kernels get but ``section``; ``flags``: more fields of the variant."""
        q, k, *_ = self.inputs
        # Strides that are whole 16-byte units go to the kernel as such, so that it can rely on it.
        alignment = 16 // self.dtype.itemsize if self.aligned else 1
        placed = [as_tokens(t) if self.varlen else t for t in self.inputs]
        strides = BackwardStrides if len(placed) == 4 else ForwardStrides
        widest = max(t.strides[1] for t in self.inputs) * max(config.block_m, config.block_n)
        return {
            "strides": strides(*(strides_of(t, alignment) for t in placed)),
            "sizes": self.sizes,
            "left": self.mask.left,
            "right": self.mask.right,
            "total_q": q.shape[1],
            "total_k": k.shape[1],
            "scores": self.scores,
            "V": Variant(
                D=q.shape[3],
                BLOCK_D=block_d_of(q.shape[3]),
                ALIGNMENT=alignment,
                PRECISION=self.precision,
                SOFTCAP=self.softcap,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                WIDE=is_wide(widest),
                PDL=config.pdl,
                USE_TMA=config.use_tma,
                CAUSAL=self.mask.CAUSAL,
                WINDOW=self.mask.WINDOW,
                DROPOUT=self.scores.dropout_p > 0,
                VARLEN=self.varlen,
                **flags,
            ),
            **config.compiler_options,
        }

    def bulk(self, config: LaunchConfig) -> dict[int, Bulk] | None:
        """Descriptors of the inputs: q and do come by queries, k and v by keys."""
        if not config.use_tma:
            return None
        rows = (config.block_m, config.block_n, config.block_n, config.block_m)
        return {i: rows_in_bulk(t, rows[i]) for i, t in enumerate(self.inputs)}


def attention_of(
    dtype: torch.dtype,
    inputs: tuple[Layout, ...],
    sequences: tuple[int, int, int] | None,
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    softcap: float,
    dropout_p: float,
    precision: str,
) -> Attention:
    """The attention of these inputs; ``sequences``: how many, and the most queries and keys."""
    (B, T_q, H, D), (T_k, H_kv) = inputs[0].shape, inputs[1].shape[1:3]
    sizes = Sizes(*(sequences or (B, T_q, T_k)), H, H_kv, H // H_kv)
    mask = mask_of(sizes.T_q, sizes.T_k, causal, window_size)
    scores = scores_of(D, softmax_scale, softcap, dropout_p)
    varlen = sequences is not None
    return Attention(dtype, inputs, sizes, mask, scores, softcap > 0, varlen, precision)


def scores_of(
    D: int, softmax_scale: float | None, softcap: float, dropout_p: float = 0.0
) -> Scores:
    """How scores become exponents of 2."""
    scale = 1 / math.sqrt(D) if softmax_scale is None else softmax_scale
    return Scores((softcap or scale) * LOG2E.value, scale / softcap if softcap else 1.0, dropout_p)


def mask_of(T_q: int, T_k: int, causal: bool, window_size: tuple[int, int]) -> Mask:
    """The mask of a call's options; a side without a limit gets one that no distance exceeds."""
    left, right = window_size
    right = 0 if causal else right
    return Mask(
        left=left if 0 <= left < T_k else T_k,
        right=right if 0 <= right < T_q else T_q,
        CAUSAL=left < 0 and right == 0,
        WINDOW=left >= 0 or right > 0,
    )


def heads_per_section(n_heads: int, bytes_per_head: int) -> int:
    """Heads that ``head_and_tile`` takes at a time, in sections of about the same size."""
    sections = max(1, triton.cdiv(n_heads * bytes_per_head, SECTION_BYTES))
    return triton.cdiv(n_heads, sections)


def as_tokens(t: Layout) -> Layout:
    """``[1, total, H, D]`` with a batch stride of 0: every sequence begins at an offset."""
    return t._replace(strides=(0, *t.strides[1:]))


def rows_in_bulk(t: Layout, rows: int) -> Bulk:
    """``[B, T, H, D]`` as ``load_rows`` reads it: ``rows`` of one head of ``[B, H, T, D]``."""
    (B, T, H, D), (b, t_, h, d) = t.shape, t.strides
    return Bulk((B, H, T, D), (b, h, t_, d), (1, 1, rows, block_d_of(D)))
