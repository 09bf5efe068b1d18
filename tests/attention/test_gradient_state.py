"""What autograd may ask for: subsets, repeats, interleaving, hooks, checkpoints, autocast."""

from itertools import product

import pytest
import torch
from budget import assert_bitwise
from strategies import DEVICE, AttentionCase, backends, normal, quick
from torch.utils.checkpoint import checkpoint

import ra_triton
from ra_triton.call.options import AttentionOptions

H, D, C = 2, 16, 24
SUBSETS = [needed for needed in product([True, False], repeat=3) if any(needed)]
CASE = AttentionCase(2, 17, 17, 1, 2)


subsets = pytest.mark.parametrize("needed", SUBSETS, ids=str)


def attend(q, k, v, backend="triton", **options):
    return ra_triton.packed_attention(q, k, v, backend=backend, **options)


def layer(x, W, bias=None, backend="triton", **options):
    return ra_triton.ra_attention(x, W, n_head=H, bias=bias, backend=backend, **options)


def layer_inputs(seed=0):
    shapes = (2, 17, C), (C, 3 * H * D), (3 * H * D,)
    return [normal(*s, seed=3 * seed + i, scale=0.3) for i, s in enumerate(shapes)]


def gradients(function, tensors, grad, needed=(True,) * 3):
    """Gradients in all inputs, None where not needed."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
    function(*leaves).backward(grad)
    return [t.grad for t in leaves]


def assert_all_bitwise(actual, expected):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_bitwise(a, e, f"gradient {i}")


# Only what is asked for


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels and stages of the backward that run."""
    from ra_triton.kernels.projection import backward as projection_backward
    from ra_triton.kernels.projection import forward as projection
    from ra_triton.launch import plans

    names = []
    call = plans.Plan.__call__

    def launch(plan, *tensors):
        name = plan.kernel.__name__.strip("_")
        if name in ("delta_kernel", "key_value_gradient_kernel", "query_gradient_kernel"):
            variant = plan.arguments.get("V")  # delta has none
            flags = [flag for flag in ("NEED_DK", "NEED_DV") if getattr(variant, flag, False)]
            names.append(" ".join([name, *flags]))
        call(plan, *tensors)

    monkeypatch.setattr(plans.Plan, "__call__", launch)

    def stage(module, name):
        original = getattr(module, name)

        def run(*args, **kwargs):
            names.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, run)

    stage(projection, "projection")
    stage(projection_backward, "weight_gradient")
    stage(projection_backward, "bias_gradient")
    return names


def assert_subset(got, all_of_them, needed):
    for grad, expected, need in zip(got, all_of_them, needed, strict=True):
        if need:
            assert_bitwise(grad, expected)
        else:
            assert grad is None


@subsets
def test_attention_computes_the_gradients_that_are_needed(launched, needed):
    everything = gradients(attend, CASE.tensors(), CASE.gradient())
    launched.clear()
    got = gradients(attend, CASE.tensors(), CASE.gradient(), needed)
    assert_subset(got, everything, needed)
    dq, dk, dv = needed
    flags = [flag for flag, need in (("NEED_DK", dk), ("NEED_DV", dv)) if need]
    expected = ["delta_kernel"] if dq or dk else []
    expected += [" ".join(["key_value_gradient_kernel", *flags])] if flags else []
    expected += ["query_gradient_kernel"] if dq else []
    assert launched == expected


@subsets
def test_a_projection_computes_the_gradients_that_are_needed(launched, needed):
    def packed(x, W, bias):
        parts = ra_triton.project(
            x, W, n_head=H, bias=bias, weight_layout="packed", backend="triton"
        )
        return torch.cat(parts, 2)

    grad = normal(2, 17, 3 * H, D, seed=5)
    everything = gradients(packed, layer_inputs(), grad)
    launched.clear()
    assert_subset(gradients(packed, layer_inputs(), grad, needed), everything, needed)
    stages = ("projection", "weight_gradient", "bias_gradient")
    asked = [stage for stage, need in zip(stages, needed, strict=True) if need]
    assert launched == ["projection", *asked]  # the first one is the forward's


@subsets
def test_a_layer_computes_the_gradients_that_are_needed(launched, needed):
    grad = normal(2, 17, H * D, seed=5)
    everything = gradients(layer, layer_inputs(), grad)
    launched.clear()
    assert_subset(gradients(layer, layer_inputs(), grad, needed), everything, needed)
    stages = ("projection", "weight_gradient", "bias_gradient")
    asked = [stage for stage, need in zip(stages, needed, strict=True) if need]
    assert [name for name in launched if name in stages] == ["projection", *asked]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_of_a_transposed_weight_lies_as_the_weight_does(dtype):
    """Whatever the layout of x; sums of integers are exact."""
    x, grad = ((4 * normal(2, 17, *shape)).round().to(dtype) for shape in ((C,), (3 * H, D)))
    exact = (x.float().flatten(0, 1).mT @ grad.float().flatten(2).flatten(0, 1)).to(dtype)
    W = layer_inputs()[1].to(dtype).mT.contiguous().mT.requires_grad_()
    for layout in (x, torch.cat((x, x), 2)[..., :C], torch.cat((x, x), 1)[:, :17]):
        y = ra_triton.project(layout, W, n_head=H, weight_layout="packed", backend="triton")
        (dW,) = torch.autograd.grad(torch.cat(y, 2), W, grad)
        assert_bitwise(dW, exact)
        assert dW.mT.is_contiguous()


