"""Pages of all images beside the report."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pytest

from icce_ray.report import browse
from icce_ray.rundir import progress
from icce_ray.stages import evaluate, report, table
from icce_ray.stages.base import Size

HOSTILE = "{:05d}\"'><script>alert(1)<b>&amp;.png"
IMAGE = re.compile(r'<figure id="i(\d+)"><a [^>]*><img src="(data:image/\w+;base64,[^"]+)" ')


@pytest.fixture
def made(make_run, report_of, monkeypatch):
    """A run of 60 images in clusters of several pages each."""
    monkeypatch.setattr(browse, "PER_PAGE", 8)
    monkeypatch.setattr(browse, "READ", 7)
    one = make_run(60, 3, errors=0.3, bad=2, overrides=["report.browse=true"], file_name=HOSTILE)
    report_of(one)
    return one


def folders(run) -> list[str]:
    return [name for name in run.folders("report") if browse.NAME.fullmatch(name)]


def texts(run) -> dict[str, str]:
    """The pages of the one folder, by name."""
    (folder,) = folders(run)
    names = run.list(f"report/{folder}")
    return {name: run.read_bytes("report", folder, name).decode() for name in names}


def shown(run) -> dict[int, str]:
    return {int(row): uri for text in texts(run).values() for row, uri in IMAGE.findall(text)}


def test_every_image_is_there_once_the_most_confident_first(made):
    pages = texts(made.run)
    assert len(shown(made.run)) == len(made.clusters) == 58
    for cluster in range(3):
        count = -(-(made.clusters == cluster).sum() // 8)
        assert count > 2
        some = [pages.pop(f"{cluster}-{number + 1}.html") for number in range(count)]
        rows = [int(row) for text in some for row, _ in IMAGE.findall(text)]
        assert sorted(rows) == np.flatnonzero(made.clusters == cluster).tolist()
        assert (np.diff(made.confidence[rows]) <= 0).all()
        row = rows[9]
        uri = html.escape(made.uris[row + 2]).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
        assert f"<code>{uri}</code>" in some[1]
    assert set(pages) == {"index.html"}


def test_they_are_plain_pages_whose_links_lead_somewhere(made, parse):
    pages = texts(made.run)
    (folder,) = folders(made.run)
    page = parse(made.run.read_bytes("report", "index.html").decode())
    ids = {"../index.html": page.ids, **{name: parse(text).ids for name, text in pages.items()}}
    outside = [load for load in page.loads if load.startswith("browse-")]
    outside += [value for name, value in page.attributes if name == "data-b"]
    inside = [link.removeprefix(f"{folder}/") for link in outside]
    assert len(inside) > 30
    for name, text in pages.items():
        one = parse(text)
        assert "script" not in one.tags and not one.handlers and "default-src 'none'" in text
        assert all(image["alt"] for image in one.images)
        loads = [load for load in one.loads if not load.startswith("data:image/")]
        inside += [f"{name}{load}" if load.startswith("#") else load for load in loads]
    for link in inside:
        name, _, mark = link.partition("#")
        assert name in ids and (not mark or mark == "_" or mark in ids[name]), link


def test_a_row_is_where_the_report_leads_to(made):
    text = made.run.read_bytes("report", "index.html").decode()
    links = re.findall(r'data-b="([^"#]+)#i(\d+)"', text)
    assert links
    for name, row in links:
        assert f'<figure id="i{row}">' in made.run.read_bytes("report", *name.split("/")).decode()


def test_made_again_nothing_is_read(made, monkeypatch):
    before = texts(made.run)
    monkeypatch.setattr(browse, "thumbnails", None)
    report.build(made.run.uri)
    assert texts(made.run) == before


def test_other_clusters_get_other_pages_and_moved_images_are_kept(made, make_context):
    before, old = shown(made.run), folders(made.run)
    for uri in made.uris[2:50]:
        Path(uri).unlink()
    made.finish("consensus", 58)
    report.run(make_context(made))
    assert folders(made.run) != old and shown(made.run) == before


def test_names_stand_for_moved_images_until_they_are_back(made):
    before = texts(made.run)
    made.run.delete("report")
    for uri in made.uris[2:50]:
        Path(uri).rename(f"{uri}.away")
    report.build(made.run.uri)
    assert len(shown(made.run)) == 10
    pages = texts(made.run)
    assert sum(text.count("<figure ") for text in pages.values()) == 58
    assert "48 of them can no longer be read" in pages["index.html"]
    for uri in made.uris[2:50]:
        Path(f"{uri}.away").rename(uri)
    report.build(made.run.uri)
    assert texts(made.run) == before


def test_made_again_they_show_progress_but_not_in_the_log_of_the_run(made, capsys, monkeypatch):
    before = [made.run.read_bytes(name) for name in ("log", "status.json")]
    made.run.delete("report")
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    capsys.readouterr()
    report.build(made.run.uri)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Pages of all images: 7 of 58 images" and len(lines) == 9
    assert [made.run.read_bytes(name) for name in ("log", "status.json")] == before


def test_half_written_pages_do_not_count(made, make_context, monkeypatch):
    old, page = folders(made.run), made.run.read_bytes("report", "index.html")
    made.finish("consensus", 58)
    write, written = type(made.run).write_bytes, []

    def full(run, data, *parts):
        written.append(parts)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        write(run, data, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(type(made.run), "write_bytes", full)
        with pytest.raises(Exception, match="no disk space left"):
            report.run(make_context(made))
    assert made.run.read_bytes("report", "index.html") == page  # leads to the whole old ones
    assert set(old) < set(folders(made.run))
    report.run(make_context(made))
    assert len(shown(made.run)) == 58  # of one folder


def test_without_the_setting_there_are_none(make_run, make_context):
    one = make_run(40, 2)
    for stage in (evaluate, report):
        one.finish(stage.FOLDER, stage.run(make_context(one)).rows)
    one.run.write_bytes(b"x", "report", "browse-of-mine", "x")
    assert (
        not folders(one.run) and "data-b" not in one.run.read_bytes("report", "index.html").decode()
    )
    report.build(one.run.uri)
    assert one.run.exists("report", "browse-of-mine", "x")  # a folder of the user's


def test_the_plan_says_what_they_take(made):
    stage = table.stage("report")
    size = Size(images=1_281_167)
    need = stage.estimate(made.config, size, None)
    plain = made.config.model_copy(
        update={"report": made.config.report.model_copy(update={"browse": False})}
    )
    more = need.disk - stage.estimate(plain, size, None).disk
    assert 6e9 < more == need.cache < 7e9
