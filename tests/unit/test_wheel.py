"""The wheel holds all that an installed package needs: golden configs, templates, the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from icce_ray import config as configs
from icce_ray.sweeps.space import golden_spaces

pytestmark = pytest.mark.slow

LOOK = """
import icce_ray
from icce_ray import config
from icce_ray.report import pages
from icce_ray.sweeps.space import golden_spaces
print(icce_ray.__file__)
print(*config.golden_configs(), *golden_spaces())
print(pages.template("report.html.j2").name, pages.template("sweep.html.j2").name)
"""


def call(*command: str, path: str = "", cwd: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout in a folder of its own, without the dependencies."""
    uv = shutil.which("uv")
    assert uv, "uv builds the wheel: pip install uv"
    made, folder = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("installed")
    call(uv, "build", "--quiet", "--wheel", "--out-dir", str(made), str(repository))
    (wheel,) = made.glob("*.whl")
    call(uv, "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel))
    return folder


def test_the_command_line_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    start = (sys.executable, "-m", "icce_ray.cli")
    assert "Usage:" in call(*start, "--help", path=str(installed), cwd=tmp_path)
    listed = call(*start, "config", path=str(installed), cwd=tmp_path)
    assert [line.split()[0] for line in listed.splitlines()] == list(configs.golden_configs())


def test_configs_spaces_and_templates_are_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    place, names, templates = call(
        sys.executable, "-c", LOOK, path=str(installed), cwd=tmp_path
    ).splitlines()
    assert Path(place).is_relative_to(installed)
    assert names.split() == [*configs.golden_configs(), *golden_spaces()]
    assert templates == "report.html.j2 sweep.html.j2"


def test_nothing_else_is_in_the_wheel(installed: Path) -> None:
    packages = {path.name for path in installed.iterdir() if path.is_dir()}
    assert {name for name in packages if not name.endswith(".dist-info")} <= {"icce_ray", "bin"}
