"""What a cluster carries, how long to wait for it, and what is said of lost nodes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
import types
from typing import Any

import pytest

from icce_ray.config.schema import EmbedConfig, RayConfig
from icce_ray.distributed import cluster as clusters
from icce_ray.distributed import stream
from icce_ray.distributed.cluster import Cluster, NodeWatch, Request, Resources, Wait
from icce_ray.errors import StageError


class Fake(Cluster):
    """A cluster of given nodes: (CPU cores, GPUs) each."""

    def __init__(
        self, *nodes: tuple[float, float], wait: int = 1800, gpus: float | None = None
    ) -> None:
        super().__init__(RayConfig(worker_wait=wait, num_gpus=gpus))
        self.nodes = list(nodes)

    def start(self) -> Any:
        entries = [
            {"Alive": True, "NodeID": str(i), "Resources": {"CPU": c, "GPU": g, "memory": 1.0}}
            for i, (c, g) in enumerate(self.nodes)
        ]
        gone = {"Alive": False, "NodeID": "gone", "Resources": {"CPU": 99.0}}
        return types.SimpleNamespace(nodes=lambda: [*entries, gone])


class Heard:
    """A reporter that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.events: list[str] = []
        self.waiting: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def event(self, text: str) -> None:
        self.events.append(text)

    def status(self, state: str, **more: Any) -> None:
        self.waiting.append(more.get("waiting", ""))


# --- which cluster -------------------------------------------------------------------------------


def test_only_a_job_joins_what_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS may be left over from another session."""
    monkeypatch.delenv(clusters.JOB, raising=False)
    monkeypatch.delenv(clusters.VARIABLE, raising=False)
    assert Cluster().address == "local" and Cluster().ignored is None
    monkeypatch.setenv(clusters.VARIABLE, "127.0.0.1:6399")
    assert Cluster().is_local
    assert "ray.address=127.0.0.1:6399 joins it" in str(Cluster().ignored)
    named = Cluster(RayConfig(address="ray://head:10001"))
    assert named.address == "ray://head:10001" and named.ignored is None
    monkeypatch.setenv(clusters.JOB, "{}")
    assert Cluster().address == "127.0.0.1:6399" and Cluster().ignored is None
    assert named.address == "ray://head:10001"
    monkeypatch.setenv(clusters.VARIABLE, "")
    assert Cluster().is_local


@pytest.mark.parametrize("by", ["setting", "job"])
def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """Nothing of Ray is asked."""
    monkeypatch.setattr(clusters.reach, "why_not", lambda address: f"nobody answers {address}")
    if by == "job":
        monkeypatch.setenv(clusters.JOB, "{}")
        monkeypatch.setenv(clusters.VARIABLE, "a:1")
        cluster, origin = Cluster(), "RAY_ADDRESS"
    else:
        cluster, origin = Cluster(RayConfig(address="a:1")), "ray.address"
    ray = types.SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(
        StageError, match=rf"cannot join Ray at a:1 \({origin}\): nobody answers a:1"
    ):
        cluster.start()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """clock.now, in seconds; sleeping moves it on."""
    time = types.SimpleNamespace(now=1000.0)
    time.monotonic = lambda: time.now
    time.sleep = lambda seconds: setattr(time, "now", time.now + seconds)
    monkeypatch.setattr(clusters, "time", time)
    return time


def test_a_head_without_cores_is_no_node_that_works() -> None:
    have = Fake((0, 0), (4, 0), (4, 2)).resources()
    assert (have.nodes, have.cpus, have.gpus, have.memory) == (2, 8, 2, 2.0)
    assert have.describe() == "2 nodes, 8 CPU cores, 2 GPUs"
    assert Fake((0, 0)).resources().describe() == "no node that does work yet"


def test_shares_fit_nodes_and_not_their_sum() -> None:
    have = Fake((0, 0), (4, 0), (2, 1)).resources()
    for request, fits in (
        (Request(4), True),
        (Request(5), False),
        (Request(2, count=3), True),
        (Request(2, count=4), False),
        (Request(1, 1), True),
        (Request(3, 1), False),
        (Request(0.5, 0.5, count=2), True),
        (Request(0, 0.5, count=3), False),
        (Request(0.1, count=60), True),
    ):
        assert request.fits(have) == fits, request
    assert not Request(1).fits(Resources(0, 0, 0, 0.0))
    assert Request(1, 2, count=3).describe() == "3 times 1 CPU core and 2 GPUs"


def test_cores_per_worker_where_nodes_differ() -> None:
    for nodes, workers, expected in (
        ([4], 1, 4),
        ([0, 4], 1, 4),  # the head does not halve the share
        ([4], 2, 2),
        ([4], 3, 1),
        ([4], 9, 1),
        ([4, 4], 2, 4),
        ([0, 4, 4], 4, 2),
        ([8, 2], 2, 4),  # both on the larger node, rather than two cores each
        ([2, 64], 1, 64),
        ([16, 64], 1, 16),  # 64 would leave a fifth of the cores idle
        ([0], 1, 1),
        ([], 3, 1),
    ):
        fake = Fake(*((cpus, 0) for cpus in nodes))
        assert fake.cpus_each(workers, 0) == expected, (nodes, workers)
        assert fake.cpus_each(workers, 1) == 1


def test_workers_are_counted_node_by_node() -> None:
    assert Fake((8, 3), (8, 3)).workers(None, 2) == 2  # a worker's GPUs are on one node
    assert Fake((8, 3), (8, 3)).workers(None, 0.5) == 12
    assert Fake((0, 0)).workers(None, 1) == 1
    assert Fake((0, 0)).workers(6, 1) == 6  # not cut to what is there now


def test_one_of_several_trials_counts_on_its_part_of_the_cores() -> None:
    fake = Fake((0, 0), (8, 2), (3, 0))
    fake.parts = 4
    have = fake.resources()
    assert have.each == ((2, 2), (1, 0)) and (have.cpus, have.gpus) == (3, 2)


def test_a_look_that_never_ends_does_not_hold_up_the_end_of_a_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where Ray's processes have ended: a call waits for a minute, then ends the process."""
    monkeypatch.setattr(clusters, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(clusters, "STOP_WITHIN", 0.0)
    looking, end = threading.Event(), threading.Event()
    watch = NodeWatch(Heard())
    watch.look = lambda: (looking.set(), end.wait())  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt), watch:
        looking.wait()
        raise KeyboardInterrupt
    assert watch._thread.is_alive()
    end.set()


