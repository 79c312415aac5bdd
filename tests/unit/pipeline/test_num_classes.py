"""num_classes=auto: when it is estimated, and when the number is known already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray import cli, pipeline
from icce_ray import config as configs
from icce_ray.core import num_classes as counting
from icce_ray.errors import ConfigError
from icce_ray.pipeline import num_classes
from icce_ray.rundir import results
from icce_ray.rundir.directory import RunDirectory

OPTIONS = ["num_classes=auto"]


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.normal(size=(5, 16)), 40, axis=0) + 0.2 * rng.normal(size=(200, 16))
    np.save(tmp_path / "x.npy", rows)
    return {"data": {"embeddings": str(tmp_path / "x.npy")}, "run_dir": str(tmp_path / "run")}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Ranges that were estimated in."""
    made: list[Any] = []
    estimate = counting.estimate

    def counted(embeddings: Any, between: Any, *others: Any) -> Any:
        made.append(between)
        return estimate(embeddings, between, *others)

    monkeypatch.setattr(counting, "estimate", counted)
    return made


@pytest.mark.parametrize(
    ("value", "between"),
    [("auto", (2, None)), ("4-30", (4, 30)), (" 50 - 200 ", (50, 200)), (10, None), ("10", None)],
)
def test_what_is_a_range(value: Any, between: Any) -> None:
    assert configs.parse_range(value) == between


@pytest.mark.parametrize("value", ["1-5", "5-5", "9-4", "ten", "20.5", "Auto"])
def test_a_range_that_is_none_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match=f"num_classes={value}.*such as 4-30"):
        configs.parse_range(value)


def test_a_plain_number_is_taken_as_it_is(tree: dict[str, Any], calls: list[Any]) -> None:
    found = num_classes.resolve(tree, ["num_classes=4"], quiet=True)
    assert found is not None and found.num_classes == 4
    assert not calls and not Path(tree["run_dir"]).exists()


def test_the_number_is_estimated_once(tree: dict[str, Any], calls: list[Any]) -> None:
    run = RunDirectory(tree["run_dir"])
    assert num_classes.resolve(tree, OPTIONS, plan_only=True, quiet=True) is None
    assert not calls and not run.look("embeddings").manifest
    found = num_classes.resolve(tree, OPTIONS, quiet=True)
    assert found is not None and found.num_classes == 5
    steps = pipeline.make_steps(found, run)
    assert [step.stage.name for step in steps if step.state == "done"] == ["index", "embed"]
    assert num_classes.resolve(tree, OPTIONS, quiet=True) == found
    assert num_classes.resolve(tree, OPTIONS, plan_only=True, quiet=True) == found
    assert calls == [(2, None)]
    said = run.read_json(results.NUM_CLASSES)
    assert said["best"] == 5 and len(said["tried"]) == len(said["agreement"])
    assert "num_classes: 5;" in (Path(tree["run_dir"]) / "log").read_text()


def test_other_images_settings_and_damaged_files_have_it_estimated_again(
    tree: dict[str, Any], calls: list[Any]
) -> None:
    num_classes.resolve(tree, OPTIONS, quiet=True)
    num_classes.resolve(tree, ["num_classes=3-9"], quiet=True)
    num_classes.resolve(tree, ["num_classes=3-9", "seed=1"], quiet=True)
    file = Path(tree["run_dir"]) / results.NUM_CLASSES
    for damage in (file.read_bytes()[:-9], b"[]", b"7"):
        file.write_bytes(damage)
        num_classes.resolve(tree, ["num_classes=3-9", "seed=1"], quiet=True)
    assert len(calls) == 6
    np.save(tree["data"]["embeddings"], np.random.default_rng(1).normal(size=(90, 16)))
    num_classes.resolve(tree, [*OPTIONS, "seed=2"], quiet=True, overwrite=True)
    assert len(calls) == 7
    assert json.loads(file.read_text())["best"] <= 90 // counting.SMALLEST


def test_the_run_continues_with_the_number(
    tree: dict[str, Any], calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tree["run_dir"])
    arguments = ["run", tree["data"]["embeddings"], "-k", "3-9", "--out", tree["run_dir"]]
    arguments += ["--until", "embed"]
    cli.app([*arguments, "--plan"], standalone_mode=False)
    shown = capsys.readouterr().err
    assert "estimated once the images are embedded" in shown
    assert "N not known yet, D 16;" in shown  # and no K: nobody has given one
    for _ in range(2):
        cli.app(arguments, standalone_mode=False)
    assert calls == [(3, 9)]
    assert configs.load(run.path("config.yaml")).num_classes == 5
    assert capsys.readouterr().err.count("num_classes: 5; 5 to 5 fit almost as well") == 1


def test_doubt_is_said(tree: dict[str, Any]) -> None:
    log = Path(tree["run_dir"]) / "log"
    num_classes.resolve(tree, ["num_classes=2-4"], quiet=True)
    assert "num_classes: 4;" in log.read_text() and "It is the end of the range" in log.read_text()
    np.save(tree["data"]["embeddings"], np.random.default_rng(0).normal(size=(900, 16)))
    num_classes.resolve(tree, [*OPTIONS, "run_dir=" + tree["run_dir"] + "-noise"], quiet=True)
    assert "No number stands out" in Path(tree["run_dir"] + "-noise", "log").read_text()
