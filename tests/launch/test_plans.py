"""Plans: what of a launch is decided once, and what a later call with them may not get wrong."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from budget import assert_bitwise, assert_projection_close
from strategies import DEVICE, normal

import ra_triton
from ra_triton.call.offsets import Offsets
from ra_triton.kernels.attention import arguments as attention_arguments
from ra_triton.launch import plans
from ra_triton.launch.configs import LaunchConfig
from ra_triton.weights.layout import Columns

ROOT = Path(__file__).parents[2]


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
    bytes_per_head = int(share * attention_arguments.SECTION_BYTES / heads)
    assert attention_arguments.heads_per_section(heads, bytes_per_head) == expected


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_sections_of_heads_change_no_bit(monkeypatch, fresh_plans, causal):
    q, k, v = (normal(2, 40, heads, 16, seed=heads).requires_grad_() for heads in (10, 5, 5))
    do = normal(2, 40, 10, 16, seed=9)

    def run():
        out = ra_triton.packed_attention(q, k, v, causal=causal, backend="triton")
        return out.detach(), *torch.autograd.grad(out, (q, k, v), do)

    whole = run()
    total = 2 * k.numel() * k.element_size()
    for share in (2, 3, 100):  # with the former two the last section is shorter
        monkeypatch.setattr(attention_arguments, "SECTION_BYTES", total // share)
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


# The key: whatever a launch depends on makes another plan


def _attention(tensors, causal=True, softmax_scale=None, dropout_p=0.1, **others):
    from ra_triton.kernels.attention.backward import attention_backward
    from ra_triton.kernels.attention.forward import attention_forward

    q, k, v, o, lse, do, dq, dk, dv, dlse, seed = tensors.values()
    options = {"causal": causal, "softmax_scale": softmax_scale, "dropout_p": dropout_p}
    options |= {"seed": seed, **others}
    attention_forward(q, k, v, o=o, lse=lse, **options)
    attention_backward(q, k, v, o, lse, do, dq, dk, dv, dlse=dlse, **options)


def _gemms(tensors, stage="projection", config=None):
    from ra_triton.kernels.projection.backward import bias_gradient, weight_gradient
    from ra_triton.kernels.projection.forward import projection

    x, w, bias, y, g = tensors.values()
    projection(x, w, bias, y, stage=stage, config=config)
    weight_gradient(x, g, config=config)
    bias_gradient(g, config=config)


def _packing(tensors, in_place=False, config=None):
    from ra_triton.kernels.lanes import packing

    packing._launch(*tensors.values(), in_place=in_place, config=config)


def _int8(tensors, columns=None, config=None):
    from ra_triton.kernels.projection.int8 import int8_projection, quantize_rows

    x, w, x_scale, w_scale, bias, y, x_int8 = tensors.values()
    int8_projection(x, w, x_scale, w_scale, bias, y, columns or Columns(), config=config)
    quantize_rows(x, x_int8, x_scale, config=config)


def _norm_rope(tensors, rope_dims=8, eps=1e-6, in_place=False):
    from ra_triton.call.norm_rope import NormRope
    from ra_triton.kernels.lanes import norm_rope, norm_rope_backward

    *read, q_out, k_out, dq_out, dk_out = tensors.values()
    call = NormRope._make((*read, rope_dims, eps))
    norm_rope._launch(call, q_out, k_out, in_place=in_place)
    norm_rope_backward.norm_rope_backward(call, dq_out, dk_out, [True] * 6)


def _composing(tensors, needed=(True,) * 9, dbias=True, gate=None, grad=None, **changed):
    from ra_triton.kernels.composition import backward as compose_backward
    from ra_triton.kernels.composition import forward as compose
    from ra_triton.weights.factors import Factors

    *read, dw, dbias_ = tensors.values()
    read[5] = read[5].to(gate or dw.dtype)
    dw, dbias_ = (t.to(grad or t.dtype) for t in (dw, dbias_))
    options = {"std": None, "rec": None, "n_head": 2, "n_kv_head": 2, "packed": True}
    options = {**options, "into": torch.float32, **changed}
    factors = Factors._make((*read, *options.values()))
    if factors.n_kv_head == 1:
        factors = factors._replace(W_k=read[1][:, :16], W_v=read[2][:, :16], b_k=read[7][:16])
    if factors.std is not None:
        factors = factors._replace(w_std=None)
    if factors.rec is not None:
        factors = factors._replace(w_rec=None)
    compose.compose(factors)
    compose_backward.compose_gradients(factors, dw, dbias_ if dbias else None, needed)


def _decode(tensors, max_length=300, **options):
    from ra_triton.kernels.attention.decode import decode

    decode(*tensors.values(), max_length=max_length, **options)


def _append(tensors, max_len=9):
    from ra_triton.kernels.lanes.append import append_

    tensors["k_cache"] = tensors["k_cache"][:, :max_len]
    append_(*tensors.values())


ROWS = (2, 6, 2, 16)
SHAPES = {
    _attention: {
        **dict.fromkeys(("q", "k", "v", "o"), ROWS),
        "lse": (2, 2, 6),
        **dict.fromkeys(("do", "dq", "dk", "dv"), ROWS),
        "dlse": (2, 2, 6),
        "seed": (1,),
    },
    _gemms: {"x": (2, 6, 8), "w": (8, 48), "bias": (48,), "y": (2, 6, 48), "g": (2, 6, 48)},
    _int8: {
        **{"x": (2, 6, 8), "w": (24, 8), "x_scale": (12,), "w_scale": (24,), "bias": (48,)},
        **{"y": (2, 6, 48), "x_int8": (2, 6, 8)},
    },
    _packing: {
        **dict.fromkeys(("q", "k"), ROWS),
        **dict.fromkeys(("q_low", "k_low"), (2, 6, 2, 4)),
        **dict.fromkeys(("q_pack", "k_pack"), ROWS),
    },
    _norm_rope: {
        **dict.fromkeys(("q", "k"), ROWS),
        **dict.fromkeys(("q_low", "k_low"), (2, 6, 2, 4)),
        **dict.fromkeys(("q_weight", "k_weight"), (16,)),
        **{"cos": (6, 4), "sin": (6, 4), "positions": (2,)},
        **dict.fromkeys(("q_out", "k_out", "dq_out", "dk_out"), ROWS),
    },
    _composing: {
        **dict.fromkeys(("W_q", "W_k", "W_v"), (24, 32)),
        **{"W_recip": (16, 4), "w_std": (2,), "w_rec": (2,)},
        **dict.fromkeys(("b_q", "b_k", "b_v"), (32,)),
        **{"dw": (24, 96), "dbias": (96,)},
    },
    _decode: {
        "q": ROWS,
        **dict.fromkeys(("k", "v"), (2, 300, 2, 16)),
        "lengths": (2,),
    },
    _append: {
        **dict.fromkeys(("k_cache", "v_cache"), (2, 9, 2, 16)),
        "lengths": (2,),
        **dict.fromkeys(("k", "v"), ROWS),
    },
}
CU = torch.zeros(4, dtype=torch.int32, device=DEVICE)
ATTENTION_OPTIONS = [
    *({"causal": False}, {"softmax_scale": 0.5}, {"dropout_p": 0.2}, {"dropout_p": 0.0}),
    *({"config": LaunchConfig(rows, 4, block_n=16)} for rows in (16, 32)),
    *({"window_size": window} for window in ((3, 0), (2, 0), (3, 1))),
    *({"softcap": softcap} for softcap in (2.0, 3.0)),
    *({"offsets": Offsets(CU[:-1], CU[:-1], *most)} for most in ((4, 4), (4, 3), (3, 4))),
    *({"offsets": Offsets(*cu, 4, 4)} for cu in ((CU, CU), (CU[1:], CU[:-1]), (CU[:-1], CU[1:]))),
]
GEMM_OPTIONS = [{"config": LaunchConfig(rows, 4, block_n=16, block_k=16)} for rows in (16, 32)]
NORM_ROPE_OPTIONS = [{"rope_dims": 4}, {"eps": 1e-5}, {"eps": None}]
COMPOSE_OPTIONS = [
    *({"std": 0.5}, {"std": 2.0}, {"rec": 0.5}, {"rec": 2.0}),
    *({"n_head": 1, "n_kv_head": 1}, {"n_kv_head": 1}, {"packed": False}, {"gate": torch.float16}),
]
COMPOSE_READS = "W_q W_k W_v W_recip", "w_std w_rec b_q b_k b_v"
GRADIENT_OPTIONS = [
    {"dbias": False},
    {"grad": torch.float16},
    {"needed": (True,) * 5 + (False,) * 4},
]
NORM_ROPE_READS = "q k q_low k_low cos sin", "q_weight k_weight positions"
DECODE_OPTIONS = [
    *({"max_length": 200}, {"left": 3}, {"softmax_scale": 0.5}, {"softcap": 2.0}),
    {"config": LaunchConfig(16, 4, block_n=16, block_k=64)},
]
DEPENDS = {  # kernel: its caller, tensors that may have any strides, tensors that may not, options
    "_attention_forward_kernel": (_attention, "q k v", "o lse seed", ATTENTION_OPTIONS),
    "_delta_kernel": (_attention, "do", "o dlse", []),
    "_key_value_gradient_kernel": (_attention, "q k v do dk dv", "lse seed", ATTENTION_OPTIONS),
    "_query_gradient_kernel": (_attention, "q k v do dq", "lse seed", ATTENTION_OPTIONS),
    "_projection_kernel": (_gemms, "x w", "bias y", [*GEMM_OPTIONS, {"stage": "input_gradient"}]),
    "_weight_gradient_kernel": (_gemms, "x", "g", GEMM_OPTIONS),
    "_column_sum_kernel": (_gemms, "", "g", GEMM_OPTIONS),
    "_int8_projection_kernel": (
        *(_int8, "x", "w x_scale w_scale bias y"),
        [*GEMM_OPTIONS, *({"columns": Columns(start, 4, 2, 4)} for start in (0, 4))],
    ),
    "_quantize_rows_kernel": (_int8, "x", "x_scale x_int8", GEMM_OPTIONS),
    "_pack_kernel": (_packing, "q k q_low k_low q_pack k_pack", "", [{"in_place": True}]),
    "_norm_rope_kernel": (
        *(_norm_rope, NORM_ROPE_READS[0] + " q_out k_out", NORM_ROPE_READS[1]),
        [*NORM_ROPE_OPTIONS, {"eps": None, "in_place": True}],
    ),
    "_norm_rope_backward_kernel": (
        *(_norm_rope, NORM_ROPE_READS[0] + " dq_out dk_out", NORM_ROPE_READS[1]),
        NORM_ROPE_OPTIONS,
    ),
    "_compose_kernel": (
        *(_composing, *COMPOSE_READS),
        [*COMPOSE_OPTIONS, {"into": torch.float16}],
    ),
    "_compose_backward_kernel": (
        *(_composing, COMPOSE_READS[0] + " dw", COMPOSE_READS[1] + " dbias"),
        [*COMPOSE_OPTIONS, *GRADIENT_OPTIONS],
    ),
    "_compose_sums_kernel": (
        *(_composing, COMPOSE_READS[0] + " dw", COMPOSE_READS[1] + " dbias"),
        [*COMPOSE_OPTIONS, *GRADIENT_OPTIONS],
    ),
    "_decode_kernel": (_decode, "q k v", "lengths", DECODE_OPTIONS),
    "_decode_combine_kernel": (_decode, "q k v", "lengths", DECODE_OPTIONS),
    "_append_kernel": (_append, "k v", "k_cache v_cache lengths", [{"max_len": 8}]),
}


NO_PRODUCTS = (
    *("_delta_kernel", "_column_sum_kernel", "_pack_kernel", "_quantize_rows_kernel"),
    *("_norm_rope_kernel", "_norm_rope_backward_kernel", "_append_kernel"),
    *("_compose_kernel", "_compose_backward_kernel", "_compose_sums_kernel"),  # IEEE always
)


def _allocate(name, shape, dtype, offset=0, spare=0):
    """A tensor that begins ``offset`` elements into its buffer, its rows ``spare`` apart."""
    if name in ("seed", "positions"):
        dtype = torch.int64
    elif name == "lengths":
        dtype = torch.int32
    elif "lse" in name:
        dtype = torch.float32
    wide = (*shape[:-1], shape[-1] + spare)
    flat = torch.zeros(offset + torch.Size(wide).numel(), dtype=dtype, device=DEVICE)
    return flat[offset:].view(wide)[..., : shape[-1]]


@pytest.mark.parametrize("kernel", DEPENDS)
def test_what_a_launch_depends_on_makes_another_plan(monkeypatch, fresh_plans, kernel):
    caller, strided, others, options = DEPENDS[kernel]
    launched = []
    monkeypatch.setattr(plans.Plan, "__call__", lambda self, *tensors: launched.append(self))

    def plan(dtype=torch.float32, changed="", offset=0, spare=0, **options):
        launched.clear()
        tensors = {
            name: _allocate(name, shape, dtype, *((offset, spare) if name == changed else ()))
            for name, shape in SHAPES[caller].items()
        }
        caller(tensors, **options)
        (found,) = (plan for plan in launched if plan.kernel.__name__ == kernel)
        return found

    found = {"as it is": plan()}
    assert plan() is found["as it is"]
    for name in strided.split():
        found[f"strides of {name}"] = plan(changed=name, spare=16)
    for name in (strided + " " + others).split():
        found[f"address of {name}"] = plan(changed=name, offset=1)
    for i, option in enumerate(options):
        found[f"{i}: {option}"] = plan(**option)
    found["dtype"] = plan(torch.float16)
    if kernel not in NO_PRODUCTS:
        monkeypatch.setattr("ra_triton.kernels.tiles.allows_tf32", lambda: True)
        found["precision"] = plan()
    names = {id(plan): name for name, plan in reversed(found.items())}
    assert {name: names[id(plan)] for name, plan in found.items()} == {name: name for name in found}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_integer_products_into_another_dtype_are_another_plan(monkeypatch, fresh_plans, dtype):
    """Their operands are int8 whatever the result is."""
    launched = []
    monkeypatch.setattr(plans.Plan, "__call__", lambda self, *tensors: launched.append(self))
    for y_dtype in (torch.float16, dtype):
        tensors = {
            name: _allocate(name, shape, torch.int8) for name, shape in SHAPES[_int8].items()
        }
        for name in ("x_scale", "w_scale"):
            tensors[name] = tensors[name].float()
        _int8({**tensors, "bias": None, "y": tensors["y"].to(y_dtype)})
    first, _, second, _ = launched
    assert first is not second


def test_descriptors_are_for_what_one_stride_leads_through(monkeypatch, fresh_plans):
    from ra_triton.kernels.projection import backward as projection_backward
    from ra_triton.kernels.projection import forward as projection

    launched = []
    monkeypatch.setattr(plans.Plan, "__call__", lambda self, *tensors: launched.append(self))
    for stage in (projection, projection_backward):
        monkeypatch.setattr(stage, "target_of", lambda device: "sm_90")
    half = {"dtype": torch.float16, "device": DEVICE}
    x, apart = torch.zeros(2, 16, 64, **half), torch.zeros(2, 24, 64, **half)[:, :16]
    w, lanes_apart = torch.zeros(64, 64, **half), torch.zeros(64, 64, 8, **half)[..., 0]
    for rows, bulk in ((x, True), (apart, False), (apart[:1], True)):
        projection.projection(rows, w, None)
        projection_backward.weight_gradient(rows, x[: len(rows)])
        assert [bool(launched.pop().bulk) for _ in range(2)] == [bulk, bulk]
    for weight, bulk in ((w.mT, True), (lanes_apart, False), (lanes_apart.mT, False)):
        projection.projection(x, weight, None)
        assert bool(launched.pop().bulk) == bulk


# Later calls


class OnGPU(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = property(lambda self: True)


def test_later_calls_pass_their_own_tensors_and_the_rest_in_the_kernels_order(monkeypatch):
    compiled, made, later, current = [], [], [], []
    monkeypatch.setattr(plans, "make_context_current", lambda: current.append(len(compiled)))

    class Kernel:
        arg_names = ("a", "b", "c", "first", "second", "PDL")

        def __getitem__(self, grid):
            return lambda *tensors, **arguments: compiled.append((grid, tensors, arguments))

    def launcher(*arguments):
        made.append(arguments)
        return lambda *tensors: later.append(tensors)

    monkeypatch.setattr(plans, "launcher", launcher)
    arguments = {"num_warps": 4, "PDL": True, "second": 22, "first": 11}
    bulk = {1: plans.Bulk((6, 8), (8, 1), (2, 8))}
    plan = plans.Plan(Kernel(), (3,), arguments, bulk)

    def tensors():
        return torch.zeros(4).as_subclass(OnGPU), torch.zeros(6, 8).as_subclass(OnGPU), None

    first = tensors()
    plan(*first)
    ((grid, passed, named),) = compiled
    assert (grid, named) == ((3, 1, 1), arguments)
    assert current == [0]  # before Triton encodes the descriptor, perhaps in a new thread
    assert passed[0] is first[0]
    assert passed[1].base is first[1]
    ((_, grid, example, descriptors, rest),) = made
    assert grid == (3, 1, 1)
    assert [a is b for a, b in zip(example, first, strict=True)] == [True] * 3
    assert list(descriptors) == [1]
    assert rest == [11, 22, True]
    for _ in range(2):
        given = tensors()
        plan(*given)
        assert all(a is b for a, b in zip(later.pop(), given, strict=True))
    assert len(compiled) == len(made) == 1
    alive = [weakref.ref(t) for t in (*first[:2], *given[:2])]
    compiled.clear(), made.clear()
    del first, given, passed, example, descriptors
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


DEPENDENT = """
import re, torch
from bench.machine_code.aot import compile_for
from ra_triton.weights.factors import Factors
from ra_triton.kernels.lanes import append
from ra_triton.kernels.attention import backward as attention_backward
from ra_triton.kernels.attention import backward_hopper
from ra_triton.kernels.attention import forward as attention_forward
from ra_triton.kernels.attention import decode
from ra_triton.kernels.composition import forward as compose
from ra_triton.kernels.composition import backward as compose_backward
from ra_triton.kernels.lanes import norm_rope
from ra_triton.kernels.lanes import norm_rope_backward
from ra_triton.kernels.lanes import packing
from ra_triton.kernels.projection import forward as projection
from ra_triton.kernels.projection import backward as projection_backward
from ra_triton.kernels.projection import int8 as projection_int8
from ra_triton.weights.layout import Columns
from ra_triton.call.norm_rope import NormRope

