"""Nearest neighbors by cosine, and ICCE's adaptive choice of how many each image keeps.

Shapes: N rows, Q query rows, D features, M neighbors. Rows are unit vectors, so that the inner
product is the cosine. Row numbers are global; an image is never its own neighbor, also where
queries and base are searched in chunks (TEMI's public code masks the wrong diagonal above 80,000
images, so that most images keep themselves).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icce_ray.core.constants import BASE_CHUNK, QUERY_CHUNK, ivf_shape
from icce_ray.core.device import on_gpu
from icce_ray.core.sampling import sample_rows

HALF_QUERIES = 8192  # rows compared at a time in half precision on a GPU, at most ...
HALF_MEMORY = 0.3  # ... and share of the free memory that their similarities may take
SPARE = 28  # candidates beyond k, which rounding to half precision could have hidden

# --- exact search --------------------------------------------------------------------------------


def search(
    matrix: np.ndarray,
    start: int,
    stop: int,
    k: int,
    device: torch.device | str = "cpu",
    on_rows: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact top k of rows start..stop among all rows, themselves excluded.

    Args:
        matrix: float16 or float32 [N, D], unit rows; may be memory-mapped.
        k: neighbors wanted, below N.
        on_rows: called with the number of query rows done.

    Returns: ids int32 [Q, k], similarity float32 [Q, k], best first.
    """
    ids = np.empty((stop - start, k), np.int32)
    similarity = np.empty((stop - start, k), np.float32)
    base = on_gpu(matrix, device)
    half = base if base is not None and base.dtype == torch.float16 else None
    knn = _faiss_knn() if torch.device(device).type == "cpu" else None
    step = QUERY_CHUNK if half is None else _half_queries(half)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        if knn is not None:
            best, where = _search_faiss(knn, matrix, first, last, k)
        elif half is None:
            best, where = _search_chunk(base, matrix, first, last, k, device)
        else:
            best, where = _search_half(half, first, last, k)
        ids[first - start : last - start] = where.cpu().numpy()
        similarity[first - start : last - start] = best.cpu().numpy()
        if on_rows:
            on_rows(last - start)
    return ids, similarity


def _rows(
    base: Tensor | None, matrix: np.ndarray, start: int, stop: int, device: torch.device | str
) -> Tensor:
    if base is not None:
        return base[start:stop].float()
    return torch.from_numpy(np.asarray(matrix[start:stop], dtype=np.float32)).to(device)


