"""Composed weights: nothing of them is kept, whatever writes a factor; fuse_ and unfuse_."""

import copy
import pickle

import pytest
import torch
from budget import assert_bitwise
from layers import C, H, assert_rounded, layer
from strategies import DEVICE, backends, normal

from ra_triton.nn import ComposedLinear, KVCache, from_gpt2, from_llama, to_gpt2, to_llama

D = C // H


def fresh(module, x):
    """What a new layer with the numbers of this one computes."""
    other = layer(seed=9, backend=module.backend).eval()
    for p, q in zip(other.parameters(), module.parameters(), strict=True):
        p.data.copy_(q.data)
    with torch.no_grad():
        return other(x)


def optimizer_step(kind, **options):
    def step(module):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        getattr(torch.optim, kind)(module.parameters(), **options).step()
        module.zero_grad()

    return step


def by_collective(module):
    """A collective fills the memory of a parameter without autograd's knowledge."""
    before = module.c_attn.W_q._version
    torch._foreach_mul_([module.c_attn.W_q.data], -1.0)
    assert module.c_attn.W_q._version == before


def new_parameter(module):
    module.c_attn.w_std = torch.nn.Parameter(-module.c_attn.w_std.detach())


def average(module):
    """As an exponential moving average is copied in, through data."""
    for p in module.parameters():
        p.data.lerp_(torch.ones_like(p), 0.1)


def assigned(module):
    state = {name: 2 * t for name, t in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def by_numpy(module):
    factor = module.c_attn.W_v.data.cpu().numpy() * 2
    module.c_attn.W_v.data = torch.from_numpy(factor).to(DEVICE)


WRITES = {
    "SGD": optimizer_step("SGD", lr=0.1),
    "fused AdamW": optimizer_step("AdamW", fused=True),
    "foreach Adam": optimizer_step("Adam", foreach=True),
    "collective": by_collective,
    "new parameter": new_parameter,
    "new data": lambda m: setattr(m.c_attn.W_q, "data", -m.c_attn.W_q.data),
    "average": average,
    "numpy": by_numpy,
    "load": lambda m: m.load_state_dict(layer(seed=7).state_dict()),
    "load with assign": assigned,
    "detached view": lambda m: m.c_attn.b_k.detach().add_(1),
    "reset": lambda m: m.c_attn.reset_parameters(),
    "cast and back": lambda m: m.half().float(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_a_write_by_any_route_is_seen_in_eval(write, inference):
    module, x = layer().eval(), normal(2, 9, C)
    with inference():
        before = module(x).clone()
    WRITES[write](module)
    with inference():
        after = module(x)
    assert (after != before).any()
    assert_bitwise(after.clone(), fresh(module, x))


@backends
def test_what_is_handed_out_is_a_copy(backend):
    module, x = layer(backend=backend).eval(), normal(2, 9, C)
    with torch.no_grad():
        before = module(x)
        for t in (module.c_attn.weight, module.c_attn.bias, *module.c_attn.fused()):
            t.mul_(2.0)
        assert_bitwise(module(x), before)


def test_gradients_in_eval_are_those_of_training_and_of_these_factors():
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


@pytest.mark.gpu
def test_what_a_replayed_step_writes_is_seen():
    module, x = layer(backend="triton").eval(), normal(2, 9, C)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)

    def step():
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        module(x)
        graph.replay()
        assert_bitwise(module(x), fresh(module, x))


# fuse_ and unfuse_


@backends
@pytest.mark.parametrize("options", [{}, {"bias": False, "rope": True, "n_kv_head": 1}, {"R": 0}])
def test_a_fused_layer_computes_the_same_and_comes_back(backend, options):
    module, x = layer(backend=backend, **options).eval(), normal(2, 9, C)
    state = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        expected = module(x)
        W, bias = module.fused_weight()
        assert module.fuse_() is module
        assert module.is_fused
        assert type(module.c_attn) is torch.nn.Linear
        assert_bitwise(module.c_attn.weight.detach(), W.mT)
        assert (module.c_attn.bias is None) == (bias is None)
        assert not any(p.requires_grad for p in module.c_attn.parameters())
        assert_rounded(module(x), expected.double(), "fused")
        free = layer("free", seed=3, backend=backend, **options).eval()
        free.load_state_dict(module.state_dict())
        assert_bitwise(free(x), module(x))
        assert module.unfuse_() is module
        assert_bitwise(module(x), expected)
    assert not module.is_fused
    assert module.train().training
    for name, t in module.state_dict().items():
        assert_bitwise(t, state[name], name)


def test_a_fused_layer_composes_no_more(monkeypatch):
    from ra_triton.nn import composed

    module, x = layer().eval().fuse_(), normal(2, 9, C)
    monkeypatch.setattr(composed, "compose_weights", None)
    with torch.no_grad():
        module(x)
        module(x, KVCache(2, 9, H, D, device=DEVICE))


def test_the_factors_follow_moves_casts_and_copies():
    module = layer().eval()
    expected = copy.deepcopy(module).bfloat16()
    module.fuse_().bfloat16()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module):
        other.unfuse_()
        for name, t in other.state_dict().items():
            assert_bitwise(t, expected.state_dict()[name], name)


def test_gates_of_a_fused_layer_are_those_of_its_factors():
    module = layer().eval()
    gates = module.gates()
    for name, t in module.fuse_().gates().items():
        assert_bitwise(t, gates[name])


def test_fused_in_inference_mode_it_serves_a_graph_later():
    module, x = layer().eval(), normal(2, 9, C).requires_grad_()
    with torch.inference_mode():
        module.fuse_()
    module(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m.fuse_(), r"c_attn is fused, for inference: unfuse_\(\) comes before fuse_"),
        (lambda m: m.train(), r"unfuse_\(\) comes before train\(\)"),
        (lambda m: torch.nn.Sequential(m).train(), r"unfuse_\(\) comes before train\(\)"),
        (lambda m: m.reset_parameters(), r"unfuse_\(\) comes before reset_parameters"),
        (lambda m: m.load_state_dict(layer().state_dict()), r"comes before load_state_dict"),
        (lambda m: m.load_state_dict(m.state_dict()), r"comes before load_state_dict"),
        (lambda m: from_gpt2(m, to_gpt2(m)), "c_attn is fused: load first, then fuse_"),
    ],
)
def test_what_would_lose_the_factors_or_be_lost_itself_raises(call, match):
    module = layer().eval()
    expected = copy.deepcopy(module.state_dict())
    module.fuse_()
    with pytest.raises(ValueError, match=match):
        call(module)
    for name, t in module.unfuse_().state_dict().items():
        assert_bitwise(t, expected[name], name)


