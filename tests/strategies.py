"""Recipes for tensors: hypothesis draws sizes, layouts, values and a seed, never elements."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("sdpa", "triton")
NAN = float("nan")


def dtypes_for(backend: str) -> list[torch.dtype]:
    """What a backend can be tested in here; the interpreter truncates float32 to bfloat16."""
    bf16 = [] if backend == "triton" and DEVICE.type == "cpu" else [torch.bfloat16]
    return [torch.float32, torch.float16, *bf16]


backends = pytest.mark.parametrize("backend", BACKENDS)
# FlexAttention trains on a GPU alone, and compiles there for seconds: what it does is in test_flex.
FORWARD_BACKENDS = BACKENDS if DEVICE.type == "cuda" else (*BACKENDS, "flex")
forward_backends = pytest.mark.parametrize("backend", FORWARD_BACKENDS)
backend_dtypes = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
        for backend in BACKENDS
        for dtype in dtypes_for(backend)
    ],
)


def quick(values: Iterable[Any], count: int = 1) -> list[Any]:
    """Parameters of which `make test` takes the first ``count``, and `make test-all` all."""
    slow = partial(pytest.param, marks=pytest.mark.slow)
    return [
        value if i < count else slow(*value) if isinstance(value, tuple) else slow(value)
        for i, value in enumerate(values)
    ]


# For tests that run several kernels an example.
few_examples = settings(max_examples=settings().max_examples * 2 // 5)
fewest_examples = settings(max_examples=settings().max_examples // 4)  # forward and backward


def normal(*shape: int, dtype=torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Seeded normal numbers; equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


# Layouts: the same numbers at other addresses; everything around them is NaN.


def operands(D, T_q, T_k, dtype=None, B=1, H=2, H_kv=1):
    """Views of one buffer, as the projection leaves them where ``T_q == T_k``, and dO."""
    dtype = dtype or dtypes_for("triton")[-1]
    rows = normal(B, max(T_q, T_k), H + 2 * H_kv, D, dtype=dtype)
    q, k, v = rows.split((H, H_kv, H_kv), dim=2)
    do = normal(B, T_q, H, D, dtype=dtype, seed=1)
    return q[:, :T_q], k[:, :T_k], v[:, :T_k], do


def _sliced(t: Tensor, fill: float = NAN) -> Tensor:
    wide = t.new_full([size + 3 for size in t.shape], fill)
    inner = wide[tuple(slice(1, 1 + size) for size in t.shape)]
    return inner.copy_(t)


def _offset(t: Tensor) -> Tensor:
    flat = t.new_full((t.numel() + 2,), NAN)
    return flat[1 : 1 + t.numel()].view(t.shape).copy_(t)


def _swapped(t: Tensor, a: int, b: int) -> Tensor:
    return t.transpose(a, b).contiguous().transpose(a, b)


def _fused_slot(t: Tensor) -> Tensor:
    buffer = t.new_full((*t.shape[:2], 3, *t.shape[2:]), NAN)  # [B, T, 3, H, D]
    return buffer[:, :, 1].copy_(t)


def _expanded(t: Tensor) -> Tensor:
    return t[:1].expand_as(t) if len(t) else t


LAYOUTS = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "sliced": _sliced,
    "offset": _offset,
    "transposed": lambda t: _swapped(t, 0, 1),  # [T, B, ...], or a column-major matrix
    "head_major": lambda t: _swapped(t, 1, 2),  # [B, H, T, D]
    "fused": _fused_slot,
    "expanded": _expanded,  # stride 0 over the batch: every batch element is the first one
}
HEAD_LAYOUTS = tuple(LAYOUTS)  # of [B, T, H, D]
TOKEN_LAYOUTS = ("contiguous", "sliced", "offset", "transposed", "expanded")  # of [B, T, C]
WEIGHT_LAYOUTS = ("contiguous", "sliced", "offset", "transposed")  # of [C, N]
WRITABLE_LAYOUTS = HEAD_LAYOUTS[:-1]


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The numbers of ``t`` in another layout (``expanded``: those of its first batch element)."""
    return LAYOUTS[layout](t)


# A gradient comes from whatever follows: a sum sends one number, a concatenation its slice.
GRADIENT_LAYOUTS = {
    **LAYOUTS,
    "of_a_sum": lambda t: t.flatten()[:1].expand(t.numel()).view_as(t) if t.numel() else t,
    "of_a_concatenation": lambda t: torch.cat((t, torch.full_like(t, NAN)), -1)[..., : t.shape[-1]],
    "lanes_apart": lambda t: torch.stack((t, torch.full_like(t, NAN)), -1)[..., 0],
}
SAME_NUMBERS = tuple(name for name in GRADIENT_LAYOUTS if name not in ("expanded", "of_a_sum"))
gradient_layouts = st.sampled_from(list(GRADIENT_LAYOUTS))


def redzoned(t: Tensor, fill: float) -> Tensor:
    """``t`` as a slice of a wider buffer filled with ``fill``."""
    return _sliced(t, fill)


VALUES = {"normal": 1.0, "zeros": 0.0, "small": 1e-3, "large": 8.0, "huge": 64.0}
SPIKES = (0.0, 1.0, -30.0, 300.0)


