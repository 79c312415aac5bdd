"""Shared fixtures. Ray starts once for the whole session, and never by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

# A local ray.init() would otherwise write a token file to HOME.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two cores serve many processes: none of them needs threads, nor workers before there is work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Where Python may leave no bytecode beside its sources, as in many a container, each of about a
# hundred processes would compile torch and Ray anew: half of the time that they take to start.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    cache = Path(__file__).parent.parent / ".pytest_cache" / "bytecode"
    sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(cache))
    sys.dont_write_bytecode = False


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with 4 logical cores, shared by all tests that ask for it."""
    import logging

    import ray

    from icce_ray.distributed import compat

    ray.shutdown()  # one that a run inside an earlier test has started for itself
    compat.init(
        ray,
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def train_heads() -> Callable[[Any, Any], np.ndarray]:
    """A function of a run directory and its config: trains the run's heads anew, undisturbed, in
    this process, and returns their assignments, [N, H].

    With one thread, as workers that run with OMP_NUM_THREADS=1: more would round differently.
    """
    import torch

    from icce_ray.core import method

    def train(run: Any, config: Any) -> np.ndarray:
        matrix = run.matrix("embeddings", "embedding")
        ids, counts = run.matrix("neighbors", "ids"), run.matrix("selection", "count")
        return method.train_heads(matrix, ids, counts, config, torch.device("cpu"))

    def train_with_one_thread(run: Any, config: Any) -> np.ndarray:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return train(run, config)
        finally:
            torch.set_num_threads(threads)

    return train_with_one_thread


# For `python -c` on Linux: ends the process also where pytest is killed.
DIE_WITH_PARENT = "import ctypes; ctypes.CDLL(None).prctl(1, 9)\n"


@dataclass
class S3:
    """An S3 server in a process of its own, on this machine; its objects are in its memory."""

    port: int
    process: subprocess.Popen[bytes]
    keys: ClassVar = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    bucket: ClassVar = "bucket"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def uri(self, path: str, port: int | None = None) -> str:
        """A URI that names the server by its options."""
        options = f"endpoint_override=127.0.0.1:{port or self.port}&scheme=http"
        return f"s3://{self.bucket}/{path}?{options}"

    def require_known_keys(self, yes: bool) -> None:
        """From now on refuse the keys (it knows none), or accept any."""
        import requests

        url = f"{self.endpoint}/moto-api/reset-auth"
        requests.post(url, data=b"0" if yes else b"inf", timeout=10).raise_for_status()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Meanwhile it takes connections and never answers."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    port = free_port()
    start = (
        f"{DIE_WITH_PARENT}from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", start],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            server = S3(port, process)
            _create_bucket(server)
            yield server
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _create_bucket(server: S3) -> None:
    import requests

    deadline = time.monotonic() + 60
    while True:
        try:
            requests.put(f"{server.endpoint}/{server.bucket}", timeout=10).raise_for_status()
            return
        except requests.ConnectionError:
            assert server.process.poll() is None, "the S3 server ended"
            assert time.monotonic() < deadline, "the S3 server does not come up"
            time.sleep(0.05)


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3:
    """The server, and its keys in the environment, but not its address."""
    for name, value in s3_server.keys.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("ICCE_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ICCE_RAY_STORAGE_TIMEOUT", "1")
    monkeypatch.setenv("ICCE_RAY_STORAGE_PAUSE", "0.1")
    monkeypatch.setenv("ICCE_RAY_STORAGE_PATIENCE", "60")
    return s3_server
