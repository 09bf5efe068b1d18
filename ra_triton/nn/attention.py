"""Causal self-attention as a module, with nanoGPT's names."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ra_triton.api import (
    decode_attention,
    pack_qk,
    pack_qk_,
    packed_attention,
    project,
    ra_attention,
)
from ra_triton.backend import choose
from ra_triton.call.norm_rope import check_norm_eps, check_rope_dims
from ra_triton.call.options import DecodeOptions
from ra_triton.checks import (
    autocast_dtype,
    check_choice,
    check_dims,
    check_float_tensor,
    check_shape,
    needs_grad,
)
from ra_triton.nn.cache import FEW_TOKENS, KVCache
from ra_triton.nn.children import is_ordinary, is_plain, is_readable
from ra_triton.nn.composed import INIT_STD, ComposedLinear, layout_of
from ra_triton.nn.configs import options_of
from ra_triton.nn.quantized import QuantizedLinear
from ra_triton.nn.rope import THETA, RotaryTables
from ra_triton.weights.quantization import QuantizedWeight, quantize_weight

PARAMETRISATIONS = ("free", "composed")
PROJECTIONS = (nn.Linear, ComposedLinear, QuantizedLinear)  # whose weights attention can read
NORMS = (nn.RMSNorm,)


class RACausalSelfAttention(nn.Module):
    """Reciprocal causal self-attention, a drop-in for nanoGPT's ``CausalSelfAttention``.

    ``c_proj(ra_attention(x, W_fused))`` with dropout on the attention weights and on the result.
    ``parametrisation`` says what is trained:

    ``"free"``      ``c_attn`` is an ``nn.Linear`` with W_fused in packed order. That is the layout
                    of GPT-2, so any GPT-2 checkpoint loads, and R only says which lanes are called
                    reciprocal: the function class is plain attention's.
    ``"composed"``  ``c_attn`` is a :class:`ComposedLinear`: W_q, W_k, W_v, W_recip and one gate per
                    head and term (``c_attn.w_std``, ``c_attn.w_rec``), composed on each call; for
                    inference :meth:`fuse_` composes once.

    Between projection and attention come, if asked for, a QK-norm of the packed heads (weights
    ``q_norm.weight``, ``k_norm.weight``, Qwen3's names) and their rotation by position (RoPE), as
    :func:`ra_triton.pack_qk` has them.

    For speed the weights of ``c_attn``, ``q_norm`` and ``k_norm`` are read by attention's kernels.
    A child that is wrapped, replaced, parametrised or has hooks is called instead: ``c_attn`` on x,
    for ``[B, T, N]`` in packed order, the norms on packed heads ``[B, T, H, D]``, before rotation;
    by PyTorch's own kernels, so that the last bits may be others.

    Both start as GPT-2 does: normal weights of standard deviation 0.02, zero biases.
    """

    _factors: tuple[ComposedLinear, ...] = ()  # set aside by fuse_; not a child of this module

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        R: int = 4,
        bias: bool = True,
        dropout: float = 0.0,
        *,
        n_kv_head: int | None = None,
        parametrisation: str = "free",
        recip_per_head: bool = False,
        rope: bool | float = False,
        rope_dims: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check the sizes and initialise the parameters.

        Args:
            n_embd: channels ``C``, a multiple of ``n_head``.
            n_head: heads ``H``; the head dim is ``D = C / H``.
            R: reciprocal rank, ``0 <= R <= D``; 0 is plain attention.
            bias: whether both projections have one.
            dropout: probability, in training, for attention weights and for the result.
            n_kv_head: key/value heads (GQA), which divide ``n_head``; ``None`` means ``n_head``.
                Composed, a key carries the mean of its group: :func:`ra_triton.compose_weights`.
            parametrisation: ``"free"`` or ``"composed"``.
            recip_per_head: a W_recip for each head, ``[H, D, R]``, not one for all; composed only.
            rope: rotate queries and keys by position; a number is theta, True is 10,000.
            rope_dims: lanes that turn, an even number; ``None``: all. Low lanes carry no position
                where ``rope_dims <= D - R``; else they mix with standard ones.
            qk_norm: an RMS norm with a weight for each lane, over the packed heads.
            norm_eps: of that norm.
            backend: see :func:`ra_triton.ra_attention`, which checks it when it is called.
            device: of the parameters.
            dtype: of the parameters.

        Raises:
            TypeError: counts that are not ints, rates that are not numbers, flags that are not
                bools.
            ValueError: sizes that do not divide, values out of range, unknown choices.
        """
        super().__init__()
        _check_dropout(dropout)
        check_norm_eps(norm_eps)
        flags = {"bias": bias, "recip_per_head": recip_per_head, "qk_norm": qk_norm}
        for name, flag in flags.items():
            if type(flag) is not bool:
                raise TypeError(f"{name} must be a bool, got {flag!r}")
        self.layout = layout_of(n_embd, n_head, n_kv_head, R)
        n_kv_head, head_dim = self.layout.n_kv_head, self.layout.head_dim
        check_choice("parametrisation", parametrisation, PARAMETRISATIONS)
        if recip_per_head and parametrisation == "free":
            raise ValueError("recip_per_head needs parametrisation='composed': free has no W_recip")
        self.n_embd, self.n_head, self.n_kv_head, self.R = n_embd, n_head, n_kv_head, R
        self.dropout, self.parametrisation, self.backend = dropout, parametrisation, backend
        factory: Any = {"device": device, "dtype": dtype}
        self.rope = _rotary_tables(rope, rope_dims, head_dim)
        self.q_norm = nn.RMSNorm(head_dim, norm_eps, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, norm_eps, **factory) if qk_norm else None
        self.c_attn: nn.Linear | ComposedLinear | QuantizedLinear
        if parametrisation == "free":
            self.c_attn = nn.Linear(n_embd, self.layout.columns, bias=bias, **factory)
        else:
            options = {"n_kv_head": n_kv_head, "recip_per_head": recip_per_head, **factory}
            self.c_attn = ComposedLinear(n_embd, n_head, R, bias, **options)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias, **factory)
        self.resid_dropout = nn.Dropout(dropout)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> "RACausalSelfAttention":
        """Build from a config of nanoGPT, or of Hugging Face's GPT-2, Llama, Mistral, Qwen2, Qwen3.

        Args:
            config: an object with their attributes; see :mod:`ra_triton.nn.configs`.
            **options: everything else that the constructor takes, ``R``, ``parametrisation``, ...,
                and what shall not be as the config says.

        Raises:
            AttributeError: attributes that the config lacks, by name.
            ValueError: a config of a layer that this is not; and what the constructor raises.
        """
        return cls(**{**options_of(config, options), **options})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's initialisation; a model scales ``c_proj`` by its depth, as nanoGPT does."""
        self._refuse_fused("reset_parameters()")
        if isinstance(self.c_attn, ComposedLinear):
            self.c_attn.reset_parameters()
        for layer in (self.c_attn, self.c_proj):
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=INIT_STD)
                if layer.bias is not None:
                    layer.bias.zero_()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Attend: ``x [B, T, C]`` to ``[B, T, C]`` in the same dtype (under autocast, its dtype).

        With a cache x holds the next tokens of each sequence, one or many: they are appended, and
        see themselves and all that the cache held before. One call, several, or one for each token:
        the result is that of the full forward. Needs ``eval()`` or no dropout, and ``no_grad()``.

        Raises:
            TypeError: not a tensor, not in the dtype of the parameters, or not in the cache's.
            ValueError: not ``[B, T, n_embd]``, on another device; a cache that does not fit or has
                no room, or with which a gradient or dropout is needed; a gradient of a quantized
                layer.
            NotImplementedError: the backend lacks an option; the message names one that has it.
        """
        if cache is not None:
            return self.resid_dropout(self.c_proj(self._attend_to(x, cache)))
        options: Any = {
            "dropout_p": self.dropout if self.training else 0.0,
            "backend": self.backend,
        }
        weights = None
        if self.rope is None and self.q_norm is None and self.k_norm is None:
            weights = self._plain_weight()
        if weights is not None:
            self._check_width(x)
            W_fused, bias = weights
            heads: Any = {"n_head": self.n_head, "n_kv_head": self.n_kv_head}
            y = ra_attention(
                x, W_fused, self.R, **heads, bias=bias, weight_layout="packed", **options
            )
        else:
            y = packed_attention(*self.operands(x), **options).flatten(2)
        return self.resid_dropout(self.c_proj(y))

    def operands(self, x: Tensor, position: int | Tensor = 0) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads: projection, then QK-norm and rotation if the layer has them.

        Args:
            x: ``[B, T, C]``.
            position: where the tokens stand, for the rotation: the first one's, an int, or ``[B]``
                (each sequence's first) or ``[B, T]`` on x's device, which is not read on the host.

        Returns:
            ``q_pack [B, T, H, D]``, ``k_pack [B, T, H_kv, D]``, ``v [B, T, H_kv, D]``.

        Raises:
            TypeError: see :meth:`forward`.
            ValueError: see :meth:`forward`; a position that is negative or of another shape.
        """
        self._check_width(x)
        weights = self._plain_weight()
        own = weights is not None  # whether q and k are this call's own, so that it may write them
        if weights is not None:
            W_fused, bias = weights
            heads: Any = {"n_head": self.n_head, "n_kv_head": self.n_kv_head}
            heads |= {"bias": bias, "weight_layout": "packed", "backend": self.backend}
            q, k, v = project(x, W_fused, self.R, **heads)
        else:
            q, k, v = self._called_projection(x)
        options: Any = {"backend": self.backend}
        norms: tuple[Tensor, ...] = ()
        if self._has_plain_norms():
            norms = self.q_norm.weight, self.k_norm.weight  # type: ignore[union-attr]
            options |= {"qk_norm": norms, "norm_eps": self.q_norm.eps}  # type: ignore[union-attr]
        elif self.q_norm is not None or self.k_norm is not None:
            q, k, own = (
                _called_norm("q_norm", self.q_norm, q),
                _called_norm("k_norm", self.k_norm, k),
                False,
            )
        if self.rope is not None:
            options |= self.rope.options(position, q)
        if len(options) > 1:
            in_place = own and not needs_grad(q, k, *norms)
            q, k = (pack_qk_ if in_place else pack_qk)(q, k, **options)
        return q, k, v

    def _plain_weight(self) -> tuple[Tensor | QuantizedWeight, Tensor | None] | None:
        """``W_fused`` and its bias; None where ``c_attn`` has to be called."""
        c_attn = self.c_attn
        if not is_plain(c_attn, PROJECTIONS):
            return None
        if isinstance(c_attn, nn.Linear):
            weight = c_attn.weight
            return (weight.mT, c_attn.bias) if is_ordinary(weight) else None
        if isinstance(c_attn, ComposedLinear):  # rounded once, to what the projection multiplies
            return c_attn.fused(autocast_dtype(c_attn.W_q.device), self.backend)
        return _fused(c_attn, self.backend)

    def _has_plain_norms(self) -> bool:
        """Whether the kernel's norm, one eps and two weights, is what the two children do."""
        q_norm, k_norm = self.q_norm, self.k_norm
        return (
            is_plain(q_norm, NORMS)
            and is_plain(k_norm, NORMS)
            and is_ordinary(q_norm.weight)  # type: ignore[union-attr]
            and is_ordinary(k_norm.weight)  # type: ignore[union-attr]
            and q_norm.eps is not None  # type: ignore[union-attr]
            and q_norm.eps == k_norm.eps  # type: ignore[union-attr]
        )

    def _called_projection(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The packed operands as ``c_attn`` returns them when it is called."""
        y, name = self.c_attn(x), "what c_attn returns"
        check_float_tensor(name, y)
        check_shape(name, y, (*x.shape[:2], self.layout.columns), "[B, T, N] in packed order")
        dtype = autocast_dtype(x.device) or x.dtype
        if y.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {y.dtype}")
        return self.layout.views(y if y.stride(-1) == 1 else y.contiguous())

    def _check_width(self, x: Tensor) -> None:
        """Before a message could blame a weight."""
        known = isinstance(x, Tensor) and not x.is_nested
        if not known or x.dim() != 3 or x.shape[-1] != self.n_embd:
            check_float_tensor("x", x)
            check_dims("x", x, "[B, T, C]")
            raise ValueError(
                f"x must be [B, T, n_embd] with n_embd = {self.n_embd}, got {tuple(x.shape)}"
            )

    def _attend_to(self, x: Tensor, cache: KVCache) -> Tensor:
        """Append ``x [B, T, C]`` to the cache and attend to what it then holds: ``[B, T, C]``."""
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a KVCache or None, got {cache!r}")
        self._check_width(x)
        if needs_grad(x, *self.parameters()):
            raise ValueError("cache cannot be used while a gradient is needed; use no_grad()")
        if self.training and self.dropout:
            raise ValueError(f"cache cannot be used with dropout={self.dropout}; call eval()")
        B, T, _ = x.shape
        dtype, head_dim = autocast_dtype(x.device) or x.dtype, self.layout.head_dim
        cache.check_fits((B, T, self.n_kv_head, head_dim), dtype, x.device)
        # Raises where decoding would, before the projection has run.
        choose(self.backend, (x,), DecodeOptions(n_queries=min(T, FEW_TOKENS)), head_dim)
        cache.claim(self)
        known = cache.known_lengths(T)
        before = None if known is None or any(n != known[0] for n in known) else known[0]
        operands = self.operands(x, cache.lengths if before is None else before)
        if T > FEW_TOKENS and before is not None:
            q, k, v = operands
            cache.append(k, v, backend=self.backend)
            if before:
                k, v = (t[:, : before + T] for t in (cache.k_pack, cache.v))
            return packed_attention(q, k, v, backend=self.backend).flatten(2)
        pieces = zip(*(t.split(FEW_TOKENS, dim=1) for t in operands), strict=True)
        outs = [self._decode(q, k, v, cache) for q, k, v in pieces]
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)).flatten(2)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
        """A few tokens after what each sequence has: ``[B, T, H, D]``."""
        cache.append(k, v, backend=self.backend)
        return decode_attention(
            q,
            cache.k_pack,
            cache.v,
            cache.lengths,
            max_length=cache.longest,
            backend=self.backend,
        )

    def fused_weight(self) -> tuple[Tensor | QuantizedWeight, Tensor | None]:
        """``W_fused [C, N]`` and its bias ``[N]`` or None, in packed order; ``N <= 3 * C``.

        Raises:
            ValueError: a ``c_attn`` whose output is more than its weight: wrapped, parametrised,
                with forward hooks.
        """
        if not is_readable(self.c_attn, PROJECTIONS):
            raise ValueError(
                f"c_attn, a {type(self.c_attn).__name__}, has no W_fused to read, as its output "
                "may be more than x @ weight: first merge or remove what is around it (an adapter, "
                "hooks, a parametrisation)"
            )
        # Also where the kernels cannot run, as on a CPU, before a layer moves to its GPU.
        return _fused(self.c_attn, "auto" if self.backend == "triton" else self.backend)

    @torch.no_grad()
    def fuse_(self) -> "RACausalSelfAttention":
        """Replace a composed ``c_attn`` by an ``nn.Linear`` of the composed weight, for inference.

        Until :meth:`unfuse_`, ``c_attn`` and the state dict are those of a free layer. The factors
        are set aside and follow moves and casts; what is written to the fused weight does not
        reach them. A free layer stays as it is.

        Returns:
            The layer itself.

        Raises:
            ValueError: a layer that is fused, quantized or in training, and where
                :meth:`fused_weight` raises.
        """
        self._refuse_fused("fuse_()")
        if isinstance(self.c_attn, QuantizedLinear):
            raise ValueError("c_attn is quantized, so it is one weight already")
        if self.training:
            raise ValueError("fuse_ is for inference: call eval() first")
        if self.parametrisation == "free":
            return self
        with torch.inference_mode(False):
            W_fused, bias = self.fused_weight()
            composed = self.c_attn
            assert isinstance(composed, ComposedLinear)
            assert isinstance(W_fused, Tensor)
            C, N = W_fused.shape
            linear = nn.Linear(C, N, bias is not None, device="meta").eval()
            linear.weight = nn.Parameter(W_fused.mT.contiguous(), requires_grad=False)
            if bias is not None:
                linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
        self._factors, self.c_attn = (composed,), linear
        return self

    def unfuse_(self) -> "RACausalSelfAttention":
        """Undo :meth:`fuse_`: the factors come back, and the fused weight goes.

        Returns:
            The layer itself.

        Raises:
            ValueError: a layer that is not fused.
        """
        if not self._factors:
            raise ValueError("c_attn is not fused")
        (self.c_attn,), self._factors = self._factors, ()
        return self

    @property
    def is_fused(self) -> bool:
        """Whether :meth:`fuse_` has set factors aside."""
        return bool(self._factors)

    def _refuse_fused(self, what: str) -> None:
        if self._factors:
            raise ValueError(f"c_attn is fused, for inference: unfuse_() comes before {what}")

    def train(self, mode: bool = True) -> "RACausalSelfAttention":
        """Switch the mode; a fused layer has nothing to train and raises ValueError."""
        if mode:
            self._refuse_fused("train()")
        return super().train(mode)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> "RACausalSelfAttention":
        """Moves and casts reach the factors too."""
        for factors in self._factors:
            factors._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuses another weight than that of the factors, which ``unfuse_`` would bring back."""
        if any(name.startswith(f"{prefix}c_attn.") for name in state_dict):
            self._refuse_fused("load_state_dict()")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.no_grad()
    def quantize_(self, which: str, *, activations: str = "none") -> "RACausalSelfAttention":
        """Replace ``c_attn`` by int8 columns, for inference; the factors of a composed one go.

        The state dict then loads into a layer that was quantized the same way. A forward whose x
        needs a gradient raises; ``c_proj`` still has one.

        Args:
            which: ``"all"`` columns, or ``"reciprocal"`` ones alone.
            activations: ``"none"`` or ``"int8"``, see :func:`ra_triton.quantize_weight`.

        Returns:
            The layer itself.

        Raises:
            ValueError: unknown choices; ``"reciprocal"`` with R = 0; a weight that is not finite;
                a layer that is quantized already.
        """
        W_fused, bias = self.fused_weight()
        if isinstance(W_fused, QuantizedWeight):
            raise ValueError("the layer is quantized already; rounding twice would lose accuracy")
        heads: Any = {"n_head": self.n_head, "n_kv_head": self.n_kv_head}
        options: Any = {"which": which, **heads, "weight_layout": "packed"}
        weight = quantize_weight(W_fused, self.R, **options, activations=activations)
        self._factors, self.c_attn = (), QuantizedLinear(weight, bias)
        return self

    def gates(self) -> dict[str, Tensor]:
        """``{"w_std": [H], "w_rec": [H]}``, detached copies; empty for free, which has no gates."""
        composed = self._factors[0] if self._factors else self.c_attn
        if not isinstance(composed, ComposedLinear):
            return {}
        return {name: getattr(composed, name).detach().clone() for name in ("w_std", "w_rec")}

    @torch.no_grad()
    def reciprocal_share(self, x: Tensor) -> Tensor:
        """How much of the variation of the scores the reciprocal term makes, per head.

        ``V_rec / (V_std + V_rec)``: V is a term's variance over the keys of a query, averaged over
        queries, as softmax ignores what all keys of a query share. About ``R / D`` at
        initialisation. Computes ``H * T * T`` scores at a time.

        Args:
            x: ``[B, T, C]``, the input of the layer.

        Returns:
            ``[H]`` float32 in [0, 1]; 0 where the scores do not vary, as for one token.

        Raises:
            TypeError: see :meth:`forward`.
            ValueError: see :meth:`forward`; a rotation that mixes low lanes with standard ones.
        """
        if self.rope is not None and self.rope.rope_dims > self.layout.d_std and self.R:
            raise ValueError(
                f"rope_dims={self.rope.rope_dims} > D - R = {self.layout.d_std}: rotation mixes "
                "low lanes with standard ones, so the scores have no reciprocal term of their own"
            )
        q_pack, k_pack, _ = self.operands(x)
        d_std = q_pack.shape[-1] - self.R
        variances = torch.zeros(2, self.n_head, dtype=torch.float32, device=x.device)
        k_pack = k_pack.repeat_interleave(self.n_head // self.n_kv_head, dim=2)
        for q, k in zip(q_pack.float(), k_pack.float(), strict=True):  # [T, H, D]
            # Standard, reciprocal.
            terms = ((q[..., :d_std], k[..., :d_std]), (q[..., d_std:], k[..., d_std:]))
            for total, (a, b) in zip(variances, terms, strict=True):
                total += _variance_over_keys(torch.einsum("ihd,jhd->hij", a, b))
        total = variances.sum(0)
        return torch.where(total > 0, variances[1] / total, 0.0)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return (
            f"n_embd={self.n_embd}, n_head={self.n_head}, n_kv_head={self.n_kv_head}, R={self.R}, "
            f"dropout={self.dropout}, parametrisation={self.parametrisation!r}, "
            f"backend={self.backend!r}" + ("" if self.rope is None else f", rope={self.rope}")
        )


def _fused(c_attn: nn.Module, backend: str) -> tuple[Tensor | QuantizedWeight, Tensor | None]:
    """``W_fused`` and its bias, of one of ``PROJECTIONS``."""
    if isinstance(c_attn, ComposedLinear):
        return c_attn.fused(backend=backend)
    if isinstance(c_attn, QuantizedLinear):
        return c_attn.quantized(), c_attn.bias
    assert isinstance(c_attn, nn.Linear)
    return c_attn.weight.mT, c_attn.bias


def _called_norm(name: str, norm: nn.Module | None, heads: Tensor) -> Tensor:
    """What ``norm`` makes of packed heads ``[B, T, H, D]``, in their dtype."""
    if norm is None:
        return heads
    y, name = norm(heads), f"what {name} returns"
    check_float_tensor(name, y, dtypes=None)
    check_shape(name, y, tuple(heads.shape), "[B, T, H, D] like its input")
    y = y.to(heads.dtype)
    return y if y.stride(-1) == 1 else y.contiguous()


def _variance_over_keys(S: Tensor) -> Tensor:
    """Causal scores ``[H, T, T]`` to ``[H]``: variance over each query's keys, summed."""
    T = S.shape[-1]
    seen = torch.ones(T, T, dtype=torch.bool, device=S.device).tril()
    count = seen.sum(-1, keepdim=True)
    mean = S.masked_fill(~seen, 0.0).sum(-1, keepdim=True) / count
    return ((S - mean).masked_fill(~seen, 0.0).square() / count).sum((-2, -1))


def _rotary_tables(rope: bool | float, rope_dims: int | None, head_dim: int) -> RotaryTables | None:
    """The tables of a layer, or None without rotation."""
    if rope is False:
        if rope_dims is not None:
            raise ValueError(f"rope_dims={rope_dims} needs rope=True or a theta")
        return None
    if not isinstance(rope, (bool, int, float)):
        raise TypeError(f"rope must be a bool or theta, a number, got {rope!r}")
    theta = THETA if rope is True else float(rope)
    if not 1 < theta < math.inf:
        raise ValueError(f"rope must be True or a theta above 1, got {rope}")
    return RotaryTables(check_rope_dims(rope_dims, head_dim), theta)


def _check_dropout(dropout: float) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout must be a number, got {dropout!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
