"""Launch configurations: a pure function of (stage, head dim, dtype, target, layout).

Nothing here is measured at run time: the same call gets the same tiles, hence the same bits, on
every run, and a new length never retunes. "static" rows were chosen from the compiled machine
code: no spilled register, asynchronous loads, two CTAs per SM where they fit; those of sm_100 and
sm_120 were compiled, and not run on such a GPU, as was "rocm" for gfx942, where some kernels use
scratch. Rows with a time were chosen by ``bench/tune.py`` on an H200 (driver 580.159.04, torch
2.11, Triton 3.6.0): bf16, causal,
16384 tokens, 12 heads; GEMMs of width 768, the projection with 8192 tokens; a row of another GPU
names it. The times are of the run that chose the row, and the kernels have changed since.
"""

from dataclasses import dataclass, replace
from typing import Any

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
    """

    block_m: int
    num_warps: int
    num_stages: int = 1
    block_n: int = 0
    block_k: int = 0
    use_tma: bool = False
    pdl: bool = False
    groups: int = 1

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
    if target == "interpreter":  # small tiles, so that short inputs reach every loop
        return {
            "attention_forward": LaunchConfig(32, 4, block_n=16),
            "projection": LaunchConfig(32, 4, block_n=32, block_k=16),
            "input_gradient": LaunchConfig(32, 4, block_n=32, block_k=16),
            "packing": LaunchConfig(16, 4),
            "norm_rope": LaunchConfig(16, 4),
            "norm_rope_backward": LaunchConfig(16, 4),
            "delta": LaunchConfig(16, 4),
            "key_value_gradient": LaunchConfig(16, 4, block_n=32),
            "query_gradient": LaunchConfig(32, 4, block_n=16),
            "weight_gradient": LaunchConfig(32, 4, block_n=32, block_k=16),
            "bias_gradient": LaunchConfig(16, 4, block_n=32),
            "add_splits": LaunchConfig(64, 4),
            "weight_only": LaunchConfig(32, 4, block_n=32, block_k=16),
            "weight_only_few": LaunchConfig(16, 4, block_n=32, block_k=16),
            "other_columns": LaunchConfig(32, 4, block_n=32, block_k=16),
            "w8a8": LaunchConfig(32, 4, block_n=32, block_k=32),
            "quantize_rows": LaunchConfig(4, 4, block_k=16),
            "decode": LaunchConfig(32, 4, block_n=16, block_k=32),
            "decode_combine": LaunchConfig(2, 4),
            "append": LaunchConfig(16, 4),
            "compose": LaunchConfig(16, 4, block_n=16, block_k=16),
            "compose_backward": LaunchConfig(16, 4, block_n=16, block_k=16),
            "compose_sums": LaunchConfig(16, 4, block_n=32),
        }[stage]
    aligned = aligned and not (varlen and target == "sm_90")
    full_precision = dtype == torch.float32
    config = _config(stage, head_dim, full_precision, target, aligned, dropout)
    if (windowed or varlen) and aligned:
        config = _cut(stage, head_dim, full_precision, target, dropout) or config
    return replace(config, pdl=target == "sm_90")


def _config(
    stage: str, head_dim: int, full_precision: bool, target: str, aligned: bool, dropout: bool
) -> LaunchConfig:
    if stage == "attention_forward":
        return _attention_forward(head_dim, full_precision, target, aligned, dropout)
    if stage in ("key_value_gradient", "query_gradient"):
        return _attention_backward(stage, head_dim, full_precision, target, aligned, dropout)
    if stage in ("projection", "input_gradient"):
        return _projection(stage, full_precision, target, aligned)
    if stage == "weight_gradient":
        return _weight_gradient(full_precision, target, aligned)
    if stage in ("weight_only", "weight_only_few", "other_columns", "w8a8"):
        return _int8_projection(stage, full_precision, target, aligned)
    if stage in ("norm_rope", "norm_rope_backward"):  # static: no spill
        return LaunchConfig(32 if head_dim <= 128 else 8, 4)
    if stage in ("compose", "compose_backward"):
        return _composing(stage, head_dim, full_precision, target, aligned)
    if stage == "decode":
        return _decode(head_dim, full_precision, aligned)
    return {
        "packing": LaunchConfig(64, 4),
        "delta": LaunchConfig(16 if full_precision and head_dim > 64 else 32, 4),
        "bias_gradient": LaunchConfig(32, 4, block_n=64),
        "add_splits": LaunchConfig(1024, 4),
        "quantize_rows": LaunchConfig(4, 4, block_k=512),
        "decode_combine": LaunchConfig(32, 4),
        "append": LaunchConfig(32, 4),
        "compose_sums": LaunchConfig(64, 4, block_n=16),
    }[stage]


def _composing(
    stage: str, head_dim: int, full_precision: bool, target: str, aligned: bool
) -> LaunchConfig:
    """Static: no spill; a gradient whose columns are far apart is not aligned."""
    if stage == "compose":
        return LaunchConfig(32, 4, 2, block_n=32, block_k=16 if full_precision else 32)
    if not full_precision:
        return LaunchConfig(32, 4, 2, block_n=32, block_k=16)
    if head_dim <= 64:
        return LaunchConfig(16, 8, 2, block_n=16, block_k=16)
    if aligned or target in ("sm_90", "sm_120"):
        return LaunchConfig(16, 16, 1, block_n=16, block_k=16)
    return LaunchConfig(32, 8 if target == "sm_100" else 16, 1, block_n=16, block_k=16)


def _projection(stage: str, full_precision: bool, target: str, aligned: bool) -> LaunchConfig:
    if full_precision:  # IEEE products run on the FMA units; static
        stages = 2 if aligned and target != "sm_90" else 3
        return LaunchConfig(64, 8, stages, block_n=64, block_k=16)
    if target == "sm_90":
        if aligned:
            # On an H100 (torch 2.11, Triton 3.6.0) 47 us for the projection, 90 us for the input's
            # gradient; 128x128 tiles in plain Triton took 57 and 95 us, cuBLAS 51 and 92 us.
            return LaunchConfig(64, 4, 3, block_n=256, block_k=64, use_tma=True, groups=3)
        return LaunchConfig(128, 8, 3, block_n=128, block_k=64)  # static
    return LaunchConfig(128, 8, 3, block_n=128, block_k=32)  # static: 128 registers, 32 KB


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


def _attention_forward(
    head_dim: int, full_precision: bool, target: str, aligned: bool, dropout: bool
) -> LaunchConfig:
    small = head_dim <= 64
    if full_precision:  # static: no spill with IEEE products and with TF32
        if small:
            if dropout and not aligned:
                many = target == "sm_120" or (target == "sm_100" and head_dim <= 32)
                return LaunchConfig(32, 16 if many else 8, 2, block_n=16)
            many = target == "sm_90" or (target == "sm_120" and head_dim <= 32)
            return LaunchConfig(32, (16 if many else 8) if dropout else 4, 2, block_n=32)
        if dropout:
            return LaunchConfig(32, 8, 2, block_n=16)
        return LaunchConfig(32, 16, 2, block_n=32)
    if dropout and aligned:  # static: no spill
        keys = 16 if small and target != "sm_90" else 64
        return LaunchConfig(64, 4 if small else 8, 2, block_n=keys, use_tma=target == "sm_90")
    if target == "sm_90" and aligned:
        if head_dim <= 64:  # 87 us, 295 TFLOP/s at T = 1024; 262 us at 4096
            return LaunchConfig(64, 4, 2, block_n=64, use_tma=True)
        return LaunchConfig(128, 4, 2, block_n=64, use_tma=True)  # 162 us; 436 us at T = 4096
    if not aligned:
        # No asynchronous copy is narrower than 4 bytes, so loads pass through registers: static,
        # small tiles without a spill. Hopper also comes here with strides of 0; one stage there,
        # because with cp.async in flight the assembler serialises WGMMA (C7515).
        few = dropout and (target == "sm_120" or (small and target != "sm_90"))
        return LaunchConfig(64, 4 if small else 8, 1, block_n=16 if few else 32)
    if head_dim <= 64 and target == "sm_120":
        return LaunchConfig(64, 4, 3, block_n=64)
    if head_dim <= 64:  # static: 255 registers, no spill, two CTAs per SM
        return LaunchConfig(128, 4, 3, block_n=64)
    if target == "sm_100":
        return LaunchConfig(64, 4, 2, block_n=64)
    return LaunchConfig(128, 8, 3, block_n=32)  # static: 200 registers, fits the 99 KB of sm_86


def warp_specialised(
    head_dim: int,
    dtype: torch.dtype,
    target: str,
    length: int,
    causal: bool,
    triton: tuple[int, ...] = (3, 7),
) -> LaunchConfig | None:
    """The row of the forward kernel whose warps have one job each, where that one is faster.

    Static: no spill; heads of 128 leave no registers for a third warpgroup. Chosen on an H100 (80
    GB HBM3, driver 580.159.04, torch 2.11, Triton 3.6.0), causal, bf16, 16384 tokens, width 2048;
    in brackets the plain kernel and cuDNN.

    Args:
        head_dim: ``D``.
        dtype: of the operands, which suit bulk copies; there is no dropout.
        target: from :func:`target`.
        length: queries or keys, whichever are fewer.
        causal: whether tiles of keys are cut by the diagonal.
        triton: major and minor version. From 3.9 on the assembler spills registers where three
            groups take tiles of 128 keys, so that two groups do; not measured.
    """
    if target != "sm_90" or dtype == torch.float32 or length < 256:
        return None
    if head_dim == 64 and length < 2048:
        if causal:  # T = 512: 136 us (171, 129), 1024: 202 us (243, 197)
            return LaunchConfig(64, 4, 3, block_n=64, use_tma=True, pdl=True, groups=3)
        # T = 1024, not causal: 311 us (429, 309)
        return LaunchConfig(64, 4, 3, block_n=128, use_tma=True, pdl=True, groups=2)
    # From 3.9 on three groups spill. Two, on an H200 (torch 2.11, Triton 3.9.0; in brackets three
    # with 3.6.0): T = 2048: 366 us (340), 4096: 681 us (616), 16384: 2573 us (2264).
    if head_dim == 64 and triton >= (3, 9):
        return LaunchConfig(64, 4, 3, block_n=128, use_tma=True, pdl=True, groups=2)
    # T = 2048: 329 us (397, 339), 4096: 616 us (747, 677), 16384: 2143 us (2668, 2496)
    if head_dim == 64:
        return LaunchConfig(64, 4, 2, block_n=128, use_tma=True, pdl=True, groups=3)
    # T = 512: 110 us (138, 102), 1024: 148 us (204, 160), 2048: 249 us (314, 272),
    # 4096: 430 us (597, 515), 16384: 1692 us (2106, 1974)
    if head_dim == 128:
        return LaunchConfig(64, 4, 2, block_n=128, use_tma=True, pdl=True, groups=2)
    return None


def _attention_backward(
    stage: str, head_dim: int, full_precision: bool, target: str, aligned: bool, dropout: bool
) -> LaunchConfig:
    """What is not measured is static: the largest tiles without a spill."""
    small = head_dim <= 64
    for_keys = stage == "key_value_gradient"
    if full_precision:
        if target != "sm_90":
            if head_dim <= 32:
                few = (dropout and not aligned) or (for_keys and target == "sm_100")
                rows = 16 if few else 32
                return LaunchConfig(rows, 16, 2, block_n=32)
            if for_keys and not small and target == "sm_120":
                return LaunchConfig(16, 16, 2, block_n=32)
            if for_keys and not (small or dropout) and target == "sm_80":
                return LaunchConfig(16, 16, 2, block_n=16)
            few = for_keys and (dropout or not small or target == "sm_120")
            return LaunchConfig(16, 4 if few else 8, 2, block_n=16)
        if dropout and not aligned:
            return LaunchConfig(32, 16, 2, block_n=16)
        few = small and not dropout and (for_keys or head_dim <= 32)
        return LaunchConfig(32, 8 if few else 16, 2, block_n=32)
    if not aligned and small and for_keys and (dropout or target == "sm_120"):
        return LaunchConfig(16, 4, 1, block_n=32)
    if not aligned:
        return LaunchConfig(32, 4 if small else 8, 1, block_n=32)
    if target == "sm_90" and for_keys:
        if dropout:  # static
            return LaunchConfig(32, 4 if small else 8, 2, block_n=64, use_tma=True)
        # D = 64: 179 us at T = 1024, 510 us at 4096; D = 128: 310 and 853 us
        return LaunchConfig(32, 4, 3, block_n=64, use_tma=True)
    if target == "sm_90":
        if small:  # 112 us at T = 1024, 291 us at 4096
            return LaunchConfig(64, 4, 2, block_n=64, use_tma=True)
        if dropout:  # static
            return LaunchConfig(64, 4, 2, block_n=32, use_tma=True)
        return LaunchConfig(64, 4, 3, block_n=32, use_tma=True)  # static
    if target == "sm_120" and small and dropout:
        return LaunchConfig(16 if for_keys else 64, 4, 2, block_n=32 if for_keys else 16)
    if target == "sm_120" and not for_keys:
        return LaunchConfig(64, 4 if small else 8, 2, block_n=32)
    if for_keys and small and (target == "sm_120" or (target == "sm_100" and dropout)):
        return LaunchConfig(32, 4, 2, block_n=64)
    if small and (for_keys or dropout):
        return LaunchConfig(64, 4, 2, block_n=32)
    if not for_keys:
        return LaunchConfig(64, 4 if small else 8, 2, block_n=64)
    return LaunchConfig(32, 8, 2, block_n=64)


def _cut(
    stage: str, head_dim: int, full_precision: bool, target: str, dropout: bool
) -> LaunchConfig | None:
    """Instead, for a window's second edge and for variable lengths: static, no spill."""
    small, for_keys = head_dim <= 64, stage == "key_value_gradient"
    if target == "sm_90":
        wide = stage == "attention_forward" and not (small or dropout or full_precision)
        return LaunchConfig(64, 4, 2, block_n=64, use_tma=True) if wide else None
    if full_precision:
        return LaunchConfig(16, 16, 2, block_n=32) if for_keys and head_dim > 32 else None
    few = target == "sm_120" and small and dropout
    if for_keys:
        return LaunchConfig(32, 4 if small else 8, 2, block_n=32 if few or not small else 64)
    if small:
        return LaunchConfig(64, 4, 2, block_n=16 if few else 32)
    return LaunchConfig(64, 8, 2, block_n=64)


