"""What a notebook displays holds nothing that others may have put into names."""

from __future__ import annotations

from icce_ray.report import notebook

EVIL = 'a/<script>alert(1)</script>"onload="x\x1b[2J.png'


def test_names_are_text() -> None:
    shown = notebook.cluster(f"cluster 0 ({EVIL})", [EVIL] * 2, [0.5, 0.25], [None, "data:,"])
    html = shown._repr_html_()
    assert "<script" not in html and '"onload' not in html
    assert html.count("&lt;script&gt;") >= 3
    assert "50%" in html and "25%" in html
    assert repr(shown).count("\n") == 2
    assert "\x1b" not in repr(shown) and "<script>" in repr(shown)
