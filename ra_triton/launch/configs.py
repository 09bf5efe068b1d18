"""Launch configurations: a pure function of (stage, head dim, dtype, target, layout).

Nothing here is measured at run time: the same call gets the same tiles, hence the same bits, on
every run, and a new length never retunes. :data:`TABLE` has the rows of each stage, and what chose
them; the first row that a call fits is taken.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and compiler options of one launch.

    Attributes:
        block_m: rows of a tile: queries, GEMM rows, or rows to pack.
        block_n: columns of a tile: keys, or GEMM columns.
        block_k: depth of one GEMM step; of decoding, the fewest keys of a split.
        num_warps: warps per CTA.
        num_stages: buffers of the software pipeline.
        use_tma: operands come through tensor descriptors (Hopper's bulk copies).
        pdl: the launch may overlap with the end of the kernel before (Hopper).
        groups: groups of ``num_warps`` warps with ``block_m`` rows each that share a tile. More
            than one: the stage's kernel for Hopper alone.
        one_pass: the backward's plain kernel of all gradients, ``backward_one_pass.py``.
    """

    block_m: int
    num_warps: int
    num_stages: int = 1
    block_n: int = 0
    block_k: int = 0
    use_tma: bool = False
    pdl: bool = False
    groups: int = 1
    one_pass: bool = False

    @property
    def compiler_options(self) -> dict[str, Any]:
        """What the compiler needs to know, by name."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        options["enable_fp_fusion"] = True  # Triton 3.10 turns it off, and the bits would change
        return options | {"launch_pdl": True} if self.pdl else options

    @property
    def options(self) -> dict[str, Any]:
        """The same for a kernel whose constants are arguments of their own, of which PDL is one."""
        return {"PDL": self.pdl, **self.compiler_options}


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        when: what a call has to be, by the names of :func:`row`.
        config: what it gets; PDL, which all kernels have on Hopper, is not in it.
        why: what chose it.
    """

    when: Mapping[str, Any]
    config: LaunchConfig
    why: str


HOLDS: dict[str, Callable[[Any, Any], bool]] = {  # a call's value and a row's; others are equal
    "D": operator.le,
    "on": lambda target, targets: target in targets.split(),
    "below": operator.lt,
    "within": operator.lt,
    "since": operator.ge,
}


def row(
    *,
    m: int,
    warps: int,
    n: int = 0,
    k: int = 0,
    stages: int = 1,
    tma: bool = False,
    groups: int = 1,
    why: str = "static",
    **when: Any,
) -> Row:
    """A row: tiles of ``m`` x ``n`` x ``k`` and the rest of a :class:`LaunchConfig`, and for what.

    ``when``, all of which has to hold: ``D``, a head dim of at most this; ``on``, one of these
    targets, separated by blanks; ``fp32``, ``aligned``, ``dropout``, ``causal``, ``window``,
    ``softcap``, ``varlen``, the same; ``cut``, whether aligned operands have a window or variable
    lengths; ``below``, fewer queries or keys than this; ``within``, a window of fewer keys than
    this; ``since``, this version of Triton or a newer one. ``why``: what chose the row. "static":
    the compiled machine code: no spilled register, asynchronous loads, two CTAs per SM where they
    fit.
    """
    return Row(when, LaunchConfig(m, warps, stages, n, k, tma, groups=groups), why)


def first_of(rows: Sequence[Row], call: Mapping[str, Any]) -> Row:
    """The first row that a call fits."""

    def fits(name: str, value: Any) -> bool:
        return HOLDS.get(name, operator.eq)(call[name], value)

    return next(row for row in rows if all(fits(*item) for item in row.when.items()))


