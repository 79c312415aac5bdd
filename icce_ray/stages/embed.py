"""Embed: every image once through the frozen backbones, to unit-norm features.

Writes part-*.parquet (image_id, embedding float16 [D]) in the order of image_id, and
_quarantine.parquet with the images that could not be used: those have no row.
Shapes: N images, B batch, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import Config
from icce_ray.core import importing
from icce_ray.core.preprocess import levels_of
from icce_ray.core.samples import AS_IS, Levels, levels_in
from icce_ray.core.unit_rows import UnitRows
from icce_ray.data import embeddings as vectors
from icce_ray.data import listing, reading
from icce_ray.distributed.cluster import Cluster
from icce_ray.distributed.inference import Embedder, Inference, Loaded, preparations
from icce_ray.distributed.shards import Quarantine, Shards
from icce_ray.distributed.stream import ADDRESS, Columns, Job
from icce_ray.errors import DataError
from icce_ray.rundir import copies
from icce_ray.rundir.addresses import is_remote
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import QUARANTINE, embeddings_schema, tensor_column, to_matrix
from icce_ray.stages.base import Context, Outcome

FOLDER = "embeddings"
BACKBONES = "_backbones.json"  # what the shards were made with
GIVEN = "embeddings that were given"
PEEK, SAMPLE = 8, 64  # images looked at for more than 8 bits, and for their range where there are


def preflight(config: Config) -> None:
    """Check names, sizes and pooling, and that weights are there. Raises ConfigError."""
    if config.data.embeddings:
        return
    importing.whole("torch")
    from icce_ray.core import backbone as core

    local = Cluster(config.ray).is_local  # else others download the weights
    for one in config.backbone:
        core.check(one, download=local)
        if one.pretrained and one.weights and is_remote(one.weights):
            copies.check("backbone.weights", one.weights)


def features(config: Config) -> int | None:
    """D, as far as it can be known before the stage has run."""
    if config.data.embeddings:
        return vectors.open_vectors(config.data.embeddings, config.data.image_column).features
    from icce_ray.core import backbone as core

    widths = [core.width(one) for one in config.backbone]
    return None if None in widths else sum(width or 0 for width in widths)


def run(context: Context) -> Outcome:
    """Embed every image, or take the embeddings that were given.

    Raises:
        DataError, StageError: too many images that cannot be used; workers lost for good.
    """
    if context.config.data.embeddings:
        return _take_given(context)
    work = _Embedding(context)
    rows = work.run()
    if rows < context.config.num_classes:
        raise DataError(
            f"only {rows} images could be used, fewer than num_classes={context.config.num_classes}"
        )
    return Outcome(rows, work.results())


class _Embedding:
    """What comes of each batch: a row for a good image, a line in quarantine for a bad one."""

    def __init__(self, context: Context) -> None:
        self.context = context
        config, run = context.config, context.run
        self.index = run.read_table("index", columns=list(ADDRESS))
        total = self.index.num_rows
        self.shards = _shards(context, total)
        place = run.path(FOLDER, QUARANTINE)
        self.bad = Quarantine(total, config.embed.max_bad_fraction, place)
        known = run.exists(FOLDER, BACKBONES)
        self.loaded = Loaded(run.read_json(FOLDER, BACKBONES) if known else ())
        self.levels = levels_in(self.loaded.backbones) if known else self._levels()
        self.rate = 0.0  # images per second, once started

    def _levels(self) -> Levels:
        """The grey levels of images of more than 8 bits, from a few images spread over all."""
        levels, total = AS_IS, self.index.num_rows
        for count in (PEEK, SAMPLE):
            places = self.index.take(pa.array(listing.evenly(total, count))).to_pydict()
            data = reading.read_many(places["uri"], places["offset"], places["size"])
            read = (one for one in data if isinstance(one, bytes))
            levels = levels_of(read, self.context.config.embed.max_pixels)
            if levels == AS_IS:
                return levels
        self.context.reporter.say(levels.describe())
        return levels

    def run(self) -> int:
        """Returns the rows written in all."""
        context, config = self.context, self.context.config
        preprocess, slots = preparations(config.backbone)
        model = Embedder(config.backbone, slots, config.embed.precision, self.levels)
        inference = Inference(
            context.cluster,
            context.reporter,
            self.index,
            self.shards,
            self._accept,
            loaded=self.loaded,
            on_load=self._note_backbones,
        )
        self.rate = inference.run(Job(model, preprocess, config.embed, self.levels), "embedding")
        self._write_quarantine()
        return self.shards.rows

    def _note_backbones(self) -> None:
        self.context.run.write_json(self.loaded.backbones, FOLDER, BACKBONES)
        if self.loaded.mixed:
            self.context.reporter.event(
                "some images were embedded in float32, others in bfloat16, as their machines "
                "compute; to have all alike, name one by embed.precision and add --overwrite"
            )

    def _accept(self, batch: Columns) -> tuple[Columns, np.ndarray]:
        good = ~batch["reason"].astype(bool)
        ids = batch["image_id"]
        self.bad.add(ids[~good], batch["reason"][~good])
        if self.bad.too_many:
            self._write_quarantine()
            raise self.bad.error(self.index["uri"])
        return {"image_id": ids, "embedding": batch["embedding"]}, good

    def _write_quarantine(self) -> None:
        self.context.run.write_table(self.bad.table(self.index["uri"]), FOLDER, QUARANTINE)

    def results(self) -> dict[str, Any]:
        """For the manifest."""
        bad = len(self.bad.ids)
        if bad:
            self.context.reporter.event(
                f"{bad:,} images could not be used: see {self.context.run.path(FOLDER, QUARANTINE)}"
            )
        return {
            "backbones": self.loaded.backbones,
            "features": sum(one["features"] for one in self.loaded.backbones),
            "precision": self.loaded.precision,
            "quarantined": bad,
            "images_per_second": round(self.rate, 1),
        }


def _shards(context: Context, total: int) -> Shards:
    run, size = context.run, context.config.embed.shard_size
    return Shards.open(run, FOLDER, total, size, _table, partial(_read, run), context.resumed)


def _table(columns: Columns) -> pa.Table:
    embedding = columns["embedding"]
    schema = embeddings_schema(embedding.shape[1])
    tensors = tensor_column(embedding, schema.field("embedding").type)
    return pa.Table.from_arrays([pa.array(columns["image_id"]), tensors], schema=schema)


def _read(run: RunDirectory, name: str, start: int, stop: int) -> Columns:
    table = run.read_table(FOLDER, name)
    return {
        "image_id": table["image_id"].to_numpy(),
        "embedding": to_matrix(table["embedding"]),
    }


# --- embeddings the user already has -------------------------------------------------------------


def _take_given(context: Context) -> Outcome:
    """Normalize given embeddings and write them as shards.

    Raises:
        DataError: rows that are not finite, or zero.
    """
    data = context.config.data
    assert data.embeddings is not None
    given = vectors.open_vectors(data.embeddings, data.image_column)
    positions = listing.evenly(given.total, data.limit)
    if len(positions) != context.run.read_table("index", columns=["image_id"]).num_rows:
        raise DataError(
            f"{data.embeddings} has another number of rows than when it was listed. "
            "Add --overwrite to list it again."
        )
    shards = _shards(context, len(positions))
    bad = UnitRows()
    reporter = context.reporter
    with reporter.bar("reading embeddings", len(positions), "rows", done=shards.rows) as bar:
        start = 0
        for block, numbers in _selected(given, positions, shards.size):
            unit = bad.normalize(block, numbers)
            ids = np.arange(start, start + len(block))
            start += len(block)
            if not bad.bad:
                shards.add({"image_id": ids, "embedding": unit}, np.ones(len(ids), bool))
            bar.update(start)
    bad.check(f"data.embeddings={data.embeddings}")
    shards.check()
    return Outcome(shards.rows, {"backbones": [], "features": given.features, "quarantined": 0})


def _selected(
    given: vectors.Vectors, positions: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows at `positions` (increasing), with their numbers, a block at a time."""
    start = 0
    for block in given.blocks(size):
        low, high = np.searchsorted(positions, (start, start + len(block)))
        numbers = positions[low:high]
        if len(numbers):
            yield block[numbers - start], numbers
        start += len(block)
