"""What planted faults (``tests/mutants``) got past the other tests: alignment, fences, offsets."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budget import assert_bitwise
from strategies import DEVICE, NAN, AttentionCase, normal

import ra_triton

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "ra_triton" / "kernels").glob("*.py"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_every_masked_load_says_what_masked_elements_hold(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            names = {keyword.arg for keyword in node.keywords}
            masked = len(node.args) > 1 or "mask" in names
            assert not masked or "other" in names, f"{path.name}:{node.lineno}"


def test_what_bulk_copies_and_wide_loads_may_read():
    from ra_triton.kernels.tiles import is_aligned

    t = torch.zeros(2, 3, 4, 16, dtype=torch.float16, device=DEVICE)
    flat = torch.zeros(2, 3 * 4 * 16 + 8, dtype=torch.float16, device=DEVICE)
    assert is_aligned(t)
    assert is_aligned(flat[:, 8:].view(2, 3, 4, 16))  # 16 bytes further, rows 8 elements apart
    assert is_aligned(t.as_strided((1, 3, 4, 16), (7, 64, 16, 1)))  # a stride that is never used
    assert not is_aligned(flat[:, 1:-7].view(2, 3, 4, 16))  # address
    assert not is_aligned(torch.zeros(2, 3, 4, 20, dtype=torch.float16, device=DEVICE))  # stride
    assert not is_aligned(t[:1].expand(2, 3, 4, 16))
    assert not is_aligned(t[:0])


def fenced(*shape, contiguous=False):
    """A tensor inside a buffer of ones, and that buffer with the tensor's elements blanked."""
    if contiguous:
        n = torch.Size(shape).numel()
        buffer = torch.ones(n + 4096, device=DEVICE)
        t = buffer[2048 : 2048 + n].view(shape)
    else:
        buffer = torch.ones([size + 40 for size in shape], device=DEVICE)
        t = buffer[tuple(slice(20, 20 + size) for size in shape)]
    t.fill_(NAN)

    def outside():
        return buffer.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(1.0), buffer

    return t, outside


def assert_fence_stands(outside):
    _, buffer = outside()
    assert_bitwise(buffer, torch.ones_like(buffer), "memory around an output")


@pytest.mark.parametrize(("T_q", "T_k", "D"), [(5, 7, 16), (35, 20, 20)])
def test_attention_writes_its_outputs_and_nothing_around_them(T_q, T_k, D):
    from ra_triton.kernels.attention_backward import attention_backward
    from ra_triton.kernels.attention_forward import attention_forward

    q, k, v = AttentionCase(2, T_q, T_k, 2, 2, D).tensors()
    options = {"causal": True, "softmax_scale": None}
    (o, o_fence), (lse, lse_fence) = (
        fenced(*shape, contiguous=True) for shape in (q.shape, (2, 4, T_q))
    )
    attention_forward(q, k, v, o=o, lse=lse, **options)
    grads, fences = zip(*(fenced(*t.shape) for t in (q, k, v)), strict=True)
    attention_backward(q, k, v, o, lse, torch.ones_like(o), *grads, **options)
    for t in (o, lse, *grads):
        assert not t.isnan().any()
    for fence in (o_fence, lse_fence, *fences):
        assert_fence_stands(fence)


@pytest.mark.parametrize(("T", "D"), [(5, 16), (35, 20)])
def test_project_writes_out_and_nothing_around_it(T, D):
    out, fence = fenced(2, T, 3, D, contiguous=True)
    x, W = normal(2, T, 24), normal(24, 3 * D, seed=1)
    ra_triton.project(x, W, 4, n_head=1, out=out, backend="triton")
    assert not out.isnan().any()
    assert_fence_stands(fence)


@pytest.mark.parametrize("backend", ra_triton.backend.BACKENDS)
def test_packing_more_key_heads_than_query_heads(backend):
    q, k, q_low, k_low = (
        normal(2, 19, H, lanes, seed=lanes + H) for H, lanes in ((1, 16), (3, 16), (3, 4), (1, 4))
    )
    q_pack, k_pack = ra_triton.pack_qk(q, k, q_low, k_low, backend=backend)
    assert_bitwise(q_pack, torch.cat((q[..., :12], k_low), -1))
    assert_bitwise(k_pack, torch.cat((k[..., :12], q_low), -1))


FAR_GRADIENTS = """
from ra_triton.kernels.attention_forward import attention_forward
from ra_triton.kernels.attention_backward import attention_backward

options = {"causal": False, "softmax_scale": None}

def gradients(T, far_do, far_grads):
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, T, 2, 16).half() for _ in range(4))
    o, lse = attention_forward(q, k, v, **options)
    grads = [torch.zeros_like(t) for t in (q, k, v)]
    if far_grads:
        grads = [spread(t, 1) for t in grads]
    attention_backward(q, k, v, o, lse, spread(do, 1) if far_do else do, *grads, **options)
    return grads

def compare(T, *where):
    for a, e in zip(gradients(T, *where), gradients(T, False, False)):
        assert a.isfinite().all()
        assert torch.equal(a, e), (a - e).abs().max()

"""


@pytest.mark.skipif(DEVICE.type == "cuda", reason="sparse buffers exist in CPU memory only")
@pytest.mark.parametrize(
    "where",
    ["3, True, False", "40, True, False", "40, False, True"],
    ids=["dO rows far apart", "dO tiles far apart", "tiles of the gradients far apart"],
)
def test_offsets_of_the_backward_beyond_two_to_the_thirty_first(where):
    from test_offsets import SCRIPT

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"{FAR_GRADIENTS}compare({where})"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr or f"killed by signal {-done.returncode}"
