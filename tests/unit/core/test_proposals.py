"""What neighbors and heads say of clusters that were cut, or are several."""

from __future__ import annotations

import numpy as np
import pytest

from icce_ray.core import proposals


def test_halves_of_a_class_are_proposed_to_be_one():
    """Class 0 is cut at random into clusters 0 and 2."""
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], 100)
    clusters = np.where((truth == 0) & (rng.random(300) < 0.5), 0, truth + 1) % 4
    ids = np.stack([rng.choice(np.flatnonzero(truth == t), 12) for t in truth])
    shares = proposals.links(clusters, ids, 4)
    assert np.allclose(shares.sum(1), 1)
    found = proposals.merges(shares)
    assert [(one.first, one.second) for one in found] == [(0, 1)]
    assert 0.3 < found[0].there < 0.7 and 0.3 < found[0].back < 0.7
    assert proposals.nearest(shares, 0) == [1] and proposals.nearest(shares, 2) == []


def test_a_cluster_that_heads_cut_is_proposed_to_be_split():
    clusters = np.repeat([0, 1, 2], 100)
    heads = np.repeat(clusters[:, None], 4, axis=1)
    heads[100:140, :3] = 3  # three heads of four see 40 images of cluster 1 apart
    heads[0:5] = 2
    found = proposals.splits(clusters, heads, 3)
    assert [one.cluster for one in found] == [1]
    assert np.isclose(found[0].share, 0.3)


def test_an_empty_cluster_is_near_nothing():
    clusters = np.array([0, 0, 2, 2])
    ids = np.array([[1], [0], [3], [2]])
    shares = proposals.links(clusters, ids, 3)
    assert shares[1].tolist() == [0, 0, 0] and proposals.merges(shares) == []
    assert proposals.splits(clusters, clusters[:, None], 3) == []


def test_numbers_that_are_no_clusters_cost_no_memory():
    """Of a damaged run: an error, or what is said of the sound ones; never an array as long."""
    clusters = np.repeat([0, 1, 2], 100)
    heads = np.repeat(clusters[:, None], 4, axis=1)
    heads[100:140, :3] = 2**31 - 1
    assert [one.cluster for one in proposals.splits(clusters, heads, 3)] == [1]
    with pytest.raises(IndexError):
        proposals.links(np.array([0, 2**31 - 1]), np.array([[1], [0]]), 2)
    with pytest.raises(IndexError):
        proposals.splits(np.array([0, 2**31 - 1]), np.zeros((2, 1), int), 2)
