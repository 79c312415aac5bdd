"""Label-free scores of a clustering, to compare settings where nobody knows the classes.

Each is at most 1, higher is better, and about 0 for random labels whatever the number of clusters:
what chance alone would give is taken off (neighbor_evidence is below 0 for them). One giant
cluster, which agrees with everything, scores 0. All are measured on random rows drawn by the seed,
the same ones for every clustering of the same images, so that two settings are compared on equal
terms.

All but neighbor_modularity compare only settings of equal num_classes: each can be had more cheaply
with fewer clusters.

Shapes: N images, H heads, L clusters per head, K clusters, M neighbors, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icce_ray.core.constants import EVIDENCE
from icce_ray.core.ensemble.agreement import entropy, mutual_information, nmi, pairwise_nmi
from icce_ray.core.sampling import sample_rows
from icce_ray.errors import ConfigError, DataError

ACROSS_CLUSTERS = ("neighbor_modularity",)  # scores that compare numbers of clusters too
LABEL_ROWS = 200_000  # rows for scores that look only at label vectors
NEIGHBOR_ROWS = 50_000  # rows whose neighbors are looked at
NEAREST = 10  # neighbors of each
PROBE_ROWS = 20_000  # rows for the linear probe, at least
PROBE_ROWS_EACH = 40  # ... and for each cluster
PROBE_ROWS_MOST = 50_000  # ... and at most
TRAINED = 0.7  # share of them that the probe is trained on
CHUNK = 65_536  # rows whose neighbors are looked up at once

SCORES: Mapping[str, str] = {
    "head_agreement": "mean NMI between pairs of heads, corrected for chance",
    "consensus_agreement": "mean NMI between the heads and the consensus, corrected for chance",
    "neighbor_consistency": f"share of the {NEAREST} nearest neighbors in the same cluster, "
    "corrected for chance",
    "neighbor_modularity": f"share of the {NEAREST} nearest neighbors in the same cluster, minus "
    "the share expected by chance; also compares different numbers of clusters",
    "neighbor_information": "mutual information between an image's cluster and its neighbors' "
    "clusters, corrected for chance, divided by log K",
    "neighbor_evidence": f"{EVIDENCE} times neighbor_information, minus the entropy of the cluster "
    "sizes; also compares clusters of equal and of unequal sizes",
    "generalization": "agreement (Cohen's kappa) between the clusters of held-out images and the "
    "predictions of a linear probe",
}


@dataclass(frozen=True)
class _Input:
    clusters: np.ndarray  # int [N]
    num_clusters: int  # K
    assignments: np.ndarray  # int [N, H]
    ids: np.ndarray  # int32 [N, M]
    features: np.ndarray  # float16 [N, D]
    seed: int

    def __len__(self) -> int:
        return len(self.clusters)

    def sample(self, most: int) -> np.ndarray:
        """Sorted numbers of at most `most` random rows."""
        return sample_rows(len(self), most, self.seed)


def score(
    names: Iterable[str],
    *,
    clusters: np.ndarray,
    num_clusters: int | None = None,
    assignments: np.ndarray,
    ids: np.ndarray,
    features: np.ndarray,
    seed: int,
) -> dict[str, float]:
    """The named scores of one clustering.

    Args:
        names: some of SCORES.
        clusters: the consensus, int [N].
        num_clusters: K, where not all are used. Default: as many as `clusters` name.
        assignments: the heads' clusters, int [N, H].
        ids: row numbers of the nearest neighbors, best first, int [N, M]. The same lists must serve
            all clusterings that are compared.
        features: [N, D], possibly memory-mapped; only sampled rows are read.
        seed: draws the rows.

    Raises:
        ConfigError: a name that does not exist.
        DataError: arrays that do not fit together.
    """
    wanted = list(names)
    unknown = [name for name in wanted if name not in SCORES]
    if unknown:
        raise ConfigError(f"no score {unknown[0]!r}; there are {', '.join(SCORES)}")
    if num_clusters is None:
        num_clusters = int(np.max(clusters, initial=0)) + 1
    given = _Input(clusters, num_clusters, assignments, ids, features, seed)
    _check(given)
    return {name: float(_FUNCTIONS[name](given)) for name in wanted}


def _check(given: _Input) -> None:
    rows = len(given.clusters)
    if given.clusters.ndim != 1 or not np.issubdtype(given.clusters.dtype, np.integer):
        raise DataError(
            f"clusters must be integers [N], not {given.clusters.dtype} {given.clusters.shape}"
        )
    if rows < 2:
        raise DataError(f"a clustering of {rows} images cannot be scored; at least 2 are needed")
    low, high = given.clusters.min(), given.clusters.max()
    if low < 0 or high >= given.num_clusters:
        raise DataError(
            f"clusters must be codes from 0 to {given.num_clusters - 1}; found {low} to {high}"
        )
    for name in ("assignments", "ids", "features"):
        value = getattr(given, name)
        if value.ndim != 2 or len(value) != rows or not value.shape[1]:
            raise DataError(f"{name} are {value.shape}, but there are {rows} clusters")
    for name in ("assignments", "ids"):
        if not np.issubdtype(getattr(given, name).dtype, np.integer):
            raise DataError(f"{name} must be integers, not {getattr(given, name).dtype}")


# --- one number each, not corrected for chance ---------------------------------------------------


def neighbor_share(clusters: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> float:
    """Mean share of an image's kept neighbors that are in its own cluster.

    clusters: int [N]. ids: int [N, M], row numbers, best first. counts: int [N], how many of the M
    are kept; images without any neighbor are left out.
    """
    total, rows = 0.0, 0
    for start in range(0, len(clusters), CHUNK):
        part = slice(start, start + CHUNK)
        kept = np.arange(ids.shape[1]) < np.asarray(counts[part])[:, None]
        near = clusters[np.where(kept, ids[part], 0)]
        same = ((near == clusters[part][:, None]) & kept).sum(axis=1)
        some = kept.any(axis=1)
        total += float((same[some] / kept[some].sum(axis=1)).sum())
        rows += int(some.sum())
    return total / rows if rows else 0.0


def spread_of_sizes(clusters: np.ndarray, num_clusters: int) -> dict[str, Any]:
    """How evenly images are spread over clusters. clusters: int [N].

    Returns `sizes` (int64 [K]), `entropy` (of the sizes, 1 = all equal), `empty` (clusters without
    an image), `largest`, `smallest` (of those with images) and their `ratio`.
    """
    sizes = np.bincount(clusters, minlength=num_clusters)
    used = sizes[sizes > 0]
    largest, smallest = (int(used.max()), int(used.min())) if len(used) else (0, 0)
    return {
        "sizes": sizes,
        "entropy": entropy(used) / float(np.log(num_clusters)) if len(used) > 1 else 0.0,
        "empty": int((sizes == 0).sum()),
        "largest": largest,
        "smallest": smallest,
        "ratio": largest / max(1, smallest),
    }


# --- the scores ----------------------------------------------------------------------------------


def above_chance(value: float, chance: float) -> float:
    """`value` on a scale where chance is 0 and the maximum 1."""
    return (value - chance) / (1 - chance) if chance < 1 else 0.0


def _head_agreement(given: _Input) -> float:
    """Mean NMI over pairs of heads, adjusted for chance (Vinh, Epps & Bailey, JMLR 11, 2010).

    Stable clusterings are the good ones: Ben-Hur, Elisseeff & Guyon, PSB 2002. The chance term is
    the NMI of each head with a shuffled other one. A head of one cluster agrees with none, and
    neither does a single head.
    """
    heads = _columns(given)
    count = len(heads)
    if count < 2:
        return 0.0
    pairs = pairwise_nmi(heads.T)
    value = pairs[np.triu_indices(count, k=1)].mean()
    rng = np.random.default_rng(given.seed)
    chance = [nmi(heads[h], rng.permutation(heads[h - 1])) for h in range(count)]
    return above_chance(value, float(np.mean(chance)))


def _consensus_agreement(given: _Input) -> float:
    """Mean NMI of each head with the consensus, adjusted for chance as above.

    The average normalized mutual information is what Strehl & Ghosh (JMLR 3, 2002) maximize. 0 for
    a single head, whose consensus is itself.
    """
    heads = _columns(given)
    if len(heads) < 2:
        return 0.0
    labels = given.clusters[given.sample(LABEL_ROWS)]
    shuffled = np.random.default_rng(given.seed).permutation(labels)
    value = np.mean([nmi(head, labels) for head in heads])
    chance = np.mean([nmi(head, shuffled) for head in heads])
    return above_chance(float(value), float(chance))


def _columns(given: _Input) -> np.ndarray:
    """The heads' clusters on sampled rows, one head after the other: [H, rows]."""
    heads = np.ascontiguousarray(given.assignments[given.sample(LABEL_ROWS)].T)
    if heads.min() < 0:
        raise DataError(f"head assignments must be codes from 0; found {heads.min()}")
    return heads


