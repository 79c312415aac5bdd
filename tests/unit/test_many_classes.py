"""Data of many classes for jobs/benchmark.py (fonts, twin), and the peers beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks import fonts, peers, twin
from PIL import Image, ImageFont


def test_characters_are_drawn_once_per_way_of_drawing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latin = ImageFont.load_default(fonts.SIDE)
    monkeypatch.setattr(fonts, "fonts", lambda: [("one", latin), ("copy", latin)])
    counts = fonts.draw(tmp_path, fewest=1)
    assert counts and set(counts.values()) == {1}  # the copy draws alike
    assert "U+0026" in counts  # an ampersand, which every Latin font has
    assert "U+3042" not in counts  # a Hiragana letter, which this font lacks
    assert {path.name for path in tmp_path.iterdir()} == set(counts)
    ink = np.asarray(Image.open(tmp_path / "U+0026" / "one.png")) < 128
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    inner = fonts.SIDE - 2 * fonts.MARGIN
    assert abs(max(np.ptp(rows), np.ptp(columns)) + 1 - inner) <= 2  # it fills all but the margin
    assert fonts.draw(tmp_path / "more", fewest=2) == {}


def test_a_twin_without_blur_is_easy_and_one_of_noise_is_not() -> None:
    easy = replace(twin.Recipe(), mode=0.0, shared=0.0, noise=0.1, blend=0.0)
    x, y = twin.make(easy, classes=12, per_class=60, features=64, seed=1)
    assert x.dtype == np.float16 and x.shape == (720, 64)
    np.testing.assert_allclose(np.linalg.norm(x.astype(np.float32), axis=1), 1, atol=2e-3)
    assert np.bincount(y).tolist() == [60] * 12
    found = twin.figures(x, y)
    assert min(found["knn"], found["linear"], found["purity@1"]) > 99 and found["kmeans"] > 60
    again, _ = twin.make(easy, classes=12, per_class=60, features=64, seed=1)
    assert (again == x).all()
    noise = twin.figures(*twin.make(replace(easy, noise=20.0), 12, 60, 64, 1))
    assert max(noise["knn"], noise["linear"], noise["kmeans"]) < 60


def test_the_search_for_a_twin_gives_the_best_that_it_saw() -> None:
    lines: list[str] = []
    recipe, found = twin.fit(6, 40, lines.append, trials=3)
    assert len(lines) == 3 and any(str(recipe) in line for line in lines)
    distance = np.linalg.norm([found[name] - twin.FIGURES[name] for name in twin.FIGURES])
    assert distance == pytest.approx(min(float(line.split()[0]) for line in lines), abs=0.01)


def test_peers_see_the_same_features_and_are_scored_alike() -> None:
    easy = replace(twin.Recipe(), mode=0.0, shared=0.0, noise=0.1, blend=0.0)
    x, y = twin.make(easy, classes=6, per_class=80, features=32)
    said: list[str] = []
    found = peers.compare(x, y, [0, 1], ["heads.steps=100", "heads.count=6"], 100, said.append)
    names = {"ours, consensus", "ours, classifier", "k-means, 10 restarts", "TURTLE, 100 steps"}
    assert {one["method"] for one in found} >= names and len(said) == len(found)
    assert {one["seed"] for one in found} == {0, 1}
    lowest = {name: 60 if "TURTLE" in name else 90 for name in names}  # from a random start
    assert all(one["acc"] > lowest.get(one["method"], 0) for one in found)
    table = peers.table(found)
    assert table.count("\n") >= len(names) and "± " in table
