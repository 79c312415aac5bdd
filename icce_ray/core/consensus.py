"""The cluster ensemble: the heads' clusterings of the same images become one.

Every method below works on label vectors alone, never on features. Each head's clusters are first
renamed by size, so renaming the clusters of a head changes nothing. A result is a linear score on
one-hot codes: with X [N, H*L] marking the cluster each head gave an image, and a sparse table
E [H*L, K], the image goes to the largest entry of its row of X E. The methods differ in E. Both
stay sparse: no array of N x H x L, nor of N x K, is ever built.

Heads may have more clusters than the result (L > K, over-clustering), except for voting, which
names the clusters of all heads alike. Every method honors head weights; Dawid-Skene also learns by
itself how far each head can be trusted.

METIS (through pymetis) cuts graphs into parts of nearly equal size, by default within 3%. So cspa,
hgpa and hbgf favor clusters of equal size; mcla balances clusters of heads, not images.

Shapes: N images, H heads, L clusters per head, K clusters of the result, V vertices of a graph.
References: Strehl & Ghosh, JMLR 3 (2002) 583-617; Fern & Brodley, ICML 2004; Dawid & Skene,
Applied Statistics 28 (1979) 20-28.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from icce_ray.errors import ConfigError, DataError

METHODS = ("voting", "cspa", "hgpa", "mcla", "hbgf", "dawid-skene")
OVER_CLUSTERED = METHODS[1:]  # methods whose heads may have more clusters than the result
CSPA_ROWS = 10_000  # CSPA's graph has up to N^2 edges; at this N they take a few GB
MIN_JACCARD = 0.05  # weaker edges of MCLA's graph are left out: most of them, and only noise
WEIGHT_SCALE = 1000  # METIS takes integer weights, and crashes on those below 1
HBGF_CUTS = 5  # cuts METIS tries; with 1, 7 of 24 trials came apart (16-54% right), with 5 none
CLIQUE_DEGREE = 64  # HGPA: neighbors sampled per image, over all heads
SMOOTHING = 1.0  # Dawid-Skene: images that a class is given in advance, spread over the clusters
CONVERGED = 1e-4  # Dawid-Skene stops when log-likelihood per image rises by less
POSTERIOR_FLOOR = 1e-5  # smaller posteriors are taken as 0
CHUNK = 32_768  # images scored at once


@dataclass(frozen=True)
class Consensus:
    """The merged clustering."""

    labels: np.ndarray  # int32 [N], 0..K-1, by decreasing cluster size
    confidence: np.ndarray  # float32 [N], 0..1
    info: dict[str, Any] = field(default_factory=dict)  # JSON values; see `consensus`


@dataclass(frozen=True)
class _Ensemble:
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

    def take(self, rows: np.ndarray | slice) -> _Ensemble:
        """The same ensemble on some of its images."""
        return replace(self, heads=np.ascontiguousarray(self.heads[:, rows]))


@dataclass
class _Draft:
    """What a method returns, before clusters are filled up and put in order."""

    labels: np.ndarray  # int64 [N]
    confidence: np.ndarray | None = None  # float [N]; None: the share of heads that agree
    info: dict[str, Any] = field(default_factory=dict)


# --- public --------------------------------------------------------------------------------------


def consensus(
    assignments: np.ndarray,
    num_clusters: int,
    method: str,
    *,
    head_clusters: int | None = None,
    weights: np.ndarray | None = None,
    max_rows: int,
    iterations: int,
    seed: int,
) -> Consensus:
    """Merge H clusterings of N images into one of K clusters.

    Args:
        assignments: integers [N, H] in 0..L-1; may be memory-mapped.
        num_clusters: K.
        head_clusters: L, at least K; more than K for the methods of OVER_CLUSTERED alone, and
            with two heads or more. Default: K.
        method: one of METHODS.
        weights: how much each head counts, [H], not negative. Default: equally.
        max_rows: hgpa, hbgf, dawid-skene: images the model is fitted on (a random subset); it is
            then applied to all.
        iterations: dawid-skene: EM steps at most.
        seed: same seed, same result.

    Returns:
        Labels in order of decreasing cluster size, ties by first image. Confidence: dawid-skene:
        the posterior probability of the image's cluster, with all heads counted as one witness (see
        `_apply`); else the (weighted) share of heads that agree, each head's clusters having been
        matched one to one with the final ones (L > K: each to the one it shares most images with).
        A single head: itself, with confidence 1.
        info: method, path (what was done), heads (used), num_clusters, head_accuracy ([H], share
        of images on which the head, so matched, agrees with the result; None for a head of weight
        0), filled and empty_clusters. A method may leave clusters empty. Each is filled with the
        largest block of images that one head separates from the rest of their consensus cluster;
        this ends with all K in use unless all heads agree inside every cluster: empty_clusters
        says how many then stay empty. dawid-skene adds log_likelihood (per image, for each EM
        step) and fitted_rows.

    Raises:
        ConfigError: unknown method, K > N, L that the method cannot take, or cspa with too many
            images.
        DataError: assignments or weights that are not as described.
    """
    each = head_clusters or num_clusters
    _check_settings(num_clusters, each, method, max_rows, iterations)
    _check_data(assignments, num_clusters, each, method)
    used, share = _check_weights(weights, assignments.shape[1])
    _check_merge(num_clusters, each, method, len(used))
    heads = _canonical_heads(assignments, used, each)
    ensemble = _Ensemble(heads, num_clusters, each, share, max_rows, iterations, seed)
    if num_clusters == 1:
        draft = _Draft(np.zeros(heads.shape[1], np.int64), info={"path": "one cluster"})
    elif len(heads) == 1:
        draft = _Draft(heads[0].astype(np.int64), info={"path": "single head"})
    else:
        draft = _SOLVERS[method](ensemble)
    result = _finish(draft, ensemble)
    accuracy: list[float | None] = [None] * assignments.shape[1]
    for head, value in zip(used, result.info["head_accuracy"], strict=True):
        accuracy[head] = value
    result.info.update(method=method, heads=len(used), head_accuracy=accuracy)
    return result


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
    _check_matrix(assignments)
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
    return _assign(_counts(labels, reference, num_clusters))


def align(labels: np.ndarray, reference: np.ndarray, num_clusters: int) -> np.ndarray:
    """`labels` renamed by `match`. Shapes as there; int64 [N]."""
    return match(labels, reference, num_clusters)[labels]


# --- checks and order ----------------------------------------------------------------------------


def _check_matrix(assignments: np.ndarray) -> None:
    if assignments.ndim != 2 or not np.issubdtype(assignments.dtype, np.integer):
        raise DataError(
            f"head assignments must be a matrix of integers [images, heads], not "
            f"{assignments.dtype} of shape {assignments.shape}"
        )
    if 0 in assignments.shape:
        raise DataError(f"there are no head assignments: their shape is {assignments.shape}")
    if assignments.min() < 0:
        raise DataError(f"head assignments must not be negative; found {assignments.min()}")


def _check_settings(
    num_clusters: int, head_clusters: int, method: str, max_rows: int, iterations: int
) -> None:
    if method not in METHODS:
        raise ConfigError(f"unknown consensus.method={method!r}; choose {', '.join(METHODS)}")
    if min(num_clusters, max_rows, iterations) < 1:
        raise ConfigError("num_classes, consensus.max_rows and .iterations must be at least 1")
    if head_clusters < num_clusters:
        raise ConfigError(
            f"heads of {head_clusters} clusters cannot make num_classes={num_clusters}; raise "
            "heads.clusters"
        )


def _check_merge(num_clusters: int, head_clusters: int, method: str, heads: int) -> None:
    """Whether the method can merge clusters of heads that have more than the result."""
    if num_clusters in (1, head_clusters):
        return
    if method not in OVER_CLUSTERED:
        raise ConfigError(
            f"consensus.method={method} needs heads of as many clusters as num_classes "
            f"({num_clusters}, not {head_clusters}). Use {', '.join(OVER_CLUSTERED)}, or unset "
            "heads.clusters."
        )
    if heads == 1:
        raise ConfigError(
            f"nothing tells how the {head_clusters} clusters of a single head make "
            f"num_classes={num_clusters}. Keep more heads, or unset heads.clusters."
        )


def _check_data(
    assignments: np.ndarray, num_clusters: int, head_clusters: int, method: str
) -> None:
    _check_matrix(assignments)
    rows = len(assignments)
    if assignments.max() >= head_clusters:
        raise DataError(
            f"a head assigns cluster {assignments.max()}, but with heads of {head_clusters} "
            f"clusters they are 0..{head_clusters - 1}; train the heads with the same num_classes "
            "and heads.clusters"
        )
    if num_clusters > rows:
        raise ConfigError(
            f"num_classes={num_clusters} exceeds the number of images ({rows}); lower it"
        )
    if method == "cspa" and rows > CSPA_ROWS:
        raise ConfigError(
            f"consensus.method=cspa compares all pairs of images, which is impractical above "
            f"{CSPA_ROWS:,} (here: {rows:,}). Use dawid-skene, mcla, hbgf or voting."
        )


def _check_weights(weights: np.ndarray | None, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the heads of positive weight, and their weights scaled to a mean of 1."""
    values = np.ones(heads) if weights is None else np.asarray(weights, np.float64)
    if values.shape != (heads,) or not np.isfinite(values).all() or (values < 0).any():
        raise DataError(f"head weights must be {heads} finite numbers >= 0")
    used = np.flatnonzero(values)
    if not len(used):
        raise DataError("all head weights are 0; at least one must be positive")
    return used, values[used] / values[used].mean()


