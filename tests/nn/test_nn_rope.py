"""The module with rotation and QK-norm: stages, gradients, positions, tables, arguments."""

import copy
import pickle

import pytest
import torch
from budget import assert_attention_close, assert_bitwise
from layers import C, D, H, R, assert_rounded, gradients, layer
from strategies import DEVICE, backends, normal
from test_rope import Case, check
from torch import nn

import ra_triton
from ra_triton.nn import RACausalSelfAttention
from ra_triton.nn.rope import RotaryTables
from ref import reciprocal_attention as ref

KINDS = {
    "rope": {"rope": True},
    "partial": {"rope": 500.0, "rope_dims": 12},
    "norm": {"qk_norm": True},
    "both": {"rope": True, "qk_norm": True, "n_kv_head": 1},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def tables_of(module, positions):
    """``cos, sin`` of ``positions [B, T]``, or None."""
    if module.rope is None:
        return None
    cos, sin = module.rope.at(positions.flatten())
    return tuple(t.view(*positions.shape, -1) for t in (cos, sin))


def plain(module):
    """The same layer without what stands between its projection and its attention."""
    other = layer(module.parametrisation, n_kv_head=module.n_kv_head, backend=module.backend)
    state = {n: t for n, t in module.state_dict().items() if "norm" not in n}
    other.load_state_dict(state)
    return other.eval()


@backends
@kinds
@pytest.mark.parametrize("recorded", [True, False])
def test_stages_pass_the_gate(backend, kind, recorded):
    module = layer("free", backend=backend, **KINDS[kind]).eval()
    x = normal(2, 20, C, seed=9)
    with torch.set_grad_enabled(recorded):
        packed = plain(module).operands(x)
        made = module.operands(x)
        out = module(x)
    norm = "weighted" if module.q_norm is not None else "none"
    norms = (module.q_norm, module.k_norm)
    weights = [None if n is None else n.weight for n in norms]
    case = Case(D=D, R=None, norm=norm, rope_dims=None)
    seen = tables_of(module, torch.arange(20, device=DEVICE).expand(2, 20))
    check(case, backend, (*packed[:2], None, None, *weights), made[:2], seen)
    assert_bitwise(made[2], packed[2])
    made = tuple(t.detach() for t in made)
    attended = ra_triton.packed_attention(*made, backend=backend)
    assert_attention_close(attended, *made)
    assert_bitwise(out, module.c_proj(attended.flatten(2)))


@backends
@kinds
def test_output_and_gradients_are_those_of_the_definition(backend, kind):
    module = layer("composed", backend=backend, **KINDS[kind])
    x, grad = normal(2, 9, C, seed=8), normal(2, 9, C, seed=9)
    p = {n: t.detach().double().requires_grad_() for n, t in module.named_parameters()}
    one = torch.cat((x, torch.ones_like(x[..., :1])), -1).double()
    weights = [torch.cat((p[f"c_attn.W_{n}"], p[f"c_attn.b_{n}"][None])) for n in "qkv"]
    W = ra_triton.compose_weights(
        *weights, p["c_attn.W_recip"], n_head=H, n_kv_head=module.n_kv_head,
        w_std=p["c_attn.w_std"], w_rec=p["c_attn.w_rec"],
    )  # fmt: skip
    q, k, v = ref.split_lanes(one @ W, R, H, module.n_kv_head)
    seen = tables_of(module, torch.arange(9, device=DEVICE).expand(2, 9))
    cos, sin = (None, None) if seen is None else (t.double() for t in seen)
    eps = None if module.q_norm is None else module.q_norm.eps
    q, k = (
        ref.norm_rope(t, weight=p.get(f"{n}_norm.weight"), eps=eps, cos=cos, sin=sin)
        for n, t in (("q", q), ("k", k))
    )
    y = ref.packed_attention(q, k, v)[0].flatten(2)
    y = nn.functional.linear(y, p["c_proj.weight"], p["c_proj.bias"])
    y.backward(grad.double())
    out = module(x)
    assert_rounded(out, y, "output")
    for name, got in gradients(module, (out * grad).sum()).items():
        assert_rounded(got, p[name].grad, name, p[name.replace(".b_", ".W_")].grad)


@backends
@kinds
def test_positions_continue_a_sequence(backend, kind):
    """Decoding: the operands of later tokens, said in each way that the method takes."""
    module = layer("free", backend=backend, **KINDS[kind]).eval()
    x = normal(2, 9, C, seed=9)
    with torch.no_grad():
        whole = module.operands(x)
        at = torch.arange(6, 9, device=DEVICE)
        ways = [6, torch.tensor(6), torch.tensor([6, 6]), at.expand(2, 3)]
        for position in ways:
            position = position.to(DEVICE) if isinstance(position, torch.Tensor) else position
            rest = module.operands(x[:, 6:], position)
            for got, want in zip(rest, whole, strict=True):
                assert_rounded(got, want[:, 6:].double(), "operands")


def test_each_sequence_has_its_own_position():
    module = layer("free", rope=True).eval()
    x = normal(2, 3, C, seed=9)
    with torch.no_grad():
        both = module.operands(x, torch.tensor([40, 2], device=DEVICE))
        for b, first in enumerate((40, 2)):
            for got, want in zip(both, module.operands(x[b : b + 1], first), strict=True):
                assert_rounded(got[b : b + 1], want.double(), "operands")


@pytest.mark.parametrize("position", [0, 7])
def test_without_rope_positions_change_nothing(position):
    module = layer("free", qk_norm=True).eval()
    x = normal(2, 3, C)
    for got, want in zip(module.operands(x, position), module.operands(x), strict=True):
        assert_bitwise(got, want)


def test_inference_overwrites_the_buffer_of_the_projection():
    module = layer("free", rope=True, qk_norm=True).eval()
    with torch.no_grad():
        q, k, v = module.operands(normal(2, 3, C))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert q.stride() == (3 * 3 * H * D, 3 * H * D, D, 1)


@pytest.mark.gpu
def test_a_captured_step_reads_its_positions_on_the_device():
    module = layer("free", rope=True, qk_norm=True, backend="triton").eval()
    x, position = normal(2, 1, C), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        module.operands(x, position)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = module.operands(x, position)
        position.copy_(torch.tensor([5, 9]))
        graph.replay()
        for got, want in zip(made, module.operands(x, position), strict=True):
            assert_bitwise(got, want)


# Tables


def test_tables_are_those_of_hugging_face():
    transformers = pytest.importorskip("transformers", reason="Hugging Face is a test-only extra")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(50)[None])
    ours = RotaryTables(16, 10000.0).rows(50, torch.device("cpu"))
    for got, want in zip(ours, (cos, sin), strict=True):
        for half in want[0].split(8, dim=-1):
            assert_bitwise(got[:50], half)


