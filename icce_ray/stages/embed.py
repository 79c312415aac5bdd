"""Stage 2: every image once through the frozen backbones, to unit-norm features.

Writes part-*.parquet (image_id, embedding float16 [D]) in the order of image_id, and
quarantine.parquet with the images that could not be used: those have no row.
Shapes: N images, B batch, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import BackboneConfig, Config, settings
from icce_ray.core.unit_rows import UnitRows
from icce_ray.data import embeddings as vectors
from icce_ray.data import listing
from icce_ray.distributed import inference as streaming
from icce_ray.distributed.cluster import Cluster
from icce_ray.distributed.inference import Columns, Job, Loaded
from icce_ray.distributed.shards import Quarantine, Shards
from icce_ray.errors import DataError, StageError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import embeddings_schema, tensor_column, to_matrix
from icce_ray.stages.base import Context, Need, Outcome, Size, Stage

if TYPE_CHECKING:
    import torch

FOLDER = "embeddings"
QUARANTINE = "quarantine.parquet"
BACKBONES = "backbones.json"  # what the shards were made with
GIVEN = "embeddings that were given"
UNIT = 1e-2  # largest deviation of a row's length from 1


def _settings(config: Config) -> dict[str, Any]:
    if config.data.embeddings:  # which is in the settings of `index`
        return {"source": GIVEN}
    embed = settings(config.embed)
    del embed["max_bad_fraction"]  # decides whether there is a result, not which
    return {"backbone": settings(config.backbone), "embed": embed}


def preflight(config: Config) -> None:
    """Check the backbones' names and weights, without building them. Raises ConfigError."""
    if config.data.embeddings:
        return
    from icce_ray.core import backbone as core

    for one in config.backbone:
        core.check(one)


def features(config: Config) -> int | None:
    """D, as far as it can be known before the stage has run."""
    if config.data.embeddings:
        return vectors.open_vectors(config.data.embeddings).features
    from icce_ray.core import backbone as core

    widths = [core.width(one) for one in config.backbone]
    return None if None in widths else sum(width or 0 for width in widths)


def _estimate(config: Config, size: Size, cluster: Cluster) -> Need:
    rows, width = size.images or 0, size.features or 1024
    if config.data.embeddings:
        memory = 8.0 * min(rows, config.embed.shard_size) * width
        return Need(memory=memory, disk=2.0 * rows * width, where="driver")
    flight = min(rows, 4 * config.embed.shard_size)
    where = "Ray Data: CPU tasks decode, actors embed"
    return Need(memory=1e9 + 4.0 * flight * width, disk=2.0 * rows * width, where=where)


# --- in the actors -------------------------------------------------------------------------------