def _canonical_order(labels: np.ndarray, num_clusters: int) -> np.ndarray:
    """New name of each label: by decreasing size, ties by first image. int64 [K]."""
    rows = len(labels)
    first = np.full(num_clusters, rows)
    first[labels[::-1]] = np.arange(rows - 1, -1, -1)  # the last of repeated writes stays
    order = np.lexsort((first, -np.bincount(labels, minlength=num_clusters)))
    rank = np.empty(num_clusters, np.int64)
    rank[order] = np.arange(num_clusters)
    return rank


def _canonical_heads(assignments: np.ndarray, used: np.ndarray, head_clusters: int) -> np.ndarray:
    """The heads in use, one after the other in memory, clusters renamed by size. [H, N]"""
    kind = np.int16 if head_clusters <= np.iinfo(np.int16).max else np.int32
    heads = np.empty((len(used), len(assignments)), kind)
    for row, head in enumerate(used):
        labels = np.asarray(assignments[:, head])
        heads[row] = _canonical_order(labels, head_clusters)[labels]
    return heads


def _finish(draft: _Draft, ensemble: _Ensemble) -> Consensus:
    """Fill empty clusters, order them, and say how far each image and head can be trusted."""
    clusters = ensemble.num_clusters
    labels = draft.labels.astype(np.int64)
    moved, filled = _fill_empty(labels, ensemble.heads, clusters)
    labels = _canonical_order(labels, clusters)[labels]
    share, accuracy = _agreement(labels, ensemble)
    confidence = share if draft.confidence is None else draft.confidence
    confidence[moved] = share[moved]
    info = {
        "num_clusters": clusters,
        "head_accuracy": accuracy.tolist(),
        "filled": filled,
        "empty_clusters": int(clusters - len(np.unique(labels))),
        **draft.info,
    }
    confidence = np.clip(confidence, 0, 1).astype(np.float32)
    return Consensus(labels.astype(np.int32), confidence, info)


