"""Sweeps over given embeddings, through the command line: sharing, resuming, stopping, failing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray import cli, config, pipeline
from icce_ray.distributed import tune as tuning
from icce_ray.rundir.directory import RunDirectory
from icce_ray.sweeps import phases

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

ROWS, FEATURES, CLUSTERS = 400, 16, 4
SMALL = """
search: grid
space:
  heads.beta: [0.6, 0.8]
  consensus.method: [voting, mcla]
"""
# Without learning (a tiny rate), heads that begin at k-means are good, and random ones are bad.
# At an absurd rate the loss is not finite.
UNEQUAL = """
search: each
concurrent: 1
space:
  heads.start: [random]
  heads.lr: [1.0e30]
"""


def write_config(folder: Path, **heads: Any) -> Path:
    generator = np.random.default_rng(0)
    labels = np.arange(ROWS) % CLUSTERS
    centers = 0.9 * np.eye(CLUSTERS, FEATURES)
    x = centers[labels] + 0.3 * generator.normal(size=(ROWS, FEATURES))
    np.save(folder / "x.npy", x.astype(np.float32))
    np.save(folder / "y.npy", labels)
    tree = {
        "num_classes": CLUSTERS,
        "run_dir": str(folder / "run"),
        "data": {"embeddings": str(folder / "x.npy"), "labels": str(folder / "y.npy")},
        "neighbors": {"max_neighbors": 12},
        "heads": {"count": 3, "batch_size": 128, **heads},
    }
    (folder / "base.yaml").write_text(json.dumps(tree))  # JSON is YAML
    return folder / "base.yaml"


def write_space(folder: Path, text: str, name: str = "small") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text("objective: neighbor_consistency\n" + text)
    return path


def results(folder: Path, name: str = "small") -> dict[str, Any]:
    return json.loads((folder / "run" / "sweeps" / name / "results.json").read_text())


def stamps(folder: Path) -> dict[Path, int]:
    """When records and finished artifacts were written."""
    run = folder / "run"
    paths = [*run.glob("store/*/_manifest.json"), *run.glob("sweeps/*/trials/*.json")]
    return {path: path.stat().st_mtime_ns for path in paths}


@dataclass
class Killed:
    """What a sweep left that was killed while heads trained."""

    folder: Path
    finished: dict[Path, int]  # artifacts, and when they were written
    checkpoints: int
    trained: int  # heads whose training was through


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """2 head trainings and 4 ensembles; SIGKILL to the driver and its own local Ray."""
    folder = tmp_path_factory.mktemp("sweep")
    base = write_config(folder, steps=600, checkpoint_every=40)
    arguments = ["sweep", str(base), str(write_space(folder, SMALL)), "ray.num_cpus=2"]
    store, said = folder / "run" / "store", folder / "stderr"
    with (
        said.open("wb") as stream,
        subprocess.Popen(
            [sys.executable, "-m", "icce_ray.cli", *arguments],
            start_new_session=True,
            stderr=stream,
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 300
            while not any(store.glob("heads-*/train/step-*/complete.json")):
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < deadline, "the sweep never got there"
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    return Killed(
        folder,
        {path: path.stat().st_mtime_ns for path in store.glob("*/_manifest.json")},
        len(list(store.glob("heads-*/train/step-*/complete.json"))),
        len(list(store.glob("heads-*/_manifest.json"))),
    )


@pytest.fixture(scope="module")
def finished(killed: Killed, ray_session: None) -> Path:
    """The folder of that sweep, resumed to its end."""
    arguments = [str(killed.folder / name) for name in ("base.yaml", "small.yaml")]
    cli.app(["sweep", *arguments], standalone_mode=False)
    return killed.folder


def test_a_killed_sweep_resumes(killed: Killed, finished: Path) -> None:
    assert killed.checkpoints and not killed.trained
    assert {path: path.stat().st_mtime_ns for path in killed.finished} == killed.finished
    found = (finished / "run" / "store").glob("heads-*/_manifest.json")
    events = [text for path in found for text in json.loads(path.read_text())["events"]]
    assert any("resumes from partial work" in text for text in events)


def test_trials_share_what_is_equal_and_are_ranked(finished: Path) -> None:
    found = results(finished)
    assert found["counts"]["done"] == 4 and len(found["trials"]) == 4
    assert found["counts"]["made"]["ensembles"] == 4
    kinds = [path.name.rpartition("-")[0] for path in (finished / "run" / "store").iterdir()]
    assert kinds.count("heads") == 2 and kinds.count("consensus") == 4
    assert kinds.count("selection") == 1 and not kinds.count("neighbors")  # the run's own search
    values = [trial["scores"]["neighbor_consistency"] for trial in found["trials"]]
    assert values == sorted(values, reverse=True) and found["best"] == found["trials"][0]["id"]
    assert values[0] > 0.3
    assert all(trial["accuracy"]["acc"] > 0.5 for trial in found["trials"])
    assert (finished / "run" / "sweeps" / "small" / "report" / "index.html").is_file()
    assert not (finished / "run" / "sweeps" / "small" / "tune").exists()


def test_the_best_config_reuses_the_sweep(finished: Path) -> None:
    best = config.load(finished / "run" / "sweeps" / "small" / "best.yaml")
    settings = results(finished)["trials"][0]["settings"]
    assert best.heads.beta == settings["heads.beta"]
    assert best.consensus.method == settings["consensus.method"]
    steps = pipeline.make_steps(best, RunDirectory(best.run_dir))
    assert [step.state for step in steps] == ["done"] * 6 + ["run"] * 4


def test_a_second_run_does_nothing_and_a_wider_space_only_what_is_new(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["sweep", str(finished / "base.yaml"), str(finished / "small.yaml")]
    before = stamps(finished)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "search", None)
        cli.app(arguments, standalone_mode=False)
    assert stamps(finished) == before
    shown = capsys.readouterr()
    assert "2 of 2 head trainings, 4 of 4 ensembles" in shown.err
    assert "best.yaml" in shown.out and "index.html" in shown.out
    write_space(finished, SMALL.replace("[voting, mcla]", "[voting, mcla, dawid-skene]"))
    cli.app(arguments, standalone_mode=False)
    after = stamps(finished)
    assert {path: after[path] for path in before} == before
    new = {path.parent.name.split("-")[0] for path in after.keys() - before.keys()}
    assert new == {"consensus", "trials"} and results(finished)["counts"]["done"] == 6


def test_bad_heads_are_stopped_and_failed_ones_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "FEWEST", 3)
    base = write_config(tmp_path, steps=1000, lr=1e-7)
    arguments = ["sweep", str(base), str(write_space(tmp_path, UNEQUAL))]
    cli.app(arguments, standalone_mode=False)
    found = results(tmp_path)
    trials = {
        (trial["settings"]["heads.start"], trial["settings"]["heads.lr"]): trial
        for trial in found["trials"]
    }
    assert trials["auto", 1e-7]["state"] == "done"
    stopped, failed = trials["random", 1e-7], trials["auto", 1e30]
    assert stopped["state"] == "stopped" and 25 <= stopped["stopped_at"] < 100
    assert failed["state"] == "failed" and "is not finite" in failed["error"]
    assert found["counts"]["made"]["head trainings"] == 3
    assert "1 trial failed" in capsys.readouterr().out
    cli.app([*arguments, "--plan"], standalone_mode=False)
    assert "2 of 3 head trainings" in capsys.readouterr().err  # the failed one is tried again
