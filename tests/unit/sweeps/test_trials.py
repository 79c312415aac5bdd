"""Trials: which artifacts they share, and by which neighbors they are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from icce_ray.rundir.directory import RunDirectory
from icce_ray.stages import heads, search


def test_matrices_of_trials_and_of_the_run_stand_side_by_side(tmp_path: Path, make: Any) -> None:
    config = make.run(tmp_path)
    run = RunDirectory(config.run_dir)
    views = [RunDirectory(run.uri, {"heads": f"store/heads-{n}"}) for n in (1, 2)]
    for value, one in enumerate([run, *views]):
        make.heads(one, config, value)
    for _ in range(2):
        for value, one in enumerate([run, *views]):
            assert (one.matrix("heads", "assignments") == value).all()
    assert len(list((tmp_path / "run" / ".cache").glob("*assignments*.npy"))) == 3


def test_trials_take_from_the_run_what_fits_and_share_the_rest(tmp_path: Path, make: Any) -> None:
    config = make.run(tmp_path)
    grid = {"heads.beta": [0.6, 0.7], "consensus.method": ["voting", "mcla"]}
    made, _ = make.sweep(config, {"search": "grid", "space": grid})
    for trial in made.trials:
        assert {"index", "embeddings", "neighbors", "selection"}.isdisjoint(trial.view.places)
    places = [trial.view.places["heads"] for trial in made.trials]
    assert places[0] == places[1] != places[2] == places[3]
    assert len({trial.view.places["consensus"] for trial in made.trials}) == 4


def test_artifacts_of_other_settings_are_left_alone(tmp_path: Path, make: Any) -> None:
    config = make.run(tmp_path)
    changed = config.model_copy(update={"data": config.data.model_copy(update={"limit": 30})})
    made, _ = make.sweep(changed, {"space": {"consensus.method": ["voting", "mcla"]}})
    assert all("index" in trial.view.places for trial in made.trials)
    assert all("embeddings" in trial.view.places for trial in made.trials)


def test_all_trials_of_one_embedding_are_judged_by_the_search_of_the_first(
    tmp_path: Path, make: Any
) -> None:
    config = make.run(tmp_path)
    made, _ = make.sweep(config, {"search": "grid", "space": {"neighbors.pca": [4, None, 256]}})
    first = made.trials[0].view
    assert first.place("neighbors") == f"store/neighbors-{made.trials[0].fingerprints['search']}"
    assert {trial.view.place(heads.JUDGE) for trial in made.trials} == {first.place("neighbors")}
    own = made.trials[2]
    assert own.view.place("neighbors") == "neighbors", "the run's own search"
    for one in (own.view, first):
        ids = np.full((make.rows, 12), 7 if one is first else 8)
        table = search._table(np.arange(make.rows), ids, ids)
        one.write_table(table, "neighbors", "part-0.parquet")
    make.finish(first, "search", made.trials[0].config)
    assert (own.view.matrix(heads.JUDGE, "ids") == 7).all()
    assert (first.matrix("neighbors", "ids") == 7).all()
    copies = list((tmp_path / "run" / ".cache").glob("*ids*.npy"))
    assert len(copies) == 1, "the judge and the search of the first are one file"
