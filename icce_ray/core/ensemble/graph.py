"""TODO"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from icce_ray.core.ensemble.agreement import cluster_sizes, pairs
from icce_ray.core.ensemble.base import (
    WEIGHT_SCALE,
    Draft,
    Ensemble,
    best_cluster,
    one_entry_table,
    one_hot_codes,
)

MIN_JACCARD = 0.05  # weaker edges of MCLA's graph are left out: most of them, and only noise


HBGF_CUTS = 5  # cuts METIS tries; with 1, 7 of 24 trials came apart (16-54% right), with 5 none


CLIQUE_DEGREE = 64  # HGPA: neighbors sampled per image, over all heads


def metis(
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
    return metis_csr(parts, graph, None, seed, cuts)


def metis_csr(
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


def mcla(ensemble: Ensemble) -> Draft:
    """Meta-clustering (Strehl & Ghosh 2002, section 3.4).

    The graph's vertices are the heads' clusters in use, its edges their Jaccard similarities. METIS
    cuts it into K meta-clusters; an image goes to the one it is associated with most, which is
    the share of the meta-cluster's members that hold the image.
    """
    heads, clusters = ensemble.heads, ensemble.num_clusters
    sizes = cluster_sizes(heads, ensemble.head_clusters)
    vertex = np.full(sizes.shape, -1)
    vertex[sizes > 0] = np.arange((sizes > 0).sum())
    ends, weights = _jaccard_edges(ensemble, sizes, vertex)
    vertices = int(vertex.max()) + 1
    parts = metis(min(clusters, vertices), vertices, ends, weights, ensemble.seed)
    target = np.where(vertex >= 0, parts[np.maximum(vertex, 0)], -1)
    members = np.bincount(
        parts, weights=np.repeat(ensemble.weights, (sizes > 0).sum(axis=1)), minlength=clusters
    )
    values = ensemble.weights[:, None] / np.maximum(members[target], 1e-12)
    labels = best_cluster(heads, one_entry_table(target, values, clusters))
    return Draft(labels, info={"path": "metis on head clusters", "edges": len(weights)})


def _jaccard_edges(
    ensemble: Ensemble, sizes: np.ndarray, vertex: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    left, right, strength = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for i, j, (a, b, shared) in pairs(ensemble.heads, ensemble.head_clusters):
        jaccard = shared / (sizes[i, a] + sizes[j, b] - shared)
        keep = jaccard >= MIN_JACCARD
        left.append(vertex[i, a[keep]])
        right.append(vertex[j, b[keep]])
        strength.append(jaccard[keep] * ensemble.weights[i] * ensemble.weights[j])
    return (np.concatenate(left), np.concatenate(right)), np.concatenate(strength)


def cspa(ensemble: Ensemble) -> Draft:
    """Cluster-based similarity partitioning (Strehl & Ghosh 2002, section 3.2).

    METIS cuts the graph of images whose edges are co-associations: the share of heads that put the
    two together. Images on which all heads agree are one vertex of their number's weight.
    """
    distinct, group, number = np.unique(
        ensemble.heads, axis=1, return_inverse=True, return_counts=True
    )
    vertices = distinct.shape[1]
    if vertices <= ensemble.num_clusters:
        return Draft(group.ravel(), info={"path": "distinct label vectors"})
    graph = _co_association(distinct, ensemble)
    graph.data *= np.repeat(number, np.diff(graph.indptr))
    graph.data *= number[graph.indices]
    parts = metis_csr(ensemble.num_clusters, graph, number, ensemble.seed)
    return Draft(parts[group.ravel()], info={"path": "metis on images", "vertices": vertices})


def _co_association(heads: np.ndarray, ensemble: Ensemble) -> sparse.csr_array:
    """Weight of the heads that put two images together, as integers >= 1; no diagonal. [V, V]"""
    codes = one_hot_codes(heads, ensemble.head_clusters).astype(np.float32)
    scaled = codes.T.tocsr()
    weights = np.repeat(ensemble.weights / ensemble.weights.max(), ensemble.head_clusters)
    scaled.data *= np.repeat(weights * WEIGHT_SCALE, np.diff(scaled.indptr))
    graph = sparse.csr_array(codes @ scaled)
    graph.setdiag(0)
    graph.eliminate_zeros()
    np.maximum(np.rint(graph.data, out=graph.data), 1, out=graph.data)
    graph.data = graph.data.astype(np.int64)
    return graph


def hgpa(ensemble: Ensemble) -> Draft:
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
    parts = metis(few.num_clusters, few.rows, ends, np.concatenate(strength), few.seed)
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


def hbgf(ensemble: Ensemble) -> Draft:
    """Hybrid bipartite graph (Fern & Brodley 2004): images and head clusters are vertices alike.

    An edge joins an image and each cluster it is in. METIS cuts images and clusters together.
    """
    rows = ensemble.sample()
    few = ensemble.take(rows)
    codes = one_hot_codes(few.heads, few.head_clusters).tocoo()
    image, cluster = codes.coords
    used, vertex = np.unique(cluster, return_inverse=True)
    strength = np.tile(few.weights, few.rows)
    ends = (image.astype(np.int64), few.rows + vertex.ravel())
    parts = metis(few.num_clusters, few.rows + len(used), ends, strength, few.seed, HBGF_CUTS)
    return _extend(ensemble, few, parts[: few.rows], rows, "metis on images and head clusters")


def _extend(
    ensemble: Ensemble, few: Ensemble, parts: np.ndarray, rows: np.ndarray | slice, path: str
) -> Draft:
    """Give the images outside the sample the part that most sampled images of their clusters have.

    Score of a part: sum over heads of its share among the sampled images of the head's cluster.
    """
    info: dict[str, Any] = {"path": path, "fitted_rows": few.rows}
    if isinstance(rows, slice):
        return Draft(parts, info=info)
    clusters, each = few.num_clusters, few.head_clusters
    flat = few.heads.astype(np.int64) + np.arange(len(few.heads))[:, None] * each
    key = (flat * clusters + parts).ravel()
    cells, counts = np.unique(key, return_counts=True)
    size = np.bincount(flat.ravel(), minlength=len(few.heads) * each)
    source = cells // clusters
    values = counts / size[source] * ensemble.weights[source // each]
    table = sparse.csr_array((values, (source, cells % clusters)), shape=(len(size), clusters))
    labels = best_cluster(ensemble.heads, table)
    labels[rows] = parts
    info["path"] += ", then by the parts of their clusters"
    return Draft(labels, info=info)
