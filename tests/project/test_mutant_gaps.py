"""What planted faults (``tests/mutants``) got past the other tests.

Alignment, bulk copies, fences around outputs, offsets of the backward.
"""

import ast
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from budget import assert_bitwise, assert_projection_close
from gradient_budget import (
    attention_gradient_budgets,
    check_gradients,
    projection_gradient_budgets,
)
from strategies import DEVICE, NAN, AttentionCase, ProjectionCase, normal, quick

import ra_triton
from ra_triton.launch.configs import LaunchConfig

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "ra_triton" / "kernels").glob("*.py"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_every_masked_load_says_what_masked_elements_hold(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            names = {keyword.arg for keyword in node.keywords}
            masked = len(node.args) > 1 or "mask" in names
            assert not masked or "other" in names, f"{path.name}:{node.lineno}"


def test_what_bulk_copies_and_wide_loads_may_read():
    from ra_triton.kernels import tiles
    from ra_triton.launch import plans

    def is_aligned(t):
        return tiles.is_aligned(plans.layout_of(t), t.dtype)

    t = torch.zeros(2, 3, 4, 16, dtype=torch.float16, device=DEVICE)
    flat = torch.zeros(2, 3 * 4 * 16 + 8, dtype=torch.float16, device=DEVICE)
    assert is_aligned(t)
    assert is_aligned(flat[:, 8:].view(2, 3, 4, 16))  # 16 bytes further, rows 8 elements apart
    assert not is_aligned(flat[:, 1:-7].view(2, 3, 4, 16))  # address
    assert not is_aligned(torch.zeros(2, 3, 4, 20, dtype=torch.float16, device=DEVICE))  # stride
    assert not is_aligned(t[:1].expand(2, 3, 4, 16))
    assert not is_aligned(t[:0])


def with_and_without_bulk_copies(run, **tiles):
    """Results with pointers and with tensor descriptors, which the interpreter has too."""
    expected, actual = (run(LaunchConfig(num_warps=4, use_tma=t, **tiles)) for t in (False, True))
    for a, e in zip(actual, expected, strict=True):
        assert_bitwise(a, e)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="Hopper alone has bulk copies")
@pytest.mark.parametrize(("T_q", "T_k"), quick([(5, 37), (40, 40), (37, 5)]))
@pytest.mark.parametrize(("D", "causal"), [(32, True), (20, False)])
def test_attention_reads_the_same_through_bulk_copies(T_q, T_k, D, causal):
    from ra_triton.kernels.attention.backward import attention_backward
    from ra_triton.kernels.attention.forward import attention_forward

    layouts = ("fused", "head_major", "transposed")
    q, k, v = AttentionCase(2, T_q, T_k, 2, 2, D, layouts=layouts).tensors()

    def run(config):
        options = {"causal": causal, "softmax_scale": None, "config": config}
        out, lse = attention_forward(q, k, v, **options)
        grads = [torch.empty_like(t) for t in (q, k, v)]
        attention_backward(q, k, v, out, lse, normal(*q.shape, seed=9), *grads, **options)
        return out, lse, *grads

    with_and_without_bulk_copies(run, block_m=32, block_n=16)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="Hopper alone has bulk copies")
@pytest.mark.parametrize("tokens", quick([35, 2100]))  # the latter in two splits
def test_projection_reads_the_same_through_bulk_copies(tokens):
    from ra_triton.kernels.projection.backward import weight_gradient
    from ra_triton.kernels.projection.forward import projection

    x, W, dy = normal(1, tokens, 40), normal(40, 60, seed=1), normal(1, tokens, 60, seed=2)

    def run(config):
        # The interpreter's product may have other bits where a tile of w arrives transposed.
        transposed = projection(x, W.mT.contiguous().mT, None, config=config)
        assert_projection_close(transposed, x, W)
        return projection(x, W, None, config=config), weight_gradient(x, dy, config=config)

    with_and_without_bulk_copies(run, block_m=32, block_n=16, block_k=32)


def fenced(*shape, contiguous=False):
    """A tensor of NaN inside a buffer of ones, and that buffer."""
    if contiguous:
        n = torch.Size(shape).numel()
        buffer = torch.ones(n + 4096, device=DEVICE)
        t = buffer[2048 : 2048 + n].view(shape)
    else:
        buffer = torch.ones([size + 40 for size in shape], device=DEVICE)
        t = buffer[tuple(slice(20, 20 + size) for size in shape)]
    return t.fill_(NAN), buffer


def assert_written_alone(t, buffer):
    """All of the tensor was written, and nothing around it."""
    assert not t.isnan().any()
    t.fill_(1.0)
    assert_bitwise(buffer, torch.ones_like(buffer), "memory around an output")


