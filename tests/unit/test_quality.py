"""The tables of jobs/benchmark.py accuracy, classes and pace."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest

from icce_ray.core.unit_rows import unit_rows
from icce_ray.errors import DataError


@pytest.fixture
def quality(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "jobs"))
    from benchmarks import quality

    return quality


def test_accuracy_of_seeds_and_their_mean(quality: ModuleType) -> None:
    one = dict.fromkeys(quality.PERCENT, 0.5) | {"test": None, "seconds": 10.0, "wall": 20.0}
    lines = quality.accuracy_table([{"seed": 0, **one}, {"seed": 4, **one, "consensus": 0.6}])
    head, _, *rest = (line.strip("| ").split(" | ") for line in lines.splitlines())
    assert "test" not in head and head[:2] == ["seed", "consensus"]
    assert rest[1][:2] == ["4", "60.0"] and rest[2][:3] == ["mean", "55.0 ± 7.1", "50.0 ± 0.0"]


def test_the_number_of_classes_is_counted_of_blobs(quality: ModuleType) -> None:
    """Rows without a label belong to no class."""
    codes = np.repeat(np.arange(6), 200)
    x = np.random.default_rng(0).normal(0, 0.2, (1200, 16)) + np.eye(6, 16)[codes]
    codes[:3] = -1
    found = quality.count_classes(unit_rows(x), codes, [0])
    assert found[0]["true"] == 6 and found[0]["low"] <= found[0]["found"] <= found[0]["high"]
    *_, line = quality.classes_table(found).splitlines()
    assert line.startswith(f"| 0 | 6 | {found[0]['found']} | {found[0]['low']}-")


def test_true_classes_are_scored_as_the_clusters_are(quality: ModuleType) -> None:
    codes = np.repeat(np.arange(3), 40)
    x = unit_rows(np.random.default_rng(0).normal(0, 0.05, (120, 8)) + np.eye(3, 8)[codes])
    found = quality.score_truth(x, codes)
    for name in ("consensus", "k-means"):
        assert found[name] == pytest.approx(found["truth"], abs=0.02), name
    assert found["truth"]["accuracy"] == 1
    assert quality.truth_table(found).splitlines()[2].startswith("| truth | 1.000 | ")
    with pytest.raises(DataError, match="4 images have no label"):
        quality.score_truth(x, np.where(np.arange(120) < 4, -1, codes))


def test_the_drawing_of_a_training_names_its_recipes(quality: ModuleType, tmp_path: Path) -> None:
    from benchmarks import pace

    point = {"step": 1, "best": 0.5}
    times = (0.0, 2.0, 30.0)
    curves = {
        name: [
            {**point, "seconds": t, "mean": 0.1 + t / 100, "loss": math.nan if t == 0 else -t}
            for t in times
        ]
        for name in ("ours", "theirs & others")
    }
    pace.pace_chart(curves, tmp_path / "pace.svg")
    drawn = ElementTree.parse(tmp_path / "pace.svg").getroot()
    text = " ".join(part.text or "" for part in drawn.iter() if part.tag.endswith("text"))
    assert "ours" in text and "theirs & others" in text
    lines = [part for part in drawn.iter() if part.tag.endswith("polyline")]
    assert [len(line.get("points", "").split()) for line in lines] == [2] * 4  # after a second
