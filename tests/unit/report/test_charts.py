"""The drawings: round ticks, escaped names, and odd values."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from icce_ray.report import charts


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 10) == [0, 2.5, 5, 7.5, 10]
    assert charts.ticks(0, 10, whole=True) == [0, 3, 6, 9]
    assert charts.ticks(3, 3) == [3]
    for low, high in ((-1.3, 7.9), (0.0, 1e-4), (1e5, 3e6)):
        found = charts.ticks(low, high)
        assert 2 <= len(found) <= 7
        assert min(found) >= low - 1e-12
        assert max(found) <= high * (1 + 1e-12)


def test_log_axis():
    assert charts.log_ticks(1e-4, 1e-2) == pytest.approx([1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
    for low, high in ((8, 12), (1e-9, 1e9), (3, 70)):
        found = charts.log_ticks(low, high)
        assert 2 <= len(found) <= 7
        assert low <= found[0] * 1.01
        assert found[-1] <= high * 1.01
    plot = charts.Plot((1, 100), (0, 1), label="", x_log=True)
    assert plot.px(10) == pytest.approx((plot.px(1) + plot.px(100)) / 2)


@pytest.mark.parametrize("values", [[[1.0]], [[1.0, float("nan")], [2.0, 3.0]], [[5.0], [5.0]]])
def test_curves_survive_one_step_nan_and_constants(values):
    drawing = charts.curves(list(range(len(values))), np.array(values), label="loss")
    assert "nan" not in drawing
    assert drawing.startswith("<svg")


def test_chart_labels_are_escaped():
    plot = charts.Plot((0, 1), (0, 1), label='"><script>')
    plot.text(0, 0, "<b>")
    assert "<script>" not in plot.svg()
    assert "<b>" not in plot.svg()


def test_heat_image_keeps_to_its_side(monkeypatch):
    monkeypatch.setattr(charts, "SIDE", 250)
    uri = charts.heat_image(np.eye(1000, dtype=np.int64))
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert picture.size == (250, 250)
    alpha = np.asarray(picture)[..., 3]
    assert (alpha.diagonal() == 255).all()
    assert alpha.sum() == 255 * 250
