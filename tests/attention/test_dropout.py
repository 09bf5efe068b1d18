"""Dropout: which scores fall, read off through v = identity; what remains, against FP64."""

import math

import pytest
import torch
from budget import MAX_Z, assert_bitwise, attention_sigma, check_budget
from gradient_budget import attention_gradient_budgets, check_gradients, dropout_budget
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    AttentionCase,
    attention_cases,
    backends,
    dtypes_for,
    fewest_examples,
    normal,
    quick,
)

import ra_triton

SIGMAS = 5  # of a binomial count
MASK_SEED = 11


def attend(backend, q, k, v, p, *, seed=MASK_SEED, **options):
    torch.manual_seed(seed)
    return ra_triton.packed_attention(q, k, v, dropout_p=p, backend=backend, **options)


def read_mask(run, q, k):
    """``[B, H, T_q, T_k]``: where ``run(q, k, v)`` weights key j at all, D keys at a time."""
    B, T_k, H_kv, D = k.shape
    parts = []
    for n in range(0, T_k, D):
        v = k.new_zeros(B, T_k, H_kv, D)
        rows = min(D, T_k - n)
        v[:, n : n + rows] = torch.eye(D, dtype=k.dtype, device=k.device)[:rows, None]
        parts.append(run(q, k, v)[..., :rows])
    return torch.cat(parts, -1).transpose(1, 2) != 0


def mask_of(backend, q, k, p, **options):
    """The mask of a call with these sizes; equal scores, so that no weight is too small to see."""
    return read_mask(
        lambda q, k, v: attend(backend, q, k, v, p, **options), q.float() * 0, k.float() * 0
    )


def equal_scores(B=2, H=4, T_q=64, T_k=64, D=64):
    return torch.zeros(B, T_q, H, D, device=DEVICE), torch.zeros(B, T_k, H, D, device=DEVICE)


# Against FP64, given the mask


def check_case(backend, case, p, layout="contiguous"):
    """The forward and every gradient: what was dropped forward is dropped backward."""
    tensors, do = case.tensors(), case.gradient(layout)
    keep = mask_of(backend, *tensors[:2], p, causal=case.causal, softcap=case.softcap)
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = attend(backend, *leaves, p, **case.options)
    options = {"keep": keep, "dropout_p": p, **case.options}
    check_budget(out, dropout_budget(*tensors, **options), dtype=case.dtype, what=f"{case}, {p}")
    grads = torch.autograd.grad(out, leaves, do)
    budgets = attention_gradient_budgets(*tensors, do, **options)
    grads = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    check_gradients(grads, budgets, dtype=case.dtype, case=f"{case}, dropout {p}")


@backends
@fewest_examples
@given(data=st.data(), p=st.sampled_from([0.1, 0.5, 0.9]))
def test_output_and_gradients_match_the_definition_given_the_mask(backend, data, p):
    dtypes = dtypes_for(backend) if backend == "triton" else [torch.float32]
    layouts = {} if backend == "triton" else {"layouts": ("contiguous",) * 3}
    check_case(backend, data.draw(attention_cases(dtypes, spikes=(), **layouts)), p)


@backends
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T_q", "T_k"), quick([(5, 37), (1, 1), (37, 5), (33, 33)]))
def test_lengths_and_grouped_heads(backend, causal, T_q, T_k):
    check_case(backend, AttentionCase(2, T_q, T_k, 2, 2, causal=causal), 0.3)


def test_ra_attention_drops_what_its_attention_drops():
    x, W = normal(2, 21, 24), normal(24, 96, seed=1)
    packed = ra_triton.project(x, W, n_head=2, backend="triton")
    expected = attend("triton", *packed, 0.4)
    torch.manual_seed(MASK_SEED)
    out = ra_triton.ra_attention(x, W, n_head=2, dropout_p=0.4, backend="triton")
    assert_bitwise(out, expected.flatten(2))


# The random state


@backends
def test_the_seed_decides(backend):
    tensors = AttentionCase(2, 20, 20, 2).tensors()
    first = attend(backend, *tensors, 0.3)
    assert_bitwise(attend(backend, *tensors, 0.3), first)
    assert not torch.equal(attend(backend, *tensors, 0.3, seed=MASK_SEED + 1), first)
    torch.manual_seed(MASK_SEED)
    calls = [ra_triton.packed_attention(*tensors, dropout_p=0.3, backend=backend) for _ in range(2)]
    assert_bitwise(calls[0], first)
    assert not torch.equal(calls[1], first)


def test_a_gradient_to_record_does_not_change_the_mask():
    tensors = AttentionCase(2, 20, 20, 2).tensors()
    expected = attend("triton", *tensors, 0.3)
    leaves = [t.detach().requires_grad_() for t in tensors]
    assert_bitwise(attend("triton", *leaves, 0.3).detach(), expected)


