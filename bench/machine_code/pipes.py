"""How many clocks an SM needs for the instructions of a loop, pipe by pipe.

Each pipe is taken to run at its documented rate and nothing else to cost time, so the largest
number is a lower bound on the time of an iteration, reached only if enough warps are resident to
overlap the pipes. Latencies, bank conflicts, L2 and DRAM are not in it.

Rates per SM and clock:

- issue: one warp instruction in each of four schedulers.
- tensor, dense, 16-bit operands and FP32 sums: 2048 FLOP on sm_80 (A100: 312 TFLOP/s, 108 SMs,
  1.41 GHz), 1024 on sm_86 and sm_89 (A40: 149.7, 84, 1.74; L40S: 362, 142, 2.52), 4096 on sm_90
  (H100 SXM: 989, 132, 1.83). Data sheets of the parts. **Assumed: sm_100 twice sm_90's, sm_120
  sm_89's.** What sm_100 multiplies in tensor memory is not counted: its opcode names no shape.
  **Assumed: data centre and workstation parts. GeForce boards of sm_86 and sm_89 sum in FP32 at
  half this rate** (whitepapers GA102, AD102), so that there the tensor pipe binds earlier. TF32
  runs at half the rate everywhere, int8 with int32 sums at twice the rate (the same data sheets:
  624, 299, 733 and 1,979 TOPS).
- HMMA on sm_90 at 62% of the rate of HGMMA: measured, arXiv:2402.13499; NVIDIA publishes none.
  **Assumed: the same for IMMA and IGMMA.**
- fma 128 lanes (64 on sm_80), integer multiplication 64 on half of those lanes, alu 64, mufu 16:
  CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions". Which instruction runs
  in which pipe: Nsight Compute's "Pipelines", and NVIDIA's forum, thread 302018.
- shared: 128 bytes, shared memory and L1 together (tuning guides: 32 banks of 4 bytes); shuffles
  take the same path at 32 lanes. HGMMA reads B, and A unless it is in registers, from there, each
  instruction anew, and TMA loads write to it. **Assumed, as NVIDIA does not say: these share the
  128 bytes with everything else.** Lanes that read the same address are counted apart, so for the
  FMA products of IEEE float32, whose lanes share addresses, this number is too high.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.machine_code.sass import Instruction

PIPES = ("tensor", "mufu", "fma", "imul", "alu", "shared", "issue")
HMMA_ON_HOPPER = 0.62
RESERVED_PER_CTA = 1024  # bytes of shared memory that the system takes

_SCHEDULERS = 4
_REGISTERS_PER_SCHEDULER = 16384
_REGISTER_UNIT = 256  # a warp gets a multiple of this
_SHARED_UNIT = 128
_SHARED_BYTES_PER_CLOCK = 128
_ALU_LANES = 64
_MUFU_LANES = 16

_FP32 = {"FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"}
_IMUL = {"IMAD", "IMUL", "IDP"}
_XU = {"MUFU", "I2F", "F2I", "F2F", "FRND", "FLO", "POPC", "BREV"}
_MEMORY = {"LDS", "STS", "LDG", "STG", "LDGSTS", "LDL", "STL", "ATOMS", "ATOMG", "RED"}
_ALU = {"IADD3", "LOP3", "SHF", "ISETP", "FSETP", "SEL", "FSEL", "FMNMX", "IMNMX", "LEA", "PRMT"}
_ALU |= {"MOV", "IABS", "PLOP3", "SGXT", "BMSK", "P2R", "R2P", "F2FP", "I2FP"}
_ALU |= {"VIADD", "VIMNMX", "VIADDMNMX", "HSETP2", "HMNMX2"}


@dataclass(frozen=True)
class Architecture:
    """What one SM has (CUDA C++ Programming Guide, "Compute Capabilities").

    Attributes:
        tensor: FLOP per clock of 16-bit matrix products with FP32 sums, dense.
        fma_lanes: FP32 results per clock.
        shared_memory: bytes for all its CTAs.
        shared_per_cta: bytes that one CTA may use.
        warps: resident warps at most.
        ctas: resident CTAs at most.
    """

    tensor: int
    fma_lanes: int
    shared_memory: int
    shared_per_cta: int
    warps: int
    ctas: int

    def ctas_per_sm(self, registers: int, shared_memory: int, warps: int) -> tuple[int, str]:
        """How many CTAs fit, and what limits them.

        Args:
            registers: per thread.
            shared_memory: bytes per CTA.
            warps: per CTA.
        """
        per_warp = _round_up(32 * registers, _REGISTER_UNIT)
        shared = _round_up(shared_memory, _SHARED_UNIT) + RESERVED_PER_CTA
        limits = {
            "registers": _REGISTERS_PER_SCHEDULER // per_warp * _SCHEDULERS // warps,
            "shared memory": self.shared_memory // shared,
            "warps": self.warps // warps,
            "CTAs": self.ctas,
        }
        limit = min(limits, key=lambda name: limits[name])
        return limits[limit], limit

    def tensor_peak(self, instruction: Instruction) -> float:
        """FLOP per clock that an SM can reach with a matrix instruction's dtypes."""
        if instruction.base in ("IMMA", "IGMMA"):
            return 2 * self.tensor
        return self.tensor / 2 if "TF32" in instruction.opcode else self.tensor

    def tensor_rate(self, instruction: Instruction) -> float:
        """FLOP per clock that it can reach with this instruction."""
        slow = self is ARCHITECTURES["sm_90"] and instruction.base in ("HMMA", "IMMA")
        return self.tensor_peak(instruction) * (HMMA_ON_HOPPER if slow else 1)

    def clocks(self, body: Iterable[Instruction], warps: int, bulk_bytes: int) -> dict[str, float]:
        """Clocks per pipe for a CTA that runs ``body`` once.

        Args:
            body: instructions, all executed by every warp.
            warps: of the CTA.
            bulk_bytes: what TMA loads write to shared memory meanwhile, in the whole CTA.
        """
        clocks = dict.fromkeys(PIPES, 0.0)
        clocks["shared"] = bulk_bytes / _SHARED_BYTES_PER_CLOCK
        for instruction in body:
            for pipe, amount in self._clocks_of(instruction).items():
                clocks[pipe] += warps * amount
        return clocks

    def _clocks_of(self, instruction: Instruction) -> dict[str, float]:
        """Clocks that one warp's instruction occupies of each pipe."""
        base = instruction.base
        clocks = {"issue": 1 / _SCHEDULERS}
        if instruction.matrix_shape:
            clocks["tensor"] = instruction.matrix_flops / self.tensor_rate(instruction)
            clocks["shared"] = _operand_bytes(instruction) / _SHARED_BYTES_PER_CLOCK
        elif base in _FP32 or base in _IMUL:
            clocks["fma"] = 32 / self.fma_lanes
            clocks["imul"] = 32 / _ALU_LANES if base in _IMUL else 0.0
        elif base in _ALU:
            clocks["alu"] = 32 / _ALU_LANES
        elif base in _XU:
            clocks["mufu"] = 32 / _MUFU_LANES
        elif base in _MEMORY:
            clocks["shared"] = 32 * max(4, instruction.bytes_per_lane) / _SHARED_BYTES_PER_CLOCK
        elif base in ("LDSM", "STSM"):  # 8x8 matrices of 16 bits, 128 bytes each
            clocks["shared"] = int(instruction.opcode[-1]) if instruction.opcode[-2] == "." else 1
        elif base == "SHFL":
            clocks["shared"] = 1
        return clocks


ARCHITECTURES = {
    "sm_80": Architecture(2048, 64, 164 << 10, 163 << 10, 64, 32),
    "sm_86": Architecture(1024, 128, 100 << 10, 99 << 10, 48, 16),
    "sm_89": Architecture(1024, 128, 100 << 10, 99 << 10, 48, 24),
    "sm_90": Architecture(4096, 128, 228 << 10, 227 << 10, 64, 32),
    "sm_100": Architecture(8192, 128, 228 << 10, 227 << 10, 64, 32),
    "sm_120": Architecture(1024, 128, 100 << 10, 99 << 10, 48, 24),
}


def _operand_bytes(instruction: Instruction) -> float:
    """Bytes of shared memory that a matrix instruction reads, per warp: a quarter of HGMMA's."""
    if instruction.base not in ("HGMMA", "IGMMA"):
        return 0.0
    assert instruction.matrix_shape
    m, n, _ = instruction.matrix_shape
    first_source = instruction.operands.split(",")[1]
    rows = n if first_source.strip().startswith("R") else n + m
    return rows * 32 / 4  # K elements are 32 bytes in every dtype


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
