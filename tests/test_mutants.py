"""The planted faults still fit the sources and the tests, without planting one."""

import ast
import shlex
from pathlib import Path

from mutants.faults import EXPECTED_SURVIVORS, FAULTS

ROOT = Path(__file__).parent.parent


def test_faults_have_names_of_their_own_and_excuses_are_for_faults():
    names = [fault.name for fault in FAULTS]
    assert sorted(names) == sorted(set(names))
    assert set(EXPECTED_SURVIVORS) <= set(names)


def test_what_a_fault_replaces_occurs_once():
    """A fault that has lost its place is no longer planted, and what it showed no longer shown."""
    texts = {file: (ROOT / file).read_text() for file in {fault.file for fault in FAULTS}}
    counts = {fault.name: texts[fault.file].count(fault.old) for fault in FAULTS}
    assert {name: count for name, count in counts.items() if count != 1} == {}
    assert [fault.name for fault in FAULTS if fault.new == fault.old] == []


def test_the_tests_of_a_fault_exist():
    """By file and function; whether a case in brackets exists only a run of the faults tells."""
    known = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        file = f"tests/{path.name}"
        body = ast.parse(path.read_text()).body
        known |= {file, *(f"{file}::{f.name}" for f in body if isinstance(f, ast.FunctionDef))}
    named = {test.partition("[")[0] for fault in FAULTS for test in shlex.split(fault.tests)}
    assert named - known == set()
