"""The page: self-contained, well-formed, safe with hostile names, within its size."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icce_ray.errors import ArtifactError
from icce_ray.report import charts, galleries, run_page
from icce_ray.stages import evaluate, report

VOID = {"meta", "img", "input", "br", "link", "hr"}
LOADS = {"src", "href", "data", "action", "poster", "srcset", "xlink:href"}


class Page(HTMLParser):
    """Checks that tags match, and collects what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert len(values) == len(attrs), f"an attribute given twice: {attrs}"
        self.tags.append(tag)
        self.loads += [values[name] or "" for name in LOADS & values.keys()]
        self.handlers += [name for name in values if name.startswith("on")]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "img":
            self.images.append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # <path/> of the charts
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(made, make_context) -> tuple[Page, str]:
    outcome = evaluate.run(make_context(made))
    made.finish("evaluation", outcome.rows)
    report.run(make_context(made))
    text = made.run.read_bytes("report", "index.html").decode()
    return Page(text), text


def test_page_is_well_formed_and_loads_nothing(make_run, make_context):
    made = make_run(200, 5, errors=0.2, bad=3, overrides=["report.cost_per_hour=3.5"])
    page, text = page_of(made, make_context)
    assert page.loads
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)
    assert not re.search(r"@import|url\(|https?://|<link|<iframe", text)
    assert "default-src 'none'" in text
    assert len(set(page.ids)) == len(page.ids)
    inside = [load[1:] for load in page.loads if load.startswith("#")]
    assert set(inside) <= set(page.ids)
    assert all(image.get("alt") for image in page.images)
    assert "Undefined" not in text


def test_page_says_what_the_scores_say(make_run, make_context):
    made = make_run(200, 5, errors=0.2, bad=3, overrides=["report.cost_per_hour=3600"])
    page, _ = page_of(made, make_context)
    scores = made.run.read_json("evaluation", "metrics.json")
    assert f"{100 * scores['acc']:.1f}%" in page.text
    assert f"{100 * scores['kmeans']['acc']:.1f}%" in page.text
    assert "5 clusters in 197 images" in page.text
    assert "3 images could not be read" in page.text
    assert "cannot identify image file" in page.text
    assert "embed goes on from partial work" in page.text
    folders = [folder for folder, _ in run_page.PARTS]
    spent = sum(made.run.manifest(folder).seconds for folder in folders)
    assert f"cost {spent:.2f}" in page.text  # 3600 an hour is 1 a second


def test_galleries_show_the_surest_and_the_least_sure(make_run, make_context):
    made = make_run(100, 2, errors=0.3, overrides=["report.images_per_cluster=4"])
    page, _ = page_of(made, make_context)
    assert len([i for i in page.images if "confidence" in i["alt"]]) == 2 * (4 + 2)
    for cluster in range(2):
        mine = np.sort(made.confidence[made.clusters == cluster])
        for value in (mine[-1], mine[0]):
            assert any(f"confidence {value:.0%}" in image["alt"] for image in page.images)


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


def test_hostile_names_stay_text(make_run, make_context):
    hostile = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    names = ["class-0", "{{ 7*7 }}<b>'\"&"]
    made = make_run(20, 2, names=names, file_name="{:03d}" + hostile.replace("/", "") + ".png")
    page, text = page_of(made, make_context)
    assert page.tags.count("script") == 1
    assert not page.handlers
    assert "alert(1)" in text  # shown, as text
    assert "{{ 7*7 }}" in page.text
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)


def noise(count: int) -> list[Image.Image]:
    """Images that do not compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 72, 72, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def test_page_of_many_clusters_stays_within_its_size(make_run, make_context, monkeypatch):
    pictures = noise(40)
    monkeypatch.setattr(galleries, "READ", 64)
    made = make_run(1500, 150, overrides=["report.max_megabytes=1", "evaluate.kmeans=false"])
    for number, uri in enumerate(made.uris):
        pictures[number % 40].save(uri)
    page, text = page_of(made, make_context)
    assert len(text.encode()) <= 1_000_000
    shown = [image for image in page.images if "confidence" in image["alt"]]
    assert len(shown) >= 150  # every cluster still shows one
    assert len(shown) % 150 == 0  # and all show equally many
    assert page.ids.count("c149") == 1
    assert "<details open" not in text.split('id="list"')[1].split('id="charts"')[0]


def test_budget_below_the_list_itself_shows_no_images(make_run, make_context, monkeypatch):
    monkeypatch.setattr(run_page, "FIXED", 10**9)
    page, _ = page_of(make_run(60, 3), make_context)
    assert not [image for image in page.images if "confidence" in image["alt"]]


def test_a_list_too_long_for_the_page_keeps_the_largest_clusters(
    make_run, make_context, monkeypatch
):
    monkeypatch.setattr(run_page, "PER_CLUSTER", 0.8e6 / 50)
    made = make_run(770, 70, errors=0.1, overrides=["report.max_megabytes=1"])
    page, _ = page_of(made, make_context)
    cards = [int(name[1:]) for name in page.ids if re.fullmatch(r"c\d+", name)]
    sizes = np.bincount(made.clusters)
    assert len(cards) == 50
    assert sorted(sizes[cards]) == sorted(np.sort(sizes)[-50:])
    assert "largest 50 of 70 clusters are listed" in page.text
    assert {load[1:] for load in page.loads if load.startswith("#")} <= set(page.ids)


def test_run_from_embeddings_shows_addresses(make_run, make_context):
    page, text = page_of(make_run(60, 3, names=None, images=False), make_context)
    assert not page.images
    assert "e.npy#" in page.text
    assert "Against the labels" not in text


def test_moved_images_leave_their_names(make_run, make_context):
    made = make_run(40, 2)
    for uri in made.uris[::2]:
        Path(uri).unlink()
    page, _ = page_of(made, make_context)
    assert page.images
    assert "00000.png" in page.text or "00002.png" in page.text


def test_thumbnails_are_small_squares():
    uri = galleries.data_uri(Image.new("RGBA", (300, 100), (10, 200, 30, 255)), 48)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert picture.size == (48, 48)
    tiny = galleries.data_uri(Image.new("L", (8, 20)), 48)
    assert Image.open(io.BytesIO(base64.b64decode(tiny.split(",")[1]))).size == (8, 8)


def test_build_again_gives_the_same_page(make_run, make_context):
    made = make_run(40, 2)
    _, text = page_of(made, make_context)
    assert report.build(made.run.uri) == made.run.path("report", "index.html")
    assert made.run.read_bytes("report", "index.html").decode() == text


def test_build_needs_a_run_with_an_evaluation(make_run, tmp_path):
    with pytest.raises(ArtifactError, match="not a run directory"):
        report.build(str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match="evaluation is not finished"):
        report.build(make_run(20, 2).run.uri)


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 10) == [0, 2.5, 5, 7.5, 10]
    assert charts.ticks(0, 10, whole=True) == [0, 3, 6, 9]
    assert charts.ticks(3, 3) == [3]
    for low, high in ((-1.3, 7.9), (0.0, 1e-4), (1e5, 3e6)):
        found = charts.ticks(low, high)
        assert 2 <= len(found) <= 7
        assert min(found) >= low - 1e-12
        assert max(found) <= high * (1 + 1e-12)


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


def test_heat_image_keeps_to_its_side():
    uri = charts.heat_image(np.eye(1000, dtype=np.int64), side=250)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert picture.size == (250, 250)
    alpha = np.asarray(picture)[..., 3]
    assert (alpha.diagonal() == 255).all()
    assert alpha.sum() == 255 * 250
