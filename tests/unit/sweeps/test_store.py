"""What a sweep keeps: copies of artifacts that are a run of their own, and records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icce_ray import pipeline
from icce_ray.rundir.directory import RunDirectory
from icce_ray.sweeps import store

FOLDERS = ["index", "embeddings", "neighbors", "selection", "heads"]


def test_copies_are_a_run_that_resumes_after_the_sweep(tmp_path: Path, make: Any) -> None:
    config = make.run(tmp_path)
    made, _ = make.sweep(config, {"search": "grid", "space": {"heads.beta": [0.7]}})
    (trial,) = made.trials
    make.heads(trial.view, trial.config, 1)
    target = RunDirectory(str(tmp_path / "best"))
    store.place_copies(trial.view, FOLDERS, target)
    steps = pipeline.make_steps(trial.config, target)
    assert [step.state for step in steps[:6]] == ["done"] * 5 + ["run"]
    other, _ = make.sweep(config, {"search": "grid", "space": {"heads.beta": [0.8]}})
    (later,) = other.trials
    make.heads(later.view, later.config, 1)
    kept = target.manifest("embeddings")
    store.place_copies(later.view, FOLDERS, target)
    steps = pipeline.make_steps(later.config, target)
    assert [step.state for step in steps[:6]] == ["done"] * 5 + ["run"]
    assert target.manifest("embeddings") == kept, "what is the same stays"
