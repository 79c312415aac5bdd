"""Neighbors stay near each other on the plane."""

from __future__ import annotations

import numpy as np
import pytest

from icce_ray.core import layout


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """200 embeddings of 5 classes, and the classes."""
    rng = np.random.default_rng(0)
    classes = np.arange(200) % 5
    rows = rng.normal(size=(5, 24))[classes] + rng.normal(0, 0.35, (200, 24))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), classes


def same_class(place: np.ndarray, classes: np.ndarray) -> float:
    """Share of the 5 nearest points that are of a point's class."""
    far = np.square(place[:, None] - place[None]).sum(2)
    np.fill_diagonal(far, np.inf)
    return float((classes[np.argsort(far, axis=1)[:, :5]] == classes[:, None]).mean())


def test_classes_that_neighbors_tell_apart_are_apart(blobs):
    rows, classes = blobs
    ids, similarity = layout.neighbors_of_sample(rows, 16, seed=0)
    assert ids.shape == similarity.shape == (200, 3 * layout.PERPLEXITY + 1)
    place = layout.coordinates(ids, similarity, rows, seed=0)
    assert place.shape == (200, 2) and place.min() == 0 and place.max() == 1
    assert same_class(place, classes) > 0.95
    assert np.array_equal(place, layout.coordinates(ids, similarity, rows, seed=0))


def test_the_lists_decide_and_not_the_embeddings(blobs):
    rows, classes = blobs
    ids, similarity = layout.neighbors_of_sample(rows, 16, seed=0)
    order = np.random.default_rng(1).permutation(200)
    place = layout.coordinates(ids, similarity, rows[order], seed=0)
    assert same_class(place, classes) > 0.95


@pytest.mark.parametrize("most", [4, 8])
def test_short_lists_and_copies_are_taken(blobs, most):
    rows, _ = blobs
    ids, _ = layout.neighbors_of_sample(rows, 16, seed=0)
    place = layout.coordinates(ids[:, :most], np.ones((200, most), np.float16), rows, seed=0)
    assert np.isfinite(place).all()


def test_equal_images_have_a_place():
    rows = np.ones((40, 8), np.float16) / np.float16(8**0.5)
    ids = (np.arange(40)[:, None] + np.arange(1, 9)) % 40
    place = layout.coordinates(ids.astype(np.int32), np.ones((40, 8), np.float16), rows, seed=0)
    assert np.isfinite(place).all()
