"""The direct launch passes Triton's C launcher what Triton's own path passes, and keeps nothing."""

import gc
import threading
import warnings
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import triton
from budget import assert_bitwise
from strategies import normal
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

import ra_triton
from ra_triton import internals
from ra_triton.launch import launcher as launcher_module
from ra_triton.launch import plans
from ra_triton.launch.launcher import ADDRESSES, Descriptors, launcher

META = {"swizzle": 3, "elem_size": 2, "elem_type": 5, "block_size": [2, 8], "fp4_padded": False}


class Bundle(NamedTuple):
    """Several arguments of a kernel in one."""

    first: object
    second: object


SIGNATURE = {0: "*fp16", 1: "tensordesc<fp16[2, 8]>", 2: "*fp32", 3: "i32"}
SIGNATURE |= {4: Bundle(Bundle("i32", "constexpr"), "fp32"), 5: "constexpr"}
GRID, REST = (3, 1, 1), [11, Bundle(Bundle(22, 1), 0.5), Bundle(64, "ieee")]


class Kernel(CompiledKernel):
    """One that was not loaded, so that there is nothing to unload."""

    def __init__(self):
        pass

    def __del__(self):
        pass


class Encoded:
    """What stands for the hardware's descriptor."""

    def __init__(self, *arguments):
        self.arguments = arguments


@pytest.fixture(autouse=True)
def warned_anew():
    internals.warn_once.cache_clear()