@backends
def test_nothing_is_recorded_where_no_gradient_is_wanted(backend):
    tensors = [t.requires_grad_() for t in CASE.tensors()]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not attend(*tensors, backend=backend).requires_grad
    out, lse = attend(*tensors, backend=backend, return_lse=True)
    assert out.requires_grad
    assert lse.requires_grad


# State


@backends
def test_a_retained_graph_gives_the_same_gradients_again(backend):
    leaves = [t.requires_grad_() for t in layer_inputs()]
    out, grad = layer(*leaves, backend=backend), normal(2, 17, H * D, seed=5)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    assert_all_bitwise(torch.autograd.grad(out, leaves, grad), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, grad)


@backends
@pytest.mark.parametrize(("order", "dropout_p"), quick([((1, 2, 0), 0.5), ((0, 1, 2), 0.0)]))
def test_interleaved_micro_batches_do_not_meet(backend, order, dropout_p):
    batches = [layer_inputs(seed) for seed in range(3)]
    grad = normal(2, 17, H * D, seed=5)
    options = {"backend": backend, "dropout_p": dropout_p}

    def run(batch, seed):
        torch.manual_seed(seed)
        leaves = [t.detach().requires_grad_() for t in batch]
        return leaves, layer(*leaves, **options)

    alone = []
    for seed, batch in enumerate(batches):
        leaves, out = run(batch, seed)
        alone.append(torch.autograd.grad(out, leaves, grad))
    pending = [run(batch, seed) for seed, batch in enumerate(batches)]
    for i in order:
        leaves, out = pending[i]
        assert_all_bitwise(torch.autograd.grad(out, leaves, grad), alone[i])


@backends
def test_two_layers_in_a_row_give_the_gradients_of_each(backend):
    x, W, bias = layer_inputs()
    W2 = normal(H * D, 3 * H * D, seed=9, scale=0.3)
    leaves = [t.requires_grad_() for t in (x, W, W2)]
    grad = normal(2, 17, H * D, seed=5)
    hidden = layer(*leaves[:2], bias, backend=backend)
    out = layer(hidden, leaves[2], backend=backend)
    together = torch.autograd.grad(out, leaves, grad)

    middle = hidden.detach().requires_grad_()
    d_middle, dW2 = torch.autograd.grad(
        layer(middle, leaves[2], backend=backend), (middle, leaves[2]), grad
    )
    first = layer(*leaves[:2], bias, backend=backend)
    assert_all_bitwise(together, (*torch.autograd.grad(first, leaves[:2], d_middle), dW2))


@backends
def test_a_hook_may_call_the_op_inside_the_backward(backend):
    grad, other = normal(2, 17, H * D, seed=5), layer_inputs(1)
    expected = gradients(lambda *t: layer(*t, backend=backend), layer_inputs(), grad)
    expected_inside = gradients(lambda *t: layer(*t, backend=backend), other, grad)
    inside = []

    def hook(_):
        with torch.enable_grad():
            inside.append(gradients(lambda *t: layer(*t, backend=backend), other, grad))

    leaves = [t.requires_grad_() for t in layer_inputs()]
    packed = ra_triton.project(*leaves[:2], n_head=H, bias=leaves[2], backend=backend)
    out = attend(*packed, backend=backend).flatten(2)
    for t in (out, *packed):
        t.register_hook(hook)
    assert_all_bitwise(torch.autograd.grad(out, leaves, grad), expected)
    assert len(inside) == 4
    for got in inside:
        assert_all_bitwise(got, expected_inside)


@backends
@pytest.mark.parametrize("dropout_p", quick([0.5, 0.0]))
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_gives_the_same_gradients(backend, dropout_p, autocast):
    grad = normal(2, 17, H * D, seed=5)

    def run(*inputs):
        with torch.autocast(DEVICE.type, torch.float16, enabled=autocast):
            return layer(*inputs, backend=backend, dropout_p=dropout_p)

    def saved(*inputs):
        torch.manual_seed(3)
        return run(*inputs)

    def recomputed(*inputs):
        torch.manual_seed(3)
        return checkpoint(run, *inputs, use_reentrant=False)

    expected = gradients(saved, layer_inputs(), grad.half() if autocast else grad)
    got = gradients(recomputed, layer_inputs(), grad.half() if autocast else grad)
    assert_all_bitwise(got, expected)


