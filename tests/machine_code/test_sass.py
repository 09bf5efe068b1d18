"""The reader of machine code, on code written by hand with known loops and counts."""

import pytest

from bench.machine_code.pipes import ARCHITECTURES
from bench.machine_code.sass import Instruction, Program

# As ptxas writes a causal kernel on sm_90: an unmasked and a masked loop, each with a wait whose
# spinning part lies behind the end; its way back is a backward branch that closes no loop.
HOPPER = """
.text._attention_forward_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR13+0xc000], R10 ;
        /*0030*/              @!P0 BRA `(.L_x_4) ;
.L_x_5:
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R56, gdesc[UR8], RZ, !UPT ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R120, R152, gdesc[UR36].tnspB, R120 ;
        /*0060*/                   MUFU.EX2 R3, R4 ;
        /*0070*/                   FFMA R5, R6, R7, R8 ;
        /*0080*/               @P1 UTMALDG.4D [UR24], [UR30] ;
        /*0090*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*00a0*/                   FSEL R5, R5, -INF, P3 ;
        /*00b0*/                   FSEL R6, R6, -INF, P3 ;
        /*00c0*/                   HGMMA.64x64x16.F32.BF16 R56, gdesc[UR8], RZ, !UPT ;
        /*00d0*/                   HGMMA.64x64x16.F32.BF16 R120, R152, gdesc[UR36].tnspB, R120 ;
        /*00e0*/                   MUFU.EX2 R3, R4 ;
        /*00f0*/                   FFMA R5, R6, R7, R8 ;
        /*0100*/                   FFMA R5, R6, R7, R8 ;
        /*0110*/                   LDG.E R5, desc[UR4][R6.64] ;
        /*0120*/               @P2 BRA `(.L_x_1) ;
        /*0130*/                   EXIT ;
.L_x_4:
        /*0140*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR13+0xc000], R10 ;
        /*0150*/              @!P0 BRA `(.L_x_4) ;
        /*0160*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*0170*/                   BRA `(.L_x_6);
        /*0180*/                   NOP;
"""

# An outer loop (heads of a group) around the loop that computes, and a wait that spins inside it.
AMPERE = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R4], [R6.64], P0 ;
        /*0030*/                   LDGDEPBAR ;
.L_x_2:
        /*0040*/                   ISETP.NE.AND P1, PT, R2, RZ, PT ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   LDSM.16.M88.4 R8, [R12] ;
        /*0070*/                   HMMA.16816.F32.BF16 R20, R8, R12, R20 ;
        /*0080*/                   HMMA.1688.F32.TF32 R20, R8, R12, R20 ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
        /*00a0*/                   STG.E.128 desc[UR4][R6.64], R8 ;
        /*00b0*/               @P2 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
"""

VECTOR = """
.L_x_0:
        /*0000*/                   FFMA R5, R6, R7, R8 ;
        /*0010*/                   FFMA R5, R6, R7, R8 ;
        /*0020*/                   FFMA R5, R6, R7, R8 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   FADD R5, R6, R7 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
"""

STRAIGHT = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R6.64] ;
        /*0010*/               @P0 EXIT ;
        /*0020*/                   STG.E.128 desc[UR4][R6.64], R4 ;
        /*0030*/                   EXIT ;
.L_x_0:
        /*0040*/                   BRA `(.L_x_0);
        /*0050*/                   NOP;
"""


def test_loops_are_backward_branches_to_a_dominator():
    assert [loop.name for loop in Program(HOPPER).loops()] == [
        ".L_x_0",
        ".L_x_1",
        ".L_x_4",
        ".L_x_6",
    ]
    assert [loop.name for loop in Program(AMPERE).loops()] == [".L_x_0", ".L_x_1", ".L_x_2"]


def test_the_hot_loop_of_a_causal_kernel_is_the_unmasked_one():
    loop = Program(HOPPER).hot_loop()
    assert (loop.name, len(loop.body)) == (".L_x_0", 8)
    assert loop.count("UTMALDG") == 1
    assert loop.count("LDG") == loop.count("FSEL") == 0
    assert loop.matrix_flops == 2 * (2 * 64 * 64 * 16) // 4


