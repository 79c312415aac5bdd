"""The second choice against a loop over images, heads and clusters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.core.ensemble import second as core


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(2, 6), st.integers(0, 99), st.booleans())
def test_second_choice_is_that_of_plain_loops(
    rows: int, heads: int, clusters: int, seed: int, small: bool
) -> None:
    rng = np.random.default_rng(seed)
    assignments = rng.integers(0, clusters + 2, (rows, heads)).astype(np.int16)
    labels = rng.integers(0, clusters, rows).astype(np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "BLOCK", 1 if small else 1 << 22)
        found = core.second_choice(assignments, labels, clusters)
    for row in range(rows):
        likely = np.zeros(clusters)
        for head in range(heads):
            alike = labels[assignments[:, head] == assignments[row, head]]
            likely += [np.mean(alike == k) for k in range(clusters)]
        likely[labels[row]] = 0
        best = likely.max()
        assert (
            found[row] == -1 if best == 0 else likely[found[row]] == pytest.approx(best, abs=1e-5)
        )


def test_heads_that_agree_name_no_other_cluster() -> None:
    labels = np.array([0, 0, 1, 1], np.int32)
    assert core.second_choice(labels[:, None], labels, 2).tolist() == [-1] * 4


def test_an_image_between_two_clusters_names_the_other_one() -> None:
    labels = np.repeat([0, 1, 2], 10).astype(np.int32)
    heads = np.stack([labels] * 3, axis=1)
    heads[0, 2] = 2  # one of three heads puts the first image into cluster 2
    found = core.second_choice(heads, labels, 3)
    assert found[0] == 2 and (found[20:] == 0).all()
