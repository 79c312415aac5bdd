"""The run directory: artifacts of stages, their manifests and fingerprints.

A run directory lives on any pyarrow file system (local, s3://, gs://). Each stage owns one folder.
Its `_manifest.json` is written last, atomically; a folder without one is unfinished work. While a
stage works, `_partial.json` holds the fingerprint it works for, so that a killed run resumes only
what fits. No pickle is written or read.

Shapes: N images, D features, M neighbors, H heads, K clusters.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import io
import json
import platform
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.errors import ArtifactError, one_line
from icce_ray.rundir.cache import NodeCache, free_bytes
from icce_ray.rundir.schemas import runs_code, to_matrix
from icce_ray.rundir.storage import Storage

# 2: search and selection are two stages; 3: components are whitened; 4: new file names
FORMAT_VERSION = 4

# What is no table begins with an underscore: readers of a folder of Parquet files skip it.
MANIFEST = "_manifest.json"
PARTIAL = "_partial.json"
OLD_MANIFEST = "manifest.json"  # up to version 3


@dataclass(frozen=True)
class Manifest:
    """What a finished stage says of itself: _manifest.json."""

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
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def fingerprint(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash of a stage's settings and of the fingerprints of what it reads."""
    content = json.dumps([FORMAT_VERSION, stage, settings, inputs], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, as `key: old -> new`."""
    keys: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            keys += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            keys.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return keys


@contextlib.contextmanager
def stored(what: str) -> Iterator[None]:
    """Around the use of stored files that a user may have edited, or a disk has damaged.

    Raises ArtifactError: where they do not hold what they should.
    """
    try:
        yield
    except (
        *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError),
        pa.ArrowException,  # where a column is of another type
    ) as error:
        raise ArtifactError(
            f"{what} is damaged, or was made by another version of icce_ray "
            f"({type(error).__name__}: {one_line(error, 150)})"
        ) from error


@dataclass(frozen=True)
class Content:
    """What a stage's folder holds, from one look at it."""

    manifest: Manifest | None = None  # of a finished stage
    partial: Mapping[str, Any] | None = None  # of an unfinished one: fingerprint, settings, inputs
    empty: bool = True  # no work that would be lost


class RunDirectory:
    """A run's files. Holds only where they are, so that it travels to Ray workers.

    Requests are patient and raise as `storage.Storage` does.
    """

    def __init__(self, uri: str, places: Mapping[str, str] | None = None) -> None:
        """Name a run directory; nothing is opened yet.

        Args:
            uri: local path or URI.
            places: of folders that lie elsewhere in the run, as a sweep's trials have them: the
                name that stages use -> where it lies, both relative to the run.
        """
        self.storage = Storage(uri)
        self.places = dict(places or {})

    @property
    def uri(self) -> str:
        """The address, absolute."""
        return self.storage.uri

    @property
    def filesystem(self) -> pafs.FileSystem:
        """pyarrow's file system, for libraries that take one."""
        return self.storage.filesystem

    @property
    def root(self) -> str:
        """The address as a path in `filesystem`."""
        return self.storage.root

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine's file system."""
        return self.storage.is_local

    @property
    def cache(self) -> NodeCache:
        """What this node keeps of the run."""
        return NodeCache(self.storage)

    def place(self, folder: str) -> str:
        """Where a folder, or a file in one, lies, relative to the run."""
        first, slash, rest = folder.partition("/")
        return self.places.get(first, first) + slash + rest

    def path(self, *parts: str) -> str:
        """The path of a file in `filesystem`."""
        return self.storage.path(*self._inside(parts))

    def address(self, *parts: str) -> str:
        """The path or URI of a file, as a user would give it."""
        return self.storage.address(*self._inside(parts))

    def _inside(self, parts: Sequence[str]) -> builtins.list[str]:
        return [self.place("/".join(parts))] if parts else []

    # reading

    def exists(self, *parts: str) -> bool:
        """Whether there is such a file or folder."""
        return self.storage.exists(*self._inside(parts))

    def list(self, folder: str, suffix: str = "") -> list[str]:
        """Sorted names of the files directly inside a folder; empty where there is none."""
        names = self._names(folder, pafs.FileType.File)
        return [n for n in names if n.endswith(suffix) and not n.startswith(".tmp-")]

    def folders(self, folder: str) -> builtins.list[str]:
        """Sorted names of the folders directly inside one; empty where there is none."""
        return self._names(folder, pafs.FileType.Directory)

    def _names(self, folder: str, kind: pafs.FileType) -> builtins.list[str]:
        infos = self.storage.list(*self._inside([folder]))
        return [info.base_name for info in infos if info.type == kind]

    def read_bytes(self, *parts: str) -> bytes:
        """A whole file. Raises ArtifactError: there is none."""
        try:
            return self.storage.read(*self._inside(parts))
        except FileNotFoundError:
            raise ArtifactError(f"{self.path(*parts)} is missing") from None

    def read_json(self, *parts: str) -> Any:
        """The content of a JSON file. Raises ArtifactError: missing or damaged."""
        with contextlib.suppress(ValueError):
            return json.loads(self.read_bytes(*parts))
        # An object may have been replaced by a longer one after its size was asked for.
        try:
            return json.loads(self.read_bytes(*parts))
        except ValueError as error:
            raise ArtifactError(
                f"{self.path(*parts)} is damaged ({error}). Delete its folder, and run again to "
                "have it made anew."
            ) from None

    def read_settings(self) -> Mapping[str, Any]:
        """The tree of config.yaml. Raises ArtifactError: missing or damaged."""
        import yaml  # not before: most commands that look at a run need no settings

        if not self.exists("config.yaml"):
            raise ArtifactError(f"{self.uri} is not a run directory: it has no config.yaml")
        with contextlib.suppress(yaml.YAMLError):
            tree = yaml.safe_load(self.read_bytes("config.yaml"))
            if isinstance(tree, dict):
                return tree
        raise ArtifactError(f"{self.path('config.yaml')} is damaged: it holds no settings")

    def read_table(self, *parts: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet file, or all shards of a folder, in name order (without side files).

        Raises ArtifactError: missing, damaged, or without one of the columns.
        """
        if parts[-1].endswith(".parquet"):
            return self._read_parquet(parts, columns)
        names = self._shards("/".join(parts))
        if not names:
            raise ArtifactError(f"{self.path(*parts)} holds no Parquet files")
        return pa.concat_tables([self._read_parquet([*parts, name], columns) for name in names])

    def _shards(self, folder: str) -> builtins.list[str]:
        return [n for n in self.list(folder, ".parquet") if not n.startswith("_")]

    def _read_parquet(self, parts: Sequence[str], columns: Sequence[str] | None) -> pa.Table:
        chosen = None if columns is None else [*columns]

        def read(files: pafs.FileSystem, path: str) -> pa.Table:
            return pq.read_table(path, columns=chosen, filesystem=files)

        try:
            table = self.storage.attempt(read, *self._inside(parts))
        except FileNotFoundError:
            raise ArtifactError(f"{self.path(*parts)} is missing") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(f"{self.path(*parts)} cannot be read: {error}") from None
        if any(runs_code(field.type) for field in table.schema):
            raise ArtifactError(f"{self.path(*parts)} holds Python objects, which are not read")
        return table

    # writing: whole or not at all

    def write_bytes(self, data: bytes | memoryview, *parts: str) -> None:
        """Write a file so that a reader sees all of it or nothing. Raises StageError: full disk."""
        self.storage.write(data, *self._inside(parts))

    def write_json(self, value: Any, *parts: str) -> None:
        """Write a JSON file; numpy scalars and arrays become numbers and lists."""
        self.write_bytes(json.dumps(value, indent=1, default=_plain).encode(), *parts)

    def write_table(self, table: pa.Table, *parts: str) -> None:
        """Write a Parquet file."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", compression_level=1)
        self.write_bytes(buffer.getbuffer(), *parts)

    def delete(self, folder: str) -> None:
        """Remove a folder and everything in it, the manifest first."""
        self.delete_file(folder, MANIFEST)
        self.storage.delete_folder(*self._inside([folder]))

    def delete_file(self, *parts: str) -> None:
        """Remove a file; nothing happens where there is none."""
        self.storage.delete(*self._inside(parts))

    # manifests

    def look(self, folder: str) -> Content:
        """What a stage's folder holds: one listing, and one read where there is something.

        Raises ArtifactError: a damaged manifest, or one of another version.
        """
        names = set(self.list(folder))
        if MANIFEST in names:
            return Content(self._manifest(folder), empty=False)
        if OLD_MANIFEST in names:
            self._refuse_old(folder)
        partial = self.read_json(folder, PARTIAL) if PARTIAL in names else None
        return Content(None, partial, empty=not names - {PARTIAL} and not self.folders(folder))

    def manifest(self, folder: str) -> Manifest | None:
        """The manifest of a finished stage, or None. Raises ArtifactError where it is damaged."""
        if self.exists(folder, MANIFEST):
            return self._manifest(folder)
        if self.exists(folder, OLD_MANIFEST):
            self._refuse_old(folder)
        return None

    def _manifest(self, folder: str) -> Manifest:
        content = self.read_json(folder, MANIFEST)
        if not isinstance(content, dict) or not _fits(content):
            raise ArtifactError(
                f"{self.path(folder, MANIFEST)} is not a manifest this version can read"
            )
        manifest = Manifest(**content)
        if manifest.format != FORMAT_VERSION:
            raise self._other_version(folder, manifest.format)
        return manifest

    def _refuse_old(self, folder: str) -> None:
        content = self.read_json(folder, OLD_MANIFEST)
        if isinstance(content, dict) and _fits(content):  # else it is a file of the user's
            raise self._other_version(folder, content.get("format", "?"))

    def _other_version(self, folder: str, number: Any) -> ArtifactError:
        return ArtifactError(
            f"{self.path(folder)} was made by another version of icce_ray (format {number}; this "
            f"one reads {FORMAT_VERSION}). Run again with another run_dir=..., or use the version "
            "that made it."
        )

    def partial(self, folder: str) -> Mapping[str, Any] | None:
        """What an unfinished stage was working for: fingerprint, settings, inputs; or None."""
        if not self.exists(folder, PARTIAL) or self.exists(folder, MANIFEST):
            return None
        return self.read_json(folder, PARTIAL)

    def begin(self, folder: str, mark: Mapping[str, Any], keep: bool = False) -> bool:
        """Start or continue a stage. Returns True where earlier partial work may be reused.

        keep: files of other work stay until the stage replaces them; else they go now.
        """
        if self.partial(folder) == json.loads(json.dumps(mark)):
            return True
        if keep:
            self.delete_file(folder, MANIFEST)
        else:
            self.delete(folder)
        self.write_json(mark, folder, PARTIAL)
        return False

    def finish(self, folder: str, manifest: Manifest) -> None:
        """Declare a stage done: its manifest is the last thing written."""
        self.write_json(vars(manifest), folder, MANIFEST)
        self.delete_file(folder, PARTIAL)

    # node files

    def matrix(self, folder: str, column: str, embedded: int | None = None) -> np.ndarray:
        """A column of a finished stage as one read-only, memory-mapped array [N, ...].

        Built once per node from the Parquet shards, whose rows are in image_id order, and kept
        in the node's cache. Processes of one node share its pages.

        embedded: rows of the embeddings, where the stage must have as many.

        Raises:
            ArtifactError: the stage is not finished, its shards do not fit its manifest, or it has
                another number of rows than asked for.
            StageError: no space in the cache.
        """
        done = self.manifest(folder)
        if done is None:
            raise ArtifactError(f"{self.path(folder)} is not finished; run that stage first")
        rows, name = done.rows, f"{self.matrix_name(folder)}-{column}"
        if embedded not in (None, rows):
            raise ArtifactError(
                f"{self.path(folder)} has {rows} rows, the embeddings {embedded}. "
                "They are of different runs: use --overwrite, or another run_dir."
            )
        return self.cache.array(name, done.id, rows, lambda: self._parts(folder, column, rows))

    def matrix_name(self, folder: str) -> str:
        """What the node files made of a folder are called: after its place, so that the trials of a
        sweep share those of what they share, and do not remove each other's."""
        return self.place(folder).replace("/", "-")

    def _parts(self, folder: str, column: str, rows: int) -> Iterator[np.ndarray]:
        """A column's shards one by one. Raises ArtifactError: not of one shape, or not N rows."""
        names = self._shards(folder)
        first, count = None, 0
        for name in names:
            part = to_matrix(self.read_table(folder, name, columns=[column])[column])
            kind = (part.shape[1:], part.dtype)
            first, count = first or kind, count + len(part)
            if kind != first:
                raise ArtifactError(f"{self.path(folder, name)} does not fit {names[0]}")
            yield part
        if first is None or count != rows:
            raise ArtifactError(
                f"{self.path(folder)} has {count} rows, its manifest {rows}. Run that stage again "
                "(--overwrite)."
            )

    def node_file(self, name: str) -> Path:
        """Where this node keeps something that is derived from the run. See NodeCache.file."""
        return self.cache.file(name)

    def node_lock(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of a node file, so that one process of the node builds it."""
        return self.cache.lock(path)

    def writing(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Around what a library writes to a node file. See NodeCache.writing."""
        return self.cache.writing(path)

    def write_matrix(self, target: Path, rows: int, parts: Iterable[np.ndarray]) -> None:
        """A node file of N rows from consecutive parts. See NodeCache.write_matrix."""
        self.cache.write_matrix(target, rows, parts)

    def free_bytes(self) -> int | None:
        """Free disk space below a local run directory; None for object stores."""
        return free_bytes(Path(self.root)) if self.is_local else None


class Snapshot:
    """What the stages' folders of a run hold, each looked at once until it is forgotten.

    One command needs one: a stage that finishes, or is deleted, is the only one looked at again.
    Trials of a sweep that share artifacts share a snapshot, as folders go by their places.
    """

    def __init__(self) -> None:
        self._known: dict[str, Content] = {}

    def look(self, run: RunDirectory, folder: str) -> Content:
        """What a folder holds. Raises as RunDirectory.look."""
        path = run.path(folder)
        if path not in self._known:
            self._known[path] = run.look(folder)
        return self._known[path]

    def forget(self, run: RunDirectory, folder: str) -> None:
        """Look at a folder again when it is asked for."""
        self._known.pop(run.path(folder), None)


# What JSON gives for the kinds of a manifest's fields.
_STORED: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "Sequence": list,
    "Mapping": dict,
}


def _fits(content: Mapping[str, Any]) -> bool:
    """Whether a manifest has the fields it needs, and each is of its kind."""
    known = {one.name: one for one in fields(Manifest)}
    needed = {name for name, one in known.items() if one.default is one.default_factory is MISSING}
    return needed <= set(content) <= set(known) and all(
        isinstance(value, _STORED[str(known[name].type).partition("[")[0]])
        for name, value in content.items()
    )


def _plain(value: Any) -> Any:
    """numpy scalars and arrays as JSON values."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
