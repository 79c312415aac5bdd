"""How far clusterings agree: contingency tables, matching of cluster names, mutual information.

Shapes: N images, H heads, K clusters. Labels are integers from 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.optimize import linear_sum_assignment

from icce_ray.core.sampling import sample_rows
from icce_ray.errors import DataError

# --- contingency and matching --------------------------------------------------------------------


def contingency(a: np.ndarray, b: np.ndarray, clusters: int) -> np.ndarray:
    """Images per pair of clusters, int64 [K, K]. a, b: int [N] in 0..K-1."""
    key = a.astype(np.int64) * clusters + b
    return np.bincount(key, minlength=clusters * clusters).reshape(clusters, clusters)


def assign(gain: np.ndarray) -> np.ndarray:
    """The permutation of greatest total gain [K, K], by the Hungarian method: int64 [K]."""
    rows, columns = linear_sum_assignment(gain, maximize=True)
    mapping = np.empty(len(gain), np.int64)
    mapping[rows] = columns
    return mapping


def match(labels: np.ndarray, reference: np.ndarray, num_clusters: int) -> np.ndarray:
    """The renaming of `labels` that agrees with `reference` on most images (Hungarian method).

    labels, reference: int [N] in 0..K-1. Returns int64 [K], a permutation: new name of each label.
    """
    return assign(contingency(labels, reference, num_clusters))


def align(labels: np.ndarray, reference: np.ndarray, num_clusters: int) -> np.ndarray:
    """`labels` renamed by `match`. Shapes as there; int64 [N]."""
    return match(labels, reference, num_clusters)[labels]


def cells(key: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Non-zero cells of a contingency table: row, column, count. key: row * K + column, [N]."""
    if clusters * clusters <= max(1 << 20, 4 * len(key)):
        counts = np.bincount(key, minlength=clusters * clusters)
        used = np.flatnonzero(counts)
        counts = counts[used]
    else:  # a table of thousands of clusters would be larger than the data
        used, counts = np.unique(key, return_counts=True)
    return used // clusters, used % clusters, counts


def pairs(
    heads: np.ndarray, clusters: int
) -> Iterator[tuple[int, int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Non-zero cells of the contingency table of every pair of heads i < j. heads: [H, N]."""
    for i in range(len(heads)):
        base = heads[i].astype(np.int64) * clusters
        for j in range(i + 1, len(heads)):
            yield i, j, cells(base + heads[j], clusters)


def cluster_sizes(heads: np.ndarray, clusters: int) -> np.ndarray:
    """Cluster sizes, int64 [H, K]. heads: int [H, N]."""
    return np.stack([np.bincount(head, minlength=clusters) for head in heads])


# --- mutual information --------------------------------------------------------------------------


def entropy(counts: np.ndarray) -> float:
    """Entropy of a distribution given by counts, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """In nats; 0 where a or b is constant. int >= 0, [N] each."""
    width = int(b.max()) + 1
    key = a.astype(np.int64) * width + b
    size = (int(a.max()) + 1) * width
    joint = np.bincount(key) if size <= 4 * len(key) else np.unique(key, return_counts=True)[1]
    own = entropy(np.bincount(a)), entropy(np.bincount(b))
    return sum(own) - entropy(joint) if min(own) > 0 else 0.0


def nmi(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information over the mean of the two entropies; 0 where a or b is constant."""
    total = entropy(np.bincount(a)) + entropy(np.bincount(b))
    return 2 * mutual_information(a, b) / total if total > 0 else 0.0


def head_nmi(heads: np.ndarray, clusters: int) -> np.ndarray:
    """NMI between all pairs of heads, float64 [H, H]. heads: int [H, N] in 0..K-1.

    Heads that put all images into one cluster agree with no other head.
    """
    own = [entropy(sizes) for sizes in cluster_sizes(heads, clusters)]
    result = np.eye(len(heads))
    for i, j, (_, _, counts) in pairs(heads, clusters):
        total = own[i] + own[j]
        shared = total - entropy(counts)
        result[i, j] = result[j, i] = min(1.0, max(0.0, 2 * shared / total)) if total else 0.0
    return result


def pairwise_nmi(assignments: np.ndarray, num_clusters: int | None = None) -> np.ndarray:
    """`head_nmi` of a matrix of assignments, int [N, H].

    Raises:
        DataError: assignments that are not a matrix of integers >= 0 with at least one row.
    """
    check_assignments(assignments)
    heads = np.ascontiguousarray(np.asarray(assignments).T)
    return head_nmi(heads, num_clusters or int(heads.max()) + 1)


def mean_nmi(
    assignments: np.ndarray, num_clusters: int | None = None, *, max_rows: int | None = None
) -> float:
    """Mean NMI over all pairs of heads; 1 for a single one. assignments: int [N, H].

    max_rows: use at most this many random images.

    Raises:
        DataError: as `pairwise_nmi`.
    """
    heads = assignments.shape[1]
    if heads < 2:
        return 1.0
    if max_rows is not None:
        assignments = assignments[sample_rows(len(assignments), max_rows, seed=0)]
    values = pairwise_nmi(assignments, num_clusters)
    return float(values[np.triu_indices(heads, k=1)].mean())


def check_assignments(assignments: np.ndarray) -> None:
    """Raise DataError for what is not a matrix of integers >= 0 with at least one row."""
    if assignments.ndim != 2 or not np.issubdtype(assignments.dtype, np.integer):
        raise DataError(
            f"head assignments must be a matrix of integers [images, heads], not "
            f"{assignments.dtype} of shape {assignments.shape}"
        )
    if 0 in assignments.shape:
        raise DataError(f"there are no head assignments: their shape is {assignments.shape}")
    if assignments.min() < 0:
        raise DataError(f"head assignments must not be negative; found {assignments.min()}")
