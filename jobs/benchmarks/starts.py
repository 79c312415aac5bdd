"""What the first steps earn by themselves: the space that neighbors are searched in, and the
clusters that heads begin at.

Labels are looked at when a clustering is made. Shapes: N images, D features, P components,
M neighbors, K clusters.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.alone import settings
from benchmarks.peers import UMAP
from benchmarks.tables import markdown, spread
from icce_ray.config.schema import MethodConfig
from icce_ray.core import method, neighbors, projection
from icce_ray.core.constants import STATISTICS_ROWS
from icce_ray.core.device import default_device
from icce_ray.core.evaluation import truth
from icce_ray.core.evaluation.kmeans import kmeans_baseline
from icce_ray.core.heads import start
from icce_ray.core.heads.trainer import HeadTrainer
from icce_ray.core.neighbors import reference_k
from icce_ray.core.sampling import sample_rows, seed_of

RANK = 10  # the neighbor whose class is compared
RESTARTS = 3  # of k-means
ROUNDS = (2, 10, 30)  # of averaging, beside the default
Say = Callable[[str], None]
Scores = dict[str, Any]  # way, seed, and figures in %


# --- the space of the neighbors ------------------------------------------------------------------


def projections(x: np.ndarray, components: int) -> Iterator[tuple[str, projection.Projection]]:
    """Ways to scale the principal components of embeddings [N, D], by name."""
    rows = sample_rows(len(x), STATISTICS_ROWS, method.SEARCH_SEED)
    sample = torch.from_numpy(np.asarray(x[rows], np.float64))
    center = sample.mean(0)
    values, vectors = torch.linalg.eigh((sample - center).T @ (sample - center) / len(sample))
    deviation = values.flip(0)[:components].clamp_min(1e-12).sqrt()
    for name, power in (("as they are", 0.0), ("half whitened", 0.5), ("whitened", 1.0)):
        made = projection.Projection(x.shape[1], components)
        made.center.copy_(center)
        made.basis.copy_(vectors.flip(1)[:, :components] * deviation**-power)
        yield name, made
    own = projection.fit_projection(x, components, method.SEARCH_SEED)
    yield "whitened by neighbors (default)", own


def by_space(x: np.ndarray, codes: np.ndarray, seeds: Sequence[int], say: Say) -> list[Scores]:
    """What each space finds. float16 [N, D], unit rows; int [N], -1 for no label.

    `neighbor`: images whose neighbor of rank 10 is of their class; `kmeans` and `ward`: accuracy of
    clusters of images as they are, and of Ward's, of images averaged with their neighbors.
    """
    clusters, device, known = int(codes.max()) + 1, default_device(), codes >= 0
    chosen, found = settings(clusters), []
    for name, space in projections(x, min(chosen.neighbors.pca or x.shape[1], x.shape[1])):
        features = projection.project(x, space, device)
        matrix = features.cpu().numpy()
        ids, _ = neighbors.search(matrix, 0, len(x), RANK, device)
        same = float((codes[ids[:, RANK - 1]] == codes)[known].mean())
        near = reference_k(start.SMOOTHED, len(x), clusters, RANK)
        lists = torch.from_numpy(ids[:, :near].astype(np.int32))
        smooth = start.smoothed(features, lists, torch.full((len(x),), near)).float()
        for seed in seeds:
            plain = kmeans_baseline(matrix, clusters, seed, restarts=RESTARTS)
            ward = start.cluster_few(smooth, clusters, seed).cpu().numpy()
            accuracy = {
                "kmeans": 100 * truth.accuracy(codes[known], plain[known]),
                "ward": 100 * truth.accuracy(codes[known], ward[known]),
            }
            found.append({"way": name, "seed": seed, "neighbor": 100 * same, **accuracy})
            say(f"{name}, seed {seed}: {found[-1]}")
    return found


# --- the clusters that heads begin at ------------------------------------------------------------


def by_start(x: np.ndarray, codes: np.ndarray, seeds: Sequence[int], say: Say) -> list[Scores]:
    """What heads begin at and end with, the same steps for all. Arguments as of `by_space`.

    `first`: accuracy of the heads before training, in the mean; `heads`: after; and `consensus`.
    """
    clusters, device, known = int(codes.max()) + 1, default_device(), codes >= 0
    found = []
    for seed in seeds:
        # Every way has the steps of Ward's start, which few classes do not have by default.
        chosen = settings(clusters, {"start": "ward"}, seed)
        ids, similarity = method.search(x, chosen, device)
        counts = method.select(ids, similarity, chosen).counts
        data, _ = method.head_data(x, ids, counts, chosen, device)
        for name, begin in _starts(x, codes, data.features.float(), chosen):
            trainer = method.head_trainer(data, chosen)
            begin(trainer)
            first = trainer.assign()[known]
            for _ in range(trainer.steps):
                trainer.step(want_loss=False)
            heads = trainer.assign()
            merged = np.asarray(method.merge(heads, ids, chosen, device).labels)
            scores = {
                "first": _mean_accuracy(codes[known], first),
                "heads": _mean_accuracy(codes[known], heads[known]),
                "consensus": 100 * truth.accuracy(codes[known], merged[known]),
            }
            found.append({"way": name, "seed": seed, **scores})
            say(f"{name}, seed {seed}: {found[-1]}")
    return found


def _starts(
    x: np.ndarray, codes: np.ndarray, features: Tensor, chosen: MethodConfig
) -> Iterator[tuple[str, Callable[[HeadTrainer], None]]]:
    """Ways to give heads their first clusters. features: those that heads see, [N, P]."""
    clusters, seed = chosen.num_classes, chosen.seed
    ward = {f"Ward's, averaged {rounds} times": {"ROUNDS": rounds} for rounds in ROUNDS}
    ward |= {"Ward's, not evened": {"SHARED": 0.0}, "Ward's (default)": {"ROUNDS": start.ROUNDS}}
    for name, other in ward.items():
        yield name, lambda trainer, other=other: _ward(trainer, other)
    plain = settings(clusters, {"start": "kmeans"}, seed).heads
    yield "k-means", lambda trainer: _as_set(trainer, plain)
    if importlib.util.find_spec("umap") is not None:
        import umap
        from sklearn.cluster import KMeans

        for name, matrix in (("embeddings", np.asarray(x, np.float32)), ("components", features)):
            flat = umap.UMAP(random_state=seed, **UMAP).fit_transform(np.asarray(matrix))
            own = KMeans(clusters, n_init=10, random_state=seed).fit_predict(flat)
            yield (
                f"UMAP of the {name}, k-means",
                lambda trainer, to=own: _at(trainer, features, to),
            )
    if (codes >= 0).all():
        yield "the true classes", lambda trainer: _at(trainer, features, codes)


def _ward(trainer: HeadTrainer, other: dict[str, float]) -> None:
    with patch.multiple(start, **other):
        trainer.start()


def _as_set(trainer: HeadTrainer, chosen: Any) -> None:
    with patch.object(trainer, "settings", chosen):
        trainer.start()


def _at(trainer: HeadTrainer, features: Tensor, clusters: np.ndarray) -> None:
    """Centroids of these clusters, of another random half of the rows for each head."""
    own = torch.from_numpy(np.asarray(clusters, np.int64)).to(features.device)
    for position, number in enumerate(trainer.numbers):
        generator = np.random.default_rng(seed_of(trainer.seed, "start", number))
        half = np.sort(generator.choice(len(own), len(own) // 2, replace=False))
        rows = torch.from_numpy(half).to(features.device)
        means = start.cluster_means(features[rows], own[rows], trainer.clusters)
        for heads in (trainer.student, trainer.teacher):
            heads.last.weight.data[position] = means.T


def _mean_accuracy(codes: np.ndarray, heads: np.ndarray) -> float:
    return 100 * statistics.mean(truth.accuracy(codes, head) for head in heads.T)


# --- both ----------------------------------------------------------------------------------------


def table(found: Sequence[Scores]) -> str:
    """A line for each way: mean and deviation over the seeds, in %."""
    figures = [key for key in found[0] if key not in ("way", "seed")]
    lines = []
    for way in dict.fromkeys(one["way"] for one in found):
        mine = [one for one in found if one["way"] == way]
        lines.append([way, *(spread([one[key] for one in mine]) for key in figures)])
    return markdown(["way", *figures], lines)