@pytest.mark.parametrize("changed", range(3))
def test_an_operand_changed_before_the_backward_is_noticed(changed):
    leaves = [t.clone().requires_grad_() for t in CASE.tensors()]
    operands = [t * 1 for t in leaves]
    out = attend(*operands)
    operands[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("function", [attend, layer], ids=["packed_attention", "ra_attention"])
def test_differentiating_twice_is_refused(function):
    leaves = [
        t.requires_grad_() for t in (CASE.tensors() if function is attend else layer_inputs())
    ]
    first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(g.sum() for g in first).backward()


@pytest.mark.parametrize("function", [attend, layer], ids=["packed_attention", "ra_attention"])
def test_a_penalty_on_the_gradient_is_refused_not_dropped(function):
    """With a constant dO only the saved operands lead to the second derivative."""
    leaves = [
        t.requires_grad_() for t in (CASE.tensors() if function is attend else layer_inputs())
    ]
    loss = function(*leaves).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError):
        (loss + sum(g.square().sum() for g in first)).backward()


@backends
@pytest.mark.parametrize("function", [attend, layer], ids=["packed_attention", "ra_attention"])
def test_torch_func_gives_the_same_gradients(backend, function):
    inputs = CASE.tensors() if function is attend else layer_inputs()
    weight = normal(*(CASE.gradient().shape if function is attend else (2, 17, H * D)), seed=5)

    def loss(*inputs):
        return (function(*inputs, backend=backend) * weight).sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs)
    assert_all_bitwise(got, gradients(lambda *t: function(*t, backend=backend), inputs, weight))


# Autocast


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("sdpa", torch.bfloat16), ("sdpa", torch.float16), ("triton", torch.float16)],
)
def test_autocast_gives_the_gradients_of_explicit_casts_in_each_inputs_dtype(backend, dtype):
    grad = normal(2, 17, H * D, seed=5).to(dtype)

    def automatic(*inputs):
        with torch.autocast(DEVICE.type, dtype):
            return layer(*inputs, backend=backend)

    def explicit(*inputs):
        return layer(*(t.to(dtype) for t in inputs), backend=backend)

    mixed = [t.to(dtype) if i == 0 else t for i, t in enumerate(layer_inputs())]
    for inputs in (layer_inputs(), mixed):
        got, expected = gradients(automatic, inputs, grad), gradients(explicit, inputs, grad)
        assert [g.dtype for g in got] == [t.dtype for t in inputs]
        if backend == "triton":  # those of the weights are not rounded to half precision before
            fine = [
                g.dtype is torch.float32 and not torch.equal(g.to(dtype).float(), g) for g in got
            ]
            assert fine[1:] == [True, True]
            got, expected = ([g.to(dtype) for g in grads] for grads in (got, expected))
        assert_all_bitwise(got, expected)


def test_a_backward_under_autocast_stays_in_the_operands_dtype():
    leaves = [t.requires_grad_() for t in CASE.tensors()]
    expected = torch.autograd.grad(attend(*leaves), leaves, CASE.gradient())
    out = attend(*leaves)
    with torch.autocast(DEVICE.type, torch.float16):
        got = torch.autograd.grad(out, leaves, CASE.gradient())
    assert_all_bitwise(got, expected)


@pytest.mark.parametrize("function", [attend, layer], ids=["packed_attention", "ra_attention"])
def test_forward_mode_is_refused_not_dropped(function):
    tensors = CASE.tensors() if function is attend else layer_inputs()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            function(dual, *tensors[1:])
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(
            lambda t: function(t, *tensors[1:]), (tensors[0],), (torch.ones_like(tensors[0]),)
        )


@pytest.mark.parametrize("name", ["pack_qk", "pack_qk_"])
def test_packing_refuses_forward_mode_too(name):
    q, k, low = normal(2, 5, 2, 16), normal(2, 5, 2, 16, seed=1), normal(2, 5, 2, 4, seed=2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(low, torch.ones_like(low))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            getattr(ra_triton, name)(q, k, dual, low, backend="triton")


class Stop(torch.autograd.Function):
    """A function whose input gets no gradient, which is not a gradient of zeros."""

    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("function", [attend, layer], ids=["packed_attention", "ra_attention"])
def test_an_output_without_a_gradient_gives_its_inputs_zeros(function):
    leaves = [
        t.requires_grad_() for t in (CASE.tensors() if function is attend else layer_inputs())
    ]
    (Stop.apply(function(*leaves)).sum() + sum(t.sum() for t in leaves)).backward()
    for t in leaves:
        assert_bitwise(t.grad, torch.ones_like(t))


def test_the_operator_too_gives_zeros_without_a_gradient():
    x, W, bias = (t.requires_grad_() for t in layer_inputs())
    constants = (H, H, *AttentionOptions().scores, 0, 0, True)
    out, _, _ = torch.ops.ra_triton.layer(x, W, bias, None, None, None, *constants)
    (Stop.apply(out).sum() + x.sum() + W.sum() + bias.sum()).backward()
    for t in (x, W, bias):
        assert_bitwise(t.grad, torch.ones_like(t))
