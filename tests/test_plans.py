"""Plans: what of a launch is decided once, and what a later call with them may not get wrong."""

import pytest
import torch
from budget import assert_bitwise, assert_projection_close
from strategies import DEVICE, normal

import ra_triton
from ra_triton.kernels import plans, tiles


@pytest.fixture
def fresh_plans():
    """Plans made by this test alone."""
    plans.forget_plans()
    yield
    plans.forget_plans()


def test_a_layout_is_all_that_a_launch_depends_on():
    t = torch.zeros(4, 6, dtype=torch.float16, device=DEVICE)
    assert plans.layout_of(t) == plans.layout_of(torch.ones_like(t))
    assert plans.layout_of(t) != plans.layout_of(t.mT)
    assert plans.layout_of(t[:, :4]) != plans.layout_of(t[:, 1:5])  # the address


@pytest.mark.parametrize(
    ("heads", "share", "expected"),
    [(96, 0.5, 96), (96, 1.0, 96), (96, 1.01, 48), (192, 2.0, 96), (7, 3.0, 3), (3, 100.0, 1)],
)
def test_heads_are_cut_into_equal_sections_that_fit(heads, share, expected):
    bytes_per_head = int(share * tiles.SECTION_BYTES / heads)
    assert tiles.heads_per_section(heads, bytes_per_head) == expected


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("share", [2, 3, 100])
def test_sections_of_heads_change_no_bit(monkeypatch, fresh_plans, share, causal):
    q, k, v = (normal(2, 70, heads, 16, seed=heads).requires_grad_() for heads in (6, 3, 3))
    do = normal(2, 70, 6, 16, seed=9)

    def run():
        out = ra_triton.packed_attention(q, k, v, causal=causal, backend="triton")
        return out.detach(), *torch.autograd.grad(out, (q, k, v), do)

    whole = run()
    total = 2 * k.numel() * k.element_size()
    monkeypatch.setattr(tiles, "SECTION_BYTES", total // share)
    plans.forget_plans()
    for sectioned, expected in zip(run(), whole, strict=True):
        assert_bitwise(sectioned, expected)


def test_the_same_shapes_at_other_addresses(fresh_plans):
    """The compiler relies on alignment, so a plan for aligned tensors must not serve others."""
    x, W = normal(2, 33, 32), normal(32, 96, scale=32**-0.5)
    flat = torch.empty(2 * 33 * 96 + 3, device=DEVICE)
    for offset in (0, 1, 0, 3, 2):
        out = flat[offset:][: 2 * 33 * 96].view(2, 33, 6, 16)
        bias = normal(96 + offset, seed=offset)[offset:]
        options = {"n_head": 2, "weight_layout": "packed", "bias": bias, "backend": "triton"}
        ra_triton.project(x, W, 4, out=out, **options)
        assert_projection_close(out.flatten(2), x, W, bias)


@pytest.mark.gpu
def test_later_calls_skip_the_jit_and_keep_nothing_alive(monkeypatch, fresh_plans):
    from triton.runtime.jit import JITFunction

    x, W = normal(2, 100, 384), normal(384, 1152, scale=384**-0.5)
    x.requires_grad_()

    def run(x):
        out = ra_triton.ra_attention(x, W, backend="triton")
        return out.detach(), *torch.autograd.grad(out.sum(), x)

    first = run(x)
    monkeypatch.setattr(JITFunction, "run", None)
    for again, expected in zip(run(x), first, strict=True):
        assert_bitwise(again, expected)
    del first, again, expected
    before = torch.cuda.memory_allocated()
    for seed in range(3):
        run(normal(2, 100, 384, seed=seed).requires_grad_())
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_a_profilers_hooks_see_later_launches(fresh_plans):
    from triton import knobs

    q, k, v = (normal(2, 64, 4, 64, seed=i) for i in range(3))
    ra_triton.packed_attention(q, k, v, backend="triton")
    seen = []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        ra_triton.packed_attention(q, k, v, backend="triton")
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    ra_triton.packed_attention(q, k, v, backend="triton")
    assert seen == ["_attention_forward_kernel"]
