"""Plants one fault at a time in a copy of the tree and sees whether the tests notice.

``python tests/mutants/run.py [--only NAME ...] [--list]``; a part of a name is enough. The
unfaulted copy has to pass all named tests first; then each fault of ``faults.py`` is applied, its
tests run, the file restored. Exit status 1 if a fault survives that nobody excused, hangs, breaks
the collection, or has moved.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutants.faults import EXPECTED_SURVIVORS, FAULTS
from mutants.planting import Fault, Stale

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60.0  # seconds for the tests of one fault
BASELINE_LIMIT = 1800.0  # seconds for all of them, unfaulted
PYTEST = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider")
PYTEST += ("-m", "slow or not slow")
PASSED, FAILED = 0, 1  # pytest's exit status; 2 and up: it could not run the tests
FINE = {"killed", "excused"}


def copy_tree(to: Path) -> None:
    """Copy what git tracks, and what it neither tracks nor ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in sorted(set(filter(None, listed.split("\0")))):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)


def run_tests(tree: Path, arguments: list[str], limit: float) -> tuple[int | None, str]:
    """Pytest in ``tree``: its exit status, None if it ran past ``limit``, and its output."""
    env = {
        **os.environ,
        "CI": "true",  # hypothesis draws the same examples on every run
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",  # a fault of equal size within a second looks like no edit
        "COLUMNS": "200",
    }
    process = subprocess.Popen(
        [*PYTEST, *arguments],
        cwd=tree,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # also what the tests have started
            process.wait()


def killer(status: int, output: str) -> str:
    """The test that failed first and how, or the signal that ended the process."""
    if status < 0:
        return signal.Signals(-status).name
    failed = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failed[-1].partition(" ")[2] if failed else output.strip().rpartition("\n")[2]


def plant(fault: Fault, tree: Path) -> tuple[str, str]:
    """Verdict on one fault, and the test that killed it or what else there is to say."""
    path = tree / fault.file
    try:
        clean = path.read_text()
        path.write_text(fault.planted(clean))
    except (Stale, OSError) as error:
        return "stale", str(error)
    try:
        status, output = run_tests(tree, fault.test_ids, LIMIT)
    finally:
        path.write_text(clean)
    excuse = EXPECTED_SURVIVORS.get(fault.name)
    if status is None:
        return ("killed", f"hangs, as it should: {LIMIT:.0f} s") if fault.hangs else ("timeout", "")
    if status == PASSED:
        return ("excused", excuse) if excuse else ("SURVIVED", fault.tests)
    if status > FAILED:
        return "broken", killer(status, output)
    return ("EXCUSED, BUT KILLED" if excuse else "killed"), killer(status, output)


def passes_unfaulted(faults: list[Fault], tree: Path) -> bool:
    """Whether all tests that the faults name exist and pass as they are."""
    named = dict.fromkeys(test for fault in faults for test in fault.test_ids)
    status, output = run_tests(tree, list(named), BASELINE_LIMIT)
    print("without a fault:", output.strip().rpartition("\n")[2] if status == PASSED else output)
    return status == PASSED


def main() -> int:
    """Run, print the table and the score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these faults alone, by any part of a name"
    )
    parser.add_argument("--list", action="store_true", help="print the faults and leave")
    options = parser.parse_args()
    names = [fault.name for fault in FAULTS]
    unknown = [part for part in options.only or [] if not any(part in name for name in names)]
    unknown += set(EXPECTED_SURVIVORS) - set(names)
    if unknown or len(set(names)) < len(names):
        parser.error(f"no such fault: {unknown}" if unknown else "two faults of one name")
    wanted = options.only or [""]
    faults = [fault for fault in FAULTS if any(part in fault.name for part in wanted)]
    if options.list:
        for fault in faults:
            print(f"{fault.name:<58} {fault.file:<40} {' '.join(fault.test_ids)}")
        return 0

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # clean up, like after Ctrl-C
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        if not passes_unfaulted(faults, tree):
            return 1
        for fault in faults:
            begin = time.monotonic()
            verdict, note = plant(fault, tree)
            verdicts.append(verdict)
            seconds = time.monotonic() - begin
            print(f"{verdict:<9} {seconds:5.1f} s  {fault.name:<58} {note[:200]}", flush=True)
    killed, excused = verdicts.count("killed"), verdicts.count("excused")
    print(f"\nscore: {killed} of {len(verdicts)} killed, {excused} excused", end="")
    others = {v: verdicts.count(v) for v in dict.fromkeys(verdicts) if v not in FINE}
    print("".join(f", {count} {verdict}" for verdict, count in others.items()))
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
