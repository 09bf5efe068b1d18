"""2:4 sparse weights: what is pruned, that results are the dense ones', what a GPU takes."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from budget import assert_attention_close, assert_bitwise, assert_projection_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, few_examples, normal

import ra_triton
from bench import ladder
from bench import sparsity as bench
from bench.harness import rungs
from bench.harness.gate import admit
from bench.harness.rungs import RUNGS, Factors
from bench.harness.shapes import Shape
from bench.models import accuracy
from ra_triton.nn import Workspace
from ra_triton.weights import sparsity
from ra_triton.weights.layout import RALayout
from ra_triton.weights.reduced import check_reduced_inputs

CUDA = torch.device("cuda")
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU takes fewer sizes and dtypes")


@st.composite
def weights(draw):
    """``W_fused [C, N]`` in split order, R and heads."""
    H_kv, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    D = draw(st.sampled_from([4, 16, 20]))
    R = draw(st.sampled_from([1, 4, D]))
    C = 4 * draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    W = normal(C, (group + 2) * H_kv * D, dtype=dtype, seed=draw(st.integers(0, 9)))
    if draw(st.booleans()):
        W = W.round()  # many equal magnitudes and zeros
    return W, R, {"n_head": H_kv * group, "n_kv_head": H_kv}


def naive_prune(column: list[float]) -> list[float]:
    """Two of four, one by one; the first ones of equal ones."""
    kept = []
    for start in range(0, len(column), 4):
        four = column[start : start + 4]
        best = sorted(range(4), key=lambda i: (-abs(four[i]), i))[:2]
        kept += [value if i in best else 0.0 for i, value in enumerate(four)]
    return kept


# What is pruned


@on_cpu
@few_examples
@given(drawn=weights(), which=st.sampled_from(sparsity.WHICH))
def test_exactly_two_of_four_stay_by_magnitude_and_the_first_of_equal_ones(drawn, which):
    W, R, heads = drawn
    before = W.clone()
    sparse = ra_triton.sparsify_weight(W, R, which=which, **heads)
    assert_bitwise(W, before)
    layout = RALayout.from_columns(W.shape[1], R, **heads)
    found = layout.split_columns(ra_triton.unpack_weight(sparse.dense(), R, **heads))
    for name, section in layout.split_columns(W).items():
        if section.numel() and (which == "all" or name in ("q_low", "k_low")):
            columns = [naive_prune(c) for c in section.flatten(1).mT.tolist()]
            section = torch.tensor(columns, dtype=W.dtype).mT.view(section.shape)
        assert_bitwise(found[name], section, name)


@on_cpu
@few_examples
@given(drawn=weights(), which=st.sampled_from(sparsity.WHICH))
def test_a_saved_weight_comes_back(drawn, which):
    W, R, heads = drawn
    dense = ra_triton.sparsify_weight(W, R, which=which, **heads).dense()
    again = ra_triton.sparsify_weight(dense, R, which=which, weight_layout="packed", **heads)
    assert_bitwise(again.dense(), dense)
    assert again.which == which
    assert again.shape == W.shape
    assert again.dtype == W.dtype


def test_the_order_of_equal_magnitudes():
    rows = torch.tensor([[1.0, -1, 1, 1], [0, 0, 0, 5], [-3, 2, 3, 2], [1, 2, 3, 4]])
    kept = torch.tensor([[1.0, -1, 0, 0], [0, 0, 0, 5], [-3, 0, 3, 0], [0, 0, 3, 4]])
    assert_bitwise(sparsity.prune(rows), kept)


# Results


@on_cpu
@pytest.mark.parametrize("which", sparsity.WHICH)
@pytest.mark.parametrize("weight_layout", ["split", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_the_pruned_dense_weight(which, weight_layout, dtype):
    x, W = normal(2, 21, 24, dtype=dtype), normal(24, 4 * 20, dtype=dtype, seed=1, scale=0.2)
    bias, heads = normal(80, dtype=dtype, seed=2), {"n_head": 2, "n_kv_head": 1}
    sparse = ra_triton.sparsify_weight(W, 3, which=which, weight_layout=weight_layout, **heads)
    packed_bias = bias
    if weight_layout == "split":
        packed_bias = ra_triton.pack_weight(bias, 3, **heads)
    for b, packed_b in ((None, None), (bias, packed_bias)):
        options = {"bias": b, "weight_layout": weight_layout}
        packed = ra_triton.project(x, sparse, 3, **options)
        y = torch.cat(packed, dim=2).flatten(2)
        assert_projection_close(y, x, sparse.dense(), packed_b, bias_rounds_too=True)
        out = ra_triton.ra_attention(x, sparse, 3, **heads, **options, causal=False)
        assert_attention_close(out.unflatten(2, (2, 20)), *packed, causal=False)


@on_cpu
@pytest.mark.parametrize("backend", ["triton", "sdpa", "flex"])
def test_the_backend_says_who_attends(backend):
    x, W = normal(2, 9, 24), normal(24, 3 * 32, scale=0.2)
    sparse = ra_triton.sparsify_weight(W, 4, n_head=2, which="all")
    packed = ra_triton.project(x, sparse, backend=backend)
    out = ra_triton.ra_attention(x, sparse, backend=backend)
    assert_bitwise(out, ra_triton.packed_attention(*packed, backend=backend).flatten(2))


@on_cpu
def test_autocast_casts_x_to_the_dtype_of_the_weight():
    x, W = normal(2, 9, 24), normal(24, 96, dtype=torch.bfloat16, scale=0.2)
    sparse = ra_triton.sparsify_weight(W, 4, n_head=2)
    with torch.autocast("cpu", torch.bfloat16):
        out = ra_triton.ra_attention(x, sparse)
    assert_bitwise(out, ra_triton.ra_attention(x.bfloat16(), sparse))


# What is refused


def call(x=None, W=None, R=4, **options):
    x = normal(2, 9, 24) if x is None else x
    W = ra_triton.sparsify_weight(normal(24, 96), 4, n_head=2) if W is None else W
    return ra_triton.ra_attention(x, W, R, **options)


@on_cpu
@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "W_fused must be [C, N] with C = 28 like x", {"x": torch.zeros(2, 9, 28)}),
        (TypeError, "W_fused must be torch.float16 like x", {"x": torch.zeros(2, 9, 24).half()}),
        (TypeError, "x must be a tensor", {"x": "text"}),
        (ValueError, "x must be [B, T, C]", {"x": torch.zeros(9, 24)}),
        (ValueError, "R must be 4 like the sparse weight's, got 3", {"R": 3}),
        (TypeError, "R must be 4 like the sparse weight's, got 4.0", {"R": 4.0}),
        (ValueError, "n_head must be 2 like", {"n_head": 4}),
        (ValueError, "n_kv_head must be 2 like", {"n_kv_head": 1}),
        (ValueError, "bias must be one value per column", {"bias": torch.zeros(95)}),
        (ValueError, "weight_layout must be one of", {"weight_layout": "fused"}),
        (ValueError, "backend must be one of", {"backend": "cudnn"}),
        (ValueError, "workspace cannot be used with a sparse", {"workspace": Workspace()}),
        (ValueError, "x needs a gradient", {"x": torch.zeros(2, 9, 24, requires_grad=True)}),
        (ValueError, "bias needs a gradient", {"bias": torch.zeros(96, requires_grad=True)}),
        (NotImplementedError, "dropout_p", {"dropout_p": 0.5, "backend": "flex"}),
    ],
)
def test_wrong_calls_are_refused(error, match, arguments):
    with pytest.raises(error, match=re.escape(match)):
        call(**arguments)


def test_another_device_is_refused():
    sparse = ra_triton.sparsify_weight(torch.ones(24, 96), 4, n_head=2)
    x = torch.zeros(2, 9, 24, device="meta")
    with pytest.raises(ValueError, match="W_fused must be on meta like x, got cpu"):
        check_reduced_inputs(x, sparse, None, 4, None, None)


@on_cpu
def test_a_gradient_is_refused_and_no_grad_is_not():
    x = normal(2, 9, 24).requires_grad_()
    sparse = ra_triton.sparsify_weight(normal(24, 96), 4, n_head=2)
    with torch.no_grad():
        assert not call(x, sparse).requires_grad
    with pytest.raises(ValueError, match=r"x needs a gradient.*torch.no_grad"):
        ra_triton.project(x, sparse)
    with pytest.raises(ValueError, match="out cannot be used with a sparse weight"):
        ra_triton.project(x.detach(), sparse, out=torch.empty(2, 9, 6, 16))


@pytest.mark.parametrize(
    ("error", "match", "weight", "options"),
    [
        (ValueError, "C a multiple of 4, got (22, 96)", torch.zeros(22, 96), {}),
        (ValueError, "C a multiple of 4, got (0, 96)", torch.zeros(0, 96), {}),
        (ValueError, "C a multiple of 4, got (96,)", torch.zeros(96), {}),
        (ValueError, "W_fused has 95 columns", torch.zeros(24, 95), {}),
        (ValueError, "which must be one of", torch.zeros(24, 96), {"which": "some"}),
        (ValueError, "weight_layout must be one of", torch.zeros(24, 96), {"weight_layout": "x"}),
        (ValueError, "needs R >= 1, got R=0", torch.zeros(24, 96), {"R": 0}),
        (ValueError, "W_fused must be finite", torch.full((24, 96), float("nan")), {}),
        (TypeError, "W_fused must be one of", torch.zeros(24, 96).double(), {}),
        (TypeError, "W_fused must be a tensor", None, {}),
        (NotImplementedError, "got meta", torch.zeros(24, 96, device="meta"), {}),
    ],
)
def test_weights_that_cannot_be_pruned_are_refused(error, match, weight, options):
    with pytest.raises(error, match=re.escape(match)):
        ra_triton.sparsify_weight(weight, **{"R": 4, "n_head": 2, **options})


def test_without_reciprocal_columns_all_can_be_pruned():
    sparse = ra_triton.sparsify_weight(torch.ones(24, 96), 0, n_head=2, which="all")
    assert sparse.dense().count_nonzero() == 24 * 96 // 2
    assert "SparseWeight('all', shape=(24, 96)" in repr(sparse)


# What a GPU takes


@pytest.mark.parametrize(
    ("capability", "version", "expected"),
    [
        ((7, 5), 701, "need compute capability 8.0 (Ampere) or newer, got 7.5"),
        ((8, 0), 0, "cutlass"),
        ((8, 6), 501, "cusparselt"),
        ((9, 0), 701, "cusparselt"),
        ((9, 0), 602, "cusparselt"),
        ((9, 0), 501, "cuSPARSELt 0.6.2 or newer, got 501"),
        ((9, 0), 0, "cuSPARSELt 0.6.2 or newer, got none"),
    ],
)
def test_kernels_are_chosen_by_device_and_library(capability, version, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: version > 0)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
    if expected in sparsity.LIMITS:
        assert sparsity.kernels_on(CUDA) == expected
        return
    with pytest.raises(NotImplementedError, match=re.escape(expected)):
        sparsity.kernels_on(CUDA)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "float16 or bfloat16", ("cutlass", "all", 96, 64, torch.float32)),
        (ValueError, "multiple of 64 channels", ("cutlass", "all", 96, 96, torch.float16)),
        (ValueError, "multiple of 16 channels", ("cusparselt", "all", 96, 24, torch.float16)),
        (ValueError, "multiple of 32 columns", ("cutlass", "all", 48, 64, torch.float16)),
        (
            ValueError,
            "multiple of 16 reciprocal columns, (n_head + n_kv_head) * R, for cusparselt, got 8; "
            "which='all' may fit",
            ("cusparselt", "reciprocal", 8, 64, torch.bfloat16),
        ),
        (ValueError, "got 0", ("cusparselt", "all", 0, 64, torch.bfloat16)),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_with_the_reason(error, match, arguments):
    with pytest.raises(error, match=re.escape(match)):
        sparsity.check_limits(*arguments)


def test_gpt2_fits_and_a_lone_w_recip_does_not():
    D, R, C, H = 64, 4, 768, 12
    for kernels in sparsity.LIMITS:
        sparsity.check_limits(kernels, "all", 3 * H * D, C, torch.float16)
        sparsity.check_limits(kernels, "reciprocal", 2 * H * R, C, torch.float16)
        for rows, channels in ((R, D), (D, R)):  # W_recip, held either way
            with pytest.raises(ValueError, match="multiple of"):
                sparsity.check_limits(kernels, "all", rows, channels, torch.float16)


def test_the_limits_are_pytorchs():
    classes = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    for kernels, limits in sparsity.LIMITS.items():
        for dtype in sparsity.SPARSE_DTYPES:
            theirs = classes[kernels]._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert (theirs.sparse_min_rows, theirs.sparse_min_cols) == limits


def test_a_composed_weight_of_a_pruned_w_recip_is_dense():
    W_q, W_recip = normal(64, 32), sparsity.prune(normal(4, 32).mT.contiguous())
    assert (W_recip == 0).double().mean() == 0.5
    assert (W_q @ W_recip).count_nonzero() == 64 * 4


# What the benchmarks say


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", sparsity.WHICH)
def test_the_rungs_are_right_and_their_gate_knows_what_was_pruned(which, dtype):
    rung, shape = RUNGS[f"sparse-{which}"], Shape("tiny", 2, 24, 3, 16)
    assert rung.unavailable("cpu") == rungs.NO_SPARSITY_HERE
    assert "no gradient" in rung.forward_only
    inputs = rung.inputs(Factors.draw(shape, torch.device("cpu")), dtype, False)
    gate = ladder._gate(rung.source, shape, inputs, None)
    found = []
    for make in (partial(rungs._sparse, 4, which, "sdpa"), partial(rungs._packed, 4, "sdpa")):
        layer = partial(replace(rung, make=make).layer, shape, inputs)
        found.append(admit("sparse", layer, gate, None, nullcontext)[1])
    assert found == ["ok", "failed the gate"]  # the second: the weight with nothing pruned


def test_a_rung_says_why_a_gpu_cannot_run_it(monkeypatch):
    def refuse(device):
        raise NotImplementedError("too old")

    monkeypatch.setattr(sparsity, "kernels_on", refuse)
    assert RUNGS["sparse-all"].unavailable("cuda") == "too old"


@on_cpu
def test_the_accuracy_page_is_that_of_its_figures(tmp_path):
    pytest.importorskip("tqdm")
    tiny = ["--steps", "2", "--batch", "2", "--block", "8", "--layers", "1", "--heads", "2"]
    tiny += ["--width", "32", "--batches", "2"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert bench.main([*tiny, "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    for folder in (tmp_path, accuracy.RESULTS):
        document = json.loads((folder / "sparsity-cpu.json").read_text())
        assert bench.markdown(document) == (folder / "sparsity-cpu.md").read_text()
        low, every = document["rows"]
        assert every["zeros"] == 0.5
        for name, error in low["lanes"].items():
            assert (error > 1e-3) == (name in ("q_low", "k_low"))
        assert min(every["lanes"].values()) > 1e-3
        for layer in document["factors"]:
            assert layer["zeros"][0] >= 0.5
            assert len(layer["refused"]) == 4


def test_a_missing_folder_is_told(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--out", "nowhere"])
    assert "no such folder: nowhere" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("which", sparsity.WHICH)
@pytest.mark.parametrize("dtype", sparsity.SPARSE_DTYPES)
def test_the_gpus_kernels_multiply_the_pruned_weight(which, dtype):
    x = normal(2, 130, 768, dtype=dtype)
    W, bias = normal(768, 2304, dtype=dtype, scale=768**-0.5), normal(2304, dtype=dtype, seed=1)
    sparse = ra_triton.sparsify_weight(W, 4, which=which, weight_layout="packed")
    assert isinstance(sparse.data, torch.sparse.SparseSemiStructuredTensor)
    reference = ra_triton.sparsify_weight(W.cpu(), 4, which=which, weight_layout="packed").dense()
    assert_bitwise(sparse.dense().cpu(), reference)
    for b in (None, bias):
        packed = ra_triton.project(x, sparse, bias=b, weight_layout="packed")
        y = torch.cat(packed, dim=2).flatten(2)
        assert_projection_close(y, x, reference.to(x.device), b, bias_rounds_too=True)
        out = ra_triton.ra_attention(x, sparse, bias=b, weight_layout="packed")
        assert_attention_close(out.unflatten(2, (12, 64)), *packed)
