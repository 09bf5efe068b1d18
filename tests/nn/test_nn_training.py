"""The attention module in training: graphs, checkpoints, precisions, copies, files, compilation."""

import copy
import io
import pickle

import pytest
import torch
from budget import assert_bitwise
from layers import C, H, R, assert_same, gradients, layer, parametrisations
from strategies import DEVICE, normal
from torch import nn
from torch.utils.checkpoint import checkpoint

import ra_triton


@parametrisations
def test_stacked_layers_repeat_and_checkpoint_bitwise(parametrisation):
    stack = nn.Sequential(*(layer(parametrisation, seed) for seed in range(3)))
    x = normal(2, 9, C).requires_grad_()
    plain = gradients(stack, stack(x).square().sum())
    assert_same(gradients(stack, stack(x).square().sum()), plain)

    def checkpointed(x):
        for module in stack:
            x = checkpoint(module, x, use_reentrant=False)
        return x

    assert_same(gradients(stack, checkpointed(x).square().sum()), plain)


def test_checkpoint_repeats_dropout():
    module = layer(dropout=0.5)
    x = normal(2, 9, C).requires_grad_()
    grads = []
    for call in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(gradients(module, call(x).square().sum()))
    assert_same(*grads)


@parametrisations
def test_a_retained_graph_gives_its_gradients_twice(parametrisation):
    module = layer(parametrisation)
    loss = module(normal(2, 9, C)).square().sum()
    parameters = list(module.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    module(normal(1, 5, C, seed=5))  # a call in between leaves the graph alone
    for a, b in zip(torch.autograd.grad(loss, parameters), first, strict=True):
        assert_bitwise(a, b)


@parametrisations
def test_interleaved_micro_batches_keep_their_own_graphs(parametrisation):
    module = layer(parametrisation)
    batches = [normal(2, 9, C, seed=1), normal(1, 5, C, seed=2)]
    apart = [gradients(module, module(x).square().sum()) for x in batches]
    losses = [module(x).square().sum() for x in batches]  # both forwards, then both backwards
    assert_same(gradients(module, losses[0]), apart[0])
    assert_same(gradients(module, losses[1]), apart[1])


def test_dropout_is_for_training_only():
    module, x = layer(dropout=0.5), normal(2, 9, C)
    assert (module(x) != module(x)).any()
    module.eval()
    assert_bitwise(module(x), module(x))
    whole = layer().eval()
    assert_bitwise(module(x), whole(x))


@parametrisations
def test_autocast_computes_in_its_dtype_and_trains_in_float32(parametrisation):
    module, x = layer(parametrisation), normal(2, 9, C)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    grads = gradients(module, out.float().square().sum())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())
    # The weight is composed in float32 and rounded once.
    W_fused, bias = module.fused_weight()
    options = {"n_head": H, "weight_layout": "packed", "backend": "sdpa"}
    half = {"dtype": torch.bfloat16}
    with torch.no_grad():
        y = ra_triton.ra_attention(
            x.to(**half), W_fused.to(**half), R, bias=bias.to(**half), **options
        )
        expected = nn.functional.linear(
            y, module.c_proj.weight.to(**half), module.c_proj.bias.to(**half)
        )
    assert_bitwise(out, expected)


@parametrisations
def test_half_precision_modules_run(parametrisation):
    module, x = layer(parametrisation).bfloat16(), normal(2, 9, C).bfloat16()
    out = module(x)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


# Copies and files


@parametrisations
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_copies_compute_the_same_and_share_nothing(parametrisation, copied):
    module, x = layer(parametrisation).eval(), normal(2, 9, C)
    with torch.no_grad():
        expected = module(x)
        other = copied(module)
        assert_bitwise(other(x), expected)
        for p in other.parameters():
            p.mul_(2)
        assert (other(x) != expected).any()
        assert_bitwise(module(x), expected)


@parametrisations
def test_saved_files_hold_the_parameters_and_no_more(parametrisation):
    module = layer(parametrisation, n_embd=192, n_head=6).eval()
    x = normal(2, 9, 192)
    with torch.no_grad():
        expected = module(x)  # fills the cache
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    assert file.tell() <= 1.1 * sum(p.nbytes for p in module.parameters())
    assert module.state_dict().keys() == dict(module.named_parameters()).keys()
    file.seek(0)
    other = layer(parametrisation, seed=1, n_embd=192, n_head=6).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert_bitwise(other(x), expected)


# Compilation


@parametrisations
def test_the_module_is_traced_as_one_graph_and_sees_new_factors(parametrisation):
    torch._dynamo.reset()
    module, x = layer(parametrisation), normal(2, 9, C)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    expected = gradients(module, module(x).square().sum())
    assert_same(gradients(module, compiled(x).square().sum()), expected)
    module.eval()
    with torch.no_grad():
        for factor in (1.0, 2.0):
            for p in module.parameters():
                p.mul_(factor)
            assert_bitwise(compiled(x), module(x))
