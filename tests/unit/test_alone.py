"""jobs/benchmark.py alone and pace: the method in one process, without Ray or pyarrow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from icce_ray.errors import ConfigError, DataError

CPU = torch.device("cpu")
WITHOUT = """
import runpy, sys
for name in ("ray", "pyarrow", "faiss"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, str(__import__("pathlib").Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def alone(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "jobs"))
    from benchmarks import alone

    return alone


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Unit rows float16 [600, 16] around 5 directions, and which one each belongs to."""
    generator = np.random.default_rng(0)
    codes = np.arange(600) % 5
    rows = generator.normal(size=(5, 16))[codes] + 0.3 * generator.normal(size=(600, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), codes


def test_all_parts_are_timed_and_find_the_blobs(
    alone: ModuleType, blobs: tuple[np.ndarray, np.ndarray]
) -> None:
    said: list[str] = []
    heads = {"count": 12, "steps": 60}
    parts, remarks = alone.measure_parts(*blobs, 5, heads, None, CPU, said.append)
    names = [part.name for part in parts]
    assert names[0].startswith("neighbors") and names[-1].startswith("classifier")
    assert "heads: 55 steps" in names and len(said) == len(parts)
    assert all(part.seconds >= 0 and part.memory == 0 for part in parts)
    assert remarks["s that all 60 steps would take"] == pytest.approx(0.06 * remarks["ms per step"])
    assert remarks["accuracy of the consensus, %"] > 90
    assert remarks["accuracy of the classifier, %"] > 90
    table = alone.parts_table(parts)
    assert "GPU" not in table and table.count("\n") == len(parts) + 1


def test_heads_cut_short_are_timed_not_judged(
    alone: ModuleType, blobs: tuple[np.ndarray, np.ndarray]
) -> None:
    _, remarks = alone.measure_parts(*blobs, 5, {"count": 3}, 10, CPU, lambda line: None)
    assert remarks["s that all 1,000 steps would take"] > 0
    assert not any(name.startswith("accuracy") for name in remarks)


def test_gpu_memory_stands_beside_the_seconds(alone: ModuleType) -> None:
    table = alone.parts_table([alone.Part("search", 2.0, 3.4e9), alone.Part("merge", 1.0, 0.0)])
    assert "GPU memory, GB" in table and "| search | 2.0 | 3.4 |" in table


def test_a_case_of_files_has_neighbors_and_codes(
    alone: ModuleType, blobs: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    x, codes = blobs
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.array(list("edcba"))[codes])
    case = alone.case_of_files(tmp_path / "x.npy", tmp_path / "y.npy", CPU)
    assert case.clusters == 5
    assert (case.codes == 4 - codes).all()
    assert not (case.ids == np.arange(600)[:, None]).any()
    assert (case.codes[case.ids[:, 0]] == case.codes).mean() > 0.9
    assert case.counts.min() >= 5


def test_files_that_do_not_belong_together_are_refused(alone: ModuleType, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((6, 3)))
    np.save(tmp_path / "y.npy", np.zeros(5))
    with pytest.raises(DataError, match="a label for each row"):
        alone.embeddings_of(str(tmp_path / "x.npy"), tmp_path / "y.npy")
    with pytest.raises(DataError, match=r"no file .*none\.npy"):
        alone.embeddings_of(str(tmp_path / "x.npy"), tmp_path / "none.npy")


def test_recipes_are_trained_and_merged(
    alone: ModuleType, blobs: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import pace

    monkeypatch.setattr(pace, "OURS", {"balance": 0.5, "steps": 60})
    monkeypatch.setattr(pace, "TEMI_EPOCHS", 2)

    x, codes = blobs
    case = alone.case_of(x, codes, 5, CPU)
    made = pace.measure_pace(case, 4, 1e6, 0, CPU, only=["ours", "TEMI"])
    assert list(made) == ["ours", "TEMI"]
    ours = made["ours"]
    assert ours["curve"][-1]["mean"] > 0.9 and ours["consensus"] > 0.9
    seconds = [point["seconds"] for point in ours["curve"]]
    assert seconds == sorted(seconds) and len(seconds) > 2
    assert [made[name]["curve"][-1]["step"] for name in made] == [60, 2 * 600 // pace.TEMI_BATCH]
    lines = pace.pace_table(made).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["ours", "TEMI"]
    with pytest.raises(ConfigError, match="no recipe 'theirs'; there are ours, "):
        pace.measure_pace(case, 4, 1e6, 0, CPU, only=["theirs"])


def test_neither_ray_nor_pyarrow_is_needed(repository: Path, tmp_path: Path) -> None:
    sizes = ["--rows", "300", "--features", "16", "--classes", "5", "--heads", "3", "--steps", "10"]
    job = str(repository / "jobs" / "benchmark.py")
    command = [sys.executable, "-c", WITHOUT, job, "alone", *sizes, "--out", str(tmp_path / "a")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=repository
    )
    assert done.returncode == 0, done.stderr
    assert "consensus" in (tmp_path / "a.md").read_text()
