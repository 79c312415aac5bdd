"""Reading, decoding and cropping images. PIL, numpy and pyarrow only: what decodes needs no torch.

An image's address (`uri` in the index) is one of

    FILE                   an image file; also http:// and https://
    TAR#MEMBER             with `offset` and `size`: bytes inside an uncompressed tar
    FILE.parquet#ROW       a row of the column `image`; of another column: FILE.parquet#COLUMN/ROW

where FILE is a local path or an s3://, gs:// URI (options such as ?region=... may follow the path).
Shapes: S side of the square input.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from icce_ray.core.preprocess import BadImage
from icce_ray.errors import DataError, IcceError, NoAnswerError, one_line, printable
from icce_ray.rundir import web
from icce_ray.rundir.addresses import is_remote
from icce_ray.rundir.schemas import runs_code
from icce_ray.rundir.storage import Storage

IMAGE_COLUMN = "image"
THREADS = 4  # concurrent reads of local files
REMOTE_THREADS = 32  # ... of an object store, where each read waits for the network
GAP = 1 << 18  # bytes between two tar members that are read along rather than skipped
RANGE = 1 << 25  # bytes read from a tar at once, at most (a larger member is read whole)

warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters is raised or quarantined

_ROW = re.compile(r"(?P<file>.*)#(?:(?P<column>[^#]+)/)?(?P<row>\d+)", re.DOTALL)
_TAR = re.compile(r".*?\.tar(?:\?[^#]*)?(?=#)", re.DOTALL | re.IGNORECASE)


def row_uri(file: str, column: str = IMAGE_COLUMN) -> str:
    """The address of a Parquet row, up to the row's number."""
    return f"{file}#" if column == IMAGE_COLUMN else f"{file}#{column}/"


def is_row(uri: str) -> bool:
    """Whether an address without an offset is that of a Parquet row."""
    return _ROW.fullmatch(uri) is not None


def member_uri(tar: str, name: str) -> str:
    """The address of a tar's member. Raises DataError where it could not be taken apart again."""
    uri = f"{tar}#{name}"
    if "#" in uri[: len(tar)] + name and tar_of(uri) != tar:
        raise DataError(
            f"{printable(tar)}: the # in this name, or in that of its member {printable(name)}, is "
            "taken for the border between the two. Rename the folder, the tar or the member"
        )
    return uri


def tar_of(uri: str) -> str:
    """The tar of a member's address: up to the # after .tar; else, of any name, to the last #."""
    ending = _TAR.match(uri)
    return ending.group() if ending else uri.rpartition("#")[0]


def read_bytes(uri: str, offset: int | None = None, size: int | None = None) -> bytes:
    """The encoded bytes of one image.

    Raises:
        BadImage: where it cannot be read.
        NoAnswerError: as read_many.
    """
    data = read_many([uri], [offset], [size])[0]
    if isinstance(data, BadImage):
        raise data
    return data


def read_many(
    uris: Sequence[str],
    offsets: Sequence[int | None] | None = None,
    sizes: Sequence[int | None] | None = None,
) -> list[bytes | BadImage]:
    """The encoded bytes of many images, in their order; in place of an unreadable one, why.

    Each tar and Parquet file is read in few large ranges, and several files at a time. A storage
    that fails for a while is waited for: that says nothing of an image.

    Raises:
        NoAnswerError: the storage did not come back in time.
    """
    offsets = offsets or [None] * len(uris)
    sizes = sizes or [None] * len(uris)
    out: list[bytes | BadImage] = [BadImage("not read")] * len(uris)
    jobs = _jobs(uris, offsets, sizes, out)
    if len(jobs) == 1:
        jobs[0]()
        return out
    threads = REMOTE_THREADS if any(is_remote(uri) for uri in uris[:1]) else THREADS
    with ThreadPoolExecutor(min(threads, max(1, len(jobs)))) as pool:
        try:
            for _ in pool.map(lambda job: job(), jobs):
                pass
        except NoAnswerError:
            pool.shutdown(cancel_futures=True)  # each of the others would wait as long
            raise
    return out


