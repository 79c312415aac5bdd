"""What one node keeps of a run for itself: files that are derived from it and can be rebuilt.

They lie beside a local run, in its `.cache`; for a run on an object store, in this node's cache.
Processes of one node share them, and the pages of memory-mapped ones.
Shapes: N rows.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from icce_ray.errors import ArtifactError, StageError
from icce_ray.rundir.storage import Storage, full_disk

try:
    import fcntl
except ImportError:  # Windows: two processes may build the same file, each its own copy
    fcntl = None  # type: ignore[assignment]


def environment_cache() -> Path:
    """Node-local cache: ICCE_RAY_CACHE, else XDG_CACHE_HOME/icce_ray, else ~/.cache/icce_ray."""
    if root := os.environ.get("ICCE_RAY_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "icce_ray"


def free_bytes(folder: Path) -> int:
    """Free disk space where a folder is, or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file of this node. Raises OSError: it cannot be made."""
    with path.with_suffix(".lock").open("w") as stream:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class NodeCache:
    """The node files of one run directory."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @property
    def folder(self) -> Path:
        """Where the files lie on this node. It need not exist yet."""
        if self._storage.is_local:
            return Path(self._storage.root) / ".cache"
        return environment_cache() / hashlib.sha256(self._storage.uri.encode()).hexdigest()[:12]

    def file(self, name: str) -> Path:
        """The path of a node file, whose folder exists. Raises StageError: it cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._explain(error, self.folder) from None
        return self.folder / name

    @contextlib.contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Hold the lock of a node file, so that one process of the node builds it."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(path))
            except OSError as error:
                raise self._explain(error, path) from None
            yield

    def array(
        self, name: str, key: str, rows: int, parts: Callable[[], Iterable[np.ndarray]]
    ) -> np.ndarray:
        """A read-only, memory-mapped array [N, ...] of this node, built where it is missing.

        Args:
            name: what it holds; arrays of the same name and another key are removed.
            key: what it was made from.
            rows: N.
            parts: makes its consecutive parts [., ...].

        Raises:
            ArtifactError: the parts have another number of rows.
            StageError: a full disk.
        """
        target = self.file(f"{name}-{key}.npy")
        if (found := _mapped(target, rows)) is not None:
            return found
        with self.lock(target):
            if _mapped(target, rows) is None:
                for old in target.parent.glob(f"{name}-*.npy"):
                    old.unlink(missing_ok=True)
                self.write_matrix(target, rows, parts())
        return np.load(target, mmap_mode="r", allow_pickle=False)

    def write_matrix(self, target: Path, rows: int, parts: Iterable[np.ndarray]) -> None:
        """A node file of N rows from consecutive parts [., ...], whole or not at all."""
        # Plain writes, not a writable map: on a full disk a map kills the process.
        temporary, written = target.with_suffix(".tmp"), 0
        try:
            with temporary.open("wb") as stream:
                for part in parts:
                    if not written:
                        _write_npy_header(stream, (rows, *part.shape[1:]), part.dtype)
                    stream.write(np.ascontiguousarray(part).data)
                    written += len(part)
            if written != rows:
                raise ArtifactError(f"{target} was to have {rows} rows, but {written} came")
            temporary.replace(target)
        except OSError as error:
            raise self._explain(error, target) from None
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Around what a library writes to a node file through its `.tmp`.

        Raises:
            StageError: a full disk, or one that cannot be written.
        """
        try:
            yield
        except OSError as error:
            raise self._explain(error, path) from None
        except RuntimeError as error:  # faiss's
            if "No space left" not in str(error) and "File too large" not in str(error):
                raise
            raise self._explain(OSError(errno.ENOSPC, str(error)), path) from None
        finally:
            path.with_suffix(".tmp").unlink(missing_ok=True)

    def _explain(self, error: OSError, path: Path) -> Exception:
        """For a node file that cannot be written: what to do."""
        local = self._storage.is_local
        where = "" if local else ", or name a folder on another disk by ICCE_RAY_CACHE,"
        if full := full_disk(error, str(path), where):
            return full
        if local:
            return StageError(
                f"{self._storage.uri} cannot be written: {error}. Choose another run_dir=..."
            )
        return StageError(
            f"this node's cache cannot be written: {error}. Name another folder by ICCE_RAY_CACHE."
        )


def _mapped(path: Path, rows: int) -> np.ndarray | None:
    """The array of a node file; None where it is not there, or damaged: it is made anew."""
    with contextlib.suppress(Exception):  # numpy raises almost anything for a damaged header
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        return found if isinstance(found, np.ndarray) and found.shape[:1] == (rows,) else None
    return None


def _write_npy_header(stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    kind = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
