"""Offsets beyond 2³¹ elements: sparse views of huge CPU buffers, in a process of their own.

The interpreter wraps 32-bit offsets as a GPU does, and a wrapped one crashes or reads elsewhere.
The operating system backs only the pages that are touched.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from strategies import DEVICE, quick

SCRIPT = """
import sys, torch, ra_triton

def spread(t, dim):
    '''t at a stride such that the last rows, and the last tile of 16, lie beyond int32.'''
    n = t.shape[dim]
    strides = list(t.stride())
    strides[dim] = 2**31 // (2 if n == 3 else n - 8) + 2**20
    flat = torch.empty((n - 1) * strides[dim] + t.numel() + 1, dtype=t.dtype)  # a few pages used
    return flat.as_strided(t.shape, strides).copy_(t)

def far(dim, *shape):
    return spread(torch.randn(shape).half(), dim)

def check(function, *tensors):
    actual = function(*tensors)
    expected = function(*(t.contiguous() for t in tensors))
    for a, e in zip(actual, expected):
        assert a.isfinite().all()
        assert torch.equal(a, e), (a - e).abs().max()

def attention(dim, n=3):
    check(
        lambda q, k, v: [ra_triton.packed_attention(q, k, v, backend="triton")],
        *(far(dim, *(n if d == dim else 2 for d in range(3)), 16) for _ in range(3)),
    )

def projection(dim):
    W = torch.randn(8, 48).half()
    check(
        lambda x: ra_triton.project(x, W, n_head=1, backend="triton"),
        far(dim, *(3 if d == dim else 2 for d in range(2)), 8),
    )

def int8():
    options = {"n_head": 1, "which": "reciprocal", "activations": "int8"}
    W = ra_triton.quantize_weight(torch.randn(8, 48).half(), 4, **options)
    for dim in (0, 1):
        x = far(dim, *(3 if d == dim else 2 for d in range(2)), 8)
        check(lambda x: ra_triton.project(x, W, backend="triton"), x)

def weight(n=3):
    x = torch.randn(1, 2, n).half()
    check(
        lambda W: ra_triton.project(
            x, W, n_head=1, weight_layout="packed", backend="triton"
        ),
        far(0, n, 48),
    )

def packing(dim):
    q, k = (far(dim, *(3 if d == dim else 2 for d in range(3)), 16) for _ in range(2))
    low = [far(dim, *q.shape[:3], 4) for _ in range(2)]
    check(lambda *args: ra_triton.pack_qk(*args, backend="triton"), q, k, *low)
    expected = ra_triton.pack_qk(*(t.contiguous() for t in (q, k, *low)), backend="triton")
    for a, e in zip(ra_triton.pack_qk_(q, k, *low, backend="triton"), expected):
        assert torch.equal(a, e)

exec(sys.argv[1])
"""

CASES = {
    "attention with a long batch stride": "attention(0)",
    "attention with a long token stride": "attention(1)",
    "attention with a long head stride": "attention(2)",
    "attention over tiles far apart": "attention(1, 40)",
    "projection with a long batch stride": "projection(0)",
    "projection with a long token stride": "projection(1)",
    "int8 projection with long strides of x": "int8()",
    "projection with long weight rows": "weight()",
    "projection with weight tiles far apart": "weight(40)",
    "packing with a long batch stride": "packing(0)",
    "packing with a long token stride": "packing(1)",
    "packing with a long head stride": "packing(2)",
}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="sparse buffers exist in CPU memory only")
@pytest.mark.parametrize("case", quick(CASES, 2))
def test_offsets_beyond_two_to_the_thirty_first(case):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, CASES[case]],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr or f"killed by signal {-done.returncode}"
