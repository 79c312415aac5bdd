"""The whole chain through the command line: real images, real weights, a local Ray."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import icce_ray
from icce_ray import cli as program
from icce_ray import pipeline
from icce_ray.config.loading import load
from icce_ray.errors import ArtifactError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.stages import embed

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SMALL = [
    "data.limit=300",
    "backbone.image_size=64",
    "embed.shard_size=64",
    "heads.count=6",
    "heads.steps=120",
    "heads.checkpoint_every=20",
    "heads.num_workers=0",
    "classifier.epochs=10",
    "ray.num_cpus=2",
]

Here = Callable[..., subprocess.CompletedProcess[str]]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "icce_ray.cli", *arguments]


def cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.fixture
def here(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Here:
    """The command line beside the finished run, in this process."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(finished)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            program.main(list(arguments))
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code or 0, said.out, said.err)

    return call


def clusters(run: Path, stage: str) -> np.ndarray:
    table = pq.read_table(run / stage / "part-00000.parquet")
    return table.sort_by("image_id")["cluster"].to_numpy()


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    """SIGKILL a run, driver first, as soon as `ready()`; its local Ray dies with it."""
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass
class Killed:
    """A small quickstart in `folder`/run, killed while it embeds, and resumed."""

    folder: Path
    shards: dict[Path, int]  # finished by then, and when
    status: str  # what `icce-ray status` said then
    last: subprocess.CompletedProcess[str]  # the command that went through


def written(run: Path) -> dict[Path, int]:
    """Shards of embeddings, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in run.glob("embeddings/part-*.parquet")}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """On one core at first: embedding must not wait for a second one."""
    folder = tmp_path_factory.mktemp("chain")
    run, arguments = folder / "run", ["run", "quickstart", "run_dir=run", *SMALL]
    with subprocess.Popen(
        command(*arguments, "ray.num_cpus=1"),
        cwd=folder,
        env=ENVIRONMENT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    ) as process:
        kill_when(process, lambda: bool(written(run)))
    shards = written(run)
    status = cli("status", "run", cwd=folder).stdout
    return Killed(folder, shards, status, cli(*arguments, cwd=folder))


@pytest.fixture(scope="module")
def finished(killed: Killed) -> Path:
    """A folder with a finished small quickstart in `run`."""
    assert killed.last.returncode == 0, killed.last.stderr
    return killed.folder


def test_the_command_ends_with_the_accuracy_and_the_report(killed: Killed) -> None:
    assert killed.last.returncode == 0, killed.last.stderr
    assert "accuracy" in killed.last.stdout
    assert str(killed.folder / "run" / "report" / "index.html") in killed.last.stdout


def test_a_killed_run_goes_on(killed: Killed) -> None:
    assert 0 < len(killed.shards) < 5, "the kill came too late to show anything"
    run = killed.folder / "run"
    assert killed.shards.items() <= written(run).items()  # they were not written again
    ids = RunDirectory(str(run)).matrix("embeddings", "image_id")
    assert ids.tolist() == list(range(300))
    assert "half done" in killed.status
    assert "embed resumes from partial work" in killed.last.stderr


def test_a_killed_run_ends_as_an_undisturbed_one(finished: Path, train_heads: Any) -> None:
    run = RunDirectory(str(finished / "run"))
    found = np.array(run.matrix("heads", "assignments"))
    assert (found == train_heads(run, load(finished / "run" / "config.yaml"))).all()


def test_every_stage_leaves_its_manifest_and_the_metrics(finished: Path) -> None:
    for stage in pipeline.STAGES:
        manifest = json.loads((finished / "run" / stage.folder / "_manifest.json").read_text())
        assert manifest["stage"] == stage.name
    metrics = json.loads((finished / "run" / "evaluation" / "metrics.json").read_text())
    for key in ("acc", "nmi", "ari"):
        assert 0 <= metrics[key] <= 1
    assert metrics["acc"] > 0.3  # chance is 0.1; a small run reaches 0.6 and more
    assert not (finished / "run" / "heads" / "train").exists()


def test_a_second_run_skips_all_stages(
    finished: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("_manifest.json")}
    monkeypatch.setattr(pipeline, "run_stage", None)
    monkeypatch.setattr(embed, "preflight", None)  # it imports timm, which takes seconds
    done = here("run", "quickstart", "run_dir=run", *SMALL)
    assert done.returncode == 0, done.stderr
    after = {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("_manifest.json")}
    assert before == after
    assert done.stderr.count("skip, done") == len(pipeline.STAGES)


def test_a_copied_run_is_as_finished_as_the_first(finished: Path, here: Here) -> None:
    shutil.copytree(finished / "run", finished / "copy")
    (finished / "copy" / "report" / "_manifest.json").unlink()
    done = here("run", "quickstart", "run_dir=copy", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("skip, done") == len(pipeline.STAGES) - 1
    assert (finished / "copy" / "report" / "_manifest.json").exists()


def test_a_changed_setting_names_what_it_invalidates(here: Here) -> None:
    done = here("run", "quickstart", "run_dir=run", *SMALL, "consensus.method=mcla")
    assert done.returncode == ArtifactError.exit_code
    assert "consensus.method: 'dawid-skene' -> 'mcla'" in done.stderr
    assert "This invalidates: consensus, answer, classify, evaluate, report" in done.stderr
    assert "--overwrite" in done.stderr
    assert "Traceback" not in done.stderr


def test_predict_labels_new_images_as_the_classifier_does(
    finished: Path, here: Here, ray_session: None
) -> None:
    done = here("predict", "run", "data/digits", "out=predicted", "data.limit=600")
    assert "Accuracy" in done.stderr
    assert done.returncode == 0, done.stderr
    table = pq.read_table(sorted((finished / "predicted").glob("*.parquet")))
    assert len(table) == 600
    confidence = table["confidence"].to_numpy()
    assert ((confidence > 0) & (confidence <= 1)).all()
    index = pq.read_table(finished / "run" / "index" / "part-00000.parquet")
    uris = index.sort_by("image_id")["uri"].to_pylist()
    predicted = dict(zip(table["uri"].to_pylist(), table["cluster"].to_pylist(), strict=True))
    own = clusters(finished / "run", "classifier")
    same = np.mean([predicted[u] == c for u, c in zip(uris, own, strict=True)])
    assert same > 0.98  # bfloat16 features depend a little on the batch they are computed in


def test_status_and_report_read_a_finished_run(here: Here) -> None:
    status = here("status", "run")
    assert status.returncode == 0
    assert status.stdout.count("done") >= len(pipeline.STAGES)
    report = here("report", "run")
    assert report.returncode == 0
    assert Path(report.stdout.strip()).is_file()


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    """150 vectors around 3 directions, and their labels."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(3, 16))
    labels = np.arange(150) % 3
    np.save(tmp_path / "x.npy", centers[labels] + 0.3 * generator.normal(size=(150, 16)))
    np.save(tmp_path / "y.npy", labels)
    np.save(tmp_path / "permuted.npy", generator.permutation(labels))
    return tmp_path


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As Ray's tasks have: more threads would round differently."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_embeddings(folder: Path, name: str, *overrides: str) -> Path:
    tree = {"num_classes": 3, "data": {"embeddings": str(folder / "x.npy")}}
    settings = [f"run_dir={folder / name}", "heads.num_workers=0", "seed=1"]
    pipeline.run(load(tree, [*settings, "heads.count=4", "heads.steps=60", *overrides]), quiet=True)
    return folder / name


