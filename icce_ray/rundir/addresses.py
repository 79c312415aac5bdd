"""Addresses of files: a local path, or a URI: s3://, gs://, abfs://.

Options may follow a URI's path, as in s3://bucket/a?endpoint_override=localhost:9000&scheme=http;
they stay at its end when names are joined to it.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from icce_ray.errors import ArtifactError, one_line, printable

_OPTIONS = re.compile(
    r"\?(?:access_key|allow_\w+|background_writes|blob_storage_\w+|check_\w+|client_\w+"
    r"|credential_kind|dfs_storage_\w+|default_bucket_location|enable_tls|endpoint_override"
    r"|force_virtual_addressing|project_id|region|retry_limit_seconds|scheme|smart_defaults"
    r"|tenant_id|tls_\w+)=[^#]*$"
)


def is_remote(uri: str) -> bool:
    """Whether an address is on an object store, not on a disk of this machine."""
    return "://" in uri and not uri.startswith("file://")


def split_options(uri: str) -> tuple[str, str]:
    """A URI without its options, and these, with the question mark."""
    options = _OPTIONS.search(uri) if "://" in uri else None
    return (uri[: options.start()], options.group()) if options else (uri, "")


def join_uri(folder: str, *names: str) -> str:
    """The URI of a file below a folder; options at the folder's end stay at the end."""
    base, options = split_options(folder)
    return "/".join([base.rstrip("/"), *names]) + options


def split_pattern(uri: str) -> tuple[str, str]:
    """The folder above the first name with *, ? or [ in it, and the pattern below; "" for none."""
    base, options = split_options(uri)
    wild = re.search(r"[*?[]", base)
    end = base.rfind("/", 0, wild.start()) + 1 if wild else len(base)
    return (base[:end] or ".") + options, base[end:]


def absolute(uri: str) -> str:
    """A path that means the same on every worker; URIs stay as they are.

    Raises:
        ArtifactError: an unknown home directory, a link to itself, a name that is too long or not
            UTF-8.
    """
    try:
        path = uri if "://" in uri else str(Path(uri).expanduser().resolve())
        path.encode()
        if "://" not in path:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                Path(path).lstat()  # a name may be too long
    except UnicodeEncodeError:
        raise ArtifactError(f"{printable(uri)}: this path is not valid UTF-8; rename it") from None
    except (RuntimeError, OSError, ValueError) as error:
        reason = one_line(error)
        raise ArtifactError(f"{printable(uri)} is not a path that can be used: {reason}") from None
    return path
