"""The direct launch passes Triton's C launcher what Triton's own path passes, and keeps nothing."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import triton
from budget import assert_bitwise
from strategies import normal
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

import ra_triton
from ra_triton.kernels import launcher as launcher_module
from ra_triton.kernels import plans
from ra_triton.kernels.launcher import ADDRESSES, Descriptors, launcher

META = {"swizzle": 3, "elem_size": 2, "elem_type": 5, "block_size": [2, 8], "fp4_padded": False}
SIGNATURE = {0: "*fp16", 1: "tensordesc<fp16[2, 8]>", 2: "*fp32", 3: "i32", 4: "constexpr"}
GRID, REST = (3, 1, 1), [11, True]


class Encoded:
    """What stands for the hardware's descriptor."""

    def __init__(self, *arguments):
        self.arguments = arguments


@pytest.fixture
def driver(monkeypatch):
    """A driver that encodes descriptors as what they were made of, and counts them."""
    made = []

    def encode(*arguments):
        made.append(arguments)
        return Encoded(*arguments)

    utils = SimpleNamespace(fill_tma_descriptor_tiled=encode, fill_tma_descriptor=encode)
    fake = SimpleNamespace(
        utils=utils, get_current_stream=lambda device: 77, get_current_device=lambda: 0, made=made
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return fake


def kernel(signature=SIGNATURE, metadata=(META,), scratch=0):
    """A compiled kernel whose C launcher records its arguments."""
    calls = []
    run = CudaLauncher.__new__(CudaLauncher)
    run.launch = wrap_handle_tensordesc(lambda *args: calls.append(args), signature, metadata)
    run.global_scratch_size = run.profile_scratch_size = scratch
    run.global_scratch_align = run.profile_scratch_align = 1
    run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, False, True
    run.arg_annotations, run.kernel_signature = "annotations", "signature"
    compiled = CompiledKernel.__new__(CompiledKernel)
    compiled._run, compiled.module, compiled.function = run, "module", 1234
    compiled.packed_metadata, compiled.src, compiled.name = (4, 1, 512), None, "kernel"
    return compiled, calls


def tensors():
    return torch.zeros(4), torch.zeros(6, 8, dtype=torch.float16), None


def described(t):
    return {1: Descriptors(TensorDescriptor, vars(TensorDescriptor(t, [6, 8], [8, 1], [2, 8])))}


def flat(call):
    """Arguments in order: lists opened, hooks and launch metadata as None, tensors by identity."""
    for value in call:
        if isinstance(value, list | tuple):
            yield from flat(value)
        elif isinstance(value, Encoded):
            yield value.arguments
        elif isinstance(value, torch.Tensor):
            yield id(value)
        else:
            yield value if isinstance(value, int | str) else None


@pytest.mark.parametrize("bulk", [True, False])
def test_the_c_launcher_gets_what_triton_would_pass(driver, bulk):
    signature = SIGNATURE if bulk else {**SIGNATURE, 1: "*fp16"}
    compiled, calls = kernel(signature, (META,) if bulk else ())
    first, later = tensors(), tensors()
    descriptors = described(first[1]) if bulk else {}
    usual = launcher_module._usual(compiled, GRID, descriptors, REST)
    launch = launcher(compiled, GRID, first, descriptors, REST)
    for given in (first, later, first):
        usual(*given), launch(*given)
        expected, found = (list(flat(call)) for call in calls)
        assert found == expected
        assert [id(t) in found for t in given] == [True, not bulk, False]
        assert {77, 1234, 11}.issubset(v for v in found if isinstance(v, int))
        calls.clear()


def test_a_descriptor_is_encoded_once_for_an_address(driver):
    compiled, _ = kernel()
    first, later = tensors(), tensors()
    launch = launcher(compiled, GRID, first, described(first[1]), REST)
    driver.made.clear()
    for given in (first, later, later, first):
        launch(*given)
    assert [made[0] for made in driver.made] == [first[1].data_ptr(), later[1].data_ptr()]


def test_descriptors_are_few_and_keep_no_tensor_alive(driver):
    first = tensors()
    descriptors = described(first[1])[1]
    many = torch.zeros(ADDRESSES + 5, 8, dtype=torch.float16)
    for row in many:
        descriptors.encoded(row, lambda d: [d.base.data_ptr()])
        assert len(descriptors._encoded) <= ADDRESSES
    assert descriptors.encoded(many[-1], None) == many[-1].data_ptr()
    compiled, calls = kernel()
    launch = launcher(compiled, GRID, first, {1: descriptors}, REST)
    launch(*first)
    calls.clear()
    alive = [weakref.ref(t) for t in first[:2]]
    del first
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.parametrize("why", ["scratch", "pointer", "unknown wrapper", "unknown launcher"])
def test_an_unknown_launcher_is_called_as_triton_calls_it(driver, monkeypatch, why):
    compiled, calls = kernel(metadata=(None,) if why == "pointer" else (META,))
    first = tensors()
    descriptors = described(first[1])
    if why == "scratch":
        compiled._run.profile_scratch_size = 64
    elif why == "unknown wrapper":
        run = compiled._run.launch
        compiled._run.launch = lambda *args: run(*args)
    elif why == "unknown launcher":
        run = compiled._run
        compiled._run = lambda *args: run(*args)
    assert launcher_module._direct(compiled, GRID, first, descriptors, REST) is None
    if why != "scratch":  # which needs an allocator
        launcher(compiled, GRID, first, descriptors, REST)(*first)
        assert len(calls) == 1


def test_a_profilers_hook_takes_tritons_path(driver):
    compiled, calls = kernel()
    first = tensors()
    launch = launcher(compiled, GRID, first, described(first[1]), REST)
    seen = []
    hook = seen.append
    chain = triton.knobs.runtime.launch_enter_hook
    chain.add(hook)
    try:
        launch(*first)
    finally:
        chain.remove(hook)
    assert any(value is chain for value in calls[0])
    launch(*first)
    assert not any(value is chain for value in calls[1])


@pytest.mark.gpu
def test_tritons_launcher_is_known_here(monkeypatch):
    plans.forget_plans()
    found = []
    direct = launcher_module._direct
    monkeypatch.setattr(
        launcher_module, "_direct", lambda *a: found.append(direct(*a)) or found[-1]
    )
    q, k, v = (normal(2, 100, 4, 64, seed=i).requires_grad_() for i in range(3))
    runs = []
    for _ in range(3):
        out = ra_triton.packed_attention(q, k, v, backend="triton")
        runs.append((out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))))
    assert len(found) == 4
    assert None not in found
    for later in runs[1:]:
        for again, expected in zip(later, runs[0], strict=True):
            assert_bitwise(again, expected)
    plans.forget_plans()