def _jobs(
    uris: Sequence[str],
    offsets: Sequence[int | None],
    sizes: Sequence[int | None],
    out: list[bytes | BadImage],
) -> list[Callable[[], None]]:
    """One job per plain file, per range of a tar, and per Parquet file; each fills its part."""
    jobs: list[Callable[[], None]] = []
    tars: dict[str, list[tuple[int, int, int]]] = {}
    tables: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for position, (uri, offset, size) in enumerate(zip(uris, offsets, sizes, strict=True)):
        if offset is not None:
            tars.setdefault(tar_of(uri), []).append((int(offset), int(size or 0), position))
        elif row := _ROW.fullmatch(uri):
            key = (row["file"], row["column"] or IMAGE_COLUMN)
            tables.setdefault(key, []).append((int(row["row"]), position))
        else:
            jobs.append(partial(_read_file, uri, position, out))
    for file, members in tars.items():
        jobs += [partial(_read_range, file, part, out) for part in _ranges(members)]
    for (file, column), rows in tables.items():
        jobs.append(partial(_read_rows, file, column, rows, out))
    return jobs


def _unreadable(error: Exception) -> BadImage:
    if isinstance(error, FileNotFoundError):
        return BadImage("not found")
    return BadImage(f"cannot be read: {one_line(error, 200)}")


def _read_file(uri: str, position: int, out: list[bytes | BadImage]) -> None:
    try:
        out[position] = web.read(uri) if web.is_web(uri) else Storage(uri).read()
    except NoAnswerError:
        raise
    except (OSError, pa.ArrowException, IcceError, ValueError) as error:
        out[position] = _unreadable(error)


def _ranges(members: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Members (offset, size, position) of a tar, grouped into ranges to read at once."""
    groups: list[list[tuple[int, int, int]]] = []
    for member in sorted(members):
        last = groups[-1] if groups else None
        near = last and member[0] - (last[-1][0] + last[-1][1]) <= GAP
        if last and near and member[0] + member[1] - last[0][0] <= RANGE:
            last.append(member)
        else:
            groups.append([member])
    return groups


def _read_range(
    file: str, members: list[tuple[int, int, int]], out: list[bytes | BadImage]
) -> None:
    start = members[0][0]
    stop = max(offset + size for offset, size, _ in members)

    try:
        data = Storage(file).read_at(stop - start, start)
    except NoAnswerError:
        raise
    except (OSError, pa.ArrowException, IcceError, ValueError) as error:
        for _, _, position in members:
            out[position] = _unreadable(error)
        return
    for offset, size, position in members:
        out[position] = data[offset - start : offset - start + size]


@lru_cache(maxsize=64)
def _group_ends(file: str) -> np.ndarray:
    """Row numbers at which the row groups of a Parquet file end."""
    metadata = Storage(file).load(lambda stream: pq.ParquetFile(stream).metadata)
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return np.cumsum(rows, dtype=np.int64)


@lru_cache(maxsize=1)  # the next batch of rows is usually in the same group
def _group(file: str, column: str, group: int) -> pa.ChunkedArray:
    """One row group's encoded images."""

    def read(stream: pa.NativeFile) -> pa.ChunkedArray:
        parquet = pq.ParquetFile(stream)
        kind = parquet.schema_arrow.field(column).type
        if runs_code(kind):
            raise ValueError("Python objects are not read")
        nested = pa.types.is_struct(kind)
        leaf = f"{column}.bytes" if nested else column
        values = parquet.read_row_group(group, columns=[leaf]).column(column)
        return pc.struct_field(values, "bytes") if nested else values

    return Storage(file).load(read)


def _read_rows(
    file: str, column: str, rows: list[tuple[int, int]], out: list[bytes | BadImage]
) -> None:
    try:
        ends = _group_ends(file)
        groups = np.searchsorted(ends, [row for row, _ in rows], side="right")
        for group in np.unique(groups):
            chosen = [rows[i] for i in np.flatnonzero(groups == group)]
            if group == len(ends):
                values: list[Any] = [None] * len(chosen)
            else:
                first = int(ends[group - 1]) if group else 0
                take = pa.array([row - first for row, _ in chosen])
                values = _group(file, column, int(group)).take(take).to_pylist()
            for (_, position), value in zip(chosen, values, strict=True):
                out[position] = value if isinstance(value, bytes) else BadImage("no image bytes")
    except NoAnswerError:
        raise
    except (OSError, pa.ArrowException, IcceError, KeyError, ValueError) as error:
        for _, position in rows:
            if isinstance(out[position], BadImage):
                out[position] = _unreadable(error)
