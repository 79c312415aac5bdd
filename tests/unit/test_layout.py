"""The rules that hold the parts of the package apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import icce_ray

PACKAGE = Path(icce_ray.__file__).parent
CORE = sorted((PACKAGE / "core").rglob("*.py"))
PURE = [
    "icce_ray.config.schema",
    "icce_ray.errors",
    "icce_ray.rundir.directory",
    "icce_ray.rundir.progress",
]


def imports(path):
    """Every module a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_core_names_no_ray_no_pyarrow_and_no_stage(path):
    found = set(imports(path))
    assert not {name for name in found if name.split(".")[0] in ("ray", "pyarrow")}
    outside = {name for name in found if name.startswith("icce_ray.")}
    allowed = (
        "icce_ray.core",
        "icce_ray.config",
        "icce_ray.errors",
        "icce_ray.data.reading",
    )
    assert all(name.startswith(allowed) for name in outside), outside
    assert not {name for name in found if name.startswith(".")}


def test_core_is_found_at_all():
    assert {"losses", "neighbors", "consensus"} <= {path.stem for path in CORE}


def test_importing_the_method_loads_no_ray_and_nothing_heavy():
    files = [path.relative_to(PACKAGE.parent).with_suffix("") for path in CORE]
    names = [".".join(path.parts) for path in files if path.name != "__init__"]
    code = (
        "import importlib, sys\n"
        f"for name in {names + PURE!r}: importlib.import_module(name)\n"
        "heavy = {'ray', 'faiss', 'timm', 'torchvision'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_pickle_is_loaded():
    for path in PACKAGE.rglob("*.py"):
        assert "pickle" not in set(imports(path)), path
        for node in ast.walk(ast.parse(path.read_text())):
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


def test_the_top_level_holds_what_was_asked_for(repository):
    """pyproject.toml, README.md, cluster.yaml, icce_ray/, jobs/, tests/; dot-files and LICENSE."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("no git checkout")
    names = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    plain = {name for name in names if not name.startswith(".")}
    assert plain <= {
        "pyproject.toml", "README.md", "LICENSE", "cluster.yaml", "icce_ray", "jobs", "tests"
    }  # fmt: skip
