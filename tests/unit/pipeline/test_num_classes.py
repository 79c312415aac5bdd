"""num_classes=auto: which numbers are tried, and what becomes of the best one."""

from __future__ import annotations

from typing import Any

import pytest

from icce_ray import pipeline
from icce_ray.errors import ConfigError
from icce_ray.sweeps import num_classes as classes
from icce_ray.sweeps import results as results_
from icce_ray.sweeps import running

TREE = {"data": {"embeddings": "x.npy"}, "run_dir": "somewhere"}


@pytest.mark.parametrize(
    ("value", "first", "last", "count"),
    [("4-9", 4, 9, 6), ("2-17", 2, 17, 16), ("2-18", 2, 18, 12), ("50-2000", 50, 2000, 16)],
)
def test_a_range_is_tried_whole_or_evenly_by_ratio(value, first, last, count):
    found = classes.numbers_to_try(value)
    assert found is not None and (found[0], found[-1], len(found)) == (first, last, count)
    assert found == sorted(set(found))


def test_auto_tries_the_golden_spaces_numbers_and_a_number_is_itself():
    found = classes.numbers_to_try("auto")
    assert found is not None and 10 in found and found == sorted(set(found))
    for value in (10, "10", None, "many"):
        assert classes.numbers_to_try(value) is None


@pytest.mark.parametrize("value", ["1-5", "5-5", "9-4"])
def test_a_range_that_is_none_is_named(value):
    with pytest.raises(ConfigError, match=f"num_classes={value}.*such as 4-30"):
        classes.numbers_to_try(value)


def test_the_best_number_of_the_sweep_is_taken(monkeypatch):
    calls: dict[str, Any] = {}

    def pretend(config, source, *, overwrite, plan_only, quiet):
        calls.update(config=config, source=source, overwrite=overwrite)
        trials = [{"settings": {"num_classes": k}} for k in (7, 5, 6)]  # best first
        return None if plan_only else {"trials": trials}

    def search(config, overwrite, quiet):
        calls.update(anew=overwrite)

    monkeypatch.setattr(running, "run", pretend)
    monkeypatch.setattr(classes, "_search", search)
    monkeypatch.setattr(classes, "_take_best", lambda *given: calls.update(taken=given))
    options = ["num_classes=5-7", "heads.count=9"]
    assert classes.resolve(TREE, options, plan_only=True) is None and "anew" not in calls
    assert classes.resolve(TREE, options) is not None
    assert calls["overwrite"] is calls["anew"] is False
    best = classes.resolve(TREE, options, overwrite=True)
    assert calls["overwrite"] is calls["anew"] is True
    assert best is not None and best.num_classes == 7 and best.heads.count == 9
    assert calls["taken"][0] == best and calls["taken"][2] is True
    name, content = calls["source"]
    assert name == "classes" and content["space"] == {"num_classes": [5, 6, 7]}
    assert content["objective"] == "neighbor_modularity"


def test_the_run_takes_what_the_sweep_made_for_the_best_number(tmp_path, make):
    made = make.finished(tmp_path, [0] * make.rows)
    for trial in (made.trials[1], made.trials[0]):
        config = trial.config.model_copy(update={"run_dir": made.run.uri})
        results = {"best_config": results_.write_best(made, trial)}
        classes._take_best(config, results, overwrite=False)
        states = [step.state for step in pipeline.make_steps(config, made.run)]
        if trial is made.trials[1]:
            assert states == ["done"] * 6 + ["run"] * 4
    assert states[5] == "changed", "nothing of other settings is overwritten"


def test_a_plain_number_needs_no_sweep(monkeypatch):
    monkeypatch.setattr(running, "run", None)
    found = classes.resolve(TREE, ["num_classes=4"])
    assert found is not None and found.num_classes == 4
