"""The line that a chart of a sweep draws through its trials."""

from __future__ import annotations

import numpy as np

from icce_ray.report import sweep_charts


def test_trend_is_the_mean_of_few_values_and_the_median_of_many():
    (x, y), name = sweep_charts.trend_of(np.array([1.0, 1, 2, 2]), np.array([0.0, 1, 4, 6]))
    assert (x, y, name) == ([1, 2], [0.5, 5], " and their mean")
    x = np.random.default_rng(0).permutation(40).astype(float)
    (middle, median), name = sweep_charts.trend_of(x, 2 * x)
    assert name == " and their running median"
    assert np.allclose(median, 2 * np.array(middle))
    assert middle == sorted(middle)
    assert sweep_charts.trend_of(np.arange(5.0), np.arange(5.0)) == (None, "")
