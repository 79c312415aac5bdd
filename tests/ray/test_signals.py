"""SIGTERM and Ctrl-C, as `timeout`, systemd, Slurm and shells send them: to more than the driver.

`jobs/benchmark.py soak` stops runs in every stage; here it is one with a Ray task at work, and one
that works in the driver itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray  # noqa: F401

import psutil  # isort: skip  # comes with Ray, and is found once that is imported

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

PATIENCE = 600.0  # seconds; only a hang is that long
SETTINGS = """
num_classes: 3
data: {labels: none}
neighbors: {max_neighbors: 10, pca: null}
heads: {count: 4, steps: 600, batch_size: 256, checkpoint_every: 50}
evaluate: {kmeans: false}
"""

# The command line, whose search waits while there is a file. Where the tests themselves run in the
# background of a shell, their processes would ignore SIGINT.
DRIVER = """
import signal, sys, time
from pathlib import Path
from icce_ray import cli
from icce_ray.stages import search

signal.signal(signal.SIGINT, signal.default_int_handler)
folder, plain = Path(sys.argv[1]), search._search_task

def gated(*arguments):
    (folder / "searching").touch()
    while (folder / "gate").exists():
        time.sleep(0.05)
    return plain(*arguments)

search._search_task = gated
cli.main(sys.argv[2:])
"""


def until(what: str, ready: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """A function that starts the run, in a process group of its own, as a shell does."""
    rng = np.random.default_rng(0)
    x = np.eye(3, 16)[np.arange(240) % 3] + 0.2 * rng.normal(size=(240, 16))
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    (tmp_path / "small.yaml").write_text(SETTINGS)
    started: list[subprocess.Popen[bytes]] = []

    def run() -> subprocess.Popen[bytes]:
        settings = [f"data.embeddings={tmp_path}/x.npy", f"run_dir={tmp_path}/run"]
        with (tmp_path / f"{len(started)}.txt").open("wb") as printed:
            command = [sys.executable, "-c", DRIVER, str(tmp_path), "run", f"{tmp_path}/small.yaml"]
            process = subprocess.Popen(
                [*command, *settings],
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def everything(driver: int) -> None:
    """SIGTERM to the driver's group and to all below it, Ray's processes first, as Slurm does."""
    below = psutil.Process(driver).children(recursive=True)
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    os.killpg(driver, signal.SIGTERM)


def ctrl_c(driver: int) -> None:
    """SIGINT to the driver's group, as a terminal sends it."""
    os.killpg(driver, signal.SIGINT)


def checkpoints(heads: Path) -> set[str]:
    return {path.parent.name for path in heads.glob("train/*/complete.json")}


def stopped_by(end: Callable[[int], None], folder: Path, driver: Any, printed: Path) -> None:
    """Send the signal, and look at what it left."""
    assert driver.poll() is None, printed.read_text()
    end(driver.pid)
    assert driver.wait(PATIENCE) in (130, 143)
    said = printed.read_text()
    assert "stopped; run the same command again to resume" in said
    assert "GCS" not in said and "Traceback" not in said, said
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "stopped"


def test_a_stopped_run_ends_in_order_and_resumes(tmp_path: Path, start: Any) -> None:
    """Stopped twice, in two ways and stages, and then left to its end."""
    (tmp_path / "gate").touch()
    driver = start()
    until("search", lambda: (tmp_path / "searching").exists() or driver.poll() is not None)
    stopped_by(ctrl_c, tmp_path, driver, tmp_path / "0.txt")
    (tmp_path / "gate").unlink()
    driver, heads = start(), tmp_path / "run" / "heads"
    until("a checkpoint", lambda: checkpoints(heads) or driver.poll() is not None)
    stopped_by(everything, tmp_path, driver, tmp_path / "1.txt")
    assert not (heads / "_manifest.json").exists()
    assert start().wait(PATIENCE) == 0, (tmp_path / "2.txt").read_text()
    assert "resumed from the checkpoint at " in (tmp_path / "2.txt").read_text()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
