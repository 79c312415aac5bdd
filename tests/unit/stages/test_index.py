"""Listing of images in every format, labels, and the checks before a run."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray import config as configs
from icce_ray.config.schema import Config, DataConfig
from icce_ray.data import embeddings, listing, tars
from icce_ray.data.labels import load_labels
from icce_ray.data.reading import read_many
from icce_ray.distributed.cluster import Cluster
from icce_ray.errors import ConfigError, DataError, IcceError
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.rundir.progress import Reporter
from icce_ray.rundir.schemas import INDEX_SCHEMA
from icce_ray.stages import index
from icce_ray.stages.base import Context
from icce_ray.stages.table import stage


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def rows(path: Path, **more: Any) -> list[dict[str, Any]]:
    return listing.list_images(DataConfig(path=str(path), **more)).table.to_pylist()


def make(tmp_path: Path, classes: int = 2, **data: Any) -> Config:
    tree = {"num_classes": classes, "run_dir": str(tmp_path / "run"), "data": data}
    return configs.load(tree)


def run_stage(config: Config) -> RunDirectory:
    run = RunDirectory(config.run_dir)
    outcome = index.run(Context(config, run, Reporter(run, quiet=True), Cluster()))
    manifest = Manifest("index", "x", {}, {}, outcome.rows, 0.0, outcome.results)
    run.finish("index", manifest)
    return run


# --- folders -------------------------------------------------------------------------------------


def test_flat_folder(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a.JPG", "é.webp", "c d.jpeg", "notes.txt", ".hidden.png", "x.tiff")
    found = rows(tmp_path)
    names = [row["uri"].removeprefix(f"{tmp_path}/") for row in found]
    assert names == ["a.JPG", "b.png", "c d.jpeg", "x.tiff", "é.webp"]
    assert [row["image_id"] for row in found] == [0, 1, 2, 3, 4]
    assert {row["label"] for row in found} == {None}


def test_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "cat/deep/2.png", "dog/1.png", ".cache/3.png", "dog/.x/4.png")
    assert [row["label"] for row in rows(tmp_path)] == ["cat", "cat", "dog"]


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.png", "outside/b.png", "outside/c.png")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "in" / "file.png").symlink_to(tmp_path / "outside" / "b.png")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "broken.png").symlink_to(tmp_path / "none")
    names = [row["uri"].removeprefix(f"{tmp_path}/in/") for row in rows(tmp_path / "in")]
    assert names == ["a.png", "file.png", "folder/b.png", "folder/c.png"]


@pytest.mark.parametrize("extra", ["top.png", None])
def test_folders_that_are_no_classes(tmp_path: Path, extra: str | None) -> None:
    touch(tmp_path, "one/1.png", "one/2.png", *([f"two/{extra}", extra] if extra else []))
    assert {row["label"] for row in rows(tmp_path)} == {None}


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("Train",), ("training", "dev")])
def test_class_folders_below_splits(tmp_path: Path, splits: tuple[str, ...]) -> None:
    touch(tmp_path, *(f"{split}/{c}/1.png" for split in splits for c in ("cat", "dog")))
    assert [row["label"] for row in rows(tmp_path)] == ["cat", "dog"] * len(splits)
    touch(tmp_path, f"{splits[0]}/flat.png")
    assert {row["label"] for row in rows(tmp_path)} == {None}


def test_a_class_may_be_named_as_a_split(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "car/1.png")
    assert [row["label"] for row in rows(tmp_path)] == ["car", "train", "train"]


def test_single_file_and_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.png", "in/b.png", "in/c.png")
    monkeypatch.chdir(tmp_path)
    assert [row["uri"] for row in rows(Path("a.png"))] == [str(tmp_path / "a.png")]
    assert len(rows(Path("in"))) == 2
    assert rows(Path("in/"))[0]["uri"] == str(tmp_path / "in" / "b.png")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        rows(tmp_path / "none")
    with pytest.raises(DataError, match=r"Looked for folder: \.jpg.*parquet"):
        rows(tmp_path)
    touch(tmp_path, "a.txt", "b.tar.gz")
    with pytest.raises(DataError, match=r"2 files ending in \.gz, \.txt .*unpacked"):
        rows(tmp_path)


def test_mixtures_need_a_format(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="several kinds"):
        rows(tmp_path)
    assert len(rows(tmp_path, format="folder")) == 1
    assert rows(tmp_path, format="parquet")[0]["uri"] == f"{tmp_path}/b.parquet#0"


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.png")).touch()
    with pytest.raises(DataError, match="UTF-8"):
        rows(tmp_path)


def test_limit_is_spread_evenly(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{i:02d}.png" for c in "abcde" for i in range(20)))
    found = rows(tmp_path, limit=10)
    assert [row["image_id"] for row in found] == list(range(10))
    assert [row["label"] for row in found] == [c for c in "abcde" for _ in range(2)]
    assert len(rows(tmp_path, limit=1000)) == 100


def test_evenly_is_increasing_and_distinct() -> None:
    for total in (1, 2, 7, 100):
        for limit in range(1, total + 1):
            chosen = listing.evenly(total, limit)
            assert len(chosen) == limit and (np.diff(chosen) > 0).all()
            assert chosen[0] == 0 and chosen[-1] < total


# --- Parquet and tars ----------------------------------------------------------------------------


def test_parquet(tmp_path: Path) -> None:
    for number, count in enumerate((3, 2)):
        images = [{"bytes": f"{number}-{i}".encode(), "path": None} for i in range(count)]
        table = pa.table({"image": images, "label": list(range(number * 10, number * 10 + count))})
        pq.write_table(table, tmp_path / f"part-{number}.parquet", row_group_size=2)
    found = rows(tmp_path)
    assert [row["label"] for row in found] == ["0", "1", "2", "10", "11"]
    assert read_many([row["uri"] for row in found]) == [b"0-0", b"0-1", b"0-2", b"1-0", b"1-1"]


def test_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"img": [b"a", b"b"], "label": ["u", None], "n": [1, 2]}), path)
    with pytest.raises(DataError, match=r"'n' is of type int64"):
        rows(path, image_column="n")
    assert rows(path) == (found := rows(path, image_column="img")), "the only column of bytes"
    assert read_many([row["uri"] for row in found]) == [b"a", b"b"]
    assert [row["label"] for row in found] == ["u", None]
    pq.write_table(pa.table({"img": [b"a"], "mask": [b"b"]}), tmp_path / "two.parquet")
    with pytest.raises(DataError, match=r"'image' does not exist.*data\.image_column=img"):
        rows(tmp_path / "two.parquet")
    pq.write_table(pa.table({"clip": [[1.0, 2.0]]}), tmp_path / "lists.parquet")
    with pytest.raises(DataError, match=r"embeddings are given as data\.embeddings="):
        rows(tmp_path / "lists.parquet")
    (tmp_path / "y.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"y\.parquet cannot be read"):
        rows(tmp_path / "y.parquet")


def test_columns_of_labels_that_are_none(tmp_path: Path) -> None:
    png, count = b"\x89PNG\r\n\x1a\n", 100
    columns: dict[str, list[Any]] = {
        "mask": [png] * count,
        "struct": [{"bytes": png, "path": "a"}] * count,
        "late": [b"cat"] * (count - 1) + [png],
        "tensor": [[1, 2]] * count,
    }
    for name, values in columns.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"image": [b"x"] * count, "label": values}), path)
        listed = listing.list_images(DataConfig(path=str(path)))
        assert listed.found == listed.table["label"].null_count == count
        assert f"1 columns 'label' that hold no plain labels ({path})" in str(listed.left)


def test_columns_of_labels_with_gaps(tmp_path: Path) -> None:
    nan = float("nan")
    for values, wanted in (
        ([1.0, nan, 0.0, None], ["1", None, "0", None]),
        ([b"cat", None, b"dog", b""], ["cat", None, "dog", ""]),
        (["nan", "naan", None, "nan"], ["nan", "naan", None, "nan"]),
    ):
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"image": [b"x"] * 4, "label": values}), path)
        assert [row["label"] for row in rows(path)] == wanted


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset(tmp_path: Path) -> None:
    long = "folder/" + "k" * 150
    write_tar(tmp_path / "1.tar", [("b.jpg", b"BB"), ("b.cls", b"7\n"), ("b.seg.png", b"no")])
    write_tar(tmp_path / "0.tar", [("a.cls", b"3"), (f"{long}.png", b"LLL"), ("a.jpg", b"A")])
    found = rows(tmp_path)
    names = [f"{tmp_path}/0.tar#{long}.png", f"{tmp_path}/0.tar#a.jpg", f"{tmp_path}/1.tar#b.jpg"]
    assert [row["uri"] for row in found] == names
    assert [row["label"] for row in found] == [None, "3", "7"]
    columns = ([row[key] for row in found] for key in ("uri", "offset", "size"))
    assert read_many(*columns) == [b"LLL", b"A", b"BB"]


def test_streamed_tars_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an object store's are read."""
    write_tar(
        tmp_path / "1.tar", [(f"{i}.{s}", b"x" * i) for i in range(9) for s in ("jpg", "cls")]
    )
    sought = rows(tmp_path)
    monkeypatch.setattr(tars.pafs, "LocalFileSystem", type(None))
    assert listing._tar_file(str(tmp_path / "1.tar"))[0].to_pylist() == [
        {k: v for k, v in row.items() if k != "image_id"} for row in sought
    ]


