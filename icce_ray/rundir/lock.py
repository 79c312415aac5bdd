"""One process at a time in a run directory, and which one it is.

On a local disk the operating system holds the lock, and drops it when the process ends. An object
store has no locks: there the process keeps a lease, a small object that it renews while it works.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from icce_ray.errors import ArtifactError, IcceError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.storage import hastily

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEASE = "lease.json"
LASTS = 180.0  # seconds after its last renewal that a lease holds
RENEW_EVERY = 30.0  # seconds between renewals
SETTLE = 2.0  # seconds between writing a lease and reading it back


# --- which process -------------------------------------------------------------------------------


def this_process() -> dict[str, Any]:
    """Host, pid and start of this process, for status.json and for locks."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}


def is_gone(process: Mapping[str, Any]) -> bool:
    """Whether a process of this host, as `this_process` described it, has ended.

    False for a process of another host, of which nothing can be known here, and on Windows.
    """
    pid = process.get("pid")
    if process.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    if fcntl is None:  # Windows, where os.kill ends a process, whatever the signal
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it exists, and belongs to another user
        pass
    return _born(pid) != process.get("born")  # else another process got its number


def _born(pid: int) -> str | None:
    """When a process started, in the kernel's ticks since this boot; None without /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    # The second field, the command's name in parentheses, may hold blanks.
    return f"{boot}/{text.rpartition(')')[2].split()[19]}"


# --- one at a time -------------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive(
    run: RunDirectory,
    on_lost: Callable[[str], None] = lambda text: None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """Keep other processes out of a run directory.

    Args:
        run: the run directory.
        on_lost: called with a sentence, from another thread, where another process took over a
            lease that this one could not renew in time.
        say: called with a sentence before a wait of half a minute.

    Raises:
        ArtifactError: another process works there.
    """
    if run.is_local and fcntl is not None:
        with _locked(run):
            yield
        return
    lease = Lease(run, on_lost, say)
    lease.take()
    try:
        yield
    finally:
        lease.release()


@contextlib.contextmanager
def _locked(run: RunDirectory) -> Iterator[None]:
    """Hold a lock of the operating system on a file of the run's cache, which names its owner."""
    path = run.node_file("running")
    with contextlib.ExitStack() as held:
        with run.writing(path):  # on a disk that may be full
            stream = held.enter_context(path.open("ab+", buffering=0))
            _claim(run, stream)
        yield


def _claim(run: RunDirectory, stream: FileIO) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ArtifactError(
            f"another process is running in {run.uri}{_read_owner(stream)}. Wait for it "
            "(icce-ray status), or choose another run_dir=..."
        ) from None
    stream.truncate(0)
    owner = f"process {os.getpid()} on host {socket.gethostname()}, since {_clock()}"
    stream.write(owner.encode())


def _read_owner(stream: FileIO) -> str:
    stream.seek(0)
    owner = stream.read().decode(errors="replace").strip()
    return f" ({owner})" if owner else ""


def _clock(seconds: float | None = None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


class Lease:
    """The right to work in a run directory on an object store, while it is renewed.

    The object `lease.json` names the owner: host, pid and a random id. A thread renews it every
    RENEW_EVERY seconds. It is respected for LASTS seconds after its last renewal, less where its
    owner is a process of this host that has ended. One that has run out is watched for as long as
    a renewal may take, since clocks differ and jump: who renews it is alive, whatever the time.

    Limits: object stores offer no atomic test-and-set through pyarrow. After writing its lease, a
    process waits SETTLE seconds and reads it back; of two that start together, the later write
    wins and the other is refused. Two may pass where one write takes longer than SETTLE. A process
    cut off from the store for longer than LASTS may lose its lease, which it notices at its next
    renewal.
    """

    def __init__(
        self, run: RunDirectory, on_lost: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        self._run, self._on_lost, self._say = run, on_lost, say
        self._own = {**this_process(), "id": uuid.uuid4().hex, "since": time.time()}
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        """Write the lease and start to renew it. Raises ArtifactError: another process holds it."""
        other = self._read()
        if other is not None and not is_gone(other) and (_is_fresh(other) or self._renewed(other)):
            raise self._refusal(other)
        self._write()
        time.sleep(SETTLE)
        other = self._read()
        if other is not None and other["id"] != self._own["id"]:
            raise self._refusal(other)
        self._thread.start()

    def _renewed(self, other: Mapping[str, Any]) -> bool:
        """Whether a lease is renewed while it is watched."""
        wait = RENEW_EVERY + SETTLE
        self._say(f"{_name(other)} may still work here: looking for {wait:.0f} s whether it does")
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            time.sleep(SETTLE)
            if (self._read() or other) != other:
                return True
        return False

    def release(self) -> None:
        """Stop renewing, and remove the lease if it is still this process's."""
        self._released.set()
        self._thread.join(timeout=RENEW_EVERY)
        with hastily(), contextlib.suppress(IcceError, OSError):
            other = self._read()
            if other is not None and other["id"] == self._own["id"]:
                self._run.delete_file(LEASE)

    def _renew(self) -> None:
        while not self._released.wait(RENEW_EVERY):
            # A failed renewal is tried again at the next turn; the lease outlasts several.
            with hastily(), contextlib.suppress(IcceError, OSError):
                other = self._read()
                if other is not None and other["id"] != self._own["id"]:
                    self._on_lost(
                        f"{_name(other)} took over {self._run.uri}: the storage could not be "
                        f"reached from here for more than {LASTS:.0f} s"
                    )
                    return
                self._write()

    def _read(self) -> dict[str, Any] | None:
        if not self._run.exists(LEASE):
            return None
        try:
            found = self._run.read_json(LEASE)
        except ArtifactError:  # deleted meanwhile, or damaged
            return None
        return found if isinstance(found, dict) and "id" in found else None

    def _write(self) -> None:
        self._run.write_json({**self._own, "renewed": time.time()}, LEASE)

    def _refusal(self, other: Mapping[str, Any]) -> ArtifactError:
        left = min(LASTS, max(1.0, other.get("renewed", 0.0) + LASTS - time.time()))
        return ArtifactError(
            f"another process is running in {self._run.uri}: {_name(other)}. Wait for it, or "
            f"choose another run_dir=...; if it is gone, this lease ends in {left:.0f} s"
        )


def _name(owner: Mapping[str, Any]) -> str:
    since = _clock(owner.get("since"))
    return f"process {owner.get('pid')} on host {owner.get('host')}, since {since}"


def _is_fresh(lease: Mapping[str, Any]) -> bool:
    """Whether its last renewal is less than LASTS seconds ago, or ahead, by this host's clock."""
    return abs(time.time() - lease.get("renewed", 0.0)) < LASTS
