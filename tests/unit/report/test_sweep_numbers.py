"""The ranking of trials, and how it compares with accuracy."""

from __future__ import annotations

import pytest

from icce_ray.report import sweep_numbers


def test_spearman_needs_three_pairs_that_differ():
    assert sweep_numbers.spearman([(1, 2), (2, 3)]) is None
    assert sweep_numbers.spearman([(1, 2), (1, 3), (1, 4)]) is None
    assert sweep_numbers.spearman([(1, 9), (5, 10), (7, 400)]) == pytest.approx(1)


def test_trials_without_a_finite_score_are_not_ranked():
    trials = [
        {"id": "a", "state": "done", "settings": {}, "scores": {"s": 0.2}},
        {"id": "b", "state": "done", "settings": {}, "scores": {"s": float("nan")}},
        {"id": "c", "state": "failed", "settings": {}, "scores": {}},
        {"id": "d", "state": "done", "settings": {"x": 1}, "scores": {"s": 0.9}},
        {"id": "e", "state": "stopped", "settings": {}, "scores": {"s": 1.0}},
    ]
    ranking = sweep_numbers.Ranking.of({"objective": "s", "space": {}, "trials": trials})
    assert [trial["id"] for trial in ranking.ranked] == ["d", "a"]
    assert [trial["id"] for trial in ranking.rest] == ["b", "e", "c"]
    assert ranking.best is trials[3]
    assert ranking.varying() == ["x"]
