"""Other ways to cluster the same features: k-means, UMAP before k-means or HDBSCAN, and TURTLE.

UMAP is no dependency: `uv run --with umap-learn python jobs/benchmark.py peers ...`; without it,
its rows are left out. TURTLE takes long without a GPU, so its steps are given. TEMI is in pace.py.

Shapes: N images, D features, K classes.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.tables import markdown, spread
from benchmarks.turtle import turtle
from icce_ray import config as configs
from icce_ray.core import method
from icce_ray.core.evaluation import truth
from icce_ray.core.evaluation.kmeans import kmeans_baseline

UMAP = {"n_neighbors": 30, "n_components": 10, "metric": "cosine", "min_dist": 0.0}
Say = Callable[[str], None]


def compare(
    embeddings: np.ndarray,
    labels: np.ndarray,
    seeds: Sequence[int],
    overrides: Sequence[str],
    turtle_steps: int,
    say: Say,
) -> list[dict[str, Any]]:
    """Every method and seed: accuracy, NMI and ARI in %, and seconds. float16 [N, D], int [N].

    turtle_steps: 0 leaves TURTLE out.
    """
    classes = len(np.unique(labels))
    tree = {"num_classes": classes, "data": {"embeddings": "in memory"}}
    config = configs.load(tree, overrides)
    groups = ("neighbors", "heads", "consensus", "classifier")
    settings = {name: getattr(config, name).model_dump(exclude_unset=True) for name in groups}
    found = []
    for seed in seeds:
        for name, clusters, seconds in _all(embeddings, classes, seed, settings, turtle_steps):
            kept = clusters >= 0  # HDBSCAN leaves images out: each then is a cluster of its own
            named = np.where(kept, clusters, clusters.max() + 1 + np.arange(len(clusters)))
            scores = {key: 100 * value for key, value in truth.scores(labels, named).items()}
            found.append({"method": name, "seed": seed, "seconds": seconds, **scores})
            say(f"seed {seed}, {name}: {scores['acc']:.1f} % in {seconds:.0f} s")
    return found


def _all(
    x: np.ndarray, classes: int, seed: int, settings: dict[str, Any], turtle_steps: int
) -> Iterator[tuple[str, np.ndarray, float]]:
    began = time.perf_counter()
    ours = method.cluster(x, classes, seed=seed, **settings)
    yield "ours, consensus", ours.labels, time.perf_counter() - began
    yield "ours, classifier", ours.predict(x)[0], time.perf_counter() - began
    began = time.perf_counter()
    yield "k-means, 10 restarts", kmeans_baseline(x, classes, seed), time.perf_counter() - began
    if turtle_steps:
        began = time.perf_counter()
        clusters = turtle([x], classes, seed, turtle_steps)
        yield f"TURTLE, {turtle_steps:,} steps", clusters, time.perf_counter() - began
    if importlib.util.find_spec("umap") is None:
        return
    import umap
    from sklearn.cluster import HDBSCAN, KMeans

    began = time.perf_counter()
    flat = umap.UMAP(random_state=seed, **UMAP).fit_transform(np.asarray(x, np.float32))
    taken = time.perf_counter() - began
    for name, model in (
        ("UMAP, k-means", KMeans(classes, n_init=10, random_state=seed)),
        ("UMAP, HDBSCAN", HDBSCAN(min_cluster_size=max(5, len(x) // classes // 10))),
    ):
        began = time.perf_counter()
        yield name, model.fit_predict(flat), taken + time.perf_counter() - began


def table(found: list[dict[str, Any]]) -> str:
    """Mean and spread over the seeds."""
    rows = []
    for name in dict.fromkeys(one["method"] for one in found):
        mine = [one for one in found if one["method"] == name]
        rows.append(
            [
                name,
                *(spread([one[key] for one in mine]) for key in ("acc", "nmi", "ari", "seconds")),
            ]
        )
    return markdown(["method", "ACC", "NMI", "ARI", "s"], rows)