def _nearest(given: _Input) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of sampled images [n], and of their nearest neighbors [n, NEAREST]."""
    rows = given.sample(NEIGHBOR_ROWS)
    near = _neighbors_of(given.ids, rows)
    return given.clusters[rows], given.clusters[near]


def _neighbors_of(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    near = np.asarray(ids[rows, :NEAREST])
    if near.min() < 0 or near.max() >= len(ids):
        raise DataError(
            f"neighbor ids must be row numbers 0..{len(ids) - 1}; found {near.min()} to "
            f"{near.max()}"
        )
    return near


def neighbor_consistency(own: np.ndarray, near: np.ndarray, chance: float | None = None) -> float:
    """(agree - c) / (1 - c), with c = sum p_k^2 the chance that two images share a cluster.

    Neighbors sharing a class is what SCAN (Van Gansbeke et al., ECCV 2020) and TEMI learn from; the
    correction is that of Cohen's kappa (1960).

    Args:
        own: clusters of some images, int [n].
        near: clusters of their neighbors, int [n, M].
        chance: c. Default: by `own`.
    """
    agree = float((near == own[:, None]).mean())
    return above_chance(agree, _chance(own) if chance is None else chance)


def _neighbor_consistency(given: _Input) -> float:
    return neighbor_consistency(*_nearest(given), _chance(given.clusters))


def _neighbor_modularity(given: _Input) -> float:
    """agree - c: the modularity of the clusters on the graph of neighbors (Newman & Girvan 2004).

    Below 1 - c even for perfect clusters, so a further cluster raises it as long as it costs fewer
    agreements than it takes from chance: with 1 / K - 1 / (K + 1) to be won, it can find some tens
    of clusters, and finds too few of hundreds (Fortunato & Barthelemy, PNAS 104, 2007).
    """
    own, near = _nearest(given)
    return float((near == own[:, None]).mean()) - _chance(given.clusters)


def _chance(clusters: np.ndarray) -> float:
    """That two images share a cluster: sum p_k^2."""
    return float(((np.bincount(clusters) / len(clusters)) ** 2).sum())


def _neighbor_information(given: _Input) -> float:
    """Mutual information of an image's cluster and its neighbor's, above chance; over log K.

    The hard-label form of TEMI's objective (arXiv 2303.17896). Beside consistency, which counts
    images, it counts a small cluster's purity by the information in it. It is not divided by the
    clusters' own entropy: so divided, it would be highest where a few clusters hold nearly all
    images. Chance: the lists of neighbors handed to other images.
    """
    own, near = _nearest(given)
    return _information(own, near, given.num_clusters, given.seed)


def _information(own: np.ndarray, near: np.ndarray, clusters: int, seed: int) -> float:
    """own: int [n]; near: int [n, M]. 0 for a single cluster."""
    if clusters < 2:
        return 0.0
    most = float(np.log(clusters))
    repeated = np.repeat(own, near.shape[1])
    shuffled = np.random.default_rng(seed).permutation(near)
    chance = mutual_information(repeated, shuffled.ravel()) / most
    return above_chance(mutual_information(repeated, near.ravel()) / most, chance)


def _neighbor_evidence(given: _Input) -> float:
    """(a I - H) / (a - 1), with I as above, H the clusters' entropy over log K, a = EVIDENCE.

    Information is highest for clusters of equal size, also where classes are not; agreement is
    highest where few clusters hold nearly all images. As a model of the graph of neighbors (Karrer
    & Newman, Physical Review E 83, 2011) clusters earn I for each link of an image, and cost H to
    name; but the links of one image say nearly the same. How many independent ones they are worth
    was set by trial, with labels: jobs/benchmarks/README.md.
    """
    own, near = _nearest(given)
    information = _information(own, near, given.num_clusters, given.seed)
    return _evidence(information, own, given.num_clusters)


def _evidence(information: float, own: np.ndarray, clusters: int) -> float:
    if clusters < 2:
        return 0.0
    cost = entropy(np.bincount(own)) / float(np.log(clusters))
    return (EVIDENCE * information - cost) / (EVIDENCE - 1)


def head_scores(
    assignments: np.ndarray, ids: np.ndarray, clusters: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`neighbor_information` and `neighbor_evidence` of each head's clusters, float64 [H] each.

    Args:
        assignments: int [N, H] in 0..L-1; may be memory-mapped, only sampled rows are read.
        ids: row numbers of the nearest neighbors, best first, int [N, M].
        clusters: L.
        seed: draws the rows.

    Raises:
        DataError: ids that are not row numbers.
    """
    # Only these rows of the assignments are read, and head after head looked up among them.
    rows = sample_rows(len(ids), NEIGHBOR_ROWS, seed)
    near = _neighbors_of(ids, rows)
    used, where = np.unique(np.concatenate([rows, near.ravel()]), return_inverse=True)
    columns = np.ascontiguousarray(np.asarray(assignments[used]).T)
    own, beside = where[: len(rows)], where[len(rows) :].reshape(near.shape)
    information = [_information(c[own], c[beside], clusters, seed) for c in columns]
    pairs = zip(information, columns, strict=True)
    return np.array(information), np.array([_evidence(i, c[own], clusters) for i, c in pairs])