@pytest.mark.parametrize(("T_q", "T_k", "D"), [(5, 7, 16), (35, 20, 20)])
def test_attention_writes_its_outputs_and_nothing_around_them(T_q, T_k, D):
    from ra_triton.kernels.attention.backward import attention_backward
    from ra_triton.kernels.attention.forward import attention_forward

    q, k, v = AttentionCase(2, T_q, T_k, 2, 2, D).tensors()
    options = {"causal": True, "softmax_scale": None}
    outs = [fenced(*shape, contiguous=True) for shape in (q.shape, (2, 4, T_q))]
    (o, _), (lse, _) = outs
    attention_forward(q, k, v, o=o, lse=lse, **options)
    grads = [fenced(*t.shape) for t in (q, k, v)]
    attention_backward(q, k, v, o, lse, torch.ones_like(o), *(t for t, _ in grads), **options)
    for t, buffer in (*outs, *grads):
        assert_written_alone(t, buffer)


@pytest.mark.parametrize(("T", "D"), [(5, 16), (35, 20)])
def test_project_writes_out_and_nothing_around_it(T, D):
    out, buffer = fenced(2, T, 3, D, contiguous=True)
    x, W = normal(2, T, 24), normal(24, 3 * D, seed=1)
    ra_triton.project(x, W, 4, n_head=1, out=out, backend="triton")
    assert_written_alone(out, buffer)


@pytest.mark.parametrize("backend", ra_triton.backend.BACKENDS)
def test_packing_more_key_heads_than_query_heads(backend):
    q, k, q_low, k_low = (
        normal(2, 19, H, lanes, seed=lanes + H) for H, lanes in ((1, 16), (3, 16), (3, 4), (1, 4))
    )
    q_pack, k_pack = ra_triton.pack_qk(q, k, q_low, k_low, backend=backend)
    assert_bitwise(q_pack, torch.cat((q[..., :12], k_low), -1))
    assert_bitwise(k_pack, torch.cat((k[..., :12], q_low), -1))


@pytest.mark.parametrize("layout", quick(["sliced", "head_major"]))
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "dO"])
def test_gradients_with_one_operand_in_another_layout(which, layout):
    layouts = ["contiguous"] * 4
    layouts[which] = layout
    case = AttentionCase(2, 20, 20, 2, 2, layouts=tuple(layouts[:3]))
    tensors, do = case.tensors(), case.gradient(layouts[3])
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = ra_triton.packed_attention(*leaves, backend="triton")
    grads = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, do), strict=True))
    budgets = attention_gradient_budgets(*tensors, do)
    check_gradients(grads, budgets, dtype=case.dtype, case=f"{case}, dO {layouts[3]}")


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_gradients_of_a_projection_with_x_in_another_layout(layout):
    case = ProjectionCase(2, 37, 40, weight_layout="packed", layouts=(layout, "contiguous"))
    x, W, _ = case.tensors()
    leaves = [t.detach().requires_grad_() for t in (x, W)]
    packed = ra_triton.project(*leaves, **case.heads, weight_layout="packed", backend="triton")
    dy = normal(2, 37, case.columns, seed=9)
    y = torch.cat(packed, 2).flatten(2)
    grads = dict(zip(("dx", "dW"), torch.autograd.grad(y, leaves, dy), strict=True))
    check_gradients(grads, projection_gradient_budgets(x, W, dy), dtype=case.dtype, case=case)


def test_a_gradient_of_the_projection_in_another_layout():
    """Behind the public functions: their views always send contiguous gradients."""
    from ra_triton.backend.triton import operators

    x, W = normal(2, 9, 24).requires_grad_(), normal(24, 48, seed=1).requires_grad_()
    y, dy = operators.project((x, W, None), ()), normal(2, 9, 48, seed=2)
    apart = torch.stack((dy, torch.full_like(dy, NAN)), -1)[..., 0]
    expected = torch.autograd.grad(y, (x, W), dy, retain_graph=True)
    for a, e in zip(torch.autograd.grad(y, (x, W), apart), expected, strict=True):
        assert_bitwise(a, e)


def test_splits_share_out_all_rows():
    from ra_triton.kernels.projection.backward import MAX_SPLITS, PROGRAMS, _splits

    for rows in (1, 31, 1024, 1025, 2100, 5000, 8192, 100_000):
        for multiple, tiles in product((16, 32, 64), (1, 12, 18, 100, 256, 257, 1000)):
            splits, split_rows = _splits(rows, multiple, tiles)
            assert 1 <= splits <= MAX_SPLITS
            assert splits * tiles <= max(PROGRAMS, tiles)
            assert split_rows % multiple == 0
            assert (splits - 1) * split_rows < rows <= splits * split_rows
    assert _splits(8192, 64, 36)[0] == PROGRAMS // 36  # as many as fill the GPU


