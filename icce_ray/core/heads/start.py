"""Where linear heads begin: clusters of the images that need no training.

k-means gets stuck where two classes share a centroid and a third has two, the more often the more
classes there are; Ward's tree merges upwards and does not. Averaging each image with its neighbors
first, many times, brings the images of a class together, also where it is no ball (as in graph
convolutions without weights, Wu et al. 2019, arXiv 1902.07153).

Shapes: N rows, P components, K clusters, M neighbors.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.cluster import hierarchy
from torch import Tensor
from torch.nn import functional as F

from icce_ray.core.constants import STATISTICS_ROWS, TREE_ROWS, TREE_ROWS_PER_CLUSTER
from icce_ray.core.projection import inverse_root

SEEDED = 100  # clusters up to which k-means is seeded with care
SHARED = 0.05  # weight of the variance of all images, beside that between neighbors
SMOOTHED = 10  # neighbors that an image is averaged with, fewer where classes are small
ROUNDS = 100  # times that this is done: far along chains of neighbors, as diffusion does
SMOOTHED_ROWS = 8192  # rows at a time
FEWEST_PER_CLUSTER = 4  # rows that a tree needs; of fewer, k-means makes the start
TREES = 4  # different ones; heads of each balance share them evenly
FEW = 10  # rounds of k-means after the tree


@torch.no_grad()
def evened(features: Tensor, ids: Tensor) -> Tensor:
    """Features in which directions that vary across all images count less: float16 [N, P].

    Neighbors share what several classes have in common, such as a style, so that the scatter
    between neighbors, which features are whitened by, does not show it. The variance of all images
    does. That holds the classes themselves too, but of many classes little in any one direction.

    features: float16 [N, P], unit rows; ids: int32 [N, M], neighbors, of which the first is taken.
    """
    count, width = features.shape
    rows = torch.linspace(0, count - 1, min(count, STATISTICS_ROWS)).round().long()
    some = features[rows.to(features.device)].double()
    near = features[ids[rows.to(ids.device), 0].long().to(features.device)].double()
    between = ((some - near).square().mean() / 2).clamp_min(1e-6)  # 0 if all are copies
    centered = some - some.mean(0)
    total = centered.T @ centered / len(rows)
    scale = inverse_root(between * torch.eye(width, device=total.device) + SHARED * total).float()
    out = torch.empty_like(features)
    for start in range(0, count, SMOOTHED_ROWS):
        part = slice(start, start + SMOOTHED_ROWS)
        out[part] = F.normalize(features[part].float() @ scale, dim=-1).half()
    return out


@torch.no_grad()
def smoothed(features: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """Each row averaged with the mean of its neighbors, of length 1: ROUNDS times.

    features: float16 [N, P]; ids: int32 [N, M], the neighbors to average with; counts: [N], how
    many of them are valid: the row itself takes the places of the others. Returns float16 [N, P],
    where `features` is.
    """
    own = torch.arange(len(ids), dtype=ids.dtype, device=ids.device)[:, None]
    columns = torch.arange(ids.shape[1], device=ids.device)
    taken = torch.where(columns < counts[:, None], ids, own).to(features.device)
    for _ in range(ROUNDS):
        out = torch.empty_like(features)
        for start in range(0, len(features), SMOOTHED_ROWS):
            part = slice(start, start + SMOOTHED_ROWS)
            near = F.embedding_bag(taken[part], features, mode="mean")  # gathers and averages
            out[part] = F.normalize(features[part].float() + near, dim=-1).half()
        features = out
    return features


class WardTree:
    """Ward's clusters (1963) of a few smoothed rows, for whatever number of them.

    The rows are drawn, and a random half of the components decides about the clusters, so that
    trees differ. Seconds on one core for thousands of rows.

    smooth: float32 [N, P].
    """

    def __init__(self, smooth: Tensor, rows: int, generator: np.random.Generator) -> None:
        picked = np.sort(generator.choice(len(smooth), rows, replace=False))
        self.points = smooth[torch.from_numpy(picked).to(smooth.device)]
        seen = self.points[:, _half_of_components(self.points, generator)]
        # Four times as fast as scipy's own. It grows with the square of the rows, so that only one
        # copy is kept; scipy makes another.
        apart = torch.pdist(seen.cpu()).double().numpy()
        self.merges = hierarchy.ward(apart)

    def centroids(self, clusters: int) -> Tensor:
        """Centroids of the K clusters, in all components: float32 [K, P]."""
        own = hierarchy.fcluster(self.merges, clusters, "maxclust").astype(np.int64) - 1
        return cluster_means(self.points, torch.from_numpy(own).to(self.points.device), clusters)


def ward_tree(smooth: Tensor, clusters: int, seed: int) -> Tensor:
    """Centroids of Ward's clusters of some smoothed rows, float32 [K, P]. Heads share TREES of
    them. smooth: float32 [N, P], N at least K."""
    rows = min(len(smooth), max(TREE_ROWS, TREE_ROWS_PER_CLUSTER * clusters))
    return WardTree(smooth, rows, np.random.default_rng(seed)).centroids(clusters)


def ward_start(sample: Tensor, smooth: Tensor, tree: Tensor, seed: int) -> Tensor:
    """First weights of one linear head from a tree's clusters, float32 [P, K].

    k-means moves the tree's centroids through the smoothed rows. Each head takes another random
    half of the rows and of the components, so that heads of one tree start different; the centroids
    themselves are those of the rows as they are, in all components.

    Args:
        sample: float32 [N, P], unit rows, on whatever device.
        smooth: float32 [N, P], the same rows smoothed.
        tree: centroids [K, P] of `ward_tree`.
    """
    generator, clusters = np.random.default_rng(seed), len(tree)
    rows = _half_of_rows(sample, clusters, generator)
    components = _half_of_components(sample, generator)
    part = smooth[rows][:, components].contiguous()
    begin = tree[:, components].contiguous()
    nearest = nearest_centroid(part, lloyd(part, clusters, generator, FEW, begin))
    return cluster_means(sample[rows], nearest, clusters).T.contiguous()


def cluster_few(smooth: Tensor, clusters: int, seed: int) -> Tensor:
    """Clusters of some smoothed rows: those of a tree, moved by k-means; of few rows, k-means
    alone. float32 [N, P] -> int64 [N]; a cluster is empty only where rows repeat."""
    generator = np.random.default_rng(seed)
    enough = len(smooth) >= FEWEST_PER_CLUSTER * clusters
    begin = ward_tree(smooth, clusters, seed) if enough else None
    return nearest_centroid(smooth, lloyd(smooth, clusters, generator, FEW, begin))


def _half_of_rows(x: Tensor, clusters: int, generator: np.random.Generator) -> Tensor:
    """Numbers of a random half of the rows, or all of few."""
    count = len(x)
    rows = count if count < FEWEST_PER_CLUSTER * clusters else max(count // 2, 2 * clusters)
    picked = np.sort(generator.choice(count, rows, replace=False))
    return torch.from_numpy(picked).to(x.device)


def _half_of_components(x: Tensor, generator: np.random.Generator) -> Tensor:
    """Numbers of a random half of the components."""
    width = x.shape[1]
    picked = np.sort(generator.permutation(width)[: max(1, math.ceil(width / 2))])
    return torch.from_numpy(picked).to(x.device)


def kmeans_start(sample: Tensor, clusters: int, seed: int) -> Tensor:
    """First weights of one linear head: centroids of a quick k-means, float32 [P, K].

    Each head takes another random half of the rows and of the components, so that heads start
    different; the centroids themselves are taken in all components.

    Args:
        sample: float32 [N, P], unit rows, on whatever device.
    """
    generator = np.random.default_rng(seed)
    rows = _half_of_rows(sample, clusters, generator)
    part = sample[rows][:, _half_of_components(sample, generator)].contiguous()
    nearest = nearest_centroid(part, lloyd(part, clusters, generator))
    return cluster_means(sample[rows], nearest, clusters).T.contiguous()


def nearest_centroid(x: Tensor, centroids: Tensor) -> Tensor:
    """Number of the centroid nearest to each row: |x - c|^2 is least where x.c - |c|^2 / 2 is most.
    [N, P] and [K, P] -> int64 [N]."""
    half = centroids.square().sum(1).mul_(-0.5)
    return torch.addmm(half, x, centroids.T).argmax(1)


def _cluster_sums(x: Tensor, nearest: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sum of the rows of each cluster [K, P], and their number [K]."""
    counts = torch.bincount(nearest, minlength=clusters)
    if x.device.type == "cpu":
        return x.new_zeros(clusters, x.shape[1]).index_add_(0, nearest, x), counts
    # A product, since a GPU adds by index in an order of its own: a seed would not repeat.
    codes = F.one_hot(nearest, clusters).to(x.dtype)
    return codes.T @ x, counts


