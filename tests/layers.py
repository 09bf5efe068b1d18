"""Small attention layers with drawn parameters, and float32 bounds for what they compute."""

import pytest
import torch
from budget import UNIT, assert_bitwise
from strategies import DEVICE, normal

from ra_triton.nn import RACausalSelfAttention

H, D, R = 3, 16, 4
C = H * D
parametrisations = pytest.mark.parametrize("parametrisation", ["free", "composed"])


def layer(parametrisation="composed", seed=0, **options):
    """A layer whose every parameter, gates and biases included, is drawn."""
    options = {"n_embd": C, "n_head": H, "R": R, "backend": "sdpa", **options}
    module = RACausalSelfAttention(parametrisation=parametrisation, **options).to(DEVICE)
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(normal(*p.shape, seed=100 * seed + i, scale=max(p.shape[-1], 1) ** -0.5))
    return module


def gradients(module, loss):
    """Gradients by name, after clearing what an earlier call left."""
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_bitwise(actual[name], expected[name], name)


def assert_rounded(actual, exact, what, *others):
    """Within the float32 roundings of sums of products as large as the largest element.

    ``others``: tensors whose elements are sums of the same products.
    """
    assert actual.shape == exact.shape, what
    error = (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
    size = max((t.abs().max().item() for t in (exact, *others) if t.numel()), default=1.0)
    assert error <= 64 * 2 * UNIT[torch.float32] * size, f"{what}: {error} of {size}"
