"""Make the clusters that a person wants of a finished run, with a classifier for them.

    curate("runs/mine", "edits.yaml")
    undo("runs/mine")

Edits are about the run's own clusters, so a file that has grown is simply given again. What is made
lies in RUN/curated (see rundir/curated.py). Of the run itself, only labels.parquet and labels.csv
change. No head is trained: the stages after the consensus run again, on the new clusters.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray import config as configs
from icce_ray import pipeline
from icce_ray.config.schema import Config
from icce_ray.core.classifier.probe import probe_settings
from icce_ray.core.regroup import Plan, Regrouped, regroup
from icce_ray.distributed.cluster import Cluster, Request
from icce_ray.distributed.tasks import run_task
from icce_ray.errors import ArtifactError
from icce_ray.pipeline import edits as edits_
from icce_ray.rundir import curated, storage
from icce_ray.rundir.directory import Manifest, RunDirectory, fingerprint
from icce_ray.rundir.lock import exclusive
from icce_ray.rundir.progress import Reporter, duration
from icce_ray.rundir.schemas import CONSENSUS_SCHEMA
from icce_ray.stages import answer
from icce_ray.stages.base import Context
from icce_ray.stages.table import stage

CHAIN = ("classify", "evaluate", "answer", "report")  # the labels change once all else is there
NEEDED = ("embeddings", "neighbors", "consensus", "answer", "classifier", "evaluation")
ADVICE = "Start a node with a CPU core"


def curate(
    run_uri: str, source: str | Path, *, quiet: bool = False, cluster: Cluster | None = None
) -> Manifest:
    """Make new clusters, labels, a classifier and a report by a file of edits.

    Args:
        run_uri: a finished run. What was curated before is replaced.
        source: a YAML file, see pipeline/edits.py.

    Returns: a manifest whose results are `clusters`: number, name, images, and what it was made of.

    Raises:
        ConfigError: the edits cannot be carried out; each problem with its key.
        ArtifactError: the run is not finished, or another process works in it.
        DataError: a cluster cannot be split so far.
        StageError: a stage failed.
    """
    storage.check(run_uri)
    run = RunDirectory(run_uri)
    config = configs.validate(dict(run.read_settings()))
    given, text = edits_.read(source)
    _check_finished(run)
    plan = edits_.plan(given, run, str(source))
    reporter = Reporter(RunDirectory(run.address(curated.FOLDER)), quiet)
    own = cluster or Cluster(config.ray)
    context = Context(config, run, reporter, own)
    started = time.monotonic()
    with pipeline.running(run, reporter, own):
        _restore(run)
        run.write_bytes(text, curated.FOLDER, curated.EDITS)
        made = _new_consensus(context, plan)
        _run_stages(context, made)
        manifest = _manifest(run, made, text, time.monotonic() - started)
        run.finish(curated.FOLDER, manifest)
        kept = sum(one["cluster"] is not None for one in manifest.results["clusters"])
        reporter.say(f"{kept} clusters in {duration(manifest.seconds)}")
    return manifest


def undo(run_uri: str) -> bool:
    """Make the run's own clusters count again. False where nothing was curated.

    Raises ArtifactError: no run, or another process works in it.
    """
    storage.check(run_uri)
    run = RunDirectory(run_uri)
    run.read_settings()  # refuses what is no run
    if not run.exists(curated.FOLDER):
        return False
    with exclusive(run):
        _restore(run)
    return True


def _check_finished(run: RunDirectory) -> None:
    for folder in NEEDED:
        if run.manifest(folder) is None:
            raise ArtifactError(f"{run.uri} has no finished {folder}/; finish it by icce-ray run")


def _restore(run: RunDirectory) -> None:
    """Labels of the run's own clusters, and nothing curated."""
    if run.exists(curated.FOLDER, "answer"):  # only then have the labels been touched
        answer.write_labels(run, run.read_table("answer"))
    run.delete(curated.FOLDER)


def _new_consensus(context: Context, plan: Plan) -> Regrouped:
    """Write the new clusters. Their manifest also holds what the old one says of heads."""
    run, seed = context.run, context.config.seed
    task = context.config.method.model_dump(mode="json")
    request = Request(context.cluster.cpus_each(1, 0), 0)
    made: Regrouped = run_task(
        context, _regroup, *(run, plan, task), request=request, advice=ADVICE
    )
    image_ids = pa.array(np.asarray(run.matrix("embeddings", "image_id")))
    table = pa.table([image_ids, made.clusters, made.confidence], CONSENSUS_SCHEMA.names)
    view, of = curated.view(run), run.manifest("consensus")
    assert of is not None  # checked before
    view.write_table(table.cast(CONSENSUS_SCHEMA), "consensus", "part-00000.parquet")
    names = {"names": made.names, "dropped": made.dropped}
    results = {**of.results, **names, "pieces": made.pieces}
    key = fingerprint("curate", {"pieces": made.pieces, "seed": seed}, {"consensus": of.id})
    inputs = {**of.inputs, "consensus": of.id}
    view.finish(
        "consensus", Manifest("curate", key, {}, inputs, len(image_ids), of.seconds, results)
    )
    return made


def _regroup(run: RunDirectory, plan: Plan, method: dict[str, Any]) -> Regrouped:
    """Runs in the task."""
    from icce_ray.config.schema import MethodConfig

    clusters, confidence = (
        np.asarray(run.matrix("consensus", name)) for name in ("cluster", "confidence")
    )
    features, ids = run.matrix("embeddings", "embedding"), run.matrix("neighbors", "ids")
    settings = MethodConfig.model_validate(method)
    return regroup(clusters, confidence, features, ids, plan, settings)


def _run_stages(context: Context, made: Regrouped) -> None:
    """The stages after the consensus, on the new clusters and in their folders."""
    view = curated.view(context.run)
    config = _settings(curated.config_of(context.config, view))
    with_view = replace(context, config=config, run=view)
    for name in CHAIN:
        one = stage(name)
        known = {need: view.manifest(stage(need).folder) for need in one.needs}
        inputs = {need: done.id for need, done in known.items() if done}
        key = fingerprint(name, {"pieces": made.pieces}, inputs)
        pipeline.run_stage(with_view, pipeline.Step(one, "run", key, inputs))


def _settings(config: Config) -> Config:
    """A probe in place of fine-tuning, which takes hours, and no k-means to compare with."""
    chosen = probe_settings(config.classifier)
    evaluate = config.evaluate.model_copy(update={"kmeans": False})
    return config.model_copy(update={"classifier": chosen, "evaluate": evaluate})


def _manifest(run: RunDirectory, made: Regrouped, text: bytes, seconds: float) -> Manifest:
    """Of the whole folder, with the new clusters in words."""
    of = run.manifest("consensus")
    assert of is not None
    sizes = np.bincount(made.clusters, minlength=len(made.pieces)).tolist()
    rows = zip(made.names, sizes, made.pieces, strict=True)
    clusters = [
        {
            "cluster": None if number == made.dropped else number,
            "name": name,
            "images": size,
            "made_of": pieces,
        }
        for number, (name, size, pieces) in enumerate(rows)
    ]
    inputs = {"consensus": of.id}
    settings = {"edits": text.decode()}
    key = fingerprint("curate", settings, inputs)
    results = {"clusters": clusters}
    return Manifest("curate", key, settings, inputs, len(made.clusters), round(seconds, 3), results)
