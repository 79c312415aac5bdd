"""The chain on object storage that fails for a while, and on disks that are full."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from icce_ray import cli, config, pipeline
from icce_ray.config import schema
from icce_ray.core import backbone as backbones
from icce_ray.core import neighbors as nearest
from icce_ray.core.projection import fit_projection, project
from icce_ray.errors import ArtifactError
from icce_ray.rundir import storage
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import to_matrix

pytestmark = [pytest.mark.ray, pytest.mark.slow]

IMAGES = 120
OUTAGE = 8  # seconds; longer than the driver's pauses between looks at a remote worker's progress
SMALL = [
    "data.path={data}",
    "data.dataset=null",
    "backbone.image_size=48",
    "embed.shard_size=50",
    "heads.count=4",
    "heads.steps=60",
    "heads.checkpoint_every=10",
    "classifier.epochs=2",
    "evaluate.kmeans=false",
    "embed.max_actors=1",
    "ray.num_cpus=2",
]

CHAIN = """
import ctypes; ctypes.CDLL(None).prctl(1, 9)  # ends where pytest is killed
import json, sys
from icce_ray import config, pipeline
from icce_ray.config import schema
from icce_ray.distributed.cluster import Cluster
overrides = json.loads(sys.argv[1])
shared = Cluster(schema.RayConfig(num_cpus=2))
shared.start()
manifests = pipeline.run(config.load("quickstart", overrides))
print(json.dumps([m.id for m in manifests.values()]))
manifests = pipeline.run(config.load("quickstart", overrides), quiet=True)
print(json.dumps([m.id for m in manifests.values()]))
shared.stop()
"""


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """PNG files in class folders."""
    found = load_digits()
    for number in range(IMAGES):
        folder = tmp_path / "digits" / str(found.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (found.images[number] * 15.9).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return tmp_path / "digits"


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, f"the run ended with {process.returncode}: see its stderr"
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.1)


def column(run: RunDirectory, folder: str, name: str) -> np.ndarray:
    return to_matrix(run.read_table(folder, columns=[name])[name])


def test_the_whole_chain_on_s3_through_two_outages(
    s3, digits, tmp_path, monkeypatch, capsys, train_heads
) -> None:
    """Real images, a Ray Train worker; the server hangs once while it embeds, once while it trains.
    A second process on the same run is refused.

    All is named by URIs with options; the result is that of undisturbed work in this process.
    """
    data, run = (s3.uri(f"chain/{name}") for name in ("data", "run"))
    filesystem, path = storage.locate(data)
    pafs.copy_files(str(digits), path, destination_filesystem=filesystem)
    overrides = [f"run_dir={run}", *(t.format(data=data) for t in SMALL), "heads.num_workers=1"]
    monkeypatch.setenv("ICCE_RAY_STORAGE_PATIENCE", "120")
    monkeypatch.setenv("ICCE_RAY_STORAGE_PAUSE", "0.2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    remote = RunDirectory(run)
    with subprocess.Popen(
        [sys.executable, "-c", CHAIN, json.dumps(overrides)],
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),
        text=True,
        start_new_session=True,
    ) as process:
        try:
            wait_for(lambda: bool(remote.list("embeddings", "_layout.json")), process)
            with pytest.raises(ArtifactError, match=f"another process .*: process {process.pid} "):
                pipeline.run(config.load("quickstart", overrides), quiet=True)
            with s3.stopped():
                time.sleep(OUTAGE)
            steps = lambda: [f for f in remote.folders("heads/train") if f.startswith("step-")]  # noqa: E731
            wait_for(lambda: bool(steps()), process)
            with s3.stopped():
                time.sleep(OUTAGE)
            lines = process.communicate(timeout=400)[0].splitlines()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path / "stderr").read_text()
    assert process.returncode == 0, said[-3000:]
    assert "storage does not answer" in said and "trying again in" in said
    assert "Traceback" not in said
    _check_chain(remote, lines[-2:])
    settings = config.load("quickstart", overrides)
    _check_embeddings(remote, settings.backbone[0], sorted(digits.rglob("*.png")))
    expected = train_heads(remote, settings)
    assert (column(remote, "heads", "assignments") == expected).all()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    by_environment = f"s3://{s3.bucket}/chain/run"
    cli.app(["status", by_environment], standalone_mode=False)
    assert capsys.readouterr().out.count("done") >= len(pipeline.STAGES)
    cli.app(["report", by_environment], standalone_mode=False)
    assert capsys.readouterr().out.strip() == f"{by_environment}/report/index.html"


def _check_embeddings(
    run: RunDirectory, backbone: schema.BackboneConfig, files: list[Path]
) -> None:
    """They, and the neighbors, are what the backbone and a plain search give here."""
    model = backbones.load(backbone)
    images = np.stack([model.transform(Image.open(file).convert("RGB")) for file in files])
    expected = torch.nn.functional.normalize(model.embed(torch.from_numpy(images)), dim=-1)
    found = column(run, "embeddings", "embedding")
    assert (found * expected.numpy()).sum(1).min() > 0.97  # where there is bfloat16, it is used
    cpu, components = torch.device("cpu"), schema.NeighborsConfig().pca
    searched = project(found, fit_projection(found, components, 0), cpu).numpy()
    _, similarity = nearest.search(searched, 0, IMAGES, 100, "cpu")
    stored = column(run, "neighbors", "similarity")
    np.testing.assert_allclose(stored, similarity[:, : stored.shape[1]], atol=2e-3)


def _check_chain(remote: RunDirectory, lines: list[str]) -> None:
    assert lines[0] == lines[1] and lines[0].count(",") == len(pipeline.STAGES) - 1  # all skipped
    assert remote.manifest("embeddings").results["quarantined"] == 0  # type: ignore[union-attr]
    events = [e for f in ("embeddings", "heads") for e in remote.manifest(f).events]  # type: ignore[union-attr]
    assert any("does not answer" in event for event in events)
    assert any("answers again" in event for event in events)
    assert remote.read_json("evaluation", "metrics.json")["acc"] > 0.3
    assert remote.folders("heads") == [] and not remote.list("heads/train")
    assert b"done in" in remote.read_bytes("log")


# --- full disks ----------------------------------------------------------------------------------

FULL = """
import ctypes; ctypes.CDLL(None).prctl(1, 9)  # ends where pytest is killed
import pathlib, resource, subprocess, sys
from icce_ray import config, pipeline
from icce_ray.config import schema
from icce_ray.rundir.directory import RunDirectory
from icce_ray.distributed.cluster import Cluster
from icce_ray.errors import StageError

folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
disk = folder / "disk"
disk.mkdir()
if kind == "tmpfs":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(disk)], check=True)
old = resource.getrlimit(resource.RLIMIT_FSIZE)

def fill():
    if kind == "limit":  # files end at 1 kB, in this process
        return resource.setrlimit(resource.RLIMIT_FSIZE, (1024, old[1]))
    try:
        with (disk / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass

def free():
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    (disk / "filler").unlink(missing_ok=True)

def settings(run):
    tree = {"num_classes": 3, "data": {"embeddings": str(folder / "x.npy")}}
    return config.load(tree, [f"run_dir={run}", "heads.num_workers=0", "heads.count=2",
        "heads.steps=20", "heads.checkpoint_every=5", "embed.shard_size=500"])

shared = Cluster(schema.RayConfig(num_cpus=2))
shared.start()
pipeline.run(settings(folder / "plain"), quiet=True)
pipeline.DISK_MARGIN = 0.0  # the disk fills up after the plan was made
before = None
for stage, place in ((one.name, one.folder) for one in pipeline.STAGES):
    if before:
        pipeline.run(settings(disk / "run"), quiet=True, last=before)
    before = stage
    fill()
    try:
        pipeline.run(settings(disk / "run"), quiet=True, last=stage)
        print(f"{stage}: no error")
    except StageError as error:
        print(f"{stage}: {error}")
    finally:
        free()
    run = RunDirectory(str(disk / "run"))
    assert run.manifest(place) is None
    left = [p.name for p in pathlib.Path(run.root).rglob("*") if ".tmp" in p.name]
    assert not left, left
pipeline.run(settings(disk / "run"), quiet=True)
for name in ("embeddings", "neighbors", "selection", "heads", "consensus", "classifier"):
    one, two = (RunDirectory(str(f)).read_table(name) for f in (folder / "plain", disk / "run"))
    assert one.equals(two), name
print("equal")
shared.stop()
"""


def _small_disk() -> tuple[list[str], str]:
    """What to put before a command so that it may mount a disk of its own, and the kind of disk.

    Where nothing may be mounted, a limit on the size of files stands for the full disk.
    """
    mount = ["mount", "-t", "tmpfs", "none", "/mnt"]
    for apart in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        with contextlib.suppress(OSError):
            if not subprocess.run([*apart, *mount], capture_output=True, check=False).returncode:
                return apart, "tmpfs"
    return [], "limit"


@pytest.mark.timeout(1500)  # ten stages, each twice
def test_a_full_disk_stops_each_stage_and_costs_nothing(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(3, 16))
    values = centers[np.arange(1500) % 3] + 0.3 * generator.normal(size=(1500, 16))
    np.save(tmp_path / "x.npy", values)
    before, kind = _small_disk()
    done = subprocess.run(
        [*before, sys.executable, "-c", FULL, str(tmp_path), kind],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, last = done.stdout.splitlines()
    assert last == "equal"
    assert [line.partition(":")[0] for line in lines] == [one.name for one in pipeline.STAGES]
    for line in lines:
        assert "no disk space left" in line and "run the same command again" in line, line
