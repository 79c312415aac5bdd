"""What all consensus functions share: their input, their result, and the order of clusters.

Shapes: N images, H heads, L clusters per head, K clusters of the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from icce_ray.core.sampling import sample_rows


@dataclass(frozen=True)
class Consensus:
    """The merged clustering."""

    labels: np.ndarray  # int32 [N], 0..K-1, by decreasing cluster size
    confidence: np.ndarray  # float32 [N], 0..1
    info: dict[str, Any] = field(default_factory=dict)  # JSON values; see `consensus`


@dataclass(frozen=True)
class Ensemble:
    """What every method works on. Clusters of each head are in canonical order."""

    heads: np.ndarray  # int16 or int32 [H, N], 0..L-1
    num_clusters: int  # K
    head_clusters: int  # L, at least K
    max_rows: int  # images that a model is fitted on
    seed: int
    device: torch.device | None = None  # a GPU for the methods that can use one

    @property
    def rows(self) -> int:
        """N."""
        return self.heads.shape[1]

    def sample(self) -> np.ndarray | slice:
        """Sorted numbers of at most max_rows random images; a full slice where all fit."""
        if self.rows <= self.max_rows:
            return slice(None)
        return sample_rows(self.rows, self.max_rows, self.seed)

    def take(self, rows: np.ndarray | slice) -> Ensemble:
        """The same ensemble on some of its images."""
        return replace(self, heads=np.ascontiguousarray(self.heads[:, rows]))


@dataclass
class Draft:
    """What a method returns, before clusters are filled up and put in order."""

    labels: np.ndarray  # int64 [N]
    confidence: np.ndarray | None = None  # float [N]; None: the share of heads that agree
    info: dict[str, Any] = field(default_factory=dict)


def canonical_order(labels: np.ndarray, num_clusters: int) -> np.ndarray:
    """New name of each label: by decreasing size, ties by first image. int64 [K]."""
    rows = len(labels)
    first = np.full(num_clusters, rows)
    first[labels[::-1]] = np.arange(rows - 1, -1, -1)  # the last of repeated writes stays
    order = np.lexsort((first, -np.bincount(labels, minlength=num_clusters)))
    rank = np.empty(num_clusters, np.int64)
    rank[order] = np.arange(num_clusters)
    return rank


def fill_empty(labels: np.ndarray, heads: np.ndarray, clusters: int) -> tuple[np.ndarray, int]:
    """Split clusters, in place, until none is empty or all heads agree inside each.

    labels: int64 [N]; heads: int [H, N]; clusters: K. Returns the images that were moved, bool [N],
    and how many clusters were filled.
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
