"""The cluster ensemble: the heads' clusterings of the same images become one.

Every method works only on label vectors, never on features. Each head's clusters are first
renamed by size, so renaming the clusters of a head changes nothing. A result is a linear score on
one-hot codes: with X [N, H*L] marking the cluster each head gave an image, and a sparse table
E [H*L, K], the image goes to the largest entry of its row of X E. The methods differ in E. Both
stay sparse: no array of N x H x L, nor of N x K, is ever built.

Heads may have more clusters than the result (L > K, over-clustering), except for voting, which
names the clusters of all heads alike. Dawid-Skene also learns how far each head can be trusted.

Shapes: N images, H heads, L clusters per head, K clusters of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import torch

from icce_ray.config.schema import ConsensusMethod
from icce_ray.core.constants import CSPA_ROWS, FITTED_ROWS
from icce_ray.core.ensemble.agreement import align, check_assignments
from icce_ray.core.ensemble.base import Consensus, Draft, Ensemble, canonical_order, fill_empty
from icce_ray.core.ensemble.dawid_skene import dawid_skene
from icce_ray.core.ensemble.graph import cspa, hbgf, mcla
from icce_ray.core.ensemble.voting import voting
from icce_ray.errors import ConfigError, DataError

METHODS: tuple[str, ...] = get_args(ConsensusMethod)
OVER_CLUSTERED = tuple(name for name in METHODS if name != "voting")  # take heads of L > K clusters


def consensus(
    assignments: np.ndarray,
    num_clusters: int,
    method: str,
    *,
    head_clusters: int | None = None,
    kept: Sequence[int] | np.ndarray | None = None,
    max_rows: int = FITTED_ROWS,
    seed: int,
    device: torch.device | None = None,
) -> Consensus:
    """Merge H clusterings of N images into one of K clusters.

    Args:
        assignments: integers [N, H] in 0..L-1; may be memory-mapped.
        num_clusters: K.
        method: one of METHODS.
        head_clusters: L, at least K; more than K only for the methods of OVER_CLUSTERED, and
            with two heads or more. Default: K.
        kept: numbers of the heads that are merged, ascending. Default: all.
        max_rows: hbgf, dawid-skene: images the model is fitted on (a random subset); it is then
            applied to all.
        seed: same seed, same result.
        device: dawid-skene: a GPU to compute on, in float32. Default: the CPU.

    Returns:
        Labels in order of decreasing cluster size, ties by first image. Confidence: dawid-skene:
        the posterior probability of the image's cluster, with all heads counted as one witness (see
        `dawid_skene`); else the share of heads that agree, each head's clusters having been
        matched one to one with the final ones (L > K: each to the one it shares most images with).
        A single head: itself, with confidence 1.
        info: method, path (what was done), heads (how many are merged), num_clusters,
        head_accuracy ([H], share of images on which the head, so matched, agrees with the result;
        None for a head that is not kept), filled and empty_clusters. A method may leave clusters
        empty. Each is filled with the largest block of images that one head separates from the
        rest of their consensus cluster; this ends with all K in use unless all heads agree inside
        every cluster: empty_clusters
        says how many then stay empty. dawid-skene adds log_likelihood (per image, for each EM
        step) and fitted_rows.

    Raises:
        ConfigError: unknown method, K > N, L that the method cannot take, or cspa with too many
            images.
        DataError: assignments or kept heads that are not as described.
    """
    each = head_clusters or num_clusters
    _check_settings(num_clusters, each, method, max_rows)
    _check_data(assignments, num_clusters, each, method)
    used = _check_kept(kept, assignments.shape[1])
    _check_merge(num_clusters, each, method, len(used))
    heads = canonical_heads(assignments, used, each)
    ensemble = Ensemble(heads, num_clusters, each, max_rows, seed, device)
    if num_clusters == 1:
        draft = Draft(np.zeros(heads.shape[1], np.int64), info={"path": "one cluster"})
    elif len(heads) == 1:
        draft = Draft(heads[0].astype(np.int64), info={"path": "single head"})
    else:
        draft = SOLVERS[method](ensemble)
    result = _finish(draft, ensemble)
    accuracy: list[float | None] = [None] * assignments.shape[1]
    for head, value in zip(used, result.info["head_accuracy"], strict=True):
        accuracy[head] = value
    result.info.update(method=method, heads=len(used), head_accuracy=accuracy)
    return result


def _check_settings(num_clusters: int, head_clusters: int, method: str, max_rows: int) -> None:
    if method not in METHODS:
        raise ConfigError(f"unknown consensus.method={method!r}; choose {', '.join(METHODS)}")
    if min(num_clusters, max_rows) < 1:
        raise ConfigError("num_classes and max_rows must be at least 1")
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
    check_assignments(assignments)
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


def _check_kept(kept: Sequence[int] | np.ndarray | None, heads: int) -> np.ndarray:
    """Numbers of the heads that are merged, int64 [kept]."""
    if kept is None:
        return np.arange(heads)
    numbers = np.asarray(kept, np.int64)
    if not len(numbers) or not np.isin(numbers, np.arange(heads)).all():
        raise DataError(f"kept heads must be one or more of 0..{heads - 1}; found {list(kept)}")
    return np.unique(numbers)


def canonical_heads(assignments: np.ndarray, used: np.ndarray, head_clusters: int) -> np.ndarray:
    """The heads in use, one after the other in memory, clusters renamed by size. [H, N]"""
    kind = np.int16 if head_clusters <= np.iinfo(np.int16).max else np.int32
    heads = np.empty((len(used), len(assignments)), kind)
    for row, head in enumerate(used):
        labels = np.asarray(assignments[:, head])
        heads[row] = canonical_order(labels, head_clusters)[labels]
    return heads


def _finish(draft: Draft, ensemble: Ensemble) -> Consensus:
    """Fill empty clusters, order them, and say how far each image and head can be trusted."""
    clusters = ensemble.num_clusters
    labels = draft.labels.astype(np.int64)
    moved, filled = fill_empty(labels, ensemble.heads, clusters)
    labels = canonical_order(labels, clusters)[labels]
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


def _agreement(labels: np.ndarray, ensemble: Ensemble) -> tuple[np.ndarray, np.ndarray]:
    """Share of heads that agree [N], and share of images on which each head does [H]."""
    share = np.zeros(len(labels))
    accuracy = np.empty(len(ensemble.heads))
    for row, head in enumerate(ensemble.heads):
        same = _renamed(head, labels, ensemble) == labels
        accuracy[row] = same.mean()
        share += same
    return share / len(ensemble.heads), accuracy


def _renamed(head: np.ndarray, labels: np.ndarray, ensemble: Ensemble) -> np.ndarray:
    """A head's labels in the names of the result: one to one, or, if L > K, many to one. [N]"""
    clusters, each = ensemble.num_clusters, ensemble.head_clusters
    if each == clusters:
        return align(head, labels, clusters)
    key = head.astype(np.int64) * clusters + labels
    counts = np.bincount(key, minlength=each * clusters).reshape(each, clusters)
    return counts.argmax(axis=1)[head]


SOLVERS: dict[str, Callable[[Ensemble], Draft]] = {
    "voting": voting,
    "cspa": cspa,
    "mcla": mcla,
    "hbgf": hbgf,
    "dawid-skene": dawid_skene,
}
