"""The second most likely cluster of each image, by the heads.

Shapes: N images, H heads, L clusters per head, K clusters.
"""

from __future__ import annotations

import numpy as np

BLOCK = 1 << 22  # shares summed at once


def second_choice(assignments: np.ndarray, clusters: np.ndarray, num_clusters: int) -> np.ndarray:
    """The likeliest cluster beside the image's own: int32 [N], -1 where no head names another.

    A cluster of a head stands for the clusters that its images are in, each with its share; an
    image's cluster is as likely as the mean of these shares over heads.

    Args:
        assignments: of the merged heads, int [N, H] in 0..L-1; may be memory-mapped.
        clusters: the consensus, int [N] in 0..K-1.
    """
    rows, heads = assignments.shape
    shares = [_shares(assignments[:, head], clusters, num_clusters) for head in range(heads)]
    second = np.empty(rows, np.int32)
    step = max(1, BLOCK // num_clusters)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        likely = np.zeros((part.stop - start, num_clusters), np.float32)
        for head in range(heads):
            likely += shares[head][assignments[part, head]]
        likely[np.arange(len(likely)), clusters[part]] = 0
        best = likely.argmax(1)
        second[part] = np.where(likely[np.arange(len(likely)), best] > 0, best, -1)
    return second


def _shares(own: np.ndarray, clusters: np.ndarray, num_clusters: int) -> np.ndarray:
    """Share of each cluster among the images of each of a head's clusters: float32 [L, K]."""
    pairs = np.asarray(own, np.int64) * num_clusters + clusters
    count = np.bincount(pairs, minlength=(int(np.max(own)) + 1) * num_clusters)
    table = count.reshape(-1, num_clusters).astype(np.float32)
    return table / np.maximum(1, table.sum(1, keepdims=True))
