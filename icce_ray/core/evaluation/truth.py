"""Scores of a clustering against ground truth: ACC, NMI, ARI.

Shapes: N images, C classes, K clusters.
Labels and clusters are integer codes from 0; rows without a label (-1) are to be left out before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from icce_ray.errors import DataError


def contingency(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Images per class and cluster: int64 [C, K], C and K being the largest codes plus one.

    Raises:
        DataError: where the two differ in length, are empty, or hold negative codes.
    """
    if labels.shape != clusters.shape or labels.ndim != 1:
        raise DataError(f"labels {labels.shape} and clusters {clusters.shape} must both be [N]")
    if not len(labels):
        raise DataError("there are no labeled images to score")
    if labels.min() < 0 or clusters.min() < 0:
        raise DataError("labels and clusters must be codes from 0; leave out unlabeled rows (-1)")
    classes, count = int(labels.max()) + 1, int(clusters.max()) + 1
    joint = labels.astype(np.int64) * count + clusters
    return np.bincount(joint, minlength=classes * count).reshape(classes, count)


@dataclass(frozen=True)
class Matching:
    """The one-to-one matching of clusters to classes that most images agree with."""

    cluster_class: np.ndarray  # int64 [K]: class of a cluster, -1 where it has none (K > C)
    order: np.ndarray  # int64 [K]: clusters by matched class, then the unmatched ones
    confusion: np.ndarray  # int64 [C, K]: the contingency with its columns in that order


def matching(labels: np.ndarray, clusters: np.ndarray) -> Matching:
    """Match clusters to classes by the Hungarian algorithm (Kuhn 1955). C and K may differ.

    labels, clusters: int [N]. Raises DataError as `contingency` does.
    """
    return match(contingency(labels, clusters))


def match(table: np.ndarray) -> Matching:
    """The same from a contingency [C, K]."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(table, maximize=True)
    cluster_class = np.full(table.shape[1], -1, dtype=np.int64)
    cluster_class[columns] = rows
    rank = np.where(cluster_class < 0, table.shape[0], cluster_class)
    order = np.argsort(rank, kind="stable")
    return Matching(cluster_class, order, table[:, order])


def accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """ACC: share of images whose cluster is matched to their class. labels, clusters: int [N]."""
    table = contingency(labels, clusters)
    classes = match(table).cluster_class
    matched = classes >= 0
    return float(table[classes[matched], np.flatnonzero(matched)].sum() / table.sum())


def nmi(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Normalized mutual information, arithmetic mean of the two entropies. int [N] each."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(labels, clusters, average_method="arithmetic"))


def ari(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Adjusted Rand index (Hubert & Arabie 1985). int [N] each."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(labels, clusters))


def scores(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """acc, nmi and ari, each in 0..1 (ari may be slightly negative)."""
    return {
        "acc": accuracy(labels, clusters),
        "nmi": nmi(labels, clusters),
        "ari": ari(labels, clusters),
    }


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """How often images of a given confidence are right: a reliability diagram's numbers.

    Args:
        confidence: float [N] in 0..1.
        correct: bool [N].

    Returns, for every bin that holds images, from low to high confidence: `confidence` (mean),
    `accuracy`, `rows`. Of all images: `error`, the mean gap between the two, weighted by rows
    (expected calibration error, Naeini et al., AAAI 2015), and `ranking`, the chance that a right
    image has more confidence than a wrong one (area under the ROC curve; None without both).
    """
    from sklearn.metrics import roc_auc_score

    place = np.clip((confidence * bins).astype(np.int64), 0, bins - 1)
    rows = np.bincount(place, minlength=bins)
    used = rows > 0
    mean = np.bincount(place, weights=confidence, minlength=bins)[used] / rows[used]
    right = np.bincount(place, weights=correct, minlength=bins)[used] / rows[used]
    both = 0 < np.count_nonzero(correct) < len(correct)
    return {
        "confidence": mean.tolist(),
        "accuracy": right.tolist(),
        "rows": rows[used].tolist(),
        "error": float((np.abs(mean - right) * rows[used]).sum() / len(correct)),
        "ranking": float(roc_auc_score(correct, confidence)) if both else None,
    }