@dataclass(frozen=True)
class AttentionCase:
    """A recipe for ``q, k, v`` and the options of one attention call."""

    B: int = 1
    T_q: int = 5
    T_k: int = 5
    H_kv: int = 1
    group: int = 1
    D: int = 16
    R: int = 4
    dtype: torch.dtype = torch.float32
    causal: bool = True
    scale: float | None = None
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    values: str = "normal"
    spikes: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0

    @property
    def options(self) -> dict:
        options = {"causal": self.causal, "softmax_scale": self.scale}
        if self.window != (-1, -1):
            options["window_size"] = self.window
        return options | {"softcap": self.softcap} if self.softcap else options

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``q [B, T_q, H, D]``, ``k, v [B, T_k, H_kv, D]``."""
        query = (self.B, self.T_q, self.H_kv * self.group, self.D)
        key = (self.B, self.T_k, self.H_kv, self.D)
        tensors = []
        for i, (shape, layout) in enumerate(zip((query, key, key), self.layouts, strict=True)):
            scale = VALUES[self.values] if i < 2 else 1.0  # v alone stays of size 1
            t = normal(*shape, dtype=self.dtype, seed=3 * self.seed + i, scale=scale)
            for token, value in self.spikes:
                if t.shape[1]:
                    t[:, token % t.shape[1], :, (token + i) % self.D] = value
            tensors.append(lay_out(t, layout))
        return tuple(tensors)

    def gradient(self, layout: str = "contiguous") -> Tensor:
        """``dO [B, T_q, H, D]``."""
        shape = (self.B, self.T_q, self.H_kv * self.group, self.D)
        return GRADIENT_LAYOUTS[layout](normal(*shape, dtype=self.dtype, seed=50 + self.seed))


def lengths(blocks: int = 3, block: int = 16) -> st.SearchStrategy[int]:
    """``T = n * block + d``, so that remainders shrink on their own."""
    return st.builds(
        lambda n, d: max(1, n * block + d),
        st.integers(0, blocks),
        st.one_of(st.sampled_from([1, 0, -1, 2]), st.integers(0, block - 1)),
    )


head_dims = st.sampled_from([16, 32, 20, 16, 16, 64, 20, 32, 16, 20, 32, 72, 80, 96, 128])
HEADS = st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 3), (2, 2)])  # H_kv, group
small_head_dims = st.sampled_from([16, 20, 32])


def ranks(D: int) -> st.SearchStrategy[int]:
    return st.sampled_from([4, 0, 1, 3, 5, D - 1, D])


@st.composite
def attention_cases(draw, dtypes=(torch.float32,), **fixed) -> AttentionCase:
    """Recipes, simplest first; ``fixed`` holds fields that are not drawn."""
    D = draw(head_dims)
    T_q = draw(lengths())
    H_kv, group = draw(HEADS)
    case = AttentionCase(
        B=draw(st.sampled_from([1, 1, 2])),
        T_q=T_q,
        T_k=draw(st.one_of(st.just(T_q), lengths())),
        H_kv=H_kv,
        group=group,
        D=D,
        R=draw(ranks(D)),
        dtype=draw(st.sampled_from(list(dtypes))),
        causal=draw(st.sampled_from([True, False])),
        scale=draw(st.sampled_from([None, 0.5, 0.01])),
        layouts=tuple(draw(st.sampled_from(HEAD_LAYOUTS)) for _ in range(3)),
        values=draw(st.sampled_from(list(VALUES))),
        spikes=tuple(
            draw(st.lists(st.tuples(st.integers(0, 70), st.sampled_from(SPIKES)), max_size=3))
        ),
        seed=draw(st.integers(0, 3)),
    )
    if fixed.pop("self_attention", False):
        fixed["T_k"] = fixed.get("T_q", case.T_q)
    return replace(case, **fixed)


@dataclass(frozen=True)
class ProjectionCase:
    """A recipe for ``x``, ``W_fused``, ``bias`` and the head counts of one projection."""

    B: int = 1
    T: int = 5
    C: int = 16
    H_kv: int = 1
    group: int = 1
    D: int = 16
    R: int = 4
    dtype: torch.dtype = torch.float32
    with_bias: bool = False
    weight_layout: str = "split"
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    seed: int = 0

    @property
    def heads(self) -> dict:
        return {"n_head": self.H_kv * self.group, "n_kv_head": self.H_kv}

    @property
    def columns(self) -> int:
        return self.H_kv * (self.group + 2) * self.D

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``x [B, T, C]``, ``W [C, N]``, ``bias [N]`` or None."""
        C, N, seed = self.C, self.columns, 3 * self.seed
        x = normal(self.B, self.T, C, dtype=self.dtype, seed=seed)
        W = normal(C, N, dtype=self.dtype, seed=seed + 1, scale=max(C, 1) ** -0.5)
        bias = normal(N, dtype=self.dtype, seed=seed + 2) if self.with_bias else None
        return lay_out(x, self.layouts[0]), lay_out(W, self.layouts[1]), bias


@st.composite
def projection_cases(draw, dtypes=(torch.float32,), sizes=head_dims, **fixed) -> ProjectionCase:
    D = draw(sizes)
    H_kv, group = draw(HEADS)
    case = ProjectionCase(
        B=draw(st.sampled_from([1, 2, 3])),
        T=draw(lengths()),
        C=draw(st.one_of(st.sampled_from([16, 1, 33]), st.integers(1, 80))),
        H_kv=H_kv,
        group=group,
        D=D,
        R=draw(ranks(D)),
        dtype=draw(st.sampled_from(list(dtypes))),
        with_bias=draw(st.booleans()),
        weight_layout=draw(st.sampled_from(["split", "packed"])),
        layouts=(
            draw(st.sampled_from(TOKEN_LAYOUTS)),
            draw(st.sampled_from(WEIGHT_LAYOUTS)),
        ),
        seed=draw(st.integers(0, 3)),
    )
    return replace(case, **fixed)