def test_tar_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, [("a.jpg", b"1"), ("a.jpg", b"2")])
    with pytest.raises(DataError, match=r"more than once.*x\.tar#a\.jpg"):
        rows(path)
    write_tar(path, [("readme.txt", b"1")])
    with pytest.raises(DataError, match="members KEY"):
        rows(path)
    path.write_bytes(b"nonsense" * 200)
    with pytest.raises(DataError, match="cannot be read as a tar"):
        rows(path)


@pytest.mark.parametrize("streamed", [False, True])
def test_hostile_tars_write_nothing_and_name_nothing_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("../../up.png", str(tmp_path / "absolute.png")):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"mine"))
        for name, kind in (("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("up.cls", "huge.png"):  # they claim ten terabytes
            info = tarfile.TarInfo(name)
            info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**13)}
            tar.addfile(info)
    if streamed:
        monkeypatch.setattr(tars.pafs, "LocalFileSystem", type(None))
    found = tars.scan(str(path))
    names = ["../../up.png", str(tmp_path / "absolute.png")]
    assert [uri.partition("#")[2].lstrip("/") for uri in found.uris] == [
        name.lstrip("/") for name in names
    ]
    assert found.labels == [None, None]
    assert read_many(found.uris, found.offsets, found.sizes) == [b"mine", b"mine"]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["x.tar"]


