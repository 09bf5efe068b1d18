"""Imports: arrows between modules go one way, and Triton is imported by the first launch only."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "ra_triton").rglob("*.py"))

SHARED = {
    "checks",
    "weights.factors",
    "internals",
    "weights.layout",
    "call.norm_rope",
    "call.offsets",
    "call.options",
}  # leaves
STAGE = {"kernels.tiles", "launch.plans", "launch.configs", "weights.layout", "call.offsets"}
REDUCED = {"weights.quantization", "weights.reduced", "weights.sparsity"}
HOPPER = {"launch.gluon", *STAGE}
FOLDERS = ("call", "kernels", "launch", "weights")
FOLDERS += tuple(f"kernels.{name}" for name in ("attention", "composition", "lanes", "projection"))
# Module: what it may import of the package. A new module needs a line here.
ARROWS = {
    "": {"api", "nn", "weights.quantization", "weights.sparsity", "varlen", "weights.fused"},
    "api": {
        "backend",
        "launch.recorded",
        *REDUCED,
        "workspace",
        *SHARED,
    },
    "weights.reduced": SHARED,
    "weights.sparsity": {"weights.reduced", *SHARED},
    "varlen": {"api", "backend", *SHARED},
    "weights.fused": {"backend", "launch.recorded", *SHARED},
    "weights.quantization": {"weights.reduced", *SHARED},
    "internals": set(),
    "checks": {"internals"},
    "launch.recorded": {"checks", "internals", "launch.launcher", "launch.plans"},
    "weights.layout": set(),
    "weights.factors": {"weights.layout"},
    "call.offsets": set(),
    "call.options": set(),
    "call.norm_rope": {"checks"},
    "backend": {"backend.flex", "backend.sdpa", "backend.triton", *SHARED},
    "backend.flex": {"backend.sdpa", *SHARED},
    "backend.sdpa": {*REDUCED - {"weights.reduced"}, "launch.recorded", "workspace", *SHARED},
    "backend.triton": {
        *("backend.sdpa", "backend.triton.operator", "backend.triton.operators"),
        *(
            "kernels.lanes.norm_rope",
            "kernels.lanes.packing",
            *REDUCED,
            "launch.recorded",
            "workspace",
        ),
        *SHARED,
    },
    "backend.triton.operator": {"backend.triton.flops", "launch.recorded", *SHARED},
    "backend.triton.operators": {
        *("backend.triton.operator", "backend.triton.flops", "weights.quantization", "workspace"),
        *("kernels.lanes.append", "kernels.attention.backward", "kernels.attention.forward"),
        *(
            "kernels.composition.forward",
            "kernels.composition.backward",
            "kernels.attention.decode",
        ),
        *("kernels.lanes.norm_rope", "kernels.lanes.norm_rope_backward"),
        *("kernels.projection.forward", "kernels.projection.backward", "kernels.projection.int8"),
        *SHARED,
    },
    "backend.triton.flops": {"internals"},
    "nn.cache": {"backend", *SHARED},
    "nn": {
        *("nn.cache", "nn.attention", "nn.composed", "nn.gpt2", "nn.llama", "nn.quantized"),
        "workspace",
    },
    "nn.attention": {
        *("api", "nn.cache", "nn.children", "nn.composed", "nn.configs", "nn.quantized", "nn.rope"),
        *("backend", "weights.quantization", "weights.fused", "workspace"),
        *SHARED,
    },
    "nn.llama": {"nn.attention", "nn.composed", "nn.gpt2", "nn.quantized", "weights.quantization"},
    "nn.rope": {"checks", "call.norm_rope", "workspace"},
    "nn.children": {"internals"},
    "nn.configs": set(),
    "nn.composed": {"weights.fused", *SHARED},
    "nn.gpt2": {
        *("nn.attention", "nn.composed", "nn.quantized", "weights.quantization", "weights.fused"),
        *SHARED,
    },
    "nn.quantized": {"api", "weights.quantization", *SHARED},
    "workspace": SHARED,
    "kernels.lanes.append": STAGE,
    "kernels.attention.arguments": STAGE,
    "kernels.attention.backward": {
        *("kernels.attention.arguments", "kernels.attention.backward_hopper"),
        "kernels.attention.backward_one_pass",
        *HOPPER,
    },
    "kernels.attention.backward_one_pass": {*STAGE, "kernels.attention.arguments"},
    "kernels.attention.backward_hopper": {
        *("kernels.attention.arguments", "kernels.attention.hopper_tiles"),
        *HOPPER,
    },
    "kernels.composition.forward": {*STAGE, "weights.factors", "kernels.composition.tiles"},
    "kernels.composition.backward": {*STAGE, "weights.factors", "kernels.composition.tiles"},
    "kernels.composition.tiles": {*STAGE, "weights.factors"},
    "kernels.attention.decode": {*STAGE, "kernels.attention.arguments"},
    "kernels.projection.arguments": STAGE,
    "kernels.projection.backward": {*STAGE, "kernels.projection.arguments"},
    **{folder: set() for folder in FOLDERS},
    "kernels.attention.forward": {
        *("kernels.attention.arguments", "kernels.attention.forward_hopper"),
        *HOPPER,
    },
    "kernels.attention.forward_hopper": {
        *("kernels.attention.arguments", "kernels.attention.hopper_tiles"),
        *HOPPER,
    },
    "kernels.attention.hopper_tiles": {"launch.gluon", "launch.plans"},
    "kernels.lanes.packing": STAGE,
    "kernels.projection.int8": {*STAGE, "kernels.projection.arguments"},
    "kernels.lanes.norm_rope": {*STAGE, "kernels.lanes.norm_rope_tiles", "call.norm_rope"},
    "kernels.lanes.norm_rope_backward": {*STAGE, "kernels.lanes.norm_rope_tiles", "call.norm_rope"},
    "kernels.lanes.norm_rope_tiles": {*STAGE, "call.norm_rope"},
    "kernels.projection.forward": {
        *("kernels.projection.arguments", "kernels.projection.forward_hopper"),
        *HOPPER,
    },
    "kernels.projection.forward_hopper": HOPPER,
    "kernels.tiles": {"checks", "launch.configs", "launch.plans", "weights.layout"},
    "launch.plans": {"launch.gluon", "launch.launcher"},
    "launch.launcher": {"internals"},
    "launch.gluon": {"internals"},
    "launch.configs": {"weights.layout"},
}


def module_of(path: Path) -> str:
    """``ra_triton/kernels/tiles.py`` → ``kernels.tiles``; a package is its ``__init__``."""
    parts = path.relative_to(ROOT / "ra_triton").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Absolute names that a file imports: modules, and what it takes from them."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, without the package's name."""
    modules = {f"ra_triton.{module_of(p)}".rstrip(".") for p in PACKAGE}
    found = set()
    for name in imports_of(path):
        while name not in modules and "." in name:
            name = name.rpartition(".")[0]
        if name in modules:
            found.add(name.removeprefix("ra_triton").removeprefix("."))
    return found


