"""One process at a time in a run directory, on a disk and on an object store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pyarrow.fs as pafs
import pytest

from icce_ray.errors import ArtifactError
from icce_ray.rundir import lock
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.lock import LEASE, exclusive, is_gone, this_process


@pytest.fixture
def local(tmp_path):
    return RunDirectory(str(tmp_path / "run"))


@pytest.fixture
def remote(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE", 0.05)
    monkeypatch.setattr(lock, "RENEW_EVERY", 0.5)
    return RunDirectory(s3.uri(f"{tmp_path.name}/run"))


@pytest.fixture(params=["local", "remote"])
def anywhere(request):
    return request.getfixturevalue(request.param)


def ended_process() -> dict[str, object]:
    """What a process that has ended said of itself."""
    code = "import json; from icce_ray.rundir.lock import this_process as p; print(json.dumps(p()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_second_process_is_refused_and_told_who_the_first_is(anywhere):
    with (
        exclusive(anywhere),
        pytest.raises(ArtifactError, match=rf"another process is running.*process {os.getpid()}"),
        exclusive(anywhere),
    ):
        pass
    with exclusive(anywhere):  # and it is free again
        pass


def test_a_process_knows_itself_and_its_end():
    assert not is_gone(this_process())
    gone = ended_process()
    assert is_gone(gone)
    assert not is_gone({**gone, "host": "another-host"})  # nothing is known of it
    assert not is_gone({"state": "running"})  # an older status.json


def test_a_number_that_another_process_got_is_no_life_sign():
    assert is_gone({**this_process(), "born": "another boot/17"})


def lease_of(run, **more):
    owner = {**this_process(), "id": "other", "since": time.time(), "renewed": time.time()}
    run.write_json({**owner, **more}, LEASE)


def test_a_fresh_lease_of_another_host_is_respected(remote):
    lease_of(remote, host="node-7", pid=11)
    with (
        pytest.raises(ArtifactError, match=r"process 11 on host node-7.*lease ends in 1\d\d s"),
        exclusive(remote),
    ):
        pass
    assert remote.read_json(LEASE)["id"] == "other"


@pytest.mark.parametrize("dead", ["expired", "killed here"])
def test_a_lease_that_nobody_holds_is_taken_over(remote, dead):
    more = {"host": "node-7", "renewed": time.time() - lock.LASTS - 1}
    lease_of(remote, **(more if dead == "expired" else ended_process()))
    with exclusive(remote):
        assert remote.read_json(LEASE)["id"] != "other"
    assert not remote.exists(LEASE)


@pytest.mark.parametrize("jump", [-10_000.0, 10_000.0])
def test_a_lease_that_is_renewed_is_respected_whatever_the_clock_says(remote, monkeypatch, jump):
    """As after a clock was set back, or forward."""
    here, ended = time.time, threading.Event()

    def renew():  # by another host's clock
        while not ended.wait(0.1):
            lease_of(remote, host="node-7", pid=11, renewed=here())

    renewing = threading.Thread(target=renew)
    lease_of(remote, host="node-7", pid=11)
    monkeypatch.setattr(lock.time, "time", lambda: here() + jump)
    renewing.start()
    try:
        with pytest.raises(ArtifactError, match="process 11 on host node-7"), exclusive(remote):
            pass
    finally:
        ended.set()
        renewing.join()


def test_of_two_that_start_together_the_later_write_wins(remote, monkeypatch):
    write = lock.Lease._write

    def overtaken(self):
        write(self)
        lease_of(remote, host="node-7", pid=11)

    monkeypatch.setattr(lock.Lease, "_write", overtaken)
    with pytest.raises(ArtifactError, match="process 11 on host node-7"), exclusive(remote):
        pass
    assert remote.read_json(LEASE)["id"] == "other"


def test_a_lease_is_renewed_and_its_loss_is_noticed(remote, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_EVERY", 0.05)
    lost, heard = threading.Event(), []

    def on_lost(text):
        heard.append(text)
        lost.set()

    with exclusive(remote, on_lost):
        first = remote.read_json(LEASE)["renewed"]
        deadline = time.monotonic() + 60
        while remote.read_json(LEASE)["renewed"] == first:
            assert time.monotonic() < deadline
        while not lost.is_set():  # a renewal in flight may overwrite it
            lease_of(remote, host="node-7", pid=11)
            lost.wait(0.2)
            assert time.monotonic() < deadline
    assert "process 11 on host node-7" in heard[0]
    assert remote.read_json(LEASE)["id"] == "other"  # it is not removed by the one that lost it


def test_without_fcntl_a_local_run_has_a_lease(local, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE", 0.0)
    monkeypatch.setattr(lock, "fcntl", None)
    with (
        exclusive(local),
        pytest.raises(ArtifactError, match="another process"),
        exclusive(local),
    ):
        pass
    assert isinstance(local.filesystem, pafs.LocalFileSystem) and not local.exists(LEASE)