# --- the stage -----------------------------------------------------------------------------------


def test_stage_writes_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "ROWS_PER_FILE", 4)
    touch(tmp_path / "images", *(f"{c}/{i}.png" for c in "abc" for i in range(3)))
    config = make(tmp_path, path=str(tmp_path / "images"))
    run = run_stage(config)
    assert len(run.list("index", ".parquet")) == 3
    table = run.read_table("index")
    assert table.schema.equals(INDEX_SCHEMA)
    assert table["image_id"].to_pylist() == list(range(9))
    found = load_labels(config, run)
    assert found is not None
    assert found[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and found[1] == ["a", "b", "c"]
    none = config.data.model_copy(update={"labels": "none"})
    assert load_labels(config.model_copy(update={"data": none}), run) is None


def test_the_stage_says_once_what_was_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "images", "a.png", "b.png", "c.txt", ".d")
    run = run_stage(make(tmp_path, path=str(tmp_path / "images")))
    done = run.manifest("index")
    assert done is not None and done.results["left_out"] == [
        {"reason": "hidden files and folders", "count": 1, "example": ".d"},
        {"reason": "files ending in .txt", "count": 1, "example": "c.txt"},
    ]
    line = "left out: 1 hidden files and folders (.d); 1 files ending in .txt (c.txt)"
    assert Path(run.path("log")).read_text().count(line) == 1


def test_more_classes_than_images(tmp_path: Path) -> None:
    touch(tmp_path / "images", "a.png", "b.png")
    with pytest.raises(ConfigError, match="num_classes=3"):
        run_stage(make(tmp_path, 3, path=str(tmp_path / "images")))


def test_labels_do_not_change_the_stage(tmp_path: Path) -> None:
    a = make(tmp_path, path="x", labels="none")
    b = make(tmp_path, path="x", labels="file.txt")
    assert stage("index").settings(a) == stage("index").settings(b)
    assert stage("index").settings(a) != stage("index").settings(make(tmp_path, path="x", limit=3))


# --- embeddings ----------------------------------------------------------------------------------


def test_embeddings(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.ones((5, 3), np.float32))
    run = run_stage(make(tmp_path, embeddings=str(tmp_path / "e.npy"), limit=2))
    assert run.read_table("index")["uri"].to_pylist() == [f"{tmp_path}/e.npy#{i}" for i in (0, 2)]


def test_parquet_embeddings_bring_addresses_and_labels(tmp_path: Path) -> None:
    table = pa.table(
        {"embedding": [[1.0, 2.0], [3.0, 4.0]], "uri": ["/a.png", "/b.png"], "label": [1, 0]}
    )
    pq.write_table(table, tmp_path / "e.parquet")
    run = run_stage(make(tmp_path, embeddings=str(tmp_path / "e.parquet")))
    assert run.read_table("index", columns=["uri", "label"]).to_pylist() == [
        {"uri": "/a.png", "label": "1"},
        {"uri": "/b.png", "label": "0"},
    ]


