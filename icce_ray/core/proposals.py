"""Which clusters may be one, and which may be several: what neighbors and heads say, no labels.

Shapes: N images, M neighbors, H heads, L clusters per head, K clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from icce_ray.core.sampling import sample_rows

NEIGHBORS = 10  # of an image that are looked at
ROWS = 100_000  # images that are looked at
MERGED = 0.08  # share of the neighbors, both ways, from which a merge is proposed
CUT = 0.15  # share that heads take away on average, from which a split is proposed
MOST = 4  # proposals of each kind


class Merge(NamedTuple):
    """Two clusters that may be one."""

    first: int
    second: int
    there: float  # share of the neighbors of the first one's images that are in the second
    back: float


class Split(NamedTuple):
    """A cluster that may be two."""

    cluster: int
    share: float  # of its images that a head puts together elsewhere, mean over the heads


def links(clusters: np.ndarray, ids: np.ndarray, num_clusters: int, seed: int = 0) -> np.ndarray:
    """Share of the neighbors of each cluster's images that are in each cluster: [K, K], rows sum
    to 1, or to 0 where a cluster is empty. clusters: int [N]; ids: int [N, M], best first."""
    rows = sample_rows(len(clusters), ROWS, seed)
    near = clusters[np.asarray(ids[rows, :NEIGHBORS])]
    # Of a damaged run, clusters may be any number: here an IndexError, to bincount all the memory.
    count = np.zeros((num_clusters, num_clusters), np.int64)
    np.add.at(count, (clusters[rows][:, None], near), 1)
    return np.asarray(count / np.maximum(1, count.sum(1, keepdims=True)))


def merges(shares: np.ndarray) -> list[Merge]:
    """Pairs whose images are each other's neighbors, the likeliest first. shares: see `links`."""
    both = np.triu(np.minimum(shares, shares.T), 1)
    order = np.argsort(-both, axis=None, kind="stable")[:MOST]
    pairs = np.stack(np.unravel_index(order, both.shape), axis=1).tolist()
    found = [Merge(i, j, float(shares[i, j]), float(shares[j, i])) for i, j in pairs]
    return [one for one in found if one.first < one.second and min(one[2:]) >= MERGED]


def splits(
    clusters: np.ndarray, assignments: np.ndarray, num_clusters: int, seed: int = 0
) -> list[Split]:
    """Clusters that heads cut in two, the likeliest first.

    clusters: int [N]. assignments: int [N, H], of the merged heads; may be memory-mapped.
    """
    rows = sample_rows(len(clusters), ROWS, seed)
    own, each = clusters[rows], []
    for head in np.asarray(assignments[rows]).T:
        used, place = np.unique(head, return_inverse=True)
        count = np.zeros((num_clusters, max(2, len(used))), np.int64)
        np.add.at(count, (own, place), 1)
        each.append(np.sort(count, axis=1)[:, -2] / np.maximum(1, count.sum(1)))
    mean = np.mean(each, axis=0)
    order = np.argsort(-mean, kind="stable")[:MOST].tolist()
    return [Split(k, float(mean[k])) for k in order if mean[k] >= CUT]


def nearest(shares: np.ndarray, cluster: int, most: int = 3) -> list[int]:
    """The clusters that a cluster's images have most of their other neighbors in."""
    other = shares[cluster].copy()
    other[cluster] = 0
    order = np.argsort(-other, kind="stable")[:most]
    return [int(k) for k in order if other[k] > 0]
