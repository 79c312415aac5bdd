"""The linear score X E that every consensus function assigns images by.

X [N, H*L] marks the cluster that each head gave an image; a method fills a sparse table E [H*L, K].
Both stay sparse: no array of N x H x L, nor of N x K, is ever built.
Shapes: N images, H heads, L clusters per head, K clusters of the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse

CHUNK = 32_768  # images scored at once


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
