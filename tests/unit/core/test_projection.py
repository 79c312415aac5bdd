"""Principal components against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.decomposition import PCA
from torch.nn import functional as F

from icce_ray.core import projection as core
from icce_ray.core.projection import Projection

FEATURES = 12


def unit_rows(rows):
    x = torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(0))
    return F.normalize(x, dim=-1)


def neighbor_scatter(z, seen, count):
    """Half the mean outer product of the differences between rows and their nearest others."""
    seen = seen / np.linalg.norm(seen, axis=1, keepdims=True)
    scatter = np.zeros((z.shape[1], z.shape[1]))
    for row in range(len(z)):
        order = np.argsort(-(seen @ seen[row]))
        for other in order[order != row][:count]:
            scatter += np.outer(z[row] - z[other], z[row] - z[other]) / (2 * count * len(z))
    return scatter


@pytest.mark.parametrize("components", [1, 5, 12])
def test_components_are_whitened_by_the_scatter_between_neighbors(components):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12)) * np.geomspace(4, 0.2, 12) + rng.normal(size=12)
    x += 3 * rng.normal(size=(4, 12))[np.arange(200) % 4]
    projection = Projection(12, components).fit(torch.from_numpy(x.astype(np.float32)))
    z = PCA(components, svd_solver="full").fit_transform(x)
    variance = z.var(0)
    within = neighbor_scatter(z, z / variance**0.25, core.PAIRED)
    within += np.diag(core.SHRINKAGE * within.trace() / components + core.UNLIKE * variance)
    expected = z @ np.linalg.inv(sqrtm(within))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = projection(torch.from_numpy(x).float()).numpy()
    # The axes themselves have no signs, so angles between rows are compared.
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_a_direction_that_all_classes_vary_in_alike_no_longer_rules():
    rng = np.random.default_rng(0)
    labels = np.arange(1000) % 4
    x = 2 * np.eye(4, 16)[labels] + 0.3 * rng.normal(size=(1000, 16))
    x[:, 13:] = 3 * rng.normal(size=(1000, 3))  # light, say
    x = torch.from_numpy(x.astype(np.float32))

    def purity(rows):
        similarity = rows @ rows.T - 2 * torch.eye(len(rows))
        near = similarity.topk(20).indices.numpy()
        return (labels[near] == labels[:, None]).mean()

    plain = F.normalize(x - x.mean(0), dim=-1)
    assert purity(Projection(16, 16).fit(x)(x)) > 0.98
    assert purity(plain) < 0.9


def test_copies_of_images_do_no_harm():
    """Neighbors without any scatter: what is left is whitening by the variance of all rows."""
    x = unit_rows(60).repeat_interleave(core.PAIRED + 1, dim=0)
    out = Projection(FEATURES, 6).fit(x)(x)
    assert out.isfinite().all()
    deviation = (out - out.mean(0)).std(0)
    assert deviation.max() < 2 * deviation.min()


def test_signs_of_the_components_do_not_depend_on_row_order():
    x = unit_rows(80)
    one, two = (Projection(FEATURES, 6).fit(rows).basis for rows in (x, x.flip(0)))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_projection_of_fewer_rows_than_components_is_finite():
    x = unit_rows(3)
    out = Projection(FEATURES, 8).fit(x)(x)
    assert out.shape == (3, 8) and out.isfinite().all()
    same = Projection(FEATURES, 4).fit(x[:1].expand(5, -1))(x[:1])  # the center itself
    assert same.isfinite().all()


@pytest.mark.parametrize("components", [None, 4, 99])
def test_projection_of_all_rows_in_pieces(monkeypatch, components):
    embeddings = np.random.default_rng(0).normal(size=(70, 9)).astype(np.float16)
    projection = core.fit_projection(embeddings, components, 0)
    monkeypatch.setattr(core, "PROJECTED_ROWS", 16)
    out = core.project(embeddings, projection, torch.device("cpu"))
    assert out.shape == (70, 4 if components == 4 else 9) and out.dtype == torch.float16
    assert not out.is_inference()  # autograd must be able to save rows of it
    expected = projection(torch.from_numpy(embeddings).float())
    np.testing.assert_allclose(out, expected, atol=1e-3)
    if components is None:  # only centered
        centered = embeddings.astype(np.float32) - embeddings.astype(np.float32).mean(0)
        centered /= np.linalg.norm(centered, axis=1, keepdims=True)
        np.testing.assert_allclose(out, centered, atol=2e-3)


def test_projection_is_fitted_on_a_sample_that_repeats(monkeypatch):
    monkeypatch.setattr(core, "STATISTICS_ROWS", 40)
    embeddings = np.random.default_rng(0).normal(size=(90, 6)).astype(np.float16)
    one, two, other = (core.fit_projection(embeddings, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(one.basis, two.basis) and not torch.equal(one.center, other.center)
