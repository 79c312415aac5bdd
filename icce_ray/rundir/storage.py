"""Bytes on any file system: patience while a storage fails, clear errors.

For S3 the environment works as well as a URI's options: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from icce_ray.errors import (
    ArtifactError,
    ConfigError,
    IcceError,
    NoAnswerError,
    StageError,
    StorageError,
    one_line,
)
from icce_ray.rundir import web
from icce_ray.rundir.addresses import absolute, is_remote, join_uri, split_options

# Each can be set in the environment, as ICCE_RAY_STORAGE_PATIENCE and so on; all in seconds.
PATIENCE = 300.0  # how long a failing request is repeated, in all
PAUSE = 1.0  # before the second try; then twice as long each time ...
LONGEST_PAUSE = 30.0  # ... up to this
TIMEOUT = 8.0  # without a byte, after which one request counts as failed

CONNECT_TIMEOUT = 3.0  # seconds
REQUESTS = 2  # tries of the storage's own client, before its failure is ours to handle

T = TypeVar("T")
Listener = Callable[[str, bool], None]  # what happens; whether the storage answers again

_log = logging.getLogger(__name__)
_thread = threading.local()
_listeners: list[Listener] = []


# --- file systems --------------------------------------------------------------------------------


def _seconds(name: str) -> float:
    """One of the first four constants, unless the environment gives another value."""
    given = os.environ.get(f"ICCE_RAY_STORAGE_{name}")
    try:
        return float(given or globals()[name])
    except ValueError:
        text = f"ICCE_RAY_STORAGE_{name}={given} must be a number of seconds"
        raise ConfigError(text) from None


_SECRET = re.compile(r"://[^/@?#]*:[^/@?#]*@|[?&]client_secret=")


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system and the path in it of a local path or a URI.

    Raises:
        ArtifactError: for a scheme pyarrow does not know, or options it does not understand.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), absolute(uri)
    if _SECRET.search(uri):
        raise ArtifactError(
            "an address must not hold a password or secret, which the log and the report would "
            f"show: take it out{_hint(uri)}"
        )
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise ArtifactError(f"{uri} cannot be opened: {_short(error)}{_hint(uri)}") from None
    return _tuned(filesystem, uri), path


def _tuned(filesystem: pafs.FileSystem, uri: str) -> pafs.FileSystem:
    """The same file system with short limits.

    S3's client would take 99 s to say that nobody answers, and two requests for a small file. The
    client of GCS would take 15 minutes.
    """
    kinds = {"s3": _tune_s3, "gcs": _tune_gcs}
    if filesystem.type_name not in kinds or "tls_" in uri or "retry_limit_seconds" in uri:
        return filesystem  # these options do not survive being rebuilt
    rebuild, (options, *_) = filesystem.__reduce__()
    return rebuild({**options, **kinds[filesystem.type_name]()})


def _tune_s3() -> dict[str, Any]:
    return {
        "connect_timeout": CONNECT_TIMEOUT,
        "request_timeout": _seconds("TIMEOUT"),
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=REQUESTS),
        "allow_delayed_open": True,
    }


def _tune_gcs() -> dict[str, Any]:
    from datetime import timedelta

    return {"retry_time_limit": timedelta(seconds=2 * _seconds("TIMEOUT"))}


@lru_cache(maxsize=64)
def _filesystem(root: str) -> tuple[pafs.FileSystem, str]:
    return open_filesystem(root)


def locate(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path in it.

    Unlike pyarrow's own, takes object names with blanks and the like as they are. Raises
    ArtifactError, as open_filesystem does.
    """
    if "://" not in uri:
        return _filesystem("/")[0], uri
    base, query = split_options(uri)
    scheme, _, rest = base.partition("://")
    host, _, path = rest.partition("/")
    filesystem, root = _filesystem(f"{scheme}://{host}/{query}")
    path = path.rstrip("/")
    return filesystem, f"{root.rstrip('/')}/{path}" if path else root


