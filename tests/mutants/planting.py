"""A fault, and where it is planted: by syntax trees, so that neither layout nor comments matter."""

import ast
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
EDIT = re.compile("«(.*?) ?→ ?(.*?)»", re.DOTALL)
HEADS = (ast.If, ast.While, ast.For, ast.With, ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)
NOT_OF_A_HEAD = ("body", "orelse", "decorator_list")


class Stale(ValueError):
    """The source has changed, and the fault has lost its place."""


@dataclass(frozen=True)
class Fault:
    """One edit of one function.

    Attributes:
        file: path from the repository's root.
        name: what is wrong.
        tests: pytest arguments; ``gqa::groups`` is ``test_groups`` of a ``test_gqa.py``.
        function: qualified name, ``f``, ``Class.method`` or ``Class``; empty for the whole file.
        edit: what occurs once in the function, with ``«old → new»`` where it changes: an
            expression, ``a «+ → -» b``; neighbours in a call, a list or an ``and``, as they stand
            there, ``a, b«, c →»``; ``name=value``, ``"key": value``; statements, ``a = 1; b = 2``;
            the head of a compound one, ``if x:``. Several edits have ``…`` between them. In a file
            that is not Python: text.
        hangs: whether running past the limit counts as killed.
    """

    file: str
    name: str
    tests: str
    function: str
    edit: str
    hangs: bool = False

    @property
    def test_ids(self) -> list[str]:
        """The tests in full."""
        return [_in_full(test) for test in shlex.split(self.tests)]

    def planted(self, source: str) -> str:
        """The text of ``file`` with the fault; raises :class:`Stale`."""
        for edit in self.edit.split(" … "):
            old, new = (EDIT.sub(side, edit).strip() for side in (r"\1", r"\2"))
            begin, end = self._place(old, source)
            new = new or "pass"
            data = source.encode()
            new = "el" * data.startswith(b"elif", begin) + new
            source = (data[:begin] + new.encode() + data[end:]).decode()
        return source

    def _place(self, old: str, source: str) -> tuple[int, int]:
        """The first byte of what is replaced, and the one after its last."""
        functions: list[ast.AST] = []
        if self.file.endswith(".py"):
            functions = [*_named(_parsed(source), self.function)]
            if not functions:
                raise Stale(f"{self.file}: there is no {self.function}")
            found = {place for function in functions for place in _places(function, old, source)}
        else:
            starts = (m.start() for m in re.finditer(re.escape(old.encode()), source.encode()))
            found = {(start, start + len(old.encode())) for start in starts}
        if len(found) != 1:
            where = f"{self.file}: {self.function}".rstrip(": ")
            raise Stale(f"{where}: {len(found)} times {old!r}{_similar(functions, old)}")
        (place,) = found
        return place


def _in_full(test: str) -> str:
    file, _, name = test.partition("::")
    return test if file.startswith("tests/") else f"{_path_of(file)}::test_{name}"


@cache
def _path_of(name: str) -> str:
    """``tests/attention/test_gqa.py`` for ``gqa``; a file that is none stays one."""
    found = sorted((ROOT / "tests").rglob(f"test_{name}.py"))
    return str(found[0].relative_to(ROOT)) if found else f"tests/test_{name}.py"


@cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _named(tree: ast.AST, name: str, path: str = "") -> Iterator[ast.AST]:
    """Functions and classes of a qualified name; the tree itself without one."""
    if name == path:
        yield tree
        return
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from _named(node, name, f"{path}.{node.name}".lstrip("."))
        elif isinstance(node, ast.stmt):
            yield from _named(node, name, path)


@cache
def _dump(node: ast.AST) -> str:
    """What a part of a tree says, wherever it stands."""
    text = ast.dump(node)
    return text.replace("ctx=Store()", "ctx=Load()").replace("ctx=Del()", "ctx=Load()")


@cache
def _inside(tree: ast.AST) -> list[ast.AST]:
    """All of a tree but the inside of f-strings, which has no reliable place."""
    below = [] if isinstance(tree, ast.JoinedStr) else ast.iter_child_nodes(tree)
    return [tree, *(node for child in below for node in _inside(child))]


