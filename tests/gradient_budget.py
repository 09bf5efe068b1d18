"""The gate for gradients: what the roundings of a correct backward may add up to, against FP64.

The reference is FP64 autograd through ``ref`` on exactly the tensors the kernel read. A backward
recomputes P from the forward's logsumexp, multiplies rounded P and dS, and takes delta from the
rounded output. With z the dropout factor of each score (1 without), s the scale, A = s |Q||K|ᵀ:

    P = exp(S - lse)            error  P (e + row_i)           e = 2⁻²³ A: rounding of the logit
    dP = dO Vᵀ                  error  g = 2⁻²³ |dO||V|ᵀ       row_i: that of lse, forward's budget
    delta = Σ_d O dO - dlse     error  d_i                     O rounded, from rounded P
    dS = P (z dP - delta)       error  dS (w + e) + P z g, each score on its own,
                                       and dS row_i + P d_i, the same sign along a row

With a softcap S = softcap tanh(x), x = s Q Kᵀ / softcap, and dS carries the slope 1 - tanh²(x), in
error by 2⁻²² tanh² and by what x is; e is then what tanh leaves of A, and its rounding. So
the errors of one row add up linearly over its keys (dQ), those of several rows as variances
(dK, dV); f, w and tiny as in the forward. ``dS e`` and ``dS row`` are the logit term E of the
forward, carried through: in float32 nothing else is as large.
"""

import math
from contextlib import contextmanager
from unittest.mock import patch

import torch
from budget import (
    FP32_STEPS,
    Budget,
    _rounding,
    attention_budget,
    check_budget,
    projection_budget,
    rms,
)
from torch import Tensor

from ref import reciprocal_attention as ref

PROMISES = {"dq": 1.5, "dk": 1.5, "dv": 1.25, "dx": 1.5, "dW": 1.5}  # Rule B
LOGIT = 2.0**-23


@contextmanager
def dropping(keep: Tensor | None):
    """``ref`` drops the scores where ``keep [B, H, T_q, T_k]`` is False, instead of random ones."""
    if keep is None:
        yield
        return
    with patch.object(torch.nn.functional, "dropout", lambda P, p: P * keep / (1 - p)):
        yield


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """The definition in FP64, with a given dropout mask: ``(out, lse)``."""
    with dropping(keep):
        return ref.packed_attention(q.double(), k.double(), v.double(), **options)


