"""jobs/FAULTS.md has a row for every message that a user may meet, and no other row.

A row begins with quoted fragments of messages; three dots stand for what differs. A new message
fails `test_every_message_has_a_row`, which names it: add a row, or a fragment to a similar one.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import icce_ray
from icce_ray import config, errors

PACKAGE = Path(icce_ray.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
FUNCTIONS: dict[str, list[ast.FunctionDef]] = {}  # of the whole package, by name
CALLS: dict[str, list[ast.Call]] = {}
for _node in itertools.chain.from_iterable(map(ast.walk, TREES.values())):
    if isinstance(_node, ast.FunctionDef):
        FUNCTIONS.setdefault(_node.name, []).append(_node)
    if isinstance(_node, ast.Call):
        _name = getattr(_node.func, "id", getattr(_node.func, "attr", ""))
        CALLS.setdefault(_name, []).append(_node)
ERRORS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.IcceError)
} | {"BadImage"}
SAYS = {"event", "_notify"}  # what is said with `!`, in the log and in the report
LEAST = 8  # letters of a fragment: shorter ones would be in many messages
DOTS = "..."


# --- the code ------------------------------------------------------------------------------------


def texts(node: ast.AST | None, scope: ast.AST, deep: int = 4) -> Iterator[str]:
    """What an expression may say, variable parts as three dots: names and calls are looked up."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else DOTS for v in node.values]
        yield "".join(map(str, parts))
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                yield from texts(part.value, scope, deep - 1)
    elif isinstance(node, (ast.BinOp, ast.IfExp, ast.Tuple)):
        for part in ast.iter_child_nodes(node):
            yield from texts(part, scope, deep)
    elif isinstance(node, ast.Name) and deep > 0:
        for found in assigned(node.id, scope):
            yield from texts(found, scope, deep - 1)
    elif isinstance(node, (ast.Call, ast.Attribute)) and deep > 0:
        for function in FUNCTIONS.get(name_of(node), ()):
            for found in ast.walk(function):
                if isinstance(found, ast.Return):
                    yield from texts(found.value, function, deep - 1)


def name_of(node: ast.Call | ast.Attribute) -> str:
    """The last name of what is called, or looked up."""
    called = node.func if isinstance(node, ast.Call) else node
    return getattr(called, "id", getattr(called, "attr", ""))


def assigned(name: str, scope: ast.AST) -> Iterator[ast.AST]:
    """What a variable may be in a function: as assigned, looped over, or given by a caller."""
    for node in ast.walk(scope):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value and any(isinstance(t, ast.Name) and t.id == name for t in targets):
                yield node.value
        elif isinstance(node, ast.For) and getattr(node.target, "id", "") == name:
            yield from (n for n in ast.walk(node.iter) if isinstance(n, ast.Tuple))
    if isinstance(scope, ast.FunctionDef):
        names = [argument.arg for argument in scope.args.args if argument.arg != "self"]
        for call in CALLS.get(scope.name, ()) if name in names else ():
            if len(call.args) > names.index(name):
                yield call.args[names.index(name)]


def is_error(call: ast.Call, scope: ast.AST) -> bool:
    """Whether a call makes one of our errors, by its name or through a variable."""
    name = name_of(call)
    kinds = [n for value in assigned(name, scope) for n in ast.walk(value)] if name else []
    return name in ERRORS or any(isinstance(n, ast.Name) and n.id in ERRORS for n in kinds)


def calls(tree: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.Call, ast.AST]]:
    """All calls, each with the function around it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield node, scope
        yield from calls(node, node if isinstance(node, ast.FunctionDef) else scope)


@functools.cache
def messages() -> list[tuple[str, list[str]]]:
    """Place and texts of every error, of what the schema refuses, and of what is said with `!`."""
    return list(found_messages())


def found_messages() -> Iterator[tuple[str, list[str]]]:
    for path, tree in TREES.items():
        place = path.relative_to(PACKAGE.parent).as_posix()
        for call, scope in calls(tree, tree):
            said = name_of(call) == "say"
            schema = path.name == "schema.py" and name_of(call) == "ValueError"
            if not call.args or not (
                said or schema or name_of(call) in SAYS or is_error(call, scope)
            ):
                continue
            found = list(texts(call.args[0], scope))
            if said and not (found and found[0].startswith("! ")):
                continue
            if re.fullmatch(r"f'\{\w+\}=\{error\}'", ast.unparse(call.args[0])):
                continue  # another error of ours, and the setting that it is about
            if found := [text for text in found if len(text) >= LEAST]:
                yield f"{place}:{call.lineno}", found


# --- the page ------------------------------------------------------------------------------------


def page() -> str:
    return (PACKAGE.parent / "jobs" / "FAULTS.md").read_text()


def rows() -> list[list[str]]:
    """Cells of each row of the tables of messages, without their heads."""
    tables = re.findall(r"^\| message .*\n\|---.*\n((?:\|.*\n)+)", page(), re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def fragments() -> list[str]:
    return [text for row in rows() for text in re.findall(r'"([^"]+)"', row[0])]


def says(text: str, fragment: str) -> bool:
    parts = map(re.escape, fragment.split(DOTS))
    return bool(re.search(".*".join(parts), " ".join(text.split())))


# --- tests ---------------------------------------------------------------------------------------


def test_every_message_has_a_row() -> None:
    known = fragments()
    bare = [
        f"{place}: {found[0]!r}"
        for place, found in messages()
        if not any(says(text, fragment) for text in found for fragment in known)
    ]
    assert not bare, "\n".join(bare)


def test_every_fragment_is_in_a_message() -> None:
    there = [text for _, found in messages() for text in found]
    stale = [f for f in fragments() if not any(says(text, f) for text in there)]
    assert not stale, "\n".join(stale)


def test_rows_are_complete_sorted_and_told_apart() -> None:
    for row in rows():
        assert len(row) == 3 and all(row), row
        assert row[0].startswith('"'), row
    for section in page().split("\n## ")[1:]:
        first = re.findall(r'^\| "([^"]+)"', section, re.MULTILINE)
        plain = [re.sub(r"[^a-z0-9 ]", "", text.lower()).strip() for text in first]
        assert plain == sorted(plain), section.splitlines()[0]
    assert len(set(fragments())) == len(fragments())
    assert not [text for text in fragments() if len(text) < LEAST]


def test_settings_named_exist() -> None:
    keys = {key for key, *_ in config.describe()}
    groups = "|".join(sorted({key.partition(".")[0] for key in keys if "." in key}))
    named = set(re.findall(rf"`((?:{groups})\.\w+)", page()))
    assert len(named) > 10
    assert named - {"classifier.safetensors"} <= keys  # a file