def test_float32_products_are_ieee_unless_pytorch_allows_tf32():
    from ra_triton.kernels.tiles import dot_precision

    before = torch.get_float32_matmul_precision()
    precisions = {}
    try:
        for allowed in ("highest", "high"):
            torch.set_float32_matmul_precision(allowed)
            precisions[allowed] = [dot_precision(t) for t in (torch.float32, torch.float16)]
    finally:
        torch.set_float32_matmul_precision(before)
    assert precisions == {"highest": ["ieee", "ieee"], "high": ["tf32", "ieee"]}


def test_pack_qk_is_differentiable_on_triton_too():
    inputs = [normal(2, 5, 2, lanes, seed=i) for i, lanes in enumerate((16, 16, 4, 4))]
    results = []
    for backend in ("triton", "sdpa"):
        leaves = [t.detach().requires_grad_() for t in inputs]
        packed = ra_triton.pack_qk(*leaves, backend=backend)
        results.append(torch.autograd.grad(packed, leaves, [2 * t.detach() for t in packed]))
    for a, b in zip(*results, strict=True):
        assert_bitwise(a, b)


FAR = """
from ra_triton.kernels.attention.forward import attention_forward
from ra_triton.kernels.attention.backward import attention_backward
from ra_triton.kernels.projection.backward import weight_gradient

def odd(dim):
    '3 rows that far apart in one dim, and at no multiple of 16 bytes: offsets count elements.'
    shape = [3 if d == dim else 2 for d in range(3)] + [16]
    t = torch.randn(shape).half()
    strides = list(t.stride())
    strides[dim] = 2**30 + 2**20 + 1
    flat = torch.empty(2 * strides[dim] + t.numel() + 1, dtype=t.dtype)
    return flat.as_strided(shape, strides).copy_(t)

def odd_attention(dim):
    check(
        lambda q, k, v: [ra_triton.packed_attention(q, k, v, backend="triton")],
        *(odd(dim) for _ in range(3)),
    )

def weight(dim, *shape):
    g = torch.randn(*shape[:2], 16).half()
    check(lambda x: [weight_gradient(x, g)], far(dim, *shape))

def gradients(T, far_do=False, far_grads=False):
    options = {"causal": False, "softmax_scale": None}
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, T, 2, 16).half() for _ in range(4))
    o, lse = attention_forward(q, k, v, **options)
    grads = [torch.zeros_like(t) for t in (q, k, v)]
    if far_grads:
        grads = [spread(t, 1) for t in grads]
    attention_backward(q, k, v, o, lse, spread(do, 1) if far_do else do, *grads, **options)
    return grads

def backward(T, **where):
    for a, e in zip(gradients(T, **where), gradients(T)):
        assert a.isfinite().all()
        assert torch.equal(a, e), (a - e).abs().max()

"""
FAR_CASES = {
    "attention with a long odd batch stride": "odd_attention(0)",
    "attention with a long odd head stride": "odd_attention(2)",
    "backward with rows of dO far apart": "backward(3, far_do=True)",
    "backward with tiles of dO far apart": "backward(40, far_do=True)",
    "backward with tiles of the gradients far apart": "backward(40, far_grads=True)",
    "weight gradient of one batch element with a long token stride": "weight(1, 1, 3, 8)",
    "weight gradient with a long token stride": "weight(1, 2, 3, 8)",
    "weight gradient with a long batch stride": "weight(0, 3, 2, 8)",
}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="sparse buffers exist in CPU memory only")
@pytest.mark.parametrize("case", quick(FAR_CASES))
def test_further_offsets_beyond_two_to_the_thirty_first(case):
    from test_offsets import SCRIPT

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, FAR + FAR_CASES[case]],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr or f"killed by signal {-done.returncode}"


@pytest.mark.gpu
def test_outputs_of_more_than_two_to_the_thirty_one_elements():
    """No sparse buffer helps here: outputs are contiguous, so every element is computed."""
    half = {"dtype": torch.float16}
    tensors = [normal(1, 512, 64, 128, seed=seed, **half) for seed in range(3)]

    def repeated(B):
        return ra_triton.packed_attention(
            *(t.expand(B, -1, -1, -1) for t in tensors), backend="triton"
        )

    B, expected = 2**31 // tensors[0].numel() + 3, repeated(2)[:1]
    out = repeated(B)
    assert out.numel() > 2**31
    for b in (0, B - 2, B - 1):
        assert_bitwise(out[b : b + 1], expected)
    del out

    x, W = normal(1, 40_000, 16, **half), normal(16, 3 * 160 * 128, seed=1, **half)
    options = {"n_head": 160, "weight_layout": "packed", "backend": "triton"}
    v = ra_triton.project(x, W, **options)[2]
    assert v.stride(1) * x.shape[1] > 2**31
    assert_bitwise(v[:, -300:], ra_triton.project(x[:, -300:], W, **options)[2])
