"""Numbers of the method that fingerprints and plans need, apart from what computes with them.

Importing them costs nothing, so that a command that only looks at a run imports no torch.
Shapes: N images, D features, K clusters.
"""

from __future__ import annotations

import math

EVIDENCE = 1.9  # neighbors of each that count as independent witnesses; see core.evaluation
CONFIDENCE_NEIGHBORS = 20  # of each image that its confidence reads, fewer where classes are small,
CONFIDENCE_WIDE = 0.5  # ... and as many as this share of its cluster, if so many are known

QUERY_CHUNK = 2048  # rows of exact search that are compared at a time ...
BASE_CHUNK = 65_536  # ... with that many others, on a CPU as float32; similarities: 512 MB
STATISTICS_ROWS = 20_000  # rows that principal components are fitted on ...
COMPARED_ROWS = 1000  # ... of which that many at a time are compared with all of them
IVF_SAMPLE_PER_LIST = 64  # rows per inverted list that its centroids are trained on

# Exact search takes 2 N^2 D operations.
EXACT_SECONDS = 3600.0  # neighbors.search=auto: exact search where it is expected to take less
CPU_FLOPS = 5e10  # float32 per core and second, as measured
GPU_FLOPS = 2e13  # float32 per GPU and second, a cautious figure

FITTED_ROWS = 200_000  # images that a consensus model is fitted on; it is then applied to all
START_ROWS = 20_000  # rows that heads' first clusters are made on, or 50 per cluster
TREE_ROWS = 6000  # of these, rows that a tree is made of: 2 s on one core; or ...
TREE_ROWS_PER_CLUSTER = 3  # ... that many per cluster
REFERENCES = 10_000  # images of a run that new ones are compared with, at most
CALIBRATED_ROWS = 10_000  # that the calibration of a classifier looks at

HIDDEN = 512  # width of the hidden layer of classifier.kind=mlp
SCORED_ROWS = 16_384  # images that a consensus model is applied to at once, by each thread
CSPA_ROWS = 10_000  # CSPA's graph has up to N^2 edges; at this N they take a few GB

SHUFFLE_BATCHES = 8  # batches in a fine-tuning worker's buffer; rows are permuted once before


def default_start(clusters: int) -> str:
    """What linear heads begin with where the settings leave it open: heads.start.

    With 10 clusters, k-means ends in many different places, of which the ensemble keeps the best.
    The more clusters, the more of them k-means puts wrong, in each head others.
    """
    return "kmeans" if clusters <= 15 else "ward"


def default_balances(start: str) -> tuple[float, ...]:
    """How far heads even out the sizes of clusters where the settings leave it open.

    Ward's clusters have about the sizes of the classes, and no balance was better than to keep
    them. k-means makes sizes alike, so that heads of several balances are tried.
    """
    return (0.0,) if start == "ward" else (0.5, 0.25, 0.0)


def default_heads(start: str) -> int:
    """Heads where the settings name no number, by what they begin with: 8 of each balance. Those
    that begin at Ward's clusters end alike, and 8 do what 24 did."""
    return 8 if start == "ward" else 24


def default_steps(clusters: int, start: str) -> int:
    """Steps of the heads where the settings name none, by what heads begin with.

    From Ward's clusters of 62 to 242 classes, 75 to 150 steps reach what 300 and 600 do; batches
    hold 8 pairs per cluster there, and fewer from 512 clusters on, so that it takes more of them.
    From k-means of 10 clusters, 500 do what 2,000 did, but 400 sometimes not. How a random start
    grows with the clusters is a guess.
    """
    if start == "ward":
        return max(150, round(0.3 * clusters))
    return 1000 if start == "kmeans" else round(2000 * max(1.0, clusters / 10) ** 0.4)


def default_batch(clusters: int) -> int:
    """Pairs per step where the settings name none: 8 per cluster, within bounds.

    The losses hold several arrays [H, 2B, K]: with 50 heads and 1,000 clusters, 1.6 GB each.
    """
    return min(4096, max(1024, 8 * clusters))


def ivf_shape(rows: int) -> tuple[int, int]:
    """Inverted lists, about 4 sqrt(N), and the rows that their centroids are trained on."""
    lists = max(1, min(int(4 * math.sqrt(rows)), rows // IVF_SAMPLE_PER_LIST))
    return lists, min(rows, lists * IVF_SAMPLE_PER_LIST)


def ivf_bytes(rows: int, features: int) -> float:
    """Memory while an index of N rows is built: of the rows that its lists are trained on, float16
    and float32; then of the lists, which grow by doubling, and of the rows to be added."""
    trained = 6.0 * ivf_shape(rows)[1] * features
    lists = 1.4 * rows * (2.0 * features + 8)
    return max(trained, lists + 4.0 * min(rows, BASE_CHUNK) * features)


def exact_seconds(rows: int, features: int, cpus: int, gpus: int) -> float:
    """Expected seconds of exact search: 2 N^2 D operations."""
    rate = gpus * GPU_FLOPS if gpus else max(1, cpus) * CPU_FLOPS
    return 2.0 * rows**2 * features / rate


def is_approximate(search: str, exact: float) -> bool:
    """Whether neighbors.search means the approximate one, where exact takes `exact` seconds."""
    return search == "ivf" or (search == "auto" and exact > EXACT_SECONDS)
