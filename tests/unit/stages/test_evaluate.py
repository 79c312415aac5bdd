"""`evaluate` on a synthetic run, its k-means task called in place."""

from __future__ import annotations

import numpy as np
import pytest

from icce_ray.core.evaluation import truth as metrics
from icce_ray.errors import ArtifactError
from icce_ray.stages import evaluate


def test_scores_agree_with_core_and_go_to_the_manifest(make_run, make_context):
    made = make_run(300, 5, errors=0.2)
    context = make_context(made)
    outcome = evaluate.run(context)
    found = made.run.read_json("evaluation", "metrics.json")
    assert found["acc"] == pytest.approx(metrics.accuracy(made.truth, made.clusters))
    assert found["nmi"] == pytest.approx(metrics.nmi(made.truth, made.clusters))
    assert found["heads"]["acc_min"] <= found["heads"]["acc_mean"] <= found["heads"]["acc_best"]
    assert len(found["heads"]["acc"]) == 4
    assert found["kmeans"]["acc"] > 0.5
    assert 0 < found["classifier"]["acc"] < found["acc"]
    assert found["labeled"] == found["rows"] == 300
    assert outcome.results["acc"] == found["acc"]
    assert outcome.results["kmeans_acc"] == found["kmeans"]["acc"]
    line = evaluate.summary(found)
    assert f"consensus {found['acc']:.1%}" in line
    assert f"k-means on the same features {found['kmeans']['acc']:.1%}" in line


def test_label_free_scores(make_run, make_context):
    made = make_run(200, 4, errors=0.0)
    evaluate.run(make_context(made))
    free = made.run.read_json("evaluation", "metrics.json")["label_free"]
    assert free["head_agreement"] == pytest.approx(1.0, abs=1e-3)
    assert free["probe_agreement"] > 0.9
    assert free["sizes"] == {
        "entropy": pytest.approx(1.0), "empty": 0, "largest": 50, "smallest": 50, "ratio": 1.0
    }  # fmt: skip


def test_quarantined_images_shift_rows_but_not_labels(make_run, make_context):
    """Row r is image r + 7 here: labels taken by row number would be wrong."""
    made = make_run(150, 5, errors=0.0, bad=7)
    evaluate.run(make_context(made))
    found = made.run.read_json("evaluation", "metrics.json")
    assert found["rows"] == 143
    assert found["acc"] == 1.0


def test_clusters_and_contingency_add_up(make_run, make_context):
    made = make_run(120, 6, errors=0.3)
    evaluate.run(make_context(made))
    clusters = made.run.read_table("evaluation", "clusters.parquet")
    cells = made.run.read_table("evaluation", "contingency.parquet")
    assert clusters["size"].to_numpy().tolist() == np.bincount(made.clusters).tolist()
    assert cells["count"].to_numpy().sum() == 120
    assert min(cells["count"].to_pylist()) > 0
    for k in range(6):
        own = np.bincount(made.truth[made.clusters == k], minlength=6)
        row = clusters.slice(k, 1).to_pylist()[0]
        assert row["purity"] == pytest.approx(own.max() / own.sum())
        assert own[row["majority"]] == own.max()


def test_without_labels_only_label_free_scores_and_no_kmeans(make_run, make_context):
    made = make_run(60, 3, names=None)
    context = make_context(made)
    outcome = evaluate.run(context)
    found = made.run.read_json("evaluation", "metrics.json")
    assert "acc" not in found
    assert "kmeans" not in found
    assert "acc" not in outcome.results
    assert context.cluster.calls == 0
    assert "No ground truth" in evaluate.summary(found)


def test_unlabeled_rows_are_left_out(make_run, make_context, monkeypatch):
    made = make_run(100, 4, errors=0.0)
    codes = made.labels.copy()
    codes[:30] = -1
    truth = evaluate.Truth(codes, [f"class-{k}" for k in range(4)])
    monkeypatch.setattr(evaluate, "truth", lambda *_: truth)
    evaluate.run(make_context(made))
    found = made.run.read_json("evaluation", "metrics.json")
    assert (found["labeled"], found["rows"], found["acc"]) == (70, 100, 1.0)


def test_empty_clusters_have_no_confidence_and_no_class(make_run, make_context):
    made = make_run(40, 4, errors=0.0, overrides=["num_classes=6"])
    evaluate.run(make_context(made))
    rows = made.run.read_table("evaluation", "clusters.parquet").to_pylist()
    assert len(rows) == 6
    assert rows[5]["size"] == 0
    assert rows[5]["confidence"] is rows[5]["matched"] is rows[5]["purity"] is None


def test_artifacts_of_another_run_are_refused(make_run, make_context):
    made = make_run(30, 3)
    table = made.run.read_table("consensus", "consensus.parquet")
    made.run.write_table(table.slice(0, 20), "consensus", "consensus.parquet")
    made.finish("consensus", 20)
    with pytest.raises(ArtifactError, match="different runs"):
        evaluate.run(make_context(made))