def _agreement(labels: np.ndarray, ensemble: _Ensemble) -> tuple[np.ndarray, np.ndarray]:
    """Weighted share of heads that agree [N], and share of images on which each head does [H]."""
    share = np.zeros(len(labels))
    accuracy = np.empty(len(ensemble.heads))
    for row, head in enumerate(ensemble.heads):
        same = _renamed(head, labels, ensemble) == labels
        accuracy[row] = same.mean()
        share += ensemble.weights[row] * same
    return share / ensemble.weights.sum(), accuracy


def _renamed(head: np.ndarray, labels: np.ndarray, ensemble: _Ensemble) -> np.ndarray:
    """A head's labels in the names of the result: one to one, or, if L > K, many to one. [N]"""
    clusters, each = ensemble.num_clusters, ensemble.head_clusters
    if each == clusters:
        return align(head, labels, clusters)
    key = head.astype(np.int64) * clusters + labels
    counts = np.bincount(key, minlength=each * clusters).reshape(each, clusters)
    return counts.argmax(axis=1)[head]


def _fill_empty(labels: np.ndarray, heads: np.ndarray, clusters: int) -> tuple[np.ndarray, int]:
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


# --- counts, matching, NMI -----------------------------------------------------------------------


def _counts(a: np.ndarray, b: np.ndarray, clusters: int) -> np.ndarray:
    """Contingency table, int64 [K, K]."""
    key = a.astype(np.int64) * clusters + b
    return np.bincount(key, minlength=clusters * clusters).reshape(clusters, clusters)


