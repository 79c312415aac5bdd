"""Embeddings the user already has: .npy, .npz or .pt, or Parquet with a column of lists.

They are read in blocks of rows; nothing needs all of them in memory.
Shapes: N rows, D features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.config.schema import DataConfig
from icce_ray.data import matrices
from icce_ray.data.formats import PARQUET, VECTORS, dotted, suffix_of
from icce_ray.data.listing import (
    Listing,
    finish,
    index_table,
    is_bytes,
    is_list,
    number,
    text_column,
)
from icce_ray.data.omissions import Omissions
from icce_ray.data.reading import IMAGE_COLUMN, row_uri
from icce_ray.data.walking import find_files
from icce_ray.errors import ArtifactError, DataError, IcceError, one_line, printable
from icce_ray.rundir.schemas import to_matrix
from icce_ray.rundir.storage import Storage, hastily

COLUMN = "embedding"
URI_COLUMN = "uri"


@dataclass(frozen=True)
class Vectors:
    """Given embeddings: what the heads of their files say."""

    uri: str  # as the user gave it
    files: tuple[str, ...]
    rows: tuple[int, ...]  # per file
    features: int
    left: Omissions  # other files beside them
    columns: tuple[str, ...]  # per file: the lists of a Parquet file; "" of others

    @property
    def total(self) -> int:
        """N."""
        return sum(self.rows)

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Consecutive blocks of at most `rows` rows, float32 [., D]."""
        for file, column in zip(self.files, self.columns, strict=True):
            if column:
                yield from self._parquet(file, column, rows)
            else:
                with _readable(file):
                    yield from map(_single, matrices.blocks(file, rows))

    def _parquet(self, file: str, column: str, rows: int) -> Iterator[np.ndarray]:
        batches, start = _Batches(file, column, rows), 0
        while (batch := batches.following()) is not None:
            yield _matrix(batch.column(0), file, self.features, start)
            start += len(batch)


class _Batches:
    """Record batches of a Parquet file, one at a time; after a failure it is opened anew."""

    def __init__(self, file: str, column: str, rows: int) -> None:
        self.file, self.column, self.rows, self.taken = Storage(file), column, rows, 0
        self._open: Iterator[pa.RecordBatch] | None = None

    def following(self) -> pa.RecordBatch | None:
        """The next batch; None at the end."""
        with _readable(self.file.uri):
            return self.file.attempt(self._following)

    def _following(self, filesystem: pafs.FileSystem, path: str) -> pa.RecordBatch | None:
        try:
            if self._open is None:
                self._open = islice(self._read(filesystem, path), self.taken, None)
            batch = next(self._open, None)
        except Exception:
            self._open = None
            raise
        self.taken += 1
        return batch

    def _read(self, filesystem: pafs.FileSystem, path: str) -> Iterator[pa.RecordBatch]:
        with filesystem.open_input_file(path) as stream:
            yield from pq.ParquetFile(stream).iter_batches(self.rows, columns=[self.column])


def are_in(file: str) -> bool:
    """Whether a Parquet file holds embeddings and no images, by its columns.

    False for one that cannot be read, too: its listing says why.
    """
    try:
        with hastily():
            schema = Storage(file).load(lambda stream: pq.ParquetFile(stream).schema_arrow)
    except (OSError, pa.ArrowException, IcceError):
        return False
    kinds = [field.type for field in schema]
    return any(map(is_list, kinds)) and not any(map(is_bytes, kinds))


def open_vectors(uri: str, column: str = IMAGE_COLUMN) -> Vectors:
    """Read the heads of the files of `data.embeddings`.

    column: data.image_column, which may name that of the embeddings.

    Raises:
        DataError: no such file, not N x D numbers, or files of different D.
    """
    there = find_files(uri, setting="data.embeddings")
    files = (there if there.is_file else there.only(PARQUET)).uris().to_pylist()
    if not files:
        raise DataError(f"data.embeddings={uri} is a folder without Parquet files")
    rows, every, columns = zip(*(_head(file, column) for file in files), strict=True)
    widths = set(every)
    if len(widths) > 1:
        raise DataError(f"data.embeddings={uri}: files differ in width: {sorted(widths)}")
    vectors = Vectors(uri, tuple(files), rows, widths.pop(), there.left, columns)
    if not vectors.total or not vectors.features:
        raise DataError(f"data.embeddings={uri} holds no numbers")
    return vectors


