"""Listing of images: folders, Parquet files, WebDataset tars, on any pyarrow file system.

The order is that of the addresses, compared as bytes; an image's position in it is its id. Names
are Arrow arrays: a million Python strings would take ten times as much memory.
Shapes: N images.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.config.schema import DataConfig
from icce_ray.data.reading import REMOTE_THREADS, THREADS, row_uri
from icce_ray.errors import DataError, StorageError, one_line
from icce_ray.rundir.schemas import INDEX_SCHEMA
from icce_ray.rundir.storage import (
    Storage,
    absolute,
    hastily,
    is_remote,
    join_uri,
    split_options,
)

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")
PARQUET = ("parquet", "pq")
TARS = ("tar",)
FORMATS = {"folder": IMAGES, "parquet": PARQUET, "webdataset": TARS}

BLOCK = 65_536  # names held as Python strings at a time
MARK = "\0"  # stands for a name; none has it
TAR_BUFFER = 1 << 23  # bytes read at once while an object store's tar streams by

T = TypeVar("T")


@dataclass(frozen=True)
class Listing:
    """The images of a run."""

    table: pa.Table  # INDEX_SCHEMA
    kind: str  # folder, parquet, webdataset
    found: int  # images before data.limit


@dataclass(frozen=True)
class Files:
    """Files below a place, sorted by name."""

    base: str  # URI or absolute path of the place
    names: pa.Array  # string [N], relative to it; [""] where the place is itself a file

    @property
    def is_file(self) -> bool:
        """Whether the place is itself a file."""
        return len(self.names) == 1 and not self.names[0].as_py()

    def uris(self) -> pa.Array:
        """Addresses of the files, string [N]."""
        if self.is_file:
            return pa.array([self.base])
        before, _, after = join_uri(self.base, MARK).rpartition(MARK)
        return pc.binary_join_element_wise(before, self.names, after, "")

    def suffixes(self) -> pa.Array:
        """What follows the last dot of each file's name, in lower case; "" where there is none."""
        if self.is_file:
            return pa.array([suffix_of(self.base)])
        last = pc.replace_substring_regex(self.names, r"(?s)^.*/", "")
        after = pc.utf8_lower(pc.replace_substring_regex(last, r"(?s)^.*\.", ""))
        return pc.if_else(pc.match_substring(last, "."), after, "")

    def only(self, suffixes: Sequence[str]) -> Files:
        """Those of the files that end so."""
        return Files(self.base, self.names.filter(_any_of(self.suffixes(), suffixes)))


def _any_of(values: pa.Array, wanted: Sequence[str]) -> pa.Array:
    return pc.is_in(values, value_set=pa.array(list(wanted), pa.string()))


def list_images(data: DataConfig, setting: str = "data.path") -> Listing:
    """List the images of `data.path`, with labels where there are any.

    setting: what the user gave the path as, for messages.

    Raises:
        DataError: nothing there, an ambiguous mixture, damaged or unsuitable files, an address
            that occurs twice.
    """
    assert data.path is not None
    files = find_files(data.path, setting)
    kind = _kind(data, files, setting)
    # a single file may have any name, where the user gave its format
    chosen = files if data.format != "auto" and files.is_file else files.only(FORMATS[kind])
    if not len(chosen.names):
        raise _nothing(data, kind, files, setting)
    reader: Callable[..., pa.Table] = {
        "folder": _folder_rows,
        "parquet": _parquet_rows,
        "webdataset": _tar_rows,
    }[kind]
    table = reader(data, chosen)
    if not table.num_rows:
        raise _nothing(data, kind, files, setting)
    return finish(table, kind, data.limit)


def finish(table: pa.Table, kind: str, limit: int | None) -> Listing:
    """Give ids, after dropping all but `limit` evenly spaced rows. Raises DataError: duplicates."""
    total = table.num_rows
    if kind != "folder":
        _refuse_duplicates(table["uri"])
    if limit is not None and limit < total:
        table = table.take(pa.array(evenly(total, limit)))
    ids = pa.array(np.arange(table.num_rows, dtype=np.int64))
    columns = [ids, *(table[name] for name in INDEX_SCHEMA.names[1:])]
    return Listing(pa.Table.from_arrays(columns, schema=INDEX_SCHEMA), kind, total)


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
        f"{len(twice)} addresses occur more than once, the first is {twice[0]['values'].as_py()}: "
        "every image needs its own"
    )


