"""Copies, on this node, of files that libraries take only from a disk: weights."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

from icce_ray.errors import ConfigError, IcceError, one_line
from icce_ray.rundir import web
from icce_ray.rundir.addresses import is_remote, split_options
from icce_ray.rundir.cache import environment_cache, locked
from icce_ray.rundir.storage import Storage, hastily

BLOCK = 1 << 24  # bytes copied at a time


def check(setting: str, uri: str) -> None:
    """See, within seconds, that a remote file is there. Raises ConfigError."""
    try:
        with hastily():
            if web.is_web(uri):
                web.load(uri, lambda answer: None)
            else:
                _version(uri)
    except (OSError, pa.ArrowException, IcceError) as error:
        raise _unreachable(setting, uri, error) from None


def local(setting: str, uri: str) -> str:
    """The path of a file on this node: itself, or a copy in the node's cache, made once.

    A file of an object store is copied anew after a change, one of the web is not.

    Raises ConfigError: it cannot be had.
    """
    if not is_remote(uri):
        return uri
    try:
        name = split_options(uri)[0].partition("?")[0].rpartition("/")[2]
        digest = hashlib.sha256(f"{uri} {_version(uri)}".encode()).hexdigest()
        target = environment_cache() / "files" / f"{digest[:12]}-{name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            if not target.exists():
                _copy(uri, target)
    except (OSError, pa.ArrowException, IcceError) as error:
        raise _unreachable(setting, uri, error) from None
    return str(target)


def _unreachable(setting: str, uri: str, error: Exception) -> ConfigError:
    if isinstance(error, FileNotFoundError):
        return ConfigError(f"{setting}={uri}: there is no such file")
    return ConfigError(f"{setting}={uri} cannot be fetched: {one_line(error)}")


def _version(uri: str) -> str:
    """What changes with the file; "" for one of the web. Raises as `Storage`."""
    if web.is_web(uri):
        return ""
    info = Storage(uri).info()
    if info.type != pafs.FileType.File:
        raise FileNotFoundError(uri)
    return f"{info.size} {info.mtime_ns}"


def _copy(uri: str, target: Path) -> None:
    temporary = target.with_suffix(".tmp")

    def save(stream: IO[bytes] | Any) -> None:
        with temporary.open("wb") as out:
            shutil.copyfileobj(stream, out, BLOCK)

    try:
        if web.is_web(uri):
            web.load(uri, save)
        else:
            Storage(uri).load(save)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
