"""The page of a run: self-contained, well-formed, safe with hostile names, within its size."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from icce_ray.errors import ArtifactError
from icce_ray.report import facts, galleries, run_page
from icce_ray.rundir.schemas import QUARANTINE_SCHEMA
from icce_ray.stages import answer, evaluate, report


@pytest.fixture
def page_of(make_context, parse):
    """page_of(made) -> (parsed page, its text) of a synthetic run."""

    def make(made):
        outcome = evaluate.run(make_context(made))
        made.finish("evaluation", outcome.rows)
        report.run(make_context(made))
        text = made.run.read_bytes("report", "index.html").decode()
        return parse(text), text

    return make


def test_page_is_well_formed_and_loads_nothing(make_run, page_of):
    made = make_run(200, 5, errors=0.2, bad=3, overrides=["report.cost_per_hour=3.5"])
    page, text = page_of(made)
    assert page.loads
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)
    assert not re.search(r"@import|url\(|https?://|<link|<iframe", text)
    assert "default-src 'none'" in text
    assert len(set(page.ids)) == len(page.ids)
    inside = [load[1:] for load in page.loads if load.startswith("#")]
    assert set(inside) <= set(page.ids)
    assert all(image.get("alt") for image in page.images)
    assert "Undefined" not in text


def test_the_first_screen_says_it_in_words_without_labels(make_run, page_of):
    made = make_run(200, 5, names=None)
    page, text = page_of(made)
    free = made.run.read_json("evaluation", "metrics.json")["label_free"]
    low, high = np.bincount(made.clusters).min(), np.bincount(made.clusters).max()
    assert f"200 images fell into 5 clusters of {low} to {high} images" in page.text
    assert f"{free['confident']:.0%} of the images have a confidence of 90% or more" in page.text
    least = min(range(5), key=lambda k: made.confidence[made.clusters == k].mean())
    assert f"The least sure cluster is cluster {least}" in page.text
    assert f"icce-ray export {made.run.uri} --to folders" in page.text
    assert text.index("What was found") < text.index('class="tiles"')


def test_page_says_what_the_scores_say(make_run, page_of):
    made = make_run(200, 5, errors=0.2, bad=3, overrides=["report.cost_per_hour=3600"])
    page, _ = page_of(made)
    scores = made.run.read_json("evaluation", "metrics.json")
    assert f"{100 * scores['acc']:.1f}%" in page.text
    assert f"{100 * scores['kmeans']['acc']:.1f}%" in page.text
    assert "5 clusters in 197 images" in page.text
    matched = f"{scores['acc']:.0%} are in the cluster that matches their class"
    assert f"Of the {scores['labeled']} images with a label, {matched}" in page.text
    assert "3 images could not be read" in page.text
    assert "cannot identify image file" in page.text
    assert "embed resumes from partial work" in page.text
    manifests = [made.run.manifest(folder) for folder, _ in facts.PARTS]
    spent = sum(manifest.seconds for manifest in manifests if manifest)
    assert f"cost {spent:.2f}" in page.text  # 3600 an hour is 1 a second


def test_page_says_what_the_listing_left_out(make_run, page_of):
    made = make_run(60, 3)
    assert "Left out of the listing" not in page_of(made)[0].text
    left = {"reason": "files ending in .txt", "count": 1200, "example": "<b>.txt"}
    made.finish("index", 60, {"left_out": [left, {**left, "reason": "links", "count": 3}]})
    page, _ = page_of(made)
    assert "The listing left out 1,203 files or folders" in page.text
    assert ["files ending in .txt", "1,200", "<b>.txt"] in page.rows


def test_galleries_show_the_surest_and_the_least_sure(make_run, page_of):
    made = make_run(100, 2, errors=0.3, overrides=["report.images_per_cluster=4"])
    page, _ = page_of(made)
    assert len([i for i in page.images if "confidence" in i["alt"]]) == 2 * (4 + 2)
    for cluster in range(2):
        mine = np.sort(made.confidence[made.clusters == cluster])
        for value in (mine[-1], mine[0]):
            assert any(f"confidence {value:.0%}" in image["alt"] for image in page.images)


def test_hostile_names_stay_text(make_run, page_of):
    hostile = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    names = ["class-0", "{{ 7*7 }}<b>'\"&"]
    made = make_run(20, 2, names=names, file_name="{:03d}" + hostile.replace("/", "") + ".png")
    page, text = page_of(made)
    assert page.tags.count("script") == 1
    assert not page.handlers
    assert "alert(1)" in text  # shown, as text
    assert "{{ 7*7 }}" in page.text
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)


def test_hostile_words_of_a_run_stay_text(make_run, page_of):
    hostile = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}\"'"
    made = make_run(20, 2, bad=2, overrides=[f"backbone.name={hostile}"])
    columns = [[0, 1], [f"/a/{hostile}", "/b"], [hostile, hostile]]
    table = pa.table(columns, schema=QUARANTINE_SCHEMA)
    made.run.write_table(table, "embeddings", "_quarantine.parquet")
    made.finish("embeddings", 18, events=(hostile,))
    page, text = page_of(made)
    assert page.tags.count("script") == 1 and not page.handlers
    assert text.count("alert(1)") >= 4  # settings, event, reason and name, as text
    assert "{{ 7*7 }}" in page.text


def noise(count: int) -> list[Image.Image]:
    """Images that do not compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 72, 72, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def test_page_of_many_clusters_stays_within_its_size(make_run, page_of, monkeypatch):
    pictures = noise(40)
    monkeypatch.setattr(galleries, "READ", 64)
    made = make_run(1500, 150, overrides=["report.max_megabytes=1", "evaluate.kmeans=false"])
    for number, uri in enumerate(made.uris):
        pictures[number % 40].save(uri)
    page, text = page_of(made)
    assert len(text.encode()) <= 1_000_000
    shown = [image for image in page.images if "confidence" in image["alt"]]
    assert len(shown) >= 150  # every cluster still shows one
    assert len(shown) % 150 == 0  # and all show equally many
    assert page.ids.count("c149") == 1
    assert "<details open" not in text.split('id="list"')[1].split('id="charts"')[0]


