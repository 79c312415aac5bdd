"""Files at http:// and https:// addresses: one request each, a few tries.

Of a list of many sites, some do not answer. Unlike a storage, they are not waited for.
urllib is imported when it is needed: a command that only looks at a run waits for no import.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import IO, TypeVar

T = TypeVar("T")

TIMEOUT = 10.0  # seconds without a byte
TRIES, PAUSE = 3, 1.0  # seconds before the second try, then twice as long
MOST = 1 << 28  # bytes of one image
AGENT = {"User-Agent": "icce_ray"}  # some sites refuse Python's own


def is_web(uri: str) -> bool:
    """Whether an address is one of the web."""
    return uri.lower().startswith(("http://", "https://"))


def read(uri: str) -> bytes:
    """A whole small file. Raises as `load`, and OSError for one that is large."""
    data = load(uri, lambda answer: answer.read(MOST + 1))
    if len(data) > MOST:
        raise OSError(f"more than {MOST:,} bytes")
    return data


def load(uri: str, work: Callable[[IO[bytes]], T]) -> T:
    """work(answer), called again with a new answer after a failure that may pass.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: no answer, or no access.
    """
    import http.client
    import urllib.error

    for number in range(TRIES):
        try:
            with _opened(uri) as answer:
                return work(answer)
        except (OSError, http.client.HTTPException) as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else None
            if code in (404, 410):
                raise FileNotFoundError(uri) from None
            passing = code is None or code == 429 or code >= 500
            if number == TRIES - 1 or not passing:
                raise OSError(f"{type(error).__name__}: {error}") from None
            time.sleep(PAUSE * 2**number)
    raise AssertionError("unreachable: the last try returns or raises")


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[IO[bytes]]:
    import urllib.request

    request = urllib.request.Request(uri, headers=AGENT)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        yield answer
