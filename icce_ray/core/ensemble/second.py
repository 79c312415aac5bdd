"""The second most likely cluster of each image, by its neighbors.

The heads do not know it: they see the same features, and name the same cluster, right or wrong.

Shapes: N images, M neighbors, K clusters.
"""

from __future__ import annotations

import numpy as np

BLOCK = 1 << 22  # neighbors, and votes for clusters, looked at at once


def second_choice(
    ids: np.ndarray, similarity: np.ndarray, clusters: np.ndarray, num_clusters: int
) -> np.ndarray:
    """The cluster that most of the neighbors outside the image's own are in: int32 [N].

    A neighbor counts by its similarity. -1 where all neighbors are in the image's cluster.

    Args:
        ids, similarity: of the nearest neighbors, [N, M]; may be memory-mapped.
        clusters: the consensus, int [N] in 0..K-1.
    """
    second = np.empty(len(ids), np.int32)
    step = max(1, BLOCK // max(num_clusters, ids.shape[1]))
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        own, near = clusters[part], clusters[ids[part]]
        vote = np.asarray(similarity[part], np.float64).clip(1e-6)
        cell = np.arange(len(own))[:, None] * num_clusters + near
        votes = np.bincount(cell.ravel(), vote.ravel(), minlength=len(own) * num_clusters)
        votes = votes.reshape(len(own), num_clusters)
        votes[np.arange(len(own)), own] = 0
        second[part] = np.where(votes.any(1), votes.argmax(1), -1)
    return second
