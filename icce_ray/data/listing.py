"""Listing of images: folders, Parquet files, WebDataset tars, on any pyarrow file system.

The order is that of the addresses, compared as bytes; an image's position in it is its id. Names
are Arrow arrays: a million Python strings would take ten times as much memory.
Shapes: N images.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.config.schema import DataConfig
from icce_ray.data import lists, tars
from icce_ray.data.formats import FORMATS, LISTS, dotted, suffix_of
from icce_ray.data.omissions import Omissions
from icce_ray.data.reading import IMAGE_COLUMN, REMOTE_THREADS, THREADS, row_uri
from icce_ray.data.walking import Files, Say, find_files
from icce_ray.errors import ArtifactError, DataError, StorageError, one_line, printable
from icce_ray.rundir.addresses import is_remote, split_pattern
from icce_ray.rundir.progress import LINE_EVERY
from icce_ray.rundir.schemas import INDEX_SCHEMA
from icce_ray.rundir.storage import Storage, hastily

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True)
class Listing:
    """The images of a run."""

    table: pa.Table  # INDEX_SCHEMA
    kind: str  # folder, parquet, webdataset, list, embeddings
    found: int  # images before data.limit
    left: Omissions  # what was not taken


def list_images(data: DataConfig, setting: str = "data.path", say: Say | None = None) -> Listing:
    """List the images of `data.path`, with labels where there are any.

    setting: what the user gave the path as, for messages. say: gets a line now and then.

    Raises:
        DataError: nothing there, an ambiguous mixture, damaged or unsuitable files, an address
            that occurs twice.
    """
    assert data.path is not None
    files = find_files(data.path, setting, say)
    if files.is_file and data.format == "auto" and suffix_of(files.base) in LISTS:
        uris, labels = lists.read_csv(files.base, data.image_column, data.label_column)
        return finish(index_table(uris, labels), "list", data.limit, files.left)
    kind = _kind(data, files, setting)
    chosen = _chosen(data, files, kind)
    if not len(chosen.names):
        raise _nothing(data, kind, files, setting)
    table = _READERS[kind](data, chosen, say)
    if not table.num_rows:
        raise _nothing(data, kind, files, setting)
    return finish(table, kind, data.limit, files.left)


def _chosen(data: DataConfig, files: Files, kind: str) -> Files:
    """The files of a format: by their endings, or of any name where the user gave the format."""
    given = data.format != "auto"
    if given and files.is_file:
        return files
    if given and not files.count(FORMATS[kind]):
        return files.only([""])  # without an ending; others have one of something else
    return files.only(FORMATS[kind])


def finish(table: pa.Table, kind: str, limit: int | None, left: Omissions) -> Listing:
    """Give ids, after dropping all but `limit` evenly spaced rows. Raises DataError: duplicates."""
    total = table.num_rows
    if kind != "folder":
        _refuse_duplicates(table["uri"])
    if limit is not None and limit < total:
        table = table.take(pa.array(evenly(total, limit)))
    ids = pa.array(np.arange(table.num_rows, dtype=np.int64))
    columns = [ids, *(table[name] for name in INDEX_SCHEMA.names[1:])]
    return Listing(pa.Table.from_arrays(columns, schema=INDEX_SCHEMA), kind, total, left)


def evenly(total: int, limit: int | None) -> np.ndarray:
    """Which of `total` rows data.limit keeps: int64, increasing, evenly spaced."""
    count = total if limit is None else min(limit, total)
    return np.arange(count, dtype=np.int64) * total // max(count, 1)


def _refuse_duplicates(uris: pa.ChunkedArray) -> None:
    if pc.count_distinct(uris).as_py() == len(uris):
        return
    counts = pc.value_counts(uris.combine_chunks())
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    raise DataError(
        f"{len(twice)} addresses occur more than once, the first is "
        f"{printable(twice[0]['values'].as_py())}: every image needs its own"
    )


def check_exists(setting: str, uri: str) -> None:
    """See, within seconds, that the file or folder of a setting is there. Raises DataError."""
    try:
        with hastily():
            info = Storage(uri).info()
            if info.type == pafs.FileType.NotFound and split_pattern(uri)[1]:
                info = Storage(split_pattern(uri)[0]).info()
    except (ArtifactError, StorageError) as error:
        raise DataError(f"{setting}={error}") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{setting}={uri} cannot be read: {one_line(error)}") from None
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"{setting}={uri}: there is no such file or folder")


def _kind(data: DataConfig, files: Files, setting: str) -> str:
    """The format: as given, or by the files' names."""
    if data.format != "auto":
        return data.format
    counts = {kind: files.count(endings) for kind, endings in FORMATS.items()}
    present = [kind for kind, count in counts.items() if count]
    if len(present) > 1:
        text = ", ".join(f"{counts[kind]:,} of format {kind}" for kind in present)
        raise DataError(
            f"{setting}={data.path} holds several kinds of files: {text}. "
            "Say which to use: data.format=folder, parquet or webdataset."
        )
    if not present:
        raise _nothing(data, "auto", files, setting)
    return present[0]