class Embedder:
    """Unit-norm features of one or several backbones (see core.backbone.join)."""

    def __init__(
        self, configs: Sequence[BackboneConfig], slots: Sequence[int], precision: str
    ) -> None:
        self.configs, self.slots = configs, slots
        self.precision: Any = precision  # as asked for; once loaded, what the device computes in
        self.backbones: list[Any] = []

    def load(self, device: torch.device) -> list[dict[str, Any]]:
        """Load the backbones onto the device; returns their descriptions."""
        from icce_ray.core import backbone as core

        loaded = [core.load(config) for config in self.configs]
        self.precision = core.arithmetic(self.precision, device)
        described = [{**one.describe(), "precision": self.precision} for one in loaded]
        self.backbones = [one.to(device) for one in loaded]
        return described

    def embed(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        """uint8 [B, 3, S, S] per distinct preparation -> float32 [B, D], rows of length 1."""
        from icce_ray.core import backbone as core

        pairs = zip(self.backbones, self.slots, strict=True)
        return core.join([one.embed(pixels[slot], self.precision) for one, slot in pairs])

    def compute(self, pixels: Sequence[torch.Tensor]) -> Columns:
        """`embedding` float16 [B, D], and `valid`: finite and not zero."""
        found = self.embed(pixels)
        valid = (found.norm(dim=-1) - 1).abs() < UNIT  # False for NaN
        return {"embedding": found.half().cpu().numpy(), "valid": valid.cpu().numpy()}


# --- in the driver -------------------------------------------------------------------------------


def _run(context: Context) -> Outcome:
    if context.config.data.embeddings:
        return _take_given(context)
    index = context.run.read_table("index", columns=list(streaming.ADDRESS))
    gatherer = Gatherer(context, index)
    rows = gatherer.run()
    if rows < context.config.num_classes:
        raise DataError(
            f"only {rows} images could be used, fewer than num_classes={context.config.num_classes}"
        )
    return Outcome(rows, gatherer.results())


class Gatherer:
    """Runs the pipeline over what is missing and writes shards."""

    def __init__(self, context: Context, index: pa.Table) -> None:
        self.context, self.index = context, index
        config, run = context.config, context.run
        total = index.num_rows
        self.shards = _shards(context, total)
        place = run.path(FOLDER, QUARANTINE)
        self.bad = Quarantine(total, config.embed.max_bad_fraction, place)
        known = run.exists(FOLDER, BACKBONES)
        self.loaded = Loaded(run.read_json(FOLDER, BACKBONES) if known else ())
        self.rate = 0.0  # images per second, once started

    def run(self) -> int:
        """Returns the rows written in all."""
        missing = self.shards.missing
        before = self.shards.rows
        reporter, total = self.context.reporter, self.index.num_rows
        if before:
            reporter.say(f"{before:,} of {total:,} images were embedded before")
        if len(missing):
            self._gather(missing)
        self.shards.check()
        self._write_quarantine()
        return self.shards.rows

    def _gather(self, missing: np.ndarray) -> None:
        table, total = self.index, self.index.num_rows
        if len(missing) < total:
            table = table.take(pa.array(missing))
        job, reporter = _job(self.context.config), self.context.reporter
        batches = streaming.stream(self.context.cluster, table, job, reporter)
        self.rate = streaming.gather(
            batches, self._take, self.context.reporter, "embedding", total - len(missing), total
        )

    def _take(self, batch: Columns) -> int:
        run = self.context.run
        if self.loaded.see(batch["note"]):
            run.write_json(self.loaded.backbones, FOLDER, BACKBONES)
            for line in self.loaded.describe():
                self.context.reporter.say(line)
            if self.loaded.mixed:
                self.context.reporter.event(
                    "some images were embedded in float32, others in bfloat16, as their machines "
                    "compute; to have all alike, name one by embed.precision and add --overwrite"
                )
        good = np.array([not reason for reason in batch["reason"]])
        ids = batch["image_id"]
        self._check_features(ids[good & ~batch["valid"]])
        self.bad.add(ids[~good], batch["reason"][~good])
        if self.bad.too_many:
            self._write_quarantine()
            raise self.bad.error(self.index["uri"])
        columns = {"image_id": ids, "embedding": batch["embedding"]}
        return self.shards.add(columns, good)

    def _check_features(self, ids: np.ndarray) -> None:
        if not len(ids):
            return
        uri = self.index["uri"][int(ids[0])].as_py()
        names = ", ".join(one["name"] for one in self.loaded.backbones)
        raise StageError(
            f"{names} gave {len(ids)} feature vectors of one batch that are zero or not finite, "
            f"the first for {uri}. Check its weights, or try embed.precision=float32."
        )

    def _write_quarantine(self) -> None:
        self.context.run.write_table(self.bad.table(self.index["uri"]), FOLDER, QUARANTINE)

    def results(self) -> dict[str, Any]:
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


def _job(config: Config) -> Job:
    preprocess, slots = streaming.preparations(config.backbone)
    model = Embedder(config.backbone, slots, config.embed.precision)
    return Job(model, preprocess, config.embed)


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
    given = vectors.open_vectors(data.embeddings)
    positions = listing.evenly(given.total, data.limit)
    if len(positions) != context.run.read_table("index", columns=["image_id"]).num_rows:
        raise DataError(
            f"{data.embeddings} has another number of rows than when it was listed. "
            "Add --overwrite to list it again."
        )
    shards = _shards(context, len(positions))
    unit = UnitRows()
    reporter = context.reporter
    with reporter.bar("reading embeddings", len(positions), "rows", done=shards.rows) as bar:
        start = 0
        for block, numbers in _selected(given, positions, shards.size):
            rows = unit.normalize(block, numbers)
            ids = np.arange(start, start + len(block))
            start += len(block)
            if not unit.bad:
                shards.add({"image_id": ids, "embedding": rows}, np.ones(len(ids), bool))
            bar.update(start)
    unit.check(f"data.embeddings={data.embeddings}")
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


STAGE = Stage(
    name="embed",
    folder=FOLDER,
    needs=("index",),
    settings=_settings,
    run=_run,
    estimate=_estimate,
)
