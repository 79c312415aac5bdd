"""The tables of jobs/benchmark.py accuracy and ablation, from results made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from icce_ray import config as configs
from icce_ray.sweeps import space


@pytest.fixture
def quality(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "jobs"))
    from benchmarks import quality

    return quality


@pytest.fixture
def results() -> dict[str, Any]:
    """What a sweep of three settings and two seeds leaves, best first, one trial having failed.

    `good` ranks the settings as accuracy does, `bad` the other way round.
    """
    choices = {"seed": [0, 1], "heads.count": [8], "consensus.method": ["mcla"]}
    chosen = space.parse({"search": "each", "space": choices})
    config = configs.load({"num_classes": 3, "data": {"path": "x"}})
    drawn = space.draw(chosen, config.model_dump(mode="json"), 0)
    trials = []
    for settings in drawn.settings:
        acc = 0.6 + 0.1 * (settings["heads.count"] == 24)
        acc += 0.1 * (settings["consensus.method"] == "mcla") + 0.02 * settings["seed"]
        trials.append(
            {
                "settings": settings,
                "state": "done",
                "seconds": 10.0,
                "scores": {"good": acc**2, "bad": -acc, "head_agreement": 0.5},
                "accuracy": {"acc": acc, "acc_mean": acc - 0.1, "acc_best": acc - 0.05},
            }
        )
    trials.append({**trials[0], "state": "failed", "scores": {}, "accuracy": None})
    trials.sort(key=lambda trial: -trial["scores"].get("good", 0))
    return {
        "objective": "good",
        "space": space.describe(chosen),
        "config": configs.settings(config),
        "trials": trials,
    }


def test_a_line_for_each_setting_with_mean_and_spread(
    quality: ModuleType, results: dict[str, Any]
) -> None:
    lines = quality.ablation_table(results).splitlines()[2:]
    names = [line.split(" | ")[0].strip("| ") for line in lines]
    assert names == ["defaults", "heads.count=8", "consensus.method=mcla"]
    cells = [cell.strip() for cell in lines[1].strip("|").split("|")]
    assert cells[1:4] == ["61.0 ± 1.4", "51.0 ± 1.4", "56.0 ± 1.4"]
    assert cells[-1] == "10"


def test_scores_are_correlated_over_settings(quality: ModuleType, results: dict[str, Any]) -> None:
    rows = {row["score"]: row for row in quality.correlation_rows(results)}
    assert rows["good"]["all"] == pytest.approx(1) and rows["bad"]["all"] == pytest.approx(-1)
    assert rows["head_agreement"]["all"] is None
    assert rows["good"]["heads"] is None  # two settings tell nothing
    assert next(iter(rows)) == "good"
    table = quality.correlation_table(list(rows.values()))
    assert "all 3 settings" in table and "| good | +1.00 | - | - | - |" in table


def test_accuracy_of_seeds_and_their_mean(quality: ModuleType) -> None:
    one = dict.fromkeys(quality.PERCENT, 0.5) | {"test": None, "seconds": 10.0, "wall": 20.0}
    lines = quality.accuracy_table([{"seed": 0, **one}, {"seed": 4, **one, "consensus": 0.6}])
    head, _, *rest = (line.strip("| ").split(" | ") for line in lines.splitlines())
    assert "test" not in head and head[:2] == ["seed", "consensus"]
    assert rest[1][:2] == ["4", "60.0"] and rest[2][:3] == ["mean", "55.0 ± 7.1", "50.0 ± 0.0"]


def test_long_tails_stand_side_by_side(quality: ModuleType, results: dict[str, Any]) -> None:
    for trial in results["trials"]:
        trial["scores"]["neighbor_evidence"] = 0.25
    tails = [
        {"ratio": ratio, "results": results, "kmeans": [{"acc": 0.4}, {"acc": 0.5}]}
        for ratio in (2.0, 20.0)
    ]
    head, _, *rest = (
        line.strip("| ").split(" | ") for line in quality.imbalance_table(tails).splitlines()
    )
    assert head == ["setting", "1:2, ACC", "evidence", "1:20, ACC", "evidence"]
    assert [line[0] for line in rest] == [
        *("defaults", "heads.count=8", "consensus.method=mcla"),
        "k-means",
    ]
    assert rest[1][1:3] == rest[1][3:] == ["61.0 ± 1.4", "0.250 ± 0.000"]
    assert rest[-1][1:] == ["45.0 ± 7.1", "-"] * 2


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
