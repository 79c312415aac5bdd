"""Consensus functions that cut a graph: MCLA, CSPA (Strehl & Ghosh 2002) and HBGF (Fern & Brodley
2004).

They differ in the vertices: clusters of heads (mcla), images (cspa), or both (hbgf). METIS (through
pymetis) cuts the graph into parts of nearly equal size, by default within 3%. So cspa and hbgf
favor clusters of equal size; mcla balances clusters of heads, not images.

Shapes: N images, H heads, L clusters per head, K clusters of the result, V vertices of a graph.
References: Strehl & Ghosh, JMLR 3 (2002) 583-617; Fern & Brodley, ICML 2004.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from icce_ray.core.ensemble.agreement import cluster_sizes, pairs
from icce_ray.core.ensemble.base import Draft, Ensemble
from icce_ray.core.ensemble.scoring import best_cluster, one_entry_table, one_hot_codes

MIN_JACCARD = 0.05  # weaker edges of MCLA's graph are left out: most of them, and only noise
HBGF_CUTS = 5  # cuts METIS tries; with 1, 7 of 24 trials came apart (16-54% right), with 5 none
WEIGHT_SCALE = 1000  # METIS takes integer weights, and crashes on those below 1

# --- METIS ---------------------------------------------------------------------------------------


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
    """Cut a symmetric graph [V, V] of positive integer weights without loops: int64 [V].

    vertex_weights: int [V], so that parts are of nearly equal weight; None: all equal.
    """
    import pymetis

    kind = pymetis.zero_copy_dtype()
    adjacency = pymetis.CSRAdjacency(graph.indptr.astype(kind), graph.indices.astype(kind))
    cut = pymetis.part_graph(
        parts,
        adjacency,
        eweights=graph.data.astype(kind, copy=False),
        vweights=None if vertex_weights is None else vertex_weights.astype(kind),
        options=pymetis.Options(seed=seed, ncuts=cuts),
    )
    return np.asarray(cut.vertex_part, np.int64)


# --- consensus functions -------------------------------------------------------------------------


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
    members = np.bincount(parts, minlength=clusters)
    values = 1 / np.maximum(members[target], 1e-12)
    labels = best_cluster(heads, one_entry_table(target, values, clusters))
    return Draft(labels, info={"path": "metis on head clusters", "edges": len(weights)})


def _jaccard_edges(
    ensemble: Ensemble, sizes: np.ndarray, vertex: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Ends and weights of MCLA's graph. sizes, vertex: int [H, L], -1 for a cluster not in use."""
    left, right, strength = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for i, j, (a, b, shared) in pairs(ensemble.heads, ensemble.head_clusters):
        jaccard = shared / (sizes[i, a] + sizes[j, b] - shared)
        keep = jaccard >= MIN_JACCARD
        left.append(vertex[i, a[keep]])
        right.append(vertex[j, b[keep]])
        strength.append(jaccard[keep])
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
    """Heads that put two images together, times WEIGHT_SCALE; no diagonal. [V, V]"""
    codes = one_hot_codes(heads, ensemble.head_clusters).astype(np.float32)
    scaled = codes.T.tocsr()
    scaled.data *= WEIGHT_SCALE
    graph = sparse.csr_array(codes @ scaled)
    graph.setdiag(0)
    graph.eliminate_zeros()
    np.maximum(np.rint(graph.data, out=graph.data), 1, out=graph.data)
    graph.data = graph.data.astype(np.int64)
    return graph


def hbgf(ensemble: Ensemble) -> Draft:
    """Hybrid bipartite graph (Fern & Brodley 2004): images and head clusters are vertices alike.

    An edge joins an image and each cluster it is in. METIS cuts images and clusters together.
    """
    rows = ensemble.sample()
    few = ensemble.take(rows)
    codes = one_hot_codes(few.heads, few.head_clusters).tocoo()
    image, cluster = codes.coords
    used, vertex = np.unique(cluster, return_inverse=True)
    ends = (image.astype(np.int64), few.rows + vertex.ravel())
    equal = np.ones(len(image))
    parts = metis(few.num_clusters, few.rows + len(used), ends, equal, few.seed, HBGF_CUTS)
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
    used, counts = np.unique(key, return_counts=True)
    size = np.bincount(flat.ravel(), minlength=len(few.heads) * each)
    source = used // clusters
    values = counts / size[source]
    table = sparse.csr_array((values, (source, used % clusters)), shape=(len(size), clusters))
    labels = best_cluster(ensemble.heads, table)
    labels[rows] = parts
    info["path"] += ", then by the parts of their clusters"
    return Draft(labels, info=info)
