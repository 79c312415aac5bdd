"""The ranking, which never sees labels, and what is written of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from icce_ray import config as configs
from icce_ray import pipeline
from icce_ray.rundir.directory import RunDirectory
from icce_ray.sweeps import results as results_


def test_labels_do_not_change_the_ranking(tmp_path: Path, make: Any) -> None:
    right = np.arange(make.rows) // (make.rows // 3)
    orders, accuracies = [], []
    for name, labels in (("right", right), ("other", np.random.default_rng(0).permutation(right))):
        made = make.finished(tmp_path / name, labels.tolist())
        ranked = results_.rank(made)
        results_.add_accuracy(made)
        assert results_.rank(made) == ranked
        results = results_.collect(made, ranked, {}, 1.0)
        orders.append([trial["id"] for trial in results["trials"]])
        accuracies.append([trial["accuracy"] for trial in results["trials"]])
        assert results["best"] == orders[-1][0] == made.trials[1].id
    assert orders[0] == orders[1]
    assert accuracies[0][1]["acc"] == 1.0 > accuracies[1][1]["acc"]
    assert accuracies[0][2] is None


def test_scores_that_are_no_numbers_do_not_rank(tmp_path: Path, make: Any) -> None:
    made = make.finished(tmp_path, [0] * make.rows)
    made.trials[1].scores["neighbor_information"] = float("nan")
    assert results_.rank(made) == [made.trials[0]]


def test_best_yaml_is_the_best_trials_config(tmp_path: Path, make: Any) -> None:
    made = make.finished(tmp_path, [0] * make.rows)
    path = results_.write_best(made, made.trials[1])
    loaded = configs.load(path)
    assert loaded.consensus.method == "mcla"
    states = [step.state for step in pipeline.make_steps(loaded, RunDirectory(loaded.run_dir))]
    assert states[:6] == ["done"] * 6 and states[6] == "run"
    assert "neighbor_information 0.7000" in Path(path).read_text().splitlines()[0]
