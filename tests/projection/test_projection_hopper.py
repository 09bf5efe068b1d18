"""The projection on Hopper: which kernel runs, with which tiles; what it computes."""

import itertools
from dataclasses import replace

import pytest
import torch
from budget import assert_bitwise, assert_projection_close
from gluon_interpreter import interpret
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, NAN, normal

from ra_triton.kernels.projection import forward as stage
from ra_triton.kernels.projection import forward_hopper as projection_hopper
from ra_triton.launch import gluon
from ra_triton.launch.configs import in_fewest_rounds, launch_config
from ra_triton.launch.plans import Bulk, Layout, layout_of

DTYPES = (torch.float16, torch.bfloat16)
THREE = launch_config("projection", 0, torch.bfloat16, "sm_90", True)
TWO = replace(THREE, groups=2, num_stages=4)
PROCESSORS = 132


def plan(
    M=8192,
    N=2304,
    C=768,
    dtype=torch.bfloat16,
    target="sm_90",
    *,
    w=None,
    x=None,
    on_16_bytes=(True, True),
    config=None,
):
    """The plan of x [1, M, C] and w [C, N], contiguous unless given."""
    x = x or Layout((1, M, C), (M * C, C, 1), True)
    w = w or Layout((C, N), (N, 1), True)
    device = torch.device("cpu")
    return stage._plan(device, dtype, x, w, on_16_bytes, "ieee", target, "projection", config)


def on_hopper(made):
    return made.kernel is projection_hopper._projection_kernel


# Which kernel, and how it is launched


@pytest.mark.parametrize("name", ["projection", "input_gradient"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "interpreter"])
def test_groups_of_warps_are_for_aligned_half_precision_on_hopper(name, dtype, target):
    for aligned in (True, False):
        config = launch_config(name, 0, dtype, target, aligned)
        hopper = aligned and target == "sm_90" and dtype != torch.float32
        assert (config.groups > 1) == hopper


@pytest.mark.parametrize(
    ("M", "N", "groups"),
    [
        (8192, 2304, 3),  # GPT-2's projection: 387 tiles on 132 SMs, and not 576
        (16384, 768, 3),  # the gradient of its input: 258, and not 384
        (8192, 1024, 2),  # 256 in two rounds, and not 172 in two
        (8192, 3072, 3),  # as long with either
        (128, 2304, 2),
        (1, 8, 2),
    ],
)
def test_the_groups_are_those_that_end_soonest(M, N, groups):
    assert in_fewest_rounds(THREE, M, N, PROCESSORS) == {2: TWO, 3: THREE}[groups]


@given(M=st.integers(1, 40_000), N=st.integers(1, 10_000), processors=st.integers(1, 200))
def test_no_other_number_of_groups_ends_sooner(M, N, processors):
    def rows_one_after_another(config):
        tiles = -(-M // (64 * config.groups)) * -(-N // 256)
        return -(-tiles // processors) * config.groups

    chosen = in_fewest_rounds(THREE, M, N, processors)
    assert chosen in (TWO, THREE)
    assert rows_one_after_another(chosen) <= min(map(rows_one_after_another, (TWO, THREE)))


def test_what_has_one_group_or_two_stays_as_it_is():
    plain = launch_config("projection", 0, torch.bfloat16, "sm_90", False)
    for config in (plain, TWO):
        assert in_fewest_rounds(config, 8192, 2304, PROCESSORS) is config


@pytest.mark.parametrize("bias", [True, None])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_launch_describes_x_w_and_y(dtype, transposed, bias):
    w = Layout((768, 1024), (1, 768) if transposed else (1024, 1), True)
    x = Layout((2, 500, 768), (500 * 800, 800, 1), True)
    made = plan(N=1024, dtype=dtype, x=x, w=w, on_16_bytes=(bias, True), config=THREE)
    assert on_hopper(made)
    assert made.grid == (6 * 4, 1, 1)
    assert {i: described[:3] for i, described in made.bulk.items()} == {
        0: ((1000, 768), (800, 1), (64, 64)),
        1: ((1024, 768), (768, 1), (256, 64))
        if transposed
        else ((768, 1024), (1024, 1), (64, 256)),
        3: ((1000, 1024), (1024, 1), (64, 64)),
    }
    for described in made.bulk.values():
        assert described.layout.swizzle_byte_width == 128
        assert described.layout.element_bitwidth == 16
    sizes = {name: made.arguments[name] for name in ("M", "N", "C", "GROUPS", "STAGES")}
    assert sizes == {"M": 1000, "N": 1024, "C": 768, "GROUPS": 3, "STAGES": 3}
    assert made.arguments["W_TRANSPOSED"] == transposed
    assert made.arguments["PDL"]
    assert made.arguments["launch_pdl"]


def test_the_sizes_decide_how_many_groups_there_are():
    assert plan().arguments["GROUPS"] == 3
    assert plan(N=1024).arguments["GROUPS"] == 2


def test_a_program_takes_several_tiles_only_when_all_sms_have_one():
    assert plan().grid == (PROCESSORS, 1, 1)
    assert plan(M=1).grid == (9, 1, 1)
    assert plan(config=TWO).grid == (PROCESSORS, 1, 1)
    assert plan(M=64 * 3 * 14, config=THREE).grid == (14 * 9, 1, 1)
    assert plan(M=64 * 3 * 14, config=TWO).grid == (PROCESSORS, 1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"target": "sm_80"},
        {"target": "interpreter"},
        {"N": 2300},
        {"C": 764},
        {"on_16_bytes": (True, False)},
        {"x": Layout((1, 8192, 768), (0, 768, 1), False)},
        {"x": Layout((2, 100, 768), (101 * 768, 768, 1), True)},
        {"w": Layout((768, 2304), (2304, 1), False)},
        {"w": Layout((768, 2304), (4608, 2), True)},
        # Columns of a wider weight: its rows are aligned, those of y are not.
        {"w": Layout((768, 2300), (2304, 1), True)},
    ],
)
def test_everything_else_goes_to_the_plain_kernel(change):
    assert not on_hopper(plan(**change))
    assert on_hopper(plan())


