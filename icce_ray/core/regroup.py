"""Clusters made anew from a clustering and a person's decisions: merged, split, dropped, corrected.

No head is trained: a cluster is split by the clusterings that heads begin at, among its own images.

Shapes: N images, D features, M neighbors, n images of one cluster, K new clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from icce_ray.config.schema import MethodConfig
from icce_ray.core import projection
from icce_ray.core.device import default_device
from icce_ray.core.heads.start import SMOOTHED, cluster_few, smoothed
from icce_ray.core.neighbors import reference_k
from icce_ray.core.sampling import seed_of
from icce_ray.errors import DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz"  # of the parts of a split cluster, by decreasing size


@dataclass(frozen=True)
class Plan:
    """What becomes of the clusters. A piece is a cluster, "7", or a part of a split one, "7b".

    Every piece is in one group, or dropped.
    """

    split: Mapping[int, int]  # cluster -> number of parts
    groups: Sequence[Sequence[str]]  # pieces of each new cluster
    names: Sequence[str | None]  # of the groups
    dropped: Sequence[str] = ()
    moved: Mapping[int, str] | None = None  # row -> the piece that it belongs to


@dataclass(frozen=True, eq=False)
class Regrouped:
    """The new clusters."""

    clusters: np.ndarray  # int32 [N], 0..K-1 by decreasing size; dropped images are in a last one
    confidence: np.ndarray  # float32 [N]
    names: list[str | None]  # of the clusters
    pieces: list[list[str]]  # that each was made of
    dropped: int | None  # number of the cluster of the dropped images


def parts_of(cluster: int, parts: int) -> list[str]:
    """Names of the parts of a split cluster."""
    return [f"{cluster}{letter}" for letter in LETTERS[:parts]]


def regroup(
    clusters: np.ndarray,
    confidence: np.ndarray,
    embeddings: np.ndarray,
    ids: np.ndarray,
    plan: Plan,
    settings: MethodConfig,
) -> Regrouped:
    """Carry out a plan.

    A merged image is as sure as it was. One of a split cluster is less sure by the share of its
    neighbors that are in another part. One that a person has put somewhere is sure.

    Args:
        clusters, confidence: of the consensus, [N].
        embeddings: float16 [N, D]; ids: int32 [N, M], best first; read only for a split.

    Raises:
        DataError: a cluster cannot be split so far, or one has no image left.
    """
    pieces = [str(k) for k in range(int(clusters.max()) + 1)]
    piece, sure = clusters.astype(np.int64), confidence.astype(np.float32).copy()
    seen = None
    for cluster, count in sorted(plan.split.items()):
        seen = seen or projection.fit_projection(embeddings, settings.heads.pca, settings.seed)
        rows = np.flatnonzero(clusters == cluster)
        near = _inside(ids, rows, len(clusters))
        part = split(np.asarray(embeddings[rows]), near, count, seen, settings.seed)
        if part is None:
            raise DataError(
                f"split.{cluster}: its {len(rows):,} images cannot be split into {count} parts: "
                "they are too few, or too much alike"
            )
        piece[rows] = len(pieces) + part
        pieces += parts_of(cluster, count)
        sure[rows] *= _share(part, near)
    number = {name: code for code, name in enumerate(pieces)}
    for row, name in (plan.moved or {}).items():
        piece[row], sure[row] = number[name], 1.0
    return _numbered(piece, sure, number, plan)


def _numbered(
    piece: np.ndarray, sure: np.ndarray, number: Mapping[str, int], plan: Plan
) -> Regrouped:
    """Groups by decreasing size, then the dropped images. piece: int [N], codes by `number`."""
    kinds = [*plan.groups, *([plan.dropped] if plan.dropped else [])]
    group = np.full(len(number), -1)
    for code, names in enumerate(kinds):
        group[[number[name] for name in names]] = code
    found = group[piece]
    sizes = np.bincount(found, minlength=len(kinds))
    if len(empty := np.flatnonzero(sizes[: len(plan.groups)] == 0)):
        raise DataError(
            f"cluster {' + '.join(plan.groups[empty[0]])} has no image left: merge it with another "
            "one, or drop it"
        )
    order = np.argsort(-sizes[: len(plan.groups)], kind="stable").tolist()
    order += range(len(plan.groups), len(kinds))
    place = np.argsort(order)
    given: list[str | None] = [*plan.names, None]
    return Regrouped(
        place[found].astype(np.int32),
        sure,
        [given[code] for code in order],
        [[*kinds[code]] for code in order],
        len(plan.groups) if plan.dropped else None,
    )


def _inside(ids: np.ndarray, rows: np.ndarray, total: int) -> np.ndarray:
    """Neighbors of a cluster's images among these images themselves, best first; -1 fills up.
    ids: int [N, M]; rows: [n]. Returns positions in `rows`, int64 [n, M]."""
    place = np.full(total, -1)
    place[rows] = np.arange(len(rows))
    near = place[ids[rows]]
    order = np.argsort(near < 0, axis=1, kind="stable")
    return np.take_along_axis(near, order, axis=1)


def _share(part: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Share of an image and its neighbors inside the cluster that are in its part: [n]."""
    there = near >= 0
    alike = (part[near] == part[:, None]) & there
    return ((1 + alike.sum(1)) / (1 + there.sum(1))).astype(np.float32)


def split(
    embeddings: np.ndarray, near: np.ndarray, parts: int, seen: projection.Projection, seed: int
) -> np.ndarray | None:
    """Cut one cluster into parts, the largest first: int64 [n]. None where its images are too few
    or too much alike.

    Its images are averaged with their neighbors in it, and grouped by Ward's tree, as at the start
    of heads.

    Args:
        embeddings: float16 [n, D].
        near: neighbors as positions among these images, best first, -1 where there are no more.
    """
    device = default_device()
    features = projection.project(embeddings, seen, device)
    width = reference_k(SMOOTHED, len(near), parts, near.shape[1])
    lists = torch.from_numpy(near[:, :width]).to(device)
    smooth = smoothed(features, lists, (lists >= 0).sum(1))
    found = cluster_few(smooth.float(), parts, seed_of(seed, "split")).cpu().numpy()
    sizes = np.bincount(found, minlength=parts)
    if not sizes.all():
        return None
    return np.argsort(np.argsort(-sizes, kind="stable"))[found]
