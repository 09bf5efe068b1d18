"""The interpreter and its products, NaN-poisoned allocation, seeds, profiles, GPU marker."""

import operator
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the scripts here; pytest has it already

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated

import pytest
from hypothesis import HealthCheck, settings
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes

_COMMON = {
    "deadline": None,  # compilation and interpreter times vary
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("dev", max_examples=8, derandomize=True, database=None, **_COMMON)
settings.register_profile("ci", max_examples=25, derandomize=True, database=None, **_COMMON)
settings.register_profile("nightly", max_examples=1000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores already
    torch.set_num_threads(1)

ALLOCATORS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
]


@pytest.fixture(autouse=True, scope="session")
def poisoned_allocations():
    """Every uninitialised float tensor starts as NaN, so reading one cannot go unnoticed."""
    _device_constructors()  # what ``with torch.device`` knows, by its own functions
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ALLOCATORS:
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        t = allocate(*args, **kwargs)
        value = 255 if t.dtype is torch.uint8 else float("nan")  # in bytes, a NaN of any float
        if (t.is_floating_point() or t.dtype is torch.uint8) and t.device.type != "meta":
            unseen = _disable_current_modes() if type(t) is torch.Tensor else nullcontext()
            with torch.no_grad(), unseen:  # by what records the operators of the package
                t.fill_(value)
        return t

    return allocate_nan


@pytest.fixture(autouse=True, scope="session")
def products_in_a_fixed_order():
    """``tl.dot`` of the interpreter without the BLAS behind ``np.matmul``.

    A GPU adds up an element of a tile in one order, whatever the tile's other rows are. A BLAS
    takes another order for another number of rows or another address, and another CPU another BLAS
    kernel: bits that the kernels promise would then be lost to the interpreter.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = _product(a.data, b.data, d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


def _product(a, b, dtype):
    """``a @ b``, each element summed over k from the first to the last.

    NumPy's einsum orders its loops by the strides, so it gets the same strides each time.
    """
    a, b = (np.ascontiguousarray(t, dtype=dtype) for t in (a, b))
    return np.einsum("...mk,...kn->...mn", a, b, optimize=False)


@pytest.fixture(autouse=True, scope="session")
def quicker_interpreter():
    """More than half of the interpreter's time, saved.

    Every call of a jit function, also by a kernel, puts the interpreter's functions in place of all
    members of ``triton.language``: here once for each module with kernels. Every sum, difference
    and product of integers is computed again in 64 bits by a dozen of the interpreter's own
    operations, but an overflow is never reported: here NumPy computes it, and an overflow raises.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    patched, patch_language = set(), interpreter._patch_lang

    def patch_once(fn):
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            patch_language(fn)
        return interpreter._LangPatchScope()  # of nothing that a launch would have to restore

    semantic = interpreter.interpreter_semantic
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(semantic, "binary_op_sanitize_overflow_impl", _assert_no_overflow)
        yield


def _assert_no_overflow(a, b, operation):
    """Of ``add``, ``sub`` or ``mul``, of two of the interpreter's tensors below 64 bits."""
    dtype = a.type.scalar
    if dtype.int_bitwidth < 64:
        a, b = (t.handle.data.astype(np.int64) for t in (a, b))
        exact = getattr(operator, operation.__name__)(a, b)
        fits = dtype.get_int_min_value() <= exact.min() and exact.max() <= dtype.get_int_max_value()
        assert fits, f"overflow of {dtype} in {operation.__name__}"


@pytest.fixture(autouse=True, scope="session")
def uncompiled_flex_attention():
    """FlexAttention by its own definition in eager PyTorch: to compile for a CPU takes seconds.

    A test that compiles takes ``compiled_flex_attention`` (test_flex.py).
    """
    if torch.cuda.is_available():
        yield
        return
    from ra_triton.backend import flex

    with pytest.MonkeyPatch.context() as patch:
        module = "torch.nn.attention.flex_attention"
        patch.setattr(f"{module}._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patch.setattr(flex, "_compiled", lambda configuration: flex._attend)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # it limits how often a function is compiled in a process
        torch._dynamo.reset()


@pytest.fixture
def integers_of_another(monkeypatch):
    """Counters begin as something, where poisoned_allocations leaves integers alone."""
    empty = torch.empty

    def used(*shape, **options):
        t = empty(*shape, **options)
        return t.fill_(3) if t.dtype is torch.int32 else t

    monkeypatch.setattr(torch, "empty", used)


def pytest_configure(config):
    """A slow test that is named, ``file::test``, runs; only -m of pyproject.toml leaves it out."""
    named = any("::" in argument for argument in config.args)
    if named and config.option.markexpr == "not slow":
        config.option.markexpr = ""


def pytest_collection_modifyitems(items):
    """What takes minutes comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_static.py")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
