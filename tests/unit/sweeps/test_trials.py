"""Sweeps without Ray: spaces and draws, views on shared artifacts, plans, ranking."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray import config as configs
from icce_ray import pipeline
from icce_ray.core import neighbors as core
from icce_ray.core.evaluation.labelfree import SCORES
from icce_ray.core.heads.trainer import HeadTrainer
from icce_ray.distributed import tune as tuning
from icce_ray.distributed.cluster import Cluster
from icce_ray.errors import ArtifactError, ConfigError
from icce_ray.rundir import schemas
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.rundir.progress import Reporter
from icce_ray.stages import heads, search, select
from icce_ray.stages.base import Context
from icce_ray.stages.table import stage as stage_of
from icce_ray.sweeps import results as results_
from icce_ray.sweeps import running, space, store, trials

ROWS, FEATURES = 60, 8
FOLDERS = ["index", "embeddings", "neighbors", "selection", "heads"]
BASE = {"num_classes": 3, "data": {"embeddings": "e.npy"}, "neighbors": {"max_neighbors": 12}}
CHOICES = {"search": "grid", "space": {"consensus.method": ["voting", "mcla"]}}


def parse(**tree: Any) -> space.Space:
    return space.parse(tree, list(SCORES))


def draws(tree: dict[str, Any], base: dict[str, Any], seed: int = 0) -> space.Draws:
    return space.draw(parse(**tree), configs.load(base).model_dump(mode="json"), seed)


# --- spaces --------------------------------------------------------------------------------------


def test_all_problems_of_a_space_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(
            objectve=1,
            objective="neighbor_consistncy",
            trials=0,
            space={
                "heads.cuont": [1],
                "data.limit": [100],
                "heads.num_workers": [1, 2],
                "neighbors.rule": ["fixd"],
                "heads.beta": {"uniform": [0.5, 1.5]},
                "heads.lr": {"log": [0, 1]},
                "neighbors.k": {"int": [1.5, 2]},
                "heads.count": {"int": [9, 9]},
                "heads.pca": [],
                "consensus.method": {"any": [1]},
                "evaluate.kmeans": [True],
            },
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "14 problems in the space:"
    for start, text in (
        ("objectve:", "Did you mean objective?"),
        ("objective:", "Did you mean neighbor_consistency?"),
        ("trials:", "greater than or equal to 1"),
        ("heads.cuont:", "Did you mean heads.count?"),
        ("data.limit:", "same data"),
        ("heads.num_workers:", "not what comes out"),
        ("neighbors.rule:", "'fixd'"),
        ("heads.beta:", "got 1.5"),
        ("heads.lr:", "above 0"),
        ("neighbors.k:", "integer"),
        ("heads.count:", "empty"),
        ("heads.pca:", "empty"),
        ("consensus.method:", "{uniform: [low, high]}"),
        ("evaluate.kmeans:", "ground truth"),
    ):
        assert any(line.strip().startswith(start) and text in line for line in lines), start


def test_choices_are_what_the_setting_takes() -> None:
    """YAML reads 1e-3 and 1.0e30 as text."""
    found = parse(
        space={"heads.lr": ["1e-3", 1], "heads.pca": [None, 8], "heads.hidden": [[], [4]]}
    )
    assert found.space == {
        "heads.lr": [0.001, 1.0],
        "heads.pca": [None, 8],
        "heads.hidden": [[], [4]],
    }


def test_a_grid_takes_no_ranges() -> None:
    with pytest.raises(ConfigError, match=r"heads\.beta: needs a list"):
        parse(search="grid", space={"heads.beta": {"uniform": [0.5, 0.9]}})


@pytest.mark.parametrize("name", ["ensemble", "neighbors", "heads", "full"])
@pytest.mark.parametrize("config", ["quickstart", "imagenet"])
def test_golden_spaces_fit_golden_configs(name: str, config: str) -> None:
    found, known = space.load(name, list(SCORES))
    drawn = space.draw(found, configs.load(config).model_dump(mode="json"), 0)
    assert known == name and len(drawn.configs) == len(drawn.settings) > 1
    if found.search == "random":
        assert len(drawn.settings) == found.trials
    assert space.golden_spaces()[name].read_text().startswith("# ")


def test_an_unknown_space_is_named_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'ensemble'"):
        space.load("ensembel", list(SCORES))


# --- draws ---------------------------------------------------------------------------------------

RANDOM = {
    "neighbors.max_neighbors": {"int": [20, 25]},
    "heads.beta": {"uniform": [0.5, 0.9]},
    "heads.lr": {"log": [1e-4, 1e-1]},
    "consensus.method": ["voting", "mcla"],
}


def test_more_trials_extend_fewer_and_draws_depend_on_the_seed_alone() -> None:
    few = draws({"trials": 5, "space": RANDOM}, BASE).settings
    many = draws({"trials": 200, "space": RANDOM}, BASE).settings
    assert many[:5] == few
    assert draws({"trials": 5, "space": RANDOM}, BASE, seed=1).settings != few
    widths = {one["neighbors.max_neighbors"] for one in many}
    assert widths == set(range(20, 26))
    rates = np.log10([one["heads.lr"] for one in many])
    assert rates.min() >= -4 and rates.max() <= -1 and -2.8 < np.median(rates) < -2.2


def test_draws_are_distinct_and_reach_the_config() -> None:
    found = draws(
        {"trials": 50, "space": {"heads.count": [3, 4], "backbone.pooling": ["cls"]}}, BASE
    )
    assert [one["heads.count"] for one in found.settings] in ([3, 4], [4, 3])
    assert [one.heads.count for one in found.configs] == [
        one["heads.count"] for one in found.settings
    ]
    assert all(one.backbone[0].pooling == "cls" for one in found.configs)


def test_combinations_that_contradict_themselves_are_left_out_and_counted() -> None:
    rule = {"neighbors.rule": ["auto", "threshold"], "neighbors.threshold": [None, 0.5]}
    found = draws({"search": "grid", "space": rule}, BASE)
    assert found.settings == (
        {"neighbors.rule": "auto", "neighbors.threshold": None},
        {"neighbors.rule": "threshold", "neighbors.threshold": 0.5},
    )
    assert found.dropped == 2 and "threshold goes with rule=threshold" in found.why
    with pytest.raises(ConfigError, match=r"neighbors.rule=threshold: .*threshold goes with"):
        draws({"search": "grid", "space": {"neighbors.rule": ["threshold"]}}, BASE)


def test_each_choice_alone_beside_the_config_as_it_is_and_all_again_for_each_seed() -> None:
    choices = {
        "seed": [0, 3],
        "heads.beta": [0.6, 0.8],  # 0.6 is the config's own
        "backbone.pooling": ["cls"],
        "consensus.method": ["voting", "mcla"],
    }
    found = draws({"search": "each", "space": choices}, BASE)
    own = {"heads.beta": 0.6, "backbone.pooling": "auto", "consensus.method": "dawid-skene"}
    changes = [{}, {"heads.beta": 0.8}, {"backbone.pooling": "cls"}]
    changes += [{"consensus.method": "voting"}, {"consensus.method": "mcla"}]
    expected = [{"seed": seed} | own | change for seed in (0, 3) for change in changes]
    assert list(found.settings) == [{key: one[key] for key in choices} for one in expected]
    assert [one.seed for one in found.configs] == [0] * 5 + [3] * 5
    assert found.configs[2].backbone[0].pooling == "cls"


# --- views ---------------------------------------------------------------------------------------


def matrix() -> np.ndarray:
    generator = np.random.default_rng(0)
    x = np.repeat(np.eye(3, FEATURES), ROWS // 3, 0) + 0.2 * generator.normal(size=(ROWS, FEATURES))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def finish(run: RunDirectory, stage: str, config: configs.Config, **results: Any) -> None:
    """A manifest as the pipeline would write it."""
    steps = {step.stage.name: step for step in pipeline.make_steps(config, run)}
    step = steps[stage]
    done = {need: run.manifest(stage_of(need).folder) for need in step.stage.needs}
    inputs = {need: one.id if one else "" for need, one in done.items()}
    settings = step.stage.settings(config)
    manifest = Manifest(stage, step.fingerprint, settings, inputs, ROWS, 1.0, results)
    run.finish(step.stage.folder, manifest)


def make_run(folder: Path, labels: Sequence[int] | None = None) -> configs.Config:
    """A run with an index, embeddings and neighbors of its own."""
    config = configs.load(BASE | {"run_dir": str(folder / "run")})
    run = RunDirectory(config.run_dir)
    names = [str(v) for v in labels] if labels is not None else [None] * ROWS
    index = {"image_id": range(ROWS), "uri": ["x"] * ROWS, "label": names}
    table = pa.table({**index, "offset": [None] * ROWS, "size": [None] * ROWS})
    run.write_table(table.cast(schemas.INDEX_SCHEMA), "index", "part-00000.parquet")
    finish(run, "index", config)
    schema = schemas.embeddings_schema(FEATURES)
    tensor = schemas.tensor_column(matrix(), schema.field("embedding").type)
    run.write_table(pa.table([range(ROWS), tensor], schema=schema), "embeddings", "part-0.parquet")
    finish(run, "embed", config)
    ids, similarity = core.search(matrix(), 0, ROWS, 12)
    run.write_table(search._table(np.arange(ROWS), ids, similarity), "neighbors", "part-0.parquet")
    finish(run, "search", config, search="exact")
    chosen = core.select(ids, similarity.astype(np.float16), rule="auto", k=5, threshold=None,
                         min_neighbors=5, mutual=False)  # fmt: skip
    select._write(run, chosen.counts)
    finish(run, "select", config)
    return config


def write_heads(run: RunDirectory, config: configs.Config, value: int) -> None:
    assignments = np.full((ROWS, 2), value, np.int16)
    kind = pa.fixed_shape_tensor(pa.int16(), [2])
    table = pa.table({"assignments": schemas.tensor_column(assignments, kind)})
    run.write_table(table, "heads", "part-00000.parquet")
    finish(run, "heads", config)


def make_sweep(config: configs.Config, tree: dict[str, Any]) -> tuple[trials.Sweep, space.Draws]:
    chosen = parse(**tree)
    drawn = space.draw(chosen, config.model_dump(mode="json"), 0)
    run = RunDirectory(config.run_dir)
    context = Context(config, run, Reporter(run, quiet=True), Cluster())
    made = trials.make_trials(config, drawn, run)
    return trials.Sweep("test", chosen, config, run, made, context), drawn


def test_a_view_maps_folders_and_travels(tmp_path: Path) -> None:
    places = {"heads": "store/heads-1", "neighbors": "n"}
    view = pickle.loads(pickle.dumps(RunDirectory(str(tmp_path), places)))
    assert view.places == places and view.is_local
    assert view.path("heads", "a.json") == f"{tmp_path}/store/heads-1/a.json"
    assert view.path("heads/train", "a") == f"{tmp_path}/store/heads-1/train/a"
    assert view.address("neighbors") == f"{tmp_path}/n" and view.path() == str(tmp_path)
    assert view.path("neighborsandmore", "a") == f"{tmp_path}/neighborsandmore/a"
    assert view.path("index", "a") == f"{tmp_path}/index/a"


def test_matrices_of_trials_and_of_the_run_stand_side_by_side(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    run = RunDirectory(config.run_dir)
    views = [RunDirectory(run.uri, {"heads": f"store/heads-{n}"}) for n in (1, 2)]
    for value, one in enumerate([run, *views]):
        write_heads(one, config, value)
    for _ in range(2):
        for value, one in enumerate([run, *views]):
            assert (one.matrix("heads", "assignments") == value).all()
    assert len(list((tmp_path / "run" / ".cache").glob("*assignments*.npy"))) == 3


def test_trials_take_from_the_run_what_fits_and_share_the_rest(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    grid = {"heads.beta": [0.6, 0.7], "consensus.method": ["voting", "mcla"]}
    made, _ = make_sweep(config, {"search": "grid", "space": grid})
    for trial in made.trials:
        assert {"index", "embeddings", "neighbors", "selection"}.isdisjoint(trial.view.places)
    places = [trial.view.places["heads"] for trial in made.trials]
    assert places[0] == places[1] != places[2] == places[3]
    assert len({trial.view.places["consensus"] for trial in made.trials}) == 4


def test_artifacts_of_other_settings_are_left_alone(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    changed = config.model_copy(update={"data": config.data.model_copy(update={"limit": 30})})
    made, _ = make_sweep(changed, CHOICES)
    assert all("index" in trial.view.places for trial in made.trials)
    assert all("embeddings" in trial.view.places for trial in made.trials)


def test_a_sweep_over_selections_takes_the_searches_of_the_run(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    grid = {"neighbors.rule": ["auto", "fixed"], "neighbors.k": [4, 5], "num_classes": [2, 3]}
    made, _ = make_sweep(config, {"search": "grid", "space": grid})
    assert running.counts(made)["search"] == {"total": 1, "there": 1}
    assert running.counts(made)["select"]["total"] == 8
    running.prepare(made)  # a search would start Ray
    fixed = next(t for t in made.trials if t.config.neighbors.rule == "fixed")
    assert (fixed.view.matrix("selection", "count") == fixed.config.neighbors.k).all()
    assert not [name for name in made.run.folders("store") if name.startswith("neighbors")]


def test_all_trials_of_one_embedding_are_judged_by_the_search_of_the_first(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    made, _ = make_sweep(config, {"search": "grid", "space": {"neighbors.pca": [4, None, 256]}})
    first = made.trials[0].view
    assert first.place("neighbors") == f"store/neighbors-{made.trials[0].fingerprints['search']}"
    assert {trial.view.place(heads.JUDGE) for trial in made.trials} == {first.place("neighbors")}
    own = made.trials[2]
    assert own.view.place("neighbors") == "neighbors", "the run's own search"
    for one in (own.view, first):
        ids = np.full((ROWS, 12), 7 if one is first else 8)
        one.write_table(search._table(np.arange(ROWS), ids, ids), "neighbors", "part-0.parquet")
    finish(first, "search", made.trials[0].config)
    np.testing.assert_array_equal(own.view.matrix(heads.JUDGE, "ids"), np.full((ROWS, 12), 7))
    assert len(list((tmp_path / "run" / ".cache").glob("*ids*.npy"))) == 1, "no copy for each trial"


def test_scores_by_other_neighbors_are_not_taken(tmp_path: Path) -> None:
    made = finished_sweep(tmp_path, [0] * ROWS)
    trial = made.trials[1]
    record = {"state": "done", "scores": trial.scores, "reused": [], "seconds": 1.0}
    for judge, taken in ((trial.judge, True), ("another", False)):
        of = {**trial.scores_of, "judge": judge}
        made.run.write_json({**record, "scores_of": of}, made.folder, "trials", f"{trial.id}.json")
        assert running._load(made, trial) is taken


def test_copies_are_a_run_that_goes_on_after_the_sweep(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    made, _ = make_sweep(config, {"search": "grid", "space": {"heads.beta": [0.7]}})
    (trial,) = made.trials
    write_heads(trial.view, trial.config, 1)
    target = RunDirectory(str(tmp_path / "best"))
    store.place_copies(trial.view, FOLDERS, target)
    steps = pipeline.make_steps(trial.config, target)
    assert [step.state for step in steps[:6]] == ["done"] * 5 + ["run"]
    other, _ = make_sweep(config, {"search": "grid", "space": {"heads.beta": [0.8]}})
    (later,) = other.trials
    write_heads(later.view, later.config, 1)
    kept = target.manifest("embeddings")
    store.place_copies(later.view, FOLDERS, target)
    steps = pipeline.make_steps(later.config, target)
    assert [step.state for step in steps[:6]] == ["done"] * 5 + ["run"]
    assert target.manifest("embeddings") == kept, "what is the same stays"


# --- the plan and early stopping -----------------------------------------------------------------


def test_the_plan_counts_what_is_needed_and_what_is_there(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    grid = {"heads.beta": [0.6, 0.7], "consensus.method": ["voting", "mcla", "hbgf"]}
    made, drawn = make_sweep(config, {"search": "grid", "space": grid})
    write_heads(made.trials[0].view, made.trials[0].config, 1)
    first, second, *_ = running.plan_lines(made, drawn)
    assert first == (
        "sweep test: 6 trials: 1 embedding, 1 neighbor search, 1 selection, 2 head trainings, "
        "6 ensembles"
    )
    assert second == (
        "already there: 1 of 1 embedding, 1 of 1 neighbor search, 1 of 1 selection, "
        "1 of 2 head trainings"
    )


def test_a_plan_warns_of_scores_that_do_not_compare(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    made, drawn = make_sweep(config, {"search": "grid", "space": {"num_classes": [3, 4]}})
    assert any("favors fewer classes" in line for line in running.plan_lines(made, drawn))


def test_how_heads_ended_is_remembered(tmp_path: Path) -> None:
    made, _ = make_sweep(
        make_run(tmp_path), {"search": "grid", "space": {"heads.beta": [0.6, 0.7]}}
    )
    prints = {trial.fingerprints["heads"]: trial for trial in made.trials}
    first, second = prints
    assert running._end_of_heads(made, prints, tuning.Ended(first, 25.0, 0.1)) == "stopped early"
    assert running._end_of_heads(made, prints, tuning.Ended(second, 50.0, 0.3, "lost")) == "failed"
    for trial in made.trials:
        running._take_heads(made, [trial])
    assert [trial.state for trial in made.trials] == ["stopped", "failed"]
    assert made.trials[0].stopped_at == 25.0 and made.trials[1].error == "lost"
    assert running.counts(made)["heads"] == {
        "total": 2,
        "there": 1,
    }  # failed: tried again


class _Assigned:
    """A trainer whose heads have assigned every row already."""

    def __init__(self, *columns: Sequence[int]) -> None:
        self.columns = np.array(columns).T

    def assign(self, rows: np.ndarray) -> np.ndarray:
        return self.columns[rows]


def test_an_unfinished_training_is_scored_above_chance() -> None:
    ids = np.array([[1], [0], [3], [2]])
    score = HeadTrainer.consistency
    rows = np.arange(4)
    assert score(_Assigned([0, 0, 1, 1]), rows, ids) == pytest.approx(1)  # type: ignore[arg-type]
    assert score(_Assigned([0, 0, 0, 0]), rows, ids) == 0  # type: ignore[arg-type]
    assert score(_Assigned([0, 1, 0, 1]), rows, ids) == pytest.approx(-1)  # type: ignore[arg-type]
    both = _Assigned([0, 0, 1, 1], [0, 0, 0, 0])
    assert score(both, rows[2:], ids[2:]) == pytest.approx(0)  # type: ignore[arg-type]


# --- ranking -------------------------------------------------------------------------------------


def finished_sweep(folder: Path, labels: Sequence[int]) -> trials.Sweep:
    """Two trials done, of which the second scores higher and the first is right; one stopped."""
    config = make_run(folder, labels)
    grid = {"consensus.method": ["voting", "mcla", "hbgf"]}
    made, _ = make_sweep(config, {"search": "grid", "space": grid})
    clusters = [np.arange(ROWS) // (ROWS // 3), np.arange(ROWS) % 3]
    for trial, found, value in zip(made.trials, clusters, (0.5, 0.7), strict=False):
        write_heads(trial.view, trial.config, 0)
        table = pa.table([range(ROWS), found, np.ones(ROWS)], schema=schemas.CONSENSUS_SCHEMA)
        trial.view.write_table(table, "consensus", "part-00000.parquet")
        finish(trial.view, "consensus", trial.config)
        trial.state, trial.scores = "done", dict.fromkeys(SCORES, value)
    made.trials[2].state = "stopped"
    return made


def test_labels_do_not_change_the_ranking(tmp_path: Path) -> None:
    right = np.arange(ROWS) // (ROWS // 3)
    orders, accuracies = [], []
    for name, labels in (("right", right), ("other", np.random.default_rng(0).permutation(right))):
        made = finished_sweep(tmp_path / name, labels.tolist())
        ranked = results_.rank(made)
        results_.add_accuracy(made)
        assert results_.rank(made) == ranked
        results = results_._results(made, ranked, {}, 1.0)
        orders.append([trial["id"] for trial in results["trials"]])
        accuracies.append([trial["accuracy"] for trial in results["trials"]])
        assert results["best"] == orders[-1][0] == made.trials[1].id
    assert orders[0] == orders[1]
    assert accuracies[0][1]["acc"] == 1.0 > accuracies[1][1]["acc"]
    assert accuracies[0][2] is None


def test_scores_that_are_no_numbers_do_not_rank(tmp_path: Path) -> None:
    made = finished_sweep(tmp_path, [0] * ROWS)
    made.trials[1].scores["neighbor_information"] = float("nan")
    assert results_.rank(made) == [made.trials[0]]


def test_best_yaml_is_the_best_trials_config(tmp_path: Path) -> None:
    made = finished_sweep(tmp_path, [0] * ROWS)
    path = results_._write_best(made, made.trials[1])
    loaded = configs.load(path)
    assert loaded.consensus.method == "mcla"
    states = [step.state for step in pipeline.make_steps(loaded, RunDirectory(loaded.run_dir))]
    assert states[:6] == ["done"] * 6 and states[6] == "run"
    assert "neighbor_information 0.7000" in Path(path).read_text().splitlines()[0]


def test_a_sweep_of_other_settings_is_not_mixed_in(tmp_path: Path) -> None:
    made = finished_sweep(tmp_path, [0] * ROWS)
    old = configs.settings(made.config)
    made.run.write_json({"config": {**old, "seed": 7}}, made.folder, "sweep.json")
    with pytest.raises(ArtifactError, match=r"seed: 7 -> 0\n.*--overwrite"):
        running._check_same(made)