def _search_chunk(
    base: Tensor | None,
    matrix: np.ndarray,
    first: int,
    last: int,
    k: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    queries = _rows(base, matrix, first, last, device)
    best = queries.new_empty(len(queries), 0)
    where = torch.empty(len(queries), 0, dtype=torch.int32, device=device)
    for start in range(0, len(matrix), BASE_CHUNK):
        stop = min(start + BASE_CHUNK, len(matrix))
        scores = queries @ _rows(base, matrix, start, stop, device).T
        mask_self(scores, first, start)
        values, columns = top(scores, min(k, stop - start))
        best, where = merge(best, where, values, (columns + start).int(), k)
    return best, where


def _faiss_knn() -> Any:
    """faiss's exact search with torch's number of threads; None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return partial(faiss.knn, metric=faiss.METRIC_INNER_PRODUCT)


def _search_faiss(
    knn: Any, matrix: np.ndarray, first: int, last: int, k: int
) -> tuple[Tensor, Tensor]:
    """As `_search_chunk`, on CPUs by faiss, which finds the best beside the products."""
    queries = np.asarray(matrix[first:last], dtype=np.float32)
    best = torch.empty(len(queries), 0)
    where = torch.empty(len(queries), 0, dtype=torch.int32)
    for start in range(0, len(matrix), BASE_CHUNK):
        rows = np.asarray(matrix[start : start + BASE_CHUNK], dtype=np.float32)
        values, near = (torch.from_numpy(one) for one in knn(queries, rows, min(k + 1, len(rows))))
        best, where = merge(best, where, values, (near + start).int(), k + 1)
    scores, ids = drop_self(best.numpy(), where.numpy(), first)
    return torch.from_numpy(scores), torch.from_numpy(ids)


def _half_queries(base: Tensor) -> int:
    """Queries whose similarities to all rows, in half precision, fit into the GPU's memory."""
    free = torch.cuda.mem_get_info(base.device)[0]
    return max(64, min(HALF_QUERIES, int(HALF_MEMORY * free / (2 * len(base)))))


def _search_half(base: Tensor, first: int, last: int, k: int) -> tuple[Tensor, Tensor]:
    """As `_search_chunk`, on a GPU that holds all rows in half precision.

    Products in half precision find some more than k candidates, whose similarities are then
    computed anew with float32 sums: those are what float32 products of the same rows give.
    """
    queries = base[first:last]
    scores = queries @ base.T
    mask_self(scores, first, 0)
    _, where = top(scores, min(k + SPARE, len(base) - 1))
    near = base[where]  # [Q, k + SPARE, D]
    exact = torch.bmm(near, queries.unsqueeze(2), out_dtype=torch.float32).squeeze(2)
    best, order = exact.topk(k, dim=1)
    return best, where.gather(1, order).int()


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(k)` of wide rows, several times faster: [Q, C] -> values and columns [Q, k].

    The k best of a row are in the k groups of columns with the highest maxima. So only these groups
    are looked at one by one. A group is made of columns at equal distances, since a reduction over
    an outer axis is fast everywhere.
    """
    rows, width = scores.shape
    size = 2 ** round(math.log2(math.sqrt(max(1.0, width / k))))  # of a group
    count = width // size
    if size < 4 or count <= k:
        return scores.topk(k, dim=1)
    grouped = scores[:, : size * count].unflatten(1, (size, count))
    chosen = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, chosen.unsqueeze(1).expand(rows, size, k)).flatten(1)
    rest = scores[:, size * count :]
    values, place = torch.cat([candidates, rest], 1).topk(k, dim=1)
    inside = place < size * k
    columns = place // k * count + chosen.gather(1, place % k)
    return values, torch.where(inside, columns, place - size * k + size * count)


def mask_self(scores: Tensor, query_start: int, base_start: int) -> None:
    """Set the similarity of each query to itself to -inf, wherever it falls in this block."""
    rows, columns = scores.shape
    low = max(query_start, base_start)
    high = min(query_start + rows, base_start + columns)
    if low < high:
        ids = torch.arange(low, high, device=scores.device)
        scores[ids - query_start, ids - base_start] = -torch.inf


def merge(
    best: Tensor, where: Tensor, values: Tensor, ids: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k best of two lists of (similarity, id) per query, best first."""
    values, ids = torch.cat([best, values], 1), torch.cat([where, ids], 1)
    top, order = values.topk(min(k, values.shape[1]), dim=1)
    return top, ids.gather(1, order)


# --- approximate search --------------------------------------------------------------------------


def build_ivf(matrix: np.ndarray, path: Path, seed: int) -> None:
    """Write `make_ivf`'s index to a file, which is complete or not there."""
    import faiss

    index = make_ivf(matrix, seed)
    temporary = path.with_suffix(".tmp")
    faiss.write_index(index, str(temporary))
    temporary.replace(path)


def make_ivf(matrix: np.ndarray, seed: int) -> Any:
    """A faiss inverted-file index of all rows [N, D], half precision."""
    import faiss

    rows, features = matrix.shape
    lists, sample = ivf_shape(rows)
    quantizer = faiss.IndexFlatIP(features)
    half = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, features, lists, half, faiss.METRIC_INNER_PRODUCT
    )
    index.by_residual = False
    index.cp.spherical, index.cp.seed = True, seed
    chosen = sample_rows(rows, sample, seed)
    index.train(np.asarray(matrix[chosen], dtype=np.float32))
    for start in range(0, rows, BASE_CHUNK):
        index.add(np.asarray(matrix[start : start + BASE_CHUNK], dtype=np.float32))
    return index


def search_ivf(
    index: Any, matrix: np.ndarray, start: int, stop: int, k: int, nprobe: int
) -> tuple[np.ndarray, np.ndarray]:
    """Approximate top k of rows start..stop, themselves excluded. Shapes as `search`.

    Where the lists visited hold too few rows, all are.
    """
    ids = np.empty((stop - start, k), np.int32)
    similarity = np.empty((stop - start, k), np.float32)
    for first in range(start, stop, QUERY_CHUNK):
        last = min(first + QUERY_CHUNK, stop)
        queries = np.asarray(matrix[first:last], dtype=np.float32)
        index.nprobe = nprobe
        scores, near = index.search(queries, k + 1)
        short = (near < 0).any(1)
        if short.any():
            index.nprobe = index.nlist
            scores[short], near[short] = index.search(queries[short], k + 1)
        scores, near = drop_self(scores, near, first)
        ids[first - start : last - start] = near
        similarity[first - start : last - start] = scores
    return ids, similarity


def drop_self(
    scores: np.ndarray, ids: np.ndarray, query_start: int
) -> tuple[np.ndarray, np.ndarray]:
    """Remove each query's own id from its k+1 results; the last result goes where it is absent."""
    own = ids == (query_start + np.arange(len(ids)))[:, None]
    own[~own.any(1), -1] = True
    shape = (len(ids), ids.shape[1] - 1)
    return scores[~own].reshape(shape), ids[~own].reshape(shape)


# --- how many neighbors an image keeps -----------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """The first `counts[i]` ids of row i are its neighbors. Rows are in order of similarity."""

    ids: np.ndarray  # int32 [N, M]
    similarity: np.ndarray  # [N, M]
    counts: np.ndarray  # int32 [N]
    threshold: float | None  # similarity that a neighbor needs; None: rule=fixed
    k: int  # neighbors per row that the rule aims at


def reference_k(k: int, images: int, clusters: int, most: int) -> int:
    """k, cut so that a neighborhood stays well inside a class of mean size N / K."""
    return int(max(1, min(k, most, max(5, images // (10 * clusters)), images - 1)))


def auto_threshold(similarity: np.ndarray, k: int) -> float:
    """The median over images of the similarity to their k-th neighbor.

    Half of the images then keep more than k neighbors (dense regions, up to M) and half fewer
    (outliers, down to the minimum). The paper keeps neighbors within a distance threshold; how it
    sets that threshold is not known, so this rule is ours.
    """
    return float(np.median(np.asarray(similarity[:, k - 1], dtype=np.float32)))


def select(
    ids: np.ndarray,
    similarity: np.ndarray,
    *,
    rule: str,
    k: int,
    threshold: float | None,
    min_neighbors: int,
) -> Selection:
    """Choose each row's neighbors among its top M. `rule`: fixed, threshold or auto."""
    rows, most = ids.shape
    if rule == "fixed":
        counts = np.full(rows, min(k, most), np.int32)
        threshold, min_neighbors = None, min(min_neighbors, k)
    else:
        if threshold is None:
            threshold = auto_threshold(similarity, min(k, most))
        counts = (similarity >= np.asarray(threshold, similarity.dtype)).sum(1).astype(np.int32)
    floor = min(min_neighbors, most)
    return Selection(ids, similarity, np.clip(counts, floor, most).astype(np.int32), threshold, k)


def describe(selection: Selection, min_neighbors: int) -> dict[str, Any]:
    """Distribution of the counts, for the manifest and the report."""
    counts, most = selection.counts, selection.ids.shape[1]
    edges = np.unique(np.linspace(0, most, min(most, 25) + 1).astype(int))
    histogram, _ = np.histogram(counts, bins=edges)
    quantiles = np.quantile(counts, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    return {
        "threshold": selection.threshold,
        "mean": float(counts.mean()),
        "quantiles": dict(zip(("0", "5", "25", "50", "75", "95", "100"), quantiles, strict=True)),
        "at_minimum": float((counts <= min_neighbors).mean()),
        "at_maximum": float((counts >= most).mean()),
        "histogram": {"edges": edges.tolist(), "counts": histogram.tolist()},
    }
