"""Which images a page shows."""

from __future__ import annotations

import numpy as np

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
