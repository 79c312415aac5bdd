"""The linear score X E that every consensus function assigns images by.

X [N, H*L] marks the cluster that each head gave an image; a method fills a sparse table E [H*L, K].
Both stay sparse: no array of N x H x L, nor of N x K, is ever built.
Shapes: N images, H heads, L clusters per head, K clusters of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from scipy import sparse

from icce_ray.core.constants import SCORED_ROWS

Result = TypeVar("Result")


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


def scored_parts(
    heads: np.ndarray, table: sparse.csr_array, work: Callable[[slice, sparse.csr_array], Result]
) -> Iterator[Result]:
    """`work(part, X E)` for a chunk of images at a time, in order. As many threads as torch uses do
    it at once: scipy and numpy let each other compute."""
    clusters = table.shape[0] // len(heads)

    def score(start: int) -> Result:
        part = slice(start, min(start + SCORED_ROWS, heads.shape[1]))
        return work(part, one_hot_codes(heads[:, part], clusters) @ table)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(score, range(0, heads.shape[1], SCORED_ROWS))


def best_cluster(heads: np.ndarray, table: sparse.csr_array) -> np.ndarray:
    """Cluster of the highest score for each image, ties by lowest number; int64 [N]."""
    return np.concatenate(list(scored_parts(heads, table, lambda _, scores: row_argmax(scores))))


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
