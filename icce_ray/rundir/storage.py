"""Files on any pyarrow file system: addresses, patience while a storage fails, clear errors.

An address is a local path or a URI: s3://, gs://, abfs://. Options may follow a URI's path, as in
s3://bucket/runs/1?endpoint_override=localhost:9000&scheme=http; they stay at its end when names are
joined to it. For S3 the environment works as well: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import tenacity

from icce_ray.errors import ArtifactError, NoAnswerError, StorageError

# Each can be set in the environment, as ICCE_RAY_STORAGE_PATIENCE and so on; all in seconds.
PATIENCE = 300.0  # how long a storage that fails is tried again, in all


PAUSE = 1.0  # before the second try; then twice as long each time ...


LONGEST_PAUSE = 30.0  # ... up to this


TIMEOUT = 8.0  # without a byte, after which one request counts as failed


CONNECT_TIMEOUT = 3.0


REQUESTS = 2  # of the storage's own client, before its failure is ours to handle


T = TypeVar("T")


Listener = Callable[[str, bool], None]  # what happens; whether the storage answers again


_log = logging.getLogger(__name__)


_thread = threading.local()


_listeners: list[Listener] = []


def _seconds(name: str) -> float:
    """A constant of this module, or what the environment says instead."""
    return float(os.environ.get(f"ICCE_RAY_STORAGE_{name}") or globals()[name])


_OPTIONS = re.compile(
    r"\?(?:access_key|allow_\w+|background_writes|blob_storage_\w+|check_\w+|client_\w+"
    r"|credential_kind|dfs_storage_\w+|default_bucket_location|enable_tls|endpoint_override"
    r"|force_virtual_addressing|project_id|region|retry_limit_seconds|scheme|smart_defaults"
    r"|tenant_id|tls_\w+)=[^#]*$"
)


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def split_options(uri: str) -> tuple[str, str]:
    """A URI without its options, and these, with the question mark."""
    found = _OPTIONS.search(uri) if "://" in uri else None
    return (uri[: found.start()], found.group()) if found else (uri, "")


def join_uri(folder: str, *names: str) -> str:
    """The URI of a file below a folder; options at the folder's end stay at the end."""
    base, options = split_options(folder)
    return "/".join([base.rstrip("/"), *names]) + options


def absolute(uri: str) -> str:
    """A path that means the same on every worker; URIs stay as they are."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system and the path in it of a local path or a URI.

    Raises:
        ArtifactError: for a scheme pyarrow does not know, or options it does not understand.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), absolute(uri)
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ArtifactError(f"cannot open {uri}: {_short(error)}{_hint(uri)}") from None
    return _tuned(filesystem, uri), path


def _tuned(filesystem: pafs.FileSystem, uri: str) -> pafs.FileSystem:
    """S3: soon to say that nobody answers (a request would take 99 s), small files at one request.

    GCS: the same, where the limit would be 15 minutes.
    """
    kinds = {"s3": _tune_s3, "gcs": _tune_gcs}
    if filesystem.type_name not in kinds or "tls_" in uri or "retry_limit_seconds" in uri:
        return filesystem  # what it was told in other ways does not survive being rebuilt
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

    Not so what a file system says of the file, of rights or of space.
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
    """One line, without what concerns the storage's operators alone."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\s*\(Request ID: \S+\)", "", text)[:300].rstrip(". ")


def _hint(uri: str) -> str:
    """How each kind of storage is told who asks."""
    hints = {
        "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role",
        "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the "
        "machine's service account (gs://anonymous@BUCKET for public ones)",
        "abfs": "abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH with `az login`, "
        "AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, or a managed identity",
    }
    scheme = uri.partition("://")[0]
    found = hints.get({"gcs": "gs", "abfss": "abfs"}.get(scheme, scheme))
    return f". Credentials come from: {found}" if found else ""


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


def patiently(work: Callable[[], T], uri: str) -> T:
    """The result of a request that may be repeated; failures that may pass are waited out.

    Raises:
        StorageError: what will not pass: no access, no such bucket.
        NoAnswerError: what might have passed, but has not after PATIENCE seconds.
        OSError: what concerns the file: missing, a full disk, a local file system's failure.
    """
    tries = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_exponential_jitter(
            _seconds("PAUSE"), LONGEST_PAUSE, jitter=_seconds("PAUSE") / 2
        ),
        stop=tenacity.stop_after_delay(0 if _hasty() else _seconds("PATIENCE")),
        before_sleep=_tell_failure,
        reraise=True,
    )
    try:
        found = tries(work)
    except (OSError, pa.ArrowException) as error:
        if not may_pass(error):  # an answer as well
            _tell_answer(tries.statistics)
        raise explain(error, uri) from None
    _tell_answer(tries.statistics)
    return found


def read(uri: str) -> bytes:
    """A whole file. Raises as `patiently`."""

    def work() -> bytes:
        filesystem, path = locate(uri)
        # Not a stream: that is read in several requests, between which the object may change.
        with filesystem.open_input_file(path) as file:
            return file.read()

    return patiently(work, uri)


def _tell_answer(statistics: dict[str, Any]) -> None:
    if statistics.get("attempt_number", 1) > 1:
        _tell(f"the storage answers again, after {statistics['idle_for']:.0f} s of waiting", True)


def _tell_failure(state: tenacity.RetryCallState) -> None:
    assert state.outcome is not None and state.next_action is not None
    error = state.outcome.exception()
    assert error is not None
    pause = state.next_action.sleep
    _tell(f"the storage does not answer ({_short(error)}): trying again in {pause:.0f} s", False)


def _tell(text: str, well: bool) -> None:
    for listener in _listeners:
        listener(text, well)
    if not _listeners:  # in Ray's workers
        _log.warning(text)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Meanwhile tell `listener` of failures that are waited out, from whichever thread."""
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


def check(uri: str) -> None:
    """See, within seconds, that a remote folder can be listed. It need not exist; its bucket must.

    Raises:
        ArtifactError: a URI that cannot be understood.
        StorageError: no answer, no access, no such bucket.
    """
    if not is_remote(uri):
        return
    filesystem, path = locate(uri)
    selector = pafs.FileSelector(path)
    with hastily(), contextlib.suppress(FileNotFoundError):
        patiently(lambda: filesystem.get_file_info(selector), uri)
