"""Every script runs from any directory, in an environment that does not have the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for path in (*(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py"))
    if "\nif __name__ ==" in path.read_text()
)
# What `python PATH --help` does, one after the other: Python puts the script's folder on its path.
RUN_ALL = """
import contextlib, io, json, os, runpy, sys
root, *scripts = sys.argv[1:]
outside = [f for f in sys.path if f not in ("", root) and not os.path.isdir(f"{f}/ra_triton")]
ours = ("bench", "ra_triton", "ref", "conftest")
failed = {}
for script in scripts:
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    sys.path, sys.argv = [script.rpartition("/")[0], *outside], [script, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as help:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code or not help.getvalue().startswith("usage: "):
            failed[script] = f"exit status {end.code}"
    except BaseException as error:
        failed[script] = repr(error)
    else:
        failed[script] = "did something"
print(json.dumps(failed))
"""


def test_every_script_finds_what_it_imports(tmp_path):
    """Imports alone: ``--help`` measures nothing, trains nothing, writes nothing."""
    assert len(SCRIPTS) > 14
    scripts = [str(path) for path in SCRIPTS]
    run = subprocess.run(
        [sys.executable, "-c", RUN_ALL, str(ROOT), *scripts],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {}


def test_a_script_takes_the_repository_that_it_lies_in(tmp_path):
    """Not an installed one, and not its own folder, whose names are nobody's top-level modules."""
    code = f"import sys; sys.path[0] = {str(ROOT / 'bench')!r}\n"
    code += "import bench.harness.options, ra_triton, importlib.util\n"
    code += "print(bench.__file__, ra_triton.__file__, importlib.util.find_spec('sampling'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    files = f"{ROOT / 'bench/__init__.py'} {ROOT / 'ra_triton/__init__.py'}"
    assert done.stdout.split() == [*files.split(), "None"]
