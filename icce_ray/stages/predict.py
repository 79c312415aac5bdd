"""Classify new images with a finished run.

    predict("runs/quickstart", "new-images/", "predictions/")

Writes part-*.parquet (PREDICTIONS_SCHEMA) in the order of the addresses, and manifest.json last;
a killed call resumes from the shards it wrote. Nothing that is there already is ever deleted.
Shapes: N images, B batch, K clusters.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray import config as configs
from icce_ray.config.schema import LABEL_MODES, Config
from icce_ray.core.evaluation import truth as metrics
from icce_ray.data import labels, listing
from icce_ray.distributed.cluster import Cluster, NodeWatch
from icce_ray.distributed.inference import (
    CLASSIFIER,
    Inference,
    Opened,
    finished_classifier,
    open_classifier,
)
from icce_ray.distributed.shards import Shards
from icce_ray.distributed.stream import Columns, Job
from icce_ray.errors import ArtifactError, ConfigError, printable
from icce_ray.rundir import addresses, storage
from icce_ray.rundir.directory import MANIFEST, PARTIAL, Manifest, RunDirectory, fingerprint
from icce_ray.rundir.progress import Reporter, duration
from icce_ray.rundir.schemas import PREDICTIONS_SCHEMA

GROUPS = ("embed", "ray", "data")  # settings that a call may change
SOURCES = ("data.path", "data.embeddings", "data.dataset")  # ... but not which images it is for
SHOW = 3  # reasons of bad images that are shown


def predict(
    run_uri: str,
    images: str,
    out: str | None = None,
    *,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    cluster: Cluster | None = None,
) -> Manifest:
    """Give every image below `images` a cluster and a confidence.

    Args:
        run_uri: a run directory with a finished classifier.
        images: a folder, Parquet or WebDataset tars, as data.path.
        out: folder or URI for the result; default: `predictions` in the run directory.
        overrides: embed.*, ray.* and data.* settings for this call, as `key.sub=value`.

    Returns: the result's manifest. An image that cannot be decoded has cluster -1 and a reason.
    Where the new images have labels (class folders, a label column, data.labels), its results hold
    `labeled`, `acc`, `nmi` and `ari` of those that could be decoded, read once all are classified.

    Raises:
        ArtifactError: no finished classifier, or `out` holds something else.
        ConfigError, DataError: settings or images that cannot be used.
        StageError: workers failed; the same call again resumes.
    """
    run = RunDirectory(run_uri)
    folder, target = _target(out or run.address("predictions"))
    for uri in (run.uri, target.uri):
        storage.check(uri)
    trained = finished_classifier(run)
    if not images:
        raise ConfigError("images is empty: name a folder, Parquet files or tars")
    listing.check_exists("images", images)
    config = _config(run, images, overrides)
    classifier = open_classifier(run, config.embed.precision)
    reporter = Reporter(RunDirectory(target.address(folder)), quiet)
    say = partial(reporter.say, log=False)  # `out` may be another's
    found = listing.list_images(config.data, setting="images", say=say)
    table = found.table
    if config.data.labels not in LABEL_MODES:
        labels.labels_of(config.data.labels, table)  # a file that does not fit is refused now
    mark = _mark(images, table, trained, config)
    finished = _claim(target, folder, mark)
    if finished is not None:
        say(f"done already: {finished.rows:,} images are in {target.address(folder)}")
        return finished
    own = cluster or Cluster(config.ray)
    work = _Work(run, config, classifier, found, target, folder, own, reporter)
    try:
        return work.run(mark)
    finally:
        if cluster is None:
            own.stop()


# --- what to do ----------------------------------------------------------------------------------


def _config(run: RunDirectory, images: str, overrides: Sequence[str]) -> Config:
    """The run's settings, with these images in place of its own."""
    for override in overrides:
        if override.partition(".")[0] not in GROUPS:
            raise ConfigError(
                f"{override}: predict takes {', '.join(f'{g}.*' for g in GROUPS)} settings only; "
                "all else is as the run was made"
            )
        if override.partition("=")[0].strip() in SOURCES:
            raise ConfigError(f"{override}: predict takes its images as its second argument")
    tree = dict(run.read_settings())
    before = tree.get("data")
    before = before if isinstance(before, dict) else {}
    kept = {key: before[key] for key in ("image_column", "label_column") if key in before}
    tree["data"] = {**kept, "path": images}
    tree["evaluate"] = {}
    return configs.load(tree, list(overrides))


def _target(out: str) -> tuple[str, RunDirectory]:
    """The last folder of `out`, and what holds it."""
    try:
        uri, options = addresses.split_options(addresses.absolute(out))
    except ArtifactError as error:
        raise ConfigError(f"out={error}") from None
    parent, _, folder = uri.rstrip("/").rpartition("/")
    if not folder or not parent or parent.endswith(":/"):
        raise ConfigError(f"out={out} must name a folder below the bucket or the root")
    return folder, RunDirectory(parent + options)


def _mark(images: str, table: pa.Table, trained: Manifest, config: Config) -> dict[str, Any]:
    """What partial results must have been made for to be reused."""
    digest = hashlib.sha256()
    for batch in table.select(["uri"]).to_batches(max_chunksize=65_536):
        digest.update("\n".join(batch.column(0).to_pylist()).encode() + b"\n")
    settings = {
        "images": addresses.absolute(images),
        "count": table.num_rows,
        "sha256": digest.hexdigest(),
        "precision": config.embed.precision,
    }
    inputs = {CLASSIFIER: trained.id}
    key = fingerprint("predict", settings, inputs)
    return {"fingerprint": key, "settings": settings, "inputs": inputs}


