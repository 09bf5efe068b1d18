"""A ``c_attn`` whose weight is composed from the factors of reciprocal attention."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ra_triton.checks import needs_grad
from ra_triton.layout import RALayout
from ra_triton.weights import compose_weights, kv_heads, last_lanes
from ra_triton.workspace import stream_id

INIT_STD = 0.02  # GPT-2's, for every projection

_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    """Fused optimizers write parameters without raising their version counters."""
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def layout_of(n_embd: int, n_head: int, n_kv_head: int | None, R: int) -> RALayout:
    """The sizes of a layer; TypeError and ValueError name what does not fit."""
    for name, count in (("n_embd", n_embd), ("n_head", n_head)):
        if type(count) is not int:
            raise TypeError(f"{name} must be an int, got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if n_embd % n_head:
        raise ValueError(f"n_embd={n_embd} must be a multiple of n_head={n_head}")
    n_kv_head = kv_heads(n_head, n_kv_head)
    columns = (n_head + 2 * n_kv_head) * (n_embd // n_head)
    return RALayout.from_columns(columns, R, n_head, n_kv_head)


@dataclass(frozen=True)
class _Cached:
    """A composed result and what it was composed from."""

    factors: tuple[Tensor, ...]  # aliases, which keep the addresses from being reused
    versions: tuple[int, ...]
    optimizer_steps: int
    stream: int  # another stream has not waited for this result
    fused: tuple[Tensor, Tensor | None]

    def is_of(self, factors: tuple[Tensor, ...], stream: int) -> bool:
        """Whether this was composed from these factors, as they are now."""
        return (
            self.stream == stream
            and self.optimizer_steps == _optimizer_steps
            and self.versions == tuple(p._version for p in factors)
            and all(
                p.data_ptr() == old.data_ptr() and p.shape == old.shape
                for p, old in zip(factors, self.factors, strict=True)
            )
        )


class ComposedLinear(nn.Module):
    """Trainable ``W_q, W_k, W_v, W_recip`` and gates, read as one ``nn.Linear`` by attention.

    ``weight`` is ``[N, C]``, ``N = (H + 2 * H_kv) * D`` (``3 * C`` without grouped heads), and
    ``bias`` ``[N]`` in packed order, composed by :func:`ra_triton.compose_weights`, so gradients
    reach every factor. In ``eval()`` and without gradients the result is kept until a factor
    changes. A write through ``parameter.data`` is invisible to autograd and to that cache: call
    ``eval()`` or ``train()`` after it.

    Attributes:
        W_q: ``[C, C]`` in float32 unless ``dtype`` says otherwise, used as ``x @ W_q``.
        W_k: ``[C, H_kv * D]``.
        W_v: ``[C, H_kv * D]``.
        W_recip: ``[D, R]``, or ``[H, D, R]`` with ``recip_per_head``.
        w_std: ``[H]`` gates on the standard term, any sign.
        w_rec: ``[H]`` gates on the reciprocal term, any sign.
        b_q: ``[C]`` or None: a bias before W_recip, folded like weights.
        b_k: ``[H_kv * D]`` or None, like ``b_v``.
    """

    b_q: nn.Parameter | None
    b_k: nn.Parameter | None
    b_v: nn.Parameter | None

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        R: int,
        bias: bool = True,
        *,
        n_kv_head: int | None = None,
        recip_per_head: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Sizes, and what they raise, as for :class:`RACausalSelfAttention`."""
        super().__init__()
        layout = layout_of(n_embd, n_head, n_kv_head, R)
        self.n_head, self.n_kv_head, self.R = n_head, layout.n_kv_head, R
        factory: Any = {"device": device, "dtype": dtype}
        D = layout.head_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **factory))

        widths = [heads * D for heads in (n_head, self.n_kv_head, self.n_kv_head)]
        self.W_q, self.W_k, self.W_v = (parameter(n_embd, width) for width in widths)
        self.W_recip = parameter(*([n_head] if recip_per_head else []), D, R)
        self.w_std, self.w_rec = parameter(n_head), parameter(n_head)
        for name, width in zip(("b_q", "b_k", "b_v"), widths, strict=True):
            self.register_parameter(name, parameter(width) if bias else None)
        self._cached: _Cached | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as plain attention: the composed weight is distributed exactly as GPT-2's c_attn.

        W_q, W_k, W_v: normal, standard deviation 0.02. W_recip picks the R lanes that the standard
        term leaves out, so low lanes have the scale of standard ones and no correlation with them.
        Gates 1, biases 0. With G query heads to a key head, the mean that the key carries is
        ``1 / sqrt(G)`` as large, and ``w_rec`` starts at ``sqrt(G)``: scores vary as they would.
        """
        for w in (self.W_q, self.W_k, self.W_v):
            w.normal_(std=INIT_STD)
        self.W_recip.copy_(last_lanes(self.W_recip))
        self.w_std.fill_(1.0)
        self.w_rec.fill_((self.n_head // self.n_kv_head) ** 0.5)
        for b in (self.b_q, self.b_k, self.b_v):
            if b is not None:
                b.zero_()

    @property
    def weight(self) -> Tensor:
        """``[N, C]`` in packed order, as of ``nn.Linear``."""
        return self.fused()[0].mT

    @property
    def bias(self) -> Tensor | None:
        """``[N]`` in packed order, or None."""
        return self.fused()[1]

    def fused(self) -> tuple[Tensor, Tensor | None]:
        """``W_fused [C, N]`` and its bias ``[N]`` or None, in packed order."""
        if not self._may_cache():
            return self._compose()
        factors = tuple(self.parameters())
        stream = stream_id(factors[0].device)
        cached = self._cached
        if cached is None or not cached.is_of(factors, stream):
            # A tensor born in inference mode could not take part in a graph later.
            with torch.inference_mode(False), torch.no_grad():
                cached = self._cached = _Cached(
                    factors=tuple(p.detach() for p in factors),
                    versions=tuple(p._version for p in factors),
                    optimizer_steps=_optimizer_steps,
                    stream=stream,
                    fused=self._compose(),
                )
        return cached.fused

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W_fused + bias``: ``[..., C] -> [..., N]``; attention reads the weight."""
        W_fused, bias = self.fused()
        return nn.functional.linear(x, W_fused.mT, bias)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        heads = f"n_head={self.n_head}, n_kv_head={self.n_kv_head}"
        return f"n_embd={self.W_q.shape[0]}, {heads}, R={self.R}"

    def _compose(self) -> tuple[Tensor, Tensor | None]:
        W_q, W_k, W_v = (
            # One more row: the bias folds like a weight over a constant 1.
            w if b is None else torch.cat((w, b[None]))
            for w, b in ((self.W_q, self.b_q), (self.W_k, self.b_k), (self.W_v, self.b_v))
        )
        fused = compose_weights(
            W_q,
            W_k,
            W_v,
            self.W_recip,
            n_head=self.n_head,
            n_kv_head=self.n_kv_head,
            w_std=self.w_std,
            w_rec=self.w_rec,
            weight_layout="packed",
        )
        return (fused, None) if self.b_q is None else (fused[:-1], fused[-1])

    def _may_cache(self) -> bool:
        """Whether a kept result is safe: nothing here is traced, recorded or differentiated."""
        factors = tuple(self.parameters())
        if self.training or torch.compiler.is_compiling() or needs_grad(*factors):
            return False
        # Other types come from functional_call or FSDP; inference tensors have no version.
        if any(type(p) is not nn.Parameter or p.is_inference() for p in factors):
            return False
        # A captured graph would hold the address of a result that is freed when a factor changes.
        return not (factors[0].is_cuda and torch.cuda.is_current_stream_capturing())

    def train(self, mode: bool = True) -> "ComposedLinear":
        """Switch the mode; ``eval()`` too comes through here and starts from fresh factors."""
        self._cached = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "ComposedLinear":
        """Moves and casts replace the data under the parameters."""
        self._cached = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles do not carry the kept result."""
        return {**self.__dict__, "_cached": None}
