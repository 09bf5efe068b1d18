"""What PyTorch does not document: in one module, and each call is right without it."""

import ast
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from budget import assert_bitwise
from strategies import normal

import ra_triton
from ra_triton import internals

ROOT = Path(__file__).parents[2]
HOMES = {"internals.py", "launch/launcher.py", "launch/gluon.py"}
PACKAGE = sorted((ROOT / "ra_triton").rglob("*.py"))
ACTIVE = "torch._C._are_functorch_transforms_active"
STACK = "torch._C._functorch.get_interpreter_stack"
LEVEL = "torch.autograd.forward_ad._current_level"
MODES = "torch._C._len_torch_dispatch_stack"
BATCH = "torch._C._functorch.is_legacy_batchedtensor"


def without(name):
    """What internals.py finds of torch, by the module's names, without one of its own."""
    bindings = SimpleNamespace(
        _are_functorch_transforms_active=lambda: False,
        _len_torch_dispatch_stack=lambda: 0,
        _is_tracing=lambda: False,
        _len_torch_function_stack=lambda: 0,
        _functorch=SimpleNamespace(
            get_interpreter_stack=lambda: None, is_legacy_batchedtensor=lambda t: False
        ),
    )
    forward_ad = SimpleNamespace(_current_level=-1)
    functorch = dict.fromkeys((STACK, BATCH), bindings._functorch)
    owner = {ACTIVE: bindings, MODES: bindings, LEVEL: forward_ad, **functorch}[name]
    delattr(owner, name.rpartition(".")[2])
    stand_in = SimpleNamespace(_C=bindings, __version__="2.99")
    return {"torch": stand_in, "forward_ad": forward_ad}


def private_names(path):
    """Names with a leading underscore that are taken from torch or Triton."""
    found, modules = set(), {"torch", "triton"}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("torch", "triton"):
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            found |= {part for part in parts if part.startswith("_")}
            modules |= {alias.asname or alias.name for alias in node.names if alias.name.islower()}
    for node in ast.walk(tree):
        parts, value = [], node
        while isinstance(value, ast.Attribute):
            parts, value = [*parts, value.attr], value.value
        if isinstance(value, ast.Name) and value.id in modules:
            found |= {part for part in parts if part.startswith("_") and part[1] != "_"}
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT / "ra_triton")))
def test_private_names_have_one_home(path):
    found = private_names(path)
    if str(path.relative_to(ROOT / "ra_triton")) not in HOMES:
        assert not found, f"{sorted(found)} belong into internals.py"


def test_the_home_of_private_names_has_some():
    assert {"_C", "_current_level"} <= private_names(ROOT / "ra_triton" / "internals.py")


@pytest.mark.parametrize("name", [ACTIVE, LEVEL, MODES, BATCH])
def test_without_a_name_calls_are_right_and_one_warning_says_so(name, monkeypatch):
    """Forward, backward, and a second derivative that is refused and not dropped."""
    internals.warn_once.cache_clear()
    q, k, v = (normal(1, 9, 2, 16, seed=seed).requires_grad_() for seed in range(3))

    def run():
        out = ra_triton.packed_attention(q, k, v, backend="triton")
        return out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))

    expected = run()
    with torch.no_grad():
        inference = ra_triton.packed_attention(q, k, v, backend="triton")
    for owned, stand_in in without(name).items():
        monkeypatch.setattr(internals, owned, stand_in)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            for actual, right in zip(run(), expected, strict=True):
                assert_bitwise(actual, right)
            with torch.no_grad():
                assert_bitwise(ra_triton.packed_attention(q, k, v, backend="triton"), inference)
        out = ra_triton.packed_attention(q, k, v, backend="triton")
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError):
            dq.square().sum().backward()
    said = [str(w.message) for w in warned if "ra_triton" in str(w.message)]
    assert len(said) == 1
    assert f"torch 2.99 has no {name}, so" in said[0]


def test_without_the_stack_of_transforms_none_are_known(monkeypatch):
    internals.warn_once.cache_clear()
    for owned, stand_in in without(STACK).items():
        monkeypatch.setattr(internals, owned, stand_in)
    with pytest.warns(UserWarning, match=STACK):
        assert internals.active_transforms() == []


def test_without_the_libraries_of_operators_one_is_made_anew(monkeypatch):
    internals.warn_once.cache_clear()
    monkeypatch.setattr(internals, "custom_ops", SimpleNamespace())
    with pytest.warns(UserWarning, match="get_library_allowing_overwrite"):
        library = internals.library_of("ra_triton_test", "nothing")
    library.define("nothing(Tensor x) -> Tensor")
    assert torch.ops.ra_triton_test.nothing.default._schema.name == "ra_triton_test::nothing"


def test_the_transforms_around_a_call_are_named_outermost_first():
    found = []

    def function(x):
        found.append((internals.transforms_active(), internals.active_transforms()))
        return x.sum()

    torch.func.vmap(torch.func.grad(function))(torch.zeros(2, 3))
    function(torch.zeros(2))
    assert found == [(True, ["Vmap", "Grad"]), (False, [])]
