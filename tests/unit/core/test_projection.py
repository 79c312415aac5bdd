"""Principal components against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch.nn import functional as F

from icce_ray.core import projection as core
from icce_ray.core.projection import Projection

FEATURES = 12


def unit_rows(rows):
    x = torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(0))
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize("components", [1, 5, 12])
def test_projection_is_half_whitened_pca_on_unit_rows(components):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12)) * np.geomspace(4, 0.2, 12) + rng.normal(size=12)
    projection = Projection(12, components).fit(torch.from_numpy(x.astype(np.float32)))
    fitted = PCA(components, svd_solver="full").fit(x)
    expected = fitted.transform(x) / fitted.explained_variance_ ** (core.WHITENED / 2)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = projection(torch.from_numpy(x).float()).numpy()
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found * signs, expected, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


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
    if components != 4:  # all of them: only centered
        centered = embeddings.astype(np.float32) - embeddings.astype(np.float32).mean(0)
        centered /= np.linalg.norm(centered, axis=1, keepdims=True)
        np.testing.assert_allclose(out, centered, atol=2e-3)


def test_projection_is_fitted_on_a_sample_that_repeats(monkeypatch):
    monkeypatch.setattr(core, "STATISTICS_ROWS", 40)
    embeddings = np.random.default_rng(0).normal(size=(90, 6)).astype(np.float16)
    one, two, other = (core.fit_projection(embeddings, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(one.basis, two.basis) and not torch.equal(one.center, other.center)
