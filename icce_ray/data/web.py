"""Images at http:// and https:// addresses: one request each, a few tries.

Of a list of many sites, some do not answer. Unlike a storage, they are not waited for.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request

TIMEOUT = 10.0  # seconds without a byte
TRIES, PAUSE = 3, 1.0  # seconds before the second try, then twice as long
MOST = 1 << 28  # bytes of one image
AGENT = {"User-Agent": "icce_ray"}  # some sites refuse Python's own


def is_web(uri: str) -> bool:
    """Whether an address is one of the web."""
    return uri.lower().startswith(("http://", "https://"))


def read(uri: str) -> bytes:
    """What an address holds.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: no answer, no access, or too large.
    """
    for number in range(TRIES):
        try:
            return _read(uri)
        except (OSError, http.client.HTTPException) as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else None
            if code in (404, 410):
                raise FileNotFoundError(uri) from None
            passing = code is None or code == 429 or code >= 500
            if number == TRIES - 1 or not passing:
                raise OSError(f"{type(error).__name__}: {error}") from None
            time.sleep(PAUSE * 2**number)
    raise AssertionError("unreachable: the last try returns or raises")


def _read(uri: str) -> bytes:
    request = urllib.request.Request(uri, headers=AGENT)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        data: bytes = answer.read(MOST + 1)
    if len(data) > MOST:
        raise OSError(f"more than {MOST:,} bytes")
    return data