# --- failures ------------------------------------------------------------------------------------

_PASSING = re.compile(
    r"NETWORK_CONNECTION|SLOW_?DOWN|REQUEST_TIME|THROTTL|SERVICE_UNAVAILABLE|INTERNAL_FAILURE"
    r"|INTERNAL_?ERROR|HTTP status(?: code)?:? (?:429|5\d\d)|UNAVAILABLE|DEADLINE_EXCEEDED"
    r"|RESOURCE_EXHAUSTED|curlCode: (?:5|6|7|16|28|35|52|55|56|92)\b|timed? ?out"
    r"|connection (?:refused|reset|closed|aborted)|could not (?:connect|resolve)",
    re.IGNORECASE,
)

_REFUSED = re.compile(
    r"ACCESS_?DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE_DOES_NOT_MATCH"
    r"|EXPIRED_?TOKEN|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION|NOT_SIGNED_UP|INVALID_SIGNATURE"
    r"|HTTP status(?: code)?:? 40[13]|PERMISSION_DENIED|UNAUTHENTICATED|AuthenticationFailed"
    r"|Authentication|access token|credential",
    re.IGNORECASE,
)

_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|ContainerNotFound|bucket does not exist", re.IGNORECASE)

_PASSING_CODES = {
    *(errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE),
    *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EAGAIN, errno.ESTALE),
}

_FULL_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space."""
    code = getattr(error, "errno", None)
    return isinstance(error, OSError) and (
        code in _FULL_CODES or "No space left" in str(error) or "quota exceeded" in str(error)
    )


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: no answer, or a busy or broken server.

    False for what concerns the file itself, rights or space.
    """
    if not _of_storage(error) or is_full(error):
        return False
    if _of_file(error):
        return error.errno in _PASSING_CODES  # type: ignore[attr-defined]
    text = str(error)
    return bool(_PASSING.search(text)) and not _NO_BUCKET.search(text)


def _of_storage(error: BaseException) -> bool:
    # Azure's failures come as plain ArrowException; its subclasses speak of a file's content.
    return isinstance(error, OSError) or type(error) is pa.ArrowException


def _of_file(error: BaseException) -> bool:
    """Whether the operating system, or pyarrow in its place, says what is wrong with a file."""
    code = getattr(error, "errno", None)
    return code is not None or isinstance(error, (FileNotFoundError, PermissionError))


def _short(error: BaseException) -> str:
    """One line, without what only the storage's operators need."""
    text = re.sub(r"\s*\(Request ID: \S+\)", "", one_line(error, 1000))
    return text[:300].rstrip(". ")


# Schemes that pyarrow knows, and what other programs call them.
_SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs", "abfs": "abfs", "abfss": "abfs"}
_ALIASES = {"s3a": "s3", "s3n": "s3", "az": "abfs", "wasb": "abfs", "wasbs": "abfs"}


def _hint(uri: str) -> str:
    """Where each kind of storage takes its credentials from, or how its addresses begin."""
    hints = {
        "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role",
        "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the "
        "machine's service account (gs://anonymous@BUCKET for public ones)",
        "abfs": "abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH with `az login`, "
        "AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, or a managed identity",
    }
    scheme = uri.partition("://")[0]
    if scheme in _SCHEMES:
        return f". Credentials come from: {hints[_SCHEMES[scheme]]}"
    meant = {**_SCHEMES, **_ALIASES}.get(scheme.lower())
    if meant is None:
        known = ". Addresses begin with s3://, gs://, abfs:// or hf://, or are local paths"
        return known + ("; a CSV file may list those of images" if web.is_web(uri) else "")
    return f". Write {meant}:// instead of {scheme}://"


