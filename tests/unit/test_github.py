"""What GitHub reads: workflows and forms of this repository. Nothing here runs them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

WORKFLOWS = ("tests", "release")


@pytest.fixture(scope="module", params=WORKFLOWS)
def workflow(request: pytest.FixtureRequest, repository: Path) -> dict[str, Any]:
    return load(repository, request.param)


def load(repository: Path, name: str) -> dict[str, Any]:
    text = (repository / ".github" / "workflows" / f"{name}.yml").read_text()
    return yaml.load(text, yaml.BaseLoader)  # else YAML reads the key `on` as true


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        assert job["runs-on"] and int(job["timeout-minutes"]) <= 120
        yield from job["steps"]


def commands(workflow: dict[str, Any]) -> str:
    return "\n".join(step["run"] for step in steps(workflow) if "run" in step)


def test_workflows_are_whole(workflow: dict[str, Any], repository: Path) -> None:
    assert workflow["on"] and workflow["permissions"]  # else a token may write everything
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step), step
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1")), step
    for path in re.findall(r"\b(?:tests|jobs)/[\w/.]+", commands(workflow)):
        assert (repository / path).exists(), path


def test_pushes_run_all_tests(repository: Path) -> None:
    assert ".ci/run" in commands(load(repository, "tests")).splitlines()


def test_a_release_is_tried_in_a_fresh_environment(repository: Path) -> None:
    ran = commands(load(repository, "release"))
    order = [ran.index(text) for text in ("uv build", "uv venv", "icce-ray --help", "gh release")]
    assert order == sorted(order)


def test_forms_ask_for_something(repository: Path) -> None:
    forms = list((repository / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text())
        if path.stem == "config":
            continue
        assert form["name"] and form["description"], path
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert all(field["attributes"]["label"] for field in fields), path
        assert len({field["id"] for field in fields}) == len(fields) >= 2, path
        assert any(field.get("validations", {}).get("required") for field in fields), path


def test_the_cpu_route_replaces_dependencies(repository: Path) -> None:
    """jobs/cpu.txt: an override of a name that is no dependency would do nothing."""
    lines = (repository / "jobs" / "cpu.txt").read_text().splitlines()
    given = {r.name: r for r in map(Requirement, filter(lambda l: l[0] != "#", lines))}
    needed = {r.name: r for r in map(Requirement, metadata.requires("icce-ray") or [])}
    assert set(given) == {"faiss-gpu", "faiss-cpu"}
    assert given["faiss-cpu"].specifier == needed["faiss-cpu"].specifier
    gpu = given["faiss-gpu"].marker
    assert gpu is not None and not gpu.evaluate()
