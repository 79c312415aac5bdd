"""jobs/benchmark.py on tiny sizes, without Ray: its input, its counting, its tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from icce_ray import config as configs
from icce_ray.core.collective import Counted
from icce_ray.errors import StageError

MEGABYTE = 1e6


@pytest.fixture
def benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "jobs"))
    from benchmarks import scale

    return scale


@pytest.fixture
def workers(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "jobs"))
    from benchmarks import workers

    return workers


# --- scale ---------------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors_whose_neighbors_are_mostly_right(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "BLOCK", 700)  # three blocks, the last one short
    benchmark.write_embeddings(tmp_path / "x.npy", rows=1500, features=64, classes=30)
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert x.shape == (1500, 64) and x.dtype == np.float16
    full = np.asarray(x, np.float32)
    np.testing.assert_allclose(np.linalg.norm(full, axis=1), 1, atol=2e-3)
    scores = full @ full.T
    np.fill_diagonal(scores, -1)
    near = np.argsort(-scores, axis=1)[:, :20]
    right = (
        benchmark.center_of(near, 30) == benchmark.center_of(np.arange(1500), 30)[:, None]
    ).mean()
    assert 0.6 < right < 1.0  # 1/30 by chance; 1 would make it too easy for an approximate search


def test_images_are_links_to_a_few_files(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "LINKS", 4)
    benchmark.make_images(tmp_path, rows=10, classes=3)
    files = sorted((tmp_path / "tree").rglob("*.png"))
    assert len(files) == 10
    assert sorted(len(list(folder.iterdir())) for folder in (tmp_path / "tree").iterdir()) == [
        3,
        3,
        4,
    ]
    inodes = [file.stat().st_ino for file in files]
    assert len(set(inodes)) == 3
    assert max(inodes.count(one) for one in inodes) <= 4


def test_settings_of_the_rehearsal_resolve(benchmark: ModuleType, tmp_path: Path) -> None:
    config = configs.load(benchmark.scale_settings(tmp_path, 1000, 50, 3))
    assert (config.num_classes, config.heads.count, config.heads.steps) == (1000, 50, 3)
    assert config.heads.batch_size is None and config.neighbors.search == "ivf"


ALLOCATE = """
import mmap, sys, time
own = bytearray(60_000_000)
with open(sys.argv[1], "rb") as stream:
    view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    touched = sum(view[i] for i in range(0, len(view), 4096))
    time.sleep(1.5)
"""


def test_allocated_and_mapped_memory_are_told_apart(benchmark: ModuleType, tmp_path: Path) -> None:
    """In a process below the one that is watched."""
    (tmp_path / "mapped").write_bytes(bytes(40_000_000))
    outer = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True)"
    inner = ["-c", ALLOCATE, str(tmp_path / "mapped")]
    seconds, peak = benchmark.watch([sys.executable, "-c", outer, *inner], tmp_path / "log")
    assert seconds > 1.5
    assert 60 * MEGABYTE < peak.own < 90 * MEGABYTE
    assert 39 * MEGABYTE < peak.mapped < 70 * MEGABYTE
    assert peak.process != "driver"
    assert peak.own < peak.all_own < peak.all


def test_a_failed_stage_says_what_it_said(benchmark: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no disk space"):
        command = [sys.executable, "-c", "import sys; sys.exit('error: no disk space')"]
        benchmark.watch(command, tmp_path / "log")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("ray::_search_task()", "_search_task"),
        ("ray::MapWorker(MapBatches(Worker)).__init__", "MapWorker(MapBatches(Worker)).__init__"),
        ("/x/bin/python -u /x/ray/dashboard/dashboard.py --host=1", "dashboard.py"),
        ("/x/ray/core/src/ray/raylet/raylet --a=b", "raylet"),
    ],
)
def test_processes_have_short_names(benchmark: ModuleType, command: str, name: str) -> None:
    assert benchmark.short_name(command) == name


def test_the_plan_stands_beside_what_was_measured(benchmark: ModuleType) -> None:
    peak = benchmark.Peak(own=2.5e9, mapped=1e9, process="driver", all_own=3e9, all=4e9)
    one = benchmark.Measured("neighbors", 1000, 12.34, 20.0, 5e8, peak, 2.25e9, 6e8)
    head, rule, line = benchmark.scale_table([one]).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert (cells["memory"], cells["s"], cells["in process"]) == ("2.5", "12.3", "driver")
    assert "| 2.5 | 2.25 | 1.11 | driver | 1 | 3 | 4 | 0.5 | 0.6 |" in line


# --- workers -------------------------------------------------------------------------------------


class Echo:
    """Two workers, the other of which has the same tensors."""

    rank, world = 0, 2

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor, tensor]

    def all_reduce_sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)

    def all_reduce_mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        return None


def test_bytes_of_a_step_are_those_of_the_formula(workers: ModuleType) -> None:
    """As jobs/README.md gives it."""
    work = workers.Work(200, 8, classes=5, heads=4, batch=64, steps=2, threads=1)
    pace = workers.measure_pace(Counted(Echo()), work)
    assert pace.sent == 2 * 64 * 4  # (W - 1) x H / W heads x B pairs, float32
    assert pace.workers == 2 and pace.seconds > 0


def test_a_single_worker_sends_nothing(workers: ModuleType, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    work = workers.Work(200, 8, classes=5, heads=4, batch=64, steps=2, threads=threads)
    workers.time_steps(0, 1, work, str(tmp_path))
    pace = json.loads((tmp_path / "1.json").read_text())
    assert pace["sent"] == 0 and pace["seconds"] > 0 and pace["workers"] == 1


def test_times_are_relative_to_the_smallest_group(workers: ModuleType) -> None:
    paces = [workers.Pace(1, 0.2, 0), workers.Pace(2, 0.15, 2.5e6)]
    table = workers.workers_table(paces).splitlines()
    assert table[2] == "| 1 | 200.0 | 1.00 | 0.000 |"
    assert table[3] == "| 2 | 150.0 | 0.75 | 2.500 |"


def test_help_names_the_measurements(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(repository / "jobs" / "benchmark.py")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "scale" in done.stdout and "workers" in done.stdout
    assert "Traceback" not in done.stderr
