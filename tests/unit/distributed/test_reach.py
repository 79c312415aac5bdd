"""Whether a cluster answers, against servers of this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from icce_ray.distributed import reach

SETTINGS = bytes([0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0, 255, 255])  # as a gRPC server begins


@pytest.fixture
def serve() -> Iterator[Callable[[bytes | None], str]]:
    """serve(answer) listens and gives that to each caller (None: nothing); returns HOST:PORT."""
    listening: list[socket.socket] = []

    def start(answer: bytes | None) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)

        def loop() -> None:
            kept = []
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                kept.append(caller)
                if answer is not None:
                    caller.recv(100)
                    caller.sendall(answer)

        threading.Thread(target=loop, daemon=True).start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in listening:
        server.close()


def unused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_what_answers_like_ray(serve: Callable[[bytes | None], str]) -> None:
    place = serve(SETTINGS)
    assert reach.why_not(place) is None
    assert reach.why_not(f"ray://{place}") is None


def test_nobody(monkeypatch: pytest.MonkeyPatch, serve: Callable[[bytes | None], str]) -> None:
    monkeypatch.setattr(reach, "EACH", 0.1)
    for address in (unused(), f"ray://{unused()}", serve(None)):
        started = time.monotonic()
        assert reach.why_not(address, patience=0.2) == "nobody answers"
        assert time.monotonic() - started < 5
    assert str(reach.why_not("no.such.host.invalid:6379", 0)).startswith("nobody answers (")


def test_something_else(serve: Callable[[bytes | None], str]) -> None:
    """A dashboard, and a Redis at Ray's own port."""
    for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR unknown command\r\n"):
        assert reach.why_not(serve(answer), patience=0) == "what answers is not Ray"


def test_a_head_node_that_is_just_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter(["nobody answers", "nobody answers", None])
    monkeypatch.setattr(reach, "_try", lambda place: next(reasons))
    assert reach.why_not("head:6379", patience=1) is None


def test_other_forms_are_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_try", str)
    for address in ("auto", "local", "plugin://somewhere", "head:port"):
        assert reach.why_not(address, 0) is None
    assert reach.why_not("ray://head", 0) == str(("head", 10001))
    assert reach.why_not("[::1]:6379", 0) == str(("::1", 6379))


def test_encrypted_clusters_are_only_called(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[[bytes | None], str]
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    assert reach.why_not(serve(None)) is None
