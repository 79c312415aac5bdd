"""List the images once and give each a stable id.

Shapes: N images.
"""

from __future__ import annotations

from icce_ray.config.schema import Config
from icce_ray.data import datasets, embeddings, labels, listing
from icce_ray.errors import ConfigError
from icce_ray.stages.base import Context, Outcome
from icce_ray.stages.table import ROWS_PER_FILE

FOLDER = "index"


# --- before the run ------------------------------------------------------------------------------


def preflight(config: Config) -> None:
    """Cheap checks of the input, before anything is started. Starts nothing, writes nothing.

    Raises:
        ConfigError: data.dataset does not fit data.path; more clusters than embeddings.
        DataError: no such images, embeddings or labels; labels of another number.
    """
    data = config.data
    if data.embeddings:
        if data.dataset:
            raise ConfigError("data.dataset is for images: leave it out with data.embeddings")
        given = embeddings.open_vectors(data.embeddings, data.image_column)
        total = len(listing.evenly(given.total, data.limit))
        _check_classes(config, total)
    elif data.dataset:
        datasets.check(data.dataset, str(data.path))
    else:
        listing.check_exists("data.path", str(data.path))
    labels.preflight(data)


def _check_classes(config: Config, images: int) -> None:
    if config.num_classes > images:
        raise ConfigError(
            f"num_classes={config.num_classes} is more than the {images} images there are"
        )


# --- the stage -----------------------------------------------------------------------------------


def run(context: Context) -> Outcome:
    """List the images, or the rows of given embeddings.

    Raises:
        ConfigError: more clusters than images.
        DataError: images or embeddings that cannot be used.
    """
    config, run = context.config, context.run
    data = config.data
    if data.dataset and datasets.materialize(data.dataset, str(data.path)):
        context.reporter.say(f"wrote {data.dataset} to {data.path}")
    if data.embeddings:
        listed = embeddings.list_rows(data)
    else:
        listed = listing.list_images(data, say=context.reporter.say)
    table, rows = listed.table, listed.table.num_rows
    _check_classes(config, rows)
    for part, start in enumerate(range(0, rows, ROWS_PER_FILE)):
        run.write_table(table.slice(start, ROWS_PER_FILE), FOLDER, f"part-{part:05d}.parquet")
    labeled = rows - table["label"].null_count
    kind = f"{rows:,} of {listed.found:,} images ({listed.kind})"
    context.reporter.say(f"{kind}, {labeled:,} with a label" if labeled else kind)
    if listed.left:
        context.reporter.say(f"left out: {listed.left}")
    results = {"kind": listed.kind, "found": listed.found, "labeled": labeled}
    return Outcome(rows, {**results, "left_out": listed.left.results()})
