"""What `import icce_ray` offers: light to import, each function a plain call."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import icce_ray
from icce_ray.errors import ArtifactError, ConfigError


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, icce_ray\n"
        "heavy = {'torch', 'ray', 'pyarrow', 'numpy', 'sklearn', 'pydantic', 'scipy', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_function_shows_its_use() -> None:
    functions = [name for name in icce_ray.__all__ if name != "__version__"]
    assert functions == ["cluster", "cluster_images", "load", "predict", "run", "sweep"]
    for name in functions:
        text = inspect.getdoc(getattr(icce_ray, name))
        assert text and f"icce_ray.{name}(" in text and "Raises:" in text, name


def test_the_version_is_that_of_the_package(repository: Path) -> None:
    text = (repository / "pyproject.toml").read_text()
    declared = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert declared and declared[1] == icce_ray.__version__


@pytest.mark.parametrize("images", [["a.jpg", "b.jpg"], None, 3])
def test_what_is_no_address_is_said_so(images: Any) -> None:
    with pytest.raises(ConfigError, match=r"not (list|NoneType|int): give a folder, a pattern"):
        icce_ray.cluster_images(images, k=2)


def test_what_is_not_there_is_named(make_run: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished consensus/"):
        icce_ray.load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="no finished evaluation/"):
        _ = icce_ray.load(make_run(6, 2).run.uri).metrics
