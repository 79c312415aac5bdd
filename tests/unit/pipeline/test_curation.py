"""Curating a synthetic run, its tasks called in place, and everything that reads it afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import icce_ray
from icce_ray import cli
from icce_ray.core import method
from icce_ray.data import export
from icce_ray.errors import ArtifactError, ConfigError
from icce_ray.pipeline import curation
from icce_ray.rundir import curated
from icce_ray.rundir.directory import RunDirectory
from icce_ray.stages import answer, evaluate, report

EDITS = """\
names: {0: cats, 2: dogs}
merge: [[0, 1]]
split: {3: 2}
drop: [4]
"""


@pytest.fixture
def finished(make_run, make_context, tmp_path):
    """A run of 150 images in 5 clusters, 2 unreadable, finished; edits are in edits.yaml."""
    made = make_run(150, 5, bad=2)
    context = make_context(made)
    for stage in (evaluate, answer, report):
        outcome = stage.run(context)
        inputs = {"consensus": made.run.manifest("consensus").id}
        made.finish(stage.FOLDER, outcome.rows, outcome.results, inputs=inputs)
    (tmp_path / "edits.yaml").write_text(EDITS)
    return made


@pytest.fixture
def curate(finished, make_context, tmp_path):
    """curate() -> the manifest."""
    tasks = make_context(finished).cluster
    tasks.stop = lambda: None
    tasks.used = dict
    tasks.gpus_each = lambda wanted=None: 0.0
    return lambda: curation.curate(
        finished.run.uri, tmp_path / "edits.yaml", quiet=True, cluster=tasks
    )


def content(run, but=curated.FOLDER):
    """Every file of a run outside a folder, by name."""
    root = Path(run.root)
    files = [path for path in root.rglob("*") if path.is_file()]
    names = {path.relative_to(root).as_posix(): path for path in files}
    kept = {n: p for n, p in names.items() if not n.startswith((f"{but}/", ".", "status.json"))}
    return {name: path.read_bytes() for name, path in kept.items()}


def test_labels_classifier_and_numbers_agree(finished, curate):
    old = np.asarray(finished.clusters)
    clusters = curate().results["clusters"]
    assert [one["name"] for one in clusters].count("cats") == 1
    by_pieces = {" ".join(one["made_of"]): one for one in clusters}
    assert set(by_pieces) == {"0 1", "2", "3a", "3b", "4"}
    assert by_pieces["0 1"]["images"] == np.isin(old, [0, 1]).sum()
    assert by_pieces["4"]["cluster"] is None and clusters[-1] is by_pieces["4"]

    found = icce_ray.load(finished.run.uri)
    cats, dogs = by_pieces["0 1"]["cluster"], by_pieces["2"]["cluster"]
    assert np.array_equal(found.clusters == cats, np.isin(old, [0, 1]))
    assert np.array_equal(found.clusters == dogs, old == 2)
    assert np.array_equal(found.clusters == -1, old == 4)
    assert found.names == [one["name"] for one in clusters[:-1]]
    assert found.classifier.num_clusters == 5  # with the dropped ones, so that it knows them

    rows = found.table.to_pylist()[2:]
    assert [row["cluster"] for row in rows] == found.clusters.tolist()
    names = {cats: "cats", dogs: "dogs"}
    assert [row["name"] for row in rows] == [names.get(k) for k in found.clusters.tolist()]
    assert {row["reason"] for row in rows if row["cluster"] < 0} == {"dropped"}
    assert {row["reason"] for row in rows if row["cluster"] >= 0} == {None}
    read = pyarrow.csv.read_csv(finished.run.path("labels.csv"))
    assert read["cluster"].to_pylist() == found.table["cluster"].to_pylist()

    new = found.predict(finished.features)
    assert {-1, cats, dogs} <= set(new["cluster"]) <= {-1, 0, 1, 2, 3}  # 4 is never said
    assert set(new["name"][new["cluster"] == cats]) == {"cats"}
    assert new["name"][new["cluster"] == -1].isna().all()
    assert found.metrics["num_classes"] == 5


def test_the_run_itself_stays_and_comes_back(finished, curate):
    before = content(finished.run)
    curate()
    changed = content(finished.run)
    differ = {name for name in before if changed[name] != before[name]}
    assert differ == {"labels.parquet", "labels.csv"} and set(changed) == set(before)
    assert curation.undo(finished.run.uri) is True
    assert content(finished.run) == before
    assert not Path(finished.run.path(curated.FOLDER)).exists()
    assert np.array_equal(icce_ray.load(finished.run.uri).clusters, finished.clusters)
    assert curation.undo(finished.run.uri) is False


def test_edits_are_about_the_own_clusters_each_time(finished, curate, tmp_path):
    curate()
    (tmp_path / "edits.yaml").write_text("names: {4: birds}\n")
    curate()
    found = icce_ray.load(finished.run.uri)
    assert len(found.names) == 5 and found.names.count("birds") == 1
    assert np.array_equal(found.clusters == found.names.index("birds"), finished.clusters == 4)
    assert (tmp_path / "edits.yaml").read_bytes() == finished.run.read_bytes(
        "curated", "edits.yaml"
    )


def test_a_corrected_image_moves_alone(finished, curate, tmp_path):
    row = int(np.flatnonzero(finished.clusters == 2)[0])
    uri = finished.uris[row + 2]
    (tmp_path / "edits.yaml").write_text(f"names: {{0: cats}}\nimages:\n  {uri}: cats\n")
    curate()
    found = icce_ray.load(finished.run.uri)
    line = found.table.to_pylist()[row + 2]
    assert (line["uri"], line["name"], line["confidence"]) == (uri, "cats", 1.0)
    assert (found.clusters == found.names.index("cats")).sum() == (finished.clusters == 0).sum() + 1


def test_folders_have_the_names(finished, curate, tmp_path):
    curate()
    made = export.export(finished.run.uri, "folders", str(tmp_path / "out"))
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    numbers = {f"{k}" for k, name in enumerate(icce_ray.load(finished.run.uri).names) if not name}
    assert folders == {"cats", "dogs"} | numbers
    assert made.images == (finished.clusters != 4).sum()


def test_the_report_shows_the_names(finished, curate):
    curate()
    page = finished.run.read_bytes("curated", "report", "index.html").decode()
    assert ">cats</a>" in page and ">dogs</a>" in page
    again = report.build(finished.run.uri)
    assert again == finished.run.address("curated", "report", "index.html")


def test_a_new_answer_ends_the_curation_and_says_so(finished, curate, make_context):
    curate()
    context = make_context(finished)
    answer.run(context)
    assert "not curated any more" in context.reporter.events[0]
    assert not curated.is_curated(finished.run)
    assert finished.run.exists("curated", "edits.yaml")
    assert curation.undo(finished.run.uri)


def test_clusters_of_an_earlier_consensus_do_not_count(finished, curate):
    curate()
    finished.finish("consensus", len(finished.rows))
    assert curated.current(RunDirectory(finished.run.uri)).places == {}


def test_a_stop_in_between_leaves_the_own_clusters(finished, curate, monkeypatch):
    before = content(finished.run)
    curate()
    monkeypatch.setattr(method, "train_classifier", lambda *given, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        curate()
    assert content(finished.run) == before
    assert np.array_equal(icce_ray.load(finished.run.uri).clusters, finished.clusters)


def test_nothing_is_touched_by_wrong_edits_or_an_unfinished_run(finished, curate, tmp_path):
    before = content(finished.run)
    (tmp_path / "edits.yaml").write_text("drop: [7]\n")
    with pytest.raises(ConfigError, match="drop: there is no cluster 7"):
        curate()
    (tmp_path / "edits.yaml").write_text(EDITS)
    finished.run.delete_file("evaluation", "_manifest.json")
    with pytest.raises(ArtifactError, match="has no finished evaluation/"):
        curate()
    assert not Path(finished.run.path(curated.FOLDER)).exists()
    del before["evaluation/_manifest.json"]
    assert content(finished.run) == before


def test_the_command_needs_edits_or_undo(finished, capsys):
    for arguments in ([], ["edits.yaml", "--undo"]):
        with pytest.raises(SystemExit):
            cli.main(["curate", finished.run.uri, *arguments])
        assert "needs a file of edits, or --undo" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["curate", finished.run.uri, "--undo"])
    assert "nothing was curated" in capsys.readouterr().out


def test_the_description_of_the_classifier_says_the_names(finished, curate):
    curate()
    about = finished.run.read_json("curated", "classifier", "classifier.json")
    assert about["names"] == [*icce_ray.load(finished.run.uri).names, None]
    assert about["dropped"] == 4 and len(about["clusters"]) == 5
    assert pq.read_schema(finished.run.path("labels.parquet")).names[2] == "name"