def explain(error: Exception, uri: str) -> Exception:
    """The error to raise for a failed request: one of ours where we can say more."""
    if not is_remote(uri) or not _of_storage(error) or _of_file(error) or is_full(error):
        return error
    text = _short(error)
    if _NO_BUCKET.search(text):
        return StorageError(f"{uri}: there is no such bucket ({text})")
    passing = may_pass(error)
    if _REFUSED.search(text):  # Google's credentials come over the network as well
        kind = NoAnswerError if passing else StorageError
        return kind(f"{uri}: the storage refuses access ({text}){_hint(uri)}")
    if passing:
        return NoAnswerError(
            f"{uri}: the storage does not answer ({text}). Check the network and the address "
            "(AWS_ENDPOINT_URL, endpoint_override). Finished work is kept: run the same command "
            "again once it does."
        )
    return StorageError(f"{uri}: the storage failed ({text})")


def full_disk(error: OSError, where: str, elsewhere: str = "") -> StageError | None:
    """The error for a full disk, or None; `elsewhere` says how to use another disk."""
    if not is_full(error):
        return None
    return StageError(
        f"no disk space left while writing {where}. Free some{elsewhere} and run the same command "
        "again: finished work is kept."
    )


# --- patience ------------------------------------------------------------------------------------


def _patiently(work: Callable[[], T], uri: str) -> T:
    """The result of a request that may be repeated; failures that may pass are waited out."""
    end = time.monotonic() + (0.0 if _hasty() else _seconds("PATIENCE"))
    pause, waited = _seconds("PAUSE"), 0.0
    while True:
        try:
            result = work()
        except (OSError, pa.ArrowException) as error:
            passing = may_pass(error)
            if passing and time.monotonic() < end:
                waited += _wait(min(pause, LONGEST_PAUSE), error)
                pause *= 2
                continue
            if not passing:  # an answer as well
                _report_answer(waited)
            raise explain(error, uri) from None
        except Exception as error:
            if not _is_foreign(uri) or isinstance(error, IcceError):
                raise
            raise StorageError(f"{uri}: the storage failed ({_short(error)})") from None
        _report_answer(waited)
        return result


def _is_foreign(uri: str) -> bool:
    """Whether a client that is no part of pyarrow, such as hf://'s, may raise what it likes."""
    return is_remote(uri) and uri.partition("://")[0] not in _SCHEMES


def _wait(pause: float, error: Exception) -> float:
    """Wait about `pause` seconds, apart from others who wait, and return for how long."""
    pause += random.uniform(0.0, _seconds("PAUSE") / 2)
    _notify(f"the storage does not answer ({_short(error)}): trying again in {pause:.0f} s", False)
    time.sleep(pause)
    return pause


def _report_answer(waited: float) -> None:
    if waited:
        _notify(f"the storage answers again, after {waited:.0f} s of waiting", True)


def _notify(text: str, well: bool) -> None:
    for listener in _listeners:
        listener(text, well)
    if not _listeners:  # in Ray's workers
        _log.warning(text)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Meanwhile notify `listener` of failures that are waited out, from whichever thread."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _hasty() -> bool:
    return getattr(_thread, "hasty", False)


@contextlib.contextmanager
def hastily() -> Iterator[None]:
    """In this thread, meanwhile, failures are not waited out."""
    before, _thread.hasty = _hasty(), True
    try:
        yield
    finally:
        _thread.hasty = before


# --- files ---------------------------------------------------------------------------------------


