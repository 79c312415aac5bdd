"""The phases of a sweep: what is made, what is taken, what is remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icce_ray.distributed import tune as tuning
from icce_ray.sweeps import phases, running


def test_a_sweep_over_selections_takes_the_searches_of_the_run(tmp_path: Path, make: Any) -> None:
    config = make.run(tmp_path)
    grid = {"neighbors.rule": ["auto", "fixed"], "neighbors.k": [4, 5], "num_classes": [2, 3]}
    made, _ = make.sweep(config, {"search": "grid", "space": grid})
    assert running.counts(made)["search"] == {"total": 1, "there": 1}
    assert running.counts(made)["select"]["total"] == 8
    phases.prepare(made)  # a search would start Ray
    fixed = next(t for t in made.trials if t.config.neighbors.rule == "fixed")
    assert (fixed.view.matrix("selection", "count") == fixed.config.neighbors.k).all()
    assert not [name for name in made.run.folders("store") if name.startswith("neighbors")]


def test_scores_by_other_neighbors_are_not_taken(tmp_path: Path, make: Any) -> None:
    made = make.finished(tmp_path, [0] * make.rows)
    trial = made.trials[1]
    record = {"state": "done", "scores": trial.scores, "reused": [], "seconds": 1.0}
    for judge, taken in ((trial.judge, True), ("another", False)):
        of = {**trial.scores_of, "judge": judge}
        made.run.write_json({**record, "scores_of": of}, made.folder, "trials", f"{trial.id}.json")
        assert phases.take_record(made, trial) is taken


def test_how_heads_ended_is_remembered(tmp_path: Path, make: Any) -> None:
    made, _ = make.sweep(
        make.run(tmp_path), {"search": "grid", "space": {"heads.beta": [0.6, 0.7]}}
    )
    keys = {trial.fingerprints["heads"]: trial for trial in made.trials}
    first, second = keys
    assert phases._end_of_heads(made, keys, tuning.Ended(first, 25.0, 0.1)) == "stopped early"
    assert phases._end_of_heads(made, keys, tuning.Ended(second, 50.0, 0.3, "lost")) == "failed"
    for trial in made.trials:
        phases._take_heads(made, [trial])
    assert [trial.state for trial in made.trials] == ["stopped", "failed"]
    assert made.trials[0].stopped_at == 25.0 and made.trials[1].error == "lost"
    assert running.counts(made)["heads"] == {"total": 2, "there": 1}  # failed: tried again
