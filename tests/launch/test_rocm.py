"""ROCm, where the kernels were compiled but never ran: who gets them, and how they launch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ra_triton import backend as registry
from ra_triton.backend import triton as backend
from ra_triton.kernels import tiles
from ra_triton.launch import launcher

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda")


@pytest.fixture
def rocm(monkeypatch):
    """A PyTorch for ROCm, on a GPU with a compute capability that is no NVIDIA GPU's."""
    monkeypatch.setattr(torch.version, "hip", "6.4", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backend._look_at.cache_clear()
    yield
    backend._look_at.cache_clear()


@pytest.mark.usefixtures("rocm")
def test_who_asks_gets_the_kernels_and_auto_does_not():
    tensors = (SimpleNamespace(device=CUDA),)
    assert registry.choose("triton", tensors) == (backend, "asked for")
    with pytest.warns(UserWarning, match="not on its Triton kernels: on ROCm"):
        module, reason = registry.choose("auto", tensors)
    assert module is registry.BACKENDS["sdpa"]
    assert reason == "on ROCm they were compiled, but never run"


def test_elsewhere_auto_takes_them(monkeypatch):
    monkeypatch.setattr(backend, "_look_at", lambda device: None)
    module, _ = registry.choose("auto", (SimpleNamespace(device=CUDA),))
    assert module is backend


@pytest.mark.usefixtures("rocm")
def test_its_row_is_its_own_and_products_are_ieee(monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    assert tiles.target_of.__wrapped__(CUDA) == "rocm"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert tiles.dot_precision(torch.float32) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_launches_go_through_tritons_own_launcher(monkeypatch):
    ran = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: ran.append((grid, arguments))

    def direct(*args):
        return lambda *tensors: ran.append("direct")

    monkeypatch.setattr(launcher, "_direct", direct)
    for hip, expected in (("6.4", ((2, 1, 1), ("x", 3))), (None, "direct")):
        monkeypatch.setattr(torch.version, "hip", hip, raising=False)
        launcher.launcher(Compiled(), (2, 1, 1), ("x",), {}, (3,))("x")
        assert ran.pop() == expected


LOOK = """
import json
import sys
from bench.machine_code.aot import shipped

found = {}
for compiled in shipped("gfx942", only=sys.argv[1]):
    code = compiled.kernel.asm["amdgcn"]
    found[compiled.label] = [compiled.shared_memory, "v_mfma" in code, "s_endpgm" in code]
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("stages", "labels"),
    [
        ("attention_forward", "bfloat16 D=64 causal=True$"),
        pytest.param(
            *("key_value_gradient query_gradient", "bfloat16 D=64 causal=True$"),
            marks=pytest.mark.slow,
        ),
        pytest.param("projection pack", "float32", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_gfx942(stages, labels):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    only = f"^({'|'.join(stages.split())}) {labels}"
    command = [sys.executable, "-c", LOOK, only]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert {label.split()[0] for label in found} == set(stages.split())
    for label, (shared_memory, products, ends) in found.items():
        assert shared_memory <= 64 << 10, label
        assert ends
        assert products or "bfloat16" not in label, label