def _head(file: str, column: str) -> tuple[int, int, str]:
    """Rows and columns of one file, and the column of Parquet that holds them."""
    with _readable(file):
        if suffix_of(file) in VECTORS:
            return *matrices.head(file), ""
        if suffix_of(file) not in PARQUET:
            raise DataError(f"{printable(file)}: embeddings come as {dotted(VECTORS)} or Parquet")
        return Storage(file).load(
            lambda stream: _parquet_head(pq.ParquetFile(stream), file, column)
        )


@contextlib.contextmanager
def _readable(file: str) -> Iterator[None]:
    """Raises DataError for what pyarrow raises of a damaged file."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeError) as error:
        raise DataError(f"{printable(file)} cannot be read: {one_line(error)}") from None


def _single(matrix: np.ndarray) -> np.ndarray:
    """As float32; what it cannot hold becomes infinite, and its row is named later."""
    with np.errstate(over="ignore"):
        return matrix.astype(np.float32)


def _parquet_head(parquet: pq.ParquetFile, file: str, column: str) -> tuple[int, int, str]:
    name = _column(parquet.schema_arrow, file, column)
    rows = parquet.metadata.num_rows
    if not rows:
        return 0, 0, name
    first = next(parquet.iter_batches(1, columns=[name]), None)
    if first is None:
        raise DataError(f"{printable(file)} is damaged: it holds fewer rows than it says")
    return rows, _matrix(first.column(0), file, None).shape[1], name


def _column(schema: pa.Schema, file: str, asked: str) -> str:
    """The column of embeddings: as asked for, else `embedding`, else the only one of lists."""
    for name in (asked, COLUMN):
        if name in schema.names and (name != IMAGE_COLUMN or is_list(schema.field(name).type)):
            return name
    lists = [field.name for field in schema if is_list(field.type)]
    if len(lists) == 1:
        return lists[0]
    several = f"; data.image_column=NAME chooses among {', '.join(lists)}" if lists else ""
    raise DataError(
        f"{printable(file)} has no column {COLUMN!r}; its columns are "
        f"{', '.join(schema.names)}{several}"
    )


def _matrix(column: pa.Array, file: str, width: int | None, start: int = 0) -> np.ndarray:
    """A list column as float32 [., D]. start: the number of its first row in the file."""
    wrong = f"{printable(file)}: embeddings must be lists of numbers, all of one length"
    kind = column.storage.type if isinstance(column, pa.ExtensionArray) else column.type
    if not (pa.types.is_nested(kind) and hasattr(kind, "value_type")):
        raise DataError(f"{wrong}; it is {kind}")
    try:
        matrix = to_matrix(column)
    except (ArtifactError, ValueError):
        raise DataError(wrong + _odd_row(column, width, start)) from None
    if column.null_count or matrix.dtype.kind not in "fiu" or width not in (None, matrix.shape[1]):
        raise DataError(wrong + _odd_row(column, width, start))
    return _single(matrix)


def _odd_row(column: pa.Array, width: int | None, start: int) -> str:
    """The first row without a list, or with one of another length than `width` or the first."""
    lists = column.storage if isinstance(column, pa.ExtensionArray) else column
    lengths = pc.fill_null(pc.list_value_length(lists), -1).to_numpy()
    usual = width or lengths[0]
    odd = np.flatnonzero((lengths != usual) | (lengths < 0))
    if not len(odd):
        return ""
    length = lengths[odd[0]]
    what = "is null" if length < 0 else f"has {length} instead of {usual}"
    return f"; row {start + odd[0]:,} (from 0) {what}"


def list_rows(data: DataConfig) -> Listing:
    """The rows of `data.embeddings` as images; Parquet columns `uri` and of labels are kept.

    Raises:
        DataError: as `open_vectors`; a row without uri, or one that occurs twice.
    """
    assert data.embeddings is not None
    given = open_vectors(data.embeddings, data.image_column)
    uris: Any = read_column(given.files, URI_COLUMN)
    if uris is None:
        pairs = zip(given.files, given.rows, strict=True)
        uris = pa.chunked_array([number(row_uri(file), count) for file, count in pairs])
    elif uris.null_count:
        raise DataError(f"data.embeddings={data.embeddings}: {uris.null_count} rows have no uri")
    labels = read_column(given.files, data.label_column)
    return finish(index_table(uris, labels), "embeddings", data.limit, given.left)


def read_column(files: Sequence[str], name: str) -> pa.ChunkedArray | None:
    """A text column of all Parquet files, or None where one of them lacks it."""
    parts = []
    for file in files:
        part = _text(file, name) if suffix_of(file) in PARQUET else None
        if part is None:
            return None
        parts.append(part)
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())


def _text(file: str, name: str) -> pa.ChunkedArray | None:
    with _readable(file):
        return Storage(file).load(lambda stream: text_column(pq.ParquetFile(stream), name))
