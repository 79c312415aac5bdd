"""How sure a cluster is, without labels.

Heads see the same features and err together, so their agreement is close to 1 nearly everywhere,
right or wrong. Neighbors are a witness of another kind: an image among images of other clusters
lies at a border, and a cluster whose images have many neighbors elsewhere was cut where no border
is.

Shapes: N images, M neighbors, K clusters.
"""

from __future__ import annotations

import numpy as np

from icce_ray.core.constants import CONFIDENCE_WIDE

CHUNK = 65_536  # images whose neighbors are looked up at once


def supported(
    posterior: np.ndarray, clusters: np.ndarray, ids: np.ndarray, near: int
) -> np.ndarray:
    """The ensemble's posterior, discounted by what the neighbors say: float32 [N], 0..1.

    The product of three: the posterior; the share of the image's neighborhood that is in its
    cluster, the geometric mean of a small neighborhood and a wide one; and the mean of the small
    ones' share over the cluster. The small one is the image itself and its `near` nearest, or as
    many as its cluster has others: a small cluster is no less sure. The wide one is half as large
    as the cluster (CONFIDENCE_WIDE), if so many neighbors are known: where several clusters meet,
    the nearest few often agree.

    Args:
        posterior: of each image's cluster, [N], 0..1.
        clusters: int [N] in 0..K-1.
        ids: row numbers of the nearest neighbors, nearest first, int [N, M].
        near: neighbors of the small neighborhood, at most M.
    """
    sizes = np.bincount(clusters)
    small = np.minimum(near, sizes - 1)[clusters]
    part_of_it = np.ceil(CONFIDENCE_WIDE * (sizes - 1)).astype(np.int64)
    wide = np.minimum(ids.shape[1], part_of_it)[clusters]
    near_share, wide_share = np.empty((2, len(clusters)))
    place = np.arange(ids.shape[1])
    for start in range(0, len(ids), CHUNK):
        part = slice(start, start + CHUNK)
        alike = clusters[ids[part]] == clusters[part, None]
        near_share[part] = (1 + alike[:, :near].sum(1)) / (1 + small[part])
        alike &= place < wide[part, None]
        wide_share[part] = (1 + alike.sum(1)) / (1 + wide[part])
    mean = np.bincount(clusters, weights=near_share) / np.maximum(sizes, 1)
    return (posterior * np.sqrt(near_share * wide_share) * mean[clusters]).astype(np.float32)