def test_a_pool_for_a_cluster_that_has_no_node_yet() -> None:
    settings = EmbedConfig(max_actors=8)
    pool = stream.plan_pool(Fake((0, 0), gpus=1), settings, rows=10**6)
    assert (pool.most, pool.gpus) == (8, 1)
    assert stream.plan_pool(Fake((0, 0)), EmbedConfig(), rows=10**6).most == 1


def test_small_nodes_beside_large_ones_do_not_shrink_the_actors() -> None:
    pool = stream.plan_pool(Fake((0, 0), (64, 0), (2, 0)), EmbedConfig(max_actors=2), rows=10**6)
    assert pool.threads == 32 and pool.cpus == 16
    assert all(request.fits(Fake((64, 0)).resources()) for request in pool.requests())


def test_waiting_is_said_once_and_ends(clock: Any) -> None:
    fake, heard = Fake((0, 0)), Heard()
    wait = Wait(fake, heard, [Request(2, 1)], "Ask for less")
    for _ in range(4):
        assert not wait.check()
        clock.now += 10
    assert heard.said == [
        "waiting for the cluster to provide 2 CPU cores and 1 GPU; it has no node that does work "
        "yet"
    ]
    assert heard.waiting == heard.said * 4
    fake.nodes.append((4, 1))
    assert wait.check() and not heard.waiting[-1]
    assert heard.said[1:] == ["the cluster now has 1 node, 4 CPU cores, 1 GPU: resuming"]


def test_only_time_without_room_counts(clock: Any) -> None:
    fake, heard = Fake((2, 0), wait=100), Heard()
    wait = Wait(fake, heard, [Request(2)], "Ask for less")
    for _ in range(50):  # a task in the queue behind others
        clock.now += 60
        assert wait.check()
    fake.nodes.clear()
    clock.now += 60
    assert not wait.check()
    clock.now += 90
    assert not wait.check()
    clock.now += 20
    with pytest.raises(StageError, match=r"for 100 s: what was asked for is 2 CPU cores, and the "):
        wait.check()


def test_it_looks_every_other_second_alone(clock: Any) -> None:
    fake, looks = Fake((2, 0)), []
    real = fake.resources
    fake.resources = lambda: (looks.append(1), real())[1]  # type: ignore[method-assign]
    wait = Wait(fake, Heard(), [Request(1)], "")
    for _ in range(100):
        wait.check()
        clock.now += 0.1
    assert len(looks) == 5


def nodes(monkeypatch: pytest.MonkeyPatch, **states: int | None) -> None:
    """Ray's list of nodes: None for alive ones, else the reason of their death."""
    listed = [
        {"NodeID": name, "NodeManagerAddress": f"10.0.0.{name[1:]}", "Alive": state is None,
         "DeathReason": state or 0}
        for name, state in states.items()
    ]  # fmt: skip
    fake = types.SimpleNamespace(is_initialized=lambda: True, nodes=lambda: listed)
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]


def test_lost_nodes_are_reported_and_idle_ones_taken_away_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard = Heard()
    watch = NodeWatch(heard)
    nodes(monkeypatch, n1=None, n2=None, n3=None, n4=2)
    watch.look()
    nodes(monkeypatch, n1=None, n2=2, n3=4, n4=2)
    watch.look()
    watch.look()
    assert heard.events == ["a node was lost (10.0.0.2): others do its work again"]
    nodes(monkeypatch, n1=3, n5=None)  # preempted
    watch.look()
    assert [text[:26] for text in heard.events[1:]] == ["a node was lost (10.0.0.1)"]


def test_little_shared_memory_is_reported_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    free = types.SimpleNamespace(free=64e6)
    monkeypatch.setattr(clusters.shutil, "disk_usage", lambda path: free)
    hint = clusters.shared_memory_hint()
    assert hint is not None and "64 MB" in hint and "--shm-size" in hint
    free.free = 4e9
    assert clusters.shared_memory_hint() is None


def test_a_local_ray_asks_for_a_token_and_keeps_to_this_machine() -> None:
    """Ray's own defaults, which nothing here may undo. Ray is stopped before it starts."""
    code = """
import inspect, os, sys
import ray
from ray._private import worker
from icce_ray.distributed.cluster import Cluster

start, ask, given = ray.init, worker.enable_token_auth_by_default, {}
def init(**options):
    given.update(options)
    start(**options)
def asked():
    ask()
    host = inspect.signature(start).parameters["dashboard_host"].default
    print(os.environ["RAY_AUTH_MODE"], host, sorted(given))
    sys.exit()
ray.init, worker.enable_token_auth_by_default = init, asked
Cluster(dashboard=True).start()
"""
    names = ("RAY_AUTH_MODE", "RAY_ADDRESS")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={key: value for key, value in os.environ.items() if key not in names},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    mode, host, given = done.stdout.strip().split(" ", 2)
    assert (mode, host) == ("token", "127.0.0.1")
    assert not {"dashboard_host", "_node_ip_address", "_system_config"} & set(
        ast.literal_eval(given)
    )