@pytest.fixture
def driver(monkeypatch):
    """A driver that encodes descriptors as what they were made of, and counts them.

    As NVIDIA's it does so only in a thread that has the device's context.
    """
    made, context = [], threading.local()

    def encode(*arguments):
        if getattr(context, "device", None) != 0:
            raise RuntimeError("Triton Error [CUDA]: invalid device context")
        made.append(arguments)
        return Encoded(*arguments)

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(context, "device", device))
    utils = SimpleNamespace(fill_tma_descriptor_tiled=encode, fill_tma_descriptor=encode)
    fake = SimpleNamespace(
        utils=utils, get_current_stream=lambda device: 77, get_current_device=lambda: 0, made=made
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return fake


def kernel(signature=SIGNATURE, metadata=(META,), scratch=0, launcher_class=CudaLauncher):
    """A compiled kernel whose C launcher records its arguments; as in any version of Triton."""
    calls = []
    run = launcher_class.__new__(launcher_class)
    run.launch = wrap_handle_tensordesc(lambda *args: calls.append(args), signature, list(metadata))
    run.global_scratch_size = run.profile_scratch_size = scratch
    run.global_scratch_align = run.profile_scratch_align = 1
    run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, False, True
    run.gsan_enabled = False
    run.arg_annotations, run.kernel_signature = "annotations", "signature"
    compiled = Kernel()
    compiled._run, compiled.module, compiled.function = run, "module", 1234
    compiled.packed_metadata, compiled.src, compiled.name = (4, 1, 512), None, "kernel"
    return compiled, calls


def tensors():
    return torch.zeros(4), torch.zeros(6, 8, dtype=torch.float16), None


def described(t):
    return {1: Descriptors(TensorDescriptor, vars(TensorDescriptor(t, [6, 8], [8, 1], [2, 8])))}


def flat(call):
    """Arguments in order: lists opened, hooks and launch metadata as None, tensors by address."""
    for value in call:
        if isinstance(value, list | tuple):
            yield from flat(value)
        elif isinstance(value, Encoded):
            yield value.arguments
        elif isinstance(value, torch.Tensor):
            yield value.data_ptr()
        else:
            yield value if isinstance(value, int | str) else None


@pytest.mark.parametrize("how", ["by descriptor", "by a descriptor's pointer", "by pointer"])
def test_the_c_launcher_gets_what_triton_would_pass(driver, how):
    bulk = how == "by descriptor"
    signature = {**SIGNATURE, 1: "*fp16"} if how == "by pointer" else SIGNATURE
    metadata = {"by descriptor": (META,), "by a descriptor's pointer": (None,), "by pointer": ()}
    compiled, calls = kernel(signature, metadata[how])
    first, later = tensors(), tensors()
    descriptors = {} if how == "by pointer" else described(first[1])
    usual = launcher_module._usual(compiled, GRID, descriptors, REST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch = launcher(compiled, GRID, first, descriptors, REST)
    assert not calls
    for given in (first, later, first):
        usual(*given), launch(*given)
        expected, found = (list(flat(call)) for call in calls)
        assert found == expected
        assert [t is not None and t.data_ptr() in found for t in given] == [True, not bulk, False]
        assert {77, 1234, 11, 22, 64}.issubset(v for v in found if isinstance(v, int))
        calls.clear()


def test_a_descriptor_is_encoded_once_for_an_address(driver):
    compiled, _ = kernel()
    first, later, last = tensors(), tensors(), tensors()
    launch = launcher(compiled, GRID, first, described(first[1]), REST)
    driver.made.clear()
    for given in (first, later, later, last, first, later):
        launch(*given)
    assert [made[0] for made in driver.made] == [later[1].data_ptr(), last[1].data_ptr()]


def test_descriptors_are_few_and_keep_no_tensor_alive(driver):
    first = tensors()
    descriptors = described(first[1])[1]
    many = torch.zeros(ADDRESSES + 5, 8, dtype=torch.float16)
    for row in many:
        assert descriptors.encoded(row) is None
        descriptors.keep(row, row.data_ptr())
        assert descriptors.encoded(row) == row.data_ptr()
        assert len(descriptors._encoded) <= ADDRESSES
    compiled, calls = kernel()
    launch = launcher(compiled, GRID, first, {1: descriptors}, REST)
    launch(*first)
    calls.clear()
    alive = [weakref.ref(t) for t in first[:2]]
    del first
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


class Counting(CudaLauncher):
    """Passes another number on each launch."""

    def __call__(self, *args):
        self.launch_pdl += 1
        super().__call__(*args)


UNKNOWN = {
    "wrapper": lambda run: setattr(run, "launch", lambda *args, launch=run.launch: launch(*args)),
    "name in the wrapper": lambda run: setattr(run, "launch", renamed(run.launch)),
    "no C launcher": lambda run: delattr(run, "launch"),
    "changing": lambda run: setattr(run, "__class__", Counting),
}


def renamed(wrapped):
    """The wrapper with another name for the C launcher."""

    def wrapper(*args):
        return inner(*args)

    inner = wrapped
    return wrapper


@pytest.mark.parametrize("how", UNKNOWN)
def test_an_unknown_launcher_is_called_as_triton_calls_it(driver, how):
    """And a warning says so, once."""
    compiled, calls = kernel()
    first = tensors()
    UNKNOWN[how](compiled._run)
    if how == "no C launcher":
        compiled._run = lambda *args: calls.append(args)
    with pytest.warns(UserWarning, match="is not as expected"):
        launcher(compiled, GRID, first, described(first[1]), REST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch = launcher(compiled, GRID, first, described(first[1]), REST)
    assert not calls
    launch(*first)
    launch(*first)
    assert len(calls) == 2


@pytest.mark.parametrize("nested", [False, True])
def test_a_bundle_is_not_taken_for_the_sequence_of_all_arguments(nested):
    """Triton 3.6 passes arguments one by one, so that a bundle may be the last."""
    values = (*tensors(), *REST)

    def launch(*given):
        after = (1234, None, [*given, *REST]) if nested else (1234, *given, *REST)
        raise launcher_module._Passed((*GRID, launcher_module._STREAM, *after))

    before, fixed, found, is_nested = launcher_module._passed(launch, values[:3])
    assert (before, is_nested) == (GRID, nested)
    assert list(found[-3:]) == REST
    assert (len(fixed), len(found)) == ((2, 6) if nested else (0, 7))


A, B = torch.zeros(2), torch.zeros(2)


@pytest.mark.parametrize(
    ("first", "again", "found"),
    [
        ([A, "encoded"], [A, "anew"], ([(0, 0)], [(1, 1)])),
        ([A, 5, B], [A, 5, B], ([(0, 0), (2, 1)], [])),
        ([5, A], [5, A], r"tensors \[1\] are not passed"),
        ([A, B, B], [A, B, B], "argument 2 of the C launcher is an unknown tensor"),
        ([B, A], [B, A], "argument 0 of the C launcher is an unknown tensor"),
        ([A, 1, "encoded"], [A, 2, "anew"], "argument 2 of the C launcher is no descriptor"),
        ([A, B, 1], [A, B, 2], "argument 2 of the C launcher is no descriptor"),
        ([1, A, B], [2, A, B], "argument 0 of the C launcher is no descriptor"),
        ([A, B, 1], [A, B], "differs from launch to launch"),
    ],
)
def test_what_is_passed_is_understood_or_refused(first, again, found):
    """Tensors, then what was encoded, in their order; all else has to stay as it is."""
    calls = [((3, 1, 1), (None,), values, True) for values in (first, again)]
    place = launcher_module._places
    if isinstance(found, tuple):
        assert place(*calls, (A, B), {1: None}) == found
        calls[1], found = ((3, 2, 1), *calls[1][1:]), "differs from launch to launch"
    with pytest.raises(LookupError, match=found):
        place(*calls, (A, B), {1: None})


@pytest.mark.parametrize("what", ["global_scratch_size", "profile_scratch_size", "gsan_enabled"])
def test_what_each_launch_needs_anew_takes_tritons_path_without_a_word(driver, what):
    compiled, _ = kernel()
    first = tensors()
    setattr(compiled._run, what, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launcher_module._direct(compiled, GRID, first, described(first[1]), REST) is None


@pytest.mark.parametrize("hooked", [False, True])
def test_a_new_thread_encodes_descriptors_too(driver, hooked):
    """It has no context of the device until it works with it, and encoding needs one."""
    compiled, calls = kernel()
    first, later = tensors(), tensors()
    launch = launcher(compiled, GRID, first, described(first[1]), REST)
    failures = []

    def work():
        try:
            launch(*later)
        except RuntimeError as error:
            failures.append(error)

    chain, hook = triton.knobs.runtime.launch_enter_hook, failures.clear
    if hooked:
        chain.add(lambda *_: hook())
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        chain.calls.clear()
    assert failures == []
    assert len(calls) == 1
    assert driver.made[-1][0] == later[1].data_ptr()


@pytest.mark.parametrize("bulk", [False, True])
def test_launches_on_places_find_their_tensors_by_base_and_offset(driver, bulk):
    signature = SIGNATURE if bulk else {**SIGNATURE, 1: "*fp16"}
    compiled, calls = kernel(signature, (META,) if bulk else ())
    first = tensors()
    launch = launcher(compiled, GRID, first, described(first[1]) if bulk else {}, REST)
    memory = torch.zeros(16, 8, dtype=torch.float16), torch.zeros(64)
    addresses = [t.data_ptr() for t in memory]
    for offset in (0, 32, 64):
        for run in launch.on([(1, 16), (0, offset), None]):
            run(addresses)
        direct, usual = (list(flat(call)) for call in calls)
        assert direct == usual
        assert addresses[1] + 16 in direct
        assert addresses[0] + offset in (driver.made[-1] if bulk else direct)
        calls.clear()


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hook_takes_tritons_path(driver, name):
    compiled, calls = kernel()
    first = tensors()
    launch = launcher(compiled, GRID, first, described(first[1]), REST)
    seen = []
    hook = seen.append
    chain = getattr(triton.knobs.runtime, name)
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


@pytest.mark.gpu
def test_new_threads_have_a_context_for_their_descriptors():
    """Whether a launch or an addition is their first work, one after the other and at once."""
    x, W = (normal(*shape, dtype=torch.bfloat16) for shape in ((2, 512, 128), (128, 384)))
    W /= 128**0.5
    options = {"n_head": 2, "weight_layout": "packed", "backend": "triton"}

    @torch.no_grad()
    def inference(x):
        return ra_triton.ra_attention(x, W, 4, **options)

    def train(x):
        w = W.detach().requires_grad_()
        out = ra_triton.ra_attention(x, w, 4, **options)
        return torch.autograd.grad(out.float().square().sum(), w)[0]

    functions = inference, train
    expected = [function(x) for function in functions]
    inputs = [x.clone() for _ in range(16)]  # other addresses, whose descriptors are not encoded
    torch.cuda.synchronize()
    found = {}

    def work(i):
        try:
            found[i] = functions[i % 2](inputs[i])
            torch.cuda.synchronize()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads[:4]:
        thread.start()
        thread.join()
    for thread in threads[4:]:
        thread.start()
    for thread in threads[4:]:
        thread.join()
    assert [error for error in found.values() if isinstance(error, Exception)] == []
    for i, actual in found.items():
        assert_bitwise(actual, expected[i % 2])
