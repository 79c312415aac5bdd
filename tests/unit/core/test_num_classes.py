"""How many classes there are, on blobs whose number is known, and the rule on curves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import icce_ray
from icce_ray.config.schema import MethodConfig
from icce_ray.core import num_classes
from icce_ray.core.unit_rows import unit_rows
from icce_ray.errors import ConfigError

SETTINGS = MethodConfig(num_classes=2)


def groups(classes: int, each: int, groups_of: int = 1, noise: float = 0.25) -> np.ndarray:
    """Rows of some classes, which lie together in groups, float16 [N, 32]."""
    rng = np.random.default_rng(0)
    above = np.repeat(rng.normal(size=(classes // groups_of, 32)), groups_of, axis=0)
    centers = above * (groups_of > 1) * 1.5 + rng.normal(size=(classes, 32))
    rows = np.repeat(centers, each, axis=0) + noise * rng.normal(size=(classes * each, 32))
    return unit_rows(rows)


@pytest.mark.parametrize("classes", [3, 8, 18])
def test_the_number_of_blobs_is_found(classes: int) -> None:
    found = num_classes.estimate(groups(classes, 120), (2, None), SETTINGS)
    assert found.best == classes and found.low <= classes <= found.high
    assert found.tried[0] == 2 and len(found.tried) == len(found.agreement)
    assert max(found.agreement) > 0.95


def test_classes_within_groups_are_counted_rather_than_the_groups() -> None:
    found = num_classes.estimate(groups(16, 100, groups_of=4), (2, None), SETTINGS)
    assert found.best == 16


def test_the_same_seed_gives_the_same_and_progress_is_told() -> None:
    x, done = groups(5, 40), []
    first = num_classes.estimate(x, (2, 30), SETTINGS, lambda *two: done.append(two))
    assert first == num_classes.estimate(x, (2, 30), SETTINGS)
    assert done == [(count, num_classes.TREES) for count in range(1, num_classes.TREES + 1)]


def test_heads_of_few_clusters_bound_the_number() -> None:
    few = MethodConfig(num_classes=2, heads={"clusters": 5}, consensus={"method": "mcla"})
    assert max(num_classes.estimate(groups(8, 60), (2, None), few).tried) == 5


def test_copies_of_one_image_agree_on_nothing() -> None:
    found = num_classes.estimate(unit_rows(np.ones((300, 8))), (2, None), SETTINGS)
    assert set(found.agreement) == {0.0} and found.best == 2


def test_too_few_images_are_an_error() -> None:
    with pytest.raises(ConfigError, match="from 50 on can be judged from 300 images: 12 for each"):
        num_classes.estimate(groups(3, 100), (50, 200), SETTINGS)


@pytest.mark.parametrize(("low", "high"), [(2, 2), (2, 30), (50, 200), (2, 1500)])
def test_numbers_are_even_by_ratio(low: int, high: int) -> None:
    tried = num_classes.numbers(low, high)
    assert tried[0] == low and tried[-1] == high and tried == sorted(set(tried))
    assert all(b - a == 1 or b - a == 2 or b / a < 1.1 for a, b in pairwise(tried))
    assert num_classes.numbers(high + 1, high) == []


@pytest.mark.parametrize(
    ("agreement", "places"),
    [
        ([0.2, 0.5, 0.9, 0.7, 0.6], (2, 2, 2)),  # one peak
        ([0.98, 0.5, 0.6, 0.97, 0.8], (3, 3, 3)),  # a coarse grouping, then the classes
        ([0.5, 0.95, 0.94, 0.965, 0.92, 0.7], (1, 1, 3)),  # a plateau: its smallest number
        ([0.97, 0.9, 0.92, 0.9, 0.91], (0, 0, 0)),  # what comes after is noise
        ([0.5, 0.88, 0.97, 0.96, 0.8], (2, 1, 3)),  # the number before fits almost as well
        ([0.2, 0.5, 0.8], (2, 2, 2)),  # still rising at the end of the range
        ([0.7], (0, 0, 0)),
        ([1.0, 1.0, 0.6, 0.5], (1, 0, 1)),  # 3 blobs, of which the nearest two make one as well
    ],
)
def test_the_last_peak_that_stands_out_is_taken(
    agreement: list[float], places: tuple[int, int, int]
) -> None:
    assert num_classes.judge(np.array(agreement)) == places


def test_the_method_in_memory_estimates_the_number_too() -> None:
    x = groups(6, 120)
    parts: set[str] = set()
    found = icce_ray.cluster(
        x,
        "auto",
        heads={"steps": 20, "count": 4},
        classifier={"epochs": 1},
        progress=lambda part, *_: parts.add(part),
    )
    assert len(set(found.labels)) == 6 and "classes" in parts
    with pytest.raises(ConfigError, match="range goes from 2"):
        icce_ray.cluster(x, "9-4")
