"""Duplicates against plain loops over all pairs of the lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.core import duplicates as core
from icce_ray.core import neighbors


def unit_rows(rows: int, features: int = 24, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, features))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def slow(embeddings: np.ndarray, ids: np.ndarray, threshold: float) -> list[int]:
    """The first row of each row's group, by merging sets."""
    x, compared = embeddings.astype(np.float64), min(core.COMPARED, ids.shape[1])
    groups = [{row} for row in range(len(x))]
    for a in range(len(x)):
        for b in range(len(x)):
            listed = b in ids[a, :compared]
            if np.array_equal(x[a], x[b]) or (listed and np.linalg.norm(x[a] - x[b]) <= threshold):
                union = groups[a] | groups[b]
                for row in union:
                    groups[row] = union
    return [min(group) for group in groups]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 40), st.integers(1, 12), st.integers(0, 99), st.sampled_from([1, 300, 1 << 23])
)
def test_groups_are_those_of_plain_loops(rows: int, most: int, seed: int, block: int) -> None:
    """Rows of few directions, some of them copies, some a little moved, in blocks of any size."""
    rng = np.random.default_rng(seed)
    base = unit_rows(max(2, rows // 2), 6, seed).astype(np.float64)
    x = base[rng.integers(0, len(base), rows)] + rng.choice([0, 0.02, 0.3], (rows, 1)) * (
        rng.normal(size=(rows, 6))
    )
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    ids, _ = neighbors.search(x, 0, rows, min(most, rows - 1))
    whole = core.find(x, ids, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "BLOCK", block)
        found = core.find(x, ids, seed)
    assert found.threshold == whole.threshold >= core.ROUNDING
    assert found.first.tolist() == slow(x, ids, found.threshold)
    assert found.later.sum() == rows - len(set(found.first.tolist()))


def test_images_that_differ_are_no_duplicates() -> None:
    x = unit_rows(500)
    ids, _ = neighbors.search(x, 0, 500, 20)
    assert not core.find(x, ids, 0).later.any()


@pytest.mark.parametrize("features", [3, 5, 8])
def test_points_of_few_dimensions_are_no_duplicates(features: int) -> None:
    """There, many lie within any fixed share of a typical distance."""
    x = unit_rows(2000, features)
    ids, _ = neighbors.search(x, 0, 2000, 20)
    typical = np.median(np.linalg.norm(x.astype(np.float32) - x[ids[:, 9]], axis=1))
    nearest = np.linalg.norm(x.astype(np.float32) - x[ids[:, 0]], axis=1)
    assert (nearest < core.NEAR * typical).mean() > 0.01
    assert core.find(x, ids, 0).later.mean() < 0.006


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_a_little_noise_is_found_whatever_the_scale_of_distances(scale: float) -> None:
    """A backbone whose features all point about one way makes all distances small."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 24)) * scale + np.eye(24)[0] * (scale < 1) * 24**0.5
    x[290:] = x[:10] + 0.1 * scale * rng.normal(size=(10, 24))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    ids, _ = neighbors.search(x, 0, 300, 20)
    found = core.find(x, ids, 0)
    assert found.first.tolist() == [*range(290), *range(10)]


def test_copies_beyond_all_lists_are_one_group() -> None:
    x = unit_rows(200)
    x[50:150] = x[7]
    ids = (np.arange(200)[:, None] + np.arange(1, 4)) % 200  # lists that miss most of the copies
    expected = np.arange(200)
    expected[50:150] = 7
    assert core.find(x, ids.astype(np.int32), 0).first.tolist() == expected.tolist()
