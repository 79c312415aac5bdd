"""How many classes there are, where nobody knows: the number at which clusterings agree.

Clusterings of different parts of the images agree where their clusters are there in the data, and
differ where they cut through classes or join them as it happens (Ben-Hur, Elisseeff & Guyon 2002;
Lange et al. 2004). The clusterings are Ward's trees of images averaged with their neighbors, which
heads of many classes begin at: one tree holds the clusters of each number, so that all numbers
together take a minute.

Shapes: N images, D features, P components, T trees, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.signal import find_peaks

from icce_ray.config.loading import Range
from icce_ray.config.schema import MethodConfig
from icce_ray.core import neighbors, projection
from icce_ray.core.evaluation.truth import ari
from icce_ray.core.heads import start
from icce_ray.core.sampling import sample_rows
from icce_ray.errors import ConfigError

ROWS = 24_000  # images that all of it is done on
TREES = 8
TREE_ROWS = 6000  # images of each tree, at most half
COMPARED_ROWS = 4000  # images that the trees' clusters are compared on
SMALLEST = 12  # images per cluster: of fewer, averages with neighbors say little
MOST = 1500  # that `auto` tries
STEP = 1.07  # ratio of two numbers that are tried, above those where it is below 1
PROMINENCE = 0.05  # that a peak has above the numbers around it: less is noise
BASIN = 0.1  # below a peak, numbers are no part of it any more
PLATEAU = 0.02  # below a peak, numbers agree as well: the smallest of them is taken

OnTree = Callable[[int, int], None]


@dataclass(frozen=True)
class NumClasses:
    """A number of classes and what speaks for it."""

    best: int
    low: int  # it may be this number as well, ...
    high: int  # ... or this one
    tried: list[int]
    agreement: list[float]  # of the trees, for each number: median adjusted Rand index of two


def _no_progress(done: int, total: int) -> None: ...


def estimate(
    embeddings: np.ndarray,
    between: Range,
    settings: MethodConfig,
    on_tree: OnTree = _no_progress,
) -> NumClasses:
    """The number of clusters in a range on which Ward's trees agree.

    Where trees agree on a coarse grouping and again, after numbers on which they do not, on a finer
    one, the finer one is taken. The classes that features show are not always those that people
    name: jobs/benchmarks/README.md has how close it comes.

    embeddings: float16 [N, D], unit rows. settings: num_classes is not looked at. on_tree: called
    with the number of trees that are made, and of all.

    Raises ConfigError: so few images that no number in the range can be judged.
    """
    rows = sample_rows(len(embeddings), ROWS, settings.seed)
    low, high = between
    limits = [MOST if high is None else high, settings.heads.clusters or MOST]
    tried = numbers(low, min(*limits, len(rows) // SMALLEST))
    if not tried:
        raise ConfigError(
            f"no number of classes from {low} on can be judged from {len(rows):,} images: "
            f"{SMALLEST} for each class are needed. Give num_classes, or more images"
        )
    sample = np.asarray(embeddings[rows])
    agreement = _agreement(_smoothed(sample, settings), tried, settings.seed, on_tree)
    best, least, most = judge(np.array(agreement))
    return NumClasses(tried[best], tried[least], tried[most], tried, agreement)


def numbers(low: int, high: int) -> list[int]:
    """The numbers of clusters that are tried from `low` to `high`, evenly by ratio."""
    if high < low:
        return []
    steps = max(1, math.ceil(math.log(high / low) / math.log(STEP)))
    return sorted({round(number) for number in np.geomspace(low, high, steps + 1)})


def judge(agreement: np.ndarray) -> tuple[int, int, int]:
    """Which of the numbers is best, and between which it lies, by their places.

    agreement: of each number, in rising order. The last peak that stands out is taken, and of the
    numbers that agree as well as it the smallest; of those that agree in full the largest, as fewer
    clusters join what is apart.
    """
    padded = np.concatenate([[-1.0], agreement, [-1.0]])
    peaks, _ = find_peaks(padded, prominence=PROMINENCE)
    peak = int(peaks[-1]) - 1 if len(peaks) else int(agreement.argmax())
    low = _end(agreement, peak, -1, BASIN)
    part = np.arange(low, _end(agreement, peak, 1, BASIN) + 1)
    full = part[agreement[part] == 1]
    near = part[agreement[part] >= agreement[peak] - PLATEAU]
    best = int(full[-1] if len(full) else near[0])
    return best, low, max(best, _end(agreement, peak, 1, PLATEAU))


def _end(agreement: np.ndarray, peak: int, step: int, drop: float) -> int:
    """The last place in one direction from a peak before the agreement is lower by `drop`."""
    place = peak
    while 0 <= place + step < len(agreement) and agreement[place + step] >= agreement[peak] - drop:
        place += step
    return place


def _smoothed(embeddings: np.ndarray, settings: MethodConfig) -> torch.Tensor:
    """The components of the images, averaged with their neighbors: float32 [N, P]."""
    cpu = torch.device("cpu")
    seen = projection.fit_projection(embeddings, settings.heads.pca, settings.seed)
    features = projection.project(embeddings, seen, cpu)
    most = min(start.SMOOTHED, len(embeddings) - 1)
    ids, _ = neighbors.search(features.numpy(), 0, len(embeddings), most, cpu)
    counts = torch.full((len(ids),), most)
    return start.smoothed(features, torch.from_numpy(ids), counts).float()


def _agreement(smooth: torch.Tensor, tried: list[int], seed: int, on_tree: OnTree) -> list[float]:
    """Median adjusted Rand index of two trees' clusters, for each number of them.

    smooth: float32 [N, P]. Each tree is of other images and components.
    """
    compared = smooth[torch.from_numpy(sample_rows(len(smooth), COMPARED_ROWS, seed))]
    labels = np.empty((len(tried), TREES, len(compared)), dtype=np.int32)
    for number in range(TREES):
        generator = np.random.default_rng([seed, number])
        tree = start.WardTree(smooth, min(len(smooth) // 2, TREE_ROWS), generator)
        for place, clusters in enumerate(tried):
            centroids = tree.centroids(clusters)
            labels[place, number] = start.nearest_centroid(compared, centroids).numpy()
        on_tree(number + 1, TREES)
    pairs = [(i, j) for i in range(TREES) for j in range(i)]
    # One cluster agrees with one cluster, and says nothing: all images are the same.
    apart = (labels != labels[:, :, :1]).any(2).all(1)
    return [
        float(np.median([ari(each[i], each[j]) for i, j in pairs])) if split else 0.0
        for each, split in zip(labels, apart, strict=True)
    ]
