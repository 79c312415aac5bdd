"""TODO"""

from __future__ import annotations

import numpy as np

from icce_ray.core.ensemble.agreement import _pairwise_nmi, assign, contingency
from icce_ray.core.ensemble.base import Draft, Ensemble, best_cluster, one_entry_table


def voting(ensemble: Ensemble) -> Draft:
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
            counts = contingency(heads[head], heads[before], clusters)
            votes[:, mapping[before]] += ensemble.weights[before] * counts
        mapping[head] = assign(votes)
    values = np.repeat(ensemble.weights[:, None], clusters, axis=1)
    labels = best_cluster(heads, one_entry_table(mapping, values, clusters))
    return Draft(labels, info={"path": "medoid head, running votes"})
