"""The table of launch configurations: a pure function, total over what the kernels accept."""

import itertools
from math import inf

import pytest
import torch

from ra_triton.launch.configs import (
    SPECIALISED,
    TABLE,
    LaunchConfig,
    first_of,
    launch_config,
    target,
)

INT8 = ("weight_only", "weight_only_few", "other_columns", "w8a8")
GEMMS = ("projection", "input_gradient", "weight_gradient", *INT8)
ATTENTION = ("attention_forward", "key_value_gradient", "query_gradient")
STAGES = (*GEMMS, *ATTENTION, "packing", "delta", "bias_gradient", "add_splits", "quantize_rows")
STAGES += ("decode", "decode_combine", "append")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "rocm", "interpreter")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8)


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_call_has_a_row_with_power_of_two_tiles(stage, target_name):
    for head_dim, dtype, aligned in itertools.product(range(16, 129), DTYPES, (True, False)):
        config = launch_config(stage, head_dim, dtype, target_name, aligned)
        assert config == launch_config(stage, head_dim, dtype, target_name, aligned)
        assert power_of_two(config.block_m)
        assert power_of_two(config.num_warps)
        assert config.num_stages >= 1
        if stage in GEMMS + ATTENTION:
            assert min(config.block_m, config.block_n) >= 16  # what a tensor core dot needs
        if stage in GEMMS:
            assert config.block_k >= 16
        if stage == "decode":  # a split is made of whole tiles of keys
            assert min(config.block_m, config.block_n) >= 16
            assert power_of_two(config.block_n)
            assert config.block_k % config.block_n == 0
            assert not config.use_tma


def test_each_row_is_for_some_call_and_says_why():
    """One that earlier rows leave nothing for, or that no call fits, would be read in vain."""
    unaligned, aligned = {"aligned": False, "cut": False}, {"aligned": True, "cut": False}
    names = ("D", "on", "fp32", "dropout")
    plain = itertools.product((32, 64, 128, 256), TARGETS[:-1], (False, True), (False, True))
    calls = [
        dict(zip(names, call, strict=True)) | operands
        for call in plain
        for operands in (unaligned, aligned, {**aligned, "cut": True})
    ]
    names = ("D", "below", "since", "causal", "softcap", "varlen", "within")
    lengths = (64, 128), (256, 4096), ((3, 6), (3, 9)), *[(False, True)] * 3, (1, 4096, inf)
    of_length = [dict(zip(names, c, strict=True)) for c in itertools.product(*lengths)]
    of_length = [{**call, "window": call["within"] < inf} for call in of_length]
    for rows, some in (*((rows, calls) for rows in TABLE.values()), (SPECIALISED, of_length)):
        taken = {id(first_of(rows, call)) for call in some}
        assert [row for row in rows if id(row) not in taken] == []
        assert all(row.why for row in rows)


def test_bulk_copies_are_chosen_only_for_hopper_and_aligned_operands():
    for stage, head_dim, dtype, name, aligned in itertools.product(
        STAGES, (32, 64, 128), DTYPES, TARGETS, (True, False)
    ):
        if launch_config(stage, head_dim, dtype, name, aligned).use_tma:
            assert name == "sm_90"
            assert aligned


def test_dependent_launches_are_for_hopper_alone():
    for stage, name in itertools.product(STAGES, TARGETS):
        config = launch_config(stage, 64, torch.bfloat16, name, True)
        assert config.pdl == (name == "sm_90")
        assert config.options.get("launch_pdl", False) == config.pdl


def test_configs_are_frozen_and_hashable():
    config = LaunchConfig(64, 4)
    assert hash(config) == hash(LaunchConfig(64, 4))
    with pytest.raises(AttributeError):
        config.block_m = 32


@pytest.mark.parametrize(
    ("capability", "kib", "expected"),
    [
        ((8, 0), 163, "sm_80"),
        ((8, 6), 99, "sm_86"),
        ((8, 9), 99, "sm_89"),
        ((9, 0), 227, "sm_90"),
        ((8, 7), 163, "sm_80"),  # Orin: Ampere with a large shared memory
        ((10, 0), 227, "sm_100"),
        ((10, 3), 227, "sm_100"),
        ((12, 0), 99, "sm_120"),
        ((12, 1), 99, "sm_120"),
        ((13, 0), 227, "sm_80"),  # newer data-centre parts: pointers, 163 KiB suffice
        ((13, 1), 99, "sm_86"),  # newer consumer parts: 99 KiB
    ],
)
def test_a_gpu_without_a_row_takes_the_one_that_fits_its_shared_memory(capability, kib, expected):
    assert target(capability, kib * 1024) == expected
