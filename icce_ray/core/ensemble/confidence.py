"""How sure a cluster is, without labels.

Heads see the same features and err together, so their agreement is close to 1 nearly everywhere,
right or wrong. Neighbors are a witness of another kind: an image among images of other clusters
lies at a border, and a cluster whose images have many neighbors elsewhere was cut where no border
is.

Shapes: N images, M neighbors, K clusters.
"""

from __future__ import annotations

import numpy as np

CHUNK = 65_536  # images whose neighbors are looked up at once


def supported(posterior: np.ndarray, clusters: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The ensemble's posterior, discounted by what the neighbors say: float32 [N], 0..1.

    The product of three: the posterior, the share of the image's neighborhood that is in its
    cluster, and the mean of that share over its cluster. The neighborhood is the image itself and
    its M nearest, or as many of them as its cluster has others: a small cluster is no less sure.

    Args:
        posterior: of each image's cluster, [N], 0..1.
        clusters: int [N] in 0..K-1.
        ids: row numbers of the nearest neighbors, int [N, M].
    """
    sizes = np.bincount(clusters)
    alike = np.empty(len(clusters), np.float64)
    for start in range(0, len(ids), CHUNK):
        near = clusters[ids[start : start + CHUNK]]
        alike[start : start + CHUNK] = (near == clusters[start : start + CHUNK, None]).sum(1)
    share = (1 + alike) / (1 + np.minimum(ids.shape[1], sizes - 1)[clusters])
    mean = np.bincount(clusters, weights=share) / np.maximum(sizes, 1)
    return (posterior * share * mean[clusters]).astype(np.float32)