# "No spill" is of Triton 3.7.1. With 3.9 these spill outside of the hot loop: 8 or 12 bytes on
# sm_86 and sm_89 (query_gradient of D = 128 in 16 bits, not causal; in float32 attention_forward of
# D = 32, not causal, and of D = 64 misaligned, key_value_gradient of D = 128 with dropout), 16 on
# sm_120 (query_gradient of D = 128 in TF32); tiles without that cost more inside the loop. Open on
# sm_100: attention_forward of D = 64 in 16 bits, causal, 188 bytes; query_gradient of D = 128 with
# window and softcap, 68; attention_forward of D = 32 in float32 with dropout, 20.
# "static" rows of sm_100 and sm_120 were compiled, and not run on such a GPU, as were those of
# "rocm" for gfx942, where some kernels use scratch. Times are of bench/tune.py on an H200 (driver
# 580.159.04, torch 2.11, Triton 3.6.0): bf16, causal, 16384 tokens, 12 heads; GEMMs of width 768,
# the projection with 8192 tokens; a row of another GPU names it. The times are of the run that
# chose the row, and the kernels have changed since.
# fmt: off
TABLE: dict[str, tuple[Row, ...]] = {
# IEEE products run on the FMA units: static with those and with TF32.
"attention_forward": (
    row(fp32=True, D=64, on="sm_120", aligned=False, dropout=True, m=32, n=16, warps=16, stages=2),
    row(fp32=True, D=32, on="sm_100", aligned=False, dropout=True, m=32, n=16, warps=16, stages=2),
    row(fp32=True, D=64, aligned=False, dropout=True, m=32, n=16, warps=8, stages=2),
    row(fp32=True, D=64, on="sm_90", dropout=True, m=32, n=32, warps=16, stages=2),
    row(fp32=True, D=32, on="sm_120", dropout=True, m=32, n=32, warps=16, stages=2),
    row(fp32=True, D=64, dropout=True, m=32, n=32, warps=8, stages=2),
    row(fp32=True, D=64, m=32, n=32, warps=4, stages=2),
    row(fp32=True, dropout=True, m=32, n=16, warps=8, stages=2),
    row(fp32=True, m=32, n=32, warps=16, stages=2),
    row(on="sm_90", D=64, aligned=True, dropout=False, m=64, n=64, warps=4, stages=2, tma=True,
        why="87 us, 295 TFLOP/s at T = 1024; 262 us at 4096"),
    row(on="sm_90", cut=True, dropout=False, m=64, n=64, warps=4, stages=2, tma=True),
    row(on="sm_90", aligned=True, dropout=False, m=128, n=64, warps=4, stages=2, tma=True,
        why="162 us at T = 1024; 436 us at 4096"),
    row(on="sm_90", D=64, aligned=True, m=64, n=64, warps=4, stages=2, tma=True),
    row(on="sm_90", aligned=True, m=64, n=64, warps=8, stages=2, tma=True),
    # No asynchronous copy is narrower than 4 bytes, so loads pass through registers: small tiles.
    # Hopper also comes here with strides of 0; one stage there, because with cp.async in flight
    # the assembler serialises WGMMA (C7515).
    row(on="sm_90", D=64, aligned=False, m=64, n=32, warps=4),
    row(D=64, aligned=False, dropout=True, m=64, n=16, warps=4),
    row(D=64, aligned=False, m=64, n=32, warps=4),
    row(on="sm_120", aligned=False, dropout=True, m=64, n=16, warps=8),
    row(aligned=False, m=64, n=32, warps=8),
    row(on="sm_120", D=64, cut=True, dropout=True, m=64, n=16, warps=4, stages=2),
    row(D=64, cut=True, m=64, n=32, warps=4, stages=2),
    row(cut=True, m=64, n=64, warps=8, stages=2),
    row(D=64, dropout=True, m=64, n=16, warps=4, stages=2),
    row(dropout=True, m=64, n=64, warps=8, stages=2),
    row(on="sm_120", D=64, m=64, n=64, warps=4, stages=3),
    row(D=64, m=128, n=64, warps=4, stages=3, why="static: 255 registers, two CTAs per SM"),
    row(on="sm_100", m=64, n=64, warps=4, stages=2),
    row(m=128, n=32, warps=8, stages=3, why="static: 200 registers, fits the 99 KB of sm_86"),
),
# Gradients: the largest tiles without a spill.
"key_value_gradient": (
    row(fp32=True, on="sm_90", aligned=False, dropout=True, m=32, n=16, warps=16, stages=2),
    row(fp32=True, on="sm_90", D=64, dropout=False, m=32, n=32, warps=8, stages=2),
    row(fp32=True, on="sm_90", m=32, n=32, warps=16, stages=2),
    row(fp32=True, D=32, on="sm_100", m=16, n=32, warps=16, stages=2),
    row(fp32=True, D=32, aligned=False, dropout=True, m=16, n=32, warps=16, stages=2),
    row(fp32=True, D=32, m=32, n=32, warps=16, stages=2),
    row(fp32=True, cut=True, m=16, n=32, warps=16, stages=2),
    row(fp32=True, D=64, on="sm_120", m=16, n=16, warps=4, stages=2),
    row(fp32=True, on="sm_120", m=16, n=32, warps=16, stages=2),
    row(fp32=True, D=64, dropout=False, m=16, n=16, warps=8, stages=2),
    row(fp32=True, D=64, m=16, n=16, warps=4, stages=2),
    row(fp32=True, on="sm_80", dropout=False, m=16, n=16, warps=16, stages=2),
    row(fp32=True, m=16, n=16, warps=4, stages=2),
    row(on="sm_120", D=64, aligned=False, m=16, n=32, warps=4),
    row(D=64, aligned=False, dropout=True, m=16, n=32, warps=4),
    row(D=64, aligned=False, m=32, n=32, warps=4),
    row(aligned=False, m=32, n=32, warps=8),
    row(on="sm_90", dropout=False, m=32, n=64, warps=4, stages=3, tma=True,
        why="D = 64: 179 us at T = 1024, 510 us at 4096; D = 128: 310 and 853 us"),
    row(on="sm_90", D=64, m=32, n=64, warps=4, stages=2, tma=True),
    row(on="sm_90", m=32, n=64, warps=8, stages=2, tma=True),
    row(on="sm_120", D=64, cut=True, dropout=True, m=32, n=32, warps=4, stages=2),
    row(D=64, cut=True, m=32, n=64, warps=4, stages=2),
    row(cut=True, m=32, n=32, warps=8, stages=2),
    row(on="sm_120", D=64, dropout=True, m=16, n=32, warps=4, stages=2),
    row(on="sm_120", D=64, m=32, n=64, warps=4, stages=2),
    row(on="sm_100", D=64, dropout=True, m=32, n=64, warps=4, stages=2),
    row(D=64, m=64, n=32, warps=4, stages=2),
    row(m=32, n=64, warps=8, stages=2),
),
"query_gradient": (
    row(fp32=True, on="sm_90", aligned=False, dropout=True, m=32, n=16, warps=16, stages=2),
    row(fp32=True, on="sm_90", D=32, dropout=False, m=32, n=32, warps=8, stages=2),
    row(fp32=True, on="sm_90", m=32, n=32, warps=16, stages=2),
    row(fp32=True, D=32, aligned=False, dropout=True, m=16, n=32, warps=16, stages=2),
    row(fp32=True, D=32, m=32, n=32, warps=16, stages=2),
    row(fp32=True, D=64, m=16, n=16, warps=8, stages=2),
    row(fp32=True, on="sm_120", m=16, n=16, warps=8, stages=2,
        why="static: of four warps a window's second edge spills with Triton 3.9"),
    row(fp32=True, m=16, n=16, warps=4, stages=2),
    row(D=64, aligned=False, m=32, n=32, warps=4),
    row(aligned=False, m=32, n=32, warps=8),
    row(on="sm_90", D=64, m=64, n=64, warps=4, stages=2, tma=True,
        why="112 us at T = 1024, 291 us at 4096"),
    row(on="sm_90", dropout=True, m=64, n=32, warps=4, stages=2, tma=True),
    row(on="sm_90", m=64, n=32, warps=4, stages=3, tma=True),
    row(on="sm_120", D=64, dropout=True, m=64, n=16, warps=4, stages=2),
    row(D=64, cut=True, m=64, n=32, warps=4, stages=2),
    row(cut=True, m=64, n=64, warps=8, stages=2),
    row(on="sm_120", D=64, m=64, n=32, warps=4, stages=2),
    row(on="sm_120", m=64, n=32, warps=8, stages=2),
    row(D=64, dropout=True, m=64, n=32, warps=4, stages=2),
    row(D=64, m=64, n=64, warps=4, stages=2),
    row(m=64, n=64, warps=8, stages=2),
),
"delta": (
    row(D=64, m=32, warps=4),
    row(fp32=True, m=16, warps=4),
    row(m=32, warps=4),
),
"projection": (
    row(fp32=True, on="sm_90", m=64, n=64, k=16, warps=8, stages=3),
    row(fp32=True, aligned=True, m=64, n=64, k=16, warps=8, stages=2),
    row(fp32=True, m=64, n=64, k=16, warps=8, stages=3),
    row(on="sm_90", aligned=True, m=64, n=256, k=64, warps=4, stages=3, tma=True, groups=3,
        why="H100 (torch 2.11, Triton 3.6.0): 47 us, 90 us for the input's gradient; 128x128 tiles "
        "in plain Triton 57 and 95 us, cuBLAS 51 and 92 us"),
    row(on="sm_90", m=128, n=128, k=64, warps=8, stages=3),
    row(m=128, n=128, k=32, warps=8, stages=3, why="static: 128 registers, 32 KB"),
),
"weight_gradient": (
    row(fp32=True, m=64, n=64, k=16, warps=8, stages=3),
    row(on="sm_90", aligned=True, m=128, n=128, k=64, warps=8, stages=3, tma=True,
        why="97 us, 600 TFLOP/s"),
    row(m=128, n=128, k=32, warps=8, stages=3),
),
"bias_gradient": (row(m=32, n=64, warps=4),),
"add_splits": (row(m=1024, warps=4),),
# Int8 weights; no other row was tried on a GPU.
"weight_only": (
    row(fp32=True, m=64, n=64, k=16, warps=8, stages=3),
    row(on="sm_90", aligned=True, m=128, n=64, k=64, warps=4, stages=3, tma=True,
        why="static: 128 columns, converted in registers, would serialise WGMMA (C7515)"),
    row(m=128, n=128, k=32, warps=4, stages=3),
),
"weight_only_few": (
    row(fp32=True, m=16, n=32, k=32, warps=4, stages=3),
    row(m=16, n=32, k=128, warps=4, stages=4),
),
"other_columns": (
    row(fp32=True, m=64, n=64, k=16, warps=8, stages=3),
    row(on="sm_90", aligned=True, m=128, n=128, k=32, warps=4, stages=3, tma=True),
    row(m=128, n=128, k=32, warps=8, stages=3),
),
"w8a8": (
    row(on="sm_90", aligned=True, m=128, n=128, k=128, warps=4, stages=3, tma=True),
    row(m=128, n=128, k=64, warps=8, stages=3),
),
"quantize_rows": (row(m=4, k=512, warps=4),),
# Several CTAs per SM keep the memory busy. At most 32 rows, also on Hopper: 64 would be WGMMA's,
# which needs descriptors, and those cannot leave out what lies beyond a sequence's length.
"decode": (
    row(fp32=True, D=64, m=16, n=32, k=128, warps=4, stages=2),
    row(fp32=True, m=16, n=32, k=128, warps=8, stages=2),
    row(aligned=False, m=32, n=32, k=128, warps=4),
    row(D=64, m=32, n=64, k=128, warps=4, stages=3),
    row(m=32, n=32, k=128, warps=4, stages=3),
),
"decode_combine": (row(m=32, warps=4),),
"append": (row(m=32, warps=4),),
"packing": (row(m=64, warps=4),),
"norm_rope": (
    row(D=128, m=32, warps=4),
    row(m=8, warps=4),
),
"compose": (
    row(fp32=True, m=32, n=32, k=16, warps=4, stages=2),
    row(m=32, n=32, k=32, warps=4, stages=2),
),
"compose_backward": (  # not aligned: a gradient whose columns are far apart
    row(fp32=True, D=64, m=16, n=16, k=16, warps=8, stages=2),
    row(fp32=True, aligned=True, m=16, n=16, k=16, warps=16),
    row(fp32=True, on="sm_90 sm_120", m=16, n=16, k=16, warps=16),
    row(fp32=True, on="sm_100", m=32, n=16, k=16, warps=8),
    row(fp32=True, m=32, n=16, k=16, warps=16),
    row(m=32, n=32, k=16, warps=4, stages=2),
),
"compose_sums": (row(m=64, n=16, warps=4),),
}
TABLE |= {"input_gradient": TABLE["projection"], "norm_rope_backward": TABLE["norm_rope"]}