def _lists(node: ast.AST) -> Iterator[tuple[str, list[ast.AST]]]:
    """What stands side by side in a node, in the order of the source, and what is between it."""
    if isinstance(node, ast.Call):
        yield ",", sorted([*node.args, *node.keywords], key=lambda n: (n.lineno, n.col_offset))
    elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        yield ",", node.elts
    elif isinstance(node, ast.Dict):
        items = zip(node.keys, node.values, strict=True)
        yield ":", [part for item in items for part in item if part]
    elif isinstance(node, ast.BoolOp):
        yield type(node.op).__name__, node.values
    if isinstance(node, ast.expr):
        yield "alone", [node]
    elif isinstance(node, (ast.stmt, ast.mod, ast.ExceptHandler)):
        for name in ("body", "orelse", "finalbody"):
            yield ";", getattr(node, name, [])


def _patterns(old: str) -> dict[str, list[ast.AST]]:
    """What ``old`` may be, by what is between its parts."""
    found: dict[str, list[ast.AST]] = {}
    with suppress(SyntaxError):
        found[";"] = ast.parse(old).body
    with suppress(SyntaxError):
        ((_, found[":"]), _) = _lists(ast.parse(f"{{\n{old}\n}}", mode="eval").body)
    with suppress(SyntaxError, ValueError):  # a bare generator is no list of arguments
        ((_, parts), _) = _lists(ast.parse(f"_(\n{old}\n)", mode="eval").body)
        found |= {",": parts, "alone": parts}
        if len(parts) == 1 and isinstance(parts[0], ast.BoolOp):
            found[type(parts[0].op).__name__] = parts[0].values
    return found


def _places(function: ast.AST, old: str, source: str) -> Iterator[tuple[int, int]]:
    """Where ``old`` stands in a function: its first and last byte, as syntax trees count."""
    lines = [0]
    for line in source.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    if old.endswith(":"):
        wanted = _head(_parsed_head(old))
        for node in _inside(function):
            if isinstance(node, HEADS) and _head(node) == wanted:
                begin = lines[node.lineno - 1] + node.col_offset
                ends = [begin, *(_end(n, lines) for n in _parts_of_head(node))]
                yield begin, source.encode().index(b":", max(ends)) + 1
        return
    wanted = {between: [_dump(n) for n in nodes] for between, nodes in _patterns(old).items()}
    for node in _inside(function):
        for between, siblings in _lists(node):
            count, keys = len(wanted.get(between, [])), [_dump(sibling) for sibling in siblings]
            for i in range(len(keys) - count + 1 if count else 0):
                if keys[i : i + count] == wanted[between]:
                    first, last = siblings[i], siblings[i + count - 1]
                    yield lines[first.lineno - 1] + first.col_offset, _end(last, lines)


def _end(node: ast.AST, lines: list[int]) -> int:
    return lines[node.end_lineno - 1] + node.end_col_offset


def _parsed_head(old: str) -> ast.AST:
    if old.startswith("except"):
        return ast.parse(f"try: pass\n{old} pass").body[0].handlers[0]
    return ast.parse(f"{old} pass").body[0]


def _parts_of_head(node: ast.AST) -> Iterator[ast.AST]:
    """What a compound statement says before its colon."""
    for name, value in ast.iter_fields(node):
        for part in value if isinstance(value, list) else [value]:
            if name not in NOT_OF_A_HEAD and isinstance(part, ast.AST):
                yield from (n for n in ast.walk(part) if hasattr(n, "end_lineno"))


def _head(node: ast.AST) -> str:
    """A compound statement without what it holds."""
    copy = type(node)(**{n: v for n, v in ast.iter_fields(node) if n not in NOT_OF_A_HEAD})
    for name in set(NOT_OF_A_HEAD) & set(node._fields):
        setattr(copy, name, [])
    return ast.dump(copy)


def _similar(functions: list[ast.AST], old: str) -> str:
    """What of the functions looks most like what was not found."""
    nodes = (node for function in functions for node in _inside(function))
    texts = {ast.unparse(node) for node in nodes if isinstance(node, (ast.expr, ast.stmt))}
    found = get_close_matches(old, [text for text in texts if text != old], n=1)
    return f"; the nearest is {found[0]!r}" if found else ""