def _nothing(data: DataConfig, kind: str, files: Files, setting: str) -> DataError:
    kinds = FORMATS if kind == "auto" else {kind: FORMATS[kind]}
    looked = "; ".join(f"{name}: {dotted(ends)}" for name, ends in kinds.items())
    seen = sorted(set(pc.unique(files.suffixes).to_pylist()))
    text = f"{setting}={data.path} holds no images. Looked for {looked}"
    if kind == "webdataset" and "tar" in seen:
        text += " with members KEY.jpg, KEY.png, ..., KEY being all before the first dot"
    if kind == "auto" and not files.is_file:
        files.only([])  # all is left out
    if files.left:
        text += f". Found {files.left}"
    if "gz" in seen or "tgz" in seen:
        text += ". Compressed tars have to be unpacked: images are read out of tars by position"
    if "" in seen and data.format == "auto":
        text += ". Files without an ending are taken where data.format names their format"
    return DataError(f"{text}.")


def _each(
    work: Callable[[str], tuple[pa.Table, Omissions]], files: Files, say: Say | None
) -> pa.Table:
    """Rows of many files in their order, several at a time; what they left out is added."""
    uris, spoken, tables = files.uris().to_pylist(), time.monotonic(), []
    threads = REMOTE_THREADS if is_remote(uris[0]) else THREADS
    with ThreadPoolExecutor(min(threads, len(uris))) as pool:
        for table, left in pool.map(work, uris):
            tables.append(table)
            files.left.take(left)
            if say is not None and time.monotonic() - spoken >= LINE_EVERY:
                spoken = time.monotonic()
                say(f"listing: {len(tables):,} of {len(uris):,} files read")
    return pa.concat_tables(tables)


def index_table(
    uris: pa.Array | pa.ChunkedArray,
    labels: Any = None,
    offsets: Any = None,
    sizes: Any = None,
) -> pa.Table:
    """A table of INDEX_SCHEMA without ids; what is not given is null."""
    count = len(uris)

    def column(values: Any, kind: pa.DataType) -> Any:
        return pa.nulls(count, kind) if values is None else values

    names = INDEX_SCHEMA.names[1:]
    kinds = [INDEX_SCHEMA.field(name).type for name in names]
    given = (uris, labels, offsets, sizes)
    columns = [column(v, kind) for v, kind in zip(given, kinds, strict=True)]
    return pa.table(dict(zip(names, columns, strict=True)))


def _folder_rows(data: DataConfig, files: Files, say: Say | None) -> pa.Table:
    """Image files, labeled by their folders."""
    return index_table(files.uris(), _folder_labels(files.names))


def _folder_labels(names: pa.Array) -> pa.Array | None:
    """The first folder below the root, or below train, val and test. string [N]

    None, unless all files lie in such a folder and two differ.
    """
    first = _first_folders(names)
    if first is not None and {name.lower() for name in pc.unique(first).to_pylist()} <= SPLITS:
        first = _first_folders(pc.replace_substring_regex(names, r"(?s)^[^/]*/", ""))
    return first if first is not None and pc.count_distinct(first).as_py() > 1 else None


def _first_folders(names: pa.Array) -> pa.Array | None:
    if not pc.all(pc.match_substring(names, "/")).as_py():
        return None
    return pc.replace_substring_regex(names, r"(?s)/.*$", "")


def _parquet_rows(data: DataConfig, files: Files, say: Say | None) -> pa.Table:
    """Rows of Parquet files; their footers say how many; only labels are read."""
    return _each(lambda uri: _parquet_file(data, uri), files, say)


