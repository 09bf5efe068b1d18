"""What is measured: named shapes, their arithmetic, and the cases a run consists of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

STAGES = ("op", "attention")
PHASES = {"forward": "forward", "train": "forward + backward"}


@dataclass(frozen=True)
class Shape:
    """One causal self-attention layer: ``x [B, T, C]`` with ``C = H * D``."""

    name: str
    B: int
    T: int
    H: int
    D: int

    @property
    def C(self) -> int:
        """Embedding width."""
        return self.H * self.D

    def with_tokens(self, T: int) -> "Shape":
        """Another length with as many tokens in all: ``B * T`` is kept where T divides it."""
        return replace(self, B=max(1, self.B * self.T // T), T=T)

    def with_head_dim(self, D: int) -> "Shape":
        """Another head dim at the same width ``C``.

        Raises:
            ValueError: D does not divide C.
        """
        if self.C % D:
            fitting = ", ".join(str(d) for d in range(8, 257, 8) if self.C % d == 0)
            raise ValueError(
                f"shape {self.name} has C = {self.C}: choose D from {fitting}, not {D}"
            )
        return replace(self, H=self.C // D, D=D)


@dataclass(frozen=True)
class Case:
    """One shape at one rank, and the providers that are timed against each other on it."""

    shape: Shape
    R: int
    providers: tuple[str, ...]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gpt2", B=8, T=1024, H=12, D=64),
        Shape("gpt2-medium", B=8, T=1024, H=16, D=64),
        Shape("gpt2-xl", B=8, T=1024, H=25, D=64),
        Shape("llama-4k", B=1, T=4096, H=32, D=128),
        # FlashAttention's own sweep: width 2048, 16384 tokens, heads of 64 or 128.
        Shape("wide-2048", B=16, T=1024, H=32, D=64),
        # One GPT-2 layer that a laptop runs in some 30 ms.
        Shape("cpu", B=2, T=512, H=12, D=64),
        # So little to compute that what is left is the cost of calling.
        Shape("call", B=1, T=8, H=1, D=64),
    )
}


def flops(shape: Shape, stage: str = "op", phase: str = "forward") -> int:
    """Floating-point operations of one causal call, the same for plain and reciprocal.

    Forward attention is two products, ``4 * B * T² * H * D``, halved because the causal mask needs
    half of the scores; softmax is not counted. The stage ``op`` adds the projection,
    ``2 * B * T * C * 3 * H * D``, and ``layer`` (the ladder's) the output projection too,
    ``2 * B * T * C * C``. Backward is 2.5 times the attention and 2 times the projections; the
    phase ``train`` is both directions.
    """
    B, T, H, D, C = shape.B, shape.T, shape.H, shape.D, shape.C
    attention = 4 * B * T * T * H * D // 2
    columns = {"attention": 0, "op": 3 * C, "layer": 4 * C}[stage]
    projection = 2 * B * T * C * columns
    if phase == "forward":
        return attention + projection
    return attention * 7 // 2 + projection * 3


def default_cases(
    on_gpu: bool, quick: bool, everyday: Sequence[str], compiled: Sequence[str]
) -> list[Case]:
    """The run without options: ranks at ``gpt2`` and lengths at width 2048; a small one on a CPU.

    Args:
        on_gpu: whether the shapes may be large.
        quick: fewer of each.
        everyday: providers for every case.
        compiled: providers that compile for each new shape, so for the rank sweep only.
    """
    everyday, compiled = tuple(everyday), tuple(compiled)
    if not on_gpu:
        small = SHAPES["cpu"]
        return [
            Case(small.with_tokens(T), R, everyday)
            for T in ([512] if quick else [256, 512, 1024])
            for R in ([0, 4] if quick else [0, 4, 8])
        ]
    wide = SHAPES["wide-2048"]
    over_R = [
        Case(SHAPES["gpt2"], R, everyday if quick else everyday + compiled)
        for R in ([0, 4] if quick else [0, 4, 8, 16, 32])
    ]
    over_T = [
        Case(wide.with_head_dim(D).with_tokens(T), 4, everyday)
        for D in (64, 128)
        for T in ([1024, 4096] if quick else [512, 1024, 2048, 4096, 8192, 16384])
    ]
    return over_R + over_T


def chosen_cases(
    shapes: Sequence[str],
    lengths: Sequence[int] | None,
    head_dims: Sequence[int] | None,
    ranks: Sequence[int],
    providers: Sequence[str],
) -> list[Case]:
    """Every combination of what the user named.

    Raises:
        ValueError: a head dim that does not divide a width, a rank above a head dim.
    """
    cases = []
    for shape in (SHAPES[name] for name in shapes):
        for D in head_dims or (shape.D,):
            for T in lengths or (shape.T,):
                sized = shape.with_head_dim(D).with_tokens(T)
                for R in ranks:
                    if R > D:
                        raise ValueError(f"R = {R} exceeds the head dim {D} of {shape.name}")
                    cases.append(Case(sized, R, tuple(providers)))
    return cases
