"""Images that were moved since the last report keep their thumbnails in the next one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from icce_ray import cli, pipeline
from icce_ray.report import earlier
from icce_ray.rundir import curated
from icce_ray.stages import report
from icce_ray.stages.table import stage


@pytest.fixture
def reported(make_run, report_of):
    """A run of 60 images whose page shows clusters, duplicates and outliers."""
    made = make_run(60, 2, errors=0.3, file_name="{:05d}&amp;'.png")
    features = np.array(made.features)
    features[[20, 31]] = features[5]
    made.write_embeddings(features)
    report_of(made)
    return made


def page_of(run) -> str:
    return run.read_bytes("report", "index.html").decode()


def images(text: str) -> list[str]:
    return re.findall(r'<img src="data:image/webp[^>]*>', text)


def test_every_place_of_the_page_keeps_them_and_says_so(reported, capsys):
    before = images(page_of(reported.run))
    assert len(before) > 30  # of all three sections
    for uri in reported.uris[1:]:
        Path(uri).unlink()
    cli_exit(["report", reported.run.uri])
    again = page_of(reported.run)
    assert images(again) == before
    said = re.search(
        r"! (\d+) images that the report shows can no longer be", capsys.readouterr()[1]
    )
    assert said and int(said[1]) == len(set(before)) - ("00000&amp;" in "".join(before))
    assert f"stand for {said[1]} of them" in again
    assert report.build(reported.run.uri) and images(page_of(reported.run)) == before


def cli_exit(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert not end.value.code


def test_without_an_earlier_thumbnail_the_name_stands(reported):
    reported.run.delete("report")
    for uri in reported.uris:
        Path(uri).unlink()
    report.build(reported.run.uri)
    text = page_of(reported.run)
    assert not images(text) and "Restore them" in text and "00000&amp;amp;" in text


def test_a_readable_image_is_read(reported):
    """A page shows what a file holds now, not what it once held."""
    text = page_of(reported.run)
    old = re.search(r"data:image/webp;base64,[^\"]*", text)[0]
    reported.run.write_bytes(
        text.replace(old, "data:image/webp;base64,AAAA").encode(), "report", "index.html"
    )
    report.build(reported.run.uri)
    assert page_of(reported.run) == text


def test_the_chain_does_not_delete_them_first(reported, make_context):
    before = images(page_of(reported.run))
    for uri in reported.uris:
        Path(uri).unlink()
    step = pipeline.Step(stage("report"), "again", "of other settings", {})
    context = make_context(reported)
    context.cluster.used = dict
    pipeline.run_stage(context, step)
    assert images(page_of(reported.run)) == before
    done = reported.run.manifest("report")
    assert done and "can no longer be read" in done.events[0]


def test_a_report_that_fails_leaves_the_one_before(reported, make_context, monkeypatch):
    before = page_of(reported.run)

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(report, "render", broken)
    step = pipeline.Step(stage("report"), "again", "of other settings", {})
    with pytest.raises(Exception, match="out of memory"):
        pipeline.run_stage(make_context(reported), step)
    assert page_of(reported.run) == before and reported.run.manifest("report") is None


def test_a_curated_run_takes_those_of_its_own_page(reported):
    assert earlier.shown(curated.view(reported.run)) == earlier.shown(reported.run) != {}


def test_only_what_a_report_holds_is_taken():
    image = '<img src="{}" data-u="a&amp;b">'
    page = '<main data-root="/d/">' + image
    for good in ("data:image/webp;base64,AB+/=", "data:image/jpeg;base64,AB=="):
        assert earlier.thumbnails(page.format(good)) == {"/d/a&b": good}
    for bad in (
        "https://x/a.png",
        "data:image/svg+xml;base64,AA",
        "data:text/html;base64,AA",
        "data:image/webp;base64,<b>",
    ):
        assert earlier.thumbnails(page.format(bad)) == {}
    assert earlier.thumbnails(image.format("data:image/webp;base64,AA")) == {}
