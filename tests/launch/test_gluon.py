"""Gluon's names as they are here, and what runs where one is missing or nothing compiles."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from gradient_budget import attention_gradient_budgets, check_gradients
from strategies import normal, quick

from ra_triton import internals
from ra_triton.kernels.attention import backward as attention_backward
from ra_triton.kernels.attention import forward as attention_forward
from ra_triton.kernels.projection import forward as projection
from ra_triton.launch import gluon, plans
from ra_triton.launch.configs import ONE_PASS
from ra_triton.launch.plans import CannotCompile, Layout, Plan, plan_in_gluon

ROOT = Path(__file__).parents[2]
STAGES = {
    "attention_forward": attention_forward,
    "attention_backward": attention_backward,
    "projection": projection,
}
stages = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr(gluon, "_broken", set())
    internals.warn_once.cache_clear()


def hopper_plan(stage, sequences=None):
    """What aligned operands take on Hopper."""
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    if stage == "projection":
        x, w = Layout((1, 512, 64), (512 * 64, 64, 1), True), Layout((64, 192), (192, 1), True)
        args = (cpu, bf16, x, w, (None, True), "ieee", "sm_90", "projection", None)
    rows = Layout((1, 512, 2, 64), (512 * 128, 128, 64, 1), True)
    if stage == "attention_backward":
        options = (None, True, (-1, 0), None, 0.0, 0.0, "ieee", "sm_90", None)
        of = (cpu, bf16, (rows,) * 4, (rows,) * 3, (True, True, None), *options)
        plans = attention_backward._one_pass_plans.__wrapped__(*of)
        return None if plans is None else plans.one_pass
    if stage == "attention_forward":
        others = (None, None, None, True, True), sequences, True, (-1, 0), None, 0.0, 0.0
        args = (cpu, bf16, rows, rows, rows, *others, "ieee", "sm_90", None)
    return STAGES[stage]._plan.__wrapped__(*args)


def in_gluon(plan):
    return plan is not None and "hopper" in plan.kernel.__module__


@stages
def test_every_name_is_found_here(stage):
    assert gluon.MISSING is None
    assert all(getattr(gluon, name) is not None for name in gluon.__all__ if name != "MISSING")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert in_gluon(hopper_plan(stage))


@stages
def test_without_a_name_the_plain_kernel_runs_and_a_warning_says_so_once(stage, monkeypatch):
    monkeypatch.setattr(gluon, "MISSING", "cannot import name 'jit'")
    with pytest.warns(UserWarning, match=f"{stage} runs without its kernel.*name 'jit'"):
        assert not in_gluon(hopper_plan(stage))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not in_gluon(hopper_plan(stage))


@stages
def test_where_no_plan_can_be_made_the_plain_kernel_runs(stage, monkeypatch):
    def changed(*args, **options):
        raise TypeError("get_default_for() takes 3 positional arguments")

    monkeypatch.setattr(gluon.gl.NVMMASharedLayout, "get_default_for", changed)
    with pytest.warns(UserWarning, match="takes 3 positional arguments"):
        assert not in_gluon(hopper_plan(stage))
    assert not gluon.works(stage)
    assert gluon.works("another")


def test_sequences_stay_sequences_where_the_plain_kernel_runs(monkeypatch):
    sequences = 3, 400, 300
    assert in_gluon(hopper_plan("attention_forward", sequences))
    monkeypatch.setattr(gluon.gl.NVMMASharedLayout, "get_default_for", None)
    with pytest.warns(UserWarning, match="attention_forward runs without its kernel"):
        plan = hopper_plan("attention_forward", sequences)
    assert not in_gluon(plan)
    assert plan.arguments["V"].VARLEN
    assert plan.arguments["sizes"][:3] == sequences


class Kernel:
    """A kernel that does not compile, or one that is launched."""

    arg_names = ("a",)

    def __init__(self, error=None):
        self.error, self.launches = error, 0

    def warmup(self, *args, grid, **options):
        if self.error is not None:
            raise self.error

    def __getitem__(self, grid):
        self.launches += 1
        return lambda *args, **options: None


def test_a_kernel_that_does_not_compile_gives_way_for_good():
    broken, plain = (
        Kernel(AttributeError("at 3:4:\n    x = y\n        ^\nno async_load\n ^")),
        Kernel(),
    )
    made = []

    def instead():
        made.append(Plan(plain, (2,), {}))
        return made[-1]

    plan = plan_in_gluon("stage", lambda: Plan(broken, (1,), {}), instead)
    assert plan.kernel is broken
    with pytest.warns(UserWarning, match="no async_load$"):
        plan(torch.zeros(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(torch.zeros(1))
    assert (plan.kernel, plan.grid, plain.launches, broken.launches) == (plain, (2, 1, 1), 2, 0)
    assert len(made) == 1


def broken_backward(monkeypatch):
    """Its calls, operands and options, where the kernel for Hopper does not compile."""
    called = []

    def broken(*tensors):
        called.append(tensors)
        raise CannotCompile from AttributeError("no async_load")

    monkeypatch.setattr(attention_backward, "_one_pass_plans", lambda *of: broken)
    q, k, v, do = (normal(1, 40, 2, 16, seed=seed) for seed in range(4))
    options = {"causal": True, "softmax_scale": None}
    o, lse = attention_forward.attention_forward(q, k, v, **options)
    return called, (q, k, v, o, lse, do), options


def test_a_backward_that_was_asked_for_and_does_not_compile_raises(monkeypatch):
    called, operands, options = broken_backward(monkeypatch)
    grads = [torch.empty_like(operands[0]) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(CannotCompile) as raised:
                attention_backward.attention_backward(
                    *operands, *grads, **options, config=ONE_PASS[64]
                )
            assert "no async_load" in str(raised.value.__cause__)
    assert len(called) == 2
    assert gluon.works("attention_backward")
    gluon._broken.add("attention_backward")
    with pytest.raises(CannotCompile):
        attention_backward.attention_backward(*operands, *grads, **options, config=ONE_PASS[64])


def test_a_backward_that_does_not_compile_gives_way_for_good(monkeypatch):
    called, (q, k, v, o, lse, do), options = broken_backward(monkeypatch)
    grads = [[torch.empty_like(q) for _ in range(3)] for _ in range(2)]
    with pytest.warns(UserWarning, match="attention_backward runs without.*no async_load"):
        attention_backward.attention_backward(q, k, v, o, lse, do, *grads[0], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_backward.attention_backward(q, k, v, o, lse, do, *grads[1], **options)
    assert len(called) == 1
    budgets = attention_gradient_budgets(q, k, v, do, None, causal=True)
    for three in grads:
        found = dict(zip(("dq", "dk", "dv"), three, strict=True))
        check_gradients(found, budgets, dtype=q.dtype, case="plain")


def test_what_the_compiler_raises_on_request_says_that_it_was_the_compiler():
    class OnGpu:
        is_cuda = True

    error = AttributeError("no async_load")
    plan = Plan(Kernel(error), (1,), {})
    plan.compile(torch.zeros(1))  # nothing to compile for
    with pytest.raises(CannotCompile) as raised:
        plan.compile(None, OnGpu())
    assert raised.value.__cause__ is error


def test_what_compiles_on_request_does_so_once_and_is_launched(monkeypatch):
    class OnGpu:
        is_cuda = True

    class Described:
        @staticmethod
        def of(t):
            assert contexts == [1]  # a descriptor needs one
            return t

    launched, contexts = [], []
    kernel = Kernel()
    plan = Plan(kernel, (1,), {}, {0: Described})
    monkeypatch.setattr(plan, "_launcher", lambda compiled, tensors: launched.append)
    monkeypatch.setattr(plans, "make_context_current", lambda: contexts.append(1))
    plan.compile(OnGpu())
    assert (launched, kernel.launches) == ([], 0)
    kernel.error = AttributeError("compiled again")
    plan.compile(OnGpu())
    plan("here")
    assert (launched, kernel.launches) == (["here"], 0)


def test_errors_of_other_kernels_are_raised():
    class Failing(Kernel):
        def __getitem__(self, grid):
            raise AttributeError("no async_load")

    with pytest.raises(AttributeError, match="no async_load"):
        Plan(Failing(), (1,), {})(torch.zeros(1))


COMPILE = """
import sys, warnings, torch
from bench.machine_code.aot import compile_for
from ra_triton.kernels.attention import forward as attention_forward
from ra_triton.kernels.attention import forward_hopper as hopper
from ra_triton.kernels.projection import forward as projection
from ra_triton.kernels.projection import forward_hopper as projection_hopper
for stage in (attention_forward, projection):
    stage.target_of = lambda device: "sm_90"
if sys.argv[1] == "renamed":
    del projection_hopper.async_load
    del hopper.async_load
q, x = torch.zeros(1, 512, 2, 64, dtype=torch.bfloat16), torch.zeros(1, 512, 64).bfloat16()
with warnings.catch_warnings(record=True) as warned, compile_for("sm_90") as compiled:
    warnings.simplefilter("always")
    for _ in range(2):
        attention_forward.attention_forward(q, q, q, causal=True, softmax_scale=None)
        projection.projection(x, x[0, :64], None)
for kernel in compiled:
    own = "hopper" in kernel.kernel.name or "GROUPS" in kernel.constants
    ours = [w for w in warned if w.category is UserWarning]  # not Triton's, of what Python drops
    print(own, kernel.kernel.metadata.enable_fp_fusion, len(ours))
"""


@pytest.mark.parametrize("names", quick(["renamed", "as they are"]))
def test_a_name_that_is_gone_is_found_by_the_compiler(names, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, names],
        env={**env, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    own, warned = (names != "renamed"), 0 if names != "renamed" else 2
    assert run.stdout.splitlines() == [f"{own} True {warned}"] * 4