def test_in_memory_the_same_comes_out(embeddings: Path, ray_session: None) -> None:
    """`cluster`, which has neither files nor Ray, and a run, on the same rows."""
    x = np.load(embeddings / "x.npy")
    run = run_embeddings(embeddings, "run")
    with one_thread():
        found = icce_ray.cluster(x, 3, seed=1, heads={"count": 4, "steps": 60})
    done = icce_ray.load(run)
    assert (done.clusters == found.labels).all()
    np.testing.assert_allclose(done.confidence, found.confidence, atol=1e-6)
    kept = RunDirectory(str(run))
    assert (kept.matrix("neighbors", "ids") == found.neighbors.ids).all()
    assert (kept.matrix("heads", "assignments") == found.assignments).all()
    given, expected = done.predict(x), found.predict(x)
    assert (given["cluster"] == expected[0]).all()
    np.testing.assert_allclose(given["confidence"], expected[1], atol=1e-4)
    assert (given["cluster"] == clusters(run, "classifier")).all()
    np.testing.assert_allclose(done.embeddings, x / np.linalg.norm(x, axis=1)[:, None], atol=1e-3)
    assert done.uris == [f"{embeddings / 'x.npy'}#{row}" for row in range(150)]


def test_ground_truth_changes_no_prediction(embeddings: Path, ray_session: None) -> None:
    true = run_embeddings(embeddings, "true", f"data.labels={embeddings / 'y.npy'}")
    wrong = run_embeddings(embeddings, "wrong", f"data.labels={embeddings / 'permuted.npy'}")
    for stage in ("consensus", "classifier"):
        first = pq.read_table(true / stage / "part-00000.parquet")
        second = pq.read_table(wrong / stage / "part-00000.parquet")
        assert first.equals(second)
    accuracy = [
        json.loads((run / "evaluation" / "metrics.json").read_text())["acc"]
        for run in (true, wrong)
    ]
    assert accuracy[0] == 1.0
    assert accuracy[1] < 0.6
