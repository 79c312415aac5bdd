"""A Ray cluster of real processes on this machine, whose nodes come and go: for faults on purpose.

Not `ray.cluster_utils.Cluster` in this process: Ray's processes must be gone at the end, however it
comes, and a driver under test connects to them as to any cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Nodes come and go as lines on stdin say. At its end, however it comes, all nodes end.
SERVER = """
import json, socket, sys, time
from types import SimpleNamespace
from ray._private import node as starting
from ray.cluster_utils import Cluster

# Ray gives a node 30 s to start, which is too little where the machine is busy.
slow = SimpleNamespace(**vars(time) | {"monotonic": lambda: time.monotonic() / 40})
starting.time = slow

# A node that is gone fails at once, one that is slow only after the timeout.
soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300,
        "health_check_timeout_ms": int(100 * float(sys.argv[1])),
        "health_check_failure_threshold": 10,
        # What waits for its answer is given up as soon: see cluster.yaml.
        "grpc_client_keepalive_time_ms": int(500 * float(sys.argv[1])),
        "grpc_client_keepalive_timeout_ms": int(500 * float(sys.argv[1]))}
head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon}
cluster, nodes = Cluster(), {}

# Where an agent chooses its ports, its raylet ends itself unless it has done so within 15 s.
PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port",
         "runtime_env_agent_port")

def add(options):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    ports = {name: one.getsockname()[1] for name, one in zip(PORTS, sockets)}
    for one in sockets:
        one.close()
    return cluster.add_node(**options, **ports)

def tell(node):
    pids = [one.process.pid for kind in node.all_processes.values() for one in kind]
    raylet = node.all_processes["raylet"][0].process.pid
    print(json.dumps({"id": node.node_id, "raylet": raylet, "pids": pids,
                      "address": cluster.address}), flush=True)

tell(add(head))
for line in sys.stdin:
    name, options = json.loads(line)
    if options is None:
        cluster.remove_node(nodes.pop(name), allow_graceful=False)
        print("{}", flush=True)
    else:
        nodes[name] = add(options)
        tell(nodes[name])
cluster.shutdown()
"""


def born(pid: int) -> int | None:
    """When a process started, which tells it from a later one of the same number; None: ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    return None


def alive(pid: int) -> bool:
    return born(pid) is not None


def children(pid: int) -> dict[int, str]:
    """Processes a raylet started, with what they say they do."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                text = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                found[int(place.name)] = text
    return found


class Nodes:
    """A Ray cluster of real processes, in a process group of its own.

    Args:
        folder: for its log.
        silence: seconds after which a node that does not answer counts as lost.
    """

    def __init__(self, folder: Path, silence: float = 600.0) -> None:
        # Short, since sockets lie in it; apart from other clusters of this machine.
        self.place = tempfile.mkdtemp(prefix="icce-", dir="/tmp")
        self.log = (folder / "cluster.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(silence)],
            env={
                **os.environ,
                "RAY_TMPDIR": self.place,
                "RAY_AUTH_MODE": "disabled",
                "RAY_agent_register_timeout_ms": "1200000",  # as above
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )
        self.started: dict[int, int | None] = {}  # process -> when
        self.lost: set[str] = set()
        self.nodes: dict[str, dict[str, Any]] = {}
        self.head: dict[str, Any] = {}
        try:
            self.head = self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                self._note(found.get("pids", ()))
                return found
        raise AssertionError("the cluster ended: " + Path(self.log.name).read_text()[-2000:])

    def _ask(self, name: str, options: dict[str, Any] | None) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, options]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def add(self, name: str, **options: Any) -> None:
        """Start a node of 2 cores."""
        self.nodes[name] = self._ask(name, {"num_cpus": 2, **options})

    def kill(self, name: str) -> None:
        """All processes of a node end by SIGKILL; its workers with their raylet."""
        self._note(children(self.nodes[name]["raylet"]))
        self.lost.add(name)
        self._ask(name, None)

    def freeze(self, name: str) -> None:
        """All processes of a node stop, and do not end."""
        node = self.nodes[name]
        pids = [*children(node["raylet"]), *node["pids"]]
        self._note(pids)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def _note(self, pids: Iterable[int]) -> None:
        self.started |= {pid: born(pid) for pid in pids}

    def name_of(self, node_id: str) -> str:
        return next(name for name, node in self.nodes.items() if node["id"] == node_id)

    def close(self) -> None:
        there = [node for name, node in self.nodes.items() if name not in self.lost]
        for node in filter(None, [self.head, *there]):
            self._note(children(node["raylet"]))
        assert self.process.stdin is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.process.kill()
        self.process.wait()
        for pid, when in self.started.items():
            if when is not None and born(pid) == when:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.log.close()
        shutil.rmtree(self.place, ignore_errors=True)
