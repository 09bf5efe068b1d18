"""A ``c_attn`` whose weight is composed from the factors of reciprocal attention."""

from typing import Any

import torch
from torch import Tensor, nn

from ra_triton.checks import autocast_dtype
from ra_triton.weights.fused import compose_weights, kv_heads, last_lanes
from ra_triton.weights.layout import RALayout

INIT_STD = 0.02  # GPT-2's, for every projection


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


class ComposedLinear(nn.Module):
    """Trainable ``W_q, W_k, W_v, W_recip`` and gates, read as one ``nn.Linear`` by attention.

    ``weight`` is ``[N, C]``, ``N = (H + 2 * H_kv) * D`` (``3 * C`` without grouped heads), and
    ``bias`` ``[N]`` in packed order, composed by :func:`ra_triton.compose_weights`, so gradients
    reach every factor. They are composed anew on each call and each access, and never cached: any
    write to a factor takes effect, and a write to ``weight`` changes only a copy. For
    inference ``RACausalSelfAttention.fuse_`` composes once.

    Attributes:
        W_q: ``[C, C]`` in float32 unless ``dtype`` says otherwise, used as ``x @ W_q``.
        W_k: ``[C, H_kv * D]``.
        W_v: ``[C, H_kv * D]``.
        W_recip: ``[D, R]``, or ``[H, D, R]`` with ``recip_per_head``; None with ``R = 0``, because
            optimizers make NaN of a parameter without elements.
        w_std: ``[H]`` gates on the standard term, any sign.
        w_rec: ``[H]`` gates on the reciprocal term, any sign.
        b_q: ``[C]`` or None: a bias before W_recip, folded like weights.
        b_k: ``[H_kv * D]`` or None, like ``b_v``.
    """

    W_recip: nn.Parameter | None
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
        recip = (n_head, D, R) if recip_per_head else (D, R)
        self.register_parameter("W_recip", parameter(*recip) if R else None)
        self.w_std, self.w_rec = parameter(n_head), parameter(n_head)
        for name, width in zip(("b_q", "b_k", "b_v"), widths, strict=True):
            self.register_parameter(name, parameter(width) if bias else None)
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
        if self.W_recip is not None:
            self.W_recip.copy_(_sharded_like(self.W_recip, last_lanes(self.W_recip)))
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

    def fused(
        self, dtype: torch.dtype | None = None, backend: str = "auto"
    ) -> tuple[Tensor, Tensor | None]:
        """``W_fused [C, N]`` and its bias ``[N]`` or None, in packed order.

        Args:
            dtype: of both, rounded once; ``None`` means that of the factors.
            backend: see :func:`ra_triton.compose_weights`.
        """
        factors = (self.W_q, self.W_k, self.W_v, self.W_recip)
        options: Any = {
            "n_head": self.n_head,
            "n_kv_head": self.n_kv_head,
            "w_std": self.w_std,
            "w_rec": self.w_rec,
            "weight_layout": "packed",
            "dtype": dtype,
            "backend": backend,
        }
        if self.b_q is None:
            return compose_weights(*factors, **options), None
        return compose_weights(*factors, biases=(self.b_q, self.b_k, self.b_v), **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W_fused + bias``: ``[..., C] -> [..., N]``; attention reads the weight."""
        W_fused, bias = self.fused(autocast_dtype(self.W_q.device))
        return nn.functional.linear(x, W_fused.mT, bias)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        heads = f"n_head={self.n_head}, n_kv_head={self.n_kv_head}"
        return f"n_embd={self.W_q.shape[0]}, {heads}, R={self.R}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Ignores the empty ``W_recip`` that states of ``R = 0`` used to hold."""
        name = f"{prefix}W_recip"
        if self.W_recip is None and name in state_dict and not state_dict[name].numel():
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _sharded_like(parameter: Tensor, t: Tensor) -> Tensor:
    """``t`` laid over the processes as ``parameter`` is; itself for an ordinary parameter."""
    if not hasattr(parameter, "device_mesh"):
        return t
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(t, mesh, placements, src_data_rank=None)  # all processes have it
