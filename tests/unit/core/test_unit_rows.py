"""Embeddings of every kind become unit rows; bad ones are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from icce_ray.core import unit_rows as core
from icce_ray.core.unit_rows import unit_rows
from icce_ray.errors import DataError


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return 7 * np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)


def test_rows_have_length_one_and_keep_their_direction(rows: np.ndarray) -> None:
    found = unit_rows(rows)
    assert found.dtype == np.float16
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=1e-3)


def test_every_kind_of_array_gives_the_same(rows: np.ndarray, tmp_path: Path) -> None:
    expected = unit_rows(rows)
    np.save(tmp_path / "x.npy", rows)
    for given in (
        rows.astype(np.float64),
        np.asfortranarray(rows),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        torch.from_numpy(rows).requires_grad_(),
        rows.tolist(),
    ):
        assert (unit_rows(given) == expected).all()
    for coarse in (rows.astype(np.float16), torch.from_numpy(rows).bfloat16()):
        np.testing.assert_allclose(unit_rows(coarse), expected, atol=1e-2)
    assert (unit_rows(np.arange(1, 7).reshape(2, 3)) > 0).all()


def test_unit_rows_stay_what_they_are(rows: np.ndarray) -> None:
    once = unit_rows(rows)
    np.testing.assert_allclose(unit_rows(once), once, atol=1e-3)


def test_rows_in_pieces_are_those_of_the_whole(
    rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = unit_rows(rows)
    monkeypatch.setattr(core, "BLOCK_ROWS", 7)
    assert (unit_rows(rows) == expected).all()
    bad = rows.copy()
    bad[[3, 20, 48]] = 0
    with pytest.raises(DataError, match=r"3 rows .*rows 3, 20, 48"):
        unit_rows(bad)


def test_lengths_that_squares_would_overflow_are_usable() -> None:
    found = unit_rows(np.array([[3e30, 4e30], [3e-30, 4e-30]], np.float32))
    np.testing.assert_allclose(found, [[0.6, 0.8]] * 2, atol=1e-3)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.ones(5), r"matrix .*not of shape \(5,\)"),
        (np.ones((2, 3, 4)), r"not of shape \(2, 3, 4\)"),
        (torch.ones(3), r"not of shape \(3,\)"),
        (np.array([["a", "b"]]), "real numbers, not <U1"),
        (np.array([[1, None]], object), "real numbers, not object"),
        (np.ones((2, 2), bool), "real numbers, not bool"),
        (np.ones((2, 2), complex), "real numbers, not complex128"),
        (torch.ones(2, 2, dtype=torch.complex64), "real numbers, not torch.complex64"),
        ([[1.0, 2.0], [3.0]], "no matrix"),
        (None, "real numbers, not object"),
        (np.ones((0, 4)), r"empty: their shape is \(0, 4\)"),
        (np.ones((4, 0)), "empty"),
        (np.array([[1.0, NAN], [1, 1]]), r"1 rows .* are rows 0 \(from 0\)"),
        (np.array([[1.0, 1], [INF, 1], [0, 0]]), "2 rows .* rows 1, 2"),
        (np.array([[1e300, 1.0]]), "1 rows .*not finite"),
        (torch.tensor([[1.0, NAN]]), "1 rows"),
    ],
)
def test_what_cannot_be_used_is_named(given: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        unit_rows(given)


def test_another_number_of_features_is_named(rows: np.ndarray) -> None:
    assert len(unit_rows(rows, features=6)) == 50
    with pytest.raises(DataError, match="have 6 features, but the classifier takes 8"):
        unit_rows(rows, features=8)
