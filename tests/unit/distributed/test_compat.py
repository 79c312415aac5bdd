"""Each private part of Ray is taken away, and something plainer is left."""

from __future__ import annotations

import ast
import logging
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import icce_ray
from icce_ray.distributed import compat

TRIED = "2.60"


@pytest.fixture
def ray() -> Any:
    return pytest.importorskip("ray")


def test_the_ray_that_was_tried_is_the_one_installed(ray: Any) -> None:
    """After an update: run these tests, and the ones below tests/ray, then change this line."""
    assert ray.__version__.startswith(f"{TRIED}.")


# --- Ray is in one room, and its private parts in one file ----------------------------------------

PACKAGE = Path(icce_ray.__file__).parent


def modules(path: Path) -> Iterator[str]:
    """What a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_this_room_imports_ray_and_only_compat_what_is_private() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        names = [name for name in modules(path) if name.split(".")[0] == "ray"]
        assert not names or path.parent.name == "distributed", (path, names)
        private = [name for name in names if any(p.startswith("_") for p in name.split("."))]
        assert not private or path.name == "compat.py", (path, private)


# --- nothing is done on import, and nothing by a call from a notebook -----------------------------


def test_importing_the_package_changes_nothing() -> None:
    code = """
import os, signal, sys, logging
before = dict(os.environ), os.fstat(2), signal.getsignal(signal.SIGTERM), sys.stderr
import icce_ray.pipeline, icce_ray.stages.predict, icce_ray.sweeps.running
from icce_ray.distributed import compat
compat.before_connecting()  # what Cluster calls; nobody asked for a quiet terminal
assert (dict(os.environ), os.fstat(2), signal.getsignal(signal.SIGTERM), sys.stderr) == before
assert "ray" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("asked", [True, False])
def test_errors_of_rays_own_calls_are_no_ones_business(asked: bool) -> None:
    """`raise_errors` is what Ray calls with errors whose results nobody asked for."""
    code = f"""
from icce_ray.distributed import compat
if {asked}: compat.quiet_terminal()
from ray._private.worker import Worker
class Fake: deserialize_objects = lambda *_: [KeyError("dataset_3")]
Worker.raise_errors(Fake(), [], [])
"""
    run, own = [sys.executable, "-c", code], dict(os.environ)
    own.pop("RAY_IGNORE_UNHANDLED_ERRORS", None)  # of another test's command line
    done = subprocess.run(run, capture_output=True, text=True, timeout=600, check=True, env=own)
    assert ("dataset_3" in done.stderr) != asked


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICCE_OWN", "mine")
    with compat.environment({"ICCE_OWN": "other", "ICCE_NEW": "1"}):
        assert (os.environ["ICCE_OWN"], os.environ["ICCE_NEW"]) == ("mine", "1")
    assert os.environ["ICCE_OWN"] == "mine" and "ICCE_NEW" not in os.environ


def test_sigterm_stays_ours() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with compat.kept_signals():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init does
    assert signal.getsignal(signal.SIGTERM) == before


# --- the terminal ---------------------------------------------------------------------------------


def test_messages_of_raylets_go_to_a_logger(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import worker

    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)  # undone at end
    compat._hush_raylets()
    assert worker.print_to_stdstream is compat._to_logger
    monkeypatch.delattr(worker, "print_to_stdstream")
    compat._hush_raylets()  # Ray has another way by now: its messages are shown
    assert not hasattr(worker, "print_to_stdstream")
    monkeypatch.setitem(sys.modules, "ray._private", None)
    compat._hush_raylets()


def test_ray_data_is_silent_only_meanwhile(ray: Any) -> None:
    import ray.data  # noqa: F401

    logger = logging.getLogger("ray.data")
    before = logger.level
    with compat.silenced_data():
        assert not logger.isEnabledFor(logging.ERROR)
    assert logger.level == before


