"""Forward and backward on six small shapes, for NVIDIA's compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/sanitize.py

Numbers after the script's name choose among its shapes, so that several can run side by side.
Without PyTorch's caching each tensor is an allocation of its own, so that an access beside one is
seen. The kernels should be in Triton's cache: run the script once without the sanitizer first.
"""

import sys

import torch

import ra_triton

SHAPES = (  # B, T, H, H_kv, D
    (1, 1, 1, 1, 16),
    (2, 65, 2, 1, 20),
    (1, 130, 2, 2, 64),
    (2, 127, 4, 2, 72),
    (1, 200, 1, 1, 128),
    (3, 64, 2, 2, 32),
)


def main(chosen: list[int]) -> None:
    """One forward and backward a shape, dtype and dropout rate."""
    for B, T, H, H_kv, D in [SHAPES[i] for i in chosen] or SHAPES:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for dropout_p in (0.0, 0.1):
                C, N = 40, (H + 2 * H_kv) * D
                x = torch.randn(B, T, C, device="cuda", dtype=dtype, requires_grad=True)
                W = torch.randn(C, N, device="cuda", dtype=dtype, requires_grad=True)
                bias = torch.randn(N, device="cuda", dtype=dtype, requires_grad=True)
                out = ra_triton.ra_attention(
                    x,
                    W,
                    n_head=H,
                    n_kv_head=H_kv,
                    bias=bias,
                    dropout_p=dropout_p,
                    backend="triton",
                )
                out.float().square().sum().backward()
                q, k, _ = ra_triton.project(x, W, n_head=H, n_kv_head=H_kv, backend="triton")
                table, weight = torch.rand(T + 3, D // 2, device="cuda"), W[0, :D].detach()
                turned = ra_triton.pack_qk(
                    *(q, k, k[..., :3], q[..., :3]),
                    rope=(table, table),
                    position=torch.arange(B, device="cuda") * 3,  # also beyond the table
                    qk_norm=(weight.clone().requires_grad_(), weight),
                    backend="triton",
                )
                sum(t.float().nansum() for t in turned).backward()
                for which in ("all", "reciprocal"):
                    with torch.no_grad():
                        heads = {"n_head": H, "n_kv_head": H_kv}
                        W_int8 = ra_triton.quantize_weight(
                            W, 4, which=which, activations="int8" if dropout_p else "none", **heads
                        )
                        ra_triton.project(x, W_int8, 4, bias=bias, backend="triton")
                torch.cuda.synchronize()
        print(f"B={B} T={T} H={H} H_kv={H_kv} D={D}: done", flush=True)


if __name__ == "__main__":
    main([int(index) for index in sys.argv[1:]])
