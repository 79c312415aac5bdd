"""What a finished run gives in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import icce_ray
from icce_ray.core.classifier import model
from icce_ray.errors import ArtifactError, ConfigError, DataError
from icce_ray.rundir import schemas


@pytest.fixture
def finished(make_run: Any) -> Any:
    """A run of 60 images, of which the first two could not be read."""
    made = make_run(60, 3, bad=2)
    head = model.Classifier("linear", 32, 3)
    head.out.weight.data.normal_(generator=None)
    weights, description = model.save(head)
    made.run.write_bytes(weights, "classifier", "classifier.safetensors")
    made.run.write_json(description, "classifier", "classifier.json")
    return made


def answer(made: Any) -> None:
    """labels.parquet, as the stage `answer` writes it."""
    rows = [{"uri": uri, "cluster": -1, "reason": "truncated"} for uri in made.uris[:2]]
    for uri, cluster, sure in zip(made.uris[2:], made.clusters, made.confidence, strict=True):
        rows.append({"uri": uri, "cluster": int(cluster), "confidence": float(sure)})
    table = pa.Table.from_pylist(rows, schema=schemas.LABELS_SCHEMA)
    made.run.write_table(table, "labels.parquet")
    made.finish("answer", 58, inputs={"consensus": made.run.manifest("consensus").id})


def test_a_finished_run_is_read_back(finished: Any) -> None:
    found = icce_ray.load(Path(finished.run.uri))
    assert found.clusters.dtype == np.int32
    assert found.clusters.tolist() == finished.clusters.tolist()
    assert found.confidence.tolist() == finished.confidence.tolist()
    assert found.uris == finished.uris[2:]
    assert np.array_equal(found.embeddings, finished.features)
    new = found.predict(finished.features)
    expected = finished.features.astype(np.float32) @ found.classifier.out.weight.detach().numpy().T
    assert (new["cluster"] == expected.argmax(1)).mean() > 0.95
    assert list(new) == ["cluster", "name", "confidence"] and len(new) == 58
    with pytest.raises(DataError, match="takes 32"):
        found.predict(np.ones((2, 5)))
    with pytest.raises(DataError, match="embeddings are empty"):
        found.predict(np.ones((0, 32)))


def test_labels_are_a_data_frame_of_all_images(finished: Any) -> None:
    with pytest.raises(ArtifactError, match="no finished answer/"):
        _ = icce_ray.load(finished.run.uri).labels
    answer(finished)
    found = icce_ray.load(finished.run.uri)
    assert found.labels["uri"].tolist() == finished.uris
    assert found.labels["cluster"].tolist() == [-1, -1, *finished.clusters.tolist()]
    assert found.labels["reason"].notna().sum() == 2
    assert found.labels.groupby("cluster").size().sum() == 60


def test_a_cluster_shows_the_images_that_it_is_most_sure_of(finished: Any) -> None:
    found = icce_ray.load(finished.run.uri)
    shown = found.show(1, n=3)
    inside = np.flatnonzero(finished.clusters == 1)
    best = inside[np.argsort(-finished.confidence[inside])][:3]
    title, *lines = repr(shown).splitlines()
    assert title == f"cluster 1: {len(inside)} images"
    assert [line.split()[-1] for line in lines] == [finished.uris[row + 2] for row in best]
    html = shown._repr_html_()
    assert html.count('<img src="data:image/') == 3
    places = [html.index(finished.uris[row + 2]) for row in best]
    assert places == sorted(places)
    assert repr(found.show(1, n=1000)).count("\n") == len(inside)


def test_an_image_that_is_gone_shows_its_name(finished: Any) -> None:
    found = icce_ray.load(finished.run.uri)
    for uri in finished.uris:
        Path(uri).unlink()
    html = found.show(0, n=2)._repr_html_()
    assert "<img" not in html and html.count(".png</div>") == 2


@pytest.mark.parametrize(
    ("cluster", "n", "message"),
    [
        (3, 5, "there is no cluster 3: they go from 0 to 2"),
        (-1, 5, "there is no cluster -1"),
        (1.5, 5, "there is no cluster 1.5"),
        ("cats", 5, "there is no cluster 'cats': none has a name"),
        (0, 0, "n=0 must be at least 1"),
    ],
)
def test_a_cluster_that_is_not_there_is_named(
    finished: Any, cluster: int | str, n: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        icce_ray.load(finished.run.uri).show(cluster, n)


def test_a_report_is_shown_and_named(finished: Any) -> None:
    found = icce_ray.load(finished.run.uri)
    with pytest.raises(ArtifactError, match="no finished report/"):
        _ = found.report
    finished.run.write_bytes(b'<p title="a">&lt;</p>', "report", "index.html")
    finished.finish("report", 3)
    assert repr(found.report) == finished.run.address("report", "index.html")
    html = found.report._repr_html_()
    assert 'srcdoc="&lt;p title=&quot;a&quot;&gt;&amp;lt;&lt;/p&gt;"' in html
    assert 'sandbox="allow-scripts' in html and "allow-same-origin" not in html
