"""TODO"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import sparse

WEIGHT_SCALE = 1000  # METIS takes integer weights, and crashes on those below 1


CHUNK = 32_768  # images scored at once


@dataclass(frozen=True)
class Consensus:
    """The merged clustering."""

    labels: np.ndarray  # int32 [N], 0..K-1, by decreasing cluster size
    confidence: np.ndarray  # float32 [N], 0..1
    info: dict[str, Any] = field(default_factory=dict)  # JSON values; see `consensus`


@dataclass(frozen=True)
class Ensemble:
    """What every method works on. Clusters of each head are in canonical order."""

    heads: np.ndarray  # int16 or int32 [H, N], 0..L-1
    num_clusters: int  # K
    head_clusters: int  # L, at least K
    weights: np.ndarray  # float64 [H], positive, mean 1
    max_rows: int
    iterations: int
    seed: int

    @property
    def rows(self) -> int:
        return self.heads.shape[1]

    def sample(self) -> np.ndarray | slice:
        """Sorted numbers of at most max_rows random images; a full slice where all fit."""
        if self.rows <= self.max_rows:
            return slice(None)
        rng = np.random.default_rng(self.seed)
        return np.sort(rng.choice(self.rows, self.max_rows, replace=False))

    def take(self, rows: np.ndarray | slice) -> Ensemble:
        """The same ensemble on some of its images."""
        return replace(self, heads=np.ascontiguousarray(self.heads[:, rows]))


@dataclass
class Draft:
    """What a method returns, before clusters are filled up and put in order."""

    labels: np.ndarray  # int64 [N]
    confidence: np.ndarray | None = None  # float [N]; None: the share of heads that agree
    info: dict[str, Any] = field(default_factory=dict)


def canonical_order(labels: np.ndarray, num_clusters: int) -> np.ndarray:
    """New name of each label: by decreasing size, ties by first image. int64 [K]."""
    rows = len(labels)
    first = np.full(num_clusters, rows)
    first[labels[::-1]] = np.arange(rows - 1, -1, -1)  # the last of repeated writes stays
    order = np.lexsort((first, -np.bincount(labels, minlength=num_clusters)))
    rank = np.empty(num_clusters, np.int64)
    rank[order] = np.arange(num_clusters)
    return rank


def fill_empty(labels: np.ndarray, heads: np.ndarray, clusters: int) -> tuple[np.ndarray, int]:
    """Split clusters, in place, until none is empty or all heads agree inside each.

    Returns the images that were moved, and how many clusters were filled.
    """
    moved = np.zeros(len(labels), bool)
    filled = 0
    blocks: dict[int, tuple[int, np.ndarray]] = {}
    for empty in np.flatnonzero(np.bincount(labels, minlength=clusters) == 0):
        if not blocks:
            blocks = _all_blocks(labels, heads)
        widest = max(blocks, key=lambda cluster: blocks[cluster][0])
        size, block = blocks[widest]
        if size == 0:
            break
        labels[block], moved[block] = empty, True
        filled += 1
        for cluster in (widest, int(empty)):
            blocks[cluster] = _block(np.flatnonzero(labels == cluster), heads)
    return moved, filled


def _all_blocks(labels: np.ndarray, heads: np.ndarray) -> dict[int, tuple[int, np.ndarray]]:
    order = np.argsort(labels, kind="stable")
    names, starts = np.unique(labels[order], return_index=True)
    groups = np.split(order, starts[1:])
    return {int(name): _block(rows, heads) for name, rows in zip(names, groups, strict=True)}


def _block(rows: np.ndarray, heads: np.ndarray) -> tuple[int, np.ndarray]:
    """The largest second-largest group, over heads, that a head makes of these images."""
    best = (0, rows[:0])
    for head in heads:
        inside = head[rows]
        sizes = np.bincount(inside)
        second = int(np.argsort(-sizes, kind="stable")[1]) if len(sizes) > 1 else -1
        if second >= 0 and sizes[second] > best[0]:
            best = (int(sizes[second]), rows[inside == second])
    return best


def one_hot_codes(heads: np.ndarray, clusters: int) -> sparse.csr_array:
    """X: one-hot codes of the clusters the heads gave, float64 [N, H*L]. clusters: L."""
    count, rows = heads.shape
    columns = heads.T.astype(np.int32) + np.arange(count, dtype=np.int32) * clusters
    starts = np.arange(rows + 1, dtype=np.int64) * count
    return sparse.csr_array(
        (np.ones(rows * count), columns.ravel(), starts), shape=(rows, count * clusters)
    )


def one_entry_table(target: np.ndarray, values: np.ndarray, clusters: int) -> sparse.csr_array:
    """E with one entry in each row that has a target >= 0. target: int [H, L], values: [H, L]."""
    cells = np.flatnonzero(target.ravel() >= 0)
    entries = (values.ravel()[cells], (cells, target.ravel()[cells]))
    return sparse.csr_array(entries, shape=(target.size, clusters))


def sparse_scores(
    heads: np.ndarray, table: sparse.csr_array
) -> Iterator[tuple[slice, sparse.csr_array]]:
    """X E for a chunk of images at a time."""
    clusters = table.shape[0] // len(heads)
    for start in range(0, heads.shape[1], CHUNK):
        part = slice(start, min(start + CHUNK, heads.shape[1]))
        yield part, one_hot_codes(heads[:, part], clusters) @ table


def best_cluster(heads: np.ndarray, table: sparse.csr_array) -> np.ndarray:
    """Cluster of the highest score for each image, ties by lowest number; int64 [N]."""
    labels = np.empty(heads.shape[1], np.int64)
    for part, scores in sparse_scores(heads, table):
        labels[part] = row_argmax(scores)
    return labels


def row_reduce(
    function: np.ufunc, scores: sparse.csr_array, data: np.ndarray | None = None
) -> np.ndarray:
    """`function` reduced over the stored entries of each row, [N]; 1 for an empty row."""
    values = scores.data if data is None else data
    some = np.diff(scores.indptr) > 0
    result = np.ones(len(some), values.dtype)
    if some.any():  # reduceat would misread empty rows
        result[some] = function.reduceat(values, scores.indptr[:-1][some])
    return result


def row_argmax(scores: sparse.csr_array) -> np.ndarray:
    """Column of each row's largest stored entry, ties by lowest column; arbitrary if empty."""
    top = np.repeat(row_reduce(np.maximum, scores), np.diff(scores.indptr))
    columns = np.where(scores.data == top, scores.indices, scores.shape[1])
    return row_reduce(np.minimum, scores, columns.astype(np.int64))
