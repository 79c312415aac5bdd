"""The aligned vote against all permutations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score


def plain_voting(assignments, clusters):
    """Every alignment by trying all permutations; votes counted image by image."""
    rows, heads = assignments.shape
    nmi = [
        sum(
            normalized_mutual_info_score(assignments[:, i], assignments[:, j]) for j in range(heads)
        )
        for i in range(heads)
    ]
    votes = np.zeros((rows, clusters))
    for step, head in enumerate(np.argsort(-np.array(nmi), kind="stable")):
        options = [
            np.array(p)[assignments[:, head]] for p in itertools.permutations(range(clusters))
        ]
        named = max(options, key=lambda x: votes[np.arange(rows), x].sum()) if step else options[0]
        votes[np.arange(rows), named] += 1
    return votes


@pytest.mark.parametrize("seed", range(5))
def test_voting_equals_brute_force(solve, same_partition, noisy_heads, make_ensemble, seed):
    _, assignments = noisy_heads(300, 5, 4, error=0.3, seed=seed)
    votes = plain_voting(make_ensemble(assignments, 4).heads.T, 4)
    clear = (votes == votes.max(axis=1, keepdims=True)).sum(axis=1) == 1
    found = solve(assignments, 4, "voting").labels
    assert clear.mean() > 0.8
    assert same_partition(found[clear], votes.argmax(axis=1)[clear])