def _parquet_file(data: DataConfig, uri: str) -> tuple[pa.Table, Omissions]:
    def read(stream: pa.NativeFile) -> tuple[pa.Table, Omissions]:
        parquet, left = pq.ParquetFile(stream), Omissions()
        column = _image_column(data.image_column, parquet.schema_arrow, uri)
        labels = text_column(parquet, data.label_column)
        if labels is None and data.label_column in parquet.schema_arrow.names:
            left.add(f"columns {data.label_column!r} that hold no plain labels", uri)
        if is_bytes(parquet.schema_arrow.field(column).type):
            uris = number(row_uri(uri, column), parquet.metadata.num_rows)
        else:
            uris = lists.addresses(parquet.read(columns=[column])[column], uri)
        return index_table(uris, labels), left

    try:
        return Storage(uri).load(read)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{printable(uri)} cannot be read as Parquet: {one_line(error)}") from None


def number(prefix: str, count: int) -> pa.Array:
    """prefix0, prefix1, ..."""
    rows = pa.array(np.arange(count)).cast(pa.string())
    return pc.binary_join_element_wise(prefix, rows, "")


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column's type is that of bytes, or of structs with a field `bytes`."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether a column's type is that of lists of numbers, one per row."""
    if isinstance(kind, pa.FixedShapeTensorType):
        kind = kind.storage_type
    of_lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (of_lists or pa.types.is_fixed_size_list(kind)):
        return False
    return pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)


def _image_column(name: str, schema: pa.Schema, uri: str) -> str:
    """The column of encoded images, or of their addresses: `name`, or in place of the default the
    only one of bytes, or one of addresses."""
    texts = [field.name for field in schema if _is_text(field.type)]
    if name in texts or (name in schema.names and is_bytes(schema.field(name).type)):
        return name
    fitting = [field.name for field in schema if is_bytes(field.type)]
    paths = lists.column(texts, name)
    if name == IMAGE_COLUMN and len(fitting) == 1:
        return fitting[0]
    if name == IMAGE_COLUMN and not fitting and paths:
        return paths
    hint = f"data.image_column={fitting[0]} would fit" if fitting else "no column holds image bytes"
    if not fitting and any(is_list(field.type) for field in schema):
        hint += "; embeddings are given as data.embeddings=..."
    what = f"is of type {schema.field(name).type}" if name in schema.names else "does not exist"
    raise DataError(
        f"{printable(uri)}: column {name!r} {what}; columns are {', '.join(schema.names)}; {hint}"
    )


def text_column(parquet: pq.ParquetFile, name: str) -> pa.ChunkedArray | None:
    """A column as text, NaN as null; None where there is none, or it holds no plain values."""
    schema = parquet.schema_arrow
    if name not in schema.names or pa.types.is_nested(schema.field(name).type):
        return None
    if is_bytes(schema.field(name).type):  # masks, perhaps: not all are read to see that
        first = next(parquet.iter_batches(64, columns=[name]), None)
        if first is not None and _as_text(first.column(0)) is None:
            return None
    column, rows = parquet.read(columns=[name])[name], parquet.metadata.num_rows
    if len(column) != rows:  # as pyarrow says of other damage; who asked names the file
        raise pa.ArrowInvalid(f"column {name} has {len(column)} rows, the file {rows}")
    return _as_text(column)


def _as_text(values: Any) -> Any:
    try:
        if pa.types.is_floating(values.type):
            values = pc.if_else(pc.is_nan(values), None, values)
        return values.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _tar_rows(data: DataConfig, files: Files, say: Say | None) -> pa.Table:
    """Members of uncompressed tars, by a scan of their headers."""
    return _each(_tar_file, files, say)


def _tar_file(uri: str) -> tuple[pa.Table, Omissions]:
    found = tars.scan(uri)
    columns = (
        pa.array(found.uris, pa.string()),
        pa.array(found.labels, pa.string()),
        pa.array(found.offsets, pa.int64()),
        pa.array(found.sizes, pa.int64()),
    )
    return index_table(*columns), found.left


_READERS: dict[str, Callable[[DataConfig, Files, Say | None], pa.Table]] = {
    "folder": _folder_rows,
    "parquet": _parquet_rows,
    "webdataset": _tar_rows,
}
