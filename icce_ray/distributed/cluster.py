"""The Ray cluster a run works on: a local one started by itself, or the one it was submitted to."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from icce_ray.config.schema import RayConfig
from icce_ray.core import importing
from icce_ray.distributed import compat, reach
from icce_ray.errors import StageError, printable

SHARED_MEMORY = Path("/dev/shm")  # where Ray's object store is
LEAST_SHARED_MEMORY = 1e9  # bytes; a container has 64 MB of its own
LOOK_EVERY = 2.0  # seconds between looks at the cluster's nodes
IDLE_CORES = 0.1  # share of the cores that tasks as large as a node may leave unused
VARIABLE = "RAY_ADDRESS"  # where Ray's jobs, and many a shell, have a cluster's address
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the process of a job
STOP_WITHIN = 5.0  # seconds that Ray gets to answer while a run ends


@dataclass(frozen=True)
class Resources:
    """What the nodes that do work have at the moment. A head node without cores does none."""

    cpus: int
    gpus: int
    nodes: int
    memory: float  # bytes
    each: tuple[tuple[float, float], ...] = ()  # cores and GPUs of every node

    def describe(self) -> str:
        if not self.nodes:
            return "no node that does work yet"
        parts = ((self.nodes, "node"), (self.cpus, "CPU core"), (self.gpus, "GPU"))
        return ", ".join(_plural(count, name) for count, name in parts)


@dataclass(frozen=True)
class Request:
    """What a stage asks for: `count` equal shares, each on one node."""

    cpus: float
    gpus: float = 0.0
    count: int = 1

    def fits(self, have: Resources) -> bool:
        """Whether the nodes there are now carry it, were they idle."""
        return sum(_shares(node, self.cpus, self.gpus) for node in have.each) >= self.count

    def describe(self) -> str:
        each = " and ".join(
            _plural(amount, name)
            for amount, name in ((self.cpus, "CPU core"), (self.gpus, "GPU"))
            if amount
        )
        return each if self.count == 1 else f"{self.count} times {each}"


def _plural(count: float, name: str) -> str:
    return f"{count:g} {name}" + ("" if count == 1 else "s")


def _shares(node: tuple[float, float], cpus: float, gpus: float) -> int:
    """How many shares of `cpus` cores and `gpus` GPUs a node (cores, GPUs) carries."""
    pairs = [(have, want) for have, want in zip(node, (cpus, gpus), strict=True) if want]
    return min((math.floor(have / want + 1e-6) for have, want in pairs), default=1)


def shared_memory_hint() -> str | None:
    """What to say where a local Ray would keep its objects on a disk, which is slow."""
    if not SHARED_MEMORY.is_dir():
        return None  # no Linux
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free >= LEAST_SHARED_MEMORY:
        return None
    return (
        f"{SHARED_MEMORY} has only {free / 1e6:,.0f} MB: Ray will pass images through a disk, "
        "which is slow. In a container, start it with --shm-size=4g or more"
    )


def _in_job() -> bool:
    """Whether `ray job submit` started this process. Ray documents no other sign."""
    return JOB in os.environ


class Cluster:
    """Starts or joins Ray at first use, so that a run with nothing to do starts nothing.

    Args:
        dashboard: of a local Ray; it is what frees a stopped trial's workers.
        parts: of how many equal users this one is, as one of several trials: each counts on that
            part of every node's cores.
    """

    def __init__(
        self, settings: RayConfig | None = None, dashboard: bool = False, parts: int = 1
    ) -> None:
        self.settings = settings or RayConfig()
        self.dashboard, self.parts = dashboard, parts
        self._owned = False
        self._levels: dict[str, int] = {}  # of Ray's loggers, before we came

    @property
    def address(self) -> str:
        """`local` unless the settings, or the job this process runs in, name a cluster.

        A cluster that merely happens to run on this machine is never joined, nor one whose address
        an earlier session left in the environment.
        """
        return self.settings.address or (_in_job() and os.environ.get(VARIABLE)) or "local"

    @property
    def ignored(self) -> str | None:
        """What to say where the environment names a cluster that is not joined."""
        named = printable(os.environ.get(VARIABLE, "local"))
        if not self.is_local or named in ("", "local"):
            return None
        return (
            f"{VARIABLE}={named} is ignored, since this is no Ray job; ray.address={named} joins it"
        )

    @property
    def is_local(self) -> bool:
        return self.address == "local"

    def start(self) -> Any:
        """Return the `ray` module, connected."""
        ray = importing.whole("ray")
        if not ray.is_initialized():
            self._connect(ray)
        return ray

    def _connect(self, ray: Any) -> None:
        self._check_address()
        compat.before_connecting()
        extra: dict[str, Any] = {}
        if self.is_local:
            extra = {"num_cpus": self.settings.num_cpus, "include_dashboard": self.dashboard}
        local = compat.LOCAL if self.is_local else {}
        try:
            with compat.environment(local), compat.kept_signals(), compat.own_session():
                compat.init(
                    ray,
                    address=self.address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=True,
                    **extra,
                )
        except Exception as error:  # Ray raises plain ones, too
            reason = str(error).strip().splitlines()
            raise StageError(
                f"cannot {'start Ray here' if self.is_local else f'join Ray at {self.address}'}: "
                f"{reason[0] if reason else type(error).__name__}"
            ) from None
        self._owned = True
        for name in ("ray", "ray.train", "ray.tune"):
            self._levels[name] = logging.getLogger(name).level
            logging.getLogger(name).setLevel(logging.ERROR)

    def _check_address(self) -> None:
        """Raises StageError where nobody answers: Ray would try for more than ten minutes."""
        reason = None if self.is_local else reach.why_not(self.address)
        if reason is not None:
            origin = "ray.address" if self.settings.address else VARIABLE
            raise StageError(
                f"cannot join Ray at {self.address} ({origin}): {reason}. Start that cluster, "
                "correct the address, or leave it out to work on a local Ray"
            )

    def stop(self) -> None:
        """Disconnect; a local Ray that this object started ends with it.

        A Ray whose processes have ended already would keep us for a minute and then end this
        process: it gets a few seconds.
        """
        ray = sys.modules.get("ray")
        if self._owned and ray is not None and ray.is_initialized():
            if self.is_local and compat.local_ray_ended():
                ending = threading.Thread(target=ray.shutdown, name="end-of-ray", daemon=True)
                ending.start()
                ending.join(STOP_WITHIN)
            else:
                ray.shutdown()
        self._owned = False
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        self._levels = {}

    def resources(self) -> Resources:
        """What the connected cluster has now (an autoscaled one may grow when asked)."""
        nodes = [node["Resources"] for node in self.start().nodes() if node["Alive"]]
        working = [node for node in nodes if node.get("CPU") or node.get("GPU")]
        each = tuple((self._part(node.get("CPU", 0.0)), node.get("GPU", 0.0)) for node in working)
        return Resources(
            cpus=int(sum(cpus for cpus, _ in each)),
            gpus=int(sum(gpus for _, gpus in each)),
            nodes=len(each),
            memory=sum(node.get("memory", 0.0) for node in working),
            each=each,
        )

    def _part(self, cpus: float) -> float:
        return cpus if self.parts == 1 else float(max(1, cpus // self.parts))

    def used(self) -> dict[str, Any]:
        """What a stage ran on, for its manifest; without Ray, this process's machine."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return {"nodes": 1, "cpus": os.cpu_count() or 1, "gpus": 0, "ray": False}
        have = self.resources()
        return {"nodes": have.nodes, "cpus": have.cpus, "gpus": have.gpus, "ray": True}

    def gpus_each(self) -> float:
        """GPUs per worker: `ray.num_gpus`, else 1 where the cluster has any."""
        if self.settings.num_gpus is not None:
            return self.settings.num_gpus
        return 1.0 if self.resources().gpus else 0.0

    def workers(self, wanted: int | None, gpus_each: float) -> int:
        """Number of workers: as asked for, else as many as the GPUs carry, else 1."""
        if wanted is not None:
            return wanted
        if not gpus_each:
            return 1
        return max(1, sum(_shares(node, 0, gpus_each) for node in self.resources().each))

    def cpus_each(self, workers: int, gpus_each: float) -> int:
        """CPU cores per worker: with GPUs one, else as many as let all workers find a place.

        One worker stands for tasks of which each node runs as many as it can: those are as large
        as a node, but small enough that hardly any core stays idle where nodes differ.
        """
        sizes = [int(cpus) for cpus, _ in self.resources().each if cpus >= 1]
        if gpus_each or not sizes:
            return 1
        if workers <= 1:
            busy = {size: sum(cpus // size * size for cpus in sizes) for size in sizes}
            return max(
                s for s in busy if busy[s] >= (1 - IDLE_CORES) * sum(sizes) or s == min(busy)
            )
        carried = (size for size in range(max(sizes), 0, -1) if _carried(sizes, size) >= workers)
        return next(carried, 1)


def _carried(sizes: Sequence[int], size: int) -> int:
    return sum(cpus // size for cpus in sizes)


class Speaker(Protocol):
    """The part of progress.Reporter that is needed here."""

    def say(self, text: str) -> None: ...
    def event(self, text: str) -> None: ...
    def status(self, state: str, **more: Any) -> None: ...


class Wait:
    """Says when the cluster cannot provide what a stage asks for, and gives up after a while.

    Time counts only while no node could carry the request, so that nothing of the stage can run:
    a task in the queue behind others waits as long as it takes.

    Args:
        requests: what has to find a place.
        advice: which settings ask for less.
    """

    def __init__(
        self, cluster: Cluster, reporter: Speaker, requests: Sequence[Request], advice: str
    ) -> None:
        self.cluster, self.reporter = cluster, reporter
        self.requests, self.advice = requests, advice
        self._since: float | None = None
        self._looked = -math.inf

    @property
    def asked(self) -> str:
        return ", ".join(request.describe() for request in self.requests)

    def check(self) -> bool:
        """Whether the cluster can provide it. Call it often: it looks every other second.

        Raises:
            StageError: after `ray.worker_wait` seconds in which it could not.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return self._since is None
        self._looked = now
        have = self.cluster.resources()
        if all(request.fits(have) for request in self.requests):
            if self._since is not None:
                self.reporter.say(f"the cluster now has {have.describe()}: resuming")
                self.reporter.status("running")
            self._since = None
            return True
        text = f"waiting for the cluster to provide {self.asked}; it has {have.describe()}"
        if self._since is None:
            self._since = now
            self.reporter.say(text)
        self.reporter.status("running", waiting=text)
        if now - self._since > self.cluster.settings.worker_wait:
            raise self.error()
        return False

    def error(self) -> StageError:
        """What to say where nothing of the stage could run for too long."""
        return StageError(
            f"nothing could run for {self.cluster.settings.worker_wait} s: what was asked for is "
            f"{self.asked}, and the cluster has {self.cluster.resources().describe()}. "
            f"{self.advice}, add nodes, or raise ray.worker_wait."
        )

    def until_there(self) -> None:
        """Wait while the cluster lacks it, and have an autoscaler provide it.

        Raises:
            StageError: after `ray.worker_wait` seconds.
        """
        if self.check():
            return
        groups = [_placement(request) for request in self.requests]  # the demand that it sees
        try:
            while not self.check():
                time.sleep(min(1.0, LOOK_EVERY))
        finally:
            from ray.util import remove_placement_group

            for group in groups:
                with contextlib.suppress(Exception):
                    remove_placement_group(group)


def _placement(request: Request) -> Any:
    """A reservation of one share: unlike the autoscaler's own requests, it ends with the driver."""
    from ray.util import placement_group

    share = {"CPU": request.cpus, "GPU": request.gpus}
    return placement_group([{name: amount for name, amount in share.items() if amount}])


class NodeWatch:
    """Reports nodes that are lost while a stage runs, once Ray is connected.

    Nodes that the autoscaler takes away because they are idle are no loss.
    """

    def __init__(self, reporter: Speaker) -> None:
        self.reporter = reporter
        self._alive: set[str] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="node-watch", daemon=True)

    def __enter__(self) -> NodeWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        self._thread.join(STOP_WITHIN)  # a look may hang where Ray is gone
        if kind is None:
            with contextlib.suppress(Exception):
                self.look()

    def _loop(self) -> None:
        while not self._ended.wait(LOOK_EVERY):
            with contextlib.suppress(Exception):  # Ray may be shutting down
                self.look()

    def look(self) -> None:
        """Compare the nodes with those of the last look."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        before = self._alive or set()
        self._alive = {name for name, node in nodes.items() if node["Alive"]}
        for name in sorted(before - self._alive):
            node = nodes.get(name, {})
            if compat.was_lost(node):
                where = node.get("NodeManagerAddress", name)
                self.reporter.event(f"a node was lost ({where}): others do its work again")
