"""Matching of names and mutual information against plain references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from icce_ray.core.ensemble import agreement
from icce_ray.core.ensemble.agreement import align, match, pairwise_nmi


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda k: st.tuples(
            st.just(k),
            st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1),
        )
    )
)
def test_match_is_the_best_of_all_permutations(case):
    clusters, pairs = case
    labels, reference = np.array(pairs).T
    found = match(labels, reference, clusters)
    assert sorted(found) == list(range(clusters))
    best = max(
        (np.array(p)[labels] == reference).sum() for p in itertools.permutations(range(clusters))
    )
    assert (align(labels, reference, clusters) == reference).sum() == best


@pytest.mark.parametrize("clusters", [5, 1500])  # dense and sparse counting
def test_pairwise_nmi_equals_scikit_learn(clusters):
    rng = np.random.default_rng(0)
    base = rng.integers(0, clusters, 400)
    heads = [np.where(rng.random(400) < p, rng.integers(0, clusters, 400), base) for p in (0, 0.4)]
    assignments = np.stack([*heads, rng.integers(0, clusters, 400)], axis=1)
    found = pairwise_nmi(assignments)
    for i, j in itertools.product(range(3), repeat=2):
        expected = normalized_mutual_info_score(assignments[:, i], assignments[:, j])
        assert found[i, j] == pytest.approx(expected, abs=1e-9)


def test_nmi_of_heads_with_a_single_cluster():
    flat = np.zeros((6, 2), int)
    assert pairwise_nmi(flat).tolist() == [[1, 0], [0, 1]]  # they tell each other nothing
    flat[:, 1] = np.arange(6) % 2
    assert pairwise_nmi(flat)[0, 1] == 0


def test_mean_nmi(noisy_heads):
    _, assignments = noisy_heads(500, 4, 5, error=0.0)
    assert agreement.mean_nmi(assignments) == pytest.approx(1)
    assert agreement.mean_nmi(assignments[:, :1]) == 1.0
    noise = np.random.default_rng(0).integers(0, 5, (2000, 3))
    assert agreement.mean_nmi(noise, 5, max_rows=1000) < 0.05