def reference_gradients(
    tensors: tuple[Tensor, Tensor, Tensor],
    do: Tensor | None,
    dlse: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    keep: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` of ``Σ out do + Σ lse dlse`` by autograd through ``ref``, in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    with dropping(keep):
        out, lse = ref.packed_attention(*leaves, **options)
    pairs = [(out, do), (lse, dlse)]
    outputs, grads = zip(*((t, g.to(t.dtype)) for t, g in pairs if g is not None), strict=True)
    grads = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return tuple(
        torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)
    )


def attention_gradient_budgets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor | None,
    dlse: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    **options,
) -> dict[str, Budget]:
    """Budgets of ``dq``, ``dk`` and ``dv``; ``options`` are those of the mask and the scores.

    Those of ``delta`` and ``lse`` ``[B, H, T_q]`` come along: their errors are common to a row.
    """
    dtype, (H, D), H_kv = q.dtype, q.shape[2:], k.shape[2]
    expected = reference_gradients((q, k, v), do, dlse, keep=keep, dropout_p=dropout_p, **options)
    lse_budget = attention_budget(q, k, v, **options)[1]
    do = torch.zeros_like(q) if do is None else do
    q, k, v, do = (t.double() for t in (q, k, v, do))
    k, v = (t.repeat_interleave(H // H_kv, dim=2) for t in (k, v))
    s = options.get("softmax_scale") or 1 / math.sqrt(D)
    w, f, tiny = _rounding(dtype), FP32_STEPS, torch.finfo(dtype).tiny

    def scores(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("bihd,bjhd->bhij", a, b)

    def over_keys(weights: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("bhij,bjhd->bihd", weights, values)

    def over_queries(weights: Tensor, values: Tensor) -> Tensor:
        """Summed over the heads of a group too: those errors are independent."""
        wide = torch.einsum("bhij,bihd->bjhd", weights, values)
        return wide.unflatten(2, (H_kv, H // H_kv)).sum(3)

    def column(t: Tensor) -> Tensor:  # [B, H, T] beside [B, T, H, D]
        return t.transpose(1, 2).unsqueeze(-1)

    allowed = _allowed(q, k, options)
    lse = lse_budget.expected
    lse = lse.masked_fill(torch.isneginf(lse), 0.0)
    S, slope, slope_error = _capped(s * scores(q, k), s * scores(q.abs(), k.abs()), options)
    S = S.masked_fill(~allowed, -math.inf)
    P = torch.exp(S - lse.unsqueeze(-1))
    z = torch.ones_like(P) if keep is None else keep / (1 - dropout_p)
    dP = z * scores(do, v)
    delta = (P * dP).sum(-1, keepdim=True)
    if dlse is not None:
        dlse = dlse.double().unsqueeze(-1)
        delta = delta - dlse
    dS = P * (dP - delta)

    e = LOGIT * (slope * s * scores(q.abs(), k.abs()) + S.masked_fill(~allowed, 0.0).abs())
    g = LOGIT * z * scores(do.abs(), v.abs())
    own = (slope * dS).square() * (w**2 + e.square()) + (slope * P * g).square()
    own = own + (dS * slope_error).square()
    row = lse_budget.sigma  # [B, H, T_q]
    out = over_keys(P * z, v)
    d = (
        w**2 * (do * out).square().sum(-1).transpose(1, 2)
        + w**2 * (P * dP).square().sum(-1)
        + (dS * e).square().sum(-1)
        + (f * (do.abs() * over_keys(P * z, v.abs())).sum(-1).transpose(1, 2)).square()
    ).sqrt()
    if dlse is not None:  # delta is stored in float32
        d = (d.square() + (LOGIT * dlse.squeeze(-1)).square()).sqrt()
    dS, P_slope = slope * dS, slope * P

    # A P or dS below the smallest normal float32 may be flushed to 0.
    lost = torch.finfo(torch.float32).tiny * allowed
    lost_dS, lost_P = lost * (1 + (dP - delta).abs()), lost * z

    dq, dk, dv = expected
    row_ij, d_ij = row.unsqueeze(-1), d.unsqueeze(-1)
    variances = {
        "dq": s**2 * over_keys(own, k.square())
        + (column(row) * dq).square()
        + (s * column(d) * over_keys(P_slope, k)).square()
        + (s * over_keys(f * dS.abs() + lost_dS, k.abs())).square()
        + (w * dq).square(),
        "dk": s**2
        * over_queries(own + (dS * row_ij).square() + (P_slope * d_ij).square(), q.square())
        + (s * over_queries(f * dS.abs() + lost_dS, q.abs())).square()
        + (w * dk).square(),
        "dv": over_queries((P * z).square() * (w**2 + e.square() + row_ij.square()), do.square())
        + over_queries(f * P * z + lost_P, do.abs()).square()
        + (w * dv).square(),
    }
    budgets = {
        name: Budget(value, (variance + tiny**2).sqrt())
        for (name, variance), value in zip(variances.items(), expected, strict=True)
    }
    return budgets | {"delta": Budget(delta.squeeze(-1), d), "lse": lse_budget}


def _allowed(q: Tensor, k: Tensor, options: dict) -> Tensor:
    mask = options.get("causal", True), options.get("window_size", (-1, -1))
    return ref.allowed_keys(q.shape[1], k.shape[1], *mask, q.device)


def _capped(S: Tensor, A: Tensor, options: dict) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """Scores after the softcap, the slope ``1 - tanh²`` and its error; ``A = s |Q||K|ᵀ``."""
    softcap = options.get("softcap", 0.0)
    if not softcap:
        return S, 1.0, 0.0
    t = torch.tanh(S / softcap)
    slope = 1 - t.square()
    return softcap * t, slope, 2 * LOGIT * (t.square() + t.abs() * slope * A / softcap)


def dropout_budget(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, dropout_p: float, **options
) -> Budget:
    """Budget of ``out`` with a given mask: the forward's, with z P for P where v is weighted."""
    expected, lse = exact_attention(q, k, v, keep=keep, dropout_p=dropout_p, **options)
    dtype, H, D = q.dtype, *q.shape[2:]
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (k, v))
    s = options.get("softmax_scale") or 1 / math.sqrt(D)
    S, A = (s * torch.einsum("bihd,bjhd->bhij", *qk) for qk in ((q, k), (q.abs(), k.abs())))
    S, slope, _ = _capped(S, A, options)
    e = LOGIT * (slope * A + (S.abs() if options.get("softcap") else 0.0))
    S = S.masked_fill(~_allowed(q, k, options), -math.inf)
    P = torch.exp(S - lse.masked_fill(torch.isneginf(lse), 0.0).unsqueeze(-1))
    z = keep / (1 - dropout_p)
    shift = (P * e).square()

    def spread(weights: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("bhij,bjhd->bihd", weights, values)

    shift_of_out = (
        spread(shift * z.square(), v.square())
        - 2 * expected * spread(shift * z, v)
        + expected.square() * shift.sum(-1).transpose(1, 2).unsqueeze(-1)
    ).clamp_min(0)
    w = _rounding(dtype)
    variance = (
        w**2 * spread((P * z).square(), v.square())
        + (w * expected).square()
        + (FP32_STEPS * spread(P * z, v.abs())).square()
        + shift_of_out
        + torch.finfo(dtype).tiny ** 2
    )
    return Budget(expected, variance.sqrt())


def projection_gradient_budgets(x: Tensor, W: Tensor, dy: Tensor) -> dict[str, Budget]:
    """Budgets of ``dx = dy Wᵀ``, ``dW = xᵀ dy`` and ``dbias = Σ dy``: three products."""
    rows, dy_rows = x.flatten(0, 1), dy.flatten(0, 1)
    ones = rows.new_ones(1, 1, rows.shape[0])
    dW, dbias = (projection_budget(t, dy_rows) for t in (rows.mT.unsqueeze(0), ones))
    return {
        "dx": projection_budget(dy, W.mT),
        "dW": Budget(dW.expected[0], dW.sigma[0]),
        "dbias": Budget(dbias.expected[0, 0], dbias.sigma[0, 0]),
    }


def check_gradients(
    grads: dict[str, Tensor | None], budgets: dict[str, Budget], *, dtype: torch.dtype, case: object
) -> None:
    """Rule A for each gradient that is not None."""
    for name, grad in grads.items():
        if grad is not None:
            check_budget(grad, budgets[name], dtype=dtype, what=f"{name} of {case}")


def assert_gradient_promise(
    name: str, actual: Tensor, exact: Tensor, eager: Tensor, promise: float | None = None
) -> None:
    """Rule B for one gradient."""
    promise = PROMISES[name] if promise is None else promise
    error, eager_error = (rms(t.double() - exact) for t in (actual, eager))
    assert error <= promise * eager_error, (
        f"{name}: RMS error {error:.3g} is {error / eager_error:.3g} times eager PyTorch's, "
        f"the promise is {promise}"
    )
