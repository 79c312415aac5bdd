"""Galleries: which images of each cluster the page of a run shows, within a budget.

Shapes: N images, K clusters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from icce_ray.report.browse import Pages
from icce_ray.report.facts import RunFacts
from icce_ray.report.pages import tail
from icce_ray.report.thumbnails import places_of, thumbnails

SIDE = 72  # of a thumbnail as the page shows it, pixels
SIDE_MIN = 44  # pixels; smaller thumbnails show nothing
LARGE = 192  # pixels of a thumbnail, for the larger view, where few images are shown ...
LARGE_SHARE = 0.2  # ... so that they take this share of the page's budget at most
PER_PIXEL = 0.3  # bytes of a thumbnail, roughly; what is shown is measured
PER_IMAGE = 270  # bytes of markup around a thumbnail, generously
READ = 512  # images whose encoded bytes are in memory at once


def choose(
    clusters: np.ndarray, confidence: np.ndarray, num_clusters: int, sure: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of each cluster's `sure` most confident images, and half as many of its least confident.

    clusters: int [N]. confidence: float [N]. The second kind starts at the lowest confidence. Ties
    are broken at random, not by file name. No row is in both.
    """
    ties = np.random.default_rng(seed).random(len(clusters))
    order = np.lexsort((ties, -confidence, clusters))
    bounds = np.searchsorted(clusters[order], np.arange(num_clusters + 1))
    picks = []
    for start, stop in itertools.pairwise(bounds):
        rows = order[start:stop]
        rest = rows[sure:]
        picks.append((rows[:sure], rest[len(rest) - min(len(rest), sure // 2) :][::-1]))
    return picks


@dataclass
class Galleries:
    """Thumbnails that fit the page's budget.

    They are added rank by rank: the first image of every cluster, then the second of every cluster.
    So all clusters show equally many, whatever the number of clusters.
    """

    facts: RunFacts
    listed: Sequence[int]  # clusters
    budget: float  # bytes
    earlier: Callable[[], Mapping[str, str]] = dict  # see earlier.shown; asked for when needed
    pages: Pages | None = None  # where all images of a cluster are
    images: dict[int, dict[str, Any]] = field(default_factory=dict)  # shown ones, by row
    apart: dict[int, dict[str, Any]] = field(default_factory=dict)  # shown outside of clusters
    ranks: list[np.ndarray] = field(default_factory=list)  # rows shown, one array per rank
    pixels: int = SIDE  # side of a thumbnail

    def __post_init__(self) -> None:
        picks = choose(
            self.facts.clusters,
            self.facts.confidence,
            self.facts.num_clusters,
            self.facts.config.report.images_per_cluster,
            self.facts.config.seed,
        )
        self.picks = {cluster: picks[cluster] for cluster in self.listed}
        shown = 2 * len(self.listed) * self.facts.config.report.images_per_cluster + 1
        large = math.sqrt(LARGE_SHARE * max(0.0, self.budget) / (shown * PER_PIXEL))
        self.pixels = int(np.clip(large, SIDE, LARGE))

    @property
    def side(self) -> int:
        """Of a thumbnail as the page shows it, pixels."""
        return min(SIDE, self.pixels)

    @property
    def count(self) -> int:
        """Thumbnails shown; a name that stands for an unreadable image is none."""
        return sum(image["src"] is not None for image in self.images.values())

    @property
    def lost(self) -> tuple[int, int]:
        """Images shown whose files can no longer be read: how many, and how many of them have the
        thumbnail of an earlier report."""
        lost = {r: i for part in (self.apart, self.images) for r, i in part.items() if i["lost"]}
        return len(lost), sum(image["src"] is not None for image in lost.values())

    @cached_property
    def _kept(self) -> Mapping[str, str]:
        return self.earlier()

    def beside(self, rows: np.ndarray, share: float) -> dict[int, dict[str, Any]]:
        """Images shown apart from the clusters', by row: the first ones that fit a share of the
        budget, which they take from it."""
        rows = rows[: max(0, int(share * self.budget / PER_IMAGE))]
        made = self._read(np.unique(rows))
        left, kept = share * self.budget, {}
        for row in dict.fromkeys(rows.tolist()):
            left -= _weight(made[row])
            if left < 0:
                break
            kept[row] = made[row]
            self.budget -= _weight(made[row])
        self.apart |= kept
        return kept

    def fill(self) -> None:
        """Read, shrink and add images while they fit."""
        waiting = self._expected(list(self._by_rank()))
        if not waiting:
            return
        made = self._read(np.sort(np.concatenate(waiting)))
        for rows in waiting:
            batch = {int(row): made[int(row)] for row in rows}
            cost = sum(_weight(image) for image in batch.values())
            if cost > self.budget:
                return
            self.budget -= cost
            self.images |= batch
            self.ranks.append(rows)

    def drop(self) -> bool:
        """Give up the last rank. False where there is none left."""
        if not self.ranks:
            return False
        for row in self.ranks.pop():
            del self.images[int(row)]
        return True

    def of(self, cluster: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Shown images of a cluster: the most and the least confident ones."""
        sure, unsure = (
            [self.images[int(row)] for row in rows if int(row) in self.images]
            for rows in self.picks[cluster]
        )
        return sure, unsure

    def _by_rank(self) -> Iterator[np.ndarray]:
        """The first image of all clusters, then the second, and so on: two confident ones, then one
        of low confidence."""
        most = self.facts.config.report.images_per_cluster
        for rank in range(most):
            turns = [(0, rank)] + ([(1, rank // 2)] if rank % 2 else [])
            for kind, place in turns:
                rows = [
                    pick[kind][place] for pick in self.picks.values() if len(pick[kind]) > place
                ]
                if rows:
                    yield np.array(rows)

    def _expected(self, waiting: list[np.ndarray]) -> list[np.ndarray]:
        """The ranks that should fit, estimated from a sample. Thumbnails are made smaller where
        fewer than 9 full ones per cluster would fit."""
        if not waiting or self.budget <= 0:
            return []
        sample = waiting[0][:: max(1, len(waiting[0]) // 32)]
        each = float(np.mean([_weight(image) for image in self._read(np.sort(sample)).values()]))
        share = self.budget / (each * sum(len(rows) for rows in waiting[:9]))
        full = self.pixels
        self.pixels = int(np.clip(full * min(1.0, share**0.7), SIDE_MIN, full))
        each *= (self.pixels / full) ** 1.3
        total = np.cumsum([len(rows) for rows in waiting])
        return waiting[: int(np.searchsorted(total, 1.15 * self.budget / each, side="right"))]

    def _read(self, rows: np.ndarray) -> dict[int, dict[str, Any]]:
        """Thumbnails of these rows, in ascending order: a tar or a Parquet row group holds
        neighboring images and is then read once."""
        made: dict[int, dict[str, Any]] = {}
        facts = self.facts
        for start in range(0, len(rows), READ):
            part = rows[start : start + READ]
            places = places_of(facts, part)
            sources = thumbnails(facts.config, places, self.pixels, facts.levels)
            for row, place, source in zip(part, places, sources, strict=True):
                made[int(row)] = self._image(int(row), place, source)
        return made

    def _image(self, row: int, place: dict[str, Any], source: str | None) -> dict[str, Any]:
        facts = self.facts
        code = -1 if facts.codes is None else int(facts.codes[row])
        label = facts.class_name(code)
        cluster = int(facts.clusters[row])
        lost = source is None and not facts.config.data.embeddings
        return {
            "src": self._kept.get(place["uri"]) if lost else source,
            "lost": lost,
            "rest": place["uri"][len(facts.root) :],
            "name": tail(place["uri"]),
            "link": self.pages.link(cluster, row) if self.pages else "",
            "cluster": cluster,
            "second": None if facts.second is None else int(facts.second[row]),
            "confidence": float(facts.confidence[row]),
            "label": label,
            "wrong": code >= 0 and code != facts.table["matched"][cluster],
        }


def _weight(image: dict[str, Any]) -> int:
    """Bytes an image takes in the page: its name appears twice, and may grow when escaped."""
    text = 2 * len(image["name"]) + 2 * len(image["label"]) + len(image["rest"])
    return PER_IMAGE + len(image["src"] or "") + text
