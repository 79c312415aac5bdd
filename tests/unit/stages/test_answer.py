"""The answer of a synthetic run, its task called in place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import icce_ray
from icce_ray import pipeline
from icce_ray.errors import ArtifactError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import LABELS_SCHEMA
from icce_ray.stages import answer


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
