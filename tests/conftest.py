"""Interpreter switch, NaN-poisoned allocation, seeds, hypothesis profiles, GPU marker."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated

import pytest
from hypothesis import HealthCheck, settings

_COMMON = {
    "deadline": None,  # compilation and interpreter times vary
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("dev", max_examples=15, **_COMMON)
settings.register_profile("ci", max_examples=25, derandomize=True, database=None, **_COMMON)
settings.register_profile("nightly", max_examples=1000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

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
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ALLOCATORS:
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        t = allocate(*args, **kwargs)
        if t.is_floating_point() and t.device.type != "meta":
            with torch.no_grad():
                t.fill_(float("nan"))
        return t

    return allocate_nan


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


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
