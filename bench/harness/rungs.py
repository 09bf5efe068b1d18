"""The rungs of the ladder: plain attention, and reciprocal attention as it became cheaper.

Every rung is one whole layer with its output projection, ``x [B, T, C] -> [B, T, C]``, on weights
made of the same factors. ``v2`` and ``v3`` are what the project's original prototype did, as its
record describes it; the packed rungs are this package. Weights are held as ``nn.Linear``
holds them, ``[out, in]``, except fused reciprocal ones, which are ``[C, 3 * C]``.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ra_triton
from bench.harness.gate import attention
from bench.harness.providers import (
    NO_TRITON_HERE,
    Layer,
    causal_sdpa,
    compile_static,
    seed_layer,
)
from bench.harness.shapes import Shape
from ra_triton.weights import sparsity
from ref import reciprocal_attention as ref

Function = Callable[..., Tensor]  # of x, the weights and W_out

FLASH = partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
NO_HALF_HERE = "half precision is timed on a GPU only"
NO_COMPILER_HERE = "torch.compile is timed on a GPU only"
INFERENCE = "forward only: an int8 weight has no gradient"
NO_SPARSITY_HERE = "2:4 sparse products are timed on a GPU only"
PRUNED = "forward only: a sparse weight has no gradient"
BUFFERS = "forward only: the next call overwrites its buffers before a backward could read them"


@dataclass(frozen=True)
class Factors:
    """What every rung's weights are made of, float32."""

    shape: Shape
    x: Tensor  # [B, T, C]
    W_q: Tensor  # [C, C], as nn.Linear holds it, like W_k, W_v, W_out
    W_k: Tensor
    W_v: Tensor
    W_recip: Tensor  # [D, D]; the first R columns are those of rank R
    W_out: Tensor
    dout: Tensor  # [B, T, C]

    @classmethod
    def draw(cls, shape: Shape, device: torch.device) -> "Factors":
        """Activations of unit variance and weights that keep it."""
        generator = torch.Generator(device).manual_seed(shape.T)

        def randn(*sizes: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(sizes, generator=generator, device=device)

        B, T, C, D = shape.B, shape.T, shape.C, shape.D
        W_q, W_k, W_v, W_out = (randn(C, C, scale=C**-0.5) for _ in range(4))
        W_recip = randn(D, D, scale=D**-0.5)
        return cls(shape, randn(B, T, C), W_q, W_k, W_v, W_recip, W_out, randn(B, T, C))

    def fused(self, R: int, weight_layout: str) -> Tensor:
        """``W_fused [C, 3 * C]`` at rank R."""
        W_recip = self.W_recip[:, :R].contiguous()
        factors = self.W_q.mT, self.W_k.mT, self.W_v.mT, W_recip
        return ra_triton.compose_weights(
            *factors, n_head=self.shape.H, weight_layout=weight_layout
        ).contiguous()


@dataclass(frozen=True)
class Source:
    """The tensors that a rung reads, and the exact layer from them by ``ref``.

    Attributes:
        names: of the weights.
        weights: builds them from the factors.
        exact: the layer as a function of ``(x, *weights, W_out)``, in any dtype.
    """

    names: tuple[str, ...]
    weights: Callable[[Factors], tuple[Tensor, ...]]
    exact: Callable[[Shape], Function]


@dataclass(frozen=True)
class Rung:
    """One step of the ladder.

    Attributes:
        what: one line for the reader.
        R: reciprocal rank.
        source: its weights and the answer.
        make: builds its function, of ``(x, *weights, W_out)``, for a shape, dtype and device.
        dtype: its own dtype; None is the run's.
        theirs: what the prototype's record says of it, on another GPU.
        forward_only: why it cannot train.
        unavailable: why it cannot run on a device type, or None.
        context: entered around each run of calls.
    """

    what: str
    R: int
    source: Source
    make: Callable[[Shape, torch.dtype, torch.device], Function]
    dtype: str | None = None
    theirs: str = ""
    forward_only: str = ""
    unavailable: Callable[[str], str | None] = lambda device: None
    context: Callable[[], AbstractContextManager[Any]] = FLASH

    def inputs(self, factors: Factors, dtype: torch.dtype, train: bool) -> tuple[Tensor, ...]:
        """``(x, *weights, W_out)`` in ``dtype``, leaves that require a gradient in training."""
        tensors = (factors.x, *self.source.weights(factors), factors.W_out)
        return tuple(t.to(dtype, copy=True).requires_grad_(train) for t in tensors)

    def layer(self, shape: Shape, inputs: tuple[Tensor, ...]) -> Layer:
        """The layer on these inputs, ready to be called."""
        function = self.make(shape, inputs[0].dtype, inputs[0].device)
        return Layer(partial(function, *inputs), inputs)


def heads_of(t: Tensor, shape: Shape) -> Tensor:
    """``[B, T, n * D] -> [B, T, n, D]``."""
    return t.unflatten(-1, (-1, shape.D))


# The weights and the answers


def _exact_plain(shape: Shape) -> Function:
    def layer(x: Tensor, W_qkv: Tensor, W_out: Tensor) -> Tensor:
        q, k, v = (heads_of(t, shape) for t in (x @ W_qkv.mT).split(shape.C, dim=-1))
        return attention(q, k, v).flatten(2) @ W_out.mT

    return layer


def _exact_fused(R: int, weight_layout: str, shape: Shape) -> Function:
    H = shape.H

    def layer(x: Tensor, W_fused: Tensor, W_out: Tensor) -> Tensor:
        W_split = W_fused
        if weight_layout == "packed":
            W_split = ra_triton.unpack_weight(W_fused, R, n_head=H)
        return attention(*ref.split_lanes(x @ W_split, R, H)).flatten(2) @ W_out.mT

    return layer


def _exact_factors(share: float, shape: Shape) -> Function:
    """The definition's projections of activations; the heads that are not routed have rank 0."""
    H = shape.H

    def layer(
        x: Tensor, W_q: Tensor, W_k: Tensor, W_v: Tensor, W_recip: Tensor, W_out: Tensor
    ) -> Tensor:
        Q, K, V = (heads_of(x @ W.mT, shape) for W in (W_q, W_k, W_v))

        def operands(recip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            R = recip.shape[1]
            D_std = shape.D - R
            lanes = (Q[..., :D_std], K[..., :D_std], V, Q @ recip, K @ recip)
            return ref.split_lanes(torch.cat([t.flatten(2) for t in lanes], dim=-1), R, H)

        chosen = torch.zeros(H, 1, dtype=torch.bool, device=x.device)
        chosen[routed_heads(H, share)] = True
        pairs = zip(operands(W_recip), operands(W_recip[:, :0]), strict=True)
        q, k, v = (torch.where(chosen, reciprocal, plain) for reciprocal, plain in pairs)
        return attention(q, k, v).flatten(2) @ W_out.mT

    return layer


def _exact_int8(R: int, which: str, activations: str, shape: Shape) -> Function:
    """What the integers stand for: of the columns, and of the tokens where those are int8 too."""
    H, D = shape.H, shape.D

    def stands_for(rows: Tensor) -> Tensor:
        q, scale = ref.round_to_int8(rows)
        return q.to(rows.dtype) * scale.to(rows.dtype)

    def layer(x: Tensor, W_fused: Tensor, W_out: Tensor) -> Tensor:
        y = (stands_for(x) if activations == "int8" else x) @ stands_for(W_fused.mT).mT
        if which == "reciprocal":
            low = torch.zeros(3 * H, D, dtype=torch.bool, device=x.device)
            low[: 2 * H, D - R :] = True  # K_low in q_pack, Q_low in k_pack
            y = torch.where(low.flatten(), y, x @ W_fused)
        split = ra_triton.unpack_weight(y, R, n_head=H)
        return attention(*ref.split_lanes(split, R, H)).flatten(2) @ W_out.mT

    return layer


def _exact_sparse(R: int, which: str, shape: Shape) -> Function:
    """The layer of the pruned weight."""
    exact = _exact_fused(R, "packed", shape)

    def layer(x: Tensor, W_fused: Tensor, W_out: Tensor) -> Tensor:
        pruned = sparsity.prune(W_fused.mT.contiguous()).mT
        if which == "reciprocal":
            low = torch.zeros(3 * shape.H, shape.D, dtype=torch.bool, device=x.device)
            low[: 2 * shape.H, shape.D - R :] = True  # K_low in q_pack, Q_low in k_pack
            pruned = torch.where(low.flatten(), pruned, W_fused)
        return exact(x, pruned, W_out)

    return layer


PLAIN = Source(("W_qkv",), lambda f: (torch.cat((f.W_q, f.W_k, f.W_v)),), _exact_plain)


def _fused(R: int, weight_layout: str) -> Source:
    return Source(
        ("W_fused",),
        lambda f: (f.fused(R, weight_layout),),
        partial(_exact_fused, R, weight_layout),
    )


def _int8_weight(R: int, which: str, activations: str) -> Source:
    return replace(_fused(R, "packed"), exact=partial(_exact_int8, R, which, activations))


def _factors(R: int, share: float) -> Source:
    return Source(
        ("W_q", "W_k", "W_v", "W_recip"),
        lambda f: (f.W_q, f.W_k, f.W_v, f.W_recip[:, :R]),
        partial(_exact_factors, share),
    )


# The rungs


def routed_heads(H: int, share: float) -> list[int]:
    """Indices of the reciprocal heads: at least one, spread evenly over all."""
    n = max(1, round(share * H))
    return [i * H // n for i in range(n)]


def _baseline(shape: Shape, *_: Any) -> Function:
    """Plain attention: fused GEMM, three contiguous copies, flash SDPA, output projection."""

    def layer(x: Tensor, W_qkv: Tensor, W_out: Tensor) -> Tensor:
        return F.linear(seed_layer(x, W_qkv, shape.H), W_out)

    return layer


def _reciprocal_heads(Q: Tensor, K: Tensor, V: Tensor, W_recip: Tensor) -> Tensor:
    """The prototype's v2, ``[B, T, n, D]`` to ``[B, n, T, D]``: GEMMs, cat, contiguous."""
    D_std = Q.shape[-1] - W_recip.shape[-1]
    Q_low, K_low = Q @ W_recip, K @ W_recip
    q = torch.cat((Q[..., :D_std], K_low), dim=-1)
    k = torch.cat((K[..., :D_std], Q_low), dim=-1)
    return causal_sdpa(*(t.transpose(1, 2).contiguous() for t in (q, k, V)))


def _v2(shape: Shape, *_: Any) -> Function:
    """Three GEMMs, then :func:`_reciprocal_heads` on all heads."""

    def layer(
        x: Tensor, W_q: Tensor, W_k: Tensor, W_v: Tensor, W_recip: Tensor, W_out: Tensor
    ) -> Tensor:
        Q, K, V = (heads_of(F.linear(x, W), shape) for W in (W_q, W_k, W_v))
        out = _reciprocal_heads(Q, K, V, W_recip)
        return F.linear(out.transpose(1, 2).flatten(2), W_out)

    return layer


def _v2_routed(share: float, shape: Shape, dtype: torch.dtype, device: torch.device) -> Function:
    """The same for a share of the heads; the others are plain, and all are gathered by index."""
    chosen = routed_heads(shape.H, share)
    others = [h for h in range(shape.H) if h not in chosen]
    chosen_heads, other_heads = (torch.tensor(h, device=device).long() for h in (chosen, others))
    places = torch.tensor(chosen + others, device=device).argsort()

    def layer(
        x: Tensor, W_q: Tensor, W_k: Tensor, W_v: Tensor, W_recip: Tensor, W_out: Tensor
    ) -> Tensor:
        QKV = [heads_of(F.linear(x, W), shape) for W in (W_q, W_k, W_v)]
        Q, K, V = (t.index_select(2, chosen_heads) for t in QKV)
        out = _reciprocal_heads(Q, K, V, W_recip)
        if others:
            q, k, v = (t.index_select(2, other_heads).transpose(1, 2).contiguous() for t in QKV)
            out = torch.cat((out, causal_sdpa(q, k, v)), dim=1)
        out = out.index_select(1, places)
        return F.linear(out.transpose(1, 2).flatten(2), W_out)

    return layer


def _v3(R: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Function:
    """One GEMM in split order, slices copied into buffers that every call uses again."""
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    D_std = D - R
    q, k, v = (torch.empty(B, H, T, D, dtype=dtype, device=device) for _ in range(3))
    parts = (q[..., :D_std], k[..., :D_std], v, k[..., D_std:], q[..., D_std:])
    widths = [part.shape[-1] for part in parts]

    def layer(x: Tensor, W_split: Tensor, W_out: Tensor) -> Tensor:
        sections = (x @ W_split).split([H * width for width in widths], dim=-1)
        for part, section, width in zip(parts, sections, widths, strict=True):
            part.copy_(section.unflatten(-1, (H, width)).transpose(1, 2))
        return F.linear(causal_sdpa(q, k, v).transpose(1, 2).flatten(2), W_out)

    return layer


def _packed(R: int, backend: str, shape: Shape, *_: Any) -> Function:
    """This package: the GEMM's output is the operands of attention."""
    options: Any = {"n_head": shape.H, "weight_layout": "packed", "backend": backend}

    def layer(x: Tensor, W_packed: Tensor, W_out: Tensor) -> Tensor:
        return F.linear(ra_triton.ra_attention(x, W_packed, R, **options), W_out)

    return layer


def _int8(R: int, which: str, activations: str, backend: str, shape: Shape, *_: Any) -> Function:
    """The same from an int8 weight, which the first call makes: the gate's, not the clock's."""
    made: list[ra_triton.QuantizedWeight] = []

    def layer(x: Tensor, W_packed: Tensor, W_out: Tensor) -> Tensor:
        if not made:
            options: Any = {"which": which, "activations": activations, "n_head": shape.H}
            made.append(ra_triton.quantize_weight(W_packed, R, weight_layout="packed", **options))
        return F.linear(ra_triton.ra_attention(x, made[0], R, backend=backend), W_out)

    return layer


def _sparse(R: int, which: str, backend: str, shape: Shape, *_: Any) -> Function:
    """The same from a 2:4 sparse weight, which the first call, the gate's, makes."""
    made: list[ra_triton.SparseWeight] = []

    def layer(x: Tensor, W_packed: Tensor, W_out: Tensor) -> Tensor:
        if not made:
            options: Any = {"which": which, "n_head": shape.H, "weight_layout": "packed"}
            made.append(ra_triton.sparsify_weight(W_packed, R, **options))
        return F.linear(ra_triton.ra_attention(x, made[0], R, backend=backend), W_out)

    return layer


def _no_sparsity(device: str) -> str | None:
    if device != "cuda":
        return NO_SPARSITY_HERE
    try:
        sparsity.kernels_on(torch.device(device))
    except NotImplementedError as error:
        return str(error)
    return None


def _compiled(make: Callable[..., Function], *sizes: Any) -> Function:
    return compile_static(make(*sizes))


def _on_gpu_only(reason: str, device: str) -> str | None:
    return None if device == "cuda" else reason


def _rungs(R: int) -> dict[str, Rung]:
    v2, packed = partial(_factors, R), _fused(R, "packed")
    half, compiler, triton = (
        partial(_on_gpu_only, reason) for reason in (NO_HALF_HERE, NO_COMPILER_HERE, NO_TRITON_HERE)
    )
    ours = partial(_packed, R, "triton")
    everywhere = v2(1.0)
    return {
        "baseline": Rung("plain: GEMM, contiguous, flash", 0, PLAIN, _baseline, theirs="1.21 ms"),
        "v2-routed-100": Rung(
            "v2, all heads routed",
            R,
            everywhere,
            partial(_v2_routed, 1.0),
            theirs="2.00 ms, 1.66x",
        ),
        "v2-routed-50": Rung("v2, half the heads", R, v2(0.5), partial(_v2_routed, 0.5)),
        "v2-routed-25": Rung("v2, a quarter of the heads", R, v2(0.25), partial(_v2_routed, 0.25)),
        "v2": Rung("v2, no routing", R, everywhere, _v2),
        "v3-R8": Rung(
            "v3, fused GEMM, copies, R=8",
            8,
            _fused(8, "split"),
            partial(_v3, 8),
            theirs="1.34x to 1.47x, target",
            forward_only=BUFFERS,
        ),
        "v3-R4": Rung(
            "v3, fused GEMM, copies, R=4",
            4,
            _fused(4, "split"),
            partial(_v3, 4),
            theirs="1.34x to 1.47x, target",
            forward_only=BUFFERS,
        ),
        "packed-sdpa": Rung("packed GEMM, flash SDPA", R, packed, partial(_packed, R, "sdpa")),
        "packed-flex": Rung(
            "packed GEMM, FlexAttention",
            R,
            packed,
            partial(_packed, R, "flex"),
            unavailable=compiler,
        ),
        "packed-triton": Rung(
            "packed GEMM and attention in Triton",
            R,
            packed,
            ours,
            theirs="0.95x to 0.99x, best case",
            unavailable=triton,
        ),
        **{
            name: Rung(
                what,
                R,
                _int8_weight(R, *way),
                partial(_int8, R, *way, "triton"),
                forward_only=INFERENCE,
                unavailable=triton,
            )
            for name, what, way in (
                ("int8-weights", "packed-triton, int8 weights", ("all", "none")),
                ("int8-w8a8", "packed-triton, int8 weights and activations", ("all", "int8")),
                ("int8-reciprocal", "packed-triton, int8 low lanes", ("reciprocal", "none")),
            )
        },
        **{
            f"sparse-{which}": Rung(
                f"packed-triton, 2:4 sparse {what}",
                R,
                replace(packed, exact=partial(_exact_sparse, R, which)),
                partial(_sparse, R, which, "triton"),
                forward_only=PRUNED,
                unavailable=_no_sparsity,
            )
            for which, what in (("reciprocal", "low lanes"), ("all", "weights"))
        },
        "baseline-fp16": Rung(
            "baseline in FP16", 0, PLAIN, _baseline, dtype="fp16", unavailable=half
        ),
        "packed-triton-fp16": Rung(
            "packed-triton in FP16", R, packed, ours, dtype="fp16", unavailable=triton
        ),
        "baseline-compiled": Rung(
            "baseline, torch.compile",
            0,
            PLAIN,
            partial(_compiled, _baseline),
            unavailable=compiler,
        ),
        "packed-triton-compiled": Rung(
            "packed-triton, torch.compile",
            R,
            packed,
            partial(_compiled, ours),
            unavailable=triton,
        ),
    }


RUNGS = _rungs(R=4)
