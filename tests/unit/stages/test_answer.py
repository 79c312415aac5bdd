"""The answer of a synthetic run, its task called in place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

import icce_ray
from icce_ray import pipeline
from icce_ray.core.words import Word
from icce_ray.data import naming
from icce_ray.errors import ArtifactError, ConfigError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import LABELS_SCHEMA
from icce_ray.stages import answer, table


@pytest.fixture
def answered(make_context):
    """answered(made) -> the run with its answer, finished as the pipeline does it."""

    def finish(made):
        outcome = answer.run(make_context(made))
        inputs = {"consensus": made.run.manifest("consensus").id}
        made.finish(answer.FOLDER, outcome.rows, outcome.results, inputs=inputs)
        return outcome

    return finish


def test_every_image_of_the_index_has_a_row(make_run, answered):
    made = make_run(60, 3, bad=4)
    answered(made)
    table = icce_ray.load(made.run.uri).table
    assert table.schema == LABELS_SCHEMA
    rows = table.to_pylist()
    assert [row["uri"] for row in rows] == made.uris
    assert [row["cluster"] for row in rows] == [-1] * 4 + made.clusters.tolist()
    assert [row["confidence"] for row in rows[4:]] == made.confidence.tolist()
    assert {row["reason"] for row in rows[:4]} == {"truncated", "cannot identify image file"}
    for row in rows[:4]:
        assert row["confidence"] is row["second_choice"] is row["outlier"] is row["duplicate_of"]
    for row in rows[4:]:
        assert row["reason"] is row["name"] is None
        assert row["second_choice"] in {None, 0, 1, 2} - {row["cluster"]}
        assert 0 <= row["outlier"] <= 1
    assert any(row["second_choice"] is not None for row in rows)


def test_the_csv_holds_the_same(make_run, answered):
    made = make_run(30, 3, bad=2, file_name='{:03d}, "ü\n.png')
    answered(made)
    path = made.run.path("labels.csv")
    options = pa.csv.ParseOptions(newlines_in_values=True)
    read = pa.csv.read_csv(path, parse_options=options)
    assert read.column_names == LABELS_SCHEMA.names
    assert read["uri"].to_pylist() == made.uris
    assert read["cluster"].to_pylist() == [-1, -1, *made.clusters.tolist()]
    assert read["confidence"].to_pylist()[:2] == [None, None]


def test_copies_name_the_first_image_by_its_address(make_run, answered):
    """Row r is image r + 3 here: row numbers would name other images."""
    made = make_run(40, 2, bad=3)
    features = np.array(made.features)
    features[[20, 30]] = features[5]
    made.write_embeddings(features)
    outcome = answered(made)
    table = icce_ray.load(made.run.uri).table
    copied = table["duplicate_of"].to_pylist()
    assert copied[23] == copied[33] == made.uris[8]
    assert outcome.results["duplicates"] == sum(one is not None for one in copied) == 2


def test_every_folder_of_rows_is_read_by_pandas(make_run, answered):
    """What is no table there begins with an underscore, which readers skip."""
    pandas = pytest.importorskip("pandas")
    made = make_run(40, 4, bad=2)
    answered(made)
    folders = [stage.folder for stage in pipeline.STAGES]
    others = {"classifier", "evaluation", "report"}
    assert others < set(folders)
    for folder in sorted(set(folders) - others):
        frame = pandas.read_parquet(made.run.path(folder))
        assert len(frame) == made.run.manifest(folder).rows, folder
        assert "image_id" in frame
    frame = pandas.read_parquet(made.run.path("embeddings"))
    assert np.array_equal(np.stack(frame["embedding"]), made.features)


def test_an_answer_of_another_consensus_is_refused(make_run, answered):
    made = make_run(30, 3)
    with pytest.raises(ArtifactError, match="no finished answer/"):
        _ = icce_ray.load(made.run.uri).table
    answered(made)
    made.finish("consensus", 30)
    with pytest.raises(ArtifactError, match="of an earlier consensus"):
        _ = icce_ray.load(made.run.uri).table


def test_artifacts_of_another_run_are_refused(make_run, make_context):
    made = make_run(30, 3)
    table = made.run.read_table("consensus", "consensus.parquet")
    made.run.write_table(table.slice(0, 20), "consensus", "consensus.parquet")
    made.finish("consensus", 20)
    with pytest.raises(ArtifactError, match="different runs"):
        answer.run(make_context(made))


def test_a_run_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path):
    """Its manifests lie under another name."""
    old = {"stage": "consensus", "fingerprint": "f", "settings": {}, "inputs": {}, "rows": 1}
    (tmp_path / "consensus").mkdir()
    text = json.dumps({**old, "seconds": 1.0, "format": 3})
    (tmp_path / "consensus/manifest.json").write_text(text)
    run = RunDirectory(str(tmp_path))
    for look in (run.look, run.manifest):
        with pytest.raises(ArtifactError, match=r"another version .*format 3; this one reads 4"):
            look("consensus")
    (tmp_path / "consensus/manifest.json").write_text('{"a file": "of the user"}')
    assert run.manifest("consensus") is run.look("consensus").manifest is None


def test_the_answer_survives_the_report_and_not_the_consensus(make_run):
    made = make_run(30, 3)
    before = pipeline.fingerprints(made.config)
    update = made.config.report.model_copy(update={"images_per_cluster": 3})
    shown = pipeline.fingerprints(made.config.model_copy(update={"report": update}))
    assert shown["answer"] == before["answer"] and shown["report"] != before["report"]
    update = made.config.consensus.model_copy(update={"method": "mcla"})
    merged = pipeline.fingerprints(made.config.model_copy(update={"consensus": update}))
    assert merged["answer"] != before["answer"]


def test_parquet_holds_plain_columns(make_run, answered):
    made = make_run(30, 3)
    answered(made)
    assert pq.read_schema(made.run.path("labels.parquet")).names == LABELS_SCHEMA.names


# --- names in words ------------------------------------------------------------------------------

WORDS = [[Word("cat", 0.6), Word("kitten", 0.1)], [Word("dog", 0.5)], []]


@pytest.fixture
def worded(monkeypatch, answered):
    """worded(made) -> the run with its answer, where a text tower has words for its clusters."""
    monkeypatch.setattr(naming, "lacks", lambda config: "")
    monkeypatch.setattr(naming, "by_vocabulary", lambda *_: WORDS)
    return answered


def test_words_are_names_where_nobody_gave_one(make_run, worded):
    made = make_run(60, 3, bad=4)
    outcome = worded(made)
    assert outcome.results["words"] == WORDS
    rows = icce_ray.load(made.run.uri).table.to_pylist()
    names = {0: "cat", 1: "dog", 2: None, -1: None}
    assert [row["name"] for row in rows] == [names[row["cluster"]] for row in rows]
    assert icce_ray.load(made.run.uri).names == ["cat", "dog", None]


def test_words_of_an_earlier_consensus_are_no_names(make_run, worded):
    made = make_run(60, 3)
    worded(made)
    made.finish("consensus", 60)
    assert icce_ray.load(made.run.uri).names == [None] * 3


def test_words_that_cannot_be_had_cost_no_answer(make_run, make_context, monkeypatch):
    def fail(*_):
        raise ConfigError("the text tower of x cannot be had")

    monkeypatch.setattr(naming, "lacks", lambda config: "")
    monkeypatch.setattr(naming, "by_vocabulary", fail)
    made = make_run(60, 3)
    context = make_context(made)
    outcome = answer.run(context)
    assert outcome.rows == 60 and outcome.results["words"] == []
    assert context.reporter.events == ["no names in words: the text tower of x cannot be had"]


def test_a_backbone_without_texts_is_named_in_one_line(make_run, make_context):
    made = make_run(60, 3)
    context = make_context(made)
    assert answer.run(context).results["words"] == []
    assert not context.reporter.events
    log = made.run.read_bytes("log").decode()
    assert f"no names in words: {made.config.backbone[0].name} has no text tower" in log


def test_a_function_of_the_user_gets_the_surest_images(make_run, make_context, monkeypatch):
    """Images are of one color each, so the function can say which ones it saw."""
    made = make_run(60, 3, bad=2, overrides=["answer.namer=mine:name"])
    seen = []

    def name(images):
        seen.append([image.getpixel((0, 0)) for image in images])
        if len(seen) == 2:
            raise ValueError("no idea")
        return f"name {len(seen)}"

    monkeypatch.setattr(naming, "namer", lambda setting: name)
    context = make_context(made)
    outcome = answer.run(context)
    assert outcome.results["words"] == [[Word("name 1", None)], [], [Word("name 3", None)]]
    assert context.reporter.events == [
        "answer.namer failed for 1 of 3 clusters; the first is cluster 1: ValueError: no idea"
    ]
    for cluster, colors in enumerate(seen):
        rows = np.flatnonzero(made.clusters == cluster)
        best = rows[np.argsort(-made.confidence[rows], kind="stable")][: answer.SHOWN]
        uris = [made.uris[made.rows[row]] for row in best]
        assert colors == [Image.open(uri).getpixel((0, 0)) for uri in uris]


def test_a_function_that_is_gone_costs_no_answer(make_run, make_context):
    """As where clusters are edited in another working directory than the run's."""
    made = make_run(30, 3, overrides=["answer.namer=no_such_module:name"])
    context = make_context(made)
    assert answer.run(context).results["words"] == []
    (event,) = context.reporter.events
    assert event.startswith("no names in words: answer.namer=no_such_module:name cannot be")


def test_what_names_are_taken_from_changes_the_answer_alone(make_run):
    """And only where it was chosen: earlier runs stay finished."""
    made = make_run(30, 3)
    before = pipeline.fingerprints(made.config)
    update = made.config.answer.model_copy(update={"vocabulary": "none"})
    after = pipeline.fingerprints(made.config.model_copy(update={"answer": update}))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"answer", "report"}
    assert made.config.answer.vocabulary == "auto"
    assert table.stage("answer").settings(made.config) == {"seed": made.config.seed}