def test_a_bias_may_lie_anywhere():
    assert on_hopper(plan(on_16_bytes=(False, True)))


def test_a_layout_in_shared_memory_makes_a_descriptor_for_gluon():
    t = torch.zeros(64, 128, dtype=torch.bfloat16)
    bulk = Bulk(t.shape, t.stride(), (16, 64))
    for described in (bulk, gluon.swizzled(bulk, t.dtype)):
        descriptor = described.of(t)
        assert descriptor.base is t
        assert tuple(descriptor.block_shape) == (16, 64)
        assert getattr(descriptor, "layout", None) == described.layout


# What it computes


def operands(M, N, C, dtype, *, transposed=False, bias=True):
    """x [1, M, C], w [C, N] and its bias."""
    w = normal(N, C, dtype=dtype, seed=1, scale=C**-0.5).mT.contiguous()
    x = normal(1, M, C, dtype=dtype)
    return x, w.mT.contiguous().mT if transposed else w, normal(N, dtype=dtype) if bias else None


SIZES = (1, 63, 64, 65, 191, 192, 193, 1000, 12_345)


def multiply(x, w, bias, config, out=None, *, seed=0, processors=3):
    """On a GPU; without one in the interpreter of Gluon, in an order of ``seed``."""
    if out is None:
        out = torch.full((*x.shape[:2], w.shape[1]), NAN, dtype=x.dtype, device=x.device)
    if x.is_cuda:
        return stage.projection(x, w, bias, out, config=config)
    layouts = layout_of(x[0]), layout_of(w)
    plan = projection_hopper.projection_plan(*layouts, x.dtype, config, processors)
    interpret(plan, (x, w, bias, out), seed=seed, processors=processors)
    return out


hopper = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper"
)


groups = pytest.mark.parametrize("config", [TWO, THREE], ids=["two groups", "three groups"])


@hopper
@groups
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "C", "dtype", "bias", "processors"),
    [
        (1, 8, 8, torch.bfloat16, True, 4),
        (193, 264, 72, torch.float16, False, 2),
        (400, 776, 200, torch.bfloat16, True, 3),
    ],
)
def test_a_few_tails(M, N, C, dtype, bias, processors, transposed, config):
    x, w, b = operands(M, N, C, dtype, transposed=transposed, bias=bias)
    y = multiply(x, w, b, config, seed=M, processors=processors)
    assert_projection_close(y, x, w, b)
    assert_bitwise(multiply(x, w, b, config, seed=M + 1, processors=1), y)


@pytest.mark.gpu
@hopper
@groups
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("N", "C"), [(8, 8), (248, 72), (264, 64), (2304, 768), (776, 200)])
def test_tails_of_every_size(N, C, transposed, dtype, config):
    for M, bias in itertools.product(SIZES, (False, True)):  # which share what is compiled
        x, w, b = operands(M, N, C, dtype, transposed=transposed, bias=bias)
        assert_projection_close(multiply(x, w, b, config), x, w, b)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_bits_depend_neither_on_groups_nor_on_other_rows(dtype, transposed):
    x, w, b = operands(12_345, 776, 520, dtype, transposed=transposed)
    expected = multiply(x, w, b, THREE)
    for config in (TWO, THREE, None):
        for first, last in ((0, 12_345), (100, 101), (777, 2000), (5000, 12_345)):
            part = x[:, first:last].contiguous()
            y = stage.projection(part, w, b) if config is None else multiply(part, w, b, config)
            assert_bitwise(y, expected[:, first:last])


@hopper
def test_nothing_past_the_end_of_y_is_written():
    x, w, b = operands(300, 776, 72, torch.bfloat16)
    for config in (TWO, THREE):
        memory = torch.full((302, 776), NAN, dtype=x.dtype, device=x.device)
        multiply(x, w, b, config, memory[None, 1:-1])
        assert not memory[1:-1].isnan().any()
        assert memory[0].isnan().all()
        assert memory[-1].isnan().all()


@pytest.mark.gpu
@hopper
def test_a_launch_waits_for_the_one_before_it():
    """Each product reads what the last one wrote, over and over, while launches overlap."""
    x, w, _ = operands(3000, 768, 768, torch.bfloat16, bias=False)
    for _ in range(3):
        chain = [x, *(torch.full_like(x, NAN) for _ in range(20))]
        for before, after in itertools.pairwise(chain):
            stage.projection(before, w, None, after, config=THREE)
        torch.cuda.synchronize()
        for before, after in itertools.pairwise(chain):
            assert_bitwise(multiply(before, w, None, TWO), after)
