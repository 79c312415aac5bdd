"""Whether a Ray cluster answers at an address: Ray itself would try for more than ten minutes."""

from __future__ import annotations

import os
import socket
import time
from urllib.parse import urlsplit

from icce_ray.errors import one_line

PATIENCE = 15.0  # seconds, of a head node that is just starting
EACH = 5.0  # seconds, of one try
PORTS = {"": 6379, "ray": 10001}  # Ray's own, where an address names none

# Ray speaks gRPC, whose every connection begins so: a greeting, and a frame of settings each way.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_KIND, _SETTINGS = 3, 4  # place of a frame's kind, and that of settings


def why_not(address: str, patience: float = PATIENCE) -> str | None:
    """Why nobody can be joined at HOST:PORT or ray://HOST:PORT, after at most about `patience`
    seconds. None where something like Ray answers, or where the address is of another form."""
    place = _place(address)
    if place is None:
        return None
    end = time.monotonic() + patience
    while (reason := _try(place)) is not None and time.monotonic() < end:
        time.sleep(min(1.0, patience / 10))
    return reason


def _place(address: str) -> tuple[str, int] | None:
    scheme, found, rest = address.rpartition("://")
    if scheme not in PORTS or (not found and ":" not in rest):
        return None  # auto, local, or what a plugin of Ray knows
    try:
        parts = urlsplit(f"//{rest}")
        return (parts.hostname or "", parts.port or PORTS[scheme])
    except ValueError:  # no number
        return None


def _try(place: tuple[str, int]) -> str | None:
    try:
        with socket.create_connection(place, EACH) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return None  # the greeting would have to be encrypted
            connection.sendall(_GREETING)
            answer = connection.recv(9)
    except (TimeoutError, ConnectionError):
        return "nobody answers"
    except (OSError, UnicodeError) as error:  # the name is not known, the network is not there
        return f"nobody answers ({one_line(error, 100)})"
    return None if answer[_KIND : _KIND + 1] == bytes([_SETTINGS]) else "what answers is not Ray"