def test_budget_below_the_list_itself_shows_no_images(make_run, page_of, monkeypatch):
    monkeypatch.setattr(run_page, "FIXED", 10**9)
    page, _ = page_of(make_run(60, 3))
    assert not [image for image in page.images if "confidence" in image["alt"]]


def test_a_list_too_long_for_the_page_keeps_the_largest_clusters(make_run, page_of, monkeypatch):
    monkeypatch.setattr(run_page, "PER_CLUSTER", 0.8e6 / 50)
    made = make_run(770, 70, errors=0.1, overrides=["report.max_megabytes=1"])
    page, _ = page_of(made)
    cards = [int(name[1:]) for name in page.ids if re.fullmatch(r"c\d+", name)]
    sizes = np.bincount(made.clusters)
    assert len(cards) == 50
    assert sorted(sizes[cards]) == sorted(np.sort(sizes)[-50:])
    assert "largest 50 of 70 clusters are listed" in page.text
    assert {load[1:] for load in page.loads if load.startswith("#")} <= set(page.ids)


def test_run_from_embeddings_shows_addresses(make_run, page_of):
    page, text = page_of(make_run(60, 3, names=None, images=False))
    assert not page.images
    assert "e.npy#" in page.text
    assert "Compared with the labels" not in text


def test_moved_images_leave_their_names(make_run, page_of):
    made = make_run(40, 2)
    for uri in made.uris[::2]:
        Path(uri).unlink()
    page, _ = page_of(made)
    assert page.images
    assert "00000.png" in page.text or "00002.png" in page.text


def test_build_again_gives_the_same_page(make_run, page_of):
    made = make_run(40, 2)
    _, text = page_of(made)
    assert report.build(made.run.uri) == made.run.path("report", "index.html")
    assert made.run.read_bytes("report", "index.html").decode() == text


def test_build_needs_a_run_with_an_evaluation(make_run, tmp_path):
    with pytest.raises(ArtifactError, match="not a run directory"):
        report.build(str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match="evaluation is not finished"):
        report.build(make_run(20, 2).run.uri)


# --- names in words ------------------------------------------------------------------------------


def suggest(made, words):
    """Say that the answer suggests these words for the clusters."""
    made.finish(
        "answer",
        len(made.rows),
        {"words": words},
        inputs={"consensus": made.run.manifest("consensus").id},
    )


@pytest.mark.parametrize("clusters", [3, run_page.OPEN + 1])
def test_suggested_words_are_shown_with_their_scores(make_run, make_context, page_of, clusters):
    made = make_run(4 * clusters, clusters, names=None)
    answer.run(make_context(made))
    rest = [[] for _ in range(clusters - 2)]
    suggest(made, [[["<b>cat", 0.61], ["kitten", 0.2]], [["a caption", None]], *rest])
    page, text = page_of(made)
    assert re.search(r"[Ii]n words: <b>cat 61%, kitten 20%", page.text)
    assert re.search(r"[Ii]n words: a caption ", page.text)
    assert page.text.lower().count("in words:") == 2
    assert "Words are suggestions" in page.text and "<b>cat" not in text
    found = dict(re.findall(r'data-t="([^"]*)" data-s="([^"]*)"', text))
    assert found["&lt;b&gt;cat"].startswith("0 ") and "kitten" in found["&lt;b&gt;cat"]
    assert found["Cluster 2"].strip() == "2"


def test_a_class_names_a_cluster_before_a_word(make_run, make_context, page_of):
    made = make_run(60, 3)
    answer.run(make_context(made))
    suggest(made, [[["cat", 0.6]], [["dog", 0.6]], [["cow", 0.6]]])
    page, _ = page_of(made)
    titles = [value for name, value in page.attributes if name == "data-t"]
    assert all(title.startswith("class-") for title in titles) and len(titles) == 3
    assert "in words: dog 60%" in page.text


def test_without_words_the_page_does_not_speak_of_them(make_run, page_of):
    page, _ = page_of(make_run(60, 3))
    assert "in words" not in page.text.lower() and "Words are" not in page.text


def test_an_estimated_number_of_classes_is_drawn_unless_the_run_has_another(make_run, page_of):
    made = make_run(60, 3)
    assert "Number of classes" not in page_of(made)[1]
    found = {"key": "k", "best": 3, "low": 2, "high": 4, "tried": [2, 3, 4, 5]}
    made.run.write_json({**found, "agreement": [0.7, 0.97, 0.9, 0.6]}, "num_classes.json")
    _, page = page_of(made)
    assert "3 classes are an estimate; 2 to 4 fit" in page and "3 clusters: agreement 0.97" in page
    damaged = [{**found, "agreement": [0.7, 0.9]}, {**found, "agreement": ["<b>", 1, 1, 1]}, [3], 7]
    others = [{**found, "best": 4, "agreement": [0.7, 0.9, 0.9, 0.6]}, found, *damaged]
    for other in others:
        made.run.write_json(other, "num_classes.json")
        assert "Number of classes" not in page_of(made)[1]
