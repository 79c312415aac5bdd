"""A run and sweeps of it whose artifacts are pretended: nothing is trained, no Ray is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray import config as configs
from icce_ray import pipeline
from icce_ray.core import neighbors as core
from icce_ray.core.evaluation.labelfree import SCORES
from icce_ray.distributed.cluster import Cluster
from icce_ray.rundir import schemas
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.rundir.progress import Reporter
from icce_ray.stages import search, select
from icce_ray.stages.base import Context
from icce_ray.sweeps import space, trials

ROWS, FEATURES = 60, 8
BASE = {"num_classes": 3, "data": {"embeddings": "e.npy"}, "neighbors": {"max_neighbors": 12}}


def matrix() -> np.ndarray:
    generator = np.random.default_rng(0)
    x = np.repeat(np.eye(3, FEATURES), ROWS // 3, 0) + 0.2 * generator.normal(size=(ROWS, FEATURES))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def finish(run: RunDirectory, stage: str, config: configs.Config, **results: Any) -> None:
    """A manifest as the pipeline would write it."""
    steps = {step.stage.name: step for step in pipeline.make_steps(config, run)}
    step = steps[stage]
    done = {need: run.manifest(trials.STAGES[need].folder) for need in step.stage.needs}
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
                         min_neighbors=5)  # fmt: skip
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
    chosen = space.parse(tree)
    drawn = space.draw(chosen, config.model_dump(mode="json"), 0)
    run = RunDirectory(config.run_dir)
    context = Context(config, run, Reporter(run, quiet=True), Cluster())
    made = trials.make_trials(config, drawn, run)
    return trials.Sweep("test", chosen, config, run, made, context), drawn


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


@pytest.fixture
def make() -> SimpleNamespace:
    """What the tests of this folder make runs and sweeps with."""
    return SimpleNamespace(
        rows=ROWS,
        matrix=matrix,
        run=make_run,
        finish=finish,
        heads=write_heads,
        sweep=make_sweep,
        finished=finished_sweep,
    )