def _claim(target: RunDirectory, folder: str, mark: Mapping[str, Any]) -> Manifest | None:
    """The manifest where all is done. Raises ArtifactError where `out` is something else."""
    where = target.address(folder)
    done = target.manifest(folder)
    if done is not None and done.fingerprint == mark["fingerprint"]:
        return done
    partial_ = target.partial(folder)
    if done is None and partial_ is not None and partial_ == mark:
        return None
    if done is not None or partial_ is not None:
        raise ArtifactError(
            f"{where} holds predictions of other images, or by another classifier. "
            "Choose another out=..., or remove it."
        )
    if target.list(folder):
        raise ArtifactError(
            f"{where} holds other files (no {MANIFEST}, no {PARTIAL}). Choose an empty out=..."
        )
    return None


# --- in the driver -------------------------------------------------------------------------------


@dataclass
class _Work:
    """One call."""

    source: RunDirectory
    config: Config
    classifier: Opened
    found: listing.Listing
    target: RunDirectory
    folder: str
    cluster: Cluster
    reporter: Reporter

    @property
    def table(self) -> pa.Table:
        """INDEX_SCHEMA, of the new images."""
        return self.found.table

    def run(self, mark: dict[str, Any]) -> Manifest:
        started = time.monotonic()
        resumed = self.target.begin(self.folder, mark)
        self.reporter.stage = "predict"
        if self.found.left:
            self.reporter.say(f"left out: {self.found.left}")
        self.shards = self._open(resumed)
        self.bad = 0
        with self.reporter.listening(), NodeWatch(self.reporter):
            rate = self._classify()
        return self._finish(mark, time.monotonic() - started, rate)

    def _open(self, resumed: bool) -> Shards:
        size, total = self.config.embed.shard_size, self.table.num_rows
        read = partial(_read_ids, self.target, self.folder)
        return Shards.open(self.target, self.folder, total, size, self._build, read, resumed)

    def _build(self, columns: Columns) -> pa.Table:
        ids = columns["image_id"]
        reasons = columns["reason"]
        bad = reasons.astype(bool)
        return pa.Table.from_arrays(
            [
                self.table["uri"].take(pa.array(ids)).combine_chunks(),
                pa.array(np.where(bad, -1, columns["cluster"]).astype(np.int32)),
                pa.array(np.where(bad, 0, columns["confidence"]).astype(np.float32)),
                pa.array([reason or None for reason in reasons], pa.string()),
            ],
            schema=PREDICTIONS_SCHEMA,
        )

    def _classify(self) -> float:
        """Returns images per second."""
        one = self.classifier
        inference = Inference(
            self.cluster, self.reporter, self.table, self.shards, self._accept, loaded=one.loaded
        )
        job = Job(one.model, one.preprocess, self.config.embed, one.levels)
        return inference.run(job, "classifying")

    def _accept(self, batch: Columns) -> tuple[Columns, np.ndarray]:
        """Every image gets a row; a bad one has a reason in it."""
        bad = batch["reason"].astype(bool)
        for row in np.flatnonzero(bad)[: max(0, SHOW - self.bad)]:
            uri = self.table["uri"][int(batch["image_id"][row])].as_py()
            self.reporter.say(f"! {printable(uri)}: {batch['reason'][row]}")
        self.bad += int(bad.sum())
        kept = ("image_id", "cluster", "confidence", "reason")
        return {name: batch[name] for name in kept}, np.ones(len(bad), bool)

    def _finish(self, mark: dict[str, Any], seconds: float, rate: float) -> Manifest:
        run, total = self.target, self.table.num_rows
        clusters = run.read_table(self.folder, columns=["cluster"])["cluster"].to_numpy()
        bad = int((clusters < 0).sum())
        scores = _scores(self.config, self.table, clusters)
        manifest = Manifest(
            stage="predict",
            fingerprint=mark["fingerprint"],
            settings=mark["settings"],
            inputs=mark["inputs"],
            rows=total,
            seconds=round(seconds, 3),
            results={
                "bad": bad,
                "left_out": self.found.left.results(),
                "images_per_second": round(rate, 1),
                "run": self.source.uri,
                **scores,
            },
            resources=self.cluster.used(),
        )
        text = f"classified {total - bad:,} images in {duration(seconds)}"
        text += f", {bad:,} could not be decoded" if bad else ""
        self.reporter.say(f"{text}: {run.address(self.folder)}")
        if scores:
            self.reporter.say(
                f"Accuracy {scores['acc']:.1%} (NMI {scores['nmi']:.3f}, ARI {scores['ari']:.3f}, "
                f"{scores['labeled']:,} labeled images)."
            )
        self.reporter.status("done")
        self.reporter.flush()
        run.finish(self.folder, manifest)
        return manifest


def _scores(config: Config, table: pa.Table, clusters: np.ndarray) -> dict[str, Any]:
    """How well the clusters, int [N], meet the images' labels; nothing where there are none."""
    known = labels.labels_of(config.data.labels, table)
    if known is None or not (both := (known >= 0) & (clusters >= 0)).any():
        return {}
    return {"labeled": int(both.sum()), **metrics.scores(known[both], clusters[both])}


def _read_ids(run: RunDirectory, folder: str, name: str, start: int, stop: int) -> Columns:
    """The ids of a file of predictions, which has a row for each."""
    if run.read_table(folder, name, columns=["cluster"]).num_rows != stop - start:
        raise ArtifactError(f"{name} is not complete")
    return {"image_id": np.arange(start, stop)}
