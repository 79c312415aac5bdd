"""Classify new images with a finished run.

    predict("runs/quickstart", "new-images/", "predictions/")

Writes part-*.parquet (PREDICTIONS_SCHEMA) in the order of the addresses, and manifest.json last;
a killed call resumes from the shards it wrote. Nothing that is there already is ever deleted.
Shapes: N images, B batch, K clusters.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from icce_ray import config as configs
from icce_ray.config.schema import LABEL_MODES, Config
from icce_ray.core.evaluation import truth as metrics
from icce_ray.data import labels, listing
from icce_ray.data.formats import IMAGES, suffix_of
from icce_ray.distributed.cluster import Cluster, NodeWatch
from icce_ray.distributed.inference import (
    CLASSIFIER,
    Inference,
    Opened,
    finished_classifier,
    open_classifier,
)
from icce_ray.distributed.shards import Arrays, Shards
from icce_ray.distributed.stream import Columns, Job
from icce_ray.errors import ArtifactError, ConfigError, DataError, printable
from icce_ray.rundir import addresses, curated, storage
from icce_ray.rundir.directory import MANIFEST, PARTIAL, Manifest, RunDirectory, fingerprint
from icce_ray.rundir.progress import Reporter, duration
from icce_ray.rundir.schemas import PREDICTIONS_SCHEMA

GROUPS = ("embed", "ray", "data")  # settings that a call may change
SOURCES = ("data.path", "data.embeddings", "data.dataset")  # ... but not which images it is for
SAID = ("image_id", "cluster", "confidence", "novelty", "reason")  # of each image
SHOW = 3  # reasons of bad images that are shown


def predict(
    run_uri: str,
    images: str,
    out: str | None = None,
    *,
    overrides: Sequence[str] = (),
    min_confidence: float = 0.0,
    quiet: bool = False,
    cluster: Cluster | None = None,
) -> Manifest:
    """Give every image below `images` a cluster and a confidence.

    Args:
        run_uri: a run directory with a finished classifier.
        images: a folder, Parquet or WebDataset tars, as data.path.
        out: folder or URI for the result; default: `predictions` in the run directory.
        overrides: embed.*, ray.* and data.* settings for this call, as `key.sub=value`.
        min_confidence: images that are less sure get cluster -1.

    Returns: the result's manifest. An image that cannot be decoded has cluster -1 and a reason.
    Where the new images have labels (class folders, a label column, data.labels), its results hold
    `labeled`, `acc`, `nmi` and `ari` of those that could be decoded, read once all are classified.

    Raises:
        ArtifactError: no finished classifier, or `out` holds something else.
        ConfigError, DataError: settings or images that cannot be used.
        StageError: workers failed; the same call again resumes.
    """
    run = curated.current(RunDirectory(run_uri))
    folder, target = _target(out or run.address("predictions"))
    storage.check(target.uri)
    task = _task(run, images, overrides, min_confidence)
    config = task.config
    reporter = Reporter(RunDirectory(target.address(folder)), quiet)
    say = partial(reporter.say, log=False)  # `out` may be another's
    found = listing.list_images(config.data, setting="images", say=say)
    table = found.table
    if config.data.labels not in LABEL_MODES:
        labels.labels_of(config.data.labels, table)  # a file that does not fit is refused now
    mark = _mark(images, table, task)
    finished = _claim(target, folder, mark)
    if finished is not None:
        say(f"done already: {finished.rows:,} images are in {target.address(folder)}")
        return finished
    own = cluster or Cluster(config.ray)
    work = _Work(task, found, target, folder, own, reporter)
    try:
        return work.run(mark)
    finally:
        if cluster is None:
            own.stop()


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one image."""

    cluster: int  # the most probable one; -1 where the image is like those that were dropped
    name: str | None  # of the cluster
    is_sure: bool  # whether its confidence is at least min_confidence
    confidence: float  # its probability
    novelty: float  # share of the run's images that lie nearer to the others; NaN if fine-tuned


