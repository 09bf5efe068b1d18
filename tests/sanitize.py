"""Every kernel on eight small shapes, for NVIDIA's compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/sanitize.py

Numbers after the script's name choose among its shapes, so that several can run side by side.
Without PyTorch's caching each tensor is an allocation of its own, so that an access beside one is
seen. The kernels should be in Triton's cache: run the script once without the sanitizer first.
"""

import argparse

import conftest  # noqa: F401  puts the repository's root on the path
import torch
from torch import Tensor

import ra_triton
from ra_triton.call.offsets import Offsets
from ra_triton.kernels.attention.backward import attention_backward
from ra_triton.kernels.attention.forward import attention_forward
from ra_triton.kernels.tiles import TRITON_VERSION
from ra_triton.launch.configs import ONE_PASS, LaunchConfig, warp_specialised
from ra_triton.nn import KVCache

SHAPES = (  # B, T, H, H_kv, D
    (1, 1, 1, 1, 16),
    (2, 65, 2, 1, 20),
    (1, 130, 2, 2, 64),
    (2, 127, 4, 2, 72),
    (1, 200, 1, 1, 128),
    (3, 64, 2, 2, 32),
    (1, 300, 2, 1, 64),  # the last two: long enough for Hopper's own kernel
    (1, 260, 2, 2, 128),
)
C = 40  # channels


def main(chosen: list[int]) -> None:
    """All functions in all dtypes, with and without dropout."""
    for shape in [SHAPES[i] for i in chosen] or SHAPES:
        B, T, H, H_kv, D = shape
        heads = {"n_head": H, "n_kv_head": H_kv}
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for dropout_p in (0.0, 0.1):
                x = torch.randn(B, T, C, device="cuda", dtype=dtype, requires_grad=True)
                N = (H + 2 * H_kv) * D
                W = torch.randn(C, N, device="cuda", dtype=dtype, requires_grad=True)
                bias = torch.randn(N, device="cuda", dtype=dtype, requires_grad=True)
                out = ra_triton.ra_attention(
                    x, W, bias=bias, dropout_p=dropout_p, backend="triton", **heads
                )
                out.float().square().sum().backward()
                q, k, v = ra_triton.project(x, W, backend="triton", **heads)
                cut(q, k, v, dropout_p)
                of_hopper(q, k, v)
                one_pass(q, k, v)
                turn(q, k, W[0, :D].detach())
                with torch.no_grad():
                    quantize(x, W, bias, "int8" if dropout_p else "none", heads)
                    decode(q, k, v)
                torch.cuda.synchronize()
        print("B={} T={} H={} H_kv={} D={}: done".format(*shape), flush=True)


def cut(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> None:
    """A window under a cap, and sequences of different lengths."""
    options = {"dropout_p": dropout_p, "backend": "triton"}
    out = ra_triton.packed_attention(q, k, v, window_size=(33, 0), softcap=5.0, **options)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    ends = [0, len(q) // 3, len(q) // 3, len(q)]
    offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
    most = len(q) - len(q) // 3
    flat = ra_triton.packed_attention_varlen(q, k, v, offsets, offsets, most, most, **options)
    (out.float().square().sum() + flat.float().square().sum()).backward(retain_graph=True)


def of_hopper(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Hopper's own kernels, also in calls that do not take them by themselves."""
    D = q.shape[3]
    hopper = torch.cuda.get_device_capability() == (9, 0)
    if not hopper or q.dtype == torch.float32 or D not in ONE_PASS:
        return
    q, k, v = (t.detach() for t in (q, k, v))
    options = {"causal": True, "softmax_scale": None}
    config = warp_specialised(D, q.dtype, "sm_90", 1024, False, TRITON_VERSION)
    attention_forward(q, k, v, window_size=(33, 0), softcap=5.0, config=config, **options)
    o, lse = attention_forward(q, k, v, **options)
    grads = [torch.empty_like(t) for t in (q, k, v)]
    attention_backward(q, k, v, o, lse, o, *grads, config=ONE_PASS[D], **options)
    q, k, v = (t.flatten(0, 1)[None] for t in (q, k, v))
    T = q.shape[1]
    cu_seqlens = torch.tensor([0, T // 3, T // 3, T], dtype=torch.int32, device="cuda")
    options |= {"window_size": (99, 0), "offsets": Offsets(cu_seqlens, cu_seqlens, T, T)}
    o, lse = attention_forward(q, k, v, **options)
    grads = [torch.empty_like(t) for t in (q, k, v)]
    attention_backward(q, k, v, o, lse, o, *grads, config=ONE_PASS[D], **options)


def one_pass(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The plain backward of one pass, with this GPU's products."""
    if q.dtype == torch.float32 or q.shape[3] not in (64, 128):
        return
    q, k, v = (t.detach() for t in (q, k, v))
    config = LaunchConfig(64, 4, 2, block_n=64, one_pass=True)
    for causal in (True, False):
        options = {"causal": causal, "softmax_scale": None}
        o, lse = attention_forward(q, k, v, **options)
        grads = [torch.empty_like(t) for t in (q, k, v)]
        attention_backward(q, k, v, o, lse, o, *grads, config=config, **options)


def turn(q: Tensor, k: Tensor, weight: Tensor) -> None:
    """Lane exchange, norm and rotation, also beyond the table."""
    B, T, _, D = q.shape
    table = torch.rand(T + 3, D // 2, device="cuda")
    turned = ra_triton.pack_qk(
        *(q, k, k[..., :3], q[..., :3]),
        rope=(table, table),
        position=torch.arange(B, device="cuda") * 3,
        qk_norm=(weight.clone().requires_grad_(), weight),
        backend="triton",
    )
    sum(t.float().nansum() for t in turned).backward()


def quantize(x: Tensor, W: Tensor, bias: Tensor, activations: str, heads: dict[str, int]) -> None:
    """Projections from int8."""
    for which in ("all", "reciprocal"):
        W_int8 = ra_triton.quantize_weight(W, 4, which=which, activations=activations, **heads)
        ra_triton.project(x, W_int8, 4, bias=bias, backend="triton")


def decode(q: Tensor, k: Tensor, v: Tensor) -> None:
    """New tokens into a cache, and the last one's attention over it."""
    B, T, H_kv, D = k.shape
    cache = KVCache(B, T + 5, H_kv, D, dtype=k.dtype, device=k.device)
    for first in range(0, T, 16):
        tokens = slice(first, first + 16)
        cache.append(k[:, tokens], v[:, tokens], backend="triton")
    ra_triton.decode_attention(q[:, -1:], cache.k_pack, cache.v, cache.lengths, backend="triton")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shapes", nargs="*", type=int, help="indices; default all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here, and the sanitizer is for one")
    main(arguments.shapes)