def test_noise_is_filtered_and_the_rest_comes_through() -> None:
    code = f"""
import os, sys
from icce_ray.distributed import compat
compat._filter_native_stderr()
os.write(2, b"E: {compat.NOISE[0]}\\n")
os.write(2, b"of interest\\n")
print("from python", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert sorted(done.stderr.splitlines()) == ["from python", "of interest"]


def test_without_a_descriptor_to_filter_nothing_is_filtered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def closed(number: int) -> int:
        raise OSError("closed")

    monkeypatch.setattr(compat.os, "dup", closed)
    before = sys.stderr
    compat._filter_native_stderr()
    assert sys.stderr is before


# --- a local Ray ----------------------------------------------------------------------------------


def test_processes_of_ray_get_a_session_of_their_own(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import services

    plain = services.ConsolePopen
    with compat.own_session():
        child = services.ConsolePopen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert os.getsid(child.pid) != os.getsid(0)
        child.kill()
        child.wait()
    assert services.ConsolePopen is plain
    monkeypatch.delattr(services, "ConsolePopen")
    with compat.own_session():
        assert not hasattr(services, "ConsolePopen")


def test_rays_start_has_a_slower_clock(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import node

    plain = node.time
    with compat.patient_start():
        assert plain.monotonic() / 3 < node.time.monotonic() < plain.monotonic() / 1.5
    assert node.time is plain
    monkeypatch.delattr(node, "time")
    with compat.patient_start():
        assert not hasattr(node, "time")


def test_a_ray_that_does_not_come_up_is_started_once_more() -> None:
    late = "The current node timed out during startup. This could"
    for failures, calls in (([], 1), ([late], 2), ([late, late], 2), (["another"], 1)):
        made: list[dict[str, Any]] = []

        def start(failures: list[str] = failures, made: list[Any] = made, **options: Any) -> None:
            made.append(options)
            if len(made) <= len(failures):
                raise RuntimeError(failures[len(made) - 1])

        fake = types.SimpleNamespace(init=start)
        if len(failures) == calls:
            with pytest.raises(RuntimeError):
                compat.init(fake, address="local")
        else:
            compat.init(fake, address="local")
        assert made == [{"address": "local"}] * calls


def test_an_end_of_ray_is_seen_where_ray_lists_its_processes(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import worker

    def node(*ended: int | None) -> Any:
        infos = [types.SimpleNamespace(process=types.SimpleNamespace(poll=lambda e=e: e))
                 for e in ended]  # fmt: skip
        return types.SimpleNamespace(all_processes={"raylet": infos})

    for global_node, ended in ((None, False), (node(None), False), (node(None, -15), True)):
        monkeypatch.setattr(worker, "_global_node", global_node)
        assert compat.local_ray_ended() == ended
    monkeypatch.setattr(worker, "_global_node", types.SimpleNamespace())
    assert not compat.local_ray_ended()
    monkeypatch.delattr(worker, "_global_node")
    assert not compat.local_ray_ended()


def test_leaving_ends_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(compat.os, "_exit", codes.append)
    monkeypatch.setattr(compat, "local_ray_ended", lambda: True)
    for code in (0, 130, None, "an error"):
        compat.leave(code)
    assert codes == [0, 130, 0, 1]
    monkeypatch.setattr(compat, "local_ray_ended", lambda: False)
    with pytest.raises(SystemExit) as left:
        compat.leave(3)
    assert left.value.code == 3


@pytest.mark.usefixtures("ray")
def test_a_finished_command_does_not_wait_for_threads_that_ray_left() -> None:
    code = """
import atexit, threading, ray
from icce_ray.distributed import compat
atexit.register(print, "finished")
threading.Thread(target=threading.Event().wait).start()  # as long as the process lives
compat.leave(3, at_once=True)
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (3, "finished\n")


# --- nodes and places -----------------------------------------------------------------------------


def test_a_node_is_lost_unless_it_went_in_order() -> None:
    assert [compat.was_lost({"DeathReason": n}) for n in (1, 2, 3, 4)] == [False, True, True, False]
    assert compat.was_lost({})


