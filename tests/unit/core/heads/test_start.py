"""The clusters that heads begin with, against plain loops and blobs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from icce_ray.core import neighbors
from icce_ray.core.evaluation.truth import accuracy
from icce_ray.core.heads import start
from icce_ray.core.heads.start import (
    cluster_few,
    evened,
    kmeans_start,
    lloyd,
    smoothed,
    ward_start,
    ward_tree,
)

FEATURES, CLUSTERS = 12, 5


def unit_rows(rows):
    x = torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(0))
    return F.normalize(x, dim=-1)


def blobs(clusters, each, noise=0.05):
    """Rows around `clusters` random directions of many components, and their clusters."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(clusters), each)
    x = rng.normal(size=(clusters, 40))[labels] / 40**0.5 + noise * rng.normal(
        size=(len(labels), 40)
    )
    return F.normalize(torch.from_numpy(x).float(), dim=-1), labels


# --- Ward's tree ---------------------------------------------------------------------------------


def by_tree(x, clusters, seed):
    return ward_start(x, x, ward_tree(x, clusters, seed), seed)


def test_rows_are_averaged_with_their_neighbors(monkeypatch):
    monkeypatch.setattr(start, "SMOOTHED_ROWS", 7)
    x = unit_rows(30).half()
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 30, (30, 4))).int()
    counts = torch.from_numpy(rng.integers(1, 5, 30)).int()
    ids[torch.arange(4) >= counts[:, None]] = 10**9  # never read
    lists = [[*one[:n], *[i] * (4 - n)] for i, (one, n) in enumerate(zip(ids, counts, strict=True))]
    expected = x.float()
    for _ in range(start.ROUNDS):
        near = torch.stack([expected[torch.tensor(row)].mean(0) for row in lists])
        expected = F.normalize(expected + near, dim=-1)
    torch.testing.assert_close(smoothed(x, ids, counts).float(), expected, atol=3e-3, rtol=0)


def nearest(x, count=10):
    ids, _ = neighbors.search(x.numpy(), 0, len(x), count, torch.device("cpu"))
    return torch.from_numpy(ids)


def test_styles_that_all_classes_have_do_not_split_them():
    """Each class has two styles, farther apart than classes; neighbors are of one style."""
    rng = np.random.default_rng(0)
    codes, style = np.repeat(np.arange(24), 40), np.arange(24 * 40) % 2
    x = np.eye(24, 48)[codes] + 0.12 * rng.normal(size=(len(codes), 48))
    x[:, -1] += 1.5 * (style - 0.5)
    x = (x - x.mean(0)) @ np.linalg.qr(rng.normal(size=(48, 48)))[0]
    features = F.normalize(torch.from_numpy(x).float(), dim=-1).half()
    ids, ten = nearest(features), torch.full((len(codes),), 10)

    def found(space):
        clusters = cluster_few(smoothed(space, ids, ten).float(), 24, seed=0)
        return accuracy(codes, clusters.numpy())

    assert found(features) < 0.7
    assert found(evened(features, ids)) > 0.98


def test_evened_directions_differ_least_where_neighbors_differ_most(monkeypatch):
    """Against the matrix that whitens neighbors and all images together, up to a rotation."""
    monkeypatch.setattr(start, "SMOOTHED_ROWS", 7)
    x = unit_rows(60).half()
    ids = nearest(x)
    rows = x.double()
    scatter = ((rows - rows[ids[:, 0].long()]) ** 2).mean() / 2 * torch.eye(FEATURES)
    scatter = scatter + start.SHARED * torch.cov(rows.T, correction=0)
    whitened = rows @ torch.linalg.cholesky(torch.linalg.inv(scatter))
    expected = F.normalize(whitened, dim=-1)
    out = evened(x, ids).double()
    torch.testing.assert_close(out @ out.T, expected @ expected.T, atol=5e-3, rtol=0)


def test_copies_of_one_image_are_evened_to_something_finite():
    x = unit_rows(1).half().repeat(20, 1)
    assert evened(x, torch.zeros(20, 3, dtype=torch.int32)).isfinite().all()


def test_the_tree_finds_blobs_that_kmeans_misses():
    x, labels = blobs(30, 40)

    def missed(weight):
        """Blobs without a centroid of their own."""
        found = (x @ weight - weight.square().sum(0) / 2).argmax(1).numpy()
        return 30 - len({np.bincount(found[labels == blob]).argmax() for blob in range(30)})

    tree = [missed(by_tree(x, 30, seed)) for seed in range(3)]
    by_kmeans = [missed(kmeans_start(x, 30, seed)) for seed in range(3)]
    assert max(tree) <= 1 < np.mean(by_kmeans)


@pytest.mark.parametrize("begin", [kmeans_start, by_tree])
def test_a_start_repeats_and_differs_by_seed(begin):
    sample = unit_rows(120)
    one, again, other = (begin(sample, CLUSTERS, seed) for seed in (3, 3, 4))
    assert one.shape == (FEATURES, CLUSTERS) and one.dtype == torch.float32
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("rows", [2, CLUSTERS, CLUSTERS + 1, 4 * CLUSTERS, 4 * CLUSTERS + 1])
def test_a_start_with_hardly_more_rows_than_clusters(rows):
    x = unit_rows(rows)
    assert kmeans_start(x, CLUSTERS, 0).isfinite().all()
    if rows >= start.FEWEST_PER_CLUSTER * CLUSTERS:
        assert by_tree(x, CLUSTERS, 0).isfinite().all()


def test_a_start_on_copies_of_few_rows():
    for sample in (unit_rows(2).repeat_interleave(50, dim=0), torch.ones(30, 1)):
        assert kmeans_start(sample, CLUSTERS, 0).isfinite().all()
        assert by_tree(sample, CLUSTERS, 0).isfinite().all()


# --- k-means -------------------------------------------------------------------------------------


def test_its_columns_are_centers_of_the_blobs():
    centers = np.linalg.qr(np.random.default_rng(0).normal(size=(FEATURES, 3)))[0].T
    sample = np.repeat(centers, 40, axis=0) + 0.01 * unit_rows(120).numpy()
    found = [
        kmeans_start(torch.from_numpy(sample.astype(np.float32)), 3, seed).numpy()
        for seed in range(20)
    ]
    # Each k-means starts from random rows; some miss a blob, none may leave the data.
    assert max((centers @ weight).max(1).min() for weight in found) > 0.98
    assert all(np.linalg.norm(weight, axis=0).max() < 1.05 for weight in found)


def test_lloyd_ends_at_means_of_its_own_clusters():
    x = unit_rows(200)
    centroids = lloyd(x, 4, np.random.default_rng(0), iterations=100)
    nearest = torch.cdist(x, centroids).argmin(1)
    means = torch.stack([x[nearest == c].mean(0) for c in range(4)])
    torch.testing.assert_close(centroids, means, atol=1e-5, rtol=0)