def _generalization(given: _Input) -> float:
    """Cohen's kappa between a linear probe's predictions and the clusters of held-out images.

    TURTLE's criterion (Gadetsky, Jiang & Brbic, ICML 2024): human labelings generalize, so choose
    the clustering whose labels a linear model learns from some images and predicts for the rest.

    The probe is linear discriminant analysis, not TURTLE's logistic regression: it is solved at
    once, so that 1,000 clusters cost no more than 10 and no step size or stopping enters the score.
    """
    used = int((np.bincount(given.clusters) > 0).sum())
    most = min(PROBE_ROWS_MOST, max(PROBE_ROWS, PROBE_ROWS_EACH * used))
    rows = np.random.default_rng(given.seed + 1).permutation(given.sample(most))
    trained = min(len(rows) - 1, max(1, round(TRAINED * len(rows))))
    labels = np.unique(given.clusters[rows], return_inverse=True)[1].ravel()
    x = _standardized(given.features, rows, trained)
    weight, bias = discriminant(x[:trained], labels[:trained])
    predicted = torch.addmm(bias, x[trained:], weight).argmax(1).numpy()
    return _kappa(labels[trained:], predicted)


def _standardized(features: np.ndarray, rows: np.ndarray, trained: int) -> Tensor:
    """These rows, float32, centered and scaled by the first `trained` of them. [n, D]"""
    order = np.argsort(rows)  # a memory map is read forward
    sample = np.empty((len(rows), features.shape[1]), np.float32)
    sample[order] = features[rows[order]]
    x = torch.from_numpy(sample)
    x -= x[:trained].mean(0)
    x /= x[:trained].square().mean(0).sqrt().clamp_min(1e-6)
    return x


