"""The gate: element-wise error over its predicted standard deviation, against FP64.

Rule A, per element: z = (actual - reference) / sigma with max|z| <= 6, per-row RMS(z) <= 4 and
global RMS(z) <= 1 (1.2 under 1,000 elements). Sigma adds up the roundings a correct kernel has to
make. Rule B, per call: RMS error at most 1.25 times that of eager PyTorch in the same dtype.
The reference is FP64 on exactly the tensors the kernel reads.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ref import reciprocal_attention as ref

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
FP32_STEPS = 8 * 2.0**-23  # relative error allowed to float32 accumulation and exp
MAX_Z, MAX_ROW_RMS, MAX_RMS, MAX_RMS_SMALL = 6.0, 4.0, 1.0, 1.2
PROMISE = 1.25  # Rule B, forward


@dataclass(frozen=True)
class Budget:
    """An FP64 reference and the standard deviation a correct kernel's error may have."""

    expected: Tensor
    sigma: Tensor


def _rounding(dtype: torch.dtype) -> float:
    return UNIT[dtype] / math.sqrt(3)


def attention_budget(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Budget, Budget]:
    """Budgets of ``out [B, T_q, H, D]`` and ``lse [B, H, T_q]``."""
    dtype, (H, D) = q.dtype, q.shape[2:]
    q, k, v = q.double(), k.double(), v.double()
    out, lse = ref.packed_attention(q, k, v, **options)
    scale = options.get("softmax_scale") or 1 / math.sqrt(D)
    k, v = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (k, v))
    S = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    softcap = options.get("softcap", 0.0)
    slope = 1 - torch.tanh(S / softcap).square() if softcap else 1.0
    S = softcap * torch.tanh(S / softcap) if softcap else S
    allowed = ref.allowed_keys(
        *S.shape[-2:], options.get("causal", True), options.get("window_size", (-1, -1)), S.device
    )
    S = S.masked_fill(~allowed, -math.inf)
    no_key = torch.isneginf(lse)
    P = torch.exp(S - lse.masked_fill(no_key, 0.0).unsqueeze(-1))

    w, tiny = _rounding(dtype), torch.finfo(dtype).tiny
    logit_error = 2.0**-23 * scale * torch.einsum("bihd,bjhd->bhij", q.abs(), k.abs())
    if softcap:  # what tanh leaves of it, and the rounding of tanh
        rounding = 2.0**-23 * S.masked_fill(~allowed, 0.0)
        logit_error = ((slope * logit_error).square() + rounding.square()).sqrt()
    shift = (P * logit_error).square()  # of P's logit, squared

    def spread(weights: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("bhij,bjhd->bihd", weights, values)

    shift_of_out = (
        spread(shift, v.square())
        - 2 * out * spread(shift, v)
        + out.square() * shift.sum(-1).transpose(1, 2).unsqueeze(-1)
    ).clamp_min(0)
    variance = (
        w**2 * spread(P.square(), v.square())
        + (w * out).square()
        + (FP32_STEPS * spread(P, v.abs())).square()
        + shift_of_out
        + (
            torch.finfo(torch.float32).tiny * spread(allowed.expand_as(P).double(), v.abs())
        ).square()
        + tiny**2
    )
    largest = S.masked_fill(~allowed, 0.0).abs().amax(-1) if S.shape[-1] else lse.new_zeros(())
    lse_variance = (
        shift.sum(-1)
        + (2.0**-23 * (lse.masked_fill(no_key, 0.0).abs() + largest)).square()
        + FP32_STEPS**2
    )
    return Budget(out, variance.sqrt()), Budget(lse, lse_variance.sqrt())


def projection_budget(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    *,
    bias_rounds_too: bool = False,
    dtype: torch.dtype | None = None,
) -> Budget:
    """Budget of ``x @ W + bias``, ``[B, T, N]``, rounded to ``dtype``, by default that of x.

    ``bias_rounds_too``: the product may be rounded before the bias is added, as F.linear does where
    x is not contiguous.
    """
    dtype = dtype or x.dtype
    x, W = x.double(), W.double()
    offset = 0.0 if bias is None else bias.double()
    y = x @ W + offset
    magnitude = x.abs() @ W.abs() + (0.0 if bias is None else offset.abs())
    variance = (
        (_rounding(dtype) * y).square()
        + (_rounding(dtype) * (y - offset) * bias_rounds_too).square()
        + (FP32_STEPS * magnitude).square()
        + torch.finfo(dtype).tiny ** 2
    )
    return Budget(y, variance.sqrt())


def check_budget(actual: Tensor, budget: Budget, *, dtype: torch.dtype, what: str) -> None:
    """Rule A; positions of NaN and infinities first."""
    expected, sigma = budget.expected, budget.sigma
    assert actual.dtype == dtype, f"{what}: dtype {actual.dtype}, expected {dtype}"
    assert actual.device == expected.device, f"{what}: device {actual.device}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}"
    if not expected.numel():
        return
    rounded = expected.to(dtype)
    finite = torch.isfinite(rounded)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = kind(actual) != kind(rounded)
        assert not wrong.any(), (
            f"{what}: {kind.__name__} differs at {wrong.sum().item()} of {wrong.numel()} places, "
            f"first {wrong.nonzero()[0].tolist()}"
        )
    z = z_scores(actual, budget).where(finite, 0.0)
    worst = z.abs().argmax()
    place = [int(i) for i in torch.unravel_index(worst, z.shape)]
    row_rms, rms = z.square().mean(-1).sqrt(), z.square().mean().sqrt()
    limit = MAX_RMS if z.numel() >= 1000 else MAX_RMS_SMALL
    report = (
        f"{what}: max|z| {z.abs().max():.3g} (limit {MAX_Z}), row RMS {row_rms.max():.3g} "
        f"(limit {MAX_ROW_RMS}), RMS {rms:.3g} (limit {limit}); worst at {place}: "
        f"{actual.flatten()[worst].item():.9g}, reference {expected.flatten()[worst].item():.9g}, "
        f"sigma {sigma.flatten()[worst].item():.3g}; {dtype}, shape {tuple(actual.shape)}"
    )
    assert z.abs().max() <= MAX_Z, report
    assert row_rms.max() <= MAX_ROW_RMS, report
    assert rms <= limit, report


def z_scores(actual: Tensor, budget: Budget) -> Tensor:
    return (actual.double() - budget.expected) / budget.sigma


def assert_attention_close(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, lse: Tensor | None = None, **options
) -> None:
    """Rule A for ``out``, and for ``lse`` where given; ``options`` are those of the call."""
    out_budget, lse_budget = attention_budget(q, k, v, **options)
    case = f"q {tuple(q.shape)}, k {tuple(k.shape)}, {options}"
    check_budget(out, out_budget, dtype=q.dtype, what=f"out of {case}")
    if lse is not None:
        check_budget(lse, lse_budget, dtype=torch.float32, what=f"lse of {case}")


def assert_projection_close(
    y: Tensor,
    x: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    *,
    bias_rounds_too: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Rule A for ``y = x @ W + bias`` in ``dtype``, by default that of x."""
    case = f"x {tuple(x.shape)}, W {tuple(W.shape)}, bias {bias is not None}"
    dtype, rounds_too = dtype or x.dtype, bias is not None and bias_rounds_too
    budget = projection_budget(x, W, bias, bias_rounds_too=rounds_too, dtype=dtype)
    check_budget(y, budget, dtype=dtype, what=f"projection of {case}")


def attention_sigma(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """The standard deviation that a correct kernel's output may have."""
    return attention_budget(q, k, v, **options)[0].sigma


def assert_agree(a: Tensor, b: Tensor, *sigmas: Tensor) -> None:
    """``a`` and ``b`` differ by no more than independent errors of these sizes."""
    sigma = torch.stack(torch.broadcast_tensors(*sigmas)).square().sum(0).sqrt()
    check_budget(a, Budget(b.double(), sigma), dtype=a.dtype, what="difference")


def assert_bitwise(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Equal bit for bit, signed zeros aside; NaN equals NaN."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} != {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if not same.all():
        place = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {(~same).sum().item()} of {same.numel()} elements differ, first at "
            f"{list(place)}: {actual[place].item():.9g} != {expected[place].item():.9g}"
        )


def assert_within_promise(out: Tensor, q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    """Rule B, for 16 tokens and 1,000 elements or more."""
    assert q.shape[1] >= 16, "Rule B is about 16 query tokens or more"
    assert out.numel() >= 1000, "Rule B is about 1,000 elements or more"
    exact = attention_budget(q, k, v, **options)[0].expected
    eager = ref.packed_attention(q, k, v, **options)[0]
    error, eager_error = (rms(t.double() - exact) for t in (out, eager))
    assert error <= PROMISE * eager_error, (
        f"RMS error {error:.3g} is {error / eager_error:.3g} times eager PyTorch's, "
        f"the promise is {PROMISE}"
    )


def rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()
