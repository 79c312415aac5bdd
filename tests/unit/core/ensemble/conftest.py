"""Ensembles whose truth is known, as fixtures that are plain functions.

Shapes: N images, H heads, K clusters.
"""

from __future__ import annotations

import numpy as np
import pytest

from icce_ray.core.ensemble import base
from icce_ray.core.ensemble import consensus as core
from icce_ray.core.ensemble.agreement import align
from icce_ray.core.ensemble.consensus import consensus


def _solve(assignments, clusters, method, **options):
    options = {"max_rows": 100_000, "seed": 0, **options}
    return consensus(assignments, clusters, method, **options)


def _accuracy(labels, truth, clusters):
    return float((align(labels, truth, clusters) == truth).mean())


def _same_partition(a, b):
    return len(np.unique(np.stack([a, b]), axis=1).T) == len(np.unique(a)) == len(np.unique(b))


def _noisy_heads(rows, heads, clusters, error=0.25, seed=0):
    """Classes [N] of equal size, and heads [N, H] that err independently, with random names."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(rows) % clusters)
    columns = []
    for _ in range(heads):
        wrong = rng.random(rows) < error
        labels = np.where(wrong, rng.integers(0, clusters, rows), truth)
        columns.append(rng.permutation(clusters)[labels])
    return truth, np.stack(columns, axis=1).astype(np.int16)


def _merging_heads(rows, heads, clusters, seed=0, error=0.1):
    """As above, but each head also merges a pair of classes and splits a third one by chance."""
    truth, assignments = _noisy_heads(rows, heads, clusters, error=error, seed=seed)
    rng = np.random.default_rng(seed + 1)
    for column in assignments.T:
        kept, merged, split = rng.choice(clusters, 3, replace=False)
        column[column == merged] = kept
        column[(column == split) & (rng.random(rows) < 0.5)] = merged
    return truth, assignments


def _renamed(assignments, clusters, seed):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(clusters)[column] for column in assignments.T], axis=1)


def _make_ensemble(assignments, clusters, each=None):
    heads = core.canonical_heads(assignments, np.arange(assignments.shape[1]), each or clusters)
    return base.Ensemble(heads, clusters, each or clusters, 100_000, 0)


def _splitting_heads(rows, heads, clusters, parts, error=0.2, seed=0):
    """Classes [N], and heads [N, H] that each cut every class into parts, in their own way."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(rows) % clusters)
    columns = []
    for _ in range(heads):
        labels = truth * parts + rng.integers(0, parts, rows)
        wrong = rng.random(rows) < error
        labels = np.where(wrong, rng.integers(0, clusters * parts, rows), labels)
        columns.append(rng.permutation(clusters * parts)[labels])
    return truth, np.stack(columns, axis=1).astype(np.int16)


@pytest.fixture(scope="session")
def solve():
    return _solve


@pytest.fixture(scope="session")
def accuracy():
    return _accuracy


@pytest.fixture(scope="session")
def same_partition():
    return _same_partition


@pytest.fixture(scope="session")
def noisy_heads():
    return _noisy_heads


@pytest.fixture(scope="session")
def merging_heads():
    return _merging_heads


@pytest.fixture(scope="session")
def renamed():
    return _renamed


@pytest.fixture(scope="session")
def splitting_heads():
    return _splitting_heads


@pytest.fixture(scope="session")
def make_ensemble():
    return _make_ensemble
