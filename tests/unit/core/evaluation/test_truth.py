"""Scores against slow, plain references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
