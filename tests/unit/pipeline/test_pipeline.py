"""What the chain decides before it runs anything. No stage is run and no Ray started."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray import pipeline
from icce_ray.config.loading import load
from icce_ray.config.schema import Config
from icce_ray.distributed.cluster import Cluster
from icce_ray.errors import ArtifactError, ConfigError, StageError
from icce_ray.rundir import tracking
from icce_ray.rundir.directory import Manifest, RunDirectory, Snapshot
from icce_ray.rundir.lock import exclusive
from icce_ray.rundir.progress import Reporter
from icce_ray.rundir.storage import Storage
from icce_ray.stages.base import Context, Size
from icce_ray.stages.table import stage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(30, 8)))
    return tmp_path


def config(folder: Path, *overrides: str) -> Config:
    tree = {"num_classes": 3, "data": {"embeddings": str(folder / "x.npy")}}
    return load(tree, [f"run_dir={folder / 'run'}", *overrides])


def ids(run: RunDirectory, names: Sequence[str]) -> dict[str, str]:
    """Ids of finished stages, by name; those that are not finished are left out."""
    done = {name: run.manifest(stage(name).folder) for name in names}
    return {name: manifest.id for name, manifest in done.items() if manifest}


def pretend(settings: Config, *names: str) -> RunDirectory:
    """Write manifests as if these stages had run with these settings."""
    run = RunDirectory(settings.run_dir)
    for step in pipeline.make_steps(settings, run):
        if step.stage.name in names:
            run.finish(
                step.stage.folder,
                Manifest(
                    stage=step.stage.name,
                    fingerprint=step.fingerprint,
                    settings=step.stage.settings(settings),
                    inputs=ids(run, step.stage.needs),
                    rows=30,
                    seconds=1.0,
                ),
            )
    return run


def states(settings: Config, run: RunDirectory, **more: Any) -> dict[str, str]:
    return {s.stage.name: s.state for s in pipeline.make_steps(settings, run, **more)}


def test_a_new_run_runs_everything(folder: Path) -> None:
    settings = config(folder)
    assert set(states(settings, RunDirectory(settings.run_dir)).values()) == {"run"}
    assert not (folder / "run").exists()  # looking writes nothing


def test_finished_stages_are_skipped(folder: Path) -> None:
    settings = config(folder)
    run = pretend(settings, *pipeline.NAMES)
    assert set(states(settings, run).values()) == {"done"}


def test_a_changed_setting_invalidates_its_stage_and_what_follows(folder: Path) -> None:
    run = pretend(config(folder), *pipeline.NAMES)
    found = states(config(folder, "heads.count=3"), run)
    assert [found[n] for n in pipeline.NAMES[:4]] == ["done"] * 4
    assert found["heads"] == "changed"
    assert {found[n] for n in ("consensus", "classify", "evaluate", "report")} == {"again"}


@pytest.mark.parametrize(
    "changed",
    [
        "num_classes=7",
        "neighbors.k=9",
        "neighbors.min_neighbors=2",
        "neighbors.rule=fixed",
        "neighbors.rule=threshold neighbors.threshold=0.5",
    ],
)
def test_another_selection_repeats_no_search(folder: Path, changed: str) -> None:
    run = pretend(config(folder), *pipeline.NAMES)
    found = states(config(folder, *changed.split()), run)
    assert [found[n] for n in ("index", "embed", "search")] == ["done"] * 3
    assert found["select"] == "changed" and found["heads"] in ("again", "changed")


@pytest.mark.parametrize(
    "changed", ["neighbors.max_neighbors=9", "neighbors.pca=4", "neighbors.nprobe=3"]
)
def test_another_search_repeats_no_embedding(folder: Path, changed: str) -> None:
    run = pretend(config(folder), *pipeline.NAMES)
    found = states(config(folder, changed), run)
    assert [found[n] for n in ("embed", "search", "select")] == ["done", "changed", "again"]


@pytest.mark.parametrize(
    ("setting", "reader"), [("answer.vocabulary", "answer"), ("data.labels", "evaluate")]
)
def test_a_file_of_words_or_labels_that_was_edited_is_read_again(
    folder: Path, setting: str, reader: str
) -> None:
    file = folder / "lines.txt"
    file.write_text("cat\ndog\n")
    settings = config(folder, f"{setting}={file}")
    run = pretend(settings, *pipeline.NAMES)
    assert set(states(settings, run).values()) == {"done"}
    file.write_text("cat\nrat\n")
    found = states(settings, run)
    assert found.pop(reader) == "changed" and found.pop("report") == "again"
    assert found.pop("evaluate", "done") == "done" and set(found.values()) == {"done"}
    reason = next(s.reason for s in pipeline.make_steps(settings, run) if s.stage.name == reader)
    assert f"{setting.partition('.')[2]}_sha256: " in reason
    file.unlink()  # which the checks before a run refuse
    assert states(settings, run)[reader] == "changed"


def test_a_runtime_setting_invalidates_nothing(folder: Path) -> None:
    run = pretend(config(folder), *pipeline.NAMES)
    other = config(folder, "heads.num_workers=7", "embed.batch_size=3", "ray.num_cpus=1")
    assert set(states(other, run).values()) == {"done"}


def test_a_missing_stage_makes_later_ones_run_again(folder: Path) -> None:
    settings = config(folder)
    run = pretend(settings, *pipeline.NAMES)
    run.delete("neighbors")
    found = states(settings, run)
    assert found["search"] == "run"
    assert found["select"] == found["heads"] == found["consensus"] == found["evaluate"] == "again"
    assert found["embed"] == "done"


def test_a_stage_that_was_made_anew_outdates_what_read_the_old_one(folder: Path) -> None:
    settings = config(folder)
    run = pretend(settings, *pipeline.NAMES)
    pretend(settings, "search")  # the same settings, another id
    found = states(settings, run)
    assert found["select"] == found["heads"] == found["consensus"] == "again"


def test_half_done_work_is_resumed_for_the_same_settings_only(folder: Path) -> None:
    settings = config(folder)
    run = pretend(settings, "index", "embed", "search", "select")
    step = pipeline.make_steps(settings, run)[4]
    inputs = ids(run, step.stage.needs)
    mark = {
        "fingerprint": step.fingerprint,
        "settings": step.stage.settings(settings),
        "inputs": inputs,
    }
    run.begin("heads", mark)
    assert states(settings, run)["heads"] == "resume"
    other = config(folder, "seed=5")
    assert states(other, run)["heads"] == "run"  # nothing was written yet: nothing to lose
    run.write_bytes(b"x", "heads", "something")
    assert states(other, run)["heads"] == "changed"


def test_the_error_names_keys_losses_and_remedies(folder: Path) -> None:
    pretend(config(folder), *pipeline.NAMES)
    with pytest.raises(ArtifactError) as error:
        pipeline.run(config(folder, "heads.count=3"), quiet=True)
    text = str(error.value)
    assert "heads.count: 24 -> 3" in text
    assert "invalidates: heads, consensus, answer, classify, evaluate, report" in text
    assert "Kept: index, embed, search, select" in text
    assert "--overwrite" in text and "run_dir" in text


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (None, None, pipeline.NAMES),
        ("heads", None, pipeline.NAMES[4:]),
        (None, "embed", ("index", "embed")),
        ("heads", "heads", ("heads",)),
    ],
)
def test_the_stages_between_two(
    first: str | None, last: str | None, expected: tuple[str, ...]
) -> None:
    assert pipeline.names_between(first, last) == expected


@pytest.mark.parametrize(("first", "last"), [("nope", None), (None, "head"), ("report", "index")])
def test_names_out_of_order_are_refused(first: str | None, last: str | None) -> None:
    with pytest.raises(ConfigError):
        pipeline.names_between(first, last)


def test_beginning_in_the_middle_needs_what_comes_before(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="needs a finished index"):
        pipeline.run(config(folder), first="heads", quiet=True)


def test_a_full_disk_is_seen_before_anything_expensive(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDirectory, "free_bytes", lambda self: 1000)
    with pytest.raises(StageError, match="no disk space left"):
        pipeline.run(config(folder), quiet=True)
    assert not (folder / "run" / "embeddings").exists()


def test_a_plan_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.run(config(folder), plan_only=True) == {}
    shown = capsys.readouterr().err
    assert "D 8" in shown and "H 24" in shown and "K 3" in shown
    assert all(name in shown for name in pipeline.NAMES)
    assert not (folder / "run").exists()


def test_one_process_at_a_time(folder: Path) -> None:
    run = RunDirectory(str(folder / "run"))
    with exclusive(run), pytest.raises(ArtifactError, match="another process"):
        pipeline.run(config(folder), quiet=True)


def test_a_run_directory_below_a_file_is_one_error(folder: Path) -> None:
    (folder / "file").touch()
    settings = config(folder, f"run_dir={folder}/file/run")
    with pytest.raises(StageError, match=r"cannot be written.*run_dir="):
        pipeline.run(settings, quiet=True)


# --- how a run ends ------------------------------------------------------------------------------


class Still:
    """A cluster that was never started."""

    stopped = False

    def stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (KeyboardInterrupt(), "stopped"),
        (SystemExit(1), "stopped"),
        (StageError("no place"), "failed"),
        (RuntimeError("a bug"), "failed"),
        (None, "done"),
    ],
)
def test_status_says_how_a_run_ended(folder: Path, error: Any, state: str) -> None:
    run = RunDirectory(str(folder / "run"))
    cluster: Any = Still()
    with (
        contextlib.suppress(BaseException),
        pipeline.running(run, Reporter(run, quiet=True), cluster),
    ):
        assert run.read_json("status.json")["state"] == "running"
        if error is not None:
            raise error
    found = run.read_json("status.json")
    assert found["state"] == state and cluster.stopped
    assert (state == "failed") == ("error" in found)
    assert found["pid"] == os.getpid() and found["host"]


def test_sigterm_stops_a_run_and_its_handler_goes(folder: Path) -> None:
    run, before = RunDirectory(str(folder / "run")), signal.getsignal(signal.SIGTERM)
    cluster: Any = Still()
    with (
        pytest.raises(KeyboardInterrupt),
        pipeline.running(run, Reporter(run, quiet=True), cluster),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert run.read_json("status.json")["state"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) is before


# --- what a look costs, and what it sees ---------------------------------------------------------


def test_a_finished_run_costs_one_listing_and_one_read_per_stage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(folder)
    run = pretend(settings, *pipeline.NAMES)
    requests: list[str] = []
    attempt = Storage.attempt

    def counted(self: Storage, work: Any, *parts: str) -> Any:
        requests.append("/".join(parts))
        return attempt(self, work, *parts)

    monkeypatch.setattr(Storage, "attempt", counted)
    snapshot = Snapshot()
    pipeline.make_steps(settings, run, snapshot=snapshot)
    assert len(requests) == 2 * len(pipeline.STAGES) == len(set(requests))
    pipeline.make_steps(settings, run, snapshot=snapshot)
    assert len(requests) == 2 * len(pipeline.STAGES)
    snapshot.forget(run, "heads")
    steps = pipeline.make_steps(settings, run, snapshot=snapshot)
    assert requests[2 * len(pipeline.STAGES) :] == ["heads", "heads/_manifest.json"]
    assert not any(step.todo for step in steps)


def begin(run: RunDirectory, settings: Config, name: str) -> None:
    """Leave a stage half done."""
    step = next(s for s in pipeline.make_steps(settings, run) if s.stage.name == name)
    values = {"settings": step.stage.settings(settings), "inputs": dict(step.inputs)}
    run.begin(step.stage.folder, {"fingerprint": step.fingerprint, **values})
    run.write_bytes(b"x", step.stage.folder, "shard")


def test_half_done_work_of_other_inputs_is_not_promised_to_resume(folder: Path) -> None:
    settings = config(folder)
    run = pretend(settings, "index", "embed", "search", "select")
    begin(run, settings, "heads")
    assert states(settings, run)["heads"] == "resume"
    pretend(settings, "select")  # the same settings, another artifact
    step = next(s for s in pipeline.make_steps(settings, run) if s.stage.name == "heads")
    assert (step.state, step.reason) == ("again", "half done with other inputs")


@pytest.mark.parametrize("override", ["report.images_per_cluster=3", "report.max_megabytes=2"])
def test_the_report_is_rebuilt_without_being_asked(folder: Path, override: str) -> None:
    run = pretend(config(folder), *pipeline.NAMES)
    other = config(folder, override)
    found = states(other, run)
    assert found.pop("report") == "again" and set(found.values()) == {"done"}
    pipeline._check(pipeline.make_steps(other, run), run, pipeline.NAMES, overwrite=False)


def test_the_arrays_beside_a_run_are_part_of_the_disk_it_needs() -> None:
    """At ImageNet's size 5.2 GB were planned and 7.7 GB written."""
    tree = {"num_classes": 1000, "data": {"path": "x"}, "neighbors": {"search": "ivf"}}
    settings, size, local = load(tree), Size(1_281_167, 1024), Cluster()
    needs = {s.name: s.estimate(settings, size, local) for s in pipeline.STAGES}
    matrix = 2.0 * 1_281_167 * 1024  # embeddings.npy
    assert needs["search"].cache > matrix
    lists = 6.0 * 1_281_167 * settings.neighbors.max_neighbors
    assert needs["select"].cache >= lists and needs["search"].disk >= lists
    assert needs["consensus"].cache >= 2.0 * 1_281_167 * settings.head_count


