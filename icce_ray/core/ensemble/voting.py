"""The aligned majority vote.

Shapes: N images, H heads, K clusters, of the heads and of the result alike.
"""

from __future__ import annotations

import numpy as np

from icce_ray.core.ensemble.agreement import assign, contingency, head_nmi
from icce_ray.core.ensemble.base import Draft, Ensemble
from icce_ray.core.ensemble.scoring import best_cluster, one_entry_table


def voting(ensemble: Ensemble) -> Draft:
    """Each image goes to the cluster that most heads give it, once clusters have common names.

    The reference is the running vote matrix. It starts with the head of greatest mean NMI to the
    others, and the rest join in that order, so that no single head names the clusters.
    """
    heads, clusters = ensemble.heads, ensemble.num_clusters
    likeness = head_nmi(heads, clusters) @ np.ones(len(heads))
    order = np.argsort(-likeness, kind="stable")
    mapping = np.empty((len(heads), clusters), np.int64)
    mapping[order[0]] = np.arange(clusters)
    for step, head in enumerate(order[1:], start=1):
        votes = np.zeros((clusters, clusters))
        for before in order[:step]:
            votes[:, mapping[before]] += contingency(heads[head], heads[before], clusters)
        mapping[head] = assign(votes)
    table = one_entry_table(mapping, np.ones(mapping.shape), clusters)
    return Draft(best_cluster(heads, table), info={"path": "medoid head, running votes"})