def cluster_means(x: Tensor, nearest: Tensor, clusters: int) -> Tensor:
    """Mean of the rows of each cluster, [K, P]; zero for an empty one."""
    sums, counts = _cluster_sums(x, nearest, clusters)
    return sums / counts.clamp_min(1).unsqueeze(1)


def _seeds(x: Tensor, clusters: int, generator: np.random.Generator) -> Tensor:
    """Rows to begin from, [K, P]: k-means++ (Arthur & Vassilvitskii 2007); random for large K,
    where its K passes cost more than k-means itself."""
    if clusters > SEEDED or len(x) <= clusters:
        picks = generator.choice(len(x), clusters, replace=len(x) < clusters)
        return x[torch.from_numpy(picks).to(x.device)].clone()
    rows = [int(generator.integers(len(x)))]
    nearest = (x - x[rows[0]]).square().sum(1)
    for _ in range(clusters - 1):
        odds = nearest.double().cpu().numpy()
        total = odds.sum()
        p = odds / total if total > 0 else None  # all rows are alike: any will do
        rows.append(int(generator.choice(len(x), p=p)))
        nearest = torch.minimum(nearest, (x - x[rows[-1]]).square().sum(1))
    return x[rows].clone()


def lloyd(
    x: Tensor,
    clusters: int,
    generator: np.random.Generator,
    iterations: int = 20,
    begin: Tensor | None = None,
) -> Tensor:
    """Centroids of plain k-means, [K, P]; empty clusters get random rows.

    A start for the heads needs no better k-means, and this one runs wherever torch does.
    begin: centroids to begin from; default: rows (k-means++).
    """
    centroids = _seeds(x, clusters, generator) if begin is None else begin
    for _ in range(iterations):
        sums, counts = _cluster_sums(x, nearest_centroid(x, centroids), clusters)
        centroids = sums / counts.clamp_min(1).unsqueeze(1)
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            rows = generator.choice(len(x), len(empty))
            centroids[empty] = x[torch.from_numpy(rows).to(x.device)]
    return centroids