def test_a_disk_too_small_for_the_arrays_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, size = config(folder), Size(30, 8)
    run = RunDirectory(settings.run_dir)
    context = Context(settings, run, Reporter(run, quiet=True), Cluster())
    steps = pipeline.make_steps(settings, run)
    needs = [step.stage.estimate(settings, size, context.cluster) for step in steps]
    files = int(1.1 * sum(need.disk for need in needs)) + 1
    monkeypatch.setattr(RunDirectory, "free_bytes", lambda self: files)
    with pytest.raises(StageError, match="no disk space left for this run"):
        pipeline._check_disk(context, steps, size)


def test_every_stage_has_a_file_and_its_folder() -> None:
    for one in pipeline.STAGES:
        module = importlib.import_module(f"icce_ray.stages.{one.name}")
        assert callable(module.run) and one.folder == module.FOLDER


# --- an experiment tracker -----------------------------------------------------------------------


def test_a_tracker_gets_the_results_of_each_stage_and_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Recorder:
        def __init__(self, run: RunDirectory, settings: Any) -> None:
            calls.append(("begin", run.uri, settings["num_classes"]))

        def measure(self, values: Any, step: int) -> None:
            calls.append(("measure", values["index/rows"]))

        def end(self, state: str) -> None:
            calls.append(("end", state))

    monkeypatch.setitem(tracking._START, "tensorboard", Recorder)
    pipeline.run(config(folder, "track=tensorboard"), last="index", quiet=True)
    assert calls == [("begin", str(folder / "run"), 3), ("measure", 30.0), ("end", "done")]


def test_a_tracker_that_cannot_be_used_is_seen_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tracking.SERVER, raising=False)
    with pytest.raises(ConfigError, match="track=mlflow"):
        pipeline.run(config(folder, "track=mlflow"), quiet=True)
    assert not (folder / "run").exists()