# The forward kernel whose warps have one job each, where that one is faster; rows of one group are
# of calls that the plain kernel computes sooner, in tiles of its own. Static: no spill; heads of
# 128 leave no registers for a third warpgroup. Chosen on an H100 (80 GB HBM3, driver 580.159.04,
# torch 2.11, Triton 3.6.0), causal, bf16, 16384 tokens, width 2048; in brackets the plain kernel
# and cuDNN. Windows, softcaps and sequences, of which there are three for every T tokens: on an
# H200, with the same versions and sizes; in brackets the plain kernel.
SPECIALISED = (
    row(D=64, window=True, varlen=False, m=0, warps=0,
        why="127 keys, T = 2048: 182 us (120), 8192: 197 us (119); 1023 keys: 391 us (355)"),
    row(D=64, softcap=True, m=0, warps=0,
        why="T = 4096: 1487 us (1336); sequences: 975 us (878), in a window of 1023: 623 us (627)"),
    row(softcap=True, varlen=False, window=True, m=0, warps=0,
        why="D = 128, T = 4096, 1023 keys: 486 us (459)"),
    row(D=64, varlen=True, m=64, n=128, warps=4, stages=3, tma=True, groups=2,
        why="sequences, T = 1024: 219 us (324), 4096: 427 us (641), with three groups 466 us; in a "
        "window of 1023 keys: 321 us (488), 336 us"),
    row(D=64, below=2048, causal=True, m=64, n=64, warps=4, stages=3, tma=True, groups=3,
        why="T = 512: 136 us (171, 129), 1024: 202 us (243, 197)"),
    row(D=64, below=2048, m=64, n=128, warps=4, stages=3, tma=True, groups=2,
        why="T = 1024, not causal: 311 us (429, 309)"),
    row(D=64, m=64, n=128, warps=4, stages=3, tma=True, groups=3,
        why="on an H200, T = 2048: 334 us, with two stages 343 us, 4096: 590 us, 16384: 2124 us; "
        "not causal, 4096: 1123 us; in other runs the plain kernel 397, 747, 2668 and 1425 us"),
    row(D=128, softcap=True, m=64, n=64, warps=4, stages=3, tma=True, groups=2,
        why="T = 4096: 854 us (909), with 128 keys, which spill, 1092 us; sequences: 605 us "
        "(2294), in a window of 1023 keys 401 us (1407)"),
    row(D=128, within=256, since=(3, 9), m=64, n=128, warps=4, stages=2, tma=True, groups=2,
        why="static: the next row spills 12 bytes, outside of the hot loop"),
    row(D=128, within=256, varlen=False, m=64, n=64, warps=4, stages=3, tma=True, groups=2,
        why="127 keys, T = 2048 and 8192: 87 to 92 us (117, 116), in tiles of 128 keys 103 to 113"),
    row(D=128, m=64, n=128, warps=4, stages=2, tma=True, groups=2,
        why="T = 512: 110 us (138, 102), 1024: 148 us (204, 160), 2048: 249 us (314, 272), "
        "4096: 430 us (597, 515), 16384: 1692 us (2106, 1974); 1023 keys: 259 us (329); "
        "sequences, T = 1024: 154 us (472), 4096: 307 us (1053), in a window of 1023 keys: 221 us "
        "(1149)"),
)

