"""The plan of a sweep, and what it refuses before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from icce_ray import config as configs
from icce_ray.errors import ArtifactError
from icce_ray.sweeps import running


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