class Storage:
    """Files at and below one address. Every request is patient. Travels to Ray workers.

    `parts` are names below the address; without any, a method concerns the address itself.

    Every method raises, beside what it says itself:
        ArtifactError: an address that cannot be understood.
        StorageError: a failure that will not pass: no access, no such bucket.
        NoAnswerError: a failure that might have passed, but has not after PATIENCE seconds.
        OSError: what concerns the file: missing (FileNotFoundError), a local disk's failure.
    """

    def __init__(self, uri: str) -> None:
        self.uri = absolute(uri)
        self._opened: tuple[pafs.FileSystem, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "_opened": None}

    @property
    def filesystem(self) -> pafs.FileSystem:
        """pyarrow's file system, for libraries that take one."""
        if self._opened is None:
            self._opened = locate(self.uri)
        return self._opened[0]

    @property
    def root(self) -> str:
        """The address as a path in `filesystem`."""
        _ = self.filesystem
        assert self._opened is not None
        return self._opened[1]

    @property
    def is_local(self) -> bool:
        """Whether it is a plain path of this machine's file system."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, *parts: str) -> str:
        """The path of a file in `filesystem`."""
        return "/".join([self.root.rstrip("/"), *parts]) if parts else self.root

    def address(self, *parts: str) -> str:
        """The path or URI of a file, as a user would give it."""
        return join_uri(self.uri, *parts) if parts else self.uri

    def attempt(self, work: Callable[[pafs.FileSystem, str], T], *parts: str) -> T:
        """work(filesystem, path), called again after a failure that may pass.

        All other requests are made of this one. `work` must be harmless to repeat.
        """
        return _patiently(lambda: work(self.filesystem, self.path(*parts)), self.uri)

    def info(self, *parts: str) -> pafs.FileInfo:
        """Type, size and time of a file or folder; of type NotFound where there is none."""
        return self.attempt(lambda files, path: files.get_file_info(path), *parts)

    def exists(self, *parts: str) -> bool:
        """Whether there is such a file or folder."""
        return self.info(*parts).type != pafs.FileType.NotFound

    def list(self, *parts: str) -> list[pafs.FileInfo]:
        """What is directly inside a folder, sorted by name; empty where there is none."""

        def work(files: pafs.FileSystem, path: str) -> list[pafs.FileInfo]:
            return files.get_file_info(pafs.FileSelector(path, allow_not_found=True))

        return sorted(self.attempt(work, *parts), key=lambda info: info.base_name)

    def load(self, work: Callable[[pa.NativeFile], T], *parts: str) -> T:
        """work(file), called again with the file opened anew after a failure that may pass."""

        def open_and_work(files: pafs.FileSystem, path: str) -> T:
            if self.is_local:
                _refuse_special(path)
            # Not a stream: that is read in several requests, between which the object may change.
            with files.open_input_file(path) as file:
                return work(file)

        return self.attempt(open_and_work, *parts)

    def read(self, *parts: str) -> bytes:
        """A whole file."""
        return self.load(lambda file: file.read(), *parts)

    def read_at(self, size: int, position: int, *parts: str) -> bytes:
        """`size` bytes of a file from `position` on."""
        return self.load(lambda file: file.read_at(size, position), *parts)

    def write(self, data: bytes | memoryview, *parts: str) -> None:
        """Write a file so that a reader sees all of it or nothing.

        Raises:
            StageError: a full disk.
        """
        write = self._write_local if self.is_local else self._write_remote
        try:
            self.attempt(lambda _, path: write(path, data), *parts)
        except OSError as error:
            raise full_disk(error, self.path(*parts)) or error from None

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

    def delete(self, *parts: str) -> None:
        """Remove a file; nothing happens where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.attempt(lambda files, path: files.delete_file(path), *parts)

    def delete_folder(self, *parts: str) -> None:
        """Remove a folder and everything in it; nothing happens where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.attempt(lambda files, path: files.delete_dir(path), *parts)


def _refuse_special(path: str) -> None:
    """Raises OSError: a pipe, which would be waited for, or a device, which may have no end."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:  # pyarrow says it in its own words
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "a pipe, a socket or a device, not a file", path)


def read(uri: str) -> bytes:
    """A whole file. Raises as `Storage`."""
    return Storage(uri).read()


def check(uri: str) -> None:
    """See, within seconds, that a remote folder can be listed. It need not exist; its bucket must.

    Raises:
        ArtifactError: a URI that cannot be understood.
        StorageError: no answer, no access, no such bucket.
    """
    if is_remote(uri):
        with hastily(), contextlib.suppress(FileNotFoundError):
            Storage(uri).attempt(lambda files, path: files.get_file_info(pafs.FileSelector(path)))