# The backward for Hopper in one pass, by head dim: static, the largest tiles without spills. On an
# H200 (torch 2.11, Triton 3.6.0; two runs), causal, bf16, 16384 tokens, width 2048, us; in brackets
# the two plain kernels: D = 64, T = 256: 311 (338), 1024: 507 (697), 16384: 5399 (7618); D = 128,
# 256: 318 (347), 1024: 469 (688), 16384: 4541 (7413). Triton 3.9 spills 24 to 36 bytes for
# D = 64, 20 to 28 for 128, some of them in the loop; 3.8 four for one length, outside of it.
ONE_PASS = {
    D: LaunchConfig(m, 4, 2, block_n=128, use_tma=True, pdl=True, groups=2)
    for D, m in ((64, 128), (128, 64))
}

# The backward in one pass in plain Triton; where m is 0 the two kernels stay. Static: no spill with
# Triton 3.6, 3.7.1 and 3.9; 3.8 spills 12 and 24 bytes for D = 64, not causal, on sm_80 and sm_89.
# Grouped heads spill 24 to 84 on sm_80, outside of the loop, and 128 for D = 64 on sm_120, a word
# in the loop, as do lengths there that are no multiples of 16, 88 or 120. None of it has run on a
# GPU of these targets. Measured are earlier versions in sm_80's code, on an H200 (torch 2.11,
# Triton 3.6.0), bf16, 16384 tokens, width 2048: their time over that of the two kernels for
# T = 1024, 4096 and, of the first one alone, 16384; see bench/results/one-pass-plain.md.
PLAIN_ONE_PASS = (
    row(on="sm_80", D=64, m=64, n=64, warps=4, stages=3,
        why="causal: 0.75, 0.74, the first version 0.78, 0.76, 0.77, in sections of heads 0.70, "
        "0.80, 0.89; not causal, in sections: 0.66, 0.73, 0.75, without 0.87, 0.86, 0.83"),
    row(on="sm_89", D=64, m=64, n=64, warps=4, stages=2,
        why="static: two CTAs per SM, with three stages one; 0.80, 0.85; not causal 0.72, 0.81"),
    row(on="sm_120", D=64, m=64, n=128, warps=8, stages=3,
        why="static: with 64 keys the loop spills; 0.81, 0.80; not causal 0.80, 0.86"),
    row(on="sm_80", D=128, m=32, n=64, warps=4, stages=2,
        why="causal: 0.56, 0.49, 0.50; not causal, without sections: 0.60, 0.56, 0.54; 64 queries, "
        "eight warps and three stages: 0.63, 0.57, 0.57; 0.66, 0.58, 0.57, in sections 0.58, 0.57, "
        "0.57"),
    row(on="sm_89 sm_120", D=128, m=64, n=64, warps=8, stages=2,
        why="static: one CTA per SM also of 32 queries and four warps, and three stages do not fit "
        "99 KB; 0.70, 0.66, 0.65; not causal, in sections: 0.65, 0.65, 0.64"),
    row(m=0, warps=0,
        why="not measured: sums would leave sm_86's 6 MB of L2, and sm_100 has other products"),
)