@backends
def test_nothing_to_drop_is_no_dropout_and_draws_no_random_number(backend):
    tensors = AttentionCase(2, 40, 40, 2).tensors()
    state = torch.get_rng_state()
    out = ra_triton.packed_attention(*tensors, dropout_p=0.0, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
    assert_bitwise(ra_triton.packed_attention(*tensors, backend=backend), out)


def test_lse_does_not_know_of_dropout():
    tensors = AttentionCase(2, 40, 40, 2).tensors()
    _, lse = ra_triton.packed_attention(*tensors, return_lse=True, backend="triton")
    _, dropped = attend("triton", *tensors, 0.7, return_lse=True)
    assert_bitwise(dropped, lse)


# The mask


def assert_share(count, n, share, what):
    """``count`` of ``n`` independent events of probability ``share``, element-wise."""
    z = (count.double() - n * share) / math.sqrt(n * share * (1 - share))
    assert z.abs().max() <= SIGMAS, f"{what}: {z.abs().max():.3g} standard deviations"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_every_row_column_and_head_keeps_its_share(p):
    mask = mask_of("triton", *equal_scores(), p, causal=False)
    for dims in ((3,), (2,), (2, 3), (0, 1, 2, 3)):
        n = math.prod(mask.shape[d] for d in dims)
        assert_share(mask.sum(dims), n, 1 - p, f"kept over dims {dims}")


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_heads_batches_rows_columns_and_seeds_are_independent(p):
    tensors = equal_scores()
    mask = mask_of("triton", *tensors, p, causal=False)
    another = read_mask(
        lambda q, k, v: attend("triton", q, k, v, p, seed=MASK_SEED + 1, causal=False), *tensors
    )
    agree = (1 - p) ** 2 + p**2
    others = {
        f"rolled by {shift} in dim {dim}": mask.roll(shift, dim)
        for dim in range(4)
        for shift in range(1, mask.shape[dim])
        if dim < 2 or shift in (1, 2, 4, 16, 32)
    }
    others |= {"transposed": mask.mT, "of another seed": another}
    for name, other in others.items():
        same = (mask == other) if name != "transposed" else (mask == other).triu(1)
        n = mask.numel() if name != "transposed" else int(torch.ones_like(mask).triu(1).sum())
        # Comparing a mask with itself moved uses each score twice: twice the variance at most.
        z = (same.sum().double() - n * agree) / math.sqrt(2 * n * agree * (1 - agree))
        assert z.abs() <= SIGMAS, f"mask {name}: {z:.3g} standard deviations"


def test_all_64_bits_of_the_key_count():
    from ra_triton.kernels.attention.forward import attention_forward

    q, k = equal_scores(1, 2, 32, 32, 32)
    masks = []
    for key in (5, 6, 5 + 2**32, 5 + 2**62):
        seed = torch.tensor([key], device=DEVICE)
        options = {"causal": False, "softmax_scale": None, "dropout_p": 0.5, "seed": seed}
        masks.append(read_mask(lambda q, k, v, o=options: attention_forward(q, k, v, **o)[0], q, k))
    for i, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:i])


def test_the_mask_does_not_depend_on_the_options_of_the_call():
    """One position, one decision: causal or not, in a longer call, with another head dim."""
    q, k = equal_scores(1, 2, 40, 40, 64)
    full = mask_of("triton", q, k, 0.4, causal=False)
    causal = mask_of("triton", q, k, 0.4)
    assert torch.equal(causal, full.tril())
    assert torch.equal(
        mask_of("triton", q[:, :17], k[:, :23], 0.4, causal=False), full[..., :17, :23]
    )
    assert torch.equal(mask_of("triton", q[..., :16], k[..., :16], 0.4, causal=False), full)


@pytest.mark.parametrize(("block_m", "block_n"), quick([(16, 64), (64, 16), (16, 16), (32, 32)]))
def test_the_mask_does_not_depend_on_the_tiles(block_m, block_n):
    from ra_triton.kernels.attention.backward import attention_backward
    from ra_triton.kernels.attention.forward import attention_forward
    from ra_triton.launch.configs import LaunchConfig

    case = AttentionCase(2, 37, 50, 1, 2, D=64)
    tensors, do = case.tensors(), case.gradient()
    seed = torch.tensor([2**40 + 3], device=DEVICE)
    options = {"causal": True, "softmax_scale": None, "dropout_p": 0.4, "seed": seed}
    config = LaunchConfig(block_m, 4, block_n=block_n)

    def run(q, k, v, config=None):
        return attention_forward(q, k, v, config=config, **options)[0]

    q, k = (0 * t for t in tensors[:2])
    keep = read_mask(run, q, k)
    assert torch.equal(read_mask(lambda *t: run(*t, config=config), q, k), keep)
    out, lse = attention_forward(*tensors, **options)
    grads = {f"d{n}": torch.empty_like(t) for n, t in zip("qkv", tensors, strict=True)}
    attention_backward(*tensors, out, lse, do, *grads.values(), config=config, **options)
    budgets = attention_gradient_budgets(*tensors, do, keep=keep, dropout_p=0.4)
    check_gradients(grads, budgets, dtype=case.dtype, case=f"{case}, {config}")


@backends
def test_the_mean_over_seeds_is_the_output_without_dropout(backend):
    case, p, runs = AttentionCase(1, 16, 16, 2, causal=False), 0.3, 30
    q, k, v = case.tensors()
    exact = ra_triton.packed_attention(q, k, v, causal=False, backend=backend).double()
    mean = sum(attend(backend, q, k, v, p, seed=s, causal=False) for s in range(runs)) / runs
    P = (torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / math.sqrt(case.D)).softmax(-1)
    one = torch.einsum("bhij,bjhd->bihd", P.square(), v.double().square()) * p / (1 - p)
    sigma = (one / runs + attention_sigma(q, k, v, causal=False).square()).sqrt()
    z = (mean.double() - exact) / sigma
    assert z.abs().max() <= MAX_Z
    n = z[0, :, :, 0].numel()  # lanes of one row share their mask
    assert z.square().mean() <= 1 + SIGMAS * math.sqrt(2 / n)