def test_masks_that_a_branch_skips_do_not_count_but_products_and_loads_do():
    mask = "@!P2 BRA `(.L_x_9) ;\n/*0055*/ FSEL R5, R5, -INF, P3 ;\n/*0056*/ {} ;\n.L_x_9:\n"
    place = "        /*0060*/ "
    plain = Program(HOPPER).hot_loop()
    masked = Program(HOPPER.replace(place, f"/*0054*/ {mask.format('ISETP')}{place}", 1)).hot_loop()
    assert len(masked.body) == len(plain.body) + 1  # the branch itself
    assert masked.count("FSEL") == masked.count("ISETP") == 0
    for kept in ("UTMALDG.4D", "HMMA.16816.F32.BF16"):
        text = HOPPER.replace(place, f"/*0054*/ {mask.format(kept)}{place}", 1)
        loop = next(loop for loop in Program(text).loops() if loop.name == plain.name)
        assert len(loop.body) == len(plain.body) + 3


def test_the_hot_loop_is_the_inner_one_without_what_spins_inside():
    loop = Program(AMPERE).hot_loop()
    assert [instruction.base for instruction in loop.body] == [
        *("LDGSTS", "LDGDEPBAR", "LDSM", "HMMA", "HMMA", "BRA")
    ]
    assert loop.matrix_flops == 2 * 16 * 8 * (16 + 8)


def test_a_loop_around_the_hot_one_is_not_hot_however_short_the_rest_of_it_is():
    """A program an SM has its last products outside the loop that has most of them."""
    products = [line for line in AMPERE.splitlines() if "HMMA" in line]
    store = "        /*00a0*/                   STG.E.128"
    text = AMPERE.replace(store, "\n".join((*products, store)))
    around, inner, _ = Program(text).loops()
    assert around.matrix_flops == inner.matrix_flops
    assert len(around.body) < len(inner.body)
    assert Program(text).hot_loop() == inner


@pytest.mark.parametrize(
    ("written", "place", "found"),
    [
        *((reg, place, 1) for reg in ("R152", "R155") for place in ("first", "second")),
        *(("R152", "before", 0), ("R152", "after", 0), ("R151", "first", 0), ("R156", "first", 0)),
        *(("R160", "first", 1), ("R160", "second", 0), ("R160", "after", 0), ("R120", "first", 0)),
    ],
)
def test_writes_over_operands_of_products_in_flight_are_found(written, place, found):
    """Those of R152 ... R155 until the second wait, those of R160 ... until the first."""
    write = f"/*0000*/ FMUL {written}, R1, R2 ;"
    lines = {
        "before": "/*0000*/ WARPGROUP.ARRIVE ;",
        "older": "/*0000*/ HGMMA.64x64x16.F32.BF16 R56, R160, gdesc[UR8], R56, gsb0 ;",
        "left": "/*0000*/ HGMMA.64x64x16.F32.BF16 R120, R152, gdesc[UR36].tnspB, R120, gsb0 ;",
        "first": "/*0000*/ BAR.SYNC R152, 0x80 ;",
        "wait": "/*0000*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
        "second": "/*0000*/ STS [R152], R153 ;",
        "all": "/*0000*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;",
        "after": "/*0000*/ NOP ;",
    }
    lines[place] += f"\n{write}"
    overwriting = Program("\n".join(lines.values())).overwritten_operands
    assert [i.opcode for i in overwriting] == ["FMUL"] * found


@pytest.mark.parametrize(
    ("text", "written"),
    [
        *(("FMUL R3, R4, R5", {3}), ("CS2R R4, SRZ", {4, 5}), ("LDS.128 R8, [R2]", {8, 9, 10, 11})),
        *(("LDG.E.64 R8, desc[UR4][R6.64]", {8, 9}), ("IMAD.WIDE R2, R3, R4, R6", {2, 3})),
        *(("SHFL.BFLY PT, R10, R11, 0x2, 0x1f", {10}), ("LDS.U16 R7, [R2]", {7})),
        *(("ISETP.GT.AND P0, PT, R19, 0x38, PT", set()), ("STS [R3], R4", set())),
        *(("BAR.ARV R14, 0x1a0", set()), ("R2UR UR39, R0", set())),
    ],
)
def test_registers_that_an_instruction_writes(text, written):
    (instruction,) = Program(f"/*0000*/ {text} ;").code
    assert instruction.written == written


def test_without_matrix_instructions_the_loop_with_most_arithmetic_is_hot():
    loop = Program(VECTOR).hot_loop()
    assert (loop.name, len(loop.body), loop.vector_flops) == (".L_x_0", 4, 192)


