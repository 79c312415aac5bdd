"""Everything that is not a documented interface of Ray, in one place.

Tried with Ray 2.60, the minor that pyproject.toml asks for. Each function says why it is needed,
and what happens where Ray no longer has the private part: something plainer, never a crash.
tests/unit/distributed/test_compat.py takes each part away and looks.

Nothing here happens on import. Only `quiet_terminal` changes the process for good, and only the
command line calls it: a notebook keeps its file descriptors, its environment and its Ray.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from icce_ray.core import importing

# --- the terminal of the command line ------------------------------------------------------------

# Every actor pool of Ray Data makes Ray's C++ core print the first with severity "E"; it concerns
# restarts after the loss of the driver's own objects, which no restart survives anyway. The second
# says that Ray does its work after a lost node, which NodeWatch reports.
NOISE = (
    "has constructor arguments in the object store and max_restarts > 0",
    ":info_message: Attempting to recover",
)

_FILTER = """
import sys
noise = sys.argv[1:]
for line in sys.stdin.buffer:
    if not any(text.encode() in line for text in noise):
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
"""

_asked = _installed = False


def quiet_terminal() -> None:
    """Keep known noise of Ray off the terminal. For a process that is ours: the command line.

    Takes effect when Ray is started, so that commands without Ray do not pay for it. Where a part
    fails, its noise is back, and no more.
    """
    global _asked  # noqa: PLW0603
    _asked = True
    # Not documented: without it a call of Ray in a thread that outlives a failed run would start a
    # new cluster. Ray reads it when it is first imported.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # Ray prints a traceback for each error whose result nobody asked for. All of ours are asked
    # for; what is left are its own statistics, which fail on a machine that is short of time.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")


def before_connecting() -> None:
    """What `quiet_terminal` asked for, once per process. Nothing where it was not called."""
    global _installed  # noqa: PLW0603
    if not _asked or _installed:
        return
    _installed = True
    _filter_native_stderr()
    _hush_raylets()


def _filter_native_stderr() -> None:
    """Send what native code writes to file descriptor 2 through a filter.

    Python's own `sys.stderr` keeps the terminal. The filter is a process of its own, so that the
    last words of a crashing driver still come through.
    """
    with contextlib.suppress(OSError, ValueError):
        terminal = os.dup(2)
        filtering = subprocess.Popen(
            [sys.executable, "-S", "-c", _FILTER, *NOISE],
            stdin=subprocess.PIPE,
            stdout=terminal,
            start_new_session=True,  # Ctrl-C is for the driver
        )
        assert filtering.stdin is not None
        sys.stderr.flush()
        os.dup2(filtering.stdin.fileno(), 2)
        filtering.stdin.close()
        sys.stderr = os.fdopen(terminal, "w", buffering=1, errors="backslashreplace")
        # Waited for by nobody: it ends when the last holder of the pipe does.
        filtering.returncode = 0


def _hush_raylets() -> None:
    """Keep what Ray prints of dying nodes and workers off the terminal.

    Of a lost node Ray prints thirty lines of a raylet's log to stdout, whatever `log_to_driver`
    says; `cluster.NodeWatch` says it in one. The text goes to the logger `icce_ray.ray`. Without
    `print_to_stdstream` the thirty lines are back.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private import worker

        getattr(worker, "print_to_stdstream")  # noqa: B009  else Ray has another way by now
        worker.print_to_stdstream = _to_logger


def _to_logger(data: Mapping[str, Any], *_: Any, **__: Any) -> None:
    logging.getLogger("icce_ray.ray").debug("\n".join(data.get("lines", ())))


@contextlib.contextmanager
def silenced_data() -> Iterator[None]:
    """Meanwhile no line of Ray Data in the terminal: its errors come as exceptions.

    Ray Data sets up its logger when it is imported, which has to come first.
    """
    with contextlib.suppress(ImportError):
        importing.whole("ray.data")
    logger = logging.getLogger("ray.data")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- a local Ray ---------------------------------------------------------------------------------

