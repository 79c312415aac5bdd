"""Embeddings the user already has: a .npy file, or Parquet with a list column `embedding`.

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
from numpy.lib import format as npy

from icce_ray.config.schema import DataConfig
from icce_ray.data.formats import PARQUET, suffix_of
from icce_ray.data.listing import Listing, finish, index_table, number, text_column
from icce_ray.data.omissions import Omissions
from icce_ray.data.reading import row_uri
from icce_ray.data.walking import find_files
from icce_ray.errors import ArtifactError, DataError, one_line, printable
from icce_ray.rundir.schemas import to_matrix
from icce_ray.rundir.storage import Storage

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

    @property
    def total(self) -> int:
        """N."""
        return sum(self.rows)

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Consecutive blocks of at most `rows` rows, float32 [., D]."""
        for file in self.files:
            read = _npy_blocks if suffix_of(file) == "npy" else self._parquet
            yield from read(file, rows)

    def _parquet(self, file: str, rows: int) -> Iterator[np.ndarray]:
        batches, start = _Batches(file, rows), 0
        while (batch := batches.following()) is not None:
            yield _matrix(batch.column(0), file, self.features, start)
            start += len(batch)


class _Batches:
    """Record batches of a Parquet file, one at a time; after a failure it is opened anew."""

    def __init__(self, file: str, rows: int) -> None:
        self.file, self.rows, self.taken = Storage(file), rows, 0
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
            yield from pq.ParquetFile(stream).iter_batches(self.rows, columns=[COLUMN])


def open_vectors(uri: str) -> Vectors:
    """Read the heads of the files of `data.embeddings`.

    Raises:
        DataError: no such file, not N x D numbers, or files of different D.
    """
    there = find_files(uri, setting="data.embeddings")
    files = (there if there.is_file else there.only(PARQUET)).uris().to_pylist()
    if not files:
        raise DataError(f"data.embeddings={uri} is a folder without Parquet files")
    heads = [_head(file) for file in files]
    widths = {width for _, width in heads}
    if len(widths) > 1:
        raise DataError(f"data.embeddings={uri}: files differ in width: {sorted(widths)}")
    vectors = Vectors(uri, tuple(files), tuple(rows for rows, _ in heads), widths.pop(), there.left)
    if not vectors.total or not vectors.features:
        raise DataError(f"data.embeddings={uri} holds no numbers")
    return vectors


def _head(file: str) -> tuple[int, int]:
    """Rows and columns of one file."""

    def read(stream: pa.NativeFile) -> tuple[int, int]:
        if suffix_of(file) == "npy":
            (rows, width), _, _ = _npy_head(stream, file)
            return rows, width
        if suffix_of(file) not in PARQUET:
            raise DataError(f"{printable(file)}: embeddings come as .npy or Parquet")
        return _parquet_head(pq.ParquetFile(stream), file)

    with _readable(file):
        return Storage(file).load(read)


@contextlib.contextmanager
def _readable(file: str) -> Iterator[None]:
    """Raises DataError for what pyarrow raises of a damaged file."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeError) as error:
        raise DataError(f"{printable(file)} cannot be read: {one_line(error)}") from None


def _npy_head(stream: Any, file: str) -> tuple[tuple[int, int], np.dtype, int]:
    """Shape, type and the position of the data in a .npy file."""
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except OSError:  # of the storage, which may come back
        raise
    except Exception as error:  # numpy raises almost anything for a damaged header
        raise DataError(f"{printable(file)} is not a .npy file: {one_line(error)}") from None
    if len(shape) != 2 or dtype.kind not in "fiu":
        raise DataError(
            f"{printable(file)} must hold N x D numbers, one row per image; "
            f"it is {dtype} of shape {shape}"
        )
    if fortran:
        raise DataError(
            f"{printable(file)} is stored by columns; save np.ascontiguousarray(embeddings)"
        )
    start = stream.tell()
    if stream.size() - start < shape[0] * shape[1] * dtype.itemsize:
        raise DataError(
            f"{printable(file)} is truncated: its header says {shape[0]} x {shape[1]} {dtype}"
        )
    return shape, dtype, start


def _npy_blocks(file: str, rows: int) -> Iterator[np.ndarray]:
    source = Storage(file)
    (total, width), dtype, start = source.load(lambda stream: _npy_head(stream, file))
    step = width * dtype.itemsize
    for first in range(0, total, rows):
        count = min(rows, total - first)
        data = source.read_at(count * step, start + first * step)
        yield _single(np.frombuffer(data, dtype).reshape(count, width))


def _single(matrix: np.ndarray) -> np.ndarray:
    """As float32; what it cannot hold becomes infinite, and its row is named later."""
    with np.errstate(over="ignore"):
        return matrix.astype(np.float32)


def _parquet_head(parquet: pq.ParquetFile, file: str) -> tuple[int, int]:
    schema = parquet.schema_arrow
    if COLUMN not in schema.names:
        raise DataError(
            f"{printable(file)} has no column {COLUMN!r}; its columns are {', '.join(schema.names)}"
        )
    rows = parquet.metadata.num_rows
    if not rows:
        return 0, 0
    first = next(parquet.iter_batches(1, columns=[COLUMN]), None)
    if first is None:
        raise DataError(f"{printable(file)} is damaged: it holds fewer rows than it says")
    return rows, _matrix(first.column(0), file, None).shape[1]


def _matrix(column: pa.Array, file: str, width: int | None, start: int = 0) -> np.ndarray:
    """A list column as float32 [., D]. start: the number of its first row in the file."""
    wrong = f"{printable(file)}: column {COLUMN!r} must hold lists of numbers, all of one length"
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
    given = open_vectors(data.embeddings)
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
        part = None if suffix_of(file) == "npy" else _text(file, name)
        if part is None:
            return None
        parts.append(part)
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())


def _text(file: str, name: str) -> pa.ChunkedArray | None:
    with _readable(file):
        return Storage(file).load(lambda stream: text_column(pq.ParquetFile(stream), name))
