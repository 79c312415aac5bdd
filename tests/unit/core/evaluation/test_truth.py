"""Scores against slow, plain references."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.core.evaluation import kmeans
from icce_ray.core.evaluation import truth as metrics
from icce_ray.errors import DataError

codes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40).map(
    lambda pairs: np.array(pairs).T
)


def best_permutation(labels: np.ndarray, clusters: np.ndarray) -> float:
    """ACC by trying every one-to-one map of clusters to classes."""
    names = range(5)
    return max(
        float(np.mean(np.array(order)[clusters] == labels))
        for order in itertools.permutations(names)
    )


@given(codes)
@settings(max_examples=60, deadline=None)
def test_accuracy_equals_the_best_permutation(pair):
    labels, clusters = pair
    assert metrics.accuracy(labels, clusters) == pytest.approx(best_permutation(labels, clusters))


@given(codes)
@settings(max_examples=60, deadline=None)
def test_matching_is_one_to_one_and_keeps_every_image(pair):
    labels, clusters = pair
    found = metrics.matching(labels, clusters)
    matched = found.cluster_class[found.cluster_class >= 0]
    assert len(set(matched.tolist())) == len(matched)
    assert sorted(found.order.tolist()) == list(range(found.confusion.shape[1]))
    assert found.confusion.sum() == len(labels)
    right = sum(
        int(found.confusion[found.cluster_class[k], place])
        for place, k in enumerate(found.order)
        if found.cluster_class[k] >= 0
    )
    assert right / len(labels) == pytest.approx(metrics.accuracy(labels, clusters))


def test_accuracy_with_more_clusters_than_classes_counts_the_spare_ones_as_wrong():
    labels = np.array([0, 0, 0, 1, 1])
    clusters = np.array([3, 3, 7, 1, 1])
    assert metrics.accuracy(labels, clusters) == pytest.approx(0.8)
    found = metrics.matching(labels, clusters)
    assert found.cluster_class[[3, 1, 7]].tolist() == [0, 1, -1]
    assert found.order[:2].tolist() == [3, 1]


def test_accuracy_with_more_classes_than_clusters():
    assert metrics.accuracy(np.array([0, 1, 2]), np.array([0, 0, 0])) == pytest.approx(1 / 3)


def test_nmi_is_normalized_by_the_arithmetic_mean():
    labels = np.array([0, 0, 1, 1, 2, 2, 2, 2])
    clusters = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    joint = metrics.contingency(labels, clusters) / len(labels)
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    mutual = float((joint[joint > 0] * np.log(joint[joint > 0] / outer[joint > 0])).sum())
    entropies = [-float((p * np.log(p)).sum()) for p in (joint.sum(0), joint.sum(1))]
    assert metrics.nmi(labels, clusters) == pytest.approx(mutual / (sum(entropies) / 2))


def test_scores_do_not_depend_on_the_names_of_clusters():
    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(0, 6, 300), rng.integers(0, 9, 300)
    renamed = rng.permutation(9)[clusters]
    assert metrics.scores(labels, renamed) == pytest.approx(metrics.scores(labels, clusters))
    assert metrics.scores(labels, labels) == pytest.approx({"acc": 1.0, "nmi": 1.0, "ari": 1.0})


@pytest.mark.parametrize(
    ("labels", "clusters"), [([0, -1], [0, 1]), ([0, 1], [0]), ([], []), ([0], [-1])]
)
def test_bad_codes_are_a_data_error(labels, clusters):
    with pytest.raises(DataError):
        metrics.accuracy(np.array(labels, dtype=int), np.array(clusters, dtype=int))


def test_calibration_leaves_out_empty_bins_and_takes_full_confidence():
    found = metrics.calibration(np.array([0.05, 0.95, 1.0, 1.0]), np.array([0, 1, 0, 1]), bins=10)
    assert found["rows"] == [1, 3]
    assert found["accuracy"] == pytest.approx([0.0, 2 / 3])
    assert found["confidence"] == pytest.approx([0.05, 2.95 / 3])
    assert found["error"] == pytest.approx((0.05 + (2.95 - 2)) / 4)
    assert found["ranking"] == pytest.approx(2.5 / 4)  # pairs in order, of two right, two wrong


def test_nothing_is_ranked_where_all_are_right():
    found = metrics.calibration(np.array([0.5, 0.7]), np.array([True, True]))
    assert found["ranking"] is None and found["error"] == pytest.approx(0.4)


def test_neighbor_consistency_equals_a_loop(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 7)
    rng = np.random.default_rng(1)
    clusters = rng.integers(0, 3, 50)
    ids = rng.integers(0, 50, (50, 6)).astype(np.int32)
    counts = rng.integers(0, 7, 50)
    shares = [
        np.mean([clusters[j] == clusters[i] for j in ids[i, : counts[i]]])
        for i in range(50)
        if counts[i]
    ]
    found = metrics.neighbor_consistency(clusters, ids, counts)
    assert found == pytest.approx(float(np.mean(shares)))


def test_neighbor_consistency_ignores_padding_beyond_the_count():
    ids = np.array([[1, -1], [0, -1]], dtype=np.int32)
    assert metrics.neighbor_consistency(np.array([4, 4]), ids, np.array([1, 1])) == 1.0


def test_cluster_sizes():
    found = metrics.cluster_sizes(np.array([0, 0, 0, 2]), 4)
    assert found["sizes"].tolist() == [3, 0, 1, 0]
    assert (found["empty"], found["largest"], found["smallest"], found["ratio"]) == (2, 3, 1, 3.0)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert found["entropy"] == pytest.approx(expected)
    assert metrics.cluster_sizes(np.arange(8) % 4, 4)["entropy"] == pytest.approx(1.0)


def blobs(rows: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    labels = np.arange(rows) % classes
    points = np.eye(width)[labels] * 4 + rng.normal(0, 0.3, (rows, width))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points.astype(np.float16), labels


@pytest.mark.parametrize("max_rows", [100_000, 200])
def test_kmeans_finds_clear_blobs_in_memory_and_streamed(tmp_path, max_rows):
    features, labels = blobs(900, 16, 5)
    np.save(tmp_path / "f.npy", features)
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r")
    found = kmeans.kmeans_baseline(mapped, 5, 3, seed=0, max_rows=max_rows)
    assert found.dtype == np.int32
    assert metrics.accuracy(labels, found) > 0.99
    again = kmeans.kmeans_baseline(mapped, 5, 3, seed=0, max_rows=max_rows)
    assert (found == again).all()


def test_streamed_kmeans_trains_on_all_rows_not_on_the_sample_alone(monkeypatch):
    import faiss

    seen = []
    original = faiss.Clustering.train_encoded
    monkeypatch.setattr(
        faiss.Clustering,
        "train_encoded",
        lambda self, x, *rest: seen.append(len(x)) or original(self, x, *rest),
    )
    features, _ = blobs(3000, 8, 2)
    kmeans.kmeans_baseline(features, 2, 1, seed=0, max_rows=100)
    assert seen == [3000]


def test_kmeans_needs_a_row_per_cluster():
    with pytest.raises(DataError, match="num_classes=5"):
        kmeans.kmeans_baseline(np.ones((3, 2), np.float16), 5, 1, seed=0)


def test_head_agreement_is_one_for_renamed_heads_and_low_for_noise():
    pytest.importorskip("icce_ray.core.ensemble.consensus")
    rng = np.random.default_rng(3)
    one = rng.integers(0, 4, 500)
    same = np.stack([one, (one + 1) % 4, (one + 2) % 4], axis=1)
    assert metrics.head_agreement(same) == pytest.approx(1.0, abs=1e-4)
    assert metrics.head_agreement(rng.integers(0, 4, (500, 3))) < 0.1
    assert metrics.head_agreement(same[:, :1]) == 1.0
