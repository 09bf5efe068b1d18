"""The composed weight that eval() keeps: never stale, never in a graph, a file or a copy."""

import copy
import gc
import pickle

import pytest
import torch
from budget import assert_bitwise
from layers import C, layer
from strategies import DEVICE, normal

from ra_triton.nn import composed


@pytest.fixture
def compositions(monkeypatch):
    """A list that grows by one for each composition."""
    calls = []
    compose = composed.compose_weights
    monkeypatch.setattr(
        composed, "compose_weights", lambda *a, **k: calls.append(1) or compose(*a, **k)
    )
    return calls


def fresh(module, x):
    """What the module computes without a cache: in training mode, dropout being 0."""
    other = copy.deepcopy(module).train()
    with torch.no_grad():
        return other(x)


def optimizer_step(module):
    module.c_attn.w_rec.grad = torch.ones_like(module.c_attn.w_rec)
    torch.optim.SGD([module.c_attn.w_rec], lr=0.5).step()


def adamw_step(module):
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(module.parameters(), fused=True).step()
    module.zero_grad()


def assign_state(module):
    state = {name: 2 * t for name, t in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def replace_parameter(module):
    module.c_attn.w_std = torch.nn.Parameter(-module.c_attn.w_std.detach())


def replace_data(module):
    module.c_attn.W_q.data = -module.c_attn.W_q.data


def write_data_then_eval(module):
    module.c_attn.W_q.data.mul_(-1)  # invisible to version counters
    module.eval()


CHANGES = [
    optimizer_step,
    adamw_step,
    assign_state,
    replace_parameter,
    replace_data,
    write_data_then_eval,
    lambda module: module.load_state_dict(layer(seed=7).state_dict()),
    lambda module: module.c_attn.reset_parameters(),
    lambda module: module.c_attn.b_k.detach().add_(1),
    lambda module: module.half().float(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_factor_is_seen(change):
    module, x = layer().eval(), normal(2, 9, C)
    with torch.no_grad():
        before = module(x)
        assert_bitwise(module(x), before)
    change(module)
    with torch.no_grad():
        after = module(x)
    assert (after != before).any()
    assert_bitwise(after, fresh(module, x))


def test_weights_are_composed_once_in_eval_and_each_step_in_training(compositions):
    module, x = layer().eval(), normal(2, 9, C)
    with torch.no_grad():
        for _ in range(3):
            module(x)
    assert len(compositions) == 1
    module.train()
    for _ in range(3):
        module(x)
    assert len(compositions) == 4


def test_gradients_in_eval_are_fresh_and_right(compositions):
    """A kept graph would give the gradient of old factors, or fail as freed."""
    module, x = layer().eval(), normal(2, 9, C)
    with torch.no_grad():
        module(x)
    grads = []
    for mode in (False, False, True):
        module.train(mode).zero_grad()
        module(x).square().sum().backward()
        grads.append(module.c_attn.w_rec.grad.clone())
    assert_bitwise(grads[1], grads[0])
    assert_bitwise(grads[2], grads[0])
    assert len(compositions) == 4


def test_a_frozen_layer_keeps_its_weight_and_passes_gradients_on(compositions):
    module = layer().eval().requires_grad_(False)
    grads = []
    for _ in range(2):
        x = normal(2, 9, C).requires_grad_()
        module(x).square().sum().backward()
        grads.append(x.grad)
    assert_bitwise(*grads)
    assert len(compositions) == 1
    module.requires_grad_(True)
    module(x).square().sum().backward()
    assert (module.c_attn.w_rec.grad != 0).all()


def test_inference_mode_leaves_nothing_that_a_graph_cannot_use():
    module = layer().eval().requires_grad_(False)
    x = normal(2, 9, C)
    with torch.inference_mode():
        kept = module(x)
    x.requires_grad_()
    out = module(x)
    out.sum().backward()
    assert_bitwise(out.detach(), kept.clone())
    assert x.grad.isfinite().all()


def test_functional_call_computes_with_what_it_is_given():
    module, x = layer().eval(), normal(2, 9, C)
    other = layer(seed=5).eval()
    with torch.no_grad():
        module(x)
        out = torch.func.functional_call(module, dict(other.named_parameters()), (x,))
        given = {name: p.detach().clone() for name, p in other.named_parameters()}
        again = torch.func.functional_call(module, given, (x,))
        assert_bitwise(out, other(x))
        assert_bitwise(again, other(x))


def test_an_address_used_again_is_not_mistaken_for_the_old_factor():
    module, x = layer().eval(), normal(2, 9, C)
    with torch.no_grad():
        module(x)
        for value in (1.0, 2.0, 3.0):  # each storage is freed before the next is allocated
            module.c_attn.w_rec.data = torch.full_like(module.c_attn.w_rec, value)
            gc.collect()
            assert_bitwise(module(x), fresh(module, x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_files_do_not_carry_the_kept_weight(copied):
    module, x = layer().eval(), normal(2, 9, C)
    empty = len(pickle.dumps(module))
    with torch.no_grad():
        module(x)
    assert module.c_attn._cached is not None
    assert len(pickle.dumps(module)) == empty
    assert copied(module).c_attn._cached is None
    assert "_cached" not in "".join(module.state_dict())


def test_autocast_and_plain_calls_share_one_float32_weight(compositions):
    module, x = layer().eval(), normal(2, 9, C)
    with torch.no_grad():
        plain = module(x)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        assert_bitwise(module(x), plain)
    assert len(compositions) == 1
    assert module.fused_weight()[0].dtype == torch.float32
