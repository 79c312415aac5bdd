"""The map on the page of a run."""

from __future__ import annotations

import html
import re

import numpy as np

from icce_ray.report import image_map

NAME = "{:05d} <b>&amp;'\"né.png"

WALK = """
const canvas = document.querySelector("#map canvas");
const output = document.querySelector("#map output");
const ink = () => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]
  .filter((value, i) => i % 4 === 3 && value > 0).length;
const [x, y] = document.querySelector("#map pre").textContent.trim().split("\\n")[0].split(" ");
const at = () => {
  const box = canvas.getBoundingClientRect(), spot = v => (v / 999 * .94 + .03) * box.width;
  return { clientX: box.left + spot(x), clientY: box.top + spot(y), pointerId: 1, bubbles: true };
};
made.shown = canvas.offsetWidth > 0;
made.ink = ink();
canvas.dispatchEvent(new PointerEvent("pointermove", at()));
made.said = output.textContent;
canvas.dispatchEvent(new MouseEvent("click", at()));
made.open = document.getElementById("view").open;
made.path = document.getElementById("path").textContent;
made.known = document.getElementById("known").textContent;
document.getElementById("view").close();
canvas.dispatchEvent(new PointerEvent("pointerleave", at()));
made.idle = output.textContent;
document.querySelector('#map button[value="+"]').click();
made.larger = ink();
document.querySelector('#map button[value="0"]').click();
made.all = ink();
made.fits = document.documentElement.scrollWidth <= innerWidth;
"""


def points(page: str) -> list[list[str]]:
    """Fields of each point, the last one its address below the root."""
    text = re.search(r"<pre hidden>\n(.*?)</pre>", page, re.DOTALL)[1]
    return [html.unescape(line).split(" ", 6) for line in text.strip().split("\n")]


def test_points_are_the_images_and_what_is_known_of_them(make_run, report_of):
    made = make_run(90, 3, errors=0.3, bad=2, file_name=NAME)
    page = report_of(made)
    second = np.asarray(made.run.matrix("answer", "second_choice"))
    root = html.unescape(re.search(r'data-root="([^"]*)"', page)[1])
    found = points(page)
    assert [root + point[6] for point in found] == made.uris[2:] and "All images" in page
    for row, (x, y, cluster, confidence, other, link, _) in enumerate(found):
        assert 0 <= int(x) <= 999 and 0 <= int(y) <= 999 and link == "-"
        assert int(cluster) == made.clusters[row]
        assert confidence == f"{made.confidence[row]:.0%}"
        assert other == ("-" if second[row] < 0 else str(second[row]))


def test_many_images_are_sampled_half_of_them_shown_ones(make_run, report_of, monkeypatch):
    monkeypatch.setattr(image_map, "MOST", 60)
    page = report_of(make_run(400, 4, file_name=NAME))
    found = points(page)
    assert len(found) == 60 and "60 of the 400 images" in page
    shown = {html.unescape(one) for one in re.findall(r'data-u="([^"]*)"', page)}
    assert 30 <= sum(point[6] in shown for point in found) < 60


def test_a_sample_has_no_row_twice_and_any_may_be_in_it():
    for shown in ([], [3], list(range(0, 100, 2)), list(range(100))):
        rows = image_map._rows(100, 40, shown, seed=0)
        assert len(np.unique(rows)) == len(rows) == 40 and rows.min() >= 0 and rows.max() < 100
    assert image_map._rows(30, 40, [3], seed=0).tolist() == list(range(30))


def test_too_few_images_have_no_map(make_run, report_of, parse):
    page = parse(report_of(make_run(20, 2)))
    assert "canvas" not in page.tags and "#map-of-images" not in page.loads


def test_without_a_script_a_sentence_stands_for_it(make_run, report_of, parse):
    text = report_of(make_run(60, 2))
    assert "<noscript><p>The map needs JavaScript" in text
    assert '<div id="map" class="card" hidden>' in text


def test_a_name_of_two_lines_stays_one_point(make_run, report_of):
    made = make_run(40, 2, file_name="{:05d}\n1 2 3\u2028.png")
    assert len(points(report_of(made))) == 40


def test_it_is_drawn_named_and_opened(make_run, report_of, in_browser):
    made = make_run(90, 3, errors=0.3, file_name=NAME)
    found = in_browser(report_of(made), WALK)
    assert found["shown"] and found["fits"] and found["ink"] > 500
    cluster, confidence = made.clusters[0], made.confidence[0]
    assert f"(#{cluster}), confidence {confidence:.0%}" in found["said"]
    assert found["open"] and found["path"] in made.uris
    assert f"confidence{made.confidence[made.uris.index(found['path'])]:.0%}" in found["known"]
    assert found["idle"].startswith("Click a point")
    assert found["larger"] != found["ink"] == found["all"]
