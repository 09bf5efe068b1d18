"""What only a device can show: every shipped config, TF32, streams, graphs, devices, recompiles.

With a GPU the rest of the suite runs on it too, bfloat16 included.
"""

import itertools

import pytest
import torch
from budget import assert_attention_close, assert_bitwise, assert_projection_close
from gradient_budget import attention_gradient_budgets, check_gradients
from strategies import normal

import ra_triton
from ra_triton.nn import RACausalSelfAttention

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LENGTHS = (1, 63, 64, 127, 128, 129, 300, 1000)


def fused_qkv(B, T, H, D, dtype, offset=0):
    """Views of one projection buffer, ``offset`` elements away from an aligned address."""
    flat = normal(B * T * 3 * H * D + offset, dtype=dtype)
    return flat[offset:].view(B, T, 3, H, D).unbind(2)


@pytest.mark.parametrize("offset", [0, 1])  # bulk copies, and loads of single elements
@pytest.mark.parametrize("D", [16, 20, 32, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_attention_config_passes_the_gate(dtype, D, offset):
    for T, causal in itertools.product(LENGTHS, (True, False)):  # which share what is compiled
        q, k, v = fused_qkv(2, T, 3, D, dtype, offset)
        out, lse = ra_triton.packed_attention(
            q, k, v, causal=causal, return_lse=True, backend="triton"
        )
        assert_attention_close(out, q, k, v, lse=lse, causal=causal)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("D", [16, 20, 32, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gradient_config_passes_the_gate(dtype, D, offset):
    for T, causal in itertools.product(LENGTHS, (True, False)):  # which share what is compiled
        tensors = [t.detach().requires_grad_() for t in fused_qkv(2, T, 3, D, dtype, offset)]
        out = ra_triton.packed_attention(*tensors, causal=causal, backend="triton")
        do = normal(*out.shape, dtype=dtype, seed=9)
        grads = torch.autograd.grad(out, tensors, do)
        grads = dict(zip(("dq", "dk", "dv"), grads, strict=True))
        budgets = attention_gradient_budgets(*tensors, do, causal=causal)
        check_gradients(grads, budgets, dtype=dtype, case=f"D={D} T={T} causal={causal}")


@pytest.mark.parametrize("C", [16, 72, 770, 768])
@pytest.mark.parametrize("T", [1, 127, 129, 500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_projection_config_passes_the_gate(dtype, T, C):
    x, W = normal(2, T, C, dtype=dtype), normal(C, 3 * 192, dtype=dtype, seed=1, scale=C**-0.5)
    for weight in (W, W.mT.contiguous().mT):
        packed = ra_triton.project(x, weight, 4, n_head=3, weight_layout="packed", backend="triton")
        y = torch.stack(packed, dim=2).flatten(2)
        assert_projection_close(y, x, weight)


def test_float32_products_are_ieee_unless_pytorch_allows_tf32():
    q, k, v = fused_qkv(1, 256, 4, 64, torch.float32)
    before = torch.get_float32_matmul_precision()
    exact = ra_triton.packed_attention(q, k, v, backend="triton")
    assert_attention_close(exact, q, k, v)
    try:
        torch.set_float32_matmul_precision("high")
        rounded = ra_triton.packed_attention(q, k, v, backend="triton")
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(rounded, exact)
    with pytest.raises(AssertionError, match=r"max\|z\|"):
        assert_attention_close(rounded, q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_repeats_give_the_same_bits_under_load(dtype):
    x, W = normal(4, 300, 384, dtype=dtype), normal(384, 1152, dtype=dtype, scale=384**-0.5)
    x.requires_grad_()
    W.requires_grad_()
    ballast, load = torch.randn(2048, 2048, device=x.device), torch.cuda.Stream()

    def run():
        out = ra_triton.ra_attention(x, W, backend="triton")
        return out.detach(), *torch.autograd.grad(out.square().sum(), (x, W))

    first = run()
    for _ in range(100):
        with torch.cuda.stream(load):
            ballast @ ballast
        for again, expected in zip(run(), first, strict=True):
            assert_bitwise(again, expected)


def test_calls_run_on_the_current_stream():
    x, W = normal(4, 512, 384), normal(384, 1152, scale=384**-0.5)
    expected = ra_triton.ra_attention(x, W, backend="triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        out = ra_triton.ra_attention(late, W, backend="triton")
    side.synchronize()
    assert_bitwise(out, expected)


def test_a_captured_graph_replays_on_new_data():
    x, W = normal(2, 200, 384), normal(384, 1152, scale=384**-0.5)
    ra_triton.ra_attention(x, W, backend="triton")  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ra_triton.ra_attention(x, W, backend="triton")
    for seed in range(3):
        x.copy_(normal(*x.shape, seed=seed))
        graph.replay()
        assert_bitwise(out, ra_triton.ra_attention(x, W, backend="triton"))


def graphed_layer():
    """A module in training, its input, and a gradient of its output."""
    layer = RACausalSelfAttention(256, 4).to("cuda", torch.bfloat16)
    x, dout = (normal(2, 200, 256, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    return layer, x.requires_grad_(), dout


def step(layer, x, dout):
    """``(out, dx, *parameter gradients)``."""
    out = layer(x)
    return out.detach(), *torch.autograd.grad(out, (x, *layer.parameters()), dout)


def test_a_captured_training_step_replays_on_new_data():
    layer, x, dout = graphed_layer()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(layer, x, dout)  # compiles before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, x, dout)
    for seed in range(3):
        with torch.no_grad():
            x.copy_(normal(*x.shape, dtype=x.dtype, seed=seed))
        graph.replay()
        for replayed, expected in zip(captured, step(layer, x, dout), strict=True):
            assert_bitwise(replayed, expected)


def test_a_capture_allocates_what_the_results_need_and_replays_allocate_nothing():
    layer, x, dout = graphed_layer()
    graph = torch.cuda.CUDAGraph()
    step(layer, x, dout)
    with torch.cuda.graph(graph):
        step(layer, x, dout)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        graph.replay()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_replays_of_a_graph_with_dropout_draw_new_masks():
    x = normal(2, 200, 256)
    W = normal(256, 768, scale=256**-0.5)

    def run():
        return ra_triton.ra_attention(x, W, n_head=4, dropout_p=0.5, backend="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)


def test_graphed_callables_train_like_the_module():
    layer, x, dout = graphed_layer()
    expected = step(layer, x, dout)
    graphed = torch.cuda.make_graphed_callables(layer, (x,))
    out = graphed(x)
    actual = (out.detach(), *torch.autograd.grad(out, (x, *layer.parameters()), dout))
    for a, e in zip(actual, expected, strict=True):
        assert_bitwise(a, e)


def test_reduce_overhead_gives_the_eager_bits():
    x = normal(2, 200, 256, dtype=torch.bfloat16)
    W = normal(256, 768, scale=256**-0.5, dtype=torch.bfloat16)

    def layer(x):
        return ra_triton.ra_attention(x, W, n_head=4, backend="triton")

    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(3):  # warm-up, capture, replay
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(x).clone()
    assert_bitwise(out, layer(x))


def test_new_lengths_do_not_recompile():
    from ra_triton.kernels.attention.forward import _attention_forward_kernel as kernel

    def variants():
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    for T in (160, 161):  # a multiple of 16, and not
        ra_triton.packed_attention(*fused_qkv(3, T, 4, 64, torch.float16), backend="triton")
    before = variants()
    for T in (33, 48, 127, 512, 1000, 1008):
        ra_triton.packed_attention(*fused_qkv(3, T, 4, 64, torch.float16), backend="triton")
    assert variants() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_launches_on_the_tensors_device_whichever_is_current():
    x, W = normal(2, 100, 384), normal(384, 1152, scale=384**-0.5)
    expected = ra_triton.ra_attention(x, W, backend="triton")
    out = ra_triton.ra_attention(x.to("cuda:1"), W.to("cuda:1"), backend="triton")
    assert out.device.index == 1
    assert_bitwise(out.to(expected.device), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 128])
def test_the_logsumexp_does_not_drift_with_the_number_of_key_tiles(D, dtype):
    """A fused multiply-add once made 2^(c m - c m) something else than 1, key tile by key tile."""
    q = normal(2, 64, 6, D, dtype=dtype)
    k, v = (normal(2, 4096, 2, D, dtype=dtype, seed=seed) for seed in (1, 2))
    options = {"causal": False, "softmax_scale": 0.37}
    out, lse = ra_triton.packed_attention(q, k, v, return_lse=True, backend="triton", **options)
    assert_attention_close(out, q, k, v, lse=lse, **options)


def test_offsets_beyond_two_to_the_thirty_one():
    B, T, H, D = 3, 8192, 16, 128
    buffer = torch.zeros(B, 174_800, 3, H, D, dtype=torch.float16, device="cuda")  # 6.4 GB
    q, k, v = buffer[:, -T:].unbind(2)
    for t, seed in zip((q, k, v), range(3), strict=True):
        t[-1, :512] = normal(512, H, D, dtype=torch.float16, seed=seed)
    assert (B - 1) * buffer.stride(0) > 2**31
    out = ra_triton.packed_attention(q, k, v, backend="triton")
    alone = [
        t[-1:].contiguous() for t in (q, k, v)
    ]  # as long: another length may be another kernel
    expected = ra_triton.packed_attention(*alone, backend="triton")
    assert_bitwise(out[-1:], expected)