def find_files(path: str, setting: str = "data.path") -> Files:
    """All files below a folder, or the file itself; hidden ones left out.

    setting: what the user gave the path as, for messages.

    Raises:
        DataError: where there is nothing, or it cannot be listed.
    """
    base = absolute(path)
    try:
        place = Storage(base)
        info = place.info()
        if info.type == pafs.FileType.File:
            return Files(base, pa.array([""]))
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"{setting}={path}: there is no such file or folder")
        walk = _walk(place) if is_remote(base) else _walk_local(place.root)
        blocks = [pa.array(names, pa.string()) for names in walk]
    except UnicodeError as error:
        raise DataError(
            f"{setting}={path}: a file name is not valid UTF-8 ({error.object!r}); rename it"  # type: ignore[attr-defined]
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{setting}={path} cannot be listed: {one_line(error)}") from None
    names = pa.concat_arrays(blocks) if blocks else pa.array([], pa.string())
    return Files(base, names.take(pc.sort_indices(names)))


def _walk_local(root: str) -> Iterator[list[str]]:
    """Names of the files below a folder of this machine, relative to it, some at a time.

    Links are followed, but no folder is entered from within itself.
    """
    todo = [("", frozenset({os.path.realpath(root)}))]
    names: list[str] = []
    while todo:
        folder, above = todo.pop()
        with os.scandir(os.path.join(root, folder)) as entries:  # noqa: PTH118
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_file():
                    names.append(folder + entry.name)
                elif not entry.is_dir():
                    continue  # a broken link, a socket
                elif not entry.is_symlink():
                    todo.append((f"{folder}{entry.name}/", above))
                elif (real := os.path.realpath(entry.path)) not in above:
                    todo.append((f"{folder}{entry.name}/", above | {real}))
                if len(names) == BLOCK:
                    yield names
                    names = []
    yield names


def _walk(place: Storage) -> Iterator[list[str]]:
    """The same for any file system, a folder at a time: its client lists a folder as a whole."""
    todo = [""]
    while todo:
        folder = todo.pop()
        infos = place.list(*folder.split("/")[:-1])
        shown = [info for info in infos if not info.base_name.startswith(".")]
        names = [(info.type, folder + info.base_name) for info in shown]
        todo += [f"{name}/" for kind, name in names if kind == pafs.FileType.Directory]
        yield [name for kind, name in names if kind == pafs.FileType.File]


def check_exists(setting: str, uri: str) -> None:
    """See, within seconds, that the file or folder of a setting is there. Raises DataError."""
    try:
        with hastily():
            info = Storage(uri).info()
    except StorageError as error:
        raise DataError(f"{setting}={error}") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{setting}={uri} cannot be read: {one_line(error)}") from None
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"{setting}={uri}: there is no such file or folder")


def suffix_of(name: str) -> str:
    """What follows the last dot of a file's address, in lower case; "" where there is none."""
    base = split_options(name)[0].rpartition("/")[2]
    return base.rpartition(".")[2].lower() if "." in base else ""


def _kind(data: DataConfig, files: Files, setting: str) -> str:
    """The format: as given, or by the files' names."""
    if data.format != "auto":
        return data.format
    suffixes = files.suffixes()
    counts = {k: pc.sum(_any_of(suffixes, ends)).as_py() or 0 for k, ends in FORMATS.items()}
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
    looked = "; ".join(f"{name}: {_dotted(ends)}" for name, ends in kinds.items())
    seen = sorted(set(pc.unique(files.suffixes()).to_pylist()) - {""})
    text = f"{setting}={data.path} holds no images. Looked for {looked}"
    if kind == "webdataset" and "tar" in seen:
        text += " with members KEY.jpg, KEY.png, ..., KEY being all before the first dot"
    if seen:
        text += f". Found {len(files.names):,} files ending in {_dotted(seen[:8])}"
    if "gz" in seen or "tgz" in seen:
        text += " (compressed tars have to be unpacked: images are read out of tars by position)"
    return DataError(text + ".")


def _dotted(suffixes: Sequence[str]) -> str:
    return ", ".join(f".{suffix}" for suffix in suffixes)


def _each(work: Callable[[str], T], uris: Sequence[str]) -> list[T]:
    """Results of many files in their order, several at a time."""
    threads = REMOTE_THREADS if is_remote(uris[0]) else THREADS
    with ThreadPoolExecutor(min(threads, len(uris))) as pool:
        return list(pool.map(work, uris))


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