# Read by Ray while it starts; its processes and their workers inherit them.
LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers of a local Ray are on this machine: they need no copy of the project.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables meanwhile, as far as the user has not. A notebook's environment is not ours."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def own_session() -> Iterator[None]:
    """Meanwhile Ray's processes start in a session of their own, by Ray's private `ConsolePopen`.

    `timeout`, a shell's `kill %1` and some schedulers signal a whole process group. Ray's processes
    would end before the driver can stop its work in order, and the driver would wait for them for a
    minute. They still end with the driver: the kernel sees to that (PR_SET_PDEATHSIG, set by Ray).
    Without `ConsolePopen` they get the signal, too; see `local_ray_ended`.
    """
    try:
        from ray._private import services

        plain = services.ConsolePopen
    except (ImportError, AttributeError):
        yield
        return

    def start(*arguments: Any, **options: Any) -> Any:
        return plain(*arguments, **{**options, "start_new_session": True})

    services.ConsolePopen = start  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        services.ConsolePopen = plain  # type: ignore[misc]


@contextlib.contextmanager
def patient_start() -> Iterator[None]:
    """Meanwhile Ray waits longer for its own processes: 60 s, not 30, which a busy machine exceeds.

    Its raylet reads how long to wait for its agent in the environment, and the driver how long to
    wait for the raylet on the clock of Ray's private `node`. Without either, 30 s it is.
    """
    with environment({"RAY_agent_register_timeout_ms": "300000"}):
        try:
            from ray._private import node

            plain = node.time
        except (ImportError, AttributeError):
            yield
            return
        slow = {**vars(plain), "monotonic": lambda: plain.monotonic() / 2}
        node.time = types.SimpleNamespace(**slow)  # type: ignore[assignment]
        try:
            yield
        finally:
            node.time = plain


def init(ray: Any, **options: Any) -> None:
    """`ray.init`, with a second try where a local Ray did not come up.

    Its raylet ends itself when its agent is not there within 15 s, as on a busy machine. That limit
    is compiled in; the second time, the files are in memory. Ray tells it only by its message:
    with another one, the first failure is the last.
    """
    with patient_start():
        try:
            ray.init(**options)
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            ray.init(**options)