def _assign(gain: np.ndarray) -> np.ndarray:
    """The permutation of greatest total gain [K, K], int64 [K]."""
    rows, columns = linear_sum_assignment(gain, maximize=True)
    mapping = np.empty(len(gain), np.int64)
    mapping[rows] = columns
    return mapping


def _cells(key: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Non-zero cells of a contingency table: row, column, count. key: row * K + column, [N]."""
    if clusters * clusters <= max(1 << 20, 4 * len(key)):
        counts = np.bincount(key, minlength=clusters * clusters)
        cells = np.flatnonzero(counts)
        counts = counts[cells]
    else:
        cells, counts = np.unique(key, return_counts=True)
    return cells // clusters, cells % clusters, counts


def _pairs(
    heads: np.ndarray, clusters: int
) -> Iterator[tuple[int, int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Non-zero cells of the contingency table of every pair of heads i < j."""
    for i in range(len(heads)):
        base = heads[i].astype(np.int64) * clusters
        for j in range(i + 1, len(heads)):
            yield i, j, _cells(base + heads[j], clusters)


def _sizes(heads: np.ndarray, clusters: int) -> np.ndarray:
    """Cluster sizes, int64 [H, K]."""
    return np.stack([np.bincount(head, minlength=clusters) for head in heads])


def _entropy(counts: np.ndarray, rows: int) -> float:
    shares = counts[counts > 0] / rows
    return float(-(shares * np.log(shares)).sum())


def _pairwise_nmi(heads: np.ndarray, clusters: int) -> np.ndarray:
    rows = heads.shape[1]
    alone = [_entropy(sizes, rows) for sizes in _sizes(heads, clusters)]
    result = np.eye(len(heads))
    for i, j, (_, _, counts) in _pairs(heads, clusters):
        total = alone[i] + alone[j]
        shared = total - _entropy(counts, rows)
        result[i, j] = result[j, i] = min(1.0, max(0.0, 2 * shared / total)) if total else 1.0
    return result


# --- scores: one-hot codes times a sparse table --------------------------------------------------


def _codes(heads: np.ndarray, clusters: int) -> sparse.csr_array:
    """X: one-hot codes of the clusters the heads gave, float64 [N, H*L]. clusters: L."""
    count, rows = heads.shape
    columns = heads.T.astype(np.int32) + np.arange(count, dtype=np.int32) * clusters
    starts = np.arange(rows + 1, dtype=np.int64) * count
    return sparse.csr_array(
        (np.ones(rows * count), columns.ravel(), starts), shape=(rows, count * clusters)
    )


def _one_entry_table(target: np.ndarray, values: np.ndarray, clusters: int) -> sparse.csr_array:
    """E with one entry in each row that has a target >= 0. target: int [H, L], values: [H, L]."""
    cells = np.flatnonzero(target.ravel() >= 0)
    entries = (values.ravel()[cells], (cells, target.ravel()[cells]))
    return sparse.csr_array(entries, shape=(target.size, clusters))


def _scores(heads: np.ndarray, table: sparse.csr_array) -> Iterator[tuple[slice, sparse.csr_array]]:
    """X E for a chunk of images at a time."""
    clusters = table.shape[0] // len(heads)
    for start in range(0, heads.shape[1], CHUNK):
        part = slice(start, min(start + CHUNK, heads.shape[1]))
        yield part, _codes(heads[:, part], clusters) @ table


def _best(heads: np.ndarray, table: sparse.csr_array) -> np.ndarray:
    """Cluster of the highest score for each image, ties by lowest number; int64 [N]."""
    labels = np.empty(heads.shape[1], np.int64)
    for part, scores in _scores(heads, table):
        labels[part] = _row_argmax(scores)
    return labels


def _row_reduce(
    function: np.ufunc, scores: sparse.csr_array, data: np.ndarray | None = None
) -> np.ndarray:
    """`function` reduced over the stored entries of each row, [N]; 1 for an empty row."""
    values = scores.data if data is None else data
    some = np.diff(scores.indptr) > 0
    result = np.ones(len(some), values.dtype)
    if some.any():  # reduceat would misread empty rows
        result[some] = function.reduceat(values, scores.indptr[:-1][some])
    return result


def _row_argmax(scores: sparse.csr_array) -> np.ndarray:
    """Column of each row's largest stored entry, ties by lowest column; arbitrary if empty."""
    top = np.repeat(_row_reduce(np.maximum, scores), np.diff(scores.indptr))
    columns = np.where(scores.data == top, scores.indices, scores.shape[1])
    return _row_reduce(np.minimum, scores, columns.astype(np.int64))


# --- METIS ---------------------------------------------------------------------------------------


def _metis(
    parts: int,
    vertices: int,
    ends: tuple[np.ndarray, np.ndarray],
    weights: np.ndarray,
    seed: int,
    cuts: int = 1,
) -> np.ndarray:
    """Cut a graph into `parts` of nearly equal size. Each undirected edge is given once.

    ends: two int [edges]. weights: positive floats [edges]. cuts: how many are tried, the lightest
    being kept. Returns int64 [V].
    """
    if parts >= vertices:
        return np.arange(vertices)
    scaled = np.maximum(1, np.rint(weights * (WEIGHT_SCALE / weights.max(initial=1e-300))))
    a, b = ends
    both = (np.concatenate([a, b]), np.concatenate([b, a]))
    values = np.concatenate([scaled, scaled]).astype(np.int64)
    graph = sparse.csr_array(sparse.coo_array((values, both), shape=(vertices, vertices)))
    return _metis_csr(parts, graph, None, seed, cuts)


def _metis_csr(
    parts: int,
    graph: sparse.csr_array,
    vertex_weights: np.ndarray | None,
    seed: int,
    cuts: int = 1,
) -> np.ndarray:
    """Cut a symmetric graph of positive integer weights without loops."""
    import pymetis

    kind = pymetis.zero_copy_dtype()
    adjacency = pymetis.CSRAdjacency(graph.indptr.astype(kind), graph.indices.astype(kind))
    found = pymetis.part_graph(
        parts,
        adjacency,
        eweights=graph.data.astype(kind, copy=False),
        vweights=None if vertex_weights is None else vertex_weights.astype(kind),
        options=pymetis.Options(seed=seed, ncuts=cuts),
    )
    return np.asarray(found.vertex_part, np.int64)


# --- the methods ---------------------------------------------------------------------------------


def _voting(ensemble: _Ensemble) -> _Draft:
    """Aligned majority vote.

    The reference is the running vote matrix, begun with the head of greatest mean NMI to the
    others and joined by the rest in that order, so that no single head names the clusters.
    """
    heads, clusters = ensemble.heads, ensemble.num_clusters
    likeness = _pairwise_nmi(heads, clusters) @ ensemble.weights
    order = np.argsort(-likeness, kind="stable")
    mapping = np.empty((len(heads), clusters), np.int64)
    mapping[order[0]] = np.arange(clusters)
    for step, head in enumerate(order[1:], start=1):
        votes = np.zeros((clusters, clusters))
        for before in order[:step]:
            counts = _counts(heads[head], heads[before], clusters)
            votes[:, mapping[before]] += ensemble.weights[before] * counts
        mapping[head] = _assign(votes)
    values = np.repeat(ensemble.weights[:, None], clusters, axis=1)
    labels = _best(heads, _one_entry_table(mapping, values, clusters))
    return _Draft(labels, info={"path": "medoid head, running votes"})


def _mcla(ensemble: _Ensemble) -> _Draft:
    """Meta-clustering (Strehl & Ghosh 2002, section 3.4).

    The graph's vertices are the heads' clusters in use, its edges their Jaccard similarities. METIS
    cuts it into K meta-clusters; an image goes to the one it is associated with most, which is
    the share of the meta-cluster's members that hold the image.
    """
    heads, clusters = ensemble.heads, ensemble.num_clusters
    sizes = _sizes(heads, ensemble.head_clusters)
    vertex = np.full(sizes.shape, -1)
    vertex[sizes > 0] = np.arange((sizes > 0).sum())
    ends, weights = _jaccard_edges(ensemble, sizes, vertex)
    vertices = int(vertex.max()) + 1
    parts = _metis(min(clusters, vertices), vertices, ends, weights, ensemble.seed)
    target = np.where(vertex >= 0, parts[np.maximum(vertex, 0)], -1)
    members = np.bincount(
        parts, weights=np.repeat(ensemble.weights, (sizes > 0).sum(axis=1)), minlength=clusters
    )
    values = ensemble.weights[:, None] / np.maximum(members[target], 1e-12)
    labels = _best(heads, _one_entry_table(target, values, clusters))
    return _Draft(labels, info={"path": "metis on head clusters", "edges": len(weights)})


def _jaccard_edges(
    ensemble: _Ensemble, sizes: np.ndarray, vertex: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    left, right, strength = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for i, j, (a, b, shared) in _pairs(ensemble.heads, ensemble.head_clusters):
        jaccard = shared / (sizes[i, a] + sizes[j, b] - shared)
        keep = jaccard >= MIN_JACCARD
        left.append(vertex[i, a[keep]])
        right.append(vertex[j, b[keep]])
        strength.append(jaccard[keep] * ensemble.weights[i] * ensemble.weights[j])
    return (np.concatenate(left), np.concatenate(right)), np.concatenate(strength)


def _cspa(ensemble: _Ensemble) -> _Draft:
    """Cluster-based similarity partitioning (Strehl & Ghosh 2002, section 3.2).

    METIS cuts the graph of images whose edges are co-associations: the share of heads that put the
    two together. Images on which all heads agree are one vertex of their number's weight.
    """
    distinct, group, number = np.unique(
        ensemble.heads, axis=1, return_inverse=True, return_counts=True
    )
    vertices = distinct.shape[1]
    if vertices <= ensemble.num_clusters:
        return _Draft(group.ravel(), info={"path": "distinct label vectors"})
    graph = _co_association(distinct, ensemble)
    graph.data *= np.repeat(number, np.diff(graph.indptr))
    graph.data *= number[graph.indices]
    parts = _metis_csr(ensemble.num_clusters, graph, number, ensemble.seed)
    return _Draft(parts[group.ravel()], info={"path": "metis on images", "vertices": vertices})


def _co_association(heads: np.ndarray, ensemble: _Ensemble) -> sparse.csr_array:
    """Weight of the heads that put two images together, as integers >= 1; no diagonal. [V, V]"""
    codes = _codes(heads, ensemble.head_clusters).astype(np.float32)
    scaled = codes.T.tocsr()
    weights = np.repeat(ensemble.weights / ensemble.weights.max(), ensemble.head_clusters)
    scaled.data *= np.repeat(weights * WEIGHT_SCALE, np.diff(scaled.indptr))
    graph = sparse.csr_array(codes @ scaled)
    graph.setdiag(0)
    graph.eliminate_zeros()
    np.maximum(np.rint(graph.data, out=graph.data), 1, out=graph.data)
    graph.data = graph.data.astype(np.int64)
    return graph


def _hgpa(ensemble: _Ensemble) -> _Draft:
    """Hypergraph partitioning (Strehl & Ghosh 2002, section 3.3), approximated.

    Every cluster of every head is a hyperedge over its images, all of weight 1. In place of a
    hypergraph partitioner, METIS cuts the clique expansion of the hypergraph (an edge of
    1 / (size - 1) between any two images of a hyperedge), of which a random sample is taken: some
    random cycles through each hyperedge. So the cut counts how much of a hyperedge is cut off,
    not, as in the paper, merely whether it is cut.
    """
    rows = ensemble.sample()
    few = ensemble.take(rows)
    rng = np.random.default_rng(ensemble.seed)
    cycles = max(1, CLIQUE_DEGREE // (2 * len(few.heads)))
    a, b, strength = [], [], []
    for head, weight in zip(few.heads, few.weights, strict=True):
        for _ in range(cycles):
            start, end = _random_cycles(head, rng)
            a.append(start)
            b.append(end)
            strength.append(np.full(len(start), weight))
    ends = (np.concatenate(a), np.concatenate(b))
    parts = _metis(few.num_clusters, few.rows, ends, np.concatenate(strength), few.seed)
    return _extend(ensemble, few, parts, rows, "metis on a sampled clique expansion")


def _random_cycles(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The edges of one random cycle through the images of each cluster, without loops."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    following = np.roll(order, -1)
    last = np.flatnonzero(labels[order] != labels[following])
    if not len(last):  # a single cluster: the roll has closed its cycle
        last = np.array([len(order) - 1])
    firsts = np.concatenate([[0], last[:-1] + 1])
    following[last] = order[firsts]
    keep = order != following
    return order[keep], following[keep]


def _hbgf(ensemble: _Ensemble) -> _Draft:
    """Hybrid bipartite graph (Fern & Brodley 2004): images and head clusters are vertices alike.

    An edge joins an image and each cluster it is in. METIS cuts images and clusters together.
    """
    rows = ensemble.sample()
    few = ensemble.take(rows)
    codes = _codes(few.heads, few.head_clusters).tocoo()
    image, cluster = codes.coords
    used, vertex = np.unique(cluster, return_inverse=True)
    strength = np.tile(few.weights, few.rows)
    ends = (image.astype(np.int64), few.rows + vertex.ravel())
    parts = _metis(few.num_clusters, few.rows + len(used), ends, strength, few.seed, HBGF_CUTS)
    return _extend(ensemble, few, parts[: few.rows], rows, "metis on images and head clusters")


def _extend(
    ensemble: _Ensemble, few: _Ensemble, parts: np.ndarray, rows: np.ndarray | slice, path: str
) -> _Draft:
    """Give the images outside the sample the part that most sampled images of their clusters have.

    Score of a part: sum over heads of its share among the sampled images of the head's cluster.
    """
    info: dict[str, Any] = {"path": path, "fitted_rows": few.rows}
    if isinstance(rows, slice):
        return _Draft(parts, info=info)
    clusters, each = few.num_clusters, few.head_clusters
    flat = few.heads.astype(np.int64) + np.arange(len(few.heads))[:, None] * each
    key = (flat * clusters + parts).ravel()
    cells, counts = np.unique(key, return_counts=True)
    size = np.bincount(flat.ravel(), minlength=len(few.heads) * each)
    source = cells // clusters
    values = counts / size[source] * ensemble.weights[source // each]
    table = sparse.csr_array((values, (source, cells % clusters)), shape=(len(size), clusters))
    labels = _best(ensemble.heads, table)
    labels[rows] = parts
    info["path"] += ", then by the parts of their clusters"
    return _Draft(labels, info=info)


# --- Dawid-Skene ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """log p(class) + sum over heads of log p(head's cluster | class), split into two parts.

    With n the expected number of images per (cluster, class) and a = SMOOTHING / L,
    log p(cluster | class) = log(1 + n / a) + log(a / (n_class + SMOOTHING)): the first term is
    zero, so not stored, wherever a cluster never meets a class; the second goes into `base`.
    """

    table: sparse.csr_array  # float64 [H*L, K]
    base: np.ndarray  # float64 [K]; -inf for a class without images
    prior: np.ndarray  # log p(class), float64 [K]
    heads: float  # total weight of the heads


def _dawid_skene(ensemble: _Ensemble) -> _Draft:
    """EM with a confusion matrix [K, L] per head (Dawid & Skene 1979).

    EM finds a local optimum, so it is started from MCLA and from the aligned vote (L > K: from
    HBGF), and the fit of the higher likelihood is kept. Confusions are smoothed by a Dirichlet
    prior of SMOOTHING images per class. A head's weight is the power its likelihood is raised to.
    Fitted on at most max_rows images, applied to all.
    """
    few = ensemble.take(ensemble.sample())
    over = few.head_clusters > few.num_clusters
    starts = {name: _SOLVERS[name] for name in (_MERGING_STARTS if over else _STARTS)}
    fits = [(*_fit(few, start(few).labels), name) for name, start in starts.items()]
    model, history, name = max(fits, key=lambda fit: fit[1][-1])
    labels, confidence = _apply(ensemble.heads, model)
    info = {"path": f"EM from {name}", "log_likelihood": history, "fitted_rows": few.rows}
    return _Draft(labels, confidence, info)


def _fit(ensemble: _Ensemble, start: np.ndarray) -> tuple[_Model, list[float]]:
    """EM from these labels [N]. Returns the model and the log-likelihood per image of each step."""
    clusters = ensemble.num_clusters
    _fill_empty(start, ensemble.heads, clusters)
    codes_t = _codes(ensemble.heads, ensemble.head_clusters).T.tocsr()
    posterior = _one_hot(start, clusters)
    history: list[float] = []
    for _ in range(ensemble.iterations):
        model = _maximize(codes_t, posterior, ensemble)
        posterior, likelihood = _expect(ensemble.heads, model)
        history.append(likelihood)
        if len(history) > 1 and history[-1] - history[-2] < CONVERGED:
            break
    return model, history


def _one_hot(labels: np.ndarray, clusters: int) -> sparse.csr_array:
    starts = np.arange(len(labels) + 1)
    return sparse.csr_array((np.ones(len(labels)), labels, starts), shape=(len(labels), clusters))


def _maximize(
    codes_t: sparse.csr_array, posterior: sparse.csr_array, ensemble: _Ensemble
) -> _Model:
    """M-step: confusions and class shares from posteriors [N, K]. codes_t: X transposed."""
    clusters, rows = ensemble.num_clusters, ensemble.rows
    each = SMOOTHING / ensemble.head_clusters
    table = sparse.csr_array(codes_t @ posterior)
    table.data[table.data < 1e-2 * each] = 0
    table.eliminate_zeros()
    row_weights = np.repeat(ensemble.weights, ensemble.head_clusters)
    table.data = np.log1p(table.data / each) * np.repeat(row_weights, np.diff(table.indptr))
    size = np.asarray(posterior.sum(axis=0)).ravel()
    prior = np.log((size + 1) / (rows + clusters))
    total = float(ensemble.weights.sum())
    base = np.where(size > 0, prior + total * np.log(each / (size + SMOOTHING)), -np.inf)
    return _Model(table, base, prior, total)


def _expect(heads: np.ndarray, model: _Model) -> tuple[sparse.csr_array, float]:
    """E-step: posteriors [N, K], and the mean log-likelihood per image."""
    parts, total = [], 0.0
    for _, scores in _scores(heads, model.table):
        total += _normalize(scores, model.base)
        scores.data[scores.data < POSTERIOR_FLOOR] = 0
        scores.eliminate_zeros()
        parts.append(scores)
    return sparse.csr_array(sparse.vstack(parts)), total / heads.shape[1]


def _apply(heads: np.ndarray, model: _Model) -> tuple[np.ndarray, np.ndarray]:
    """Most probable class of all images, int64 [N], and how sure that is, float64 [N].

    Heads see the same features and err together, so the posterior is close to 1 nearly everywhere
    and orders images badly. For the confidence the log-likelihood is averaged over the heads
    instead of summed: all of them together count as one witness.
    """
    labels = np.empty(heads.shape[1], np.int64)
    confidence = np.empty(heads.shape[1])
    alone = np.exp(model.base - np.logaddexp.reduce(model.base))  # where nothing is known
    averaged = model.prior + (model.base - model.prior) / model.heads
    for part, scores in _scores(heads, model.table):
        blank = np.diff(scores.indptr) == 0
        single = scores / model.heads
        _normalize(single, averaged)
        _normalize(scores, model.base)
        found = _row_argmax(scores)
        chosen = scores.indices == np.repeat(found, np.diff(scores.indptr))
        sure = _row_reduce(np.add, single, np.where(chosen, single.data, 0))
        labels[part] = np.where(blank, alone.argmax(), found)
        confidence[part] = np.where(blank, alone.max(), sure)
    return labels, confidence


def _normalize(scores: sparse.csr_array, base: np.ndarray) -> float:
    """Log-scores to posteriors, in place. Returns the sum of the log-likelihoods.

    Classes that none of the image's clusters ever met are not stored, and count as impossible. A
    row without any (all its clusters unseen in the sample) stays empty.
    """
    lengths = np.diff(scores.indptr)
    scores.data += base[scores.indices]
    top = _row_reduce(np.maximum, scores)
    scores.data = np.exp(scores.data - np.repeat(top, lengths))
    total = _row_reduce(np.add, scores)
    scores.data /= np.repeat(total, lengths)
    return float((top + np.log(total))[lengths > 0].sum())


_STARTS = ("mcla", "voting")
_MERGING_STARTS = ("mcla", "hbgf")
_SOLVERS: dict[str, Callable[[_Ensemble], _Draft]] = {
    "voting": _voting,
    "cspa": _cspa,
    "hgpa": _hgpa,
    "mcla": _mcla,
    "hbgf": _hbgf,
    "dawid-skene": _dawid_skene,
}