def predict_one(
    run_uri: str, image: str, overrides: Sequence[str] = (), min_confidence: float = 0.0
) -> Prediction:
    """Classify one image file in this process, without Ray. Nothing is written.

    Arguments and errors as of `predict`. Raises DataError also where the image cannot be decoded.
    """
    with _uncollected():
        task = _task(curated.current(RunDirectory(run_uri)), image, overrides, min_confidence)
        found = _here(task, listing.list_images(task.config.data, setting="images").table)
    if reason := found["reason"][0]:
        raise DataError(f"{printable(image)} cannot be classified: {reason}")
    sure = bool(found["confidence"][0] >= min_confidence)
    confidence, novelty = float(found["confidence"][0]), float(found["novelty"][0])
    number = int(found["cluster"][0])
    return Prediction(number, task.classifier.naming.of(number), sure, confidence, novelty)


class Here:
    """A run's classifier in this process, without Ray: loaded once, until the run has another."""

    def __init__(self, run_uri: str) -> None:
        self.run_uri = run_uri
        self._kept: tuple[str, Opened] | None = None  # with the id of the classifier

    def predict(self, images: Sequence[str]) -> pa.Table:
        """Classify images. Nothing is written.

        images: one or several, each as `predict` takes them. Errors as of `predict`.

        Returns: PREDICTIONS_SCHEMA, in the order given.
        """
        run = curated.current(RunDirectory(self.run_uri))
        for each in images:
            listing.check_exists("images", each)
        with _uncollected():
            task = self._again(_task(run, images[0], ()))
            places = [task.config.data.model_copy(update={"path": each}) for each in images]
            tables = [listing.list_images(place, setting="images").table for place in places]
            table = pa.concat_tables(tables)
            ids = pa.array(np.arange(table.num_rows))
            table = table.set_column(0, table.schema.field("image_id"), ids)
            return _rows(task, table, _here(task, table))

    def _again(self, task: _Task) -> _Task:
        """The task with the model of the call before, where it is of the same classifier."""
        made = task.trained.id
        if self._kept is None or self._kept[0] != made:
            self._kept = made, task.classifier
        model = self._kept[1].model
        return replace(task, classifier=task.classifier._replace(model=model))


def _here(task: _Task, table: pa.Table) -> Columns:
    """What the classifier says of the images of a table, by row; `reason` where one is bad."""
    answers, reporter = Arrays(table.num_rows), Reporter(task.run, quiet=True, silent=True)

    def accept(batch: Columns) -> tuple[Columns, np.ndarray]:
        return {name: batch[name] for name in SAID}, np.ones(len(batch["reason"]), bool)

    loaded = task.classifier.loaded
    Inference(None, reporter, table, answers, accept, loaded=loaded).run(task.job, "")
    return answers.columns


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Meanwhile no garbage collection: torch and timm bring a million objects when they are first
    imported, none of them garbage, and to look at these again and again takes half a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def is_image(images: str) -> bool:
    """Whether this is one image file. Raises DataError where there is nothing."""
    if suffix_of(images) not in IMAGES:
        return False
    listing.check_exists("images", images)
    return bool(storage.Storage(images).info().is_file)


# --- what to do ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A classifier, and how images are prepared for it."""

    run: RunDirectory
    trained: Manifest
    config: Config
    classifier: Opened
    min_confidence: float

    @property
    def job(self) -> Job:
        one = self.classifier
        return Job(one.model, one.preprocess, self.config.embed, one.levels)


def _task(
    run: RunDirectory, images: str, overrides: Sequence[str], min_confidence: float = 0.0
) -> _Task:
    """What there is to do, after all checks that need no image."""
    if not 0 <= min_confidence <= 1:
        raise ConfigError(f"min_confidence={min_confidence:g} must lie between 0 and 1")
    storage.check(run.uri)
    trained = finished_classifier(run)
    if not images:
        raise ConfigError("images is empty: name a folder, Parquet files or tars")
    listing.check_exists("images", images)
    config = _config(run, images, overrides)
    classifier = open_classifier(run, config.embed.precision)
    return _Task(run, trained, config, classifier, min_confidence)


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