def discriminant(x: Tensor, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis: weights [D, K] and biases [K] of the class scores.

    The within-class covariance S is shrunk towards its mean variance v: (1 - g) S + g v I, with
    g = D / (D + n). Classes without a row get a bias of -inf.

    Args:
        x: float32 [n, D], centered.
        labels: int [n].
    """
    rows, width = x.shape
    codes = torch.from_numpy(labels.astype(np.int64))
    sizes = torch.bincount(codes)
    means = torch.zeros(len(sizes), width).index_add_(0, codes, x)
    means /= sizes.clamp_min(1).unsqueeze(1)
    within = (x.T @ x - (means * sizes.unsqueeze(1)).T @ means) / rows
    shrink = width / (width + rows)
    within.mul_(1 - shrink)
    within.diagonal().add_(within.trace() / width * shrink / (1 - shrink) + 1e-6)
    weight = torch.cholesky_solve(means.T, torch.linalg.cholesky(within))
    bias = (sizes / rows).log() - (means.T * weight).sum(0) / 2
    return weight, bias


def _kappa(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Accuracy above that of predictions as frequent but given out at random (Cohen 1960)."""
    count = int(max(labels.max(), predicted.max())) + 1
    share, guess = (np.bincount(v, minlength=count) / len(v) for v in (labels, predicted))
    return above_chance(float((labels == predicted).mean()), float(share @ guess))


_FUNCTIONS: dict[str, Callable[[_Input], float]] = {
    "head_agreement": _head_agreement,
    "consensus_agreement": _consensus_agreement,
    "neighbor_consistency": _neighbor_consistency,
    "neighbor_modularity": _neighbor_modularity,
    "neighbor_information": _neighbor_information,
    "neighbor_evidence": _neighbor_evidence,
    "generalization": _generalization,
}
