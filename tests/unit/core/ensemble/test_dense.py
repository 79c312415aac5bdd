"""The dense EM against the sparse one, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from icce_ray.core.ensemble import agreement, dawid_skene, dense
from icce_ray.core.ensemble.base import Ensemble

CPU = torch.device("cpu")


def noisy_heads(rows, clusters, heads, noise, seed):
    """Clusters of each head [H, N]: the truth renamed, with a share of random errors."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, clusters, rows)
    out = np.empty((heads, rows), np.int16)
    for head in out:
        wrong = rng.random(rows) < noise
        head[:] = np.where(wrong, rng.integers(0, clusters, rows), rng.permutation(clusters)[truth])
    return out


@pytest.mark.parametrize("max_rows", [10_000, 150])  # all images, and a sample
@pytest.mark.parametrize(("clusters", "noise"), [(3, 0.1), (7, 0.4), (20, 0.2)])
def test_the_same_model_labels_and_confidence(monkeypatch, clusters, noise, max_rows):
    monkeypatch.setattr(dense, "CHUNK", 64)
    ensemble = Ensemble(noisy_heads(400, clusters, 6, noise, 0), clusters, clusters, max_rows, 0)
    expected = dawid_skene.dawid_skene(ensemble)
    monkeypatch.setattr(dawid_skene, "_fit", lambda few, start: dense.fit(few, start, em(), CPU))
    monkeypatch.setattr(dawid_skene, "_apply", lambda heads, model: dense.apply(heads, model, CPU))
    found = dawid_skene.dawid_skene(ensemble)
    # Of two starts that end in the same model under other names, either may be taken.
    assert (agreement.align(found.labels, expected.labels, clusters) == expected.labels).all()
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-4)
    history = expected.info["log_likelihood"]
    np.testing.assert_allclose(found.info["log_likelihood"], history, rtol=1e-4)


def em():
    return dense.EM(
        dawid_skene.ITERATIONS,
        dawid_skene.CONVERGED,
        dawid_skene.SMOOTHING,
        dawid_skene.POSTERIOR_FLOOR,
    )