def _mark(images: str, table: pa.Table, task: _Task) -> dict[str, Any]:
    """What partial results must have been made for to be reused."""
    digest = hashlib.sha256()
    for batch in table.select(["uri"]).to_batches(max_chunksize=65_536):
        digest.update("\n".join(batch.column(0).to_pylist()).encode() + b"\n")
    settings = {
        "images": addresses.absolute(images),
        "count": table.num_rows,
        "sha256": digest.hexdigest(),
        "precision": task.config.embed.precision,
        "min_confidence": task.min_confidence,
    }
    inputs = {CLASSIFIER: task.trained.id}
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
            f"{where} holds predictions of other images, by another classifier, or with another "
            "--min-confidence. Choose another out=..., or remove it."
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

    task: _Task
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
        size, total = self.task.config.embed.shard_size, self.table.num_rows
        read = partial(_read_ids, self.target, self.folder)
        return Shards.open(self.target, self.folder, total, size, self._build, read, resumed)

    def _build(self, columns: Columns) -> pa.Table:
        return _rows(self.task, self.table, columns)

    def _classify(self) -> float:
        """Returns images per second."""
        work = (self.cluster, self.reporter, self.table, self.shards, self._accept)
        loaded = self.task.classifier.loaded
        return Inference(*work, loaded=loaded).run(self.task.job, "classifying")

    def _accept(self, batch: Columns) -> tuple[Columns, np.ndarray]:
        """Every image gets a row; a bad one has a reason in it."""
        bad = batch["reason"].astype(bool)
        for row in np.flatnonzero(bad)[: max(0, SHOW - self.bad)]:
            uri = self.table["uri"][int(batch["image_id"][row])].as_py()
            self.reporter.say(f"! {printable(uri)}: {batch['reason'][row]}")
        self.bad += int(bad.sum())
        return {name: batch[name] for name in SAID}, np.ones(len(bad), bool)

    def _finish(self, mark: dict[str, Any], seconds: float, rate: float) -> Manifest:
        run, total = self.target, self.table.num_rows
        made = run.read_table(self.folder, columns=["cluster", "reason"])
        clusters = made["cluster"].to_numpy()
        dropped = pc.sum(pc.equal(made["reason"], curated.DROPPED)).as_py() or 0
        bad = total - made["reason"].null_count - dropped
        unsure = int((clusters < 0).sum()) - bad - dropped
        scores = _scores(self.task.config, self.table, clusters)
        manifest = Manifest(
            stage="predict",
            fingerprint=mark["fingerprint"],
            settings=mark["settings"],
            inputs=mark["inputs"],
            rows=total,
            seconds=round(seconds, 3),
            results={
                "bad": bad,
                "unsure": unsure,
                "dropped": dropped,
                "left_out": self.found.left.results(),
                "images_per_second": round(rate, 1),
                "run": self.task.run.uri,
                **scores,
            },
            resources=self.cluster.used(),
        )
        text = f"classified {total - bad:,} images in {duration(seconds)}"
        text += f", {bad:,} could not be decoded" if bad else ""
        text += f", {unsure:,} got no cluster, since they are not sure enough" if unsure else ""
        text += f", {dropped:,} got none, {curated.DROPPED}" if dropped else ""
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


def _rows(task: _Task, table: pa.Table, columns: Columns) -> pa.Table:
    """PREDICTIONS_SCHEMA of some images of a table, from what the classifier said of them."""
    ids = columns["image_id"]
    reasons = columns["reason"]
    bad = reasons.astype(bool)
    confidence = np.where(bad, 0, columns["confidence"]).astype(np.float32)
    novelty = columns["novelty"].astype(np.float32)
    dropped = ~bad & (columns["cluster"] < 0)
    reasons = np.where(dropped, curated.DROPPED, reasons)
    open_ = bad | dropped | (confidence < task.min_confidence)
    cluster = np.where(open_, -1, columns["cluster"]).astype(np.int32)
    names = map(task.classifier.naming.of, cluster.tolist())
    return pa.Table.from_arrays(
        [
            table["uri"].take(pa.array(ids)).combine_chunks(),
            pa.array(cluster),
            pa.array(names, pa.string()),
            pa.array(confidence),
            pa.array(novelty, mask=bad | np.isnan(novelty)),
            pa.array([reason or None for reason in reasons], pa.string()),
        ],
        schema=PREDICTIONS_SCHEMA,
    )


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
