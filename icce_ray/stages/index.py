"""List the images once and give each a stable id.

Shapes: N images.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import Config, settings
from icce_ray.data import datasets, listing
from icce_ray.data import embeddings as vectors
from icce_ray.data.reading import row_uri
from icce_ray.distributed.cluster import Cluster
from icce_ray.errors import ConfigError, DataError
from icce_ray.rundir import storage
from icce_ray.rundir.directory import RunDirectory
from icce_ray.stages.base import Context, Need, Outcome, Size, Stage

FOLDER = "index"
ROWS_PER_FILE = 1_000_000
BYTES_PER_ROW = 450  # in memory while listing, as measured
LABEL_MODES = ("auto", "none")


def _settings(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = settings(config.data)
    del found["labels"]
    return {"data": found}


# --- before the run ------------------------------------------------------------------------------


def preflight(config: Config) -> None:
    """Cheap checks of the input, before anything is started. Starts nothing, writes nothing.

    Raises:
        ConfigError: data.dataset does not fit data.path; more clusters than embeddings.
        DataError: no such images, embeddings or labels; labels of another number.
    """
    data = config.data
    total = None
    if data.embeddings:
        if data.dataset:
            raise ConfigError("data.dataset is for images: leave it out with data.embeddings")
        total = len(listing.evenly(vectors.open_vectors(data.embeddings).total, data.limit))
        _check_classes(config, total)
    elif data.dataset:
        datasets.check(data.dataset, str(data.path))
    else:
        listing.check_exists("data.path", str(data.path))
    if data.labels not in LABEL_MODES:
        listing.check_exists("data.labels", data.labels)
        if data.embeddings and listing._suffix(data.labels) == "npy":
            full = vectors.open_vectors(data.embeddings).total
            _check_length(data.labels, len(_read_labels(data.labels)), (total or full, full))


def _check_classes(config: Config, images: int) -> None:
    if config.num_classes > images:
        raise ConfigError(
            f"num_classes={config.num_classes} is more than the {images} images there are"
        )


# --- the stage -----------------------------------------------------------------------------------


def _run(context: Context) -> Outcome:
    config, run = context.config, context.run
    data = config.data
    if data.dataset and datasets.materialize(data.dataset, str(data.path)):
        context.reporter.say(f"wrote {data.dataset} to {data.path}")
    found = list_embeddings(config) if data.embeddings else listing.list_images(data)
    _check_classes(config, found.table.num_rows)
    for part, start in enumerate(range(0, found.table.num_rows, ROWS_PER_FILE)):
        run.write_table(found.table.slice(start, ROWS_PER_FILE), FOLDER, f"part-{part:05d}.parquet")
    labeled = found.table.num_rows - found.table["label"].null_count
    kind = f"{found.table.num_rows:,} of {found.found:,} images ({found.kind})"
    context.reporter.say(f"{kind}, {labeled:,} with a label" if labeled else kind)
    return Outcome(
        found.table.num_rows, {"kind": found.kind, "found": found.found, "labeled": labeled}
    )


def list_embeddings(config: Config) -> listing.Listing:
    """Rows of given embeddings; the Parquet columns `uri` and the label column are taken along."""
    data = config.data
    assert data.embeddings is not None
    given = vectors.open_vectors(data.embeddings)
    uris: Any = vectors.read_column(given.files, vectors.URI_COLUMN)
    if uris is None:
        pairs = zip(given.files, given.rows, strict=True)
        uris = pa.chunked_array([listing.number(row_uri(f), rows) for f, rows in pairs])
    elif uris.null_count:
        raise DataError(f"data.embeddings={data.embeddings}: {uris.null_count} rows have no uri")
    labels = vectors.read_column(given.files, data.label_column)
    table = listing._rows(uris, labels)
    return listing.finish(table, "embeddings", data.limit)


def _estimate(config: Config, size: Size, cluster: Cluster) -> Need:
    images = size.images or 0
    return Need(memory=images * BYTES_PER_ROW, disk=images * 40.0, where="driver")


# --- ground truth --------------------------------------------------------------------------------


def load_labels(config: Config, run: RunDirectory) -> tuple[np.ndarray, list[str]] | None:
    """Ground truth by image_id, for `evaluate` and `report` alone.

    Returns:
        Codes int64 [N] (-1: no label) in the order of image_id, and the names of the classes; or
        None where there are no labels.

    Raises:
        DataError: a labels file that cannot be read, or of another length than the images.
    """
    mode = config.data.labels
    if mode == "none":
        return None
    if mode == "auto":
        column = run.read_table(FOLDER, columns=["label"])["label"]
        values: Any = column.to_numpy()
    else:
        values = _chosen(_read_labels(mode), mode, run)
    codes, names = encode(values)
    return (codes, names) if names else None


def labels_of(mode: str, table: pa.Table) -> np.ndarray | None:
    """Ground truth of listed images, in their order: codes int64 [N], -1 where there is no label.

    mode: data.labels. Returns None where there are none; raises DataError as `load_labels`.
    """
    if mode == "none":
        return None
    values = table["label"].to_numpy() if mode == "auto" else _read_labels(mode)
    _check_length(mode, len(values), [table.num_rows])
    codes, names = encode(values)
    return codes if names else None


def _chosen(values: np.ndarray, uri: str, run: RunDirectory) -> np.ndarray:
    """The labels of the images that data.limit kept."""
    done = run.manifest(FOLDER)
    images = done.rows if done else run.read_table(FOLDER, columns=["image_id"]).num_rows
    found = int(done.results.get("found", images)) if done else images
    _check_length(uri, len(values), (images, found))
    return values if len(values) == images else values[listing.evenly(found, images)]


def _check_length(uri: str, labels: int, images: Sequence[int]) -> None:
    if labels not in images:
        raise DataError(
            f"data.labels={uri} has {labels:,} labels, but there are {images[0]:,} images: it must "
            "have one label per image, in the order of the index"
        )


def _read_labels(uri: str) -> np.ndarray:
    """A .npy file, or text with one label a line. Returns [N] of integers or of objects."""
    try:
        data = storage.read(listing.absolute(uri))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data.labels={uri} cannot be read: {error}") from None
    try:
        array = listing._suffix(uri) == "npy"
        values = np.load(io.BytesIO(data), allow_pickle=False) if array else None
        if values is None:
            return np.array([line.strip() for line in data.decode().splitlines()], dtype=object)
    except (ValueError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"data.labels={uri} is neither .npy nor text: {error}") from None
    if values.ndim != 1:
        raise DataError(f"data.labels={uri} must have one label per image, not {values.shape}")
    if values.dtype.kind == "f" and np.array_equal(values, np.rint(values)):
        return values.astype(np.int64)
    if values.dtype.kind not in "iuUSb":
        raise DataError(f"data.labels={uri} must hold integers or text, not {values.dtype}")
    return values


def encode(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Labels as codes int64 [N] and their names, sorted (as numbers where all are integers).

    None, empty text and negative integers mean: no label, code -1.
    """
    if values.dtype.kind in "iub":
        texts = values.astype(np.int64)
        known = texts >= 0
    else:
        texts = np.array(
            ["" if v is None else v.decode() if isinstance(v, bytes) else str(v) for v in values],
            dtype=str,
        )
        known = texts != ""
        texts, known = _as_integers(texts, known)
    codes = np.full(len(values), -1, np.int64)
    names, codes[known] = np.unique(texts[known], return_inverse=True)
    return codes, [str(name) for name in names]


def _as_integers(texts: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers, where all known texts are such (as written by str), so that 10 comes after 9."""
    distinct = np.unique(texts[known])
    if not all(t.removeprefix("-").isdecimal() and str(int(t)) == t for t in distinct):
        return texts, known
    numbers = np.full(len(texts), -1, np.int64)
    numbers[known] = texts[known].astype(np.int64)
    return numbers, numbers >= 0


STAGE = Stage(
    name="index",
    folder=FOLDER,
    needs=(),
    settings=_settings,
    run=_run,
    estimate=_estimate,
)
