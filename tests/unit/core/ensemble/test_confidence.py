"""Confidence against its definition, image by image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.core.ensemble import confidence as core


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 9), st.data())
def test_it_is_the_product_of_posterior_neighbors_and_cluster(rows, clusters, most, data):
    near, seed = data.draw(st.integers(1, most)), data.draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    labels, posterior = rng.integers(0, clusters, rows), rng.random(rows)
    ids = rng.integers(0, rows, (rows, most))
    others = [(labels == labels[i]).sum() - 1 for i in range(rows)]

    def share(i, count, size):
        alike = sum(labels[j] == labels[i] for j in ids[i, :count])
        return (1 + alike) / (1 + size)

    small = [share(i, near, min(near, others[i])) for i in range(rows)]
    half = [min(most, math.ceil(others[i] / 2)) for i in range(rows)]
    wide = [share(i, half[i], half[i]) for i in range(rows)]
    mean = [np.mean([small[j] for j in range(rows) if labels[j] == labels[i]]) for i in range(rows)]
    expected = [posterior[i] * math.sqrt(small[i] * wide[i]) * mean[i] for i in range(rows)]
    found = core.supported(posterior, labels, ids, near)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_small_cluster_can_be_sure():
    labels = np.array([0] * 30 + [1] * 3 + [2])
    own = [[j for j in range(34) if labels[j] == labels[i] and j != i] for i in range(34)]
    ids = np.array(
        [(near + [j for j in range(34) if j not in (i, *near)])[:10] for i, near in enumerate(own)]
    )
    assert core.supported(np.ones(34), labels, ids, 10).min() == 1


def test_images_in_pieces_are_those_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    labels, ids = rng.integers(0, 3, 50), rng.integers(0, 50, (50, 4))
    whole = core.supported(np.ones(50), labels, ids, 2)
    monkeypatch.setattr(core, "CHUNK", 7)
    assert (core.supported(np.ones(50), labels, ids, 2) == whole).all()


def test_errors_at_borders_are_less_sure_than_what_is_right():
    """Two classes along a line, cut in the wrong place; the ensemble is equally sure of all."""
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], 500)
    near = np.arange(1000)[:, None] + rng.integers(-40, 41, (1000, 10))
    ids = np.where(truth == 0, near.clip(0, 499).T, near.clip(500, 999).T).T
    found = core.supported(np.ones(1000), (np.arange(1000) >= 440).astype(int), ids, 10)
    wrong = slice(440, 500)
    assert found[wrong].mean() < 0.9 * np.delete(found, wrong).mean()


def test_between_clusters_is_less_sure_than_inside_where_the_nearest_agree_alike():
    """A wide neighborhood sees that other clusters meet there, the nearest few do not."""
    labels = np.repeat([0, 1], 100)
    own = np.tile(np.arange(1, 5), (200, 1))
    own = np.where(labels[:, None] == 0, own, own + 100)
    inside = np.tile(np.arange(10, 56), (200, 1))
    ids = np.hstack([own, np.where(labels[:, None] == 0, inside, inside + 100)])
    ids[7, 4:] = ids[107, 4:]  # beyond its nearest, others
    found = core.supported(np.ones(200), labels, ids, 4)
    assert found[7] < 0.5 * np.delete(found, 7).min()
