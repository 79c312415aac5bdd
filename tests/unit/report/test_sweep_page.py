"""The sweep's page: self-contained, ranked by the objective alone, safe with hostile strings."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from icce_ray.errors import ArtifactError
from icce_ray.report import sweep_page
from icce_ray.rundir.directory import RunDirectory

SWEEP = "sweeps/first"


SPACE = {
    "heads.lr": {"low": 1e-4, "high": 1e-1, "log": True, "int": False},
    "heads.count": {"choices": [4, 16, 64]},
    "consensus.method": {"choices": ["mcla", "voting"]},
    "heads.hidden": {"choices": [[], [512, 256]]},
    "heads.pca": {"choices": [None, 64]},
    "seed": {"choices": [0]},
}


def results(count: int = 20, labels: bool = True, seed: int = 0) -> dict[str, Any]:
    """A sweep whose last trials failed or were stopped, in no order."""
    rng = np.random.default_rng(seed)
    trials = []
    for number in range(count):
        chosen = {
            "heads.lr": float(10 ** rng.uniform(-4, -1)),
            "heads.count": [4, 16, 64][number % 3],
            "consensus.method": ["mcla", "voting"][number % 2],
            "heads.hidden": [[], [512, 256]][number // 2 % 2],
            "heads.pca": [None, 64][number // 3 % 2],
            "seed": 0,
        }
        value = float(rng.random())
        accuracy = {"acc": 0.5 + value / 3 + 0.05 * rng.random(), "nmi": 0.4, "ari": 0.3}
        trial = {
            "id": f"t{number}",
            "settings": chosen,
            "state": "done",
            "scores": {"neighbor_consistency": value, "head_agreement": float(rng.random())},
            "seconds": 10.0 * number,
            "reused": ["neighbors"],
            "stopped_at": None,
            "accuracy": accuracy if labels else None,
            "error": None,
        }
        if number and number % 7 == 0:
            trial |= {"state": "failed", "scores": {}, "accuracy": None, "error": "no memory left"}
        if number and number % 9 == 0:
            trial |= {"state": "stopped", "scores": {}, "accuracy": None, "stopped_at": 30.0}
        trials.append(trial)
    return {
        "name": "first",
        "config": {"num_classes": 10},
        "objective": "neighbor_consistency",
        "space": SPACE,
        "trials": trials,
        "best": "t0",
        "seconds": 4000.0,
        "counts": {"done": count, "made": {"trainings": 12}},
    }


@pytest.fixture
def page_of(tmp_path, parse):
    """page_of(results) -> (parsed page, its text)."""
    run = RunDirectory(str(tmp_path / "a run"))

    def make(content: Any) -> tuple[Any, str]:
        run.write_json(content, SWEEP, "results.json")
        path = sweep_page.build(run, SWEEP)
        assert path == run.path(SWEEP, "report", "index.html")
        text = run.read_bytes(SWEEP, "report", "index.html").decode()
        return parse(text), text

    return make


@pytest.mark.parametrize(
    ("count", "labels"), [(1, True), (1, False), (2, True), (20, False), (500, True)]
)
def test_page_is_well_formed_and_loads_nothing(page_of, count, labels):
    page, text = page_of(results(count, labels))
    assert not re.search(r"@import|url\(|https?://|<link|<iframe|<script|\bnan\b|Undefined", text)
    assert "default-src 'none'" in text
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "data"}
    assert len(page.trials) == count
    assert len(text) < 2_000_000


def test_trials_are_ranked_by_the_objective_and_the_rest_comes_last(page_of):
    content = results(30)
    page, _ = page_of(content)
    done = [trial for trial in content["trials"] if trial["state"] == "done"]
    done.sort(key=lambda trial: -trial["scores"]["neighbor_consistency"])
    rows = page.trials
    assert [row[1].split()[0] for row in rows[: len(done)]] == [trial["id"] for trial in done]
    assert [row[0] for row in rows] == [str(i + 1) for i in range(len(done))] + [""] * (
        30 - len(done)
    )
    rest = [row[2] for row in rows[len(done) :]]
    assert rest == sorted(rest, reverse=True)  # stopped, then failed
    assert "stopped early at 30% of its training" in page.text
    assert "no memory left" in page.text
    assert f"{done[0]['scores']['neighbor_consistency']:.4f}" in page.text.split("All trials")[0]


def test_columns_are_the_settings_that_vary(page_of):
    page, _ = page_of(results())
    head = [cell.strip() for cell in page.rows[0]]
    assert head[2].endswith("neighbor_consistency")
    assert set(SPACE) - set(head) == {"seed"}
    assert "Equal in all trials: seed=0" in re.sub(r"\s*=\s*", "=", page.text)
    assert {"head_agreement", "time"} <= set(head)


def test_the_command_runs_the_best_config(page_of, tmp_path):
    page, _ = page_of(results())
    assert f"icce-ray run '{tmp_path}/a run/{SWEEP}/best.yaml'" in page.text


def test_hostile_strings_stay_text(page_of):
    hostile = "</td><script>alert(1)</script>{{ 7*7 }}\"'&"
    content = results(12)
    content["name"] = content["objective"] = hostile
    for number, trial in enumerate(content["trials"]):
        trial["id"] = f"{hostile}{number}"
        trial["settings"] = {hostile: [hostile, number], "other": f"{number}{hostile}"}
        trial["scores"] = {hostile: number / 12, f"b{hostile}": 1.0} if trial["scores"] else {}
        trial["error"] = hostile if trial["state"] == "failed" else None
        trial["reused"] = [hostile]
    content["space"] = {hostile: {"choices": [hostile]}}
    content["counts"] = {hostile: hostile}
    content["config"] = {hostile: hostile}
    page, text = page_of(content)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in page.text
    assert "<script" not in text


def test_long_values_are_cut_and_kept_in_a_title(page_of):
    content = results(4)
    long = "package:" + "x" * 300
    for number, trial in enumerate(content["trials"]):
        trial["settings"]["backbone.weights"] = f"{long}{number}"
    page, _ = page_of(content)
    assert ("title", f"{long}0") in page.attributes
    assert max(len(cell) for row in page.trials for cell in row) < 60


def test_all_failed(page_of):
    content = results(5)
    for trial in content["trials"]:
        trial |= {"state": "failed", "scores": {}, "accuracy": None, "error": "broken"}
    content["best"] = None
    page, _ = page_of(content)
    assert "No trial has a score" in page.text
    assert "icce-ray run" not in page.text
    assert "svg" not in page.tags
    assert page.text.count("broken") == 5


def test_a_score_that_is_not_finite_is_no_score(page_of):
    content = results(6)
    content["trials"][2]["scores"]["neighbor_consistency"] = float("nan")
    page, _ = page_of(content)
    assert page.trials[-1][1] == "t2"
    assert "no finite neighbor_consistency" in page.text


def test_without_labels_nothing_is_said_of_accuracy(page_of):
    page, _ = page_of(results(labels=False))
    assert "accuracy" not in page.text.lower()
    assert "Spearman" not in page.text


def test_rank_correlation_of_every_score_is_shown(page_of):
    content = results(20)
    page, _ = page_of(content)
    done = [trial for trial in content["trials"] if trial["state"] == "done"]
    rows = {
        row[0].strip(): [cell.strip() for cell in row[1:]] for row in page.rows if len(row) == 3
    }
    for name in ("neighbor_consistency", "head_agreement"):
        pairs = [(t["scores"][name], t["accuracy"]["acc"]) for t in done]
        assert rows[name] == [f"{spearmanr(pairs).statistic:+.2f}", str(len(done))]
    assert "not used for ranking" in page.text


def test_a_chart_per_varying_setting(page_of):
    page, text = page_of(results(30))
    section = text.split('id="effects"')[1].split('id="truth"')[0]
    assert section.count("<svg") == 5
    done = sum(trial["state"] == "done" for trial in results(30)["trials"])
    circles = re.findall(r"<circle class=\"fill trial\"", section)
    assert len(circles) == 5 * done
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert any("neighbor_consistency over heads.lr" in label for label in labels)


@pytest.mark.parametrize("content", [[], {"name": "x"}, {"trials": []}])
def test_another_file_is_refused(page_of, content):
    with pytest.raises(ArtifactError, match=r"results\.json is not a sweep's result"):
        page_of(content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"results\.json is missing"):
        sweep_page.build(RunDirectory(str(tmp_path)), "sweeps/none")
