"""Imports: arrows between modules go one way, and Triton is imported by the first launch only."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "ra_triton").rglob("*.py"))

SHARED = {"checks", "factors", "internals", "layout", "norm_rope", "offsets", "options"}  # leaves
STAGE = {"kernels.tiles", "kernels.plans", "kernels.configs", "layout", "offsets"}
HOPPER = {"kernels.gluon", *STAGE}
# Module: what it may import of the package. A new module needs a line here.
ARROWS = {
    "": {"api", "nn", "quantization", "sparsity", "varlen", "weights"},
    "api": {"backend", "recorded", "quantization", "sparsity", "workspace", *SHARED},
    "sparsity": SHARED,
    "varlen": {"api", "backend", *SHARED},
    "weights": {"backend", "recorded", *SHARED},
    "quantization": SHARED,
    "internals": set(),
    "checks": {"internals"},
    "recorded": {"checks", "internals", "kernels.launcher", "kernels.plans"},
    "layout": set(),
    "factors": {"layout"},
    "offsets": set(),
    "options": set(),
    "norm_rope": {"checks"},
    "backend": {"backend.flex", "backend.sdpa", "backend.triton", *SHARED},
    "backend.flex": {"backend.sdpa", "workspace", *SHARED},
    "backend.sdpa": {"quantization", "recorded", "workspace", *SHARED},
    "backend.triton": {
        *("backend.sdpa", "backend.triton.operator", "backend.triton.operators"),
        *("kernels.norm_rope", "kernels.packing", "quantization", "recorded", "workspace"),
        *SHARED,
    },
    "backend.triton.operator": {"flops", "recorded", *SHARED},
    "backend.triton.operators": {
        *("backend.triton.operator", "flops", "quantization", "workspace"),
        *("kernels.append", "kernels.attention_backward", "kernels.attention_forward"),
        *("kernels.compose", "kernels.compose_backward", "kernels.decode"),
        *("kernels.norm_rope", "kernels.norm_rope_backward"),
        *("kernels.projection", "kernels.projection_backward", "kernels.projection_int8"),
        *SHARED,
    },
    "flops": {"internals"},
    "cache": {"backend", *SHARED},
    "nn": {
        *("cache", "nn.attention", "nn.composed", "nn.gpt2", "nn.llama", "nn.quantized"),
        "workspace",
    },
    "nn.attention": {
        *("api", "cache", "nn.children", "nn.composed", "nn.configs", "nn.quantized", "nn.rope"),
        *("backend", "quantization", "weights", "workspace"),
        *SHARED,
    },
    "nn.llama": {"nn.attention", "nn.composed", "nn.gpt2", "nn.quantized", "quantization"},
    "nn.rope": {"checks", "norm_rope", "workspace"},
    "nn.children": {"internals"},
    "nn.configs": set(),
    "nn.composed": {"weights", *SHARED},
    "nn.gpt2": {
        *("nn.attention", "nn.composed", "nn.quantized", "quantization", "weights"),
        *SHARED,
    },
    "nn.quantized": {"api", "quantization", *SHARED},
    "workspace": SHARED,
    "kernels.append": STAGE,
    "kernels.attention_arguments": STAGE,
    "kernels.attention_backward": {*STAGE, "kernels.attention_arguments"},
    "kernels.compose": {*STAGE, "factors", "kernels.compose_tiles"},
    "kernels.compose_backward": {*STAGE, "factors", "kernels.compose_tiles"},
    "kernels.compose_tiles": {*STAGE, "factors"},
    "kernels.decode": {*STAGE, "kernels.attention_arguments"},
    "kernels.projection_arguments": STAGE,
    "kernels.projection_backward": {*STAGE, "kernels.projection_arguments"},
    "kernels": set(),
    "kernels.attention_forward": {
        *("kernels.attention_arguments", "kernels.attention_forward_hopper"),
        *HOPPER,
    },
    "kernels.attention_forward_hopper": {*HOPPER, "kernels.attention_arguments"},
    "kernels.packing": STAGE,
    "kernels.projection_int8": {*STAGE, "kernels.projection_arguments"},
    "kernels.norm_rope": {*STAGE, "kernels.norm_rope_tiles", "norm_rope"},
    "kernels.norm_rope_backward": {*STAGE, "kernels.norm_rope_tiles", "norm_rope"},
    "kernels.norm_rope_tiles": {*STAGE, "norm_rope"},
    "kernels.projection": {
        *("kernels.projection_arguments", "kernels.projection_hopper"),
        *HOPPER,
    },
    "kernels.projection_hopper": HOPPER,
    "kernels.tiles": {"checks", "kernels.configs", "kernels.plans", "layout"},
    "kernels.plans": {"kernels.gluon", "kernels.launcher"},
    "kernels.launcher": {"internals"},
    "kernels.gluon": {"internals"},
    "kernels.configs": {"layout"},
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
    if not module_of(path).startswith("kernels"):
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
