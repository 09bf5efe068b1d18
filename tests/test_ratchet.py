"""Rule D: precision may not get worse. Run ``python tests/test_ratchet.py`` to record anew.

The committed number is the global RMS of error over budget for one fixed case; a correct kernel
varies by a few percent, and an accumulator in too small a dtype costs more than the limit.
"""

import json
from pathlib import Path

import conftest  # noqa: F401  sets the interpreter switch when this file runs as a script
import pytest
import torch
from budget import attention_budget, projection_budget, rms, z_scores
from strategies import BACKENDS, DEVICE, AttentionCase, ProjectionCase, dtypes_for

import ra_triton

LIMIT = 1.15
RECORD = Path(__file__).parent / "precision_ratchet.json"


def attention_error(backend: str, dtype: torch.dtype, causal: bool) -> float:
    case = AttentionCase(B=2, T_q=200, T_k=200, H_kv=2, D=64, dtype=dtype, causal=causal)
    tensors = case.tensors()
    out = ra_triton.packed_attention(*tensors, backend=backend, **case.options)
    return rms(z_scores(out, attention_budget(*tensors, **case.options)[0]))


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
    limits = [e for c, e in recorded.items() if c.startswith("attention") and f" {name}," in c]
    assert limits
    assert rms(z_scores(coarse.to(dtype), budget)) > LIMIT * max(limits)


if __name__ == "__main__":
    entries = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    entries |= {case: float(f"{measure(case):.4g}") for case in CASES}
    RECORD.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
    print(f"recorded {len(CASES)} cases in {RECORD.name}")
