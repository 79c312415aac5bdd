"""What experiment trackers get of a run, with a recorded tracker and with the real ones."""

from __future__ import annotations

import importlib.util
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from icce_ray.errors import ConfigError
from icce_ray.rundir import progress, tracking
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.progress import Reporter
from icce_ray.rundir.tracking import Tracking

SETTINGS = {"num_classes": 3, "heads": {"count": 2}, "backbone": [{"name": "a"}, {"name": "b"}]}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path / "runs" / "mine"))


@pytest.fixture
def tracked(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A reporter whose tracker notes every call, and the calls."""
    calls: list[tuple[Any, ...]] = []

    def tracker(run: RunDirectory, settings: Any) -> Any:
        calls.append(("begin", settings))

        def noting(name: str) -> Callable[..., None]:
            return lambda *arguments: calls.append((name, *arguments))

        return SimpleNamespace(**{n: noting(n) for n in ("measure", "note", "trial", "end")})

    monkeypatch.setitem(tracking._START, "wandb", tracker)
    reporter = Reporter(run, quiet=True, tracking=Tracking("wandb", run, SETTINGS))
    return SimpleNamespace(reporter=reporter, calls=calls)


# --- what is sent --------------------------------------------------------------------------------


def test_settings_results_and_events_arrive_in_order(tracked: SimpleNamespace) -> None:
    reporter = tracked.reporter
    with reporter.tracked():
        reporter.stage = "heads"
        reporter.event("a node was lost")
        reporter.measured({"rows": 9, "nmi": 0.5, "kind": "x", "bad": float("nan"), "flag": True})
        reporter.trial("t1", {"seed": 1}, {"acc": 0.9, "note": "no number"})
    names = {"backbone.0.name": "a", "backbone.1.name": "b"}
    assert tracked.calls == [
        ("begin", {"num_classes": 3, "heads.count": 2, **names}),
        ("note", "a node was lost"),
        ("measure", {"heads/rows": 9.0, "heads/nmi": 0.5}, 0),
        ("trial", "t1", {"seed": 1}, {"acc": 0.9}),
        ("end", "done"),
    ]


def test_losses_of_a_training_are_measured_at_their_steps(
    tracked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "STATUS_EVERY", -1.0)
    tracked.reporter.stage = "heads"
    with tracked.reporter.tracked(), tracked.reporter.bar("heads", 40) as bar:
        bar.update(10, "loss -1.250")
        bar.update(20, "30 images/s")
        bar.update(30, "loss 0.5")
    found = [call[1:] for call in tracked.calls if call[0] == "measure"]
    assert found == [({"heads/loss": -1.25}, 10), ({"heads/loss": 0.5}, 30)]


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt(), "stopped"), (ValueError("x"), "failed")]
)
def test_the_end_is_told_as_it_was(
    tracked: SimpleNamespace, error: BaseException, state: str
) -> None:
    with pytest.raises(type(error)), tracked.reporter.tracked():
        raise error
    assert tracked.calls[-1] == ("end", state)


def test_without_the_setting_nothing_is_sent(run: RunDirectory) -> None:
    reporter = Reporter(run, quiet=True)
    with reporter.tracked():
        reporter.event("a node was lost")
        reporter.measured({"rows": 9})


# --- trackers that fail --------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["begin", "later"])
def test_a_tracker_that_fails_is_given_up_and_the_work_continues(
    tracked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no route\nto host")

    start = refuse if when == "begin" else lambda *_: SimpleNamespace(note=refuse)
    monkeypatch.setitem(tracking._START, "wandb", start)
    with tracked.reporter.tracked():
        tracked.reporter.event("one")
        tracked.reporter.event("two")
    assert [e for e in tracked.reporter.events if e not in ("one", "two")] == [
        "tracking by wandb is given up: no route to host"
    ]


def test_a_tracker_that_hangs_holds_nothing_up(
    tracked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = threading.Event()
    monkeypatch.setattr(tracking, "END_WITHIN", 0.05)
    monkeypatch.setitem(tracking._START, "wandb", lambda *_: hang.wait())
    with tracked.reporter.tracked():
        tracked.reporter.event("one")
    hang.set()


# --- before anything is started ------------------------------------------------------------------


def test_what_is_missing_is_named_before_anything_runs(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking.check(None, run)
    monkeypatch.delenv(tracking.SERVER, raising=False)
    monkeypatch.setattr(tracking, "MODULES", {"mlflow": "json", "wandb": "no_such_module"})
    with pytest.raises(ConfigError, match=r"track=wandb needs a package: pip install '.\[wandb\]'"):
        tracking.check("wandb", run)
    with pytest.raises(ConfigError, match="track=mlflow: say where, as MLFLOW_TRACKING_URI="):
        tracking.check("mlflow", run)
    monkeypatch.setenv(tracking.SERVER, "http://host")
    tracking.check("mlflow", run)


def test_tensorboard_needs_a_disk(run: RunDirectory) -> None:
    tracking.check("tensorboard", run)
    remote: Any = SimpleNamespace(is_local=False, uri="s3://bucket/run")
    with pytest.raises(ConfigError, match=r"s3://bucket/run is an object store; use mlflow"):
        tracking.check("tensorboard", remote)


# --- the real ones -------------------------------------------------------------------------------


def installed(kind: str) -> None:
    if importlib.util.find_spec(tracking.MODULES[kind]) is None:
        warnings.warn(f"track={kind} is not tested: uv sync --extra {kind}", stacklevel=2)
        pytest.skip(f"NOT TESTED: {tracking.MODULES[kind]} is not installed (--extra {kind})")


def work(kind: str, run: RunDirectory) -> None:
    reporter = Reporter(run, quiet=True, tracking=Tracking(kind, run, SETTINGS))
    with reporter.tracked():
        reporter.stage = "heads"
        reporter.measured({"loss": 0.25}, 7)
        reporter.event("a node was lost")
        reporter.trial("first", {"heads.count": 4, "consensus.method": "mcla"}, {"nmi": 0.75})
    assert reporter.events == ["a node was lost"]  # the tracker did not fail


def events(folder: Path) -> Iterator[Any]:
    """Events of TensorBoard's files: each a length of 8 bytes, its checksum of 4, the event, and a
    checksum of 4."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.rglob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_tensorboard_has_them_in_the_run(run: RunDirectory) -> None:
    installed("tensorboard")
    work("tensorboard", run)
    found = list(events(Path(run.path(tracking.FOLDER))))
    values = [(e.step, value) for e in found for value in e.summary.value]
    scalars = {(value.tag, step, value.simple_value) for step, value in values}
    assert {("heads/loss", 7, 0.25), ("nmi", 0, 0.75)} <= scalars
    text = " ".join(str(value.tensor.string_val) for _, value in values)
    for said in ("a node was lost", "| heads.count | 2 |", "done"):
        assert said in text


def test_mlflow_has_a_run_and_one_for_each_trial(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv(tracking.SERVER, (tmp_path / "store").as_uri())
    work("mlflow", run)
    client = MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    experiment = client.get_experiment_by_name(tracking.PROJECT)
    trial, whole = sorted(
        client.search_runs([experiment.experiment_id]), key=lambda r: r.info.run_name
    )
    assert (whole.info.run_name, whole.info.status) == ("mine", "FINISHED")
    assert whole.data.params["backbone.1.name"] == "b"
    assert whole.data.tags["note.001"] == "a node was lost"
    (loss,) = client.get_metric_history(whole.info.run_id, "heads/loss")
    assert (loss.step, loss.value) == (7, 0.25)
    assert (trial.info.run_name, trial.data.metrics) == ("first", {"nmi": 0.75})
    assert trial.data.tags["mlflow.parentRunId"] == whole.info.run_id


@pytest.mark.slow
def test_wandb_keeps_them_for_later_where_it_is_offline(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    work("wandb", run)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while len(data := path.read_bytes()) < 100:  # W&B's own process writes it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for said in (b"heads/loss", b"a node was lost", b"backbone.1.name", b"first", b"done"):
        assert said in data