def test_without_a_loop_the_whole_kernel_is_hot_and_padding_is_not_counted():
    loop = Program(STRAIGHT).hot_loop()
    assert (loop.name, len(loop.body)) == ("whole kernel", 4)


def test_clocks_of_a_warpgroup_on_hopper():
    body = Program(HOPPER).hot_loop().body
    clocks = ARCHITECTURES["sm_90"].clocks(body, warps=4, bulk_bytes=1280)
    assert clocks["tensor"] == 2 * (2 * 64 * 64 * 16) / 4096
    assert clocks["mufu"] == 4 * 32 / 16
    assert clocks["fma"] == 4 * 32 / 128
    assert clocks["issue"] == len(body)
    # A and B, 64 rows of 32 bytes each, for the first product; B for the second; bulk copies.
    assert clocks["shared"] == (2 * 64 * 32 + 64 * 32 + 1280) / 128


def test_clocks_on_ampere():
    body = Program(AMPERE).hot_loop().body
    clocks = ARCHITECTURES["sm_80"].clocks(body, warps=8, bulk_bytes=0)
    assert clocks["tensor"] == 8 * (2 * 16 * 8 * 16 / 2048 + 2 * 16 * 8 * 8 / 1024)
    assert clocks["shared"] == 8 * (4 + 4)  # 512 bytes each for LDGSTS and LDSM
    assert clocks["issue"] == 8 * len(body) / 4


@pytest.mark.parametrize(
    ("target", "registers", "shared_memory", "warps", "expected"),
    [
        ("sm_80", 255, 48 << 10, 4, (2, "registers")),
        ("sm_86", 160, 40 << 10, 4, (2, "shared memory")),
        ("sm_80", 160, 40 << 10, 4, (3, "registers")),
        ("sm_90", 32, 0, 4, (16, "registers")),
        ("sm_89", 24, 0, 4, (12, "warps")),
        ("sm_86", 16, 0, 1, (16, "CTAs")),
        ("sm_90", 168, 0, 4, (3, "registers")),
    ],
)
def test_ctas_per_sm(target, registers, shared_memory, warps, expected):
    assert ARCHITECTURES[target].ctas_per_sm(registers, shared_memory, warps) == expected


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [("LDGSTS.E.BYPASS.128", 16), ("LDS.64", 8), ("STS", 4), ("LDG.E.U16", 2), ("LDG.E.U8", 1)],
)
def test_bytes_of_a_load(opcode, expected):
    assert Instruction("", opcode, " R4, [R6]").bytes_per_lane == expected


@pytest.mark.parametrize(
    ("opcode", "shape", "flops_per_warp", "clocks"),
    [
        ("IMMA.16832.S8.S8.SAT", (16, 8, 32), 2 * 16 * 8 * 32, 2 * 16 * 8 * 32 / (4096 * 2 * 0.62)),
        ("IGMMA.64x128x32.S8.S8", (64, 128, 32), 2 * 16 * 128 * 32, 2 * 16 * 128 * 32 / 8192),
    ],
)
def test_integer_products_run_at_twice_the_rate(opcode, shape, flops_per_warp, clocks):
    instruction = Instruction("", opcode, " R24, gdesc[UR4], R24, gsb0")
    assert instruction.matrix_shape == shape
    assert instruction.matrix_flops == flops_per_warp
    found = ARCHITECTURES["sm_90"].clocks([instruction], warps=1, bulk_bytes=0)
    assert found["tensor"] == pytest.approx(clocks)


def test_products_in_tensor_memory_make_a_loop_hot():
    """Their opcode names no shape; a loop with many FP32 products and none of them is not hot."""
    text = """
    .L_x_0:
    /*0010*/ UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12], tmem[UR14], idesc[UR15], UP0 ;
    /*0020*/ @P0 BRA `(.L_x_0) ;
    .L_x_1:
    /*0030*/ FFMA R0, R1, R2, R3 ;
    /*0040*/ FFMA R4, R1, R2, R3 ;
    /*0050*/ @P0 BRA `(.L_x_1) ;
    /*0060*/ EXIT ;
    """
    loop = Program("\n".join(line.strip() for line in text.splitlines())).hot_loop()
    assert (loop.name, loop.tensor_memory_products) == (".L_x_0", 1)
