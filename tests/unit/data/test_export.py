"""Exports of a synthetic run, read back as the tools read them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from icce_ray import cli
from icce_ray.config.schema import DataConfig
from icce_ray.data import export as exports
from icce_ray.data.listing import list_images
from icce_ray.data.places import FILES, MARK
from icce_ray.errors import ArtifactError, ConfigError
from icce_ray.stages import answer


@pytest.fixture
def answered(make_run, make_context):
    """answered(N, K, **options) -> a synthetic run with its answer."""

    def make(*size, **options):
        made = make_run(*size, **options)
        outcome = answer.run(make_context(made))
        inputs = {"consensus": made.run.manifest("consensus").id}
        made.finish(answer.FOLDER, outcome.rows, outcome.results, inputs=inputs)
        return made

    return make


def files(folder) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in Path(folder).rglob("*")
        if not path.is_dir() and path.name not in (MARK, FILES)
    )


def test_folders_are_called_by_the_words_that_were_suggested(answered, tmp_path):
    made = answered(40, 3)
    inputs = {"consensus": made.run.manifest("consensus").id}
    words = [[["cat", 0.6]], [["ice cream", 0.5]], [["cat", 0.4]]]
    made.finish(answer.FOLDER, 40, {"words": words}, inputs=inputs)
    exports.export(made.run.uri, "folders", str(tmp_path / "out"))
    names = ["cat 0", "ice cream", "cat 2"]
    for uri, cluster in zip(made.uris, made.clusters, strict=True):
        assert (tmp_path / "out" / names[cluster] / Path(uri).name).exists()


@pytest.mark.parametrize("copy", [False, True])
def test_folders_hold_the_images_of_their_clusters(answered, tmp_path, copy):
    made = answered(40, 11, bad=3)
    out = tmp_path / "out"
    found = exports.export(made.run.uri, "folders", str(out), copy=copy)
    expected = [
        f"{cluster:02d}/{Path(uri).name}"
        for uri, cluster in zip(made.uris[3:], made.clusters, strict=True)
    ]
    assert files(out) == sorted(expected) and found.images == 37 and not found.missing
    for uri, name in zip(made.uris[3:], expected, strict=True):
        path = out / name
        assert path.is_symlink() is not copy
        assert path.read_bytes() == Path(uri).read_bytes()


def test_only_what_is_asked_for(answered, tmp_path):
    made = answered(60, 4, bad=2)
    for kind in exports.KINDS:
        out = tmp_path / kind
        found = exports.export(made.run.uri, kind, str(out), clusters=[1, 3], min_confidence=0.8)
        expected = np.isin(made.clusters, [1, 3]) & (made.confidence >= 0.8)
        assert found.images == expected.sum() > 0, kind


def test_a_name_that_is_there_twice_gets_a_number(answered, tmp_path):
    """Folders of the same file names, as cameras write them; a link of one must not hide others."""
    made = answered(12, 2, file_name="IMG_{:05d}.png")
    same = []
    for number, uri in enumerate(made.uris):
        new = Path(uri).parent / str(number) / ["a.png", "A.PNG", "a.jpg"][number % 3]
        new.parent.mkdir()
        Path(uri).rename(new)
        same.append(str(new))
    index = made.run.read_table("index", "index.parquet")
    made.run.write_table(index.set_column(1, "uri", pa.array(same)), "index", "index.parquet")
    made.finish("index", 12)
    labels = pq.read_table(made.run.path("labels.parquet"))
    made.run.write_table(labels.set_column(0, "uri", pa.array(same)), "labels.parquet")
    for kind, folder in (("folders", "*"), ("fiftyone", "data")):
        out = tmp_path / kind
        exports.export(made.run.uri, kind, str(out))
        paths = [path for path in out.glob(f"{folder}/*") if path.is_symlink()]
        assert sorted(str(path.resolve()) for path in paths) == sorted(same), kind
        assert len({(path.parent, path.stem.casefold()) for path in paths}) == 12


def test_csv_is_that_of_the_run_without_the_rest(answered, tmp_path):
    made = answered(30, 3, bad=2)
    exports.export(made.run.uri, "csv", str(tmp_path / "all"))
    whole = (tmp_path / "all" / "labels.csv").read_bytes()
    assert whole == made.run.read_bytes("labels.csv")
    exports.export(made.run.uri, "csv", str(tmp_path / "some"), clusters=[2])
    some = pa.csv.read_csv(tmp_path / "some" / "labels.csv")
    assert set(some["cluster"].to_pylist()) == {2}


def test_coco_boxes_are_the_images(answered, tmp_path):
    made = answered(20, 3)
    exports.export(made.run.uri, "coco", str(tmp_path / "out"))
    content = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [one["name"] for one in content["categories"]] == ["0", "1", "2"]
    by_id = {one["id"]: one for one in content["images"]}
    assert len(by_id) == len(content["annotations"]) == 20
    for one, uri, cluster in zip(content["annotations"], made.uris, made.clusters, strict=True):
        image = by_id[one["image_id"]]
        assert image["file_name"] == Path(uri).name and one["category_id"] == cluster + 1
        with Image.open(tmp_path / "out" / "images" / image["file_name"]) as picture:
            assert one["bbox"] == [0, 0, *picture.size] == [0, 0, image["width"], image["height"]]


def test_fiftyone_finds_each_label_by_the_stem(answered, tmp_path):
    made = answered(20, 3)
    exports.export(made.run.uri, "fiftyone", str(tmp_path / "out"))
    content = json.loads((tmp_path / "out" / "labels.json").read_text())
    names = {path.stem: path for path in (tmp_path / "out" / "data").iterdir()}
    assert set(names) == set(content["labels"])
    expected = dict(zip(made.uris, made.clusters.tolist(), strict=True))
    for stem, path in names.items():
        cluster = content["labels"][stem]
        assert expected[str(path.resolve())] == cluster and content["classes"][cluster]


def test_label_studio_tasks_fit_their_configuration(answered, tmp_path):
    made = answered(20, 3, file_name="{:05d} %20 ü.png")
    exports.export(made.run.uri, "label-studio", str(tmp_path / "out"))
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text())
    view = ElementTree.parse(tmp_path / "out" / "labels.xml").getroot()
    choices = view.find("Choices")
    image = view.find("Image")
    assert choices is not None and image is not None
    values = [one.get("value") for one in choices]
    for task, uri, cluster in zip(tasks, made.uris, made.clusters, strict=True):
        address = urlsplit(task["data"][image.get("value", "")[1:]])
        assert address.path == "/data/local-files/"
        assert "/" + parse_qs(address.query)["d"][0] == uri
        result = task["predictions"][0]["result"][0]
        assert (result["from_name"], result["to_name"]) == (choices.get("name"), image.get("name"))
        assert result["value"]["choices"] == [values[cluster]] == [str(cluster)]
    assert files(tmp_path / "out") == ["labels.xml", "tasks.json"]
    exports.export(made.run.uri, "label-studio", str(tmp_path / "out"), copy=True)
    assert len(files(tmp_path / "out")) == 2 + 20


def test_imagefolder_names_every_file_and_its_label(answered, tmp_path):
    made = answered(20, 3)
    exports.export(made.run.uri, "imagefolder-hf", str(tmp_path / "out"))
    train = tmp_path / "out" / "train"
    rows = pa.csv.read_csv(train / "metadata.csv").to_pylist()
    assert sorted(row["file_name"] for row in rows) == [
        name for name in files(train) if name != "metadata.csv"
    ]
    for row, uri, cluster in zip(rows, made.uris, made.clusters, strict=True):
        assert (train / row["file_name"]).resolve() == Path(uri)
        assert str(row["label"]) == str(cluster)


def relist(made, data: DataConfig) -> None:
    """Give the images of a run the addresses of others."""
    table = list_images(data).table
    made.run.write_table(table, "index", "index.parquet")
    labels = pq.read_table(made.run.path("labels.parquet"))
    made.run.write_table(labels.set_column(0, "uri", table["uri"]), "labels.parquet")


def test_rows_and_members_are_copied_with_an_ending(answered, tmp_path):
    made = answered(8, 2)
    encoded = [Path(uri).read_bytes() for uri in made.uris]
    pq.write_table(pa.table({"image": encoded}), tmp_path / "photos.parquet")
    relist(made, DataConfig(path=str(tmp_path / "photos.parquet")))
    exports.export(made.run.uri, "folders", str(tmp_path / "rows"))
    names = files(tmp_path / "rows")
    assert sorted(Path(name).name for name in names) == [f"photos-{k}.png" for k in range(8)]
    assert not (tmp_path / "rows" / names[0]).is_symlink()

    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for number, data in enumerate(encoded):
            member = tarfile.TarInfo(f"../../{number}/x.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    relist(made, DataConfig(path=str(tmp_path / "photos.tar")))
    before = set(tmp_path.parent.iterdir())
    found = exports.export(made.run.uri, "folders", str(tmp_path / "members"))
    assert found.images == 8 and set(tmp_path.parent.iterdir()) == before
    contents = {(tmp_path / "members" / name).read_bytes() for name in files(tmp_path / "members")}
    assert contents == set(encoded)


def test_what_has_vanished_is_counted_and_said(answered, tmp_path, capsys):
    made = answered(20, 2)
    for uri in made.uris[:3]:
        Path(uri).unlink()
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        cli.main(["export", made.run.uri, f"out={out}"])
    said = capsys.readouterr()
    assert not end.value.code and said.out == f"exported 17 images to {out}\n"
    assert said.err == f"! 3 images were left out, the first is {made.uris[0]}: not found\n"
    assert len(files(out)) == 17


def test_the_same_export_again_replaces_the_first(answered, tmp_path):
    made = answered(30, 3)
    out = tmp_path / "out"
    exports.export(made.run.uri, "folders", str(out))
    (out / "mine.txt").touch()
    exports.export(made.run.uri, "coco", str(out), clusters=[0])
    names = files(out)
    assert {name.split("/")[0] for name in names} == {"images", "annotations.json", "mine.txt"}
    assert len(names) == 2 + (made.clusters == 0).sum()


def test_an_export_among_the_images_is_no_image_of_the_next_run(answered):
    made = answered(20, 2)
    before = list_images(DataConfig(path=made.config.data.path)).table["uri"]
    exports.export(made.run.uri, "folders", f"{made.config.data.path}/sorted")
    found = list_images(DataConfig(path=made.config.data.path))
    assert found.table["uri"].equals(before) and "sorted/" in str(found.left)


def test_the_usual_folder_lies_in_the_run(answered, capsys):
    made = answered(20, 2)
    with pytest.raises(SystemExit):
        cli.main(["export", made.run.uri, "--to", "csv", "--clusters", "0, 1"])
    assert f"to {made.run.uri}/exports/csv\n" in capsys.readouterr().out
    assert files(f"{made.run.uri}/exports/csv") == ["labels.csv"]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (["--to", "zip"], ConfigError, "no export to 'zip'; there are folders, csv"),
        (["--clusters", "3,x"], ConfigError, "--clusters=3,x must be numbers of clusters"),
        (["--clusters", "9"], ConfigError, "there is no cluster 9: they go from 0 to 1"),
        (["--min-confidence", "2"], ConfigError, "min_confidence=2 must lie between 0 and 1"),
        (["out=s3://bucket/x"], ConfigError, "must be a local folder"),
        (["seed=1"], ConfigError, "seed=1: export takes out=FOLDER only"),
        (["out=images"], ArtifactError, "holds other files"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    answered, tmp_path, capsys, monkeypatch, options, kind, message
):
    made = answered(20, 2)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        cli.main(["export", made.run.uri, *options])
    assert end.value.code == kind.exit_code
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_of_embeddings_has_labels_only(answered, tmp_path):
    made = answered(20, 2, images=False)
    with pytest.raises(ConfigError, match="it has no images"):
        exports.export(made.run.uri, "folders", str(tmp_path / "out"))
    assert exports.export(made.run.uri, "csv", str(tmp_path / "out")).images == 20