def test_tables_grow_and_stay_float32_whatever_becomes_of_the_model():
    module = layer("free", rope=True).eval()
    names = set(module.state_dict())
    cos, _ = module.rope.rows(5, DEVICE)
    assert len(cos) == 10
    assert module.rope.rows(10, DEVICE)[0] is cos
    longer, _ = module.rope.rows(11, DEVICE)
    assert_bitwise(longer[:10], cos)
    half = copy.deepcopy(module).half()
    half(normal(1, 3, C).half())
    assert half.rope.rows(1, DEVICE)[0].dtype == torch.float32
    assert set(half.state_dict()) == names == set(layer("free").state_dict())
    assert pickle.loads(pickle.dumps(module.rope))._kept == {}


def test_tables_made_in_inference_mode_serve_a_graph_later():
    module = layer("free", rope=True)
    with torch.inference_mode():
        module(normal(1, 3, C))
    module(normal(1, 3, C)).sum().backward()
    assert module.c_attn.weight.grad.isfinite().all()


@kinds
def test_compiled_layers_have_one_graph_and_keep_no_traced_table(kind):
    module = layer("free", **KINDS[kind])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = normal(2, 9, C)
    assert_rounded(compiled(x), module(x).double(), "output")
    with torch.no_grad():
        assert_rounded(compiled(x), module(x).double(), "output")
    assert module.rope is None or all(type(t) is torch.Tensor for t in module.rope.rows(9, DEVICE))


# Initialisation, diagnostics, arguments


def test_norms_start_at_one_and_have_the_names_of_qwen3():
    module = RACausalSelfAttention(C, H, R, qk_norm=True, norm_eps=1e-5)
    norms = {n: p for n, p in module.named_parameters() if "norm" in n}
    assert set(norms) == {"q_norm.weight", "k_norm.weight"}
    for weight in norms.values():
        assert_bitwise(weight.detach(), torch.ones(D))
    assert module.k_norm.eps == 1e-5


@pytest.mark.parametrize(("lanes", "share"), [(slice(D - R, D), 0.0), (slice(0, D - R), 1.0)])
def test_the_reciprocal_share_is_of_turned_scores_where_low_lanes_stay_apart(lanes, share):
    x, module = normal(2, 9, C), layer("free", rope=True, rope_dims=12, qk_norm=True).eval()
    assert ((module.reciprocal_share(x) > 0) & (module.reciprocal_share(x) < 1)).all()
    with torch.no_grad():
        for t in (module.c_attn.weight, module.c_attn.bias):
            t.unflatten(0, (3 * H, D))[:H, lanes] = 0
    assert_bitwise(module.reciprocal_share(x), torch.full((H,), share, device=DEVICE))
    with pytest.raises(ValueError, match=r"rope_dims=16 > D - R = 12: rotation mixes"):
        layer("free", rope=True).reciprocal_share(x)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rope": "yes"}, TypeError, "rope must be a bool or theta, a number, got 'yes'"),
        ({"rope": 0.5}, ValueError, "rope must be True or a theta above 1, got 0.5"),
        ({"rope": float("inf")}, ValueError, "rope must be True or a theta above 1, got inf"),
        ({"rope": True, "rope_dims": 5}, ValueError, "rope_dims must be even, from 2 to D = 16"),
        ({"rope": True, "rope_dims": 18}, ValueError, "rope_dims must be even, from 2 to D = 16"),
        ({"rope_dims": 8}, ValueError, "rope_dims=8 needs rope=True or a theta"),
        ({"rope": True, "n_embd": 45}, ValueError, "D = 15 is odd: pass rope_dims"),
    ],
)
def test_wrong_options_are_named(options, error, match):
    with pytest.raises(error, match=match):
        RACausalSelfAttention(**{"n_embd": C, "n_head": H, **options})


@pytest.mark.parametrize(
    ("position", "error", "match"),
    [
        (-1, ValueError, "position must be at least 0, got -1"),
        (True, TypeError, "position must be an int or an int tensor, got True"),
        (torch.zeros(3).long(), ValueError, r"position must be \[\], \[B\] = \[2\] or"),
        (torch.zeros(2), TypeError, "position must be an int32 or int64 tensor"),
    ],
)
def test_wrong_positions_are_named(position, error, match):
    position = position.to(DEVICE) if isinstance(position, torch.Tensor) else position
    with pytest.raises(error, match=match):
        layer("free", rope=True).operands(normal(2, 3, C), position)
