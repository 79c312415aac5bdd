"""TODO"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.optimize import linear_sum_assignment

from icce_ray.errors import DataError


def pairwise_nmi(
    assignments: np.ndarray,
    num_clusters: int | None = None,
    *,
    max_rows: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """NMI between all pairs of heads (arithmetic mean of the entropies), float64 [H, H].

    assignments: integers >= 0, [N, H]. max_rows: use only so many random images. Two heads that
    each put all images into one cluster have an NMI of 1.

    Raises:
        DataError: assignments that are not a matrix of integers >= 0 with at least one row.
    """
    check_matrix(assignments)
    if max_rows is not None and len(assignments) > max_rows:
        rng = np.random.default_rng(seed)
        assignments = assignments[np.sort(rng.choice(len(assignments), max_rows, replace=False))]
    heads = np.ascontiguousarray(np.asarray(assignments).T)
    return _pairwise_nmi(heads, num_clusters or int(heads.max()) + 1)


def head_agreement(
    assignments: np.ndarray, num_clusters: int | None = None, *, max_rows: int | None = None
) -> float:
    """Mean NMI over all pairs of heads; 1.0 for a single one. assignments: int [N, H]."""
    heads = assignments.shape[1]
    if heads < 2:
        return 1.0
    pairs = pairwise_nmi(assignments, num_clusters, max_rows=max_rows)
    return float(pairs[np.triu_indices(heads, k=1)].mean())


def match(labels: np.ndarray, reference: np.ndarray, num_clusters: int) -> np.ndarray:
    """The renaming of `labels` that agrees with `reference` on most images (Hungarian method).

    labels, reference: int [N] in 0..K-1. Returns int64 [K], a permutation: new name of each label.
    """
    return assign(contingency(labels, reference, num_clusters))


def align(labels: np.ndarray, reference: np.ndarray, num_clusters: int) -> np.ndarray:
    """`labels` renamed by `match`. Shapes as there; int64 [N]."""
    return match(labels, reference, num_clusters)[labels]


def check_matrix(assignments: np.ndarray) -> None:
    if assignments.ndim != 2 or not np.issubdtype(assignments.dtype, np.integer):
        raise DataError(
            f"head assignments must be a matrix of integers [images, heads], not "
            f"{assignments.dtype} of shape {assignments.shape}"
        )
    if 0 in assignments.shape:
        raise DataError(f"there are no head assignments: their shape is {assignments.shape}")
    if assignments.min() < 0:
        raise DataError(f"head assignments must not be negative; found {assignments.min()}")


def contingency(a: np.ndarray, b: np.ndarray, clusters: int) -> np.ndarray:
    """Contingency table, int64 [K, K]."""
    key = a.astype(np.int64) * clusters + b
    return np.bincount(key, minlength=clusters * clusters).reshape(clusters, clusters)


def assign(gain: np.ndarray) -> np.ndarray:
    """The permutation of greatest total gain [K, K], int64 [K]."""
    rows, columns = linear_sum_assignment(gain, maximize=True)
    mapping = np.empty(len(gain), np.int64)
    mapping[rows] = columns
    return mapping


def cells(key: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Non-zero cells of a contingency table: row, column, count. key: row * K + column, [N]."""
    if clusters * clusters <= max(1 << 20, 4 * len(key)):
        counts = np.bincount(key, minlength=clusters * clusters)
        cells = np.flatnonzero(counts)
        counts = counts[cells]
    else:
        cells, counts = np.unique(key, return_counts=True)
    return cells // clusters, cells % clusters, counts


def pairs(
    heads: np.ndarray, clusters: int
) -> Iterator[tuple[int, int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Non-zero cells of the contingency table of every pair of heads i < j."""
    for i in range(len(heads)):
        base = heads[i].astype(np.int64) * clusters
        for j in range(i + 1, len(heads)):
            yield i, j, cells(base + heads[j], clusters)


def cluster_sizes(heads: np.ndarray, clusters: int) -> np.ndarray:
    """Cluster sizes, int64 [H, K]."""
    return np.stack([np.bincount(head, minlength=clusters) for head in heads])


def entropy(counts: np.ndarray, rows: int) -> float:
    shares = counts[counts > 0] / rows
    return float(-(shares * np.log(shares)).sum())


def _pairwise_nmi(heads: np.ndarray, clusters: int) -> np.ndarray:
    rows = heads.shape[1]
    alone = [entropy(sizes, rows) for sizes in cluster_sizes(heads, clusters)]
    result = np.eye(len(heads))
    for i, j, (_, _, counts) in pairs(heads, clusters):
        total = alone[i] + alone[j]
        shared = total - entropy(counts, rows)
        result[i, j] = result[j, i] = min(1.0, max(0.0, 2 * shared / total)) if total else 1.0
    return result