attention, gemms = (attention_backward, attention_forward), (projection, projection_backward)
others = (norm_rope, norm_rope_backward, packing, projection_int8, append, decode)
others += (compose, compose_backward)
for stage in (*attention, *gemms, *others):
    stage.target_of = lambda device: "sm_90"
rows = torch.zeros(1, 2048, 16, dtype=torch.float16)
q, k, v, do, dq, dk, dv = (rows.clone()[:, :64, None] for _ in range(7))
options = {"causal": True, "softmax_scale": None}
with compile_for("sm_90") as compiled:
    o, lse = attention_forward.attention_forward(q, k, v, **options)
    attention_backward.attention_backward(q, k, v, o, lse, do, dq, dk, dv, **options)
    for_rows = torch.zeros(1, 2, 256), torch.zeros(3, dtype=torch.int32)
    backward_hopper.Plans.__call__ = lambda plans, q, k, v, o, lse, do, dlse, *gradients: (
        plans.rows(o, do, lse, dlse, *for_rows, None, None)
    )
    long = torch.zeros(1, 256, 1, 64, dtype=torch.float16)
    statistics, grads = torch.zeros(1, 1, 256), [long] * 3
    attention_backward.attention_backward(*[long] * 4, statistics, long, *grads, **options)
    packing.pack(q, k, q[..., :4], k[..., :4])
    call = NormRope(q, k, *[None] * 4, *[torch.zeros(64, 8)] * 2, None, 16, 1e-6)
    norm_rope.norm_rope(call)
    norm_rope_backward.norm_rope_backward(call, dq, dk, [True] * 6)
    w, b, gate = rows[0, :32], rows[0, 0], rows[0, 0, :1]
    numbers = (None, None, 1, 1, True, torch.float16)
    factors = Factors(w, w, w, w[:16, :4], gate, gate, b, b, b, *numbers)
    compose_backward.compose_gradients(factors, *compose.compose(factors), [True] * 9)
    lengths = torch.zeros(1, dtype=torch.int32)
    decode.decode(q[:, :1], k, v, lengths, max_length=64)
    append.append_(k.clone(), v.clone(), lengths, k[:, :1], v[:, :1])
    projection.projection(rows, rows[0, :16], None)
    projection_backward.weight_gradient(rows, rows)
    projection_backward.bias_gradient(rows)
    x_int8, scale = torch.zeros_like(rows, dtype=torch.int8), torch.zeros(2048)
    projection_int8.quantize_rows(rows, x_int8, scale)
    projection_int8.int8_projection(
        x_int8, x_int8[0, :16], scale, scale[:16], None, rows, Columns()
    )
for kernel in compiled:
    ptx = kernel.kernel.asm["ptx"]
    access = re.search("(ld|st)[.]global|cp[.]async", ptx).start()
    print(kernel.kernel.name, 0 <= ptx.find("griddepcontrol.wait") < access)
"""


def test_kernels_launched_early_wait_before_they_touch_memory():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", DEPENDENT],
        env={**env, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    waits = dict(line.split() for line in run.stdout.splitlines())
    others = ["_add_splits_kernel", "_delta_and_lse_kernel"]
    assert waits == dict.fromkeys([*DEPENDS, *others], "True")


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
    gc.collect()  # of tests before
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