def _folder_rows(data: DataConfig, files: Files) -> pa.Table:
    """Image files. Labels: the first folder below the root, where all lie in one and two differ."""
    labels = None
    if pc.all(pc.match_substring(files.names, "/")).as_py():
        first = pc.replace_substring_regex(files.names, r"(?s)/.*$", "")
        labels = first if pc.count_distinct(first).as_py() > 1 else None
    return index_table(files.uris(), labels)


def _parquet_rows(data: DataConfig, files: Files) -> pa.Table:
    """Rows of Parquet files; their footers say how many; only labels are read."""
    uris = files.uris().to_pylist()
    return pa.concat_tables(_each(lambda uri: _parquet_file(data, uri), uris))


def _parquet_file(data: DataConfig, uri: str) -> pa.Table:
    def read(stream: pa.NativeFile) -> pa.Table:
        parquet = pq.ParquetFile(stream)
        _check_image_column(data.image_column, parquet.schema_arrow, uri)
        labels = _label_column(parquet, data.label_column)
        return index_table(
            number(row_uri(uri, data.image_column), parquet.metadata.num_rows), labels
        )

    try:
        return Storage(uri).load(read)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{uri} cannot be read as Parquet: {one_line(error)}") from None


def number(prefix: str, count: int) -> pa.Array:
    """prefix0, prefix1, ..."""
    rows = pa.array(np.arange(count)).cast(pa.string())
    return pc.binary_join_element_wise(prefix, rows, "")


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _check_image_column(name: str, schema: pa.Schema, uri: str) -> None:
    if name in schema.names and _is_bytes(schema.field(name).type):
        return
    fitting = [field.name for field in schema if _is_bytes(field.type)]
    hint = f"data.image_column={fitting[0]} would fit" if fitting else "no column holds image bytes"
    what = f"is of type {schema.field(name).type}" if name in schema.names else "does not exist"
    raise DataError(f"{uri}: column {name!r} {what}; columns are {', '.join(schema.names)}; {hint}")


def _label_column(parquet: pq.ParquetFile, column: str) -> Any:
    """The label column as text; None where there is none or it holds no plain values."""
    if column not in parquet.schema_arrow.names:
        return None
    kind = parquet.schema_arrow.field(column).type
    if pa.types.is_nested(kind):
        return None
    return parquet.read(columns=[column])[column].cast(pa.string()).combine_chunks()


def _tar_rows(data: DataConfig, files: Files) -> pa.Table:
    """Members of uncompressed tars, by a scan of their headers."""
    return pa.concat_tables(_each(_tar_file, files.uris().to_pylist()))


def _tar_file(uri: str) -> pa.Table:
    try:
        return Storage(uri).attempt(lambda files, path: _scan_tar(files, path, uri))
    except (OSError, tarfile.TarError, pa.ArrowException) as error:
        raise DataError(f"{uri} cannot be read as a tar: {one_line(error)}") from None


def _scan_tar(filesystem: pafs.FileSystem, path: str, uri: str) -> pa.Table:
    images: list[tuple[str, int, int]] = []
    keys: list[str] = []
    labels: dict[str, str] = {}
    for member, read in _members(filesystem, path):
        key, suffix = _key(member.name)
        if suffix in IMAGES:
            images.append((member.name, member.offset_data, member.size))
            keys.append(key)
        elif suffix == "cls":
            labels[key] = read().decode("utf-8", "replace").strip()
    names = [f"{uri}#{name}" for name, _, _ in images]
    return index_table(
        pa.array(names, pa.string()),
        pa.array([labels.get(key) for key in keys], pa.string()),
        pa.array([offset for _, offset, _ in images], pa.int64()),
        pa.array([size for _, _, size in images], pa.int64()),
    )


def _key(name: str) -> tuple[str, str]:
    """WebDataset's convention: the sample's key is all before the base name's first dot."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.parent / stem), suffix.lower() if stem else ""


def _members(
    filesystem: pafs.FileSystem, path: str
) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Regular members of a tar, each with a function that reads it (at once or never).

    A local file is sought through; an object store's is streamed, since a request per header would
    take longer than to read all of it.
    """
    local = isinstance(filesystem, pafs.LocalFileSystem)
    opened = (
        filesystem.open_input_file(path)
        if local
        else filesystem.open_input_stream(path, buffer_size=TAR_BUFFER)
    )
    with opened as stream, tarfile.open(fileobj=stream, mode="r:" if local else "r|") as tar:
        for member in tar:
            if member.isreg():
                yield member, lambda member=member: tar.extractfile(member).read()  # type: ignore
            tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps all it has seen