INTERPRETER = {  # m, n, k of small tiles, so that short inputs reach every loop
    "attention_forward": (32, 16), "key_value_gradient": (16, 32), "query_gradient": (32, 16),
    "delta": (16,), "decode": (32, 16, 32), "decode_combine": (2,), "append": (16,),
    "projection": (32, 32, 16), "input_gradient": (32, 32, 16), "weight_gradient": (32, 32, 16),
    "bias_gradient": (16, 32), "add_splits": (64,), "weight_only": (32, 32, 16),
    "weight_only_few": (16, 32, 16), "other_columns": (32, 32, 16), "w8a8": (32, 32, 32),
    "quantize_rows": (4, 0, 16), "packing": (16,), "norm_rope": (16,), "norm_rope_backward": (16,),
    "compose": (16, 16, 16), "compose_backward": (16, 16, 16), "compose_sums": (16, 32),
}
# fmt: on


def target(capability: tuple[int, int], shared_memory: int) -> str:
    """The row of the table for a GPU: its own, or that of the tested GPU it most resembles.

    Args:
        capability: CUDA compute capability.
        shared_memory: bytes that one CTA may use; decides for GPUs without a row.
    """
    known = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90"}
    known |= {(10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120", (12, 1): "sm_120"}
    default = "sm_80" if shared_memory >= 160 * 1024 else "sm_86"
    return known.get(capability, default)


def launch_config(
    stage: str,
    head_dim: int,
    dtype: torch.dtype,
    target: str,
    aligned: bool,
    dropout: bool = False,
    windowed: bool = False,
    varlen: bool = False,
) -> LaunchConfig:
    """The configuration of one launch.

    Args:
        stage: a kernel's name without its underscores, e.g. ``"attention_forward"``.
        head_dim: ``D``; only attention depends on it.
        dtype: of the operands.
        target: from :func:`target`, or ``"interpreter"``.
        aligned: whether the operands' addresses and strides suit 16-byte loads and bulk copies.
        dropout: whether attention draws random numbers, which takes registers.
        windowed: whether attention has a window, whose second edge takes registers.
        varlen: whether sequences begin anywhere among their tokens, where no descriptor points.
    """
    if target == "interpreter":
        m, n, k = (*INTERPRETER[stage], 0, 0)[:3]
        return LaunchConfig(m, 4, block_n=n, block_k=k)
    aligned = aligned and not (varlen and target == "sm_90")
    call = {"D": head_dim, "on": target, "fp32": dtype == torch.float32, "aligned": aligned}
    call |= {"dropout": dropout, "cut": aligned and (windowed or varlen)}
    return replace(first_of(TABLE[stage], call).config, pdl=target == "sm_90")


def in_fewest_rounds(config: LaunchConfig, M: int, N: int, processors: int) -> LaunchConfig:
    """``config`` with as many groups as compute ``[M, N]`` soonest, a tile an SM and round.

    Tiles of two groups have two thirds of the rows, and leave room for one more stage. On an H100
    the gradient of 8192 inputs, 3072 columns into 1024, took 104 us in tiles of three groups (172
    on 132 SMs) and 68 us in tiles of two (256). Both add an element's products in one order.
    """

    def rows(groups: int) -> int:
        tiles = -(-M // (groups * config.block_m)) * -(-N // config.block_n)
        return -(-tiles // processors) * groups

    if config.groups == 3 and rows(2) < rows(3):
        return replace(config, groups=2, num_stages=config.num_stages + 1)
    return config


def warp_specialised(
    head_dim: int,
    dtype: torch.dtype,
    target: str,
    length: int,
    causal: bool,
    triton: tuple[int, ...] = (3, 7),
    *,
    keys: int | None = None,
    softcap: bool = False,
    varlen: bool = False,
) -> LaunchConfig | None:
    """The row of :data:`SPECIALISED`, or None where the plain kernel is faster.

    Args:
        head_dim: ``D``.
        dtype: of the operands, which suit bulk copies; there is no dropout.
        target: from :func:`target`.
        length: queries or keys, whichever are fewer; with ``varlen`` the most of a sequence.
        causal: whether tiles of keys are cut by the diagonal.
        triton: major and minor version.
        keys: the most that a query sees in a window, with its own; None without a window.
        softcap: whether scores are capped.
        varlen: whether sequences of different lengths lie one after the other.
    """
    if target != "sm_90" or dtype == torch.float32 or length < 256 or head_dim not in (64, 128):
        return None
    call = {"D": head_dim, "below": length, "causal": causal, "since": triton}
    call |= {"window": keys is not None, "within": math.inf if keys is None else keys}
    call |= {"softcap": softcap, "varlen": varlen}
    config = first_of(SPECIALISED, call).config
    return replace(config, pdl=True) if config.groups > 1 else None


def one_pass(head_dim: int, dtype: torch.dtype, target: str, length: int) -> LaunchConfig | None:
    """The row of :data:`ONE_PASS` or :data:`PLAIN_ONE_PASS`; None where two kernels compute.

    Args:
        head_dim: ``D``.
        dtype: of the operands, which are aligned; there is neither dropout nor softcap, and in the
            plain kernel neither a window nor sequences of different lengths.
        target: from :func:`target`.
        length: queries or keys, whichever are fewer; of sequences the most of one.
    """
    if dtype == torch.float32 or length < 256 or head_dim not in ONE_PASS:
        return None
    if target == "sm_90":
        return ONE_PASS[head_dim]
    config = first_of(PLAIN_ONE_PASS, {"D": head_dim, "on": target}).config
    return replace(config, one_pass=True) if config.block_m else None
