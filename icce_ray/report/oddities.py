"""What stands apart: groups of images that show the same, and images unlike all others.

Shapes: N images.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from icce_ray.report.facts import RunFacts
from icce_ray.report.galleries import Galleries

GROUPS, PER_GROUP = 12, 8  # groups of duplicates shown, and images of each
OUTLIERS = 24  # images shown
SHARE = 0.1  # of the page's budget that these images may take


def groups(first: np.ndarray) -> list[np.ndarray]:
    """Rows of each group of duplicates, the largest first. first: int [N], see core.duplicates."""
    sizes = np.bincount(first, minlength=len(first))
    order = np.argsort(first, kind="stable")  # rows of a group side by side, in their order
    stops = np.cumsum(sizes)
    heads = np.flatnonzero(sizes > 1)
    heads = heads[np.argsort(-sizes[heads], kind="stable")]
    return [order[stops[head] - sizes[head] : stops[head]] for head in heads[:GROUPS]]


def outliers(outlier: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Rows of the highest scores, the highest first, each group of duplicates once."""
    order = np.argsort(-outlier, kind="stable")
    return order[first[order] == order][:OUTLIERS]


def sections(facts: RunFacts, galleries: Galleries) -> dict[str, Any]:
    """Variables of the template, of images that fit a share of the galleries' budget."""
    if facts.first is None or facts.outlier is None:
        return {"duplicates": None, "outliers": []}
    found = groups(facts.first)
    shown = [rows[:PER_GROUP] for rows in found]
    apart = outliers(facts.outlier, facts.first)
    images = galleries.beside(np.concatenate([*shown, apart]).astype(np.int64), SHARE)
    cards = [
        {
            "count": len(rows),
            "clusters": np.unique(facts.clusters[rows]).tolist(),
            "images": [images[int(row)] for row in some if int(row) in images],
        }
        for rows, some in zip(found, shown, strict=True)
    ]
    repeats = int((facts.first != np.arange(len(facts.first))).sum())
    duplicates = {"repeats": repeats, "groups": [card for card in cards if card["images"]]}
    return {
        "duplicates": duplicates if repeats else None,
        "outliers": [images[int(row)] for row in apart if int(row) in images],
    }
