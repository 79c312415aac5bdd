"""What the chain decides before it runs anything. No stage is run and no Ray started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray import pipeline
from icce_ray.config.loading import load
from icce_ray.config.schema import Config
from icce_ray.errors import ArtifactError, ConfigError, StageError
from icce_ray.rundir.directory import Manifest, RunDirectory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(30, 8)))
    return tmp_path


def config(folder: Path, *overrides: str) -> Config:
    tree = {"num_classes": 3, "data": {"embeddings": str(folder / "x.npy")}}
    return load(tree, [f"run_dir={folder / 'run'}", *overrides])


def pretend(settings: Config, *names: str) -> RunDirectory:
    """Write manifests as if these stages had run with these settings."""
    run = RunDirectory(settings.run_dir)
    for step in pipeline.make_steps(settings, run):
        if step.stage.name in names:
            run.finish(
                step.stage.folder,
                Manifest(
                    stage=step.stage.name,
                    fingerprint=step.fingerprint,
                    settings=step.stage.settings(settings),
                    inputs={need: pipeline._id(run, need) for need in step.stage.needs},
                    rows=30,
                    seconds=1.0,
                ),
            )
    return run


def states(settings: Config, run: RunDirectory, **more: Any) -> dict[str, str]:
    return {s.stage.name: s.state for s in pipeline.make_steps(settings, run, **more)}


def test_a_new_run_runs_everything(folder: Path) -> None:
    settings = config(folder)
    assert set(states(settings, RunDirectory(settings.run_dir)).values()) == {"run"}
    assert not (folder / "run").exists()  # looking writes nothing


def test_finished_stages_are_skipped(folder: Path) -> None:
    settings = config(folder)
    run = pretend(settings, *pipeline.NAMES)
    assert set(states(settings, run).values()) == {"done"}


def test_a_changed_setting_invalidates_its_stage_and_what_follows(folder: Path) -> None:
    run = pretend(config(folder), *pipeline.NAMES)
    found = states(config(folder, "heads.count=3"), run)
    assert [found[n] for n in ("index", "embed", "neighbors")] == ["done"] * 3
    assert found["heads"] == "changed"
    assert {found[n] for n in ("consensus", "classifier", "evaluate", "report")} == {"again"}


def test_a_runtime_setting_invalidates_nothing(folder: Path) -> None:
    run = pretend(config(folder), *pipeline.NAMES)
    other = config(folder, "heads.num_workers=7", "embed.batch_size=3", "ray.num_cpus=1")
    assert set(states(other, run).values()) == {"done"}


def test_a_missing_stage_makes_later_ones_run_again(folder: Path) -> None:
    settings = config(folder)
    run = pretend(settings, *pipeline.NAMES)
    run.delete("neighbors")
    found = states(settings, run)
    assert found["neighbors"] == "run"
    assert found["heads"] == found["consensus"] == found["evaluate"] == "again"
    assert found["embed"] == "done"


def test_a_stage_that_was_made_anew_outdates_what_read_the_old_one(folder: Path) -> None:
    settings = config(folder)
    run = pretend(settings, *pipeline.NAMES)
    pretend(settings, "neighbors")  # the same settings, another id
    assert states(settings, run)["heads"] == "again"


def test_half_done_work_is_resumed_for_the_same_settings_only(folder: Path) -> None:
    settings = config(folder)
    run = pretend(settings, "index", "embed", "neighbors")
    step = pipeline.make_steps(settings, run)[3]
    inputs = {need: pipeline._id(run, need) for need in step.stage.needs}
    mark = {
        "fingerprint": step.fingerprint,
        "settings": step.stage.settings(settings),
        "inputs": inputs,
    }
    run.begin("heads", mark)
    assert states(settings, run)["heads"] == "resume"
    other = config(folder, "seed=5")
    assert states(other, run)["heads"] == "run"  # nothing was written yet: nothing to lose
    run.write_bytes(b"x", "heads", "something")
    assert states(other, run)["heads"] == "changed"


def test_the_error_names_keys_losses_and_remedies(folder: Path) -> None:
    pretend(config(folder), *pipeline.NAMES)
    with pytest.raises(ArtifactError) as error:
        pipeline.run(config(folder, "heads.count=3"), quiet=True)
    text = str(error.value)
    assert "heads.count: 24 -> 3" in text
    assert "invalidates: heads, consensus, classifier, evaluate, report" in text
    assert "Kept: index, embed, neighbors" in text
    assert "--overwrite" in text and "run_dir" in text


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (None, None, pipeline.NAMES),
        ("heads", None, pipeline.NAMES[3:]),
        (None, "embed", ("index", "embed")),
        ("heads", "heads", ("heads",)),
    ],
)
def test_select(first: str | None, last: str | None, expected: tuple[str, ...]) -> None:
    assert pipeline.select(first, last) == expected


@pytest.mark.parametrize(("first", "last"), [("nope", None), (None, "head"), ("report", "index")])
def test_select_refuses(first: str | None, last: str | None) -> None:
    with pytest.raises(ConfigError):
        pipeline.select(first, last)


def test_beginning_in_the_middle_needs_what_comes_before(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="needs a finished index"):
        pipeline.run(config(folder), first="heads", quiet=True)


def test_a_full_disk_is_seen_before_anything_expensive(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDirectory, "free_bytes", lambda self: 1000)
    with pytest.raises(StageError, match="no disk space left"):
        pipeline.run(config(folder), quiet=True)
    assert not (folder / "run" / "embeddings").exists()


def test_a_plan_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.run(config(folder), plan_only=True) == {}
    shown = capsys.readouterr().err
    assert "D 8" in shown and "H 24" in shown and "K 3" in shown
    assert all(name in shown for name in pipeline.NAMES)
    assert not (folder / "run").exists()


def test_one_process_at_a_time(folder: Path) -> None:
    run = RunDirectory(str(folder / "run"))
    with pipeline.exclusive(run), pytest.raises(ArtifactError, match="another process"):
        pipeline.run(config(folder), quiet=True)


def test_a_run_directory_below_a_file_is_one_error(folder: Path) -> None:
    (folder / "file").touch()
    settings = config(folder, f"run_dir={folder}/file/run")
    with pytest.raises(StageError, match=r"cannot be written.*run_dir="):
        pipeline.run(settings, quiet=True)