def _weight_gradient(full_precision: bool, target: str, aligned: bool) -> LaunchConfig:
    if full_precision:  # static
        return LaunchConfig(64, 8, 3, block_n=64, block_k=16)
    if target == "sm_90" and aligned:  # 97 us, 600 TFLOP/s
        return LaunchConfig(128, 8, 3, block_n=128, block_k=64, use_tma=True)
    return LaunchConfig(128, 8, 3, block_n=128, block_k=32)


def _int8_projection(stage: str, full_precision: bool, target: str, aligned: bool) -> LaunchConfig:
    """All static: no spill, no serialised WGMMA; no other row was tried on a GPU."""
    few = stage == "weight_only_few"
    if full_precision:
        if few:
            return LaunchConfig(16, 4, 3, block_n=32, block_k=32)
        return LaunchConfig(64, 8, 3, block_n=64, block_k=16)
    if few:
        return LaunchConfig(16, 4, 4, block_n=32, block_k=128)
    if target == "sm_90" and aligned:
        if stage == "w8a8":
            return LaunchConfig(128, 4, 3, block_n=128, block_k=128, use_tma=True)
        if stage == "other_columns":
            return LaunchConfig(128, 4, 3, block_n=128, block_k=32, use_tma=True)
        # 128 columns of w, converted in registers, would serialise WGMMA (C7515).
        return LaunchConfig(128, 4, 3, block_n=64, block_k=64, use_tma=True)
    if stage == "w8a8":
        return LaunchConfig(128, 8, 3, block_n=128, block_k=64)
    if stage == "other_columns":
        return LaunchConfig(128, 8, 3, block_n=128, block_k=32)
    return LaunchConfig(128, 4, 3, block_n=128, block_k=32)


def _decode(head_dim: int, full_precision: bool, aligned: bool) -> LaunchConfig:
    """Static: no spill, asynchronous copies, and several CTAs per SM to keep the memory busy.

    At most 32 rows, also on Hopper: 64 would be WGMMA's, which needs descriptors, and those cannot
    leave out what lies beyond a sequence's length.
    """
    if full_precision:
        return LaunchConfig(16, 4 if head_dim <= 64 else 8, 2, block_n=32, block_k=128)
    if not aligned:
        return LaunchConfig(32, 4, 1, block_n=32, block_k=128)
    return LaunchConfig(32, 4, 3, block_n=64 if head_dim <= 64 else 32, block_k=128)