def test_what_cannot_be_fused_or_unfused_says_why():
    with pytest.raises(ValueError, match=r"fuse_ is for inference: call eval\(\) first"):
        layer().fuse_()
    with pytest.raises(ValueError, match="c_attn is quantized, so it is one weight already"):
        layer().eval().quantize_("all").fuse_()
    with pytest.raises(ValueError, match="c_attn is not fused"):
        layer().unfuse_()
    with pytest.raises(ValueError, match="c_attn is not fused"):
        layer().eval().fuse_().quantize_("all").unfuse_()
    free = layer("free").eval()
    before = free.c_attn
    assert free.fuse_().c_attn is before
    assert not free.is_fused


def test_a_fused_layer_folds_into_stock_layers():
    for options, fold, load in (({}, to_gpt2, from_gpt2), ({"rope": True}, to_llama, from_llama)):
        module = layer(**options).eval()
        before = fold(module)
        for name, t in fold(module.fuse_()).items():
            assert_bitwise(t, before[name], name)
        with pytest.raises(ValueError, match="c_attn is fused: load first, then fuse_"):
            load(module, before)
        assert isinstance(module.unfuse_().c_attn, ComposedLinear)


def test_a_fused_layer_is_rounded_to_the_same_integers():
    one, other = layer().eval(), layer().eval().fuse_()
    for module in (one, other):
        module.quantize_("all")
    assert_bitwise(other.c_attn.data, one.c_attn.data)


def test_casts_of_autocast_are_of_a_float32_weight():
    module, x = layer().eval(), normal(2, 9, C)
    with torch.no_grad():
        plain = module(x)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        assert_bitwise(module(x), plain)
    assert module.fused_weight()[0].dtype == torch.float32
