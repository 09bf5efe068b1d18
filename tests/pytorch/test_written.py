"""What is written in place: autograd has to notice, on every backend and through every view."""

import pytest
import torch
from budget import assert_bitwise
from strategies import DEVICE, backends, normal

import ra_triton
from ra_triton.nn import KVCache

B, T, H, D, R = 2, 3, 2, 16, 4
TABLES = tuple(normal(T, D // 2, seed=seed) for seed in (7, 8))


def pack(buffer, backend):
    q, k = buffer[:, :, 0], buffer[:, :, 1]
    low = normal(B, T, H, R, seed=5)
    ra_triton.pack_qk_(q, k, low, low, backend=backend)


def turn(buffer, backend):
    ra_triton.pack_qk_(buffer[:, :, 0], buffer[:, :, 1], rope=TABLES, backend=backend)


def project(buffer, backend):
    x, W = normal(B, T, 8, seed=2), normal(8, 3 * H * D, seed=3)
    ra_triton.project(x, W, R, n_head=H, out=buffer.view(B, T, 3 * H, D), backend=backend)


def project_int8(buffer, backend):
    x, W = normal(B, T, 8, seed=2), normal(8, 3 * H * D, seed=3)
    weight = ra_triton.quantize_weight(W, R, n_head=H, which="reciprocal")
    ra_triton.project(x, weight, R, out=buffer.view(B, T, 3 * H, D), backend=backend)


writers = pytest.mark.parametrize("write", [pack, turn, project, project_int8])


@backends
@writers
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("part", ["buffer", "view"])
def test_a_saved_tensor_that_is_overwritten_makes_backward_raise(backend, write, context, part):
    buffer = normal(B, T, 3, H, D)
    saved = buffer if part == "buffer" else buffer[:, 1:, 0]
    weight = normal(1, seed=4).requires_grad_()
    loss = (saved * weight).sum()
    before = buffer.clone()
    with context():
        write(buffer, backend)
    assert not torch.equal(buffer, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@backends
@torch.no_grad()
def test_a_cache_that_is_appended_to(backend):
    cache = KVCache(B, 8, H, D, device=DEVICE)
    tensors = cache.k_pack, cache.v, cache.lengths
    before = [t._version for t in tensors]
    cache.append(*(normal(B, T, H, D, seed=seed) for seed in range(2)), backend=backend)
    assert all(t._version > version for t, version in zip(tensors, before, strict=True))


@backends
@writers
def test_tensors_born_in_inference_mode_have_no_version_and_are_written(backend, write):
    with torch.inference_mode():
        buffer = normal(B, T, 3, H, D)
        write(buffer, backend)
    plain = normal(B, T, 3, H, D)
    with torch.no_grad():
        write(plain, backend)
    assert_bitwise(buffer, plain)
