"""The map of the images: which ones it shows, where they are, and what is known of them.

Shapes: N images, P points.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from icce_ray.core import layout
from icce_ray.core.sampling import sample_rows
from icce_ray.errors import printable
from icce_ray.report.facts import RunFacts
from icce_ray.report.galleries import Galleries
from icce_ray.report.thumbnails import places_of
from icce_ray.rundir.directory import RunDirectory

MOST = 2000  # points: their places take about 3 s on one core
SHARE = 0.05  # of the page's size that they may take ...
PER_POINT = 100  # ... at this many bytes each, roughly


def points(facts: RunFacts, files: RunDirectory, galleries: Galleries) -> list[list[Any]]:
    """x and y in 0..999, cluster, confidence, second choice, page and address of each point; none
    where there are too few images."""
    most = int(min(MOST, SHARE * facts.config.report.max_megabytes * 1e6 / PER_POINT))
    total = len(facts.clusters)
    if min(total, most) < layout.FEWEST:
        return []
    rows = _rows(total, most, sorted(galleries.images), facts.config.seed)
    place = np.round(_places(facts, files, rows) * 999).astype(int)
    return [
        [
            *xy,
            facts.clusters[row],
            f"{facts.confidence[row]:.0%}",
            "-" if facts.second is None or facts.second[row] < 0 else facts.second[row],
            galleries.pages.link(facts.clusters[row], row) if galleries.pages else "-",
            printable(where["uri"][len(facts.root) :]),
        ]
        for row, xy, where in zip(rows, place.tolist(), places_of(facts, rows), strict=True)
    ]


def _rows(total: int, most: int, shown: list[int], seed: int) -> np.ndarray:
    """All images, or some drawn at random: up to half of them of those that the page shows, so that
    a click on a point finds a picture."""
    if total <= most:
        return np.arange(total)
    some = np.array(shown, dtype=np.int64)[sample_rows(len(shown), most // 2, seed)]
    others = np.setdiff1d(np.arange(total), some, assume_unique=True)
    return np.union1d(some, others[sample_rows(len(others), most - len(some), seed)])


def _places(facts: RunFacts, files: RunDirectory, rows: np.ndarray) -> np.ndarray:
    """By the run's own neighbor lists, where the map shows all images: float32 [P, 2]."""
    embeddings, seed = files.matrix("embeddings", "embedding"), facts.config.seed
    some = np.asarray(embeddings[rows])
    if len(rows) == len(embeddings):
        ids, similarity = (files.matrix("neighbors", name) for name in ("ids", "similarity"))
        return layout.coordinates(ids, similarity, some, seed)
    components = facts.config.neighbors.pca
    ids, similarity = layout.neighbors_of_sample(some, components, seed)
    return layout.coordinates(ids, similarity, some, seed)
