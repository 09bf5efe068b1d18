"""Every pair of torch and Triton that is supported, each in an environment of its own.

    python tests/matrix.py                          # all pairs, of several GB each
    python tests/matrix.py --pair 2.11.0+3.6.0 --pair newest
    python tests/matrix.py --pair newest --quick    # as CI does: no plain kernel is compiled

An environment is ``.matrix/<torch>+<triton>`` and is kept. In it run: the imports, the tests of the
launcher and of Gluon's names, the tracing (no graph break), a part of the interpreter's tests, and
the compilation of the kernels for Hopper (no spill, no serialised WGMMA), two of these at a time.
The exit status is 1 if anything fails.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAIRS = {  # torch and Triton, and what else has to be of a version
    "2.11.0+3.6.0": ["numpy<2.4"],  # with later ones Triton 3.6's interpreter fails
    "2.12.1+3.7.1": ["numpy<3"],
    "2.13.0+3.7.1": ["numpy<3"],
    "2.14.1+3.8.0": ["numpy<3"],
    "2.15.0+3.9.0": ["numpy<3"],
}
TOOLS = ["pytest>=8", "hypothesis>=6.100"]

IMPORTS = """
import sys, torch
from importlib.metadata import version
import ra_triton, ra_triton.nn
assert "triton" not in sys.modules, "import ra_triton imports Triton"
pair = torch.__version__.partition("+")[0] + "+" + version("triton")
assert pair == sys.argv[1], f"installed: {pair}"
from ra_triton.backend.triton import operators
from ra_triton.kernels.attention import forward as attention_forward
from ra_triton.launch import gluon
from ra_triton.kernels.projection import forward as projection
assert gluon.MISSING is None, gluon.MISSING
"""
# Triton compiles and assembles; what falls back to a plain kernel warns, which is an error here.
AHEAD_OF_TIME = """
import sys, warnings
from bench.machine_code.aot import shipped
warnings.simplefilter("error", UserWarning)  # Triton itself has some of what Python deprecates
in_gluon, plain = set(), set()
for kernel in shipped("sm_90", only=sys.argv[1]):
    own = "hopper" in kernel.name or "GROUPS" in kernel.constants
    (in_gluon if own else plain).add(kernel.label)
    assert kernel.kernel.metadata.enable_fp_fusion
    assert not kernel.spilled_bytes, f"{kernel.label}: spills {kernel.spilled_bytes} bytes"
    assert not kernel.serialised_wgmma, f"{kernel.label}: serialised WGMMA"
print(len(in_gluon), "kernels in Gluon,", len(plain), "others")
attention = {label for label in in_gluon if label.startswith("attention_forward_hopper")}
assert len(attention) >= 5 and len(in_gluon - attention) >= 8, sorted(in_gluon)
"""
GLUON = "attention_forward_hopper|projection (bfloat16|float16)"


@dataclass(frozen=True)
class Step:
    """A command that has to succeed: arguments of the environment's Python."""

    name: str
    arguments: Sequence[str]
    interpreted: bool = False


def steps(pair: str, quick: bool) -> list[Step]:
    """What is run for a pair; ``quick``: without the plain kernels, with fewer tests."""
    tests = [
        "tests/projection/test_projection.py",
        "tests/lanes/test_packing.py",
        "tests/pytorch/test_compile.py",
    ]
    if quick:
        tests = ["tests/attention/test_attention.py::test_lengths_around_tile_boundaries"]
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    return [
        Step("imports", ("-c", IMPORTS, pair)),
        Step("sm_90", ("-c", AHEAD_OF_TIME, GLUON if quick else "")),
        Step("tracing", (*pytest, "tests/pytorch/test_tracing.py"), True),
        Step(
            "launcher",
            (*pytest, "tests/launch/test_launcher.py", "tests/launch/test_gluon.py"),
            True,
        ),
        Step("interpreter", (*pytest, *tests), True),
    ]


def environment(pair: str, folder: Path) -> Path:
    """The Python of a pair's environment, which is made unless it is there."""
    python = folder / pair / "bin" / "python"
    torch, _, triton = pair.partition("+")
    wanted = [f"torch=={torch}", f"triton=={triton}", *PAIRS[pair], *TOOLS]
    done = folder / pair / "installed"
    if not done.exists() or done.read_text().split() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / pair)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        done.write_text("\n".join(wanted))
    return python


def run(python: Path, step: Step) -> tuple[bool, float]:
    """Whether a step succeeds, and its seconds; its output is shown only if it does not."""
    start = time.monotonic()
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT)} | ({"TRITON_INTERPRET": "1"} if step.interpreted else {})
    done = subprocess.run(
        [str(python), *step.arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )
    if done.returncode:
        print(
            f"{step.name}: exit status {done.returncode}", done.stdout[-6000:], done.stderr[-6000:]
        )
    return done.returncode == 0, time.monotonic() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status says whether everything succeeded."""
    args = _parse(argv)
    lines, failed = [], False
    for pair in args.pair:
        cells, start = [], time.monotonic()
        try:
            python = environment(pair, args.folder)
        except subprocess.CalledProcessError as error:
            lines.append(f"{pair:14}  not installed: {error}")
            failed = True
            continue
        cells.append(f"install {time.monotonic() - start:.0f} s")
        todo = steps(pair, args.quick)
        with ThreadPoolExecutor(2) as pool:
            for step, (passed, seconds) in zip(
                todo, pool.map(partial(run, python), todo), strict=True
            ):
                failed |= not passed
                cells.append(f"{step.name} {'ok' if passed else 'FAILED'} {seconds:.0f} s")
                print(f"{pair}: {cells[-1]}", flush=True)
        lines.append(f"{pair:14}  {'   '.join(cells)}")
    print("\n".join(["", *lines]))
    return int(failed)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("matrix.py", description=__doc__, formatter_class=form)
    newest = list(PAIRS)[-1]
    parser.add_argument("--pair", action="append", choices=[*PAIRS, "newest"], help="default: all")
    parser.add_argument("--quick", action="store_true", help="no plain kernel, and fewer tests")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="of environments")
    args = parser.parse_args(argv)
    args.pair = [newest if pair == "newest" else pair for pair in args.pair or PAIRS]
    return args


if __name__ == "__main__":
    sys.exit(main())
