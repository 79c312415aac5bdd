"""k-means on the same features: what any method must beat.

Shapes: N images, D features, K clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from icce_ray.core.sampling import sample_rows
from icce_ray.errors import DataError

CHUNK = 65_536  # rows decoded at once
RESTARTS = 10  # the best one is taken
EXACT_WORK = 1e10  # N * D * K up to which scikit-learn's restarts take minutes on a few cores


def kmeans_is_large(rows: int, features: int, clusters: int, max_rows: int = 100_000) -> bool:
    """Whether `kmeans_baseline` works on a sample and then on a stream, instead of in memory."""
    return rows > max_rows or float(rows) * features * clusters > EXACT_WORK


def kmeans_baseline(
    features: np.ndarray,
    num_clusters: int,
    seed: int,
    *,
    restarts: int = RESTARTS,
    max_rows: int = 100_000,
    gpu: bool = False,
) -> np.ndarray:
    """Clusters of the best of several k-means: int32 [N].

    features: float16 or float32 [N, D], rows of length 1, possibly memory-mapped.
    Up to `max_rows` rows (and `EXACT_WORK`): scikit-learn's KMeans with k-means++ and `restarts`.
    Above: faiss, spherical; the restarts run on a sample of max(max_rows, 256 K) rows. The best one
    continues on all rows, which are decoded from float16 a block at a time: no float32 copy of the
    whole matrix is ever made. `gpu`: let faiss use the GPUs this process sees.

    Raises:
        DataError: where there are fewer rows than clusters.
    """
    rows, width = features.shape
    if rows < num_clusters:
        raise DataError(f"{rows} images cannot make num_classes={num_clusters} clusters")
    if not kmeans_is_large(rows, width, num_clusters, max_rows):
        return _kmeans_in_memory(features, num_clusters, restarts, seed)
    chosen = sample_rows(rows, max(max_rows, 256 * num_clusters), seed)
    options = {"seed": seed, "spherical": True, "min_points_per_centroid": 1}
    centers = _kmeans_sample(features[chosen], num_clusters, restarts, options, gpu)
    return _kmeans_stream(features, centers, options, gpu)


def _kmeans_in_memory(
    features: np.ndarray, num_clusters: int, restarts: int, seed: int
) -> np.ndarray:
    """All restarts by scikit-learn. int32 [N]."""
    from sklearn.cluster import KMeans

    model = KMeans(num_clusters, n_init=restarts, random_state=seed)
    return model.fit_predict(np.asarray(features, dtype=np.float32)).astype(np.int32)


def _kmeans_sample(
    sample: np.ndarray, num_clusters: int, restarts: int, options: dict[str, Any], gpu: bool
) -> np.ndarray:
    """Centers of the best of several spherical k-means: float32 [K, D]."""
    import faiss

    rows, width = sample.shape
    model = faiss.Kmeans(
        width,
        num_clusters,
        nredo=restarts,
        gpu=gpu and faiss.get_num_gpus() > 0,
        max_points_per_centroid=rows,  # faiss would draw 256 rows per cluster without a word
        **options,
    )
    model.train(sample.astype(np.float32))
    return np.asarray(model.centroids)


def _kmeans_stream(
    features: np.ndarray, centers: np.ndarray, options: dict[str, Any], gpu: bool
) -> np.ndarray:
    """Ten more iterations over all rows, decoded from float16 block by block. int32 [N]."""
    import faiss

    rows, width = features.shape
    settings = faiss.ClusteringParameters()
    for name, value in {**options, "niter": 10, "max_points_per_centroid": rows}.items():
        setattr(settings, name, value)
    model = faiss.Clustering(width, len(centers), settings)
    faiss.copy_array_to_vector(centers.ravel(), model.centroids)
    index: Any = faiss.IndexFlatIP(width)
    if gpu and faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    half = np.ascontiguousarray(features, dtype=np.float16)  # no copy of a float16 memory map
    codec = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16)
    model.train_encoded(half.view(np.uint8), codec, index)
    return _nearest(half, index)


def _nearest(features: np.ndarray, index: Any) -> np.ndarray:
    """Row of `index` nearest to each feature: int32 [N]."""
    out = np.empty(len(features), dtype=np.int32)
    for part in _parts(len(features)):
        _, nearest = index.search(features[part].astype(np.float32), 1)
        out[part] = nearest[:, 0]
    return out


def _parts(rows: int) -> Iterator[slice]:
    for start in range(0, rows, CHUNK):
        yield slice(start, min(rows, start + CHUNK))
