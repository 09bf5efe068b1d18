"""The planted faults still fit the sources and the tests, without planting one."""

import ast
from functools import cache
from pathlib import Path

import pytest
from mutants.faults import EXPECTED_SURVIVORS, FAULTS
from mutants.planting import Fault, Stale

ROOT = Path(__file__).parents[2]


def test_faults_have_names_of_their_own_and_excuses_are_for_faults():
    names = [fault.name for fault in FAULTS]
    assert sorted(names) == sorted(set(names))
    assert set(EXPECTED_SURVIVORS) <= set(names)


def test_a_name_stands_for_one_test():
    """A name bound again would hand the faults above it tests that do not see them."""
    tree = ast.parse((ROOT / "tests/mutants/faults.py").read_text())
    bound = [
        node.id
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        for node in ast.walk(target)
        if isinstance(node, ast.Name)
    ]
    assert sorted(bound) == sorted(set(bound))


@cache
def _statements(file):
    """The lines of each statement of a module, decorators among them."""
    tree = ast.parse((ROOT / file).read_text())
    decorated = [getattr(node, "decorator_list", []) for node in tree.body]
    return [
        (min(n.lineno for n in (node, *decorators)), node.end_lineno)
        for node, decorators in zip(tree.body, decorated, strict=True)
    ]


def _in_common(a, b):
    """How many items two lists have in common at their beginning."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def edited(file, source, planted):
    """The statements of a module that an edit is in: a whole module takes ten times as long."""
    old, new = source.splitlines(), planted.splitlines()
    same, tail = _in_common(old, new), _in_common(old[::-1], new[::-1])
    last = len(old) - tail
    spans = [span for span in _statements(file) if span[1] > same and span[0] <= last]
    return "\n".join(new[spans[0][0] - 1 : len(new) - (len(old) - spans[-1][1])])


def test_every_fault_has_one_place_and_is_an_edit():
    """A fault that has lost its place is no longer planted, and what it showed no longer shown."""
    wrong = {}
    for fault in FAULTS:
        try:
            source = (ROOT / fault.file).read_text()
            planted = fault.planted(source)
            if fault.file.endswith(".py") and planted != source:
                ast.parse(edited(fault.file, source, planted))
        except (OSError, Stale, SyntaxError) as error:
            wrong[fault.name] = str(error)
        else:
            if planted == source:
                wrong[fault.name] = "changes nothing"
    assert wrong == {}


SOURCE = '''
class A:
    def f(self, a, b=1):
        """Σ"""
        if (a < b  # c
            and b > 0 and not a):
            g(a, b, k=1,
              z={"u": a, "v": b})
        elif a: x += (a +
                      b)
        for i in (range(a),): pass
        try: w = "Σ", h(a); w = 2
        except KeyError as e: raise
def f(): a < b
'''


@pytest.mark.parametrize(
    ("edit", "old", "new"),
    [
        ("a «< → <=» b", "(a < b ", "(a <= b "),
        ("a + b«→ + 1»", "+\n                      b)", "+ b+ 1)"),
        ("x «+= → -=» a + b", "x +=", "x -="),
        ("b > 0« and not a →»", " and not a", ""),
        ("a < b «and → or» b > 0", "a < b  # c\n            and b", "a < b or b"),
        ("b«, k=1 →»", "b, k=1", "b"),
        ("k=«1 → 2»", "k=1", "k=2"),
        ('"v": «b → a»', '"v": b', '"v": a'),
        ("if «a → not a»:", "elif a:", "elif not a:"),
        ("for i in «(range(a),) → ()»:", "(range(a),)", "()"),
        ("except «KeyError → OSError» as e:", "KeyError", "OSError"),
        ("«w = 2 →»", "w = 2", "pass"),
        ('w = "Σ", h(a); w = «2 → 3»', "w = 2", "w = 3"),
        ("«raise →» … h(«a → b»)", "h(a)", "h(b)"),
    ],
)
def test_an_edit_is_of_what_the_source_says_however_it_is_written(edit, old, new):
    planted = Fault("a.py", "", "", "A.f", edit).planted(SOURCE)
    assert SOURCE.count(old) == 1
    expected = SOURCE.replace(old, new).replace("raise", "pass" if "raise" in edit else "raise")
    assert ast.dump(ast.parse(planted)) == ast.dump(ast.parse(expected))


@pytest.mark.parametrize(
    ("function", "edit", "message"),
    [
        ("A.g", "a", "a.py: there is no A.g"),
        ("A.f", "«a → b»", "a.py: A.f: 8 times 'a'"),
        ("", "a «< → <=» b", "a.py: 2 times 'a < b'"),
        ("A.f", "h(«b → a»)", r"a.py: A.f: 0 times 'h\(b\)'; the nearest is 'h\(a\)'"),
    ],
)
def test_a_fault_that_has_no_place_says_where_it_was_looked_for(function, edit, message):
    with pytest.raises(Stale, match=message):
        Fault("a.py", "", "", function, edit).planted(SOURCE)


def test_the_tests_of_a_fault_exist():
    """By file and function; whether a case in brackets exists only a run of the faults tells."""
    known = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        file = str(path.relative_to(ROOT))
        body = ast.parse(path.read_text()).body
        known |= {file, *(f"{file}::{f.name}" for f in body if isinstance(f, ast.FunctionDef))}
    named = {test.partition("[")[0] for fault in FAULTS for test in fault.test_ids}
    assert named - known == set()