def test_without_a_head_resource_any_node_serves() -> None:
    head = {"node:__internal_head__": 1.0}
    assert compat.head_share(types.SimpleNamespace(cluster_resources=lambda: head)) == {
        "node:__internal_head__": 0.001
    }
    for gone in (types.SimpleNamespace(cluster_resources=dict), types.SimpleNamespace()):
        assert compat.head_share(gone) == {"CPU": 0.01}


def test_without_ray_trains_context_there_is_no_reservation(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = "ray.train.v2._internal.execution.context"
    run = types.SimpleNamespace(train_run_context=types.SimpleNamespace(run_id="7"))
    fake = types.SimpleNamespace(get_train_context=lambda: run)
    monkeypatch.setitem(sys.modules, train, fake)  # type: ignore[arg-type]
    assert compat.reservation() == "train-7"
    for broken in (types.SimpleNamespace(), None):
        monkeypatch.setitem(sys.modules, train, broken)  # type: ignore[arg-type]
        assert compat.reservation() is None


def test_without_placement_groups_nothing_is_given_back(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compat.placement() is None  # outside of any worker
    compat.release_placement("no id")
    monkeypatch.setitem(sys.modules, "ray.util", None)
    assert compat.placement() is None
    compat.release_placement("00" * 18)


def test_a_trainer_starts_only_what_serves_here(ray: Any) -> None:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    def started(fed: bool) -> set[str]:
        trainer = DataParallelTrainer(lambda: None)
        compat.without_servants(trainer, fed)
        return {type(one).__name__ for one in trainer._create_default_callbacks()}

    with_data, without = started(True), started(False)
    assert with_data - without == {"DatasetsCallback"} and "BackendSetupCallback" in without
    assert "PlacementGroupCleanerCallback" not in with_data
    compat.without_servants(object(), fed=False)  # of another Ray


def test_only_groups_whose_maker_has_died_are_orphans(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group

    def group(name: bytes, maker: bytes, **more: Any) -> bytes:
        made = Group(placement_group_id=name, creator_actor_id=maker, **more)
        return made.SerializeToString()

    groups = [
        group(b"orphan", b"dead"),
        group(b"served", b"alive"),
        group(b"of the driver", b""),
        group(b"detached", b"dead", is_detached=True),
        group(b"gone", b"dead", state=Group.REMOVED),
    ]
    tables = types.SimpleNamespace(
        _connect_and_get_accessor=lambda: types.SimpleNamespace(
            get_placement_group_table=lambda: groups
        ),
        actor_table=lambda maker: {"State": bytes.fromhex(maker).decode().upper()},
    )
    released: list[bytes] = []
    monkeypatch.setattr(compat, "release_placement", lambda id: released.append(bytes.fromhex(id)))
    monkeypatch.setattr(state, "state", tables)
    compat.release_orphans()
    assert released == [b"orphan"]
    monkeypatch.setattr(state, "state", object())  # without those tables
    compat.release_orphans()
    assert released == [b"orphan"]


def test_without_a_coordinator_nothing_is_cancelled(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise ValueError("no such actor")

    monkeypatch.setattr(ray, "get_actor", none)
    compat.cancel_reservation("train-7")
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: object())  # without that method
    compat.cancel_reservation("train-7")


@pytest.mark.parametrize(("ray_there", "torn_down"), [(False, ""), (True, "torn down\n")])
def test_a_command_without_ray_leaves_its_memory_to_the_system(
    ray_there: bool, torn_down: str
) -> None:
    code = (
        "import atexit, sys, types\n"
        "from icce_ray import cli\n"
        "atexit.register(print, 'torn down')\n"
        f"if {ray_there}: sys.modules['ray'] = types.SimpleNamespace(is_initialized=lambda: True)\n"
        "sys.argv = ['icce-ray', '--version']\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    version, _, rest = done.stdout.partition("\n")
    assert version.startswith("icce-ray ") and rest == torn_down
