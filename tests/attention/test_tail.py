"""Offsets that nobody has read: tokens of no sequence, and longest sequences of a compiler."""

import pytest
import torch
import torch._dynamo
from budget import assert_bitwise
from strategies import DEVICE, backends, normal

import ra_triton
from ra_triton.call.offsets import Offsets, check_longest

H, D, C, R = 2, 16, 24, 4
TOTAL, USED = 10, 7
CU = torch.tensor([0, 3, USED], dtype=torch.int32, device=DEVICE)


def layer(x, W, longest=4, **options):
    options = {"n_head": H, "weight_layout": "packed", "cu_seqlens": CU, **options}
    return ra_triton.ra_attention(x, W, R, max_seqlen=longest, **options)


@backends
def test_tokens_behind_the_last_sequence_give_zeros_and_no_gradient(backend):
    inputs = [normal(TOTAL, C), normal(C, 3 * H * D, scale=0.2)]
    used = [inputs[0][:USED], inputs[1]]
    grad = normal(TOTAL, H * D, seed=3)
    found = {}
    for check, tensors in ((False, inputs), (True, used)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = layer(*leaves, check=check, backend=backend)
        found[check] = [out, *torch.autograd.grad(out, leaves, grad[: len(out)])]
    (out, dx, dW), (want, want_dx, want_dW) = found[False], found[True]
    assert not out[USED:].any()
    assert not dx[USED:].any()
    assert dW.isfinite().all()
    assert dW.shape == want_dW.shape
    if backend == "triton":  # a BLAS may take another order for a product of more rows
        assert_bitwise(out[:USED], want)
        assert_bitwise(dx[:USED], want_dx)
        assert_bitwise(dW, want_dW)


@backends
def test_operands_behind_the_last_sequence_too(backend):
    operands = [normal(TOTAL, H, D, seed=seed) for seed in range(3)]
    found = {}
    for check, rows in ((False, TOTAL), (True, USED)):
        leaves = [t[:rows].clone().requires_grad_() for t in operands]
        out, lse = ra_triton.packed_attention_varlen(
            *leaves, CU, CU, 4, 4, return_lse=True, check=check, backend=backend
        )
        grads = torch.autograd.grad(out.square().sum() + lse[:, :USED].sum(), leaves)
        found[check] = out, lse.mT, *grads
    for got, want in zip(found[False], found[True], strict=True):
        assert_bitwise(got[:USED], want)
    out, lse, *grads = found[False]
    assert (lse[USED:] == -torch.inf).all()
    for zeros in (out, *grads):
        assert not zeros[USED:].any()


@pytest.mark.parametrize("spans", [True, False])
def test_what_is_known_to_be_complete_is_not_filled(monkeypatch, spans):
    filled = []
    zero_ = torch.Tensor.zero_
    monkeypatch.setattr(torch.Tensor, "zero_", lambda t: filled.append(t) or zero_(t))
    rows = USED if spans else TOTAL
    layer(normal(rows, C), normal(C, 3 * H * D), check=spans, backend="triton")
    assert bool(filled) is not spans


scalars = torch._dynamo.config.patch(capture_scalar_outputs=True)


def measured(x, W, cu_seqlens):
    longest = (cu_seqlens[1:] - cu_seqlens[:-1]).max().item()
    q, k, v = (x @ W).view(-1, 3, H, D).unbind(1)
    between = ra_triton.packed_attention_varlen(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, backend="triton"
    )
    out = layer(x, W, longest, cu_seqlens=cu_seqlens, backend="triton")
    return out + between.flatten(1)


@scalars
def test_a_compiled_call_measures_its_longest_sequence():
    compiled = torch.compile(measured, backend="aot_eager", fullgraph=True, dynamic=True)
    for ends in ([0, 3, 7], [0, 5, 6, 12], [0, 1, 2]):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        inputs = normal(ends[-1], C), normal(C, 3 * H * D, scale=0.2)
        found = []
        for function in (compiled, measured):
            leaves = [t.clone().requires_grad_() for t in inputs]
            out = function(*leaves, cu_seqlens)
            found.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
        for got, want in zip(*found, strict=True):
            assert_bitwise(got, want)


@scalars
def test_a_number_that_no_compiler_knew_is_looked_at_when_the_call_runs():
    x, W = normal(USED, C), normal(C, 3 * H * D)

    def run(number):
        return layer(x, W, number.item(), backend="triton")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected = run(torch.tensor(4))
    for enough in (4, 1000):
        assert_bitwise(compiled(torch.tensor(enough)), expected)
    with pytest.raises(ValueError, match="must be at least 1 with 7 tokens, got 0"):
        compiled(torch.tensor(0))


@pytest.mark.parametrize("longest", [True, 1.0, None])
def test_the_longest_sequence_is_an_int(longest):
    with pytest.raises(TypeError, match="max_seqlen must be an int"):
        check_longest("max_seqlen", longest, 3)


def test_no_sequence_is_longer_than_all_tokens():
    offsets = Offsets(CU, CU, 1000, 5).within(7, 9)
    assert offsets[2:4] == (7, 5)
