"""Read machine code as ``nvdisasm -c`` prints it: instructions, loops, and the hot loop.

A loop is a backward branch to an instruction that dominates it, from the one to the other in the
text. Not every instruction between counts. What belongs to a loop inside, such as a wait that
spins, does not, nor what a branch can skip if it neither multiplies matrices nor loads, such as the
masks of a causal kernel that has one loop for all its tiles. Rarely taken code that ptxas has moved
out of line lies outside the range anyway.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_NO_FALL_THROUGH = ("BRA", "BRX", "JMP", "EXIT", "RET")
_MMA = re.compile(r"[HI]MMA\.(16)(8)(32|16|8|4)\b|[HI]GMMA\.(64)x(\d+)x(\d+)\b")
_WARPGROUP = ("HGMMA", "IGMMA")
# Products in tensor memory (sm_100), whose opcode names no shape.
TENSOR_MEMORY = ("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA")
_WARPS_PER_WARPGROUP = 4
_LOADS = ("LDG", "LDGSTS", "UTMALDG")
_ONLY_READS = ("BAR", "BRX", "WARPSYNC", "NANOSLEEP")  # their first operand


@dataclass(frozen=True)
class Instruction:
    """One instruction, e.g. ``@!P0 BRA `(.L_x_2)``: guard ``!P0``, opcode, operands."""

    guard: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without modifiers, e.g. ``"HGMMA"``."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> str | None:
        """The label that it branches to."""
        found = _TARGET.search(self.operands)
        return found[1] if found and self.base in ("BRA", "CALL", "JMP") else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow: it has a condition, or is no jump."""
        conditional = self.guard not in ("", "PT") or re.match(
            r"\s*(\.\w+\s+)?!?U?P", self.operands
        )
        return bool(conditional) or self.opcode == "BRA.DIV" or self.base not in _NO_FALL_THROUGH

    @property
    def written(self) -> set[int]:
        """The numbers of the registers that it writes: those of its first operand."""
        found = re.match(r"\s*(?:PT, )?R(\d+)", self.operands)
        if found is None or self.base in _ONLY_READS:
            return set()
        pair = self.base == "CS2R" or ".WIDE" in self.opcode
        words = self.bytes_per_lane // 4 if self.base in ("LDG", "LDS", "LDL") else 1 + pair
        return set(range(int(found[1]), int(found[1]) + max(1, words)))

    @property
    def bytes_per_lane(self) -> int:
        """What a load or store moves: ``.128`` is 16 bytes, ``.U16`` is 2, none named is 4."""
        bits = re.search(r"\.[US]?(128|64|16|8)\b", self.opcode)
        return int(bits[1]) // 8 if bits else 4

    @property
    def matrix_shape(self) -> tuple[int, int, int] | None:
        """``(M, N, K)`` of a matrix instruction, as its opcode says."""
        found = _MMA.match(self.opcode)
        if found is None:
            return None
        m, n, k = (int(size) for size in found.groups() if size)
        return m, n, k

    @property
    def matrix_flops(self) -> int:
        """FLOP of a matrix instruction per warp; a warpgroup's work is shared by its four."""
        if self.matrix_shape is None:
            return 0
        m, n, k = self.matrix_shape
        return 2 * m * n * k // (_WARPS_PER_WARPGROUP if self.base in _WARPGROUP else 1)

    @property
    def vector_flops(self) -> int:
        """FLOP of an FP32 instruction per warp."""
        return 32 * {"FFMA": 2, "FADD": 1, "FMUL": 1}.get(self.base, 0)


@dataclass(frozen=True)
class Loop:
    """The instructions of one iteration, without those of loops inside; or the whole kernel."""

    name: str
    body: tuple[Instruction, ...]
    inner: frozenset[str] = frozenset()  # names of the loops inside

    def count(self, *bases: str) -> int:
        """How many instructions have one of these opcodes, modifiers aside."""
        return sum(instruction.base in bases for instruction in self.body)

    @cached_property
    def matrix_flops(self) -> int:
        """FLOP of the matrix instructions, per warp."""
        return sum(instruction.matrix_flops for instruction in self.body)

    @property
    def tensor_memory_products(self) -> int:
        """How many instructions multiply in tensor memory."""
        return self.count(*TENSOR_MEMORY)

    @cached_property
    def vector_flops(self) -> int:
        """FLOP of the FP32 instructions, per warp."""
        return sum(instruction.vector_flops for instruction in self.body)


class Program:
    """The instructions of one kernel and where its labels point."""

    def __init__(self, text: str) -> None:
        """Parse ``text``; lines that are neither an instruction nor a label do not matter."""
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                self.labels[label[1]] = len(self.code)
            elif found := _INSTRUCTION.search(line):
                self.code.append(Instruction(found[1] or "", found[2], found[3]))

    @cached_property
    def overwritten_operands(self) -> list[Instruction]:
        """What writes registers that a WGMMA in flight may still read its left operand from.

        A wait for all but the last n groups is a wait for those before in the text.
        """
        found = []
        groups: list[set[int]] = [set()]  # registers, of the groups that no wait has covered
        for instruction in self.code:
            if instruction.opcode == "WARPGROUP.DEPBAR.LE":
                left = int(instruction.operands.split(",")[-1].strip(), 16)
                groups = groups[len(groups) - 1 - left :] if left < len(groups) else groups
            elif instruction.base in _WARPGROUP:
                if operand := re.match(r"\s*R\d+, R(\d+), gdesc", instruction.operands):
                    groups[-1] |= set(range(int(operand[1]), int(operand[1]) + 4))
                if "gsb0" in instruction.operands:  # the last of its group
                    groups.append(set())
            elif instruction.written & set().union(*groups):
                found.append(instruction)
        return found

    def hot_loop(self) -> Loop:
        """Where the kernel spends its time; the whole kernel if it has no loop that computes.

        Among the loops that do at least half the work of the one that does most, and have none of
        these inside, the one with the fewest instructions for its work: a causal kernel may run the
        same products in an unmasked and a masked loop, and most tiles take the unmasked one. Work
        is products in tensor memory; without them matrix FLOP; without these too FP32 FLOP.
        """
        loops = self.loops()
        kinds = ("tensor_memory_products", "matrix_flops", "vector_flops")
        kind = next((kind for kind in kinds if any(map(attrgetter(kind), loops))), kinds[-1])
        work = attrgetter(kind)
        most = max(map(work, loops), default=0)
        if most == 0:
            return Loop("whole kernel", self._without_padding())
        heavy = [loop for loop in loops if 2 * work(loop) >= most]
        names = {loop.name for loop in heavy}
        heavy = [loop for loop in heavy if not names & loop.inner]
        return min(heavy, key=lambda loop: len(loop.body) / work(loop))

    def loops(self) -> list[Loop]:
        """All loops, in the order of the text."""
        ranges: dict[int, int] = {}
        for i, instruction in enumerate(self.code):
            start = self.labels.get(instruction.target or "", len(self.code))
            if self._leaves_a_spin(i):
                continue
            if instruction.base == "BRA" and start <= i and self._dominates(start, i):
                ranges[start] = max(i, ranges.get(start, i))
        names = {position: label for label, position in self.labels.items()}
        return [
            Loop(
                names[start],
                self._own(start, end, ranges),
                frozenset(names[i] for i in ranges if start < i <= end),
            )
            for start, end in sorted(ranges.items())
        ]

    def _own(self, start: int, end: int, ranges: dict[int, int]) -> tuple[Instruction, ...]:
        others: set[int] = set()
        for first, last in ranges.items():
            if (first, last) != (start, end) and start <= first and last <= end:
                others.update(range(first, last + 1))
        for i in range(start, end):
            target = self.labels.get(self.code[i].target or "", 0)
            skipped = range(i + 1, target)
            if target <= end and not any(
                self.code[j].matrix_shape or self.code[j].base in (*_LOADS, *TENSOR_MEMORY)
                for j in skipped
            ):
                others.update(skipped)
        return tuple(self.code[i] for i in range(start, end + 1) if i not in others)

    def _leaves_a_spin(self, i: int) -> bool:
        """Whether ``i`` goes back from a wait that ptxas has put out of line, after the code."""
        before = self.code[i - 1] if i else self.code[i]
        if self.code[i].falls_through or before.target is None:
            return False
        return i - 4 <= self.labels.get(before.target, i) < i

    def _dominates(self, dominator: int, i: int) -> bool:
        """Whether every way from the entry to ``i`` passes ``dominator``."""
        seen = {dominator}
        ahead = [] if dominator == 0 else [0]
        while ahead:
            position = ahead.pop()
            if position == i:
                return False
            if position not in seen:
                seen.add(position)
                ahead += self._successors[position]
        return True

    @cached_property
    def _successors(self) -> list[list[int]]:
        """Which instructions can follow each."""
        targets = [self.labels.get(instruction.target or "") for instruction in self.code]
        following: list[list[int]] = [
            [i + 1] if instruction.falls_through and i + 1 < len(self.code) else []
            for i, instruction in enumerate(self.code)
        ]
        for ahead, target in zip(following, targets, strict=True):
            ahead += [] if target is None else [target]
        return following

    def _without_padding(self) -> tuple[Instruction, ...]:
        """Without the no-ops and the branch to itself that fill the last cache line."""
        end = max(i for i, instruction in enumerate(self.code) if instruction.base == "EXIT")
        return tuple(self.code[: end + 1])
