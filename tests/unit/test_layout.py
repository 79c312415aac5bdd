"""The rules of the house: what a room may hold and import, and how large its parts may be.

Each test lists every offender, so that one run shows all there is to mend.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import icce_ray
from icce_ray import config

PACKAGE = Path(icce_ray.__file__).parent
REPOSITORY = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
JOBS = sorted((REPOSITORY / "jobs").rglob("*.py"))
CORE = sorted((PACKAGE / "core").rglob("*.py"))

LINES_OF_A_FILE = 500
LINES_OF_A_FUNCTION = 65
NAMES_AT_THE_TOP = 12  # files and folders of the package
SETTINGS = 75
UNDOCUMENTED = 30  # public functions, classes and modules without a docstring; to fall, not to rise
HEAVY = {"ray", "faiss", "timm", "torchvision"}  # slow to import
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PURE = ("config.schema", "errors", "rundir.directory", "rundir.progress")  # nor may these load them

# What a room may import of the package, beside itself; `config` and `errors` are open to all.
ROOMS = {
    "core": (),
    "data": ("core", "rundir"),
    "rundir": ("core",),
    "report": ("core", "data", "rundir"),
}


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Module and imported names of every import, at the top or inside a function."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names]


def modules(path: Path) -> set[str]:
    """Modules a file imports; `from icce_ray import x` counts as icce_ray.x."""
    found = set()
    for module, names in imports(path):
        found |= {f"{module}.{name}" for name in names} if module == "icce_ray" else {module}
    return found


# --- sizes ---------------------------------------------------------------------------------------


def test_files_are_short():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in [*FILES, *JOBS]}
    assert not {name: n for name, n in lengths.items() if n > LINES_OF_A_FILE}


def test_functions_are_short():
    long = {}
    for path in [*FILES, *JOBS]:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LINES_OF_A_FUNCTION:
                    long[f"{name_of(path)}:{node.name}"] = length
    assert not long


def test_the_top_of_the_package_is_short():
    names = {p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert len(names - {"__init__.py"}) <= NAMES_AT_THE_TOP, sorted(names)


def test_settings_are_few():
    keys = [key for key, *_ in config.describe()]
    assert len(keys) <= SETTINGS, f"{len(keys)} settings"


# --- who imports whom ----------------------------------------------------------------------------


def test_only_distributed_imports_ray():
    inside = PACKAGE / "distributed"
    assert not [
        name_of(path)
        for path in FILES
        if inside not in path.parents and "ray" in {m.split(".")[0] for m in modules(path)}
    ]


def test_core_imports_no_pyarrow():
    assert len(CORE) > 10
    assert not [
        name_of(path) for path in CORE if "pyarrow" in {m.split(".")[0] for m in modules(path)}
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    allowed = {room, "config", "errors", *ROOMS[room]}
    wrong = {}
    for path in sorted((PACKAGE / room).rglob("*.py")):
        rooms = {m.split(".")[1] for m in modules(path) if m.startswith("icce_ray.")}
        if rooms - allowed:
            wrong[name_of(path)] = sorted(rooms - allowed)
    assert not wrong


def test_private_names_stay_in_their_file():
    wrong = []
    for path in [*FILES, *JOBS]:
        for module, names in imports(path):
            if module.startswith(("icce_ray", "benchmarks", ".")):
                wrong += [
                    f"{name_of(path)}: from {module} import {name}"
                    for name in names
                    if name.startswith("_") and not name.startswith("__")
                ]
    assert not wrong


def test_private_names_of_a_module_are_not_reached_into():
    """`module._name` is the same as importing `_name`."""
    wrong = []
    for path in [*FILES, *JOBS]:
        tree = tree_of(path)
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("icce_ray")
            for alias in node.names
            if alias.name[0].islower()
        }
        wrong += [
            f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
            and isinstance(node.value, ast.Name)
            and node.value.id in imported
        ]
    assert not wrong


def test_importing_the_method_loads_nothing_heavy():
    paths = [path.relative_to(PACKAGE.parent).with_suffix("") for path in CORE]
    names = [".".join(path.parts) for path in paths if path.name != "__init__"]
    names += [f"icce_ray.{name}" for name in PURE]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# --- documentation and safety --------------------------------------------------------------------


def public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and of its classes (overrides excepted)."""
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if node.name.startswith("_"):
            continue
        yield f"{prefix}:{node.name}", node
        if isinstance(node, ast.ClassDef) and not node.bases:
            yield from public(node.body, f"{prefix}:{node.name}")


def test_what_is_public_has_a_docstring():
    bare = []
    for path in FILES:
        tree = tree_of(path)
        for name, node in [(name_of(path), tree), *public(tree.body, name_of(path))]:
            if not ast.get_docstring(node):
                bare.append(name)
    assert len(bare) <= UNDOCUMENTED, "\n".join(bare)


def test_no_pickle_is_loaded():
    for path in FILES:
        assert not PICKLES & {part for name in modules(path) for part in name.split(".")}, path
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            call = ast.unparse(node.func)
            if call == "torch.load":
                assert ast.unparse(given["weights_only"]) == "True", path
            if call == "np.load":
                assert ast.unparse(given["allow_pickle"]) == "False", path
            if call.endswith(("yaml.load", "yaml.unsafe_load")):
                assert ast.unparse(node.args[1]) in ("_Loader", "yaml.SafeLoader"), path


def test_the_top_of_the_repository_is_short(repository):
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("no git checkout")
    names = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    plain = {name for name in names if not name.startswith(".")}
    assert plain <= {
        "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "cluster.yaml",
        "icce_ray", "jobs", "tests",
    }  # fmt: skip
