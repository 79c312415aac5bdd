"""Which images a page shows, and their thumbnails."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from icce_ray.report import galleries


def test_choose_takes_no_row_twice_and_orders_by_confidence():
    rng = np.random.default_rng(0)
    clusters, confidence = rng.integers(0, 5, 60), rng.random(60).round(1)
    clusters[clusters == 3] = 2
    picks = galleries.choose(clusters, confidence, 5, 8, seed=0)
    assert [len(part) for part in picks[3]] == [0, 0]
    for k, (sure, unsure) in enumerate(picks):
        assert not set(sure) & set(unsure)
        assert (clusters[sure] == k).all()
        assert (clusters[unsure] == k).all()
        assert (np.diff(confidence[sure]) <= 0).all()
        assert (np.diff(confidence[unsure]) >= 0).all()
        if len(unsure):
            assert confidence[unsure[0]] == confidence[clusters == k].min()
            assert len(sure) == 8


def test_thumbnails_are_small_squares():
    uri = galleries.data_uri(Image.new("RGBA", (300, 100), (10, 200, 30, 255)), 48)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert picture.size == (48, 48)
    tiny = galleries.data_uri(Image.new("L", (8, 20)), 48)
    assert Image.open(io.BytesIO(base64.b64decode(tiny.split(",")[1]))).size == (8, 8)
