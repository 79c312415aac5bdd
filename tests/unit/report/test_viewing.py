"""The larger view of an image, clicked through in a real browser."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest

from icce_ray.report import galleries, run_page

NAME = "{:05d} <b>&amp;'\"né.png"

LOOK = """
const text = id => document.getElementById(id).textContent;
const press = key => view.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const view = document.getElementById("view"), all = [...document.querySelectorAll("[data-u]")];
made.before = view.open;
all[0].click();
made.open = view.open;
made.path = text("path");
made.known = text("known");
const large = view.querySelector("#picture img");
made.picture = large !== null && large.src === all[0].src;
made.fits = document.documentElement.scrollWidth <= innerWidth;
made.inside = view.getBoundingClientRect().right <= innerWidth;
press("ArrowRight");
made.second = text("path");
press("ArrowLeft");
press("ArrowLeft");
made.last = text("place");
made.focusable = document.querySelectorAll('.strip [role="button"]').length;
const writeText = async text => { made.copied = text === made.path; };
Object.defineProperty(navigator, "clipboard", { value: { writeText } });
press("ArrowRight");
document.getElementById("copy").click();
await null;
await null;
made.says = text("copy");
view.close();
const strip = document.querySelector('.strip [role="button"]');
strip.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
made.again = view.open;
"""


def test_an_image_opens_large_with_what_is_known_of_it(make_run, report_of, in_browser):
    made = make_run(60, 3, errors=0.3, file_name=NAME)
    page = report_of(made)
    found = in_browser(page, LOOK)
    assert not found["before"] and found["open"] and found["again"] and found["picture"]
    assert found["path"] in made.uris and found["copied"]
    assert found["second"] in made.uris and found["second"] != found["path"]
    assert found["says"] == "Copied"
    count = int(found["last"].split()[0])
    assert found["last"] == f"{count} of {count}" and count == 18  # of the cluster, not the page
    row = made.uris.index(found["path"])
    cluster, confidence = made.clusters[row], made.confidence[row]
    assert f"(#{cluster})confidence{confidence:.0%}second choice" in found["known"]
    assert f"labeledclass-{made.labels[row]}" in found["known"]
    assert found["fits"] and found["inside"] and found["focusable"] > 3


def test_a_run_without_images_shows_addresses(make_run, report_of, in_browser):
    found = in_browser(report_of(make_run(60, 3, names=None, images=False)), LOOK)
    assert found["open"] and re.fullmatch(r"e\.npy#\d+", found["path"]) and not found["picture"]
    assert "labeled" not in found["known"]


def test_the_page_holds_the_whole_address_once_per_image(make_run, report_of):
    made = make_run(60, 3, errors=0.3, file_name=NAME)
    page = report_of(made)
    root = html.unescape(re.search(r'data-root="([^"]*)"', page)[1])
    rest = [html.unescape(one) for one in re.findall(r'data-u="([^"]*)"', page)]
    assert root.endswith("/images/") and {root + one for one in rest} <= set(made.uris)
    second = np.asarray(made.run.matrix("answer", "second_choice"))
    known = re.findall(r'data-u="([^"]*)" data-k="(\d+)" data-f="\d+%"(?: data-o="(\d+)")?', page)
    for one, cluster, other in known:
        row = made.uris.index(root + html.unescape(one))
        assert int(cluster) == made.clusters[row]
        assert int(other or -1) == second[row]


def test_few_images_are_kept_in_more_detail(make_run):
    def side(overrides, listed):
        facts = report_facts(make_run, overrides)
        one = galleries.Galleries(facts, listed, 24e6)
        return one.pixels, one.side

    assert side([], range(3)) == (galleries.LARGE, galleries.SIDE)
    many = ["report.images_per_cluster=4000"]
    assert side(many, range(3)) == (galleries.SIDE, galleries.SIDE)


def report_facts(make_run, overrides):
    import types

    made = make_run(30, 3, overrides=overrides)
    return types.SimpleNamespace(
        config=made.config,
        clusters=made.clusters,
        confidence=made.confidence,
        num_clusters=3,
        manifests={},
    )


CUT = """
const width = innerWidth, right = one => one.getBoundingClientRect().right;
made.links = [...document.querySelectorAll("nav a")].filter(one => right(one) > width).length;
made.shown = made.cut = 0;
for (const strip of document.querySelectorAll(".many .c > .strip")) {
  const frame = strip.getBoundingClientRect();
  for (const image of strip.children) {
    const one = image.getBoundingClientRect();
    if (one.top > frame.bottom - 1) continue;
    made.shown += 1;
    if (one.right > frame.right + 1 || one.bottom > frame.bottom + 1) made.cut += 1;
  }
}
"""


@pytest.mark.parametrize("images", [True, False])
def test_a_narrow_page_cuts_no_image_and_no_link(make_run, report_of, in_browser, images):
    count = run_page.OPEN + 1  # in rows, not cards
    page = report_of(make_run(12 * count, count, images=images))
    found = in_browser(page, CUT)
    assert found["shown"] >= 2 * count and not found["cut"] and not found["links"]
