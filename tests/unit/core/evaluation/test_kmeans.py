"""k-means in memory and streamed."""

from __future__ import annotations

import numpy as np
import pytest

from icce_ray.core.evaluation import kmeans
from icce_ray.core.evaluation import truth as metrics
from icce_ray.errors import DataError


def blobs(rows: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    labels = np.arange(rows) % classes
    points = np.eye(width)[labels] * 4 + rng.normal(0, 0.3, (rows, width))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points.astype(np.float16), labels


@pytest.mark.parametrize("max_rows", [100_000, 200])
def test_kmeans_finds_clear_blobs_in_memory_and_streamed(tmp_path, max_rows):
    features, labels = blobs(900, 16, 5)
    np.save(tmp_path / "f.npy", features)
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r")
    found = kmeans.kmeans_baseline(mapped, 5, seed=0, restarts=3, max_rows=max_rows)
    assert found.dtype == np.int32
    assert metrics.accuracy(labels, found) > 0.99
    again = kmeans.kmeans_baseline(mapped, 5, seed=0, restarts=3, max_rows=max_rows)
    assert (found == again).all()


def test_streamed_kmeans_trains_on_all_rows_not_on_the_sample_alone(monkeypatch):
    import faiss

    seen = []
    original = faiss.Clustering.train_encoded
    monkeypatch.setattr(
        faiss.Clustering,
        "train_encoded",
        lambda self, x, *rest: seen.append(len(x)) or original(self, x, *rest),
    )
    features, _ = blobs(3000, 8, 2)
    kmeans.kmeans_baseline(features, 2, seed=0, restarts=1, max_rows=100)
    assert seen == [3000]


def test_kmeans_needs_a_row_per_cluster():
    with pytest.raises(DataError, match="num_classes=5"):
        kmeans.kmeans_baseline(np.ones((3, 2), np.float16), 5, seed=0)
