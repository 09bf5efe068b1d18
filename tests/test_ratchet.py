"""Rule D: precision may not get worse. Run ``python tests/test_ratchet.py`` to record anew.

The committed number is the global RMS of error over budget for one fixed case; a correct kernel
varies by a few percent, and an accumulator in too small a dtype costs more than the limit.
"""

import argparse
import json
from pathlib import Path

import conftest  # noqa: F401  sets the interpreter switch and the path when this is a script
import pytest
import torch
from budget import attention_budget, projection_budget, rms, z_scores
from gradient_budget import attention_gradient_budgets, projection_gradient_budgets
from strategies import BACKENDS, DEVICE, AttentionCase, ProjectionCase, dtypes_for, normal

import ra_triton

LIMIT = 1.15
RECORD = Path(__file__).parent / "precision_ratchet.json"


def attention_error(backend: str, dtype: torch.dtype, causal: bool) -> float:
    case = AttentionCase(B=2, T_q=200, T_k=200, H_kv=2, D=64, dtype=dtype, causal=causal)
    tensors = case.tensors()
    out = ra_triton.packed_attention(*tensors, backend=backend, **case.options)
    return rms(z_scores(out, attention_budget(*tensors, **case.options)[0]))


def gradient_error(backend: str, dtype: torch.dtype, causal: bool) -> float:
    case = AttentionCase(B=2, T_q=200, T_k=200, H_kv=1, group=2, D=64, dtype=dtype, causal=causal)
    tensors, do = case.tensors(), case.gradient()
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = ra_triton.packed_attention(*leaves, backend=backend, **case.options)
    grads = torch.autograd.grad(out, leaves, do)
    budgets = attention_gradient_budgets(*tensors, do, **case.options)
    errors = [z_scores(g, budgets[name]) for name, g in zip(("dq", "dk", "dv"), grads, strict=True)]
    return rms(torch.cat([z.flatten() for z in errors]))


def projection_gradient_error(backend: str, dtype: torch.dtype) -> float:
    case = ProjectionCase(B=2, T=200, C=64, H_kv=2, D=32, dtype=dtype, weight_layout="packed")
    x, W, _ = case.tensors()
    dy = normal(2, 200, case.columns, dtype=dtype, seed=50)
    leaves = [t.detach().requires_grad_() for t in (x, W)]
    options = {"weight_layout": "packed", "backend": backend, **case.heads}
    packed = ra_triton.project(*leaves, case.R, **options)
    grads = torch.autograd.grad(torch.cat(packed, 2).flatten(2), leaves, dy)
    budgets = projection_gradient_budgets(x, W, dy)
    errors = [z_scores(g, budgets[name]) for name, g in zip(("dx", "dW"), grads, strict=True)]
    return rms(torch.cat([z.flatten() for z in errors]))


def projection_error(backend: str, dtype: torch.dtype) -> float:
    case = ProjectionCase(
        B=2, T=100, C=256, H_kv=2, D=32, dtype=dtype, with_bias=True, weight_layout="packed"
    )
    x, W, bias = case.tensors()
    packed = ra_triton.project(
        x, W, case.R, bias=bias, weight_layout="packed", backend=backend, **case.heads
    )
    return rms(z_scores(torch.cat(packed, 2).flatten(2), projection_budget(x, W, bias)))


STAGES = {
    "attention B2 T200 H2 D64 causal": lambda *case: attention_error(*case, True),
    "attention B2 T200 H2 D64 full": lambda *case: attention_error(*case, False),
    "projection B2 T100 C256 N192": projection_error,
    "attention gradients B2 T200 H2 H_kv1 D64 causal": lambda *case: gradient_error(*case, True),
    "projection gradients B2 T200 C64 N192": projection_gradient_error,
}


def where(backend: str) -> str:
    """A GPU by name; the interpreter and PyTorch's CPU kernels have numbers of their own."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    return "interpreter" if backend == "triton" else "cpu"


CASES = {
    f"{stage}, {str(dtype).removeprefix('torch.')}, {backend}, {where(backend)}": (
        stage,
        backend,
        dtype,
    )
    for stage in STAGES
    for backend in BACKENDS
    for dtype in dtypes_for(backend)
    if DEVICE.type == "cuda" or dtype != torch.float32  # on a CPU it depends on the BLAS
}


def measure(case: str) -> float:
    stage, backend, dtype = CASES[case]
    return STAGES[stage](backend, dtype)


@pytest.mark.parametrize("case", CASES)
def test_precision_is_no_worse_than_recorded(case):
    record = json.loads(RECORD.read_text())
    if case not in record and DEVICE.type == "cuda":
        pytest.skip("no entry for this GPU: record one with python tests/test_ratchet.py")
    assert case in record, "no entry: record one with python tests/test_ratchet.py"
    error = measure(case)
    assert error <= LIMIT * record[case], f"{error:.4g} is over {LIMIT} times {record[case]:.4g}"


def test_the_limit_notices_an_accumulator_in_bfloat16():
    dtype = torch.float16
    case = AttentionCase(B=2, T_q=200, T_k=200, H_kv=2, D=64, dtype=dtype)
    q, k, v = case.tensors()
    budget, _ = attention_budget(q, k, v)
    coarse = torch.zeros_like(budget.expected)
    S = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8
    P = S.masked_fill(torch.ones_like(S).triu(1).bool(), -torch.inf).softmax(-1)
    for n in range(0, 200, 16):  # as a flash kernel that keeps O in bfloat16 would
        tile = torch.einsum("bhij,bjhd->bihd", P[..., n : n + 16], v[:, n : n + 16].double())
        coarse = (coarse + tile).to(torch.bfloat16).double()
    recorded = json.loads(RECORD.read_text())
    name = str(dtype).removeprefix("torch.")
    limits = [e for c, e in recorded.items() if c.startswith("attention B2") and f" {name}," in c]
    assert limits
    assert rms(z_scores(coarse.to(dtype), budget)) > LIMIT * max(limits)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    entries = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    entries |= {case: float(f"{measure(case):.4g}") for case in CASES}
    RECORD.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
    print(f"recorded {len(CASES)} cases in {RECORD.name}")
