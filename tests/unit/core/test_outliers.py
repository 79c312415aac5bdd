"""Percentiles of distances against loops over images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.core import outliers as core

CPU = torch.device("cpu")


def unit_rows(rows: int, features: int = 8, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, features))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 15), st.integers(0, 99), st.sampled_from([1, 7, 99]))
def test_outlier_score_is_the_share_of_images_with_nearer_neighbors(
    rows: int, most: int, seed: int, chunk: int
) -> None:
    values = np.random.default_rng(seed).integers(0, 5, (rows, most)) / 4
    similarity = -np.sort(-values, axis=1).astype(np.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "CHUNK", chunk)
        found = core.outlier_scores(similarity)
    mean = [np.mean(row[: core.NEAREST].astype(np.float32)) for row in similarity]
    nearer = [sum(other > own for other in mean) / max(1, rows - 1) for own in mean]
    np.testing.assert_allclose(found, nearer, atol=1e-6)
    assert found.min() >= 0 and found.max() <= 1


def test_one_image_far_from_all_has_the_score_one() -> None:
    similarity = np.full((50, 20), 0.8, np.float16)
    similarity[13] = 0.1
    similarity[13, 0] = 1.0  # a copy of it does not make it usual
    scores = core.outlier_scores(similarity)
    assert scores[13] == 1 and np.delete(scores, 13).max() == 0


def test_novelty_is_the_share_of_the_runs_images_that_lie_nearer() -> None:
    rows, new = unit_rows(60), unit_rows(20, seed=1)
    reference = core.make_reference(rows, 0, CPU)
    found = core.novelty(reference, torch.from_numpy(new))
    x = rows.astype(np.float64)

    def distance(one: np.ndarray, others: np.ndarray) -> float:
        return float(np.mean(np.sort(1 - others @ one)[: core.NEAREST]))

    own = [distance(x[i], np.delete(x, i, 0)) for i in range(60)]
    for score, one in zip(found.tolist(), new.astype(np.float64), strict=True):
        assert score == pytest.approx(np.mean([d < distance(one, x) for d in own]), abs=1e-6)


def test_images_of_another_kind_are_new_and_those_of_the_same_are_not() -> None:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, 32))

    def images(kinds: list[int], count: int) -> np.ndarray:
        x = centers[np.array(kinds)[np.arange(count) % len(kinds)]]
        x = x + 0.3 * rng.normal(size=(count, 32))
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)

    reference = core.make_reference(images([0, 1, 2], 600), 0, CPU)
    assert core.novelty(reference, torch.from_numpy(images([3], 50))).min() > 0.99
    usual = core.novelty(reference, torch.from_numpy(images([0, 1, 2], 300)))
    assert 0.4 < usual.mean() < 0.6  # percentiles of images of the run


def test_a_reference_survives_its_file_and_a_run_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "REFERENCES", 30)
    reference = core.make_reference(unit_rows(80), 3, CPU)
    assert len(reference.rows) == len(reference.distances) == 30
    again = core.Reference.of(reference.tensors(), CPU)
    new = torch.from_numpy(unit_rows(9, seed=4))
    assert torch.equal(core.novelty(again, new), core.novelty(reference, new))
    with pytest.raises(KeyError):
        core.Reference.of({"rows": reference.rows}, CPU)
    two = core.make_reference(unit_rows(2), 0, CPU)
    assert core.novelty(two, new).shape == (9,)