@contextlib.contextmanager
def kept_signals() -> Iterator[None]:
    """Undo that `ray.init` takes SIGTERM for itself: its handler ends the process on the spot."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Ray leaves signals to the main thread
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def local_ray_ended() -> bool:
    """Whether the processes of this driver's own Ray have ended, as by a signal to all of them.

    Every call of Ray then waits for a minute and ends the process. Where Ray no longer lists its
    processes, False: the driver then waits for that minute.
    """
    if "ray" not in sys.modules:
        return False
    with contextlib.suppress(Exception):
        from ray._private import worker

        node: Any = worker._global_node  # None: no local Ray
        return any(
            one.process.poll() is not None
            for kind in ("gcs_server", "raylet")
            for one in node.all_processes.get(kind, ())
        )
    return False


def leave(code: int | str | None, at_once: bool = False) -> NoReturn:
    """End this process, with an exit code as `sys.exit` takes it.

    Where Ray's processes have ended before us, without Ray's own clean-up at exit, which would wait
    for them for a minute and then end the process with a code of its own.

    at_once: leave the memory to the operating system, too, where there is no Ray, or none any more:
        Python takes a second to free what torch and timm hold, object by object, and a thread that
        Ray left behind may meanwhile crash, which would make a finished run end with that.
    """
    ray = sys.modules.get("ray")
    if not local_ray_ended():
        is_connected = getattr(ray, "is_initialized", bool)  # none in a Ray half imported
        if not at_once or is_connected():
            sys.exit(code)
        if ray is not None:
            atexit._run_exitfuncs()  # whoever else has something to finish: a log, a tracker
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


# --- nodes and places ----------------------------------------------------------------------------

# Of ray.nodes()["DeathReason"]: shut down in order; taken away by the autoscaler, being idle.
_WANTED_DEATHS = (1, 4)


def was_lost(node: Mapping[str, Any]) -> bool:
    """Whether a node of `ray.nodes()` that is no longer alive is a loss.

    The reason is a number of a protocol of Ray's own. Without it every node that goes is a loss.
    """
    return node.get("DeathReason") not in _WANTED_DEATHS


def head_share(ray: Any) -> dict[str, float]:
    """A reservation that takes no core and stays on the head node, which is not lost with a spot
    node. The resource's name is Ray's own; without it a hundredth of a core, anywhere."""
    name = "node:__internal_head__"
    with contextlib.suppress(Exception):
        if ray.cluster_resources().get(name):
            return {name: 0.001}
    return {"CPU": 0.01}


def placement() -> str | None:
    """Id of the placement group that this worker lives in; None where there is none."""
    with contextlib.suppress(Exception):
        from ray.util import get_current_placement_group

        group = get_current_placement_group()
        return group.id.hex() if group is not None else None
    return None


def reservation() -> str | None:
    """The name under which Ray Train keeps nodes for this worker's group, while it may grow.

    None where Ray has no such thing any more: a later group may then wait for 3 minutes until the
    reservation of a killed one runs out.
    """
    with contextlib.suppress(Exception):
        from ray.train.v2._internal.execution.context import get_train_context

        return f"train-{get_train_context().train_run_context.run_id}"
    return None


def release_placement(placed: str) -> None:
    """Give back a placement group by its id, as `placement` returned it.

    Ray does this by a watchdog that needs the dashboard. Without it, or where the group is gone
    already, nothing happens: the group then ends with the driver.
    """
    with contextlib.suppress(Exception):
        from ray import PlacementGroupID
        from ray.util import remove_placement_group
        from ray.util.placement_group import PlacementGroup

        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(placed))))


# Each is a process that imports for four seconds. The first reads data sets. The second gives back
# the places of a dead controller where there is a dashboard to watch it; we do that by ourselves.
_SERVANTS = ("DatasetsCallback", "PlacementGroupCleanerCallback")


def without_servants(trainer: Any, fed: bool) -> None:
    """Make a trainer of Ray Train start without the processes that serve nothing here.

    Args:
        fed: whether it is given data sets.

    What it starts is a list that it makes in a method of its own. Without that method it starts
    them all, which only takes longer.
    """
    with contextlib.suppress(AttributeError):
        plain = trainer._create_default_callbacks
        unused = _SERVANTS[1:] if fed else _SERVANTS
        trainer._create_default_callbacks = lambda: [
            one for one in plain() if type(one).__name__ not in unused
        ]


def release_orphans() -> None:
    """Give back placement groups whose maker has died, as Ray does it.

    Ray does it once, when it learns of the death: a group whose request was still under way then
    keeps its place, or asks for one, until the job ends. Only Ray's own tables say who made a
    group. Without them such a group remains.
    """
    with contextlib.suppress(Exception):
        from ray._private.state import state
        from ray.core.generated import gcs_pb2

        table = vars(gcs_pb2)["PlacementGroupTableData"]  # generated, without types
        for raw in state._connect_and_get_accessor().get_placement_group_table():
            group = table.FromString(raw)
            gone = group.state == table.REMOVED or group.is_detached
            if gone or not group.creator_actor_id:
                continue
            if state.actor_table(group.creator_actor_id.hex()).get("State") == "DEAD":
                release_placement(group.placement_group_id.hex())


def cancel_reservation(name: str) -> None:
    """Give back the nodes that Ray Train keeps under a name; see `reservation`."""
    with contextlib.suppress(Exception):
        import ray

        actor = "AutoscalingCoordinator"
        coordinator = ray.get_actor(actor, namespace=actor)
        ray.get(coordinator.cancel_request.remote(name), timeout=5)
