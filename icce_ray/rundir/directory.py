"""The run directory: schemas, atomic writes, manifests, fingerprints.

A run directory lives on any pyarrow file system (local, s3://, gs://). Each stage owns one folder.
Its `manifest.json` is written last, atomically; a folder without one is unfinished work. While a
stage works, `partial.json` holds the fingerprint it works for, so that a killed run resumes only
what fits. No pickle is written or read.

Shapes: N images, D features, M neighbors, H heads, K clusters.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.errors import ArtifactError, StageError
from icce_ray.rundir.cache import environment_cache
from icce_ray.rundir.schemas import to_matrix
from icce_ray.rundir.storage import absolute, is_full, join_uri, locate, patiently

FORMAT_VERSION = 2  # 2: search and selection of neighbors are two stages


MANIFEST = "manifest.json"


PARTIAL = "partial.json"


T = TypeVar("T")


def _full_disk(error: OSError, where: str, elsewhere: str = "") -> StageError | None:
    """The error for a full disk; `elsewhere` says how to use another one."""
    if not is_full(error):
        return None
    return StageError(
        f"no disk space left while writing {where}. Free some{elsewhere} and run the same command "
        "again: finished work is kept."
    )


@dataclass(frozen=True)
class Manifest:
    """What a finished stage says of itself."""

    stage: str
    fingerprint: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    rows: int
    seconds: float
    results: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[str] = ()
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    finished: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())  # noqa: PLW0108
    format: int = FORMAT_VERSION


def library_versions() -> dict[str, str]:
    """Versions of what can change a result."""
    names = ("icce-ray", "ray", "torch", "timm", "faiss-gpu", "numpy", "pyarrow", "scikit-learn")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def fingerprint(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash of a stage's settings and of the fingerprints of what it reads."""
    content = json.dumps([FORMAT_VERSION, stage, settings, inputs], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, as `key: old -> new`."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return found


class RunDirectory:
    """A run's files. Holds only where they are, so that it travels to Ray workers."""

    def __init__(self, uri: str, places: Mapping[str, str] | None = None) -> None:
        """places: of folders that lie elsewhere in the run, as a sweep's trials have them: the name
        that stages use -> where it lies, both relative to the run."""
        self.uri = absolute(uri)
        self.places = dict(places or {})
        self._opened: tuple[pafs.FileSystem, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "places": self.places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["uri"], state["places"])  # type: ignore[misc]

    def place(self, folder: str) -> str:
        """Where a folder, or a file in one, lies, relative to the run."""
        first, slash, rest = folder.partition("/")
        return self.places.get(first, first) + slash + rest

    @property
    def filesystem(self) -> pafs.FileSystem:
        if self._opened is None:
            self._opened = locate(self.uri)
        return self._opened[0]

    @property
    def root(self) -> str:
        _ = self.filesystem
        assert self._opened is not None
        return self._opened[1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, *parts: str) -> str:
        """The path of a file inside this directory's file system."""
        inside = [self.place("/".join(parts))] if parts else []
        return "/".join([self.root.rstrip("/"), *inside])

    def address(self, *parts: str) -> str:
        """The path or URI of a file, as a user would give it."""
        return join_uri(self.uri, *([self.place("/".join(parts))] if parts else []))

    def _patiently(self, work: Callable[[], T]) -> T:
        return patiently(work, self.uri)

    # reading; a storage that fails for a while is waited for

    def exists(self, *parts: str) -> bool:
        path = self.path(*parts)
        info = self._patiently(lambda: self.filesystem.get_file_info(path))
        return info.type != pafs.FileType.NotFound

    def list(self, folder: str, suffix: str = "") -> list[str]:
        """Sorted names of the files directly inside a folder; empty where there is none."""
        names = self._names(folder, pafs.FileType.File)
        return [n for n in names if n.endswith(suffix) and not n.startswith(".tmp-")]

    def folders(self, folder: str) -> builtins.list[str]:
        """Sorted names of the folders directly inside one; empty where there is none."""
        return self._names(folder, pafs.FileType.Directory)

    def _names(self, folder: str, kind: pafs.FileType) -> builtins.list[str]:
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        found = self._patiently(lambda: self.filesystem.get_file_info(selector))
        return sorted(info.base_name for info in found if info.type == kind)

    def read_bytes(self, *parts: str) -> bytes:
        path = self.path(*parts)
        try:
            return self._patiently(lambda: self._read(path))
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing") from None

    def _read(self, path: str) -> bytes:
        # Not a stream: that is read in several requests, between which the object may change.
        with self.filesystem.open_input_file(path) as file:
            return file.read()

    def read_json(self, *parts: str) -> Any:
        try:
            return json.loads(self.read_bytes(*parts))
        except ValueError:
            pass  # an object may have been replaced by a longer one after its size was asked for
        try:
            return json.loads(self.read_bytes(*parts))
        except ValueError as error:
            raise ArtifactError(
                f"{self.path(*parts)} is damaged ({error}). Delete its folder, and run again to "
                "have it made anew."
            ) from None

    def read_table(self, *parts: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet file, or all shards of a folder, in name order (quarantine left out)."""
        folder = parts[-1] if not parts[-1].endswith(".parquet") else None
        if folder is None:
            return self._read_parquet(self.path(*parts), columns)
        names = self.list("/".join(parts), ".parquet")
        names = [name for name in names if not name.startswith("quarantine")]
        if not names:
            raise ArtifactError(f"{self.path(*parts)} holds no Parquet files")
        tables = [self._read_parquet(self.path(*parts, n), columns) for n in names]
        return pa.concat_tables(tables)

    def _read_parquet(self, path: str, columns: Sequence[str] | None) -> pa.Table:
        chosen = None if columns is None else [*columns]

        def read() -> pa.Table:
            return pq.read_table(path, columns=chosen, filesystem=self.filesystem)

        try:
            return self._patiently(read)
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from None

    # writing

    def write_bytes(self, data: bytes | memoryview, *parts: str) -> None:
        """Write a file so that a reader sees all of it or nothing."""
        path = self.path(*parts)
        write = self._write_local if self.is_local else self._write_remote
        try:
            self._patiently(lambda: write(path, data))
        except OSError as error:
            raise _full_disk(error, path) or error from None

    def _write_local(self, path: str, data: bytes | memoryview) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex[:8]}")
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def _write_remote(self, path: str, data: bytes | memoryview) -> None:
        # An object store shows an object only once its upload is complete.
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(data)

    def write_json(self, value: Any, *parts: str) -> None:
        self.write_bytes(json.dumps(value, indent=1, default=_plain).encode(), *parts)

    def write_table(self, table: pa.Table, *parts: str) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", compression_level=1)
        self.write_bytes(buffer.getbuffer(), *parts)

    def delete(self, folder: str) -> None:
        """Remove a folder and everything in it, the manifest first."""
        self.delete_file(folder, MANIFEST)
        path = self.path(folder)
        with contextlib.suppress(FileNotFoundError):
            self._patiently(lambda: self.filesystem.delete_dir(path))

    def delete_file(self, *parts: str) -> None:
        """Remove a file; nothing happens where there is none."""
        path = self.path(*parts)
        with contextlib.suppress(FileNotFoundError):
            self._patiently(lambda: self.filesystem.delete_file(path))

    # manifests

    def manifest(self, folder: str) -> Manifest | None:
        """The manifest of a finished stage, or None. Raises ArtifactError where it is damaged."""
        if not self.exists(folder, MANIFEST):
            return None
        content = self.read_json(folder, MANIFEST)
        try:
            found = Manifest(**content)
        except TypeError:
            raise ArtifactError(
                f"{self.path(folder, MANIFEST)} is not a manifest this version can read"
            ) from None
        if found.format != FORMAT_VERSION:
            raise ArtifactError(
                f"{self.path(folder)} was made by another version of icce_ray (format "
                f"{found.format}; this one reads {FORMAT_VERSION}). Run again with another "
                "run_dir=..., or use the version that made it."
            )
        return found

    def partial(self, folder: str) -> Mapping[str, Any] | None:
        """What an unfinished stage was working for: fingerprint, settings, inputs; or None."""
        if not self.exists(folder, PARTIAL) or self.exists(folder, MANIFEST):
            return None
        return self.read_json(folder, PARTIAL)

    def begin(self, folder: str, mark: Mapping[str, Any]) -> bool:
        """Start or continue a stage. Returns True where earlier partial work may be reused."""
        if self.partial(folder) == json.loads(json.dumps(mark)):
            return True
        self.delete(folder)
        self.write_json(mark, folder, PARTIAL)
        return False

    def finish(self, folder: str, manifest: Manifest) -> None:
        self.write_json(vars(manifest), folder, MANIFEST)
        self.delete_file(folder, PARTIAL)

    # big matrices

    def matrix(self, folder: str, column: str) -> np.ndarray:
        """A column of a finished stage as one read-only, memory-mapped array [N, ...].

        Built once per node from the Parquet shards, whose rows are in image_id order, and kept
        beside a local run, or in this node's cache. Processes of one node share its pages.
        """
        done = self.manifest(folder)
        if done is None:
            raise ArtifactError(f"{self.path(folder)} is not finished; run that stage first")
        name = self.matrix_name(folder)
        target = self.node_file(f"{name}-{column}-{done.id}.npy")
        if not target.exists():
            with self.node_lock(target):
                if not target.exists():
                    _remove_stale(target, f"{name}-{column}-*.npy")
                    self.write_matrix(target, done.rows, self._parts(folder, column, done.rows))
        return np.load(target, mmap_mode="r", allow_pickle=False)

    def matrix_name(self, folder: str) -> str:
        """What the node files made of a folder are called: after its place, so that the trials of a
        sweep share those of what they share, and do not remove each other's."""
        return self.place(folder).replace("/", "-")

    def node_file(self, name: str) -> Path:
        """Where this node keeps something that is derived from the run and can be rebuilt."""
        if self.is_local:
            folder = Path(self.root) / ".cache"
        else:
            folder = environment_cache() / hashlib.sha256(self.uri.encode()).hexdigest()[:12]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cache_error(error, folder) from None
        return folder / name

    def _cache_error(self, error: OSError, path: Path) -> Exception:
        """For a node file that cannot be written: what to do."""
        where = "" if self.is_local else ", or name a folder on another disk by ICCE_RAY_CACHE,"
        if full := _full_disk(error, str(path), where):
            return full
        if self.is_local:
            return StageError(f"{self.uri} cannot be written: {error}. Choose another run_dir=...")
        return StageError(
            f"this node's cache cannot be written: {error}. Name another folder by ICCE_RAY_CACHE."
        )

    @contextlib.contextmanager
    def node_lock(self, path: Path) -> Iterator[None]:
        """Hold the lock of a node file, so that one process of the node builds it."""
        try:
            stream = path.with_suffix(".lock").open("w")
        except OSError as error:
            raise self._cache_error(error, path) from None
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Around what a library writes to a node file through its `.tmp`.

        Raises:
            StageError: no space left, or a cache that cannot be written; the `.tmp` is removed.
        """
        try:
            yield
        except OSError as error:
            raise self._cache_error(error, path) from None
        except RuntimeError as error:  # faiss's
            if "No space left" not in str(error) and "File too large" not in str(error):
                raise
            raise self._cache_error(OSError(errno.ENOSPC, str(error)), path) from None
        finally:
            path.with_suffix(".tmp").unlink(missing_ok=True)

    def _parts(self, folder: str, column: str, rows: int) -> Iterator[np.ndarray]:
        """A column's shards one by one. Raises ArtifactError: not of one shape, or not N rows."""
        names = [n for n in self.list(folder, ".parquet") if not n.startswith("quarantine")]
        first, found = None, 0
        for name in names:
            part = to_matrix(self.read_table(folder, name, columns=[column])[column])
            kind = (part.shape[1:], part.dtype)
            first, found = first or kind, found + len(part)
            if kind != first:
                raise ArtifactError(f"{self.path(folder, name)} does not fit {names[0]}")
            yield part
        if first is None or found != rows:
            raise ArtifactError(
                f"{self.path(folder)} has {found} rows, its manifest {rows}. Run that stage again "
                "(--overwrite)."
            )

    def write_matrix(self, target: Path, rows: int, parts: Iterable[np.ndarray]) -> None:
        """A node file of N rows from consecutive parts [., ...], whole or not at all."""
        # Plain writes, not a writable map: on a full disk a map kills the process.
        temporary, found = target.with_suffix(".tmp"), 0
        try:
            with temporary.open("wb") as stream:
                for part in parts:
                    if not found:
                        _write_npy_header(stream, (rows, *part.shape[1:]), part.dtype)
                    stream.write(np.ascontiguousarray(part).data)
                    found += len(part)
            if found != rows:
                raise ArtifactError(f"{target} was to have {rows} rows, but {found} came")
            temporary.replace(target)
        except OSError as error:
            raise self._cache_error(error, target) from None
        finally:
            temporary.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Free disk space below a local run directory; None for object stores."""
        if not self.is_local:
            return None
        folder = Path(self.root)
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def _write_npy_header(stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    kind = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def _remove_stale(target: Path, pattern: str) -> None:
    for old in target.parent.glob(pattern):
        old.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """numpy scalars and arrays as JSON values."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
