"""Images on a plane, so that neighbors stay near each other: t-SNE on neighbor lists.

van der Maaten & Hinton 2008, by scikit-learn, from lists as a run has them. Shapes: N images, M
neighbors, D features.
"""

from __future__ import annotations

import numpy as np

PERPLEXITY = 15  # neighbors that count, roughly; lists three times as long are used
STEPS = 350  # of them 250 that pull groups apart first; more change little, and cost
FEWEST = 30  # images; below, there is nothing to see


def neighbors_of_sample(
    embeddings: np.ndarray, components: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbor lists among some images alone, where those of all images lead out of the sample.

    embeddings: float16 [N, D], few enough for exact search in seconds. components: see
    projection.fit_projection. Returns: ids int32 [N, M], similarity float32 [N, M], best first.
    """
    import torch  # only here: a small run's map needs it not

    from icce_ray.core import neighbors, projection

    fitted = projection.fit_projection(embeddings, components, seed)
    matrix = projection.project(embeddings, fitted, torch.device("cpu")).numpy()
    most = min(3 * PERPLEXITY + 1, len(matrix) - 1)
    return neighbors.search(matrix, 0, len(matrix), most)


def coordinates(
    ids: np.ndarray, similarity: np.ndarray, embeddings: np.ndarray, seed: int
) -> np.ndarray:
    """Where each image is on the plane: float32 [N, 2] in 0..1, the longer side filled.

    ids, similarity: [N, M], best first; cosines. embeddings: [N, D]; their two leading principal
    components are where images start. N is at least FEWEST.
    """
    from scipy import sparse
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = len(ids)
    most = min(3 * PERPLEXITY + 1, ids.shape[1])
    own = np.arange(rows, dtype=np.int32)[:, None]
    cosine = np.asarray(similarity[:, :most], dtype=np.float32)
    distance = np.sqrt(np.maximum(0, 2 - 2 * cosine))  # of unit vectors
    distance = np.concatenate([np.zeros((rows, 1), np.float32), distance], axis=1)
    near = np.concatenate([own, ids[:, :most]], axis=1)
    shape, ends = (rows, rows), np.arange(0, near.size + 1, near.shape[1])
    graph = sparse.csr_matrix((distance.ravel(), near.ravel(), ends), shape=shape)
    features = np.asarray(embeddings, dtype=np.float32)
    with np.errstate(invalid="ignore"):  # where all images are equal
        start = PCA(2, svd_solver="randomized", random_state=seed).fit_transform(features)
    start *= 1e-4 / max(float(start[:, 0].std()), 1e-12)
    tsne = TSNE(
        metric="precomputed",
        init=start.astype(np.float32),
        perplexity=max(1.0, (most - 1) / 3),
        max_iter=STEPS,
        random_state=seed,
    )
    place = tsne.fit_transform(graph)
    place -= place.min(axis=0)
    return np.asarray(place / max(float(place.max()), 1e-12), dtype=np.float32)
