"""The plan of a sweep, and what it refuses before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray import config as configs
from icce_ray import pipeline
from icce_ray.errors import ArtifactError
from icce_ray.rundir import storage
from icce_ray.rundir.directory import RunDirectory
from icce_ray.sweeps import running

SPACE = ("test", {"search": "grid", "space": {"consensus.method": ["voting", "mcla", "hbgf"]}})


@pytest.fixture
def config(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> configs.Config:
    """A run of pretended embeddings, which a preflight would miss."""
    monkeypatch.setattr(pipeline, "preflight", lambda *_, **options: [])
    return make.run(tmp_path)


def test_the_plan_counts_what_is_needed_and_what_is_there(tmp_path: Path, make: Any) -> None:
    config = make.run(tmp_path)
    grid = {"heads.beta": [0.6, 0.7], "consensus.method": ["voting", "mcla", "hbgf"]}
    made, drawn = make.sweep(config, {"search": "grid", "space": grid})
    make.heads(made.trials[0].view, made.trials[0].config, 1)
    first, second, *_ = running.plan_lines(made, drawn)
    assert first == (
        "sweep test: 6 trials: 1 embedding, 1 neighbor search, 1 selection, 2 head trainings, "
        "6 ensembles"
    )
    assert second == (
        "already there: 1 of 1 embedding, 1 of 1 neighbor search, 1 of 1 selection, "
        "1 of 2 head trainings"
    )


def test_a_plan_warns_of_scores_that_do_not_compare(tmp_path: Path, make: Any) -> None:
    config = make.run(tmp_path)
    made, drawn = make.sweep(config, {"search": "grid", "space": {"num_classes": [3, 4]}})
    assert any("favors fewer classes" in line for line in running.plan_lines(made, drawn))


def test_a_sweep_of_other_settings_is_not_mixed_in(tmp_path: Path, make: Any) -> None:
    made = make.finished(tmp_path, [0] * make.rows)
    old = configs.settings(made.config)
    made.run.write_json({"config": {**old, "seed": 7}}, made.folder, "sweep.json")
    with pytest.raises(ArtifactError, match=r"seed: 7 -> 0\n.*--overwrite"):
        running._check_same(made)


def test_a_plan_looks_at_each_folder_once(
    config: configs.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    look = RunDirectory.look

    def counted(self: RunDirectory, folder: str) -> Any:
        looks.append(self.path(folder))
        return look(self, folder)

    monkeypatch.setattr(RunDirectory, "look", counted)
    assert running.run(config, SPACE, plan_only=True, quiet=True) is None
    assert len(looks) == len(set(looks)) == 10 + 1 + 3  # of the run; heads; ensembles


def test_a_sweep_reports_storage_that_does_not_answer(
    config: configs.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def phases(sweep: Any) -> dict[str, Any]:
        storage._notify("the storage does not answer: waiting", False)
        return {}

    monkeypatch.setattr(running, "_run_phases", phases)
    running.run(config, SPACE, quiet=True)
    log = Path(config.run_dir, "sweeps", "test", "log").read_text()
    assert "! the storage does not answer: waiting" in log


def test_a_tracker_gets_every_ranked_trial(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make.finished(tmp_path, np.arange(make.rows) // (make.rows // 3))
    for phase in ("prepare", "train_heads", "make_ensembles"):
        monkeypatch.setattr(running, phase, lambda sweep: None)
    got: list[tuple[Any, ...]] = []
    monkeypatch.setattr(sweep.context.reporter, "trial", lambda *trial: got.append(trial))
    running._run_phases(sweep)
    assert [settings["consensus.method"] for _, settings, _ in got] == ["mcla", "voting"]
    assert got[0][2]["neighbor_information"] == 0.7 and "acc" in got[0][2]
