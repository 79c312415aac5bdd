"""Which heads the ensemble takes: from the settings to the consensus."""

from __future__ import annotations

import json

import numpy as np
import pytest

from icce_ray import config as configs
from icce_ray.config import schema
from icce_ray.core import constants
from icce_ray.core.ensemble.agreement import align
from icce_ray.core.evaluation.labelfree import head_scores
from icce_ray.errors import ConfigError
from icce_ray.stages import consensus
from icce_ray.stages.table import stage


@pytest.fixture
def solve(make_run, make_context):
    """solve(*overrides) -> (labels, results, context) on 240 rows, 3 classes and 4 heads."""

    def run(*overrides, **options):
        made = make_run(240, 3, names=None, images=False, overrides=overrides, **options)
        context = make_context(made)
        context.in_process = True
        outcome = consensus.run(context)
        table = made.run.read_table("consensus", "part-00000.parquet")
        json.dumps(outcome.results)
        return table["cluster"].to_numpy(), outcome.results, context

    return run


ALIKE = "heads.balance=0.5"


def test_few_heads_are_all_kept_by_default(solve):
    _, results, _ = solve(ALIKE)
    assert results["kept"] == [0, 1, 2, 3]
    assert results["heads"] == 4


def test_by_default_the_heads_whose_clusters_say_most_about_neighbors_are_kept(solve):
    """Of 4 heads all, of 40 a quarter."""
    _, results, context = solve(ALIKE, heads=40)
    ids = context.run.matrix("neighbors", "ids")
    told, _ = head_scores(context.run.matrix("heads", "assignments"), ids, 3, seed=0)
    best = np.argsort(-told)[:10]
    assert results["kept"] == sorted(best.tolist())


@pytest.mark.parametrize(("heads", "keep", "count"), [(4, 1e-3, 1), (5, 0.5, 2), (3, 1, 3)])
def test_a_share_of_the_heads_is_rounded_and_never_empty(heads, keep, count):
    found = configs.load(TREE, [f"heads.count={heads}", f"consensus.keep={keep}"])
    assert found.kept_heads(heads) == count


def test_only_heads_of_the_balance_that_fits_are_merged(solve):
    """Heads take three balances in turn."""
    _, results, context = solve("heads.balance=[1,0.5,0]", heads=30)
    ids = context.run.matrix("neighbors", "ids")
    _, evidence = head_scores(context.run.matrix("heads", "assignments"), ids, 3, seed=0)
    best = max(range(3), key=lambda turn: np.sort(evidence[turn::3])[-5:].mean())
    assert results["balance"] == [1, 0.5, 0][best]
    assert set(results["kept"]) <= set(range(best, 30, 3))
    assert results["heads"] == 8
    assert results["head_evidence"] == pytest.approx(evidence.tolist())


def test_a_lone_kept_head_is_the_result(solve):
    labels, results, context = solve("consensus.keep=0.25", "consensus.method=voting")
    (only,) = results["kept"]
    column = np.asarray(context.run.matrix("heads", "assignments"))[:, only]
    assert (align(column, labels, 3) == labels).all()


def test_heads_of_more_clusters_make_num_classes(solve):
    """The 3 clusters of the run's heads become the two that num_classes asks for."""
    labels, results, _ = solve(ALIKE, "num_classes=2", "heads.clusters=3")
    assert np.unique(labels).tolist() == [0, 1]
    assert results["num_clusters"] == 2
    assert len(results["sizes"]) == 2


TREE = {"num_classes": 10, "data": {"embeddings": "e.npy"}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["heads.clusters=9"], "at least num_classes"),
        (["heads.clusters=20", "consensus.method=voting"], "cannot merge"),
        (["heads.clusters=20", "heads.count=1"], "at least two heads"),
        (["heads.clusters=20", "heads.count=8", "consensus.keep=0.1"], "consensus.keep"),
        (["consensus.keep=0"], "consensus.keep"),
        (["consensus.method=luck"], "'voting', 'cspa', 'mcla', 'hbgf' or 'dawid-skene'"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        configs.load(TREE, overrides)


def test_heads_of_equal_clusters_are_shared_between_numbers_of_classes():
    def of(*overrides):
        return stage("heads").settings(configs.load(TREE, overrides))

    assert of("heads.clusters=40") == of("heads.clusters=40", "num_classes=20")
    assert of() == of("heads.clusters=10") != of("num_classes=20")
    assert of("consensus.keep=0.5") == of()
    ensemble = stage("consensus").settings
    assert ensemble(configs.load(TREE, ["consensus.keep=0.5"])) != ensemble(configs.load(TREE))


def test_other_defaults_make_other_artifacts(monkeypatch):
    """What stands for a setting that is not given belongs to the fingerprint as if it were."""
    config = configs.load(TREE)
    trained, merged = (
        stage("heads").settings(config),
        stage("consensus").settings(config),
    )
    assert trained["heads"]["balance"] == list(constants.default_balances("kmeans"))
    for module, name, value in (
        (constants, "default_steps", lambda clusters, start: 7),
        (constants, "default_batch", lambda clusters: 7),
        (constants, "default_heads", lambda start: 7),
        (constants, "default_balances", lambda start: (1.0,)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            assert stage("heads").settings(config) != trained, name
    monkeypatch.setattr(schema, "KEEP_LEAST", 3)
    assert stage("consensus").settings(config) != merged
    assert json.loads(json.dumps(trained)) == trained
