"""Weights: compose W_q, W_k, W_v, W_recip and gates into one ``W_fused``; reorder its columns.

``Q_low = (x W_q) W_recip = x (W_q W_recip)``, so every lane that attention reads is a column of one
matrix. Composing weights costs a few MFLOP, and autograd reaches every factor.
"""

from typing import overload

import torch
from torch import Tensor

from ra_triton.backend import choose
from ra_triton.checks import (
    DTYPES,
    check_choice,
    check_float_tensor,
    check_same,
    check_shape,
)
from ra_triton.launch import recorded
from ra_triton.weights.factors import Factors
from ra_triton.weights.layout import WEIGHT_LAYOUTS, RALayout


@overload
def compose_weights(
    W_q: Tensor,
    W_k: Tensor,
    W_v: Tensor,
    W_recip: Tensor | None,
    *,
    n_head: int,
    n_kv_head: int | None = None,
    w_std: Tensor | float | None = None,
    w_rec: Tensor | float | None = None,
    biases: None = None,
    weight_layout: str = "split",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor: ...
@overload
def compose_weights(
    W_q: Tensor,
    W_k: Tensor,
    W_v: Tensor,
    W_recip: Tensor | None,
    *,
    n_head: int,
    n_kv_head: int | None = None,
    w_std: Tensor | float | None = None,
    w_rec: Tensor | float | None = None,
    biases: tuple[Tensor, Tensor, Tensor],
    weight_layout: str = "split",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def compose_weights(
    W_q: Tensor,
    W_k: Tensor,
    W_v: Tensor,
    W_recip: Tensor | None,
    *,
    n_head: int,
    n_kv_head: int | None = None,
    w_std: Tensor | float | None = None,
    w_rec: Tensor | float | None = None,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    weight_layout: str = "split",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Fold the factors of reciprocal attention into one projection matrix.

    ``[w_std * Q_std | K_std | V | Q W_recip | w_rec * K W_recip]`` as columns over ``x``. The gates
    sit on the query side alone, so any sign is allowed and gradients at 0 are finite. Biases of
    q, k and v fold the same way, as one more row: they add to ``x W_q`` before W_recip.

    On a GPU it is one kernel, and two for all gradients. Its sums are in float32, and float32
    products are not rounded to TF32, whatever PyTorch's own may be.

    Grouped heads (GQA), ``G = H / H_kv`` query heads to a key head: query head h carries
    ``K_low = K_(h // G) W_recip`` and each key head the mean of its group's ``Q W_recip``. That is
    another operator than RA per head, which needs G low parts on each key: there is one key for the
    whole group, and one cache. It is RA per head where the group's ``Q W_recip`` are equal. A mean
    of G independent parts is ``1 / sqrt(G)`` as large as each; ``w_rec = sqrt(G)`` makes up for it.

    Args:
        W_q: ``[C, H*D]`` query projection, used as ``x @ W_q``.
        W_k: ``[C, H_kv*D]`` key projection.
        W_v: ``[C, H_kv*D]`` value projection.
        W_recip: ``[D, R]`` shared by all heads, or ``[H, D, R]``, one for each query head; ``None``
            means ``R = 0``.
        n_head: query heads ``H``.
        n_kv_head: key/value heads ``H_kv``, which divide ``H``; ``None`` means ``H``.
        w_std: gate on the standard term: a number, a scalar tensor or ``[H]``; ``None`` means 1.
        w_rec: gate on the reciprocal term, likewise.
        biases: ``b_q [H*D]``, ``b_k [H_kv*D]`` and ``b_v [H_kv*D]``.
        weight_layout: column order of the result, ``"split"`` or ``"packed"``.
        dtype: of the result, that which the projection multiplies in; ``None`` means the weights'.
        backend: ``"triton"``, ``"sdpa"``, ``"flex"`` (both are plain torch) or ``"auto"``: Triton
            for float16, bfloat16 and float32 on a supported GPU, plain torch elsewhere.

    Returns:
        ``W_fused [C, (H + 2*H_kv)*D]``, differentiable in every argument; with ``biases``
        ``(W_fused, bias)``, bias ``[(H + 2*H_kv)*D]`` in the order of the columns.

    Raises:
        TypeError: an argument that is not a float tensor, or mixed dtypes.
        ValueError: shapes that do not fit together, mixed devices, an unknown ``weight_layout``.
        NotImplementedError: the backend cannot run the call; the message names one that can.

    Source: reciprocal attention, github.com/mcgrof/knlp; grouped heads: arXiv:2305.13245.
    """
    gates = (gate if isinstance(gate, Tensor) else None for gate in (w_std, w_rec))
    given = biases if isinstance(biases, tuple) and len(biases) == 3 else (None, None, None)
    w = (W_q, W_k, W_v, W_recip, *gates, *given)  # as in Factors; nothing is checked yet
    std, rec = (None if isinstance(gate, Tensor) else gate for gate in (w_std, w_rec))
    numbers = (std, rec, n_head, n_kv_head, weight_layout, dtype, backend, biases is None)
    key = recorded.key_of(w, numbers)
    call = recorded.known(key)
    if call is not None:
        return _as_returned(*call.run(*_on_device(w)))
    check_choice("weight_layout", weight_layout, WEIGHT_LAYOUTS)
    _check_factors(W_q, W_k, W_v, W_recip, n_head, n_kv_head)
    for name, gate in (("w_std", w_std), ("w_rec", w_rec)):
        _check_gate(name, gate, n_head, W_q.device)
    if biases is not None:
        _check_biases(biases, W_q, W_k)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point dtype or None, got {dtype!r}")
    if backend == "auto" and not {W_q.dtype, dtype or W_q.dtype} <= {*DTYPES}:
        backend = "sdpa"  # float64 has no kernel
    module, _ = choose(backend, w, head_dim=W_q.shape[1] // n_head)
    if backend == "triton" and dtype not in (None, *DTYPES):
        known = ", ".join(map(str, DTYPES))
        raise NotImplementedError(
            f"backend='triton': dtype must be one of {known}, got {dtype}; use backend='sdpa'"
        )
    heads = n_head, kv_heads(n_head, n_kv_head)
    rest = (std, rec, *heads, weight_layout == "packed", dtype or W_q.dtype)
    W_fused, bias = module.compose(Factors._make((*_on_device(w), *rest)))
    recorded.keep(key, module.known_compose(rest, W_fused.requires_grad))
    return _as_returned(W_fused, bias)


def _on_device(w: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """With scalar gates, which may be on a CPU, where the weights are."""
    gates = (g if g is None or g.device == w[0].device else g.to(w[0].device) for g in w[4:6])  # type: ignore[union-attr]
    return (*w[:4], *gates, *w[6:])


def _as_returned(W_fused: Tensor, bias: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    return W_fused if bias is None else (W_fused, bias)


def pack_weight(
    W_fused: Tensor, R: int, *, n_head: int | None = None, n_kv_head: int | None = None
) -> Tensor:
    """Reorder the columns of ``W_fused`` (or the entries of its bias) from split to packed order.

    Args:
        W_fused: ``[..., N]`` with ``N = (n_head + 2 * n_kv_head) * D``, in split order.
        R: reciprocal rank, ``0 <= R <= D``.
        n_head: query heads; ``None`` means heads of 64, GPT-2's. Columns cannot tell: a model
            with heads of another size has to pass it.
        n_kv_head: key/value heads; ``None`` means ``n_head``.

    Returns:
        The same numbers in packed order; :func:`unpack_weight` is the exact inverse.

    Raises:
        TypeError: not a tensor, or a count that is not an int.
        ValueError: columns that do not divide into heads, R out of range.
    """
    return _layout_of(W_fused, R, n_head, n_kv_head).pack(W_fused)


def unpack_weight(
    W_packed: Tensor, R: int, *, n_head: int | None = None, n_kv_head: int | None = None
) -> Tensor:
    """Reorder columns from packed to split order: the exact inverse of :func:`pack_weight`.

    Takes the same arguments and raises the same errors.
    """
    return _layout_of(W_packed, R, n_head, n_kv_head).unpack(W_packed)


def factor_weight(
    W_fused: Tensor,
    R: int,
    *,
    n_head: int,
    n_kv_head: int | None = None,
    weight_layout: str = "split",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors that :func:`compose_weights` turns into ``W_fused`` again, with both gates at 1.

    Any weight of plain attention has them: W_recip picks the last R lanes of each head
    (:func:`last_lanes`), so W_q holds ``[Q_std|Q_low]`` and W_k ``[K_std|K_low]`` per head. A bias
    factors as a one-row matrix. With grouped heads only R = 0 has them: the R free lanes of one key
    head cannot make a different K_low for each query head of its group.

    Args:
        W_fused: ``[C, (H + 2*H_kv)*D]``.
        R: reciprocal rank, ``0 <= R <= D``.
        n_head: query heads ``H``.
        n_kv_head: key/value heads; ``None`` means ``H``.
        weight_layout: column order of ``W_fused``, ``"split"`` or ``"packed"``.

    Returns:
        ``W_q [C, H*D]``, ``W_k`` and ``W_v`` ``[C, H_kv*D]`` and ``W_recip [D, R]``, in the dtype
        of ``W_fused``.

    Raises:
        TypeError: not a tensor, or a count that is not an int.
        ValueError: columns that do not divide into heads, R out of range, an unknown
            ``weight_layout``, grouped heads with R > 0.
    """
    check_choice("weight_layout", weight_layout, WEIGHT_LAYOUTS)
    layout = _layout_of(W_fused, R, n_head, n_kv_head)
    if R and layout.n_kv_head < layout.n_head:
        raise ValueError(
            f"a weight with n_kv_head={n_kv_head} < n_head={n_head} has no factors with R={R}: a "
            "key head has one K_low for its whole group; take R=0 or the free parametrisation"
        )
    s = layout.split_columns(layout.unpack(W_fused) if weight_layout == "packed" else W_fused)
    q, k = s["q_std"], s["k_std"]
    if R:
        q, k = torch.cat((q, s["q_low"]), dim=-1), torch.cat((k, s["k_low"]), dim=-1)
    W_recip = last_lanes(W_fused.new_empty(layout.head_dim, R))
    return q.flatten(-2), k.flatten(-2), s["v"].flatten(-2), W_recip


def last_lanes(W_recip: Tensor) -> Tensor:
    """A W_recip like the given ``[..., D, R]`` that picks the last R lanes: ``[0; I]``."""
    D, R = W_recip.shape[-2:]
    eye = torch.eye(D, dtype=W_recip.dtype, device=W_recip.device)
    return eye[:, D - R :].expand_as(W_recip).clone()


def kv_heads(n_head: int, n_kv_head: int | None) -> int:
    """``n_kv_head``, checked; ``n_head`` for None."""
    if n_kv_head is None:
        return n_head
    if type(n_kv_head) is not int:
        raise TypeError(f"n_kv_head must be an int or None, got {n_kv_head!r}")
    if n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(f"n_kv_head must divide n_head={n_head}, got {n_kv_head}")
    return n_kv_head


def _layout_of(w: Tensor, R: int, n_head: int | None, n_kv_head: int | None) -> RALayout:
    if not isinstance(w, Tensor):
        raise TypeError(f"W_fused must be a tensor, got {type(w).__name__}")
    if w.is_nested:
        raise TypeError("W_fused must be a dense tensor, got a nested one")
    if w.dim() < 1:
        raise ValueError("W_fused must have at least one dimension, got a scalar tensor")
    return RALayout.from_columns(w.shape[-1], R, n_head, n_kv_head)


def _check_factors(
    W_q: Tensor,
    W_k: Tensor,
    W_v: Tensor,
    W_recip: Tensor | None,
    n_head: int,
    n_kv_head: int | None,
) -> None:
    """``W_q [C, H*D]``, ``W_k, W_v [C, H_kv*D]`` and W_recip fit each other and the heads."""
    weights = {"W_q": W_q, "W_k": W_k, "W_v": W_v}
    weights |= {} if W_recip is None else {"W_recip": W_recip}
    for name, w in weights.items():
        check_float_tensor(name, w, dtypes=None)
    check_same("W_q", W_q, **weights)
    if type(n_head) is not int:
        raise TypeError(f"n_head must be an int, got {n_head!r}")
    if W_q.dim() != 2 or n_head < 1 or W_q.shape[1] == 0 or W_q.shape[1] % n_head:
        raise ValueError(f"W_q must be [C, H*D] with H = n_head = {n_head}, got {tuple(W_q.shape)}")
    C, D = W_q.shape[0], W_q.shape[1] // n_head
    H_kv = kv_heads(n_head, n_kv_head)
    for name in ("W_k", "W_v"):
        w = weights[name]
        if w.shape == (C, H_kv * D):
            continue
        if n_kv_head is None and w.dim() == 2 and w.shape[0] == C and w.shape[1] < W_q.shape[1]:
            raise ValueError(f"{name} has fewer heads than W_q ({tuple(w.shape)}): pass n_kv_head")
        like = "like W_q" if H_kv == n_head else f"with n_kv_head = {H_kv} heads of W_q's size"
        raise ValueError(f"{name} must be {(C, H_kv * D)} {like}, got {tuple(w.shape)}")
    if W_recip is not None:
        _check_recip(W_recip, n_head, D)


def _check_recip(W_recip: Tensor, n_head: int, D: int) -> None:
    """``[D, R]`` or ``[H, D, R]``, ``R <= D``."""
    if W_recip.dim() not in (2, 3) or W_recip.shape[-2] != D:
        raise ValueError(
            f"W_recip must be [D, R] or [H, D, R] with D = {D}, got {tuple(W_recip.shape)}"
        )
    if W_recip.dim() == 3 and W_recip.shape[0] != n_head:
        raise ValueError(
            f"W_recip must be [H, D, R] with H = {n_head} heads, got {tuple(W_recip.shape)}"
        )
    if W_recip.shape[-1] > D:
        raise ValueError(f"R must be between 0 and the head dim {D}, got {W_recip.shape[-1]}")


def _check_biases(biases: tuple[Tensor, Tensor, Tensor], W_q: Tensor, W_k: Tensor) -> None:
    """``b_q, b_k, b_v``, one value per column of their weights."""
    if not isinstance(biases, tuple) or len(biases) != 3:
        raise TypeError(f"biases must be (b_q, b_k, b_v) or None, got {biases!r}")
    for name, b, w in zip(("b_q", "b_k", "b_v"), biases, (W_q, W_k, W_k), strict=True):
        check_float_tensor(name, b, dtypes=None)
        check_same("W_q", W_q, **{name: b})
        check_shape(name, b, (w.shape[1],), f"one value per column of W_{name[-1]}")


def _check_gate(name: str, gate: Tensor | float | None, n_head: int, device: torch.device) -> None:
    """None, a number, a scalar tensor or ``[H]`` on ``device``."""
    if isinstance(gate, Tensor):
        check_float_tensor(name, gate, dtypes=None)
        if gate.dim() and gate.device != device:
            raise ValueError(f"{name} must be on {device} like W_q, got {gate.device}")
        if gate.dim() and gate.shape != (n_head,):
            raise ValueError(
                f"{name} must be a scalar or one value per head [{n_head}], got {tuple(gate.shape)}"
            )
    elif gate is not None and (isinstance(gate, bool) or not isinstance(gate, (int, float))):
        raise TypeError(f"{name} must be a tensor, a number or None, got {gate!r}")
