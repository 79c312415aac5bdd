"""EM against EM written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import sparse

from icce_ray.core.ensemble import consensus as core
from icce_ray.core.ensemble import dawid_skene


def plain_dawid_skene(assignments, start, clusters, steps, each=None):
    """EM written out, with the smoothing of the module. each: clusters per head."""
    each = each or clusters
    rows, heads = assignments.shape
    posterior = np.eye(clusters)[start]
    history = []
    for _ in range(steps):
        size = posterior.sum(axis=0)
        prior = (size + 1) / (rows + clusters)
        confusion = np.full((heads, each, clusters), dawid_skene.SMOOTHING / each)
        for n, h in itertools.product(range(rows), range(heads)):
            confusion[h, assignments[n, h]] += posterior[n]
        confusion /= size + dawid_skene.SMOOTHING
        likelihood = np.tile(prior, (rows, 1))
        for n, h in itertools.product(range(rows), range(heads)):
            likelihood[n] *= confusion[h, assignments[n, h]]
        history.append(np.log(likelihood.sum(axis=1)).mean())
        posterior = likelihood / likelihood.sum(axis=1, keepdims=True)
    return posterior, confusion, prior, history


@pytest.mark.parametrize("clusters", [3, 7])
def test_dawid_skene_equals_plain_em(
    solve, same_partition, noisy_heads, make_ensemble, clusters, monkeypatch
):
    _, assignments = noisy_heads(400, 5, clusters, error=0.35, seed=4)
    monkeypatch.setattr(dawid_skene, "ITERATIONS", 6)
    found = solve(assignments, clusters, "dawid-skene")
    used = found.info["path"].removeprefix("EM from ")
    steps = len(found.info["log_likelihood"])
    ensemble = make_ensemble(assignments, clusters)
    start = core.SOLVERS[used](ensemble).labels
    posterior, confusion, prior, history = plain_dawid_skene(
        ensemble.heads.T, start, clusters, steps
    )
    assert found.info["log_likelihood"] == pytest.approx(history, abs=2e-3)
    assert same_partition(found.labels, posterior.argmax(axis=1))
    # confidence: the likelihood averaged over the heads
    logs = np.log([[confusion[h, c] for h, c in enumerate(row)] for row in ensemble.heads.T])
    single = prior * np.exp(logs.mean(axis=1))
    single /= single.sum(axis=1, keepdims=True)
    expected = single[np.arange(400), posterior.argmax(axis=1)]
    assert np.abs(found.confidence - expected).max() < 0.02


def test_dawid_skene_log_likelihood_rises(solve, merging_heads):
    _, assignments = merging_heads(1000, 6, 8, seed=3, error=0.4)
    history = solve(assignments, 8, "dawid-skene").info["log_likelihood"]
    assert len(history) > 2
    assert (np.diff(history) > -1e-3).all()
    assert history[-1] > history[0]


def test_over_clustered_dawid_skene_equals_plain_em(
    solve, same_partition, splitting_heads, make_ensemble, monkeypatch
):
    _, assignments = splitting_heads(300, 4, 3, 2, error=0.4)
    monkeypatch.setattr(dawid_skene, "ITERATIONS", 5)
    found = solve(assignments, 3, "dawid-skene", head_clusters=6)
    ensemble = make_ensemble(assignments, 3, 6)
    start = core.SOLVERS[found.info["path"].removeprefix("EM from ")](ensemble).labels
    steps = len(found.info["log_likelihood"])
    posterior, _, _, history = plain_dawid_skene(ensemble.heads.T, start, 3, steps, each=6)
    assert found.info["log_likelihood"] == pytest.approx(history, abs=2e-3)
    assert same_partition(found.labels, posterior.argmax(axis=1))


def test_images_whose_clusters_the_sample_never_saw():
    """Such an image (the second) has no score at all; it gets the most probable class."""
    model = dawid_skene._Model(
        sparse.csr_array((np.array([1.0, 2.0]), ([0, 2], [1, 1])), shape=(6, 3)),
        base=np.log([0.2, 0.3, 0.5]),
        prior=np.log([0.2, 0.3, 0.5]),
        heads=2.0,
    )
    labels, confidence = dawid_skene._apply(np.array([[0, 1, 2], [1, 2, 2]]), model)
    assert labels.tolist() == [1, 2, 1]
    assert confidence == pytest.approx([1, 0.5, 1])
