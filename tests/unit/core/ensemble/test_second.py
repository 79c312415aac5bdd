"""The second choice against a loop over images and neighbors."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.core.ensemble import second as core


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 9), st.integers(2, 6), st.integers(0, 99), st.booleans())
def test_second_choice_is_that_of_plain_loops(
    rows: int, most: int, clusters: int, seed: int, small: bool
) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, rows, (rows, most)).astype(np.int32)
    similarity = rng.integers(-1, 9, (rows, most)).astype(np.float16) / 8
    labels = rng.integers(0, clusters, rows).astype(np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "BLOCK", 1 if small else 1 << 22)
        found = core.second_choice(ids, similarity, labels, clusters)
    for row in range(rows):
        votes = np.zeros(clusters)
        for near, alike in zip(ids[row], similarity[row], strict=True):
            if labels[near] != labels[row]:
                votes[labels[near]] += max(float(alike), 1e-6)
        best = votes.max()
        if best == 0:
            assert found[row] == -1
        else:
            assert votes[found[row]] == pytest.approx(best)


def test_a_near_neighbor_counts_more_than_a_far_one() -> None:
    labels = np.array([0, 1, 2, 2], np.int32)
    ids = np.array([[1, 2], [0, 2], [3, 0], [2, 0]], np.int32)
    similarity = np.array([[0.5, 0.4], [0.2, 0.6], [0.9, 0.1], [0.9, 0.1]], np.float16)
    assert core.second_choice(ids, similarity, labels, 3).tolist() == [1, 2, 0, 0]
    assert core.second_choice(ids[2:] - 2, similarity[2:], labels[2:], 3)[0] == -1


def test_long_lists_are_looked_at_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with few clusters, whose votes alone take little memory."""
    monkeypatch.setattr(core, "BLOCK", 1 << 12)
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(0, 5000, (5000, 50)), rng.integers(0, 2, 5000)
    tracemalloc.start()
    core.second_choice(ids, np.ones(ids.shape, np.float16), labels, 2)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 300 * core.BLOCK  # 1.2 MB; it was 4
