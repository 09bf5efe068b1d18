"""Tensors whose other pieces are in other processes: DTensors, and ``context_parallel``."""

import pytest
import torch
import torch.distributed as dist
from strategies import DEVICE, backends, normal

import ra_triton
from ra_triton import checks
from ra_triton.launch import recorded
from ra_triton.nn import KVCache

if not dist.is_available():
    pytest.skip("this build has no torch.distributed", allow_module_level=True)

B, T, H, D, C, R = 2, 4, 2, 16, 24, 4


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(DEVICE.type, (1,))
    dist.destroy_process_group()


def operands():
    return [normal(B, T, H, D, seed=seed) for seed in range(3)]


def lengths():
    return torch.full((B,), T, dtype=torch.int32, device=DEVICE)


CALLS = {
    "ra_attention": lambda d, o: ra_triton.ra_attention(
        d(normal(B, T, C)), normal(C, 3 * H * D), R, n_head=H, **o
    ),
    "weight": lambda d, o: ra_triton.ra_attention(
        normal(B, T, C), d(normal(C, 3 * H * D)), R, n_head=H, **o
    ),
    "packed_attention": lambda d, o: ra_triton.packed_attention(*map(d, operands()), **o),
    "varlen": lambda d, o: ra_triton.packed_attention_varlen(
        *(d(t.flatten(0, 1)) for t in operands()), *[lengths().cumsum(0).int()] * 2, T, T,
        check=False, **o,
    ),
    "decode": lambda d, o: ra_triton.decode_attention(*map(d, operands()), lengths(), **o),
    "project": lambda d, o: ra_triton.project(
        d(normal(B, T, C)), normal(C, 3 * H * D), R, n_head=H, **o
    ),
    "pack_qk": lambda d, o: ra_triton.pack_qk(*map(d, (*operands(), operands()[0])), **o),
    "pack_qk_": lambda d, o: ra_triton.pack_qk_(*map(d, (*operands(), operands()[0])), **o),
    "append": lambda d, o: KVCache(B, 8, H, D, device=DEVICE).append(*map(d, operands()[1:]), **o),
}  # fmt: skip
ATTENTION = ("ra_attention", "weight", "packed_attention", "varlen", "decode")


@pytest.mark.parametrize("call", CALLS)
def test_the_kernels_refuse_dtensors_and_name_local_tensors(mesh, call):
    from torch.distributed.tensor import Replicate, distribute_tensor

    def distribute(t):
        return distribute_tensor(t, mesh, [Replicate()])

    backends = ["triton"]
    if call in ATTENTION and DEVICE.type == "cpu":
        backends += ["sdpa", "flex", "auto"]  # PyTorch's own has DTensors on a GPU
    for backend in backends:
        with pytest.raises(NotImplementedError, match=r"to_local"):
            CALLS[call](distribute, {"backend": backend})
    CALLS[call](lambda t: distribute(t).to_local(), {"backend": "triton"})


@backends
def test_attention_inside_context_parallel_is_refused(mesh, backend, monkeypatch):
    from torch.distributed.tensor.experimental import context_parallel

    monkeypatch.setattr(recorded, "DEVICE", DEVICE.type)
    x, W = normal(B, T, C), normal(C, 3 * H * D)
    options = {"backend": backend}

    def layer():
        return ra_triton.ra_attention(x, W, R, n_head=H, weight_layout="packed", **options)

    for _ in range(2):
        layer()  # known
    q, k, v = operands()
    compiled = torch.compile(
        lambda *t: ra_triton.packed_attention(*t, **options), backend="eager", fullgraph=True
    )
    if backend == "triton":
        compiled(q, k, v)
    with context_parallel(mesh, buffers=[q.clone()], buffer_seq_dims=[1]):
        for call in ATTENTION:
            with pytest.raises(NotImplementedError, match="context_parallel"):
                CALLS[call](lambda t: t, options)
        with pytest.raises(NotImplementedError, match="context_parallel"):
            layer()
        if backend == "triton":
            with pytest.raises(NotImplementedError, match="context_parallel"):
                compiled(q, k, v)
        ra_triton.project(x, W, R, n_head=H, **options)  # token by token
    layer()


def test_another_replacement_of_pytorchs_attention_is_none_of_ours(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *t: None)
    checks.refuse_context_parallel()