def roots(path: Path, **options) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(path, **options)}


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: module_of(path) or "ra_triton")
def test_arrows_between_modules_go_one_way(path):
    module = module_of(path)
    assert module in ARROWS, f"{module} has no line in ARROWS: decide what it may import"
    extra = imported_modules(path) - ARROWS[module]
    assert not extra, f"{module} must not import {sorted(extra)}"


def test_the_arrows_have_no_cycle_and_name_existing_modules():
    modules = {module_of(path) for path in PACKAGE}
    assert set(ARROWS) <= modules, set(ARROWS) - modules
    assert set().union(*ARROWS.values()) <= modules
    done: set[str] = set()
    while len(done) < len(ARROWS):
        ready = {name for name, targets in ARROWS.items() if targets <= done} - done
        assert ready, f"a cycle among {sorted(set(ARROWS) - done)}"
        done |= ready


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: module_of(path) or "ra_triton")
def test_the_package_never_imports_what_surrounds_it(path):
    assert not roots(path) & {"ref", "tests", "bench", "numpy", "hypothesis", "pytest"}


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: module_of(path) or "ra_triton")
def test_only_kernels_import_triton_at_their_top(path):
    module = module_of(path)
    if not module.startswith(("kernels", "launch")) or module == "launch.recorded":
        assert "triton" not in roots(path, top_level_only=True)


@pytest.mark.parametrize("path", sorted((ROOT / "ref").glob("*.py")), ids=lambda path: path.name)
def test_the_reference_imports_torch_only(path):
    assert roots(path) <= {"torch", "math", "typing"}


def run_python(code: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK_TRITON = "import sys; sys.modules['triton'] = None\n"  # importing it raises
USE = """
import torch, ra_triton
x = torch.randn(2, 5, 12)
W = torch.randn(12, 3 * 32, requires_grad=True)
ra_triton.ra_attention(x, W, n_head=2).sum().backward()
assert W.grad.isfinite().all()
"""


def test_import_and_sdpa_leave_triton_alone():
    code = "import sys, torch\nbefore = 'triton' in sys.modules\n" + USE
    code += "print(before, 'triton' in sys.modules, 'ra_triton.kernels' in sys.modules)\n"
    code += "print('torch._inductor' in sys.modules)"
    before, after, kernels, compiler = run_python(code, CUDA_VISIBLE_DEVICES="").split()
    assert before == after == "False"
    assert kernels == compiler == "False"


def test_everything_but_the_kernels_works_without_triton_and_without_a_gpu():
    run_python(BLOCK_TRITON + USE, CUDA_VISIBLE_DEVICES="")


REFUSED = """
import torch, ra_triton
q = torch.randn(1, 3, 1, 16)
try:
    ra_triton.packed_attention(q, q, q, backend="triton")
except NotImplementedError as error:
    print(error)
"""


def test_triton_on_cpu_tensors_without_the_interpreter_says_what_it_needs():
    message = run_python(REFUSED, CUDA_VISIBLE_DEVICES="")
    assert "the kernels need CUDA tensors, got cpu ones; use backend='sdpa'" in message


def test_a_missing_triton_is_named():
    message = run_python(BLOCK_TRITON + REFUSED, CUDA_VISIBLE_DEVICES="")
    assert "triton is not installed; use backend='sdpa'" in message


def test_nn_is_an_attribute_that_is_imported_when_it_is_used():
    code = "import sys, ra_triton\nassert 'ra_triton.nn' not in sys.modules\n"
    code += "assert {'nn', *ra_triton.__all__} <= set(dir(ra_triton))\n"
    code += "print(ra_triton.nn.KVCache is __import__('ra_triton.nn').nn.KVCache)\n"
    code += "print(getattr(ra_triton, 'mm', 'no mm'))\nprint('triton' in sys.modules)"
    assert run_python(code).splitlines() == ["True", "no mm", "False"]


def test_public_names_are_exactly_those_of_all():
    code = "import ra_triton\nfor name in ra_triton.__all__: getattr(ra_triton, name)\n"
    code += "print([n for n in vars(ra_triton) if not n.startswith('_')])"
    import ra_triton

    visible = set(ast.literal_eval(run_python(code)))
    modules = {module_of(path).partition(".")[0] for path in PACKAGE}
    assert visible - (modules - {"nn"}) == set(ra_triton.__all__)
