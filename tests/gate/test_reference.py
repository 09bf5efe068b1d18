"""ref/: the definition against a loop over scalars, against SDPA, and against itself."""

import math

import pytest
import torch
from budget import Budget, assert_attention_close, check_budget

from ref import reciprocal_attention as ref


def factors(H=2, D=5, R=2, C=7, T=6, B=2, per_head=False):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    recip = draw(H, D, R) if per_head else draw(D, R)
    return draw(B, T, C), draw(C, H * D), draw(C, H * D), draw(C, H * D), recip


def close(actual, expected):
    """Equal to a few hundred FP64 roundings of the largest element: two orders of summation."""
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    size = expected.abs().max().item() if expected.numel() else 0.0
    assert actual.shape == expected.shape
    assert error <= 256 * 2.0**-53 * size, f"{error} of {size}"


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("gates", [(1.0, 1.0), (0.5, -2.0), (0.0, 1.0)])
def test_the_definition_written_as_loops(per_head, gates):
    H, D, R = 2, 5, 2
    x, W_q, W_k, W_v, recip = factors(H, D, R, per_head=per_head)
    out = ref.reciprocal_attention(
        x, W_q, W_k, W_v, recip, n_head=H, w_std=gates[0], w_rec=gates[1]
    )
    B, T, _ = x.shape
    expected = torch.zeros(B, T, H * D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            columns = slice(h * D, (h + 1) * D)
            Q, K, V = (x[b] @ W[:, columns] for W in (W_q, W_k, W_v))
            W_recip = recip[h] if per_head else recip
            for i in range(T):
                scores = []
                for j in range(i + 1):
                    std = sum(Q[i, d] * K[j, d] for d in range(D - R))
                    low = (K[i] @ W_recip) @ (Q[j] @ W_recip)  # i is the query, and gives its key
                    scores.append((gates[0] * std + gates[1] * low) / math.sqrt(D))
                weights = torch.stack(scores).softmax(0)
                expected[b, i, columns] = weights @ V[: i + 1]
    close(out, expected)


def test_reciprocal_scores_transpose_when_query_and_key_swap_roles():
    Q, K = (torch.randn(2, 6, 3, 8, dtype=torch.float64) for _ in range(2))
    W_recip = torch.randn(8, 8, dtype=torch.float64)  # R = D: the reciprocal term alone
    scores = ref.reciprocal_scores(Q, K, W_recip)
    close(ref.reciprocal_scores(K, Q, W_recip), scores.mT)


def test_rank_zero_is_plain_causal_attention():
    x, W_q, W_k, W_v, _ = factors()
    out = ref.reciprocal_attention(
        x, W_q, W_k, W_v, torch.empty(5, 0, dtype=torch.float64), n_head=2
    )
    q, k, v = ((x @ W).unflatten(-1, (2, 5)).transpose(1, 2) for W in (W_q, W_k, W_v))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(out, plain.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"softmax_scale": 0.3}])
def test_fused_and_factored_definitions_agree(options):
    H, D, R = 2, 5, 2
    x, W_q, W_k, W_v, recip = factors(H, D, R)
    q, k = (W.unflatten(-1, (H, D)) for W in (W_q, W_k))
    sections = (q[..., : D - R], k[..., : D - R], W_v.unflatten(-1, (H, D)), q @ recip, k @ recip)
    W_fused = torch.cat([section.flatten(1) for section in sections], dim=1)
    close(
        ref.reciprocal_attention_fused(x, W_fused, R, n_head=H, **options),
        ref.reciprocal_attention(x, W_q, W_k, W_v, recip, n_head=H, **options),
    )


def test_fused_definition_adds_its_bias():
    x, W = torch.randn(2, 4, 6), torch.randn(6, 24)
    one = torch.cat((x, torch.ones(2, 4, 1)), -1).double()
    bias = torch.randn(24)
    close(
        ref.reciprocal_attention_fused(x.double(), W.double(), 3, n_head=2, bias=bias.double()),
        ref.reciprocal_attention_fused(one, torch.cat((W, bias[None])).double(), 3, n_head=2),
    )


def test_grouped_heads_repeat_keys_and_values():
    q = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    k, v = (torch.randn(2, 5, 2, 4, dtype=torch.float64) for _ in range(2))
    repeated = (t[:, :, [0, 0, 0, 1, 1, 1]] for t in (k, v))
    for a, b in zip(ref.packed_attention(q, k, v), ref.packed_attention(q, *repeated), strict=True):
        close(a, b)


def test_masks_by_enumeration():
    def keys(*args):
        return ref.allowed_keys(*args, torch.device("cpu")).int().tolist()

    assert keys(3, 3, True, (-1, -1)) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert keys(2, 4, True, (-1, -1)) == [[1, 1, 1, 0], [1, 1, 1, 1]]  # bottom-right
    assert keys(3, 1, True, (-1, -1)) == [[0], [0], [1]]
    assert keys(3, 3, True, (1, 0)) == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert keys(3, 3, False, (0, 1)) == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert keys(2, 2, False, (-1, -1)) == [[1, 1], [1, 1]]
    assert keys(3, 3, False, (-1, 0)) == keys(3, 3, True, (-1, -1))


def test_softcap_bounds_the_scores():
    q, k, v = (torch.randn(1, 9, 1, 8, dtype=torch.float64) for _ in range(3))
    _, lse = ref.packed_attention(100 * q, k, v, softcap=2.0)
    assert lse.max() <= 2.0 + math.log(9)
    out, lse = ref.packed_attention(q, k, v, softcap=2.0**40)  # tanh is linear there
    plain, plain_lse = ref.packed_attention(q, k, v)
    assert_attention_close(out.float(), q.float(), k.float(), v.float())
    sigma = torch.full_like(lse, 2.0**-24)
    check_budget(lse.float(), Budget(plain_lse, sigma), dtype=torch.float32, what="lse")
    assert plain.shape == out.shape


def test_dropout_drops_a_weight_or_doubles_it():
    q, k, v = torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2), torch.ones(1, 4, 1, 2)
    out, _ = ref.packed_attention(q, k, v, dropout_p=0.5)
    assert set(out[:, 0].flatten().tolist()) <= {0.0, 2.0}


@pytest.mark.parametrize("R", [0, 2, 5])
def test_the_definition_passes_gradcheck(R):
    inputs = [t.requires_grad_() for t in factors(R=max(R, 1), T=3, B=1)]
    if R == 0:
        inputs[-1] = torch.empty(5, 0, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *args: ref.reciprocal_attention(*args, n_head=2), inputs, fast_mode=True
    )


def test_rows_without_keys_are_zero_with_zero_gradients():
    q, k, v = (torch.randn(1, T, 1, 4, dtype=torch.float64, requires_grad=True) for T in (5, 2, 2))
    out, lse = ref.packed_attention(q, k, v)
    assert (out[:, :3] == 0).all()
    assert lse[..., :3].isneginf().all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :3] == 0).all()