def test_labels_of_embeddings_may_be_nan(tmp_path: Path) -> None:
    table = {"embedding": [[1.0, 2.0]] * 4, "label": [0.0, 1.0, float("nan"), 1.0]}
    pq.write_table(pa.table(table), tmp_path / "e.parquet")
    config = make(tmp_path, embeddings=str(tmp_path / "e.parquet"))
    run = run_stage(config)
    done, found = run.manifest("index"), load_labels(config, run)
    assert done is not None and done.results["labeled"] == 3
    assert found is not None
    assert found[0].tolist() == [0, 1, -1, 1] and found[1] == ["0", "1"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(5), "N x D"),
        (np.ones((2, 2, 2)), "N x D"),
        (np.ones((0, 4)), "no numbers"),
        (np.array([["a", "b"]]), "N x D"),
        (np.array([[None, 1]], object), "N x D"),
    ],
)
def test_unsuitable_embeddings(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "e.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        index.preflight(make(tmp_path, embeddings=str(tmp_path / "e.npy")))


def test_ragged_and_missing_parquet_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    for column, values, message in (
        ("vector", [1.0], "no column 'embedding'"),
        ("vector", [["a"]], "no column 'embedding'"),
        ("embedding", [1.0, 2.0], "lists of numbers"),
        ("embedding", [["a"]], "lists of numbers"),
    ):
        pq.write_table(pa.table({column: values}), path)
        with pytest.raises(DataError, match=message):
            index.preflight(make(tmp_path, embeddings=str(path)))


def blocks(path: Path) -> list[np.ndarray]:
    return list(embeddings.open_vectors(str(path)).blocks(2))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0]] * 3 + [[1.0]] + [[1.0, 2.0]], r"row 3 \(from 0\) has 1 instead of 2"),
        ([[1.0, 2.0]] * 2 + [[1.0, 2.0, 3.0]] * 2, r"row 2 \(from 0\) has 3 instead of 2"),
        ([[1.0, 2.0]] * 4 + [None], r"row 4 \(from 0\) is null"),
        ([None, [1.0, 2.0]], r"row 0 \(from 0\) is null"),
        ([[1.0, 2.0], []], r"row 1 \(from 0\) has 0 instead of 2"),
    ],
)
def test_the_odd_row_is_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    for kind in (pa.list_(pa.float32()), pa.large_list(pa.float64())):
        table = pa.table({"embedding": pa.array(rows, kind)})
        pq.write_table(table, tmp_path / "e.parquet", row_group_size=2)
        with pytest.raises(DataError, match=message):
            blocks(tmp_path / "e.parquet")


def test_a_missing_row_of_a_fixed_size_is_named(tmp_path: Path) -> None:
    column = pa.array([[1.0, 2.0], [3.0, 4.0], None], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"embedding": column}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"row 2 \(from 0\) is null"):
        blocks(tmp_path / "e.parquet")


@pytest.mark.filterwarnings("error")
def test_numbers_too_large_for_float32_are_infinite(tmp_path: Path) -> None:
    values = [[1.0, 1e300], [-1e300, 2.0]]
    pq.write_table(pa.table({"embedding": values}), tmp_path / "e.parquet")
    np.save(tmp_path / "e.npy", np.array(values))
    for name in ("e.npy", "e.parquet"):
        (found,) = blocks(tmp_path / name)
        assert found.tolist() == [[1.0, np.inf], [-np.inf, 2.0]]


def test_embeddings_are_never_unpickled(tmp_path: Path, pickled: Any) -> None:
    path = tmp_path / "e.parquet"
    lists = pa.ListArray.from_arrays([0, 1, 2], pickled(2))
    pq.write_table(pa.table({"embedding": lists}), path)
    with pytest.raises(DataError, match="lists of numbers"):
        index.preflight(make(tmp_path, embeddings=str(path)))


# --- before a run --------------------------------------------------------------------------------


def test_preflight(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.ones((5, 3)))
    np.save(tmp_path / "l.npy", np.zeros(4, int))
    touch(tmp_path, "cut.npy")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "e.npy").read_bytes()[:200])
    given = str(tmp_path / "e.npy")
    index.preflight(make(tmp_path, 5, embeddings=given))
    index.preflight(make(tmp_path, path=str(tmp_path / "digits"), dataset="digits"))
    cases: list[tuple[Config, type[IcceError], str]] = [
        (make(tmp_path, path=str(tmp_path / "none")), DataError, r"data\.path=.*no such"),
        (
            make(tmp_path, embeddings=str(tmp_path / "none.npy")),
            DataError,
            r"data\.embeddings=.*no",
        ),
        (make(tmp_path, embeddings=str(tmp_path / "cut.npy")), DataError, "truncated"),
        (make(tmp_path, 6, embeddings=given), ConfigError, "num_classes=6"),
        (make(tmp_path, 4, embeddings=given, limit=3), ConfigError, "num_classes=4"),
        (make(tmp_path, embeddings=given, dataset="digits"), ConfigError, "leave it out"),
        (make(tmp_path, embeddings=given, labels="none.npy"), DataError, r"data\.labels=none\.npy"),
        (make(tmp_path, embeddings=given, labels=str(tmp_path / "l.npy")), DataError, "4 labels"),
        (make(tmp_path, path="data/cifar10", dataset="cifar10"), ConfigError, "cifar10/train"),
    ]
    for config, kind, message in cases:
        with pytest.raises(kind, match=message):
            index.preflight(config)
