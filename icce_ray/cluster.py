"""The Ray cluster a run works on: a local one started by itself, or the one it was submitted to."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from icce_ray.config import RayConfig
from icce_ray.errors import IcceError, StageError
from icce_ray.quiet import filter_native_stderr

# Ray's own chatter. Errors are raised as exceptions, so nothing is lost.
_QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives a failed run must not start Ray anew
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Resources:
    """What the cluster has at the moment."""

    cpus: int
    gpus: int
    nodes: int
    memory: float  # bytes

    def describe(self) -> str:
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{nodes}, {self.cpus} CPU cores, {self.gpus} GPUs"


class Cluster:
    """Starts or joins Ray at first use, so that a run with nothing to do starts nothing."""

    def __init__(self, settings: RayConfig | None = None) -> None:
        self.settings = settings or RayConfig()
        self._owned = False

    @property
    def address(self) -> str:
        """`local` unless the settings, or the job this process runs in, name a cluster.

        A cluster that merely happens to run on this machine is never joined.
        """
        return self.settings.address or os.environ.get("RAY_ADDRESS") or "local"

    @property
    def is_local(self) -> bool:
        return self.address == "local"

    def start(self) -> Any:
        """Return the `ray` module, connected."""
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        if self.is_local:  # workers of a local Ray share this environment; nothing to ship
            os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        import ray

        if not ray.is_initialized():
            self._connect(ray)
        for name in ("ray", "ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        return ray

    def _connect(self, ray: Any) -> None:
        filter_native_stderr()
        extra: dict[str, Any] = {}
        if self.is_local:
            extra = {"num_cpus": self.settings.num_cpus, "include_dashboard": False}
        main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
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
        if main:  # Ray's own handler would end the process without a word to the user
            signal.signal(signal.SIGTERM, handler)

    def stop(self) -> None:
        """Disconnect; a local Ray that this object started ends with it."""
        ray = sys.modules.get("ray")
        if self._owned and ray is not None and ray.is_initialized():
            ray.shutdown()
        self._owned = False

    def resources(self) -> Resources:
        """What the connected cluster has now (an autoscaled one may grow when asked)."""
        ray = self.start()
        have = ray.cluster_resources()
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        return Resources(
            cpus=int(have.get("CPU", 0)),
            gpus=int(have.get("GPU", 0)),
            nodes=nodes,
            memory=have.get("memory", 0.0),
        )

    def used(self) -> dict[str, Any]:
        """What a stage ran on, for its manifest; without Ray, this process's machine."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return {"nodes": 1, "cpus": os.cpu_count() or 1, "gpus": 0, "ray": False}
        have = self.resources()
        return {"nodes": have.nodes, "cpus": have.cpus, "gpus": have.gpus, "ray": True}

    def gpus_each(self, wanted: float | None) -> float:
        """GPUs per worker: as asked for, else 1 where the cluster has any."""
        if wanted is not None:
            return wanted
        return 1.0 if self.resources().gpus else 0.0

    def workers(self, wanted: int | None, gpus_each: float) -> int:
        """Number of workers: as asked for, else as many as the GPUs carry, else 1."""
        if wanted is not None:
            return wanted
        return max(1, int(self.resources().gpus / gpus_each)) if gpus_each else 1

    def cpus_each(self, workers: int, gpus_each: float) -> float:
        """CPU cores per worker: with GPUs one, else an even share of a node's cores."""
        if gpus_each:
            return 1
        have = self.resources()
        per_node = have.cpus / max(have.nodes, 1)
        return max(1, int(per_node / max(1, workers)))


def completed(ray: Any, refs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Yield (position, result) of Ray tasks as they end; an error of ours keeps its type."""
    position = {ref: index for index, ref in enumerate(refs)}
    waiting = list(refs)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1)
        for ref in done:
            yield position[ref], fetch(ray, ref)


def fetch(ray: Any, ref: Any) -> Any:
    """The result of one Ray task; an IcceError raised in it is raised here as itself."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, IcceError):
            raise error.cause from None
        raise StageError(f"a Ray task failed:\n{str(error).strip()[-2000:]}") from None
    except ray.exceptions.RayError as error:
        raise StageError(f"a Ray task was lost: {str(error).strip()[-500:]}") from None
